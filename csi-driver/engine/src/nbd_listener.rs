//! Takes NBD connections and serves each on a task of its own.

use std::io;
use std::time::Duration;

use holdfast_nbd::Server;
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};

/// Pause after a connection could not be taken: out of descriptors, or gone before it was taken. The next may work.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

/// Serves other nodes until the runtime ends.
pub async fn serve_tcp(listener: TcpListener, server: Server) {
    loop {
        if let Some((stream, peer)) = taken(listener.accept().await).await {
            let stream: TcpStream = stream;
            if let Err(error) = stream.set_nodelay(true) {
                tracing::debug!(%peer, %error, "TCP_NODELAY could not be set");
            }
            let server = server.clone();
            tokio::spawn(async move {
                if let Err(error) = server.serve_connection(stream).await {
                    tracing::info!(%peer, %error, "an NBD connection ended");
                }
            });
        }
    }
}

/// Serves clients on this machine until the runtime ends.
pub async fn serve_unix(listener: UnixListener, server: Server) {
    loop {
        if let Some((stream, _)) = taken(listener.accept().await).await {
            let stream: UnixStream = stream;
            let server = server.clone();
            tokio::spawn(async move {
                if let Err(error) = server.serve_connection(stream).await {
                    tracing::info!(%error, "a local NBD client's connection ended");
                }
            });
        }
    }
}

async fn taken<T>(accepted: io::Result<T>) -> Option<T> {
    match accepted {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            tracing::warn!(%error, "an NBD connection could not be accepted");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}
