//! One data process: starts and stops everything a node's storage half runs.
//!
//! ```text
//!  hf-control   gRPC services and calls, record store, heartbeats; waits for no disk
//!  hf-pulse     timers of all state machines; waits for nothing else
//!  hf-accept    takes other nodes' connections
//!  hf-nbd-*     one per connection of another node's session: its requests and their disk I/O
//!  hf-vol-*     one per attached volume: its NBD connections, local clients, the local replica's disk I/O
//!  hf-ring      disk I/O of everything else
//! ```

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use holdfast_frontend::FuseLoop;
use holdfast_io::BlockDevice;
use holdfast_nbd::Server as NbdServer;
use holdfast_proto::storage::data_server::DataServer;
use holdfast_proto::storage::pool_server::PoolServer;
use holdfast_proto::storage::replica_server::ReplicaServer;
use holdfast_proto::storage::volume_jobs_server::VolumeJobsServer;
use holdfast_service::serve;
use holdfast_storage_core::encryption::VolumeKey;
use holdfast_storage_core::ids::{Attachment, VolumeId};
use holdfast_storage_core::node_directory::{NodeDirectory, NodeInfo};
use holdfast_storage_core::record_store::RecordStore;
use holdfast_storage_core::target::TargetStatus;
use holdfast_storage_core::timers;
use holdfast_store::{Pool, PoolOptions};
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::UnixListenerStream;
use tonic::transport::Server;

use crate::config::{ANNOUNCE_INTERVAL, DataConfig, FrontEndKind};
use crate::data_service::DataService;
use crate::host;
use crate::jobs_service::JobsService;
use crate::nbd_listener;
use crate::nbd_threads::NbdThreads;
use crate::node::NodeContext;
use crate::peers::Peers;
use crate::pool_service::PoolService;
use crate::pulse::Pulse;
use crate::replica::grpc::ReplicaService;
use crate::replica::host::ReplicaHost;
use crate::replica::provider::{InspectExports, ReplicaExports};
use crate::target::table::Volumes;
use crate::target::volume::AttachError;
use crate::thread_runtime::ThreadRuntime;
use crate::tls::TlsMaterial;
use crate::wire;

/// How long the pool's lock is waited for: a killed predecessor's last I/O must land first (R3).
const POOL_LOCK_WAIT: Duration = Duration::from_secs(30);
/// Bytes of the pool's file system that are left alone.
const POOL_RESERVE_BYTES: u64 = 64 << 20;

/// Socket in the folder for local NBD clients at which this node's replicas can be looked at.
const INSPECT_SOCKET: &str = "replicas.sock";

