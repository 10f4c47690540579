//! Tells when somebody else changed what the data path relies on: links, addresses, routes, neighbours, forwarding entries,
//! some sysctls, nf_tables.
//!
//! ```text
//! rtnetlink groups --filter: ours?--> a mark --> [`Watch::links`]      the caller compares everything, see there
//! nf_tables group (read by the policy side) --readable--> [`Watch::tables`]
//! ```
//!
//! A notification is only a reason to compare: what it says is not believed, and one too many costs a comparison that
//! writes nothing. What is our own request's is left out where the kernel tells (routes, addresses, neighbours);
//! changes of links carry no sender, so a pass that writes is followed by one that does not. A socket that overflows
//! (ENOBUFS) means: compare everything.
//!
//! Not told by any notification: most sysctls (they are polled, see [`crate::sysctls`]), and routes that the kernel drops with
//! their device or source address (that device or address is told).

use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use netlink_sys::Socket;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::error::{Error, Result};
use crate::links::ROUTE_PROTOCOL;
use crate::nft::socket::{force_buffer, socket_error};
use crate::nft::wire::{Attrs, F_REPLACE, Message, from_host32, messages};

/// `RTNLGRP_LINK`, `_NEIGH`, `_IPV4_IFADDR`, `_IPV4_ROUTE`, `_IPV6_IFADDR`, `_IPV6_ROUTE`, `_IPV4_NETCONF`, `_IPV6_NETCONF`
const GROUPS: [u32; 8] = [1, 3, 5, 7, 9, 11, 24, 25];
/// Notifications that wait; some thousand. If it overflows everything is compared.
const RECEIVE_BYTES: usize = 1 << 20;
/// Of one datagram, as the kernel fills it.
const DATAGRAM_BYTES: usize = 64 << 10;

const NEWLINK: u16 = 16;
const DELLINK: u16 = 17;
const NEWADDR: u16 = 20;
const DELADDR: u16 = 21;
const NEWROUTE: u16 = 24;
const DELROUTE: u16 = 25;
const NEWNEIGH: u16 = 28;
const DELNEIGH: u16 = 29;
const NEWNETCONF: u16 = 80;
const DELNETCONF: u16 = 81;

/// `NETCONFA_IFINDEX`, behind `struct netconfmsg`, which is padded.
const NETCONF_IFINDEX: u16 = 1;
const NETCONF_HEADER_LEN: usize = 4;

/// `AF_BRIDGE`
const FAMILY_BRIDGE: u8 = 7;
/// `NUD_PERMANENT | NUD_NOARP | NUD_FAILED`: what entries of ours are, and what a deleted one becomes.
const STATES_OF_OURS: u16 = 0x80 | 0x40 | 0x20;

/// The interfaces that matter.
#[derive(Debug, Default)]
pub struct Interests {
    /// Bridge, VXLAN device, bridge ports. Empty until the first comparison: then everything matters.
    ours: Mutex<BTreeSet<u32>>,
    /// The interface below the overlay, of which only the link matters; 0: none.
    uplink: AtomicU32,
}

impl Interests {
    /// Interfaces of ours that exist.
    pub fn add(&self, indices: impl IntoIterator<Item = u32>) {
        self.with(|ours| ours.extend(indices));
    }

    /// It is being removed by us.
    pub fn remove(&self, index: u32) {
        self.with(|ours| ours.remove(&index));
    }

    /// Sets the interface below the overlay.
    pub fn set_uplink(&self, index: u32) {
        self.uplink.store(index, Ordering::Relaxed);
    }

    fn has(&self, index: u32) -> bool {
        self.with(|ours| ours.is_empty() || ours.contains(&index))
    }

    fn is_uplink(&self, index: u32) -> bool {
        self.uplink.load(Ordering::Relaxed) == index
    }

    fn with<T>(&self, work: impl FnOnce(&mut BTreeSet<u32>) -> T) -> T {
        // A set of numbers is whole after any panic.
        work(&mut self.ours.lock().unwrap_or_else(std::sync::PoisonError::into_inner))
    }
}

/// The sockets.
pub struct Watch {
    routes: AsyncFd<Socket>,
    tables: AsyncFd<OwnedFd>,
    interests: Arc<Interests>,
    /// Ports of our own rtnetlink sockets.
    own: Vec<u32>,
    changed: AtomicBool,
}

impl Watch {
    /// Subscribes in the calling thread's network namespace; needs a tokio runtime. `tables`: the policy side's notification socket,
    /// which is only waited for here.
    pub fn open(tables: OwnedFd, interests: Arc<Interests>, own: Vec<u32>) -> Result<Self> {
        let mut socket = Socket::new(netlink_sys::protocols::NETLINK_ROUTE).map_err(socket_error("open"))?;
        socket.bind_auto().map_err(socket_error("bind"))?;
        force_buffer(&socket, libc::SO_RCVBUFFORCE, RECEIVE_BYTES)?;
        for group in GROUPS {
            socket.add_membership(group).map_err(socket_error("subscribe"))?;
        }
        socket.set_non_blocking(true).map_err(socket_error("set up"))?;
        Ok(Self {
            routes: wait_for(socket)?,
            tables: wait_for(tables)?,
            interests,
            own,
            changed: AtomicBool::new(false),
        })
    }

