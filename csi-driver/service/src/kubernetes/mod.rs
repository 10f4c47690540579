//! Kubernetes as the record store: custom resources at the API server, read and swapped directly, never through a cache.
//!
//! ```text
//!   controller, data process ──> KubernetesStore      kinds VolumeRecord and VolumeName   (compare-and-swap)
//!                          │                         kind SnapshotGroup                  (compare-and-swap)
//!                          └───> KubernetesDirectory  kind StorageNode                    (where nodes are reached)
//!   controller ──> ControllerLease  kind Lease   (one controller at a time)
//!              └─> VolumeBoard      kind Volume  (what people see)
//! ```
//!
//! What is promised and why is in `store.rs` (versions, outcomes) and `names.rs` (names). While the API server is away
//! every call ends as unknown within [`CALL_TIMEOUT`]; volumes that need no swap go on.

pub mod certificates;
mod client;
mod convert;
mod groups;
mod lease;
mod names;
mod nodes;
mod objects;
mod store;
#[cfg(test)]
mod tests;
mod volumes;

pub use client::{CALL_TIMEOUT, ConnectError, KubernetesClient};
pub use lease::{ControllerLease, LEASE_NAME};
pub use nodes::KubernetesDirectory;
pub use objects::crds;
pub use store::KubernetesStore;
pub use volumes::VolumeBoard;
