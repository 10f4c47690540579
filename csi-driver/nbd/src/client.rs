//! The client side.

use std::io;

use holdfast_io::{BlockDevice, BlockError, BlockOp, Completion};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::provider::{Extent, ExtentsCompletion};
use crate::tls::ClientTls;

/// What to connect to.
#[derive(Debug, Clone, Default)]
pub struct ClientOptions {
    /// The export's name.
    pub export: String,
    /// STARTTLS first; a server without it is refused.
    pub tls: Option<ClientTls>,
    /// Ask for `base:allocation`, which [`Client::block_status`] needs.
    pub block_status: bool,
}

/// Why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The stream failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The server broke the protocol or speaks another one.
    #[error("the server does not speak NBD as we need it: {0}")]
    Protocol(String),
    /// The server refused the export.
    #[error("the server refused export \"{export}\": {reason}")]
    Refused {
        /// Its name.
        export: String,
        /// The server's own words.
        reason: String,
    },
    /// Negotiation took too long.
    #[error("the server did not finish negotiation within {0} s")]
    HandshakeTimeout(u64),
}

/// What the server said about the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Transmission flags as on the wire.
    pub flags: u16,
    /// Smallest unit of I/O.
    pub block_bytes_min: u32,
    /// Largest payload of a request.
    pub payload_bytes_max: u32,
    /// `base:allocation` was agreed on.
    pub block_status: bool,
}

/// One connection to an export. Many requests are in flight at once; replies complete them in any order.
///
/// When the connection is lost, every request in flight completes with `ENOTCONN` exactly once, and later ones do so at
/// once. Dropping the client closes the connection in the same way.
#[derive(Debug)]
pub struct Client {
    info: ExportInfo,
}

impl Client {
    /// Negotiates over a connected stream. Must be called within a tokio runtime, which runs the connection's two tasks.
    ///
    /// # Errors
    /// [`ConnectError`].
    #[expect(clippy::unused_async, reason = "filled in next")]
    pub async fn connect<S>(stream: S, options: ClientOptions) -> Result<Self, ConnectError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let _ = (stream, options);
        Err(ConnectError::Protocol("not connected yet".into()))
    }

    /// What the server said about the export.
    #[must_use]
    pub fn info(&self) -> ExportInfo {
        self.info
    }

    /// Whether the connection is lost or closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        true
    }

    /// Resolves when the connection is lost or closed and every request in flight has been completed. Cancel-safe.
    pub async fn closed(&self) {
        std::future::pending().await
    }

    /// Closes the connection: requests in flight complete with `ENOTCONN`.
    pub fn close(&self) {}

    /// Allocation of `[offset, offset + len)` or a prefix of it; `ENOTSUP` if it was not agreed on.
    pub fn block_status(&self, offset: u64, len: u32, done: ExtentsCompletion) {
        let _ = (offset, len);
        let answer: Result<Vec<Extent>, _> = Err(BlockError(107));
        done(answer);
    }
}

impl BlockDevice for Client {
    fn size_bytes(&self) -> u64 {
        self.info.size_bytes
    }

    fn submit(&self, op: BlockOp, done: Completion) {
        drop(op);
        done(Err(BlockError(107)));
    }
}
