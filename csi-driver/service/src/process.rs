//! The controller and the node process: everything put together, started and stopped.

use std::future::Future;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use futures::future::select_all;
use holdfast_proto::csi::controller_server::ControllerServer;
use holdfast_proto::csi::group_controller_server::GroupControllerServer;
use holdfast_proto::csi::identity_server::IdentityServer;
use holdfast_proto::csi::node_server::NodeServer;
use holdfast_proto::csi::snapshot_metadata_server::SnapshotMetadataServer;
use holdfast_proto::storage::operator_server::OperatorServer;
use holdfast_storage_core::node_directory::{NodeDirectory, NodeStates};
use holdfast_storage_core::record_store::{GroupStore, RecordStore, StoreError};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use crate::controller::{ControllerService, ControllerSettings};
use crate::gate::Gate;
use crate::identity::IdentityService;
use crate::kubernetes::{
    ControllerLease, KubernetesClient, KubernetesDirectory, KubernetesStore, VolumeBoard,
};
use crate::node::{NodeConfig, NodeService};
use crate::node_book::NodeBook;
use crate::registry_server::RegistryServer;
use crate::serve::{SocketError, bind_unix, serve_tcp, serve_unix, server};
use crate::sled_store::{OpenError, SledStore};
use crate::tls::TlsIdentity;

/// Calls under way may take this long to end at a shutdown; then they are cut off, which every call survives.
const SHUTDOWN_GRACE: Duration = Duration::from_secs(10);

/// Why a process could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The record store.
    #[error(transparent)]
    Store(#[from] OpenError),
    /// What was decided about nodes cannot be read.
    #[error("what was decided about nodes cannot be read: {0}")]
    Nodes(StoreError),
    /// The CSI socket.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The registry's address.
    #[error("cannot listen on {address} for the registry: {source}")]
    Listen {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: std::io::Error,
    },
    /// The node service.
    #[error("the node service cannot start: {0}")]
    Node(std::io::Error),
}

/// Settings of the controller process.
#[derive(Clone)]
pub struct ControllerConfig {
    /// Unix socket of the CSI services.
    pub csi_socket: PathBuf,
    /// The API server that keeps records and nodes; none: they are in `store_dir` and with the registry.
    pub kubernetes: Option<KubernetesClient>,
    /// Folder of the record store sled.
    pub store_dir: PathBuf,
    /// Where the registry listens.
    pub registry_listen: SocketAddr,
    /// For how long a node must be silent before its replicas that are out of sync are replaced; none: never.
    pub replace_after: Option<Duration>,
    /// How much of each pool's capacity may be promised.
    pub overprovision_percent: u32,
    /// By how many percent the fullest node must be fuller than the emptiest for a replica to move; none: none does.
    pub rebalance_above_percent: Option<u32>,
    /// Mutual TLS for the registry and towards the nodes; none is plain text.
    pub tls: Option<TlsIdentity>,
}

/// A running controller or node process. Dropping it is a crash: calls under way are cut off.
pub struct Process {
    stop: watch::Sender<bool>,
    /// What ends early ends the process, with its reason.
    tasks: Vec<JoinHandle<Result<(), String>>>,
    held: Option<HeldLease>,
    /// Where the registry listens; none on nodes.
    registry_address: Option<SocketAddr>,
}

/// The controller's lease, renewed until it is released.
struct HeldLease {
    release: watch::Sender<bool>,
    task: JoinHandle<Result<(), String>>,
}

impl HeldLease {
    async fn acquire(client: KubernetesClient) -> Self {
        let mut lease = ControllerLease::acquire(client, identity()).await;
        let (release, released) = watch::channel(false);
        let task = tokio::spawn(async move {
            let lost = tokio::select! {
                reason = lease.hold() => Some(reason),
                () = told(released) => None,
            };
            match lost {
                Some(reason) => Err(reason),
                None => {
                    lease.release().await;
                    Ok(())
                }
            }
        });
        Self { release, task }
    }
}

