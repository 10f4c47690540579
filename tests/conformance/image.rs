//! The container image: everything in it runs by itself, it is small, and the same content makes the same digest.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use holdfast_tests::image::{Build, Image, PROGRAMS, REFERENCE, TOOLS};
use holdfast_tests::process::run;
use holdfast_tests::work::binaries_dir;
use libtest_mimic::Trial;
use nix::sys::stat::{Mode, umask};
use serde_json::Value;

/// What is transferred to each node: 22 MiB when this was written.
const ARCHIVE_BYTES_MAX: u64 = 32 << 20;
/// The file system for the tools' trial; xfs is never smaller.
const FILE_BYTES: u64 = 320 << 20;

/// Trials of this file.
pub fn trials() -> Vec<Trial> {
    vec![Trial::test("the_image_has_all_that_runs_in_it_and_its_digest_tells_its_content", || {
        check().map_err(|error| format!("{error:#}").into())
    })]
}

/// One trial, because the image is made once for all of it; twice for the digest.
fn check() -> Result<()> {
    let work = tempfile::Builder::new().prefix("holdfast-image-").tempdir()?;
    let Some(image) = build(&work.path().join("first"))? else { return Ok(()) };
    println!("{:.1} MiB, {:.1} MiB unpacked", mib(image.archive_bytes), mib(image.root_bytes));
    ensure!(image.archive_bytes < ARCHIVE_BYTES_MAX, "{:.1} MiB are too many", mib(image.archive_bytes));
    every_program_finds_its_libraries(&image.root)?;
    programs_run(&image.root)?;
    file_systems_are_made_and_grow(&image.root)?;
    nothing_else_is_in_it(&image.root)?;
    it_is_read_by_others(&image, work.path())?;

    let mask = umask(Mode::from_bits_truncate(0o077));
    let again = build(&work.path().join("second"));
    umask(mask);
    let again = again?.context("the second one was skipped")?;
    ensure!(again.digest == image.digest, "the same content is {} and {}", image.digest, again.digest);
    ensure!(fs::read(&again.archive)? == fs::read(&image.archive)?, "the archives differ");
    Ok(())
}

fn build(folder: &Path) -> Result<Option<Image>> {
    fs::create_dir(folder)?;
    let programs = binaries_dir()?;
    // Downloads are kept beside the build's: they are checked each time.
    let packages = programs.join("work/packages");
    match (Build { programs: &programs, packages: &packages, folder, reference: REFERENCE }).run()? {
        Ok(image) => Ok(Some(image)),
        Err(skip) => {
            println!("{skip}");
            Ok(None)
        }
    }
}

fn every_program_finds_its_libraries(root: &Path) -> Result<()> {
    let loader = root.join("usr/lib64/ld-linux-x86-64.so.2");
    let loader = if loader.symlink_metadata().is_ok() {
        "/lib64/ld-linux-x86-64.so.2"
    } else {
        "/lib/ld-linux-aarch64.so.1"
    };
    for folder in ["usr/bin", "usr/sbin"] {
        for entry in fs::read_dir(root.join(folder))? {
            let program = Path::new("/").join(entry?.path().strip_prefix(root)?);
            let listed = run(in_root(root, loader).arg("--list").arg(&program))?;
            ensure!(!listed.contains("not found"), "{}: {listed}", program.display());
        }
    }
    Ok(())
}

fn programs_run(root: &Path) -> Result<()> {
    for program in PROGRAMS {
        let mut command = in_root(root, program);
        let said = if program == "holdfast-cni" {
            run(command.env("CNI_COMMAND", "VERSION"))?
        } else {
            run(command.arg("--version"))?
        };
        let wanted = if program == "holdfast-cni" { "\"1.1.0\"" } else { env!("CARGO_PKG_VERSION") };
        ensure!(said.contains(wanted), "{program}: {said}");
    }
    Ok(())
}

