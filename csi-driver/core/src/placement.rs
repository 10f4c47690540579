//! Which nodes get a volume's replicas: distinct ones with enough space, in as many zones as there are, most free space first.
//! What a StorageClass demands beyond that is a rule ([`PlacementRules`]): it is kept, or nothing is placed.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::ids::NodeName;
use crate::record::VolumeRecord;
use crate::transitions;

/// A node as a candidate.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeSpace {
    /// The node.
    pub name: NodeName,
    /// Bytes its pool can still promise.
    pub available_bytes: u64,
    /// The zone it stands in; nodes without one count as one zone.
    pub zone: Option<String>,
    /// The class of its pool.
    pub pool_class: Option<String>,
}

/// What a StorageClass demands of the places of a volume's replicas.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlacementRules {
    /// Of their zones.
    #[serde(default)]
    pub zones: ZoneRule,
    /// Of the node where the volume's first pod is going to run.
    #[serde(default)]
    pub local_replica: LocalReplica,
    /// Only pools of this class are used; any, where there is none.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pool_class: Option<String>,
}

/// Whether two replicas may stand in one zone.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ZoneRule {
    /// Where there are too few zones.
    #[default]
    Preferred,
    /// Never.
    Required,
}

/// Whether the node where the first pod is going to run gets a replica when the volume is made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum LocalReplica {
    /// If it can.
    #[default]
    Preferred,
    /// Always.
    Required,
    /// Never.
    None,
}

impl PlacementRules {
    /// Whether nothing is demanded.
    #[must_use]
    pub fn is_default(&self) -> bool {
        *self == Self::default()
    }

    /// Whether a pool of this class may be used.
    #[must_use]
    pub fn admits(&self, pool_class: Option<&str>) -> bool {
        self.pool_class.as_deref().is_none_or(|wanted| pool_class == Some(wanted))
    }
}

/// What is to be placed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct PlacementRequest {
    /// Replicas wanted, each on a node of its own; at least one.
    pub replicas: u32,
    /// Bytes each replica may grow to.
    pub size_bytes: u64,
    /// Where the first pod will run.
    pub prefer: Option<NodeName>,
    /// Nodes that have a replica of the volume: they get no other, and their zones count as used.
    pub kept: Vec<NodeName>,
    /// Nodes that get none for another reason.
    pub excluded: Vec<NodeName>,
    /// Nodes that hold what the volume is to begin as: they come before all others.
    pub holders: BTreeSet<NodeName>,
    /// What the StorageClass demands.
    pub rules: PlacementRules,
}

impl PlacementRequest {
    /// So many further replicas of a volume.
    #[must_use]
    pub fn further(record: &VolumeRecord, replicas: u32) -> Self {
        Self {
            replicas,
            size_bytes: record.size_bytes,
            kept: transitions::nodes_taken(record).into_iter().collect(),
            rules: record.params.placement.clone(),
            ..Self::default()
        }
    }

    fn may_use(&self, node: &NodeSpace) -> bool {
        let is_local = self.prefer.as_ref() == Some(&node.name);
        let local = self.rules.local_replica != LocalReplica::None || !is_local;
        local && self.rules.admits(node.pool_class.as_deref()) && !self.excluded.contains(&node.name)
    }

    /// The node that must get a replica, where there is none yet.
    fn required_node(&self) -> Option<&NodeName> {
        let node = self.prefer.as_ref().filter(|_| self.rules.local_replica == LocalReplica::Required)?;
        (!self.kept.contains(node)).then_some(node)
    }
}

