//! What the parts of one data process share.

use std::sync::Arc;

use holdfast_storage_core::record_store::RecordStore;
use tokio::runtime::Handle;

use crate::config::DataConfig;
use crate::peers::Peers;
use crate::pulse::Pulse;
use crate::replica::host::ReplicaHost;

/// Shared by the services and the targets of one data process.
pub struct NodeContext {
    /// Settings.
    pub config: DataConfig,
    /// The record store.
    pub store: Arc<dyn RecordStore>,
    /// The other nodes.
    pub peers: Arc<Peers>,
    /// This node's replicas.
    pub replicas: Arc<ReplicaHost>,
    /// The timer thread.
    pub pulse: Pulse,
    /// The control thread.
    pub control: Handle,
}
