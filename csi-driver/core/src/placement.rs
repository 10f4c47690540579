//! Which nodes get a volume's replicas: distinct ones with enough space, most free space first.

use crate::ids::NodeName;

/// A node as a candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSpace {
    /// The node.
    pub name: NodeName,
    /// Bytes its pool can still promise.
    pub available_bytes: u64,
}

/// What is to be placed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacementRequest {
    /// Replicas wanted, each on a node of its own; at least one.
    pub replicas: u32,
    /// Bytes each replica may grow to.
    pub size_bytes: u64,
    /// Takes one replica if it has the space (where the first pod will run).
    pub prefer: Option<NodeName>,
    /// Nodes that may hold one; empty means all (CSI's requisite topology).
    pub allowed: Vec<NodeName>,
}

/// Why a volume cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// No replicas were asked for.
    #[error("a volume needs at least one replica")]
    NoReplicas,
    /// Too few nodes are known, or allowed.
    #[error("{wanted} replicas need {wanted} nodes, only {nodes} can be used")]
    TooFewNodes {
        /// Replicas wanted.
        wanted: u32,
        /// Nodes that are known and allowed.
        nodes: usize,
    },
    /// Too few of the nodes have the space.
    #[error(
        "{wanted} replicas of {size_bytes} bytes do not fit: {fitting} of {nodes} nodes have the space, the next best \
         is {best} with {best_bytes} bytes"
    )]
    NoSpace {
        /// Replicas wanted.
        wanted: u32,
        /// Bytes each.
        size_bytes: u64,
        /// Nodes with enough space.
        fitting: usize,
        /// Nodes that are known and allowed.
        nodes: usize,
        /// The roomiest node that is still too small.
        best: NodeName,
        /// Its free bytes.
        best_bytes: u64,
    },
}

/// Chooses the nodes; the preferred one first, then by free space, then by name, so that equal input gives equal output.
pub fn place(request: &PlacementRequest, nodes: &[NodeSpace]) -> Result<Vec<NodeName>, PlacementError> {
    if request.replicas == 0 {
        return Err(PlacementError::NoReplicas);
    }
    let wanted = request.replicas as usize;
    let mut usable: Vec<&NodeSpace> =
        nodes.iter().filter(|n| request.allowed.is_empty() || request.allowed.contains(&n.name)).collect();
    usable.sort_by(|a, b| b.available_bytes.cmp(&a.available_bytes).then_with(|| a.name.cmp(&b.name)));
    // A node listed twice must not hold two replicas.
    let mut seen = std::collections::BTreeSet::new();
    usable.retain(|n| seen.insert(&n.name));
    if usable.len() < wanted {
        return Err(PlacementError::TooFewNodes { wanted: request.replicas, nodes: usable.len() });
    }
    let fitting = usable.iter().filter(|n| n.available_bytes >= request.size_bytes).count();
    if fitting < wanted {
        let best = usable[fitting];
        return Err(PlacementError::NoSpace {
            wanted: request.replicas,
            size_bytes: request.size_bytes,
            fitting,
            nodes: usable.len(),
            best: best.name.clone(),
            best_bytes: best.available_bytes,
        });
    }
    usable.truncate(fitting);
    usable.sort_by_key(|n| request.prefer.as_ref() != Some(&n.name));
    Ok(usable.into_iter().take(wanted).map(|n| n.name.clone()).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_nodes(spaces: &[(&str, u64)]) -> Vec<NodeSpace> {
        let mk = |(name, bytes): &(&str, u64)| NodeSpace {
            name: NodeName((*name).to_owned()),
            available_bytes: *bytes,
        };
        spaces.iter().map(mk).collect()
    }

    fn mk_request(replicas: u32, size_bytes: u64) -> PlacementRequest {
        PlacementRequest { replicas, size_bytes, prefer: None, allowed: vec![] }
    }

    fn names(chosen: &[NodeName]) -> Vec<&str> {
        chosen.iter().map(|n| n.0.as_str()).collect()
    }

    #[test]
    fn most_free_space_first_and_names_break_ties() {
        let nodes = mk_nodes(&[("c", 10), ("a", 10), ("b", 30), ("d", 5)]);
        assert_eq!(names(&place(&mk_request(3, 8), &nodes).unwrap()), ["b", "a", "c"]);
    }

    #[test]
    fn the_preferred_node_is_taken_if_it_fits() {
        let nodes = mk_nodes(&[("a", 10), ("b", 30), ("c", 20)]);
        let mut request = mk_request(2, 8);
        request.prefer = Some(NodeName("a".to_owned()));
        assert_eq!(names(&place(&request, &nodes).unwrap()), ["a", "b"]);
        request.size_bytes = 15;
        assert_eq!(names(&place(&request, &nodes).unwrap()), ["b", "c"]);
    }

    #[test]
    fn no_node_holds_two_replicas() {
        let nodes = mk_nodes(&[("a", 10), ("a", 10), ("b", 10)]);
        let error = place(&mk_request(3, 8), &nodes).unwrap_err();
        assert_eq!(error, PlacementError::TooFewNodes { wanted: 3, nodes: 2 });
    }

    #[test]
    fn the_error_names_what_lacks() {
        let nodes = mk_nodes(&[("a", 10), ("b", 7), ("c", 3)]);
        let error = place(&mk_request(2, 8), &nodes).unwrap_err().to_string();
        assert!(error.contains("1 of 3") && error.contains("b with 7"), "{error}");
        assert_eq!(place(&mk_request(0, 8), &nodes), Err(PlacementError::NoReplicas));
    }
}
