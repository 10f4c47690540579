//! Ranges for nodes that have no `spec.podCIDR`: blocks of a cluster range, claimed by the nodes themselves.
//!
//! **Promise**: a block belongs to one node at a time. Who could break it: two agents that choose the same free block at the same
//! moment; an agent whose list is old; an agent that was killed between choosing and writing; the store of a node that is
//! believed gone. So a choice here is only a proposal. It counts once the block's object, whose name is made from the block, has been
//! swapped in by comparison with the owner that the proposal was made from; a node uses no address of a block before, and finds its
//! block again by its own name after a restart.
//!
//! A block is taken from another node only if none is free and that node has no Node object any more.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};

use crate::ipam::overlap;
use crate::objects::Meta;
use crate::plan::stable_hash;

/// A cluster range is cut into 2 to the power of this many blocks at most.
const BLOCK_BITS_MAX: u8 = 16;

/// The object of a block: kind `PodRange` of `network.holdfast.dev/v1alpha1`, cluster-scoped, called [`object_name`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRange {
    /// Its name.
    pub metadata: Meta,
    /// The claim.
    pub spec: PodRangeSpec,
}

/// `spec` of a PodRange.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PodRangeSpec {
    /// The block.
    pub range: IpNetwork,
    /// The node whose pods get its addresses.
    pub node: String,
}

impl PodRange {
    /// The claim of a node.
    #[must_use]
    pub fn new(range: IpNetwork, node: &str) -> Self {
        let metadata = Meta { name: object_name(&range), ..Meta::default() };
        Self { metadata, spec: PodRangeSpec { range, node: node.to_owned() } }
    }

    /// Whether name and block belong together; without that, two objects could claim one block.
    ///
    /// # Errors
    /// A sentence that says what does not fit.
    pub fn validate(&self) -> Result<(), String> {
        let range = self.spec.range;
        if range.ip() != range.network() {
            return Err(format!("spec.range {range} has bits behind its prefix length"));
        }
        if self.spec.node.is_empty() {
            return Err("spec.node is empty".to_owned());
        }
        let name = object_name(&range);
        if self.metadata.name != name {
            return Err(format!("the PodRange of {range} must be called {name}"));
        }
        Ok(())
    }
}

/// The name of a block's object: the address in hexadecimal digits, and the prefix length.
#[must_use]
pub fn object_name(range: &IpNetwork) -> String {
    match range {
        IpNetwork::V4(range) => format!("{:08x}-{}", range.network().to_bits(), range.prefix()),
        IpNetwork::V6(range) => format!("{:032x}-{}", range.network().to_bits(), range.prefix()),
    }
}

/// A range of the cluster with the size of its blocks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ClusterRange {
    range: IpNetwork,
    prefix: u8,
}

impl ClusterRange {
    /// `range` in blocks with `prefix` bits.
    ///
    /// # Errors
    /// A sentence: the block is larger than the range, leaves no address for pods, or there are too many of them.
    pub fn new(range: IpNetwork, prefix: u8) -> Result<Self, String> {
        let width = if range.is_ipv4() { 32 } else { 128 };
        if range.ip() != range.network() {
            return Err(format!("the cluster range {range} has bits behind its prefix length"));
        }
        if prefix < range.prefix() || prefix > width - 2 {
            return Err(format!("the cluster range {range} cannot be cut into blocks of /{prefix}"));
        }
        if prefix - range.prefix() > BLOCK_BITS_MAX {
            return Err(format!(
                "the cluster range {range} has more than 65,536 blocks of /{prefix}; choose larger blocks"
            ));
        }
        Ok(Self { range, prefix })
    }

    fn count(&self) -> u32 {
        1 << (self.prefix - self.range.prefix())
    }

    fn nth(&self, index: u32) -> Option<IpNetwork> {
        let address = match self.range {
            IpNetwork::V4(range) => {
                let offset = u64::from(index) << (32 - u32::from(self.prefix));
                IpAddr::V4(Ipv4Addr::from_bits(range.network().to_bits() | u32::try_from(offset).ok()?))
            }
            IpNetwork::V6(range) => {
                let offset = u128::from(index) << (128 - u32::from(self.prefix));
                IpAddr::V6(Ipv6Addr::from_bits(range.network().to_bits() | offset))
            }
        };
        IpNetwork::new(address, self.prefix).ok()
    }
}

impl std::fmt::Display for ClusterRange {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} in blocks of /{}", self.range, self.prefix)
    }
}

/// What a node should swap in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proposal {
    /// The block.
    pub range: IpNetwork,
    /// Who must have it when the swap is made: nobody, or a node that is gone.
    pub from: Option<String>,
}

/// No block can be proposed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "the cluster range {0} has no block left: each one is claimed by a node, or overlaps a node's podCIDR; add a range"
)]
pub struct NoBlock(String);

