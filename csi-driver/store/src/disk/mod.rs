//! The file layer: the real one (direct I/O, blocking calls for control files and a ring for data), and in tests one
//! that loses and tears what was not synced.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_io::{AlignedBuf, Durability, LockOutcome, OpenMode, Ring, RingDone};

#[cfg(test)]
pub mod sim;

/// Where files live.
#[derive(Debug, Clone)]
pub enum Disk {
    /// The machine's file systems.
    Real(Ring),
    /// A simulated disk.
    #[cfg(test)]
    Sim(sim::SimDisk),
}

/// An open file. Memory, offset and length of every read and write are multiples of a page.
#[derive(Debug, Clone)]
pub enum DiskFile {
    /// A direct-I/O file.
    Real {
        /// The file.
        file: Arc<File>,
        /// Runs its asynchronous I/O.
        ring: Ring,
    },
    /// A file of a simulated disk.
    #[cfg(test)]
    Sim(sim::SimFile),
}

/// What a file fills.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileUse {
    /// Two names with one inode are one file: clones share layers.
    pub inode: u64,
    /// Bytes that it has space for.
    pub bytes: u64,
    /// How many names it has; its space is free once the last one is gone.
    pub links: u64,
}

impl Disk {
    /// Whether merges run on a thread of their own. A simulated disk counts changes, and must see them in one order.
    pub fn has_threads(&self) -> bool {
        match self {
            Disk::Real(_) => true,
            #[cfg(test)]
            Disk::Sim(_) => false,
        }
    }

    /// Makes a folder and those above it.
    pub fn create_dir_all(&self, path: &Path) -> io::Result<()> {
        match self {
            Disk::Real(_) => fs::create_dir_all(path),
            #[cfg(test)]
            Disk::Sim(sim) => sim.create_dir(path),
        }
    }

    /// Whether a file or folder is there.
    pub fn exists(&self, path: &Path) -> io::Result<bool> {
        match self {
            Disk::Real(_) => path.try_exists(),
            #[cfg(test)]
            Disk::Sim(sim) => sim.exists(path),
        }
    }

    /// Names in a folder, in order.
    pub fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let mut names = match self {
            Disk::Real(_) => fs::read_dir(path)?
                .map(|entry| entry.map(|entry| entry.file_name().to_string_lossy().into_owned()))
                .collect::<io::Result<Vec<String>>>()?,
            #[cfg(test)]
            Disk::Sim(sim) => sim.list(path)?,
        };
        names.sort_unstable();
        Ok(names)
    }

    /// Renames; durable after [`Disk::sync_dir`] of the parent.
    pub fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        match self {
            Disk::Real(_) => fs::rename(from, to),
            #[cfg(test)]
            Disk::Sim(sim) => sim.rename(from, to),
        }
    }

    /// Removes a folder with what is in it.
    pub fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        match self {
            Disk::Real(_) => fs::remove_dir_all(path),
            #[cfg(test)]
            Disk::Sim(sim) => sim.remove_dir_all(path),
        }
    }

    /// Removes a file; an absent one is fine.
    pub fn remove_file(&self, path: &Path) -> io::Result<()> {
        let removed = match self {
            Disk::Real(_) => fs::remove_file(path),
            #[cfg(test)]
            Disk::Sim(sim) => sim.remove_file(path),
        };
        removed.or_else(|error| if error.kind() == io::ErrorKind::NotFound { Ok(()) } else { Err(error) })
    }

    /// Gives a file a second name; durable after [`Disk::sync_dir`] of the new name's folder.
    pub fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        match self {
            Disk::Real(_) => fs::hard_link(from, to),
            #[cfg(test)]
            Disk::Sim(sim) => sim.hard_link(from, to),
        }
    }

    /// Makes names in a folder durable.
    pub fn sync_dir(&self, path: &Path) -> io::Result<()> {
        match self {
            Disk::Real(_) => File::open(path)?.sync_all(),
            #[cfg(test)]
            Disk::Sim(sim) => sim.sync_dir(path),
        }
    }

    /// Opens a file for direct I/O.
    pub fn open(&self, path: &Path, mode: OpenMode) -> io::Result<DiskFile> {
        match self {
            Disk::Real(ring) => {
                let file = Arc::new(holdfast_io::open_direct(path, mode)?);
                Ok(DiskFile::Real { file, ring: ring.clone() })
            }
            #[cfg(test)]
            Disk::Sim(sim) => sim.open(path, mode).map(DiskFile::Sim),
        }
    }

    /// Bytes left in the file system.
    pub fn free_bytes(&self, path: &Path) -> io::Result<u64> {
        match self {
            Disk::Real(_) => holdfast_io::free_bytes(path),
            #[cfg(test)]
            Disk::Sim(sim) => sim.free_bytes(),
        }
    }

    /// What each of a folder's files fills, not counting folders in it.
    pub fn used(&self, path: &Path) -> io::Result<Vec<FileUse>> {
        const SECTOR_OF_STAT: u64 = 512;
        match self {
            Disk::Real(_) => {
                let mut used = Vec::new();
                for entry in fs::read_dir(path)? {
                    match entry?.metadata() {
                        Ok(found) => {
                            used.push(FileUse {
                                inode: found.ino(),
                                bytes: found.blocks() * SECTOR_OF_STAT,
                                links: found.nlink(),
                            });
                        }
                        // Removed between the two calls.
                        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                        Err(error) => return Err(error),
                    }
                }
                Ok(used)
            }
            #[cfg(test)]
            Disk::Sim(sim) => sim.used(path),
        }
    }
}

