//! The flow log: what the kernel's log group tells of the connections that policy judged (NFLOG over netlink).
//!
//! ```text
//! rule `log group` --> kernel's queue --netlink--> FlowLog::next --> FlowEvent
//! ```
//!
//! The kernel never waits: what does not fit the socket's buffer is dropped there, and the gap in the messages' numbers
//! says how many. Both logs are samples, see the rates in the skeleton. One socket of a network namespace reads a group.
//!
//! Who is client and who server is told by the log's prefix, not by a copy of the conntrack entry, which many kernels
//! cannot give: the rules know the direction of a packet, and at the hooks where they stand a packet has the client's own
//! address and the server's after destination NAT. Numbers are those of `linux/netfilter/nfnetlink_log.h`.

use std::io;
use std::net::IpAddr;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use netlink_sys::Socket;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use super::skeleton::{Logged, logged};
use super::socket::{PROTOCOL, force_buffer, socket_error};
use super::wire::{Buffer, F_ACK, F_REQUEST, Message, messages};
use crate::error::{Error, Result};

/// `NFNL_SUBSYS_ULOG`
const SUBSYS_LOG: u16 = 4;
/// `NFULNL_MSG_PACKET`
const MSG_PACKET: u16 = SUBSYS_LOG << 8;
/// `NFULNL_MSG_CONFIG`
const MSG_CONFIG: u16 = (SUBSYS_LOG << 8) | 1;

const CFG_CMD: u16 = 1;
const CFG_MODE: u16 = 2;
const CFG_TIMEOUT: u16 = 4;
const CFG_QTHRESH: u16 = 5;
const CFG_FLAGS: u16 = 6;
/// `NFULNL_CFG_CMD_BIND`
const CMD_BIND: u8 = 1;
/// `NFULNL_COPY_PACKET`
const COPY_PACKET: u8 = 2;
/// `NFULNL_CFG_F_SEQ`
const FLAG_SEQ: u16 = 1;

const ATTR_TIMESTAMP: u16 = 3;
const ATTR_PAYLOAD: u16 = 9;
const ATTR_PREFIX: u16 = 10;
const ATTR_SEQ: u16 = 12;

/// Bytes of a packet that are copied: headers up to the ports, some IPv6 extension headers among them.
const COPY_BYTES: u32 = 128;
/// The kernel sends this many packets at once, so that a busy log wakes nobody for each.
const QUEUE_PACKETS: u32 = 16;
/// Or what it has after this many hundredths of a second.
const QUEUE_TIMEOUT_CS: u32 = 10;
/// What waits for a reader that is away: at 200 packets of some 400 bytes per second ten seconds. Beyond, the kernel
/// drops and the reader counts.
const RECEIVE_BYTES: usize = 1 << 20;
/// The kernel's buffer of a batch is one page, or a packet's size.
const DATAGRAM_BYTES: usize = 64 << 10;
/// IPv6 extension headers that are looked past.
const EXTENSIONS_MAX: usize = 8;

/// What policy did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FlowVerdict {
    /// A new connection was let through.
    Allowed,
    /// A packet was dropped.
    Denied,
}

/// One logged packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FlowEvent {
    /// What policy did with it.
    pub verdict: FlowVerdict,
    /// Who opened the connection.
    pub client: IpAddr,
    /// Who was reached, after destination NAT.
    pub server: IpAddr,
    /// IANA protocol number.
    pub protocol: u8,
    /// The server's port; 0 where the protocol has none or the packet does not show it.
    pub server_port: u16,
    /// The packet belongs to no connection: client and server are its source and destination.
    pub stateless: bool,
    /// When the packet passed; when it was read, if the kernel did not say.
    pub time: SystemTime,
}

/// What one look brought.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct FlowBatch {
    /// In the order the packets passed. Empty if only others' rules logged into the group.
    pub events: Vec<FlowEvent>,
    /// Messages the kernel had to drop before these, because nobody read them in time.
    pub lost: u64,
}

/// The reader of a log group, in the network namespace of the thread that opened it.
pub struct FlowLog {
    socket: AsyncFd<Socket>,
    datagram: Vec<u8>,
    numbers: Numbers,
}

