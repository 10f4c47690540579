//! Listeners: gRPC on Unix sockets (mode 0600) and on TCP with mutual TLS.

use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustls::ServerConfig;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{Semaphore, mpsc};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::{ReceiverStream, TcpListenerStream, UnixListenerStream};
use tonic::transport::Server;
use tonic::transport::server::Router;

/// TLS handshakes under way at once; at the limit further connections wait in the kernel's queue.
const HANDSHAKES_MAX: usize = 64;
/// A client that has not finished its handshake by then is dropped.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(5);
/// Calls that one connection may have under way; further ones wait.
const CALLS_PER_CONNECTION_MAX: usize = 64;
/// How often an idle connection is asked whether its peer still lives, and how long it may take to answer.
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_TIMEOUT: Duration = Duration::from_secs(5);
/// After a failed accept (out of file descriptors, say) the next one waits this long.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Why a Unix socket cannot be listened on.
#[derive(Debug, thiserror::Error)]
pub enum SocketError {
    /// Somebody answers on it.
    #[error("socket {0} is in use by another process: stop that one, or choose another path")]
    InUse(PathBuf),
    /// The path is something else than a socket.
    #[error("{0} exists and is not a socket; it is left alone, choose another path")]
    NotASocket(PathBuf),
    /// The operating system refused.
    #[error("cannot listen on socket {path}: {source}")]
    Io {
        /// The path.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
}

/// Listens on `path`, replacing what a dead process left there.
///
/// The socket is made under a temporary name, gets mode 0600 and is then renamed into place, so that nobody can
/// connect before the mode is set.
///
/// # Errors
/// Somebody listens there, the path is no socket, or the operating system refuses.
pub async fn bind_unix(path: &Path) -> Result<UnixListener, SocketError> {
    let failed = |source: io::Error| SocketError::Io { path: path.to_owned(), source };
    if let Some(parent) = path.parent() {
        std::fs::create_dir_all(parent).map_err(failed)?;
    }
    match std::fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => return Err(SocketError::NotASocket(path.to_owned())),
        Ok(_) if UnixStream::connect(path).await.is_ok() => return Err(SocketError::InUse(path.to_owned())),
        Ok(_) => {}
        Err(e) if e.kind() == io::ErrorKind::NotFound => {}
        Err(e) => return Err(failed(e)),
    }
    let mut fresh = path.as_os_str().to_owned();
    fresh.push(".new");
    let fresh = PathBuf::from(fresh);
    match std::fs::remove_file(&fresh) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(failed(e)),
        _ => {}
    }
    let listener = UnixListener::bind(&fresh).map_err(failed)?;
    std::fs::set_permissions(&fresh, std::fs::Permissions::from_mode(0o600)).map_err(failed)?;
    std::fs::rename(&fresh, path).map_err(failed)?;
    Ok(listener)
}

/// A server with the limits that all of ours have.
#[must_use]
pub fn server() -> Server {
    Server::builder()
        .concurrency_limit_per_connection(CALLS_PER_CONNECTION_MAX)
        .http2_keepalive_interval(Some(KEEPALIVE_INTERVAL))
        .http2_keepalive_timeout(Some(KEEPALIVE_TIMEOUT))
}

/// Serves on a Unix socket until `shutdown`; calls under way are finished first.
///
/// # Errors
/// The listener failed.
pub async fn serve_unix(
    router: Router,
    listener: UnixListener,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    router.serve_with_incoming_shutdown(UnixListenerStream::new(listener), shutdown).await
}

/// Serves on TCP until `shutdown`, with mutual TLS where `tls` is given.
///
/// # Errors
/// The listener failed.
pub async fn serve_tcp(
    router: Router,
    listener: TcpListener,
    tls: Option<Arc<ServerConfig>>,
    shutdown: impl Future<Output = ()> + Send,
) -> Result<(), tonic::transport::Error> {
    match tls {
        None => {
            let incoming = TcpListenerStream::new(listener).map(|stream| stream.inspect(set_nodelay));
            router.serve_with_incoming_shutdown(incoming, shutdown).await
        }
        Some(config) => {
            let (sender, receiver) = mpsc::channel(1);
            let accepting = tokio::spawn(accept_tls(listener, TlsAcceptor::from(config), sender));
            let served = router.serve_with_incoming_shutdown(ReceiverStream::new(receiver), shutdown).await;
            accepting.abort();
            served
        }
    }
}

async fn accept_tls(
    listener: TcpListener,
    acceptor: TlsAcceptor,
    sender: mpsc::Sender<io::Result<TlsStream<TcpStream>>>,
) {
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    loop {
        let Ok(permit) = Arc::clone(&handshakes).acquire_owned().await else { return };
        let (stream, peer) = match listener.accept().await {
            Ok(accepted) => accepted,
            Err(error) => {
                tracing::warn!(%error, "a connection could not be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        set_nodelay(&stream);
        let (acceptor, sender) = (acceptor.clone(), sender.clone());
        tokio::spawn(async move {
            let _permit = permit;
            match tokio::time::timeout(HANDSHAKE_TIMEOUT, acceptor.accept(stream)).await {
                // The receiver is gone only when the server has ended.
                Ok(Ok(stream)) => drop(sender.send(Ok(stream)).await),
                Ok(Err(error)) => tracing::warn!(%peer, %error, "a TLS handshake failed"),
                Err(_) => tracing::warn!(%peer, "a TLS handshake took too long"),
            }
        });
    }
}

/// Small calls must not wait for the answers to earlier ones.
fn set_nodelay(stream: &TcpStream) {
    if let Err(error) = stream.set_nodelay(true) {
        tracing::debug!(%error, "TCP_NODELAY could not be set");
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_socket_is_for_its_owner_and_replaces_only_what_a_dead_process_left() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("made/csi.sock");
        let listener = bind_unix(&path).await.unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        let refusal = bind_unix(&path).await.unwrap_err();
        assert!(matches!(refusal, SocketError::InUse(_)), "{refusal}");
        drop(listener);
        bind_unix(&path).await.expect("nobody listens any more");

        let file = dir.path().join("file");
        std::fs::write(&file, b"precious").unwrap();
        let refusal = bind_unix(&file).await.unwrap_err();
        assert!(matches!(refusal, SocketError::NotASocket(_)), "{refusal}");
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
    }
}
