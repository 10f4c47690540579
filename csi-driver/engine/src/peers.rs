//! Where other nodes are reached: the registry's node list, cached.
//!
//! The cache keeps answering while the registry is away: a target must be able to reconnect without it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_storage_core::ids::NodeName;
use holdfast_storage_core::node_directory::{NodeDirectory, NodeInfo};
use tonic::transport::Endpoint;

use crate::tls::TlsMaterial;

/// How long connecting to a peer may take before the attempt counts as failed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// How long the registry may take to list the nodes before the cached list is used.
const LIST_TIMEOUT: Duration = Duration::from_secs(2);

/// Why a peer cannot be reached.
#[derive(Debug, Clone, thiserror::Error)]
pub enum PeerError {
    /// The registry never named the node, at least not to this process.
    #[error("node {0} is unknown: it has not announced itself to the registry")]
    Unknown(NodeName),
    /// The announced address is no address.
    #[error("node {node} announced the address {address}, which is not usable: {reason}")]
    Address {
        /// The node.
        node: NodeName,
        /// What it announced.
        address: String,
        /// Why it is not usable.
        reason: String,
    },
}

/// The nodes' addresses.
pub struct Peers {
    directory: Arc<dyn NodeDirectory>,
    tls: Option<TlsMaterial>,
    // One entry per node of the cluster; it shrinks never, a cluster's nodes are few.
    known: Mutex<HashMap<NodeName, NodeInfo>>,
}

impl Peers {
    /// An address book that is empty until the first refresh.
    #[must_use]
    pub fn new(directory: Arc<dyn NodeDirectory>, tls: Option<TlsMaterial>) -> Self {
        Self { directory, tls, known: Mutex::new(HashMap::new()) }
    }

    /// Reads the node list anew; without an answer the cached one stays.
    pub async fn refresh(&self) {
        let listed = tokio::time::timeout(LIST_TIMEOUT, self.directory.list_nodes()).await;
        let nodes = match listed {
            Ok(Ok(nodes)) => nodes,
            Ok(Err(error)) => {
                tracing::debug!(%error, "the node list could not be read; the cached one stays in use");
                return;
            }
            Err(_) => {
                tracing::debug!("the registry did not list the nodes in time; the cached list stays in use");
                return;
            }
        };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.extend(nodes.into_iter().map(|info| (info.name.clone(), info)));
    }

    /// The node's announcement, from the cache, or read anew where the cache lacks it.
    ///
    /// # Errors
    /// The registry does not name the node.
    pub async fn info(&self, node: &NodeName) -> Result<NodeInfo, PeerError> {
        if let Some(info) = self.cached(node) {
            return Ok(info);
        }
        self.refresh().await;
        self.cached(node).ok_or_else(|| PeerError::Unknown(node.clone()))
    }

    /// How to connect to a node's control services, each session over a connection of its own.
    ///
    /// # Errors
    /// The announced address is not usable.
    pub fn endpoint(&self, info: &NodeInfo) -> Result<Endpoint, PeerError> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let unusable = |reason: String| PeerError::Address {
            node: info.name.clone(),
            address: info.control_address.clone(),
            reason,
        };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{}", info.control_address))
            .map_err(|e| unusable(e.to_string()))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true);
        if let Some(tls) = &self.tls {
            endpoint =
                endpoint.tls_config(tls.tonic_client(&info.name.0)).map_err(|e| unusable(e.to_string()))?;
        }
        Ok(endpoint)
    }

    /// The node's TLS material, for NBD connections to peers.
    #[must_use]
    pub fn tls(&self) -> Option<&TlsMaterial> {
        self.tls.as_ref()
    }

    fn cached(&self, node: &NodeName) -> Option<NodeInfo> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(node).cloned()
    }
}
