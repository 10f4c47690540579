//! Checksum offload of the VXLAN device.
//!
//! With it on, the kernel leaves checksums of encapsulated packets to the hardware. Some kernels and network cards then send wrong
//! ones, and the receiver drops the packets: ping works in the overlay and TCP stalls (flannel#1279, calico#3145). With it
//! off, the kernel computes the inner checksum before it encapsulates: right everywhere, at some cost per byte.

use std::io;
use std::os::fd::AsRawFd;

use netlink_sys::Socket;

use crate::error::{Error, Result};

/// `SIOCETHTOOL`
const SIOCETHTOOL: libc::c_ulong = 0x8946;
/// `ETHTOOL_GTXCSUM`, `ETHTOOL_STXCSUM`
const GET_TX_CHECKSUM: u32 = 0x16;
const SET_TX_CHECKSUM: u32 = 0x17;

/// `struct ethtool_value`
#[repr(C)]
struct EthtoolValue {
    command: u32,
    data: u32,
}

/// Turns the checksum offload of `ifname` on or off, in the calling thread's network namespace; true if it was otherwise.
///
/// # Errors
/// The interface does not exist, or the kernel refuses.
pub fn hold_checksum_offload(ifname: &str, wanted: bool) -> Result<bool> {
    if checksum_offload(ifname)? == wanted {
        return Ok(false);
    }
    let set = ask(ifname, SET_TX_CHECKSUM, u32::from(wanted));
    set.map_err(|source| Error::Socket { what: format!("set the checksum offload of {ifname}"), source })?;
    Ok(true)
}

/// Whether `ifname` leaves checksums to the hardware.
///
/// # Errors
/// The interface does not exist, or the kernel refuses.
pub fn checksum_offload(ifname: &str) -> Result<bool> {
    let found = ask(ifname, GET_TX_CHECKSUM, 0);
    let found =
        found.map_err(|source| Error::Socket { what: format!("read the offloads of {ifname}"), source })?;
    Ok(found != 0)
}

fn ask(ifname: &str, command: u32, data: u32) -> io::Result<u32> {
    // Any socket of the namespace leads to its interfaces.
    let socket = Socket::new(netlink_sys::protocols::NETLINK_ROUTE)?;
    let mut value = EthtoolValue { command, data };
    let bytes = ifname.as_bytes();
    if bytes.len() >= libc::IFNAMSIZ {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: all bits zero are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(bytes) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_data = std::ptr::from_mut(&mut value).cast();
    // SAFETY: the descriptor is open, the name ends with a zero byte, and the pointer leads to a `struct ethtool_value`, which is what
    // both commands read and write; both outlive the call.
    let code = unsafe { libc::ioctl(socket.as_raw_fd(), SIOCETHTOOL as _, std::ptr::from_mut(&mut request)) };
    if code == 0 { Ok(value.data) } else { Err(io::Error::last_os_error()) }
}
