//! The transmission phase, the server's side.
//!
//! One task polls a reader and a writer. The reader gives each request to the device; the request's [`Responder`] puts the
//! reply into the writer's queue from whatever thread completes it. The queue ends, and with it the connection, when the
//! reader and every responder are gone: that is how "every request has completed" is known.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_io::{BlockDevice, BlockError, BlockOp};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, ReadHalf, WriteHalf};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::{Notify, Semaphore};

use crate::checks::Rules;
use crate::negotiate::Agreed;
use crate::outgoing::{BATCH_MESSAGES_MAX, next_batch, write_batch};
use crate::payload::{PAYLOAD_BYTES_MAX, READ_BUFFER_BYTES, read_array_or_end, read_payload, skip};
use crate::proto::{
    self, Command, Framing, RequestHeader, STATUS_EXTENTS_MAX, STATUS_FILTER_BYTES_MAX, command_flag, errno,
};
use crate::provider::Context;
use crate::respond::{Lifetime, Reply, Responder, StatusGather};
use crate::server::ServeError;

/// What the requests of one connection may hold at once, in units of [`UNIT_BYTES`]: 64 MiB of payload or 1,024 requests.
/// At the limit nothing further is read, so the client waits.
const IN_FLIGHT_UNITS: usize = 1024;
/// What a request without payload counts, and each context of a block status request.
const UNIT_BYTES: u64 = 64 << 10;

/// After the client has left, replies that still wait are written at most this long.
const LINGER: Duration = Duration::from_secs(5);

/// Serves requests until the connection ends and every request has completed.
pub(crate) async fn transmission<S>(stream: S, agreed: Box<Agreed>) -> Result<(), ServeError>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let Agreed { mut export, framing, contexts } = *agreed;
    let lifetime = Arc::new(Lifetime { _guard: export.guard.take(), _membership: export.connections.join() });
    let (read_half, write_half) = tokio::io::split(stream);
    let (queue, queued) = unbounded_channel();
    let signals = Signals::default();
    let connections = export.connections.clone();
    let receiver = Receiver {
        stream: BufReader::with_capacity(READ_BUFFER_BYTES, read_half),
        rules: Rules {
            framing,
            size_bytes: export.device.size_bytes(),
            block_bytes: export.block_bytes,
            read_only: export.read_only,
            fast_zero: export.fast_zero,
            has_contexts: !contexts.is_empty(),
        },
        device: export.device,
        contexts,
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
    rules: Rules,
    device: Arc<dyn BlockDevice>,
    contexts: Vec<Context>,
    room: Arc<Semaphore>,
    queue: UnboundedSender<Reply>,
    lifetime: Arc<Lifetime>,
}

/// A request's payload, as far as it is of use.
enum Payload {
    /// None.
    None,
    /// What a write puts on the device.
    Data(Bytes),
    /// Which part of the export, and which contexts, a block status request means.
    Filter(u64, Vec<u32>),
    /// Read and forgotten: the request is refused for it.
    Senseless(&'static str),
}

impl<S> Receiver<S>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    async fn run(mut self) -> Result<(), ServeError> {
        while let Some(request) = self.next_request().await? {
            if request.command == Command::Disconnect {
                return Ok(());
            }
            let carries = request.payload_bytes(self.rules.framing);
            if carries > u64::from(PAYLOAD_BYTES_MAX) {
                return Err(ServeError::Protocol(format!(
                    "a payload of {carries} bytes, {PAYLOAD_BYTES_MAX} are allowed"
                )));
            }
            // Room before the payload is read, so that a connection's memory is bounded.
            let units = u32::try_from(self.units(&request)).unwrap_or(u32::MAX);
            let room = self.room.clone().acquire_many_owned(units).await.ok();
            let framing = self.rules.framing;
            let responder =
                Responder::new(framing, &request, room, self.queue.clone(), self.lifetime.clone());
            let payload = self.read_payload(&request, carries).await?;
            self.serve(&request, payload, responder);
        }
        Ok(())
    }

    async fn next_request(&mut self) -> Result<Option<RequestHeader>, ServeError> {
        let decoded = if self.rules.framing == Framing::Extended {
            let bytes = read_array_or_end(&mut self.stream).await?;
            bytes.map(|bytes| RequestHeader::decode_extended(&bytes))
        } else {
            let bytes = read_array_or_end(&mut self.stream).await?;
            bytes.map(|bytes| RequestHeader::decode_compact(&bytes))
        };
        Ok(decoded.transpose()?)
    }

