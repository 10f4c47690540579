//! What the tests share: a device in memory, a provider, and a server on a Unix socket.
#![allow(dead_code, reason = "each test file uses its part")]

pub mod tools;

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use holdfast_io::{BlockDevice, BlockError, BlockOp, Completion};
use holdfast_nbd::{
    BlockStatus, Client, ConnectionSet, Context, Export, ExportProvider, Extent, ExtentsCompletion,
    OpenError, PeerIdentity, Server,
};
use tokio::net::UnixListener;

pub const BLOCK: usize = 4096;

/// A device in memory. It can hold requests back, answer the newest first, fail them, or drop them.
pub struct MemoryDevice {
    /// What is told; more than there is memory for, if the device is sparse: then nothing is kept.
    size_bytes: u64,
    data: Mutex<Vec<u8>>,
    pub behaviour: Mutex<Behaviour>,
    held: Mutex<Vec<(BlockOp, Completion)>>,
    pub flushes: AtomicU64,
    pub fuas: AtomicU64,
    pub trims: AtomicU64,
    pub zeroes: AtomicU64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Behaviour {
    Answer,
    Hold,
    Fail(i32),
    Drop,
}

impl MemoryDevice {
    pub fn new(bytes: usize) -> Arc<Self> {
        Self::with_size(bytes, bytes as u64)
    }

    fn with_size(bytes: usize, size_bytes: u64) -> Arc<Self> {
        Arc::new(Self {
            size_bytes,
            data: Mutex::new(vec![0; bytes]),
            behaviour: Mutex::new(Behaviour::Answer),
            held: Mutex::new(Vec::new()),
            flushes: AtomicU64::new(0),
            fuas: AtomicU64::new(0),
            trims: AtomicU64::new(0),
            zeroes: AtomicU64::new(0),
        })
    }

    pub fn set(&self, behaviour: Behaviour) {
        *self.behaviour.lock().unwrap() = behaviour;
    }

    pub fn held(&self) -> usize {
        self.held.lock().unwrap().len()
    }

    /// Answers what is held, the newest first.
    pub fn release(&self) {
        let held = std::mem::take(&mut *self.held.lock().unwrap());
        for (op, done) in held.into_iter().rev() {
            done(Ok(self.apply(&op)));
        }
    }

    pub fn bytes(&self) -> Vec<u8> {
        self.data.lock().unwrap().clone()
    }

    fn apply(&self, op: &BlockOp) -> Bytes {
        let mut data = self.data.lock().unwrap();
        match op {
            BlockOp::Read { offset, len } => {
                let start = *offset as usize;
                return Bytes::copy_from_slice(&data[start..start + *len as usize]);
            }
            BlockOp::Write { offset, data: new, fua } => {
                assert!(holdfast_io::is_aligned(new), "a write's data can go to direct I/O");
                let start = *offset as usize;
                data[start..start + new.len()].copy_from_slice(new);
                self.fuas.fetch_add(u64::from(*fua), Ordering::Relaxed);
            }
            BlockOp::Zero { offset, len, fua, trim } => {
                if !data.is_empty() {
                    let start = *offset as usize;
                    data[start..start + *len as usize].fill(0);
                }
                self.fuas.fetch_add(u64::from(*fua), Ordering::Relaxed);
                let counter = if *trim { &self.trims } else { &self.zeroes };
                counter.fetch_add(1, Ordering::Relaxed);
            }
            BlockOp::Flush => {
                self.flushes.fetch_add(1, Ordering::Relaxed);
            }
        }
        Bytes::new()
    }
}

impl BlockDevice for MemoryDevice {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn submit(&self, op: BlockOp, done: Completion) {
        let behaviour = *self.behaviour.lock().unwrap();
        match behaviour {
            Behaviour::Answer => done(Ok(self.apply(&op))),
            Behaviour::Hold => self.held.lock().unwrap().push((op, done)),
            Behaviour::Fail(errno) => done(Err(BlockError(errno))),
            Behaviour::Drop => drop(done),
        }
    }
}

impl BlockStatus for MemoryDevice {
    fn block_status(&self, offset: u64, len: u64, extents_max: usize, done: ExtentsCompletion) {
        match *self.behaviour.lock().unwrap() {
            Behaviour::Fail(errno) => return done(Err(BlockError(errno))),
            Behaviour::Drop => return,
            Behaviour::Answer | Behaviour::Hold => {}
        }
        let data = self.data.lock().unwrap();
        let mut extents: Vec<Extent> = Vec::new();
        for block in data[offset as usize..offset as usize + len as usize].chunks(BLOCK) {
            let empty = block.iter().all(|byte| *byte == 0);
            let full = extents.len() == extents_max;
            match extents.last_mut() {
                Some(last) if last.is_zero() == empty => last.len += block.len() as u64,
                _ if full => break,
                _ => extents.push(allocation(block.len(), empty)),
            }
        }
        done(Ok(extents));
    }
}

/// An extent of `base:allocation`.
pub fn allocation(len: usize, hole: bool) -> Extent {
    Extent { len: len as u64, state: if hole { Extent::HOLE | Extent::ZERO } else { 0 } }
}

/// The id of the absent replica whose dirty map the tests' export has, and the context's name.
pub const ABSENT: &str = "0123";
pub const DIRTY: &str = "x-holdfast:dirty:0123";

/// A dirty map: every other MiB is dirty, beginning with the first.
struct EveryOtherMib;

impl BlockStatus for EveryOtherMib {
    fn block_status(&self, offset: u64, len: u64, extents_max: usize, done: ExtentsCompletion) {
        const MIB: u64 = 1 << 20;
        let mut extents = Vec::new();
        let mut at = offset;
        while at < offset + len && extents.len() < extents_max {
            let end = ((at / MIB + 1) * MIB).min(offset + len);
            let state = if (at / MIB).is_multiple_of(2) { Extent::DIRTY } else { 0 };
            extents.push(Extent { len: end - at, state });
            at = end;
        }
        done(Ok(extents));
    }
}

/// Serves one device under the name "vol" (under "ro" read-only, under "slow" without fast zeroing); tells who asked.
pub struct OneVolume {
    pub device: Arc<MemoryDevice>,
    pub connections: ConnectionSet,
    pub peers: Mutex<Vec<PeerIdentity>>,
}

impl OneVolume {
    pub fn new(bytes: usize) -> Arc<Self> {
        Self::of(MemoryDevice::new(bytes))
    }

