//! A connection that a change forbids stops at once, whichever side is sending; another one loses nothing.
//!
//! Both connections end at the same server. The times are the wall clock's, on a machine that may be busy: the median of
//! several rounds must keep the promise, and no round may take many times as long.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use holdfast_tests::process::wait_until;

use crate::bed::Bed;
use crate::connects::enter;
use crate::services::{near, with_services};
use crate::world::{PodName, Protocol};

/// A forbidden connection is silent after this.
const PROMISE: Duration = Duration::from_millis(100);
/// No single round may take longer, however busy the machine is.
const LIMIT: Duration = Duration::from_secs(1);
/// Rounds of each kind.
const ROUNDS: usize = 5;
/// How often the sending side sends.
const SEND_INTERVAL: Duration = Duration::from_millis(1);
/// From the threads' start until both connections run, on a machine that does other things as well.
const START_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the connections run before the change and after it.
const RUN: Duration = Duration::from_millis(250);
/// Port of the server.
const PORT: u16 = 80;
/// Admits x/b to y/b, and nobody else.
pub const ONLY_X_B: &str = "{podSelector: {matchLabels: {pod: b}}, policyTypes: [Ingress], \
    ingress: [{from: [{namespaceSelector: {matchLabels: {ns: x}}, podSelector: {matchLabels: {pod: b}}}]}]}";

/// Who sends.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sender {
    Server,
    Client,
}

/// One kind of connection.
#[derive(Debug, Clone, Copy)]
struct Kind {
    protocol: Protocol,
    sender: Sender,
    v6: bool,
    /// The Service that the clients ask for, whose address and port are translated; else the server itself.
    service: Option<[SocketAddr; 2]>,
}

/// Every kind, several times, without address translation.
pub fn run(bed: &mut Bed) -> Result<()> {
    every_kind(bed, None)
}

/// The same through a Service.
pub fn run_through_service(bed: &mut Bed) -> Result<()> {
    with_services(bed, |bed, services| every_kind(bed, Some(near(services)?.front)))
}

fn every_kind(bed: &mut Bed, service: Option<[SocketAddr; 2]>) -> Result<()> {
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        for sender in [Sender::Server, Sender::Client] {
            let mut times = Vec::new();
            for round in 0..ROUNDS {
                let kind = Kind { protocol, sender, v6: round % 2 == 1, service };
                times.push(round_of(bed, kind, "y/revoke").with_context(|| format!("{kind:?}"))?);
            }
            times.sort_unstable();
            let by = if service.is_some() { "through a Service" } else { "direct" };
            println!("revocation, {}, {by}, {sender:?} sends: silent after {times:?}", protocol.word());
            ensure!(times[ROUNDS / 2] <= PROMISE, "the median is {:?}", times[ROUNDS / 2]);
            ensure!(times[ROUNDS - 1] <= LIMIT, "one round took {:?}", times[ROUNDS - 1]);
        }
    }
    // The twin: a policy of another namespace forbids nothing here, and the connection must be seen to go on.
    let kind = Kind { protocol: Protocol::Tcp, sender: Sender::Server, v6: false, service };
    let goes_on = round_of(bed, kind, "z/revoke")?;
    ensure!(goes_on > PROMISE, "a connection that nothing forbids looks cut after {goes_on:?}");
    Ok(())
}

