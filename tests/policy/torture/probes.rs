//! Who reaches whom, asked without a pause: every pod sends to every other one in both families, and each answer, silence and
//! forbidden arrival is judged against what holds at that moment.
//!
//! A probe is a datagram that the other pod sends back. Source ports change, so that beside known connections there are always new
//! ones. A forged packet carries the address of a pod that would be let in.
//!
//! Excuses say what a fault may cost: pods, pairs of nodes or a node whose packets may be lost until a time, a node whose rules
//! may be gone until a time, verdicts of before an edit that may still be in force. Nothing else excuses anything.

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6, UdpSocket};
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::time::{Duration, Instant};

use anyhow::Result;
use holdfast_tests::netbed::Attachment;
use nix::sys::socket::{MsgFlags, SockaddrIn, SockaddrIn6, sendto};

use crate::packets::{Tuple, first_packet};
use crate::prober::{in_netns, open_senders};
use crate::world::Protocol;

/// Nodes of the network.
pub const NODES: usize = 3;
/// How often every pair is tried.
pub const TICK: Duration = Duration::from_millis(200);
/// An answer that takes longer is none.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(1);
/// So many probes of a pair lost one after another are a cut; fewer are counted as lost.
const CUT_TICKS: u32 = 5;
/// Where pods answer.
const PORT: u16 = 80;
/// Source port of forged packets; no probe has it.
const FORGED_PORT: u16 = 6666;
/// Sockets that a pod sends from in turn, each for [`TICKS_PER_SENDER`]: when its turn comes again, conntrack has forgotten it.
const SENDERS: usize = 8;
const TICKS_PER_SENDER: u32 = 5;
/// Longer than any run's single fault.
const OPEN_END: Duration = Duration::from_secs(1000);
/// Lost probes that are told one by one.
const LOST_TOLD_MAX: u64 = 500;
/// More breaches than these tell nothing new.
const BREACHES_MAX: usize = 20;

/// What a pod's label says, and policies go by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    Web,
    Client,
    Stranger,
}

impl Role {
    pub const ALL: [Self; 3] = [Self::Web, Self::Client, Self::Stranger];

    pub fn word(self) -> &'static str {
        match self {
            Self::Web => "web",
            Self::Client => "client",
            Self::Stranger => "stranger",
        }
    }
}

/// Which of three policies for strangers is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Edit {
    Open,
    FromWeb,
    FromClient,
}

impl Edit {
    pub const ALL: [Self; 3] = [Self::Open, Self::FromWeb, Self::FromClient];
}

/// The oracle: only clients reach web, clients reach only web and clients, and strangers are reached as the edit says.
pub fn allows(from: Role, to: Role, edit: Edit) -> bool {
    let egress = from != Role::Client || to != Role::Stranger;
    let ingress = match (to, edit) {
        (Role::Web, _) => from == Role::Client,
        (Role::Client, _) | (Role::Stranger, Edit::Open) => true,
        (Role::Stranger, Edit::FromWeb) => from == Role::Web,
        (Role::Stranger, Edit::FromClient) => from == Role::Client,
    };
    egress && ingress
}

/// What was counted.
#[derive(Debug, Default, Clone)]
pub struct Counts {
    /// Allowed probes that were answered.
    pub passed: u64,
    /// Allowed ones that a fault excuses and that were lost.
    pub excused: u64,
    /// Allowed ones that were lost without an excuse, each alone.
    pub lost: u64,
    /// Probes of pairs that are denied.
    pub denied: u64,
    /// Denied or forged packets that arrived where the rules had just been taken away.
    pub leaked: u64,
    /// Forged packets.
    pub forged: u64,
    /// The longest that an excused pair had no answer, by the fault that excused it.
    pub outages: BTreeMap<&'static str, Duration>,
}

struct Station {
    name: String,
    node: usize,
    role: Role,
    addresses: [IpAddr; 2],
    listener: UdpSocket,
    senders: Vec<UdpSocket>,
    raw: [OwnedFd; 2],
    excuse: Excuse,
    /// An agent that is away has not heard of it.
    is_young: bool,
}

