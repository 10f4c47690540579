//! Raw frames from a pod, in both modes: only those with the pod's own addresses and MAC come anywhere. Needs root.

#![allow(unsafe_code)] // one lifetime extension in the support module, argued there; packet sockets
#![allow(clippy::unwrap_used)] // a test's failure is its panic

mod support;

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, UdpSocket};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::time::{Duration, Instant};

use holdfast_dataplane::Dataplane;
use holdfast_net_core::plan::{Attachment, EndpointPlan, GATEWAY_V4, GATEWAY_V6, MacAddr};
use holdfast_net_core::ruleset::{Ruleset, pins_of};
use support::{Netns, Node};

/// Where frames that are let through go.
const PORT: u16 = 4999;
const ETH_IPV4: [u8; 2] = [0x08, 0x00];
const ETH_IPV6: [u8; 2] = [0x86, 0xdd];
const ETH_ARP: [u8; 2] = [0x08, 0x06];

/// What a frame says of itself.
#[derive(Debug, Clone, Copy)]
struct Forged {
    to_mac: MacAddr,
    from_mac: MacAddr,
    from: IpAddr,
    to: IpAddr,
}

impl Forged {
    /// UDP with `number` in it.
    fn udp(&self, number: u32) -> Vec<u8> {
        let mut udp = [PORT.to_be_bytes(), PORT.to_be_bytes(), 12u16.to_be_bytes(), [0, 0]].concat();
        udp.extend_from_slice(&number.to_be_bytes());
        let (ethertype, header) = match (self.from, self.to) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let mut header = vec![0x45, 0, 0, 32, 0, 0, 0, 0, 64, 17, 0, 0];
                header.extend_from_slice(&from.octets());
                header.extend_from_slice(&to.octets());
                let sum = checksum(&header);
                header[10..12].copy_from_slice(&sum);
                (ETH_IPV4, header)
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let mut header = vec![0x60, 0, 0, 0, 0, 12, 17, 64];
                header.extend_from_slice(&from.octets());
                header.extend_from_slice(&to.octets());
                let pseudo = [&header[8..40], &[0, 0, 0, 12, 0, 0, 0, 17], &udp].concat();
                let sum = checksum(&pseudo);
                udp[6..8].copy_from_slice(&sum);
                (ETH_IPV6, header)
            }
            _ => unreachable!("one family"),
        };
        [self.to_mac.0.as_slice(), &self.from_mac.0, &ethertype, &header, &udp].concat()
    }

    /// The same with a VLAN tag before it.
    fn tagged(&self, number: u32) -> Vec<u8> {
        let plain = self.udp(number);
        [&plain[..12], &[0x81, 0x00, 0, 1], &plain[12..]].concat()
    }

    /// An answer to nobody's question: `from` is at `from_mac`.
    fn arp(&self) -> Vec<u8> {
        let (IpAddr::V4(from), IpAddr::V4(to)) = (self.from, self.to) else { unreachable!("ARP is IPv4's") };
        let mut frame = [self.to_mac.0.as_slice(), &self.from_mac.0, &ETH_ARP].concat();
        frame.extend_from_slice(&[0, 1, 8, 0, 6, 4, 0, 2]);
        frame.extend_from_slice(&self.from_mac.0);
        frame.extend_from_slice(&from.octets());
        frame.extend_from_slice(&self.to_mac.0);
        frame.extend_from_slice(&to.octets());
        frame.resize(60, 0);
        frame
    }
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> [u8; 2] {
    let mut sum: u32 =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | u32::from(*pair.get(1).unwrap_or(&0))).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    (!u16::try_from(sum).unwrap()).to_be_bytes()
}

/// A packet socket on the pod's interface.
struct Raw(OwnedFd);

impl Raw {
    fn open(pod: &Netns) -> Self {
        let open = || {
            // SAFETY: plain system calls; the address lives on the stack for the call.
            unsafe {
                let fd = libc::socket(
                    libc::AF_PACKET,
                    libc::SOCK_RAW,
                    i32::from((libc::ETH_P_ALL as u16).to_be()),
                );
                assert!(fd >= 0, "{}", std::io::Error::last_os_error());
                let mut address: libc::sockaddr_ll = std::mem::zeroed();
                address.sll_family = libc::AF_PACKET as u16;
                address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
                address.sll_ifindex = libc::if_nametoindex(c"eth0".as_ptr()) as i32;
                let size = size_of::<libc::sockaddr_ll>() as u32;
                let bound = libc::bind(fd, (&raw const address).cast(), size);
                assert_eq!(bound, 0, "{}", std::io::Error::last_os_error());
                OwnedFd::from_raw_fd(fd)
            }
        };
        Self(pod.inside(open).join().unwrap())
    }

