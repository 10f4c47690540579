//! Where both sides run: one set of namespaces with a loopback of its own, and one work folder on a disk file system.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_tests::cleanup::{self, Logs};
use holdfast_tests::direct_io::{self, DirectOutcome};
use holdfast_tests::{Namespaces, Program, ProgramSpec, Work, process};

/// How long a program may take to open its socket.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// Longest command that is run to its end.
const COMMAND_TIMEOUT: Duration = Duration::from_secs(300);

/// The place; ending it ends everything in it.
pub struct Place {
    pub work: Work,
    spaces: Namespaces,
}

impl Place {
    pub fn new() -> Result<Self> {
        cleanup::sweep_dead_runs()?;
        let work = Work::create("bench")?;
        cleanup::set_active(Some(work.dir()));
        let spaces = Namespaces::create("bench", &work)?;
        Ok(Self { work, spaces })
    }

    /// Where the host sees a path of the inside.
    pub fn host_path(&self, inside: &Path) -> PathBuf {
        self.spaces.host_path(inside)
    }

    /// Starts a program that runs until the end; its output goes to a log.
    pub fn start(&self, name: &str, program: &Path, arguments: Vec<String>) -> Result<Program> {
        let log = self.work.folder("logs")?.join(format!("{name}.log"));
        let command = process::maker(&self.spaces.command(program), arguments);
        Program::start(ProgramSpec { name: name.to_owned(), log, command })
    }

    /// Runs a command to its end and gives its output.
    pub fn run(&self, program: &str, arguments: &[String]) -> Result<String> {
        let mut command = Command::new("timeout");
        let inside = self.spaces.command(program);
        command.args(["--kill-after=5", &COMMAND_TIMEOUT.as_secs().to_string()]);
        command.arg(inside.get_program()).args(inside.get_args()).args(arguments);
        let output = command.stdin(std::process::Stdio::null()).output().context("cannot run timeout")?;
        let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
        let stderr = String::from_utf8_lossy(&output.stderr);
        anyhow::ensure!(output.status.success(), "{program} {}: {stderr}{stdout}", arguments.join(" "));
        Ok(stdout)
    }

    /// Writes a block past every cache; answers when the device has answered.
    pub fn write_block(&self, device: &str, offset: u64) -> Result<()> {
        match direct_io::write_block(&self.spaces, device, offset, 1)? {
            DirectOutcome::Served(_) => Ok(()),
            refused @ DirectOutcome::Refused(_) => {
                anyhow::bail!("a write to {device} at {offset} was {}", refused.describe())
            }
        }
    }

    /// Waits until a program has opened its socket.
    pub fn wait_for(&self, program: &mut Program, socket: &Path) -> Result<()> {
        let host_path = self.host_path(socket);
        wait_until(START_TIMEOUT, || {
            anyhow::ensure!(program.is_alive(), "{} ended:\n{}", program.name(), program.log_tail());
            Ok(host_path.exists())
        })
        .with_context(|| {
            format!("{} does not open {}:\n{}", program.name(), socket.display(), program.log_tail())
        })
    }

    /// Ends everything and checks that nothing is left.
    pub fn end(self, logs: Logs) -> Result<()> {
        let Self { work, spaces } = self;
        drop(spaces);
        let swept = cleanup::sweep(work.dir(), logs);
        cleanup::set_active(None);
        swept
    }
}

/// Asks until the answer is yes; an error ends the wait.
pub fn wait_until(timeout: Duration, mut ask: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = std::time::Instant::now();
    while !ask()? {
        anyhow::ensure!(start.elapsed() < timeout, "not within {} s", timeout.as_secs());
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}
