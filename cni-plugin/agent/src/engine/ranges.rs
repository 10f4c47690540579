//! Blocks of the cluster range: which node has which, and what this node lacks.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_net_core::objects::Node;
use holdfast_net_core::pod_ranges::{self, PodRange, PodRangeSpec, Proposal, object_name};
use ipnetwork::IpNetwork;
use tracing::info;

use super::Engine;
use crate::claims::Swapped;

/// Blocks that others took first, before this pass gives up; the next one goes on with what it learnt.
const TRIES_MAX: usize = 64;

impl Engine {
    /// A Node, with the blocks that it has claimed.
    ///
    /// Kubelets write their Nodes every few minutes, mostly what nobody here reads: that is no reason to plan anew.
    pub(super) fn take_in_node(&mut self, name: &str, node: Option<&Node>) {
        let now = node.map(|node| Node { claimed: self.claimed_by(name), ..node.clone() });
        if self.nodes.get(name) == now.as_ref() {
            return;
        }
        self.nodes_changed = true;
        match now {
            Some(node) => _ = self.nodes.insert(name.to_owned(), node),
            None => drop(self.nodes.remove(name)),
        }
    }

    /// A claim, or its end.
    pub(super) fn take_in_range(&mut self, name: &str, range: Option<&PodRange>) {
        self.nodes_changed = true;
        let before = match range {
            Some(range) => self.pod_ranges.insert(name.to_owned(), range.spec.clone()),
            None => self.pod_ranges.remove(name),
        };
        let owners =
            before.map(|spec| spec.node).into_iter().chain(range.map(|range| range.spec.node.clone()));
        for owner in owners.collect::<Vec<_>>() {
            let claimed = self.claimed_by(&owner);
            if let Some(node) = self.nodes.get_mut(&owner) {
                node.claimed = claimed;
            }
        }
    }

    /// In one order on all nodes, IPv4 first.
    fn claimed_by(&self, node: &str) -> Vec<IpNetwork> {
        let of_node = |spec: &&PodRangeSpec| spec.node == node;
        let claimed: BTreeSet<IpNetwork> =
            self.pod_ranges.values().filter(of_node).map(|spec| spec.range).collect();
        claimed.into_iter().collect()
    }

    /// Claims what this node lacks, if its object names no range. No address of a block is used before its claim is on stable
    /// storage.
    pub(super) async fn claim_ranges(&mut self) -> Result<(), String> {
        let name = self.settings.node.clone();
        let needs = self.nodes.get(&name).is_some_and(|node| node.given_cidrs().is_empty());
        if self.settings.cluster_ranges.is_empty() || !needs {
            return Ok(());
        }
        for _ in 0..TRIES_MAX {
            let Some(proposal) = self.proposal(&name)? else { return Ok(()) };
            let swapped = self.claims.swap(&proposal, &name).await;
            let swapped =
                swapped.map_err(|error| format!("cannot claim {} for this node: {error}", proposal.range))?;
            // The source of objects tells the same soon; until then this is what is known of the block.
            let owner = match swapped {
                Swapped::Done => {
                    info!(range = %proposal.range, from = ?proposal.from, "a block of the cluster range is claimed");
                    Some(name.clone())
                }
                Swapped::Is(owner) => owner,
            };
            let known = owner.map(|owner| PodRange::new(proposal.range, &owner));
            self.take_in_range(&object_name(&proposal.range), known.as_ref());
            self.nodes_changed = false;
        }
        Err("other nodes took every block that this one tried to claim; it goes on".to_owned())
    }

    fn proposal(&self, name: &str) -> Result<Option<Proposal>, String> {
        let claims: BTreeMap<IpNetwork, String> =
            self.pod_ranges.values().map(|spec| (spec.range, spec.node.clone())).collect();
        let nodes: BTreeSet<&str> = self.nodes.keys().map(String::as_str).collect();
        let reserved: Vec<IpNetwork> = self.nodes.values().flat_map(Node::given_cidrs).collect();
        let proposals = pod_ranges::propose(&self.settings.cluster_ranges, &claims, &nodes, &reserved, name);
        Ok(proposals.map_err(|error| error.to_string())?.into_iter().next())
    }
}
