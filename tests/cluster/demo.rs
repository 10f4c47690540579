//! The demo as a program: interrupted or killed, it leaves nothing behind.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use holdfast_tests::cleanup;
use holdfast_tests::process::wait_until;
use holdfast_tests::work::{State, binaries_dir, read_state};
use libtest_mimic::Trial;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::trial;

/// How long an interrupted demo may take to clean up.
const CLEAN_UP_TIMEOUT: Duration = Duration::from_secs(40);

/// Trials of this file.
pub fn trials() -> Vec<Trial> {
    vec![
        trial("a_demo_interrupted_while_the_database_runs_leaves_nothing", || {
            end_demo(Signal::SIGINT, "== 4.", Some(130))
        }),
        trial("a_demo_interrupted_while_it_starts_leaves_nothing", || {
            end_demo(Signal::SIGTERM, "== 1.", Some(143))
        }),
        trial("a_demo_killed_while_the_volume_is_mounted_leaves_nothing", || {
            end_demo(Signal::SIGKILL, "== 3.", None)
        }),
    ]
}

/// Starts the demo, sends the signal once the line appears, and looks for anything left.
fn end_demo(signal: Signal, at_line: &str, code: Option<i32>) -> Result<()> {
    let root = tempfile::Builder::new().prefix("interrupted-").tempdir_in(binaries_dir()?)?;
    let mut demo = Command::new(binaries_dir()?.join("holdfast-demo"))
        .env("HOLDFAST_WORK_DIR", root.path())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot start the demo")?;
    read_up_to(&mut demo, at_line)?;
    let run = only_run(root.path())?;
    let state = read_state(&run);

    kill(Pid::from_raw(demo.id().cast_signed()), signal)?;

    let status = demo.wait()?;
    ensure!(code.is_none() || status.code() == code, "the demo ended with {status}, wanted {code:?}");
    let is_clean = || cleanup::leftovers(&state, &run).is_empty() && !run.exists();
    if code.is_some() {
        // It cleans up itself before it ends; only the last words of its guard may still be under way.
        wait_until(Duration::from_secs(2), || Ok(is_clean())).with_context(|| what_is_left(&state, &run))?;
    }
    wait_until(CLEAN_UP_TIMEOUT, || Ok(is_clean())).with_context(|| what_is_left(&state, &run))?;
    let files: Vec<_> = std::fs::read_dir(root.path())?.flatten().map(|entry| entry.path()).collect();
    ensure!(files.is_empty(), "files are left: {files:?}");
    Ok(())
}

/// Reads the demo's output up to a line; the rest is read by a thread, so that the demo never waits for a reader.
fn read_up_to(demo: &mut Child, start: &str) -> Result<()> {
    let mut lines = BufReader::new(demo.stdout.take().context("the demo has no output")?).lines();
    let mut said = String::new();
    for line in lines.by_ref() {
        let line = line?;
        if line.starts_with(start) {
            std::thread::spawn(move || lines.for_each(drop));
            return Ok(());
        }
        said.push_str(&line);
        said.push('\n');
    }
    bail!("the demo ended before {start:?}: {}\n{said}", demo.wait()?)
}

fn only_run(root: &Path) -> Result<PathBuf> {
    // The folder is made a moment after the first line.
    let mut found = None;
    wait_until(Duration::from_secs(10), || {
        let entries = std::fs::read_dir(root)?.flatten().map(|entry| entry.path());
        found = entries.into_iter().find(|path| path.join("state.json").exists());
        Ok(found.is_some())
    })?;
    found.context("the demo made no work folder")
}

fn what_is_left(state: &State, run: &Path) -> String {
    format!("left: {:?}; folder there: {}", cleanup::leftovers(state, run), run.exists())
}
