//! Real connections: a server in every pod that says its pod's name, and clients that want to hear it.
//!
//! Beside the prober, which sees only first packets: here a connection must come to its end in both directions.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, SockaddrStorage, connect, socket};

use crate::bed::Bed;
use crate::prober::PORTS;
use crate::world::{PodName, Protocol};

/// An allowed connection that takes longer is a failure. TCP repeats a lost SYN after 1 s.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(4);
/// After the last allowed connection of a pod, its other ones have this long to succeed wrongly.
const GRACE: Duration = Duration::from_millis(30);
/// A datagram is sent again after this.
const RESEND_INTERVAL: Duration = Duration::from_millis(100);
/// How often servers look whether they shall end.
const SERVER_POLL_MS: u16 = 50;

/// One connection to be tried.
#[derive(Debug, Clone)]
pub struct Attempt {
    /// The client.
    pub from: PodName,
    /// The server.
    pub to: PodName,
    /// Where it listens.
    pub target: SocketAddr,
    /// Whether it should come about.
    pub passes: bool,
}

/// The servers of all pods.
pub struct Servers {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl Servers {
    /// Starts one in every pod of the tables.
    ///
    /// # Errors
    /// A pod's network namespace cannot be entered.
    pub fn start(bed: &Bed) -> Result<Self> {
        // One socket for both families.
        let any = || vec![IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
        Self::start_at(bed.sandboxes().map(|(name, netns)| (name.clone(), netns.to_path_buf(), any())))
    }

    /// Starts one in each of these network namespaces, at these addresses; it says the name.
    ///
    /// # Errors
    /// A network namespace cannot be entered.
    pub fn start_at(places: impl Iterator<Item = (PodName, PathBuf, Vec<IpAddr>)>) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut servers = Self { stop: stop.clone(), threads: Vec::new() };
        let (ready, wait) = std::sync::mpsc::channel();
        for (name, netns, addresses) in places {
            let (name, stop, ready) = (name.to_string(), stop.clone(), ready.clone());
            servers.threads.push(std::thread::spawn(move || {
                enter(&netns)?;
                let (listeners, sockets) =
                    listen(&addresses).with_context(|| format!("the server of {name}"))?;
                ready.send(()).map_err(|_| anyhow!("nobody waits for the server"))?;
                drop(ready);
                serve(&name, &listeners, &sockets, &stop)
            }));
        }
        drop(ready);
        let started = wait.iter().take(servers.threads.len()).count();
        anyhow::ensure!(started == servers.threads.len(), "only {started} servers started");
        Ok(servers)
    }

    /// Tries all connections at once and tells which ended otherwise than they should.
    ///
    /// # Errors
    /// A pod's network namespace cannot be entered.
    pub fn try_all(&self, bed: &Bed, protocol: Protocol, attempts: Vec<Attempt>) -> Result<Vec<String>> {
        let mut by_client: BTreeMap<PodName, Vec<Attempt>> = BTreeMap::new();
        for attempt in attempts {
            by_client.entry(attempt.from.clone()).or_default().push(attempt);
        }
        let sandboxes: BTreeMap<PodName, PathBuf> =
            bed.sandboxes().map(|(name, netns)| (name.clone(), netns.to_path_buf())).collect();
        let outcomes: Vec<Result<Vec<String>>> = std::thread::scope(|scope| {
            let clients: Vec<_> = by_client
                .iter()
                .map(|(name, attempts)| {
                    let netns = sandboxes.get(name);
                    scope.spawn(move || {
                        enter(netns.with_context(|| format!("{name} has no sandbox"))?)?;
                        try_from_here(protocol, attempts)
                    })
                })
                .collect();
            let ended = clients
                .into_iter()
                .map(|client| client.join().unwrap_or_else(|_| Err(anyhow!("a client panicked"))));
            ended.collect()
        });
        let mut wrong = Vec::new();
        for outcome in outcomes {
            wrong.extend(outcome?);
        }
        Ok(wrong)
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            if let Ok(Err(error)) = thread.join() {
                eprintln!("{error:#}");
            }
        }
    }
}

