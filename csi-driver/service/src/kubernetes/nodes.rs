//! Nodes as objects of kind `StorageNode`.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use holdfast_storage_core::ids::NodeName;
use holdfast_storage_core::node_directory::{NodeDirectory, NodeInfo, NodeState, NodeStates};
use holdfast_storage_core::record_store::{StoreError, StoreFuture};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use k8s_openapi::jiff::Timestamp;

use super::client::{CallError, Deadline, KubernetesClient};
use super::convert::{counter, number};
use super::objects::{NodeStateSpec, StorageNode, StorageNodeSpec};
use super::store::about_list;
use crate::node_book::NodeBook;

/// A node that announces just what it announced before is written again after this only: it keeps the API server's load low,
/// and stays well below the time after which a node counts as silent.
const REFRESH_INTERVAL: Duration = Duration::from_secs(3);
/// How often the controller looks which nodes were announced anew.
const FEED_INTERVAL: Duration = Duration::from_secs(2);

/// Announces nodes to the API server, and lists them.
pub struct KubernetesDirectory {
    client: KubernetesClient,
    announced: Mutex<BTreeMap<NodeName, (NodeInfo, Instant)>>,
}

impl KubernetesDirectory {
    /// A directory at the API server of `client`.
    #[must_use]
    pub fn new(client: KubernetesClient) -> Self {
        Self { client, announced: Mutex::new(BTreeMap::new()) }
    }

    /// Announces to `book` each node that announced itself here since the last look, until it is dropped: how the
    /// controller knows which nodes are alive. A node's clock does not matter, only that its object changes. What was decided
    /// about nodes, here or by `kubectl patch`, is in the book before any of them.
    ///
    /// Cancellation safe. While the API server does not answer, nodes go silent in the book: no new replicas, nothing else.
    pub async fn feed(&self, book: Arc<NodeBook>) {
        let mut seen: BTreeMap<String, Time> = BTreeMap::new();
        loop {
            match self.objects().await {
                Ok(nodes) => {
                    book.set_states(decided(&nodes));
                    for (info, announced_at, state) in nodes {
                        if state == NodeState::Removed {
                            continue;
                        }
                        if seen.get(&info.name.0) != Some(&announced_at) {
                            // The first look may be at a dead node's last word: it counts once it changes.
                            let known = seen.insert(info.name.0.clone(), announced_at).is_some();
                            if known && let Err(error) = book.announce(info).await {
                                tracing::warn!(%error, "a node could not be entered in the book");
                            }
                        }
                    }
                }
                Err(error) => tracing::warn!(%error, "the nodes cannot be listed"),
            }
            tokio::time::sleep(FEED_INTERVAL).await;
        }
    }

    async fn objects(&self) -> Result<Vec<(NodeInfo, Time, NodeState)>, StoreError> {
        let objects: Vec<StorageNode> = self.client.list(Deadline::new()).await.map_err(about_list)?;
        objects.into_iter().map(from_object).collect()
    }

    async fn announce_now(&self, node: NodeInfo) -> Result<(), StoreError> {
        if self.is_fresh(&node) {
            return Ok(());
        }
        let spec = StorageNodeSpec {
            control_address: node.control_address.clone(),
            nbd_address: node.nbd_address.clone(),
            capacity_bytes: number("capacity_bytes", node.capacity_bytes)?,
            available_bytes: number("available_bytes", node.available_bytes)?,
            zone: node.zone.clone(),
            pool_class: node.pool_class.clone(),
            volumes_max: node.volumes_max,
            state: None,
            announced_at: Time(Timestamp::now()),
        };
        let name = node.name.0.clone();
        self.client
            .apply(Deadline::new(), &name, &StorageNode::new(&name, spec))
            .await
            .map_err(about_list)?;
        let mut announced = self.announced.lock().unwrap_or_else(PoisonError::into_inner);
        announced.insert(node.name.clone(), (node, Instant::now()));
        Ok(())
    }

    /// Whether the same was written lately. Free space moves all the time, and may be a little old.
    fn is_fresh(&self, node: &NodeInfo) -> bool {
        let announced = self.announced.lock().unwrap_or_else(PoisonError::into_inner);
        announced.get(&node.name).is_some_and(|(last, at)| {
            let moved = NodeInfo { available_bytes: node.available_bytes, ..last.clone() };
            at.elapsed() < REFRESH_INTERVAL && moved == *node
        })
    }
}

impl NodeDirectory for KubernetesDirectory {
    fn announce(&self, node: NodeInfo) -> StoreFuture<'_, ()> {
        Box::pin(self.announce_now(node))
    }

    fn list_nodes(&self) -> StoreFuture<'_, Vec<NodeInfo>> {
        Box::pin(async move { Ok(self.objects().await?.into_iter().map(|(info, ..)| info).collect()) })
    }
}

impl NodeStates for KubernetesDirectory {
    fn node_states(&self) -> StoreFuture<'_, BTreeMap<NodeName, NodeState>> {
        Box::pin(async move { Ok(decided(&self.objects().await?)) })
    }

    fn set_node_state(&self, node: NodeName, state: NodeState) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            let state = match state {
                NodeState::Active => None,
                NodeState::Draining => Some(NodeStateSpec::Draining),
                NodeState::Removed => Some(NodeStateSpec::Removed),
            };
            let fields = serde_json::json!({"spec": {"state": state}});
            match self.client.merge::<StorageNode>(Deadline::new(), &node.0, &fields).await {
                Ok(_) => Ok(()),
                Err(CallError::Missing) => Err(StoreError::Refused(format!(
                    "there is no StorageNode {node} that could hold the decision"
                ))),
                Err(error) => Err(about_list(error)),
            }
        })
    }
}

fn decided(nodes: &[(NodeInfo, Time, NodeState)]) -> BTreeMap<NodeName, NodeState> {
    let decided = nodes.iter().filter(|(_, _, state)| *state != NodeState::Active);
    decided.map(|(info, _, state)| (info.name.clone(), *state)).collect()
}

fn from_object(object: StorageNode) -> Result<(NodeInfo, Time, NodeState), StoreError> {
    let spec = object.spec;
    let info = NodeInfo {
        name: NodeName(object.metadata.name.unwrap_or_default()),
        control_address: spec.control_address,
        nbd_address: spec.nbd_address,
        capacity_bytes: counter("capacityBytes", spec.capacity_bytes)?,
        available_bytes: counter("availableBytes", spec.available_bytes)?,
        zone: spec.zone,
        pool_class: spec.pool_class,
        volumes_max: spec.volumes_max,
    };
    let state = match spec.state {
        None | Some(NodeStateSpec::Active) => NodeState::Active,
        Some(NodeStateSpec::Draining) => NodeState::Draining,
        Some(NodeStateSpec::Removed) => NodeState::Removed,
    };
    Ok((info, spec.announced_at, state))
}