    /// A device that takes zeroing only, of a size for which there is no memory.
    pub fn sparse(size_bytes: u64) -> Arc<Self> {
        Self::of(MemoryDevice::with_size(0, size_bytes))
    }

    fn of(device: Arc<MemoryDevice>) -> Arc<Self> {
        Arc::new(Self { device, connections: ConnectionSet::new(), peers: Mutex::new(Vec::new()) })
    }
}

impl ExportProvider for OneVolume {
    fn open(&self, name: &str, peer: &PeerIdentity) -> Result<Export, OpenError> {
        self.peers.lock().unwrap().push(peer.clone());
        match name {
            "vol" | "ro" | "slow" => {}
            "secret" => return Err(OpenError::NotAllowed("it is another node's".into())),
            other => return Err(OpenError::Unknown(other.to_owned())),
        }
        let mut export = Export::new(self.device.clone());
        export.contexts =
            vec![Context::allocation(self.device.clone()), Context::dirty(ABSENT, Arc::new(EveryOtherMib))];
        export.description = "a volume in memory".into();
        export.fast_zero = name == "vol";
        export.read_only = name == "ro";
        export.multi_conn = true;
        export.connections = self.connections.clone();
        Ok(export)
    }

    fn list(&self, _: &PeerIdentity) -> Vec<String> {
        vec!["vol".into(), "ro".into(), "slow".into()]
    }
}

/// A server on a Unix socket; ends with the runtime.
pub struct Listening {
    pub volume: Arc<OneVolume>,
    pub socket: PathBuf,
    _dir: tempfile::TempDir,
}

impl Listening {
    pub fn start(bytes: usize) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("nbd.sock");
        let volume = OneVolume::new(bytes);
        let server = Server::new(volume.clone());
        let listener = UnixListener::bind(&socket).unwrap();
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let server = server.clone();
                tokio::spawn(async move {
                    if let Err(error) = server.serve_connection(stream).await {
                        println!("server: {error}");
                    }
                });
            }
        });
        Self { volume, socket, _dir: dir }
    }

    /// `nbd+unix:///vol?socket=...`
    pub fn uri(&self, export: &str) -> String {
        format!("nbd+unix:///{export}?socket={}", self.socket.display())
    }

    pub fn dir(&self) -> &Path {
        self._dir.path()
    }
}

/// Asks for extents and waits.
pub async fn extents(
    client: &Client,
    context: &str,
    offset: usize,
    len: usize,
    one: bool,
) -> Result<Vec<Extent>, BlockError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    let done = Box::new(move |result| drop(sender.send(result)));
    client.block_status(context, offset as u64, len as u64, one, done);
    receiver.await.expect("every request completes")
}

/// Calls something that completes like a request, and waits.
pub async fn wait(ask: impl FnOnce(Completion)) -> Result<Bytes, BlockError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    ask(Box::new(move |result| drop(sender.send(result))));
    receiver.await.expect("every request completes")
}

/// Submits and waits.
pub async fn call(device: &dyn BlockDevice, op: BlockOp) -> Result<Bytes, BlockError> {
    let (sender, receiver) = tokio::sync::oneshot::channel();
    device.submit(op, Box::new(move |result| drop(sender.send(result))));
    receiver.await.expect("every request completes")
}
