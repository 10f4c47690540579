//! One run of the machine: started, watched, and ended after a time.

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use holdfast_tests::cleanup::{self, Logs};
use holdfast_tests::process::run_within;
use holdfast_tests::work::{Work, binaries_dir};

use crate::image;

/// How long one test may take in the emulated machine; it boots in some seconds.
const RUN_TIMEOUT: Duration = Duration::from_secs(300);
/// MiB of memory, disks included.
const MEMORY_MIB: &str = "2048";
/// Starts every line of the guest that is for us.
pub const MARK: &str = "VM: ";

/// Why the machine cannot be started here; none if it can.
pub fn missing() -> Option<String> {
    if let Err(error) = kernel() {
        return Some(format!("{error:#}"));
    }
    let found = |program: &str| {
        ["/usr/bin", "/bin", "/usr/sbin"].iter().any(|dir| PathBuf::from(dir).join(program).exists())
    };
    let tools = ["qemu-system-x86_64", "busybox", "cpio", "xz", "dmsetup", "nbd-client"];
    let absent: Vec<&str> = tools.into_iter().filter(|tool| !found(tool)).collect();
    (!absent.is_empty()).then(|| format!("not installed: {}", absent.join(", ")))
}

/// Folder of the unpacked kernel package.
pub fn kernel_dir() -> Result<PathBuf> {
    let release = binaries_dir()?;
    Ok(release.parent().context("the binaries have no folder above")?.join("vm/kernel"))
}

fn kernel() -> Result<PathBuf> {
    let boot = kernel_dir()?.join("boot");
    let entries = std::fs::read_dir(&boot)
        .with_context(|| format!("no kernel in {}: the package could not be downloaded", boot.display()))?;
    let mut kernels = entries.flatten().map(|entry| entry.path());
    kernels
        .find(|path| path.file_name().is_some_and(|name| name.to_string_lossy().starts_with("vmlinuz-")))
        .with_context(|| format!("no kernel in {}", boot.display()))
}

/// Boots the machine, lets it run the guest's test and reads its verdict.
pub fn boot(test: &str) -> Result<()> {
    let work = Work::create("vm")?;
    let outcome = boot_in(&work, test);
    cleanup::sweep(work.dir(), Logs::Remove)?;
    outcome
}

fn boot_in(work: &Work, test: &str) -> Result<()> {
    let initramfs = image::make(&work.folder("root")?, &work.dir().join("initramfs"))?;
    let mut qemu = Command::new("qemu-system-x86_64");
    // QEMU 7.2 comes back from cmpxchg16b with broken flags now and then, and the kernel's allocator falls over it: a
    // processor without it.
    qemu.args(["-accel", "tcg", "-cpu", "Haswell-v4,-cx16", "-m", MEMORY_MIB]);
    qemu.args(["-nodefaults", "-display", "none", "-serial", "stdio", "-no-reboot", "-nic", "none"]);
    qemu.arg("-kernel").arg(kernel()?).arg("-initrd").arg(initramfs);
    qemu.arg("-append").arg(format!("console=ttyS0 quiet panic=-1 holdfast.test={test}"));
    let said = run_within(RUN_TIMEOUT, &mut qemu)?;
    for line in said.lines() {
        if let Some(line) = line.trim_end().strip_prefix(MARK) {
            println!("{line}");
        }
    }
    let verdicts: Vec<&str> = said.lines().map(str::trim_end).filter(|line| line.starts_with(MARK)).collect();
    match verdicts.last() {
        Some(line) if *line == "VM: passed" => Ok(()),
        _ => {
            let lines: Vec<&str> = said.lines().collect();
            bail!("the guest did not pass:\n{}", lines[lines.len().saturating_sub(40)..].join("\n"))
        }
    }
}
