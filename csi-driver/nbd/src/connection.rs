//! The transmission phase, the client's side.
//!
//! One task polls a reader and a writer. A request is in the pending table from submit until its reply, or until the
//! connection fails; whoever takes it out of the table completes it, so that it completes exactly once.

use std::collections::HashMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use holdfast_io::{BlockError, Completion};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;

use crate::outgoing::{BATCH_MESSAGES_MAX, Outgoing, next_batch, write_batch};
use crate::payload::{READ_BUFFER_BYTES, read_array, read_payload};
use crate::proto::{
    self, Command, DecodeError, ERROR_TEXT_BYTES_MAX, ReplyHeader, RequestHeader, SIMPLE_REPLY_BYTES,
    STATUS_EXTENTS_MAX, chunk, chunk_flag, errno,
};
use crate::provider::ExtentsCompletion;

/// Requests in flight on one connection; one more fails with ENOMEM. Far above what front ends have in flight, so that
/// meeting it is a defect of the caller.
const IN_FLIGHT_MAX: usize = 16_384;
/// How long an orderly goodbye may take.
const GOODBYE: Duration = Duration::from_millis(100);

/// What the reply to a request looks like.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Expected {
    Nothing,
    Data { offset: u64, len: u32 },
    Extents,
}

/// Who waits for a reply.
pub(crate) enum Waiter {
    Data(Completion),
    Extents(ExtentsCompletion),
}

impl Waiter {
    fn fail(self, errno: i32) {
        match self {
            Self::Data(done) => done(Err(BlockError(errno))),
            Self::Extents(done) => done(Err(BlockError(errno))),
        }
    }
}

/// The shared half of a client's connection.
#[derive(Debug)]
pub(crate) struct Connection {
    pending: Mutex<Pending>,
    queue: UnboundedSender<Outgoing<()>>,
    /// Ends the task.
    closing: watch::Sender<bool>,
    /// Everything in flight has been completed.
    closed: watch::Sender<bool>,
}

impl Connection {
    /// Spawns the connection's task.
    pub(crate) fn start<S>(stream: S, context_id: Option<u32>) -> Arc<Self>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (queue, queued) = unbounded_channel();
        let connection = Arc::new(Self {
            pending: Mutex::new(Pending::default()),
            queue,
            closing: watch::Sender::new(false),
            closed: watch::Sender::new(false),
        });
        tokio::spawn(run(connection.clone(), stream, queued, context_id));
        connection
    }

    /// Registers a request and queues it. The cookie in `request` is set here.
    pub(crate) fn send(&self, mut request: RequestHeader, data: Bytes, expected: Expected, waiter: Waiter) {
        let refused = match self.pending().insert(expected, waiter) {
            Ok(cookie) => {
                request.cookie = cookie;
                // Queued under the lock's shadow: if the connection fails in between, the request is completed by that
                // and the queue swallows it.
                let _ = self.queue.send(Outgoing::new(&request.encode(), &[], data, ()));
                return;
            }
            Err(refused) => refused,
        };
        let (waiter, errno) = *refused;
        waiter.fail(errno);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.pending().closed
    }

    pub(crate) async fn closed(&self) {
        let mut closed = self.closed.subscribe();
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// Completes everything in flight with ENOTCONN and ends the task.
    pub(crate) fn close(&self) {
        let in_flight = self.pending().close();
        for waiter in in_flight {
            waiter.fail(errno::ENOTCONN);
        }
        self.closing.send_replace(true);
        self.closed.send_replace(true);
    }

    fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Requests in flight, by cookie. A cookie is a slot's index and how often the slot was used, so that a reply that comes
/// twice is told from the reply to the slot's next user.
#[derive(Default)]
struct Pending {
    slots: Vec<Slot>,
    free: Vec<u32>,
    closed: bool,
}

#[derive(Default)]
struct Slot {
    uses: u32,
    waiting: Option<(Expected, Waiter)>,
}

impl Pending {
    fn insert(&mut self, expected: Expected, waiter: Waiter) -> Result<u64, Box<(Waiter, i32)>> {
        if self.closed {
            return Err(Box::new((waiter, errno::ENOTCONN)));
        }
        let index = match self.free.pop() {
            Some(index) => index,
            None if self.slots.len() < IN_FLIGHT_MAX => {
                self.slots.push(Slot::default());
                u32::try_from(self.slots.len() - 1).expect("at most 16,384 slots")
            }
            None => return Err(Box::new((waiter, errno::ENOMEM))),
        };
        let slot = &mut self.slots[index as usize];
        slot.uses = slot.uses.wrapping_add(1);
        slot.waiting = Some((expected, waiter));
        Ok(u64::from(slot.uses) << 32 | u64::from(index))
    }

    fn slot(&mut self, cookie: u64) -> Option<&mut Slot> {
        let (uses, index) = ((cookie >> 32) as u32, (cookie & 0xffff_ffff) as usize);
        self.slots.get_mut(index).filter(|slot| slot.uses == uses)
    }

    fn expected(&mut self, cookie: u64) -> Option<Expected> {
        self.slot(cookie)?.waiting.as_ref().map(|(expected, _)| *expected)
    }

    fn take(&mut self, cookie: u64) -> Option<Waiter> {
        let (_, waiter) = self.slot(cookie)?.waiting.take()?;
        self.free.push((cookie & 0xffff_ffff) as u32);
        Some(waiter)
    }

    fn close(&mut self) -> Vec<Waiter> {
        self.closed = true;
        self.free.clear();
        self.slots.drain(..).filter_map(|slot| slot.waiting).map(|(_, waiter)| waiter).collect()
    }
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let in_flight = self.slots.len() - self.free.len();
        f.debug_struct("Pending")
            .field("in_flight", &in_flight)
            .field("closed", &self.closed)
            .finish_non_exhaustive()
    }
}