/// Lets x/a and x/b talk to y/b, admits only x/b from some moment on, and tells how long after it x/a was last heard.
fn round_of(bed: &mut Bed, kind: Kind, policy: &str) -> Result<Duration> {
    let mut world = bed.base();
    bed.show(&world)?;
    let name = PodName::new;
    let server_pod = &world.pods[&name("y/b")];
    let family = usize::from(kind.v6);
    let direct = SocketAddr::new(server_pod.addresses[family], PORT);
    let address = kind.service.map_or(direct, |front| front[family]);
    let sandbox = |pod: &str| -> Result<PathBuf> {
        let found = bed.sandboxes().find(|(other, _)| **other == name(pod));
        Ok(found.with_context(|| format!("{pod} has no sandbox"))?.1.to_path_buf())
    };
    let stop = Arc::new(AtomicBool::new(false));
    let begin = Instant::now();
    let clients = ["x/a", "x/b"].map(|pod| (world.pods[&name(pod)].addresses[family], Heard::new(begin)));
    let mut threads = vec![start_server(kind, sandbox("y/b")?, clients.clone(), stop.clone())?];
    for ((_, heard), pod) in clients.iter().zip(["x/a", "x/b"]) {
        threads.push(start_client(kind, sandbox(pod)?, address, heard.clone(), stop.clone()));
    }
    std::thread::sleep(RUN);
    wait_until(START_TIMEOUT, || Ok(clients.iter().all(|(_, heard)| heard.count() > 10)))
        .context("the connections do not run")?;

    world.put_policy(&name(policy), ONLY_X_B)?;
    let changed = begin.elapsed();
    bed.write(&world)?;
    std::thread::sleep(RUN);
    let late = begin.elapsed();
    std::thread::sleep(RUN);
    stop.store(true, Ordering::SeqCst);
    for thread in threads {
        thread.join().map_err(|_| anyhow!("a connection's thread panicked"))??;
    }
    let [(_, forbidden), (_, allowed)] = &clients;
    ensure!(allowed.last() > late, "the allowed connection stopped, too");
    let lost = allowed.lost();
    ensure!(lost.is_empty(), "the allowed connection lost {lost:?}; the change was at {changed:?}");
    Ok(forbidden.last().saturating_sub(changed))
}

/// What the receiving side of a connection heard.
#[derive(Clone)]
struct Heard(Arc<HeardInner>);

struct HeardInner {
    begin: Instant,
    last_ns: AtomicU64,
    parts: AtomicU64,
    /// Numbers that were missing, with the time at which that was noticed.
    lost: Mutex<Vec<(u64, Duration)>>,
}

impl Heard {
    fn new(begin: Instant) -> Self {
        let zero = AtomicU64::default;
        Self(Arc::new(HeardInner { begin, last_ns: zero(), parts: zero(), lost: Mutex::default() }))
    }

    /// Takes the next part's number; numbers count from 0.
    fn take(&self, number: u64) {
        let expected = self.0.parts.swap(number + 1, Ordering::SeqCst);
        let missing = (expected..number).map(|missing| (missing, self.0.begin.elapsed()));
        self.0.lost.lock().unwrap_or_else(PoisonError::into_inner).extend(missing);
        let now = u64::try_from(self.0.begin.elapsed().as_nanos()).unwrap_or(u64::MAX);
        self.0.last_ns.store(now, Ordering::SeqCst);
    }

    fn count(&self) -> u64 {
        self.0.parts.load(Ordering::SeqCst)
    }

    fn last(&self) -> Duration {
        Duration::from_nanos(self.0.last_ns.load(Ordering::SeqCst))
    }

    fn lost(&self) -> Vec<(u64, Duration)> {
        self.0.lost.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

type Running = JoinHandle<Result<()>>;

/// Serves both clients, told apart by their addresses.
fn start_server(
    kind: Kind,
    netns: PathBuf,
    clients: [(IpAddr, Heard); 2],
    stop: Arc<AtomicBool>,
) -> Result<Running> {
    let (ready, is_ready) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || {
        enter(&netns)?;
        let any = (Ipv6Addr::UNSPECIFIED, PORT);
        if kind.protocol == Protocol::Udp {
            let socket = UdpSocket::bind(any)?;
            ready.send(()).map_err(|_| anyhow!("nobody waits"))?;
            return serve_datagrams(kind.sender, &socket, &clients, &stop);
        }
        let listener = TcpListener::bind(any)?;
        ready.send(()).map_err(|_| anyhow!("nobody waits"))?;
        serve_streams(kind.sender, &listener, &clients, &stop)
    });
    if is_ready.recv().is_err() {
        thread.join().map_err(|_| anyhow!("the server panicked"))??;
        bail!("the server ended");
    }
    Ok(thread)
}

fn heard_of(clients: &[(IpAddr, Heard); 2], from: SocketAddr) -> Option<&Heard> {
    let address = from.ip().to_canonical();
    clients.iter().find(|(client, _)| *client == address).map(|(_, heard)| heard)
}

fn serve_streams(
    sender: Sender,
    listener: &TcpListener,
    clients: &[(IpAddr, Heard); 2],
    stop: &Arc<AtomicBool>,
) -> Result<()> {
    let mut threads: Vec<Running> = Vec::new();
    for _ in clients {
        let (stream, from) = listener.accept()?;
        let stop = stop.clone();
        threads.push(match sender {
            Sender::Server => std::thread::spawn(move || send_stream(stream, &stop)),
            Sender::Client => {
                let heard = heard_of(clients, from).context("a stranger connected")?.clone();
                std::thread::spawn(move || receive_stream(stream, &heard, &stop))
            }
        });
    }
    threads
        .into_iter()
        .try_for_each(|thread| thread.join().map_err(|_| anyhow!("a stream's thread panicked"))?)
}

fn serve_datagrams(
    sender: Sender,
    socket: &UdpSocket,
    clients: &[(IpAddr, Heard); 2],
    stop: &AtomicBool,
) -> Result<()> {
    socket.set_read_timeout(Some(SEND_INTERVAL))?;
    let mut known: Vec<(SocketAddr, u64)> = Vec::new();
    let mut buffer = [0; 8];
    while !stop.load(Ordering::SeqCst) {
        match socket.recv_from(&mut buffer) {
            Ok((_, from)) => {
                if sender == Sender::Client {
                    heard_of(clients, from).context("a stranger")?.take(u64::from_be_bytes(buffer));
                } else if known.iter().all(|(other, _)| *other != from) {
                    known.push((from, 0));
                }
            }
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error.into()),
        }
        if sender == Sender::Server {
            for (client, number) in &mut known {
                socket.send_to(&number.to_be_bytes(), *client)?;
                *number += 1;
            }
        }
    }
    Ok(())
}

