//! The compiled ruleset against a slow oracle that reads NetworkPolicy v1 straight from the objects.
//!
//! Random clusters change step by step under one compiler, as they do under an agent that is restarted now and then. After each step every local pod is
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
use holdfast_net_core::policy::{Compiler, Direction, Lookup, Party, Subject, Trace, allows, differences};
use holdfast_net_core::ruleset::{ClassId, Delta, Pin, Ruleset, diff};
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

use oracle::oracle;
use world::World;

const SEEDS: u64 = 200;
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
        "{} decisions, {} allowed, {} by explain; {} commits took something away, {} said so without need, {} restarts",
        tally.decisions, tally.allowed, tally.explained, tally.revoking, tally.needless, tally.restarts
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
    /// Commits that took something away, and those that said so without need, as far as the probes tell.
    revoking: u64,
    needless: u64,
    restarts: u64,
}

/// What was decided about one question: endpoint (of another uid it is another one), its address, peer, direction, probe.
type Verdicts = BTreeMap<(String, IpAddr, IpAddr, Direction, usize), bool>;

/// An agent: what it compiled, and what the kernel holds.
struct Agent {
    compiler: Compiler,
    kernel: Ruleset,
}

impl Agent {
    fn new() -> Self {
        Self { compiler: Compiler::default(), kernel: Ruleset::default() }
    }

    fn take_in(&mut self, before: &World, now: &World, rng: &mut StdRng) {
        let mut changes = now.objects.changes_since(&before.objects);
        changes.shuffle(rng);
        changes.iter().for_each(|change| self.compiler.apply(change));
        for subject in &before.subjects {
            if !now.subjects.contains(subject) {
                self.compiler.remove(&endpoint(subject));
                // Its port goes, and its classes with it.
                for address in &subject.addresses {
                    self.kernel.cls_in.remove(address);
                    self.kernel.cls_eg.remove(address);
                }
            }
        }
        for subject in &now.subjects {
            if !before.subjects.contains(subject) {
                for address in &subject.addresses {
                    self.kernel.cls_in.entry(*address).or_insert(ClassId::DENY_ALL);
                    self.kernel.cls_eg.entry(*address).or_insert(ClassId::DENY_ALL);
                }
            }
            self.compiler.put(&endpoint(subject), subject.clone());
        }
    }

    fn commit(&mut self) -> Delta {
        let delta = self.compiler.commit();
        let changes = self.kernel.changes(&delta);
        self.kernel.apply(&changes);
        delta
    }

    /// Another one that starts with what the first one left in the kernel.
    fn restart(&mut self, world: &World, rng: &mut StdRng, at: &str) {
        let swept = self.compiler.sweep();
        self.kernel.apply(&self.kernel.changes(&swept));
        self.compiler = Compiler::default();
        let kernel = self.kernel.clone();
        self.take_in(&World::empty(), world, rng);
        // The endpoints are attached already: nothing denies them anew.
        self.kernel = kernel;
        let _ = self.compiler.commit();
        self.compiler.adopt(&self.kernel);
        let written = diff(&self.kernel, &self.compiler.ruleset());
        assert!(written.is_empty(), "{at}: a restart with unchanged objects writes {written:?}");
    }
}

/// The ruleset with the endpoints' pins, by which a comparison tells a new endpoint from one that has connections.
fn pinned(ruleset: &Ruleset, world: &World) -> Ruleset {
    let mut ruleset = ruleset.clone();
    for address in world.subjects.iter().flat_map(|subject| &subject.addresses) {
        let pin = Pin {
            ifname: "hfv".to_owned(),
            mac: MacAddr([2, 0, 0, 0, 0, 1]),
            address: *address,
            routed: false,
        };
        ruleset.pins.insert(pin);
    }
    ruleset
}

/// Addresses are leased to one endpoint at a time.
fn endpoint(subject: &Subject) -> String {
    format!("{:?}", subject.addresses)
}

fn run_history(seed: u64, tally: &mut Tally) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut world = World::generate(&mut rng);
    let mut agent = Agent::new();
    agent.take_in(&World::empty(), &world, &mut rng);
    let mut verdicts = Verdicts::new();
    for step in 0..STEPS {
        let at = format!("seed {seed} step {step}");
        let before = agent.kernel.clone();
        let delta = agent.commit();
        assert_eq!(agent.kernel, agent.compiler.ruleset(), "{at}: the deltas add up to the whole");
        assert_eq!(agent.kernel.validate(), Ok(()), "{at}");
        for (id, rules) in &agent.kernel.profiles {
            let old = before.profiles.get(id).unwrap_or(rules);
            assert_eq!(old, rules, "{at}: profile {id:?} changed its meaning");
        }
        assert_eq!(
            agent.compiler.commit(),
            Delta::default(),
            "{at}: an unchanged state is an unchanged ruleset"
        );
        let now = compare(&world, &agent.kernel, tally, &at);
        let taken_away =
            verdicts.iter().find(|(question, allowed)| **allowed && now.get(question) == Some(&false));
        assert!(taken_away.is_none() || delta.revokes, "{at}: not revoked: {taken_away:?}");
        // An agent that starts anew knows no commits, only what the kernel has and what belongs there.
        let compared = diff(&pinned(&before, &world), &pinned(&agent.kernel, &world));
        assert!(taken_away.is_none() || compared.revokes, "{at}: not revoked by comparison: {taken_away:?}");
        tally.revoking += u64::from(taken_away.is_some());
        tally.needless += u64::from(taken_away.is_none() && delta.revokes);
        verdicts = now;
        compare_explain(&world, &agent.compiler, &mut rng, tally, &at);
        // A generator of its own: what is asked does not change the history.
        let mut asked = StdRng::seed_from_u64(seed * 1000 + step as u64);
        compare_elements(&world, &agent.compiler, &agent.kernel, &mut asked, &at);
        if rng.random_bool(0.2) {
            agent.restart(&world, &mut rng, &at);
            tally.restarts += 1;
        } else if rng.random_bool(0.2) {
            let swept = agent.compiler.sweep();
            agent.kernel.apply(&agent.kernel.changes(&swept));
        }
        let earlier = world.clone();
        // Changes that are committed together must not spoil each other.
        for _ in 0..rng.random_range(1..=3) {
            world.mutate(&mut rng);
        }
        agent.take_in(&earlier, &world, &mut rng);
    }
}

