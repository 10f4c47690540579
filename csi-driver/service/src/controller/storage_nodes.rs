//! What operators decide about nodes, and what is told of them.
//!
//! A decision is durable before it is answered, and is all that a call does: the sweep acts on it, as often as it takes, also
//! after a restart of the controller. So a call may be repeated, and a drain survives whoever asked for it.

use std::collections::BTreeMap;
use std::sync::PoisonError;

use holdfast_proto::storage::{
    ListStorageNodesReply, NodeState as WireState, SetNodeStateReply, SetNodeStateRequest, StorageNode,
    StuckVolume,
};
use holdfast_storage_core::ids::NodeName;
use holdfast_storage_core::node_directory::NodeState;
use tonic::Status;

use super::Inner;
use crate::status::from_store;

/// Volumes whose replicas do not leave a node, as many as are told of each node.
const STUCK_MAX: usize = 100;

impl Inner {
    pub(super) async fn set_node_state(
        &self,
        request: SetNodeStateRequest,
    ) -> Result<SetNodeStateReply, Status> {
        let wanted = request.state();
        let node = self.known_node(&request.node).await?;
        let state = match wanted {
            WireState::Unspecified => return Err(Status::invalid_argument("state is missing or unknown")),
            WireState::Active => NodeState::Active,
            WireState::Draining => NodeState::Draining,
            WireState::Removed => NodeState::Removed,
        };
        if state == NodeState::Removed && self.alive_nodes().is_none_or(|alive| alive.contains(&node)) {
            return Err(Status::failed_precondition(format!(
                "node {node} answers, or did until a moment ago: drain it, or stop its data process and repeat the call 10 s later"
            )));
        }
        self.node_states.set_node_state(node.clone(), state).await.map_err(from_store)?;
        tracing::info!(%node, ?state, "an operator decided about a node");
        self.book.set_state(node, state);
        self.sweep_soon.notify_one();
        Ok(SetNodeStateReply {})
    }

    /// A name that is misspelled shall not wait for ever to be drained.
    async fn known_node(&self, name: &str) -> Result<NodeName, Status> {
        let node = NodeName(name.to_owned());
        if name.is_empty() {
            return Err(Status::invalid_argument("node is missing"));
        }
        if self.book.get(&node).is_some() || self.is_leaving(&node) {
            return Ok(node);
        }
        let records = self.all_records().await?;
        if records.iter().flat_map(|record| record.replicas.values()).any(|replica| replica.node == node) {
            return Ok(node);
        }
        let shown: String = name.chars().take(64).collect();
        Err(Status::not_found(format!(
            "node: \"{shown}\" has not announced itself since this controller started, and no volume has a replica on it"
        )))
    }

    pub(super) async fn list_storage_nodes(&self) -> Result<ListStorageNodesReply, Status> {
        let records = self.all_records().await?;
        let unhealed = self.unhealed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let alive: Vec<NodeName> = self.book.alive().into_iter().map(|info| info.name).collect();
        let mut nodes: BTreeMap<NodeName, StorageNode> = BTreeMap::new();
        for info in self.book.all() {
            let node = nodes.entry(info.name).or_default();
            node.zone = info.zone.unwrap_or_default();
            (node.capacity_bytes, node.available_bytes) = (info.capacity_bytes, info.available_bytes);
        }
        for node in self.book.decided() {
            nodes.entry(node).or_default();
        }
        for record in &records {
            for (id, replica) in &record.replicas {
                let leaving = self.is_leaving(&replica.node);
                let node = nodes.entry(replica.node.clone()).or_default();
                node.replicas += 1;
                node.in_sync += u32::from(record.in_sync.contains(id));
                if let Some(reason) = unhealed.get(&record.volume_id).filter(|_| leaving)
                    && node.stuck.len() < STUCK_MAX
                {
                    node.stuck.push(StuckVolume {
                        volume_id: record.volume_id.to_string(),
                        reason: reason.clone(),
                    });
                }
            }
            if let Some(node) = &record.attached_to {
                nodes.entry(node.clone()).or_default().attached += 1;
            }
        }
        for (name, node) in &mut nodes {
            node.name = name.0.clone();
            node.alive = alive.contains(name);
            node.set_state(match self.book.state(name) {
                NodeState::Active => WireState::Active,
                NodeState::Draining => WireState::Draining,
                NodeState::Removed => WireState::Removed,
            });
        }
        Ok(ListStorageNodesReply { nodes: nodes.into_values().collect() })
    }
}
