//! Sends the first packet of every connection of a table at once and tells which arrived.
//!
//! One thread serves all pods: a socket belongs to the network namespace in which it was opened, whoever uses it later.
//! Pods listen with packet sockets; nodes with raw sockets, which get only what the node's own rules let in.
//!
//! Silence is the answer "denied", so silence must never be an accident:
//! - a round counts only if everything arrived that may pass, and the sentinels (node to own pod, always allowed) after it;
//!   else all of it is sent again under a new source port, at most [`ATTEMPTS_MAX`] times;
//! - whatever arrives is charged to the round whose source port it carries, however late: a packet that was wrongly let
//!   through is reported even if it comes when the next table is already being tried.

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::net::{IpAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd as _, AsRawFd as _, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sched::{CloneFlags, setns};
use nix::sys::socket::{
    AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, SockaddrIn6, recv, recvfrom,
    sendto, setsockopt, socket, sockopt,
};

use crate::oracle::End;
use crate::packets::{SOURCE_PORT_END, SOURCE_PORT_FIRST, Tuple, first_packet, parse};
use crate::world::Protocol;

/// Ports of a table.
pub const PORTS: [u16; 2] = [80, 81];
/// Port of sentinels.
const SENTINEL_PORT: u16 = 9;
/// Target ports from here on belong to markers.
pub const MARKER_PORT_FIRST: u16 = 20_000;
/// How often a table is sent again because something that may pass did not arrive.
const ATTEMPTS_MAX: u32 = 5;
/// How long the packets of a round may be under way.
const ROUND_TIMEOUT: Duration = Duration::from_millis(400);
/// After the last expected packet and the sentinels, listen this much longer for what should not come. What comes later
/// still is charged to its round.
const GRACE: Duration = Duration::from_millis(4);
/// Packets sent between two looks at what arrived, so that no receiver's buffer fills.
const BURST: usize = 64;
/// Room for all packets of a round at every receiver.
const RECEIVE_BUFFER_BYTES: usize = 4 << 20;

/// A connection that is tried.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Probe {
    /// Number of the sending station.
    pub source: usize,
    /// Number of the receiving station.
    pub target: usize,
    /// Transport.
    pub protocol: Protocol,
    /// Port of the target.
    pub port: u16,
    /// Over IPv6.
    pub v6: bool,
}

/// A probe that went otherwise than it should.
#[derive(Debug, Clone)]
pub struct Mismatch {
    /// The table that it belongs to.
    pub label: String,
    /// What was tried.
    pub what: String,
    /// Whether it should have passed.
    pub expected: bool,
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (should, did) = if self.expected { ("pass", "was dropped") } else { ("be dropped", "passed") };
        write!(f, "{}: {} should {should} and {did}", self.label, self.what)
    }
}

/// Somebody who sends and receives.
struct Station {
    end: End,
    addresses: [IpAddr; 2],
    /// Number of the node that it is, or lies on.
    node: usize,
    send: [OwnedFd; 2],
    receive: Vec<Receiver>,
}

/// A socket that packets arrive on.
enum Receiver {
    /// Gives packets from their IP header on.
    Whole(OwnedFd),
    /// Gives what follows an IPv6 header.
    Behind6(OwnedFd, Protocol),
}

/// One sending of a table.
struct Round {
    label: Arc<str>,
    table: Arc<Table>,
    expected: Vec<bool>,
    seen: Vec<bool>,
}

/// All probes between the stations of a moment.
struct Table {
    probes: Vec<Probe>,
    numbers: HashMap<Probe, usize>,
    names: Vec<String>,
}

/// Sends and receives for all stations.
pub struct Prober {
    stations: Vec<Station>,
    table: Arc<Table>,
    rounds: Vec<Round>,
    /// Per station and family, in this round.
    sentinels: Vec<[bool; 2]>,
    /// The highest marker port that arrived, by station.
    markers: Vec<u16>,
    late: Vec<Mismatch>,
    /// Packets sent as probes.
    pub packets: u64,
    /// Rounds that had to be sent again.
    pub repeated: u64,
}

