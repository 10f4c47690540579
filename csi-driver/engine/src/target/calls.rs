//! A target's calls to replicas and to the record store. Each is a task that ends by posting its outcome.

use std::sync::{Arc, Weak};
use std::time::Duration;

use holdfast_nbd::{BASE_ALLOCATION, Client, ClientOptions};
use holdfast_proto::storage::replica_client::ReplicaClient;
use holdfast_service::record_copies;
use holdfast_storage_core::ids::{RecordVersion, ReplicaId};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::StoreError;
use holdfast_storage_core::replica::{OpenReply, OpenRequest, SessionKey};
use holdfast_storage_core::target::{CallId, Control, OpenSession, Opened, SessionId, TargetEvent};
use tokio::net::TcpStream;
use tokio::sync::mpsc::UnboundedReceiver;
use tokio::task::JoinHandle;

use crate::peers::PeerError;
use crate::replica::grpc;
use crate::wire;

use super::link::{ControlAnswer, Link, LinkError, Path, RemoteLink};
use super::machine::{TargetActor, TargetInput};
use super::snapshot_reads::SnapshotReads;

/// A record store call without an answer for so long counts as unknown (R8).
const STORE_TIMEOUT: Duration = Duration::from_secs(3);
/// Connecting to a replica's NBD server, with negotiation.
const NBD_CONNECT_TIMEOUT: Duration = Duration::from_secs(2);
/// A heartbeat without an answer for so long is forgotten; the core counts the silence itself.
const HEARTBEAT_TIMEOUT: Duration = Duration::from_secs(3);
/// The core gives a session up long before; this only ends the task of one that hangs.
const CONTROL_TIMEOUT: Duration = Duration::from_secs(30);
/// Connecting a control channel; the core tries again.
const CONTROL_CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// Reads the record.
pub async fn read_record(actor: Arc<TargetActor>, call: CallId) {
    let read = tokio::time::timeout(STORE_TIMEOUT, actor.env.store.read(actor.env.volume_id)).await;
    let result = read.unwrap_or_else(|_| Err(StoreError::Unknown("no answer in time".to_owned())));
    if let Err(error) = &result {
        tracing::warn!(volume = %actor.env.volume_id, %error, "the volume's record could not be read");
    }
    actor.post(TargetInput::core(TargetEvent::RecordRead { call, result }));
}

/// Swaps the record.
pub async fn swap(actor: Arc<TargetActor>, call: CallId, expected: RecordVersion, record: VolumeRecord) {
    let (generation, epoch, members) = (record.generation, record.epoch.number, record.in_sync.len());
    let swap = tokio::time::timeout(STORE_TIMEOUT, actor.env.store.swap(expected, record)).await;
    let result = swap.unwrap_or_else(|_| Err(StoreError::Unknown("no answer in time".to_owned())));
    match &result {
        Ok(_) => {
            tracing::info!(volume = %actor.env.volume_id, %generation, epoch, members, "the volume's record was swapped");
        }
        Err(error) => {
            tracing::warn!(volume = %actor.env.volume_id, %error, "a swap of the volume's record did not succeed");
        }
    }
    actor.post(TargetInput::core(TargetEvent::SwapAnswered { call, result }));
}

/// Sends a heartbeat.
pub async fn heartbeat(actor: Arc<TargetActor>, link: Arc<Link>, session: SessionId, sequence: u64) {
    let event = match tokio::time::timeout(HEARTBEAT_TIMEOUT, link.lease(sequence)).await {
        Ok(Ok(cache_lost)) => TargetEvent::HeartbeatAnswered { session, sequence, cache_lost },
        Ok(Err(LinkError::Over(reason))) => {
            tracing::info!(volume = %actor.env.volume_id, reason, "a replica ended the session");
            TargetEvent::SessionLost { session }
        }
        // Silence is counted by the core: one lost heartbeat is no lost session.
        Ok(Err(LinkError::Silent(_) | LinkError::Refused(_))) | Err(_) => return,
    };
    actor.post(TargetInput::core(event));
}

