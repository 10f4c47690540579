//! Other people's container runtimes and plugins against ours: cnitool, containerd, podman, and the reference plugins in a chain.
//!
//! Each runs inside a node made of namespaces, as the real binary with private folders, so that a killed run leaves no process behind.
//! What cannot be had is a counted skip with its reason. Images are made on the spot of one static busybox; nothing is pulled.

mod bed;
mod chain;
mod cnitool;
mod containerd;
mod cri;
mod podman;

use std::path::{Path, PathBuf};

use anyhow::Result;
use holdfast_tests::go_tools::{self, Skip};
use libtest_mimic::Trial;

use self::bed::Machine;

/// Trials of this folder.
pub fn trials() -> Vec<Trial> {
    vec![
        with_tools("cnitool_adds_checks_deletes_and_collects", cnitool_alone, |machine, [tool, _]| {
            cnitool::run(machine, tool)
        }),
        with_tools("reference_plugins_of_cni_1_1_follow_ours", both_tools, |machine, [tool, plugins]| {
            chain::run(machine, tool, plugins)
        }),
        with_programs("pods_of_containerd_are_on_our_network", &containerd::PROGRAMS, containerd::pods),
        with_programs("containerd_killed_anywhere_leaves_nothing", &containerd::PROGRAMS, containerd::killed),
        with_programs("containers_of_podman_are_on_our_network", &podman::PROGRAMS, podman::containers),
    ]
}

/// A trial that needs programs which the modules in this folder pin.
fn with_tools(
    name: &str,
    tools: fn() -> Result<Result<[PathBuf; 2], Skip>>,
    body: fn(&mut Machine, [&Path; 2]) -> Result<()>,
) -> Trial {
    Trial::test(name, move || {
        let outcome = tools().and_then(|tools| match tools {
            Ok([first, second]) => bed::run(|machine| body(machine, [&first, &second])),
            Err(skip) => {
                println!("{skip}");
                Ok(())
            }
        });
        outcome.map_err(|error| format!("{error:#}").into())
    })
}

/// A trial that needs programs of Debian.
fn with_programs(
    name: &str,
    programs: &'static [&'static str],
    body: fn(&mut Machine) -> Result<()>,
) -> Trial {
    Trial::test(name, move || {
        if let Some(skip) = bed::skip_without(programs) {
            println!("{skip}");
            return Ok(());
        }
        bed::run(body).map_err(|error| format!("{error:#}").into())
    })
}

fn cnitool_alone() -> Result<Result<[PathBuf; 2], Skip>> {
    Ok(go_tools::cnitool()?.map(|tool| [tool, PathBuf::new()]))
}

fn both_tools() -> Result<Result<[PathBuf; 2], Skip>> {
    let (tool, plugins) = (go_tools::cnitool()?, go_tools::cni_plugins()?);
    Ok(tool.and_then(|tool| plugins.map(|plugins| [tool, plugins])))
}
