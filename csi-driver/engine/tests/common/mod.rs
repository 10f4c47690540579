//! Three data processes in one test process, on loopback ports, with temporary pools and a record store in memory.
#![allow(dead_code, clippy::unwrap_used, missing_docs)]

pub mod cut;
pub mod store;

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use holdfast_engine::{DataConfig, DataProcess, FrontEndKind, TlsMaterial};
use holdfast_io::{BlockDevice, BlockError, BlockOp};
use holdfast_proto::storage as pb;
use holdfast_proto::storage::pool_client::PoolClient;
use holdfast_proto::storage::volume_jobs_client::VolumeJobsClient;
use holdfast_service::tls::CONTROLLER_NAME;
use holdfast_storage_core::ids::{Attachment, Lineage, NodeName, ReplicaId, SnapshotId, VolumeId};
use holdfast_storage_core::record::{VolumeParams, VolumeRecord};
use holdfast_storage_core::transitions::{self, NewVolume};
use rand::Rng;
use store::MemStore;
use tonic::transport::{Channel, Endpoint};

pub const MIB: u64 = 1 << 20;

pub struct Cluster {
    pub dir: tempfile::TempDir,
    /// On tmpfs, as the cookie demands.
    pub cookies: tempfile::TempDir,
    pub store: Arc<MemStore>,
    pub nodes: Vec<Node>,
    /// Issued the nodes' certificates; none where everything is plain text.
    pub authority: Option<Authority>,
    pub client_dir: Option<PathBuf>,
}

pub struct Node {
    pub name: NodeName,
    pub process: Option<DataProcess>,
    pub tls_dir: Option<PathBuf>,
    /// How the node sees the others; cutting it cuts what the node connects, not what others connect to it.
    pub view: Arc<cut::View>,
    /// Changing it takes effect at the node's next start.
    pub pool_capacity_bytes: u64,
    /// An address of its own: on 127.0.0.1 a connection that goes out could take the port while the node is down.
    address: Ipv4Addr,
    ports: (u16, u16),
}

impl Cluster {
    pub async fn start(count: usize) -> Self {
        Self::start_with(count, false).await
    }

    pub async fn start_with(count: usize, tls: bool) -> Self {
        Self::start_in(tempfile::tempdir().unwrap(), count, tls, None).await
    }

    pub async fn start_in(
        dir: tempfile::TempDir,
        count: usize,
        tls: bool,
        client_dir: Option<PathBuf>,
    ) -> Self {
        let _ = tracing_subscriber::fmt()
            .with_env_filter(tracing_subscriber::EnvFilter::from_default_env())
            .with_test_writer()
            .try_init();
        let cookies = tempfile::tempdir_in("/dev/shm").unwrap();
        let authority = tls.then(Authority::new);
        let store = Arc::new(MemStore::default());
        let mut cluster = Self { dir, cookies, store, nodes: Vec::new(), authority, client_dir };
        let net: [u8; 2] = [rand::rng().random_range(1..=254), rand::rng().random()];
        for index in 0..u8::try_from(count).unwrap() {
            let name = NodeName(format!("node-{}", char::from(b'a' + index)));
            let tls_dir = cluster.issue(&name.0);
            let view = cut::View::new(name.clone(), cluster.store.clone());
            cluster.nodes.push(Node {
                name,
                process: None,
                tls_dir,
                view,
                pool_capacity_bytes: 4 << 30,
                address: Ipv4Addr::new(127, net[0], net[1], index + 1),
                ports: (0, 0),
            });
            cluster.start_node(index.into()).await;
        }
        cluster
    }

    pub async fn start_node(&mut self, index: usize) {
        let config = self.config(index);
        let view = self.nodes[index].view.clone();
        let process = DataProcess::start(config, view.clone(), view).await.unwrap();
        let node = &mut self.nodes[index];
        // The same ports after a restart, as a real node has.
        node.ports = (process.control_address().port(), process.nbd_address().port());
        node.process = Some(process);
    }

    /// Ends a process as `kill -9` does: nothing is flushed or released.
    pub fn kill(&mut self, index: usize) {
        self.nodes[index].process.take().unwrap().abort();
    }

    pub fn process(&self, index: usize) -> &DataProcess {
        self.nodes[index].process.as_ref().unwrap()
    }

    pub fn config(&self, index: usize) -> DataConfig {
        let node = &self.nodes[index];
        let dir = self.dir.path().join(&node.name.0);
        for sub in ["pool", "run"] {
            std::fs::create_dir_all(dir.join(sub)).unwrap();
        }
        DataConfig {
            zone: None,
            pool_class: None,
            volumes_max: None,
            node: node.name.clone(),
            pool_dir: dir.join("pool"),
            pool_capacity_bytes: node.pool_capacity_bytes,
            cookie_dir: self.cookies.path().join(&node.name.0),
            control_listen: SocketAddr::from((node.address, node.ports.0)),
            nbd_listen: SocketAddr::from((node.address, node.ports.1)),
            control_advertise: None,
            nbd_advertise: None,
            data_socket: dir.join("run/data.sock"),
            nbd_client_dir: self.client_dir.as_ref().map(|dir| dir.join(&node.name.0)),
            run_dir: dir.join("run/mounts"),
            tls: node.tls_dir.as_deref().map(|dir| TlsMaterial::load(dir).unwrap()),
            without_checksums: false,
            front_end: FrontEndKind::None,
            attach_timeout: Duration::from_secs(30),
        }
    }