/// A program in the image, with the machine's /proc and /dev, which a container has too, in a mount namespace of its own.
fn in_root(root: &Path, program: &str) -> Command {
    let script = "mount --rbind /proc \"$1/proc\" && mount --rbind /dev \"$1/dev\" && exec chroot \"$@\"";
    let mut command = Command::new("unshare");
    command
        .args(["--mount", "--propagation", "slave", "--", "sh", "-ec", script, "sh"])
        .arg(root)
        .arg(program);
    command.env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

/// As the node service calls them.
fn file_systems_are_made_and_grow(root: &Path) -> Result<()> {
    let file = root.join("tmp/disk");
    let run_in = |program: &str, arguments: &[&str]| run(in_root(root, program).args(arguments));
    let blank = || fs::File::create(&file).and_then(|file| file.set_len(FILE_BYTES));
    blank()?;
    let options = "nodiscard,assume_storage_prezeroed=1";
    run_in("mkfs.ext4", &["-F", "-q", "-m", "0", "-b", "4096", "-E", options, "/tmp/disk"])?;
    fs::OpenOptions::new().write(true).open(&file)?.set_len(2 * FILE_BYTES)?;
    run_in("e2fsck", &["-f", "-p", "/tmp/disk"])?;
    let grown = run_in("resize2fs", &["/tmp/disk"])?;
    ensure!(grown.contains(&format!("{} (4k) blocks", 2 * FILE_BYTES / 4096)), "{grown}");
    blank()?;
    run_in("mkfs.xfs", &["-f", "-q", "-K", "/tmp/disk"])?;
    ensure!(fs::read(&file)?.starts_with(b"XFSB"), "no xfs was made");
    run_in("xfs_growfs", &["-V"])?;
    fs::remove_file(file)?;
    Ok(())
}

/// No shell, no file that lends its owner's rights, no key; and each package's notice.
fn nothing_else_is_in_it(root: &Path) -> Result<()> {
    let mut programs: Vec<String> = Vec::new();
    for folder in ["usr/bin", "usr/sbin"] {
        for entry in fs::read_dir(root.join(folder))? {
            programs.push(entry?.file_name().to_string_lossy().into_owned());
        }
    }
    programs.sort();
    let mut wanted: Vec<&str> = [&PROGRAMS[..], &TOOLS[..], &["mke2fs"]].concat();
    wanted.sort_unstable();
    ensure!(programs == wanted, "{programs:?}");
    for (file, mode) in files(root)? {
        ensure!(mode & 0o7022 == 0, "{file} has mode {mode:o}");
        ensure!(!file.ends_with(".pem") && !file.ends_with(".key"), "{file}");
    }
    for entry in fs::read_dir(root.join("var/lib/dpkg/status.d"))? {
        let name = entry?.file_name();
        let notice = root.join("usr/share/doc").join(&name).join("copyright");
        ensure!(fs::metadata(&notice).is_ok_and(|found| found.len() > 0), "no notice of {name:?}");
    }
    let crates = fs::read_to_string(root.join("usr/share/doc/holdfast/third-party"))?;
    ensure!(
        crates.contains("\ntokio ") && !crates.contains("\nlibtest-mimic "),
        "the wrong crates are named"
    );
    Ok(())
}

/// Names below the root, with their modes.
fn files(root: &Path) -> Result<Vec<(String, u32)>> {
    let (mut found, mut open) = (Vec::new(), vec![root.to_owned()]);
    while let Some(folder) = open.pop() {
        for entry in fs::read_dir(folder)? {
            let path = entry?.path();
            let kind = path.symlink_metadata()?;
            if kind.is_dir() {
                open.push(path.clone());
            }
            if !kind.is_symlink() {
                found.push((path.display().to_string(), kind.permissions().mode() & 0o7777));
            }
        }
    }
    Ok(found)
}

/// podman loads it under the name that workloads use, with the digest that we say.
fn it_is_read_by_others(image: &Image, work: &Path) -> Result<()> {
    if Command::new("podman").arg("--version").output().is_err() {
        println!("There is no podman to read the image with.");
        return Ok(());
    }
    let podman = |arguments: &[&str]| {
        let mut command = Command::new("podman");
        command.arg("--root").arg(work.join("podman")).arg("--runroot").arg(work.join("podman-run"));
        run(command.args(["--storage-driver", "vfs"]).args(arguments))
    };
    podman(&["pull", "-q", &format!("oci-archive:{}", image.archive.display())])?;
    let listed: Value = serde_json::from_str(&podman(&["images", "--format", "json"])?)?;
    let digest = listed[0]["Digest"].as_str().unwrap_or_default();
    ensure!(digest == image.digest, "podman says {listed}, not {}", image.digest);
    let name = listed[0]["Names"][0].as_str().unwrap_or_default();
    ensure!(name.ends_with(&format!("/{REFERENCE}")), "podman names it {name}");
    println!("podman reads {REFERENCE} as {digest}");
    Ok(())
}

fn mib(bytes: u64) -> f64 {
    bytes as f64 / f64::from(1 << 20)
}