/// Until when something may be lost, and why.
#[derive(Debug, Clone, Copy)]
struct Excuse {
    since: Instant,
    until: Instant,
    why: &'static str,
    /// A fault followed before the one before was forgotten: which of them costs what cannot be told.
    is_mixed: bool,
}

impl Excuse {
    fn none(now: Instant) -> Self {
        Self { since: now, until: now, why: "nothing", is_mixed: false }
    }

    /// A later fault's end does not shorten an earlier one's.
    fn extend(&mut self, until: Instant, why: &'static str) {
        let now = Instant::now();
        if self.until < now {
            (self.since, self.why, self.is_mixed) = (now, why, false);
        } else {
            self.is_mixed |= self.why != why;
        }
        self.until = self.until.max(until);
    }
}

/// Of which probe: sender, receiver, family.
type Path = (u32, u32, usize);

/// All pods, all excuses.
pub struct Network {
    /// For what is printed.
    pub started: Instant,
    /// Losses are meant.
    pub is_sabotaged: bool,
    stations: BTreeMap<u32, Station>,
    next_station: u32,
    tick: u32,
    sent: VecDeque<(u32, Instant, BTreeMap<Path, bool>)>,
    silent: BTreeMap<Path, u32>,
    pairs: [[Excuse; NODES]; NODES],
    /// Faults that last until they are ended, however long that takes.
    held: [[u32; NODES]; NODES],
    leaky: [Instant; NODES],
    leaks_held: [bool; NODES],
    /// What is new is not known everywhere before it is back.
    is_agent_away: bool,
    /// The newest one is in force; an older one may be until its time.
    edits: Vec<(Edit, Instant)>,
    /// Of this run.
    pub counts: Counts,
    /// What must not happen and did.
    pub breaches: Vec<String>,
    pub stop: bool,
}

impl Network {
    pub fn new(edit: Edit) -> Self {
        let now = Instant::now();
        Self {
            started: now,
            is_sabotaged: false,
            stations: BTreeMap::new(),
            next_station: 1,
            tick: 0,
            sent: VecDeque::new(),
            silent: BTreeMap::new(),
            pairs: [[Excuse::none(now); NODES]; NODES],
            held: [[0; NODES]; NODES],
            leaky: [now; NODES],
            leaks_held: [false; NODES],
            is_agent_away: false,
            edits: vec![(edit, now)],
            counts: Counts::default(),
            breaches: Vec::new(),
            stop: false,
        }
    }

    /// Puts an attached pod among those that are probed.
    pub fn add(&mut self, name: &str, role: Role, attachment: &Attachment) -> Result<u32> {
        let (listener, senders, raw) = in_netns(&attachment.netns, open_station)?;
        let id = self.next_station;
        self.next_station += 1;
        let station = Station {
            name: name.to_owned(),
            node: attachment.node,
            role,
            addresses: attachment.addresses,
            listener,
            senders,
            raw,
            excuse: Excuse::none(Instant::now()),
            is_young: self.is_agent_away,
        };
        self.stations.insert(id, station);
        Ok(id)
    }

    pub fn remove(&mut self, station: u32) {
        self.stations.remove(&station);
        self.silent.retain(|path, _| path.0 != station && path.1 != station);
    }

    /// Packets of one pod may be lost.
    pub fn excuse_pod(&mut self, station: u32, until: Instant, why: &'static str) {
        if let Some(station) = self.stations.get_mut(&station) {
            station.excuse.extend(until, why);
        }
    }

    /// Packets between two nodes, or within one, may be lost.
    pub fn excuse_pair(&mut self, one: usize, other: usize, until: Instant, why: &'static str) {
        self.pairs[one][other].extend(until, why);
        if one != other {
            self.pairs[other][one].extend(until, why);
        }
    }

