//! A client of a raw block device that remembers, per block, which contents a crash may leave.
//!
//! What is promised: a write that was answered survives the death of every process (it is in a replica's cache); one that
//! was followed by an answered flush survives a power cut of every replica too. A block that was being written may hold
//! old or new, by the sector, and nothing else. What was read after a crash stays.
//!
//! Each thread owns a range of blocks and does one thing at a time, so what it may read is known exactly.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use anyhow::{Context, Result, bail, ensure};
use nix::fcntl::FallocateFlags;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::direct_io::Aligned;

/// Bytes of a block.
pub const BLOCK_BYTES: usize = 4096;
const SECTOR_BYTES: usize = 512;
/// Sectors of a block.
const SECTORS: usize = BLOCK_BYTES / SECTOR_BYTES;
/// Blocks of the largest request.
const REQUEST_BLOCKS_MAX: usize = 64;
/// Threads, so requests in flight.
const THREADS: usize = 6;
/// Blocks that are read at once by a check.
const CHUNK_BLOCKS: usize = 256;
/// Wrong blocks that an error names.
const WRONG_SHOWN: usize = 5;
/// Starts every sector that is not all zeroes.
const MAGIC: u64 = 0x4846_424c_4f43_4b31;

/// What a crash took.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Crash {
    /// Processes died; the kernels under them kept what they had.
    Processes,
    /// Every replica's machine lost its power.
    Power,
}

/// Contents of a block: the version of each sector; 0 is zeroes.
type Content = [u64; SECTORS];

/// One block's history since it was last certain.
#[derive(Debug, Clone)]
struct Block {
    /// What it holds at least, after a power cut of all.
    flushed: Content,
    /// Versions that were begun since, oldest first.
    since: Vec<u64>,
    /// How many of them were answered; the first that many.
    answered: usize,
}

impl Block {
    /// Whether a sector may hold `version` after the crash.
    fn allows(&self, crash: Crash, sector: usize, version: u64) -> bool {
        let certain = match crash {
            Crash::Power => None,
            Crash::Processes => self.answered.checked_sub(1),
        };
        match certain {
            Some(last) => self.since[last..].contains(&version),
            None => self.flushed[sector] == version || self.since.contains(&version),
        }
    }

    fn begin(&mut self, version: u64) {
        // One whose answer never came may be there or not, for ever below the next.
        self.since.push(version);
    }

    fn answer(&mut self) {
        self.answered = self.since.len();
    }

    /// A flush that began after every answer so far was answered.
    fn flush(&mut self) {
        if let Some(last) = self.answered.checked_sub(1) {
            self.flushed = [self.since[last]; SECTORS];
            self.since.drain(..=last);
            self.answered = 0;
        }
    }

    fn settle(&mut self, content: Content) {
        *self = Self { flushed: content, since: Vec::new(), answered: 0 };
    }
}

/// What the client did and knows.
pub struct BlockLedger {
    blocks: Vec<Block>,
    next_version: u64,
    /// Writes, zeroes and flushes that were answered.
    pub requests: u64,
    /// Flushes among them.
    pub flushes: u64,
    /// Bytes that were read and compared.
    pub bytes_verified: u64,
}

/// What a check found.
#[derive(Debug, Default, Clone, Copy)]
pub struct Checked {
    /// Blocks whose last write was not flushed and is there all the same.
    pub unflushed_kept: u64,
    /// Blocks whose last write was not flushed and is gone, as it may.
    pub unflushed_lost: u64,
    /// Blocks with old and new sectors, as they may.
    pub torn: u64,
}

impl BlockLedger {
    /// For a volume that was never written.
    #[must_use]
    pub fn new(blocks: usize) -> Self {
        let fresh = Block { flushed: [0; SECTORS], since: Vec::new(), answered: 0 };
        Self { blocks: vec![fresh; blocks], next_version: 1, requests: 0, flushes: 0, bytes_verified: 0 }
    }

