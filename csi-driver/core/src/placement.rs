//! Which nodes get a volume's replicas: distinct ones with enough space, in as many zones as there are, most free space first.

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::NodeName;

/// A node as a candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSpace {
    /// The node.
    pub name: NodeName,
    /// Bytes its pool can still promise.
    pub available_bytes: u64,
    /// The zone it stands in; nodes without one count as one zone.
    pub zone: Option<String>,
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
    /// Nodes that have a replica of the volume: they get no other, and their zones count as used.
    pub kept: Vec<NodeName>,
}

/// Why a volume cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// No replicas were asked for.
    #[error("a volume needs at least one replica")]
    NoReplicas,
    /// Too few nodes are known that have no replica of the volume yet.
    #[error("{wanted} replicas need {wanted} nodes, only {nodes} can be used")]
    TooFewNodes {
        /// Replicas wanted.
        wanted: u32,
        /// Nodes that are known and have no replica of the volume yet.
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
        /// Nodes that are known and have no replica of the volume yet.
        nodes: usize,
        /// The roomiest node that is still too small.
        best: NodeName,
        /// Its free bytes.
        best_bytes: u64,
    },
}

/// Chooses the nodes. The preferred one comes first. Each further replica goes into a zone with as few replicas of the volume
/// as any that has room, there to the node with the most free space, then by name, so that equal input gives equal output.
///
/// Zones are spread as far as the nodes allow; that there are fewer zones than replicas is no error.
///
/// # Errors
/// There are not enough nodes, or not enough with the space.
pub fn place(request: &PlacementRequest, nodes: &[NodeSpace]) -> Result<Vec<NodeName>, PlacementError> {
    if request.replicas == 0 {
        return Err(PlacementError::NoReplicas);
    }
    let wanted = request.replicas as usize;
    // A node listed twice must not hold two replicas.
    let mut seen: BTreeSet<&NodeName> = request.kept.iter().collect();
    let mut usable: Vec<&NodeSpace> = nodes.iter().collect();
    usable.sort_by(|a, b| b.available_bytes.cmp(&a.available_bytes).then_with(|| a.name.cmp(&b.name)));
    usable.retain(|node| seen.insert(&node.name));
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
    Ok(spread(request, nodes, usable))
}

