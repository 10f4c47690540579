//! Ending a run: everything it made is ended and removed, from its state file alone, by whoever gets to it.
//!
//! Three ways lead here: the driver at its end, the guard (a process that outlives a killed driver), and the next run,
//! which first sweeps the folders of dead ones.

use std::fs;
use std::io::{BufRead, Write};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::cgroups;
use crate::helper;
use crate::process::{namespace_inode, process_start_time, wait_until};
use crate::work::{HolderState, State, lock_folder, read_state, work_root, write_state};

/// How long processes and devices of a run may take to vanish once it is ended.
const VANISH_TIMEOUT: Duration = Duration::from_secs(20);
/// Where the logs of a failed run are kept, below the work root; the last failure only.
const FAILED_LOGS: &str = "failed-logs";

static ACTIVE: Mutex<Option<PathBuf>> = Mutex::new(None);
static INTERRUPTED: AtomicBool = AtomicBool::new(false);

/// What becomes of a run's logs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logs {
    /// Removed with everything else.
    Remove,
    /// Moved to the folder `failed-logs` beside the work folders.
    Keep,
}

/// Ends the run in `dir` and removes its folder. It may be repeated.
///
/// # Errors
/// Something is still there; the error lists it.
pub fn sweep(dir: &Path, logs: Logs) -> Result<()> {
    let state = read_state(dir);
    // Their numbers stay theirs until this ends: whoever is in them is of this run.
    let _held = hold_namespaces(&state);
    end_holders(&state);
    // A loop device whose target died stays until its last user is gone, so ask again.
    let devices_gone = wait_until(VANISH_TIMEOUT, || {
        detach_loops(&state);
        state.cgroups.iter().for_each(|group| cgroups::remove(group));
        Ok(leftovers(&state, dir).is_empty())
    });
    if logs == Logs::Keep {
        keep_logs(dir);
    }
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(|| format!("cannot remove {}", dir.display()))?;
    }
    let left = leftovers(&state, dir);
    if !left.is_empty() {
        anyhow::bail!("left behind: {}", left.join("; "));
    }
    devices_gone
}

/// Everything of the run that still exists outside of its folder: processes, namespaces, loop devices, mounts.
#[must_use]
pub fn leftovers(state: &State, dir: &Path) -> Vec<String> {
    let mut left = Vec::new();
    for holder in &state.holders {
        let processes = processes_in(holder);
        left.extend(processes.into_iter().map(|pid| format!("process {pid} of {}", holder.name)));
    }
    left.extend(our_loops(state).into_iter().map(|device| format!("loop device {device}")));
    let groups = state.cgroups.iter().flat_map(|group| cgroups::existing(group));
    left.extend(groups.map(|folder| format!("control group {}", folder.display())));
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    let marks = [dir.display().to_string()];
    for line in mounts.lines() {
        if marks
            .iter()
            .chain(&state.volume_ids)
            .chain(&state.disk_marks)
            .any(|mark| line.contains(mark.as_str()))
        {
            left.push(format!("mount {line}"));
        }
    }
    left
}

/// Processes in the namespaces of a holder. Once the last of them has ended, the kernel gives the namespaces' numbers to new ones, of
/// anybody: whoever sees that nothing is left forgets the holder.
pub(crate) fn processes_in(holder: &HolderState) -> Vec<i32> {
    let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
    let processes = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    let is_in =
        |pid: i32, kind: &str, inode: u64| namespace_inode(pid, kind).is_ok_and(|found| found == inode);
    let is_inside =
        |pid: &i32| is_in(*pid, "pid", holder.pid_namespace) || is_in(*pid, "net", holder.net_namespace);
    processes.filter(is_inside).collect()
}

/// Sweeps the runs whose drivers are dead, except kept ones.
///
/// # Errors
/// The work root cannot be read, or a run cannot be ended.
pub fn sweep_dead_runs() -> Result<()> {
    for dir in run_folders()? {
        if !read_state(&dir).kept && lock_folder(&dir)?.is_some() {
            sweep(&dir, Logs::Remove).with_context(|| format!("ending the dead run {}", dir.display()))?;
        }
    }
    Ok(())
}

/// Ends every kept run and tells how many there were.
///
/// # Errors
/// A run cannot be ended.
pub fn sweep_kept_runs() -> Result<usize> {
    let mut ended = 0;
    for dir in run_folders()? {
        if read_state(&dir).kept && lock_folder(&dir)?.is_some() {
            sweep(&dir, Logs::Remove)?;
            ended += 1;
        }
    }
    Ok(ended)
}