async fn run<S>(
    connection: Arc<Connection>,
    stream: S,
    queued: UnboundedReceiver<Outgoing<()>>,
    context_id: Option<u32>,
) where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let (read_half, mut write_half) = tokio::io::split(stream);
    let stream = BufReader::with_capacity(READ_BUFFER_BYTES, read_half);
    let mut replies = Replies { connection: connection.clone(), stream, context_id, partial: HashMap::new() };
    let mut closing = connection.closing.subscribe();
    let mid_message = AtomicBool::new(false);
    let ended = tokio::select! {
        biased;
        _ = closing.wait_for(|closing| *closing) => Ok(()),
        ended = replies.run() => ended,
        ended = write_requests(&mut write_half, queued, &mid_message) => ended,
    };
    connection.close();
    if let Err(error) = ended {
        tracing::debug!(%error, "an NBD connection ended");
    } else if !mid_message.load(Ordering::Relaxed) {
        // Only between messages: after half a write, the goodbye would be taken for the rest of its data, and data that
        // nobody wrote would reach the disk.
        let goodbye = RequestHeader { flags: 0, command: Command::Disconnect, cookie: 0, offset: 0, len: 0 };
        let farewell = async {
            write_half.write_all(&goodbye.encode()).await?;
            write_half.shutdown().await
        };
        let _ = tokio::time::timeout(GOODBYE, farewell).await;
    }
}

/// Ends with an error only: the queue's sender lives in the connection.
async fn write_requests<S>(
    stream: &mut WriteHalf<S>,
    mut queue: UnboundedReceiver<Outgoing<()>>,
    mid_message: &AtomicBool,
) -> io::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut batch = Vec::with_capacity(BATCH_MESSAGES_MAX);
    while next_batch(&mut queue, &mut batch).await {
        mid_message.store(true, Ordering::Relaxed);
        write_batch(stream, &batch).await?;
        mid_message.store(false, Ordering::Relaxed);
    }
    Ok(())
}

struct Replies<S> {
    connection: Arc<Connection>,
    stream: BufReader<ReadHalf<S>>,
    context_id: Option<u32>,
    /// Replies of which a chunk has come and the last has not. Bounded by the requests in flight.
    partial: HashMap<u64, Partial>,
}

/// A structured reply being put together.
#[derive(Default)]
struct Partial {
    error: Option<i32>,
    data: Option<Vec<u8>>,
    received: u64,
    extents: Option<Vec<crate::provider::Extent>>,
}

