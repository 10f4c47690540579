//! The nodes that announced themselves, and when.
//!
//! Kept in memory only: it says where to connect and which nodes are alive, never who owns what. After a restart of
//! the controller it fills again within one announcement interval. What operators decided about nodes is a copy of what
//! [`NodeStates`](holdfast_storage_core::node_directory::NodeStates) keeps.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use holdfast_storage_core::ids::NodeName;
use holdfast_storage_core::node_directory::{NodeDirectory, NodeInfo, NodeState};
use holdfast_storage_core::record_store::{StoreError, StoreFuture};

/// Nodes a cluster may have; a further one is refused.
pub const NODES_MAX: usize = 4096;
/// A node that has not announced itself for this long gets no new replica: five announcements were missed.
pub const SILENT_AFTER: Duration = Duration::from_secs(10);
/// For this long after the start an unknown node may simply not have announced itself yet.
const FILLING_FOR: Duration = Duration::from_secs(6);

/// The book. Shared between the registry server and the controller service.
pub struct NodeBook {
    started: Instant,
    nodes: Mutex<BTreeMap<NodeName, (NodeInfo, Instant)>>,
    /// Of those that are not active.
    states: Mutex<BTreeMap<NodeName, NodeState>>,
}

impl Default for NodeBook {
    fn default() -> Self {
        Self { started: Instant::now(), nodes: Mutex::default(), states: Mutex::default() }
    }
}

impl NodeBook {
    /// An empty book.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Nodes that announced themselves lately.
    #[must_use]
    pub fn alive(&self) -> Vec<NodeInfo> {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.values().filter(|(_, at)| at.elapsed() < SILENT_AFTER).map(|(info, _)| info.clone()).collect()
    }

    /// Every node that was ever heard of.
    #[must_use]
    pub fn all(&self) -> Vec<NodeInfo> {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.values().map(|(info, _)| info.clone()).collect()
    }

    /// One node, also a silent one.
    #[must_use]
    pub fn get(&self, name: &NodeName) -> Option<NodeInfo> {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.get(name).map(|(info, _)| info.clone())
    }

    /// For how long a node has not announced itself; one that was never heard of, since the book was begun.
    #[must_use]
    pub fn silent_for(&self, name: &NodeName) -> Duration {
        let nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        nodes.get(name).map_or(self.started, |(_, at)| *at).elapsed()
    }

    /// What an operator decided about a node.
    #[must_use]
    pub fn state(&self, name: &NodeName) -> NodeState {
        let states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        states.get(name).copied().unwrap_or_default()
    }

    /// What was decided about all nodes; who is not in it is active.
    pub fn set_states(&self, decided: BTreeMap<NodeName, NodeState>) {
        *self.states.lock().unwrap_or_else(PoisonError::into_inner) = decided;
    }

    /// What was decided about one node.
    pub fn set_state(&self, name: NodeName, state: NodeState) {
        let mut states = self.states.lock().unwrap_or_else(PoisonError::into_inner);
        match state {
            NodeState::Active => drop(states.remove(&name)),
            NodeState::Draining | NodeState::Removed => drop(states.insert(name, state)),
        }
    }

    /// Nodes about which something was decided.
    #[must_use]
    pub fn decided(&self) -> Vec<NodeName> {
        self.states.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// Whether nodes may exist that this book has not heard of since it was started.
    #[must_use]
    pub fn is_filling(&self) -> bool {
        self.started.elapsed() < FILLING_FOR
    }
}

impl NodeDirectory for NodeBook {
    fn announce(&self, node: NodeInfo) -> StoreFuture<'_, ()> {
        if self.state(&node.name) == NodeState::Removed {
            let sentence = format!(
                "node {} was removed from the cluster; `holdfast node activate {0}` lets it in again",
                node.name
            );
            return Box::pin(std::future::ready(Err(StoreError::Refused(sentence))));
        }
        let mut nodes = self.nodes.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = if nodes.len() >= NODES_MAX && !nodes.contains_key(&node.name) {
            Err(StoreError::Refused(format!("node {}: {NODES_MAX} nodes are known already", node.name)))
        } else {
            if nodes.insert(node.name.clone(), (node.clone(), Instant::now())).is_none() {
                tracing::info!(node = %node.name, control = node.control_address, "node announced itself");
            }
            Ok(())
        };
        Box::pin(std::future::ready(answer))
    }

    fn list_nodes(&self) -> StoreFuture<'_, Vec<NodeInfo>> {
        Box::pin(std::future::ready(Ok(self.all())))
    }
}
