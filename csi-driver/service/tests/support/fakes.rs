//! Pools and stores that obey the real rules and can be cut off at any step.

use std::collections::BTreeMap;
use std::pin::Pin;
use std::sync::atomic::{AtomicI64, Ordering};
use std::sync::{Arc, Mutex};

use holdfast_proto::storage::pool_server::{Pool, PoolServer};
use holdfast_proto::storage::volume_jobs_server::VolumeJobsServer;
use holdfast_proto::storage::{
    BlockRun, CreateReplicaReply, CreateReplicaRequest, DeleteReplicaReply, DeleteReplicaRequest,
    GetPoolReply, GetPoolRequest, KeptRecord, KnownMeta, ReadRecordsReply, ReadRecordsRequest,
    ReadSnapshotBlocksReply, ReadSnapshotBlocksRequest,
};
use holdfast_service::NodeBook;
use holdfast_storage_core::group::{GroupRecord, VersionedGroup};
use holdfast_storage_core::ids::{GroupId, NodeName, RecordVersion, VolumeId};
use holdfast_storage_core::node_directory::{NodeDirectory, NodeInfo};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::{GroupStore, RecordStore, StoreError, StoreFuture, Versioned};
use tokio::net::TcpListener;
use tokio_stream::wrappers::TcpListenerStream;
use tonic::transport::Server;
use tonic::{Request, Response, Status};

/// After how many changes the world stands still for the controller, as it does for one that is killed.
#[derive(Clone)]
pub struct Cut {
    left: Arc<AtomicI64>,
    /// The change at the cut happens, and only its answer is lost.
    happens: bool,
}

/// What becomes of one change.
pub enum Fate {
    Normal,
    AnswerLost,
    Nothing,
}

impl Cut {
    pub fn never() -> Self {
        Self { left: Arc::new(AtomicI64::new(i64::MAX)), happens: false }
    }

    pub fn after(changes: i64, happens: bool) -> Self {
        Self { left: Arc::new(AtomicI64::new(changes)), happens }
    }

    pub fn was_reached(&self) -> bool {
        self.left.load(Ordering::SeqCst) < 0
    }

    fn change<'a, T: Send + 'a>(&self, work: impl FnOnce() -> StoreFuture<'a, T>) -> StoreFuture<'a, T> {
        let lost = || Err(StoreError::Unknown("cut".to_owned()));
        match self.next() {
            Fate::Normal => work(),
            Fate::AnswerLost => {
                let work = work();
                Box::pin(async move {
                    drop(work.await);
                    lost()
                })
            }
            Fate::Nothing => Box::pin(std::future::ready(lost())),
        }
    }

    pub fn next(&self) -> Fate {
        match self.left.fetch_sub(1, Ordering::SeqCst) {
            1.. => Fate::Normal,
            0 if self.happens => Fate::AnswerLost,
            _ => Fate::Nothing,
        }
    }
}

/// A real store behind a cut.
pub struct CutStore {
    pub store: Arc<dyn RecordStore>,
    pub cut: Cut,
}

/// A real store whose changes take a while to begin.
pub struct SlowStore {
    pub store: Arc<dyn RecordStore>,
    pub delay: std::time::Duration,
}

impl RecordStore for SlowStore {
    fn read(&self, volume: VolumeId) -> StoreFuture<'_, Versioned> {
        self.store.read(volume)
    }

    fn list(&self) -> StoreFuture<'_, Vec<Arc<Versioned>>> {
        self.store.list()
    }

    fn create(&self, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        Box::pin(async move {
            tokio::time::sleep(self.delay).await;
            self.store.create(record).await
        })
    }

    fn swap(&self, expected: RecordVersion, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        Box::pin(async move {
            tokio::time::sleep(self.delay).await;
            self.store.swap(expected, record).await
        })
    }

    fn remove(&self, expected: RecordVersion, volume: VolumeId) -> StoreFuture<'_, ()> {
        self.store.remove(expected, volume)
    }
}

/// A real store in which something happens right after the first read.
pub struct MeddledStore {
    pub store: Arc<dyn RecordStore>,
    pub after_read: Mutex<Option<Meanwhile>>,
}

impl RecordStore for MeddledStore {
    fn read(&self, volume: VolumeId) -> StoreFuture<'_, Versioned> {
        Box::pin(async move {
            let found = self.store.read(volume).await;
            let meanwhile = self.after_read.lock().unwrap().take();
            if let Some(meanwhile) = meanwhile {
                meanwhile().await;
            }
            found
        })
    }

    fn list(&self) -> StoreFuture<'_, Vec<Arc<Versioned>>> {
        self.store.list()
    }

    fn create(&self, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        self.store.create(record)
    }

    fn swap(&self, expected: RecordVersion, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        self.store.swap(expected, record)
    }

    fn remove(&self, expected: RecordVersion, volume: VolumeId) -> StoreFuture<'_, ()> {
        self.store.remove(expected, volume)
    }
}

