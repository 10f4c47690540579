//! Who may do what between nodes: a certificate names its node, and a node acts for itself alone. Whoever may not gets a clear
//! answer, and the volume that is attached meanwhile does not notice.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use common::{Authority, Cluster, MIB, pattern, read, write};
use holdfast_engine::TlsMaterial;
use holdfast_io::BlockDevice;
use holdfast_nbd::{Client, ClientOptions, ConnectError};
use holdfast_proto::storage as pb;
use holdfast_proto::storage::pool_client::PoolClient;
use holdfast_proto::storage::replica_client::ReplicaClient;
use holdfast_proto::storage::volume_jobs_client::VolumeJobsClient;
use holdfast_storage_core::ids::{Epoch, TargetId, VolumeId};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tonic::Code;

const SIZE: u64 = 64 * MIB;

/// A cluster over TLS with a volume that node-a writes to.
struct Busy {
    cluster: Cluster,
    volume: VolumeId,
    device: Arc<dyn BlockDevice>,
    epoch: Epoch,
}

impl Busy {
    async fn start() -> Self {
        let cluster = Cluster::start_with(3, true).await;
        let volume = cluster.create_volume(SIZE).await;
        let device = cluster.attach(volume, 0).await;
        write(&device, 0, pattern(0, 1, 65536)).await.unwrap();
        let epoch = cluster.store.get(volume).record.epoch;
        Self { cluster, volume, device, epoch }
    }

    /// Everything is as it was: all members in sync under the same epoch, data there, writes go on.
    async fn assert_undisturbed(&self) {
        write(&self.device, MIB, pattern(1, 2, 65536)).await.unwrap();
        assert_eq!(read(&self.device, 0, 65536).await.unwrap(), pattern(0, 1, 65536));
        let record = self.cluster.store.get(self.volume).record;
        assert_eq!((record.in_sync.len(), record.epoch), (3, self.epoch));
    }

