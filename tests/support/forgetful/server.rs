//! Helper `forgetful-disks`: a FUSE folder whose files are disks, and the socket by which their power is cut.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, KernelConfig,
    LockOwner, MountOption, OpenFlags, ReplyAttr, ReplyData, ReplyEmpty, ReplyEntry, ReplyOpen, ReplyWrite,
    Request, WriteFlags,
};
use rand::SeedableRng;
use rand::rngs::StdRng;

use super::medium::Medium;
use super::{CONTROL_SOCKET, MOUNT_POINT, Tear};

const FOREVER: Duration = Duration::from_hours(24);
/// Largest request in bytes.
const REQUEST_BYTES_MAX: u32 = 1 << 20;
/// Inode of the first disk; the root has 1.
const FIRST_INODE: u64 = 2;

/// Whether the disks answer.
enum Power {
    On,
    /// Cut a moment ago: nothing is answered, as no machine without power answers. Requests wait here for the error that
    /// lets the killed processes go; the kernel sends no more than its own limit of them.
    Cut(Vec<Box<dyn FnOnce(Errno) + Send>>),
    /// Everything fails.
    Off,
}

struct State {
    power: Power,
    media: Vec<Medium>,
}

/// The file system. One lock for all disks: a cut strikes all of them between the same two requests.
#[derive(Clone)]
struct Disks {
    names: Arc<Vec<String>>,
    state: Arc<Mutex<State>>,
}

/// Helper's main: `FOLDER SEED BYTES NAME...`, in namespaces of its own.
pub(crate) fn disks_main(arguments: &[String]) -> Result<ExitCode> {
    let [folder, seed, bytes, names @ ..] = arguments else { bail!("usage: FOLDER SEED BYTES NAME...") };
    let (seed, bytes): (u64, u64) = (seed.parse()?, bytes.parse()?);
    let mut media = Vec::new();
    for (index, name) in (0u64..).zip(names) {
        let random = StdRng::seed_from_u64(seed.wrapping_add(index));
        media.push(Medium::open(Path::new(folder), name, bytes, random)?);
    }
    let state = Arc::new(Mutex::new(State { power: Power::On, media }));
    let disks = Disks { names: Arc::new(names.to_vec()), state };
    std::fs::create_dir_all(MOUNT_POINT)?;
    let mut config = Config::default();
    config.mount_options = vec![MountOption::FSName("forgetful".to_owned()), MountOption::RW];
    let session =
        fuser::spawn_mount(disks.clone(), MOUNT_POINT, &config).context("cannot mount the disks")?;
    let listener = UnixListener::bind(CONTROL_SOCKET).context("cannot listen")?;
    for connection in listener.incoming() {
        disks.serve(&connection?)?;
    }
    drop(session);
    Ok(ExitCode::SUCCESS)
}

impl Disks {
    /// One command and its answer per connection.
    fn serve(&self, connection: &UnixStream) -> Result<()> {
        let mut line = String::new();
        BufReader::new(connection).read_line(&mut line)?;
        let answer = match self.obey(line.trim()) {
            Ok(answer) => format!("ok {answer}\n"),
            Err(error) => format!("error {error:#}\n"),
        };
        let mut connection = connection;
        // Whoever asked may be gone.
        let _ = connection.write_all(answer.as_bytes());
        Ok(())
    }

