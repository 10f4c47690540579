//! Seeded simulation of the write path: the very `Target` and `Replica` of the data process, under simulated clocks,
//! network, disks and record store. Each failing seed prints the line that replays it.
//!
//! `HOLDFAST_SIM_SEEDS=N` runs N seeds, `HOLDFAST_SIM_SEED=S` runs one with a trace of what happened.

#![allow(clippy::print_stderr, missing_docs)]

mod bites;
mod chaos;
mod disk;
mod history;
mod layers;
mod replica_host;
mod run;
mod target_host;
mod world;

use chaos::FOCUSED;
use holdfast_storage_core::guards::Guards;

/// Seeds of a plain run; about a minute on two slow cores in release mode.
const SEEDS: u64 = if cfg!(debug_assertions) { 150 } else { 1_500 };

/// Seeds that once found something, kept for good.
const REGRESSIONS: [u64; 0] = [];

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
    let focused = FOCUSED..FOCUSED + count / 8;
    let seeds: Vec<u64> = REGRESSIONS.into_iter().chain(0..count).chain(focused).collect();
    let total = run::in_parallel(&seeds, Guards::default(), |seed, outcome| {
        if !outcome.violations.is_empty() {
            eprintln!("seed {seed}: {:#?}", outcome.violations);
            eprintln!("replay: HOLDFAST_SIM_SEED={seed} scripts/test sim");
        }
    });
    eprintln!(
        "{} seeds: {} writes acknowledged, {} reads checked, {} starts of a target, {} changes of the in-sync set, {} \
         losses of all caches",
        seeds.len(),
        total.writes,
        total.reads,
        total.targets,
        total.epochs,
        total.losses
    );
    assert!(total.failed.is_empty(), "failing seeds: {:?}", total.failed);
    assert!(total.writes > seeds.len() as u64 * 50, "the runs did too little to prove anything");
}
