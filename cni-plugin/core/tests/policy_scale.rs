//! How the compiled model grows: identities follow the selectors in force, not the pods.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

use std::net::IpAddr;
use std::time::Instant;

use holdfast_net_core::objects::{
    IngressRule, LabelSelector, Labels, Meta, NetworkPolicy, NetworkPolicySpec, ObjectChange, Operator, Peer,
    Pod, PodStatus, PolicyPort, PortNumberOrName, Requirement,
};
use holdfast_net_core::policy::{Compiler, Subject};
use holdfast_net_core::ruleset::Ruleset;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const PODS: u32 = 5_000;
const APPS: u32 = 300;
const NAMESPACES: u32 = 40;
const POLICIES: u32 = 1_000;
const LOCAL: usize = 100;
const MANY_PEERS: u32 = 100_000;
const MANY_POLICIES: u32 = 10_000;
const SLOTS: u32 = 100;

#[test]
fn a_large_clusters_ruleset_stays_small_and_a_change_costs_what_it_reaches() {
    let mut rng = StdRng::seed_from_u64(1);
    let mut compiler = Compiler::default();
    for index in 0..NAMESPACES {
        compiler.apply(&ObjectChange::Namespace(format!("ns{index}"), Some(Labels::new())));
    }
    let pods: Vec<Pod> = (0..PODS).map(|index| mk_pod(&mut rng, index)).collect();
    for pod in &pods {
        compiler.apply(&put_pod(pod));
    }
    for index in 0..POLICIES {
        compiler.apply(&put_policy(&mk_policy(&mut rng, index)));
    }
    for pod in pods.iter().take(LOCAL) {
        compiler.put(&pod.metadata.name, mk_subject(pod));
    }
    let started = Instant::now();
    let mut kernel = Ruleset::default();
    kernel.apply(&kernel.changes(&compiler.commit()));
    println!("first commit {:?}, {:?}", started.elapsed(), compiler.counts());
    let counts = compiler.counts();
    assert!(counts.identities < 1_000, "{counts:?}");
    assert!(counts.pairs < 20_000, "{counts:?}");
    assert_eq!(kernel, compiler.ruleset());

    let mut relabelled = pods[PODS as usize - 1].clone();
    relabelled.metadata.labels.insert("app".to_owned(), "app7".to_owned());
    let small = time(&mut compiler, &mut kernel, &put_pod(&relabelled), "a pod's label");
    assert!(small <= 4, "{small} elements for one label");
    let mut policy = mk_policy(&mut rng, 1);
    time(&mut compiler, &mut kernel, &put_policy(&policy), "a policy");
    policy.spec.ingress[0].ports[0].port = Some(PortNumberOrName::Number(9999));
    time(&mut compiler, &mut kernel, &put_policy(&policy), "a policy's port");
    time(&mut compiler, &mut kernel, &ObjectChange::Policy(policy.object_name(), None), "a policy less");
}

/// Ten thousand policies, a hundred on each of a hundred local pods, that name a hundred thousand peers in lists of labels.
#[test]
fn selectors_that_list_values_and_pods_with_many_policies_cost_no_more() {
    let mut compiler = Compiler::default();
    let started = Instant::now();
    for index in 0..MANY_PEERS {
        compiler.apply(&put_pod(&mk_grouped_pod(index, index % MANY_POLICIES)));
    }
    for index in 0..MANY_POLICIES {
        compiler.apply(&put_policy(&mk_listing_policy(index, 8000)));
    }
    for slot in 0..SLOTS {
        let pod = mk_slot_pod(slot);
        compiler.apply(&put_pod(&pod));
        compiler.put(&pod.metadata.name, mk_subject(&pod));
    }
    println!("objects in {:?}", started.elapsed());
    let started = Instant::now();
    let delta = compiler.commit();
    println!("first commit {:?}, {:?}", started.elapsed(), compiler.counts());
    let mut kernel = Ruleset::default();
    kernel.apply(&kernel.changes(&delta));
    let started = Instant::now();
    assert_eq!(kernel, compiler.ruleset());
    println!("the whole ruleset {:?}", started.elapsed());
    let started = Instant::now();
    compiler.adopt(&kernel);
    println!("adopted in {:?}", started.elapsed());
    assert_eq!(kernel, compiler.ruleset());

    let label = put_pod(&mk_grouped_pod(77, 78));
    assert!(time(&mut compiler, &mut kernel, &label, "a pod's label") <= 4);
    let address = put_pod(&mk_grouped_pod(MANY_PEERS, 5));
    assert!(time(&mut compiler, &mut kernel, &address, "a pod more") <= 4);
    let name = mk_grouped_pod(MANY_PEERS, 5).object_name();
    assert!(time(&mut compiler, &mut kernel, &ObjectChange::Pod(name, None), "a pod less") <= 4);
    let port = put_policy(&mk_listing_policy(7, 9000));
    assert!(time(&mut compiler, &mut kernel, &port, "a policy's port") <= 8);
    let more = put_policy(&mk_listing_policy(MANY_POLICIES, 9000));
    // A class of 101 policies takes the place of one of 100, and its number.
    assert!(time(&mut compiler, &mut kernel, &more, "a policy more") <= 8);
    let name = mk_listing_policy(MANY_POLICIES, 9000).object_name();
    assert!(time(&mut compiler, &mut kernel, &ObjectChange::Policy(name, None), "a policy less") <= 8);
}