    fn units(&self, request: &RequestHeader) -> u64 {
        match request.command {
            Command::Read | Command::Write => {
                request.len.min(u64::from(PAYLOAD_BYTES_MAX)).div_ceil(UNIT_BYTES).max(1)
            }
            Command::BlockStatus => self.contexts.len().max(1) as u64,
            _ => 1,
        }
    }

    async fn read_payload(&mut self, request: &RequestHeader, carries: u64) -> Result<Payload, ServeError> {
        let len = usize::try_from(carries).expect("checked against 32 MiB");
        match request.command {
            _ if carries == 0 => Ok(Payload::None),
            Command::Write => Ok(Payload::Data(read_payload(&mut self.stream, len).await?)),
            Command::BlockStatus if len <= STATUS_FILTER_BYTES_MAX => {
                let data = read_payload(&mut self.stream, len).await?;
                Ok(match proto::decode_status_filter(&data) {
                    Ok((len, ids)) => Payload::Filter(len, ids),
                    Err(_) => Payload::Senseless("the list of contexts makes no sense"),
                })
            }
            _ => {
                skip(&mut self.stream, carries).await?;
                Ok(Payload::Senseless("a payload that the command does not have"))
            }
        }
    }

    fn serve(&self, request: &RequestHeader, payload: Payload, responder: Responder) {
        let (len, data, filter) = match payload {
            Payload::Senseless(reason) => return responder.fail(errno::EINVAL, reason),
            Payload::None => (request.len, Bytes::new(), None),
            Payload::Data(data) => (request.len, data, None),
            Payload::Filter(len, ids) => (len, Bytes::new(), Some(ids)),
        };
        match self.rules.check(request, len) {
            Err((errno, reason)) => responder.fail(errno, reason),
            Ok(()) if request.command == Command::BlockStatus => {
                self.submit_block_status(request, len, filter, responder);
            }
            Ok(()) => self.submit(request, data, responder),
        }
    }

    fn submit(&self, request: &RequestHeader, data: Bytes, responder: Responder) {
        let RequestHeader { flags, offset, len, .. } = *request;
        let fua = flags & command_flag::FUA != 0;
        let op = match request.command {
            Command::Read => {
                let len = u32::try_from(len).expect("checked against 32 MiB");
                BlockOp::Read { offset, len }
            }
            Command::Write if len > 0 => BlockOp::Write { offset, data, fua },
            Command::Flush => BlockOp::Flush,
            Command::Trim if len > 0 => BlockOp::Zero { offset, len, fua, trim: true },
            Command::WriteZeroes if len > 0 => {
                BlockOp::Zero { offset, len, fua, trim: flags & command_flag::NO_HOLE == 0 }
            }
            // An empty range, or a hint for a cache: there is none here that could be filled.
            Command::Cache | Command::Write | Command::Trim | Command::WriteZeroes => {
                return responder.finish(Ok(Bytes::new()));
            }
            Command::BlockStatus | Command::Disconnect | Command::Unknown(_) => {
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
        self.device.submit(op, Box::new(done));
    }

    /// Asks the contexts named, or all that were chosen. Their numbers count from 1.
    fn submit_block_status(
        &self,
        request: &RequestHeader,
        len: u64,
        filter: Option<Vec<u32>>,
        responder: Responder,
    ) {
        let chosen = 1..=u32::try_from(self.contexts.len()).expect("at most 16 contexts");
        let ids: Vec<u32> = filter.unwrap_or_else(|| chosen.clone().collect());
        if ids.iter().any(|id| !chosen.contains(id)) {
            return responder.fail(errno::EINVAL, "a context that was not agreed on");
        }
        let one = request.flags & command_flag::REQ_ONE != 0;
        let extents_max = if one { 1 } else { STATUS_EXTENTS_MAX };
        let gather = StatusGather::new(len, extents_max, ids.len(), responder);
        for id in ids {
            let source = &self.contexts[id as usize - 1].source;
            source.block_status(request.offset, len, extents_max, gather.completion(id));
        }
    }
}
