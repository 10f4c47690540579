//! How the compiled model grows: identities follow the selectors in force, not the pods.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

use std::net::IpAddr;
use std::time::Instant;

use holdfast_net_core::objects::{
    IngressRule, LabelSelector, Labels, Meta, NetworkPolicy, NetworkPolicySpec, ObjectChange, Peer, Pod,
    PodStatus, PolicyPort, PortNumberOrName,
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

/// Commits a change and tells how many elements it took.
fn time(compiler: &mut Compiler, kernel: &mut Ruleset, change: &ObjectChange, what: &str) -> usize {
    let started = Instant::now();
    compiler.apply(change);
    let delta = compiler.commit();
    let elapsed = started.elapsed();
    let changes = kernel.changes(&delta);
    kernel.apply(&changes);
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