/// Why a volume cannot be placed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// No replicas were asked for.
    #[error("a volume needs at least one replica")]
    NoReplicas,
    /// Too few nodes are known that may be used and have no replica of the volume yet.
    #[error("{wanted} replicas need {wanted} nodes, only {nodes} can be used")]
    TooFewNodes {
        /// Replicas wanted.
        wanted: u32,
        /// Nodes that are known, may be used and have no replica of the volume yet.
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
        /// Nodes that are known, may be used and have no replica of the volume yet.
        nodes: usize,
        /// The roomiest node that is still too small.
        best: NodeName,
        /// Its free bytes.
        best_bytes: u64,
    },
    /// Each replica is to have a zone of its own.
    #[error("zones are required: {wanted} replicas need {wanted} zones without one, and those with room are {}", named(.zones))]
    TooFewZones {
        /// Replicas wanted.
        wanted: u32,
        /// Zones with a node that can be used and no replica of the volume; nodes without a zone are one.
        zones: Vec<Option<String>>,
    },
    /// The node of the first pod is to have a replica.
    #[error(
        "a local replica is required, and node {0} cannot hold one: it does not answer, has not the room, or may not be used"
    )]
    NoLocalReplica(NodeName),
}

fn named(zones: &[Option<String>]) -> String {
    let name =
        |zone: &Option<String>| zone.clone().unwrap_or_else(|| "that of the nodes without one".to_owned());
    if zones.is_empty() { "none".to_owned() } else { zones.iter().map(name).collect::<Vec<_>>().join(", ") }
}

/// Chooses the nodes. One that must have a replica comes first, then those that hold what the volume begins as, then the node
/// of the first pod. Each further replica goes into a zone with as few replicas of the volume as any that has room. Of equals
/// the node with the most free space is taken, then by name, so that equal input gives equal output.
///
/// Zones are spread as far as the nodes allow; that there are fewer zones than replicas is an error only where the rules say so.
///
/// # Errors
/// There are not enough nodes, or not enough with the space, or the rules cannot be kept.
pub fn place(request: &PlacementRequest, nodes: &[NodeSpace]) -> Result<Vec<NodeName>, PlacementError> {
    if request.replicas == 0 {
        return Err(PlacementError::NoReplicas);
    }
    let wanted = request.replicas as usize;
    // A node listed twice must not hold two replicas.
    let mut seen: BTreeSet<&NodeName> = request.kept.iter().collect();
    let mut usable: Vec<&NodeSpace> = nodes.iter().collect();
    usable.sort_by(|a, b| b.available_bytes.cmp(&a.available_bytes).then_with(|| a.name.cmp(&b.name)));
    usable.retain(|node| seen.insert(&node.name) && request.may_use(node));
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
    let in_zone = zones_of_kept(request, nodes);
    if request.rules.zones == ZoneRule::Required {
        usable.retain(|node| !in_zone.contains_key(&node.zone));
        let zones: BTreeSet<&Option<String>> = usable.iter().map(|node| &node.zone).collect();
        if zones.len() < wanted {
            let zones = zones.into_iter().cloned().collect();
            return Err(PlacementError::TooFewZones { wanted: request.replicas, zones });
        }
    }
    if let Some(node) = request.required_node()
        && !usable.iter().any(|usable| usable.name == *node)
    {
        return Err(PlacementError::NoLocalReplica(node.clone()));
    }
    Ok(spread(request, in_zone, usable))
}

/// The size of the largest volume that can be placed now by these rules, bytes, whichever node its first pod is for.
#[must_use]
pub fn largest(rules: &PlacementRules, replicas: u32, nodes: &[NodeSpace]) -> u64 {
    let usable = nodes.iter().filter(|node| rules.admits(node.pool_class.as_deref()));
    let mut free: Vec<u64> = match rules.zones {
        ZoneRule::Preferred => usable.map(|node| node.available_bytes).collect(),
        ZoneRule::Required => {
            let mut zones: BTreeMap<&Option<String>, u64> = BTreeMap::new();
            for node in usable {
                let most = zones.entry(&node.zone).or_default();
                *most = node.available_bytes.max(*most);
            }
            zones.into_values().collect()
        }
    };
    free.sort_unstable_by(|a, b| b.cmp(a));
    free.get((replicas as usize).saturating_sub(1)).copied().unwrap_or(0)
}

/// How many replicas each zone has.
fn zones_of_kept<'a>(
    request: &PlacementRequest,
    nodes: &'a [NodeSpace],
) -> BTreeMap<&'a Option<String>, u32> {
    let mut in_zone: BTreeMap<&Option<String>, u32> = BTreeMap::new();
    for name in &request.kept {
        if let Some(node) = nodes.iter().find(|node| node.name == *name) {
            *in_zone.entry(&node.zone).or_default() += 1;
        }
    }
    in_zone
}

