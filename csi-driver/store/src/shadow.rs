//! The shadow: checksums and states of unflushed blocks, kept in tmpfs beside the cookie.
//!
//! Data goes to the disk when it is written, its checksum only with the next flush. A process that is killed in between
//! would find new data under an old checksum, or a block that is "absent" though its write was acknowledged. So every
//! entry is also appended to a file in tmpfs before its write is answered, and replayed when the replica is opened.
//! The file lives exactly as long as the cookie: a power loss takes both, and then the replica has lost its cache (R19).
//!
//! ```text
//!  segment: ├ magic 8 ┼ sequence 8 ┼ layer 4 ┼ 0 4 ┤ then records: ├ block 8 (state in the top byte) ┼ sum 4 ┼ crc32c 4 ┤
//! ```
//!
//! There are two segments. A flush switches to the other one when it collects the tables, and empties the old one once
//! they are durable. Replay takes the lower sequence first. A segment names the layer whose entries it holds: a freeze
//! leaves none behind, and a segment that could not be emptied must not be taken for the new layer's.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use holdfast_storage_core::ids::ReplicaId;

use crate::sealed::{u32_at, u64_at};
use crate::tables::{Entry, State};

const MAGIC: &[u8; 8] = b"HFSHADO2";
const HEAD_BYTES: u64 = 24;
const RECORD_BYTES: usize = 16;
/// A segment of this length asks for a flush: 1 GiB was written since the last one.
const FLUSH_AT_BYTES: u64 = 4 << 20;
/// At this length the flush does not keep up: the shadow is given up, and with it the cookie, until the next flush ends.
const SEGMENT_BYTES_MAX: u64 = 64 << 20;

/// Blocks with their entries, oldest first.
type Records = Vec<(u64, Entry)>;

/// The shadow of one open replica.
#[derive(Debug)]
pub struct Shadow {
    /// None where there is no cookie folder: every start counts as a lost cache then.
    segments: Option<Segments>,
}

#[derive(Debug)]
struct Segments {
    paths: [PathBuf; 2],
    files: [File; 2],
    current: usize,
    sequence: u64,
    layer: u32,
    len: u64,
    buffer: Vec<u8>,
}

/// What an append asks of its caller.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Appended {
    /// Nothing.
    Fine,
    /// Start a flush soon.
    FlushSoon,
    /// The entries are not kept: the cookie's copy must go before the write is answered.
    Lost,
}

impl Shadow {
    /// Opens the shadow and gives what it holds of `layer`, oldest first. Leftovers of two segments are merged into one.
    /// An error of kind `InvalidData` says that a segment has another format: what it held is lost.
    pub fn open(dir: Option<&Path>, replica: ReplicaId, layer: u32) -> io::Result<(Self, Records)> {
        let Some(dir) = dir else { return Ok((Self { segments: None }, Vec::new())) };
        let paths = segment_paths(dir, replica);
        let mut found = Vec::new();
        for path in &paths {
            found.extend(read_segment(path, layer)?);
        }
        found.sort_by_key(|(sequence, _)| *sequence);
        // Higher than both: should the second segment outlive a kill here, it is replayed before what contains it.
        let sequence = found.last().map_or(0, |(sequence, _)| *sequence) + 1;
        let records: Records = found.into_iter().flat_map(|(_, records)| records).collect();
        let mut buffer = header(sequence, layer);
        for (block, entry) in &records {
            push_record(&mut buffer, *block, *entry);
        }
        // Whole or not at all: a kill here leaves the two segments as they were.
        let new = dir.join(format!("{replica}.sums.new"));
        let merged = create(&new)?;
        merged.write_all_at(&buffer, 0)?;
        std::fs::rename(&new, &paths[0])?;
        let other = create(&paths[1])?;
        let segments = Segments {
            paths,
            files: [merged, other],
            current: 0,
            sequence,
            layer,
            len: buffer.len() as u64,
            buffer: Vec::new(),
        };
        Ok((Self { segments: Some(segments) }, records))
    }

