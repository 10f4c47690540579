//! Runs the tests by tier and sums them up. `scripts/test` builds and starts it.
//!
//! Tiers are the test targets of this crate, by name; everything else in the workspace is tier `unit`. All test programs
//! are built in one go, so that no dependency is built twice, then run one after another: many of them use the machine's
//! links and devices.

mod summary;
mod targets;

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use holdfast_tests::go_tools;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::summary::Summary;
use crate::targets::{Target, build_tests};

/// Every tier, in the order of running.
const TIERS: [&str; 7] = ["unit", "sim", "conformance", "policy", "cluster", "vm", "kubernetes"];
/// A test program that runs longer hangs; it is ended and counts as failed.
const PROGRAM_TIMEOUT: Duration = Duration::from_secs(15 * 60);
/// The same where one program has a whole cluster.
const KUBERNETES_TIMEOUT: Duration = Duration::from_secs(50 * 60);
/// The same with `--long`.
const LONG_PROGRAM_TIMEOUT: Duration = Duration::from_secs(3 * 60 * 60);
/// Set for test programs by `--long`.
const LONG_VARIABLE: &str = "HOLDFAST_LONG";
/// The same with `--suites`: hundreds of specs of minutes each.
const SUITES_TIMEOUT: Duration = Duration::from_secs(6 * 60 * 60);
/// Set for test programs by `--suites`.
const SUITES_VARIABLE: &str = "HOLDFAST_SUITES";
/// Set for the simulator by `--seeds`.
const SEEDS_VARIABLE: &str = "HOLDFAST_SIM_SEEDS";

/// What is to be run.
#[derive(Debug, Default, PartialEq, Eq)]
struct Wanted {
    /// Tiers; none: all.
    tiers: Vec<String>,
    /// Random tests run long.
    long: bool,
    /// Kubernetes' own suites run, too.
    suites: bool,
    /// Part of the names of the tests that run; none: all.
    only: Option<String>,
    /// How many mixed seeds the simulator runs, in as much time as they take; none: CI's share.
    seeds: Option<u64>,
}

