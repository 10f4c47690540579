//! The server side: one future per connection.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

use crate::negotiate::{Negotiated, Negotiation, TlsState};
use crate::proto::DecodeError;
use crate::provider::{ExportProvider, PeerIdentity};
use crate::serve;
use crate::tls::peer_names;

/// Negotiation including TLS takes at most this long; then the connection is closed, so that idle strangers hold nothing.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Connections of one server that may negotiate at once; further ones are closed at once. Those that have opened an export
/// do not count.
const NEGOTIATIONS_MAX: usize = 256;

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
    /// The TLS handshake failed: a certificate that is not trusted, has expired or is missing, or no TLS at all.
    #[error("the TLS handshake failed: {0}")]
    Tls(#[source] io::Error),
    /// Too many connections are negotiating; the one that came was closed.
    #[error("{0} connections are negotiating already")]
    Busy(usize),
    /// Negotiation took too long.
    #[error("the client did not finish negotiation within {0} s")]
    HandshakeTimeout(u64),
}

impl From<DecodeError> for ServeError {
    fn from(error: DecodeError) -> Self {
        Self::Protocol(error.to_string())
    }
}

/// Serves NBD connections from an [`ExportProvider`].
#[derive(Clone)]
pub struct Server {
    provider: Arc<dyn ExportProvider>,
    tls: Option<ServerTls>,
    negotiations: Arc<Semaphore>,
}

impl Server {
    /// A server without TLS.
    #[must_use]
    pub fn new(provider: Arc<dyn ExportProvider>) -> Self {
        Self { provider, tls: None, negotiations: Arc::new(Semaphore::new(NEGOTIATIONS_MAX)) }
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
    pub async fn serve_connection<S>(&self, stream: S) -> Result<(), ServeError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let deadline = tokio::time::Instant::now() + HANDSHAKE;
        let room = self.negotiations.clone().try_acquire_owned();
        let room = room.map_err(|_| ServeError::Busy(NEGOTIATIONS_MAX))?;
        let mut stream = stream;
        let tls = self.tls.as_ref().map_or(TlsState::Absent, TlsState::Offered);
        let mut plain = Negotiation::new(&*self.provider, PeerIdentity::Anonymous, tls);
        let negotiated = in_time(deadline, async {
            plain.greet(&mut stream).await?;
            plain.run(&mut stream).await
        });
        match negotiated.await? {
            Negotiated::Left => Ok(()),
            Negotiated::Transmission(agreed) => {
                drop(room);
                serve::transmission(stream, agreed).await
            }
            Negotiated::StartTls(config) => {
                let client_flags = plain.client_flags();
                let upgraded = in_time(deadline, async {
                    let accepted = TlsAcceptor::from(config).accept(stream).await;
                    let mut stream = accepted.map_err(ServeError::Tls)?;
                    let peer = tls_peer(&stream);
                    let mut inner = Negotiation::inside_tls(&*self.provider, peer, client_flags);
                    let negotiated = inner.run(&mut stream).await?;
                    Ok((stream, negotiated))
                });
                match upgraded.await? {
                    (stream, Negotiated::Transmission(agreed)) => {
                        drop(room);
                        serve::transmission(stream, agreed).await
                    }
                    (_, Negotiated::Left | Negotiated::StartTls(_)) => Ok(()),
                }
            }
        }
    }
}

async fn in_time<T>(
    deadline: tokio::time::Instant,
    negotiation: impl Future<Output = Result<T, ServeError>>,
) -> Result<T, ServeError> {
    let late = |_| ServeError::HandshakeTimeout(HANDSHAKE.as_secs());
    tokio::time::timeout_at(deadline, negotiation).await.map_err(late)?
}

fn tls_peer<S>(stream: &tokio_rustls::server::TlsStream<S>) -> PeerIdentity {
    let (_, session) = stream.get_ref();
    let certificate = session.peer_certificates().and_then(<[_]>::first);
    PeerIdentity::Named(certificate.map(peer_names).unwrap_or_default())
}
