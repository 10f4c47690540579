//! The registry's client: a record store and node directory for nodes without Kubernetes.
//!
//! Reads are never cached. A call without an answer is [`StoreError::Unknown`]: the change may or may not have
//! happened, now or later, and the caller must read until it knows (R8).

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_proto::storage::registry_client::RegistryClient as Client;
use holdfast_proto::storage::{
    AnnounceRequest, CreateRecordRequest, ListNodesRequest, ListRecordsRequest, ReadRecordRequest,
    RemoveRecordRequest, SwapRecordRequest,
};
use holdfast_storage_core::ids::{RecordVersion, VolumeId};
use holdfast_storage_core::node_directory::{NodeDirectory, NodeInfo};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::{RecordStore, StoreError, StoreFuture, Versioned};
use tonic::transport::{Channel, Endpoint};
use tonic::{Response, Status};

use crate::registry_wire::{from_status, node_from_wire, node_to_wire, record_to_json, versioned_from_wire};
use crate::tls::TlsIdentity;

/// How long a call may take, connecting included.
const CALL_TIMEOUT: Duration = Duration::from_secs(3);
/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A connection whose peer does not answer a ping is given up after interval + timeout, so that the next call
/// connects anew instead of waiting for TCP to notice.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(1);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(1);
/// Largest answer taken: a list of about 60 000 records. A longer list fails as unknown.
const ANSWER_BYTES_MAX: usize = 64 << 20;

/// Why a client could not be made.
#[derive(Debug, thiserror::Error)]
#[error("registry address \"{address}\" cannot be used: {reason}; it must be HOST:PORT")]
pub struct AddressError {
    /// The address as given.
    pub address: String,
    /// Why.
    pub reason: String,
}

/// The client. It connects at its first call and again whenever the connection is lost.
#[derive(Clone)]
pub struct RegistryClient {
    address: String,
    tls: Option<(TlsIdentity, String)>,
    /// With the version of our certificate that it was made with.
    made: Arc<Mutex<(u64, Client<Channel>)>>,
}

impl RegistryClient {
    /// A client of the registry at `address` (`host:port`); with TLS the server must be named `server_name`.
    /// Nothing is sent yet.
    ///
    /// # Errors
    /// The address has no usable form.
    pub fn new(address: &str, tls: Option<(&TlsIdentity, &str)>) -> Result<Self, AddressError> {
        let tls = tls.map(|(identity, name)| (identity.clone(), name.to_owned()));
        let made = make(address, tls.as_ref())?;
        Ok(Self { address: address.to_owned(), tls, made: Arc::new(Mutex::new(made)) })
    }

    /// A client with our newest certificate; calls under way keep the one that they have.
    fn client(&self) -> Client<Channel> {
        let mut made = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if self.tls.as_ref().is_some_and(|(identity, _)| identity.version() != made.0)
            // The address was usable before.
            && let Ok(fresh) = make(&self.address, self.tls.as_ref())
        {
            *made = fresh;
        }
        made.1.clone()
    }
}

fn make(address: &str, tls: Option<&(TlsIdentity, String)>) -> Result<(u64, Client<Channel>), AddressError> {
    let unusable = |reason: String| AddressError { address: address.to_owned(), reason };
    let scheme = if tls.is_some() { "https" } else { "http" };
    let mut endpoint = Endpoint::from_shared(format!("{scheme}://{address}"))
        .map_err(|e| unusable(e.to_string()))?
        .connect_timeout(CONNECT_TIMEOUT)
        .tcp_nodelay(true)
        .http2_keep_alive_interval(KEEPALIVE_INTERVAL)
        .keep_alive_timeout(KEEPALIVE_TIMEOUT)
        .keep_alive_while_idle(true);
    let mut version = 0;
    if let Some((identity, server_name)) = tls {
        // Before what is used, so that a replacement in between only makes it anew once more.
        version = identity.version();
        endpoint = endpoint.tls_config(identity.client(server_name)).map_err(|e| unusable(e.to_string()))?;
    }
    if address.rsplit_once(':').and_then(|(_, port)| port.parse::<u16>().ok()).is_none() {
        return Err(unusable("it names no port".to_owned()));
    }
    Ok((version, Client::new(endpoint.connect_lazy()).max_decoding_message_size(ANSWER_BYTES_MAX)))
}

impl RecordStore for RegistryClient {
    fn read(&self, volume: VolumeId) -> StoreFuture<'_, Versioned> {
        let mut client = self.client();
        Box::pin(async move {
            let request = ReadRecordRequest { volume_id: volume.to_string() };
            let reply = answer(client.read(request)).await?;
            let record =
                reply.record.ok_or_else(|| StoreError::Unknown("the answer has no record".to_owned()))?;
            versioned_from_wire(&record)
        })
    }

    fn list(&self) -> StoreFuture<'_, Vec<Arc<Versioned>>> {
        let mut client = self.client();
        Box::pin(async move {
            let reply = answer(client.list(ListRecordsRequest {})).await?;
            reply.records.iter().map(|record| versioned_from_wire(record).map(Arc::new)).collect()
        })
    }

    fn create(&self, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        let mut client = self.client();
        Box::pin(async move {
            let json = record_to_json(&record)?;
            Ok(RecordVersion(answer(client.create(CreateRecordRequest { json })).await?.version))
        })
    }

    fn swap(&self, expected: RecordVersion, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        let mut client = self.client();
        Box::pin(async move {
            let request = SwapRecordRequest { expected_version: expected.0, json: record_to_json(&record)? };
            Ok(RecordVersion(answer(client.swap(request)).await?.version))
        })
    }

    fn remove(&self, expected: RecordVersion, volume: VolumeId) -> StoreFuture<'_, ()> {
        let mut client = self.client();
        Box::pin(async move {
            let request = RemoveRecordRequest { volume_id: volume.to_string(), expected_version: expected.0 };
            answer(client.remove(request)).await.map(|_| ())
        })
    }
}

impl NodeDirectory for RegistryClient {
    fn announce(&self, node: NodeInfo) -> StoreFuture<'_, ()> {
        let mut client = self.client();
        Box::pin(async move {
            let request = AnnounceRequest { node: Some(node_to_wire(node)) };
            answer(client.announce(request)).await.map(|_| ())
        })
    }

    fn list_nodes(&self) -> StoreFuture<'_, Vec<NodeInfo>> {
        let mut client = self.client();
        Box::pin(async move {
            let reply = answer(client.list_nodes(ListNodesRequest {})).await?;
            Ok(reply.nodes.into_iter().map(node_from_wire).collect())
        })
    }
}

async fn answer<T>(call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, StoreError> {
    match tokio::time::timeout(CALL_TIMEOUT, call).await {
        Ok(Ok(reply)) => Ok(reply.into_inner()),
        Ok(Err(status)) => Err(from_status(&status)),
        Err(_) => Err(StoreError::Unknown(format!("the registry gave no answer within {CALL_TIMEOUT:?}"))),
    }
}