    /// Keeps entries beyond this process's life. The caller answers its write afterwards.
    pub fn append(&mut self, entries: impl Iterator<Item = (u64, Entry)>) -> Appended {
        let Some(segments) = &mut self.segments else { return Appended::Fine };
        segments.buffer.clear();
        for (block, entry) in entries {
            push_record(&mut segments.buffer, block, entry);
        }
        let added = segments.buffer.len() as u64;
        if segments.len + added > SEGMENT_BYTES_MAX {
            tracing::warn!("flushes do not keep up with writes: a killed process would lose its write cache");
            return Appended::Lost;
        }
        if let Err(error) = segments.files[segments.current].write_all_at(&segments.buffer, segments.len) {
            tracing::warn!(%error, "checksums cannot be kept in tmpfs: a killed process would lose its write cache");
            return Appended::Lost;
        }
        let before = segments.len;
        segments.len += added;
        if before < FLUSH_AT_BYTES && segments.len >= FLUSH_AT_BYTES {
            Appended::FlushSoon
        } else {
            Appended::Fine
        }
    }

    /// A flush collects the tables: what is appended from now on is not in it.
    pub fn switch(&mut self) {
        let Some(segments) = &mut self.segments else { return };
        segments.current = 1 - segments.current;
        segments.sequence += 1;
        let file = &segments.files[segments.current];
        let header = header(segments.sequence, segments.layer);
        segments.len = HEAD_BYTES;
        if let Err(error) = file.set_len(0).and_then(|()| file.write_all_at(&header, 0)) {
            tracing::warn!(%error, "a segment of unflushed checksums cannot be begun");
            // Appends will fail as well, and report the loss.
            segments.len = SEGMENT_BYTES_MAX;
        }
    }

    /// From now on another layer takes the writes. Everything of the one before is durable.
    pub fn set_layer(&mut self, layer: u32) {
        if let Some(segments) = &mut self.segments {
            segments.layer = layer;
        }
        self.switch();
        self.drop_old();
    }

    /// The flush that switched is durable: what was appended before is on the disk.
    pub fn drop_old(&mut self) {
        let Some(segments) = &mut self.segments else { return };
        if let Err(error) = segments.files[1 - segments.current].set_len(0) {
            // Replaying it again is harmless until its blocks change, and later records come after it.
            tracing::warn!(%error, "a segment of flushed checksums cannot be emptied");
        }
    }

    /// The handle is poisoned: nothing here may be replayed.
    pub fn remove(&mut self) {
        if let Some(segments) = self.segments.take() {
            for path in &segments.paths {
                let _ = std::fs::remove_file(path);
            }
        }
    }
}

/// Removes the shadow of a deleted replica.
pub fn remove_files(dir: Option<&Path>, replica: ReplicaId) {
    for path in dir.iter().flat_map(|dir| segment_paths(dir, replica)) {
        let _ = std::fs::remove_file(path);
    }
}

fn segment_paths(dir: &Path, replica: ReplicaId) -> [PathBuf; 2] {
    [0, 1].map(|number| dir.join(format!("{replica}.sums-{number}")))
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(path)
}

fn header(sequence: u64, layer: u32) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend(sequence.to_le_bytes());
    bytes.extend(layer.to_le_bytes());
    bytes.extend([0; 4]);
    bytes
}

fn push_record(bytes: &mut Vec<u8>, block: u64, entry: Entry) {
    let at = bytes.len();
    bytes.extend((block | (entry.state as u64) << 56).to_le_bytes());
    bytes.extend(entry.sum.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[at..]);
    bytes.extend(crc.to_le_bytes());
}

