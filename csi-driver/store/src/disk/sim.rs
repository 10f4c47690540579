//! A disk in memory that loses power: what was not synced may be lost or torn, sector by sector.

use std::collections::BTreeMap;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};

use holdfast_io::OpenMode;
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

use super::FileUse;

const SECTOR_BYTES: u64 = 512;

/// A simulated disk. Clones are the same disk.
#[derive(Debug, Clone, Default)]
pub struct SimDisk(Arc<Mutex<State>>);

/// A file of it.
#[derive(Debug, Clone)]
pub struct SimFile {
    disk: SimDisk,
    inode: u64,
}

type Sector = [u8; SECTOR_BYTES as usize];

#[derive(Debug, Default)]
struct State {
    /// Paths as running programs see them.
    names: BTreeMap<PathBuf, Node>,
    /// Paths as a power loss leaves them, plus some of `name_changes`.
    durable_names: BTreeMap<PathBuf, Node>,
    name_changes: Vec<NameChange>,
    inodes: BTreeMap<u64, Inode>,
    next_inode: u64,
    /// Changing operations until the power goes; `None` for never.
    changes_left: Option<u64>,
    changes: u64,
    /// At the cut the first folder's files are copied to the second: tmpfs as a kill leaves it.
    copy_at_cut: Option<(PathBuf, PathBuf)>,
    cut_met: bool,
    fail_syncs: bool,
    full: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Node {
    Dir,
    File(u64),
}

#[derive(Debug, Clone)]
enum NameChange {
    Link(PathBuf, Node),
    Unlink(PathBuf),
    Rename(PathBuf, PathBuf),
}

#[derive(Debug, Clone, Default)]
struct Image {
    len: u64,
    sectors: BTreeMap<u64, Sector>,
}

#[derive(Debug, Default)]
struct Inode {
    seen: Image,
    durable: Image,
    pending: Vec<Change>,
}

#[derive(Debug, Clone)]
enum Change {
    Sector(u64, Option<Box<Sector>>),
    Len(u64),
}

fn apply(image: &mut Image, change: &Change) {
    match change {
        Change::Sector(at, Some(bytes)) => {
            image.sectors.insert(*at, **bytes);
        }
        Change::Sector(at, None) => {
            image.sectors.remove(at);
        }
        Change::Len(len) => {
            image.len = *len;
            image.sectors.split_off(&len.div_ceil(SECTOR_BYTES));
        }
    }
}

fn apply_name(names: &mut BTreeMap<PathBuf, Node>, change: &NameChange) {
    match change {
        NameChange::Link(path, node) => {
            names.insert(path.clone(), *node);
        }
        NameChange::Unlink(path) => names.retain(|name, _| !name.starts_with(path)),
        NameChange::Rename(from, to) => {
            let moved: Vec<PathBuf> = names.keys().filter(|name| name.starts_with(from)).cloned().collect();
            for name in moved {
                let node = names.remove(&name).expect("just listed");
                let rest = name.strip_prefix(from).expect("filtered by prefix");
                let target = if rest.as_os_str().is_empty() { to.clone() } else { to.join(rest) };
                names.insert(target, node);
            }
        }
    }
}

fn copy_files(from: &Path, to: &Path) {
    for entry in std::fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        std::fs::copy(&path, to.join(path.file_name().unwrap())).unwrap();
    }
}

fn off() -> io::Error {
    io::Error::from_raw_os_error(nix::libc::EIO)
}

impl SimDisk {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// The power goes after so many further changing operations: that one and all later ones fail. At that moment the
    /// files of `tmpfs` are copied to `copy`, because a process that sees its disk fail removes them.
    pub fn cut_after(&self, changes: u64, tmpfs: &Path, copy: &Path) {
        let mut state = self.lock();
        state.changes_left = Some(changes);
        state.copy_at_cut = Some((tmpfs.to_owned(), copy.to_owned()));
    }

    /// Changing operations so far.
    pub fn changes(&self) -> u64 {
        self.lock().changes
    }

    /// Every sync fails from now on, or works again.
    pub fn fail_syncs(&self, fail: bool) {
        self.lock().fail_syncs = fail;
    }

    /// Reserving space fails from now on, or works again.
    pub fn set_full(&self, full: bool) {
        self.lock().full = full;
    }

    /// What is found after the power comes back: everything synced, and of the rest any part, chosen by `seed`.
    pub fn after_power_loss(&self, seed: u64) -> SimDisk {
        let mut rng = SmallRng::seed_from_u64(seed);
        let state = self.lock();
        let mut names = state.durable_names.clone();
        // A journalling file system keeps the order of name changes.
        let kept = rng.random_range(0..=state.name_changes.len());
        for change in &state.name_changes[..kept] {
            apply_name(&mut names, change);
        }
        let mut inodes = BTreeMap::new();
        for (number, inode) in &state.inodes {
            let mut image = inode.durable.clone();
            let keep_percent = [0, 50, 90, 100][rng.random_range(0..4)];
            for change in &inode.pending {
                if rng.random_range(0..100) < keep_percent {
                    apply(&mut image, change);
                }
            }
            inodes.insert(*number, Inode { seen: image.clone(), durable: image, pending: Vec::new() });
        }
        let next_inode = state.next_inode;
        SimDisk(Arc::new(Mutex::new(State {
            names: names.clone(),
            durable_names: names,
            inodes,
            next_inode,
            ..State::default()
        })))
    }

