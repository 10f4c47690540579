//! What a server serves: exports, chosen by name and by who asks.

use std::any::Any;
use std::fmt;
use std::sync::Arc;

use holdfast_io::{BlockDevice, BlockError};
use tokio::sync::watch;

/// Who is at the other end of a connection.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PeerIdentity {
    /// No TLS: whoever can reach the socket.
    Anonymous,
    /// Mutual TLS: the DNS names of the certificate it proved to hold. A node's certificate has one, the node's name.
    Named(Vec<String>),
}

impl PeerIdentity {
    /// Whether the peer proved to be `name`; an anonymous peer never did.
    #[must_use]
    pub fn is_named(&self, name: &str) -> bool {
        match self {
            Self::Anonymous => false,
            Self::Named(names) => names.iter().any(|known| known == name),
        }
    }
}

/// Why an export is not given; the text reaches the client's log.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// No such export, or a session that is over.
    #[error("there is no export \"{0}\" (or its session is over)")]
    Unknown(String),
    /// The peer may not have it.
    #[error("the peer may not open this export: {0}")]
    NotAllowed(String),
    /// It exists but cannot be served now.
    #[error("the export cannot be served now: {0}")]
    Unavailable(String),
}

/// Decides, per connection, what an export name stands for. Called on a tokio worker: it must not block.
pub trait ExportProvider: Send + Sync + 'static {
    /// Opens an export. Also called for NBD_OPT_INFO, whose result is dropped after the answer: opening has no side effect
    /// beyond what dropping the [`Export`] undoes.
    ///
    /// # Errors
    /// [`OpenError`], whose text is sent to the client.
    fn open(&self, name: &str, peer: &PeerIdentity) -> Result<Export, OpenError>;

    /// Names that NBD_OPT_LIST tells. The default tells none, as names that carry session tokens are secrets.
    fn list(&self, peer: &PeerIdentity) -> Vec<String> {
        let _ = peer;
        Vec::new()
    }
}

/// One opened export: the device and how it is offered.
pub struct Export {
    /// Answers the I/O.
    pub device: Arc<dyn BlockDevice>,
    /// The metadata contexts on offer, each with what answers NBD_CMD_BLOCK_STATUS for it. Names are told apart exactly.
    pub contexts: Vec<Context>,
    /// A text for people, may be empty.
    pub description: String,
    /// Zeroing whole blocks is faster than writing them; else NBD_CMD_FLAG_FAST_ZERO is refused with ENOTSUP.
    pub fast_zero: bool,
    /// Writes are refused with EPERM.
    pub read_only: bool,
    /// A flush on one connection covers writes answered on the others (NBD_FLAG_CAN_MULTI_CONN).
    pub multi_conn: bool,
    /// Smallest unit of I/O in bytes, a power of two; requests that do not keep it get EINVAL.
    pub block_bytes: u32,
    /// The connection joins this set for its life: closing the set closes it.
    pub connections: ConnectionSet,
    /// Dropped when the connection is closed and the last of its requests has completed.
    pub guard: Option<Box<dyn Any + Send + Sync>>,
}

impl Export {
    /// A writable export with 4096-byte blocks and a connection set of its own.
    #[must_use]
    pub fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self {
            device,
            contexts: Vec::new(),
            description: String::new(),
            fast_zero: false,
            read_only: false,
            multi_conn: false,
            block_bytes: 4096,
            connections: ConnectionSet::new(),
            guard: None,
        }
    }
}

impl fmt::Debug for Export {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Export")
            .field("size_bytes", &self.device.size_bytes())
            .field("read_only", &self.read_only)
            .field("multi_conn", &self.multi_conn)
            .field("block_bytes", &self.block_bytes)
            .finish_non_exhaustive()
    }
}

/// Name of the context which tells what is allocated.
pub const BASE_ALLOCATION: &str = "base:allocation";
/// Start of the names of our own contexts that tell which blocks an absent replica lacks; its id follows.
pub const DIRTY_PREFIX: &str = "x-holdfast:dirty:";

/// A metadata context of an export.
#[derive(Clone)]
pub struct Context {
    /// `namespace:leaf`.
    pub name: String,
    /// Answers for it.
    pub source: Arc<dyn BlockStatus>,
}

