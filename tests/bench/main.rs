//! Measures Holdfast beside a peer on this machine, in one run, under the same load. `scripts/bench` builds and runs it.

mod csi;
mod figures;
mod fio;
mod network;
mod node;
mod ours;
mod peer;
mod place;
mod policy;
mod storage;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};
use holdfast_tests::{cleanup, helper};

/// Holdfast beside a peer, in one run on this machine.
#[derive(Parser)]
struct Arguments {
    #[command(subcommand)]
    part: Part,
}

#[derive(Subcommand)]
enum Part {
    /// A replicated volume beside qemu-storage-daemon's quorum of three.
    Storage(storage::Options),
    /// The plugin and the data path beside the reference plugins, a VXLAN and a veth pair made by hand.
    Network(network::Options),
    /// The rules of network policy, with one policy and with ten thousand, beside those of other shapes.
    Policy(policy::Options),
    /// Many volumes through the CSI services: time of each call, memory of the controller.
    Csi(csi::Options),
    /// Times a plugin's calls; started by `network` inside a node.
    #[command(hide = true)]
    NetworkCalls(network::CallsOptions),
    /// Asks and answers over one connection; started by `network` inside a pod.
    #[command(hide = true)]
    NetworkTrips(network::TripsOptions),
    /// Connects, sends or serves; started by `policy` inside a pod.
    #[command(hide = true)]
    PolicyTraffic(policy::TrafficOptions),
    /// Changes objects and waits for the kernel; started by `policy` inside a node.
    #[command(hide = true)]
    PolicyChanges(policy::ChangesOptions),
}

fn main() -> ExitCode {
    if let Some(code) = helper::run_if_asked() {
        return code;
    }
    match run(Arguments::parse().part) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe bench failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(part: Part) -> Result<()> {
    anyhow::ensure!(nix::unistd::geteuid().is_root(), "it needs root: it makes namespaces, links and mounts");
    match part {
        Part::NetworkCalls(options) => network::run_calls(&options),
        Part::NetworkTrips(options) => network::run_trips(&options),
        Part::PolicyTraffic(options) => policy::run_traffic(&options),
        Part::PolicyChanges(options) => policy::run_changes(&options),
        Part::Storage(options) => cleanup::end_when_interrupted().and_then(|()| storage::run(&options)),
        Part::Csi(options) => cleanup::end_when_interrupted().and_then(|()| csi::run(&options)),
        Part::Network(options) => cleanup::end_when_interrupted().and_then(|()| network::run(&options)),
        Part::Policy(options) => cleanup::end_when_interrupted().and_then(|()| policy::run(&options)),
    }
}