/// Why a data process could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener could not be opened.
    #[error("cannot listen on {address} for {service}: {source}")]
    Listen {
        /// What was to listen.
        service: &'static str,
        /// Where.
        address: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A folder could not be made or read.
    #[error("folder {path} cannot be used: {source}")]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The pool could not be opened.
    #[error("pool {path} cannot be opened: {reason}")]
    Pool {
        /// Its folder.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// The kernel gives no thread.
    #[error("a thread cannot be started: {0}")]
    Thread(std::io::Error),
}

/// A running data process. Dropping it without [`DataProcess::shutdown`] is a crash: no lease is released.
pub struct DataProcess {
    node: Arc<NodeContext>,
    volumes: Arc<Volumes>,
    control: ThreadRuntime,
    nbd: ThreadRuntime,
    sessions: Arc<NbdThreads>,
    control_address: SocketAddr,
    nbd_address: SocketAddr,
}

struct Listeners {
    control: TcpListener,
    nbd: TcpListener,
    data: UnixListener,
    inspect: Option<UnixListener>,
}

impl DataProcess {
    /// Opens the pool, starts the servers and announces the node. It returns once requests are taken.
    ///
    /// # Errors
    /// A listener, folder or the pool cannot be opened; nothing keeps running then.
    pub async fn start(
        config: DataConfig,
        store: Arc<dyn RecordStore>,
        directory: Arc<dyn NodeDirectory>,
    ) -> Result<Self, StartError> {
        for (name, value) in timers::table() {
            tracing::debug!(name, value, "timer");
        }
        make_folders(&config)?;
        let control = ThreadRuntime::start("hf-control").map_err(StartError::Thread)?;
        let nbd = ThreadRuntime::start("hf-accept").map_err(StartError::Thread)?;
        let pulse = Pulse::start().map_err(StartError::Thread)?;
        let replicas = open_pool(&config, pulse.clone(), control.handle().clone()).await?;
        clean_stale(&config).await;

        let peers = Arc::new(Peers::new(Arc::clone(&directory), config.tls.clone()));
        let listeners = bind(&config, &control, &nbd)?;
        let control_address = address_of(&listeners.control, config.control_listen);
        let nbd_address = address_of(&listeners.nbd, config.nbd_listen);
        let info = NodeInfo {
            name: config.node.clone(),
            control_address: config.control_advertise.clone().unwrap_or_else(|| control_address.to_string()),
            nbd_address: config.nbd_advertise.clone().unwrap_or_else(|| nbd_address.to_string()),
            capacity_bytes: config.pool_capacity_bytes,
            available_bytes: 0,
            zone: config.zone.clone(),
            pool_class: config.pool_class.clone(),
            volumes_max: config.volumes_max,
        };
        let node = Arc::new(NodeContext {
            config,
            store,
            peers,
            replicas,
            pulse,
            control: control.handle().clone(),
        });
        let volumes = Arc::new(Volumes::new(Arc::clone(&node)));
        let sessions = start_services(&node, &volumes, listeners, &control, &nbd, nbd_address.port());
        control.handle().spawn(announce(Arc::clone(&node), directory, info));
        tracing::info!(node = %node.config.node, control = %control_address, nbd = %nbd_address, "the data process serves");
        Ok(Self { node, volumes, control, nbd, sessions, control_address, nbd_address })
    }

    /// Starts the volume's target for an attachment and exposes it, as the Data service's Attach does.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub async fn attach(&self, volume: VolumeId, attachment: Attachment) -> Result<(), AttachError> {
        self.attach_with(volume, attachment, None).await
    }

    /// [`DataProcess::attach`] of an encrypted volume, with its key.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub async fn attach_with(
        &self,
        volume: VolumeId,
        attachment: Attachment,
        key: Option<VolumeKey>,
    ) -> Result<(), AttachError> {
        let volumes = Arc::clone(&self.volumes);
        let attach =
            self.control.handle().spawn(async move { volumes.attach(volume, attachment, key).await });
        let stopping =
            |_| AttachError::FrontEnd { volume, reason: "the data process is stopping".to_owned() };
        attach.await.map_err(stopping)?.map(|_| ())
    }

    /// Flushes and stops the volume's target, as the Data service's Detach does.
    ///
    /// # Errors
    /// See [`AttachError`].
    pub async fn detach(&self, volume: VolumeId) -> Result<(), AttachError> {
        let volumes = Arc::clone(&self.volumes);
        let detach = self.control.handle().spawn(async move { volumes.detach(volume).await });
        let stopping =
            |_| AttachError::FrontEnd { volume, reason: "the data process is stopping".to_owned() };
        detach.await.map_err(stopping)?
    }

    /// An attached volume's target as a block device.
    #[must_use]
    pub fn device(&self, volume: VolumeId) -> Option<Arc<dyn BlockDevice>> {
        self.volumes.get(volume)?.device()
    }

    /// An attached volume's target.
    #[must_use]
    pub fn status(&self, volume: VolumeId) -> Option<TargetStatus> {
        Some(self.volumes.get(volume)?.status())
    }

    /// Begins a pass of the scrub over an attached volume, as the Data service's Scrub does.
    pub fn scrub(&self, volume: VolumeId) {
        if let Some(volume) = self.volumes.get(volume) {
            volume.scrub();
        }
    }

    /// Flushes and stops every target, releases its leases, closes the replicas and stops the servers.
    pub async fn shutdown(self) {
        self.volumes.detach_all().await;
        self.node.replicas.stop_in_order().await;
        self.abort();
        tracing::info!("the data process stopped");
    }

    /// Stops as a crash does: nothing is flushed or released. Blocks for a moment.
    pub fn abort(mut self) {
        self.volumes.abandon_all();
        self.node.replicas.stop();
        self.nbd.stop();
        self.sessions.stop();
        self.control.stop();
    }

    /// Where the control services listen.
    #[must_use]
    pub fn control_address(&self) -> SocketAddr {
        self.control_address
    }

    /// Where the NBD server listens.
    #[must_use]
    pub fn nbd_address(&self) -> SocketAddr {
        self.nbd_address
    }
}

