//! Serves other nodes' sessions to this node's replicas, each connection on a thread of its own that does the disk I/O of
//! its requests too: a request wakes one thread, and a busy or slow session delays no other.

use std::collections::HashMap;
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use holdfast_io::thread_ring::LoneIo;
use holdfast_nbd::Server;
use tokio::net::{TcpListener, TcpStream};

use crate::nbd_listener::taken;
use crate::thread_runtime::ThreadRuntime;

/// Connections served at a time, far above the sessions of a node's replicas. One more is closed at once; its client
/// tries again.
const CONNECTIONS_MAX: usize = 1_024;

/// The connections and their threads.
pub struct NbdThreads {
    server: Server,
    live: Mutex<Live>,
}

#[derive(Default)]
struct Live {
    threads: HashMap<u64, ThreadRuntime>,
    next: u64,
    stopped: bool,
}

impl NbdThreads {
    /// No connection yet.
    #[must_use]
    pub fn new(server: Server) -> Arc<Self> {
        Arc::new(Self { server, live: Mutex::default() })
    }

    /// Takes connections until the task is dropped.
    pub async fn accept(self: Arc<Self>, listener: TcpListener) {
        loop {
            let Some((stream, peer)) = taken(listener.accept().await).await else { continue };
            if let Err(error) = self.serve(stream, peer) {
                tracing::warn!(%peer, %error, "an NBD connection could not be served");
            }
        }
    }

    fn serve(self: &Arc<Self>, stream: TcpStream, peer: SocketAddr) -> io::Result<()> {
        if let Err(error) = stream.set_nodelay(true) {
            tracing::debug!(%peer, %error, "TCP_NODELAY could not be set");
        }
        let stream = stream.into_std()?;
        // Held until the thread is in the books: its end takes it out.
        let mut live = self.lock();
        if live.stopped {
            return Ok(());
        }
        if live.threads.len() >= CONNECTIONS_MAX {
            tracing::warn!(%peer, limit = CONNECTIONS_MAX, "too many NBD connections: one is closed");
            return Ok(());
        }
        let number = live.next;
        live.next += 1;
        // The thread serves nobody else: it may wait for the disk that its one client waits for.
        let thread = ThreadRuntime::start_with_ring(&format!("hf-nbd-{number}"), LoneIo::Blocks)?;
        let (server, threads) = (self.server.clone(), Arc::downgrade(self));
        thread.handle().spawn(async move {
            let ended = match TcpStream::from_std(stream) {
                Ok(stream) => server.serve_connection(stream).await.map_err(|error| error.to_string()),
                Err(error) => Err(error.to_string()),
            };
            if let Err(error) = ended {
                tracing::info!(%peer, error, "an NBD connection ended");
            }
            if let Some(threads) = threads.upgrade() {
                threads.lock().threads.remove(&number);
            }
        });
        live.threads.insert(number, thread);
        Ok(())
    }

    /// Closes every connection and takes no more. Blocks for a moment; disk I/O under way may still land.
    pub fn stop(&self) {
        let threads = {
            let mut live = self.lock();
            live.stopped = true;
            std::mem::take(&mut live.threads)
        };
        for mut thread in threads.into_values() {
            thread.stop();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
