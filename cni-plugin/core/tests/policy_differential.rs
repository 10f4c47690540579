//! The compiled ruleset against a slow oracle that reads NetworkPolicy v1 straight from the objects.
//!
//! Random clusters change step by step under one numbering, as they do under an agent. After each step every local pod is
//! asked about every address, protocol and port of interest, in both directions. A failure prints its seed and step;
//! replay with `HOLDFAST_SEED=N cargo test -p holdfast-net-core --test policy_differential`.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::net::IpAddr;

use holdfast_net_core::objects::{
    Container, ContainerPort, EgressRule, IngressRule, IpBlock, LabelSelector, Labels, Meta, Namespace,
    NetworkPolicy, NetworkPolicySpec, ObjectName, Objects, Operator, Peer, Pod, PodIp, PodSpec, PodStatus,
    PolicyPort, PolicyType, PortNumberOrName, Protocol, Requirement,
};
use holdfast_net_core::policy::{Direction, Model, Numbering, Party, Subject, allows, explain, validate};
use holdfast_net_core::ruleset::{Ruleset, diff};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const SEEDS: u64 = 60;
const STEPS: usize = 12;
const DECISIONS_MIN: u64 = 100_000;

#[test]
fn compiled_verdicts_equal_the_oracles_over_random_histories() {
    let only = std::env::var("HOLDFAST_SEED").ok().and_then(|text| text.parse::<u64>().ok());
    let mut tally = Tally::default();
    for seed in only.map_or(0..SEEDS, |seed| seed..seed + 1) {
        run_history(seed, &mut tally);
    }
    println!("{} decisions, {} allowed, {} by explain", tally.decisions, tally.allowed, tally.explained);
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
}

fn run_history(seed: u64, tally: &mut Tally) {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut world = World::generate(&mut rng);
    let mut numbering = Numbering::default();
    let mut before = Ruleset::default();
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
        compare(&world, ruleset, tally, &at);
        compare_explain(&world, &mut rng, tally, &at);
        before = model.ruleset;
        // A restarted agent reads its numbering back.
        let stored = serde_json::to_string(&numbering).unwrap();
        numbering = serde_json::from_str(&stored).unwrap();
        world.mutate(&mut rng);
    }
}

