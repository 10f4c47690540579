//! Objects as nobody should write them: too large, contradicting, in any order. The compiler stays correct and quick.
//!
//! Times are loose, because the machine may be busy: what they tell apart is seconds from minutes.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

use std::net::{IpAddr, Ipv4Addr};
use std::time::{Duration, Instant};

use holdfast_net_core::objects::{
    ClusterAction, ClusterIngressRule, ClusterNetworkPolicy, ClusterNetworkPolicySpec, ClusterPeer,
    ClusterSubject, ClusterTier, IngressRule, IpBlock, LabelSelector, Labels, Meta, NetworkPolicy,
    NetworkPolicySpec, ObjectChange, ObjectName, Operator, Peer, Pod, PodStatus, PolicyPort, PolicyType,
    PortNumberOrName, Requirement,
};
use holdfast_net_core::policy::{
    Compiler, Direction, PARTS_MAX, PORTS_MAX, Subject, allows, check_cluster_size, check_size, closed,
    closed_cluster,
};
use holdfast_net_core::ports::Proto;
use holdfast_net_core::ruleset::Ruleset;
use rand::rngs::StdRng;
use rand::seq::SliceRandom;
use rand::{Rng, SeedableRng};

/// No commit of one change takes longer, however large the policy within the limits is.
const COMMIT_LIMIT: Duration = Duration::from_secs(20);
const RULES: u32 = 100_000;
const NAMESPACE: &str = "shop";

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn app(name: &str) -> LabelSelector {
    LabelSelector { match_labels: labels(&[("app", name)]), ..LabelSelector::default() }
}

fn mk_pod(name: &str, number: u8) -> Pod {
    let metadata = Meta {
        name: name.to_owned(),
        namespace: NAMESPACE.to_owned(),
        labels: labels(&[("app", name)]),
        ..Meta::default()
    };
    let address = Some(IpAddr::from([10, 0, 0, number]));
    let status = PodStatus { phase: "Running".to_owned(), pod_ip: address, ..PodStatus::default() };
    Pod { metadata, status, ..Pod::default() }
}

fn mk_policy(name: &str, subject: &str, ingress: Vec<IngressRule>) -> NetworkPolicy {
    NetworkPolicy {
        metadata: Meta { name: name.to_owned(), namespace: NAMESPACE.to_owned(), ..Meta::default() },
        spec: NetworkPolicySpec { pod_selector: app(subject), ingress, ..NetworkPolicySpec::default() },
    }
}

fn from_app(name: &str) -> Peer {
    Peer { pod_selector: Some(app(name)), ..Peer::default() }
}

fn from_block(cidr: String, except: Vec<String>) -> Peer {
    let except = except.iter().map(|text| text.parse().unwrap()).collect();
    Peer { ip_block: Some(IpBlock { cidr: cidr.parse().unwrap(), except }), ..Peer::default() }
}

fn at_port(number: u16) -> PolicyPort {
    PolicyPort { port: Some(PortNumberOrName::Number(number)), ..PolicyPort::default() }
}

fn put_pod(pod: &Pod) -> ObjectChange {
    ObjectChange::Pod(pod.object_name(), Some(Box::new(pod.clone())))
}

fn put_policy(policy: &NetworkPolicy) -> ObjectChange {
    ObjectChange::Policy(policy.object_name(), Some(Box::new(policy.clone())))
}

fn subject_of(pod: &Pod) -> Subject {
    Subject { pod: Some(pod.object_name()), uid: String::new(), addresses: pod.addresses() }
}

/// A compiler with what it has put into the kernel.
#[derive(Default)]
struct Node {
    compiler: Compiler,
    kernel: Ruleset,
}

impl Node {
    /// With a server and a client here.
    fn new() -> Self {
        let mut node = Self::default();
        node.apply(&ObjectChange::Namespace(NAMESPACE.to_owned(), Some(Labels::new())));
        for pod in [mk_pod("server", 1), mk_pod("client", 2)] {
            node.apply(&put_pod(&pod));
            node.compiler.put(&pod.metadata.name, subject_of(&pod));
        }
        node.commit();
        node
    }

    fn apply(&mut self, change: &ObjectChange) {
        self.compiler.apply(change);
    }