    /// Makes a volume with one replica on each node, as the controller does.
    pub async fn create_volume(&self, size_bytes: u64) -> VolumeId {
        self.create_volume_on(&(0..self.nodes.len()).collect::<Vec<_>>(), size_bytes).await
    }

    /// The same on some nodes only.
    pub async fn create_volume_on(&self, nodes: &[usize], size_bytes: u64) -> VolumeId {
        self.create_volume_from(None, nodes, size_bytes).await
    }

    /// The same, from a snapshot that these nodes hold.
    pub async fn create_volume_from(
        &self,
        source: Option<(VolumeId, SnapshotId)>,
        nodes: &[usize],
        size_bytes: u64,
    ) -> VolumeId {
        let volume_id = VolumeId(rand::rng().random());
        if let Some((volume, snapshot)) = source {
            let clone = |record: &mut VolumeRecord| {
                *record = transitions::add_clone(record, snapshot, volume_id).unwrap();
            };
            self.store.update(volume, clone);
        }
        let record = transitions::create(NewVolume {
            volume_id,
            name: format!("vol-{volume_id}"),
            lineage: Lineage(rand::rng().random()),
            size_bytes,
            epoch_nonce: rand::rng().random(),
            replicas: nodes
                .iter()
                .map(|n| (ReplicaId(rand::rng().random()), self.nodes[*n].name.clone()))
                .collect(),
            params: VolumeParams::new(u32::try_from(nodes.len()).unwrap(), ""),
            encryption: None,
            source: None,
        });
        for &index in nodes {
            let node = &self.nodes[index];
            let (replica, _) = record.replicas.iter().find(|(_, r)| r.node == node.name).unwrap();
            let request = pb::CreateReplicaRequest {
                volume_id: volume_id.to_string(),
                replica_id: replica.to_string(),
                lineage: record.lineage.to_string(),
                size_bytes,
                epoch: Some(pb::Epoch { number: record.epoch.number, nonce: record.epoch.nonce }),
                source_replica_id: source
                    .map(|(v, _)| self.replica_on(v, index).to_string())
                    .unwrap_or_default(),
                source_snapshot_id: source.map(|(_, s)| s.to_string()).unwrap_or_default(),
                record: None,
            };
            self.pool_client(index).await.create_replica(request).await.unwrap();
        }
        use holdfast_storage_core::record_store::RecordStore;
        self.store.create(record).await.unwrap();
        volume_id
    }

    /// A folder with a certificate for `name`, if the cluster has certificates.
    pub fn issue(&self, name: &str) -> Option<PathBuf> {
        let dir = self.dir.path().join(name).join("tls");
        if !dir.exists() {
            self.authority.as_ref()?.issue(name, &dir);
        }
        Some(dir)
    }

    /// A node's pool, as the controller reaches it.
    pub async fn pool_client(&self, index: usize) -> PoolClient<Channel> {
        let tls = self.issue(CONTROLLER_NAME);
        PoolClient::new(self.channel(index, tls.as_deref()).await.unwrap())
    }

    /// A node's volume jobs, as the controller reaches them.
    pub async fn jobs_client(&self, index: usize) -> VolumeJobsClient<Channel> {
        let tls = self.issue(CONTROLLER_NAME);
        VolumeJobsClient::new(self.channel(index, tls.as_deref()).await.unwrap())
    }

    /// A channel to a node's control services with the certificate in a folder, or in plain text.
    pub async fn channel(
        &self,
        index: usize,
        tls: Option<&Path>,
    ) -> Result<Channel, tonic::transport::Error> {
        let address = self.process(index).control_address();
        let endpoint = match tls {
            None => Endpoint::from_shared(format!("http://{address}"))?,
            Some(dir) => {
                let tls = TlsMaterial::load(dir).unwrap().tonic_client(&self.nodes[index].name.0);
                Endpoint::from_shared(format!("https://{address}"))?.tls_config(tls)?
            }
        };
        endpoint.connect().await
    }

    /// Publishes the volume to a node, wherever it was, as the controller does.
    pub fn publish(&self, volume: VolumeId, index: usize) -> Attachment {
        let node = self.nodes[index].name.clone();
        self.store.update(volume, |record| {
            let free = transitions::unpublish(record, None).unwrap();
            *record = transitions::publish(&free, &node, false).unwrap();
        });
        self.store.get(volume).record.attachment
    }

    /// Publishes and attaches; answers the target's device.
    pub async fn attach(&self, volume: VolumeId, index: usize) -> Arc<dyn BlockDevice> {
        let attachment = self.publish(volume, index);
        self.process(index).attach(volume, attachment).await.unwrap();
        self.process(index).device(volume).unwrap()
    }