impl DiskFile {
    /// Length in bytes.
    pub fn len_bytes(&self) -> io::Result<u64> {
        match self {
            DiskFile::Real { file, .. } => Ok(file.metadata()?.len()),
            #[cfg(test)]
            DiskFile::Sim(file) => file.len_bytes(),
        }
    }

    /// How many names the file has.
    pub fn link_count(&self) -> io::Result<u64> {
        match self {
            DiskFile::Real { file, .. } => Ok(file.metadata()?.nlink()),
            #[cfg(test)]
            DiskFile::Sim(file) => Ok(file.link_count()),
        }
    }

    /// Sets the length; new bytes are zero.
    pub fn set_len(&self, len_bytes: u64) -> io::Result<()> {
        match self {
            DiskFile::Real { file, .. } => file.set_len(len_bytes),
            #[cfg(test)]
            DiskFile::Sim(file) => file.set_len(len_bytes),
        }
    }

    /// Reserves space, blocking. A file system without reservation allocates as it writes.
    pub fn reserve_now(&self, offset: u64, len: u64) -> io::Result<()> {
        let reserved = match self {
            DiskFile::Real { file, .. } => holdfast_io::reserve_space(file, offset, len),
            #[cfg(test)]
            DiskFile::Sim(file) => file.allocate(),
        };
        match reserved {
            Err(error) if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => Ok(()),
            other => other,
        }
    }

    /// Reads `len` bytes, blocking.
    pub fn read_now(&self, offset: u64, len: usize) -> io::Result<AlignedBuf> {
        let mut buf = AlignedBuf::new(len);
        match self {
            DiskFile::Real { file, .. } => file.read_exact_at(&mut buf, offset)?,
            #[cfg(test)]
            DiskFile::Sim(file) => file.read(offset, &mut buf)?,
        }
        Ok(buf)
    }

    /// Writes into the disk's cache, blocking.
    pub fn write_now(&self, offset: u64, data: &AlignedBuf) -> io::Result<()> {
        match self {
            DiskFile::Real { file, .. } => file.write_all_at(data, offset),
            #[cfg(test)]
            DiskFile::Sim(file) => file.write(offset, data),
        }
    }

    /// Writes onto stable storage, blocking. Says nothing about earlier writes.
    pub fn write_durable_now(&self, offset: u64, data: &AlignedBuf) -> io::Result<()> {
        match self {
            DiskFile::Real { file, .. } => holdfast_io::write_durable(file, offset, data),
            #[cfg(test)]
            DiskFile::Sim(file) => file.write_durable(offset, data),
        }
    }