    /// A fault between two nodes begins that lasts until [`Network::release_pair`].
    pub fn hold_pair(&mut self, one: usize, other: usize) {
        self.held[one][other] += 1;
        self.held[other][one] = self.held[one][other];
    }

    /// It ended; packets may be lost until a time.
    pub fn release_pair(&mut self, one: usize, other: usize, until: Instant, why: &'static str) {
        self.held[one][other] = self.held[one][other].saturating_sub(1);
        self.held[other][one] = self.held[one][other];
        self.excuse_pair(one, other, until, why);
    }

    /// A node's rules may be gone.
    pub fn excuse_leak(&mut self, node: usize, until: Instant) {
        self.leaky[node] = self.leaky[node].max(until);
    }

    /// A node's rules may be gone until that is taken back.
    pub fn hold_leak(&mut self, node: usize, held: bool) {
        self.leaks_held[node] = held;
    }

    fn may_leak(&self, node: usize) -> bool {
        self.leaks_held[node] || self.leaky[node] > Instant::now()
    }

    /// Whether a node itself is disturbed at this moment.
    pub fn is_excused(&self, node: usize) -> bool {
        let held = self.held[node].iter().any(|held| *held > 0);
        held || self.pairs[node].iter().any(|excuse| excuse.until > Instant::now())
    }

    /// From now on `edit` is in force, or will be; the one before may be until `until`, or until every agent is back.
    pub fn edit(&mut self, edit: Edit, until: Instant) {
        if let Some(before) = self.edits.last_mut() {
            before.1 = until;
        }
        self.edits.push((edit, until));
        self.keep_edits(if self.is_agent_away { until + OPEN_END } else { until });
    }

    /// Some agent is away now, or none is: all will have heard of everything by `until`.
    pub fn set_agent_away(&mut self, away: bool, until: Instant) {
        if away && !self.is_agent_away {
            self.keep_edits(until + OPEN_END);
            let now = Instant::now();
            self.stations.values_mut().for_each(|it| it.is_young |= it.excuse.until > now);
        }
        if !away && self.is_agent_away {
            for station in self.stations.values_mut().filter(|it| it.is_young) {
                station.is_young = false;
                station.excuse.extend(until, "new pod");
            }
            let open = Instant::now() + OPEN_END / 2;
            self.edits.iter_mut().filter(|edit| edit.1 > open).for_each(|edit| edit.1 = until);
        }
        self.is_agent_away = away;
    }

    /// Edits that may not be everywhere yet stay so until then.
    fn keep_edits(&mut self, until: Instant) {
        let now = Instant::now();
        if let Some((_, older)) = self.edits.split_last_mut() {
            older.iter_mut().filter(|edit| edit.1 > now).for_each(|edit| edit.1 = until.max(edit.1));
        }
    }

    /// Sends one probe for each pair and family, and one forged packet.
    pub fn send(&mut self) {
        self.tick += 1;
        let mut paths = BTreeMap::new();
        let turn = usize::try_from(self.tick / TICKS_PER_SENDER).unwrap_or(0) % SENDERS;
        for (from, sender) in &self.stations {
            for (to, target) in self.stations.iter().filter(|(to, _)| *to != from) {
                for (family, address) in target.addresses.iter().enumerate() {
                    let payload = mk_payload(self.tick, *from, *to, family);
                    // What the kernel does not take is a lost probe.
                    let _ = sender.senders[turn].send_to(&payload, mapped(*address, PORT));
                    paths.insert((*from, *to, family), false);
                }
            }
        }
        self.sent.push_back((self.tick, Instant::now(), paths));
        self.forge();
    }

