//! The nodes' pools, as the controller reaches them.

use std::collections::HashMap;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::future::join_all;
use holdfast_proto::storage::pool_client::PoolClient;
use holdfast_proto::storage::{
    BlockRun, CreateReplicaRequest, DeleteReplicaRequest, GetPoolRequest, KeptRecord, ReadRecordsRequest,
    ReadSnapshotBlocksRequest,
};
use holdfast_storage_core::ids::NodeName;
use holdfast_storage_core::node_directory::{NodeInfo, NodeState};
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::node_book::NodeBook;
use crate::tls::TlsIdentity;

/// How long connecting to a node may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// How long a pool may take to tell its free space; a slower one gets no new replica.
const SURVEY_TIMEOUT: Duration = Duration::from_secs(3);
/// How old a survey may be to be used for another placement: calls that come together share one.
const SURVEY_AGE_MAX: Duration = Duration::from_millis(250);
/// How long a pool may take to make or delete a replica.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a pool may take to tell what some of its replicas keep: it looks at the tables of those that were never formatted.
const RECORDS_TIMEOUT: Duration = Duration::from_secs(60);
/// Bytes of the largest such answer.
const RECORDS_BYTES_MAX: usize = 64 << 20;
/// A connection whose peer does not answer a ping for this long is given up.
const KEEPALIVE: Duration = Duration::from_secs(2);

/// Free space of one node's pool, as it said itself a moment ago.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct PoolSpace {
    pub(super) node: NodeName,
    pub(super) capacity_bytes: u64,
    pub(super) available_bytes: u64,
}

/// Clients of the pools, one connection per node.
pub(super) struct Pools {
    book: Arc<NodeBook>,
    tls: Option<TlsIdentity>,
    /// By node, with the address and the version of our certificate that it is for; bounded by the book's own limit.
    channels: Mutex<HashMap<NodeName, (String, u64, Channel)>>,
    /// What the newest survey found, and when it was begun.
    surveyed: Mutex<Option<(Instant, Vec<PoolSpace>)>>,
}

impl Pools {
    pub(super) fn new(book: Arc<NodeBook>, tls: Option<TlsIdentity>) -> Self {
        Self { book, tls, channels: Mutex::new(HashMap::new()), surveyed: Mutex::new(None) }
    }

    /// Asks every node that is alive for its free space; silent ones are left out.
    pub(super) async fn survey(&self) -> Vec<PoolSpace> {
        let begun = Instant::now();
        let ask = |info: NodeInfo| async move {
            let node = info.name.clone();
            let mut client = self.client(&info).ok()?;
            match within(SURVEY_TIMEOUT, &node, client.get_pool(GetPoolRequest {})).await {
                Ok(pool) => {
                    let (capacity_bytes, available_bytes) = (pool.capacity_bytes, pool.available_bytes);
                    Some(PoolSpace { node, capacity_bytes, available_bytes })
                }
                Err(status) => {
                    tracing::warn!(%node, %status, "the pool does not tell its free space");
                    None
                }
            }
        };
        let asked = self.book.alive().into_iter().map(ask);
        let found: Vec<PoolSpace> = join_all(asked).await.into_iter().flatten().collect();
        *self.surveyed.lock().unwrap_or_else(PoisonError::into_inner) = Some((begun, found.clone()));
        found
    }

    /// What the nodes said a moment ago, if they were asked. Somebody's data may have grown since, and a node may have died:
    /// a pool refuses what it has no room for, and another one is chosen then.
    pub(super) fn surveyed_lately(&self) -> Option<Vec<PoolSpace>> {
        let surveyed = self.surveyed.lock().unwrap_or_else(PoisonError::into_inner);
        surveyed
            .as_ref()
            .filter(|(begun, _)| begun.elapsed() < SURVEY_AGE_MAX)
            .map(|(_, found)| found.clone())
    }

    pub(super) async fn create_replica(
        &self,
        node: &NodeName,
        request: CreateReplicaRequest,
    ) -> Result<(), Status> {
        let mut client = self.client(&self.known(node)?)?;
        within(CHANGE_TIMEOUT, node, client.create_replica(request)).await.map(|_| ())
    }

