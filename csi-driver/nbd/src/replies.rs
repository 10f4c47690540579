//! A client's reader: puts replies together and completes requests.

use std::collections::{BTreeMap, HashMap};
use std::io;
use std::sync::Arc;

use bytes::Bytes;
use holdfast_io::AlignedBuf;
use tokio::io::{AsyncRead, AsyncReadExt, BufReader};

use crate::connection::Connection;
use crate::payload::{read_array, read_payload};
use crate::pending::{Content, Expected, Waiter};
use crate::proto::{
    self, ChunkHeader, DecodeError, ERROR_TEXT_BYTES_MAX, Framing, ReplyHeader, chunk, errno,
    status_chunk_bytes_max,
};
use crate::provider::Extent;

/// Chunks without content (errors) in one reply; more end the connection, so that no reply can go on for ever.
const ERROR_CHUNKS_MAX: u32 = 256;
/// Pieces of data in one reply; more end the connection. The specification wants pieces of 512 bytes at least, of which so
/// many make the longest read.
const PIECES_MAX: usize = 65_536;
/// Fields of an error chunk beside its text.
const ERROR_CHUNK_EXTRA_BYTES: u64 = 64;

/// The reader of a connection.
pub(crate) struct Replies<R> {
    connection: Arc<Connection>,
    stream: BufReader<R>,
    /// Replies of which a chunk has come and the last has not. Bounded by the requests in flight.
    partial: HashMap<u64, Partial>,
    /// The server said that it is shutting down: nothing more is read.
    shut_down: bool,
}

/// A reply being put together.
#[derive(Default)]
struct Partial {
    error: Option<i32>,
    error_chunks: u32,
    data: Option<AlignedBuf>,
    /// What has come of the data: start and end within it.
    covered: BTreeMap<u64, u64>,
    received: u64,
    extents: Option<Vec<Extent>>,
    /// Contexts that have answered.
    contexts: Vec<u32>,
}