    /// Elements that changed, and how long it took to find them.
    fn commit(&mut self) -> (usize, Duration) {
        let started = Instant::now();
        let delta = self.compiler.commit();
        let took = started.elapsed();
        let changes = self.kernel.changes(&delta);
        self.kernel.apply(&changes);
        self.kernel.validate().unwrap();
        (changes.add.len() + changes.remove.len(), took)
    }

    fn put(&mut self, policy: &NetworkPolicy) -> (usize, Duration) {
        self.apply(&put_policy(policy));
        self.commit()
    }

    fn admits(&self, client: impl Into<IpAddr>, port: u16) -> bool {
        let server = IpAddr::from([10, 0, 0, 1]);
        allows(&self.kernel, Direction::Ingress, server, client.into(), Proto::Tcp, port)
    }
}

/// Puts a policy into force and takes it out again; another policy's change beside it costs a few elements.
fn try_large(what: &str, policy: &NetworkPolicy) -> Node {
    assert_eq!(check_size(policy).map_err(|error| error.to_string()), Ok(()), "{what}");
    let mut node = Node::new();
    let (elements, took) = node.put(policy);
    println!("{what}: {elements} elements, {took:?}");
    assert!(took < COMMIT_LIMIT, "{what} took {took:?}");
    let (small, took_beside) = node.put(&mk_policy(
        "other",
        "client",
        vec![IngressRule { from: vec![from_app("server")], ports: vec![at_port(7)] }],
    ));
    println!("{what}: another policy beside it {small} elements, {took_beside:?}");
    assert!(small < 10, "{what}: {small} elements for another policy");
    assert!(took_beside < COMMIT_LIMIT / 4, "{what}: another policy took {took_beside:?}");
    let started = Instant::now();
    let explained = node.compiler.explain(&party([10, 9, 9, 9]), &party([10, 0, 0, 1]), Proto::Tcp, 80);
    assert_eq!(explained.is_allowed(), node.admits([10, 9, 9, 9], 80), "{what}");
    assert!(started.elapsed() < COMMIT_LIMIT / 4, "{what}: explaining took {:?}", started.elapsed());
    node
}

fn party(address: [u8; 4]) -> holdfast_net_core::policy::Party {
    holdfast_net_core::policy::Party { pod: None, address: address.into() }
}

/// The n-th address from 10.1.0.0 on.
fn address(number: u32) -> Ipv4Addr {
    Ipv4Addr::from(0x0a01_0000 + number)
}

#[test]
fn policies_as_large_as_the_limits_let_them_be_are_compiled_and_changed_beside() {
    let rules = u32::try_from(PARTS_MAX / 3).unwrap() - 1;
    let ports = |number: u32| u16::try_from(number % u32::try_from(PORTS_MAX).unwrap()).unwrap() * 2 + 1;
    let blocks = (0..rules).map(|number| IngressRule {
        from: vec![from_block(format!("{}/32", address(number)), vec![])],
        ports: vec![at_port(ports(number))],
    });
    let node = try_large("a rule for each of many addresses", &mk_policy("p", "server", blocks.collect()));
    assert!(node.admits(address(300), ports(300)) && !node.admits(address(300), ports(301)));
    assert!(!node.admits(address(rules), ports(rules)));

    let peers = (0..rules).map(|number| from_app(&format!("a{number}"))).chain([from_app("client")]);
    let one = vec![IngressRule { from: peers.collect(), ports: vec![at_port(80)] }];
    let node = try_large("a rule with many selectors", &mk_policy("p", "server", one));
    assert!(node.admits([10, 0, 0, 2], 80) && !node.admits([10, 0, 0, 3], 80));

    let everybody =
        (0..rules).map(|number| IngressRule { from: vec![], ports: vec![at_port(ports(number))] });
    let node = try_large("many rules for everybody", &mk_policy("p", "server", everybody.collect()));
    assert!(node.admits([192, 0, 2, 1], 1) && !node.admits([192, 0, 2, 1], 2));

    // Every other address is excepted.
    let except =
        (0..u32::try_from(PARTS_MAX).unwrap() - 100).map(|number| format!("{}/32", address(2 * number)));
    let one = vec![IngressRule {
        from: vec![from_block("10.0.0.0/8".to_owned(), except.collect())],
        ports: vec![],
    }];
    let node = try_large("a block with many exceptions", &mk_policy("p", "server", one));
    assert!(!node.admits(address(0), 80) && node.admits(address(1), 80) && !node.admits(address(200), 80));

    let overlapping =
        (0..1000).map(|number| from_block("0.0.0.0/0".to_owned(), vec![format!("{}/32", address(number))]));
    let one = vec![IngressRule { from: overlapping.collect(), ports: vec![] }];
    try_large("blocks that overlap", &mk_policy("p", "server", one));

    let values = (0..PARTS_MAX - 100).map(|number| format!("v{number}")).chain(["client".to_owned()]);
    let requirement = Requirement { key: "app".to_owned(), operator: Operator::In, values: values.collect() };
    let huge = LabelSelector { match_expressions: vec![requirement], ..LabelSelector::default() };
    let one =
        vec![IngressRule { from: vec![Peer { pod_selector: Some(huge), ..Peer::default() }], ports: vec![] }];
    let node = try_large("a selector with many values", &mk_policy("p", "server", one));
    assert!(node.admits([10, 0, 0, 2], 80));
}