/// Moves this thread into a network namespace, for good.
///
/// # Errors
/// There is none at that path.
pub fn enter(netns: &Path) -> Result<()> {
    let file = File::open(netns).with_context(|| format!("cannot open {}", netns.display()))?;
    setns(file, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")
}

fn listen(addresses: &[IpAddr]) -> Result<(Vec<TcpListener>, Vec<UdpSocket>)> {
    let (mut listeners, mut sockets) = (Vec::new(), Vec::new());
    for address in PORTS.iter().flat_map(|port| addresses.iter().map(|address| (*address, *port))) {
        let listener = TcpListener::bind(address)?;
        listener.set_nonblocking(true)?;
        listeners.push(listener);
        let socket = UdpSocket::bind(address)?;
        socket.set_nonblocking(true)?;
        sockets.push(socket);
    }
    Ok((listeners, sockets))
}

fn serve(name: &str, listeners: &[TcpListener], sockets: &[UdpSocket], stop: &AtomicBool) -> Result<()> {
    while !stop.load(Ordering::SeqCst) {
        let fds = listeners.iter().map(AsFd::as_fd).chain(sockets.iter().map(AsFd::as_fd));
        wait(fds.map(|fd| (fd, PollFlags::POLLIN)), SERVER_POLL_MS.into())?;
        for listener in listeners {
            while let Ok((mut stream, _)) = listener.accept() {
                // A client that is gone already is no error of the server.
                let _ = stream.write_all(name.as_bytes());
            }
        }
        for socket in sockets {
            let mut buffer = [0; 64];
            while let Ok((bytes, from)) = socket.recv_from(&mut buffer) {
                // Probes are empty; only a client that asks is answered.
                if bytes > 0 {
                    let _ = socket.send_to(name.as_bytes(), from);
                }
            }
        }
    }
    Ok(())
}

/// A connection under way.
enum Client {
    Connecting(TcpStream),
    Listening(TcpStream),
    Asking(UdpSocket),
    Ended(Result<String, String>),
}

impl Client {
    fn start(protocol: Protocol, target: SocketAddr) -> Result<Self> {
        if protocol == Protocol::Udp {
            let any: SocketAddr = if target.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
            let socket = UdpSocket::bind(any)?;
            socket.set_nonblocking(true)?;
            socket.connect(target)?;
            return Ok(Self::Asking(socket));
        }
        let family = if target.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 };
        let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
        let fd = socket(family, SockType::Stream, flags, None)?;
        match connect(fd.as_raw_fd(), &SockaddrStorage::from(target)) {
            Ok(()) | Err(Errno::EINPROGRESS) => Ok(Self::Connecting(TcpStream::from(fd))),
            Err(errno) => Ok(Self::Ended(Err(errno.to_string()))),
        }
    }

    fn wish(&self) -> Option<(BorrowedFd<'_>, PollFlags)> {
        match self {
            Self::Connecting(stream) => Some((stream.as_fd(), PollFlags::POLLOUT)),
            Self::Listening(stream) => Some((stream.as_fd(), PollFlags::POLLIN)),
            Self::Asking(socket) => Some((socket.as_fd(), PollFlags::POLLIN)),
            Self::Ended(_) => None,
        }
    }

    /// Goes on as far as it can without waiting.
    fn advance(self) -> Self {
        let would_block = |error: &std::io::Error| error.kind() == std::io::ErrorKind::WouldBlock;
        match self {
            Self::Connecting(stream) => match (stream.take_error(), stream.peer_addr()) {
                (Ok(Some(error)), _) | (Err(error), _) => Self::Ended(Err(error.to_string())),
                (Ok(None), Err(_)) => Self::Connecting(stream),
                (Ok(None), Ok(_)) => Self::Listening(stream).advance(),
            },
            Self::Listening(mut stream) => {
                let mut buffer = [0; 64];
                match stream.read(&mut buffer) {
                    Ok(bytes) => Self::Ended(Ok(String::from_utf8_lossy(&buffer[..bytes]).into_owned())),
                    Err(error) if would_block(&error) => Self::Listening(stream),
                    Err(error) => Self::Ended(Err(error.to_string())),
                }
            }
            Self::Asking(socket) => {
                let mut buffer = [0; 64];
                match socket.recv(&mut buffer) {
                    Ok(bytes) => Self::Ended(Ok(String::from_utf8_lossy(&buffer[..bytes]).into_owned())),
                    Err(error) if would_block(&error) => Self::Asking(socket),
                    Err(error) => Self::Ended(Err(error.to_string())),
                }
            }
            ended @ Self::Ended(_) => ended,
        }
    }
}

/// Tries every connection from the network namespace that this thread is in.
fn try_from_here(protocol: Protocol, attempts: &[Attempt]) -> Result<Vec<String>> {
    let started = attempts.iter().map(|attempt| Client::start(protocol, attempt.target));
    let mut clients = started.collect::<Result<Vec<Client>>>()?;
    let mut until = Instant::now() + CONNECT_TIMEOUT;
    let mut all_passed = false;
    let mut resend_at = Instant::now();
    while Instant::now() < until {
        if resend_at <= Instant::now() {
            resend_at += RESEND_INTERVAL;
            for client in &clients {
                if let Client::Asking(socket) = client {
                    // An error of the last datagram is read here; the next one asks anew.
                    let _ = socket.send(b"who?");
                }
            }
        }
        let next = until.min(resend_at).saturating_duration_since(Instant::now());
        let wishes = clients.iter().filter_map(Client::wish);
        wait(wishes, u64::try_from(next.as_millis()).unwrap_or(u64::MAX).saturating_add(1))?;
        clients = clients.into_iter().map(Client::advance).collect();
        let passed =
            |(attempt, client): (&Attempt, &Client)| !attempt.passes || matches!(client, Client::Ended(_));
        if !all_passed && attempts.iter().zip(&clients).all(passed) {
            all_passed = true;
            until = Instant::now() + GRACE;
        }
    }
    let ended = attempts.iter().zip(clients);
    Ok(ended.filter_map(|(attempt, client)| judge(protocol, attempt, &client)).collect())
}

fn judge(protocol: Protocol, attempt: &Attempt, client: &Client) -> Option<String> {
    let what = format!("{} -> {} ({}/{})", attempt.from, attempt.to, attempt.target, protocol.word());
    match client {
        Client::Ended(Ok(name)) if attempt.passes && *name == attempt.to.to_string() => None,
        Client::Ended(Ok(name)) if attempt.passes => Some(format!("{what}: {name:?} answered")),
        Client::Ended(Ok(_)) => Some(format!("{what}: connected and should not")),
        // A denied connection is dropped, never refused.
        Client::Ended(Err(error)) => Some(format!("{what}: {error}")),
        _ if attempt.passes => Some(format!("{what}: should connect and does not")),
        _ => None,
    }
}

fn wait<'a>(wishes: impl Iterator<Item = (BorrowedFd<'a>, PollFlags)>, timeout_ms: u64) -> Result<()> {
    let mut fds: Vec<PollFd<'_>> = wishes.map(|(fd, flags)| PollFd::new(fd, flags)).collect();
    match poll(&mut fds, PollTimeout::try_from(timeout_ms).unwrap_or(PollTimeout::MAX)) {
        Ok(_) | Err(Errno::EINTR) => Ok(()),
        Err(errno) => Err(errno).context("cannot wait for sockets"),
    }
}