    fn send(&self, frame: &[u8]) {
        // SAFETY: the buffer is valid for its length.
        let sent = unsafe { libc::send(self.0.as_raw_fd(), frame.as_ptr().cast(), frame.len(), 0) };
        assert_eq!(usize::try_from(sent).ok(), Some(frame.len()), "{}", std::io::Error::last_os_error());
    }

    /// What has arrived and was sent by others.
    fn received(&self) -> Vec<Vec<u8>> {
        let mut frames = Vec::new();
        let mut buffer = [0u8; 2048];
        loop {
            // SAFETY: all zeroes is a value of it.
            let mut from: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
            let mut size = size_of::<libc::sockaddr_ll>() as u32;
            // SAFETY: both buffers are valid for the lengths that are passed.
            let length = unsafe {
                libc::recvfrom(
                    self.0.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    libc::MSG_DONTWAIT,
                    (&raw mut from).cast(),
                    &raw mut size,
                )
            };
            let Ok(length) = usize::try_from(length) else { return frames };
            if from.sll_pkttype != libc::PACKET_OUTGOING {
                frames.push(buffer[..length].to_vec());
            }
        }
    }
}

/// Numbers of our UDP packets among frames.
fn numbers(frames: &[Vec<u8>]) -> Vec<u32> {
    let port = PORT.to_be_bytes();
    let number = |frame: &Vec<u8>| {
        let udp = frame.get(frame.len().checked_sub(12)?..)?;
        (udp[..2] == port && udp[2..4] == port).then(|| u32::from_be_bytes(udp[8..12].try_into().unwrap()))
    };
    // Short frames are padded; ours are long enough.
    frames.iter().filter_map(number).collect()
}

/// A node with a pod that forges and one that listens, all of it open to each other.
struct Bed {
    node: Node,
    pods: [Netns; 2],
    plans: [EndpointPlan; 2],
    /// Of both families.
    on_node: UdpSocket,
}

impl Bed {
    fn new(name: &str, routed: bool) -> Self {
        let mut node = Node::new(name);
        if routed {
            node.attachment = Attachment::Routed { mtu: 1450 };
        }
        node.netns
            .run("ip link set lo up; ip addr add 192.0.2.7/32 dev lo; ip addr add fd07::7/128 dev lo nodad");
        let pods = [Netns::new(&format!("{name}-a")), Netns::new(&format!("{name}-b"))];
        let plans =
            [node.endpoint(&pods[0], "10.85.0.2,fd85::2"), node.endpoint(&pods[1], "10.85.0.3,fd85::3")];
        let open = Ruleset { pins: plans.iter().flat_map(pins_of).collect(), ..Ruleset::default() };
        let node_plan = node.alone_plan();
        node.runtime.block_on(async |dp: &Dataplane| {
            dp.apply_node(&node_plan).await.unwrap();
            for (plan, pod) in plans.iter().zip(&pods) {
                dp.attach(plan, pod.path()).await.unwrap();
            }
            dp.apply_ruleset(&open).await.unwrap();
        });
        let on_node = node.netns.inside(|| UdpSocket::bind(("::", PORT)).unwrap()).join().unwrap();
        on_node.set_nonblocking(true).unwrap();
        Self { node, pods, plans, on_node }
    }

    /// Numbers that a socket of the node got.
    fn got_by_node(&self) -> Vec<u32> {
        let mut numbers = Vec::new();
        let mut buffer = [0u8; 64];
        while let Ok((4, _)) = self.on_node.recv_from(&mut buffer) {
            numbers.push(u32::from_be_bytes(buffer[..4].try_into().unwrap()));
        }
        numbers
    }

    fn dropped(&self) -> u64 {
        self.node.runtime.block_on(async |dp: &Dataplane| dp.denied().await.unwrap().1)
    }
}

/// Every forgery of sources, MACs and destinations.
fn forgeries(bed: &Bed) -> Vec<Forged> {
    let [own, other] = &bed.plans;
    let strange = MacAddr([2, 0, 0, 0, 0, 0x99]);
    let v4 = |text: &str| IpAddr::V4(text.parse::<Ipv4Addr>().unwrap());
    let v6 = |text: &str| IpAddr::V6(text.parse::<Ipv6Addr>().unwrap());
    let to_macs = [own.gateway_mac, other.mac, MacAddr([0xff; 6])];
    let from_macs = [own.mac, other.mac, own.gateway_mac, strange];
    let families = [
        (
            vec![
                v4("10.85.0.3"),
                v4("10.85.0.99"),
                v4("192.0.2.7"),
                v4("127.0.0.1"),
                v4("0.0.0.0"),
                IpAddr::V4(GATEWAY_V4),
            ],
            own.addresses[0],
            [other.addresses[0], v4("192.0.2.7")],
        ),
        (
            vec![
                v6("fd85::3"),
                v6("fd85::99"),
                v6("fd07::7"),
                v6("::1"),
                v6("::"),
                IpAddr::V6(other.mac.link_local()),
                IpAddr::V6(GATEWAY_V6),
            ],
            own.addresses[1],
            [other.addresses[1], v6("fd07::7")],
        ),
    ];
    let mut all = Vec::new();
    for (forged, real, targets) in families {
        for (to, to_mac) in targets.iter().flat_map(|to| to_macs.map(|mac| (*to, mac))) {
            for from_mac in from_macs {
                all.extend(forged.iter().map(|from| Forged { to_mac, from_mac, from: *from, to }));
            }
            // Its own address from another MAC.
            all.extend(from_macs[1..].iter().map(|from_mac| Forged {
                to_mac,
                from_mac: *from_mac,
                from: real,
                to,
            }));
        }
    }
    all
}