/// Takes the wanted number of nodes out of `fitting`, the roomiest first, which has that many.
fn spread(request: &PlacementRequest, all: &[NodeSpace], mut fitting: Vec<&NodeSpace>) -> Vec<NodeName> {
    let mut in_zone: BTreeMap<&Option<String>, u32> = BTreeMap::new();
    for name in &request.kept {
        if let Some(node) = all.iter().find(|node| node.name == *name) {
            *in_zone.entry(&node.zone).or_default() += 1;
        }
    }
    let mut chosen = Vec::new();
    for _ in 0..request.replicas {
        let rank = |node: &NodeSpace| {
            let preferred = request.prefer.as_ref() == Some(&node.name);
            (!preferred, in_zone.get(&node.zone).copied().unwrap_or(0))
        };
        // Of equals the first, which is the roomiest.
        let Some(best) = (0..fitting.len()).min_by_key(|at| rank(fitting[*at])) else { break };
        let node = fitting.remove(best);
        *in_zone.entry(&node.zone).or_default() += 1;
        chosen.push(node.name.clone());
    }
    chosen
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn mk_nodes(spaces: &[(&str, u64)]) -> Vec<NodeSpace> {
        let mk = |(name, bytes): &(&str, u64)| NodeSpace {
            name: NodeName((*name).to_owned()),
            available_bytes: *bytes,
            zone: None,
        };
        spaces.iter().map(mk).collect()
    }

    fn mk_request(replicas: u32, size_bytes: u64) -> PlacementRequest {
        PlacementRequest { replicas, size_bytes, prefer: None, kept: vec![] }
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

    fn mk_zoned(spaces: &[(&str, &str, u64)]) -> Vec<NodeSpace> {
        let mk = |(name, zone, bytes): &(&str, &str, u64)| NodeSpace {
            name: NodeName((*name).to_owned()),
            available_bytes: *bytes,
            zone: Some((*zone).to_owned()),
        };
        spaces.iter().map(mk).collect()
    }

    #[test]
    fn every_zone_gets_one_before_any_gets_a_second() {
        let nodes =
            mk_zoned(&[("a", "x", 90), ("b", "x", 80), ("c", "x", 70), ("d", "y", 20), ("e", "z", 10)]);
        assert_eq!(names(&place(&mk_request(3, 8), &nodes).unwrap()), ["a", "d", "e"]);
        assert_eq!(names(&place(&mk_request(4, 8), &nodes).unwrap()), ["a", "d", "e", "b"]);
        assert_eq!(names(&place(&mk_request(3, 15), &nodes).unwrap()), ["a", "d", "b"], "e has no room");
    }

    #[test]
    fn a_replica_that_is_replaced_goes_where_no_other_one_is() {
        let nodes =
            mk_zoned(&[("a", "x", 90), ("b", "x", 80), ("c", "y", 70), ("d", "y", 60), ("e", "z", 9)]);
        let mut request = mk_request(1, 8);
        request.kept = vec![NodeName("a".to_owned()), NodeName("c".to_owned())];
        assert_eq!(names(&place(&request, &nodes).unwrap()), ["e"]);
        request.size_bytes = 10;
        assert_eq!(names(&place(&request, &nodes).unwrap()), ["b"], "z has no room: any zone will do");
        request.replicas = 4;
        let error = place(&request, &nodes).unwrap_err();
        assert_eq!(error, PlacementError::TooFewNodes { wanted: 4, nodes: 3 });
    }

    /// Against all choices that there are, on small clusters.
    #[test]
    fn no_choice_is_spread_better_and_none_as_good_has_roomier_nodes_zone_by_zone() {
        let mut placed = 0;
        for seed in 0..4000_u64 {
            let mut random = SmallRng::seed_from_u64(seed);
            let (request, nodes) = mk_random(&mut random);
            let fits = |n: &&NodeSpace| n.available_bytes >= request.size_bytes;
            let free: Vec<&NodeSpace> =
                nodes.iter().filter(|n| !request.kept.contains(&n.name)).filter(fits).collect();
            let Ok(chosen) = place(&request, &nodes) else {
                assert!(free.len() < request.replicas as usize, "seed {seed}: refused without a reason");
                continue;
            };
            placed += 1;
            let mask: Vec<bool> = free.iter().map(|n| chosen.contains(&n.name)).collect();
            let count = mask.iter().filter(|taken| **taken).count();
            assert_eq!((chosen.len(), count), (request.replicas as usize, chosen.len()), "seed {seed}");
            let preferred = free.iter().position(|n| request.prefer.as_ref() == Some(&n.name));
            if let Some(at) = preferred {
                assert!(mask[at] && chosen[0] == free[at].name, "seed {seed}: not the preferred one first");
            }
            let unevenness = unevenness(&request, &nodes, &free, &mask);
            for choice in 0..1_u32 << free.len() {
                let other: Vec<bool> = (0..free.len()).map(|at| choice >> at & 1 == 1).collect();
                let same_size = choice.count_ones() == request.replicas;
                if same_size && preferred.is_none_or(|at| other[at]) {
                    let better = self::unevenness(&request, &nodes, &free, &other);
                    assert!(better >= unevenness, "seed {seed}: {chosen:?}, and {other:?} is spread better");
                }
            }
            for (taken, left) in pairs(&mask) {
                let roomier = free[left].available_bytes > free[taken].available_bytes;
                let swap = free[left].zone == free[taken].zone && preferred != Some(taken);
                assert!(!(roomier && swap), "seed {seed}: {} is roomier", free[left].name);
            }
        }
        assert!(placed > 1000, "only {placed} could be placed");
    }

    /// Sum of the squares of the zones' replicas: smallest where they are spread best.
    fn unevenness(
        request: &PlacementRequest,
        nodes: &[NodeSpace],
        free: &[&NodeSpace],
        mask: &[bool],
    ) -> usize {
        let kept = nodes.iter().filter(|n| request.kept.contains(&n.name));
        let taken = free.iter().zip(mask).filter(|(_, taken)| **taken).map(|(node, _)| *node);
        let mut zones: BTreeMap<&Option<String>, usize> = BTreeMap::new();
        kept.chain(taken).for_each(|node| *zones.entry(&node.zone).or_default() += 1);
        zones.values().map(|count| count * count).sum()
    }

    fn pairs(mask: &[bool]) -> Vec<(usize, usize)> {
        let of = |wanted: bool| (0..mask.len()).filter(move |at| mask[*at] == wanted);
        of(true).flat_map(|taken| of(false).map(move |left| (taken, left))).collect()
    }

    fn mk_random(random: &mut SmallRng) -> (PlacementRequest, Vec<NodeSpace>) {
        let nodes: Vec<NodeSpace> = (0..random.random_range(1..8))
            .map(|number| NodeSpace {
                name: NodeName(format!("n{number}")),
                available_bytes: random.random_range(0..6),
                zone: Some(random.random_range(0..4_u32))
                    .filter(|zone| *zone > 0)
                    .map(|zone| format!("z{zone}")),
            })
            .collect();
        let some = |random: &mut SmallRng| nodes[random.random_range(0..nodes.len())].name.clone();
        let kept: BTreeSet<NodeName> = (0..random.random_range(0..3_u32)).map(|_| some(random)).collect();
        let request = PlacementRequest {
            replicas: random.random_range(1..5),
            size_bytes: random.random_range(0..3),
            prefer: (random.random_range(0..2_u32) == 0).then(|| some(random)),
            kept: kept.into_iter().collect(),
        };
        (request, nodes)
    }
}