/// Sends a session's control requests in their order, each after the answer to the one before. The core sets deadlines.
pub async fn control(
    actor: Weak<TargetActor>,
    link: Weak<Link>,
    session: SessionId,
    replica: ReplicaId,
    mut queued: UnboundedReceiver<(CallId, Control)>,
) {
    while let Some((call, op)) = queued.recv().await {
        let Some(link) = link.upgrade() else { return };
        let answer = tokio::time::timeout(CONTROL_TIMEOUT, link.control(op)).await;
        let answer = answer.unwrap_or_else(|_| Err(LinkError::Silent("no answer in time".to_owned())));
        let Some(actor) = actor.upgrade() else { return };
        let event = match answer {
            Ok(ControlAnswer::Done) => TargetEvent::ControlDone { call },
            Ok(ControlAnswer::Map(map)) => TargetEvent::MapRead { call, map },
            Err(LinkError::Refused(error)) => TargetEvent::ControlRefused { call, error },
            Ok(ControlAnswer::Verified(blocks)) => TargetEvent::Verified { call, blocks },
            Ok(ControlAnswer::Extents(extents)) => TargetEvent::ExtentsRead { call, extents },
            Ok(ControlAnswer::Changes(blocks)) => TargetEvent::ChangesRead { call, blocks },
            Err(error) => {
                tracing::info!(volume = %actor.env.volume_id, %replica, %error, "a control request failed");
                TargetEvent::SessionLost { session }
            }
        };
        actor.post(TargetInput::core(event));
    }
}

/// Why a session did not come up.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    #[error(transparent)]
    Peer(#[from] PeerError),
    #[error("the control service cannot be reached: {0}")]
    Control(String),
    #[error("the NBD server cannot be reached: {0}")]
    Nbd(String),
    #[error("the replica is not open on this node")]
    Absent,
    #[error("the replica failed meanwhile")]
    Failed,
}

/// Opens a session: the control call, then the NBD connection.
pub async fn open(actor: Arc<TargetActor>, wanted: OpenSession) {
    let session = wanted.session;
    let replica = wanted.replica;
    let request = OpenRequest {
        volume_id: wanted.volume_id,
        replica_id: replica,
        generation: wanted.generation,
        target_id: wanted.target_id,
        lineage: wanted.lineage,
        promoted_from: wanted.promoted_from,
        epoch: wanted.epoch,
        in_sync: wanted.in_sync.clone(),
        size_bytes: wanted.size_bytes,
        snapshots: wanted.snapshots.clone(),
        sequence: session.0,
        copy: record_copies::copy_of(&wanted.record),
    };
    let opened = if wanted.node == actor.env.node {
        open_local(&actor, session, request).await
    } else {
        open_remote(&actor, &wanted, request).await
    };
    let input = match opened {
        Ok(Ok((link, reply))) => TargetInput::SessionUp(session, Arc::new(link), opened_of(reply)),
        Ok(Err(refusal)) => {
            tracing::info!(volume = %actor.env.volume_id, %replica, node = %wanted.node, %refusal, "a replica refused to open");
            TargetInput::core(TargetEvent::OpenRefused { session, refusal })
        }
        Err(error) => {
            tracing::info!(volume = %actor.env.volume_id, %replica, node = %wanted.node, %error, "a replica could not be opened");
            TargetInput::core(TargetEvent::OpenFailed { session })
        }
    };
    actor.post(input);
}

type Outcome = Result<Result<(Link, OpenReply), holdfast_storage_core::replica::OpenRefusal>, OpenError>;

async fn open_local(actor: &Arc<TargetActor>, session: SessionId, request: OpenRequest) -> Outcome {
    let replica = actor.env.host.get(request.replica_id).ok_or(OpenError::Absent)?;
    let (generation, target_id) = (request.generation, request.target_id);
    let target = Arc::downgrade(actor);
    let ended = Box::new(move || {
        if let Some(target) = target.upgrade() {
            target.post(TargetInput::core(TargetEvent::SessionLost { session }));
        }
    });
    let result = grpc::open(&replica, request, vec![actor.env.node.0.clone()], Some(ended)).await;
    Ok(result.ok_or(OpenError::Failed)?.map(|reply| {
        let key = SessionKey { generation, target_id, token: reply.token };
        (Link::new(Path::Local { actor: replica, key }), reply)
    }))
}

