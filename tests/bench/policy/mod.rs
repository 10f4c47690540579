//! `policy`: the data path of network policy, with one policy and with ten thousand, beside rule sets of the kind that
//! others generate for the same policies; and the time that changes and starts take.
//!
//! Each rule set has a node of its own, all on this machine: pods as network namespaces, attached by our plugin. Rounds
//! alternate between the nodes, so that what else the machine does falls on all of them.

mod changes;
mod nodes;
mod shapes;
mod traffic;
mod world;

use std::time::Instant;

use anyhow::{Context, Result};
use clap::Args;
use holdfast_tests::Work;
use holdfast_tests::cleanup::{self, Logs};

use crate::figures::{self, Figure, RatioLimit, median, percentile};
use changes::{Done, Script};
use nodes::PolicyNode;
use shapes::Shape;
use world::World;

pub use changes::{ChangesOptions, run_changes};
pub use traffic::{TrafficOptions, run_traffic};

/// Policies that the peers are given at most; with more they fail.
const PEER_POLICIES: usize = 4000;
/// Policies on the pod whose denied packets are counted.
const POLICIES_ON_SERVER: usize = 100;
/// Pods on the node beside the client.
const SLOTS: usize = 100;
/// Of the datagrams that were sent, this part must have been judged and dropped by policy, in thousandths.
const JUDGED_PER_MILLE: u64 = 999;
const FLAT: f64 = 0.1;
const DENIED_RATIO: f64 = 3.0;
const CHANGE_LIMIT_MS: f64 = 5.0;
const END_TO_END_LIMIT_MS: f64 = 20.0;
const STARTUP_LIMIT_S: f64 = 2.0;
const RSS_LIMIT_MIB: f64 = 64.0;
const FLOW_LOG_RATIO: f64 = 0.98;
/// Figures of [`change_times`] and of [`starts`].
const CHANGE_NAMES: [&str; 4] = [
    "policy.change_p99_ms",
    "policy.end_to_end_p99_ms",
    "policy.change_ranges_p99_ms",
    "policy.end_to_end_ranges_p99_ms",
];
const START_NAMES: [&str; 2] = ["policy.startup_s", "policy.rss_mib"];

/// How much is measured.
#[derive(Debug, Args)]
pub struct Options {
    /// One JSON object per line instead of the table.
    #[arg(long)]
    json: bool,
    /// Only the figures whose names begin with this; may be given several times.
    #[arg(long)]
    only: Vec<String>,
    /// Policies on the large node.
    #[arg(long, default_value_t = 10_000)]
    policies: usize,
    /// Pods on other nodes that they admit.
    #[arg(long, default_value_t = 100_000)]
    peers: usize,
    /// How often each side is measured; the median counts.
    #[arg(long, default_value_t = 9)]
    rounds: usize,
    /// Milliseconds of one measurement.
    #[arg(long, default_value_t = 1000)]
    millis: u64,
    /// Rounds of six changes each.
    #[arg(long, default_value_t = 100)]
    change_rounds: usize,
    /// A small cluster and short rounds, to see that everything works; the figures mean nothing.
    #[arg(long)]
    quick: bool,
}

impl Options {
    fn world(&self) -> World {
        let (policies, peers) = if self.quick { (400, 4000) } else { (self.policies, self.peers) };
        let slots = if self.quick { 10 } else { SLOTS };
        World { policies, peers, slots, on_server: POLICIES_ON_SERVER.min(policies) }
    }

    fn wants(&self, names: &[&str]) -> bool {
        let wanted = |prefix: &String| names.iter().any(|name| name.starts_with(prefix));
        self.only.is_empty() || self.only.iter().any(wanted)
    }

    fn rounds(&self) -> usize {
        if self.quick { 2 } else { self.rounds }
    }

    fn millis(&self) -> u64 {
        if self.quick { 200 } else { self.millis }
    }

    fn change_rounds(&self) -> usize {
        if self.quick { 5 } else { self.change_rounds }
    }
}

/// Runs it all and prints the figures.
///
/// # Errors
/// Something could not be started or measured, or something is left behind.
pub fn run(options: &Options) -> Result<()> {
    cleanup::sweep_dead_runs()?;
    let work = Work::create("bench")?;
    cleanup::set_active(Some(work.dir()));
    // The namespaces end with `measure_all`, before the folder is swept.
    let measured = measure_all(&work, options);
    let logs = if measured.is_ok() { Logs::Remove } else { Logs::Keep };
    let swept = cleanup::sweep(work.dir(), logs);
    cleanup::set_active(None);
    let figures = measured?;
    swept?;
    figures::print(&figures, options.json);
    Ok(())
}