    /// Reads every block and compares it with what the crash may have left; what was read is certain from then on.
    ///
    /// # Errors
    /// A block cannot be read, or holds what it must not: the error names the first few.
    pub fn check(&mut self, device: &Path, crash: Crash) -> Result<Checked> {
        let file = open(device)?;
        let mut checked = Checked::default();
        let mut wrong = Vec::new();
        let mut buffer = Aligned::new(CHUNK_BLOCKS * BLOCK_BYTES);
        let count = self.blocks.len();
        for (chunk, first) in self.blocks.chunks_mut(CHUNK_BLOCKS).zip((0u64..).step_by(CHUNK_BLOCKS)) {
            let data = &mut buffer.bytes()[..chunk.len() * BLOCK_BYTES];
            file.read_exact_at(data, first * BLOCK_BYTES as u64)
                .with_context(|| format!("blocks from {first} on cannot be read"))?;
            self.bytes_verified += data.len() as u64;
            for ((block, data), number) in chunk.iter_mut().zip(data.chunks_exact(BLOCK_BYTES)).zip(first..) {
                match judge(number, block, data, crash, &mut checked) {
                    Ok(content) => block.settle(content),
                    Err(error) => wrong.push(format!("{error:#}")),
                }
            }
        }
        let shown = &wrong[..wrong.len().min(WRONG_SHOWN)];
        ensure!(wrong.is_empty(), "{} of {count} blocks are wrong: {}", wrong.len(), shown.join("; "));
        Ok(checked)
    }
}

/// Threads that write, zero, flush and read until they are stopped or the device fails.
pub struct BlockWork {
    threads: Vec<JoinHandle<Result<ThreadEnd>>>,
    stop: Arc<AtomicBool>,
    next_version: u64,
    requests: u64,
    flushes: u64,
    bytes_verified: u64,
}

impl BlockWork {
    /// Starts the threads on a device whose contents the ledger knows.
    ///
    /// # Errors
    /// The device cannot be opened.
    pub fn start(device: &Path, ledger: BlockLedger, seed: u64) -> Result<Self> {
        let BlockLedger { mut blocks, next_version, requests, flushes, bytes_verified } = ledger;
        let stop = Arc::new(AtomicBool::new(false));
        let per_thread = blocks.len().div_ceil(THREADS);
        let mut threads = Vec::new();
        let mut first = 0;
        while !blocks.is_empty() {
            let rest = blocks.split_off(blocks.len().min(per_thread));
            let count = blocks.len() as u64;
            let worker = Worker {
                file: open(device)?,
                first,
                blocks: std::mem::replace(&mut blocks, rest),
                random: StdRng::seed_from_u64(seed.wrapping_add(first)),
                version: next_version,
                buffer: Aligned::new(REQUEST_BLOCKS_MAX * BLOCK_BYTES),
                counts: Counts::default(),
            };
            let stop = Arc::clone(&stop);
            threads.push(std::thread::spawn(move || worker.run(&stop)));
            first += count;
        }
        Ok(Self { threads, stop, next_version, requests, flushes, bytes_verified })
    }

    /// Stops the threads and waits for what they have in flight; tells the device's error, if one ended them.
    ///
    /// # Errors
    /// A thread read what it must not while all was well.
    pub fn finish(self) -> Result<(BlockLedger, Option<std::io::Error>)> {
        self.stop.store(true, Ordering::SeqCst);
        let mut ledger = BlockLedger {
            blocks: Vec::new(),
            next_version: self.next_version,
            requests: self.requests,
            flushes: self.flushes,
            bytes_verified: self.bytes_verified,
        };
        let mut error = None;
        for thread in self.threads {
            let end = thread.join().map_err(|_| anyhow::anyhow!("a thread panicked"))??;
            ledger.blocks.extend(end.blocks);
            ledger.next_version = ledger.next_version.max(end.version);
            ledger.requests += end.counts.requests;
            ledger.flushes += end.counts.flushes;
            ledger.bytes_verified += end.counts.bytes_verified;
            error = error.or(end.error);
        }
        Ok((ledger, error))
    }
}

