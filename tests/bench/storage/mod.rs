//! `storage`: a volume with three replicas beside qemu's quorum of three.

use std::time::Instant;

use anyhow::Result;
use clap::Args;
use holdfast_tests::cleanup::Logs;

use crate::figures::{self, Figure};
use crate::fio::{self, Access, JOBS};
use crate::ours::{Ours, Tls};
use crate::peer::{self, Peer};
use crate::place::Place;

/// How much is measured.
#[derive(Debug, Args)]
pub struct Options {
    /// One JSON object per line instead of the table.
    #[arg(long)]
    json: bool,
    /// Size of the volume.
    #[arg(long, default_value_t = 512)]
    size_mib: u64,
    /// How long each job runs, after one second to warm up.
    #[arg(long, default_value_t = 4)]
    seconds: u64,
    /// How often each job runs on each side; the median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
    /// Without the front ends.
    #[arg(long)]
    no_fuse: bool,
    /// Without the figure for TLS.
    #[arg(long)]
    no_tls: bool,
}

/// What is written and read back at the end.
const VERIFY_MIB: u64 = 128;

/// Runs it all and prints the figures.
pub fn run(options: &Options) -> Result<()> {
    let place = Place::new()?;
    let measured = measure_all(&place, options);
    let logs = if measured.is_ok() { Logs::Remove } else { Logs::Keep };
    let ended = place.end(logs);
    figures::print(&measured?, options.json);
    ended
}

fn measure_all(place: &Place, options: &Options) -> Result<Vec<Figure>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let start = Instant::now();
    let tell = |text: &str| eprintln!("{:>6.1} s  {text}", start.elapsed().as_secs_f64());

    tell("starting the peer");
    let mut peer = Peer::start(place, options.size_mib)?;
    let peer_nbd = peer.serve_nbd(place)?;
    tell("starting a controller and three data processes, TLS off, checksums and intent log on");
    let ours = Ours::start(place, &runtime, Tls::Off, options.size_mib)?;
    tell("filling both");
    fio::fill(place, &peer_nbd, options.size_mib)?;
    fio::fill(place, &ours.nbd, options.size_mib)?;

    let verify_mib = VERIFY_MIB.min(options.size_mib);
    let mut figures = compare(place, options, "nbd", (&ours.nbd, &peer_nbd), &tell)?;
    tell("verifying the data");
    fio::verify(place, &ours.nbd, verify_mib)?;
    fio::verify(place, &peer_nbd, verify_mib)?;
    if !options.no_fuse {
        let peer_block = peer.serve_block(place)?;
        figures.extend(compare(place, options, "fuse", (&ours.block, &peer_block), &tell)?);
        tell("verifying the data");
        fio::verify(place, &ours.block, verify_mib)?;
        fio::verify(place, &peer_block, verify_mib)?;
    }
    peer.stop(place)?;
    for line in peer.command_lines() {
        eprintln!("peer: {line}");
    }
    eprintln!(
        "peer: files preallocated, on the same file system as ours; a read asks one replica (read-pattern=fifo)"
    );
    if !options.no_tls {
        figures.push(tls_ratio(place, &runtime, &ours, options, &tell)?);
    }
    ours.detach()?;
    Ok(figures)
}

/// All jobs in rounds that alternate between the two, so that a machine that slows down slows down both.
fn compare(
    place: &Place,
    options: &Options,
    prefix: &str,
    (ours, peer): (&Access, &Access),
    tell: &dyn Fn(&str),
) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    for job in &JOBS {
        let measure = |access: &Access| fio::measure(place, access, job, options.size_mib, options.seconds);
        let mut rounds = (Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            rounds.0.push(measure(ours)?);
            rounds.1.push(measure(peer)?);
        }
        let name = format!("{prefix}.{}", job.name);
        let figure = Figure::of_rounds(&name, job.unit, peer::NAME, &rounds.0, &rounds.1);
        tell(&format!("{name}: ours {:.0}, peer {:.0} {}", figure.ours, figure.peer, figure.unit));
        figures.push(figure);
    }
    Ok(figures)
}

/// What mutual TLS between the nodes costs: ours with it beside ours without.
fn tls_ratio(
    place: &Place,
    runtime: &tokio::runtime::Runtime,
    plain: &Ours,
    options: &Options,
    tell: &dyn Fn(&str),
) -> Result<Figure> {
    tell("starting a second set of ours, TLS on");
    let secured = Ours::start(place, runtime, Tls::On, options.size_mib)?;
    fio::fill(place, &secured.nbd, options.size_mib)?;
    let job = &JOBS[1];
    let mut rounds = (Vec::new(), Vec::new());
    for _ in 0..options.rounds {
        rounds.0.push(fio::measure(place, &secured.nbd, job, options.size_mib, options.seconds)?);
        rounds.1.push(fio::measure(place, &plain.nbd, job, options.size_mib, options.seconds)?);
    }
    secured.detach()?;
    let figure = Figure::of_rounds("engine.tls_on_off_iops", "iops", "ours, TLS off", &rounds.0, &rounds.1);
    tell(&format!("{}: TLS on {:.0}, off {:.0} {}", figure.name, figure.ours, figure.peer, figure.unit));
    Ok(figure)
}