fn measure_all(work: &Work, options: &Options) -> Result<Vec<Figure>> {
    let start = Instant::now();
    let tell = |text: &str| eprintln!("{:>6.1} s  {text}", start.elapsed().as_secs_f64());
    let world = options.world();
    let mut figures = Vec::new();
    tell(&format!("a node with {} policies and {} peers", world.policies, world.peers));
    let mut many = PolicyNode::start(work, "many", &world)?;
    let (flat_names, log_name) =
        (["policy.conn_rate_10k_vs_1", "policy.cpu_per_conn_10k_vs_1"], "policy.flowlog_conn_rate");
    if options.wants(&flat_names) || options.wants(&[log_name]) {
        tell("a node with one policy");
        let mut one = PolicyNode::start(work, "one", &World { slots: 1, ..world.first(1) })?;
        if options.wants(&flat_names) {
            figures.extend(flat(options, flat_names, (&mut one, &mut many), &tell)?);
        }
        if options.wants(&[log_name]) {
            figures.push(flow_log(work, options, log_name, &mut one, &tell)?);
        }
    }
    for (name, shape) in [
        ("policy.denied_rate_vs_chain_per_pod", Shape::ChainPerPod),
        ("policy.denied_rate_vs_chain_per_policy", Shape::ChainPerPolicy),
    ] {
        if options.wants(&[name]) {
            figures.push(denied(work, options, (name, shape), &mut many, &tell)?);
        }
    }
    if options.wants(&CHANGE_NAMES) {
        figures.extend(change_times(options, &world, &many, &tell)?);
    }
    if options.wants(&START_NAMES) {
        figures.extend(starts(options, &mut many, &tell)?);
    }
    anyhow::ensure!(!figures.is_empty(), "no figure's name begins with {:?}", options.only);
    Ok(figures)
}

/// Connections with one policy and with many.
fn flat(
    options: &Options,
    [rate, cost]: [&str; 2],
    (one, many): (&mut PolicyNode, &mut PolicyNode),
    tell: &dyn Fn(&str),
) -> Result<Vec<Figure>> {
    let (mut rates, mut costs) = ([Vec::new(), Vec::new()], [Vec::new(), Vec::new()]);
    for round in 1..=options.rounds() {
        tell(&format!("connections, round {round} of {}", options.rounds()));
        for (side, node) in [&mut *many, &mut *one].into_iter().enumerate() {
            let connections = node.connect(options.millis())?;
            rates[side].push(connections.per_second);
            costs[side].push(connections.cpu_us_each);
        }
    }
    Ok(vec![
        Figure::of_rounds(rate, "/s", "ours with 1 policy", &rates[0], &rates[1])
            .with_ratio(RatioLimit::AtLeast(1.0 - FLAT)),
        Figure::of_rounds(cost, "us", "ours with 1 policy", &costs[0], &costs[1])
            .with_ratio(RatioLimit::AtMost(1.0 + FLAT)),
    ])
}

/// Denied packets beside a peer's rules for as many of the policies as it loads.
fn denied(
    work: &Work,
    options: &Options,
    (name, shape): (&str, Shape),
    many: &mut PolicyNode,
    tell: &dyn Fn(&str),
) -> Result<Figure> {
    let world = options.world();
    let node = if shape == Shape::ChainPerPod { "per-pod" } else { "per-policy" };
    let mut peer = PolicyNode::start(work, node, &World { slots: 1, ..world.first(1) })?;
    let mut policies = PEER_POLICIES.min(world.policies);
    let seconds = loop {
        tell(&format!("{}: loading {policies} policies", shape.name()));
        if let Some(seconds) = peer.replace(work, shape, &world.first(policies))? {
            break seconds;
        }
        policies /= 2;
        anyhow::ensure!(policies >= POLICIES_ON_SERVER, "the peer loads no rules at all");
    };
    tell(&format!("{}: {policies} policies loaded within {seconds:.1} s", shape.name()));
    // The peer lets through what ours does.
    peer.connect(10).context("through the peer's rules")?;
    let before = [many.denied()?, peer.denied()?];
    let (mut rates, mut sent) = ([Vec::new(), Vec::new()], [0, 0]);
    for _ in 0..options.rounds() {
        for (side, node) in [&mut *many, &mut peer].into_iter().enumerate() {
            let (per_second, count) = node.send_denied(options.millis() / 2)?;
            rates[side].push(per_second);
            sent[side] += count;
        }
    }
    let judged = [many.denied()? - before[0], peer.denied()? - before[1]];
    for (sent, judged) in sent.into_iter().zip(judged) {
        anyhow::ensure!(
            judged * 1000 >= sent * JUDGED_PER_MILLE,
            "of {sent} packets only {judged} were judged and dropped by policy; the rest was lost elsewhere"
        );
    }
    let peer_name = format!("{}, {policies} policies", shape.name());
    Ok(Figure::of_rounds(name, "/s", &peer_name, &rates[0], &rates[1])
        .with_ratio(RatioLimit::AtLeast(DENIED_RATIO)))
}