/// A real store of groups behind a cut.
pub struct CutGroups {
    pub groups: Arc<dyn GroupStore>,
    pub cut: Cut,
}

impl GroupStore for CutGroups {
    fn read_group(&self, group: GroupId) -> StoreFuture<'_, Option<VersionedGroup>> {
        self.groups.read_group(group)
    }

    fn list_groups(&self) -> StoreFuture<'_, Vec<VersionedGroup>> {
        self.groups.list_groups()
    }

    fn swap_group(
        &self,
        group: GroupId,
        expected: Option<RecordVersion>,
        record: Option<GroupRecord>,
    ) -> StoreFuture<'_, RecordVersion> {
        self.cut.change(|| self.groups.swap_group(group, expected, record))
    }
}

impl RecordStore for CutStore {
    fn read(&self, volume: VolumeId) -> StoreFuture<'_, Versioned> {
        self.store.read(volume)
    }

    fn list(&self) -> StoreFuture<'_, Vec<Arc<Versioned>>> {
        self.store.list()
    }

    fn create(&self, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        self.cut.change(|| self.store.create(record))
    }

    fn swap(&self, expected: RecordVersion, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        self.cut.change(|| self.store.swap(expected, record))
    }

    fn remove(&self, expected: RecordVersion, volume: VolumeId) -> StoreFuture<'_, ()> {
        self.cut.change(|| self.store.remove(expected, volume))
    }
}

/// What one pool holds: replica id to volume id and size.
pub type Replicas = BTreeMap<String, (String, u64)>;

/// What happens in the middle of something.
pub type Meanwhile = Arc<dyn Fn() -> Pin<Box<dyn Future<Output = ()> + Send>> + Send + Sync>;

/// One node's pool.
#[derive(Clone)]
pub struct FakePool {
    pub node: &'static str,
    /// The records that its volume jobs work on.
    pub store: Option<Arc<dyn RecordStore>>,
    pub state: Arc<Mutex<State>>,
    pub book: Arc<NodeBook>,
    control_address: String,
}

pub struct State {
    capacity_bytes: u64,
    replicas: Replicas,
    /// Replicas take no space before they are written, and nobody writes.
    pub thin: bool,
    pub cut: Cut,
    /// Targets that read their records anew.
    pub applied: Vec<String>,
    /// Volumes whose writes are held, by snapshot.
    pub holds: BTreeMap<String, String>,
    /// Blocks that each snapshot of each replica has, and in which any two differ.
    pub blocks: Vec<u64>,
    /// Asking for them fails.
    pub blocks_fail: bool,
    /// Runs in the middle of each snapshot.
    pub during_cut: Option<Meanwhile>,
    /// Creating fails with this sentence, after it was done or instead of it.
    create_fails: Option<(bool, &'static str)>,
    /// Calls wait for this long first.
    delay: std::time::Duration,
    /// What each replica keeps of its volume's record.
    pub kept: BTreeMap<String, KeptRecord>,
}

impl FakePool {
    /// What it has of a volume is deleted, and nobody is told.
    pub fn forget(&self, volume_id: &str) {
        let mut state = self.state.lock().unwrap();
        state.replicas.retain(|_, (volume, _)| volume != volume_id);
        state.kept.retain(|_, kept| kept.volume_id != volume_id);
    }

    /// Listens on loopback and announces the node.
    pub async fn start(
        node: &'static str,
        capacity_bytes: u64,
        book: &Arc<NodeBook>,
        store: Option<&Arc<dyn RecordStore>>,
    ) -> Self {
        let state = State {
            capacity_bytes,
            replicas: Replicas::new(),
            thin: false,
            cut: Cut::never(),
            applied: Vec::new(),
            holds: BTreeMap::new(),
            blocks: Vec::new(),
            blocks_fail: false,
            during_cut: None,
            create_fails: None,
            delay: std::time::Duration::ZERO,
            kept: BTreeMap::new(),
        };
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let control_address = listener.local_addr().unwrap().to_string();
        let state = Arc::new(Mutex::new(state));
        let pool = Self { node, store: store.cloned(), state, book: Arc::clone(book), control_address };
        let router = Server::builder()
            .add_service(PoolServer::new(pool.clone()))
            .add_service(VolumeJobsServer::new(pool.clone()));
        tokio::spawn(router.serve_with_incoming(TcpListenerStream::new(listener)));
        pool.announce(book).await;
        pool
    }

    /// The node says again that it lives.
    pub async fn announce(&self, book: &NodeBook) {
        let capacity_bytes = self.state.lock().unwrap().capacity_bytes;
        announce(book, self.node, &self.control_address, capacity_bytes).await;
    }

    pub fn replicas(&self) -> Replicas {
        self.state.lock().unwrap().replicas.clone()
    }

    pub fn set_cut(&self, cut: Cut) {
        self.state.lock().unwrap().cut = cut;
    }

