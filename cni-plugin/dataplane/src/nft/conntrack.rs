//! Conntrack entries, as far as policy needs them. A revision number may be used again only when no entry carries it any
//! more, else a forbidden connection would come back to life. And entries that the rules forbid are deleted, as hygiene.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use holdfast_net_core::ports::Proto;

use super::socket::{NetfilterSocket, SUBSYS_CONNTRACK};
use super::wire::{Attrs, Buffer, F_ACK, F_REQUEST};
use crate::error::Result;

/// `IPCTNL_MSG_CT_NEW`
const MSG_NEW: u16 = SUBSYS_CONNTRACK << 8;
/// `IPCTNL_MSG_CT_GET`
const MSG_GET: u16 = (SUBSYS_CONNTRACK << 8) | 1;
/// `IPCTNL_MSG_CT_DELETE`
const MSG_DELETE: u16 = (SUBSYS_CONNTRACK << 8) | 2;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_TUPLE_REPLY: u16 = 2;
const CTA_MARK: u16 = 8;
const CTA_ID: u16 = 12;
const CTA_ZONE: u16 = 18;
const CTA_MARK_MASK: u16 = 21;
/// `NLA_F_NESTED`, which the raw copy of a tuple needs.
const NESTED: u16 = 0x8000;
/// Updates per `send`; the kernel holds a lock per message only.
const UPDATES_PER_SEND: usize = 256;

/// Clears the bits of `mask` from every entry that has any of them; returns how many had.
///
/// An entry that vanishes meanwhile is fine; an entry that gets the mark again meanwhile keeps it.
pub fn clear_marks(socket: &mut NetfilterSocket, mask: u32) -> Result<usize> {
    // Filtering for "not zero" is not among the kernel's filters, so all entries are read: once per 254 revocations.
    let marked = socket.dump(
        MSG_GET,
        0,
        |_| {},
        |message| {
            let mark = message.attrs().u32(CTA_MARK)?;
            (mark & mask != 0).then(|| {
                let tuple = message.attrs().find(CTA_TUPLE_ORIG).map(<[u8]>::to_vec);
                let zone = message.attrs().find(CTA_ZONE).map(<[u8]>::to_vec);
                (message.body.first().copied().unwrap_or(0), tuple, zone)
            })
        },
    )?;
    for chunk in marked.chunks(UPDATES_PER_SEND) {
        let mut buffer = Buffer::default();
        for (family, tuple, zone) in chunk {
            let seq = socket.next_seq();
            let start = buffer.begin_message(MSG_NEW, F_REQUEST | F_ACK, seq, *family, 0);
            buffer.attr(CTA_TUPLE_ORIG | NESTED, tuple.as_deref().unwrap_or(&[]));
            if let Some(zone) = zone {
                buffer.attr(CTA_ZONE, zone);
            }
            buffer.be32(CTA_MARK, 0);
            buffer.be32(CTA_MARK_MASK, mask);
            buffer.end_message(start);
        }
        socket.send_each(&buffer, "clear the revision from conntrack entries")?;
    }
    Ok(marked.len())
}

/// A connection as the chains see it: the keys that they look up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Connection {
    /// Who opened it.
    pub client: IpAddr,
    /// From where.
    pub client_port: u16,
    /// Who answers, after destination NAT.
    pub server: IpAddr,
    /// Where.
    pub server_port: u16,
    /// Whom the client dialled, before destination NAT.
    pub dialled: (IpAddr, u16),
    /// Its protocol; entries of others are not read.
    pub proto: Proto,
    /// The ct mark.
    pub mark: u32,
}

/// An entry and what names it to the kernel.
#[derive(Debug, Clone)]
pub struct Entry {
    /// What it is about.
    pub connection: Connection,
    family: u8,
    tuple: Vec<u8>,
    zone: Option<Vec<u8>>,
    /// Another entry with the same tuple has another number.
    id: Vec<u8>,
}