impl Prober {
    /// Without any station.
    #[must_use]
    pub fn new() -> Self {
        let table = Arc::new(Table { probes: Vec::new(), numbers: HashMap::new(), names: Vec::new() });
        Self {
            stations: Vec::new(),
            table,
            rounds: Vec::new(),
            sentinels: Vec::new(),
            markers: Vec::new(),
            late: Vec::new(),
            packets: 0,
            repeated: 0,
        }
    }

    /// Adds a pod whose network namespace is at `netns`.
    ///
    /// # Errors
    /// The sockets cannot be opened.
    pub fn add_pod(&mut self, end: End, node: usize, addresses: [IpAddr; 2], netns: &Path) -> Result<()> {
        let (send, receive) = in_netns(netns, open_pod)?;
        self.add(Station { end, addresses, node, send, receive });
        Ok(())
    }

    /// Adds a node; the first node must be number 0 and so on.
    ///
    /// # Errors
    /// The sockets cannot be opened.
    pub fn add_node(&mut self, end: End, node: usize, addresses: [IpAddr; 2], netns: &Path) -> Result<()> {
        let (send, receive) = in_netns(netns, open_node)?;
        self.add(Station { end, addresses, node, send, receive });
        Ok(())
    }

    /// Forgets a pod that goes away.
    pub fn remove(&mut self, end: &End) {
        self.receive_all();
        self.stations.retain(|station| station.end != *end);
        self.rebuild();
    }

    /// The ends by the numbers that probes use, with their addresses.
    pub fn ends(&self) -> impl Iterator<Item = (&End, [IpAddr; 2])> {
        self.stations.iter().map(|station| (&station.end, station.addresses))
    }

    /// All probes of the table of now.
    pub fn probes(&self) -> &[Probe] {
        &self.table.probes
    }

    /// Tries every connection and compares. `expect` says whether a probe should pass.
    ///
    /// # Errors
    /// The sentinels do not arrive, or the system refuses.
    pub fn compare(&mut self, label: &str, expect: impl Fn(&Probe) -> bool) -> Result<Vec<Mismatch>> {
        let table = self.table.clone();
        let expected: Vec<bool> = table.probes.iter().map(expect).collect();
        let label: Arc<str> = label.into();
        let mut missing = Vec::new();
        for attempt in 0..ATTEMPTS_MAX {
            self.repeated += u64::from(attempt > 0);
            let seen = vec![false; expected.len()];
            self.rounds.push(Round {
                label: label.clone(),
                table: table.clone(),
                expected: expected.clone(),
                seen,
            });
            self.send_round()?;
            let round = self.rounds.last().context("a round was begun")?;
            let passed = round.wrong(false);
            missing = round.wrong(true);
            if !passed.is_empty() || missing.is_empty() {
                missing.extend(passed);
                break;
            }
        }
        missing.append(&mut self.late);
        Ok(missing)
    }

    /// What arrived after its round was judged, and should not have.
    pub fn take_late(&mut self) -> Vec<Mismatch> {
        self.receive_all();
        std::mem::take(&mut self.late)
    }

    /// Sends a datagram from a node to a pod's marker port and tells whether it arrived within `wait`.
    ///
    /// # Errors
    /// The system refuses.
    pub fn marker_arrives(&mut self, node: &End, pod: &End, port: u16, wait: Duration) -> Result<bool> {
        let number = |end: &End| self.stations.iter().position(|station| station.end == *end);
        let (from, to) = (number(node).context("no such node")?, number(pod).context("no such pod")?);
        self.send_one(from, to, Protocol::Udp, SOURCE_PORT_FIRST, port, 0);
        let until = Instant::now() + wait;
        while self.markers[to] < port && self.wait_readable(until)? {
            self.receive_all();
        }
        Ok(self.markers[to] >= port)
    }

    fn add(&mut self, station: Station) {
        self.receive_all();
        self.stations.push(station);
        self.rebuild();
    }

