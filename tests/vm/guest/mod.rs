//! What runs inside the machine: this same program, started by its init.

mod log;
mod log_writes;
mod nbd;

use std::path::Path;
use std::process::{Command, ExitCode};

use anyhow::{Result, bail, ensure};
use holdfast_tests::process::run;

/// First argument that asks for the guest's side.
pub const ARGUMENT: &str = "__holdfast-vm-guest";

/// Runs the guest's test that this process was started for, if it was.
pub fn run_if_asked() -> Option<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [first, test] = arguments.as_slice() else { return None };
    if first != ARGUMENT {
        return None;
    }
    match run_test(test) {
        Ok(()) => println!("VM: passed"),
        Err(error) => println!("VM: failed: {}", format!("{error:#}").replace('\n', " | ")),
    }
    Some(ExitCode::SUCCESS)
}

fn run_test(test: &str) -> Result<()> {
    match test {
        "modules" => modules(),
        "log-writes" => log_writes::keeps_what_was_flushed(),
        "dropped-writes" => log_writes::notices_dropped_writes(),
        "nbd" => nbd::client_of_the_kernel(),
        other => bail!("there is no guest test {other}"),
    }
}

fn modules() -> Result<()> {
    let version = std::fs::read_to_string("/proc/sys/kernel/osrelease")?;
    println!("VM: kernel {}", version.trim());
    for module in ["dm_log_writes", "nbd", "ublk_drv"] {
        ensure!(Path::new("/sys/module").join(module).exists(), "{module} is not loaded");
    }
    let targets = sh("dmsetup", &["targets"])?;
    ensure!(targets.contains("log-writes"), "the device mapper has no log-writes: {targets}");
    for device in ["/dev/nbd0", "/dev/ublk-control", "/dev/ram2"] {
        ensure!(Path::new(device).exists(), "{device} is missing");
    }
    Ok(())
}

/// Runs one of the machine's tools.
fn sh(program: &str, arguments: &[&str]) -> Result<String> {
    run(Command::new(Path::new("/bin").join(program)).args(arguments))
}
