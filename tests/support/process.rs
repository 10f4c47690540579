//! Long-running programs inside namespaces, and commands run to their end.

use std::fs::{self, OpenOptions};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a killed process may take to vanish: it may sit in a device's wait until its I/O ends.
const DEATH_TIMEOUT: Duration = Duration::from_secs(15);
/// How many lines of a log an error quotes.
const LOG_TAIL_LINES: usize = 15;

/// How a program is started; kept, so that it can be started again.
#[derive(Clone)]
pub struct ProgramSpec {
    /// For messages and the log's name.
    pub name: String,
    /// Where its output goes.
    pub log: PathBuf,
    /// Makes the command, without its output.
    pub command: Arc<dyn Fn() -> Command + Send + Sync>,
}

/// How a program is started, again and again: the command's own arguments followed by more.
#[must_use]
pub fn maker(template: &Command, arguments: Vec<String>) -> Arc<dyn Fn() -> Command + Send + Sync> {
    let program = template.get_program().to_owned();
    let mut line: Vec<_> = template.get_args().map(std::ffi::OsStr::to_owned).collect();
    line.extend(arguments.into_iter().map(Into::into));
    Arc::new(move || {
        let mut command = Command::new(&program);
        command.args(&line).stdin(Stdio::null());
        // Ctrl-C in the terminal is the driver's to handle.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        command
    })
}

/// A running program.
pub struct Program {
    spec: ProgramSpec,
    // nsenter stays as the parent of a program in another PID namespace.
    wrapper: Child,
    pid: i32,
}

impl Program {
    /// Starts it and learns its process number.
    ///
    /// # Errors
    /// It cannot be started or ended at once.
    pub fn start(spec: ProgramSpec) -> Result<Self> {
        let log = OpenOptions::new().create(true).append(true).open(&spec.log)?;
        let mut wrapper = (spec.command)()
            .stdout(Stdio::from(log.try_clone()?))
            .stderr(Stdio::from(log))
            .spawn()
            .with_context(|| format!("cannot start {}", spec.name))?;
        let pid = find_child(&mut wrapper)
            .with_context(|| format!("{} ended at once:\n{}", spec.name, tail(&spec.log)))?;
        Ok(Self { spec, wrapper, pid })
    }

    /// Its process number on the host.
    #[must_use]
    pub fn pid(&self) -> i32 {
        self.pid
    }

    /// Its resident memory now, and at most so far, in MiB.
    ///
    /// # Errors
    /// It is gone.
    pub fn rss_mib(&self) -> Result<(f64, f64)> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid))?;
        let mib = |key: &str| -> Result<f64> {
            let line = status.lines().find_map(|line| line.strip_prefix(key)).context("no such line")?;
            Ok(line.trim().trim_end_matches(" kB").parse::<f64>()? / 1024.0)
        };
        Ok((mib("VmRSS:")?, mib("VmHWM:")?))
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.spec.name
    }

    /// Everything that it and its forerunners wrote.
    ///
    /// # Errors
    /// The log cannot be read.
    pub fn log(&self) -> Result<String> {
        Ok(String::from_utf8_lossy(&fs::read(&self.spec.log)?).into_owned())
    }

    /// The end of its log, for messages.
    #[must_use]
    pub fn log_tail(&self) -> String {
        tail(&self.spec.log)
    }

    /// Whether it runs.
    pub fn is_alive(&mut self) -> bool {
        matches!(self.wrapper.try_wait(), Ok(None))
    }

    /// `kill -9`, and waits until it is gone.
    ///
    /// # Errors
    /// It does not go.
    pub fn kill(&mut self) -> Result<()> {
        self.end_by(Signal::SIGKILL)
    }

    /// SIGTERM, and waits until it is gone.
    ///
    /// # Errors
    /// It does not go.
    pub fn terminate(&mut self) -> Result<()> {
        self.end_by(Signal::SIGTERM)
    }

    /// SIGINT, and waits until it is gone.
    ///
    /// # Errors
    /// It does not go.
    pub fn interrupt(&mut self) -> Result<()> {
        self.end_by(Signal::SIGINT)
    }

    /// Starts it again with the same command; the old one must be gone.
    ///
    /// # Errors
    /// As for [`Program::start`].
    pub fn start_again(&mut self) -> Result<()> {
        if self.is_alive() {
            bail!("{} still runs", self.spec.name);
        }
        *self = Self::start(self.spec.clone())?;
        Ok(())
    }

    fn end_by(&mut self, signal: Signal) -> Result<()> {
        if self.is_alive() {
            kill(Pid::from_raw(self.pid), signal)
                .with_context(|| format!("cannot end {}", self.spec.name))?;
        }
        wait_until(DEATH_TIMEOUT, || Ok(!self.is_alive()))
            .with_context(|| format!("{} (process {}) does not end after {signal}", self.spec.name, self.pid))
    }
}

