//! The client side: the handle that requests are submitted to.

use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use holdfast_io::{BlockDevice, BlockError, BlockOp, Completion};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::connection::Connection;
use crate::handshake::{Handshake, Stream};
use crate::pending::{Content, Waiter};
use crate::proto::{
    self, Command, DecodeError, Framing, RequestHeader, command_flag, errno, transmission_flag as flag,
};
use crate::provider::ExtentsCompletion;
use crate::tls::ClientTls;

/// Negotiation including TLS takes at most this long.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Longest range in one request without payload where headers are compact; longer ones are split. A multiple of every
/// block size.
const COMPACT_RANGE_BYTES_MAX: u64 = 1 << 30;
/// Pieces of one split request that are in flight at a time; the next goes out when one is answered.
const PIECES_IN_FLIGHT: u64 = 8;

/// What to connect to.
#[derive(Debug, Clone, Default)]
pub struct ClientOptions {
    /// The export's name.
    pub export: String,
    /// STARTTLS first; a server without it is refused.
    pub tls: Option<ClientTls>,
    /// Metadata contexts to agree on, by their whole names; what the server does not have is left out. At most 16.
    pub contexts: Vec<String>,
    /// Do not ask for extended headers.
    pub compact_headers: bool,
}

/// Why a connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// The stream failed.
    #[error("the connection failed: {0}")]
    Io(#[from] io::Error),
    /// The server broke the protocol or speaks another one.
    #[error("the server does not speak NBD as we need it: {0}")]
    Protocol(String),
    /// TLS is wanted and the server has none.
    #[error("TLS is wanted here, but the server refused STARTTLS: {0}")]
    TlsRefused(String),
    /// The server has TLS and insists on it.
    #[error("the server gives nothing without TLS: {0}")]
    TlsRequired(String),
    /// The TLS handshake failed: a certificate that is not trusted, is another node's or has expired.
    #[error("the TLS handshake failed: {0}")]
    Tls(#[source] io::Error),
    /// The server refused the export.
    #[error("the server refused export \"{export}\": {reason}")]
    Refused {
        /// Its name.
        export: String,
        /// The server's own words.
        reason: String,
    },
    /// Negotiation took too long.
    #[error("the server did not finish negotiation within {0} s")]
    HandshakeTimeout(u64),
}

impl From<DecodeError> for ConnectError {
    fn from(error: DecodeError) -> Self {
        Self::Protocol(error.to_string())
    }
}

/// What the server said about the export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportInfo {
    /// Size in bytes.
    pub size_bytes: u64,
    /// Transmission flags as on the wire, see [`crate::proto::transmission_flag`].
    pub flags: u16,
    /// Smallest unit of I/O.
    pub block_bytes_min: u32,
    /// Largest payload of a request.
    pub payload_bytes_max: u32,
    /// Requests have 64 bits of length.
    pub extended_headers: bool,
}

/// One connection to an export. Many requests are in flight at once; replies complete them in any order.
///
/// When the connection is lost, every request in flight completes with `ENOTCONN` exactly once, and later ones do so at
/// once. Dropping the client closes the connection in the same way. A server that answers `ESHUTDOWN` is left.
#[derive(Debug)]
pub struct Client {
    info: ExportInfo,
    contexts: Vec<(u32, String)>,
    connection: Arc<Connection>,
}

/// How a range is to be zeroed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ZeroOptions {
    /// On stable storage before the answer.
    pub fua: bool,
    /// The space may be given back.
    pub trim: bool,
    /// Fail with `ENOTSUP`, changing nothing, unless it is faster than writing zeroes.
    pub only_if_fast: bool,
}

