//! A netfilter netlink socket: transactions and dumps.
//!
//! The kernel works a request off inside `send`, so all answers to a transaction wait in the socket when it returns.

use std::borrow::Cow;
use std::io;
use std::os::fd::AsRawFd;

use netlink_sys::Socket;

use super::wire::{Buffer, F_ACK, F_DUMP, F_DUMP_INTR, F_REQUEST, MSG_DONE, MSG_ERROR, messages};
use crate::error::{Error, Result};

/// `NETLINK_NETFILTER`
pub const PROTOCOL: isize = 12;
/// `NFNL_SUBSYS_NFTABLES`
pub const SUBSYS_NFTABLES: u16 = 10;
/// `NFNL_SUBSYS_CTNETLINK`
pub const SUBSYS_CONNTRACK: u16 = 1;
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
/// A transaction must fit one `send`; 1M elements take about 80 MB. Beyond, it is refused before anything is sent.
const TRANSACTION_BYTES_MAX: usize = 256 << 20;
/// Room for the answers of a transaction: errors only, each with a copy of the header. If it overflows, the
/// transaction's outcome is read back from the kernel.
const RECEIVE_BYTES: usize = 4 << 20;
/// A dump that was interrupted by somebody's change is repeated this often, then taken as failed.
const DUMP_TRIES: usize = 8;
/// Bytes of one answer datagram; the kernel fills at most 32 KiB per dump message.
const DATAGRAM_BYTES: usize = 64 << 10;

/// `NFNL_SUBSYS_NFTABLES << 8 | message`
pub fn nft_message(message: u16) -> u16 {
    (SUBSYS_NFTABLES << 8) | message
}

/// A transaction under construction.
#[derive(Debug)]
pub struct Batch {
    buffer: Buffer,
    last: usize,
    first_seq: u32,
    /// What each message does, for errors; the sequence numbers count them.
    labels: Vec<Cow<'static, str>>,
}

impl Batch {
    fn new(first_seq: u32) -> Self {
        let mut buffer = Buffer::default();
        let start = buffer.begin_message(BATCH_BEGIN, F_REQUEST, first_seq, 0, SUBSYS_NFTABLES);
        buffer.end_message(start);
        Self { buffer, last: start, first_seq, labels: vec!["begin a transaction".into()] }
    }

    /// Adds a message.
    pub fn push(
        &mut self,
        message: u16,
        flags: u16,
        family: u8,
        label: impl Into<Cow<'static, str>>,
        fill: impl FnOnce(&mut Buffer),
    ) {
        let seq = self.next_seq();
        let start = self.buffer.begin_message(nft_message(message), F_REQUEST | flags, seq, family, 0);
        fill(&mut self.buffer);
        self.buffer.end_message(start);
        self.last = start;
        self.labels.push(label.into());
    }

    /// Nothing was pushed.
    pub fn is_empty(&self) -> bool {
        self.labels.len() == 1
    }

    fn next_seq(&self) -> u32 {
        self.first_seq.wrapping_add(u32::try_from(self.labels.len()).unwrap_or(u32::MAX))
    }

    /// The finished bytes; only the last message is acknowledged, errors come for each.
    fn finish(mut self) -> (Vec<u8>, u32, Vec<Cow<'static, str>>) {
        let ack_seq = self.next_seq().wrapping_sub(1);
        self.buffer.add_flags(self.last, F_ACK);
        let start = self.buffer.begin_message(BATCH_END, F_REQUEST, self.next_seq(), 0, SUBSYS_NFTABLES);
        self.buffer.end_message(start);
        (self.buffer.as_slice().to_vec(), ack_seq, self.labels)
    }
}

/// The socket.
pub struct NetfilterSocket {
    socket: Socket,
    port: u32,
    seq: u32,
    send_bytes: usize,
}

/// The error of a socket call that failed at `what`.
pub fn socket_error(what: &str) -> impl Fn(io::Error) -> Error {
    move |source| Error::Socket { what: what.to_string(), source }
}

impl NetfilterSocket {
    /// Opens a socket in the calling thread's network namespace.
    pub fn open() -> Result<Self> {
        let mut socket = Socket::new(PROTOCOL).map_err(socket_error("open"))?;
        let address = socket.bind_auto().map_err(socket_error("bind"))?;
        force_buffer(&socket, libc::SO_RCVBUFFORCE, RECEIVE_BYTES)?;
        Ok(Self { socket, port: address.port_number(), seq: 1, send_bytes: 0 })
    }

    /// The port number that marks our own changes in notifications.
    pub fn port(&self) -> u32 {
        self.port
    }

    /// Starts a transaction.
    pub fn batch(&self) -> Batch {
        Batch::new(self.seq)
    }

