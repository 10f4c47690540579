//! A set of namespaces and the process that holds it.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, ExitCode, Stdio};

use anyhow::{Context, Result, bail};
use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, unshare};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

use crate::cleanup::processes_in;
use crate::helper;
use crate::process::{namespace_inode, process_start_time, run};
use crate::work::{HolderState, Work};

/// How often the first process of a namespace collects orphans that ended.
const REAP_INTERVAL_MS: u16 = 100;

/// Network, mount, PID, UTS and IPC namespaces of their own, alive as long as their first process.
///
/// Inside are a fresh `/proc`, `/sys`, and empty tmpfs on `/run` and `/dev/shm`; the rest of the file tree is the host's.
/// Dropping it ends everything inside, like a power cut.
pub struct Namespaces {
    name: String,
    pid: i32,
    work: Work,
    starter: Child,
    pipe: Option<ChildStdin>,
}

impl Namespaces {
    /// Makes the namespaces and waits until they can be used.
    ///
    /// # Errors
    /// The kernel refuses (no root), or the holder ended early.
    pub fn create(name: &str, work: &Work) -> Result<Self> {
        let mut command = helper::command("holder")?;
        let mut starter = command
            .arg(name)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            // Ctrl-C in the terminal is the driver's to handle.
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start the holder of {name}"))?;
        let pipe = starter.stdin.take();
        let mut lines = BufReader::new(starter.stdout.take().context("the holder has no output")?).lines();
        let mut next = || -> Result<String> {
            lines
                .next()
                .with_context(|| format!("the holder of {name} ended early; is this root?"))?
                .map_err(Into::into)
        };
        // One line is from the starter, the other from the first process: they come in any order.
        let said = [next()?, next()?];
        if !said.iter().any(|line| line == "ready") {
            bail!("the holder of {name} is not ready");
        }
        let pid: i32 =
            said.iter().find_map(|line| line.parse().ok()).context("the holder names no process")?;
        let holder = HolderState {
            name: name.to_owned(),
            pid,
            start_time: process_start_time(pid)?,
            pid_namespace: namespace_inode(pid, "pid")?,
            net_namespace: namespace_inode(pid, "net")?,
        };
        work.change_state(|state| state.holders.push(holder))?;
        Ok(Self { name: name.to_owned(), pid, work: work.clone(), starter, pipe })
    }

    /// The name it was made with.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Host number of the first process.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Where the host sees a path of the inside.
    #[must_use]
    pub fn host_path(&self, inside: impl AsRef<Path>) -> PathBuf {
        let inside = inside.as_ref();
        let relative = inside.strip_prefix("/").unwrap_or(inside);
        Path::new("/proc").join(self.pid.to_string()).join("root").join(relative)
    }

    /// A command that will run `program` inside.
    #[must_use]
    pub fn command(&self, program: impl AsRef<Path>) -> Command {
        self.nsenter("--net", program.as_ref())
    }

    /// A command that will run `program` inside, but in the network namespace bound at `netns` (a path of the inside).
    #[must_use]
    pub fn command_in(&self, netns: &Path, program: impl AsRef<Path>) -> Command {
        self.nsenter(&format!("--net={}", self.host_path(netns).display()), program.as_ref())
    }

    /// Runs a command inside to its end.
    ///
    /// # Errors
    /// It cannot be started or fails; the error carries its output.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Result<String> {
        run(self.command(program).args(arguments)).with_context(|| format!("on {}", self.name))
    }

    /// Kills everything inside without waiting for the end: what waits for a disk ends when that answers.
    pub(crate) fn kill(&self) {
        let _ = kill(Pid::from_raw(self.pid), Signal::SIGKILL);
    }

    /// Lets the namespaces outlive this process.
    ///
    /// # Errors
    /// The holder is gone.
    pub fn keep(&mut self) -> Result<()> {
        self.pipe.as_mut().context("already let go")?.write_all(b"keep\n")?;
        Ok(())
    }

    /// Where the network namespace can be opened.
    #[must_use]
    pub fn network_path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/{}/ns/net", self.pid))
    }

    /// A command that will run `program` with the inside's network and the host's everything else.
    #[must_use]
    pub fn network_command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg("--target").arg(self.pid.to_string()).args(["--net", "--", program]);
        command.process_group(0).stdin(Stdio::null());
        command
    }

    fn nsenter(&self, net: &str, program: &Path) -> Command {
        let mut command = Command::new("nsenter");
        command.arg("--target").arg(self.pid.to_string());
        command.args(["--mount", "--uts", "--ipc", "--pid", net, "--"]).arg(program);
        command.current_dir("/").process_group(0).stdin(Stdio::null());
        command
    }
}

