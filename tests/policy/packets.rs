//! First packets of connections, made by hand: the kernel under the tests has no SCTP sockets, and a whole table of
//! packets can be under way at once.
//!
//! Layouts: RFC 791, RFC 8200, RFC 9293 (TCP), RFC 768 (UDP), RFC 9260 (SCTP). Checksums must be right, or conntrack calls
//! a packet invalid.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::world::Protocol;

/// Source ports from here on are the kernel's own (its default range starts at 32768): such packets are no probes.
pub const SOURCE_PORT_END: u16 = 32_000;
/// First source port of probes.
pub const SOURCE_PORT_FIRST: u16 = 1024;

/// What tells one probe's packet from all others.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Tuple {
    /// Who sends.
    pub source: IpAddr,
    /// To whom.
    pub target: IpAddr,
    /// Transport.
    pub protocol: Protocol,
    /// Port of the sender.
    pub source_port: u16,
    /// Port of the receiver.
    pub target_port: u16,
}

/// A whole IP packet: SYN, datagram or INIT.
///
/// # Panics
/// The addresses are of two families: a mistake of the caller.
#[must_use]
pub fn first_packet(tuple: &Tuple) -> Vec<u8> {
    let mut payload = match tuple.protocol {
        Protocol::Tcp => tcp_syn(tuple),
        Protocol::Udp => datagram(tuple),
        Protocol::Sctp => sctp_init(tuple),
    };
    let checksum_at = match tuple.protocol {
        Protocol::Tcp => Some(16),
        Protocol::Udp => Some(6),
        // A checksum of its own, made already.
        Protocol::Sctp => None,
    };
    let (header, pseudo) = match (tuple.source, tuple.target) {
        (IpAddr::V4(source), IpAddr::V4(target)) => ipv4(source, target, tuple.protocol, payload.len()),
        (IpAddr::V6(source), IpAddr::V6(target)) => ipv6(source, target, tuple.protocol, payload.len()),
        _ => panic!("{} and {} are of two families", tuple.source, tuple.target),
    };
    if let Some(at) = checksum_at {
        let sum = internet_checksum(pseudo.iter().chain(&payload));
        payload[at..at + 2].copy_from_slice(&sum.to_be_bytes());
    }
    let mut packet = header;
    packet.extend(payload);
    packet
}

/// Reads a packet from its IP header on; none for anything that is not one of the three transports or is cut short.
#[must_use]
pub fn parse(packet: &[u8]) -> Option<Tuple> {
    let (source, target, number, payload): (IpAddr, IpAddr, u8, &[u8]) = match packet.first()? >> 4 {
        4 => {
            let header = usize::from(packet[0] & 15) * 4;
            let address =
                |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(at..at + 4)?).ok()?));
            (address(12)?.into(), address(16)?.into(), *packet.get(9)?, packet.get(header..)?)
        }
        6 => {
            let address =
                |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(packet.get(at..at + 16)?).ok()?));
            (address(8)?.into(), address(24)?.into(), *packet.get(6)?, packet.get(40..)?)
        }
        _ => return None,
    };
    let protocol = Protocol::ALL.into_iter().find(|protocol| protocol.number() == number)?;
    let port = |at: usize| Some(u16::from_be_bytes(payload.get(at..at + 2)?.try_into().ok()?));
    Some(Tuple { source, target, protocol, source_port: port(0)?, target_port: port(2)? })
}

fn ports(tuple: &Tuple) -> Vec<u8> {
    [tuple.source_port.to_be_bytes(), tuple.target_port.to_be_bytes()].concat()
}

fn tcp_syn(tuple: &Tuple) -> Vec<u8> {
    let mut segment = ports(tuple);
    segment.extend(1u32.to_be_bytes()); // sequence
    segment.extend(0u32.to_be_bytes()); // acknowledgement
    segment.extend([5 << 4, 0x02]); // 20 bytes, SYN
    segment.extend(0xffffu16.to_be_bytes()); // window
    segment.extend([0; 4]); // checksum, urgent pointer
    segment
}

fn datagram(tuple: &Tuple) -> Vec<u8> {
    let mut datagram = ports(tuple);
    datagram.extend(8u16.to_be_bytes()); // length
    datagram.extend([0; 2]); // checksum
    datagram
}

fn sctp_init(tuple: &Tuple) -> Vec<u8> {
    let mut packet = ports(tuple);
    packet.extend([0; 8]); // verification tag of an INIT; checksum
    packet.extend([1, 0]); // INIT, no flags
    packet.extend(20u16.to_be_bytes()); // length
    packet.extend(7u32.to_be_bytes()); // initiate tag
    packet.extend(0x1_0000u32.to_be_bytes()); // receiver window
    packet.extend([0, 1, 0, 1]); // one stream each way
    packet.extend(1u32.to_be_bytes()); // first TSN
    let sum = crc32c::crc32c(&packet);
    packet[8..12].copy_from_slice(&sum.to_le_bytes());
    packet
}

fn length(bytes: usize) -> [u8; 2] {
    u16::try_from(bytes).expect("probes are small").to_be_bytes()
}

/// Header and pseudo header.
fn ipv4(source: Ipv4Addr, target: Ipv4Addr, protocol: Protocol, payload: usize) -> (Vec<u8>, Vec<u8>) {
    let mut header = vec![0x45, 0];
    header.extend(length(20 + payload));
    header.extend([0, 0, 0x40, 0]); // identification; do not fragment
    header.extend([64, protocol.number()]);
    header.extend([0; 2]); // checksum
    header.extend(source.octets());
    header.extend(target.octets());
    let sum = internet_checksum(&header);
    header[10..12].copy_from_slice(&sum.to_be_bytes());
    let mut pseudo = [source.octets(), target.octets()].concat();
    pseudo.extend([0, protocol.number()]);
    pseudo.extend(length(payload));
    (header, pseudo)
}

fn ipv6(source: Ipv6Addr, target: Ipv6Addr, protocol: Protocol, payload: usize) -> (Vec<u8>, Vec<u8>) {
    let mut header = vec![0x60, 0, 0, 0];
    header.extend(length(payload));
    header.extend([protocol.number(), 64]);
    header.extend(source.octets());
    header.extend(target.octets());
    let mut pseudo = [source.octets(), target.octets()].concat();
    pseudo.extend([0, 0]);
    pseudo.extend(length(payload));
    pseudo.extend([0, 0, 0, protocol.number()]);
    (header, pseudo)
}

/// RFC 1071. All our parts have an even length.
fn internet_checksum<'a>(bytes: impl IntoIterator<Item = &'a u8>) -> u16 {
    let mut sum = 0u32;
    for (index, byte) in bytes.into_iter().enumerate() {
        sum += u32::from(*byte) << if index % 2 == 0 { 8 } else { 0 };
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded to 16 bits")
}
