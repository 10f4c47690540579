//! The NBD protocol: fixed newstyle handshake, structured replies, extended headers, metadata contexts, STARTTLS.
//!
//! [`proto`] is the sans-I/O half: pure encode and decode. [`Server`] answers connections of any tokio stream from
//! [`holdfast_io::BlockDevice`]s which an [`ExportProvider`] gives out by export name; [`Client`] is a `BlockDevice` whose
//! other end is an NBD server. [`Inquiry`] asks a server about its exports without opening one.
//!
//! ```text
//!   Client::submit -> queue -> writer task ==stream==> reader -> BlockDevice::submit
//!   Completion <- pending table <- reader task <==stream== writer <- queue <- Completion
//! ```
//!
//! Refused: oldstyle negotiation, requests that do not keep the advertised block size, payloads above 32 MiB, resizing.
//! Not promised: order between overlapping requests that are in flight together.
//!
//! # Limits
//!
//! Of a peer's doing, whatever it sends, per connection: 16 KiB of option data at a time, 256 options, 10 s of
//! negotiation, 16 contexts, 64 MiB of payload or 1,024 requests in flight at the server, 16,384 at the client, 4,096
//! extents per context and reply. Beyond them a server refuses the option, closes the connection or stops reading; a
//! client fails the request or the connection. A server has 256 negotiations at once.

mod checks;
mod client;
mod connection;
mod handshake;
mod inquiry;
mod negotiate;
mod outgoing;
mod payload;
mod pending;
pub mod proto;
mod provider;
mod replies;
mod respond;
mod serve;
mod server;
mod tls;

pub use client::{Client, ClientOptions, ConnectError, ExportInfo, ZeroOptions};
pub use inquiry::Inquiry;
pub use provider::{
    BASE_ALLOCATION, BlockStatus, ConnectionSet, Context, DIRTY_PREFIX, Export, ExportProvider, Extent,
    ExtentsCompletion, OpenError, PeerIdentity,
};
pub use server::{ServeError, Server, ServerTls};
pub use tls::{ClientTls, TlsError, TlsIdentity, peer_names};
