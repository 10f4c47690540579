//! A store, pools and controllers that come and go.

use std::sync::Arc;

use holdfast_proto::csi::controller_client::ControllerClient;
use holdfast_proto::csi::controller_server::ControllerServer;
use holdfast_proto::csi::group_controller_server::GroupControllerServer;
use holdfast_proto::csi::identity_server::IdentityServer;
use holdfast_proto::csi::snapshot_metadata_server::SnapshotMetadataServer;
use holdfast_service::gate::Gate;
use holdfast_service::serve::{bind_unix, serve_unix, server};
use holdfast_service::{ControllerService, ControllerSettings, IdentityService, NodeBook, SledStore};
use holdfast_storage_core::ids::NodeName;
use holdfast_storage_core::node_directory::{NodeDirectory, NodeInfo, NodeStates};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::{GroupStore, RecordStore};
use tempfile::TempDir;
use tonic::transport::Endpoint;

use super::fakes::{Cut, CutGroups, CutStore, FakePool};
use super::requests::Controller;

pub const GIB: u64 = 1 << 30;

/// A store, pools and a place for sockets; controllers come and go.
pub struct World {
    pub store: Arc<dyn RecordStore>,
    pub groups: Arc<dyn GroupStore>,
    pub node_states: Arc<dyn NodeStates>,
    pub book: Arc<NodeBook>,
    pub pools: Vec<FakePool>,
    /// Of controllers that are started from now on.
    pub settings: ControllerSettings,
    dir: TempDir,
}

impl World {
    pub async fn start(nodes: &[&'static str]) -> Self {
        let nodes: Vec<_> = nodes.iter().map(|node| (*node, 100 * GIB)).collect();
        Self::start_with(&nodes).await
    }

    pub async fn start_with(nodes: &[(&'static str, u64)]) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let sled = SledStore::open(&dir.path().join("store")).unwrap();
        let groups: Arc<dyn GroupStore> = Arc::new(sled.clone());
        let node_states: Arc<dyn NodeStates> = Arc::new(sled.clone());
        let store: Arc<dyn RecordStore> = Arc::new(sled);
        let book = Arc::new(NodeBook::new());
        let mut pools = Vec::new();
        for (node, capacity_bytes) in nodes {
            pools.push(FakePool::start(node, *capacity_bytes, &book, Some(&store)).await);
        }
        Self { store, groups, node_states, book, pools, settings: ControllerSettings::default(), dir }
    }

    pub async fn controller(&self) -> Controller {
        self.serve(Arc::clone(&self.store), Arc::clone(&self.groups)).await
    }

    /// A controller for which the world stands still after so many changes.
    pub async fn cut_controller(&self, cut: &Cut) -> Controller {
        for pool in &self.pools {
            pool.set_cut(cut.clone());
        }
        let store = Arc::new(CutStore { store: Arc::clone(&self.store), cut: cut.clone() });
        let groups = Arc::new(CutGroups { groups: Arc::clone(&self.groups), cut: cut.clone() });
        self.serve(store, groups).await
    }

    pub fn heal(&self) {
        for pool in &self.pools {
            pool.set_cut(Cut::never());
        }
    }

    pub async fn serve(&self, store: Arc<dyn RecordStore>, groups: Arc<dyn GroupStore>) -> Controller {
        let socket = tempfile::Builder::new().tempdir_in(self.dir.path()).unwrap().keep().join("csi.sock");
        let listener = bind_unix(&socket).await.unwrap();
        let settings = self.settings.clone();
        let node_states = Arc::clone(&self.node_states);
        let book = Arc::clone(&self.book);
        let service = ControllerService::new(Arc::clone(&store), groups, node_states, book, settings);
        let router = server()
            .add_service(IdentityServer::new(IdentityService::controller(store, open_gate())))
            .add_service(GroupControllerServer::new(service.clone()))
            .add_service(SnapshotMetadataServer::new(service.clone()))
            .add_service(ControllerServer::new(service.clone()));
        tokio::spawn(serve_unix(router, listener, std::future::pending()));
        let channel =
            Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap().connect().await.unwrap();
        Controller(ControllerClient::new(channel.clone()), channel, service)
    }

    /// A node says something else of itself from now on.
    pub async fn announce_again(&self, node: &str, change: impl Fn(NodeInfo) -> NodeInfo) {
        let info = self.book.get(&NodeName(node.to_owned())).unwrap();
        self.book.announce(change(info)).await.unwrap();
    }

    pub fn pool(&self, node: &str) -> &FakePool {
        self.pools.iter().find(|pool| pool.node == node).unwrap()
    }

    /// Replicas of the volume on all pools.
    pub fn count(&self, volume_id: &str) -> usize {
        self.pools.iter().flat_map(FakePool::replicas).filter(|(_, (volume, _))| volume == volume_id).count()
    }

    pub async fn record(&self, volume_id: &str) -> VolumeRecord {
        self.store.read(volume_id.parse().unwrap()).await.unwrap().record
    }

    /// Changes a record behind the controller's back.
    pub async fn change(&self, volume_id: &str, change: impl Fn(&VolumeRecord) -> VolumeRecord) {
        let found = self.store.read(volume_id.parse().unwrap()).await.unwrap();
        self.store.swap(found.version, change(&found.record)).await.unwrap();
    }

    /// Every replica on a pool is named by some record, on that node.
    pub async fn assert_nothing_unlisted(&self) {
        let records = self.store.list().await.unwrap();
        for pool in &self.pools {
            for (replica, (volume, _)) in pool.replicas() {
                let listed = records.iter().any(|found| {
                    found.record.volume_id.to_string() == volume
                        && found
                            .record
                            .replicas
                            .get(&replica.parse().unwrap())
                            .is_some_and(|r| r.node.0 == pool.node)
                });
                assert!(listed, "replica {replica} on {} is forgotten", pool.node);
            }
        }
    }

    pub async fn assert_empty(&self) {
        assert!(self.store.list().await.unwrap().is_empty());
        for pool in &self.pools {
            assert!(pool.replicas().is_empty(), "{} keeps a replica", pool.node);
        }
    }
}

fn open_gate() -> Gate {
    let gate = Gate::default();
    gate.open();
    gate
}