    /// On a node that an operator removed there is nothing that anybody could come back to: a success.
    pub(super) async fn delete_replica(
        &self,
        node: &NodeName,
        request: DeleteReplicaRequest,
    ) -> Result<(), Status> {
        if self.book.state(node) == NodeState::Removed {
            return Ok(());
        }
        let mut client = self.client(&self.known(node)?)?;
        within(CHANGE_TIMEOUT, node, client.delete_replica(request)).await.map(|_| ())
    }

    /// What all replicas of a node know and keep.
    pub(super) async fn kept_records(&self, info: &NodeInfo) -> Result<Vec<KeptRecord>, Status> {
        let mut client = self.client(info)?.max_decoding_message_size(RECORDS_BYTES_MAX);
        let (mut kept, mut after_replica_id): (Vec<KeptRecord>, String) = Default::default();
        loop {
            let request = ReadRecordsRequest { after_replica_id: std::mem::take(&mut after_replica_id) };
            let reply = within(RECORDS_TIMEOUT, &info.name, client.read_records(request)).await?;
            kept.extend(reply.replicas);
            match kept.last() {
                Some(last) if reply.more => after_replica_id.clone_from(&last.replica_id),
                _ => return Ok(kept),
            }
        }
    }

    pub(super) async fn snapshot_blocks(
        &self,
        node: &NodeName,
        request: ReadSnapshotBlocksRequest,
    ) -> Result<Vec<BlockRun>, Status> {
        let mut client = self.client(&self.known(node)?)?;
        within(CHANGE_TIMEOUT, node, client.read_snapshot_blocks(request)).await.map(|reply| reply.runs)
    }

    pub(super) fn known(&self, node: &NodeName) -> Result<NodeInfo, Status> {
        self.book.get(node).ok_or_else(|| {
            Status::unavailable(format!("node {node} has not announced itself since this controller started"))
        })
    }

    fn client(&self, info: &NodeInfo) -> Result<PoolClient<Channel>, Status> {
        self.channel(info).map(PoolClient::new)
    }

    pub(super) fn channel(&self, info: &NodeInfo) -> Result<Channel, Status> {
        let mut channels = self.channels.lock().unwrap_or_else(PoisonError::into_inner);
        let version = self.tls.as_ref().map_or(0, TlsIdentity::version);
        if let Some((address, made_with, channel)) = channels.get(&info.name)
            && *address == info.control_address
            && *made_with == version
        {
            return Ok(channel.clone());
        }
        let channel = self.connect(info).map_err(|e| {
            Status::unavailable(format!(
                "node {} announced the address {}, which cannot be used: {e}",
                info.name, info.control_address
            ))
        })?;
        channels.insert(info.name.clone(), (info.control_address.clone(), version, channel.clone()));
        Ok(channel)
    }

    fn connect(&self, info: &NodeInfo) -> Result<Channel, tonic::transport::Error> {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        let mut endpoint = Endpoint::from_shared(format!("{scheme}://{}", info.control_address))?
            .connect_timeout(CONNECT_TIMEOUT)
            .tcp_nodelay(true)
            .http2_keep_alive_interval(KEEPALIVE)
            .keep_alive_timeout(KEEPALIVE)
            .keep_alive_while_idle(true);
        if let Some(tls) = &self.tls {
            endpoint = endpoint.tls_config(tls.client(&info.name.0))?;
        }
        Ok(endpoint.connect_lazy())
    }
}

pub(super) async fn within<T>(
    limit: Duration,
    node: &NodeName,
    call: impl Future<Output = Result<Response<T>, Status>>,
) -> Result<T, Status> {
    match tokio::time::timeout(limit, call).await {
        Ok(Ok(reply)) => Ok(reply.into_inner()),
        Ok(Err(status)) => Err(Status::new(status.code(), format!("node {node}: {}", status.message()))),
        Err(_) => Err(Status::unavailable(format!("node {node} gave no answer within {limit:?}"))),
    }
}
