//! The compiled ruleset against a slow oracle that reads NetworkPolicy v1 straight from the objects.
//!
//! Random clusters change step by step under one numbering, as they do under an agent. After each step every local pod is
//! asked about every address, protocol and port of interest, in both directions. A failure prints its seed and step;
//! replay with `HOLDFAST_SEED=N cargo test -p holdfast-net-core --test policy_differential`.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod oracle;
mod world;

use std::collections::BTreeMap;
use std::net::IpAddr;

use holdfast_net_core::objects::Protocol;
use holdfast_net_core::plan::MacAddr;
use holdfast_net_core::policy::{Direction, Model, Numbering, Party, allows, explain};
use holdfast_net_core::ruleset::{Pin, Ruleset, diff};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use oracle::oracle;
use world::World;

const SEEDS: u64 = 80;
const STEPS: usize = 12;
const DECISIONS_MIN: u64 = 1_000_000;

#[test]
fn compiled_verdicts_equal_the_oracles_over_random_histories() {
    let only = std::env::var("HOLDFAST_SEED").ok().and_then(|text| text.parse::<u64>().ok());
    let mut tally = Tally::default();
    for seed in only.map_or(0..SEEDS, |seed| seed..seed + 1) {
        run_history(seed, &mut tally);
    }
    println!(
        "{} decisions, {} allowed, {} by explain; {} steps took something away, {} said so without need",
        tally.decisions, tally.allowed, tally.explained, tally.revoking, tally.needless
    );
    if only.is_none() {
        assert!(tally.decisions >= DECISIONS_MIN, "{}", tally.decisions);
        // A generator that denies or allows nearly everything tests nothing.
        let share = tally.allowed * 100 / tally.decisions;
        assert!((10..90).contains(&share), "{share} % of the decisions are allowed");
    }
}

#[derive(Default)]
struct Tally {
    decisions: u64,
    allowed: u64,
    explained: u64,
    /// Steps that took something away, and those that said so without need, as far as the probes tell.
    revoking: u64,
    needless: u64,
}

/// What was decided about one question: endpoint, its address, peer, direction, probe.
type Verdicts = BTreeMap<(String, IpAddr, IpAddr, Direction, usize), bool>;

/// The ruleset with the endpoints' pins, by which a revocation tells a new endpoint from one that has connections.
fn pinned(ruleset: &Ruleset, world: &World) -> Ruleset {
    let mut ruleset = ruleset.clone();
    for address in world.subjects.iter().flat_map(|subject| &subject.addresses) {
        let pin = Pin { ifname: "hfv".to_owned(), mac: MacAddr([2, 0, 0, 0, 0, 1]), address: *address };
        ruleset.pins.insert(pin);
    }
    ruleset
}

fn run_history(seed: u64, tally: &mut Tally) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut world = World::generate(&mut rng);
    let mut numbering = Numbering::default();
    let mut before = Ruleset::default();
    let mut verdicts = Verdicts::new();
    for step in 0..STEPS {
        let at = format!("seed {seed} step {step}");
        let model = Model::compile(&world.objects, &world.subjects, &mut numbering);
        let ruleset = &model.ruleset;
        assert_eq!(ruleset.validate(), Ok(()), "{at}");
        for (id, rules) in &ruleset.profiles {
            let old = before.profiles.get(id).unwrap_or(rules);
            assert_eq!(old, rules, "{at}: profile {id:?} changed its meaning");
        }
        let again = Model::compile(&world.objects, &world.subjects, &mut numbering);
        assert!(diff(ruleset, &again.ruleset).is_empty(), "{at}: an unchanged state is an unchanged ruleset");
        let now = compare(&world, ruleset, tally, &at);
        let revokes = diff(&before, &pinned(ruleset, &world)).revokes;
        let taken_away =
            verdicts.iter().find(|(question, allowed)| **allowed && now.get(question) == Some(&false));
        assert!(taken_away.is_none() || revokes, "{at}: not revoked: {taken_away:?}");
        tally.revoking += u64::from(taken_away.is_some());
        tally.needless += u64::from(taken_away.is_none() && revokes);
        verdicts = now;
        compare_explain(&world, &mut rng, tally, &at);
        before = pinned(ruleset, &world);
        // A restarted agent reads its numbering back.
        let stored = serde_json::to_string(&numbering).unwrap();
        numbering = serde_json::from_str(&stored).unwrap();
        world.mutate(&mut rng);
    }
}

fn compare(world: &World, ruleset: &Ruleset, tally: &mut Tally, at: &str) -> Verdicts {
    let peers = world.interesting_addresses();
    let mut verdicts = Verdicts::new();
    for subject in &world.subjects {
        for &address in &subject.addresses {
            for &peer in peers.iter().filter(|peer| peer.is_ipv4() == address.is_ipv4() && **peer != address)
            {
                for direction in [Direction::Ingress, Direction::Egress] {
                    for (probe, (protocol, port)) in PROBES.into_iter().enumerate() {
                        let expected = oracle(world, direction, subject, peer, protocol, port);
                        let got = allows(ruleset, direction, address, peer, protocol.into(), port);
                        tally.decisions += 1;
                        tally.allowed += u64::from(got);
                        assert_eq!(
                            got, expected,
                            "{at}: {direction:?} {subject:?} peer {peer} {protocol:?} {port}\n{:#?}",
                            world.objects.policies
                        );
                        verdicts.insert((format!("{subject:?}"), address, peer, direction, probe), got);
                    }
                }
            }
        }
    }
    verdicts
}

fn compare_explain(world: &World, rng: &mut StdRng, tally: &mut Tally, at: &str) {
    let peers = world.interesting_addresses();
    for _ in 0..4 {
        let from = world.subjects[rng.random_range(0..world.subjects.len())].clone();
        let address = from.addresses[0];
        let peer = peers[rng.random_range(0..peers.len())];
        if peer.is_ipv4() != address.is_ipv4() || peer == address {
            continue;
        }
        let (protocol, port) = PROBES[rng.random_range(0..PROBES.len())];
        let local = world.subjects.iter().find(|subject| subject.addresses.contains(&peer));
        let to = Party { pod: local.and_then(|subject| subject.pod.clone()), address: peer };
        let client = Party { pod: from.pod.clone(), address };
        let answer = explain(&world.objects, &world.subjects, &client, &to, protocol.into(), port);
        let egress = oracle(world, Direction::Egress, &from, peer, protocol, port);
        assert_eq!(answer.egress.allowed, egress, "{at}: {answer:?}");
        let reason = &answer.egress.reason;
        let says_denied =
            [" denies ", "no rule admits", "is not known"].iter().any(|words| reason.contains(words));
        assert_eq!(says_denied, !egress, "{at}: {reason}");
        if let Some(local) = local {
            let ingress = oracle(world, Direction::Ingress, local, address, protocol, port);
            assert_eq!(answer.ingress.allowed, ingress, "{at}: {answer:?}");
        }
        tally.explained += 1;
    }
}

const PROBES: [(Protocol, u16); 9] = [
    (Protocol::Tcp, 80),
    (Protocol::Tcp, 81),
    (Protocol::Tcp, 8080),
    (Protocol::Tcp, 8085),
    (Protocol::Tcp, 65535),
    (Protocol::Udp, 53),
    (Protocol::Udp, 80),
    (Protocol::Sctp, 80),
    (Protocol::Tcp, 1),
];