/// Asks until the answer is yes.
///
/// # Errors
/// The last error, or a time-out.
pub fn wait_until(timeout: Duration, mut ask: impl FnMut() -> Result<bool>) -> Result<()> {
    let start = Instant::now();
    loop {
        let answer = ask();
        if matches!(answer, Ok(true)) {
            return Ok(());
        }
        if start.elapsed() > timeout {
            answer?;
            bail!("not within {} s", timeout.as_secs());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Runs a command to its end and returns its output.
///
/// # Errors
/// It cannot be started or fails; the error carries what it wrote.
pub fn run(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let output = command.stdin(Stdio::null()).output().with_context(|| format!("cannot run {shown}"))?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        let stderr = String::from_utf8_lossy(&output.stderr);
        bail!("{shown} failed ({}): {}{stdout}", output.status, stderr);
    }
    Ok(stdout)
}

/// Runs a command to its end, but kills it after a time (it may hang on a dead device).
///
/// # Errors
/// It cannot be started, fails, or takes longer.
pub fn run_within(timeout: Duration, command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {shown}"))?;
    let pid = child.id().cast_signed();
    let (sender, receiver) = std::sync::mpsc::channel();
    // The thread ends with the command, whose output it takes so that no full pipe stops it.
    std::thread::spawn(move || sender.send(child.wait_with_output()));
    let Ok(output) = receiver.recv_timeout(timeout) else {
        for inner in children_of(pid).into_iter().chain([pid]) {
            let _ = kill(Pid::from_raw(inner), Signal::SIGKILL);
        }
        bail!("{shown} takes longer than {} s", timeout.as_secs());
    };
    let output = output?;
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    if !output.status.success() {
        bail!("{shown} failed ({}): {}{stdout}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(stdout)
}

/// Field 22 of `/proc/PID/stat`: when it started, in ticks since boot.
pub(crate) fn process_start_time(pid: i32) -> Result<u64> {
    let stat =
        fs::read_to_string(format!("/proc/{pid}/stat")).with_context(|| format!("no process {pid}"))?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name.split_whitespace().nth(19).context("no start time")?.parse().context("no start time")
}

/// Inode that names a process's namespace of one kind.
pub(crate) fn namespace_inode(pid: i32, kind: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/ns/{kind}");
    let metadata = fs::metadata(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(std::os::unix::fs::MetadataExt::ino(&metadata))
}

/// Direct children of a process.
pub(crate) fn children_of(pid: i32) -> Vec<i32> {
    let listed = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    listed.split_whitespace().filter_map(|number| number.parse().ok()).collect()
}

fn find_child(wrapper: &mut Child) -> Result<i32> {
    let mut found = None;
    wait_until(Duration::from_secs(5), || {
        found = children_of(wrapper.id().cast_signed()).first().copied();
        if found.is_none()
            && let Some(status) = wrapper.try_wait()?
        {
            // Anything else would wait for a process that can no longer come.
            found = Some(-1);
            let _ = status;
        }
        Ok(found.is_some())
    })?;
    found.filter(|pid| *pid > 0).context("it ended")
}

/// The last lines of a log.
pub(crate) fn tail(path: &Path) -> String {
    let text = fs::read(path).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(LOG_TAIL_LINES)..].join("\n")
}
