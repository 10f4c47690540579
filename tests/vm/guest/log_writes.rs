//! A replica on ext4 on a device whose every write is logged; then the device as it was at each flush, and the replica
//! opened on it as after a power cut.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use holdfast_io::AlignedBuf;
use holdfast_storage_core::ids::{BLOCK_BYTES, Epoch, Lineage, Region, ReplicaId, VolumeId};
use holdfast_storage_core::replica::ReplicaMeta;
use holdfast_store::{Done, Pool, PoolOptions, Replica, StoreError};
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::log::{self, Entry};
use super::sh;

/// Bytes of the disk under the pool.
const DISK_BYTES: usize = 64 << 20;
const VOLUME_BYTES: u64 = 8 << 20;
const VOLUME_BLOCKS: usize = 2048;
/// Flushes of the workload, each after so many writes at most.
const FLUSHES: usize = 8;
const WRITES_MAX: usize = 40;
/// Of so many flush or FUA points between two marks one is checked, beside every mark.
const SAMPLE_ONE_IN: u32 = 12;
const REPLICA: ReplicaId = ReplicaId(7);

/// What the client knows: the version of every block at each answered flush, and what it wrote after it.
#[derive(Default)]
struct History {
    flushed: Vec<Vec<u64>>,
    written_after: Vec<Vec<(usize, u64)>>,
}

/// Every point of the log at which the device promised durability is opened and compared.
pub fn keeps_what_was_flushed() -> Result<()> {
    let (history, entries) = record()?;
    let mut random = StdRng::seed_from_u64(1);
    let (mut image, mut mark, mut points, mut blocks) = (vec![0; DISK_BYTES], None, 0, 0);
    for entry in &entries {
        let durable = apply(&mut image, entry, &mut mark)?;
        let Some(number) = mark else { continue };
        let is_mark = matches!(entry, Entry::Mark(_));
        if is_mark || (durable && random.random_ratio(1, SAMPLE_ONE_IN)) {
            blocks += check(&image, &history, number)
                .with_context(|| format!("point {points}, after flush {number}"))?;
            points += 1;
        }
    }
    println!("VM: {} entries, {points} points opened, {blocks} blocks compared", entries.len());
    ensure!(points >= FLUSHES, "only {points} points: no test");
    Ok(())
}

/// The same check on a device that dropped what was written between two of the flushes that it answered.
pub fn notices_dropped_writes() -> Result<()> {
    let (history, entries) = record()?;
    let (mut image, mut mark) = (vec![0; DISK_BYTES], None);
    let before_last = FLUSHES - 2;
    for entry in &entries {
        if mark == Some(before_last) && !matches!(entry, Entry::Mark(_)) {
            continue;
        }
        apply(&mut image, entry, &mut mark)?;
        if mark == Some(before_last + 1) {
            break;
        }
    }
    let Err(error) = check(&image, &history, before_last + 1) else {
        bail!("the check did not notice that flushed writes were dropped")
    };
    println!("VM: noticed: {error:#}");
    ensure!(format!("{error:#}").contains("holds version"), "noticed for another reason");
    Ok(())
}

/// Runs the workload on the logged device and reads the log.
fn record() -> Result<(History, Vec<Entry>)> {
    let sectors = DISK_BYTES / 512;
    let table = format!("0 {sectors} log-writes /dev/ram0 /dev/ram1");
    sh("dmsetup", &["create", "logged", "--noudevrules", "--noudevsync", "--table", &table])?;
    // No udev here: the kernel's own name for the first mapped device.
    let device = "/dev/dm-0";
    sh("mkfs.ext4", &["-q", "-E", "nodiscard", device])?;
    sh("mount", &["-t", "ext4", device, "/pool"])?;
    let pool = open_pool("first")?;
    let epoch = Epoch { number: 1, nonce: 2 };
    pool.create_replica(&ReplicaMeta::new(VolumeId(1), REPLICA, Lineage(1), VOLUME_BYTES, epoch))?;
    let replica = pool.open_replica(REPLICA)?;
    let history = write_and_flush(&replica)?;
    ask(|done| replica.close(done))?;
    drop(replica);
    drop(pool);
    sh("umount", &["/pool"])?;
    sh("dmsetup", &["remove", "--noudevsync", "logged"])?;
    Ok((history, log::read(Path::new("/dev/ram1"))?))
}

