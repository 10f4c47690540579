//! The simulation notices when a rule is taken out: each guard, switched off, is found within a bounded number of seeds.

use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use holdfast_storage_core::guards::Guards;

use crate::run;

type Switch = fn(&mut Guards) -> &mut bool;

/// Guards with the number of seeds within which the simulation must find that they are off.
const GUARDS: [(&str, Switch, u64); 26] = [
    ("range", |g| &mut g.range, 600),
    ("readlock", |g| &mut g.readlock, 600),
    ("epochack", |g| &mut g.epochack, 600),
    ("tell", |g| &mut g.tell, 600),
    ("mapinflight", |g| &mut g.mapinflight, 600),
    ("mapdurable", |g| &mut g.mapdurable, 600),
    ("ownlog", |g| &mut g.ownlog, 600),
    ("readrec", |g| &mut g.readrec, 600),
    ("intent", |g| &mut g.intent, 600),
    ("recflush", |g| &mut g.recflush, 600),
    ("genpersist", |g| &mut g.genpersist, 600),
    ("drain", |g| &mut g.drain, 600),
    ("lease", |g| &mut g.lease, 600),
    ("leasewait", |g| &mut g.leasewait, 600),
    ("clearrule", |g| &mut g.clearrule, 600),
    ("clearseq", |g| &mut g.clearseq, 600),
    ("instance", |g| &mut g.instance, 600),
    ("lostsrc", |g| &mut g.lostsrc, 600),
    ("keepgood", |g| &mut g.keepgood, 600),
    ("joint", |g| &mut g.joint, 600),
    ("joinflush", |g| &mut g.joinflush, 600),
    ("mapcopy", |g| &mut g.mapcopy, 600),
    ("unknown", |g| &mut g.unknown, 600),
    ("sameatt", |g| &mut g.sameatt, 600),
    ("errwrite", |g| &mut g.errwrite, 600),
    ("reglock", |g| &mut g.reglock, 600),
];

#[test]
fn every_guard_that_is_taken_out_is_found() {
    let only = std::env::var("HOLDFAST_SIM_GUARD").ok();
    let chosen: Vec<_> = GUARDS.iter().filter(|(name, ..)| only.as_ref().is_none_or(|o| o == name)).collect();
    let (next, unnoticed) = (AtomicUsize::new(0), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(2, usize::from) {
            scope.spawn(|| {
                while let Some((name, switch, limit)) = chosen.get(next.fetch_add(1, Ordering::Relaxed)) {
                    match first_found(*switch, *limit) {
                        Some((seed, what)) => eprintln!("{name}: seed {seed}: {what}"),
                        None => unnoticed.lock().expect("no panic while held").push(*name),
                    }
                }
            });
        }
    });
    let unnoticed = unnoticed.into_inner().expect("no panic while held");
    assert!(unnoticed.is_empty(), "not noticed: {unnoticed:?}");
}

fn first_found(switch: Switch, limit: u64) -> Option<(u64, String)> {
    let mut guards = Guards::default();
    *switch(&mut guards) = false;
    (0..limit).find_map(|seed| {
        let outcome = run::run(seed, guards, false);
        outcome.violations.first().map(|what| (seed, what.chars().take(100).collect()))
    })
}