#[derive(Default)]
struct Counts {
    requests: u64,
    flushes: u64,
    bytes_verified: u64,
}

struct ThreadEnd {
    blocks: Vec<Block>,
    version: u64,
    counts: Counts,
    error: Option<std::io::Error>,
}

struct Worker {
    file: File,
    /// Number of its first block.
    first: u64,
    blocks: Vec<Block>,
    random: StdRng,
    version: u64,
    buffer: Aligned,
    counts: Counts,
}

impl Worker {
    fn run(mut self, stop: &AtomicBool) -> Result<ThreadEnd> {
        let mut error = None;
        while error.is_none() && !stop.load(Ordering::SeqCst) {
            error = self.step()?.err();
        }
        let Self { blocks, version, counts, .. } = self;
        Ok(ThreadEnd { blocks, version, counts, error })
    }

    /// One request. The inner result is the device's.
    fn step(&mut self) -> Result<std::io::Result<()>> {
        let start = self.random.random_range(0..self.blocks.len());
        let most = REQUEST_BLOCKS_MAX.min(self.blocks.len() - start);
        // Mostly small, now and then large.
        let bits = self.random.random_range(0..=REQUEST_BLOCKS_MAX.ilog2());
        let count = self.random.random_range(1..=most.min(1 << bits));
        let outcome = match self.random.random_range(0..100) {
            0..70 => self.write(start, count),
            70..80 => self.zero(start, count),
            80..92 => return self.read(start, count),
            _ => self.flush(),
        };
        self.counts.requests += u64::from(outcome.is_ok());
        Ok(outcome)
    }

    fn write(&mut self, start: usize, count: usize) -> std::io::Result<()> {
        self.version += 1;
        let data = &mut self.buffer.bytes()[..count * BLOCK_BYTES];
        for (data, number) in data.chunks_exact_mut(BLOCK_BYTES).zip(self.first + start as u64..) {
            fill(data, number, self.version);
        }
        self.blocks[start..start + count].iter_mut().for_each(|block| block.begin(self.version));
        self.file.write_all_at(data, (self.first + start as u64) * BLOCK_BYTES as u64)?;
        self.blocks[start..start + count].iter_mut().for_each(Block::answer);
        Ok(())
    }

    fn zero(&mut self, start: usize, count: usize) -> std::io::Result<()> {
        let mode = if self.random.random_bool(0.5) {
            FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE
        } else {
            FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE
        };
        let offset = (self.first + start as u64) * BLOCK_BYTES as u64;
        self.blocks[start..start + count].iter_mut().for_each(|block| block.begin(0));
        nix::fcntl::fallocate(&self.file, mode, offset.cast_signed(), (count * BLOCK_BYTES) as i64)?;
        self.blocks[start..start + count].iter_mut().for_each(Block::answer);
        Ok(())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.sync_data()?;
        self.counts.flushes += 1;
        self.blocks.iter_mut().for_each(Block::flush);
        Ok(())
    }

    /// Nobody else writes here and nothing is in flight: only the last answer may be read.
    fn read(&mut self, start: usize, count: usize) -> Result<std::io::Result<()>> {
        let data = &mut self.buffer.bytes()[..count * BLOCK_BYTES];
        if let Err(error) = self.file.read_exact_at(data, (self.first + start as u64) * BLOCK_BYTES as u64) {
            return Ok(Err(error));
        }
        let mut checked = Checked::default();
        for (index, data) in data.chunks_exact(BLOCK_BYTES).enumerate() {
            let (number, block) = (self.first + (start + index) as u64, &self.blocks[start + index]);
            judge(number, block, data, Crash::Processes, &mut checked).context("a read without a crash")?;
        }
        self.counts.bytes_verified += (count * BLOCK_BYTES) as u64;
        Ok(Ok(()))
    }
}

