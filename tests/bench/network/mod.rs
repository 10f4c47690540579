//! `network`: the plugin and the data path beside the reference plugins, a hand-made VXLAN and a bare veth pair.
//!
//! Everything runs in namespaces of its own. The plugins are executed as a runtime does it: environment and standard
//! input, timed from the start of the process to its end, by a process inside the node.

mod calls;
mod many_nodes;
mod nodes;
mod streams;
mod trips;

use std::time::Instant;

use anyhow::Result;
use clap::Args;
use holdfast_tests::Work;
use holdfast_tests::cleanup::{self, Logs};

use crate::figures::{self, Figure};
use crate::node::make_sandbox;

pub use calls::{CallsOptions, run_calls};
pub use trips::{TripsOptions, run_trips};

/// How much is measured.
#[derive(Debug, Args)]
pub struct Options {
    /// One JSON object per line instead of the table.
    #[arg(long)]
    json: bool,
    /// Pods per round.
    #[arg(long, default_value_t = 100)]
    pods: usize,
    /// How often each side is measured; the median counts.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// How ours attaches pods: bridge or routed.
    #[arg(long, default_value = "bridge")]
    attachment: String,
    /// How long each stream runs, after one second to warm up.
    #[arg(long, default_value_t = 3)]
    seconds: u32,
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
    tell("starting two nodes with holdfast-netd, and two without for the peers");
    let sandboxes = options.pods.max(calls::BURST);
    let ours = nodes::Ours::start(work, sandboxes, &options.attachment)?;
    let peer = nodes::Peer::start(work)?;
    tell(&format!("making {sandboxes} sandboxes on each side"));
    for index in 0..sandboxes {
        make_sandbox(&ours.nodes[0], &nodes::pod_name(index))?;
        make_sandbox(&ours.nodes[1], &nodes::pod_name(index))?;
        make_sandbox(&peer.nodes[0], &nodes::pod_name(index))?;
    }
    let sides = calls::Sides::new(work, &ours)?;
    let mut figures = calls::compare(&sides, &ours, &peer, options.pods, options.rounds, &tell)?;
    figures.extend(calls::burst(&sides, &ours, &peer, options.rounds, &tell)?);
    figures.push(calls::flatness(&ours, options.pods, options.rounds, &tell)?);
    figures.extend(streams::compare(&ours, &peer, options.rounds, options.seconds, &tell)?);
    figures.push(many_nodes::measure(&ours, &tell)?);
    Ok(figures)
}