/// A segment's sequence and records if they are of `layer`, up to the first one that is not whole: a kill may cut an append short, before its
/// write was answered.
fn read_segment(path: &Path, layer: u32) -> io::Result<Option<(u64, Records)>> {
    let bytes = match std::fs::read(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        other => other?,
    };
    if bytes.get(..8).is_some_and(|magic| magic != MAGIC) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "unflushed checksums of another format"));
    }
    if bytes.len() < HEAD_BYTES as usize || u32_at(&bytes, 16) != layer {
        return Ok(None);
    }
    let records = bytes[HEAD_BYTES as usize..].chunks_exact(RECORD_BYTES);
    let whole = records.take_while(|record| crc32c::crc32c(&record[..12]) == u32_at(record, 12));
    let entries = whole.map(|record| {
        let block = u64_at(record, 0);
        let state = State::from_bits((block >> 56) as u8);
        (block & !(0xff << 56), Entry { state, sum: u32_at(record, 8) })
    });
    Ok(Some((u64_at(&bytes, 8), entries.collect())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_not_flushed_is_replayed_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let replica = ReplicaId(1);
        let (mut shadow, found) = Shadow::open(Some(dir.path()), replica, 0).unwrap();
        assert_eq!(found, []);
        shadow.append([(1, Entry::data(10)), (2, Entry::data(20))].into_iter());
        shadow.switch();
        shadow.append([(1, Entry::zero(true))].into_iter());
        let (again, found) = Shadow::open(Some(dir.path()), replica, 0).unwrap();
        assert_eq!(found, [(1, Entry::data(10)), (2, Entry::data(20)), (1, Entry::zero(true))]);
        drop(again);
        let (mut merged, found) = Shadow::open(Some(dir.path()), replica, 0).unwrap();
        assert_eq!(found.len(), 3, "merging loses nothing");
        merged.switch();
        merged.append([(3, Entry::data(30))].into_iter());
        merged.drop_old();
        let (mut last, found) = Shadow::open(Some(dir.path()), replica, 0).unwrap();
        assert_eq!(found, [(3, Entry::data(30))]);
        last.remove();
        assert_eq!(Shadow::open(Some(dir.path()), replica, 0).unwrap().1, []);
    }

    #[test]
    fn a_kill_during_the_merge_leaves_the_newest_record_last() {
        let dir = tempfile::tempdir().unwrap();
        let replica = ReplicaId(1);
        let (mut shadow, _) = Shadow::open(Some(dir.path()), replica, 0).unwrap();
        shadow.switch();
        shadow.append([(1, Entry::data(10))].into_iter());
        // The flush of segment 1's records is under way while segment 0 takes new ones.
        shadow.switch();
        shadow.append([(1, Entry::data(11))].into_iter());
        let second = dir.path().join(format!("{replica}.sums-1"));
        let left_by_the_kill = std::fs::read(&second).unwrap();
        drop(Shadow::open(Some(dir.path()), replica, 0).unwrap());
        std::fs::write(&second, left_by_the_kill).unwrap();
        let (_, found) = Shadow::open(Some(dir.path()), replica, 0).unwrap();
        assert_eq!(found.last(), Some(&(1, Entry::data(11))));
    }

    #[test]
    fn an_append_cut_short_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let (mut shadow, _) = Shadow::open(Some(dir.path()), ReplicaId(1), 0).unwrap();
        shadow.append([(1, Entry::data(10)), (2, Entry::data(20))].into_iter());
        let path = dir.path().join(format!("{}.sums-0", ReplicaId(1)));
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(HEAD_BYTES + 2 * RECORD_BYTES as u64 - 3).unwrap();
        assert_eq!(Shadow::open(Some(dir.path()), ReplicaId(1), 0).unwrap().1, [(1, Entry::data(10))]);
    }

    #[test]
    fn what_one_layer_left_is_not_taken_for_another_ones() {
        let dir = tempfile::tempdir().unwrap();
        let replica = ReplicaId(1);
        let (mut shadow, _) = Shadow::open(Some(dir.path()), replica, 4).unwrap();
        shadow.append([(1, Entry::data(10))].into_iter());
        let left = std::fs::read(dir.path().join(format!("{replica}.sums-0"))).unwrap();
        shadow.set_layer(5);
        shadow.append([(2, Entry::data(20))].into_iter());
        // A segment that could not be emptied.
        std::fs::write(dir.path().join(format!("{replica}.sums-0")), left).unwrap();
        assert_eq!(Shadow::open(Some(dir.path()), replica, 5).unwrap().1, [(2, Entry::data(20))]);
    }

    #[test]
    fn a_segment_of_another_format_is_told() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join(format!("{}.sums-1", ReplicaId(1))), b"HFSHADOW and more").unwrap();
        let opened = Shadow::open(Some(dir.path()), ReplicaId(1), 0);
        assert_eq!(opened.unwrap_err().kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn long_segments_ask_for_a_flush_once() {
        let dir = tempfile::tempdir().unwrap();
        let (mut shadow, _) = Shadow::open(Some(dir.path()), ReplicaId(1), 0).unwrap();
        let mut answers = Vec::new();
        for _ in 0..=FLUSH_AT_BYTES / (256 * RECORD_BYTES as u64) {
            answers.push(shadow.append((0..256).map(|block| (block, Entry::data(1)))));
        }
        assert_eq!(answers.iter().filter(|answer| **answer == Appended::FlushSoon).count(), 1);
        assert!(!answers.contains(&Appended::Lost));
    }
}