/// Takes the wanted number of nodes out of `fitting`, the roomiest first, which has that many, and zones where they are
/// required.
fn spread<'a>(
    request: &PlacementRequest,
    mut in_zone: BTreeMap<&'a Option<String>, u32>,
    mut fitting: Vec<&'a NodeSpace>,
) -> Vec<NodeName> {
    let mut chosen = Vec::new();
    for _ in 0..request.replicas {
        let rank = |node: &NodeSpace| {
            let required = request.required_node() == Some(&node.name);
            let holds = request.holders.contains(&node.name);
            let preferred = request.prefer.as_ref() == Some(&node.name);
            (!required, !holds, !preferred, in_zone.get(&node.zone).copied().unwrap_or(0))
        };
        // Of equals the first, which is the roomiest.
        let Some(best) = (0..fitting.len()).min_by_key(|at| rank(fitting[*at])) else { break };
        let node = fitting.remove(best);
        if request.rules.zones == ZoneRule::Required {
            fitting.retain(|other| other.zone != node.zone);
        }
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
            pool_class: None,
        };
        spaces.iter().map(mk).collect()
    }

    fn mk_request(replicas: u32, size_bytes: u64) -> PlacementRequest {
        PlacementRequest { replicas, size_bytes, ..PlacementRequest::default() }
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
            pool_class: None,
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

    #[test]
    fn required_zones_are_kept_or_refused_with_the_zones_that_there_are() {
        let nodes = mk_zoned(&[("a", "x", 90), ("b", "x", 80), ("c", "y", 70), ("d", "z", 5), ("e", "z", 4)]);
        let mut request = mk_request(3, 4);
        request.rules.zones = ZoneRule::Required;
        assert_eq!(names(&place(&request, &nodes).unwrap()), ["a", "c", "d"]);
        request.size_bytes = 10;
        let error = place(&request, &nodes).unwrap_err();
        assert_eq!(
            error,
            PlacementError::TooFewZones {
                wanted: 3,
                zones: ["x", "y"].map(|zone| Some(zone.to_owned())).into()
            }
        );
        assert!(error.to_string().contains("x, y"), "{error}");
        // A replica more, and the zones of those that there are count as used.
        let mut more = PlacementRequest { kept: vec![NodeName("a".to_owned())], ..request };
        more.replicas = 1;
        assert_eq!(names(&place(&more, &nodes).unwrap()), ["c"]);
        more.kept.push(NodeName("c".to_owned()));
        assert!(
            matches!(place(&more, &nodes), Err(PlacementError::TooFewZones { zones, .. }) if zones.is_empty())
        );
    }

    #[test]
    fn the_first_pod_s_node_must_may_or_must_not_hold_a_replica() {
        let nodes = mk_nodes(&[("a", 10), ("b", 30), ("c", 20)]);
        let mut request = mk_request(2, 8);
        request.prefer = Some(NodeName("a".to_owned()));
        request.rules.local_replica = LocalReplica::Required;
        assert_eq!(names(&place(&request, &nodes).unwrap()), ["a", "b"]);
        request.size_bytes = 15;
        let node = NodeName("a".to_owned());
        assert_eq!(place(&request, &nodes), Err(PlacementError::NoLocalReplica(node)));
        request.rules.local_replica = LocalReplica::None;
        request.size_bytes = 8;
        assert_eq!(names(&place(&request, &nodes).unwrap()), ["b", "c"]);
        request.replicas = 3;
        assert_eq!(place(&request, &nodes), Err(PlacementError::TooFewNodes { wanted: 3, nodes: 2 }));
    }

    #[test]
    fn only_pools_of_the_class_are_used_and_holders_come_first() {
        let mut nodes = mk_nodes(&[("a", 10), ("b", 30), ("c", 20), ("d", 15)]);
        for node in &mut nodes {
            node.pool_class = (node.name.0 != "b").then(|| "fast".to_owned());
        }
        let mut request = mk_request(2, 8);
        request.rules.pool_class = Some("fast".to_owned());
        assert_eq!(names(&place(&request, &nodes).unwrap()), ["c", "d"]);
        request.holders = ["a", "b"].map(|name| NodeName(name.to_owned())).into();
        assert_eq!(names(&place(&request, &nodes).unwrap()), ["a", "c"]);
        request.rules.pool_class = Some("slow".to_owned());
        assert_eq!(place(&request, &nodes), Err(PlacementError::TooFewNodes { wanted: 2, nodes: 0 }));
        request.rules.pool_class = None;
        assert_eq!(names(&place(&request, &nodes).unwrap()), ["b", "a"]);
        request.excluded = vec![NodeName("b".to_owned())];
        assert_eq!(names(&place(&request, &nodes).unwrap()), ["a", "c"]);
    }

    /// Against all choices that there are, on small clusters.
    #[test]
    fn what_can_be_placed_is_and_no_choice_by_the_rules_is_better() {
        let (mut placed, mut refused) = (0, 0);
        for seed in 0..6000_u64 {
            let mut random = SmallRng::seed_from_u64(seed);
            let (request, nodes) = mk_random(&mut random);
            let allowed: Vec<Choice> = choices(&request, &nodes);
            let Ok(chosen) = place(&request, &nodes) else {
                assert!(allowed.is_empty(), "seed {seed}: refused, and {:?} can be", allowed[0]);
                refused += 1;
                continue;
            };
            placed += 1;
            let set: BTreeSet<NodeName> = chosen.iter().cloned().collect();
            assert_eq!(set.len(), chosen.len(), "seed {seed}: {chosen:?} names one twice");
            let Some(ours) = allowed.iter().find(|choice| choice.nodes == set) else {
                panic!("seed {seed}: {chosen:?} is against the rules")
            };
            let best = allowed.iter().map(|choice| choice.rank).min();
            assert_eq!(Some(ours.rank), best, "seed {seed}: {chosen:?} is not the best choice");
            // What is as good and differs in one node of the same zone is not roomier.
            for other in allowed.iter().filter(|other| other.rank == ours.rank) {
                let only = |a: &BTreeSet<NodeName>, b: &BTreeSet<NodeName>| {
                    let left: Vec<NodeName> = a.difference(b).cloned().collect();
                    if let [one] = &left[..] { nodes.iter().find(|n| n.name == *one) } else { None }
                };
                if let (Some(taken), Some(left)) =
                    (only(&ours.nodes, &other.nodes), only(&other.nodes, &ours.nodes))
                    && taken.zone == left.zone
                    && request.holders.contains(&taken.name) == request.holders.contains(&left.name)
                {
                    assert!(
                        left.available_bytes <= taken.available_bytes,
                        "seed {seed}: {left:?} is roomier"
                    );
                }
            }
        }
        assert!(placed > 1500 && refused > 1500, "{placed} could be placed, {refused} could not");
    }

    #[test]
    fn the_largest_volume_can_be_placed_and_none_that_is_larger() {
        for seed in 0..2000_u64 {
            let mut random = SmallRng::seed_from_u64(seed);
            let (request, nodes) = mk_random(&mut random);
            let rules = PlacementRules { local_replica: LocalReplica::Preferred, ..request.rules };
            let size_bytes = largest(&rules, request.replicas, &nodes);
            let mut request = PlacementRequest { rules, size_bytes, ..mk_request(request.replicas, 0) };
            if size_bytes > 0 {
                assert!(place(&request, &nodes).is_ok(), "seed {seed}: {size_bytes} bytes");
            }
            request.size_bytes += 1;
            assert!(place(&request, &nodes).is_err(), "seed {seed}: more than {size_bytes} bytes");
        }
    }

    /// A set of nodes that the rules allow.
    #[derive(Debug)]
    struct Choice {
        nodes: BTreeSet<NodeName>,
        /// Smaller is better: nodes that do not hold the source, the preferred one left out, how uneven the zones are (the
        /// sum of the squares of their replicas).
        rank: (usize, bool, usize),
    }

    fn choices(request: &PlacementRequest, nodes: &[NodeSpace]) -> Vec<Choice> {
        let kept: Vec<&NodeSpace> = nodes.iter().filter(|n| request.kept.contains(&n.name)).collect();
        let free: Vec<&NodeSpace> = nodes
            .iter()
            .filter(|n| !request.kept.contains(&n.name) && n.available_bytes >= request.size_bytes)
            .collect();
        let sets = (0..1_u32 << free.len()).filter(|set| set.count_ones() == request.replicas);
        let mut allowed = Vec::new();
        for set in sets {
            let taken: Vec<&NodeSpace> =
                free.iter().enumerate().filter(|(at, _)| set >> at & 1 == 1).map(|(_, node)| *node).collect();
            if !is_allowed(request, &kept, &taken) {
                continue;
            }
            let mut zones: BTreeMap<&Option<String>, usize> = BTreeMap::new();
            kept.iter().chain(&taken).for_each(|node| *zones.entry(&node.zone).or_default() += 1);
            let holders = taken.iter().filter(|n| request.holders.contains(&n.name)).count();
            let preferred = taken.iter().any(|n| request.prefer.as_ref() == Some(&n.name));
            let unevenness = zones.values().map(|count| count * count).sum();
            allowed.push(Choice {
                nodes: taken.iter().map(|node| node.name.clone()).collect(),
                rank: (taken.len() - holders, !preferred, unevenness),
            });
        }
        allowed
    }

    fn is_allowed(request: &PlacementRequest, kept: &[&NodeSpace], taken: &[&NodeSpace]) -> bool {
        let rules = &request.rules;
        let local = |node: &NodeSpace| request.prefer.as_ref() == Some(&node.name);
        let class = |node: &NodeSpace| rules.pool_class.is_none() || node.pool_class == rules.pool_class;
        let zones: BTreeSet<&Option<String>> = taken.iter().map(|node| &node.zone).collect();
        let own_zones = zones.len() == taken.len() && kept.iter().all(|node| !zones.contains(&node.zone));
        let locality = match rules.local_replica {
            LocalReplica::Preferred => true,
            LocalReplica::Required => {
                request.prefer.is_none() || kept.iter().chain(taken).any(|node| local(node))
            }
            LocalReplica::None => !taken.iter().any(|node| local(node)),
        };
        locality
            && taken.iter().all(|node| class(node) && !request.excluded.contains(&node.name))
            && (rules.zones == ZoneRule::Preferred || own_zones)
    }

    fn mk_random(random: &mut SmallRng) -> (PlacementRequest, Vec<NodeSpace>) {
        let classes = [None, Some("fast".to_owned()), Some("slow".to_owned())];
        let nodes: Vec<NodeSpace> = (0..random.random_range(1..8))
            .map(|number| NodeSpace {
                name: NodeName(format!("n{number}")),
                available_bytes: random.random_range(0..6),
                zone: Some(random.random_range(0..4_u32))
                    .filter(|zone| *zone > 0)
                    .map(|zone| format!("z{zone}")),
                pool_class: classes[random.random_range(0..10_usize).min(2)].clone(),
            })
            .collect();
        let some = |random: &mut SmallRng, most: u32| -> BTreeSet<NodeName> {
            let name = |random: &mut SmallRng| nodes[random.random_range(0..nodes.len())].name.clone();
            (0..random.random_range(0..=most)).map(|_| name(random)).collect()
        };
        let locality = [LocalReplica::Preferred, LocalReplica::Required, LocalReplica::None];
        let request = PlacementRequest {
            replicas: random.random_range(1..5),
            size_bytes: random.random_range(0..3),
            prefer: some(random, 1).into_iter().next(),
            kept: some(random, 2).into_iter().collect(),
            excluded: some(random, 1).into_iter().collect(),
            holders: some(random, 3),
            rules: PlacementRules {
                zones: if random.random() { ZoneRule::Preferred } else { ZoneRule::Required },
                local_replica: locality[random.random_range(0..3_usize)],
                pool_class: classes[random.random_range(0..6_usize).saturating_sub(4) * 2].clone(),
            },
        };
        (request, nodes)
    }
}
