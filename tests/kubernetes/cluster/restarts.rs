//! Parts of nodes and of the control plane end at random and start again: everything converges.

use std::collections::BTreeMap;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use holdfast_tests::effort::{rounds, seed};
use holdfast_tests::go_tools::Skip;
use holdfast_tests::k8s::{KubeCluster, NODES, Tools, has_condition};
use libtest_mimic::Trial;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::Value;

use super::bank::Bank;
use super::ready::{NAMESPACE, unready};
use super::trial;

/// Restarts in CI, and by hand.
const RESTARTS: (usize, usize) = (4, 200);
/// Within this time everything is as before, or whatever is not says why.
const CONVERGED_WITHIN: Duration = Duration::from_secs(60);
/// After this it never will be.
const CONVERGED_MAX: Duration = Duration::from_secs(300);
/// A node without power lies still for up to so long.
const DARK_MAX: Duration = Duration::from_secs(30);
/// Workloads of ours whose pods may go at any time. Those of the data process may while nothing is attached there, which `upgrade` tries.
const PODS: [&str; 4] =
    ["holdfast-netd", "holdfast-node", "holdfast-controller", "holdfast-network-controller"];

pub fn trials(tools: &Result<Tools, Skip>) -> Vec<Trial> {
    vec![trial(tools, "random_restarts_of_nodes_and_control_plane_converge", restarts)]
}

/// What is done to the cluster.
#[derive(Debug, Clone, Copy)]
enum Blow {
    Power(&'static str, Duration),
    Program(&'static str, &'static str),
    Control(&'static str),
    Pod(&'static str),
}

impl fmt::Display for Blow {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Power(node, time) => write!(f, "power of {node} away for {:.0} s", time.as_secs_f64()),
            Self::Program(node, program) => write!(f, "{program} of {node} killed"),
            Self::Control(part) => write!(f, "{part} killed"),
            Self::Pod(app) => write!(f, "a pod of {app} deleted"),
        }
    }
}

impl Blow {
    fn draw(random: &mut StdRng) -> Self {
        let node = NODES.choose(random).copied().unwrap_or(NODES[0]);
        let pick = |random: &mut StdRng, of: &[&'static str]| of.choose(random).copied().unwrap_or(of[0]);
        match random.random_range(0..10) {
            0..3 => Self::Power(node, random.random_range(Duration::ZERO..DARK_MAX)),
            3..5 => Self::Program(node, pick(random, &["containerd", "kubelet", "kube-proxy"])),
            5..8 => Self::Control(pick(
                random,
                &["kube-apiserver", "kube-apiserver", "kube-controller-manager", "kube-scheduler"],
            )),
            _ => Self::Pod(pick(random, &PODS)),
        }
    }

    fn strike(self, cluster: &mut KubeCluster, random: &mut StdRng) -> Result<()> {
        match self {
            Self::Power(node, time) => {
                cluster.power_off(node)?;
                std::thread::sleep(time);
                cluster.power_on(node)
            }
            Self::Program(node, program) => cluster.restart(Some(node), program),
            Self::Control(part) => cluster.restart(None, part),
            Self::Pod(app) => {
                let selector = format!("--selector=app.kubernetes.io/name={app}");
                let pods = cluster.get(&["pods", "-n", NAMESPACE, &selector])?;
                let pods = pods["items"].as_array().context("a list")?;
                let pod = pods.choose(random).with_context(|| format!("{app} has no pod"))?;
                let name = pod["metadata"]["name"].as_str().context("a name")?;
                let grace = ["--grace-period=0", "--force"];
                let how = if random.random_bool(0.5) { &grace[..] } else { &[] };
                cluster
                    .kubectl(&[&["delete", "pod", "-n", NAMESPACE, name, "--wait=false"], how].concat())
                    .map(drop)
            }
        }
    }
}

fn restarts(cluster: &mut KubeCluster) -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed()?);
    let bank = Bank::start(cluster, "restarts", 1)?;
    let client = bank.client(cluster, "restarts-client", "", 1)?;
    let (mut slowest, mut late) = (Duration::ZERO, Vec::new());
    let count = rounds(RESTARTS.0, RESTARTS.1);
    for number in 1..=count {
        let blow = Blow::draw(&mut random);
        println!("{number} of {count}: {blow}");
        blow.strike(cluster, &mut random).with_context(|| format!("restart {number}: {blow}"))?;
        let took = converge(cluster, &mut late).with_context(|| format!("after restart {number}: {blow}"))?;
        slowest = slowest.max(took);
        // The client's next entry came over the node that it knows and the pod as it is now.
        client.wait_for(20).with_context(|| format!("after restart {number}: {blow}"))?;
    }
    let kept = client.end(|| bank.numbers(cluster, ""))?;
    println!(
        "{count} restarts: all converged, the slowest after {:.0} s, {} of them later than {} s and with a reason; {kept} acknowledged entries, all there",
        slowest.as_secs_f64(),
        late.len(),
        CONVERGED_WITHIN.as_secs()
    );
    late.iter().for_each(|reasons| println!("  {reasons}"));
    bank.remove(cluster)
}