fn write_and_flush(replica: &Replica) -> Result<History> {
    let mut random = StdRng::seed_from_u64(2);
    let mut now = vec![0u64; VOLUME_BLOCKS];
    let mut history = History::default();
    let mut version = 0;
    for flush in 0..FLUSHES {
        let mut written = Vec::new();
        for _ in 0..random.random_range(1..=WRITES_MAX) {
            let block = random.random_range(0..VOLUME_BLOCKS);
            version += 1;
            let offset = block as u64 * BLOCK_BYTES;
            let region = Region(u32::try_from(offset >> 20)?);
            ask(|done| replica.log_add(&[region], done))?;
            let data = AlignedBuf::copy_of(&content(block, version)).into_bytes();
            ask(|done| replica.write(offset, data, false, done))?;
            now[block] = version;
            written.push((block, version));
        }
        if let Some(last) = history.written_after.last_mut() {
            *last = written;
        }
        ask(|done| replica.flush(done))?;
        history.flushed.push(now.clone());
        history.written_after.push(Vec::new());
        sh("dmsetup", &["message", "logged", "0", "mark", &format!("flush-{flush}")])?;
        if random.random_bool(0.3) {
            // What the target does after a flush of all members (R18).
            let all: Vec<Region> = (0..u32::try_from(VOLUME_BYTES >> 20)?).map(Region).collect();
            ask(|done| replica.log_remove(&all, done))?;
        }
    }
    Ok(history)
}

/// Applies one entry; tells whether it promised durability.
fn apply(image: &mut [u8], entry: &Entry, mark: &mut Option<usize>) -> Result<bool> {
    match entry {
        Entry::Write { offset, data, durable } => {
            let start = usize::try_from(*offset)?;
            image.get_mut(start..start + data.len()).context("a write past the disk")?.copy_from_slice(data);
            Ok(*durable)
        }
        Entry::Discard { offset, bytes } => {
            let start = usize::try_from(*offset)?;
            image
                .get_mut(start..start + usize::try_from(*bytes)?)
                .context("a discard past the disk")?
                .fill(0);
            Ok(false)
        }
        Entry::Mark(text) => {
            if let Some(number) = text.strip_prefix("flush-") {
                *mark = Some(number.parse()?);
            }
            Ok(true)
        }
    }
}

/// Opens the replica on the image as after a power cut and compares every block.
fn check(image: &[u8], history: &History, flush: usize) -> Result<usize> {
    let disk = File::options().write(true).open("/dev/ram2")?;
    disk.write_all_at(image, 0)?;
    disk.sync_all()?;
    sh("mount", &["-t", "ext4", "/dev/ram2", "/pool"])?;
    let compared = compare(history, flush);
    sh("umount", &["/pool"])?;
    compared
}

fn compare(history: &History, flush: usize) -> Result<usize> {
    // Another memory than the one that the writer's cookie was in.
    let pool = open_pool("second")?;
    let replica = pool.open_replica(REPLICA).context("the replica does not open")?;
    let after = &history.written_after[flush];
    for (block, flushed) in history.flushed[flush].iter().enumerate() {
        let since: Vec<u64> =
            after.iter().filter(|(written, _)| *written == block).map(|(_, version)| *version).collect();
        let offset = block as u64 * BLOCK_BYTES;
        match ask(|done| replica.read(offset, u32::try_from(BLOCK_BYTES).unwrap_or(0), done)) {
            Ok(data) => {
                let version = u64::from_le_bytes(data[8..16].try_into()?);
                let whole = if version == 0 { vec![0; data.len()] } else { content(block, version) };
                ensure!(data == whole, "block {block} holds what was never written");
                ensure!(
                    version == *flushed || since.contains(&version),
                    "block {block} holds version {version}, flushed was {flushed}, written since {since:?}"
                );
            }
            // Unflushed and in a logged region: the protocol never takes it for a source (R32).
            Err(StoreError::Checksum { .. }) if !since.is_empty() => {}
            Err(error) => bail!("block {block}, flushed as {flushed} and not written since: {error}"),
        }
    }
    ask(|done| replica.close(done))?;
    Ok(VOLUME_BLOCKS)
}

fn open_pool(memory: &str) -> Result<Pool> {
    let options = PoolOptions {
        capacity_bytes: DISK_BYTES as u64,
        reserve_bytes: 0,
        cookie_dir: Some(Path::new("/dev/shm").join(memory)),
        lock_wait: Duration::from_secs(10),
    };
    Pool::open(Path::new("/pool/pool"), options).context("the pool does not open")
}

fn content(block: usize, version: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    while bytes.len() < BLOCK_BYTES as usize {
        bytes.extend((block as u64).to_le_bytes());
        bytes.extend(version.to_le_bytes());
    }
    bytes
}

fn ask<T: Send + 'static>(call: impl FnOnce(Done<T>)) -> Result<T, StoreError> {
    let (sender, receiver) = std::sync::mpsc::channel();
    call(Box::new(move |result| drop(sender.send(result))));
    receiver.recv_timeout(Duration::from_secs(60)).expect("an answer within 60 s")
}