fn mk_grouped_pod(index: u32, group: u32) -> Pod {
    let labels = Labels::from([("group".to_owned(), format!("g{group}"))]);
    let metadata = Meta {
        name: format!("peer{index}"),
        namespace: format!("ns{}", index % NAMESPACES),
        labels,
        ..Meta::default()
    };
    let address = IpAddr::from((0x0a80_0000 + index).to_be_bytes());
    let status = PodStatus { phase: "Running".to_owned(), pod_ip: Some(address), ..PodStatus::default() };
    Pod { metadata, status, ..Pod::default() }
}

fn mk_slot_pod(slot: u32) -> Pod {
    let labels = Labels::from([("slot".to_owned(), format!("s{slot}"))]);
    let metadata =
        Meta { name: format!("slot{slot}"), namespace: "local".to_owned(), labels, ..Meta::default() };
    let address = IpAddr::from((0x0af4_0000 + slot).to_be_bytes());
    let status = PodStatus { phase: "Running".to_owned(), pod_ip: Some(address), ..PodStatus::default() };
    Pod { metadata, status, ..Pod::default() }
}

fn mk_listing_policy(index: u32, first_port: u16) -> NetworkPolicy {
    let values = [index, index + 1].map(|group| format!("g{}", group % MANY_POLICIES)).to_vec();
    let listed = Requirement { key: "group".to_owned(), operator: Operator::In, values };
    let from = vec![Peer {
        pod_selector: Some(LabelSelector { match_expressions: vec![listed], ..LabelSelector::default() }),
        namespace_selector: Some(LabelSelector::default()),
        ip_block: None,
    }];
    let number = first_port + u16::try_from(index % 50).unwrap();
    let ports = vec![PolicyPort { port: Some(PortNumberOrName::Number(number)), ..PolicyPort::default() }];
    let pod_selector = LabelSelector {
        match_labels: Labels::from([("slot".to_owned(), format!("s{}", index % SLOTS))]),
        ..LabelSelector::default()
    };
    NetworkPolicy {
        metadata: Meta { name: format!("policy{index}"), namespace: "local".to_owned(), ..Meta::default() },
        spec: NetworkPolicySpec {
            pod_selector,
            ingress: vec![IngressRule { from, ports }],
            ..NetworkPolicySpec::default()
        },
    }
}

/// Commits a change and tells how many elements it took.
fn time(compiler: &mut Compiler, kernel: &mut Ruleset, change: &ObjectChange, what: &str) -> usize {
    let started = Instant::now();
    compiler.apply(change);
    let delta = compiler.commit();
    let elapsed = started.elapsed();
    let comparing = Instant::now();
    let changes = kernel.changes(&delta);
    kernel.apply(&changes);
    println!("{what}: compared in {:?}", comparing.elapsed());
    assert_eq!(*kernel, compiler.ruleset(), "{what}");
    let elements = changes.add.len() + changes.remove.len();
    println!("{what}: {elements} elements, {elapsed:?}");
    elements
}

fn put_pod(pod: &Pod) -> ObjectChange {
    ObjectChange::Pod(pod.object_name(), Some(Box::new(pod.clone())))
}

fn put_policy(policy: &NetworkPolicy) -> ObjectChange {
    ObjectChange::Policy(policy.object_name(), Some(Box::new(policy.clone())))
}

fn mk_pod(rng: &mut StdRng, index: u32) -> Pod {
    let app = rng.random_range(0..APPS);
    let mut labels = Labels::from([
        ("app".to_owned(), format!("app{app}")),
        ("tier".to_owned(), ["web", "db", "job"][rng.random_range(0..3)].to_owned()),
    ]);
    if rng.random_bool(0.3) {
        labels.insert("statefulset.kubernetes.io/pod-name".to_owned(), format!("pod{index}"));
    }
    let namespace = format!("ns{}", app % NAMESPACES);
    let metadata = Meta { name: format!("pod{index}"), namespace, labels, ..Meta::default() };
    let address = IpAddr::from((0x0a00_0000 + index).to_be_bytes());
    let status = PodStatus { phase: "Running".to_owned(), pod_ip: Some(address), ..PodStatus::default() };
    Pod { metadata, status, ..Pod::default() }
}

fn mk_policy(rng: &mut StdRng, index: u32) -> NetworkPolicy {
    let (app, peer) = (rng.random_range(0..APPS), rng.random_range(0..APPS));
    let select = |app: u32| LabelSelector {
        match_labels: Labels::from([("app".to_owned(), format!("app{app}"))]),
        ..LabelSelector::default()
    };
    let from = vec![Peer {
        pod_selector: Some(select(peer)),
        namespace_selector: Some(LabelSelector::default()),
        ip_block: None,
    }];
    let number = rng.random_range(1..100);
    let ports = vec![PolicyPort { port: Some(PortNumberOrName::Number(number)), ..PolicyPort::default() }];
    let namespace = format!("ns{}", app % NAMESPACES);
    NetworkPolicy {
        metadata: Meta { name: format!("policy{index}"), namespace, ..Meta::default() },
        spec: NetworkPolicySpec {
            pod_selector: select(app),
            ingress: vec![IngressRule { from, ports }],
            ..NetworkPolicySpec::default()
        },
    }
}

fn mk_subject(pod: &Pod) -> Subject {
    Subject { pod: Some(pod.object_name()), uid: String::new(), addresses: pod.addresses() }
}