    fn rebuild(&mut self) {
        self.sentinels = vec![[false; 2]; self.stations.len()];
        self.markers = vec![0; self.stations.len()];
        let mut probes = Vec::new();
        let numbers = 0..self.stations.len();
        for source in numbers.filter(|number| is_in_tables(&self.stations[*number].end)) {
            for (target, receiver) in self.stations.iter().enumerate() {
                let is_beds_own = is_pod(&receiver.end) && !is_in_tables(&receiver.end);
                if source == target || is_beds_own {
                    continue;
                }
                for protocol in Protocol::ALL {
                    for port in PORTS {
                        probes.extend([false, true].map(|v6| Probe { source, target, protocol, port, v6 }));
                    }
                }
            }
        }
        let numbers = probes.iter().cloned().enumerate().map(|(number, probe)| (probe, number)).collect();
        let names = self.stations.iter().map(|station| name_of(&station.end)).collect();
        self.table = Arc::new(Table { probes, numbers, names });
    }

    /// Sends the newest round and waits for what it should bring.
    fn send_round(&mut self) -> Result<()> {
        let source_port = SOURCE_PORT_FIRST + u16::try_from(self.rounds.len()).unwrap_or(u16::MAX);
        ensure!(source_port < SOURCE_PORT_END, "all source ports are used up");
        let table = self.table.clone();
        for burst in table.probes.chunks(BURST) {
            for probe in burst {
                let family = usize::from(probe.v6);
                self.send_one(probe.source, probe.target, probe.protocol, source_port, probe.port, family);
            }
            self.packets += burst.len() as u64;
            self.receive_all();
        }
        self.sentinels.fill([false; 2]);
        let until = Instant::now() + ROUND_TIMEOUT;
        while !self.sentinels_arrived() && Instant::now() < until {
            self.send_sentinels(source_port);
            let again = Instant::now() + GRACE;
            while !self.sentinels_arrived() && self.wait_readable(again)? {
                self.receive_all();
            }
        }
        ensure!(self.sentinels_arrived(), "packets from nodes to their own pods do not arrive");
        while !self.round_is_whole() && self.wait_readable(until)? {
            self.receive_all();
        }
        let until = Instant::now() + GRACE;
        while self.wait_readable(until)? {
            self.receive_all();
        }
        Ok(())
    }

    fn round_is_whole(&self) -> bool {
        self.rounds.last().is_none_or(|round| {
            round.expected.iter().zip(&round.seen).all(|(expected, seen)| *seen || !expected)
        })
    }

    fn sentinels_arrived(&self) -> bool {
        let mut pods = self.stations.iter().zip(&self.sentinels).filter(|(station, _)| is_pod(&station.end));
        pods.all(|(_, seen)| seen == &[true; 2])
    }

    fn send_sentinels(&self, source_port: u16) {
        for (from, node) in self.stations.iter().enumerate().filter(|(_, station)| !is_pod(&station.end)) {
            for (to, pod) in self.stations.iter().enumerate() {
                if is_pod(&pod.end) && pod.node == node.node {
                    for family in [0, 1].into_iter().filter(|family| !self.sentinels[to][*family]) {
                        self.send_one(from, to, Protocol::Udp, source_port, SENTINEL_PORT, family);
                    }
                }
            }
        }
    }

    /// A packet that the kernel does not take now is a lost one: the round is repeated.
    fn send_one(
        &self,
        from: usize,
        to: usize,
        protocol: Protocol,
        source_port: u16,
        port: u16,
        family: usize,
    ) {
        let (sender, receiver) = (&self.stations[from], &self.stations[to]);
        let (source, target) = (sender.addresses[family], receiver.addresses[family]);
        let packet = first_packet(&Tuple { source, target, protocol, source_port, target_port: port });
        let fd = sender.send[family].as_raw_fd();
        let flags = MsgFlags::MSG_DONTWAIT;
        let _ = match target {
            IpAddr::V4(address) => {
                sendto(fd, &packet, &SockaddrIn::from(SocketAddrV4::new(address, 0)), flags)
            }
            IpAddr::V6(address) => {
                sendto(fd, &packet, &SockaddrIn6::from(SocketAddrV6::new(address, 0, 0, 0)), flags)
            }
        };
    }

