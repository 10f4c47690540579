//! Which nodes are due: they have the taint, and a Ready pod of the agent. Pure.

use std::collections::{BTreeMap, BTreeSet};

use kube::api::DynamicObject;
use serde_json::Value;

/// Keeps pods off a node whose network is not ready yet, whatever its effect.
pub const START_UP_TAINT: &str = "network.holdfast.dev/not-ready";

/// A node that is to be written.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Due {
    pub node: String,
    /// The version that `taints` was made from.
    pub version: String,
    /// The taints that stay.
    pub taints: Vec<Value>,
}

/// What is known of the cluster.
#[derive(Debug, Default)]
pub(super) struct Index {
    /// The agent's Ready pods, and the nodes that they are on.
    ready: BTreeMap<String, String>,
    /// Nodes with the taint.
    tainted: BTreeMap<String, Due>,
}

impl Index {
    /// A pod of the agent as it is now.
    pub(super) fn put_pod(&mut self, pod: &DynamicObject) {
        let Some(name) = &pod.metadata.name else { return };
        let node = pod.data["spec"]["nodeName"].as_str().unwrap_or_default();
        let conditions = pod.data["status"]["conditions"].as_array().into_iter().flatten();
        let is_ready = conditions.into_iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
        if is_ready && !node.is_empty() && pod.metadata.deletion_timestamp.is_none() {
            self.ready.insert(name.clone(), node.to_owned());
        } else {
            self.ready.remove(name);
        }
    }

    /// A pod of the agent is gone.
    pub(super) fn remove_pod(&mut self, pod: &DynamicObject) {
        if let Some(name) = &pod.metadata.name {
            self.ready.remove(name);
        }
    }

    /// A node as it is now.
    pub(super) fn put_node(&mut self, node: &DynamicObject) {
        let (Some(name), Some(version)) = (&node.metadata.name, &node.metadata.resource_version) else {
            return;
        };
        let all = node.data["spec"]["taints"].as_array().map_or(&[][..], Vec::as_slice);
        // Whole, with fields that this program does not know.
        let taints: Vec<Value> = all.iter().filter(|taint| taint["key"] != START_UP_TAINT).cloned().collect();
        if taints.len() == all.len() {
            self.tainted.remove(name);
        } else {
            let due = Due { node: name.clone(), version: version.clone(), taints };
            self.tainted.insert(name.clone(), due);
        }
    }

    /// A node is gone.
    pub(super) fn remove_node(&mut self, node: &DynamicObject) {
        if let Some(name) = &node.metadata.name {
            self.remove_name(name);
        }
    }

    /// Nothing is known of this node until the next event on it.
    pub(super) fn remove_name(&mut self, node: &str) {
        self.tainted.remove(node);
    }

    /// The nodes to write, in order.
    pub(super) fn due(&self) -> Vec<Due> {
        let ready: BTreeSet<&String> = self.ready.values().collect();
        self.tainted.values().filter(|due| ready.contains(&due.node)).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn mk(object: Value) -> DynamicObject {
        serde_json::from_value(object).unwrap()
    }

    fn mk_node(name: &str, version: &str, keys: &[&str]) -> DynamicObject {
        let taints: Vec<Value> =
            keys.iter().map(|key| json!({"key": key, "effect": "NoSchedule", "timeAdded": "x"})).collect();
        mk(json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "resourceVersion": version},
            "spec": {"podCIDR": "10.0.0.0/24", "taints": taints},
        }))
    }

    fn mk_pod(name: &str, node: &str, ready: &str) -> DynamicObject {
        mk(json!({
            "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name}, "spec": {"nodeName": node},
            "status": {"conditions": [{"type": "Initialized", "status": "True"}, {"type": "Ready", "status": ready}]},
        }))
    }

    fn names(index: &Index) -> Vec<String> {
        index.due().into_iter().map(|due| due.node).collect()
    }

    #[test]
    fn a_node_is_due_while_it_has_the_taint_and_a_ready_agent() {
        let mut index = Index::default();
        index.put_node(&mk_node("a", "1", &["other", START_UP_TAINT]));
        index.put_node(&mk_node("b", "1", &[START_UP_TAINT]));
        index.put_node(&mk_node("c", "1", &["other"]));
        index.put_pod(&mk_pod("netd-1", "a", "False"));
        index.put_pod(&mk_pod("netd-3", "c", "True"));
        assert!(names(&index).is_empty());
        index.put_pod(&mk_pod("netd-1", "a", "True"));
        let due = index.due();
        assert_eq!(due.len(), 1);
        assert_eq!((due[0].node.as_str(), due[0].version.as_str()), ("a", "1"));
        let kept = json!({"key": "other", "effect": "NoSchedule", "timeAdded": "x"});
        assert_eq!(due[0].taints, [kept], "another's taint stays, whole");
        // The newest version is what is written to.
        index.put_node(&mk_node("a", "2", &[START_UP_TAINT]));
        assert_eq!(index.due()[0].version, "2");
        index.put_pod(&mk_pod("netd-1", "a", "Unknown"));
        assert!(names(&index).is_empty());
        index.put_pod(&mk_pod("netd-1", "a", "True"));
        index.remove_pod(&mk_pod("netd-1", "a", "True"));
        assert!(names(&index).is_empty());
    }

    #[test]
    fn the_old_pod_of_an_upgrade_says_nothing_of_the_new_one() {
        let mut index = Index::default();
        index.put_node(&mk_node("a", "1", &[START_UP_TAINT]));
        let mut ending = mk_pod("old", "a", "True");
        index.put_pod(&ending);
        assert_eq!(names(&index), ["a"]);
        ending.metadata.deletion_timestamp = serde_json::from_value(json!("2026-01-01T00:00:00Z")).unwrap();
        index.put_pod(&ending);
        index.put_pod(&mk_pod("new", "a", "False"));
        assert!(names(&index).is_empty());
        index.put_pod(&mk_pod("new", "a", "True"));
        index.remove_pod(&ending);
        assert_eq!(names(&index), ["a"]);
    }

    #[test]
    fn nodes_that_go_are_forgotten() {
        let mut index = Index::default();
        index.put_pod(&mk_pod("netd-1", "a", "True"));
        index.put_node(&mk_node("a", "1", &[START_UP_TAINT]));
        index.remove_node(&mk_node("a", "1", &[START_UP_TAINT]));
        assert!(names(&index).is_empty());
        // One that is not in order yet has no status at all.
        index.put_pod(&mk(
            json!({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "netd-1"}, "spec": {}}),
        ));
        index.put_node(&mk_node("a", "2", &[START_UP_TAINT]));
        assert!(names(&index).is_empty());
    }
}
