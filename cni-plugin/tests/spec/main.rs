//! The CNI specification 1.1.0, rule by rule: one test for each MUST and SHOULD that is about a plugin, named after it. The rules
//! with their tests are listed in docs/cni.md. On the real binaries, a real agent and a real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

#[path = "../support/mod.rs"]
mod support;

mod add_and_del;
mod check;
mod gc_and_status;
mod words;

use serde_json::{Value, json};
use support::{Cluster, Netns, Node, plugin};

/// A cluster of one node whose pods get addresses of 10.42.1.0/24.
pub fn mk_node() -> (Cluster, Node) {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    let node = cluster.start_node("a", 1);
    (cluster, node)
}

/// Executes the plugin with these variables beside CNI_COMMAND; `extra` is merged into the configuration.
pub fn call(node: &Node, command: &str, variables: &[(&str, &str)], extra: Value) -> Result<Value, Value> {
    let mut all = vec![("CNI_COMMAND", command)];
    all.extend(variables);
    plugin(Some(&node.netns), &all, &node.config(extra).to_string())
}

/// ADD of a container without a pod.
pub fn add(node: &Node, id: &str, sandbox: &Netns) -> Result<Value, Value> {
    node.cni("ADD", id, Some(&sandbox.path()), json!({}))
}
