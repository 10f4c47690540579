//! Deleting a link without waiting for its memory.
//!
//! The kernel deletes a link inside `send`, in two steps. First the link is taken off the lists of its namespace, with what
//! depends on it (a veth's other end, a bridge port, addresses, routes), and RTM_DELLINK is broadcast; from then on nobody finds it,
//! and its name and index are free. Then the caller waits, without the lock on links, until no reader can hold it any more
//! (`netdev_run_todo`: `rcu_barrier`), and frees it. The first step of a veth pair takes less than a millisecond on Linux 6.18,
//! the second one 10 to 30. So a thread of its own sends the request, and whoever asked goes on with the broadcast.

use std::io;
use std::sync::Arc;

use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::LinkMessage;
use netlink_sys::protocols::NETLINK_ROUTE;
use netlink_sys::{AsyncSocket, AsyncSocketExt, Socket, SocketAddr, TokioSocket};
use rtnetlink::packet_core::{NLM_F_ACK, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use tokio::sync::Semaphore;

/// `RTNLGRP_LINK`
const LINK_GROUP: u32 = 1;
/// Links whose memory is being freed at one time. Each holds a thread; one more waits for one of them to end.
const FREEING_MAX: usize = 32;

/// Deletes links, each by a thread of its own.
pub struct Unlinker {
    freeing: Arc<Semaphore>,
}

impl Default for Unlinker {
    fn default() -> Self {
        Self { freeing: Arc::new(Semaphore::new(FREEING_MAX)) }
    }
}

impl Unlinker {
    /// Deletes the link `index` of the calling thread's namespace; returns once it is off the namespace's lists. Cancellation safe: the
    /// deletion goes on.
    ///
    /// # Errors
    /// The kernel's errno; ENODEV if there is no such link.
    pub async fn delete(&self, index: u32) -> io::Result<()> {
        let Ok(permit) = Arc::clone(&self.freeing).acquire_owned().await else {
            return Err(io::Error::other("no thread to delete a link"));
        };
        // Before the request, so that its broadcast cannot be missed.
        let mut broadcasts = TokioSocket::new(NETLINK_ROUTE)?;
        broadcasts.socket_mut().bind(&SocketAddr::new(0, 0))?;
        broadcasts.socket_mut().add_membership(LINK_GROUP)?;
        let request = tokio::task::spawn_blocking(move || {
            let answer = request(index);
            drop(permit);
            answer
        });
        tokio::select! {
            biased;
            gone = until_gone(&mut broadcasts, index) => gone,
            answer = request => answer.unwrap_or_else(|_| Err(io::Error::other("deleting a link was cut off"))),
        }
    }
}

/// Sends RTM_DELLINK and waits for its answer.
fn request(index: u32) -> io::Result<()> {
    let mut socket = Socket::new(NETLINK_ROUTE)?;
    socket.bind_auto()?;
    let mut link = LinkMessage::default();
    link.header.index = index;
    let mut message = NetlinkMessage::from(RouteNetlinkMessage::DelLink(link));
    message.header.flags = NLM_F_REQUEST | NLM_F_ACK;
    message.finalize();
    let mut bytes = vec![0; message.buffer_len()];
    message.serialize(&mut bytes);
    socket.send(&bytes, 0)?;
    let (answer, _) = socket.recv_from_full()?;
    let answer = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&answer).map_err(io::Error::other)?;
    match answer.payload {
        NetlinkPayload::Error(error) if error.raw_code() != 0 => {
            Err(io::Error::from_raw_os_error(error.raw_code().abs()))
        }
        _ => Ok(()),
    }
}

/// Waits for the broadcast that the link is gone. Never returns if it cannot be received: the request's answer comes in any case.
async fn until_gone(broadcasts: &mut TokioSocket, index: u32) -> io::Result<()> {
    while let Ok((bytes, _)) = broadcasts.recv_from_full().await {
        let Ok(message) = NetlinkMessage::<RouteNetlinkMessage>::deserialize(&bytes) else { continue };
        if let NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelLink(link)) = message.payload
            // The bridge tells in the same way that a port is gone, before the link is.
            && link.header.interface_family == netlink_packet_route::AddressFamily::Unspec
            && link.header.index == index
        {
            return Ok(());
        }
    }
    std::future::pending().await
}