    pub fn replica_on(&self, volume: VolumeId, index: usize) -> ReplicaId {
        let record = self.store.get(volume).record;
        *record.replicas.iter().find(|(_, r)| r.node == self.nodes[index].name).unwrap().0
    }

    /// Waits until the record names `count` members.
    pub async fn wait_members(&self, volume: VolumeId, count: usize, within: Duration) {
        let start = Instant::now();
        while self.store.get(volume).record.in_sync.len() != count {
            assert!(
                start.elapsed() < within,
                "not {count} members after {within:?}: {:?}",
                self.store.get(volume)
            );
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Checks that every replica that the record calls a member holds the same bytes: P5. The volume's writer must be
    /// idle. The replicas' files are opened after all processes stopped.
    pub async fn assert_members_equal(mut self, volume: VolumeId) {
        for node in &self.nodes {
            if let Some(process) = &node.process {
                process.detach(volume).await.unwrap();
            }
        }
        let record = self.store.get(volume).record;
        assert_eq!(record.in_sync.len(), record.replicas.len(), "a member was lost at the stop");
        for node in &mut self.nodes {
            if let Some(process) = node.process.take() {
                process.shutdown().await;
            }
        }
        let mut first: Option<(NodeName, Bytes)> = None;
        for replica in &record.in_sync {
            let node = &record.replicas[replica].node;
            let bytes = self.read_replica(node, *replica, record.size_bytes).await;
            match &first {
                None => first = Some((node.clone(), bytes)),
                Some((other, expected)) => {
                    let differs = expected.iter().zip(&bytes).position(|(a, b)| a != b);
                    assert_eq!(differs, None, "{other} and {node} differ from this byte on");
                }
            }
        }
    }

    async fn read_replica(&self, node: &NodeName, replica: ReplicaId, size_bytes: u64) -> Bytes {
        let dir = self.dir.path().join(&node.0);
        let options = holdfast_store::PoolOptions {
            capacity_bytes: 4 << 30,
            reserve_bytes: 0,
            cookie_dir: Some(self.cookies.path().join(&node.0)),
            lock_wait: Duration::from_secs(5),
        };
        let pool = holdfast_store::Pool::open(&dir.join("pool"), options).unwrap();
        let disk = pool.open_replica(replica).unwrap();
        let mut bytes = Vec::new();
        for offset in (0..size_bytes).step_by(MIB as usize) {
            let part = holdfast_store::wait(&disk, |done| disk.read(offset, MIB as u32, done)).await.unwrap();
            bytes.extend_from_slice(&part);
        }
        Bytes::from(bytes)
    }
}

pub async fn submit(device: &Arc<dyn BlockDevice>, op: BlockOp) -> Result<Bytes, BlockError> {
    let (tx, rx) = tokio::sync::oneshot::channel();
    device.submit(op, Box::new(move |result| drop(tx.send(result))));
    tokio::time::timeout(Duration::from_secs(60), rx).await.expect("I/O hangs").expect("completed once")
}

pub async fn write(device: &Arc<dyn BlockDevice>, offset: u64, data: Vec<u8>) -> Result<(), BlockError> {
    submit(device, BlockOp::Write { offset, data: Bytes::from(data), fua: false }).await.map(|_| ())
}

pub async fn read(device: &Arc<dyn BlockDevice>, offset: u64, len: u32) -> Result<Bytes, BlockError> {
    submit(device, BlockOp::Read { offset, len }).await
}

pub async fn flush(device: &Arc<dyn BlockDevice>) -> Result<(), BlockError> {
    submit(device, BlockOp::Flush).await.map(|_| ())
}

/// A page of bytes that tells its place and its version.
pub fn pattern(offset: u64, version: u64, len: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(len);
    let mut at = offset;
    while bytes.len() < len {
        bytes.extend_from_slice(&at.to_le_bytes());
        bytes.extend_from_slice(&version.to_le_bytes());
        at += 16;
    }
    bytes.truncate(len);
    bytes
}

/// A certificate authority of the test.
pub struct Authority {
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
    pem: String,
}

impl Authority {
    pub fn new() -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let cert = params.self_signed(&key).unwrap();
        Self { pem: cert.pem(), issuer: rcgen::Issuer::new(params, key) }
    }

    pub fn issue(&self, name: &str, dir: &Path) {
        self.issue_until(name, dir, 4096);
    }

    /// Issues a certificate that is no longer good from `year` on.
    pub fn issue_until(&self, name: &str, dir: &Path, year: i32) {
        std::fs::create_dir_all(dir).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut params = rcgen::CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.not_after = rcgen::date_time_ymd(year, 1, 1);
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        std::fs::write(dir.join("ca.pem"), &self.pem).unwrap();
        std::fs::write(dir.join("node.pem"), cert.pem()).unwrap();
        std::fs::write(dir.join("node.key"), key.serialize_pem()).unwrap();
    }
}
