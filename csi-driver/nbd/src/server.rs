//! The server side.

use std::io;
use std::sync::Arc;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};

use crate::provider::ExportProvider;

/// Whether and how a server does STARTTLS.
#[derive(Debug, Clone)]
pub struct ServerTls {
    /// Our certificate and whom we trust.
    pub config: Arc<ServerConfig>,
    /// Refuse everything but STARTTLS and ABORT before TLS (the specification's FORCEDTLS mode).
    pub required: bool,
}

/// Why a connection ended, other than by the client's wish or a closed [`crate::ConnectionSet`].
#[derive(Debug, thiserror::Error)]
pub enum ServeError {
    /// The stream failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The client broke the protocol; the connection cannot be used any further.
    #[error("the client broke the NBD protocol: {0}")]
    Protocol(String),
    /// Negotiation took too long.
    #[error("the client did not finish negotiation within {0} s")]
    HandshakeTimeout(u64),
}

/// Serves NBD connections from an [`ExportProvider`].
#[derive(Clone)]
pub struct Server {
    provider: Arc<dyn ExportProvider>,
    tls: Option<ServerTls>,
}

impl Server {
    /// A server without TLS.
    #[must_use]
    pub fn new(provider: Arc<dyn ExportProvider>) -> Self {
        Self { provider, tls: None }
    }

    /// The same with STARTTLS.
    #[must_use]
    pub fn with_tls(mut self, tls: ServerTls) -> Self {
        self.tls = Some(tls);
        self
    }

    /// Serves one connection until it ends; every request it gave to the device has completed when this returns.
    /// The caller sets TCP_NODELAY. Dropping the future closes the connection, but does not wait for its requests.
    ///
    /// # Errors
    /// [`ServeError`]; a client that leaves in order and a closed connection set are no errors.
    #[expect(clippy::unused_async, reason = "filled in next")]
    pub async fn serve_connection<S>(&self, stream: S) -> Result<(), ServeError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let _ = (stream, &self.provider, &self.tls);
        Err(ServeError::Protocol("not served yet".into()))
    }
}