/// The blocks that `node` lacks: one of each cluster range of which it has none.
///
/// `claims` are the known claims, `nodes` the names of all Node objects, `reserved` the ranges that nodes have by `spec.podCIDR`. Each node
/// begins to look at a place of its own, so that a cluster that starts at once rarely proposes one block twice.
///
/// # Errors
/// A range is used up; nothing is proposed then.
pub fn propose(
    cluster: &[ClusterRange],
    claims: &BTreeMap<IpNetwork, String>,
    nodes: &BTreeSet<&str>,
    reserved: &[IpNetwork],
    node: &str,
) -> Result<Vec<Proposal>, NoBlock> {
    let mut proposals = Vec::new();
    for of in cluster {
        let has_one = claims.iter().any(|(range, owner)| owner == node && overlap(range, &of.range));
        if has_one {
            continue;
        }
        let inside = |ranges: &mut dyn Iterator<Item = IpNetwork>| -> Vec<IpNetwork> {
            ranges.filter(|range| overlap(range, &of.range)).collect()
        };
        let taken = inside(&mut claims.keys().chain(reserved).copied());
        let count = of.count();
        let begin = u32::try_from(stable_hash(&["pod-range", node]) % u64::from(count)).unwrap_or(0);
        let mut blocks = (0..count).filter_map(|step| of.nth((begin + step) % count));
        let free = blocks.find(|block| !taken.iter().any(|other| overlap(other, block)));
        let proposal = match free {
            Some(range) => Proposal { range, from: None },
            None => abandoned(of, claims, nodes, reserved).ok_or_else(|| NoBlock(of.to_string()))?,
        };
        proposals.push(proposal);
    }
    Ok(proposals)
}

/// The first block whose node is gone.
fn abandoned(
    of: &ClusterRange,
    claims: &BTreeMap<IpNetwork, String>,
    nodes: &BTreeSet<&str>,
    reserved: &[IpNetwork],
) -> Option<Proposal> {
    let (range, owner) = claims.iter().find(|(range, owner)| {
        range.prefix() == of.prefix
            && overlap(range, &of.range)
            && !nodes.contains(owner.as_str())
            && !reserved.iter().any(|other| overlap(other, range))
    })?;
    Some(Proposal { range: *range, from: Some(owner.clone()) })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn range(text: &str) -> IpNetwork {
        text.parse().unwrap()
    }

    fn cluster(text: &str, prefix: u8) -> ClusterRange {
        ClusterRange::new(range(text), prefix).unwrap()
    }

    #[test]
    fn each_node_gets_a_block_of_each_range_until_none_is_left() {
        let cluster = [cluster("10.42.0.0/22", 24), cluster("fd00:42::/62", 64)];
        let mut claims = BTreeMap::new();
        let names = ["a", "b", "c", "d"];
        let nodes = BTreeSet::from(names);
        for name in names {
            let proposals = propose(&cluster, &claims, &nodes, &[], name).unwrap();
            assert_eq!(proposals.len(), 2, "{name}");
            for proposal in proposals {
                assert_eq!(proposal.from, None);
                assert_eq!(claims.insert(proposal.range, name.to_owned()), None, "{}", proposal.range);
            }
            assert_eq!(propose(&cluster, &claims, &nodes, &[], name), Ok(Vec::new()), "it has both");
        }
        assert_eq!(claims.len(), 8);
        let error = propose(&cluster, &claims, &nodes, &[], "e").unwrap_err().to_string();
        assert!(error.contains("10.42.0.0/22 in blocks of /24 has no block left"), "{error}");
    }

    #[test]
    fn a_block_is_taken_from_a_node_only_if_that_is_gone_and_none_is_free() {
        let cluster = [cluster("10.42.0.0/23", 24)];
        let mut claims = BTreeMap::from([(range("10.42.0.0/24"), "gone".to_owned())]);
        let nodes = BTreeSet::from(["a", "b"]);
        let proposal = |claims: &BTreeMap<IpNetwork, String>, nodes: &BTreeSet<&str>| {
            propose(&cluster, claims, nodes, &[], "b").map(|all| all[0].clone())
        };
        assert_eq!(proposal(&claims, &nodes).unwrap().range, range("10.42.1.0/24"), "the free one first");
        claims.insert(range("10.42.1.0/24"), "a".to_owned());
        let wanted = Proposal { range: range("10.42.0.0/24"), from: Some("gone".to_owned()) };
        assert_eq!(proposal(&claims, &nodes), Ok(wanted));
        let nodes = BTreeSet::from(["a", "b", "gone"]);
        assert!(proposal(&claims, &nodes).is_err(), "its node is there");
    }

    #[test]
    fn what_a_node_has_by_its_pod_cidr_is_not_proposed_nor_a_block_that_overlaps_a_claim_of_another_size() {
        let cluster = [cluster("10.42.0.0/22", 24)];
        let claims = BTreeMap::from([(range("10.42.0.0/23"), "old".to_owned())]);
        let nodes = BTreeSet::from(["a", "old"]);
        let proposals = propose(&cluster, &claims, &nodes, &[range("10.42.2.0/25")], "a").unwrap();
        assert_eq!(proposals, [Proposal { range: range("10.42.3.0/24"), from: None }]);
    }

    #[test]
    fn ranges_that_make_no_sense_are_refused() {
        for (text, prefix) in
            [("10.42.0.1/16", 24), ("10.42.0.0/16", 15), ("10.42.0.0/16", 31), ("fd00::/32", 64)]
        {
            assert!(ClusterRange::new(range(text), prefix).is_err(), "{text} {prefix}");
        }
    }

    #[test]
    fn a_name_belongs_to_one_block() {
        assert_eq!(object_name(&range("10.42.3.0/24")), "0a2a0300-24");
        let mut object = PodRange::new(range("fd00:42:0:1::/64"), "a");
        assert_eq!(object.metadata.name, "fd000042000000010000000000000000-64");
        assert_eq!(object.validate(), Ok(()));
        object.metadata.name = "another".to_owned();
        assert!(object.validate().is_err());
    }
}
