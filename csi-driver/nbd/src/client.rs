//! The client side: negotiation, and the handle that requests are submitted to.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use holdfast_io::{BlockDevice, BlockError, BlockOp, Completion};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsConnector;

use crate::connection::{Connection, Expected, Waiter};
use crate::negotiate::BASE_ALLOCATION;
use crate::payload::{PAYLOAD_BYTES_MAX, read_array};
use crate::proto::{
    self, ClientOption, Command, DecodeError, InfoReply, MAGIC_GREETING, MAGIC_OPTION, OPTION_BYTES_MAX,
    OptionReplyHeader, RequestHeader, command_flag, errno, handshake_flag, info, reply,
    transmission_flag as flag,
};
use crate::provider::ExtentsCompletion;
use crate::tls::ClientTls;

/// Negotiation including TLS takes at most this long.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Replies that a server may send to one option; more end the negotiation.
const OPTION_REPLIES_MAX: u32 = 1024;
/// Longest range in one zeroing request; longer ones are split. A multiple of every block size.
const ZERO_BYTES_MAX: u64 = 1 << 30;

/// What to connect to.
#[derive(Debug, Clone, Default)]
pub struct ClientOptions {
    /// The export's name.
    pub export: String,
    /// STARTTLS first; a server without it is refused.
    pub tls: Option<ClientTls>,
    /// Ask for `base:allocation`, which [`Client::block_status`] needs.
    pub block_status: bool,
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
    /// `base:allocation` was agreed on.
    pub block_status: bool,
}

