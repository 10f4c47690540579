//! The transmission phase, the server's side.
//!
//! One task polls a reader and a writer. The reader gives each request to the device; the request's [`Responder`] puts the
//! reply into the writer's queue from whatever thread completes it. The queue ends, and with it the connection, when the
//! reader and every responder are gone: that is how "every request has completed" is known.

use std::any::Any;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_io::{BlockError, BlockOp};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

use crate::negotiate::{Agreed, BASE_ALLOCATION_ID};
use crate::outgoing::{BATCH_MESSAGES_MAX, Outgoing, next_batch, write_batch};
use crate::payload::{PAYLOAD_BYTES_MAX, READ_BUFFER_BYTES, read_array_or_end, read_payload};
use crate::proto::{self, Command, RequestHeader, STATUS_EXTENTS_MAX, chunk, command_flag, errno};
use crate::provider::{Export, Extent, Membership};
use crate::server::ServeError;

/// What the requests of one connection may hold at once, in units of [`UNIT_BYTES`]: 64 MiB of payload or 1,024 requests.
/// At the limit nothing further is read, so the client waits.
const IN_FLIGHT_UNITS: usize = 1024;
/// What a request without payload counts.
const UNIT_BYTES: u32 = 64 << 10;

/// After the client has left, replies that still wait are written at most this long.
const LINGER: Duration = Duration::from_secs(5);

/// Serves requests until the connection ends and every request has completed.
pub(crate) async fn transmission<S>(stream: S, agreed: Box<Agreed>) -> Result<(), ServeError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Agreed { mut export, structured, block_status } = *agreed;
    let lifetime = Arc::new(Lifetime { _guard: export.guard.take(), _membership: export.connections.join() });
    let (read_half, write_half) = tokio::io::split(stream);
    let (queue, queued) = unbounded_channel();
    let signals = Signals::default();
    let connections = export.connections.clone();
    let receiver = Receiver {
        stream: BufReader::with_capacity(READ_BUFFER_BYTES, read_half),
        export,
        structured,
        block_status,
        room: Arc::new(Semaphore::new(IN_FLIGHT_UNITS)),
        queue,
        lifetime: lifetime.clone(),
    };

    let reading = async {
        let ended = tokio::select! {
            biased;
            () = connections.closed() => { signals.abandon.notify_one(); Ok(()) }
            () = signals.write_failed.notified() => Ok(()),
            ended = receiver.run() => ended,
        };
        tokio::select! {
            () = signals.all_written.notified() => {}
            () = connections.closed() => signals.abandon.notify_one(),
            () = tokio::time::sleep(LINGER) => signals.abandon.notify_one(),
        }
        ended
    };
    let (ended, ()) = tokio::join!(reading, write_replies(write_half, queued, &signals));
    drop(lifetime);
    ended
}

/// What reader and writer tell each other.
#[derive(Debug, Default)]
struct Signals {
    write_failed: Notify,
    all_written: Notify,
    /// Write no more, whatever is queued.
    abandon: Notify,
}

/// Ends when the last request of a connection has completed.
struct Lifetime {
    _guard: Option<Box<dyn Any + Send + Sync>>,
    _membership: Membership,
}

type Reply = Outgoing<Option<OwnedSemaphorePermit>>;

async fn write_replies<S>(mut stream: WriteHalf<S>, mut queue: UnboundedReceiver<Reply>, signals: &Signals)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut batch = Vec::with_capacity(BATCH_MESSAGES_MAX);
    let mut usable = true;
    while next_batch(&mut queue, &mut batch).await {
        if !usable {
            continue;
        }
        usable = tokio::select! {
            biased;
            written = write_batch(&mut stream, &batch) => written.is_ok(),
            () = signals.abandon.notified() => false,
        };
        if !usable {
            signals.write_failed.notify_one();
        }
    }
    if usable {
        // TLS says goodbye; a peer that does not read gets none.
        let _ = tokio::time::timeout(Duration::from_millis(100), stream.shutdown()).await;
    }
    signals.all_written.notify_one();
}

struct Receiver<S> {
    stream: BufReader<ReadHalf<S>>,
    export: Export,
    structured: bool,
    block_status: bool,
    room: Arc<Semaphore>,
    queue: UnboundedSender<Reply>,
    lifetime: Arc<Lifetime>,
}