impl Context {
    /// [`BASE_ALLOCATION`].
    #[must_use]
    pub fn allocation(source: Arc<dyn BlockStatus>) -> Self {
        Self { name: BASE_ALLOCATION.to_owned(), source }
    }

    /// What the replica `absent` lacks: extents whose state is [`Extent::DIRTY`] or 0.
    #[must_use]
    pub fn dirty(absent: impl fmt::Display, source: Arc<dyn BlockStatus>) -> Self {
        Self { name: format!("{DIRTY_PREFIX}{absent}"), source }
    }
}

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Context").field(&self.name).finish()
    }
}

/// One run of equal state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Length in bytes, not zero.
    pub len: u64,
    /// What the context says of it, in the context's own bits.
    pub state: u32,
}

impl Extent {
    /// `base:allocation`: no space is allocated (NBD_STATE_HOLE).
    pub const HOLE: u32 = 1;
    /// `base:allocation`: reads as zeroes (NBD_STATE_ZERO).
    pub const ZERO: u32 = 2;
    /// [`DIRTY_PREFIX`]: written since the replica left, as far as is known.
    pub const DIRTY: u32 = 1;

    /// Whether no space is allocated, in `base:allocation`.
    #[must_use]
    pub fn is_hole(self) -> bool {
        self.state & Self::HOLE != 0
    }

    /// Whether it reads as zeroes, in `base:allocation`.
    #[must_use]
    pub fn is_zero(self) -> bool {
        self.state & Self::ZERO != 0
    }
}

/// Receives the extents, exactly once, on any thread; it must not block.
pub type ExtentsCompletion = Box<dyn FnOnce(Result<Vec<Extent>, BlockError>) + Send>;

/// Tells the states of one context, for NBD_CMD_BLOCK_STATUS.
pub trait BlockStatus: Send + Sync + 'static {
    /// Describes `[offset, offset + len)`, which lies within the export, or a non-empty prefix of it, in at most
    /// `extents_max` extents. The work must be bounded, whatever `len` is: an answer may be short.
    fn block_status(&self, offset: u64, len: u64, extents_max: usize, done: ExtentsCompletion);
}

/// The connections of one session. Clones are the same set.
///
/// A connection counts as live until it is closed *and* its last request has completed, so that
/// [`ConnectionSet::wait_drained`] after [`ConnectionSet::close`] is the drain that R2 asks for.
#[derive(Debug, Clone)]
pub struct ConnectionSet(Arc<SetState>);

#[derive(Debug)]
struct SetState {
    closed: watch::Sender<bool>,
    live: watch::Sender<usize>,
}

impl ConnectionSet {
    /// An empty, open set.
    #[must_use]
    pub fn new() -> Self {
        Self(Arc::new(SetState { closed: watch::Sender::new(false), live: watch::Sender::new(0) }))
    }

    /// Closes every connection, now and in future: no further request is read from any. Safe to repeat.
    pub fn close(&self) {
        self.0.closed.send_replace(true);
    }

    /// Whether it was closed.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        *self.0.closed.borrow()
    }

    /// Resolves once closed. Cancel-safe.
    pub async fn closed(&self) {
        let mut closed = self.0.closed.subscribe();
        // The sender lives in `self`, so waiting cannot fail.
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// Connections that are open or still have requests in the device.
    #[must_use]
    pub fn live(&self) -> usize {
        *self.0.live.borrow()
    }

    /// Follows [`ConnectionSet::live`], to learn when a connection came or ended.
    #[must_use]
    pub fn watch_live(&self) -> watch::Receiver<usize> {
        self.0.live.subscribe()
    }

    /// Resolves when no connection is live. Cancel-safe.
    pub async fn wait_drained(&self) {
        let mut live = self.0.live.subscribe();
        let _ = live.wait_for(|live| *live == 0).await;
    }

    /// Counts one connection in until the answer is dropped.
    pub(crate) fn join(&self) -> Membership {
        self.0.live.send_modify(|live| *live += 1);
        Membership(self.clone())
    }
}

impl Default for ConnectionSet {
    fn default() -> Self {
        Self::new()
    }
}

/// One live connection of a set.
#[derive(Debug)]
pub(crate) struct Membership(ConnectionSet);

impl Drop for Membership {
    fn drop(&mut self) {
        self.0.0.live.send_modify(|live| *live -= 1);
    }
}