impl Client {
    /// Negotiates over a connected stream (the caller sets TCP_NODELAY). Must be called within a tokio runtime, which runs
    /// the connection's task.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn connect<S>(stream: S, options: ClientOptions) -> Result<Self, ConnectError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let stream: Box<dyn Stream> = Box::new(stream);
        let opened =
            in_time(async { Handshake::begin(stream, options.tls.as_ref()).await?.open(&options).await });
        let opened = opened.await?;
        Ok(Self {
            info: opened.info,
            contexts: opened.contexts,
            connection: Connection::start(opened.stream, opened.framing),
        })
    }

    /// What the server said about the export.
    #[must_use]
    pub fn info(&self) -> ExportInfo {
        self.info
    }

    /// Whether a metadata context was agreed on.
    #[must_use]
    pub fn has_context(&self, name: &str) -> bool {
        self.contexts.iter().any(|(_, known)| known == name)
    }

    /// Whether the connection is lost or closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.connection.is_closed()
    }

    /// Resolves when the connection is lost or closed and every request in flight has been completed. Cancel-safe.
    pub async fn closed(&self) {
        self.connection.closed().await;
    }

    /// Closes the connection: requests in flight complete with `ENOTCONN` before this returns.
    pub fn close(&self) {
        self.connection.close();
    }

    /// The states of `[offset, offset + len)`, or of a non-empty prefix of it, in a context that was agreed on; else
    /// `ENOTSUP`. With `one` a single extent is enough. Neither answer is longer than `len`.
    pub fn block_status(&self, context: &str, offset: u64, len: u64, one: bool, done: ExtentsCompletion) {
        let Some(&(context_id, _)) = self.contexts.iter().find(|(_, name)| name == context) else {
            return done(Err(BlockError(errno::ENOTSUP)));
        };
        let framing = self.connection.framing();
        let len = if framing.is_extended() { len } else { len.min(COMPACT_RANGE_BYTES_MAX) };
        let flags = if one { command_flag::REQ_ONE } else { 0 };
        let mut request = RequestHeader { flags, command: Command::BlockStatus, cookie: 0, offset, len };
        let mut payload = Bytes::new();
        if self.contexts.len() > 1 && self.supports(flag::BLOCK_STATUS_PAYLOAD) && framing.is_extended() {
            payload = proto::encode_status_filter(len, &[context_id]).into();
            request.len = payload.len() as u64;
            request.flags |= command_flag::PAYLOAD_LEN;
        }
        let content = Content::Extents { context_id, len };
        self.connection.send(request, payload, content, Waiter::Extents(done));
    }

    /// Zeroes a range of any length; in parts, if headers are compact and it is long. The first error ends it.
    pub fn zero(&self, offset: u64, len: u64, options: ZeroOptions, done: Completion) {
        let ZeroOptions { fua, trim, only_if_fast } = options;
        let lacks_fast = only_if_fast && !self.supports(flag::SEND_FAST_ZERO);
        if !self.supports(flag::SEND_WRITE_ZEROES) || (fua && !self.supports(flag::SEND_FUA)) || lacks_fast {
            return done(Err(BlockError(errno::ENOTSUP)));
        }
        let keep = if trim { 0 } else { command_flag::NO_HOLE };
        let fast = if only_if_fast { command_flag::FAST_ZERO } else { 0 };
        self.ranged(Command::WriteZeroes, fua_flag(fua) | keep | fast, offset, len, done);
    }

    /// Says that a range is no longer needed; what it reads as after that is open.
    pub fn discard(&self, offset: u64, len: u64, fua: bool, done: Completion) {
        if !self.supports(flag::SEND_TRIM) || (fua && !self.supports(flag::SEND_FUA)) {
            return done(Err(BlockError(errno::ENOTSUP)));
        }
        self.ranged(Command::Trim, fua_flag(fua), offset, len, done);
    }

    /// Says that a range will be read soon.
    pub fn cache(&self, offset: u64, len: u64, done: Completion) {
        if !self.supports(flag::SEND_CACHE) {
            return done(Err(BlockError(errno::ENOTSUP)));
        }
        self.ranged(Command::Cache, 0, offset, len, done);
    }

    /// Reads with the wish that the reply is one piece (NBD_CMD_FLAG_DF), for servers that would send many. `EOVERFLOW`
    /// where it is too long for that; 64 KiB never are.
    pub fn read_in_one_piece(&self, offset: u64, len: u32, done: Completion) {
        let flags = if self.supports(flag::SEND_DF) { command_flag::DF } else { 0 };
        self.read(offset, len, flags, done);
    }

    fn supports(&self, wanted: u16) -> bool {
        self.info.flags & wanted != 0
    }

    fn read(&self, offset: u64, len: u32, flags: u16, done: Completion) {
        if len > self.info.payload_bytes_max {
            return done(Err(BlockError(errno::EINVAL)));
        }
        let request = RequestHeader { flags, command: Command::Read, cookie: 0, offset, len: u64::from(len) };
        self.connection.send(request, Bytes::new(), Content::Data(len), Waiter::Data(done));
    }

    fn write(&self, offset: u64, data: Bytes, fua: bool, done: Completion) {
        if data.len() > self.info.payload_bytes_max as usize {
            return done(Err(BlockError(errno::EINVAL)));
        }
        if fua && !self.supports(flag::SEND_FUA) {
            return done(Err(BlockError(errno::ENOTSUP)));
        }
        let extended = self.connection.framing() == Framing::Extended;
        // A payload of no bytes must not be announced.
        let carries = if extended && !data.is_empty() { command_flag::PAYLOAD_LEN } else { 0 };
        let flags = fua_flag(fua) | carries;
        let len = data.len() as u64;
        let request = RequestHeader { flags, command: Command::Write, cookie: 0, offset, len };
        self.connection.send(request, data, Content::Nothing, Waiter::Data(done));
    }

    /// A request without payload, split where 32 bits are too few.
    fn ranged(&self, command: Command, flags: u16, offset: u64, len: u64, done: Completion) {
        if offset.checked_add(len).is_none() {
            return done(Err(BlockError(errno::EINVAL)));
        }
        let request = RequestHeader { flags, command, cookie: 0, offset, len };
        if self.connection.framing().is_extended() || len <= COMPACT_RANGE_BYTES_MAX {
            return self.connection.send(request, Bytes::new(), Content::Nothing, Waiter::Data(done));
        }
        let state = SplitState { next: 0, in_flight: 0, error: None, done: Some(done) };
        let split =
            Arc::new(Split { connection: self.connection.clone(), request, state: Mutex::new(state) });
        for _ in 0..PIECES_IN_FLIGHT {
            split.clone().send_next();
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.close();
    }
}