    /// What is found after all processes were killed: everything that was answered, the power stayed on.
    pub fn after_kill(&self) -> SimDisk {
        let state = self.lock();
        let copy = |inode: &Inode| Inode {
            seen: inode.seen.clone(),
            durable: inode.durable.clone(),
            pending: inode.pending.clone(),
        };
        SimDisk(Arc::new(Mutex::new(State {
            names: state.names.clone(),
            durable_names: state.durable_names.clone(),
            name_changes: state.name_changes.clone(),
            inodes: state.inodes.iter().map(|(number, inode)| (*number, copy(inode))).collect(),
            next_inode: state.next_inode,
            ..State::default()
        })))
    }

    /// Flips one bit of a file, as a disk that rots does.
    pub fn flip_bit(&self, path: &Path, byte: u64) {
        let mut state = self.lock();
        let Some(Node::File(number)) = state.names.get(path).copied() else { panic!("no file {path:?}") };
        let inode = state.inodes.get_mut(&number).unwrap();
        for image in [&mut inode.seen, &mut inode.durable] {
            let sector = image.sectors.entry(byte / SECTOR_BYTES).or_insert([0; SECTOR_BYTES as usize]);
            sector[usize::try_from(byte % SECTOR_BYTES).unwrap()] ^= 1;
        }
    }

    /// The state, unless the power is off.
    fn powered(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        if state.changes_left != Some(0) {
            return Ok(state);
        }
        if let Some((from, to)) = state.copy_at_cut.take() {
            copy_files(&from, &to);
        }
        Err(off())
    }

    fn change(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.powered()?;
        if let Some(left) = &mut state.changes_left {
            *left -= 1;
        }
        state.changes += 1;
        Ok(state)
    }

    /// The first change that meets the cut was under way: the power loss may leave any part of it.
    fn interrupted(&self) -> Option<MutexGuard<'_, State>> {
        let mut state = self.lock();
        (!std::mem::replace(&mut state.cut_met, true)).then_some(state)
    }

    fn change_names(&self, change: &NameChange) -> io::Result<()> {
        let mut state = self.change().inspect_err(|_| {
            if let Some(mut state) = self.interrupted() {
                state.name_changes.push(change.clone());
            }
        })?;
        apply_name(&mut state.names, change);
        state.name_changes.push(change.clone());
        Ok(())
    }

    pub fn create_dir(&self, path: &Path) -> io::Result<()> {
        if self.exists(path)? {
            Ok(())
        } else {
            self.change_names(&NameChange::Link(path.to_owned(), Node::Dir))
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "the real side can fail")]
    pub fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.lock().names.contains_key(path))
    }

    pub fn list(&self, path: &Path) -> io::Result<Vec<String>> {
        let state = self.lock();
        if !state.names.contains_key(path) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let children = state.names.keys().filter(|name| name.parent() == Some(path));
        Ok(children.map(|name| name.file_name().unwrap().to_string_lossy().into_owned()).collect())
    }

    pub fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.change_names(&NameChange::Rename(from.to_owned(), to.to_owned()))
    }

    pub fn remove_dir_all(&self, path: &Path) -> io::Result<()> {
        self.change_names(&NameChange::Unlink(path.to_owned()))
    }

    pub fn remove_file(&self, path: &Path) -> io::Result<()> {
        if self.exists(path)? { self.change_names(&NameChange::Unlink(path.to_owned())) } else { Ok(()) }
    }

    pub fn sync_dir(&self, _path: &Path) -> io::Result<()> {
        let mut state = self.change()?;
        if state.fail_syncs {
            return Err(off());
        }
        state.durable_names = state.names.clone();
        state.name_changes.clear();
        Ok(())
    }

    pub fn open(&self, path: &Path, mode: OpenMode) -> io::Result<SimFile> {
        let found = self.lock().names.get(path).copied();
        match (found, mode) {
            (Some(Node::File(inode)), OpenMode::Existing) => Ok(SimFile { disk: self.clone(), inode }),
            (None, OpenMode::New) => {
                let inode = {
                    let mut state = self.lock();
                    state.next_inode += 1;
                    let inode = state.next_inode;
                    // Also when the power goes meanwhile: the name may be there.
                    state.inodes.insert(inode, Inode::default());
                    inode
                };
                self.change_names(&NameChange::Link(path.to_owned(), Node::File(inode)))?;
                Ok(SimFile { disk: self.clone(), inode })
            }
            (Some(_), _) => Err(io::ErrorKind::AlreadyExists.into()),
            (None, OpenMode::Existing) => Err(io::ErrorKind::NotFound.into()),
        }
    }

    #[expect(clippy::unnecessary_wraps, reason = "the real side can fail")]
    pub fn free_bytes(&self) -> io::Result<u64> {
        Ok(if self.lock().full { 0 } else { 1 << 40 })
    }

    #[expect(clippy::unnecessary_wraps, reason = "the real side can fail")]
    pub fn used(&self, path: &Path) -> io::Result<Vec<FileUse>> {
        let state = self.lock();
        let files = state.names.iter().filter(|(name, _)| name.parent() == Some(path));
        let used = files.filter_map(|(_, node)| match node {
            Node::Dir => None,
            Node::File(number) => {
                let sectors = state.inodes.get(number).map_or(0, |inode| inode.seen.sectors.len() as u64);
                let links = state.names.values().filter(|other| *other == node).count() as u64;
                Some(FileUse { inode: *number, bytes: sectors * SECTOR_BYTES, links })
            }
        });
        Ok(used.collect())
    }

    pub fn hard_link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let node = self.lock().names.get(from).copied().ok_or(io::ErrorKind::NotFound)?;
        self.change_names(&NameChange::Link(to.to_owned(), node))
    }
}