/// Connections with the flow log being read, and without any log. More and shorter rounds than elsewhere: two percent are
/// to be seen.
fn flow_log(
    work: &Work,
    options: &Options,
    name: &str,
    node: &mut PolicyNode,
    tell: &dyn Fn(&str),
) -> Result<Figure> {
    let rounds = options.rounds() * 3;
    tell(&format!("connections with a reader of the flow log and without the log, {rounds} rounds"));
    let reader = node.read_flows(work)?;
    let (mut on, mut off) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        on.push(node.connect(options.millis() / 2)?.per_second);
        node.stop_log()?;
        let without = node.connect(options.millis() / 2);
        node.resume_log()?;
        off.push(without?.per_second);
    }
    let told = reader.log()?.lines().filter(|line| line.contains("\"allowed\":true")).count();
    anyhow::ensure!(told > 0, "the reader of the flow log was told nothing:\n{}", reader.log_tail());
    tell(&format!("the reader was told {told} connections"));
    Ok(Figure::of_rounds(name, "/s", "ours without the log", &on, &off)
        .with_ratio(RatioLimit::AtLeast(FLOW_LOG_RATIO)))
}

fn change_times(
    options: &Options,
    world: &World,
    node: &PolicyNode,
    tell: &dyn Fn(&str),
) -> Result<Vec<Figure>> {
    let script = Script::of_objects(world, options.change_rounds());
    tell(&format!("{} changes of one pod, label or policy", script.len()));
    let done = node.change(&script)?;
    let inside = engine_ms(node, script.len())?;
    let ranges = Script::of_ranges(world, options.change_rounds().div_ceil(5));
    tell(&format!("{} changes of policies with CIDRs or ranges of ports", ranges.len()));
    let done_ranges = node.change(&ranges)?;
    let inside_ranges = engine_ms(node, ranges.len())?;
    let apart = done.iter().filter(|done| done.deleted_ranges).count();
    if apart > 0 {
        tell(&format!(
            "{apart} of the first kind deleted elements of ranges; they are reported with the others"
        ));
    }
    let ms = |done: &[&Done]| -> Vec<f64> { done.iter().map(|done| done.ms).collect() };
    let (plain, deleted): (Vec<&Done>, Vec<&Done>) =
        done.iter().chain(&done_ranges).partition(|done| !done.deleted_ranges);
    let [change, end_to_end, change_ranges, end_to_end_ranges] = CHANGE_NAMES;
    Ok(vec![
        Figure::within(change, "ms", percentile(&inside, 99), CHANGE_LIMIT_MS),
        Figure::within(end_to_end, "ms", percentile(&ms(&plain), 99), END_TO_END_LIMIT_MS),
        Figure::told(change_ranges, "ms", percentile(&inside_ranges, 99)),
        Figure::told(end_to_end_ranges, "ms", percentile(&ms(&deleted), 99)),
    ])
}

/// Milliseconds from the event at the engine to the commit, of the last changes.
fn engine_ms(node: &PolicyNode, changes: usize) -> Result<Vec<f64>> {
    let dump = node.dump()?;
    let recent =
        dump["changes"]["recentUs"].as_array().context("the agent's dump has no changes.recentUs")?;
    let last = &recent[recent.len().saturating_sub(changes)..];
    anyhow::ensure!(
        last.len() * 2 >= changes.min(1000),
        "of {changes} changes only {} were written",
        last.len()
    );
    Ok(last.iter().filter_map(serde_json::Value::as_f64).map(|us| us / 1000.0).collect())
}

fn starts(options: &Options, node: &mut PolicyNode, tell: &dyn Fn(&str)) -> Result<Vec<Figure>> {
    let (now, most) = node.agent_mib()?;
    tell(&format!("the agent has {now:.1} MiB, had at most {most:.1} MiB"));
    let (mut empty, mut full) = (Vec::new(), Vec::new());
    for _ in 0..options.rounds().div_ceil(3) {
        full.push(node.restart(false)?);
        empty.push(node.restart(true)?);
    }
    let (full, empty) = (median(&full), median(&empty));
    tell(&format!("starts: {full:.2} s with the kernel as it was, {empty:.2} s with the kernel empty"));
    let [startup, rss] = START_NAMES;
    Ok(vec![
        Figure::within(startup, "s", full.max(empty), STARTUP_LIMIT_S),
        Figure::within(rss, "MiB", now, RSS_LIMIT_MIB),
    ])
}
