//! Where other nodes are reached: the registry's node list, cached, and one gRPC channel per node.
//!
//! The cache keeps answering while the registry is away: a target must be able to reconnect without it.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_storage_core::ids::NodeName;
use holdfast_storage_core::node_directory::{NodeDirectory, NodeInfo};
use tonic::transport::{Channel, Endpoint};

use crate::tls::TlsMaterial;

/// How long connecting to a peer may take before the attempt counts as failed.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);

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

/// The nodes' addresses and channels to them.
pub struct Peers {
    directory: Arc<dyn NodeDirectory>,
    tls: Option<TlsMaterial>,
    // One entry per node of the cluster; it shrinks never, a cluster's nodes are few.
    known: Mutex<HashMap<NodeName, Peer>>,
}

#[derive(Clone)]
struct Peer {
    info: NodeInfo,
    channel: Option<Channel>,
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
        for info in nodes {
            match known.get_mut(&info.name) {
                Some(peer) if peer.info.control_address == info.control_address => peer.info = info,
                _ => {
                    known.insert(info.name.clone(), Peer { info, channel: None });
                }
            }
        }
    }

    /// The node's announcement, from the cache, or read anew where the cache lacks it.
    ///
    /// # Errors
    /// The registry does not name the node.
    pub async fn info(&self, node: &NodeName) -> Result<NodeInfo, PeerError> {
        if let Some(peer) = self.cached(node) {
            return Ok(peer.info);
        }
        self.refresh().await;
        self.cached(node).map(|peer| peer.info).ok_or_else(|| PeerError::Unknown(node.clone()))
    }

    /// A channel to the node's control services. It connects at its first call and again after a failure.
    ///
    /// # Errors
    /// The node is unknown or its address is not usable.
    pub async fn channel(&self, node: &NodeName) -> Result<Channel, PeerError> {
        let info = self.info(node).await?;
        if let Some(channel) = self.cached(node).and_then(|peer| peer.channel) {
            return Ok(channel);
        }
        let channel = self.endpoint(&info)?.connect_lazy();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(peer) = known.get_mut(node) {
            peer.channel = Some(channel.clone());
        }
        Ok(channel)
    }

    /// How to connect to a node's control services, for callers that keep a channel of their own.
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

    fn cached(&self, node: &NodeName) -> Option<Peer> {
        self.known.lock().unwrap_or_else(PoisonError::into_inner).get(node).cloned()
    }
}