impl FlowLog {
    /// Begins to read `group`; the kernel ends that when the value is dropped. Needs a tokio runtime and CAP_NET_ADMIN.
    ///
    /// # Errors
    /// Another program reads the group, or the kernel has no NFLOG.
    pub fn open(group: u16) -> Result<Self> {
        let mut socket = Socket::new(PROTOCOL).map_err(socket_error("open the flow log"))?;
        socket.bind_auto().map_err(socket_error("bind the flow log"))?;
        force_buffer(&socket, libc::SO_RCVBUFFORCE, RECEIVE_BYTES)?;
        socket.set_non_blocking(true).map_err(socket_error("open the flow log"))?;
        let what = format!("read log group {group} (does another program read it?)");
        configure(&socket, group).map_err(socket_error(&what))?;
        // SAFETY: the socket owns its descriptor, which nobody closes or replaces while `AsyncFd` holds it: only shared
        // references leave it.
        let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
        let socket = registered.map_err(io::Error::from).map_err(socket_error("wait for the flow log"))?;
        Ok(Self { socket, datagram: Vec::with_capacity(DATAGRAM_BYTES), numbers: Numbers::default() })
    }

    /// Waits for the next packets. Cancellation safe: what is taken from the socket is returned at once.
    ///
    /// # Errors
    /// The socket failed; open it anew.
    pub async fn next(&mut self) -> Result<FlowBatch> {
        loop {
            let mut ready = self.socket.readable().await.map_err(socket_error("wait for the flow log"))?;
            let datagram = &mut self.datagram;
            let received = ready.try_io(|socket| {
                datagram.clear();
                socket.get_ref().recv(datagram, libc::MSG_DONTWAIT)
            });
            match received {
                Ok(Ok(_)) => return Ok(batch(&self.datagram, &mut self.numbers, SystemTime::now())),
                // Messages were dropped: the next one's number says how many.
                Ok(Err(error)) if error.raw_os_error() == Some(libc::ENOBUFS) => {}
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(source)) => return Err(Error::Socket { what: "read the flow log".into(), source }),
                Err(_would_block) => {}
            }
        }
    }
}

fn encode_bind(out: &mut Buffer) {
    out.attr(CFG_CMD, &[CMD_BIND]);
    // struct nfulnl_msg_config_mode: range, mode, padding; packed.
    let mut mode = COPY_BYTES.to_be_bytes().to_vec();
    mode.extend_from_slice(&[COPY_PACKET, 0]);
    out.attr(CFG_MODE, &mode);
    out.be32(CFG_TIMEOUT, QUEUE_TIMEOUT_CS);
    out.be32(CFG_QTHRESH, QUEUE_PACKETS);
    out.attr(CFG_FLAGS, &FLAG_SEQ.to_be_bytes());
}

/// One request and its answer, which waits in the socket when `send` returns; packets may stand before it and are not
/// counted yet, since nobody was told that the log is open.
fn configure(socket: &Socket, group: u16) -> io::Result<()> {
    let mut request = Buffer::default();
    let start = request.begin_message(MSG_CONFIG, F_REQUEST | F_ACK, 1, 0, group);
    encode_bind(&mut request);
    request.end_message(start);
    socket.send(request.as_slice(), 0)?;
    let mut datagram = Vec::with_capacity(DATAGRAM_BYTES);
    loop {
        datagram.clear();
        socket.recv(&mut datagram, libc::MSG_DONTWAIT)?;
        match messages(&datagram).find_map(|message| message.errno()) {
            Some(0) => return Ok(()),
            Some(errno) => return Err(io::Error::from_raw_os_error(errno)),
            None => {}
        }
    }
}

/// The numbers of the messages, which have no gap unless some were dropped.
#[derive(Debug, Default)]
struct Numbers {
    next: Option<u32>,
}

impl Numbers {
    /// How many are missing before `number`.
    fn missing_before(&mut self, number: u32) -> u64 {
        let expected = self.next.replace(number.wrapping_add(1));
        expected.map_or(0, |expected| number.wrapping_sub(expected).into())
    }
}

fn batch(datagram: &[u8], numbers: &mut Numbers, now: SystemTime) -> FlowBatch {
    let mut batch = FlowBatch::default();
    for message in messages(datagram).filter(|message| message.kind == MSG_PACKET) {
        if let Some(number) = message.attrs().u32(ATTR_SEQ) {
            batch.lost += numbers.missing_before(number);
        }
        batch.events.extend(event(message, now));
    }
    batch
}