fn nothing_forged_passes(name: &str, routed: bool) {
    let bed = Bed::new(name, routed);
    let (sender, listener) = (Raw::open(&bed.pods[0]), Raw::open(&bed.pods[1]));
    let [own, other] = &bed.plans;
    let forgeries = forgeries(&bed);
    let before = bed.dropped();
    for (number, forged) in (0..).zip(&forgeries) {
        sender.send(&forged.udp(number));
        sender.send(&forged.tagged(number));
    }
    let claim = Forged {
        to_mac: own.gateway_mac,
        from_mac: own.mac,
        from: other.addresses[0],
        to: IpAddr::V4(GATEWAY_V4),
    };
    for to_mac in [own.gateway_mac, other.mac, MacAddr([0xff; 6])] {
        sender.send(&Forged { to_mac, ..claim }.arp());
    }
    // What is not forged passes, and tells that all before it was looked at.
    let last = u32::MAX;
    for (at, to) in [(0, other.addresses[0]), (1, other.addresses[1])] {
        let honest = Forged { to_mac: own.gateway_mac, from_mac: own.mac, from: own.addresses[at], to };
        sender.send(&honest.udp(last));
        let node = ["192.0.2.7", "fd07::7"][at].parse().unwrap();
        sender.send(&Forged { to: node, ..honest }.udp(last));
    }
    let deadline = Instant::now() + Duration::from_secs(5);
    let (mut got, mut got_by_node, mut frames) = (Vec::new(), Vec::new(), Vec::new());
    while got.len() < 2 || got_by_node.len() < 2 {
        assert!(Instant::now() < deadline, "honest packets are lost: {got:?}, {got_by_node:?}");
        std::thread::sleep(Duration::from_millis(20));
        frames.extend(listener.received());
        got = numbers(&frames);
        got_by_node.extend(bed.got_by_node());
    }
    let show = |numbers: &[u32]| -> Vec<Forged> {
        numbers.iter().filter(|number| **number != last).map(|number| forgeries[*number as usize]).collect()
    };
    assert_eq!((got.len(), got_by_node.len()), (2, 2), "{:?}; {:?}", show(&got), show(&got_by_node));
    let from_sender = frames.iter().filter(|frame| frame[6..12] == own.mac.0).count();
    assert_eq!(from_sender, 0, "no frame goes from pod to pod");
    assert!(bed.dropped() - before >= forgeries.len() as u64 / 3, "the pins counted what they dropped");
    // The claim about another pod's address moved nothing.
    bed.node.netns.run("ping -c1 -W1 10.85.0.3; ping -6 -c1 -W1 fd85::3");
    let route = bed.node.netns.run("ip route get 10.85.0.3");
    assert!(route.contains(&bed.node.pod_device(other)), "{route}");
    println!(
        "{} forgeries, twice each, in mode {}",
        forgeries.len(),
        if routed { "routed" } else { "bridge" }
    );
}

#[test]
fn nothing_forged_leaves_a_port_of_the_bridge() {
    nothing_forged_passes("hft-sb", false);
}

#[test]
fn nothing_forged_leaves_a_routed_port() {
    nothing_forged_passes("hft-sr", true);
}

/// The same without pins: the test would notice.
#[test]
fn without_its_pins_a_routed_port_lets_forged_sources_through() {
    let bed = Bed::new("hft-sn", true);
    bed.node.netns.run("nft flush chain inet holdfast pin_routed");
    let (sender, listener) = (Raw::open(&bed.pods[0]), Raw::open(&bed.pods[1]));
    let [own, other] = &bed.plans;
    let from = "10.85.0.99".parse().unwrap();
    let forged = Forged { to_mac: own.gateway_mac, from_mac: own.mac, from, to: other.addresses[0] };
    let deadline = Instant::now() + Duration::from_secs(5);
    let mut frames = Vec::new();
    while numbers(&frames).is_empty() {
        assert!(Instant::now() < deadline, "a strict reverse path filter does the pins' work here");
        sender.send(&forged.udp(7));
        std::thread::sleep(Duration::from_millis(20));
        frames.extend(listener.received());
    }
}
