//! A cluster of three nodes with everything of ours on it, used as its people do: with `kubectl`.
//!
//! The trials share one cluster and build on each other: the first that runs starts it, and none leaves it broken.

mod bank;
mod guide;
mod leaving;
mod moves;
mod network;
mod reach;
mod ready;
mod restarts;
mod steady;
mod suites;
mod upgrade;
mod volumes;

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::go_tools::Skip;
use holdfast_tests::k8s::{KubeCluster, Tools};
use libtest_mimic::Trial;

/// The cluster that the trials share, from the first one on.
static SHARED: Mutex<Shared> = Mutex::new(Shared { cluster: None, failed: false });

struct Shared {
    cluster: Option<KubeCluster>,
    failed: bool,
}

pub fn trials() -> Vec<Trial> {
    let tools = match Tools::get() {
        Ok(Ok(tools)) => Ok(tools),
        Ok(Err(skip)) => Err(skip),
        // The trials tell why.
        Err(error) => return vec![Trial::test("cluster::tools", move || Err(format!("{error:#}").into()))],
    };
    let mut trials = Vec::new();
    trials.extend(ready::trials(&tools));
    trials.extend(guide::trials(&tools));
    trials.extend(network::trials(&tools));
    trials.extend(volumes::trials(&tools));
    trials.extend(steady::trials(&tools));
    trials.extend(moves::trials(&tools));
    trials.extend(upgrade::trials(&tools));
    trials.extend(suites::trials(&tools));
    trials.extend(restarts::trials(&tools));
    // Nothing can follow it.
    trials.extend(leaving::trials(&tools));
    trials
}

/// Ends the shared cluster; a trial that failed keeps its logs.
pub fn end() -> Result<()> {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(cluster) = shared.cluster.take() else { return Ok(()) };
    let logs = if shared.failed { Logs::Keep } else { Logs::Remove };
    let took = cluster.end(logs).context("something of the cluster is left")?;
    println!("The cluster of three nodes was ended in {:.1} s and left nothing.", took.as_secs_f64());
    Ok(())
}

/// A trial on the shared cluster. Where there can be none it is skipped, and says why.
fn trial(
    tools: &Result<Tools, Skip>,
    name: &str,
    body: impl FnOnce(&mut KubeCluster) -> Result<()> + Send + 'static,
) -> Trial {
    let name = format!("cluster::{name}");
    let tools = match tools {
        Ok(tools) => tools.clone(),
        Err(skip) => {
            println!("{skip}");
            return Trial::test(name, || Ok(())).with_ignored_flag(true);
        }
    };
    Trial::test(name, move || run(&tools, body).map_err(|error| format!("{error:#}").into()))
}

fn run(tools: &Tools, body: impl FnOnce(&mut KubeCluster) -> Result<()>) -> Result<()> {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if shared.cluster.is_none() {
        shared.cluster = Some(KubeCluster::start(tools, ready::images()?)?);
    }
    let cluster = shared.cluster.as_mut().context("it was just started")?;
    let outcome = ready::make_ready(cluster).and_then(|()| body(cluster));
    let Err(error) = outcome else { return Ok(()) };
    let story = cluster.story();
    shared.failed = true;
    Err(error.context(story))
}