fn make_folders(config: &DataConfig) -> Result<(), StartError> {
    let folders = [Some(&config.pool_dir), Some(&config.cookie_dir), Some(&config.run_dir)];
    for folder in folders.into_iter().flatten().chain(config.nbd_client_dir.as_ref()) {
        std::fs::create_dir_all(folder)
            .map_err(|source| StartError::Folder { path: folder.clone(), source })?;
    }
    Ok(())
}

async fn open_pool(
    config: &DataConfig,
    pulse: Pulse,
    control: tokio::runtime::Handle,
) -> Result<Arc<ReplicaHost>, StartError> {
    let options = PoolOptions {
        capacity_bytes: config.pool_capacity_bytes,
        reserve_bytes: POOL_RESERVE_BYTES,
        cookie_dir: Some(config.cookie_dir.clone()),
        lock_wait: POOL_LOCK_WAIT,
    };
    let (path, without_checksums) = (config.pool_dir.clone(), config.without_checksums);
    let open = move |path: &Path| {
        let pool = Pool::open(path, options).map_err(|error| error.to_string())?;
        if without_checksums {
            stop_checksums(&pool)?;
        }
        ReplicaHost::open(pool, pulse, control).map_err(|error| error.to_string())
    };
    let dir = path.clone();
    let opened = tokio::task::spawn_blocking(move || open(&dir)).await;
    opened.unwrap_or_else(|error| Err(error.to_string())).map_err(|reason| StartError::Pool { path, reason })
}

fn stop_checksums(pool: &Pool) -> Result<(), String> {
    if !pool.list().map_err(|error| error.to_string())?.is_empty() {
        return Err(
            "it has replicas: without checksums only an empty pool may be used, for a measurement".to_owned()
        );
    }
    tracing::warn!("checksums are off: what is written to this pool is to be thrown away");
    holdfast_store::hot::stop_checksums();
    Ok(())
}

/// What a killed predecessor left in the kernel: its loop devices answer nothing any more.
async fn clean_stale(config: &DataConfig) {
    if config.front_end == FrontEndKind::None {
        return;
    }
    let dir = config.run_dir.clone();
    let cleaned = tokio::task::spawn_blocking(move || FuseLoop::clean_stale(&dir)).await;
    match cleaned {
        Ok(Ok(cleaned)) if cleaned.cleared.is_empty() && cleaned.busy.is_empty() => {}
        Ok(Ok(cleaned)) => tracing::info!(?cleaned, "block devices of an earlier process were cleaned up"),
        Ok(Err(error)) => {
            tracing::warn!(%error, "block devices of an earlier process could not be cleaned up")
        }
        Err(error) => tracing::warn!(%error, "cleaning up did not end"),
    }
}

fn bind(config: &DataConfig, control: &ThreadRuntime, nbd: &ThreadRuntime) -> Result<Listeners, StartError> {
    let tcp = |runtime: &ThreadRuntime, service, address: SocketAddr| {
        let _inside = runtime.handle().enter();
        std::net::TcpListener::bind(address)
            .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
            .and_then(TcpListener::from_std)
            .map_err(|source| StartError::Listen { service, address: address.to_string(), source })
    };
    let unix = |runtime: &ThreadRuntime, service, path: &Path| {
        let _inside = runtime.handle().enter();
        let address = path.display().to_string();
        host::listen_unix(path).map_err(|source| StartError::Listen { service, address, source })
    };
    let inspect = config.nbd_client_dir.as_ref().map(|dir| dir.join(INSPECT_SOCKET));
    Ok(Listeners {
        control: tcp(control, "control", config.control_listen)?,
        nbd: tcp(nbd, "NBD", config.nbd_listen)?,
        data: unix(control, "the CSI node service", &config.data_socket)?,
        inspect: inspect.map(|path| unix(nbd, "looking at replicas", &path)).transpose()?,
    })
}