/// Reads one message; `None` if it is not of our rules, or shows no addresses.
fn event(message: Message<'_>, now: SystemTime) -> Option<FlowEvent> {
    let attrs = message.attrs();
    let logged = logged(attrs.string(ATTR_PREFIX)?)?;
    let mut ends = of_packet(attrs.find(ATTR_PAYLOAD)?)?;
    if logged == Logged::DeniedReply {
        ends = ends.reversed();
    }
    let verdict = match logged {
        Logged::Allowed => FlowVerdict::Allowed,
        Logged::Denied | Logged::DeniedReply | Logged::DeniedStateless => FlowVerdict::Denied,
    };
    Some(FlowEvent {
        verdict,
        client: ends.source,
        server: ends.destination,
        protocol: ends.protocol,
        server_port: ends.ports.1,
        stateless: logged == Logged::DeniedStateless,
        time: attrs.find(ATTR_TIMESTAMP).and_then(timestamp).unwrap_or(now),
    })
}

#[derive(Debug, PartialEq, Eq)]
struct Ends {
    source: IpAddr,
    destination: IpAddr,
    protocol: u8,
    /// Source and destination; 0 where there are none.
    ports: (u16, u16),
}

impl Ends {
    fn reversed(self) -> Self {
        let Self { source, destination, protocol, ports } = self;
        Self { source: destination, destination: source, protocol, ports: (ports.1, ports.0) }
    }
}

fn of_packet(packet: &[u8]) -> Option<Ends> {
    match packet.first()? >> 4 {
        4 => of_ipv4(packet),
        6 => of_ipv6(packet),
        _ => None,
    }
}

fn of_ipv4(packet: &[u8]) -> Option<Ends> {
    let header = packet.get(..20)?;
    let address = |at: usize| Some(IpAddr::from(<[u8; 4]>::try_from(header.get(at..at + 4)?).ok()?));
    let first_fragment = u16::from_be_bytes([header[6], header[7]]) & 0x1fff == 0;
    let transport = packet.get(usize::from(header[0] & 0xf) * 4..).filter(|_| first_fragment);
    let protocol = header[9];
    Some(Ends {
        source: address(12)?,
        destination: address(16)?,
        protocol,
        ports: ports(protocol, transport),
    })
}

fn of_ipv6(packet: &[u8]) -> Option<Ends> {
    let header = packet.get(..40)?;
    let address = |at: usize| Some(IpAddr::from(<[u8; 16]>::try_from(header.get(at..at + 16)?).ok()?));
    let (protocol, transport) = past_extensions(header[6], packet.get(40..)?);
    Some(Ends { source: address(8)?, destination: address(24)?, protocol, ports: ports(protocol, transport) })
}

/// The transport protocol behind IPv6 extension headers (RFC 8200), and its bytes as far as they are there.
fn past_extensions(mut protocol: u8, mut rest: &[u8]) -> (u8, Option<&[u8]>) {
    const HOP_BY_HOP: u8 = 0;
    const ROUTING: u8 = 43;
    const FRAGMENT: u8 = 44;
    const DESTINATION: u8 = 60;
    for _ in 0..EXTENSIONS_MAX {
        if ![HOP_BY_HOP, ROUTING, FRAGMENT, DESTINATION].contains(&protocol) {
            return (protocol, Some(rest));
        }
        let Some(&[next, units, high, low]) = rest.first_chunk::<4>() else { return (protocol, None) };
        let later_fragment = protocol == FRAGMENT && u16::from_be_bytes([high, low]) & 0xfff8 != 0;
        let bytes = if protocol == FRAGMENT { 8 } else { (usize::from(units) + 1) * 8 };
        protocol = next;
        match rest.get(bytes..) {
            Some(behind) if !later_fragment => rest = behind,
            Some(_) | None => return (protocol, None),
        }
    }
    (protocol, None)
}

fn ports(protocol: u8, transport: Option<&[u8]>) -> (u16, u16) {
    const WITH_PORTS: [u8; 3] = [6, 17, 132];
    let ports =
        transport.and_then(|bytes| bytes.first_chunk::<4>()).filter(|_| WITH_PORTS.contains(&protocol));
    ports.map_or((0, 0), |&[a, b, c, d]| (u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])))
}