fn main() -> ExitCode {
    let wanted = match parse(std::env::args().skip(1)) {
        Ok(wanted) => wanted,
        Err(sentence) => {
            eprintln!("{sentence}");
            return ExitCode::from(2);
        }
    };
    let mut summary = Summary::default();
    if let Err(error) = run_tiers(&wanted, &mut summary) {
        println!("{error:#}");
        summary.fail("the tests could not be run");
    }
    summary.print();
    if summary.is_success() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn parse(arguments: impl Iterator<Item = String>) -> Result<Wanted, String> {
    let mut wanted = Wanted::default();
    let mut arguments = arguments;
    while let Some(argument) = arguments.next() {
        match argument.as_str() {
            "--long" => wanted.long = true,
            "--suites" => wanted.suites = true,
            "--only" => wanted.only = Some(arguments.next().ok_or("--only needs a part of a test's name")?),
            "--seeds" => {
                let count = arguments.next().and_then(|count| count.parse().ok());
                wanted.seeds =
                    Some(count.filter(|count| *count > 0).ok_or("--seeds needs a number of seeds")?);
            }
            tier if TIERS.contains(&tier) => wanted.tiers.push(argument),
            _ => return Err(format!("there is no tier {argument}; there are: {}", TIERS.join(", "))),
        }
    }
    Ok(wanted)
}

fn run_tiers(wanted: &Wanted, summary: &mut Summary) -> Result<()> {
    let targets = build_tests()?;
    for tier in TIERS
        .into_iter()
        .filter(|tier| wanted.tiers.is_empty() || wanted.tiers.iter().any(|name| name == tier))
    {
        println!("\n#### tier {tier}");
        let in_tier: Vec<&Target> = targets.iter().filter(|target| target.tier() == tier).collect();
        if in_tier.is_empty() {
            println!("tier {tier} is empty: nothing of it exists yet");
        }
        if let Err(error) = build_tools(tier, wanted.suites) {
            println!("{error:#}");
            summary.fail(&format!("the tools of tier {tier} do not build"));
        }
        for target in in_tier {
            let mut command = Command::new(&target.executable);
            command.current_dir(target.manifest.parent().unwrap_or(Path::new(".")));
            if tier == "unit" {
                // A test that skips itself says so in output that libtest hides otherwise.
                command.arg("--show-output");
            }
            command.args(&wanted.only);
            if wanted.long {
                command.env(LONG_VARIABLE, "1");
            }
            if wanted.suites {
                command.env(SUITES_VARIABLE, "1");
            }
            if let Some(seeds) = wanted.seeds {
                command.env(SEEDS_VARIABLE, seeds.to_string());
            }
            let timeout = match tier {
                "kubernetes" if wanted.suites => SUITES_TIMEOUT,
                _ if wanted.long || wanted.seeds.is_some() => LONG_PROGRAM_TIMEOUT,
                "kubernetes" => KUBERNETES_TIMEOUT,
                _ => PROGRAM_TIMEOUT,
            };
            run_program(&target.title(), command, timeout, summary)?;
        }
        if tier == "unit" && wanted.only.is_none() {
            let mut command = Command::new(targets::cargo());
            command.args(["test", "--release", "--workspace", "--doc", "--quiet"]);
            run_program("examples in the documentation", command, PROGRAM_TIMEOUT, summary)?;
        }
    }
    Ok(())
}

/// Builds what a tier's tests run beside our own programs: a first build takes longer than a test program may.
///
/// Where a tool cannot be had, each test that needs it says so.
fn build_tools(tier: &str, suites: bool) -> Result<()> {
    let mut skips = match tier {
        "conformance" => vec![
            go_tools::csi_sanity()?.err(),
            go_tools::cnitool()?.err(),
            go_tools::cni_plugins()?.err(),
            go_tools::kustomize()?.err(),
            go_tools::helm()?.err(),
        ],
        "kubernetes" => vec![
            go_tools::etcd()?.err(),
            go_tools::kube_apiserver()?.err(),
            go_tools::kubernetes()?.err(),
            go_tools::containerd()?.err(),
            go_tools::pod_programs()?.err(),
            go_tools::cert_manager()?.err(),
        ],
        _ => Vec::new(),
    };
    if suites && tier == "kubernetes" {
        skips.push(go_tools::e2e()?.err());
    }
    for skip in skips.into_iter().flatten() {
        println!("not built: {}", skip.0);
    }
    Ok(())
}

/// Runs one test program, shows what it says and counts its results.
fn run_program(title: &str, mut command: Command, timeout: Duration, summary: &mut Summary) -> Result<()> {
    println!("\n## {title}");
    std::io::stdout().flush()?;
    let (start, failed_before) = (Instant::now(), summary.failed());
    let mut child = command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {command:?}"))?;
    let (done, watchdog) = watch(child.id().cast_signed(), timeout);
    let (mut counted, mut in_successes) = (false, false);
    for line in BufReader::new(child.stdout.take().context("the program has no output")?).lines() {
        let line = line?;
        in_successes = (in_successes || line == "successes:")
            && line != "failures:"
            && !line.starts_with("test result:");
        if !in_successes && !line.is_empty() {
            println!("{line}");
        }
        counted |= summary.count_line(title, &line);
    }
    let status = child.wait()?;
    drop(done);
    let timed_out = watchdog.join().unwrap_or(false);
    println!("   {:.1} s", start.elapsed().as_secs_f64());
    if timed_out {
        summary.fail(&format!("{title}: ended after {} s without an end", timeout.as_secs()));
    } else if !status.success() && summary.failed() == failed_before {
        summary.fail(&format!("{title}: {status}"));
    } else if !counted && !title.starts_with("examples") {
        summary.fail(&format!("{title}: no result line"));
    }
    Ok(())
}

/// Ends the process after a time unless the sender is dropped before.
fn watch(pid: i32, timeout: Duration) -> (std::sync::mpsc::Sender<()>, std::thread::JoinHandle<bool>) {
    let (sender, receiver) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        let timed_out = receiver.recv_timeout(timeout) == Err(std::sync::mpsc::RecvTimeoutError::Timeout);
        if timed_out {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        timed_out
    });
    (sender, thread)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tiers_and_options_come_in_any_order_and_an_unknown_word_is_refused() {
        let words = |text: &str| parse(text.split_whitespace().map(str::to_owned));

        let wanted = words("cluster --only power --long --suites vm").unwrap();

        assert_eq!(wanted.tiers, ["cluster", "vm"]);
        assert!(wanted.long && wanted.suites && wanted.only.as_deref() == Some("power"));
        assert_eq!(words(""), Ok(Wanted::default()));
        assert_eq!(words("sim --seeds 20000").unwrap().seeds, Some(20_000));
        assert!(words("clutser").is_err() && words("--only").is_err());
        assert!(words("sim --seeds").is_err() && words("sim --seeds 0").is_err());
    }
}
