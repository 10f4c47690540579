//! The node agent: owns addresses, interfaces and policy of one node.
//!
//! ```text
//! folder of YAML, or API server --changes--> engine (single writer) --plan, ruleset--> holdfast-dataplane
//! holdfast-cni --gRPC--> service --> attacher --leases--> sled
//! ```
//!
//! It refuses to guess: while objects were not read, rules of an earlier run stay in force and new pods are denied. After
//! a kill at any point a start brings leases, interfaces and rules together again ([`run`]).

mod ask;
mod attach;
mod batch;
mod claims;
mod controller;
mod doctor;
mod engine;
mod flows;
mod flusher;
mod folder;
mod garbage;
mod hygiene;
mod install;
mod intake;
mod keys;
mod kubernetes;
mod leases;
mod matrix;
mod metrics;
mod objects;
mod offload;
pub mod pending;
mod result_cache;
mod service;
mod settings;
mod source;
mod uninstall;
mod uplink;

use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use holdfast_dataplane::{Config, Dataplane};
use holdfast_proto::agent::agent_server::AgentServer;
use tokio::net::{TcpListener, UnixListener};
use tokio_stream::wrappers::UnixListenerStream;
use tracing::info;

pub use ask::ready;
pub use batch::Batch;
pub use claims::{Claims, Swapped};
pub use controller::{ControllerSettings, START_UP_TAINT, run_controller};
pub use doctor::{DoctorOptions, Finding, doctor};
pub use holdfast_dataplane::share_one_heap;
pub use install::{CNI_PLUGIN, InstallOptions, Installed, install_cni};
pub use leases::{AttachmentKey, Lease, LeaseError, Leases, Wanted};
pub use objects::ObjectKey;
pub use offload::ChecksumOffload;
pub use settings::{Mode, ObjectSource, Settings};
pub use source::open_objects;
pub use uninstall::{Removal, UninstallOptions, uninstall};

use attach::Attacher;
use engine::Engine;
use flows::Feed;
use metrics::{Exporter, Metrics};
use service::Service;

/// Delete records written while the agent was coming up are looked for this often.
const PENDING_INTERVAL: Duration = Duration::from_secs(5);
/// Calls that are being served may take this long once the end was asked for. A reader of the flow log that takes nothing
/// from its connection would keep it open for ever.
const END_GRACE: Duration = Duration::from_secs(15);

/// A start waits for the objects this long before it serves without them.
const OBJECTS_WAIT_MAX: Duration = Duration::from_secs(5);

