//! The target: serves an attached volume's I/O and fans writes out to its replicas.

pub mod allocation;
mod buffers;
mod calls;
pub mod device;
mod encrypted;
mod limited;
pub mod link;
pub mod machine;
mod snapshot_reads;
pub mod table;
mod tend;
pub mod volume;
