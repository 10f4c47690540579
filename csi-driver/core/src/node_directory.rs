//! The seam to the list of nodes: who runs a data process, and where it is reached.
//!
//! Only the signatures live here; the registry's client and its server side are in `service`.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::ids::NodeName;
use crate::record_store::StoreFuture;

/// What an operator decided about a node.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum NodeState {
    /// It gets replicas and keeps them.
    #[default]
    Active,
    /// It gets no replicas, and those it has move away.
    Draining,
    /// It never comes back: nobody waits for it, and it is not let in again while this stands.
    Removed,
}

/// One node as its data process announces it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NodeInfo {
    /// The node.
    pub name: NodeName,
    /// `host:port` of the Replica and Pool services.
    pub control_address: String,
    /// `host:port` of the NBD server.
    pub nbd_address: String,
    /// Bytes the pool may use.
    pub capacity_bytes: u64,
    /// Bytes still unused.
    pub available_bytes: u64,
    /// The zone it stands in; a part of a cluster that may fail as one.
    pub zone: Option<String>,
    /// The class of its pool; StorageClasses can demand one.
    pub pool_class: Option<String>,
    /// Most volumes that may be attached to it at the same time.
    pub volumes_max: Option<u32>,
}

/// Announces a node and lists the announced ones.
///
/// Nothing is decided on this list but where to connect, where new replicas go, and whether a further volume is attached: a
/// stale entry costs a failed connection or a replica in a zone that has one already, never data.
pub trait NodeDirectory: Send + Sync {
    /// Makes a node known; repeated every few seconds.
    fn announce(&self, node: NodeInfo) -> StoreFuture<'_, ()>;

    /// Every node that was announced, also those that have gone silent.
    fn list_nodes(&self) -> StoreFuture<'_, Vec<NodeInfo>>;
}

/// What operators decided about nodes. It outlives the controller, and is the controller's alone.
pub trait NodeStates: Send + Sync {
    /// Every node that is not active.
    fn node_states(&self) -> StoreFuture<'_, BTreeMap<NodeName, NodeState>>;

    /// Decides about one node, durably. Repeating it is a success.
    fn set_node_state(&self, node: NodeName, state: NodeState) -> StoreFuture<'_, ()>;
}