/// Marks the run as kept: neither its driver's end nor a later run ends it.
pub(crate) fn mark_kept(dir: &Path) -> Result<()> {
    let mut state = read_state(dir);
    state.kept = true;
    write_state(dir, &state)
}

/// The run that an interrupt must end; none once it is ended.
pub fn set_active(dir: Option<&Path>) {
    *ACTIVE.lock().unwrap_or_else(PoisonError::into_inner) = dir.map(Path::to_path_buf);
}

/// From now on SIGINT, SIGTERM and SIGHUP end the active run and then this process.
///
/// # Errors
/// The handler cannot be set up.
pub fn end_when_interrupted() -> Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let enter = runtime.enter();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    let mut hangup = signal(SignalKind::hangup())?;
    drop(enter);
    std::thread::spawn(move || {
        let code = runtime.block_on(async {
            tokio::select! {
                _ = interrupt.recv() => 130,
                _ = terminate.recv() => 143,
                _ = hangup.recv() => 129,
            }
        });
        INTERRUPTED.store(true, Ordering::SeqCst);
        eprintln!("\nInterrupted: ending the cluster.");
        let active = ACTIVE.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(dir) = active {
            match sweep(&dir, Logs::Remove) {
                Ok(()) => eprintln!("Nothing is left behind."),
                Err(error) => eprintln!("{error:#}"),
            }
        }
        std::process::exit(code);
    });
    Ok(())
}

/// Once interrupted, the handler ends the run and the process: whoever sees its cluster fall apart waits here for that.
pub(crate) fn leave_it_to_the_interrupt_handler() {
    while INTERRUPTED.load(Ordering::SeqCst) {
        std::thread::park();
    }
}

/// A process that ends the run if its driver is killed.
pub(crate) struct Guard {
    process: Child,
}

impl Guard {
    pub(crate) fn start(dir: &Path) -> Result<Self> {
        let process = helper::command("guard")?
            .arg(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot start the guard")?;
        Ok(Self { process })
    }

    /// Sends the guard home: the run was ended, or is kept.
    pub(crate) fn dismiss(mut self) {
        if let Some(mut pipe) = self.process.stdin.take() {
            let _ = pipe.write_all(b"done\n");
        }
        let _ = self.process.wait();
    }
}

/// Helper `guard`: waits for the driver's end.
pub(crate) fn guard_main(arguments: &[String]) -> Result<ExitCode> {
    let dir = PathBuf::from(arguments.first().context("the guard needs a folder")?);
    let mut line = String::new();
    std::io::stdin().lock().read_line(&mut line)?;
    if line.trim() != "done" && dir.exists() {
        let _lock = lock_folder(&dir)?;
        sweep(&dir, Logs::Remove)?;
    }
    Ok(ExitCode::SUCCESS)
}

fn run_folders() -> Result<Vec<PathBuf>> {
    let root = work_root()?;
    let Ok(entries) = fs::read_dir(&root) else { return Ok(Vec::new()) };
    let folders = entries.flatten().map(|entry| entry.path());
    Ok(folders.filter(|path| path.join("lock").exists()).collect())
}

fn hold_namespaces(state: &State) -> Vec<fs::File> {
    let alive = state.holders.iter().filter(|holder| is_alive(holder));
    let paths = alive.flat_map(|holder| ["pid", "net"].map(|kind| format!("/proc/{}/ns/{kind}", holder.pid)));
    paths.filter_map(|path| fs::File::open(path).ok()).collect()
}

/// The number may belong to another process by now.
fn is_alive(holder: &HolderState) -> bool {
    process_start_time(holder.pid).is_ok_and(|start| start == holder.start_time)
}

fn end_holders(state: &State) {
    for holder in state.holders.iter().filter(|holder| is_alive(holder)) {
        let _ = kill(Pid::from_raw(holder.pid), Signal::SIGKILL);
    }
}

fn our_loops(state: &State) -> Vec<String> {
    let mut ours = Vec::new();
    for entry in fs::read_dir("/sys/block").into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Ok(backing) = fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
        if state.volume_ids.iter().chain(&state.disk_marks).any(|mark| backing.contains(mark.as_str())) {
            ours.push(format!("/dev/{name}"));
        }
    }
    ours
}

fn detach_loops(state: &State) {
    for device in our_loops(state) {
        let _ = Command::new("losetup").args(["-d", &device]).stderr(Stdio::null()).status();
    }
}

fn keep_logs(dir: &Path) {
    let Some(root) = dir.parent() else { return };
    let kept = root.join(FAILED_LOGS);
    let _ = fs::remove_dir_all(&kept);
    if fs::rename(dir.join("logs"), &kept).is_ok() {
        eprintln!("The logs are in {}", kept.display());
    }
}
