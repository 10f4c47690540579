//! CSI services and record stores.
//!
//! ```text
//!   sidecars ── CSI ──> Controller ──> RecordStore (SledStore) <── Registry (gRPC) <── RegistryClient ── nodes
//!                            │         RecordStore (KubernetesStore) ──> API server <── KubernetesStore ── nodes
//!                            └── Pool (gRPC) ──> each node's data process
//!   kubelet  ── CSI ──> Node ──> Data (Unix socket) ──> this node's data process; mkfs, mount
//! ```
//!
//! The controller decides nothing about data: it places replicas when a volume is made and swaps who may attach it.
//! The node service refuses to format anything whose record does not say that no file system was ever made (R36).

pub mod controller;
mod fixed_params;
pub mod gate;
pub mod identity;
mod in_flight;
pub mod kubernetes;
pub mod mutable_params;
pub mod node;
pub mod node_book;
pub mod process;
pub mod record_copies;
pub mod registry_client;
pub mod registry_server;
mod registry_wire;
pub mod serve;
pub mod sled_store;
mod status;
pub mod tls;
pub mod topology;
pub mod volume_request;

pub use controller::{ControllerService, ControllerSettings};
pub use identity::IdentityService;
pub use kubernetes::{KubernetesClient, KubernetesDirectory, KubernetesStore};
pub use node::{NodeConfig, NodeService};
pub use node_book::NodeBook;
pub use process::{ControllerConfig, Process};
pub use registry_client::RegistryClient;
pub use registry_server::RegistryServer;
pub use sled_store::SledStore;
pub use tls::TlsIdentity;

/// The driver's name, as GetPluginInfo answers it and StorageClasses spell it.
pub const DRIVER_NAME: &str = "csi.holdfast.dev";