impl<S> Replies<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    /// Handles replies until the stream ends or makes no sense.
    async fn run(&mut self) -> io::Result<()> {
        loop {
            let bytes: [u8; SIMPLE_REPLY_BYTES] = read_array(&mut self.stream).await?;
            match ReplyHeader::decode(&bytes).map_err(nonsense)? {
                ReplyHeader::Simple { error, cookie } => self.simple(error, cookie).await?,
                header @ ReplyHeader::Chunk { .. } => {
                    let header = header.with_length(read_array(&mut self.stream).await?);
                    if let ReplyHeader::Chunk { flags, kind, cookie, len } = header {
                        self.chunk(flags & chunk_flag::DONE != 0, kind, cookie, len).await?;
                    }
                }
            }
        }
    }

    async fn simple(&mut self, error: u32, cookie: u64) -> io::Result<()> {
        let expected = self.expected(cookie)?;
        if error != 0 {
            return self.complete(cookie, Err(errno::from_wire(error)));
        }
        let data = match expected {
            Expected::Nothing => Bytes::new(),
            Expected::Data { len, .. } => read_payload(&mut self.stream, len as usize).await?,
            Expected::Extents => return Err(out_of_step("a simple reply to a status request")),
        };
        self.complete(cookie, Ok(data))
    }

    async fn chunk(&mut self, last: bool, kind: u16, cookie: u64, len: u32) -> io::Result<()> {
        let expected = self.expected(cookie)?;
        match (kind, expected) {
            (chunk::NONE, _) if len == 0 => {
                if last && !self.partial.contains_key(&cookie) && matches!(expected, Expected::Nothing) {
                    return self.complete(cookie, Ok(Bytes::new()));
                }
                self.partial.entry(cookie).or_default();
            }
            (chunk::OFFSET_DATA, Expected::Data { offset, len: wanted }) => {
                let start = u64::from_be_bytes(read_array(&mut self.stream).await?);
                let len = len.checked_sub(8).ok_or_else(|| out_of_step("a data chunk without an offset"))?;
                let at = position(start, len, offset, wanted)?;
                if len == wanted && last && !self.partial.contains_key(&cookie) {
                    let data = read_payload(&mut self.stream, len as usize).await?;
                    return self.complete(cookie, Ok(data));
                }
                let partial = self.partial.entry(cookie).or_default();
                let data = partial.data.get_or_insert_with(|| vec![0; wanted as usize]);
                self.stream.read_exact(&mut data[at..at + len as usize]).await?;
                partial.received += u64::from(len);
            }
            (chunk::OFFSET_HOLE, Expected::Data { offset, len: wanted }) if len == 12 => {
                let start = u64::from_be_bytes(read_array(&mut self.stream).await?);
                let hole = u32::from_be_bytes(read_array(&mut self.stream).await?);
                let at = position(start, hole, offset, wanted)?;
                let partial = self.partial.entry(cookie).or_default();
                let data = partial.data.get_or_insert_with(|| vec![0; wanted as usize]);
                data[at..at + hole as usize].fill(0);
                partial.received += u64::from(hole);
            }
            (chunk::BLOCK_STATUS, Expected::Extents) if len as usize <= 4 + 8 * STATUS_EXTENTS_MAX => {
                let data = read_payload(&mut self.stream, len as usize).await?;
                let (context, extents) = proto::decode_status_chunk(&data).map_err(nonsense)?;
                let partial = self.partial.entry(cookie).or_default();
                if Some(context) == self.context_id {
                    partial.extents = Some(extents);
                }
            }
            (error, _) if error & chunk::ERROR_BIT != 0 && len as usize <= ERROR_TEXT_BYTES_MAX + 64 => {
                let data = read_payload(&mut self.stream, len as usize).await?;
                let (error, message) = proto::decode_error_chunk(&data).map_err(nonsense)?;
                tracing::debug!(error, message, "an NBD request failed");
                self.partial.entry(cookie).or_default().error.get_or_insert(errno::from_wire(error));
            }
            _ => return Err(out_of_step("a chunk that does not fit its request")),
        }
        if last { self.finish_partial(cookie, expected) } else { Ok(()) }
    }

    fn finish_partial(&mut self, cookie: u64, expected: Expected) -> io::Result<()> {
        let partial = self.partial.remove(&cookie).unwrap_or_default();
        if let Some(errno) = partial.error {
            return self.complete(cookie, Err(errno));
        }
        match expected {
            Expected::Nothing => self.complete(cookie, Ok(Bytes::new())),
            Expected::Data { len, .. } => match partial.data {
                // The specification forbids chunks that overlap, so the sum tells whether all came.
                Some(data) if partial.received == u64::from(len) => self.complete(cookie, Ok(data.into())),
                _ => Err(out_of_step("a read reply that does not cover its request")),
            },
            Expected::Extents => {
                let extents = partial.extents.ok_or_else(|| out_of_step("a status reply without extents"))?;
                match self.connection.pending().take(cookie) {
                    Some(Waiter::Extents(done)) => done(Ok(extents)),
                    Some(Waiter::Data(done)) => done(Err(BlockError(errno::EIO))),
                    None => {}
                }
                Ok(())
            }
        }
    }

    fn expected(&self, cookie: u64) -> io::Result<Expected> {
        let expected = self.connection.pending().expected(cookie);
        expected.ok_or_else(|| out_of_step("a reply to a request that is not in flight"))
    }

    fn complete(&mut self, cookie: u64, result: Result<Bytes, i32>) -> io::Result<()> {
        self.partial.remove(&cookie);
        // `None`: the connection was closed a moment ago, which has completed it.
        let Some(waiter) = self.connection.pending().take(cookie) else { return Ok(()) };
        match (waiter, result) {
            (Waiter::Data(done), Ok(data)) => done(Ok(data)),
            (waiter @ Waiter::Extents(_), Ok(_)) => {
                waiter.fail(errno::EIO);
                return Err(out_of_step("a status reply without extents"));
            }
            (waiter, Err(errno)) => waiter.fail(errno),
        }
        Ok(())
    }
}

/// Where in a read of `[offset, offset + wanted)` a chunk of `len` bytes at `start` belongs.
fn position(start: u64, len: u32, offset: u64, wanted: u32) -> io::Result<usize> {
    let at = start
        .checked_sub(offset)
        .filter(|at| at.checked_add(u64::from(len)).is_some_and(|end| end <= wanted.into()));
    at.and_then(|at| usize::try_from(at).ok())
        .filter(|_| len > 0)
        .ok_or_else(|| out_of_step("a chunk outside the range that was read"))
}

fn nonsense(error: DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn out_of_step(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the NBD server sent {what}"))
}