impl<R> Replies<R>
where
    R: AsyncRead + Unpin,
{
    pub(crate) fn new(connection: Arc<Connection>, stream: BufReader<R>) -> Self {
        Self { connection, stream, partial: HashMap::new(), shut_down: false }
    }

    /// Handles replies until the stream ends or makes no sense.
    pub(crate) async fn run(&mut self) -> io::Result<()> {
        while !self.shut_down {
            if self.connection.framing() == Framing::Extended {
                let bytes = read_array(&mut self.stream).await?;
                self.chunk(ChunkHeader::decode_extended(&bytes).map_err(nonsense)?).await?;
                continue;
            }
            match ReplyHeader::decode(&read_array(&mut self.stream).await?).map_err(nonsense)? {
                ReplyHeader::Simple { error, cookie } => self.simple(error, cookie).await?,
                ReplyHeader::Chunk(_) if !self.connection.framing().has_chunks() => {
                    return Err(out_of_step("a chunk that was not agreed on"));
                }
                ReplyHeader::Chunk(header) => {
                    let length = read_array(&mut self.stream).await?;
                    self.chunk(header.with_length(length)).await?;
                }
            }
        }
        Ok(())
    }

    async fn simple(&mut self, error: u32, cookie: u64) -> io::Result<()> {
        let expected = self.expected(cookie)?;
        if self.partial.contains_key(&cookie) {
            return Err(out_of_step("a simple reply amid chunks"));
        }
        if error != 0 {
            return self.complete(cookie, Err(errno::from_wire(error)));
        }
        let data = match expected.content {
            Content::Nothing => Bytes::new(),
            Content::Data(_) if self.connection.framing().has_chunks() => {
                return Err(out_of_step("a simple reply to a read"));
            }
            Content::Data(len) => read_payload(&mut self.stream, len as usize).await?,
            Content::Extents { .. } => return Err(out_of_step("a simple reply to a status request")),
        };
        self.complete(cookie, Ok(data))
    }

    async fn chunk(&mut self, header: ChunkHeader) -> io::Result<()> {
        let ChunkHeader { kind, cookie, len, .. } = header;
        let expected = self.expected(cookie)?;
        if header.offset.is_some_and(|offset| offset != expected.offset) {
            return Err(out_of_step("a reply to another offset"));
        }
        let first = !self.partial.contains_key(&cookie);
        match (kind, expected.content) {
            (chunk::NONE, content) if len == 0 && header.is_last() => {
                if first && content == Content::Nothing {
                    return self.complete(cookie, Ok(Bytes::new()));
                }
            }
            (chunk::OFFSET_DATA, Content::Data(wanted)) if len > 8 => {
                let at = self.position(expected.offset, wanted, len - 8).await?;
                if len - 8 == u64::from(wanted) && header.is_last() && first {
                    let data = read_payload(&mut self.stream, wanted as usize).await?;
                    return self.complete(cookie, Ok(data));
                }
                self.put_data(cookie, wanted, at).await?;
            }
            (chunk::OFFSET_HOLE, Content::Data(wanted)) if len == 12 => {
                let start = u64::from_be_bytes(read_array(&mut self.stream).await?);
                let hole = u32::from_be_bytes(read_array(&mut self.stream).await?);
                let at = within(start, u64::from(hole), expected.offset, wanted)?;
                self.partial.entry(cookie).or_default().cover(at, wanted)?;
            }
            (chunk::BLOCK_STATUS | chunk::BLOCK_STATUS_EXT, Content::Extents { context_id, .. }) => {
                self.put_extents(header, context_id).await?;
            }
            (error, _) if error & chunk::ERROR_BIT != 0 => self.put_error(cookie, len).await?,
            _ => return Err(out_of_step("a chunk that does not fit its request")),
        }
        if header.is_last() { self.finish_partial(cookie, expected.content) } else { Ok(()) }
    }

    /// Reads where a data chunk of `len` bytes belongs.
    async fn position(&mut self, offset: u64, wanted: u32, len: u64) -> io::Result<(u64, u64)> {
        let start = u64::from_be_bytes(read_array(&mut self.stream).await?);
        within(start, len, offset, wanted)
    }

    async fn put_data(&mut self, cookie: u64, wanted: u32, (from, to): (u64, u64)) -> io::Result<()> {
        let partial = self.partial.entry(cookie).or_default();
        let data = partial.cover((from, to), wanted)?;
        let (from, to) = (usize_of(from), usize_of(to));
        self.stream.read_exact(&mut data[from..to]).await.map(|_| ())
    }

    async fn put_extents(&mut self, header: ChunkHeader, wanted: u32) -> io::Result<()> {
        let framing = self.connection.framing();
        let fitting = if framing.is_extended() { chunk::BLOCK_STATUS_EXT } else { chunk::BLOCK_STATUS };
        if header.kind != fitting || header.len > status_chunk_bytes_max(framing) {
            return Err(out_of_step("a status chunk of another kind or too long"));
        }
        let data = read_payload(&mut self.stream, usize_of(header.len)).await?;
        let (context, extents) = proto::decode_status_chunk(framing, &data).map_err(nonsense)?;
        let partial = self.partial.entry(header.cookie).or_default();
        if partial.contexts.contains(&context) || partial.contexts.len() == proto::CONTEXTS_MAX {
            return Err(out_of_step("two answers for one context"));
        }
        partial.contexts.push(context);
        if context == wanted {
            partial.extents = Some(extents);
        }
        Ok(())
    }

    async fn put_error(&mut self, cookie: u64, len: u64) -> io::Result<()> {
        if len > ERROR_TEXT_BYTES_MAX as u64 + ERROR_CHUNK_EXTRA_BYTES {
            return Err(out_of_step("an error text that is too long"));
        }
        let data = read_payload(&mut self.stream, usize_of(len)).await?;
        let (error, message) = proto::decode_error_chunk(&data).map_err(nonsense)?;
        tracing::debug!(error, message, "an NBD request failed");
        let partial = self.partial.entry(cookie).or_default();
        partial.error.get_or_insert(errno::from_wire(error));
        partial.error_chunks += 1;
        if partial.error_chunks > ERROR_CHUNKS_MAX { Err(out_of_step("errors without end")) } else { Ok(()) }
    }

    fn finish_partial(&mut self, cookie: u64, content: Content) -> io::Result<()> {
        let partial = self.partial.remove(&cookie).unwrap_or_default();
        if let Some(errno) = partial.error {
            return self.complete(cookie, Err(errno));
        }
        match content {
            Content::Nothing => self.complete(cookie, Ok(Bytes::new())),
            Content::Data(len) => match partial.data {
                Some(data) if partial.received == u64::from(len) => {
                    self.complete(cookie, Ok(data.into_bytes()))
                }
                _ => Err(out_of_step("a read reply that does not cover its request")),
            },
            Content::Extents { len, .. } => {
                let extents = partial.extents.ok_or_else(|| out_of_step("a status reply without extents"))?;
                match self.connection.pending().take(cookie) {
                    Some(Waiter::Extents(done)) => done(Ok(cut(extents, len))),
                    Some(waiter @ Waiter::Data(_)) => waiter.fail(errno::EIO),
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
        let waiter = self.connection.pending().take(cookie);
        let Some(waiter) = waiter else { return Ok(()) };
        match result {
            Ok(data) => waiter.give(data),
            Err(errno) => {
                waiter.fail(errno);
                // The specification's order: whoever is told this says goodbye.
                self.shut_down |= errno == errno::ESHUTDOWN;
            }
        }
        Ok(())
    }
}

impl Partial {
    /// Notes that a piece has come, and gives the buffer. The specification forbids pieces that overlap; if they were let
    /// pass, a gap elsewhere would be read as zeroes.
    fn cover(&mut self, (from, to): (u64, u64), wanted: u32) -> io::Result<&mut AlignedBuf> {
        let before = self.covered.range(..to).next_back().map(|(_, end)| *end);
        if before.is_some_and(|end| end > from) {
            return Err(out_of_step("two chunks for the same bytes"));
        }
        if self.covered.len() == PIECES_MAX {
            return Err(out_of_step("a reply in too many pieces"));
        }
        self.covered.insert(from, to);
        self.received += to - from;
        Ok(self.data.get_or_insert_with(|| AlignedBuf::zeroed(wanted as usize)))
    }
}

/// Where in a read of `[offset, offset + wanted)` a chunk of `len` bytes at `start` belongs.
fn within(start: u64, len: u64, offset: u64, wanted: u32) -> io::Result<(u64, u64)> {
    let inside = |from: u64| {
        let to = from.checked_add(len)?;
        (len > 0 && to <= u64::from(wanted)).then_some((from, to))
    };
    let position = start.checked_sub(offset).and_then(inside);
    position.ok_or_else(|| out_of_step("a chunk outside the range that was read"))
}

/// The extents of the first `len` bytes: a server may tell more than it was asked.
fn cut(mut extents: Vec<Extent>, len: u64) -> Vec<Extent> {
    let mut left = len;
    extents.retain_mut(|extent| {
        extent.len = extent.len.min(left);
        left -= extent.len;
        extent.len > 0
    });
    extents
}

fn usize_of(len: u64) -> usize {
    usize::try_from(len).expect("checked against a limit far below 4 GiB")
}

fn nonsense(error: DecodeError) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

fn out_of_step(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("the NBD server sent {what}"))
}