/// Reads all entries and keeps those that `keep` wants, at most `max`.
pub fn read(
    socket: &mut NetfilterSocket,
    max: usize,
    mut keep: impl FnMut(&Connection) -> bool,
) -> Result<Vec<Entry>> {
    let mut kept = 0;
    socket.dump(
        MSG_GET,
        0,
        |_| {},
        |message| {
            let attrs = message.attrs();
            let connection = connection(attrs)?;
            if kept == max || !keep(&connection) {
                return None;
            }
            kept += 1;
            Some(Entry {
                connection,
                family: *message.body.first()?,
                tuple: attrs.find(CTA_TUPLE_ORIG)?.to_vec(),
                zone: attrs.find(CTA_ZONE).map(<[u8]>::to_vec),
                id: attrs.find(CTA_ID)?.to_vec(),
            })
        },
    )
}

/// Deletes entries; tells how many were still there.
pub fn delete<'a>(socket: &mut NetfilterSocket, entries: impl Iterator<Item = &'a Entry>) -> Result<usize> {
    let mut buffer = Buffer::default();
    for entry in entries {
        let seq = socket.next_seq();
        let start = buffer.begin_message(MSG_DELETE, F_REQUEST | F_ACK, seq, entry.family, 0);
        buffer.attr(CTA_TUPLE_ORIG | NESTED, &entry.tuple);
        if let Some(zone) = &entry.zone {
            buffer.attr(CTA_ZONE, zone);
        }
        buffer.attr(CTA_ID, &entry.id);
        buffer.end_message(start);
    }
    if buffer.len() == 0 {
        return Ok(0);
    }
    socket.send_each(&buffer, "delete conntrack entries")
}

fn connection(attrs: Attrs<'_>) -> Option<Connection> {
    let [original, reply] = [attrs.nested(CTA_TUPLE_ORIG)?, attrs.nested(CTA_TUPLE_REPLY)?];
    let (client, number, client_port) = end(original, SOURCE)?;
    let (dialled, _, dialled_port) = end(original, DESTINATION)?;
    let (server, _, server_port) = end(reply, SOURCE)?;
    let proto = Proto::from_number(number)?;
    let mark = attrs.u32(CTA_MARK).unwrap_or(0);
    let dialled = (dialled, dialled_port);
    Some(Connection { client, client_port, server, server_port, dialled, proto, mark })
}

/// The attributes of one end of a tuple: IPv4 address, IPv6 address, port.
type End = [u16; 3];
/// CTA_IP_V4_SRC, CTA_IP_V6_SRC, CTA_PROTO_SRC_PORT
const SOURCE: End = [1, 3, 2];
/// CTA_IP_V4_DST, CTA_IP_V6_DST, CTA_PROTO_DST_PORT
const DESTINATION: End = [2, 4, 3];

/// Address, protocol and port of one end of a tuple.
fn end(tuple: Attrs<'_>, [ip_v4, ip_v6, port]: End) -> Option<(IpAddr, u8, u16)> {
    const CTA_TUPLE_IP: u16 = 1;
    const CTA_TUPLE_PROTO: u16 = 2;
    const CTA_PROTO_NUM: u16 = 1;
    let ip = tuple.nested(CTA_TUPLE_IP)?;
    let address = match (ip.find(ip_v4), ip.find(ip_v6)) {
        (Some(v4), _) => IpAddr::from(Ipv4Addr::from(<[u8; 4]>::try_from(v4).ok()?)),
        (None, v6) => IpAddr::from(Ipv6Addr::from(<[u8; 16]>::try_from(v6?).ok()?)),
    };
    let proto = tuple.nested(CTA_TUPLE_PROTO)?;
    let port = u16::from_be_bytes(proto.find(port)?.try_into().ok()?);
    Some((address, *proto.find(CTA_PROTO_NUM)?.first()?, port))
}
