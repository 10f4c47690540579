//! Conntrack entries, as far as the policy revision needs them: a revision number may be used again only when no entry
//! carries it any more, else a forbidden connection would come back to life.

use super::socket::{NetfilterSocket, SUBSYS_CONNTRACK};
use super::wire::{Buffer, F_ACK, F_REQUEST};
use crate::error::Result;

/// `IPCTNL_MSG_CT_NEW`
const MSG_NEW: u16 = SUBSYS_CONNTRACK << 8;
/// `IPCTNL_MSG_CT_GET`
const MSG_GET: u16 = (SUBSYS_CONNTRACK << 8) | 1;
const CTA_TUPLE_ORIG: u16 = 1;
const CTA_MARK: u16 = 8;
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
        match socket.send_each(&buffer, "clear the revision from conntrack entries") {
            Err(crate::Error::Nft { errno: libc::ENOENT, .. }) | Ok(()) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(marked.len())
}