    /// Commits a transaction, all or nothing.
    pub fn commit(&mut self, batch: Batch) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let first_seq = batch.first_seq;
        let (bytes, ack_seq, labels) = batch.finish();
        if bytes.len() > TRANSACTION_BYTES_MAX {
            return Err(Error::Config(format!(
                "the ruleset takes {} bytes in one transaction, more than {TRANSACTION_BYTES_MAX}",
                bytes.len()
            )));
        }
        self.seq = ack_seq.wrapping_add(2);
        self.send(&bytes)?;
        let mut acked = false;
        let mut datagram = Vec::with_capacity(DATAGRAM_BYTES);
        while self.receive(&mut datagram, libc::MSG_DONTWAIT)? {
            for message in messages(&datagram) {
                match message.errno() {
                    Some(0) => acked |= message.seq == ack_seq,
                    Some(errno) => {
                        let index = message.seq.wrapping_sub(first_seq) as usize;
                        let what = labels.get(index).map_or("commit", |l| l.as_ref()).to_string();
                        self.drain()?;
                        return Err(Error::Nft { what, errno });
                    }
                    None => {}
                }
            }
        }
        if acked { Ok(()) } else { Err(Error::Protocol("a transaction was not acknowledged".into())) }
    }

    /// Runs a dump and gives each message's attributes to `each`.
    pub fn dump<T>(
        &mut self,
        kind: u16,
        family: u8,
        fill: impl Fn(&mut Buffer),
        mut each: impl FnMut(super::wire::Message<'_>) -> Option<T>,
    ) -> Result<Vec<T>> {
        for _ in 0..DUMP_TRIES {
            let seq = self.next_seq();
            let mut buffer = Buffer::default();
            let start = buffer.begin_message(kind, F_REQUEST | F_DUMP, seq, family, 0);
            fill(&mut buffer);
            buffer.end_message(start);
            self.send(buffer.as_slice())?;
            if let Some(found) = self.collect(seq, &mut each)? {
                return Ok(found);
            }
        }
        Err(Error::Protocol(format!("the kernel's state changed during {DUMP_TRIES} dumps in a row")))
    }

    fn collect<T>(
        &mut self,
        seq: u32,
        each: &mut impl FnMut(super::wire::Message<'_>) -> Option<T>,
    ) -> Result<Option<Vec<T>>> {
        let mut found = Vec::new();
        let mut interrupted = false;
        let mut datagram = Vec::with_capacity(DATAGRAM_BYTES);
        loop {
            self.receive(&mut datagram, 0)?;
            for message in messages(&datagram).filter(|m| m.seq == seq) {
                interrupted |= message.flags & F_DUMP_INTR != 0;
                match (message.kind, message.errno()) {
                    (MSG_DONE, _) => return Ok((!interrupted).then_some(found)),
                    (MSG_ERROR, Some(errno)) => {
                        return Err(Error::Nft { what: "read its state".into(), errno });
                    }
                    _ => found.extend(each(message)),
                }
            }
        }
    }

    /// Asks for one thing that is not a dump and gives the answer to `read`. `None`: there is none, which the kernel says as
    /// ENOENT or, for the end of a range above the last one, by an acknowledgement alone. `what` names it in errors.
    pub fn ask<T>(
        &mut self,
        kind: u16,
        family: u8,
        what: &str,
        fill: impl FnOnce(&mut Buffer),
        read: impl Fn(super::wire::Message<'_>) -> Option<T>,
    ) -> Result<Option<T>> {
        let seq = self.next_seq();
        let mut buffer = Buffer::default();
        let start = buffer.begin_message(kind, F_REQUEST | F_ACK, seq, family, 0);
        fill(&mut buffer);
        buffer.end_message(start);
        self.send(buffer.as_slice())?;
        let mut found = None;
        let mut datagram = Vec::with_capacity(DATAGRAM_BYTES);
        while self.receive(&mut datagram, libc::MSG_DONTWAIT)? {
            // What an earlier question left is not the answer.
            for message in messages(&datagram).filter(|message| message.seq == seq) {
                match message.errno() {
                    Some(0) => return Ok(found),
                    Some(libc::ENOENT) => return Ok(None),
                    Some(errno) => return Err(Error::Nft { what: what.to_string(), errno }),
                    None => match read(message) {
                        Some(answer) => found = Some(answer),
                        None => {
                            let what = format!("{what}: it is not what this program writes");
                            return Err(Error::Protocol(what));
                        }
                    },
                }
            }
        }
        Err(Error::Protocol(format!("{what}: no answer")))
    }

    /// Sends messages outside a transaction, each of which asks for an acknowledgement; tells how many were done. That a
    /// thing is not there any more is no error; the first other one is returned.
    pub fn send_each(&mut self, buffer: &Buffer, what: &str) -> Result<usize> {
        self.send(buffer.as_slice())?;
        let mut datagram = Vec::with_capacity(DATAGRAM_BYTES);
        let (mut done, mut first) = (0, None);
        while self.receive(&mut datagram, libc::MSG_DONTWAIT)? {
            for errno in messages(&datagram).filter_map(|m| m.errno()) {
                match errno {
                    0 => done += 1,
                    libc::ENOENT => {}
                    errno => drop(first.get_or_insert(errno)),
                }
            }
        }
        first.map_or(Ok(done), |errno| Err(Error::Nft { what: what.to_string(), errno }))
    }

    /// A sequence number of its own.
    pub fn next_seq(&mut self) -> u32 {
        self.seq = self.seq.wrapping_add(1);
        self.seq
    }

    fn send(&mut self, bytes: &[u8]) -> Result<()> {
        // The kernel counts a datagram's overhead against the buffer.
        let need = bytes.len() + (bytes.len() >> 3) + 65_536;
        if need > self.send_bytes {
            force_buffer(&self.socket, libc::SO_SNDBUFFORCE, need)?;
            self.send_bytes = need;
        }
        let sent = self.socket.send(bytes, 0).map_err(socket_error("send"))?;
        if sent == bytes.len() { Ok(()) } else { Err(Error::Protocol("a message was cut".into())) }
    }

    /// Receives one datagram; false if none is waiting and `flags` says not to wait.
    fn receive(&self, datagram: &mut Vec<u8>, flags: libc::c_int) -> Result<bool> {
        datagram.clear();
        match self.socket.recv(datagram, flags) {
            Ok(_) => Ok(true),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(e) if e.kind() == io::ErrorKind::Interrupted => self.receive(datagram, flags),
            Err(e) => Err(socket_error("receive")(e)),
        }
    }

    fn drain(&self) -> Result<()> {
        let mut datagram = Vec::with_capacity(DATAGRAM_BYTES);
        while self.receive(&mut datagram, libc::MSG_DONTWAIT)? {}
        Ok(())
    }
}

/// `NFNLGRP_NFTABLES`
const GROUP_NFTABLES: u32 = 7;
/// Notifications waiting to be looked at; 100,000 elements take about 7 MB. If it overflows, our tables are read back.
const EVENT_BYTES: usize = 16 << 20;

/// Tells whether somebody else changed our tables.
pub struct Events {
    socket: Socket,
}

impl Events {
    /// Subscribes in the calling thread's network namespace.
    pub fn open() -> Result<Self> {
        let mut socket = Socket::new(PROTOCOL).map_err(socket_error("open"))?;
        socket.bind_auto().map_err(socket_error("bind"))?;
        force_buffer(&socket, libc::SO_RCVBUFFORCE, EVENT_BYTES)?;
        socket.add_membership(GROUP_NFTABLES).map_err(socket_error("subscribe"))?;
        Ok(Self { socket })
    }

    /// To wait for notifications with.
    pub fn descriptor(&self) -> Result<std::os::fd::OwnedFd> {
        crate::watch::duplicate(&self.socket)
    }

    /// Looks at what came since the last call: did a socket other than `own_port` change the table `table`?
    pub fn foreign_change(&self, table: &str, own_port: u32) -> Result<bool> {
        let mut changed = false;
        let mut datagram = Vec::with_capacity(DATAGRAM_BYTES);
        loop {
            datagram.clear();
            match self.socket.recv(&mut datagram, libc::MSG_DONTWAIT) {
                // In every notification about a table, chain, rule, set or element attribute 1 is the table's name.
                Ok(_) => {
                    changed |= messages(&datagram)
                        .any(|m| m.port != own_port && m.attrs().string(1).is_some_and(|t| t == table));
                }
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return Ok(changed),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.raw_os_error() == Some(libc::ENOBUFS) => changed = true,
                Err(e) => return Err(socket_error("receive notifications")(e)),
            }
        }
    }
}

/// Sets a buffer's size beyond what the system allows without CAP_NET_ADMIN.
pub fn force_buffer(socket: &Socket, option: libc::c_int, bytes: usize) -> Result<()> {
    let value = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    // SAFETY: the descriptor is open for the call's duration, and the pointer and length describe `value`.
    let code = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            option,
            std::ptr::from_ref(&value).cast(),
            size_of::<libc::c_int>() as libc::socklen_t,
        )
    };
    if code == 0 { Ok(()) } else { Err(socket_error("size the buffer of")(io::Error::last_os_error())) }
}
