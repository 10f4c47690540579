//! Random policies of both kinds, changed step by step, against the oracle: every decision is a real packet.
//!
//! A failure prints the seed, the step, the probes and all objects. Replay: `HOLDFAST_SEED=N scripts/test policy --only
//! random_policies`.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr};

use anyhow::{Context, Result, bail, ensure};
use holdfast_tests::effort::rounds;
use ipnetwork::IpNetwork;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::bed::{Bed, oracle_allows};
use crate::cases::describe;
use crate::world::{NamedPort, PodName, Protocol, World, labels};

/// Histories that are the same in every run; one more has a seed of its own.
const SEEDS: std::ops::Range<u64> = 1..4;
/// Changes of one history.
const STEPS: usize = 12;
/// The same with `--long`.
const LONG_STEPS: usize = 200;
/// Packets that a run must have compared.
const PACKETS_MIN: u64 = 20_000;
/// Policies of each kind at most.
const POLICIES_MAX: usize = 6;

/// Runs the histories.
///
/// # Errors
/// A packet went otherwise than the oracle says.
pub fn run(bed: &mut Bed) -> Result<()> {
    let only = std::env::var("HOLDFAST_SEED").ok().and_then(|text| text.parse::<u64>().ok());
    let seeds: Vec<u64> = match only {
        Some(seed) => vec![seed],
        None => SEEDS.chain([rand::random::<u32>().into()]).collect(),
    };
    let steps = rounds(STEPS, LONG_STEPS);
    let (packets, mut decisions, mut allowed) = (bed.prober.packets, 0u64, 0u64);
    println!("random policies: seeds {seeds:?}, {steps} steps each");
    for seed in &seeds {
        let outcome = run_history(bed, *seed, steps, &mut decisions, &mut allowed);
        outcome.with_context(|| format!("seed {seed}; again: HOLDFAST_SEED={seed}"))?;
    }
    println!(
        "random policies: {decisions} decisions, {allowed} of them allowed, {} packets",
        bed.prober.packets - packets
    );
    ensure!(decisions >= PACKETS_MIN || only.is_some(), "only {decisions} decisions");
    let share = allowed * 100 / decisions.max(1);
    ensure!((10..90).contains(&share), "{share} % are allowed: such policies test little");
    Ok(())
}

fn run_history(bed: &mut Bed, seed: u64, steps: usize, decisions: &mut u64, allowed: &mut u64) -> Result<()> {
    let mut random = Random(StdRng::seed_from_u64(seed));
    let mut world = bed.base();
    for namespace in world.used_namespaces().into_iter().map(str::to_owned).collect::<Vec<_>>() {
        random.relabel_namespace(&mut world, &namespace);
    }
    for name in world.pods.keys().cloned().collect::<Vec<_>>() {
        random.change_pod(&mut world, &name)?;
    }
    for _ in 0..4 {
        random.put_policy(&mut world)?;
        random.put_cluster_policy(&mut world)?;
    }
    for step in 0..steps {
        for _ in 0..random.up_to(3) {
            random.change(&mut world)?;
        }
        let label = format!("seed {seed} step {step}");
        bed.show(&world).with_context(|| label.clone())?;
        let mismatches = bed.compare(&label, &world)?;
        if !mismatches.is_empty() {
            let texts: Vec<String> = mismatches.iter().map(ToString::to_string).collect();
            bail!("{}\nall objects:\n{}", describe(&texts, &world)?, world.yaml()?);
        }
        let ends: Vec<_> = bed.prober.ends().map(|(end, addresses)| (end.clone(), addresses)).collect();
        for probe in bed.prober.probes() {
            *decisions += 1;
            *allowed += u64::from(oracle_allows(&world, &ends, probe));
        }
    }
    Ok(())
}

struct Random(StdRng);

impl Random {
    /// 1 to `max`.
    fn up_to(&mut self, max: usize) -> usize {
        self.0.random_range(1..=max)
    }