    /// Waits until anything can be read; false at the deadline.
    fn wait_readable(&self, until: Instant) -> Result<bool> {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Ok(false);
        }
        let fds = self.stations.iter().flat_map(|station| &station.receive).map(Receiver::fd);
        let mut fds: Vec<PollFd<'_>> = fds.map(|fd| PollFd::new(fd.as_fd(), PollFlags::POLLIN)).collect();
        let timeout = PollTimeout::try_from(left + Duration::from_micros(999)).unwrap_or(PollTimeout::MAX);
        match poll(&mut fds, timeout) {
            Ok(ready) => Ok(ready > 0),
            Err(Errno::EINTR) => Ok(true),
            Err(errno) => Err(errno).context("cannot wait for packets"),
        }
    }

    fn receive_all(&mut self) {
        let mut arrived = Vec::new();
        for (number, station) in self.stations.iter().enumerate() {
            for receiver in &station.receive {
                receiver.drain(station.addresses[1], |tuple| arrived.push((number, tuple)));
            }
        }
        for (station, tuple) in arrived {
            self.take(station, &tuple);
        }
    }

    fn take(&mut self, station: usize, tuple: &Tuple) {
        let family = usize::from(tuple.target.is_ipv6());
        if self.stations[station].addresses[family] != tuple.target
            || !(SOURCE_PORT_FIRST..SOURCE_PORT_END).contains(&tuple.source_port)
        {
            return;
        }
        // Source ports count up: round n is entry n - 1.
        let round = usize::from(tuple.source_port - SOURCE_PORT_FIRST);
        if tuple.target_port >= MARKER_PORT_FIRST {
            self.markers[station] = self.markers[station].max(tuple.target_port);
        } else if tuple.target_port == SENTINEL_PORT {
            self.sentinels[station][family] |= round == self.rounds.len();
        } else if let Some(source) = self.stations.iter().position(|s| s.addresses[family] == tuple.source) {
            let (protocol, port) = (tuple.protocol, tuple.target_port);
            self.charge(round, &Probe { source, target: station, protocol, port, v6: family == 1 });
        }
    }

    fn charge(&mut self, round: usize, probe: &Probe) {
        let is_last = round == self.rounds.len();
        let Some(round) = round.checked_sub(1).and_then(|index| self.rounds.get_mut(index)) else { return };
        if !Arc::ptr_eq(&round.table, &self.table) {
            // The stations have other numbers since. What was under way was received before that change.
            return;
        }
        let Some(&at) = round.table.numbers.get(probe) else { return };
        if !is_last && !round.seen[at] && !round.expected[at] {
            self.late.push(round.mismatch(at));
        }
        round.seen[at] = true;
    }
}

impl Round {
    /// Those expected to pass (or not) that did not (or did).
    fn wrong(&self, expected: bool) -> Vec<Mismatch> {
        let numbers = 0..self.expected.len();
        let wrong = numbers.filter(|at| self.expected[*at] == expected && self.seen[*at] != expected);
        wrong.map(|at| self.mismatch(at)).collect()
    }

    fn mismatch(&self, at: usize) -> Mismatch {
        let probe = &self.table.probes[at];
        let family = if probe.v6 { "IPv6" } else { "IPv4" };
        let (from, to) = (&self.table.names[probe.source], &self.table.names[probe.target]);
        let what = format!("{from} -> {to}:{}/{} over {family}", probe.port, probe.protocol.word());
        Mismatch { label: self.label.to_string(), what, expected: self.expected[at] }
    }
}

impl Receiver {
    fn fd(&self) -> &OwnedFd {
        match self {
            Self::Whole(fd) | Self::Behind6(fd, _) => fd,
        }
    }

    /// Reads until nothing is left. An error of the socket is a lost packet at worst.
    fn drain(&self, own6: IpAddr, mut take: impl FnMut(Tuple)) {
        let mut buffer = [0u8; 128];
        match self {
            Self::Whole(fd) => {
                while let Ok(bytes) = recv(fd.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                    parse(&buffer[..bytes.min(buffer.len())]).into_iter().for_each(&mut take);
                }
            }
            Self::Behind6(fd, protocol) => {
                while let Ok((bytes, Some(from))) = recvfrom::<SockaddrIn6>(fd.as_raw_fd(), &mut buffer) {
                    if bytes < 4 {
                        continue;
                    }
                    let port = |at: usize| u16::from_be_bytes([buffer[at], buffer[at + 1]]);
                    take(Tuple {
                        source: from.ip().into(),
                        target: own6,
                        protocol: *protocol,
                        source_port: port(0),
                        target_port: port(2),
                    });
                }
            }
        }
    }
}