    /// Returns when something of ours may have changed since the last return. Cancellation safe.
    ///
    /// # Errors
    /// The socket failed for good.
    pub async fn links(&self) -> Result<()> {
        loop {
            if self.changed.swap(false, Ordering::AcqRel) {
                return Ok(());
            }
            let mut ready = self.routes.readable().await.map_err(socket_error("wait for notifications"))?;
            ready.clear_ready();
            // Nothing is awaited between here and the mark.
            self.drain()?;
        }
    }

    /// Returns when the policy side has notifications to look at, its own among them. Cancellation safe.
    ///
    /// # Errors
    /// The socket failed for good.
    pub async fn tables(&self) -> Result<()> {
        let mut ready = self.tables.readable().await.map_err(socket_error("wait for notifications"))?;
        ready.clear_ready();
        Ok(())
    }

    fn drain(&self) -> Result<()> {
        let mut datagram = Vec::with_capacity(DATAGRAM_BYTES);
        let mut changed = false;
        loop {
            datagram.clear();
            match self.routes.get_ref().recv(&mut datagram, libc::MSG_DONTWAIT) {
                Ok(_) => changed |= messages(&datagram).filter(|message| self.matters(message)).count() > 0,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => changed = true,
                Err(error) => return Err(socket_error("receive notifications")(error)),
            }
        }
        self.changed.fetch_or(changed, Ordering::AcqRel);
        Ok(())
    }

    /// All and new ones matter, as do messages that do not say.
    fn has_sysctls_of(&self, body: &[u8]) -> bool {
        let index = interface_of_sysctls(body).and_then(|index| u32::try_from(index).ok());
        index.is_none_or(|index| self.interests.has(index))
    }

    fn matters(&self, message: &Message<'_>) -> bool {
        let body = message.body;
        let family = body.first().copied().unwrap_or_default();
        // `ifinfomsg`, `ifaddrmsg` and `ndmsg` have the interface at the same place.
        let index = body.get(4..8).and_then(|bytes| bytes.try_into().ok()).map_or(0, from_host32);
        let foreign = !self.own.contains(&message.port);
        match message.kind {
            DELLINK if family != FAMILY_BRIDGE => {
                let had = self.interests.has(index);
                self.interests.remove(index);
                had || self.interests.is_uplink(index)
            }
            NEWLINK | DELLINK => self.interests.has(index) || self.interests.is_uplink(index),
            NEWADDR | DELADDR => foreign,
            NEWNEIGH | DELNEIGH => {
                let is_entry = family == FAMILY_BRIDGE
                    || message.kind == DELNEIGH
                    || state_of(body) & STATES_OF_OURS != 0;
                foreign && is_entry && self.interests.has(index)
            }
            // Of a replacing route only the new one is told.
            NEWROUTE | DELROUTE => {
                let ours = body.get(5) == Some(&ROUTE_PROTOCOL);
                foreign && (ours || message.flags & F_REPLACE != 0)
            }
            NEWNETCONF | DELNETCONF => foreign && self.has_sysctls_of(body),
            _ => false,
        }
    }
}

fn wait_for<T: AsRawFd>(socket: T) -> Result<AsyncFd<T>> {
    // SAFETY: both kinds of socket own their descriptor, which nobody closes or replaces while `AsyncFd` holds it: only shared
    // references to them are given out.
    let registered = unsafe { AsyncFd::register_with_interest(socket, Interest::READABLE) };
    registered.map_err(|error| socket_error("wait for")(error.into()))
}

/// Of which interface a NETCONF message tells: a number, or one below 0 for all and for new ones. Every interface that anybody makes
/// is told here.
fn interface_of_sysctls(body: &[u8]) -> Option<i32> {
    let found = Attrs::of(body.get(NETCONF_HEADER_LEN..)?).find(NETCONF_IFINDEX)?;
    Some(from_host32(found.try_into().ok()?).cast_signed())
}

/// `ndm_state`
fn state_of(body: &[u8]) -> u16 {
    match body.get(8..10) {
        Some(bytes) => u16::from(bytes[0]) | u16::from(bytes[1]),
        None => 0,
    }
}

/// A descriptor of the same socket.
pub fn duplicate(socket: &Socket) -> Result<OwnedFd> {
    // SAFETY: the socket is open for the duration of the borrow, which ends with this function.
    let borrowed = unsafe { BorrowedFd::borrow_raw(socket.as_raw_fd()) };
    borrowed.try_clone_to_owned().map_err(|source| Error::Socket { what: "duplicate".into(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sysctl_of_an_interface_of_others_does_not_matter_and_one_of_all_does() {
        let body = |index: i32| {
            let mut body = vec![2, 0, 0, 0, 8, 0, 1, 0];
            body.extend(crate::nft::wire::host32(index.cast_unsigned()));
            body
        };
        for index in [7, -1, -2] {
            assert_eq!(interface_of_sysctls(&body(index)), Some(index));
        }
        assert_eq!(interface_of_sysctls(&[2, 0, 0, 0]), None);
    }
}