/// struct nfulnl_msg_packet_timestamp: seconds and microseconds.
fn timestamp(bytes: &[u8]) -> Option<SystemTime> {
    let number = |at: usize| Some(u64::from_be_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
    let micros = number(8)?.min(999_999);
    UNIX_EPOCH.checked_add(Duration::from_secs(number(0)?))?.checked_add(Duration::from_micros(micros))
}

#[cfg(test)]
mod tests {
    use std::net::UdpSocket;
    use std::process::Command;

    use holdfast_net_core::plan::MacAddr;
    use holdfast_net_core::ruleset::{ClassId, Pin, Ruleset};

    use super::*;
    use crate::Config;
    use crate::nft::Nft;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn octets(address: IpAddr) -> Vec<u8> {
        match address {
            IpAddr::V4(a) => a.octets().to_vec(),
            IpAddr::V6(a) => a.octets().to_vec(),
        }
    }

    /// A message of the log, as the kernel writes it.
    fn mk_message(prefix: &str, number: u32, fill: impl FnOnce(&mut Buffer)) -> Vec<u8> {
        let mut out = Buffer::default();
        let start = out.begin_message(MSG_PACKET, 0, 0, 2, 4807);
        out.string(ATTR_PREFIX, prefix);
        out.be32(ATTR_SEQ, number);
        fill(&mut out);
        out.end_message(start);
        out.as_slice().to_vec()
    }

    fn read(datagram: &[u8]) -> FlowBatch {
        batch(datagram, &mut Numbers::default(), UNIX_EPOCH)
    }

    fn only(datagram: &[u8]) -> FlowEvent {
        let mut events = read(datagram).events;
        assert_eq!(events.len(), 1);
        events.remove(0)
    }

    /// The bytes of a request to bind a group, after `struct nlmsghdr`, as the kernel's header lays them out.
    #[test]
    fn a_request_to_read_a_group_has_the_kernels_layout() {
        let mut out = Buffer::default();
        encode_bind(&mut out);
        #[cfg(target_endian = "little")]
        let golden: &[&[u8]] = &[
            &[5, 0, 1, 0, 1, 0, 0, 0],
            &[10, 0, 2, 0, 0, 0, 0, 128, 2, 0, 0, 0],
            &[8, 0, 4, 0, 0, 0, 0, 10],
            &[8, 0, 5, 0, 0, 0, 0, 16],
            &[6, 0, 6, 0, 0, 1, 0, 0],
        ];
        #[cfg(target_endian = "little")]
        assert_eq!(out.as_slice(), golden.concat());
    }

    fn mk_packet(prefix: &str, packet: &[u8]) -> Vec<u8> {
        mk_message(prefix, 0, |out| out.attr(ATTR_PAYLOAD, packet))
    }

    fn mk_ipv4(fragment: u16) -> Vec<u8> {
        let mut packet = vec![0x46, 0, 0, 0, 0, 0, 0, 0, 64, 17, 0, 0];
        packet[6..8].copy_from_slice(&fragment.to_be_bytes());
        packet.extend([10, 0, 0, 1, 10, 0, 0, 2, 1, 1, 1, 1]);
        packet.extend([0x9c, 0x40, 0, 53]);
        packet
    }

    fn mk_ipv6(next: u8, behind: &[u8]) -> Vec<u8> {
        let mut packet = vec![0x60, 0, 0, 0, 0, 0, next, 64];
        packet.extend(octets(ip("fd00::1")));
        packet.extend(octets(ip("fd00::2")));
        packet.extend(behind);
        packet
    }

    #[test]
    fn the_prefix_tells_verdict_and_direction() {
        let told = |logged: Logged| {
            let event = only(&mk_packet(logged.prefix(), &mk_ipv4(0)));
            let ends = (event.client.to_string(), event.server.to_string(), event.server_port);
            (event.verdict, event.stateless, ends)
        };
        let forward = ("10.0.0.1".to_owned(), "10.0.0.2".to_owned(), 53);
        let backward = ("10.0.0.2".to_owned(), "10.0.0.1".to_owned(), 40_000);
        assert_eq!(told(Logged::Allowed), (FlowVerdict::Allowed, false, forward.clone()));
        assert_eq!(told(Logged::Denied), (FlowVerdict::Denied, false, forward.clone()));
        assert_eq!(told(Logged::DeniedReply), (FlowVerdict::Denied, false, backward));
        assert_eq!(told(Logged::DeniedStateless), (FlowVerdict::Denied, true, forward));
    }

    #[test]
    fn the_time_is_the_kernels_or_else_that_of_reading() {
        let mut datagram = mk_message(Logged::Denied.prefix(), 7, |out| {
            out.attr(ATTR_TIMESTAMP, &[3u64.to_be_bytes(), 500_000u64.to_be_bytes()].concat());
            out.attr(ATTR_PAYLOAD, &mk_ipv4(0));
        });
        datagram.extend(mk_packet(Logged::Denied.prefix(), &mk_ipv4(0)));
        let times: Vec<SystemTime> = read(&datagram).events.iter().map(|event| event.time).collect();
        assert_eq!(times, [UNIX_EPOCH + Duration::from_millis(3500), UNIX_EPOCH]);
    }

    #[test]
    fn protocol_and_ports_are_found_behind_options_and_extension_headers() {
        let ends = |packet: &[u8]| {
            let event = only(&mk_packet(Logged::Denied.prefix(), packet));
            (event.client.to_string(), event.server.to_string(), event.protocol, event.server_port)
        };
        let v4 = |port| ("10.0.0.1".to_owned(), "10.0.0.2".to_owned(), 17, port);
        assert_eq!(ends(&mk_ipv4(0x4000)), v4(53), "options are passed over");
        assert_eq!(ends(&mk_ipv4(0x2000)), v4(53), "a first fragment has ports");
        assert_eq!(ends(&mk_ipv4(0x2001)), v4(0), "a later fragment has none");
        assert_eq!(ends(&mk_ipv4(0)[..24]), v4(0), "what was not copied is not invented");

        let v6 = |protocol, port| ("fd00::1".to_owned(), "fd00::2".to_owned(), protocol, port);
        let tcp = [0x9c, 0x40, 0x1f, 0x90];
        assert_eq!(ends(&mk_ipv6(6, &tcp)), v6(6, 8080));
        let hop_by_hop = [&[6, 1][..], &[0; 14], &tcp].concat();
        assert_eq!(ends(&mk_ipv6(0, &hop_by_hop)), v6(6, 8080));
        let first = [&[6, 0, 0, 1, 0, 0, 0, 9][..], &tcp].concat();
        assert_eq!(ends(&mk_ipv6(44, &first)), v6(6, 8080));
        let later = [&[6, 0, 0, 9, 0, 0, 0, 9][..], &tcp].concat();
        assert_eq!(ends(&mk_ipv6(44, &later)), v6(6, 0));
        assert_eq!(ends(&mk_ipv6(58, &[128, 0, 0, 1])), v6(58, 0), "an ICMP identifier is no port");
    }

    #[test]
    fn gaps_in_the_numbers_are_messages_lost_also_when_they_come_round() {
        let mut numbers = Numbers::default();
        let mut lost = |number: u32| {
            let datagram = mk_message("someone else's ", number, |_| {});
            batch(&datagram, &mut numbers, UNIX_EPOCH).lost
        };
        assert_eq!(lost(u32::MAX - 2), 0, "the first one only says where they are");
        assert_eq!(lost(u32::MAX - 1), 0);
        assert_eq!(lost(1), 2);
        assert_eq!(lost(2), 0);
        assert_eq!(lost(102), 99);
    }

    #[test]
    fn others_rules_that_log_into_the_group_are_not_ours() {
        let packet = mk_ipv4(0);
        for prefix in ["", "holdfast", "holdfast denied ", "Holdfast deny "] {
            let datagram = mk_message(prefix, 1, |out| out.attr(ATTR_PAYLOAD, &packet));
            assert_eq!(read(&datagram), FlowBatch::default(), "{prefix:?}");
        }
    }

    /// Every cut and every single wrong byte of good messages, and bytes without any sense.
    #[test]
    fn garbage_is_read_without_a_panic() {
        let mut good = Vec::new();
        let extended = mk_ipv6(0, &[&[43, 0][..], &[0; 6], &[60, 255], &[0; 8]].concat());
        for packet in [mk_ipv4(0), mk_ipv6(17, &[0, 1, 0, 2]), extended] {
            good.extend(mk_packet(Logged::DeniedReply.prefix(), &packet));
        }
        assert_eq!(read(&good).events.len(), 3);
        for cut in 0..good.len() {
            assert!(read(&good[..cut]).events.len() < 3);
        }
        for at in 0..good.len() {
            for value in [0, 1, 4, 0x7f, 0x80, 0xff] {
                let mut bad = good.clone();
                bad[at] = value;
                assert!(read(&bad).events.len() <= 3);
            }
        }
        let mut state = 1u32;
        let noise: Vec<u8> = std::iter::repeat_with(|| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            state.to_be_bytes()[0]
        })
        .take(100_000)
        .collect();
        for start in (0..noise.len() - 256).step_by(64) {
            assert!(
                of_packet(&noise[start..start + 128])
                    .is_none_or(|ends| ends.source.is_ipv4() == ends.destination.is_ipv4())
            );
            assert!(read(&noise[start..start + 256]).events.is_empty());
        }
    }

    /// Loopback traffic passes the chain `input`, so a namespace of its own is enough of a node.
    #[test]
    fn the_kernel_tells_new_connections_denied_packets_and_their_direction() {
        let thread = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("these tests run as root");
            shell("ip link set lo up");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(kernel_tells());
        });
        thread.join().unwrap();
    }

    async fn kernel_tells() {
        let mut nft = Nft::open(Config::default()).unwrap();
        // Only a pinned address has connections that can be revoked.
        let mut rules = Ruleset::default();
        let (ifname, mac) = ("hfv0123456789ab".into(), MacAddr([2, 0, 0, 0, 0, 9]));
        rules.pins.insert(Pin { ifname, mac, address: ip("127.0.0.1"), routed: false });
        nft.apply(&rules).unwrap();
        let mut log = FlowLog::open(Config::default().log_group).unwrap();
        let server = UdpSocket::bind("127.0.0.2:5001").unwrap();
        let client = UdpSocket::bind("127.0.0.1:0").unwrap();
        let client_port = client.local_addr().unwrap().port();
        let ends = (ip("127.0.0.1"), ip("127.0.0.2"), 17, 5001);

        client.send_to(b"x", "127.0.0.2:5001").unwrap();
        assert_eq!(told(&mut log).await, (FlowVerdict::Allowed, false, ends));
        server.send_to(b"x", ("127.0.0.1", client_port)).unwrap();
        server.recv_from(&mut [0; 8]).unwrap();
        client.recv_from(&mut [0; 8]).unwrap();

        rules.cls_eg.insert(ip("127.0.0.1"), ClassId::DENY_ALL);
        assert!(nft.apply(&rules).unwrap().revoked);
        // A reply is no new connection, so nothing was told of the one before.
        server.send_to(b"x", ("127.0.0.1", client_port)).unwrap();
        assert_eq!(told(&mut log).await, (FlowVerdict::Denied, false, ends));
        client.send_to(b"x", "127.0.0.2:5001").unwrap();
        assert_eq!(told(&mut log).await, (FlowVerdict::Denied, false, ends));

        shell("nft 'table inet t { chain o { type filter hook output priority -300; notrack; }; }'");
        client.send_to(b"x", "127.0.0.2:5001").unwrap();
        assert_eq!(told(&mut log).await, (FlowVerdict::Denied, true, ends));
    }

    #[tokio::test]
    async fn a_group_has_one_reader_and_is_free_when_it_leaves() {
        let group = 40_000 + u16::try_from(std::process::id() % 20_000).unwrap();
        let first = FlowLog::open(group).unwrap();
        let refused = FlowLog::open(group).err().unwrap();
        assert!(
            matches!(&refused, Error::Socket { what, source } if what.contains(&group.to_string())
                && source.raw_os_error() == Some(libc::EPERM)),
            "{refused:?}"
        );
        drop(first);
        // A child that another test starts at this moment has the socket, too, until it executes its program.
        let deadline = std::time::Instant::now() + Duration::from_secs(5);
        while let Err(error) = FlowLog::open(group) {
            assert!(std::time::Instant::now() < deadline, "never free again: {error}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// The next event, with its time checked.
    async fn told(log: &mut FlowLog) -> (FlowVerdict, bool, (IpAddr, IpAddr, u8, u16)) {
        let batch =
            tokio::time::timeout(Duration::from_secs(5), log.next()).await.expect("told in time").unwrap();
        assert_eq!((batch.events.len(), batch.lost), (1, 0), "{batch:?}");
        let FlowEvent { verdict, client, server, protocol, server_port, stateless, time } = batch.events[0];
        let age = time.elapsed().unwrap_or_default();
        assert!(age < Duration::from_secs(10), "{age:?}");
        (verdict, stateless, (client, server, protocol, server_port))
    }

    fn shell(line: &str) {
        assert!(Command::new("sh").args(["-c", line]).status().unwrap().success(), "{line}");
    }
}