/// Sees what arrives in a network namespace, from its opening on.
pub struct Capture(Vec<Receiver>);

impl Capture {
    /// Opens it.
    ///
    /// # Errors
    /// The sockets cannot be opened.
    pub fn open(netns: &Path) -> Result<Self> {
        Ok(Self(in_netns(netns, open_pod)?.1))
    }

    /// What arrived since the last call.
    #[must_use]
    pub fn drain(&self) -> Vec<Tuple> {
        let mut arrived = Vec::new();
        for receiver in &self.0 {
            receiver.drain(IpAddr::V6(std::net::Ipv6Addr::UNSPECIFIED), |tuple| arrived.push(tuple));
        }
        arrived
    }
}

/// Pods that only serve the test bed are in no table.
fn is_in_tables(end: &End) -> bool {
    matches!(end, End::Pod(name) if name.namespace != crate::bed::SETTLE_NAMESPACE)
}

fn is_pod(end: &End) -> bool {
    matches!(end, End::Pod(_))
}

fn name_of(end: &End) -> String {
    match end {
        End::Pod(name) => name.to_string(),
        End::Node(name) => format!("node {name}"),
    }
}

type Sockets = ([OwnedFd; 2], Vec<Receiver>);

/// Runs `open` on a thread of its own inside a network namespace; what it opens stays there.
pub fn in_netns<T: Send + 'static>(netns: &Path, open: fn() -> Result<T>) -> Result<T> {
    let file = File::open(netns).with_context(|| format!("cannot open {}", netns.display()))?;
    let thread = std::thread::spawn(move || {
        setns(file, CloneFlags::CLONE_NEWNET).context("cannot enter the network namespace")?;
        open()
    });
    thread.join().map_err(|_| anyhow::anyhow!("the thread in the network namespace panicked"))?
}

fn open_pod() -> Result<Sockets> {
    let whole = |protocol: SockProtocol| {
        opened(AddressFamily::Packet, SockType::Datagram, protocol).map(Receiver::Whole)
    };
    Ok((open_senders()?, vec![whole(SockProtocol::EthIp)?, whole(SockProtocol::EthIpv6)?]))
}

fn open_node() -> Result<Sockets> {
    let numbers = [
        (Protocol::Tcp, SockProtocol::Tcp),
        (Protocol::Udp, SockProtocol::Udp),
        (Protocol::Sctp, SockProtocol::Sctp),
    ];
    let mut receive = Vec::new();
    for (protocol, number) in numbers {
        receive.push(Receiver::Whole(opened(AddressFamily::Inet, SockType::Raw, number)?));
        receive.push(Receiver::Behind6(opened(AddressFamily::Inet6, SockType::Raw, number)?, protocol));
    }
    Ok((open_senders()?, receive))
}

/// Raw sockets of protocol 255 only send, headers and all.
///
/// # Errors
/// They cannot be opened.
pub fn open_senders() -> Result<[OwnedFd; 2]> {
    let sender = |family| opened(family, SockType::Raw, SockProtocol::Raw);
    Ok([sender(AddressFamily::Inet)?, sender(AddressFamily::Inet6)?])
}

fn opened(family: AddressFamily, kind: SockType, protocol: SockProtocol) -> Result<OwnedFd> {
    let flags = SockFlag::SOCK_NONBLOCK | SockFlag::SOCK_CLOEXEC;
    let fd = socket(family, kind, flags, protocol)
        .with_context(|| format!("cannot open a {family:?} socket for {protocol:?}"))?;
    setsockopt(&fd, sockopt::RcvBufForce, &RECEIVE_BUFFER_BYTES)
        .context("cannot enlarge a receive buffer")?;
    Ok(fd)
}
