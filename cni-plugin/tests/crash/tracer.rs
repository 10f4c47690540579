//! Kills a process at its n-th system call, by ptrace.
//!
//! All calls about one process come from the thread that seized it, as the kernel wants it.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::{Child, Command};

use nix::errno::Errno;
use nix::sys::ptrace::{self, Options};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
use nix::unistd::Pid;

/// What `syscall_info` calls a stop before a system call.
const ENTRY: u8 = 1;
/// `PTRACE_EVENT_EXEC`
const EVENT_EXEC: i32 = 4;

/// Whether the process was killed, or ended before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    Killed,
    Ended,
}

/// Runs `program ARGS` by `command`, which must be a shell that is given a script, and kills it before its `nth` system call after
/// it was executed, counted from 0.
pub fn kill_program_at(mut command: Command, input: &str, nth: usize) -> Outcome {
    let mut child = command.spawn().unwrap();
    feed(&mut child, input);
    let pid = pid_of(&child);
    // The shell stops itself: nothing of the program has run.
    assert_eq!(waitpid(pid, Some(WaitPidFlag::WUNTRACED)), Ok(WaitStatus::Stopped(pid, Signal::SIGSTOP)));
    let options = Options::PTRACE_O_TRACEEXEC | Options::PTRACE_O_TRACESYSGOOD | Options::PTRACE_O_EXITKILL;
    ptrace::seize(pid, options).unwrap();
    kill(pid, Signal::SIGCONT).unwrap();
    let (mut executed, mut entries) = (false, 0);
    loop {
        match waitpid(pid, Some(WaitPidFlag::__WALL)).unwrap() {
            WaitStatus::PtraceEvent(_, _, EVENT_EXEC) => {
                executed = true;
                ptrace::syscall(pid, None).unwrap();
            }
            WaitStatus::PtraceEvent(..) if executed => ptrace::syscall(pid, None).unwrap(),
            WaitStatus::PtraceEvent(..) => ptrace::cont(pid, None).unwrap(),
            WaitStatus::PtraceSyscall(_) => {
                if ptrace::syscall_info(pid).unwrap().op == ENTRY {
                    if entries == nth {
                        kill(pid, Signal::SIGKILL).unwrap();
                        continue;
                    }
                    entries += 1;
                }
                ptrace::syscall(pid, None).unwrap();
            }
            WaitStatus::Stopped(_, signal) => {
                // The signals that woke the shell are ours.
                let signal = (![Signal::SIGCONT, Signal::SIGSTOP, Signal::SIGTRAP].contains(&signal))
                    .then_some(signal);
                if executed {
                    ptrace::syscall(pid, signal).unwrap();
                } else {
                    ptrace::cont(pid, signal).unwrap();
                }
            }
            WaitStatus::Signaled(_, Signal::SIGKILL, _) => return Outcome::Killed,
            WaitStatus::Exited(..) => return Outcome::Ended,
            other => panic!("unexpected: {other:?}"),
        }
    }
}

fn feed(child: &mut Child, input: &str) {
    use std::io::Write;
    // It fits into the pipe, so that nobody waits for the other.
    assert!(input.len() < 4096);
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_raw(i32::try_from(child.id()).unwrap())
}

/// A process with all its threads under watch.
pub struct Watched {
    pid: Pid,
    /// Threads that reported nothing yet since they were seized.
    stops: BTreeSet<Pid>,
}

impl Watched {
    /// Seizes a running process. Its next system calls are reported to the calling thread.
    pub fn seize(pid: u32) -> Self {
        let options = Options::PTRACE_O_TRACECLONE | Options::PTRACE_O_TRACESYSGOOD;
        let mut stops = BTreeSet::new();
        // Threads may start meanwhile: until a look finds no new one.
        loop {
            let before = stops.len();
            for entry in std::fs::read_dir(format!("/proc/{pid}/task")).unwrap() {
                let thread: i32 = entry.unwrap().file_name().to_str().unwrap().parse().unwrap();
                let thread = Pid::from_raw(thread);
                if stops.contains(&thread) {
                    continue;
                }
                // It may be gone, or be a child of one that is seized already.
                match ptrace::seize(thread, options) {
                    Ok(()) => {
                        ptrace::interrupt(thread).unwrap();
                        stops.insert(thread);
                    }
                    Err(Errno::ESRCH | Errno::EPERM) => {}
                    Err(error) => panic!("cannot seize {thread}: {error}"),
                }
            }
            if stops.len() == before {
                break;
            }
        }
        Self { pid: Pid::from_raw(i32::try_from(pid).unwrap()), stops }
    }

    /// Lets it run until the `nth` system call that `counts`, counted from 0, of any thread, and kills the process before that, or
    /// as soon as `is_over` says so. Returns which of both it was.
    pub fn kill_at(self, nth: usize, counts: impl Fn(i64) -> bool, is_over: impl Fn() -> bool) -> Outcome {
        let mut left = nth;
        let flags = WaitPidFlag::__WALL | WaitPidFlag::__WNOTHREAD | WaitPidFlag::WNOHANG;
        let mut outcome = None;
        loop {
            match waitpid(Pid::from_raw(-1), Some(flags)) {
                Ok(WaitStatus::StillAlive) => {
                    if outcome.is_none() && is_over() {
                        outcome = Some(Outcome::Ended);
                        kill(self.pid, Signal::SIGKILL).unwrap();
                    }
                    std::thread::sleep(std::time::Duration::from_micros(20));
                }
                Ok(WaitStatus::PtraceSyscall(thread)) => {
                    let is_entry = ptrace::syscall_info(thread).is_ok_and(|info| info.op == ENTRY);
                    if outcome.is_none() && is_entry && number(thread).is_some_and(&counts) {
                        if left == 0 {
                            outcome = Some(Outcome::Killed);
                            kill(self.pid, Signal::SIGKILL).unwrap();
                            continue;
                        }
                        left -= 1;
                    }
                    go_on(thread, None);
                }
                Ok(WaitStatus::PtraceEvent(thread, ..)) => go_on(thread, None),
                Ok(WaitStatus::Stopped(thread, signal)) => {
                    go_on(thread, Some(signal).filter(|s| *s != Signal::SIGTRAP))
                }
                Ok(WaitStatus::Signaled(pid, ..) | WaitStatus::Exited(pid, _)) if pid == self.pid => {
                    return outcome.unwrap_or(Outcome::Ended);
                }
                Ok(_) => {}
                Err(Errno::ECHILD) => return outcome.unwrap_or(Outcome::Ended),
                Err(error) => panic!("waitpid: {error}"),
            }
        }
    }

    /// How many threads there are.
    pub fn threads(&self) -> usize {
        self.stops.len()
    }
}

/// A thread that is being killed is gone meanwhile.
fn go_on(thread: Pid, signal: Option<Signal>) {
    match ptrace::syscall(thread, signal) {
        Ok(()) | Err(Errno::ESRCH) => {}
        Err(error) => panic!("cannot go on with {thread}: {error}"),
    }
}

/// The system call that a stopped thread is about to make.
fn number(thread: Pid) -> Option<i64> {
    let text = std::fs::read_to_string(Path::new("/proc").join(thread.to_string()).join("syscall")).ok()?;
    text.split(' ').next()?.parse().ok()
}
