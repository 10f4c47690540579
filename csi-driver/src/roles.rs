//! Starts a role and ends it at a signal.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use holdfast_engine::{DataConfig, DataProcess, FrontEndKind, TlsMaterial, config, host};
use holdfast_service::kubernetes::certificates::{self, Holder, HolderSettings, IssuerSettings};
use holdfast_service::node::NodeConfig;
use holdfast_service::tls::CONTROLLER_NAME;
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

use crate::inspect::inspect;
use crate::uninstall::{UninstallOptions, uninstall};

/// How often the files of --tls-dir are looked at.
const TLS_FOLDER_INTERVAL: Duration = Duration::from_secs(10);

/// Runs the role until a signal or a failure.
pub async fn run(role: Role) -> anyhow::Result<()> {
    let signals = Signals::install()?;
    match role {
        Role::Controller(options) => controller(options, signals).await,
        Role::Node(options) => node(options, signals).await,
        Role::Data(options) => data(options, signals).await,
        Role::Uninstall(options) => remove(options, signals).await,
        Role::Inspect(options) => tokio::task::spawn_blocking(move || inspect(&options)).await?,
    }
}

async fn controller(options: ControllerOptions, mut signals: Signals) -> anyhow::Result<()> {
    if options.tls.protection.tls_issuer.is_some() {
        // Before its own certificate, which it gives itself. It may run beside another controller that waits or serves.
        let settings = IssuerSettings {
            signer: options.tls.tls_signer.clone(),
            life: Duration::from_secs(options.tls.tls_life_s),
            authority_life: Duration::from_secs(options.tls_authority_life_s),
            overlap: Duration::from_secs(options.tls_authority_overlap_s),
        };
        tokio::spawn(certificates::issue(KubernetesClient::infer().await?, settings));
    }
    let tls = tokio::select! {
        tls = identity(&options.tls, CONTROLLER_NAME) => tls?,
        () = signals.wait() => return Ok(()),
    };
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
    // With records at an API server it connects to no process of ours but its node's, by a Unix socket.
    let tls = match options.registry.record_store {
        NodeStore::Kubernetes => None,
        NodeStore::Registry if options.tls.protection.tls_issuer.is_some() => {
            bail!(
                "--tls-issuer gives node services no certificates: use --tls-dir, or --record-store kubernetes"
            )
        }
        NodeStore::Registry => identity(&options.tls, &options.node).await?,
    };
    let (store, _) = stores(&options.registry, tls.as_ref()).await?;
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
    let node = node_name(&options.node)?;
    let tls = tokio::select! {
        tls = identity(&options.tls, &node.0) => tls?,
        () = signals.wait() => return Ok(()),
    };
    let (store, directory) = stores(&options.registry, tls.as_ref()).await?;
    let advertise = |listen: SocketAddr, flag: &str| match options.advertise_ip {
        Some(ip) => Ok(Some(SocketAddr::new(ip, listen.port()).to_string())),
        None if listen.ip().is_unspecified() => {
            bail!("{flag} is the wildcard {listen}: other nodes need --advertise-ip to find this one")
        }
        None => Ok(None),
    };
    let config = DataConfig {
        node,
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
        tls: tls.map(TlsMaterial::from),
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

async fn remove(options: UninstallOptions, mut signals: Signals) -> anyhow::Result<()> {
    let stay = options.stay;
    tokio::task::spawn_blocking(move || uninstall(&options)).await??;
    if stay {
        signals.wait().await;
    }
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

/// The certificate of this process, which follows its source from now on; none for plain text. May wait for an issuer, for as long
/// as that takes.
async fn identity(options: &TlsOptions, name: &str) -> anyhow::Result<Option<TlsIdentity>> {
    if options.protection.tls_issuer.is_some() {
        let settings = HolderSettings {
            name: name.to_owned(),
            dir: options.tls_state_dir.clone(),
            signer: options.tls_signer.clone(),
            life: Duration::from_secs(options.tls_life_s),
        };
        let holder = Holder::obtain(KubernetesClient::infer().await?, settings).await?;
        let identity = holder.identity();
        tokio::spawn(holder.keep());
        return Ok(Some(identity));
    }
    let Some(dir) = options.protection.tls_dir.clone() else { return Ok(None) };
    let identity = TlsIdentity::load(&dir)?;
    tokio::spawn(follow_folder(dir, identity.clone()));
    Ok(Some(identity))
}

/// Whoever renews certificates replaces the files; what does not fit together yet is looked at again.
async fn follow_folder(dir: PathBuf, identity: TlsIdentity) {
    let mut told = String::new();
    loop {
        tokio::time::sleep(TLS_FOLDER_INTERVAL).await;
        match identity.reload(&dir) {
            Ok(changed) => {
                told.clear();
                if changed {
                    tracing::info!(dir = %dir.display(), "the certificate was replaced; new connections use it");
                }
            }
            Err(error) if error.to_string() != told => {
                told = error.to_string();
                tracing::warn!(%error, "the certificate stays what it was");
            }
            Err(_) => {}
        }
    }
}

/// The records and the nodes, as a node sees them.
async fn stores(
    options: &RegistryOptions,
    tls: Option<&TlsIdentity>,
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
    let tls = tls.map(|identity| (identity, options.registry_name.as_str()));
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