fn start_client(
    kind: Kind,
    netns: PathBuf,
    server: SocketAddr,
    heard: Heard,
    stop: Arc<AtomicBool>,
) -> Running {
    std::thread::spawn(move || match kind.protocol {
        Protocol::Udp => client_datagrams(kind.sender, &netns, server, &heard, &stop),
        Protocol::Tcp | Protocol::Sctp => {
            enter(&netns)?;
            let stream = TcpStream::connect(server)?;
            match kind.sender {
                Sender::Server => receive_stream(stream, &heard, &stop),
                Sender::Client => send_stream(stream, &stop),
            }
        }
    })
}

fn client_datagrams(
    sender: Sender,
    netns: &Path,
    server: SocketAddr,
    heard: &Heard,
    stop: &AtomicBool,
) -> Result<()> {
    enter(netns)?;
    let any: SocketAddr = if server.is_ipv4() { ([0; 4], 0).into() } else { ([0u16; 8], 0).into() };
    let socket = UdpSocket::bind(any)?;
    socket.connect(server)?;
    socket.set_read_timeout(Some(Duration::from_millis(20)))?;
    let (mut number, mut buffer) = (0u64, [0; 8]);
    socket.send(&number.to_be_bytes())?;
    while !stop.load(Ordering::SeqCst) {
        if sender == Sender::Client {
            std::thread::sleep(SEND_INTERVAL);
            number += 1;
            socket.send(&number.to_be_bytes())?;
            continue;
        }
        match socket.recv(&mut buffer) {
            Ok(_) => heard.take(u64::from_be_bytes(buffer)),
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Sends numbers until told to stop. A peer that hears nothing any more fills the buffers: no reason to fail.
fn send_stream(mut stream: TcpStream, stop: &AtomicBool) -> Result<()> {
    stream.set_nodelay(true)?;
    stream.set_nonblocking(true)?;
    let mut number = 0u64;
    while !stop.load(Ordering::SeqCst) {
        std::thread::sleep(SEND_INTERVAL);
        match stream.write(&number.to_be_bytes()) {
            Ok(8) => number += 1,
            Ok(bytes) => bail!("{bytes} of 8 bytes were sent"),
            Err(error) if error.kind() == ErrorKind::WouldBlock => {}
            // The other side was told to stop first.
            Err(error) if stop.load(Ordering::SeqCst) => drop(error),
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn receive_stream(mut stream: TcpStream, heard: &Heard, stop: &AtomicBool) -> Result<()> {
    stream.set_read_timeout(Some(Duration::from_millis(20)))?;
    let (mut buffer, mut filled) = ([0; 8], 0);
    while !stop.load(Ordering::SeqCst) {
        match stream.read(&mut buffer[filled..]) {
            Ok(0) => return Ok(()),
            Ok(bytes) => filled += bytes,
            Err(error) if is_timeout(&error) => {}
            Err(error) => return Err(error.into()),
        }
        if filled == buffer.len() {
            heard.take(u64::from_be_bytes(buffer));
            filled = 0;
        }
    }
    Ok(())
}

fn is_timeout(error: &std::io::Error) -> bool {
    matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut)
}