    /// Makes data and length durable, blocking.
    pub fn sync_now(&self) -> io::Result<()> {
        match self {
            DiskFile::Real { file, .. } => file.sync_data(),
            #[cfg(test)]
            DiskFile::Sim(file) => file.sync(),
        }
    }

    /// Where the first data from `offset` on lies, if any does; a hole, or space that was only reserved, has none. A file
    /// system that does not know says `offset`.
    pub fn next_data(&self, offset: u64) -> io::Result<Option<u64>> {
        match self {
            DiskFile::Real { file, .. } => holdfast_io::next_data(file, offset),
            #[cfg(test)]
            DiskFile::Sim(_) => Ok(Some(offset)),
        }
    }

    /// Gives space back, blocking; the range reads as zeroes. A file system that punches no holes keeps it.
    pub fn punch_now(&self, offset: u64, len: u64) -> io::Result<()> {
        let punched = match self {
            DiskFile::Real { file, .. } => holdfast_io::punch_hole(file, offset, len),
            #[cfg(test)]
            DiskFile::Sim(file) => file.punch(offset, len),
        };
        match punched {
            Err(error) if error.raw_os_error() == Some(nix::libc::EOPNOTSUPP) => Ok(()),
            other => other,
        }
    }

    /// Takes the file's lock; see [`holdfast_io::lock_exclusive`].
    pub fn lock(&self, wait: Duration) -> io::Result<LockOutcome> {
        match self {
            DiskFile::Real { file, .. } => holdfast_io::lock_exclusive(file, wait),
            #[cfg(test)]
            DiskFile::Sim(_) => Ok(LockOutcome::Locked),
        }
    }

    /// Gives the file's lock back.
    pub fn unlock(&self) -> io::Result<()> {
        match self {
            DiskFile::Real { file, .. } => holdfast_io::unlock(file),
            #[cfg(test)]
            DiskFile::Sim(_) => Ok(()),
        }
    }

    /// Reads; answers on the ring's thread.
    pub fn read(&self, offset: u64, buf: AlignedBuf, done: RingDone<AlignedBuf>) {
        match self {
            DiskFile::Real { file, ring } => ring.read(file, offset, buf, done),
            #[cfg(test)]
            DiskFile::Sim(file) => {
                let mut buf = buf;
                let result = file.read(offset, &mut buf).map(|()| buf);
                done(result.map_err(Into::into));
            }
        }
    }

    /// Writes page-aligned memory into the disk's cache; answers on the ring's thread.
    pub fn write(&self, offset: u64, data: Bytes, done: RingDone<()>) {
        match self {
            DiskFile::Real { file, ring } => ring.write(file, offset, data, Durability::Cached, done),
            #[cfg(test)]
            DiskFile::Sim(file) => done(file.write(offset, &data).map_err(Into::into)),
        }
    }

    /// Makes everything answered before durable; answers on the ring's thread.
    pub fn sync(&self, done: RingDone<()>) {
        match self {
            DiskFile::Real { file, ring } => ring.sync_data(file, done),
            #[cfg(test)]
            DiskFile::Sim(file) => done(file.sync().map_err(Into::into)),
        }
    }

    /// Gives space back; answers on the ring's thread.
    pub fn punch(&self, offset: u64, len: u64, done: RingDone<()>) {
        match self {
            DiskFile::Real { file, ring } => ring.punch(file, offset, len, done),
            #[cfg(test)]
            DiskFile::Sim(file) => done(file.punch(offset, len).map_err(Into::into)),
        }
    }

    /// Reserves space; answers on the ring's thread.
    pub fn allocate(&self, offset: u64, len: u64, done: RingDone<()>) {
        match self {
            DiskFile::Real { file, ring } => ring.allocate(file, offset, len, done),
            #[cfg(test)]
            DiskFile::Sim(file) => {
                let _ = (offset, len);
                done(file.allocate().map_err(Into::into));
            }
        }
    }
}