async fn open_remote(actor: &Arc<TargetActor>, wanted: &OpenSession, request: OpenRequest) -> Outcome {
    let env = &actor.env;
    let info = env.peers.info(&wanted.node).await?;
    // A connection of its own for each session: one that a cut link left behind would delay this one by its retries.
    let endpoint = env.peers.endpoint(&info)?;
    let unreachable = |reason: String| OpenError::Control(format!("{}: {reason}", info.control_address));
    let channel = tokio::time::timeout(CONTROL_CONNECT_TIMEOUT, endpoint.connect())
        .await
        .map_err(|_| unreachable("no connection in time".to_owned()))?
        .map_err(|error| unreachable(chain(&error)))?;
    let mut rpc = ReplicaClient::new(channel)
        .max_decoding_message_size(wire::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(wire::MESSAGE_BYTES_MAX);
    let open_pb = wire::open_request_pb(&request, &env.node);
    let mut session = open_pb.session.clone().unwrap_or_default();
    let reply = rpc.open(open_pb).await.map_err(|status| unreachable(status.to_string()))?;
    let reply = wire::open_reply(reply.into_inner()).map_err(|status| unreachable(status.to_string()))?;
    let reply = match reply {
        Ok(reply) => reply,
        Err(refusal) => return Ok(Err(refusal)),
    };
    session.token = reply.token.to_string();

    let tls = env.peers.tls().map(|tls| tls.nbd_client(&info.name.0)).transpose();
    let options = ClientOptions {
        export: wire::export_name(request.volume_id, request.replica_id, reply.token),
        tls: tls.map_err(|error| OpenError::Nbd(error.to_string()))?,
        contexts: vec![BASE_ALLOCATION.to_owned()],
        compact_headers: false,
    };
    let snapshots = SnapshotReads::new(info.nbd_address.clone(), options.clone());
    // The connection lives where the volume's I/O is done, so that a request crosses no thread.
    let connecting = AbortOnDrop(env.data.spawn(connect_nbd(info.nbd_address, options)));
    let client = connecting.join().await?;
    watch_client(actor, wanted.session, &client);
    Ok(Ok((Link::new(Path::Remote(Box::new(RemoteLink { client, rpc, session, snapshots }))), reply)))
}

/// Connects to a replica's NBD server; the connection lives on the runtime that polls this.
pub async fn connect_nbd(address: String, options: ClientOptions) -> Result<Arc<Client>, OpenError> {
    let connect = async {
        let stream = TcpStream::connect(&address).await.map_err(|error| error.to_string())?;
        stream.set_nodelay(true).map_err(|error| error.to_string())?;
        Client::connect(stream, options).await.map_err(|error| error.to_string())
    };
    match tokio::time::timeout(NBD_CONNECT_TIMEOUT, connect).await {
        Ok(Ok(client)) => Ok(Arc::new(client)),
        Ok(Err(reason)) => Err(OpenError::Nbd(format!("{address}: {reason}"))),
        Err(_) => Err(OpenError::Nbd(format!("{address}: no connection in time"))),
    }
}

/// R5: one lost connection is the session lost.
fn watch_client(actor: &Arc<TargetActor>, session: SessionId, client: &Arc<Client>) {
    let target = Arc::downgrade(actor);
    let client = Arc::clone(client);
    actor.env.data.spawn(async move {
        // Ends with the link, which closes the client when it is dropped.
        client.closed().await;
        if let Some(target) = target.upgrade() {
            target.post(TargetInput::core(TargetEvent::SessionLost { session }));
        }
    });
}

fn opened_of(reply: OpenReply) -> Opened {
    Opened {
        cache_lost: reply.cache_lost,
        logged: reply.logged,
        size_bytes: reply.size_bytes,
        epoch: reply.epoch,
        snapshots: reply.snapshots,
    }
}

/// An error with its sources, as transport errors hide the reason there.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(next) = source {
        text = format!("{text}: {next}");
        source = next.source();
    }
    text
}

/// A task that ends with whoever waits for it.
struct AbortOnDrop<T>(JoinHandle<T>);

impl<T> AbortOnDrop<Result<T, OpenError>> {
    async fn join(mut self) -> Result<T, OpenError> {
        (&mut self.0).await.unwrap_or(Err(OpenError::Failed))
    }
}

impl<T> Drop for AbortOnDrop<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}