#[test]
fn a_policy_beyond_a_limit_isolates_and_admits_nothing_and_the_limit_is_named() {
    let rules = |number: u32| IngressRule {
        from: vec![from_block(format!("{}/32", address(number)), vec![])],
        ports: vec![at_port(80)],
    };
    let except: Vec<String> = (0..RULES).map(|number| format!("{}/32", address(number))).collect();
    let many_ports =
        (0..u16::try_from(PORTS_MAX).unwrap() + 1).map(|number| at_port(2 * number + 1)).collect();
    let overlapping =
        (0..1001).map(|number| from_block("0.0.0.0/0".to_owned(), vec![format!("{}/32", address(number))]));
    for (ingress, expected) in [
        ((0..RULES).map(rules).collect(), "300001 rules, peers, ports and values"),
        (
            vec![IngressRule { from: vec![from_block("10.0.0.0/8".to_owned(), except)], ports: vec![] }],
            "100003",
        ),
        (vec![IngressRule { from: vec![], ports: many_ports }], "257 different ports"),
        (vec![IngressRule { from: overlapping.collect(), ports: vec![] }], "blocks times exceptions"),
    ] {
        let policy = mk_policy("p", "server", ingress);
        let problem = check_size(&policy).unwrap_err().to_string();
        assert!(problem.contains(expected), "{problem}");
        let mut node = Node::new();
        assert!(node.admits([10, 0, 0, 2], 80), "no policy");
        let (elements, _) = node.put(&closed(&policy));
        assert_eq!(elements, 1, "only the server's class");
        assert!(!node.admits([10, 0, 0, 2], 80) && !node.admits(address(5), 80));
        let client = IpAddr::from([10, 0, 0, 2]);
        assert!(allows(&node.kernel, Direction::Ingress, client, [10, 0, 0, 1].into(), Proto::Tcp, 80));
    }
    let mut both = mk_policy("p", "server", vec![]);
    both.spec.policy_types = vec![PolicyType::Egress];
    assert_eq!(closed(&both).spec.policy_types, [PolicyType::Egress], "it isolates no other direction");
}

#[test]
fn a_rule_of_a_cluster_policy_with_a_peer_beyond_the_limit_fails_closed() {
    let values = (0..PARTS_MAX).map(|number| format!("v{number}")).chain([NAMESPACE.to_owned()]);
    let key = "kubernetes.io/metadata.name".to_owned();
    let requirement = Requirement { key, operator: Operator::In, values: values.collect() };
    let huge = LabelSelector { match_expressions: vec![requirement], ..LabelSelector::default() };
    let with = |action| {
        let from = vec![ClusterPeer { namespaces: Some(huge.clone()), ..ClusterPeer::default() }];
        let rule = ClusterIngressRule { name: String::new(), action, from, protocols: None };
        let subject = ClusterSubject { namespaces: Some(huge.clone()), pods: None };
        let (ingress, egress) = (vec![rule], Vec::new());
        let spec =
            ClusterNetworkPolicySpec { tier: ClusterTier::Admin, priority: 1, subject, ingress, egress };
        let metadata = Meta { name: "p".to_owned(), ..Meta::default() };
        ClusterNetworkPolicy { metadata, spec }
    };
    // Who is no peer of the rule, and who would be.
    let (stranger, peer) = ([192, 0, 2, 1], [10, 0, 0, 2]);
    for action in [ClusterAction::Accept, ClusterAction::Deny, ClusterAction::Pass] {
        let policy = with(action);
        let problem = check_cluster_size(&policy).unwrap_err().to_string();
        assert!(problem.starts_with("spec.ingress[0].from[0]: at most 20000"), "{problem}");
        let closed = closed_cluster(&policy);
        assert_eq!(check_cluster_size(&closed), Ok(()), "the subject has no limit");
        let mut node = Node::new();
        node.put(&mk_policy("isolate", "client", vec![]));
        node.apply(&ObjectChange::ClusterPolicy("p".to_owned(), Some(Box::new(closed))));
        node.commit();
        let open = action == ClusterAction::Accept;
        assert_eq!((node.admits(stranger, 80), node.admits(peer, 80)), (open, open), "{action:?}");
        let client = IpAddr::from(peer);
        let admitted = allows(&node.kernel, Direction::Ingress, client, [10, 0, 0, 1].into(), Proto::Tcp, 80);
        assert!(!admitted, "{action:?} admits nobody whom another policy does not");
    }
}

