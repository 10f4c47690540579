//! Seeded simulation of the write path: the very `Target` and `Replica` of the data process, under simulated clocks,
//! network, disks and record store. docs/simulator.md says what is shared with the data process and what is modelled.
//!
//! `scripts/test sim --seeds N` runs N mixed seeds, N / 8 of each other family and N / 16 of groups;
//! `HOLDFAST_SIM_SEED=S scripts/test sim` runs one with a trace of what happened. Each failing seed prints the line that
//! replays it.

#![allow(clippy::print_stderr, missing_docs)]

mod bites;
mod chaos;
mod client;
mod coordinators;
mod coverage;
mod damage;
mod disk;
mod families;
mod groups;
mod history;
mod layers;
mod operator;
mod removals;
mod replica_host;
mod rescues;
mod rot;
mod run;
mod snapshots;
mod store_host;
mod stragglers;
mod target_host;
mod traps;
mod world;

use families::Family;
use holdfast_storage_core::guards::Guards;

/// Mixed seeds of a plain run; a few minutes on two slow cores in release mode.
const SEEDS: u64 = if cfg!(debug_assertions) { 150 } else { 1_500 };

/// Client operations that CI's share has at least.
const OPERATIONS: u64 = 1_000_000;

/// A run that lost everything names every block otherwise.
const VIOLATIONS_SHOWN: usize = 8;

/// Seeds that once found something, kept for good.
///
/// - Extents of a source that was lost before it answered, or that a write begun earlier had not reached, were taken for
///   "nothing there": a returning replica joined without data.
/// - A full intent log kept out the copies whose end would have made room.
/// - A target that slept through its timer got no other one (of the simulation's own).
/// - A copy that waited for the throttle in a configuration that was not settled was due for ever: a processor was lost.
/// - A write that one member refused while another was away kept the target deciding for ever.
/// - Copies that waited for room in the intent log kept out those whose end would have made it (another way than above).
/// - A member that had lost its cache was flushed, and its log cleared, while a call to the store kept the target from
///   judging it: acknowledged writes were gone and nobody said so.
/// - An Open that was overtaken by a later one of the same target dropped snapshots that were committed in between.
/// - A returning replica was asked to grow to the volume's size and to a larger one at a time; the smaller ended last, and the
///   member that it became was smaller than the record said: no target could ever open it again.
const REGRESSIONS: &[u64] = &[
    5, 36, 40, 131, 71, 90, 106, 1_000_045, 6_000_069, 2_000_011, 743, 850, 905, 2_000_078, 3_000_034,
    6_000_024, 908, 1_486, 48, 9_000_075, 11_000_108,
];

fn env(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn promises_hold_under_every_seed() {
    if let Some(seed) = env("HOLDFAST_SIM_SEED") {
        let outcome = run::run(seed, Guards::default(), true);
        assert!(outcome.violations.is_empty(), "seed {seed}: {:#?}", outcome.violations);
        return;
    }
    let count = env("HOLDFAST_SIM_SEEDS").unwrap_or(SEEDS);
    let only = env("HOLDFAST_SIM_FAMILY");
    let mut seeds: Vec<u64> = if only.is_none() { REGRESSIONS.to_vec() } else { Vec::new() };
    for family in Family::ALL.into_iter().filter(|family| only.is_none_or(|only| only == *family as u64)) {
        seeds.extend(family.seeds(family.share_of(count)));
    }
    let total = run::in_parallel(&seeds, Guards::default(), |seed, outcome| {
        if !outcome.violations.is_empty() {
            let shown = &outcome.violations[..outcome.violations.len().min(VIOLATIONS_SHOWN)];
            eprintln!("seed {seed}: {} violations: {shown:#?}", outcome.violations.len());
            eprintln!("replay: HOLDFAST_SIM_SEED={seed} scripts/test sim");
        }
    });
    eprintln!(
        "{} seeds: {} client operations ({} writes, {} reads, {} flushes), {} starts of a target, {} changes of the \
         in-sync set, {} losses of all caches",
        seeds.len(),
        total.all.operations(),
        total.all.writes,
        total.all.reads,
        total.all.flushes,
        total.all.targets,
        total.all.epochs,
        total.all.losses
    );
    total.all.coverage.print();
    eprintln!("{:?}", total.all.snapshots);
    assert!(total.failed.is_empty(), "failing seeds: {:?}", total.failed);
    if count >= SEEDS && only.is_none() && !cfg!(debug_assertions) {
        assert!(total.all.operations() >= OPERATIONS, "the runs did too little");
        let missing = total.all.coverage.missing();
        assert!(missing.is_empty(), "scenarios that never happened: {missing:?}");
    }
}

#[test]
fn the_document_names_every_counter() {
    let document = include_str!("../../docs/simulator.md");
    let missing: Vec<_> =
        coverage::Scenario::ALL.iter().filter(|s| !document.contains(&format!("{s:?}"))).collect();
    assert!(missing.is_empty(), "docs/simulator.md does not say where the simulation makes {missing:?}");
}
