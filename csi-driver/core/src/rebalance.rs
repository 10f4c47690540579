//! Which replica moves where so that nodes are filled alike: one at a time, none without a gain.

use std::collections::BTreeSet;

use crate::ids::{NodeName, VolumeId};
use crate::placement::PlacementRules;

/// A whole, in thousandths.
const WHOLE: u128 = 1000;

/// How full a node is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeFill {
    /// The node.
    pub name: NodeName,
    /// Bytes that it may promise.
    pub promisable_bytes: u64,
    /// Bytes that it has promised.
    pub promised_bytes: u64,
    /// The zone it stands in.
    pub zone: Option<String>,
    /// The class of its pool.
    pub pool_class: Option<String>,
}

impl NodeFill {
    /// How much of what it may promise it has promised, in thousandths.
    #[must_use]
    pub fn filled(&self) -> u64 {
        self.filled_with(self.promised_bytes)
    }

    fn filled_with(&self, promised_bytes: u64) -> u64 {
        let filled = u128::from(promised_bytes) * WHOLE / u128::from(self.promisable_bytes.max(1));
        u64::try_from(filled).unwrap_or(u64::MAX)
    }
}

/// A volume that may move a replica.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Placed {
    /// The volume.
    pub volume: VolumeId,
    /// Bytes of each replica.
    pub size_bytes: u64,
    /// The nodes of its replicas.
    pub nodes: BTreeSet<NodeName>,
    /// Where it is attached: that node's replica stays.
    pub attached_to: Option<NodeName>,
    /// What its StorageClass demands.
    pub rules: PlacementRules,
}

/// A replica to be moved.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Move {
    /// Whose.
    pub volume: VolumeId,
    /// From the fullest node.
    pub from: NodeName,
    /// To the emptiest one.
    pub to: NodeName,
}

/// The move that is worth most, if the fullest node is by more than so many thousandths fuller than the emptiest one: of the
/// largest volume that leaves the emptiest node less full than the fullest one was, and stands in as many zones as before.
/// Equal volumes by their ids. As each move makes a fuller node emptier than any was, there is an end of them.
#[must_use]
pub fn rebalance(nodes: &[NodeFill], volumes: &[Placed], above: u64) -> Option<Move> {
    let rank = |node: &&NodeFill| (node.filled(), node.name.clone());
    let (full, empty) = (nodes.iter().max_by_key(rank)?, nodes.iter().min_by_key(rank)?);
    if full.filled().saturating_sub(empty.filled()) <= above {
        return None;
    }
    let zone_of = |name: &NodeName| nodes.iter().find(|node| node.name == *name).map(|node| &node.zone);
    let zones = |names: &BTreeSet<NodeName>| names.iter().map(zone_of).collect::<BTreeSet<_>>().len();
    let gains = |placed: &&Placed| {
        let after = empty.promised_bytes.saturating_add(placed.size_bytes);
        let mut moved = placed.nodes.clone();
        moved.remove(&full.name)
            && moved.insert(empty.name.clone())
            && placed.attached_to.as_ref() != Some(&full.name)
            && placed.rules.admits(empty.pool_class.as_deref())
            && after <= empty.promisable_bytes
            && empty.filled_with(after) < full.filled()
            && zones(&moved) >= zones(&placed.nodes)
    };
    let best = volumes
        .iter()
        .filter(gains)
        .max_by_key(|placed| (placed.size_bytes, std::cmp::Reverse(placed.volume)))?;
    Some(Move { volume: best.volume, from: full.name.clone(), to: empty.name.clone() })
}

#[cfg(test)]
mod tests {
    use rand::rngs::SmallRng;
    use rand::{Rng, SeedableRng};

    use super::*;

    fn mk_node(name: u32, promisable_bytes: u64, zone: Option<u32>) -> NodeFill {
        let zone = zone.map(|zone| format!("z{zone}"));
        NodeFill {
            name: NodeName(format!("n{name}")),
            promisable_bytes,
            promised_bytes: 0,
            zone,
            pool_class: None,
        }
    }