impl<S> Receiver<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    async fn run(mut self) -> Result<(), ServeError> {
        while let Some(bytes) = read_array_or_end(&mut self.stream).await? {
            let request = RequestHeader::decode(&bytes)?;
            let carries = match request.command {
                Command::Disconnect => return Ok(()),
                Command::Write => request.len,
                _ => 0,
            };
            if carries > PAYLOAD_BYTES_MAX {
                return Err(ServeError::Protocol(format!(
                    "a write of {carries} bytes, {PAYLOAD_BYTES_MAX} are allowed"
                )));
            }
            let responder = self.responder(&request).await;
            let data = read_payload(&mut self.stream, carries as usize).await?;
            match self.check(&request) {
                Ok(()) => self.submit(&request, data, responder),
                Err((errno, reason)) => responder.fail(errno, reason),
            }
        }
        Ok(())
    }

    /// Waits for room, so that a connection's memory is bounded.
    async fn responder(&self, request: &RequestHeader) -> Responder {
        let payload = match request.command {
            Command::Read | Command::Write => request.len.min(PAYLOAD_BYTES_MAX),
            _ => 0,
        };
        let units = payload.div_ceil(UNIT_BYTES).max(1);
        Responder {
            cookie: request.cookie,
            read_offset: (request.command == Command::Read).then_some(request.offset),
            structured: self.structured,
            room: self.room.clone().acquire_many_owned(units).await.ok(),
            queue: Some(self.queue.clone()),
            _lifetime: self.lifetime.clone(),
        }
    }

    fn check(&self, request: &RequestHeader) -> Result<(), (i32, &'static str)> {
        let known = command_flag::FUA | command_flag::NO_HOLE | command_flag::DF | command_flag::REQ_ONE;
        if request.flags & !known != 0 {
            return Err((errno::EINVAL, "unknown flags"));
        }
        let changes = match request.command {
            Command::Flush => return Ok(()),
            Command::Write | Command::Trim | Command::WriteZeroes => true,
            Command::Read | Command::Cache | Command::BlockStatus => false,
            Command::Disconnect | Command::Unknown(_) => return Err((errno::EINVAL, "unknown command")),
        };
        if changes && self.export.read_only {
            return Err((errno::EPERM, "the export is read-only"));
        }
        if request.command == Command::BlockStatus && !self.block_status {
            return Err((errno::EINVAL, "no metadata context was agreed on"));
        }
        if request.len == 0 && matches!(request.command, Command::Read | Command::BlockStatus) {
            return Err((errno::EINVAL, "an empty range"));
        }
        if request.command == Command::Read && request.len > PAYLOAD_BYTES_MAX {
            return Err((errno::EOVERFLOW, "the read is too large"));
        }
        let end = request.offset.checked_add(u64::from(request.len));
        if end.is_none_or(|end| end > self.export.device.size_bytes()) {
            let errno = if request.command == Command::Write { errno::ENOSPC } else { errno::EINVAL };
            return Err((errno, "beyond the end of the export"));
        }
        let mask = u64::from(self.export.block_bytes) - 1;
        if (request.offset | u64::from(request.len)) & mask != 0 {
            return Err((errno::EINVAL, "not a multiple of the block size"));
        }
        Ok(())
    }

    fn submit(&self, request: &RequestHeader, data: Bytes, responder: Responder) {
        let RequestHeader { flags, offset, len, .. } = *request;
        let fua = flags & command_flag::FUA != 0;
        let op = match request.command {
            Command::Read => BlockOp::Read { offset, len },
            Command::Write if len > 0 => BlockOp::Write { offset, data, fua },
            Command::Flush => BlockOp::Flush,
            Command::Trim if len > 0 => BlockOp::Zero { offset, len: u64::from(len), fua, trim: true },
            Command::WriteZeroes if len > 0 => {
                BlockOp::Zero { offset, len: u64::from(len), fua, trim: flags & command_flag::NO_HOLE == 0 }
            }
            Command::BlockStatus => return self.submit_block_status(request, responder),
            // A hint that we do not follow, or an empty range.
            Command::Cache | Command::Write | Command::Trim | Command::WriteZeroes => {
                return responder.finish(Ok(Bytes::new()));
            }
            Command::Disconnect | Command::Unknown(_) => {
                return responder.fail(errno::EINVAL, "unknown command");
            }
        };
        let expected = match op {
            BlockOp::Read { len, .. } => len as usize,
            BlockOp::Write { .. } | BlockOp::Zero { .. } | BlockOp::Flush => 0,
        };
        let done = move |result: Result<Bytes, BlockError>| match result {
            // Another length would put the stream out of step.
            Ok(data) if data.len() != expected => {
                responder.fail(errno::EIO, "the device answered another length")
            }
            other => responder.finish(other),
        };
        self.export.device.submit(op, Box::new(done));
    }

    fn submit_block_status(&self, request: &RequestHeader, responder: Responder) {
        let wanted = request.len;
        let one = request.flags & command_flag::REQ_ONE != 0;
        let extents_max = if one { 1 } else { STATUS_EXTENTS_MAX };
        let Some(source) = &self.export.block_status else {
            return responder.finish_status(&[Extent { len: wanted, hole: false, zero: false }]);
        };
        let done = move |result: Result<Vec<Extent>, BlockError>| match result {
            Ok(mut extents) => {
                extents.truncate(extents_max);
                let total: u64 = extents.iter().map(|extent| u64::from(extent.len)).sum();
                if extents.iter().any(|extent| extent.len == 0) || total == 0 || total > u64::from(wanted) {
                    responder.fail(errno::EIO, "the device's extents do not fit the request");
                } else {
                    responder.finish_status(&extents);
                }
            }
            Err(BlockError(errno)) => responder.fail(errno, ""),
        };
        source.block_status(request.offset, wanted, extents_max, Box::new(done));
    }
}

