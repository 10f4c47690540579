//! How the compiled model grows: identities follow the selectors in force, not the pods.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

use std::net::IpAddr;
use std::time::Instant;

use holdfast_net_core::objects::{
    IngressRule, LabelSelector, Labels, Meta, Namespace, NetworkPolicy, NetworkPolicySpec, Objects, Peer,
    Pod, PodStatus, PolicyPort, PortNumberOrName,
};
use holdfast_net_core::policy::{Model, Numbering, Subject};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const PODS: u32 = 5_000;
const APPS: u32 = 300;
const NAMESPACES: u32 = 40;
const POLICIES: u32 = 1_000;
const LOCAL: usize = 100;

#[test]
fn a_large_clusters_ruleset_stays_small() {
    let mut rng = StdRng::seed_from_u64(1);
    let mut objects = Objects::default();
    for index in 0..NAMESPACES {
        let metadata = Meta { name: format!("ns{index}"), ..Meta::default() };
        objects.insert_namespace(Namespace { metadata });
    }
    for index in 0..PODS {
        let pod = mk_pod(&mut rng, index);
        objects.pods.insert(pod.object_name(), pod);
    }
    for index in 0..POLICIES {
        let policy = mk_policy(&mut rng, index);
        objects.policies.insert(policy.object_name(), policy);
    }
    let subjects: Vec<Subject> = objects.pods.values().take(LOCAL).map(mk_subject).collect();
    let mut numbering = Numbering::default();
    let started = Instant::now();
    let ruleset = Model::compile(&objects, &subjects, &mut numbering).ruleset;
    let first = started.elapsed();
    let started = Instant::now();
    let again = Model::compile(&objects, &subjects, &mut numbering).ruleset;
    println!("first {first:?}, again {:?}", started.elapsed());
    let identities: std::collections::BTreeSet<_> = ruleset.ident.values().collect();
    println!(
        "{} identities over {} addresses, {} pairs, {} profiles",
        identities.len(),
        ruleset.ident.len(),
        ruleset.pair_in.len(),
        ruleset.profiles.len()
    );
    assert_eq!(ruleset, again);
    assert!(identities.len() < 1_000, "{}", identities.len());
    assert!(ruleset.pair_in.len() < 20_000, "{}", ruleset.pair_in.len());
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
