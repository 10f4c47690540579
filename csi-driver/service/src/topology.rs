//! Topology as CSI spells it: a node's own name, and its zone where it has one.
//!
//! Every node reaches every volume and every snapshot, so that neither has an accessible topology of its own, and a
//! requirement is met wherever one of its topologies is part of the cluster.

use std::collections::HashMap;

use holdfast_proto::csi::{Topology, TopologyRequirement};
use holdfast_storage_core::ids::NodeName;
use tonic::Status;

use crate::node_book::NodeBook;

/// Key of a node's topology: its own name.
pub const NODE_KEY: &str = "csi.holdfast.dev/node";
/// Key of a node's topology: the zone it stands in.
pub const ZONE_KEY: &str = "csi.holdfast.dev/zone";
/// Longest value of a label in Kubernetes, which a segment becomes there.
const VALUE_BYTES_MAX: usize = 63;

/// Whether a text can be the value of a segment, which Kubernetes makes a label of.
#[must_use]
pub fn is_topology_value(text: &str) -> bool {
    let inner = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let edge = |c: Option<char>| c.is_some_and(|c| c.is_ascii_alphanumeric());
    text.len() <= VALUE_BYTES_MAX
        && edge(text.chars().next())
        && edge(text.chars().last())
        && text.chars().all(inner)
}

/// Where a node is.
#[must_use]
pub fn of_node(node: &NodeName, zone: Option<&str>) -> Topology {
    let mut segments = HashMap::from([(NODE_KEY.to_owned(), node.0.clone())]);
    segments.extend(zone.map(|zone| (ZONE_KEY.to_owned(), zone.to_owned())));
    Topology { segments }
}

/// The node of the most preferred topology: where the first pod of a volume is going to run.
#[must_use]
pub fn preferred_node(requirement: Option<&TopologyRequirement>) -> Option<NodeName> {
    let requirement = requirement?;
    let first = requirement.preferred.first().or(requirement.requisite.first())?;
    first.segments.get(NODE_KEY).map(|node| NodeName(node.clone()))
}

/// Checks a requirement of a new volume or snapshot.
///
/// # Errors
/// INVALID_ARGUMENT for a key that is none of ours; RESOURCE_EXHAUSTED where no requisite topology is part of the cluster;
/// UNAVAILABLE where it may be, as this controller was just started.
pub fn check_requirement(requirement: Option<&TopologyRequirement>, book: &NodeBook) -> Result<(), Status> {
    let Some(TopologyRequirement { requisite, preferred }) = requirement else { return Ok(()) };
    for (field, topologies) in [("requisite", requisite), ("preferred", preferred)] {
        topologies
            .iter()
            .try_for_each(|topology| check_keys(&format!("accessibility_requirements.{field}"), topology))?;
    }
    if requisite.is_empty() || requisite.iter().any(|topology| exists(topology, book)) {
        return Ok(());
    }
    let sentence = "accessibility_requirements.requisite: no node of this cluster is there";
    Err(if book.is_filling() { Status::unavailable(sentence) } else { Status::resource_exhausted(sentence) })
}

/// Checks the keys of one topology.
///
/// # Errors
/// INVALID_ARGUMENT naming the key that is none of ours.
pub fn check_keys(field: &str, topology: &Topology) -> Result<(), Status> {
    let mut keys: Vec<&String> = topology.segments.keys().collect();
    keys.sort();
    match keys.into_iter().find(|key| ![NODE_KEY, ZONE_KEY].contains(&key.as_str())) {
        None => Ok(()),
        Some(key) => {
            let shown: String = key.chars().take(80).collect();
            let sentence =
                format!("{field}: segment \"{shown}\" is unknown; known are {NODE_KEY} and {ZONE_KEY}");
            Err(Status::invalid_argument(sentence))
        }
    }
}

/// Whether some node was ever heard of at a topology.
#[must_use]
pub fn exists(topology: &Topology, book: &NodeBook) -> bool {
    let segment = |key: &str| topology.segments.get(key);
    book.all().iter().any(|info| {
        segment(NODE_KEY).is_none_or(|node| *node == info.name.0)
            && segment(ZONE_KEY).is_none_or(|zone| info.zone.as_ref() == Some(zone))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_are_those_of_labels() {
        for good in ["a", "zone-1", "eu.west_2-A"] {
            assert!(is_topology_value(good), "{good}");
        }
        for bad in ["", "-a", "a-", "a/b", "a b", &"z".repeat(64)] {
            assert!(!is_topology_value(bad), "{bad}");
        }
    }

    #[test]
    fn the_first_preferred_node_counts_and_else_the_first_requisite_one() {
        let at = |name: &str| of_node(&NodeName(name.to_owned()), Some("z"));
        let mut requirement =
            TopologyRequirement { requisite: vec![at("a"), at("b")], preferred: vec![at("b")] };
        assert_eq!(preferred_node(Some(&requirement)), Some(NodeName("b".to_owned())));
        requirement.preferred.clear();
        assert_eq!(preferred_node(Some(&requirement)), Some(NodeName("a".to_owned())));
        assert_eq!(preferred_node(None), None);
    }
}