    fn mk_placed(volume: u128, size_bytes: u64, nodes: &[u32]) -> Placed {
        let nodes = nodes.iter().map(|node| NodeName(format!("n{node}"))).collect();
        Placed {
            volume: VolumeId(volume),
            size_bytes,
            nodes,
            attached_to: None,
            rules: PlacementRules::default(),
        }
    }

    fn fill(nodes: &mut [NodeFill], volumes: &[Placed]) {
        for node in nodes {
            let here = volumes.iter().filter(|placed| placed.nodes.contains(&node.name));
            node.promised_bytes = here.map(|placed| placed.size_bytes).sum();
        }
    }

    #[test]
    fn the_largest_volume_that_gains_moves_and_where_it_is_attached_it_stays() {
        let mut nodes: Vec<NodeFill> = (0..3).map(|name| mk_node(name, 100, None)).collect();
        let mut volumes = [mk_placed(1, 30, &[0, 1]), mk_placed(2, 20, &[0, 1]), mk_placed(3, 20, &[0, 1])];
        fill(&mut nodes, &volumes);
        let told = |volumes: &[Placed], above| {
            rebalance(&nodes, volumes, above).map(|m| (m.volume.0, m.from.0, m.to.0))
        };
        let moves = |volume: u128| Some((volume, "n1".to_owned(), "n2".to_owned()));
        assert_eq!(told(&volumes, 699), moves(1));
        assert_eq!(told(&volumes, 700), None, "not by more than that");
        volumes[0].attached_to = Some(NodeName("n1".to_owned()));
        assert_eq!(told(&volumes, 100), moves(2));
        volumes[1].rules.pool_class = Some("fast".to_owned());
        assert_eq!(told(&volumes, 100), moves(3));
    }

    #[test]
    fn a_volume_that_would_only_change_the_fullest_node_s_name_stays() {
        let mut nodes = [mk_node(0, 100, None), mk_node(1, 100, None)];
        let volumes = [mk_placed(1, 60, &[0])];
        fill(&mut nodes, &volumes);
        assert_eq!(rebalance(&nodes, &volumes, 100), None);
    }

    /// Moves are made until there is none: it ends, and no volume has fewer zones or two replicas on a node.
    #[test]
    fn moves_come_to_an_end_and_what_is_fuller_than_allowed_has_nothing_to_move() {
        let mut made = 0;
        for seed in 0..500_u64 {
            let mut random = SmallRng::seed_from_u64(seed);
            let count = random.random_range(2..7_u32);
            let zones = random.random_range(0..4_u32);
            let mut nodes: Vec<NodeFill> = (0..count)
                .map(|name| mk_node(name, random.random_range(200..1000), (zones > 0).then(|| name % zones)))
                .collect();
            let mut volumes: Vec<Placed> = (0..random.random_range(1..30))
                .map(|volume| {
                    let first = random.random_range(0..count);
                    let replicas: Vec<u32> =
                        (0..random.random_range(1..=count)).map(|more| (first + more) % count).collect();
                    mk_placed(volume, random.random_range(1..40), &replicas)
                })
                .collect();
            fill(&mut nodes, &volumes);
            let above = random.random_range(0..300);
            let mut steps = 0;
            while let Some(step) = rebalance(&nodes, &volumes, above) {
                steps += 1;
                assert!(steps < 1000, "seed {seed}: no end");
                let fullest = nodes.iter().map(NodeFill::filled).max();
                let placed = volumes.iter_mut().find(|placed| placed.volume == step.volume).unwrap();
                assert!(
                    placed.nodes.remove(&step.from) && placed.nodes.insert(step.to.clone()),
                    "seed {seed}"
                );
                fill(&mut nodes, &volumes);
                assert!(nodes.iter().map(NodeFill::filled).max() <= fullest, "seed {seed}");
                made += 1;
            }
        }
        assert!(made > 300, "only {made} moves");
    }
}