impl Process {
    /// Opens the store and serves CSI Identity and Controller, and the registry. Returns once calls are taken. With records at
    /// an API server it first waits until no other controller serves (see `kubernetes/lease.rs`), for as long as that takes; until
    /// then Identity says that it is not ready, and every other call is refused.
    ///
    /// Cancellation safe: nothing keeps running.
    ///
    /// # Errors
    /// The store, the socket or the address cannot be used; nothing keeps running then.
    pub async fn start_controller(config: ControllerConfig) -> Result<Self, StartError> {
        let (stop, stopped) = watch::channel(false);
        let gate = Gate::default();
        let Stores { store, group_store, node_states } =
            open_stores(config.kubernetes.clone(), config.store_dir).await?;
        let csi_listener = bind_unix(&config.csi_socket).await?;
        let book = Arc::new(NodeBook::new());
        if config.kubernetes.is_none() {
            // At an API server it is read with the nodes, before any of them counts.
            book.set_states(node_states.node_states().await.map_err(StartError::Nodes)?);
        }
        let directory: Arc<dyn NodeDirectory> = Arc::clone(&book) as _;
        let settings = ControllerSettings {
            replace_after: config.replace_after,
            overprovision_percent: config.overprovision_percent,
            rebalance_above_percent: config.rebalance_above_percent,
            tls: config.tls.clone(),
        };
        let controller =
            ControllerService::new(Arc::clone(&store), group_store, node_states, Arc::clone(&book), settings);
        let csi = server()
            .add_service(IdentityServer::new(IdentityService::controller(Arc::clone(&store), gate.clone())))
            .add_service(OperatorServer::with_interceptor(controller.clone(), gate.clone()))
            .add_service(GroupControllerServer::with_interceptor(controller.clone(), gate.clone()))
            .add_service(SnapshotMetadataServer::with_interceptor(controller.clone(), gate.clone()))
            .add_service(ControllerServer::with_interceptor(controller.clone(), gate.clone()));
        let csi = tokio::spawn(serving(serve_unix(csi, csi_listener, told(stopped.clone()))));
        let held = match config.kubernetes.clone() {
            Some(client) => Some(HeldLease::acquire(client).await),
            None => None,
        };
        let listen = |source| StartError::Listen { address: config.registry_listen, source };
        let registry_listener = TcpListener::bind(config.registry_listen).await.map_err(listen)?;
        let registry_address = registry_listener.local_addr().map_err(listen)?;
        let beside = beside_calls(controller, config.kubernetes, book);
        let registry = RegistryServer::new(store, directory, config.tls.is_some());
        let registry = server().add_service(registry.into_service());
        let tls = config.tls.as_ref().map(TlsIdentity::server);
        let tasks = vec![
            csi,
            tokio::spawn(serving(serve_tcp(registry, registry_listener, tls, told(stopped.clone())))),
            tokio::spawn(async move {
                tokio::select! {
                    () = beside => {}
                    () = told(stopped.clone()) => {}
                }
                Ok(())
            }),
        ];
        gate.open();
        tracing::info!(socket = %config.csi_socket.display(), registry = %registry_address, "controller started");
        Ok(Self { stop, tasks, held, registry_address: Some(registry_address) })
    }

    /// Serves CSI Identity and Node. Returns once calls are taken; registry and data process need not run yet.
    ///
    /// # Errors
    /// A path cannot be used; nothing keeps running then.
    pub async fn start_node(
        csi_socket: PathBuf,
        config: NodeConfig,
        store: Arc<dyn RecordStore>,
    ) -> Result<Self, StartError> {
        let name = config.node.clone();
        let node = NodeService::new(config, store).map_err(StartError::Node)?;
        let listener = bind_unix(&csi_socket).await?;
        let csi = server()
            .add_service(IdentityServer::new(IdentityService::node()))
            .add_service(NodeServer::new(node));
        let (stop, stopped) = watch::channel(false);
        let tasks = vec![tokio::spawn(serving(serve_unix(csi, listener, told(stopped))))];
        tracing::info!(socket = %csi_socket.display(), node = %name, "node service started");
        Ok(Self { stop, tasks, held: None, registry_address: None })
    }

