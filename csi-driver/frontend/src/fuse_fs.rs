//! The file system behind the loop device: a root and one file, whose I/O goes to a [`BlockDevice`].

use std::ffi::OsStr;
use std::io;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::{Duration, UNIX_EPOCH};

use bytes::Bytes;
use fuser::{
    Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, InitFlags,
    KernelConfig, LockOwner, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyStatfs,
    ReplyWrite, Request, WriteFlags,
};
use holdfast_io::{AlignedBuf, BlockDevice, BlockError, BlockOp};

/// Largest request in bytes: 256 pages, what every kernel since 4.20 allows.
pub(crate) const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Requests that the kernel keeps in flight; further ones wait in the loop device's queue. The loop device has 128 tags.
const IN_FLIGHT_MAX: u16 = 128;
/// Nothing but I/O ever changes, and the size, which the kernel is told of.
const FOREVER: Duration = Duration::from_hours(24 * 365);

pub(crate) const FILE_INODE: INodeNo = INodeNo(2);
const BLOCK_BYTES: u32 = 4096;

/// Where the file's I/O goes. It can be cut off, after which every request fails with EIO: the kernel may hold the file for
/// longer than the target lives.
#[derive(Clone)]
pub(crate) struct Gate(Arc<RwLock<Option<Arc<dyn BlockDevice>>>>);

impl Gate {
    pub(crate) fn new(device: Arc<dyn BlockDevice>) -> Self {
        Self(Arc::new(RwLock::new(Some(device))))
    }

    pub(crate) fn cut(&self) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).take();
    }

    fn submit(&self, op: BlockOp, done: impl FnOnce(Result<Bytes, Errno>) + Send + 'static) {
        // Held while submitting, which never blocks, so that nothing reaches the device after `cut` has returned.
        let device = self.0.read().unwrap_or_else(PoisonError::into_inner);
        match &*device {
            Some(device) => {
                let done = |result: Result<Bytes, BlockError>| {
                    done(result.map_err(|BlockError(e)| Errno::from_i32(e)))
                };
                device.submit(op, Box::new(done));
            }
            None => done(Err(Errno::EIO)),
        }
    }
}

impl std::fmt::Debug for Gate {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Gate")
    }
}

/// One file of the device's size.
pub(crate) struct OneFile {
    gate: Gate,
    name: String,
    size_bytes: Arc<AtomicU64>,
    read_only: bool,
}

impl OneFile {
    pub(crate) fn new(gate: Gate, name: String, size_bytes: Arc<AtomicU64>, read_only: bool) -> Self {
        Self { gate, name, size_bytes, read_only }
    }

    fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::Relaxed)
    }

    fn file(&self) -> FileAttr {
        let perm = if self.read_only { 0o400 } else { 0o600 };
        attr(FILE_INODE, FileType::RegularFile, perm, self.size_bytes())
    }

    fn root() -> FileAttr {
        attr(INodeNo::ROOT, FileType::Directory, 0o500, 0)
    }

    /// The part of a read that lies within the file.
    fn clipped(&self, offset: u64, size: u32) -> u32 {
        let left = self.size_bytes().saturating_sub(offset);
        u32::try_from(left.min(u64::from(size))).expect("not more than size")
    }

    fn aligned(offset: u64, len: u64) -> bool {
        (offset | len).is_multiple_of(u64::from(BLOCK_BYTES))
    }

    fn within(&self, offset: u64, len: u64) -> bool {
        offset.checked_add(len).is_some_and(|end| end <= self.size_bytes())
    }
}

fn attr(ino: INodeNo, kind: FileType, perm: u16, size: u64) -> FileAttr {
    FileAttr {
        ino,
        size,
        blocks: size / 512,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind,
        perm,
        nlink: 1,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: BLOCK_BYTES,
        flags: 0,
    }
}

