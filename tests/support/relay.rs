//! A link to a server that a test cuts: connections are passed on, or closed, or cut after some bytes.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use anyhow::Result;
use tokio::io::{AsyncReadExt, copy};
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Handle;
use tokio::sync::watch;
use tokio::task::JoinHandle;

/// A link on an address of its own, as long as it lives.
pub struct Relay {
    address: SocketAddr,
    link: Arc<Link>,
    task: JoinHandle<()>,
}

struct Link {
    is_closed: AtomicBool,
    /// How many bytes a new connection passes on from the server before it is cut.
    bytes_max: AtomicU64,
    /// Rises with each cut.
    cuts: watch::Sender<u64>,
    connections: AtomicU64,
}

impl Relay {
    /// A link to a server, on a free port of the loopback device.
    ///
    /// # Errors
    /// There is no port.
    pub fn start(runtime: &Handle, server: SocketAddr) -> Result<Self> {
        let listener = std::net::TcpListener::bind("127.0.0.1:0")?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let link = Arc::new(Link {
            is_closed: AtomicBool::new(false),
            bytes_max: AtomicU64::new(u64::MAX),
            cuts: watch::Sender::new(0),
            connections: AtomicU64::new(0),
        });
        let _entered = runtime.enter();
        let listener = TcpListener::from_std(listener)?;
        let task = runtime.spawn(serve(listener, server, Arc::clone(&link)));
        Ok(Self { address, link, task })
    }

    /// Where it listens.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Cuts all connections; new ones work.
    pub fn cut(&self) {
        self.link.cuts.send_modify(|cuts| *cuts += 1);
    }

    /// Cuts all connections and each new one.
    pub fn close(&self) {
        self.link.is_closed.store(true, Ordering::SeqCst);
        self.cut();
    }

    /// Ends [`Relay::close`].
    pub fn open(&self) {
        self.link.is_closed.store(false, Ordering::SeqCst);
    }

    /// Cuts each new connection after so many bytes from the server; `u64::MAX`: not at all.
    pub fn cut_after(&self, bytes: u64) {
        self.link.bytes_max.store(bytes, Ordering::SeqCst);
    }

    /// How many connections there were.
    #[must_use]
    pub fn connections(&self) -> u64 {
        self.link.connections.load(Ordering::SeqCst)
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.task.abort();
        self.close();
    }
}

async fn serve(listener: TcpListener, server: SocketAddr, link: Arc<Link>) {
    while let Ok((client, _)) = listener.accept().await {
        link.connections.fetch_add(1, Ordering::SeqCst);
        if !link.is_closed.load(Ordering::SeqCst) {
            tokio::spawn(pass_on(client, server, Arc::clone(&link)));
        }
    }
}

/// Ends, and closes both sides with it, at the first end or cut.
async fn pass_on(mut client: TcpStream, server: SocketAddr, link: Arc<Link>) {
    let mut cuts = link.cuts.subscribe();
    let Ok(mut server) = TcpStream::connect(server).await else { return };
    let (mut from_client, mut to_client) = client.split();
    let (from_server, mut to_server) = server.split();
    let mut from_server = from_server.take(link.bytes_max.load(Ordering::SeqCst));
    tokio::select! {
        _ = cuts.changed() => {}
        _ = copy(&mut from_client, &mut to_server) => {}
        _ = copy(&mut from_server, &mut to_client) => {}
    }
}
