//! Which secrets stage an encrypted volume (ADR 0007): the data process, here a stand-in that writes down what it is given,
//! hears of a volume only with the one key that its record is bound to.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use holdfast_proto::csi::node_client::NodeClient;
use holdfast_proto::csi::node_server::NodeServer;
use holdfast_proto::csi::*;
use holdfast_proto::storage::data_server::{Data, DataServer};
use holdfast_proto::storage::{
    AttachReply, AttachRequest, CountAllocatedReply, CountAllocatedRequest, DetachReply, DetachRequest,
    GetStatusReply, GetStatusRequest, ScrubReply, ScrubRequest,
};
use holdfast_service::serve::{bind_unix, serve_unix, server};
use holdfast_service::{NodeConfig, NodeService, SledStore};
use holdfast_storage_core::encryption::{Encryption, EncryptionKind, VolumeKey};
use holdfast_storage_core::ids::{Attachment, NodeName, Salt};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::RecordStore;
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use crate::support::fakes::{Cut, CutStore};
use crate::support::mk_record;
use crate::support::requests::mk_block;

const SALT: Salt = Salt(0xfeed);
const RIGHT: &str = "the right passphrase";
const WRONG: &str = "another passphrase";

fn key_of(secret: &str) -> Vec<u8> {
    VolumeKey::derive(secret.as_bytes(), SALT).unwrap().as_bytes().to_vec()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_stage_binds_the_volume_to_its_secret_and_every_other_one_is_refused_before_an_attach() {
    let world = World::start(EncryptionKind::AesXts).await;
    let node = world.node(Arc::clone(&world.store)).await;
    for (secret, named) in [(None, "secrets[encryption-passphrase] is missing"), (Some("short"), "5 bytes")] {
        let status = node.stage(&world, secret).await.unwrap_err();
        assert_eq!(status.code(), Code::InvalidArgument, "{status}");
        assert!(status.message().contains(named), "{status}");
    }
    assert_eq!(world.bound().await, None, "that binds nothing");
    node.stage(&world, Some(RIGHT)).await.unwrap();
    node.stage(&world, Some(RIGHT)).await.expect("staged twice is staged");
    let bound = world.bound().await;
    assert_eq!(bound, Some(VolumeKey::derive(RIGHT.as_bytes(), SALT).unwrap().check()));
    let wrong = node.stage(&world, Some(WRONG)).await.unwrap_err();
    assert_eq!(wrong.code(), Code::FailedPrecondition, "{wrong}");
    assert!(!wrong.message().contains(WRONG), "{wrong}");
    assert_eq!(node.stage(&world, None).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(world.bound().await, bound);
    assert_eq!(world.keys(), [key_of(RIGHT), key_of(RIGHT)]);
}

#[tokio::test(flavor = "multi_thread")]
async fn of_twins_with_different_secrets_one_key_wins_and_the_other_is_never_attached() {
    for round in 0..6 {
        let world = World::start(EncryptionKind::AesXts).await;
        // As after a restart whose predecessor still works on its call.
        let (one, other) =
            (world.node(Arc::clone(&world.store)).await, world.node(Arc::clone(&world.store)).await);
        let (first, second) = tokio::join!(one.stage(&world, Some(RIGHT)), other.stage(&world, Some(WRONG)));
        assert!(first.is_ok() != second.is_ok(), "round {round}: {first:?}, {second:?}");
        let (won, lost) = if first.is_ok() { (RIGHT, second) } else { (WRONG, first) };
        assert_eq!(lost.unwrap_err().code(), Code::FailedPrecondition);
        assert_eq!(world.keys(), [key_of(won)]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_swap_whose_answer_is_lost_attaches_nothing_and_the_next_call_finds_out() {
    for happened in [false, true] {
        let world = World::start(EncryptionKind::AesXts).await;
        let cut = Cut::after(0, happened);
        let store = Arc::new(CutStore { store: Arc::clone(&world.store), cut: cut.clone() });
        let status = world.node(store).await.stage(&world, Some(RIGHT)).await.unwrap_err();
        assert!(cut.was_reached());
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        assert!(world.keys().is_empty());
        let node = world.node(Arc::clone(&world.store)).await;
        if happened {
            assert_eq!(node.stage(&world, Some(WRONG)).await.unwrap_err().code(), Code::FailedPrecondition);
            node.stage(&world, Some(RIGHT)).await.unwrap();
        } else {
            node.stage(&world, Some(WRONG)).await.expect("nobody has bound it");
            assert_eq!(node.stage(&world, Some(RIGHT)).await.unwrap_err().code(), Code::FailedPrecondition);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_is_not_encrypted_gets_no_key_whatever_secrets_come() {
    let world = World::start(EncryptionKind::None).await;
    let node = world.node(Arc::clone(&world.store)).await;
    node.stage(&world, Some(RIGHT)).await.unwrap();
    node.stage(&world, None).await.unwrap();
    assert!(world.keys().iter().all(Vec::is_empty) && world.keys().len() == 2);
    assert_eq!(world.store.read(world.record.volume_id).await.unwrap().record, world.record);
}

/// A raw block volume that is published to node-a as attachment 7.
struct World {
    store: Arc<dyn RecordStore>,
    record: VolumeRecord,
    keys: Arc<Mutex<Vec<Vec<u8>>>>,
    dir: TempDir,
}

impl World {
    async fn start(kind: EncryptionKind) -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("kubelet")).unwrap();
        let keys = Arc::new(Mutex::default());
        let listener = bind_unix(&dir.path().join("data.sock")).await.unwrap();
        let router = server().add_service(DataServer::new(Keys(Arc::clone(&keys))));
        tokio::spawn(serve_unix(router, listener, std::future::pending()));
        let mut record = VolumeRecord {
            attached_to: Some(NodeName("node-a".to_owned())),
            attachment: Attachment(7),
            ..mk_record(0xab, "data", &["node-a"])
        };
        record.params.fs_type.clear();
        record.params.encryption = kind;
        record.encryption = (!kind.is_none()).then_some(Encryption { salt: SALT, key_check: None });
        let store = Arc::new(SledStore::open(&dir.path().join("store")).unwrap());
        store.create(record.clone()).await.unwrap();
        Self { store, record, keys, dir }
    }

    async fn node(&self, store: Arc<dyn RecordStore>) -> Node {
        let config = NodeConfig {
            node: NodeName("node-a".to_owned()),
            zone: None,
            volumes_max: None,
            data_socket: self.dir.path().join("data.sock"),
            kubelet_dir: self.dir.path().join("kubelet"),
        };
        let socket = tempfile::Builder::new().tempdir_in(self.dir.path()).unwrap().keep().join("csi.sock");
        let listener = bind_unix(&socket).await.unwrap();
        let router = server().add_service(NodeServer::new(NodeService::new(config, store).unwrap()));
        tokio::spawn(serve_unix(router, listener, std::future::pending()));
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        Node(NodeClient::new(endpoint.connect().await.unwrap()))
    }

    async fn bound(&self) -> Option<holdfast_storage_core::ids::KeyCheck> {
        self.store.read(self.record.volume_id).await.unwrap().record.encryption.unwrap().key_check
    }

    fn keys(&self) -> Vec<Vec<u8>> {
        self.keys.lock().unwrap().clone()
    }
}

struct Node(NodeClient<Channel>);

impl Node {
    async fn stage(&self, world: &World, secret: Option<&str>) -> Result<(), Status> {
        let secrets = secret.map(|text| ("encryption-passphrase".to_owned(), text.to_owned()));
        let request = NodeStageVolumeRequest {
            volume_id: world.record.volume_id.to_string(),
            publish_context: HashMap::from([("attachment".to_owned(), "7".to_owned())]),
            staging_target_path: world.dir.path().join("kubelet/staging").display().to_string(),
            volume_capability: Some(mk_block()),
            secrets: secrets.into_iter().collect(),
            ..NodeStageVolumeRequest::default()
        };
        self.0.clone().node_stage_volume(request).await.map(drop)
    }
}

/// A data process that writes down the key of each attach.
struct Keys(Arc<Mutex<Vec<Vec<u8>>>>);

#[tonic::async_trait]
impl Data for Keys {
    async fn attach(&self, request: Request<AttachRequest>) -> Result<Response<AttachReply>, Status> {
        self.0.lock().unwrap().push(request.into_inner().key);
        Ok(Response::new(AttachReply { device: "/dev/null".to_owned(), generation: 1 }))
    }

    async fn detach(&self, _: Request<DetachRequest>) -> Result<Response<DetachReply>, Status> {
        Ok(Response::new(DetachReply {}))
    }

    async fn get_status(&self, _: Request<GetStatusRequest>) -> Result<Response<GetStatusReply>, Status> {
        Err(Status::not_found("not attached"))
    }

    async fn scrub(&self, _: Request<ScrubRequest>) -> Result<Response<ScrubReply>, Status> {
        Err(Status::unimplemented("nobody asks for it here"))
    }

    async fn count_allocated(
        &self,
        _: Request<CountAllocatedRequest>,
    ) -> Result<Response<CountAllocatedReply>, Status> {
        Err(Status::unimplemented("nobody asks for it here"))
    }
}