/// Waits until all is as it should be. What is not in time must say why.
fn converge(cluster: &KubeCluster, late: &mut Vec<String>) -> Result<Duration> {
    let start = Instant::now();
    let mut was_late = false;
    // What is told of a node that was struck is from before, until it gives a new sign of life.
    let signs = signs_of_life(cluster)?;
    let is_heard = |now: &BTreeMap<String, String>| {
        NODES.iter().all(|node| now.get(*node).is_some_and(|sign| signs.get(*node) != Some(sign)))
    };
    loop {
        let mut left = unsettled(cluster)?;
        if left.is_empty() && !is_heard(&signs_of_life(cluster)?) {
            left.insert("nodes".to_owned(), "not every node has given a sign of life since".to_owned());
        }
        if left.is_empty() {
            return Ok(start.elapsed());
        }
        if !was_late && start.elapsed() > CONVERGED_WITHIN {
            was_late = true;
            let silent: Vec<&String> =
                left.iter().filter(|(_, reason)| reason.is_empty()).map(|(what, _)| what).collect();
            ensure!(
                silent.is_empty(),
                "after {CONVERGED_WITHIN:?} these do not say what they wait for: {silent:?}"
            );
            late.push(format!("{left:?}"));
        }
        if start.elapsed() > CONVERGED_MAX {
            bail!("not as before after {CONVERGED_MAX:?}: {left:?}");
        }
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// When each node was heard of last, as the API server has it.
fn signs_of_life(cluster: &KubeCluster) -> Result<BTreeMap<String, String>> {
    let leases = cluster.get(&["leases", "-n", "kube-node-lease"])?;
    let sign = |lease: &Value| {
        let name = lease["metadata"]["name"].as_str()?;
        Some((name.to_owned(), lease["spec"]["renewTime"].as_str()?.to_owned()))
    };
    Ok(leases["items"].as_array().context("a list")?.iter().filter_map(sign).collect())
}

/// Nodes, volumes and pods that are not as they should be, each with the reason that is told for it.
fn unsettled(cluster: &KubeCluster) -> Result<BTreeMap<String, String>> {
    let mut left = BTreeMap::new();
    let mut look = |kind: &str, is_fine: &dyn Fn(&Value) -> bool| -> Result<()> {
        let objects = cluster.get(&[kind, "-A"])?;
        for object in objects["items"].as_array().context("a list")? {
            if !is_fine(object) {
                let name = object["metadata"]["name"].as_str().unwrap_or_default();
                left.insert(format!("{kind} {name}"), reason_of(object));
            }
        }
        Ok(())
    };
    look("nodes", &|node| has_condition(node, "Ready"))?;
    look("pods", &|pod| has_condition(pod, "Ready"))?;
    look("volumes.storage.holdfast.dev", &|volume| volume["status"]["inSync"] == "3/3")?;
    for workload in unready(cluster)? {
        // Its pods, or that they are missing, tell more.
        left.entry(workload).or_insert_with(|| "not all of its pods are ready".to_owned());
    }
    Ok(left)
}

/// What the object's conditions and containers say, where they say something.
fn reason_of(object: &Value) -> String {
    let status = &object["status"];
    let conditions = status["conditions"].as_array().into_iter().flatten();
    let containers = status["containerStatuses"].as_array().into_iter().flatten();
    let waiting =
        containers.flat_map(|container| [&container["state"]["waiting"], &container["state"]["terminated"]]);
    let told = conditions.filter(|condition| condition["status"] != "True").chain(waiting);
    let told = told.filter_map(|told| {
        let text = |key: &str| told[key].as_str().filter(|text| !text.is_empty());
        text("message").or_else(|| text("reason"))
    });
    let told: Vec<&str> = told.collect();
    told.join("; ")
}