impl SimFile {
    fn change(&self, changes: Vec<Change>, durable: bool) -> io::Result<()> {
        let mut state = self.disk.change().inspect_err(|_| {
            if let Some(mut state) = self.disk.interrupted() {
                let inode = state.inodes.get_mut(&self.inode).expect("an open file stays");
                inode.pending.extend(changes.iter().cloned());
            }
        })?;
        if durable && state.fail_syncs {
            return Err(off());
        }
        let inode = state.inodes.get_mut(&self.inode).expect("an open file stays");
        for change in changes {
            apply(&mut inode.seen, &change);
            if durable {
                // Earlier changes of the same place must not come over it later.
                inode.pending.retain(|old| match (old, &change) {
                    (Change::Sector(a, _), Change::Sector(b, _)) => a != b,
                    _ => true,
                });
                apply(&mut inode.durable, &change);
            } else {
                inode.pending.push(change);
            }
        }
        Ok(())
    }

    fn sectors(offset: u64, data: &[u8]) -> Vec<Change> {
        assert!(offset.is_multiple_of(4096) && data.len().is_multiple_of(4096), "direct I/O is aligned");
        let chunks = data.chunks(SECTOR_BYTES as usize).zip(offset / SECTOR_BYTES..);
        chunks.map(|(bytes, at)| Change::Sector(at, Some(Box::new(bytes.try_into().unwrap())))).collect()
    }

    #[expect(clippy::unnecessary_wraps, reason = "the real side can fail")]
    pub fn len_bytes(&self) -> io::Result<u64> {
        Ok(self.disk.lock().inodes[&self.inode].seen.len)
    }

    pub fn link_count(&self) -> u64 {
        let state = self.disk.lock();
        let links = state.names.values().filter(|node| matches!(node, Node::File(at) if *at == self.inode));
        links.count() as u64
    }

    pub fn set_len(&self, len: u64) -> io::Result<()> {
        self.change(vec![Change::Len(len)], false)
    }

    pub fn read(&self, offset: u64, buf: &mut [u8]) -> io::Result<()> {
        let state = self.disk.powered()?;
        let image = &state.inodes[&self.inode].seen;
        if offset + buf.len() as u64 > image.len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        for (bytes, at) in buf.chunks_mut(SECTOR_BYTES as usize).zip(offset / SECTOR_BYTES..) {
            bytes.copy_from_slice(image.sectors.get(&at).unwrap_or(&[0; SECTOR_BYTES as usize]));
        }
        Ok(())
    }

    pub fn write(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        let mut changes = Vec::new();
        let end = offset + data.len() as u64;
        if end > self.len_bytes()? {
            changes.push(Change::Len(end));
        }
        changes.extend(Self::sectors(offset, data));
        self.change(changes, false)
    }

    pub fn write_durable(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        self.change(Self::sectors(offset, data), true)
    }

    pub fn sync(&self) -> io::Result<()> {
        let mut state = self.disk.change()?;
        if state.fail_syncs {
            return Err(off());
        }
        let inode = state.inodes.get_mut(&self.inode).expect("an open file stays");
        inode.durable = inode.seen.clone();
        inode.pending.clear();
        Ok(())
    }

    pub fn punch(&self, offset: u64, len: u64) -> io::Result<()> {
        let sectors = offset / SECTOR_BYTES..(offset + len) / SECTOR_BYTES;
        self.change(sectors.map(|at| Change::Sector(at, None)).collect(), false)
    }

    pub fn allocate(&self) -> io::Result<()> {
        let state = self.disk.powered()?;
        if state.full { Err(io::Error::from_raw_os_error(nix::libc::ENOSPC)) } else { Ok(()) }
    }
}