    fn tls_of(&self, index: usize) -> PathBuf {
        self.cluster.nodes[index].tls_dir.clone().unwrap()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_controller_makes_and_removes_replicas() {
    let busy = Busy::start().await;
    let replica_id = busy.cluster.replica_on(busy.volume, 1).to_string();
    let channel = busy.cluster.channel(1, Some(&busy.tls_of(2))).await.unwrap();
    let mut pool = PoolClient::new(channel);
    let request = pb::DeleteReplicaRequest { volume_id: busy.volume.to_string(), replica_id };
    let refused = pool.delete_replica(request).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert!(refused.message().contains("names node-c"), "{refused}");
    let refused = pool.create_replica(pb::CreateReplicaRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    assert_eq!(pool.get_pool(pb::GetPoolRequest {}).await.unwrap_err().code(), Code::PermissionDenied);
    let channel = busy.cluster.channel(1, Some(&busy.tls_of(2))).await.unwrap();
    let mut jobs = VolumeJobsClient::new(channel);
    let refused = jobs.create_snapshot(pb::CreateSnapshotRequest::default()).await.unwrap_err();
    assert_eq!(refused.code(), Code::PermissionDenied);
    busy.assert_undisturbed().await;
    let mut pool = busy.cluster.pool_client(1).await;
    assert!(pool.get_pool(pb::GetPoolRequest {}).await.unwrap().get_ref().capacity_bytes > 0);
}

/// An Open of node-b's replica for a target on `node`, under a generation above the present one.
fn open_request(busy: &Busy, node: &str) -> pb::OpenRequest {
    let record = busy.cluster.store.get(busy.volume).record;
    pb::OpenRequest {
        session: Some(pb::Session {
            volume_id: busy.volume.to_string(),
            replica_id: busy.cluster.replica_on(busy.volume, 1).to_string(),
            generation: record.generation.0 + 1,
            target_id: TargetId(7).to_string(),
            token: String::new(),
        }),
        lineage: record.lineage.to_string(),
        promoted_from: String::new(),
        epoch: Some(pb::Epoch { number: record.epoch.number, nonce: record.epoch.nonce }),
        in_sync: record.in_sync.iter().map(ToString::to_string).collect(),
        size_bytes: SIZE,
        node: node.to_owned(),
        ..pb::OpenRequest::default()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_opened_in_the_name_of_one_s_own_node_alone() {
    let busy = Busy::start().await;
    let channel = busy.cluster.channel(1, Some(&busy.tls_of(2))).await.unwrap();
    let mut replica = ReplicaClient::new(channel);
    for (node, word) in [("node-a", "names node-c"), ("", "names node-c")] {
        let refused = replica.open(open_request(&busy, node)).await.unwrap_err();
        assert_eq!(refused.code(), Code::PermissionDenied);
        assert!(refused.message().contains(word), "{refused}");
    }
    let controller = busy.cluster.issue("holdfast-controller").unwrap();
    let channel = busy.cluster.channel(1, Some(&controller)).await.unwrap();
    let open = ReplicaClient::new(channel).open(open_request(&busy, "holdfast-controller")).await;
    assert_eq!(open.unwrap_err().code(), Code::PermissionDenied, "the controller runs no targets");
    busy.assert_undisturbed().await;
}

async fn connect_nbd(busy: &Busy, tls: &Path, export: &str) -> Result<Client, ConnectError> {
    let stream = TcpStream::connect(busy.cluster.process(1).nbd_address()).await.unwrap();
    let tls = Some(TlsMaterial::load(tls).unwrap().nbd_client("node-b").unwrap());
    Client::connect(stream, ClientOptions { tls, ..ClientOptions::new(export) }).await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_session_is_used_by_the_node_that_opened_it_alone() {
    let busy = Busy::start().await;
    busy.cluster.process(0).detach(busy.volume).await.unwrap();
    let mut owner = ReplicaClient::new(busy.cluster.channel(1, Some(&busy.tls_of(0))).await.unwrap());
    let request = open_request(&busy, "node-a");
    let opened = owner.open(request.clone()).await.unwrap().into_inner();
    assert!(opened.refusal.is_none(), "{opened:?}");
    let session = pb::Session { token: opened.token.clone(), ..request.session.unwrap() };
    let export = format!("{}/{}/{}", session.volume_id, session.replica_id, session.token);

    // node-c knows the token, and it does not help.
    let mut other = ReplicaClient::new(busy.cluster.channel(1, Some(&busy.tls_of(2))).await.unwrap());
    let lease = pb::LeaseRequest { session: Some(session.clone()), sequence: 1 };
    assert_eq!(other.lease(lease.clone()).await.unwrap_err().code(), Code::PermissionDenied);
    let release = pb::ReleaseRequest { session: Some(session) };
    assert_eq!(other.release(release).await.unwrap_err().code(), Code::PermissionDenied);
    let refused = connect_nbd(&busy, &busy.tls_of(2), &export).await.unwrap_err();
    assert!(refused.to_string().contains("node-a opened the session"), "{refused}");

    owner.lease(lease).await.expect("the owner's session lives on");
    let client = connect_nbd(&busy, &busy.tls_of(0), &export).await.unwrap();
    let device: Arc<dyn BlockDevice> = Arc::new(client);
    assert_eq!(read(&device, 0, 4096).await.unwrap(), pattern(0, 1, 4096));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_and_expired_certificates_are_refused_on_both_ports() {
    let busy = Busy::start().await;
    let dir = busy.cluster.dir.path();
    let (stranger, expired) = (dir.join("stranger"), dir.join("expired"));
    Authority::new().issue("node-a", &stranger);
    // It trusts the cluster's authority, so that the refusal is the server's.
    std::fs::copy(busy.tls_of(0).join("ca.pem"), stranger.join("ca.pem")).unwrap();
    busy.cluster.authority.as_ref().unwrap().issue_until("node-a", &expired, 2001);
    for tls in [&stranger, &expired] {
        // TLS 1.3 tells a client of its refusal with the first answer only.
        let control = match busy.cluster.channel(1, Some(tls)).await {
            Ok(channel) => PoolClient::new(channel).get_pool(pb::GetPoolRequest {}).await.is_ok(),
            Err(_) => false,
        };
        assert!(!control, "{tls:?} was let in");
        let refused = connect_nbd(&busy, tls, "x/y/z").await.unwrap_err();
        assert!(matches!(refused, ConnectError::Tls(_) | ConnectError::Io(_)), "{refused}");
    }
    busy.assert_undisturbed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn plain_clients_and_garbage_on_tls_ports_get_nothing() {
    let busy = Busy::start().await;
    let process = busy.cluster.process(1);
    if let Ok(channel) = busy.cluster.channel(1, None).await {
        assert!(PoolClient::new(channel).get_pool(pb::GetPoolRequest {}).await.is_err());
    }
    let stream = TcpStream::connect(process.nbd_address()).await.unwrap();
    let refused = Client::connect(stream, ClientOptions::new("x/y/z")).await.unwrap_err();
    assert!(matches!(refused, ConnectError::TlsRequired(_)), "{refused}");
    for address in [process.control_address(), process.nbd_address()] {
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(&[0x5a; 4096]).await.unwrap();
        let mut answer = Vec::new();
        let ended = stream.read_to_end(&mut answer);
        let _ = tokio::time::timeout(Duration::from_secs(20), ended).await.expect("the server hangs up");
    }
    busy.assert_undisturbed().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_wants_tls_refuses_a_plain_port_in_words() {
    let cluster = Cluster::start(1).await;
    let dir = cluster.dir.path().join("node-x");
    Authority::new().issue("node-x", &dir);
    let stream = TcpStream::connect(cluster.process(0).nbd_address()).await.unwrap();
    let tls = Some(TlsMaterial::load(&dir).unwrap().nbd_client("node-a").unwrap());
    let refused =
        Client::connect(stream, ClientOptions { tls, ..ClientOptions::new("x") }).await.unwrap_err();
    assert!(refused.to_string().contains("TLS is not configured here"), "{refused}");
    assert!(cluster.channel(0, Some(&dir)).await.is_err(), "gRPC with TLS to a plain port");
}