    pub fn set_create_fails(&self, how: Option<(bool, &'static str)>) {
        self.state.lock().unwrap().create_fails = how;
    }

    pub fn set_delay(&self, delay: std::time::Duration) {
        self.state.lock().unwrap().delay = delay;
    }

    async fn pause(&self) {
        let delay = self.state.lock().unwrap().delay;
        tokio::time::sleep(delay).await;
    }
}

/// Makes a node known at an address.
pub async fn announce(book: &NodeBook, node: &str, control_address: &str, capacity_bytes: u64) {
    book.announce(mk_info(node, control_address, capacity_bytes)).await.unwrap();
}

/// Of a node without zone and limit.
pub fn mk_info(node: &str, control_address: &str, capacity_bytes: u64) -> NodeInfo {
    NodeInfo {
        name: NodeName(node.to_owned()),
        control_address: control_address.to_owned(),
        nbd_address: "127.0.0.1:1".to_owned(),
        capacity_bytes,
        available_bytes: capacity_bytes,
        zone: None,
        pool_class: None,
        volumes_max: None,
    }
}

#[tonic::async_trait]
impl Pool for FakePool {
    async fn get_pool(&self, _: Request<GetPoolRequest>) -> Result<Response<GetPoolReply>, Status> {
        self.pause().await;
        let state = self.state.lock().unwrap();
        if state.cut.was_reached() {
            return Err(Status::unavailable("cut"));
        }
        let used: u64 = if state.thin { 0 } else { state.replicas.values().map(|(_, bytes)| bytes).sum() };
        Ok(Response::new(GetPoolReply {
            node: self.node.to_owned(),
            capacity_bytes: state.capacity_bytes,
            available_bytes: state.capacity_bytes - used,
        }))
    }

    async fn create_replica(
        &self,
        request: Request<CreateReplicaRequest>,
    ) -> Result<Response<CreateReplicaReply>, Status> {
        self.pause().await;
        let request = request.into_inner();
        if !request.source_replica_id.is_empty() {
            self.check_source(&request).await?;
        }
        let mut state = self.state.lock().unwrap();
        let fate = state.cut.next();
        if let (Fate::Nothing, _) | (_, Some((false, _))) = (&fate, state.create_fails) {
            return Err(Status::unavailable("nothing was made"));
        }
        let kept = KeptRecord {
            replica_id: request.replica_id.clone(),
            volume_id: request.volume_id.clone(),
            copy: request.record.clone(),
            copy_error: String::new(),
            meta: Some(KnownMeta {
                lineage: request.lineage.clone(),
                generation: 0,
                epoch: request.epoch,
                size_bytes: request.size_bytes,
            }),
            holds_data: Some(false),
        };
        state.kept.insert(request.replica_id.clone(), kept);
        let shape = (request.volume_id, request.size_bytes);
        match state.replicas.get(&request.replica_id) {
            Some(other) if *other != shape => return Err(Status::already_exists("of another shape")),
            _ => drop(state.replicas.insert(request.replica_id, shape)),
        }
        match (fate, state.create_fails) {
            (Fate::AnswerLost, _) => Err(Status::unavailable("cut")),
            (_, Some((_, sentence))) => Err(Status::internal(sentence)),
            _ => Ok(Response::new(CreateReplicaReply {})),
        }
    }

    async fn read_records(
        &self,
        _: Request<ReadRecordsRequest>,
    ) -> Result<Response<ReadRecordsReply>, Status> {
        let replicas = self.state.lock().unwrap().kept.values().cloned().collect();
        Ok(Response::new(ReadRecordsReply { replicas, more: false }))
    }

    async fn read_snapshot_blocks(
        &self,
        request: Request<ReadSnapshotBlocksRequest>,
    ) -> Result<Response<ReadSnapshotBlocksReply>, Status> {
        let request = request.into_inner();
        if self.state.lock().unwrap().blocks_fail {
            return Err(Status::data_loss("a block does not verify"));
        }
        let end = request.start_block + request.blocks;
        let blocks = self.state.lock().unwrap().blocks.clone();
        let inside = blocks.into_iter().filter(|block| (request.start_block..end).contains(block));
        let runs = inside.map(|start_block| BlockRun { start_block, blocks: 1 }).collect();
        Ok(Response::new(ReadSnapshotBlocksReply { runs }))
    }

    async fn delete_replica(
        &self,
        request: Request<DeleteReplicaRequest>,
    ) -> Result<Response<DeleteReplicaReply>, Status> {
        self.pause().await;
        let mut state = self.state.lock().unwrap();
        let fate = state.cut.next();
        if let Fate::Nothing = fate {
            return Err(Status::unavailable("cut"));
        }
        let replica_id = request.into_inner().replica_id;
        state.replicas.remove(&replica_id);
        state.kept.remove(&replica_id);
        match fate {
            Fate::AnswerLost => Err(Status::unavailable("cut")),
            _ => Ok(Response::new(DeleteReplicaReply {})),
        }
    }
}