fn compare(world: &World, ruleset: &Ruleset, tally: &mut Tally, at: &str) -> Verdicts {
    let peers = world.interesting_addresses();
    let mut verdicts = Verdicts::new();
    for subject in &world.subjects {
        for &address in &subject.addresses {
            for &peer in peers.iter().filter(|peer| peer.is_ipv4() == address.is_ipv4() && **peer != address)
            {
                for direction in Direction::BOTH {
                    for (probe, (protocol, port)) in PROBES.into_iter().enumerate() {
                        let expected = oracle(world, direction, subject, peer, protocol, port);
                        let got = allows(ruleset, direction, address, peer, protocol.into(), port);
                        tally.decisions += 1;
                        tally.allowed += u64::from(got);
                        assert_eq!(
                            got, expected,
                            "{at}: {direction:?} {subject:?} peer {peer} {protocol:?} {port}\n{:#?}",
                            world.objects
                        );
                        verdicts.insert((format!("{subject:?}"), address, peer, direction, probe), got);
                    }
                }
            }
        }
    }
    verdicts
}

fn compare_explain(world: &World, compiler: &Compiler, rng: &mut StdRng, tally: &mut Tally, at: &str) {
    let peers = world.interesting_addresses();
    for _ in 0..8 {
        if world.subjects.is_empty() {
            return;
        }
        let from = world.subjects[rng.random_range(0..world.subjects.len())].clone();
        let address = from.addresses[0];
        let peer = peers[rng.random_range(0..peers.len())];
        if peer.is_ipv4() != address.is_ipv4() || peer == address {
            continue;
        }
        let (protocol, port) = PROBES[rng.random_range(0..PROBES.len())];
        let to = Party { pod: compiler.pod_at(peer), address: peer };
        let client = Party { pod: from.pod.clone(), address };
        let answer = compiler.explain(&client, &to, protocol.into(), port);
        let egress = oracle(world, Direction::Egress, &from, peer, protocol, port);
        assert_eq!(answer.egress.allowed, egress, "{at}: {answer:?}");
        let reason = &answer.egress.reason;
        let says_denied =
            [" denies ", "no rule admits", "is not known"].iter().any(|words| reason.contains(words));
        assert_eq!(says_denied, !egress, "{at}: {reason}");
        // The other end, whether it is here or elsewhere.
        let local = world.subjects.iter().find(|subject| subject.addresses.contains(&peer)).cloned();
        let elsewhere = || {
            world.owner(peer).map(|pod| Subject {
                pod: Some(pod.object_name()),
                uid: String::new(),
                addresses: vec![peer],
            })
        };
        if let Some(server) = local.or_else(elsewhere) {
            let ingress = oracle(world, Direction::Ingress, &server, address, protocol, port);
            assert_eq!(answer.ingress.allowed, ingress, "{at}: {answer:?}");
        }
        tally.explained += 1;
    }
}

/// What the compiler says of single elements is what is programmed, so that a kernel can be compared with it.
fn compare_elements(world: &World, compiler: &Compiler, kernel: &Ruleset, rng: &mut StdRng, at: &str) {
    let peers = world.interesting_addresses();
    for subject in &world.subjects {
        let subject = subject.addresses[0];
        let peer = peers[rng.random_range(0..peers.len())];
        if peer.is_ipv4() != subject.is_ipv4() {
            continue;
        }
        let (protocol, port) = PROBES[rng.random_range(0..PROBES.len())];
        for direction in Direction::BOTH {
            let lookup = Lookup { direction, subject, peer, proto: protocol.into(), port };
            let (Ok(compiled), Ok(held)) =
                (Trace::of(&mut &*compiler, &lookup), Trace::of(&mut &*kernel, &lookup));
            assert_eq!(compiled, held, "{at}: {lookup:?}");
            assert_eq!(differences(&lookup, &compiled, &held), [], "{at}: {lookup:?}");
            let allowed = allows(kernel, direction, subject, peer, protocol.into(), port);
            assert_eq!(held.is_allowed(), allowed, "{at}: {lookup:?}");
        }
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