/// Answers one request exactly once: with EIO if it is dropped without an answer.
struct Responder {
    cookie: u64,
    read_offset: Option<u64>,
    structured: bool,
    room: Option<OwnedSemaphorePermit>,
    queue: Option<UnboundedSender<Reply>>,
    _lifetime: Arc<Lifetime>,
}

impl Responder {
    fn finish(mut self, result: Result<Bytes, BlockError>) {
        match result {
            Err(BlockError(errno)) => self.send_error(errno, ""),
            Ok(data) => match (self.structured, self.read_offset) {
                (false, _) => self.send(&proto::encode_simple_reply(self.cookie, 0), &[], data),
                (true, Some(offset)) => {
                    let len = u32::try_from(data.len() + 8).expect("reads are at most 32 MiB");
                    let header = proto::encode_structured_header(self.cookie, chunk::OFFSET_DATA, len);
                    self.send(&header, &offset.to_be_bytes(), data);
                }
                (true, None) => {
                    self.send(
                        &proto::encode_structured_header(self.cookie, chunk::NONE, 0),
                        &[],
                        Bytes::new(),
                    );
                }
            },
        }
    }

    fn finish_status(mut self, extents: &[Extent]) {
        let data = proto::encode_status_chunk(BASE_ALLOCATION_ID, extents);
        let len = u32::try_from(data.len()).expect("at most 4,096 extents");
        self.send(&proto::encode_structured_header(self.cookie, chunk::BLOCK_STATUS, len), &[], data.into());
    }

    fn fail(mut self, errno: i32, reason: &'static str) {
        self.send_error(errno, reason);
    }

    fn send_error(&mut self, errno: i32, reason: &'static str) {
        let error = errno::to_wire(errno);
        if self.structured {
            let data = proto::encode_error_chunk(error, reason);
            let len = u32::try_from(data.len()).expect("our reasons are short");
            self.send(&proto::encode_structured_header(self.cookie, chunk::ERROR, len), &[], data.into());
        } else {
            self.send(&proto::encode_simple_reply(self.cookie, error), &[], Bytes::new());
        }
    }

    fn send(&mut self, head: &[u8], more: &[u8], payload: Bytes) {
        if let Some(queue) = self.queue.take() {
            // The writer outlives every responder unless the whole connection was dropped; then nobody waits.
            let _ = queue.send(Outgoing::new(head, more, payload, self.room.take()));
        }
    }
}

impl Drop for Responder {
    fn drop(&mut self) {
        if self.queue.is_some() {
            self.send_error(errno::EIO, "the device dropped the request");
        }
    }
}
