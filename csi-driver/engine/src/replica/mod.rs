//! The replica server: this node's replicas, opened by targets here and on other nodes.

pub mod disk;
pub mod grpc;
pub mod host;
pub mod kept_records;
pub mod machine;
pub mod provider;
pub mod snapshot_blocks;
mod verify;
