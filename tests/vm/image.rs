//! The machine's initramfs: busybox, some of the host's tools with their libraries, kernel modules, and our binaries.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use holdfast_tests::process::run;
use holdfast_tests::work::binaries_dir;

use crate::guest;
use crate::machine::kernel_dir;

/// Tools of the host, where Debian puts them.
const TOOLS: [&str; 7] = [
    "/usr/sbin/mkfs.ext4",
    "/usr/sbin/e2fsck",
    "/usr/sbin/dmsetup",
    "/usr/sbin/nbd-client",
    "/usr/bin/mount",
    "/usr/bin/umount",
    "/usr/sbin/blockdev",
];
/// Modules in the order of loading, with their parameters; below the package's `kernel/drivers`.
const MODULES: [(&str, &str); 6] = [
    // Disks in memory, in KiB each.
    ("block/brd", "rd_nr=3 rd_size=262144"),
    ("block/loop", ""),
    ("block/nbd", "nbds_max=2"),
    ("block/ublk_drv", ""),
    ("md/dm-mod", ""),
    ("md/dm-log-writes", ""),
];

/// Makes the tree below `root` and packs it.
pub fn make(root: &Path, packed: &Path) -> Result<PathBuf> {
    for folder in ["bin", "proc", "sys", "dev", "run", "tmp", "mnt", "pool", "etc", "modules"] {
        fs::create_dir_all(root.join(folder))?;
    }
    install(root, Path::new("/bin/busybox"), "bin/busybox")?;
    let mut libraries = BTreeSet::new();
    for tool in TOOLS {
        let name =
            Path::new(tool).file_name().context("a tool without a name")?.to_string_lossy().into_owned();
        install(root, Path::new(tool), &format!("bin/{name}"))?;
        libraries.extend(libraries_of(Path::new(tool))?);
    }
    let ours =
        [(binaries_dir()?.join("holdfast-csi"), "holdfast-csi"), (std::env::current_exe()?, "vm-tests")];
    for (binary, name) in &ours {
        let stripped = root.join("bin").join(name);
        run(Command::new("strip").arg("--strip-debug").arg("-o").arg(&stripped).arg(binary))?;
        libraries.extend(libraries_of(binary)?);
    }
    for library in libraries {
        let relative = library.strip_prefix("/").unwrap_or(&library).display().to_string();
        install(root, &library, &relative)?;
    }
    fs::write(root.join("etc/mtab"), "")?;
    let init = root.join("init");
    fs::write(&init, init_script(&modules(root)?))?;
    fs::set_permissions(&init, fs::Permissions::from_mode(0o755))?;
    let script = format!("find . | cpio --quiet -o -H newc > '{}'", packed.display());
    run(Command::new("sh").args(["-c", &script]).current_dir(root))?;
    Ok(packed.to_path_buf())
}

fn install(root: &Path, from: &Path, to: &str) -> Result<()> {
    let to = root.join(to);
    fs::create_dir_all(to.parent().context("no folder")?)?;
    fs::copy(from, &to).with_context(|| format!("cannot copy {}", from.display()))?;
    Ok(())
}

/// What the loader would map: `name => /path (address)` and the loader itself.
fn libraries_of(binary: &Path) -> Result<Vec<PathBuf>> {
    let listed = run(Command::new("ldd").arg(binary))?;
    let paths = listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    let paths: Vec<PathBuf> = paths.map(PathBuf::from).collect();
    ensure!(!paths.is_empty(), "{} needs no library: {listed}", binary.display());
    Ok(paths)
}

/// Unpacks the modules into the tree; answers the commands that load them.
fn modules(root: &Path) -> Result<Vec<String>> {
    let versions = kernel_dir()?.join("lib/modules");
    let version = fs::read_dir(&versions)?.flatten().next().context("the kernel has no modules")?.path();
    let mut commands = Vec::new();
    for (module, parameters) in MODULES {
        let name = module.rsplit('/').next().unwrap_or(module);
        let packed = version.join("kernel/drivers").join(format!("{module}.ko.xz"));
        let unpacked = root.join("modules").join(format!("{name}.ko"));
        let output = Command::new("xz").args(["-dc"]).arg(&packed).output()?;
        ensure!(output.status.success(), "cannot unpack {}", packed.display());
        fs::write(unpacked, output.stdout)?;
        commands.push(format!("insmod /modules/{name}.ko {parameters}"));
    }
    Ok(commands)
}

fn init_script(modules: &[String]) -> String {
    let mut script = "#!/bin/busybox sh\n\
        export PATH=/bin\n\
        busybox mount -t proc proc /proc\n\
        busybox mount -t sysfs sys /sys\n\
        busybox mount -t devtmpfs dev /dev\n\
        mkdir() { busybox mkdir \"$@\"; }\n\
        insmod() { busybox insmod \"$@\" || echo \"VM: cannot load $1\"; }\n\
        mkdir -p /dev/shm\n\
        for at in /run /tmp /dev/shm; do busybox mount -t tmpfs tmpfs $at; done\n\
        busybox ip link set lo up\n"
        .to_owned();
    for command in modules {
        script.push_str(command);
        script.push('\n');
    }
    script.push_str("test=$(busybox sed 's/.*holdfast.test=\\([^ ]*\\).*/\\1/' /proc/cmdline)\n");
    script.push_str(&format!("vm-tests {} \"$test\" 2>&1\n", guest::ARGUMENT));
    script.push_str("busybox poweroff -f\n");
    script
}