fn compare(world: &World, ruleset: &Ruleset, tally: &mut Tally, at: &str) {
    let peers = world.interesting_addresses();
    for subject in &world.subjects {
        for &address in &subject.addresses {
            for &peer in peers.iter().filter(|peer| peer.is_ipv4() == address.is_ipv4() && **peer != address)
            {
                for direction in [Direction::Ingress, Direction::Egress] {
                    for (protocol, port) in PROBES {
                        let expected = oracle(world, direction, subject, peer, protocol, port);
                        let got = allows(ruleset, direction, address, peer, protocol.into(), port);
                        tally.decisions += 1;
                        tally.allowed += u64::from(got);
                        assert_eq!(
                            got, expected,
                            "{at}: {direction:?} {subject:?} peer {peer} {protocol:?} {port}\n{:#?}",
                            world.objects.policies
                        );
                    }
                }
            }
        }
    }
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
        let says_allowed = reason.starts_with("policy ") || reason.starts_with("no policy ");
        assert_eq!(says_allowed, egress, "{at}: {reason}");
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

// ---- the oracle: no sharing with the code under test but the objects' types ----

fn oracle(
    world: &World,
    direction: Direction,
    subject: &Subject,
    peer: IpAddr,
    protocol: Protocol,
    port: u16,
) -> bool {
    let Some(name) = &subject.pod else { return true };
    let Some(pod) = world.live_pod(name, &subject.uid) else { return false };
    let peer_pod = world.owner(peer);
    let target = match direction {
        Direction::Ingress => Some(pod),
        Direction::Egress => peer_pod,
    };
    let mut isolated = false;
    for policy in world.objects.policies.values() {
        let spec = &policy.spec;
        let applies = if spec.policy_types.is_empty() {
            direction == Direction::Ingress || !spec.egress.is_empty()
        } else {
            let wanted = match direction {
                Direction::Ingress => PolicyType::Ingress,
                Direction::Egress => PolicyType::Egress,
            };
            spec.policy_types.contains(&wanted)
        };
        if !applies
            || policy.metadata.namespace != pod.metadata.namespace
            || !selects(&spec.pod_selector, &pod.metadata.labels)
        {
            continue;
        }
        isolated = true;
        let rules: Vec<(&Vec<Peer>, &Vec<PolicyPort>)> = match direction {
            Direction::Ingress => spec.ingress.iter().map(|rule| (&rule.from, &rule.ports)).collect(),
            Direction::Egress => spec.egress.iter().map(|rule| (&rule.to, &rule.ports)).collect(),
        };
        for (peers, ports) in rules {
            let peer_ok = peers.is_empty()
                || peers.iter().any(|entry| peer_matches(world, policy, entry, peer, peer_pod));
            let port_ok =
                ports.is_empty() || ports.iter().any(|entry| port_matches(entry, target, protocol, port));
            if peer_ok && port_ok {
                return true;
            }
        }
    }
    !isolated
}

fn peer_matches(
    world: &World,
    policy: &NetworkPolicy,
    entry: &Peer,
    address: IpAddr,
    pod: Option<&Pod>,
) -> bool {
    if let Some(block) = &entry.ip_block {
        return block.cidr.contains(address) && !block.except.iter().any(|except| except.contains(address));
    }
    let Some(pod) = pod else { return false };
    let namespace = match &entry.namespace_selector {
        Some(selector) => {
            let mut labels =
                world.objects.namespaces.get(&pod.metadata.namespace).cloned().unwrap_or_default();
            labels.insert("kubernetes.io/metadata.name".into(), pod.metadata.namespace.clone());
            selects(selector, &labels)
        }
        None => pod.metadata.namespace == policy.metadata.namespace,
    };
    let labels = entry.pod_selector.as_ref().is_none_or(|selector| selects(selector, &pod.metadata.labels));
    namespace && labels
}

fn port_matches(entry: &PolicyPort, target: Option<&Pod>, protocol: Protocol, port: u16) -> bool {
    if entry.protocol != protocol {
        return false;
    }
    match (&entry.port, entry.end_port) {
        (None, _) => true,
        (Some(PortNumberOrName::Number(number)), None) => *number == port,
        (Some(PortNumberOrName::Number(number)), Some(end)) => *number <= port && port <= end,
        (Some(PortNumberOrName::Name(name)), _) => target.is_some_and(|pod| {
            pod.spec.containers.iter().flat_map(|container| &container.ports).any(|documented| {
                documented.name.as_ref() == Some(name)
                    && documented.protocol == protocol
                    && documented.container_port == port
            })
        }),
    }
}

fn selects(selector: &LabelSelector, labels: &Labels) -> bool {
    for (key, value) in &selector.match_labels {
        if labels.get(key) != Some(value) {
            return false;
        }
    }
    for requirement in &selector.match_expressions {
        let value = labels.get(&requirement.key);
        let listed = value.is_some_and(|value| requirement.values.contains(value));
        let ok = match requirement.operator {
            Operator::In => listed,
            Operator::NotIn => !listed,
            Operator::Exists => value.is_some(),
            Operator::DoesNotExist => value.is_none(),
        };
        if !ok {
            return false;
        }
    }
    true
}

// ---- random clusters ----

struct World {
    objects: Objects,
    subjects: Vec<Subject>,
}

impl World {
    fn generate(rng: &mut StdRng) -> Self {
        let mut world = Self { objects: Objects::default(), subjects: Vec::new() };
        for name in ["x", "y", "z"] {
            let metadata = Meta { name: name.into(), labels: mk_labels(rng), ..Meta::default() };
            world.objects.insert_namespace(Namespace { metadata });
        }
        for index in 0..9 {
            let pod = mk_pod(rng, index);
            let name = pod.object_name();
            if index < 4 {
                let uid = if rng.random_bool(0.1) { "another" } else { "" };
                let moved = rng.random_bool(0.2);
                let addresses =
                    if moved { vec![v4(20 + index), v6(20 + u16::from(index))] } else { pod.addresses() };
                world.subjects.push(Subject { pod: Some(name.clone()), uid: uid.into(), addresses });
            }
            world.objects.pods.insert(name, pod);
        }
        world.subjects.push(Subject { pod: None, uid: String::new(), addresses: vec![v4(30), v6(30)] });
        let unknown = Some(ObjectName::new("x", "unknown"));
        world.subjects.push(Subject { pod: unknown, uid: String::new(), addresses: vec![v4(31)] });
        for index in 0..rng.random_range(0..6) {
            world.put_policy(rng, index);
        }
        world
    }

    fn mutate(&mut self, rng: &mut StdRng) {
        for _ in 0..rng.random_range(1..4) {
            match rng.random_range(0..6) {
                0 | 1 => {
                    let index = rng.random_range(0..6);
                    self.put_policy(rng, index);
                }
                2 => {
                    let index = rng.random_range(0..6);
                    self.objects.policies.retain(|name, _| name.name != format!("p{index}"));
                }
                3 | 4 => {
                    let nth = rng.random_range(0..self.objects.pods.len());
                    let pod = self.objects.pods.values_mut().nth(nth).unwrap();
                    match rng.random_range(0..3) {
                        0 => pod.metadata.labels = mk_labels(rng),
                        1 => pod.status.phase = mk_phase(rng),
                        _ => pod.spec.containers = mk_containers(rng),
                    }
                }
                _ => {
                    let name = ["x", "y", "z"][rng.random_range(0..3)];
                    let metadata = Meta { name: name.into(), labels: mk_labels(rng), ..Meta::default() };
                    self.objects.insert_namespace(Namespace { metadata });
                }
            }
        }
    }

    fn put_policy(&mut self, rng: &mut StdRng, index: usize) {
        let namespace = ["x", "y", "z"][rng.random_range(0..3)];
        let types = [
            vec![],
            vec![PolicyType::Ingress],
            vec![PolicyType::Egress],
            vec![PolicyType::Ingress, PolicyType::Egress],
        ];
        let spec = NetworkPolicySpec {
            pod_selector: mk_selector(rng),
            policy_types: types[rng.random_range(0..4)].clone(),
            ingress: many(rng, 3, |rng| IngressRule {
                from: many(rng, 3, mk_peer),
                ports: many(rng, 3, mk_port),
            }),
            egress: many(rng, 3, |rng| EgressRule {
                to: many(rng, 3, mk_peer),
                ports: many(rng, 3, mk_port),
            }),
        };
        let metadata = Meta { name: format!("p{index}"), namespace: namespace.into(), ..Meta::default() };
        let policy = NetworkPolicy { metadata, spec };
        assert_eq!(validate(&policy), Ok(()));
        self.objects.policies.insert(policy.object_name(), policy);
    }

    fn live_pod(&self, name: &ObjectName, uid: &str) -> Option<&Pod> {
        let pod = self.objects.pods.get(name)?;
        let completed = pod.status.phase == "Succeeded" || pod.status.phase == "Failed";
        let same = uid.is_empty() || pod.metadata.uid.is_empty() || pod.metadata.uid == uid;
        (!completed && !pod.spec.host_network && same).then_some(pod)
    }

    fn owner(&self, address: IpAddr) -> Option<&Pod> {
        if let Some(subject) = self.subjects.iter().find(|subject| subject.addresses.contains(&address)) {
            return self.live_pod(subject.pod.as_ref()?, &subject.uid);
        }
        let claims = self.objects.pods.iter().filter(|(name, pod)| {
            let ours = pod.status.pod_ips.iter().any(|entry| entry.ip == address);
            ours && self.live_pod(name, "").is_some()
        });
        let claims: Vec<&Pod> = claims.map(|(_, pod)| pod).collect();
        if claims.len() == 1 { Some(claims[0]) } else { None }
    }

    fn interesting_addresses(&self) -> Vec<IpAddr> {
        let mut addresses: Vec<IpAddr> = (0..=11).map(v4).collect();
        addresses.extend((0..=6).map(v6));
        addresses.extend((20..24).map(v4));
        addresses.extend([v4(30), v4(31), v4(127), v4(128), v4(255), v6(30)]);
        addresses.extend(
            ["10.1.0.1", "8.8.8.8", "255.255.255.255", "2001:db8::1"].map(|t| t.parse::<IpAddr>().unwrap()),
        );
        addresses
    }
}

fn v4(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

fn v6(last: u16) -> IpAddr {
    IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, last])
}

