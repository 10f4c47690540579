//! Starts a role and ends it at a signal.

use std::net::{IpAddr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use holdfast_engine::{DataConfig, DataProcess, FrontEndKind, TlsMaterial, config, host};
use holdfast_service::node::NodeConfig;
use holdfast_service::{
    ControllerConfig, KubernetesClient, KubernetesDirectory, KubernetesStore, Process, RegistryClient,
    TlsIdentity,
};
use holdfast_storage_core::ids::NodeName;
use holdfast_storage_core::node_directory::NodeDirectory;
use holdfast_storage_core::record_store::RecordStore;
use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::options::{
    ControllerOptions, ControllerStore, DataOptions, FrontEnd, NodeOptions, NodeStore, RegistryOptions, Role,
    TlsOptions,
};

/// Runs the role until a signal or a failure.
pub async fn run(role: Role) -> anyhow::Result<()> {
    let signals = Signals::install()?;
    match role {
        Role::Controller(options) => controller(options, signals).await,
        Role::Node(options) => node(options, signals).await,
        Role::Data(options) => data(options, signals).await,
    }
}

async fn controller(options: ControllerOptions, mut signals: Signals) -> anyhow::Result<()> {
    let tls = options.tls.tls_dir.as_deref().map(TlsIdentity::load).transpose()?;
    let kubernetes = match options.record_store {
        ControllerStore::Sled => None,
        ControllerStore::Kubernetes => Some(KubernetesClient::infer().await?),
    };
    let config = ControllerConfig {
        kubernetes,
        csi_socket: options.csi_socket,
        store_dir: options.store_dir,
        registry_listen: options.registry_listen,
        replace_after: (options.replace_after_s > 0).then(|| Duration::from_secs(options.replace_after_s)),
        overprovision_percent: options.overprovision_percent,
        rebalance_above_percent: (options.rebalance_above_percent > 0)
            .then_some(options.rebalance_above_percent),
        tls,
    };
    // While another controller serves, this one waits.
    let process = tokio::select! {
        started = Process::start_controller(config) => started?,
        () = signals.wait() => return Ok(()),
    };
    serve(process, signals).await
}

async fn node(options: NodeOptions, signals: Signals) -> anyhow::Result<()> {
    let (store, _) = stores(&options.registry, &options.tls).await?;
    let config = NodeConfig {
        node: node_name(&options.node)?,
        zone: options.place.zone,
        volumes_max: options.place.volumes_max,
        data_socket: options.data_socket,
        kubelet_dir: options.kubelet_dir,
    };
    let process = Process::start_node(options.csi_socket, config, store).await?;
    serve(process, signals).await
}

async fn data(options: DataOptions, mut signals: Signals) -> anyhow::Result<()> {
    let (store, directory) = stores(&options.registry, &options.tls).await?;
    let advertise = |listen: SocketAddr, flag: &str| match options.advertise_ip {
        Some(ip) => Ok(Some(SocketAddr::new(ip, listen.port()).to_string())),
        None if listen.ip().is_unspecified() => {
            bail!("{flag} is the wildcard {listen}: other nodes need --advertise-ip to find this one")
        }
        None => Ok(None),
    };
    let config = DataConfig {
        node: node_name(&options.node)?,
        zone: options.place.zone,
        pool_class: options.pool_class,
        volumes_max: options.place.volumes_max,
        control_advertise: advertise(options.control_listen, "--control-listen")?,
        nbd_advertise: advertise(options.nbd_listen, "--nbd-listen")?,
        pool_dir: options.pool_dir,
        pool_capacity_bytes: options.pool_capacity,
        cookie_dir: options.cookie_dir,
        control_listen: options.control_listen,
        nbd_listen: options.nbd_listen,
        data_socket: options.data_socket,
        nbd_client_dir: options.nbd_client_dir,
        run_dir: options.run_dir,
        tls: options.tls.tls_dir.as_deref().map(TlsMaterial::load).transpose()?,
        without_checksums: options.measure_without_checksums,
        front_end: match options.front_end {
            FrontEnd::FuseLoop => FrontEndKind::FuseLoop,
            FrontEnd::None => FrontEndKind::None,
        },
        attach_timeout: config::ATTACH_TIMEOUT,
    };
    // Threads that are started from here on inherit it.
    host::protect_from_memory_pressure();
    let process = DataProcess::start(config, store, directory).await?;
    signals.wait().await;
    process.shutdown().await;
    Ok(())
}

async fn serve(mut process: Process, mut signals: Signals) -> anyhow::Result<()> {
    tokio::select! {
        () = signals.wait() => {
            process.shutdown().await;
            Ok(())
        }
        reason = process.failed() => bail!(reason),
    }
}

/// The records and the nodes, as a node sees them.
async fn stores(
    options: &RegistryOptions,
    tls: &TlsOptions,
) -> anyhow::Result<(Arc<dyn RecordStore>, Arc<dyn NodeDirectory>)> {
    if options.record_store == NodeStore::Kubernetes {
        let client = KubernetesClient::infer().await?;
        return Ok((
            Arc::new(KubernetesStore::new(client.clone())),
            Arc::new(KubernetesDirectory::new(client)),
        ));
    }
    let Some(address) = &options.registry else {
        bail!("--registry is missing: the address HOST:PORT of the controller's registry");
    };
    let identity = tls.tls_dir.as_deref().map(|dir: &Path| TlsIdentity::load(dir)).transpose()?;
    let tls = identity.as_ref().map(|identity| (identity, options.registry_name.as_str()));
    let client = Arc::new(RegistryClient::new(address, tls)?);
    Ok((Arc::clone(&client) as _, client))
}

/// A node's name reaches records, certificates and answers, so it must look like one.
fn node_name(text: &str) -> anyhow::Result<NodeName> {
    let plain = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-' || c == '.';
    if text.is_empty() || text.len() > 253 || !text.chars().all(plain) || text.parse::<IpAddr>().is_ok() {
        bail!(
            "--node \"{text}\" is no node name: lower-case letters, digits, \"-\" and \".\", at most 253 of them"
        );
    }
    Ok(NodeName(text.to_owned()))
}

/// SIGTERM and SIGINT, caught from the start on, so that none is lost while a role starts.
struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    fn install() -> anyhow::Result<Self> {
        let install = |kind| signal(kind).context("signal handlers cannot be installed");
        Ok(Self {
            terminate: install(SignalKind::terminate())?,
            interrupt: install(SignalKind::interrupt())?,
        })
    }

    async fn wait(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => tracing::info!("SIGTERM: ending"),
            _ = self.interrupt.recv() => tracing::info!("SIGINT: ending"),
        }
    }
}