fn address_of(listener: &TcpListener, asked: SocketAddr) -> SocketAddr {
    listener.local_addr().unwrap_or(asked)
}

fn start_services(
    node: &Arc<NodeContext>,
    volumes: &Arc<Volumes>,
    listeners: Listeners,
    control: &ThreadRuntime,
    nbd: &ThreadRuntime,
    nbd_port: u16,
) -> Arc<NbdThreads> {
    let tls = node.config.tls.as_ref();
    let replica_service = ReplicaService { host: Arc::clone(&node.replicas), nbd_port, tls: tls.is_some() };
    let replica_service = ReplicaServer::new(replica_service)
        .max_decoding_message_size(wire::MESSAGE_BYTES_MAX)
        .max_encoding_message_size(wire::MESSAGE_BYTES_MAX);
    let pool_service =
        PoolService { node: node.config.node.clone(), host: Arc::clone(&node.replicas), tls: tls.is_some() };
    let mut nbd_server = NbdServer::new(Arc::new(ReplicaExports::new(&node.replicas)));
    if let Some(tls) = tls {
        nbd_server = nbd_server.with_tls(tls.nbd_server());
    }
    let jobs_service = JobsService { volumes: Arc::clone(volumes), tls: tls.is_some() };
    let control_server = serve::server()
        .add_service(replica_service)
        .add_service(PoolServer::new(pool_service))
        .add_service(VolumeJobsServer::new(jobs_service));
    let grpc_tls = tls.map(TlsMaterial::grpc_server);
    // It ends with its runtime.
    let serving = serve::serve_tcp(control_server, listeners.control, grpc_tls, std::future::pending());
    control.handle().spawn(report("control", serving));
    let data_service = DataService { volumes: Arc::clone(volumes) };
    let data_server = Server::builder()
        .add_service(DataServer::new(data_service))
        .serve_with_incoming(UnixListenerStream::new(listeners.data));
    control.handle().spawn(report("data", data_server));
    let nbd_threads = NbdThreads::new(nbd_server);
    nbd.handle().spawn(Arc::clone(&nbd_threads).accept(listeners.nbd));
    if let Some(listener) = listeners.inspect {
        let server = NbdServer::new(Arc::new(InspectExports::new(&node.replicas)));
        nbd.handle().spawn(nbd_listener::serve_unix(listener, server));
    }
    nbd_threads
}

async fn report(service: &'static str, server: impl Future<Output = Result<(), tonic::transport::Error>>) {
    if let Err(error) = server.await {
        tracing::error!(service, %error, "a service ended");
    }
}

/// Makes this node known, and the other nodes known here, until the process ends.
async fn announce(node: Arc<NodeContext>, directory: Arc<dyn NodeDirectory>, mut info: NodeInfo) {
    let mut trouble = None;
    loop {
        let replicas = Arc::clone(&node.replicas);
        if let Ok(Ok(space)) = tokio::task::spawn_blocking(move || replicas.space()).await {
            info.capacity_bytes = space.capacity_bytes;
            info.available_bytes = space.available_bytes;
        }
        let announced = match tokio::time::timeout(ANNOUNCE_INTERVAL, directory.announce(info.clone())).await
        {
            Ok(announced) => announced.map_err(|error| error.to_string()),
            Err(_) => Err("no answer in time".to_owned()),
        };
        // Once per cause: a registry that is away for long, or a foreign certificate, would fill the log.
        match announced {
            Ok(()) => trouble = None,
            Err(sentence) if trouble.as_ref() == Some(&sentence) => {}
            Err(sentence) => {
                tracing::warn!(node = %info.name, error = %sentence, "the registry does not take this node's announcement; it is tried on");
                trouble = Some(sentence);
            }
        }
        node.peers.refresh().await;
        tokio::time::sleep(ANNOUNCE_INTERVAL).await;
    }
}