    /// Receives whatever came, answers probes and takes answers.
    pub fn receive(&mut self) {
        let mut arrived = Vec::new();
        for (id, station) in &self.stations {
            let mut buffer = [0; 64];
            while let Ok((bytes, from)) = station.listener.recv_from(&mut buffer) {
                arrived.push((*id, from, buffer[..bytes].to_vec()));
            }
            for sender in &station.senders {
                while let Ok((bytes, _)) = sender.recv_from(&mut buffer) {
                    let Some((tick, path)) = read_payload(&buffer[..bytes]) else { continue };
                    let sent = self.sent.iter_mut().find(|sent| sent.0 == tick);
                    if let Some(answered) = sent.and_then(|sent| sent.2.get_mut(&path)) {
                        *answered = true;
                    }
                }
            }
        }
        for (id, from, payload) in arrived {
            let is_asked = self.judge_arrival(id, from.port(), read_payload(&payload).map(|(_, path)| path));
            if let Some(station) = self.stations.get(&id).filter(|_| is_asked) {
                let _ = station.listener.send_to(&payload, from);
            }
        }
    }

    /// Judges probes that have had their time.
    pub fn judge(&mut self) {
        let now = Instant::now();
        while self.sent.front().is_some_and(|sent| sent.1 + ANSWER_TIMEOUT < now) {
            let Some((_, sent, paths)) = self.sent.pop_front() else { return };
            for (path, answered) in paths {
                self.judge_probe(path, sent, answered);
            }
        }
        let newest = self.edits.pop();
        self.edits.retain(|(_, until)| *until + ANSWER_TIMEOUT * 2 > now);
        self.edits.extend(newest);
    }

    fn judge_probe(&mut self, path: Path, sent: Instant, answered: bool) {
        let (Some(from), Some(to)) = (self.stations.get(&path.0), self.stations.get(&path.1)) else { return };
        let newest = self.edits.len() - 1;
        let possible = self.edits.iter().enumerate().filter(|(at, edit)| *at == newest || edit.1 > sent);
        let mut verdicts = possible.map(|(_, edit)| allows(from.role, to.role, edit.0));
        let first = verdicts.next();
        if verdicts.any(|verdict| Some(verdict) != first) {
            return;
        }
        if first == Some(false) {
            self.counts.denied += 1;
            return;
        }
        if answered {
            self.counts.passed += 1;
            self.silent.remove(&path);
            return;
        }
        let excuses = [&from.excuse, &to.excuse, &self.pairs[from.node][to.node]];
        if self.held[from.node][to.node] > 0 || from.is_young || to.is_young {
            self.counts.excused += 1;
            self.silent.remove(&path);
            return;
        }
        let excuses: Vec<Excuse> =
            excuses.into_iter().filter(|excuse| excuse.until > sent).copied().collect();
        if let Some(excuse) = excuses.first() {
            if excuses.len() == 1 && !excuse.is_mixed {
                let outage = self.counts.outages.entry(excuse.why).or_default();
                *outage = (*outage).max(sent.saturating_duration_since(excuse.since));
            }
            self.counts.excused += 1;
            self.silent.remove(&path);
            return;
        }
        self.counts.lost += 1;
        if self.counts.lost <= LOST_TOLD_MAX && !self.is_sabotaged {
            println!(
                "{:8.2} s  lost: {}",
                sent.saturating_duration_since(self.started).as_secs_f64(),
                describe(from, to, path.2)
            );
        }
        let silent = self.silent.entry(path).or_default();
        *silent += 1;
        if *silent == CUT_TICKS {
            let what = format!("no answer for {:?}: {}", TICK * CUT_TICKS, describe(from, to, path.2));
            self.breach(what);
        }
    }

