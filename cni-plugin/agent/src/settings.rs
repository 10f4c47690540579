//! Settings of the agent.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use holdfast_net_core::nat::MasqueradeSettings;
use holdfast_net_core::overlay::OverlaySettings;
use holdfast_net_core::pod_ranges::ClusterRange;

use crate::offload::ChecksumOffload;

/// How pods are attached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// A veth pair into the node's bridge, every pod port isolated on it.
    Bridge,
    /// The host end of the veth pair is the pod's gateway.
    Routed,
}

/// Where Kubernetes' objects come from.
#[derive(Debug, Clone)]
pub enum ObjectSource {
    /// A folder of YAML and JSON.
    Folder(PathBuf),
    /// The API server.
    Kubernetes {
        /// How to get there; `None`: by the pod's service account.
        kubeconfig: Option<PathBuf>,
    },
}

impl ObjectSource {
    /// Whether it is a cluster's.
    #[must_use]
    pub fn is_kubernetes(&self) -> bool {
        matches!(self, Self::Kubernetes { .. })
    }
}

/// Settings of one agent.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Name of this node's Node object.
    pub node: String,
    /// Where objects come from.
    pub objects: ObjectSource,
    /// Folder of the lease store.
    pub state_dir: PathBuf,
    /// Unix socket to serve on.
    pub socket: PathBuf,
    /// Folder where the plugin leaves delete records while the agent is down.
    pub pending_dir: PathBuf,
    /// How pods are attached.
    pub mode: Mode,
    /// Interface of the underlay; `None` finds the one with the InternalIP.
    pub uplink: Option<String>,
    /// Whether checksums of the overlay's packets are left to the hardware.
    pub checksum_offload: ChecksumOffload,
    /// Bridge and VXLAN device.
    pub overlay: OverlaySettings,
    /// Where nodes without `spec.podCIDR` take their ranges from; empty: they get none.
    pub cluster_ranges: Vec<ClusterRange>,
    /// Whose traffic leaves the cluster with the node's address as source.
    pub masquerade: MasqueradeSettings,
    /// How long a freed address goes to nobody: longer than any node takes to see that a pod is gone. Zero: not at all.
    pub address_quarantine: Duration,
    /// How long an attachment must look dead before it is freed without a runtime asking for it. Zero: never.
    pub collect_after: Duration,
    /// Where metrics are served, without asking who reads; nowhere if `None`.
    pub metrics: Option<SocketAddr>,
}
