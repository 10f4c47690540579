//! What a data process is started with.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use holdfast_storage_core::ids::NodeName;

use crate::tls::TlsMaterial;

/// How often a node announces itself to the registry.
pub const ANNOUNCE_INTERVAL: Duration = Duration::from_secs(2);

/// How a target becomes a block device of this machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FrontEndKind {
    /// FUSE file with a loop device over it; works on every kernel with both.
    FuseLoop,
    /// None: the target is reached through [`DataConfig::nbd_client_dir`] or in-process only.
    None,
}

/// Settings of one data process.
#[derive(Debug, Clone)]
pub struct DataConfig {
    /// This node's name, as records spell it.
    pub node: NodeName,
    /// The zone that the node announces.
    pub zone: Option<String>,
    /// The class of the pool, as announced: StorageClasses can demand one.
    pub pool_class: Option<String>,
    /// Most volumes that may be attached here, as announced; the controller sees to it.
    pub volumes_max: Option<u32>,
    /// Folder of this node's replicas.
    pub pool_dir: PathBuf,
    /// Bytes the pool may use.
    pub pool_capacity_bytes: u64,
    /// Folder of the continuity cookies; must be a tmpfs in production (R19).
    pub cookie_dir: PathBuf,
    /// Where the Replica and Pool services listen.
    pub control_listen: SocketAddr,
    /// Where the NBD server listens for other nodes' targets.
    pub nbd_listen: SocketAddr,
    /// `host:port` that others are told for the control services; the bound address where absent.
    pub control_advertise: Option<String>,
    /// `host:port` that others are told for NBD; the bound address where absent.
    pub nbd_advertise: Option<String>,
    /// Unix socket of the Data service.
    pub data_socket: PathBuf,
    /// Where set, each attached volume is also served as `DIR/<volume_id>.sock` to local NBD clients (mode 0600).
    pub nbd_client_dir: Option<PathBuf>,
    /// Folder for the front ends' mounts.
    pub run_dir: PathBuf,
    /// Mutual TLS for control and NBD; none is plain text.
    pub tls: Option<TlsMaterial>,
    /// To measure what checksums cost: blocks get none and none is verified. Refused for a pool with replicas.
    pub without_checksums: bool,
    /// How targets become block devices.
    pub front_end: FrontEndKind,
    /// How long Attach waits for the target to serve.
    pub attach_timeout: Duration,
}

/// How long Attach waits where nothing else is said: R3's lease term and R12's cache grace fit in it.
pub const ATTACH_TIMEOUT: Duration = Duration::from_secs(90);
