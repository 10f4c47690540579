//! The running storage engine of one node: the replica server of its pool and the targets of the volumes attached to
//! it.
//!
//! Decisions are made by [`holdfast_storage_core`]; this crate gives them clocks, disks, sockets and the record store.
//! It refuses to decide anything itself: what it cannot do it reports to the core, which swaps, fences or waits.
//!
//! ```text
//!   FUSE, NBD clients ─> TargetDevice ─> target machine ─┬─ in-process ──> replica machine ─> store
//!                                                        └─ NBD + gRPC ──> other nodes' replica machines
//! ```
//!
//! State machines run on whatever thread brings them an event (see `actor`); nothing that they are driven by may block.

mod actor;
mod clock;
pub mod config;
pub mod data_process;
mod data_service;
mod errno;
pub mod host;
mod jobs_service;
mod nbd_listener;
mod nbd_threads;
mod node;
pub mod peers;
mod pool_service;
mod pulse;
mod replica;
mod target;
mod thread_runtime;
pub mod tls;
mod wire;

pub use config::{DataConfig, FrontEndKind};
pub use data_process::{DataProcess, StartError};
pub use target::volume::AttachError;
pub use tls::TlsMaterial;