    fn obey(&self, command: &str) -> Result<String> {
        let mut state = self.lock();
        match command {
            "cut random" => state.cut(Tear::Random),
            "cut drop-all" => state.cut(Tear::DropAll),
            "fail" => {
                let power = std::mem::replace(&mut state.power, Power::Off);
                drop(state);
                if let Power::Cut(waiting) = power {
                    waiting.into_iter().for_each(|answer| answer(Errno::EIO));
                }
                Ok(String::new())
            }
            "on" => {
                state.power = Power::On;
                Ok(String::new())
            }
            "lie" | "tell the truth" => {
                state.media.iter_mut().for_each(|medium| medium.set_lying(command == "lie"));
                Ok(String::new())
            }
            "flushes" => Ok(state.media.iter().map(Medium::flushes).sum::<u64>().to_string()),
            other => bail!("unknown command {other:?}"),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something with a disk under power and answers; else refuses or lets the request wait.
    fn ask<T>(
        &self,
        ino: INodeNo,
        answer: impl FnOnce(Result<T, Errno>) + Send + 'static,
        work: impl FnOnce(&mut Medium) -> std::io::Result<T>,
    ) {
        let mut state = self.lock();
        let State { power, media } = &mut *state;
        let outcome = match power {
            Power::Cut(waiting) => return waiting.push(Box::new(|errno| answer(Err(errno)))),
            Power::Off => Err(Errno::EIO),
            Power::On => match index_of(ino).and_then(|index| media.get_mut(index)) {
                Some(medium) => work(medium).map_err(Errno::from),
                None => Err(Errno::EISDIR),
            },
        };
        drop(state);
        answer(outcome);
    }

    fn attributes(&self, ino: INodeNo) -> Option<FileAttr> {
        let state = self.lock();
        let (kind, size, perm) = match index_of(ino) {
            None => (FileType::Directory, 0, 0o700),
            Some(index) => (FileType::RegularFile, state.media.get(index)?.size_bytes(), 0o600),
        };
        Some(FileAttr {
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
            blksize: 4096,
            flags: 0,
        })
    }
}

/// Which disk; none for the root.
fn index_of(ino: INodeNo) -> Option<usize> {
    usize::try_from(ino.0.checked_sub(FIRST_INODE)?).ok()
}

impl State {
    fn cut(&mut self, tear: Tear) -> Result<String> {
        let mut answer = String::new();
        for medium in &mut self.media {
            let count = medium.cut(tear)?;
            let (kept, dropped, torn) = (count.kept_sectors, count.dropped_sectors, count.torn_pages);
            answer.push_str(&format!("{kept} {dropped} {torn} "));
        }
        self.power = Power::Cut(Vec::new());
        Ok(answer)
    }
}

impl Filesystem for Disks {
    fn init(&mut self, _req: &Request, config: &mut KernelConfig) -> std::io::Result<()> {
        let fixed = |_| std::io::Error::other("the FUSE request size cannot be set");
        config.set_max_write(REQUEST_BYTES_MAX).map_err(fixed)?;
        Ok(())
    }

    fn lookup(&self, _req: &Request, _parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let numbered = (FIRST_INODE..).zip(self.names.iter());
        let found = numbered.into_iter().find(|(_, own)| name == OsStr::new(own.as_str()));
        match found.and_then(|(ino, _)| self.attributes(INodeNo(ino))) {
            Some(attributes) => reply.entry(&FOREVER, &attributes, Generation(0)),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn getattr(&self, _req: &Request, ino: INodeNo, _fh: Option<FileHandle>, reply: ReplyAttr) {
        match self.attributes(ino) {
            Some(attributes) => reply.attr(&FOREVER, &attributes),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn open(&self, _req: &Request, _ino: INodeNo, _flags: OpenFlags, reply: ReplyOpen) {
        // Past the page cache: what is unflushed is ours to forget.
        let flags = FopenFlags::FOPEN_DIRECT_IO
            | FopenFlags::FOPEN_PARALLEL_DIRECT_WRITES
            | FopenFlags::FOPEN_NOFLUSH;
        reply.opened(FileHandle(0), flags);
    }

    fn read(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        size: u32,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let answer = |outcome: Result<Vec<u8>, Errno>| match outcome {
            Ok(data) => reply.data(&data),
            Err(errno) => reply.error(errno),
        };
        self.ask(ino, answer, |medium| {
            let left = medium.size_bytes().saturating_sub(offset);
            let mut data = vec![0; usize::try_from(left.min(size.into())).unwrap_or(0)];
            medium.read(offset, &mut data)?;
            Ok(data)
        });
    }

    fn write(
        &self,
        _req: &Request,
        ino: INodeNo,
        _fh: FileHandle,
        offset: u64,
        data: &[u8],
        _write_flags: WriteFlags,
        _flags: OpenFlags,
        _lock_owner: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        let len = u32::try_from(data.len()).unwrap_or(0);
        let answer = move |outcome: Result<(), Errno>| match outcome {
            Ok(()) => reply.written(len),
            Err(errno) => reply.error(errno),
        };
        self.ask(ino, answer, |medium| medium.write(offset, data));
    }

    fn fsync(&self, _req: &Request, ino: INodeNo, _fh: FileHandle, _datasync: bool, reply: ReplyEmpty) {
        let answer = |outcome: Result<(), Errno>| match outcome {
            Ok(()) => reply.ok(),
            Err(errno) => reply.error(errno),
        };
        self.ask(ino, answer, Medium::flush);
    }
}
