//! Answers to requests, given from whatever thread completes them.

use std::any::Any;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use holdfast_io::BlockError;
use tokio::sync::OwnedSemaphorePermit;
use tokio::sync::mpsc::UnboundedSender;

use crate::checks::wire_error;
use crate::outgoing::Outgoing;
use crate::proto::{
    self, ChunkHeader, Command, Framing, RequestHeader, chunk, chunk_flag, command_flag, errno,
};
use crate::provider::{Extent, ExtentsCompletion, Membership};

/// Ends when the last request of a connection has completed.
pub(crate) struct Lifetime {
    pub(crate) _guard: Option<Box<dyn Any + Send + Sync>>,
    pub(crate) _membership: Membership,
}

/// A message for the connection's writer, holding its share of the connection's room until it is written.
pub(crate) type Reply = Outgoing<Option<OwnedSemaphorePermit>>;

/// Answers one request exactly once: with EIO if it is dropped without an answer.
pub(crate) struct Responder {
    framing: Framing,
    cookie: u64,
    offset: u64,
    is_read: bool,
    fast_zero: bool,
    room: Option<OwnedSemaphorePermit>,
    queue: Option<UnboundedSender<Reply>>,
    _lifetime: Arc<Lifetime>,
}

impl Responder {
    pub(crate) fn new(
        framing: Framing,
        request: &RequestHeader,
        room: Option<OwnedSemaphorePermit>,
        queue: UnboundedSender<Reply>,
        lifetime: Arc<Lifetime>,
    ) -> Self {
        Self {
            framing,
            cookie: request.cookie,
            offset: request.offset,
            is_read: request.command == Command::Read,
            fast_zero: request.flags & command_flag::FAST_ZERO != 0,
            room,
            queue: Some(queue),
            _lifetime: lifetime,
        }
    }

    pub(crate) fn finish(mut self, result: Result<Bytes, BlockError>) {
        let data = match result {
            Ok(data) => data,
            Err(BlockError(errno)) => return self.send_error(errno, ""),
        };
        if !self.framing.has_chunks() {
            return self.send(Outgoing::new(proto::encode_simple_reply(self.cookie, 0), data, None));
        }
        if !self.is_read {
            return self.send(Outgoing::new(self.last_chunk(chunk::NONE, 0), Bytes::new(), None));
        }
        let mut header = self.last_chunk(chunk::OFFSET_DATA, data.len() + 8);
        header.put(&self.offset.to_be_bytes());
        self.send(Outgoing::new(header, data, None));
    }

    /// Answers with one chunk per context.
    fn finish_status(mut self, contexts: Vec<(u32, Vec<Extent>)>) {
        let kind = if self.framing.is_extended() { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
        let last = contexts.len() - 1;
        let mut reply = Vec::new();
        for (index, (id, extents)) in contexts.into_iter().enumerate() {
            let data = proto::encode_status_chunk(self.framing, id, &extents);
            let flags = if index == last { chunk_flag::DONE } else { 0 };
            reply.extend_from_slice(&self.chunk(flags, kind, data.len()).encode(self.framing));
            reply.extend_from_slice(&data);
        }
        self.send(Outgoing::new(proto::HeaderBytes::default(), reply.into(), None));
    }

    pub(crate) fn fail(mut self, errno: i32, reason: &'static str) {
        self.send_error(errno, reason);
    }

    fn send_error(&mut self, errno: i32, reason: &'static str) {
        let error = wire_error(errno, self.fast_zero);
        if self.framing.has_chunks() {
            let data = proto::encode_error_chunk(error, reason);
            self.send(Outgoing::new(self.last_chunk(chunk::ERROR, data.len()), data.into(), None));
        } else {
            self.send(Outgoing::new(proto::encode_simple_reply(self.cookie, error), Bytes::new(), None));
        }
    }

    fn last_chunk(&self, kind: u16, len: usize) -> proto::HeaderBytes {
        self.chunk(chunk_flag::DONE, kind, len).encode(self.framing)
    }

    fn chunk(&self, flags: u16, kind: u16, len: usize) -> ChunkHeader {
        ChunkHeader { flags, kind, cookie: self.cookie, offset: Some(self.offset), len: len as u64 }
    }

    fn send(&mut self, reply: Reply) {
        if let Some(queue) = self.queue.take() {
            // The writer outlives every responder unless the whole connection was dropped; then nobody waits.
            let _ = queue.send(reply.holding(self.room.take()));
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

/// Gathers what several contexts say of one request. Whoever completes the last one answers; if a source drops its
/// completion, the responder goes with it and answers EIO.
pub(crate) struct StatusGather {
    wanted_len: u64,
    extents_max: usize,
    state: Mutex<GatherState>,
}

struct GatherState {
    missing: usize,
    found: Vec<(u32, Vec<Extent>)>,
    responder: Option<Responder>,
}

impl StatusGather {
    pub(crate) fn new(
        wanted_len: u64,
        extents_max: usize,
        contexts: usize,
        responder: Responder,
    ) -> Arc<Self> {
        let state = GatherState { missing: contexts, found: Vec::new(), responder: Some(responder) };
        Arc::new(Self { wanted_len, extents_max, state: Mutex::new(state) })
    }

    /// What the source of context `id` is to call.
    pub(crate) fn completion(self: &Arc<Self>, id: u32) -> ExtentsCompletion {
        let gather = self.clone();
        Box::new(move |result| gather.part(id, result))
    }

    fn part(&self, id: u32, result: Result<Vec<Extent>, BlockError>) {
        let fitting = result.and_then(|mut extents| {
            extents.truncate(self.extents_max);
            let sum = extents.iter().try_fold(0_u64, |sum, extent| sum.checked_add(extent.len));
            let fits = sum.is_some_and(|sum| (1..=self.wanted_len).contains(&sum));
            if fits && extents.iter().all(|extent| extent.len > 0) {
                Ok(extents)
            } else {
                Err(BlockError(errno::EIO))
            }
        });
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.missing -= 1;
        let answer = match fitting {
            Err(BlockError(errno)) => Err(errno),
            Ok(extents) => {
                state.found.push((id, extents));
                Ok(state.missing == 0)
            }
        };
        if answer == Ok(false) {
            return;
        }
        let Some(responder) = state.responder.take() else { return };
        let found = std::mem::take(&mut state.found);
        drop(state);
        match answer {
            Ok(_) => responder.finish_status(found),
            Err(errno) => responder.fail(errno, "a context's extents cannot be told"),
        }
    }
}
