//! The harness itself: what it makes on the machine vanishes with it.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_tests::cleanup::{self, Logs};
use holdfast_tests::work::{self, Work};
use holdfast_tests::{Namespaces, process};
use libtest_mimic::Trial;

use crate::trial;

/// Trials of this file.
pub fn trials() -> Vec<Trial> {
    vec![
        trial("namespaces_of_two_runs_do_not_see_one_another", namespaces_of_two_runs_do_not_see_one_another),
        trial("ending_the_holder_ends_every_process_inside", ending_the_holder_ends_every_process_inside),
    ]
}

fn namespaces_of_two_runs_do_not_see_one_another() -> Result<()> {
    let (work_one, work_two) = (Work::create("machine")?, Work::create("machine")?);
    let one = Namespaces::create("node-a", &work_one)?;
    let two = Namespaces::create("node-a", &work_two)?;

    for spaces in [&one, &two] {
        spaces.run("ip", &["link", "add", "hf0", "type", "bridge"])?;
        spaces.run("ip", &["addr", "add", "10.244.1.1/24", "dev", "hf0"])?;
        spaces.run("touch", &["/run/mine"])?;
    }

    ensure!(
        process::run(Command::new("ip").args(["link", "show", "dev", "hf0"])).is_err(),
        "hf0 is on the host"
    );
    ensure!(!std::path::Path::new("/run/mine").exists(), "/run of a node is the host's");
    drop((one, two));
    cleanup::sweep(work_one.dir(), Logs::Remove)?;
    cleanup::sweep(work_two.dir(), Logs::Remove)
}

fn ending_the_holder_ends_every_process_inside() -> Result<()> {
    let run = Work::create("machine")?;
    let spaces = Namespaces::create("node-a", &run)?;
    let mut sleeper = spaces.command("setsid").args(["sleep", "600"]).stdout(Stdio::null()).spawn()?;
    process::wait_until(Duration::from_secs(5), || Ok(spaces.run("pgrep", &["sleep"]).is_ok()))
        .context("sleep does not run inside")?;
    let state = work::read_state(run.dir());
    ensure!(cleanup::leftovers(&state, run.dir()).len() >= 2, "the sleeper is not seen as the run's");

    drop(spaces);

    sleeper.wait()?;
    cleanup::sweep(run.dir(), Logs::Remove)?;
    ensure!(!run.dir().exists(), "the folder is still there");
    Ok(())
}