impl Drop for Namespaces {
    fn drop(&mut self) {
        // Killing the first process of a PID namespace kills all others before this returns from wait.
        self.kill();
        drop(self.pipe.take());
        let _ = self.starter.wait();
        // Where the folder is gone already, nobody asks any more.
        let _ = self.work.change_state(|state| {
            state.holders.retain(|holder| holder.pid != self.pid || !processes_in(holder).is_empty());
        });
    }
}

/// Helper `holder`: makes the namespaces, starts their first process and waits for it.
pub(crate) fn holder_main(arguments: &[String]) -> Result<ExitCode> {
    let name = arguments.first().context("the holder needs a name")?;
    let flags = CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC;
    unshare(flags).context("cannot make namespaces; this needs root")?;
    let mut first =
        helper::command("holder-init")?.arg(name).spawn().context("cannot start the first process")?;
    println!("{}", first.id());
    std::io::stdout().flush()?;
    first.wait()?;
    Ok(ExitCode::SUCCESS)
}

/// Helper `holder-init`: the first process of the namespaces. It ends when its input does, unless told to stay.
pub(crate) fn holder_init_main(arguments: &[String]) -> Result<ExitCode> {
    let name = arguments.first().context("the holder needs a name")?;
    prepare_inside(name)?;
    println!("ready");
    std::io::stdout().flush()?;
    let stdin = std::io::stdin();
    let mut watching = true;
    loop {
        reap();
        if !watching {
            std::thread::sleep(std::time::Duration::from_millis(REAP_INTERVAL_MS.into()));
            continue;
        }
        let mut fds = [PollFd::new(std::os::fd::AsFd::as_fd(&stdin), PollFlags::POLLIN)];
        match poll(&mut fds, PollTimeout::from(REAP_INTERVAL_MS)) {
            Ok(0) | Err(Errno::EINTR) => {}
            Ok(_) => {
                let mut line = String::new();
                if stdin.lock().read_line(&mut line)? == 0 {
                    return Ok(ExitCode::SUCCESS);
                }
                watching = line.trim() != "keep";
            }
            Err(errno) => return Err(errno).context("cannot wait for input"),
        }
    }
}

fn prepare_inside(name: &str) -> Result<()> {
    let none: Option<&str> = None;
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_PRIVATE, none)
        .context("cannot make mounts private")?;
    // New mounts of the inside must reach the sandboxes made in it, never the host.
    mount(none, "/", none, MsFlags::MS_REC | MsFlags::MS_SHARED, none)
        .context("cannot share mounts inside")?;
    let safe = MsFlags::MS_NOSUID | MsFlags::MS_NODEV;
    mount(Some("proc"), "/proc", Some("proc"), safe, none).context("cannot mount /proc")?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), safe, none).context("cannot mount /sys")?;
    mount(Some("tmpfs"), "/run", Some("tmpfs"), safe, Some("mode=755")).context("cannot mount /run")?;
    mount(Some("tmpfs"), "/dev/shm", Some("tmpfs"), safe, Some("mode=1777"))
        .context("cannot mount /dev/shm")?;
    nix::unistd::sethostname(name).context("cannot set the host name")?;
    run(Command::new("ip").args(["link", "set", "lo", "up"])).map(drop)
}

fn reap() {
    while let Ok(status) = waitpid(None, Some(WaitPidFlag::WNOHANG)) {
        if status == WaitStatus::StillAlive {
            return;
        }
    }
}
