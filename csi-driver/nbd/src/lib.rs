//! The NBD protocol: fixed newstyle handshake, structured replies, STARTTLS, `base:allocation`.
//!
//! [`proto`] is the sans-I/O half: pure encode and decode. [`Server`] answers connections of any tokio stream from
//! [`holdfast_io::BlockDevice`]s which an [`ExportProvider`] gives out by export name; [`Client`] is a `BlockDevice` whose
//! other end is an NBD server.
//!
//! ```text
//!   Client::submit -> queue -> writer task ==stream==> reader -> BlockDevice::submit
//!   Completion <- pending table <- reader task <==stream== writer <- queue <- Completion
//! ```
//!
//! Refused: oldstyle negotiation, compact export names without a provider, requests which do not keep the advertised
//! block size, extended (64-bit) headers. Not promised: order between overlapping requests that are in flight together.

mod client;
mod connection;
mod negotiate;
mod outgoing;
mod payload;
pub mod proto;
mod provider;
mod serve;
mod server;
mod tls;

pub use client::{Client, ClientOptions, ConnectError, ExportInfo};
pub use provider::{
    BlockStatus, ConnectionSet, Export, ExportProvider, Extent, ExtentsCompletion, OpenError, PeerIdentity,
};
pub use server::{ServeError, Server, ServerTls};
pub use tls::{ClientTls, TlsError, TlsIdentity, peer_names};