    /// True for a probe that is to be answered.
    ///
    /// What is denied is not: an answer that leaves when the rules are back, or when the connection's entry is deleted, is a new
    /// connection in the other direction, which policies may allow, and the denied sender's next packets are its replies.
    fn judge_arrival(&mut self, at: u32, port: u16, path: Option<Path>) -> bool {
        let now = Instant::now();
        let Some(to) = self.stations.get(&at) else { return false };
        if port == FORGED_PORT {
            if (0..NODES).any(|node| self.may_leak(node)) {
                self.counts.leaked += 1;
            } else {
                let what = format!("a forged packet arrived at {}", to.name);
                self.breach(what);
            }
            return false;
        }
        let Some((from, meant, family)) = path else { return false };
        let Some(from) = self.stations.get(&from).filter(|_| meant == at) else { return false };
        if self.edits.last().is_some_and(|(edit, _)| allows(from.role, to.role, *edit)) {
            return true;
        }
        let mut older = self.edits.iter().filter(|(_, until)| *until > now);
        if older.any(|(edit, _)| allows(from.role, to.role, *edit)) {
            return false;
        }
        if self.may_leak(from.node) || self.may_leak(to.node) {
            self.counts.leaked += 1;
        } else {
            let what = format!("a denied packet arrived: {}", describe(from, to, family));
            self.breach(what);
        }
        false
    }

    /// A stranger sends with the address of a client to a web pod.
    fn forge(&mut self) {
        let of =
            |role: Role| -> Vec<&Station> { self.stations.values().filter(|s| s.role == role).collect() };
        let (strangers, clients, webs) = (of(Role::Stranger), of(Role::Client), of(Role::Web));
        if strangers.is_empty() || clients.is_empty() || webs.is_empty() {
            return;
        }
        let at = usize::try_from(self.tick).unwrap_or(0);
        let forger = strangers[at % strangers.len()];
        let (forged, target) = (clients[at / 3 % clients.len()], webs[at / 7 % webs.len()]);
        for family in 0..2 {
            let tuple = Tuple {
                source: forged.addresses[family],
                target: target.addresses[family],
                protocol: Protocol::Udp,
                source_port: FORGED_PORT,
                target_port: PORT,
            };
            let (fd, packet, flags) =
                (forger.raw[family].as_raw_fd(), first_packet(&tuple), MsgFlags::MSG_DONTWAIT);
            let _ = match tuple.target {
                IpAddr::V4(address) => {
                    sendto(fd, &packet, &SockaddrIn::from(SocketAddrV4::new(address, 0)), flags)
                }
                IpAddr::V6(address) => {
                    sendto(fd, &packet, &SockaddrIn6::from(SocketAddrV6::new(address, 0, 0, 0)), flags)
                }
            };
            self.counts.forged += 1;
        }
    }

    fn breach(&mut self, what: String) {
        if self.breaches.len() < BREACHES_MAX {
            self.breaches.push(what);
        }
    }
}

fn describe(from: &Station, to: &Station, family: usize) -> String {
    let station = |it: &Station| format!("{} ({}, node {})", it.name, it.addresses[family], it.node);
    format!("{} -> {}", station(from), station(to))
}

type Sockets = (UdpSocket, Vec<UdpSocket>, [OwnedFd; 2]);

/// Both families on each socket.
fn open_station() -> Result<Sockets> {
    let open = |port: u16| -> Result<UdpSocket> {
        let socket = UdpSocket::bind(SocketAddrV6::new([0; 8].into(), port, 0, 0))?;
        socket.set_nonblocking(true)?;
        Ok(socket)
    };
    let senders = (0..SENDERS).map(|_| open(0)).collect::<Result<_>>()?;
    Ok((open(PORT)?, senders, open_senders()?))
}

fn mapped(address: IpAddr, port: u16) -> SocketAddr {
    let address = match address {
        IpAddr::V4(address) => address.to_ipv6_mapped(),
        IpAddr::V6(address) => address,
    };
    SocketAddr::new(address.into(), port)
}

fn mk_payload(tick: u32, from: u32, to: u32, family: usize) -> Vec<u8> {
    let family = u32::try_from(family).unwrap_or(0);
    [tick, from, to, family].iter().flat_map(|number| number.to_be_bytes()).collect()
}

fn read_payload(payload: &[u8]) -> Option<(u32, Path)> {
    let number = |at: usize| Some(u32::from_be_bytes(payload.get(at * 4..at * 4 + 4)?.try_into().ok()?));
    Some((number(0)?, (number(1)?, number(2)?, usize::try_from(number(3)?).ok()?)))
}