/// One connection to an export. Many requests are in flight at once; replies complete them in any order.
///
/// When the connection is lost, every request in flight completes with `ENOTCONN` exactly once, and later ones do so at
/// once. Dropping the client closes the connection in the same way.
#[derive(Debug)]
pub struct Client {
    info: ExportInfo,
    connection: Arc<Connection>,
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
        let negotiated = tokio::time::timeout(HANDSHAKE, Self::connect_unhurried(stream, options));
        negotiated.await.map_err(|_| ConnectError::HandshakeTimeout(HANDSHAKE.as_secs()))?
    }

    async fn connect_unhurried<S>(mut stream: S, options: ClientOptions) -> Result<Self, ConnectError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        exchange_greetings(&mut stream).await?;
        match &options.tls {
            None => Self::open(stream, &options).await,
            Some(tls) => {
                if let Some(refusal) = ask(&mut stream, &ClientOption::StartTls, |_, _| Ok(())).await? {
                    return Err(ConnectError::Protocol(format!("STARTTLS was refused: {refusal}")));
                }
                let connector = TlsConnector::from(tls.config.clone());
                let stream = connector.connect(tls.server_name.clone(), stream).await?;
                Self::open(stream, &options).await
            }
        }
    }

    async fn open<S>(mut stream: S, options: &ClientOptions) -> Result<Self, ConnectError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let structured = ask(&mut stream, &ClientOption::StructuredReply, |_, _| Ok(())).await?.is_none();
        let mut context_id = None;
        if structured && options.block_status {
            let queries = vec![BASE_ALLOCATION.to_owned()];
            let option = ClientOption::MetaContext { set: true, name: options.export.clone(), queries };
            // A refusal leaves the export without the context; GO will say what is wrong, if anything.
            ask(&mut stream, &option, |kind, data| {
                if kind == reply::META_CONTEXT {
                    let (id, name) = proto::decode_meta_context_reply(data)?;
                    context_id = (name == BASE_ALLOCATION).then_some(id);
                }
                Ok(())
            })
            .await?;
        }
        let mut summary = None;
        let mut sizes = None;
        let go = ClientOption::Open { go: true, name: options.export.clone(), wants: vec![info::BLOCK_SIZE] };
        let refusal = ask(&mut stream, &go, |kind, data| {
            if kind == reply::INFO {
                match proto::decode_info_reply(data)? {
                    InfoReply::Export(told) => summary = Some(told),
                    InfoReply::BlockSizes(told) => sizes = Some(told),
                    InfoReply::Other(_) => {}
                }
            }
            Ok(())
        })
        .await?;
        if let Some(reason) = refusal {
            return Err(ConnectError::Refused { export: options.export.clone(), reason });
        }
        let summary = summary.ok_or_else(|| ConnectError::Protocol("NBD_INFO_EXPORT is missing".into()))?;
        let info = ExportInfo {
            size_bytes: summary.size_bytes,
            flags: summary.flags,
            block_bytes_min: sizes.map_or(1, |sizes| sizes.min),
            payload_bytes_max: sizes.map_or(PAYLOAD_BYTES_MAX, |sizes| sizes.max.min(PAYLOAD_BYTES_MAX)),
            block_status: context_id.is_some(),
        };
        Ok(Self { info, connection: Connection::start(stream, context_id) })
    }

    /// What the server said about the export.
    #[must_use]
    pub fn info(&self) -> ExportInfo {
        self.info
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

    /// Allocation of `[offset, offset + len)` or a prefix of it; `ENOTSUP` if it was not agreed on.
    pub fn block_status(&self, offset: u64, len: u32, done: ExtentsCompletion) {
        if !self.info.block_status {
            return done(Err(BlockError(errno::ENOTSUP)));
        }
        let request = RequestHeader { flags: 0, command: Command::BlockStatus, cookie: 0, offset, len };
        self.connection.send(request, Bytes::new(), Expected::Extents, Waiter::Extents(done));
    }

    fn zero(&self, offset: u64, len: u64, flags: u16, done: Completion) {
        let pieces = len.div_ceil(ZERO_BYTES_MAX).max(1);
        let joined = Arc::new(Joined {
            missing: AtomicU64::new(pieces),
            state: std::sync::Mutex::new((Some(done), None)),
        });
        for piece in 0..pieces {
            let start = piece * ZERO_BYTES_MAX;
            let request = RequestHeader {
                flags,
                command: Command::WriteZeroes,
                cookie: 0,
                offset: offset + start,
                len: u32::try_from((len - start).min(ZERO_BYTES_MAX)).expect("1 GiB fits"),
            };
            let joined = joined.clone();
            let done = Box::new(move |result| joined.piece_done(result));
            self.connection.send(request, Bytes::new(), Expected::Nothing, Waiter::Data(done));
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
        let fua_flag = |fua: bool| if fua { command_flag::FUA } else { 0 };
        let supports = |wanted: u16| self.info.flags & wanted != 0;
        let plain = |command, flags, offset, len| RequestHeader { flags, command, cookie: 0, offset, len };
        match op {
            BlockOp::Read { offset, len } if len <= self.info.payload_bytes_max => {
                let request = plain(Command::Read, 0, offset, len);
                self.connection.send(
                    request,
                    Bytes::new(),
                    Expected::Data { offset, len },
                    Waiter::Data(done),
                );
            }
            BlockOp::Write { offset, data, fua } if data.len() <= self.info.payload_bytes_max as usize => {
                if fua && !supports(flag::SEND_FUA) {
                    return done(Err(BlockError(errno::ENOTSUP)));
                }
                let len = u32::try_from(data.len()).expect("at most 32 MiB");
                let request = plain(Command::Write, fua_flag(fua), offset, len);
                self.connection.send(request, data, Expected::Nothing, Waiter::Data(done));
            }
            BlockOp::Read { .. } | BlockOp::Write { .. } => done(Err(BlockError(errno::EINVAL))),
            BlockOp::Zero { offset, len, fua, trim } => {
                if !supports(flag::SEND_WRITE_ZEROES) || (fua && !supports(flag::SEND_FUA)) {
                    return done(Err(BlockError(errno::ENOTSUP)));
                }
                let keep = if trim { 0 } else { command_flag::NO_HOLE };
                self.zero(offset, len, fua_flag(fua) | keep, done);
            }
            // A server without FLUSH promises that every answered write is on stable storage.
            BlockOp::Flush if !supports(flag::SEND_FLUSH) => done(Ok(Bytes::new())),
            BlockOp::Flush => {
                let request = plain(Command::Flush, 0, 0, 0);
                self.connection.send(request, Bytes::new(), Expected::Nothing, Waiter::Data(done));
            }
        }
    }
}

/// Several requests that complete one caller: with the first error, when the last has ended.
struct Joined {
    missing: AtomicU64,
    state: std::sync::Mutex<(Option<Completion>, Option<BlockError>)>,
}

impl Joined {
    fn piece_done(&self, result: Result<Bytes, BlockError>) {
        let mut state = self.state.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Err(error) = result {
            state.1.get_or_insert(error);
        }
        if self.missing.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let (done, error) = (state.0.take(), state.1);
        drop(state);
        if let Some(done) = done {
            done(error.map_or(Ok(Bytes::new()), Err));
        }
    }
}

async fn exchange_greetings<S>(stream: &mut S) -> Result<(), ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let expect = |found: u64, magic: u64| {
        (found == magic)
            .then_some(())
            .ok_or(DecodeError::Magic { expected: "the greeting of an NBD server (fixed newstyle)", found })
    };
    expect(u64::from_be_bytes(read_array(stream).await?), MAGIC_GREETING)?;
    expect(u64::from_be_bytes(read_array(stream).await?), MAGIC_OPTION)?;
    let flags = u16::from_be_bytes(read_array(stream).await?);
    if flags & handshake_flag::FIXED_NEWSTYLE == 0 {
        return Err(ConnectError::Protocol("it is not fixed newstyle".into()));
    }
    let answer = flags & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    stream.write_all(&u32::from(answer).to_be_bytes()).await?;
    stream.flush().await?;
    Ok(())
}

/// Sends one option and hands every reply but the last to `each`. `Some` is the server's refusal.
async fn ask<S>(
    stream: &mut S,
    option: &ClientOption,
    mut each: impl FnMut(u32, &[u8]) -> Result<(), DecodeError>,
) -> Result<Option<String>, ConnectError>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut wire = Vec::new();
    option.encode(&mut wire);
    stream.write_all(&wire).await?;
    stream.flush().await?;
    for _ in 0..OPTION_REPLIES_MAX {
        let header = OptionReplyHeader::decode(&read_array(stream).await?)?;
        if header.option != option.number() || header.len > OPTION_BYTES_MAX {
            return Err(ConnectError::Protocol("a reply does not fit the option that was sent".into()));
        }
        let mut data = vec![0; header.len as usize];
        stream.read_exact(&mut data).await?;
        if header.is_error() {
            let text = String::from_utf8_lossy(&data);
            return Ok(Some(format!("{text} (reply {:#x})", header.kind)));
        }
        if header.kind == reply::ACK {
            return Ok(None);
        }
        each(header.kind, &data)?;
    }
    Err(ConnectError::Protocol(format!("more than {OPTION_REPLIES_MAX} replies to one option")))
}