    /// Where the registry listens, for processes that were started with port 0.
    #[must_use]
    pub fn registry_address(&self) -> Option<SocketAddr> {
        self.registry_address
    }

    /// Waits until a listener fails and answers why; it does not return while all is well. Cancellation safe.
    pub async fn failed(&mut self) -> String {
        let lease = self.held.iter_mut().map(|held| &mut held.task);
        let (ended, ..) = select_all(self.tasks.iter_mut().chain(lease)).await;
        match ended {
            Ok(Ok(())) => "a server ended without being told to".to_owned(),
            Ok(Err(reason)) => reason,
            Err(failure) => format!("a server's task failed: {failure}"),
        }
    }

    /// Takes no more calls and waits for those under way.
    pub async fn shutdown(self) {
        // Nobody listens only if every server has ended already.
        self.stop.send_replace(true);
        for mut task in self.tasks {
            if tokio::time::timeout(SHUTDOWN_GRACE, &mut task).await.is_err() {
                tracing::warn!("calls are still under way after {SHUTDOWN_GRACE:?}; they are cut off");
                task.abort();
            }
        }
        // Not before the last call has ended: the next controller may begin at once.
        if let Some(held) = self.held {
            held.release.send_replace(true);
            drop(tokio::time::timeout(SHUTDOWN_GRACE, held.task).await);
        }
    }
}

/// Where the controller keeps what it must not forget.
struct Stores {
    store: Arc<dyn RecordStore>,
    group_store: Arc<dyn GroupStore>,
    node_states: Arc<dyn NodeStates>,
}

async fn open_stores(kubernetes: Option<KubernetesClient>, store_dir: PathBuf) -> Result<Stores, StartError> {
    if let Some(client) = kubernetes {
        let store = KubernetesStore::new(client.clone());
        let node_states = Arc::new(KubernetesDirectory::new(client));
        return Ok(Stores { store: Arc::new(store.clone()), group_store: Arc::new(store), node_states });
    }
    match tokio::task::spawn_blocking(move || SledStore::open(&store_dir)).await {
        Ok(opened) => {
            let store = Arc::new(opened?);
            Ok(Stores {
                store: Arc::clone(&store) as _,
                group_store: Arc::clone(&store) as _,
                node_states: store,
            })
        }
        Err(failure) => std::panic::resume_unwind(failure.into_panic()),
    }
}

/// What a controller does beside answering calls; it does not end.
async fn beside_calls(
    controller: ControllerService,
    kubernetes: Option<KubernetesClient>,
    book: Arc<NodeBook>,
) {
    let Some(client) = kubernetes else { return controller.keep_sweeping().await };
    let (directory, board) = (KubernetesDirectory::new(client.clone()), VolumeBoard::new(client));
    tokio::join!(controller.keep_sweeping(), directory.feed(book), board.keep_publishing(controller.clone()));
}

async fn serving(server: impl Future<Output = Result<(), tonic::transport::Error>>) -> Result<(), String> {
    server.await.map_err(|error| format!("a server failed: {error}"))
}

/// Who holds a lease: the machine, and something that no other process of it has.
fn identity() -> String {
    let host = nix::unistd::gethostname().unwrap_or_default();
    format!("{}_{:016x}", host.to_string_lossy(), rand::random::<u64>())
}

fn told(mut stopped: watch::Receiver<bool>) -> Pin<Box<dyn Future<Output = ()> + Send>> {
    Box::pin(async move {
        // An error means that the process object is gone: stop as well.
        drop(stopped.wait_for(|stop| *stop).await);
    })
}
