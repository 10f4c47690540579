//! The running storage engine of one node: the replica server of its pool and the targets of the volumes attached to
//! it.
//!
//! Decisions are made by [`holdfast_storage_core`]; this crate gives them clocks, disks, sockets and the record store.
//! It refuses to decide anything itself: what it cannot do it reports to the core, which swaps, fences or waits.

pub mod config;
pub mod data_process;
pub mod peers;
pub mod tls;

pub use config::{DataConfig, FrontEndKind};
pub use data_process::{DataProcess, StartError};
pub use tls::TlsMaterial;
