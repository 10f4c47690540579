//! Figures of ours beside the peer's.

use anyhow::Result;

use crate::figures::Figure;
use crate::fio::{self, Access, JOBS, Job};
use crate::peer::{self, Peer};

use super::Bench;

/// What is written and read back at the end.
const VERIFY_MIB: u64 = 128;

/// Both front ends, as far as their figures are wanted.
pub fn measure(bench: &mut Bench<'_>) -> Result<Vec<Figure>> {
    let (nbd, fuse) = (wanted(bench, "nbd"), wanted(bench, "fuse"));
    if nbd.is_empty() && fuse.is_empty() {
        return Ok(Vec::new());
    }
    let size_mib = bench.options.size_mib;
    bench.tell("starting the peer");
    let mut peer = Peer::start(bench.place, size_mib)?;
    let peer_nbd = peer.serve_nbd(bench.place)?;
    let ours = bench.plain()?;
    let (ours_nbd, ours_block) = (ours.nbd(), ours.block());
    bench.tell("filling the peer");
    fio::fill(bench.place, &peer_nbd, size_mib)?;
    let mut figures = compare(bench, "nbd", &nbd, (&ours_nbd, &peer_nbd))?;
    if !fuse.is_empty() {
        let peer_block = peer.serve_block(bench.place)?;
        figures.extend(compare(bench, "fuse", &fuse, (&ours_block, &peer_block))?);
    }
    peer.stop(bench.place)?;
    for line in peer.command_lines() {
        eprintln!("peer: {line}");
    }
    eprintln!(
        "peer: files preallocated, on the same file system as ours; a read asks one replica (read-pattern=fifo)"
    );
    Ok(figures)
}

fn wanted(bench: &Bench<'_>, prefix: &str) -> Vec<&'static Job> {
    JOBS.iter().filter(|job| bench.wants(&format!("{prefix}.{}", job.name))).collect()
}

/// The jobs in rounds that alternate between the two, so that a machine that slows down slows down both; then what both
/// hold is verified.
fn compare(
    bench: &Bench<'_>,
    prefix: &str,
    jobs: &[&Job],
    (ours, peer): (&Access, &Access),
) -> Result<Vec<Figure>> {
    let (place, options) = (bench.place, bench.options);
    let mut figures = Vec::new();
    for job in jobs {
        let measure = |access: &Access| fio::measure(place, access, job, options.size_mib, options.seconds);
        let mut rounds = (Vec::new(), Vec::new());
        for _ in 0..options.rounds {
            rounds.0.push(measure(ours)?);
            rounds.1.push(measure(peer)?);
        }
        let name = format!("{prefix}.{}", job.name);
        let figure = Figure::of_rounds(&name, job.unit, peer::NAME, &rounds.0, &rounds.1);
        bench.tell(&format!("{name}: ours {:.0?}, peer {:.0?} {}", rounds.0, rounds.1, figure.unit));
        figures.push(figure);
    }
    if !jobs.is_empty() {
        bench.tell("verifying the data");
        let verify_mib = VERIFY_MIB.min(options.size_mib);
        fio::verify(place, ours, verify_mib)?;
        fio::verify(place, peer, verify_mib)?;
    }
    Ok(figures)
}
