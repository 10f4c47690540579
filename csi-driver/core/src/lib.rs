//! The storage half's decisions, without I/O: input and `now` in, actions out.

pub mod ids;
pub mod node_directory;
pub mod record;
pub mod record_store;
