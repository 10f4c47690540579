//! Takes local NBD connections and serves each on a task of its own. Other nodes' are `nbd_threads`' business.

use std::io;
use std::time::Duration;

use holdfast_nbd::Server;
use tokio::net::{UnixListener, UnixStream};

/// Pause after a connection could not be taken: out of descriptors, or gone before it was taken. The next may work.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

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

/// A connection; `None` after a pause where none could be taken.
pub async fn taken<T>(accepted: io::Result<T>) -> Option<T> {
    match accepted {
        Ok(accepted) => Some(accepted),
        Err(error) => {
            tracing::warn!(%error, "an NBD connection could not be accepted");
            tokio::time::sleep(ACCEPT_PAUSE).await;
            None
        }
    }
}
