//! Edits of single policies, as people make them: what the policy says now holds at the next commit.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

use std::net::IpAddr;

use holdfast_net_core::objects::{ClusterNetworkPolicy, NetworkPolicy, ObjectChange, ObjectName};
use holdfast_net_core::policy::{Compiler, Direction, Subject, allows};
use holdfast_net_core::ports::Proto;
use serde_json::{Value, from_value, json};

const SERVER: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 1));
const CLIENT: IpAddr = IpAddr::V4(std::net::Ipv4Addr::new(10, 0, 0, 2));

/// A node with one pod, whose port "http" is 8080, and a client elsewhere.
fn mk_compiler() -> Compiler {
    let mut compiler = Compiler::default();
    let pod = json!({
        "metadata": { "name": "server", "namespace": "shop", "labels": { "app": "server" } },
        "spec": { "containers": [{ "ports": [{ "name": "http", "containerPort": 8080 }] }] },
        "status": { "phase": "Running", "podIP": SERVER },
    });
    let client = json!({
        "metadata": { "name": "client", "namespace": "shop" }, "status": { "phase": "Running", "podIP": CLIENT },
    });
    let name = ObjectName::new("shop", "client");
    compiler.apply(&ObjectChange::Pod(name, Some(from_value(client).unwrap())));
    let name = ObjectName::new("shop", "server");
    compiler.apply(&ObjectChange::Pod(name.clone(), Some(from_value(pod).unwrap())));
    compiler.put("hf1", Subject { pod: Some(name), uid: String::new(), addresses: vec![SERVER] });
    compiler
}

fn answers(compiler: &mut Compiler) -> bool {
    let _ = compiler.commit();
    allows(&compiler.ruleset(), Direction::Ingress, SERVER, CLIENT, Proto::Tcp, 8080)
}

#[test]
fn an_edited_policy_may_use_a_port_name_that_none_used_before() {
    let mut compiler = mk_compiler();
    let mut put = |port: Value| {
        let policy: NetworkPolicy = from_value(json!({
            "metadata": { "name": "p", "namespace": "shop" },
            "spec": { "podSelector": {}, "ingress": [{ "ports": [{ "port": port }] }] },
        }))
        .unwrap();
        compiler.apply(&ObjectChange::Policy(policy.object_name(), Some(Box::new(policy))));
        answers(&mut compiler)
    };
    assert!(!put(json!(80)));
    assert!(put(json!("http")));
    assert!(!put(json!("https")));
    assert!(put(json!(8080)));
}

#[test]
fn an_edited_deny_may_use_a_port_name_that_none_used_before() {
    let mut compiler = mk_compiler();
    let mut put = |protocol: Value| {
        let policy: ClusterNetworkPolicy = from_value(json!({
            "metadata": { "name": "p" },
            "spec": {
                "tier": "Admin", "priority": 1, "subject": { "namespaces": {} },
                "ingress": [{
                    "action": "Deny", "from": [{ "namespaces": {} }],
                    "protocols": [protocol],
                }],
            },
        }))
        .unwrap();
        compiler.apply(&ObjectChange::ClusterPolicy("p".to_owned(), Some(Box::new(policy))));
        answers(&mut compiler)
    };
    assert!(put(json!({ "tcp": { "destinationPort": { "number": 80 } } })));
    assert!(!put(json!({ "tcp": { "destinationPort": { "number": 8080 } } })));
    assert!(put(json!({ "tcp": { "destinationPort": { "number": 80 } } })));
    assert!(!put(json!({ "destinationNamedPort": "http" })));
    assert!(put(json!({ "destinationNamedPort": "https" })));
}

/// The port of an endpoint outlives it, and keeps its class's number in the kernel.
#[test]
fn what_is_left_of_a_pod_does_not_come_under_the_new_rules_of_its_twin() {
    let mut compiler = mk_compiler();
    let twin_address = IpAddr::from([10, 0, 0, 3]);
    let put_twin = |compiler: &mut Compiler, app: &str| {
        let pod = json!({
            "metadata": { "name": "twin", "namespace": "shop", "labels": { "app": app } },
            "status": { "phase": "Running", "podIP": twin_address },
        });
        compiler.apply(&ObjectChange::Pod(ObjectName::new("shop", "twin"), Some(from_value(pod).unwrap())));
        let _ = compiler.commit();
        compiler.ruleset().cls_in.get(&twin_address).copied()
    };
    for (app, ports) in [("server", json!([{ "port": 80 }])), ("open", json!([]))] {
        let policy: NetworkPolicy = from_value(json!({
            "metadata": { "name": app, "namespace": "shop" },
            "spec": { "podSelector": { "matchLabels": { "app": app } }, "ingress": [{ "ports": ports }] },
        }))
        .unwrap();
        compiler.apply(&ObjectChange::Policy(policy.object_name(), Some(Box::new(policy))));
    }
    let twin = Subject {
        pod: Some(ObjectName::new("shop", "twin")),
        uid: String::new(),
        addresses: vec![twin_address],
    };
    compiler.put("hf2", twin);
    let before = put_twin(&mut compiler, "server");
    assert_eq!(before, compiler.ruleset().cls_in.get(&SERVER).copied(), "they are of one class");
    compiler.remove("hf1");
    let _ = compiler.commit();
    assert_ne!(put_twin(&mut compiler, "open"), before);
}