/// Reads a block's content and tells whether it may be there.
fn judge(number: u64, block: &Block, data: &[u8], crash: Crash, checked: &mut Checked) -> Result<Content> {
    let mut content = [0; SECTORS];
    for (sector, data) in data.chunks_exact(SECTOR_BYTES).enumerate() {
        content[sector] = read_sector(data, number, sector)?;
        if !block.allows(crash, sector, content[sector]) {
            bail!(
                "block {number} sector {sector} holds version {}; flushed was {}, written since {:?}, {} of them answered",
                content[sector],
                block.flushed[sector],
                block.since,
                block.answered
            );
        }
    }
    let torn = content.iter().any(|version| *version != content[0]) && content != block.flushed;
    checked.torn += u64::from(torn);
    if let Some(last) = block.since.last() {
        let kept = content.iter().all(|version| version == last);
        checked.unflushed_kept += u64::from(kept);
        checked.unflushed_lost += u64::from(!kept && !torn);
    }
    Ok(content)
}

/// Every sector tells its place and its version, and the rest follows from them.
fn fill(data: &mut [u8], number: u64, version: u64) {
    for (sector, data) in data.chunks_exact_mut(SECTOR_BYTES).enumerate() {
        data.copy_from_slice(&sector_bytes(number, sector as u64, version));
    }
}

fn sector_bytes(number: u64, sector: u64, version: u64) -> [u8; SECTOR_BYTES] {
    let mut bytes = [0; SECTOR_BYTES];
    let mut state = number ^ version.rotate_left(32) ^ sector.rotate_left(56);
    for (index, word) in bytes.chunks_exact_mut(8).enumerate() {
        let value = match index {
            0 => MAGIC,
            1 => number,
            2 => version,
            3 => sector,
            _ => {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                state
            }
        };
        word.copy_from_slice(&value.to_le_bytes());
    }
    bytes
}

fn read_sector(data: &[u8], number: u64, sector: usize) -> Result<u64> {
    if data.iter().all(|byte| *byte == 0) {
        return Ok(0);
    }
    let version = u64::from_le_bytes(data[16..24].try_into()?);
    ensure!(
        data == sector_bytes(number, sector as u64, version),
        "block {number} sector {sector} holds what was never written there: {:02x?}...",
        &data[..32]
    );
    Ok(version)
}

fn open(device: &Path) -> Result<File> {
    OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(device)
        .with_context(|| format!("cannot open {}", device.display()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_block(flushed: u64, since: &[u64], answered: usize) -> Block {
        Block { flushed: [flushed; SECTORS], since: since.to_vec(), answered }
    }

    #[test]
    fn killed_processes_may_not_lose_an_answered_write_and_a_power_cut_may_unless_it_was_flushed() {
        let mut block = mk_block(3, &[4, 5, 6], 2);
        let allowed =
            |block: &Block, crash| (0..9).filter(|v| block.allows(crash, 0, *v)).collect::<Vec<_>>();

        assert_eq!(allowed(&block, Crash::Processes), [5, 6]);
        assert_eq!(allowed(&block, Crash::Power), [3, 4, 5, 6]);

        block.flush();

        assert_eq!(allowed(&block, Crash::Processes), [5, 6]);
        assert_eq!(allowed(&block, Crash::Power), [5, 6]);
    }

    #[test]
    fn a_block_of_another_place_or_with_a_flipped_bit_is_wrong() {
        let mut data = vec![0; BLOCK_BYTES];
        fill(&mut data, 7, 2);
        let block = mk_block(2, &[], 0);
        let judged = |number, data: &[u8]| judge(number, &block, data, Crash::Power, &mut Checked::default());

        assert!(judged(7, &data).is_ok());
        assert!(judged(8, &data).is_err());
        data[4000] ^= 1;
        assert!(judged(7, &data).is_err());
    }
}