fn mk_pod(rng: &mut StdRng, index: u8) -> Pod {
    // Now and then two pods claim one address.
    let last = if index > 4 && rng.random_bool(0.1) { index - 1 } else { index } + 1;
    let ips = [v4(last), v6(last.into())].map(|ip| PodIp { ip }).to_vec();
    let metadata = Meta {
        name: format!("pod{index}"),
        namespace: ["x", "y", "z"][rng.random_range(0..3)].into(),
        uid: format!("uid{index}"),
        labels: mk_labels(rng),
        ..Meta::default()
    };
    let spec =
        PodSpec { host_network: rng.random_bool(0.05), containers: mk_containers(rng), ..PodSpec::default() };
    Pod { metadata, spec, status: PodStatus { phase: mk_phase(rng), pod_ip: Some(ips[0].ip), pod_ips: ips } }
}

fn mk_phase(rng: &mut StdRng) -> String {
    ["Running", "Running", "Running", "Pending", "Running", "Succeeded", "Failed", "Running"]
        [rng.random_range(0..8)]
    .to_owned()
}

fn mk_containers(rng: &mut StdRng) -> Vec<Container> {
    many(rng, 3, |rng| {
        let ports = many(rng, 3, |rng| ContainerPort {
            name: Some(["http", "dns"][rng.random_range(0..2)].to_owned()),
            container_port: [80, 81, 8080, 53][rng.random_range(0..4)],
            protocol: mk_protocol(rng),
        });
        Container { ports, restart_policy: None }
    })
}