/// Runs an agent until `stop` is done.
///
/// Start: open the store (refused while another process holds it), adopt the kernel's rules, read the objects, undo what
/// an interrupted ADD left, apply plan and rules, replay delete records, and only then serve. An end leaves everything
/// in force.
///
/// # Errors
/// The store, the data path or the socket cannot be opened.
pub async fn run(settings: Settings, stop: impl Future<Output = ()> + Send) -> anyhow::Result<()> {
    private_folder(&settings.state_dir)?;
    let leases = Arc::new(Leases::open(&settings.state_dir, settings.address_quarantine)?);
    // Read beside the kernel's tables; the queue holds what comes before the engine is there.
    let (batches, claims) = open_objects(&settings.objects, &settings.node).await?;
    let config = Config {
        bridge: settings.overlay.bridge.clone(),
        vxlan_device: settings.overlay.vxlan_device.clone(),
        ..Config::default()
    };
    let log_group = config.log_group;
    let dataplane = Dataplane::new(config).await.context("cannot open the data path")?;
    let dataplane = Arc::new(dataplane);
    let (socket, collect_after) = (settings.socket.clone(), settings.collect_after);
    let verbs = attach::Verbs {
        pending_dir: settings.pending_dir.clone(),
        overlay_port: settings.overlay.port,
        needs_pod: settings.objects.is_kubernetes(),
    };
    let node: Arc<str> = settings.node.as_str().into();
    let metrics_listener = match settings.metrics {
        Some(address) => {
            let bound = TcpListener::bind(address).await;
            Some(bound.with_context(|| format!("cannot serve metrics on {address}"))?)
        }
        None => None,
    };
    let metrics = Metrics::new();
    let (engine, handle) = Engine::new(
        settings,
        Arc::clone(&dataplane),
        Arc::clone(&leases),
        (batches, claims),
        Arc::clone(&metrics),
    )
    .await;
    let mut seen = handle.seen();
    let flows = Feed::new(Arc::clone(&metrics));
    let exporter = Exporter { metrics, engine: handle.clone(), dataplane: Arc::clone(&dataplane) };
    let metrics_task = metrics_listener.map(|listener| tokio::spawn(exporter.serve(listener)));
    let flows_task = tokio::spawn(Arc::clone(&flows).run(log_group, handle.clone()));
    let hygiene = tokio::spawn(hygiene::run(Arc::clone(&dataplane)));
    let attacher = Arc::new(Attacher::new(dataplane, Arc::clone(&leases), handle, verbs));
    let engine = tokio::spawn(engine.run());
    attacher
        .reconcile()
        .await
        .map_err(anyhow::Error::msg)
        .context("cannot reconcile leases and interfaces")?;
    // Without objects it serves all the same, later: DEL must work, and STATUS says what is missing.
    if tokio::time::timeout(OBJECTS_WAIT_MAX, seen.wait_for(|seen| seen.ready)).await.is_err() {
        tracing::warn!("objects were not read yet");
    }
    attacher.replay_all().await;
    if let Err(error) = attacher.engine.sync().await {
        tracing::warn!(%error, "rules are not as compiled yet");
    }

    let listener = bind(&socket)?;
    info!(socket = %socket.display(), "serving");
    let later = tokio::spawn(look_after(Arc::clone(&attacher), Arc::clone(&leases)));
    let collector = tokio::spawn(garbage::run(Arc::clone(&attacher), collect_after));
    let served = serve(listener, Service { attacher, flows, node }, stop).await;
    later.abort();
    collector.abort();
    flows_task.abort();
    hygiene.abort();
    metrics_task.inspect(tokio::task::JoinHandle::abort);
    engine.abort();
    // A plugin that finds no socket knows at once that nobody serves.
    let _ = std::fs::remove_file(&socket);
    leases.flush().await.context("cannot flush the lease store")?;
    served
}

/// What is done from time to time: delete records are replayed, and freed addresses forgotten.
async fn look_after(attacher: Arc<Attacher>, leases: Arc<Leases>) {
    loop {
        attacher.replay_all().await;
        if let Err(error) = leases.forget_freed().await {
            tracing::warn!(%error, "freed addresses stay on the disk; a start will hold them back anew");
        }
        tokio::time::sleep(PENDING_INTERVAL).await;
    }
}

/// Serves until `stop` is done and the calls of before have ended, or [`END_GRACE`] is over.
async fn serve(
    listener: UnixListener,
    service: Service,
    stop: impl Future<Output = ()> + Send,
) -> anyhow::Result<()> {
    let flows = Arc::clone(&service.flows);
    let (stopped, was_stopped) = tokio::sync::oneshot::channel();
    let stop = async move {
        stop.await;
        flows.end();
        // The receiver is gone only when serving has ended.
        let _ = stopped.send(());
    };
    let grace = async move {
        match was_stopped.await {
            Ok(()) => tokio::time::sleep(END_GRACE).await,
            Err(_) => std::future::pending().await,
        }
    };
    let serving = tonic::transport::Server::builder()
        .add_service(AgentServer::new(service))
        .serve_with_incoming_shutdown(UnixListenerStream::new(listener), stop);
    tokio::select! {
        served = serving => served.context("serving failed"),
        () = grace => {
            tracing::warn!("calls that did not end in time are cut off");
            Ok(())
        }
    }
}

fn private_folder(path: &Path) -> anyhow::Result<()> {
    std::fs::create_dir_all(path).with_context(|| format!("cannot make {}", path.display()))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o700))
        .with_context(|| format!("cannot restrict {}", path.display()))
}

/// Binds with mode 0600 from the first moment. A socket that an earlier run left is removed; the store's lock has already
/// made sure that no other agent serves it.
fn bind(path: &Path) -> anyhow::Result<UnixListener> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if found.file_type().is_socket() => std::fs::remove_file(path)
            .with_context(|| format!("cannot remove the old socket {}", path.display()))?,
        Ok(_) => bail!("{} exists and is not a socket", path.display()),
        Err(_) => {}
    }
    let umask = nix::sys::stat::umask(nix::sys::stat::Mode::from_bits_truncate(0o177));
    let listener = UnixListener::bind(path);
    nix::sys::stat::umask(umask);
    listener.with_context(|| format!("cannot bind {}", path.display()))
}