/// What a state allows does not depend on the order in which it was told, nor on what was told twice.
#[test]
fn events_in_any_order_and_twice_lead_to_the_same_verdicts() {
    for seed in 0..200 {
        let mut rng = StdRng::seed_from_u64(seed);
        let (server, client, gone) = (mk_pod("server", 1), mk_pod("client", 2), mk_pod("gone", 3));
        let rule = |from: &str, port| IngressRule { from: vec![from_app(from)], ports: vec![at_port(port)] };
        let policies = [
            mk_policy("by-client", "server", vec![rule("client", 80)]),
            // It names a pod that is deleted before or after it.
            mk_policy("by-gone", "server", vec![rule("gone", 81)]),
        ];
        let namespace = ObjectChange::Namespace(NAMESPACE.to_owned(), Some(Labels::new()));
        let mut events = vec![namespace, put_pod(&server), put_pod(&client), put_pod(&gone)];
        events.extend(policies.iter().map(put_policy));
        let twice: Vec<ObjectChange> = events.iter().filter(|_| rng.random_bool(0.3)).cloned().collect();
        events.extend(twice);
        events.shuffle(&mut rng);
        let last = events.iter().rposition(|event| *event == put_pod(&gone)).unwrap();
        let at = rng.random_range(last + 1..=events.len());
        events.insert(at, ObjectChange::Pod(gone.object_name(), None));
        // A pod, a policy and a namespace that never were.
        for event in [
            ObjectChange::Pod(ObjectName::new("nowhere", "nobody"), None),
            ObjectChange::Policy(ObjectName::new("nowhere", "nothing"), None),
            ObjectChange::Namespace("nowhere".to_owned(), None),
        ] {
            events.insert(rng.random_range(0..=events.len()), event);
        }

        let mut node = Node::default();
        for pod in [&server, &client] {
            node.compiler.put(&pod.metadata.name, subject_of(pod));
        }
        for event in &events {
            node.apply(event);
            if rng.random_bool(0.5) {
                node.commit();
            }
        }
        node.commit();
        let found = [([10, 0, 0, 2], 80), ([10, 0, 0, 2], 81), ([10, 0, 0, 3], 81), ([10, 0, 0, 3], 80)]
            .map(|(from, port)| node.admits(from, port));
        assert_eq!(found, [true, false, false, false], "seed {seed}: {events:#?}");
        assert_eq!(node.kernel, node.compiler.ruleset(), "seed {seed}");
    }
}

#[test]
fn an_address_that_two_live_pods_claim_is_nobodys_until_that_is_settled() {
    let mut node = Node::new();
    let other = mk_pod("other", 9);
    let mut twin = mk_pod("client", 9);
    twin.metadata.name = "twin".to_owned();
    node.put(&mk_policy("p", "server", vec![IngressRule { from: vec![from_app("client")], ports: vec![] }]));
    node.apply(&put_pod(&twin));
    node.commit();
    assert!(node.admits([10, 0, 0, 9], 80));

    node.apply(&put_pod(&other));
    node.commit();
    assert!(!node.admits([10, 0, 0, 9], 80), "one of the two is no client");
    assert_eq!(node.compiler.contested().iter().collect::<Vec<_>>(), [&IpAddr::from([10, 0, 0, 9])]);

    node.apply(&ObjectChange::Pod(other.object_name(), None));
    node.commit();
    assert!(node.admits([10, 0, 0, 9], 80) && node.compiler.contested().is_empty());
}
