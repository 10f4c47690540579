//! The objects of the torture: pods, and the policies that the oracle knows.

use anyhow::Result;
use holdfast_tests::netbed::NetBed;
use serde_json::{Value, json};

use super::probes::{Edit, Role};

/// Of every pod and policy.
pub const NAMESPACE: &str = "t";

/// Writes a pod's object; without a status it is pending.
pub fn put_pod(bed: &NetBed, name: &str, role: Role, node: usize, status: &Value) -> Result<()> {
    let status = if status.is_null() { json!({ "phase": "Pending" }) } else { status.clone() };
    let object = json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": { "name": name, "namespace": NAMESPACE, "labels": { "role": role.word() } },
        "spec": { "nodeName": bed.nodes[node].name, "containers": [{ "name": "main", "image": "none" }] },
        "status": status,
    });
    bed.objects.put(&format!("pod-{NAMESPACE}-{name}"), &object)
}

/// What [`super::probes::allows`] says.
pub fn put_policies(bed: &NetBed, edit: Edit) -> Result<()> {
    let only = |role: Role| json!({ "podSelector": { "matchLabels": { "role": role.word() } } });
    let ingress = |name: &str, to: Role, from: Role| {
        let spec = json!({ "podSelector": { "matchLabels": { "role": to.word() } }, "ingress": [{ "from": [only(from)] }] });
        policy(name, &spec)
    };
    let egress = policy(
        "egress",
        &json!({
            "podSelector": { "matchLabels": { "role": "client" } }, "policyTypes": ["Egress"],
            "egress": [{ "to": [only(Role::Web), only(Role::Client)] }],
        }),
    );
    let mut policies = vec![ingress("web", Role::Web, Role::Client), egress];
    match edit {
        Edit::Open => {}
        Edit::FromWeb => policies.push(ingress("edited", Role::Stranger, Role::Web)),
        Edit::FromClient => policies.push(ingress("edited", Role::Stranger, Role::Client)),
    }
    bed.objects.put("policies", &json!({ "apiVersion": "v1", "kind": "List", "items": policies }))
}

fn policy(name: &str, spec: &Value) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": { "name": name, "namespace": NAMESPACE }, "spec": spec,
    })
}
