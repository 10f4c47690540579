//! A client of a mounted file system that remembers which files it was told are safe.
//!
//! What is promised: a file whose `fsync` and whose folder's `fsync` were answered is there after any crash, whole; and
//! one that was safely removed stays away. Contents follow from the seed and the file's number, so nothing is kept.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};

/// Threads, each with a folder of its own.
const THREADS: u64 = 3;
/// Bytes of the largest file.
const FILE_BYTES_MAX: usize = 96 << 10;
/// Files that a thread keeps at most; then it removes one for each new one.
const FILES_MAX: usize = 60;

/// Whether a file is there for certain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Safe,
    /// It was being removed when the end came.
    Either,
}

/// What was written and is safe, by folder and number.
#[derive(Debug, Default)]
pub struct FileLedger {
    folders: Vec<BTreeMap<u64, Fate>>,
    seed: u64,
    next: u64,
    /// Files that were read back and compared.
    pub files_verified: u64,
    /// Their bytes.
    pub bytes_verified: u64,
    /// Answered `fsync`s of a file and its folder.
    pub syncs: u64,
}

/// Threads that write, sync, rename and remove files until they are stopped or the file system fails.
pub struct FileWork {
    threads: Vec<JoinHandle<Worker>>,
    stop: Arc<AtomicBool>,
    ledger: FileLedger,
}

impl FileLedger {
    /// For an empty file system.
    #[must_use]
    pub fn new(seed: u64) -> Self {
        Self { folders: vec![BTreeMap::new(); THREADS as usize], seed, ..Self::default() }
    }

    /// Reads every file that must be there.
    ///
    /// # Errors
    /// One is missing or damaged; the error names it.
    pub fn check(&mut self, root: &Path) -> Result<()> {
        for (thread, files) in self.folders.iter_mut().enumerate() {
            let folder = folder(root, thread as u64);
            let newest = files.keys().next_back().copied();
            for number in files.keys().copied().collect::<Vec<_>>() {
                let path = folder.join(name(number));
                let found = match fs::read(&path) {
                    Err(error)
                        if error.kind() == io::ErrorKind::NotFound && files[&number] == Fate::Either =>
                    {
                        files.remove(&number);
                        continue;
                    }
                    found => found.with_context(|| {
                        let newest =
                            newest.map(|newest| format!("; the newest is {newest}")).unwrap_or_default();
                        format!("the safe file {} is lost{newest}", path.display())
                    })?,
                };
                ensure!(found == content(self.seed, number), "the safe file {} is damaged", path.display());
                files.insert(number, Fate::Safe);
                self.files_verified += 1;
                self.bytes_verified += found.len() as u64;
            }
        }
        Ok(())
    }
}

impl FileWork {
    /// Starts the threads below `root`, the file system's mount point.
    #[must_use]
    pub fn start(root: &Path, mut ledger: FileLedger) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for (thread, files) in std::mem::take(&mut ledger.folders).into_iter().enumerate() {
            let thread = thread as u64;
            let worker = Worker {
                folder: folder(root, thread),
                files,
                seed: ledger.seed,
                number: ledger.next + thread,
                syncs: 0,
                error: None,
            };
            let stop = Arc::clone(&stop);
            threads.push(std::thread::spawn(move || worker.run(&stop)));
        }
        Self { threads, stop, ledger }
    }

    /// Stops the threads; tells the file system's error, if one ended them.
    ///
    /// # Errors
    /// A thread panicked.
    pub fn finish(self) -> Result<(FileLedger, Option<io::Error>)> {
        self.stop.store(true, Ordering::SeqCst);
        let Self { threads, mut ledger, .. } = self;
        let mut error = None;
        for thread in threads {
            let worker = thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))?;
            ledger.folders.push(worker.files);
            ledger.next = ledger.next.max(worker.number + THREADS);
            ledger.syncs += worker.syncs;
            error = error.or(worker.error);
        }
        Ok((ledger, error))
    }
}

struct Worker {
    folder: PathBuf,
    files: BTreeMap<u64, Fate>,
    seed: u64,
    number: u64,
    syncs: u64,
    error: Option<io::Error>,
}

impl Worker {
    fn run(mut self, stop: &AtomicBool) -> Self {
        while self.error.is_none() && !stop.load(Ordering::SeqCst) {
            self.error = self.step().err();
        }
        self
    }

    /// One new file, made safe by file sync, rename and folder sync; and an old one removed where there are many.
    fn step(&mut self) -> io::Result<()> {
        fs::create_dir_all(&self.folder)?;
        let number = self.number;
        self.number += THREADS;
        let temporary = self.folder.join("new");
        let mut file = File::create(&temporary)?;
        file.write_all(&content(self.seed, number))?;
        file.sync_all()?;
        fs::rename(&temporary, self.folder.join(name(number)))?;
        let oldest = self.files.keys().next().copied().filter(|_| self.files.len() >= FILES_MAX);
        if let Some(oldest) = oldest {
            self.files.insert(oldest, Fate::Either);
            fs::remove_file(self.folder.join(name(oldest)))?;
        }
        File::open(&self.folder)?.sync_all()?;
        // xfs answers a folder's fsync with success once it has given up on its log: what was pinned there is let go. A
        // file's fsync tells. On a machine without power nobody would have seen either answer.
        file.sync_all()?;
        self.syncs += 1;
        self.files.insert(number, Fate::Safe);
        if let Some(oldest) = oldest {
            self.files.remove(&oldest);
        }
        Ok(())
    }
}

fn folder(root: &Path, thread: u64) -> PathBuf {
    root.join(format!("thread-{thread}"))
}

fn name(number: u64) -> String {
    format!("file-{number}")
}

fn content(seed: u64, number: u64) -> Vec<u8> {
    let mut random = StdRng::seed_from_u64(seed.wrapping_add(number));
    let mut bytes = vec![0; random.random_range(1..FILE_BYTES_MAX)];
    random.fill_bytes(&mut bytes);
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_safe_file_that_is_missing_or_changed_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let work = FileWork::start(dir.path(), FileLedger::new(1));
        std::thread::sleep(std::time::Duration::from_millis(100));
        let (mut ledger, error) = work.finish().unwrap();
        assert!(error.is_none() && ledger.syncs > 0);
        ledger.check(dir.path()).unwrap();
        let number = *ledger.folders[1].keys().next().unwrap();
        let path = folder(dir.path(), 1).join(name(number));
        let mut bytes = fs::read(&path).unwrap();

        bytes[0] ^= 1;
        fs::write(&path, &bytes).unwrap();
        assert!(format!("{:#}", ledger.check(dir.path()).unwrap_err()).contains("damaged"));

        fs::remove_file(&path).unwrap();
        assert!(format!("{:#}", ledger.check(dir.path()).unwrap_err()).contains("lost"));
    }
}