    fn one<'a>(&mut self, words: &[&'a str]) -> &'a str {
        words[self.0.random_range(0..words.len())]
    }

    fn chance(&mut self, percent: u32) -> bool {
        self.0.random_range(0..100) < percent
    }

    fn change(&mut self, world: &mut World) -> Result<()> {
        match self.0.random_range(0..10) {
            0..3 => self.put_policy(world),
            3..6 => self.put_cluster_policy(world),
            6 => {
                let name = self.policy_name();
                world.policies.remove(&name);
                let name = self.cluster_policy_name();
                world.cluster_policies.remove(&name);
                Ok(())
            }
            7 => {
                let namespace = self.one(&["x", "y", "z"]);
                self.relabel_namespace(world, namespace);
                Ok(())
            }
            _ => {
                let number = self.0.random_range(0..world.pods.len());
                let name = world.pods.keys().nth(number).context("there is a pod")?.clone();
                self.change_pod(world, &name)
            }
        }
    }

    /// Every namespace keeps its label `ns`, which the namespace of the bed's own pods lacks.
    fn relabel_namespace(&mut self, world: &mut World, namespace: &str) {
        let team = self.one(&["", ",team=red", ",team=blue"]);
        world.namespaces.insert(namespace.to_owned(), labels(&format!("ns={namespace}{team}")));
    }

    fn change_pod(&mut self, world: &mut World, name: &PodName) -> Result<()> {
        let app = self.one(&["", ",app=one", ",app=two"]);
        let mut ports = Vec::new();
        for (port_name, protocol) in [("web", Protocol::Tcp), ("dns", Protocol::Udp), ("sig", Protocol::Sctp)]
        {
            if self.chance(70) {
                let number = if self.chance(50) { 80 } else { 81 };
                ports.push(NamedPort { name: port_name.to_owned(), protocol, number });
            }
        }
        let completed = self.chance(4);
        let pod = world.pods.get_mut(name).context("it exists")?;
        pod.labels = labels(&format!("pod={}{app}", name.name));
        pod.ports = ports;
        pod.completed = completed;
        Ok(())
    }

    fn policy_name(&mut self) -> PodName {
        let number = self.up_to(POLICIES_MAX);
        PodName::new(&format!("{}/p{number}", self.one(&["x", "y", "z"])))
    }

    fn cluster_policy_name(&mut self) -> String {
        format!("c{}", self.up_to(POLICIES_MAX))
    }

    fn put_policy(&mut self, world: &mut World) -> Result<()> {
        let name = self.policy_name();
        let types = self.one(&["[]", "[Ingress]", "[Egress]", "[Ingress, Egress]", "[Ingress, Egress]"]);
        let mut spec = format!("{{podSelector: {}, policyTypes: {types}", self.pod_selector());
        for (list, word) in [("ingress", "from"), ("egress", "to")] {
            let mut rules = Vec::new();
            for _ in 0..self.0.random_range(0..3) {
                let peers: Vec<String> = (0..self.0.random_range(0..3)).map(|_| self.peer(world)).collect();
                let ports: Vec<String> = (0..self.0.random_range(0..3)).map(|_| self.port()).collect();
                rules.push(format!("{{{word}: [{}], ports: [{}]}}", peers.join(", "), ports.join(", ")));
            }
            let _ = write!(spec, ", {list}: [{}]", rules.join(", "));
        }
        world.put_policy(&name, &(spec + "}"))
    }

    fn pod_selector(&mut self) -> String {
        self.one(&[
            "{}",
            "{}",
            "{matchLabels: {pod: a}}",
            "{matchLabels: {app: one}}",
            "{matchExpressions: [{key: pod, operator: In, values: [b, c]}]}",
            "{matchExpressions: [{key: app, operator: Exists}]}",
            "{matchExpressions: [{key: app, operator: NotIn, values: [one]}]}",
            "{matchLabels: {pod: b}, matchExpressions: [{key: app, operator: DoesNotExist}]}",
        ])
        .to_owned()
    }

    fn namespace_selector(&mut self) -> String {
        self.one(&[
            "{}",
            "{matchLabels: {ns: x}}",
            "{matchLabels: {team: red}}",
            "{matchLabels: {kubernetes.io/metadata.name: y}}",
            "{matchExpressions: [{key: ns, operator: NotIn, values: [z]}]}",
            "{matchExpressions: [{key: team, operator: Exists}]}",
        ])
        .to_owned()
    }

    fn peer(&mut self, world: &World) -> String {
        let (pods, namespaces) = (self.pod_selector(), self.namespace_selector());
        match self.0.random_range(0..6) {
            0 => format!("{{podSelector: {pods}}}"),
            1 => format!("{{namespaceSelector: {namespaces}}}"),
            2 | 3 => format!("{{podSelector: {pods}, namespaceSelector: {namespaces}}}"),
            _ => {
                let cidr = self.range(world);
                let except = if self.chance(50) { self.range_within(world, &cidr) } else { None };
                let except = except.map(|range| format!("'{range}'")).unwrap_or_default();
                format!("{{ipBlock: {{cidr: '{cidr}', except: [{except}]}}}}")
            }
        }
    }

    /// A range that holds some pods or nodes.
    fn range(&mut self, world: &World) -> IpNetwork {
        let v6 = self.chance(50);
        let number = self.0.random_range(0..world.pods.len());
        let pod = world.pods.values().nth(number).map(|pod| pod.addresses[usize::from(v6)]);
        let address = pod.unwrap_or(IpAddr::V4(Ipv4Addr::UNSPECIFIED));
        let lengths: [u8; 6] = if v6 { [0, 48, 64, 125, 126, 128] } else { [0, 8, 24, 29, 30, 32] };
        network(address, lengths[self.0.random_range(0..lengths.len())])
    }

    /// A smaller range within another one, around a pod, if there is one.
    fn range_within(&mut self, world: &World, cidr: &IpNetwork) -> Option<IpNetwork> {
        let mut inside: Vec<IpAddr> = world.pods.values().flat_map(|pod| pod.addresses.clone()).collect();
        inside.retain(|address| cidr.contains(*address));
        let address = inside.get(self.0.random_range(0..inside.len().max(1)))?;
        let longest: u8 = if address.is_ipv4() { 32 } else { 128 };
        let length = longest - if self.chance(50) { 0 } else { 2 };
        (length > cidr.prefix()).then(|| network(*address, length))
    }

    fn port(&mut self) -> String {
        let protocol = self.one(&["TCP", "TCP", "UDP", "SCTP"]);
        match self.0.random_range(0..6) {
            0 => format!("{{protocol: {protocol}}}"),
            1 => format!("{{protocol: {protocol}, port: {}}}", self.one(&["web", "dns", "sig"])),
            2 => format!("{{protocol: {protocol}, port: 70, endPort: {}}}", self.one(&["80", "90"])),
            3 => format!("{{port: {}}}", self.one(&["80", "web"])),
            _ => format!("{{protocol: {protocol}, port: {}}}", self.one(&["80", "81"])),
        }
    }

    fn put_cluster_policy(&mut self, world: &mut World) -> Result<()> {
        let name = self.cluster_policy_name();
        let tier = self.one(&["Admin", "Baseline"]);
        // Equal priorities are undefined, so each name has its own.
        let number: u32 = name[1..].parse()?;
        let priority = number + 10 * self.0.random_range(0..10);
        // Never the namespace of the bed's own pods.
        let ours = "{matchExpressions: [{key: ns, operator: Exists}]}";
        let subject = match self.0.random_range(0..4) {
            0 => format!("namespaces: {ours}"),
            1 => format!("namespaces: {{matchLabels: {{ns: {}}}}}", self.one(&["x", "y", "z"])),
            2 => format!("pods: {{namespaceSelector: {ours}, podSelector: {}}}", self.pod_selector()),
            _ => {
                let pods = self.pod_selector();
                format!("pods: {{namespaceSelector: {{matchLabels: {{ns: y}}}}, podSelector: {pods}}}")
            }
        };
        let mut spec = format!("{{tier: {tier}, priority: {priority}, subject: {{{subject}}}");
        for (list, word) in [("ingress", "from"), ("egress", "to")] {
            let rules: Vec<String> =
                (0..self.0.random_range(0..4)).map(|_| self.cluster_rule(world, word)).collect();
            let _ = write!(spec, ", {list}: [{}]", rules.join(", "));
        }
        world.put_cluster_policy(&name, &(spec + "}"))
    }

    fn cluster_rule(&mut self, world: &World, word: &str) -> String {
        let action = self.one(&["Accept", "Deny", "Pass"]);
        let peers: Vec<String> = (0..self.up_to(2)).map(|_| self.cluster_peer(world, word == "to")).collect();
        // Names are for pods only: the API refuses them beside networks and nodes.
        let only_pods = peers.iter().all(|peer| peer.contains("namespace"));
        let mut rule = format!("{{action: {action}, {word}: [{}]", peers.join(", "));
        if self.chance(60) {
            let entries: Vec<String> = (0..self.up_to(2)).map(|_| self.cluster_protocol(only_pods)).collect();
            let _ = write!(rule, ", protocols: [{}]", entries.join(", "));
        }
        rule + "}"
    }

    fn cluster_peer(&mut self, world: &World, egress: bool) -> String {
        let namespaces = self.namespace_selector();
        match self.0.random_range(0..if egress { 20 } else { 12 }) {
            0..5 => format!("{{namespaces: {namespaces}}}"),
            5..11 => {
                format!("{{pods: {{namespaceSelector: {namespaces}, podSelector: {}}}}}", self.pod_selector())
            }
            11 if self.chance(15) => "{someday: {namespace: known}}".to_owned(),
            11 => "{namespaces: {}}".to_owned(),
            12..18 => {
                // The list is a set.
                let ranges: BTreeSet<String> =
                    (0..self.up_to(2)).map(|_| format!("'{}'", self.range(world))).collect();
                format!("{{networks: [{}]}}", ranges.into_iter().collect::<Vec<_>>().join(", "))
            }
            _ => {
                let label = self.one(&["kubernetes.io/os: linux", "kubernetes.io/hostname: node-a"]);
                format!("{{nodes: {{matchLabels: {{{label}}}}}}}")
            }
        }
    }

    fn cluster_protocol(&mut self, named: bool) -> String {
        let protocol = self.one(&["tcp", "tcp", "udp", "sctp"]);
        match self.0.random_range(0..5) {
            0 if named => format!("{{destinationNamedPort: {}}}", self.one(&["web", "dns", "sig"])),
            1 => format!("{{{protocol}: {{}}}}"),
            2 => format!(
                "{{{protocol}: {{destinationPort: {{range: {{start: 70, end: {}}}}}}}}}",
                self.one(&["80", "90"])
            ),
            _ => format!("{{{protocol}: {{destinationPort: {{number: {}}}}}}}", self.one(&["80", "81"])),
        }
    }
}

fn network(address: IpAddr, length: u8) -> IpNetwork {
    let whole = IpNetwork::new(address, length).expect("the lengths fit the families");
    IpNetwork::new(whole.network(), length).expect("the lengths fit the families")
}