fn mk_labels(rng: &mut StdRng) -> Labels {
    let mut labels = BTreeMap::new();
    for key in ["app", "tier"] {
        if rng.random_bool(0.7) {
            labels.insert(key.to_owned(), ["a", "b", "c"][rng.random_range(0..3)].to_owned());
        }
    }
    labels
}

fn mk_selector(rng: &mut StdRng) -> LabelSelector {
    let match_labels = if rng.random_bool(0.4) { mk_labels(rng) } else { Labels::new() };
    let match_expressions = many(rng, 2, |rng| {
        let operator =
            [Operator::In, Operator::NotIn, Operator::Exists, Operator::DoesNotExist][rng.random_range(0..4)];
        let values = match operator {
            Operator::In | Operator::NotIn => vec!["a".to_owned(), "b".to_owned()],
            Operator::Exists | Operator::DoesNotExist => Vec::new(),
        };
        Requirement { key: ["app", "tier"][rng.random_range(0..2)].to_owned(), operator, values }
    });
    LabelSelector { match_labels, match_expressions }
}

fn mk_peer(rng: &mut StdRng) -> Peer {
    if rng.random_bool(0.35) {
        return Peer { ip_block: Some(mk_block(rng)), ..Peer::default() };
    }
    let mut peer = Peer::default();
    if rng.random_bool(0.7) {
        peer.pod_selector = Some(mk_selector(rng));
    }
    if peer.pod_selector.is_none() || rng.random_bool(0.4) {
        peer.namespace_selector = Some(mk_selector(rng));
    }
    peer
}

fn mk_block(rng: &mut StdRng) -> IpBlock {
    let choices: [(&str, &[&str]); 8] = [
        ("0.0.0.0/0", &["10.0.0.0/8"]),
        ("0.0.0.0/0", &[]),
        ("10.0.0.0/24", &["10.0.0.4/30", "10.0.0.6/31", "10.0.0.128/25"]),
        ("10.0.0.0/25", &[]),
        ("10.0.0.5/32", &[]),
        ("10.0.0.0/8", &["10.0.0.0/29"]),
        ("::/0", &["fd00::4/126"]),
        ("fd00::/126", &[]),
    ];
    let (cidr, except) = choices[rng.random_range(0..choices.len())];
    let except = except.iter().filter(|_| rng.random_bool(0.7)).map(|text| text.parse().unwrap());
    IpBlock { cidr: cidr.parse().unwrap(), except: except.collect() }
}

fn mk_port(rng: &mut StdRng) -> PolicyPort {
    let protocol = mk_protocol(rng);
    match rng.random_range(0..5) {
        0 => PolicyPort { protocol, port: None, end_port: None },
        1 => {
            let name = ["http", "dns"][rng.random_range(0..2)].to_owned();
            PolicyPort { protocol, port: Some(PortNumberOrName::Name(name)), end_port: None }
        }
        2 => {
            let (first, last) = [(80, 81), (81, 8080), (8080, 65535), (1, 1)][rng.random_range(0..4)];
            PolicyPort { protocol, port: Some(PortNumberOrName::Number(first)), end_port: Some(last) }
        }
        _ => {
            let number = [80, 81, 53, 8085][rng.random_range(0..4)];
            PolicyPort { protocol, port: Some(PortNumberOrName::Number(number)), end_port: None }
        }
    }
}

fn mk_protocol(rng: &mut StdRng) -> Protocol {
    [Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::Sctp][rng.random_range(0..4)]
}

fn many<T>(rng: &mut StdRng, below: usize, mut make: impl FnMut(&mut StdRng) -> T) -> Vec<T> {
    (0..rng.random_range(0..below)).map(|_| make(rng)).collect()
}