impl BlockDevice for Client {
    fn size_bytes(&self) -> u64 {
        self.info.size_bytes
    }

    fn submit(&self, op: BlockOp, done: Completion) {
        match op {
            BlockOp::Read { offset, len } => self.read(offset, len, 0, done),
            BlockOp::Write { offset, data, fua } => self.write(offset, data, fua, done),
            BlockOp::Zero { offset, len, fua, trim } => {
                self.zero(offset, len, ZeroOptions { fua, trim, only_if_fast: false }, done);
            }
            // A server without FLUSH promises that every answered write is on stable storage.
            BlockOp::Flush if !self.supports(flag::SEND_FLUSH) => done(Ok(Bytes::new())),
            BlockOp::Flush => {
                let request =
                    RequestHeader { flags: 0, command: Command::Flush, cookie: 0, offset: 0, len: 0 };
                self.connection.send(request, Bytes::new(), Content::Nothing, Waiter::Data(done));
            }
        }
    }
}

fn fua_flag(fua: bool) -> u16 {
    if fua { command_flag::FUA } else { 0 }
}

/// Limits a negotiation's time.
pub(crate) async fn in_time<T>(
    negotiation: impl Future<Output = Result<T, ConnectError>>,
) -> Result<T, ConnectError> {
    let late = |_| ConnectError::HandshakeTimeout(HANDSHAKE.as_secs());
    tokio::time::timeout(HANDSHAKE, negotiation).await.map_err(late)?
}

/// A long request in parts: it completes when the last part under way has ended, with the first error.
struct Split {
    connection: Arc<Connection>,
    request: RequestHeader,
    state: Mutex<SplitState>,
}

struct SplitState {
    /// Bytes that have been sent out.
    next: u64,
    in_flight: u64,
    error: Option<BlockError>,
    done: Option<Completion>,
}

impl Split {
    fn send_next(self: Arc<Self>) {
        let (offset, len) = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            let left = self.request.len - state.next;
            if left == 0 || state.error.is_some() {
                return;
            }
            let (at, len) = (state.next, left.min(COMPACT_RANGE_BYTES_MAX));
            state.next += len;
            state.in_flight += 1;
            (self.request.offset + at, len)
        };
        let request = RequestHeader { offset, len, ..self.request };
        let split = self.clone();
        let done = Box::new(move |result: Result<Bytes, BlockError>| split.part_done(result.err()));
        self.connection.send(request, Bytes::new(), Content::Nothing, Waiter::Data(done));
    }

    fn part_done(self: Arc<Self>, error: Option<BlockError>) {
        let finished = {
            let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.in_flight -= 1;
            state.error = state.error.or(error);
            let over = state.error.is_some() || state.next == self.request.len;
            if over && state.in_flight == 0 {
                state.done.take().map(|done| (done, state.error))
            } else {
                None
            }
        };
        match finished {
            Some((done, error)) => done(error.map_or(Ok(Bytes::new()), Err)),
            None => self.send_next(),
        }
    }
}