impl Filesystem for OneFile {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let fixed = |_| io::Error::other("the FUSE request size cannot be set");
        config.set_max_write(REQUEST_BYTES_MAX).map_err(fixed)?;
        let _ = config.set_max_readahead(REQUEST_BYTES_MAX);
        let _ = config.set_max_background(IN_FLIGHT_MAX);
        let _ = config.set_congestion_threshold(IN_FLIGHT_MAX);
        let needed = InitFlags::FUSE_ASYNC_DIO | InitFlags::FUSE_ASYNC_READ | InitFlags::FUSE_MAX_PAGES;
        config
            .add_capabilities(needed)
            .map_err(|missing| io::Error::other(format!("this kernel's FUSE lacks {missing:?}")))
    }

    fn lookup(&self, _req: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        if parent == INodeNo::ROOT && name == OsStr::new(&self.name) {
            reply.entry(&FOREVER, &self.file(), Generation(0));
        } else {
            reply.error(Errno::ENOENT);
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match ino {
            INodeNo::ROOT => reply.attr(&FOREVER, &Self::root()),
            FILE_INODE => reply.attr(&FOREVER, &self.file()),
            _ => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        if ino != FILE_INODE {
            return reply.error(Errno::EISDIR);
        }
        // Past the page cache, and writes side by side: the target orders what overlaps.
        let flags = FopenFlags::FOPEN_DIRECT_IO
            | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            | FopenFlags::FOPEN_NOFLUSH;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let len = self.clipped(offset, size);
        if !Self::aligned(offset, u64::from(len)) {
            return reply.error(Errno::EINVAL);
        }
        if len == 0 {
            return reply.data(&[]);
        }
        self.gate.submit(BlockOp::Read { offset, len }, move |result| match result {
            Ok(data) if data.len() == len as usize => reply.data(&data),
            Ok(_) => reply.error(Errno::EIO),
            Err(errno) => reply.error(errno),
        });
    }

    fn write(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let len = u32::try_from(data.len()).expect("a FUSE request is at most 1 MiB");
        if self.read_only {
            return reply.error(Errno::EROFS);
        }
        if len == 0 || !Self::aligned(offset, u64::from(len)) || !self.within(offset, u64::from(len)) {
            return reply.error(Errno::EINVAL);
        }
        let data = AlignedBuf::copy_of(data).into_bytes();
        // The loop device flushes for FUA by itself, with fsync.
        self.gate.submit(BlockOp::Write { offset, data, fua: false }, move |result| match result {
            Ok(_) => reply.written(len),
            Err(errno) => reply.error(errno),
        });
    }

    fn fsync(&self, _req: &Request, _ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        self.gate.submit(BlockOp::Flush, move |result| finish(reply, result));
    }

    fn fallocate(
        &self,
        _req: &Request,
        _ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        length: u64,
        mode: i32,
        reply: ReplyEmpty,
    ) {
        // How the loop device sends discard and write-zeroes that may unmap, and write-zeroes that may not.
        let trim = match mode & !libc::FALLOC_FL_KEEP_SIZE {
            libc::FALLOC_FL_PUNCH_HOLE => true,
            libc::FALLOC_FL_ZERO_RANGE => false,
            _ => return reply.error(Errno::EOPNOTSUPP),
        };
        if self.read_only {
            return reply.error(Errno::EROFS);
        }
        if length == 0 || !Self::aligned(offset, length) || !self.within(offset, length) {
            return reply.error(Errno::EINVAL);
        }
        let op = BlockOp::Zero { offset, len: length, fua: false, trim };
        self.gate.submit(op, move |result| finish(reply, result));
    }

    fn statfs(&self, _req: &Request, _ino: INodeNo, reply: ReplyStatfs) {
        // The loop device takes its discard granularity from the block size told here.
        let blocks = self.size_bytes() / u64::from(BLOCK_BYTES);
        reply.statfs(blocks, 0, 0, 1, 0, BLOCK_BYTES, 255, BLOCK_BYTES);
    }
}

fn finish(reply: ReplyEmpty, result: Result<Bytes, Errno>) {
    match result {
        Ok(_) => reply.ok(),
        Err(errno) => reply.error(errno),
    }
}
