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
mod releases;
mod restarts;
mod steady;
mod suites;
mod upgrade;
mod volumes;

use std::path::PathBuf;
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
    // Nothing can follow it on the same cluster; what does has one of its own.
    trials.extend(leaving::trials(&tools));
    trials.extend(releases::trials(&tools));
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
    skippable(name, tools.clone(), move |tools| on_shared(tools, body))
}

/// A trial that needs something; where that is missing it is skipped, and says why.
fn skippable<T: Send + 'static>(
    name: &str,
    needs: Result<T, Skip>,
    body: impl FnOnce(&T) -> Result<()> + Send + 'static,
) -> Trial {
    let name = format!("cluster::{name}");
    match needs {
        Ok(needs) => Trial::test(name, move || body(&needs).map_err(|error| format!("{error:#}").into())),
        Err(skip) => {
            println!("{skip}");
            Trial::test(name, || Ok(())).with_ignored_flag(true)
        }
    }
}

fn on_shared(tools: &Tools, body: impl FnOnce(&mut KubeCluster) -> Result<()>) -> Result<()> {
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    if shared.cluster.is_none() {
        shared.cluster = Some(KubeCluster::start(tools, vec![ready::image()?])?);
    }
    shared.run(|cluster| ready::make_ready(cluster).and_then(|()| body(cluster)))
}

/// Runs `body` on a cluster of its own that has nothing of ours but images. The shared one is ended: nothing that needs it can follow.
fn on_fresh(
    tools: &Tools,
    images: Vec<PathBuf>,
    body: impl FnOnce(&mut KubeCluster) -> Result<()>,
) -> Result<()> {
    end()?;
    let mut shared = SHARED.lock().unwrap_or_else(PoisonError::into_inner);
    *shared = Shared { cluster: Some(KubeCluster::start(tools, images)?), failed: false };
    shared.run(body)
}

impl Shared {
    fn run(&mut self, body: impl FnOnce(&mut KubeCluster) -> Result<()>) -> Result<()> {
        let cluster = self.cluster.as_mut().context("no cluster was started")?;
        let Err(error) = body(cluster) else { return Ok(()) };
        let story = cluster.story();
        self.failed = true;
        Err(error.context(story))
    }
}
