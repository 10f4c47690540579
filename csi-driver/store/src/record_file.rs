//! `record`: the copy of the volume's record that the replica keeps (ADR 0011), replaced whole by rename.
//!
//! Payload: replica_id 16, lineage 16, generation 8, version 8, then the record as JSON, which is not looked into. The page
//! is as many pages long as the payload needs.
//!
//! 1. Write `record.new` and sync it: a crash leaves a file that the next copy replaces.
//! 2. Rename it to `record`, sync the folder: a crash leaves the old copy or the new one.
//!
//! A copy that cannot be read says nothing and keeps nothing from working: the next one takes its place.

use std::io;
use std::path::{Path, PathBuf};

use holdfast_io::{AlignedBuf, OpenMode};
use holdfast_storage_core::ids::{Generation, Lineage, RecordVersion, ReplicaId};
use holdfast_storage_core::record_copy::{CopyStamp, RecordCopy};

use crate::disk::Disk;
use crate::error::PoolError;
use crate::layout::PAGE_BYTES;
use crate::manifest::bad_page;
use crate::sealed::{FRAME_BYTES, seal, u64_at, u128_at, unseal};

const MAGIC: &[u8; 8] = b"HFRECORD";
const VERSION: u32 = 1;
const HEAD_BYTES: usize = 48;
const FILE: &str = "record";
pub(crate) const NEW_FILE: &str = "record.new";
/// Bytes of the largest file that is read: far above what a store takes for a record.
const FILE_BYTES_MAX: u64 = 64 << 20;

/// The file of an open replica, knowing what is in it.
#[derive(Debug)]
pub struct RecordFile {
    disk: Disk,
    dir: PathBuf,
    replica: ReplicaId,
    kept: Option<CopyStamp>,
}

impl RecordFile {
    /// Looks at what is there.
    pub fn open(disk: &Disk, dir: &Path, replica: ReplicaId) -> Self {
        let kept = read(disk, dir, replica).unwrap_or_else(|error| {
            tracing::warn!(%replica, %error, "the copy of the record cannot be read; the next one replaces it");
            None
        });
        Self { disk: disk.clone(), dir: dir.to_owned(), replica, kept: kept.map(|copy| copy.stamp) }
    }

    /// Makes a copy durable, unless the one that is there is as new. After an error the old one or the new one is there.
    pub fn keep(&mut self, copy: &RecordCopy) -> io::Result<()> {
        if !copy.stamp.replaces(self.kept.as_ref()) {
            return Ok(());
        }
        let new = self.dir.join(NEW_FILE);
        self.disk.remove_file(&new)?;
        let file = self.disk.open(&new, OpenMode::New)?;
        file.write_now(0, &page_of(self.replica, copy))?;
        file.sync_now()?;
        self.disk.rename(&new, &self.dir.join(FILE))?;
        self.disk.sync_dir(&self.dir)?;
        self.kept = Some(copy.stamp);
        Ok(())
    }
}

/// The copy in a replica's folder; none: no record was kept yet.
pub fn read(disk: &Disk, dir: &Path, replica: ReplicaId) -> Result<Option<RecordCopy>, PoolError> {
    let path = dir.join(FILE);
    if !disk.exists(&path).map_err(PoolError::io("examining", &path))? {
        return Ok(None);
    }
    let corrupt = |what: &str| PoolError::Corrupt { path: path.clone(), what: what.to_owned() };
    let file = disk.open(&path, OpenMode::Existing).map_err(PoolError::io("opening", &path))?;
    let found_bytes = file.len_bytes().map_err(PoolError::io("reading", &path))?;
    let expected_bytes = PAGE_BYTES as u64;
    if found_bytes < expected_bytes || !found_bytes.is_multiple_of(expected_bytes) {
        return Err(PoolError::Truncated { path, found_bytes, expected_bytes });
    }
    let len = usize::try_from(found_bytes).ok().filter(|_| found_bytes <= FILE_BYTES_MAX);
    let len = len.ok_or_else(|| corrupt("it is far too long"))?;
    let page = file.read_now(0, len).map_err(PoolError::io("reading", &path))?;
    let payload = unseal(MAGIC, VERSION, &page).map_err(|bad| bad_page(&path, VERSION, &bad))?;
    if payload.len() < HEAD_BYTES {
        return Err(corrupt("its payload is too short"));
    }
    if ReplicaId(u128_at(payload, 0)) != replica {
        return Err(corrupt("it belongs to another replica"));
    }
    let stamp = CopyStamp {
        lineage: Lineage(u128_at(payload, 16)),
        generation: Generation(u64_at(payload, 32)),
        version: RecordVersion(u64_at(payload, 40)),
    };
    Ok(Some(RecordCopy { stamp, json: payload[HEAD_BYTES..].into() }))
}

fn page_of(replica: ReplicaId, copy: &RecordCopy) -> AlignedBuf {
    let mut payload = replica.0.to_le_bytes().to_vec();
    payload.extend(copy.stamp.lineage.0.to_le_bytes());
    payload.extend(copy.stamp.generation.0.to_le_bytes());
    payload.extend(copy.stamp.version.0.to_le_bytes());
    payload.extend_from_slice(&copy.json);
    let mut page = AlignedBuf::zeroed((FRAME_BYTES + payload.len()).next_multiple_of(PAGE_BYTES));
    seal(MAGIC, VERSION, &payload, &mut page);
    page
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::disk::sim::SimDisk;

    const REPLICA: ReplicaId = ReplicaId(3);
    const DIR: &str = "/pool/replicas/3";

    /// Longer than a page, and another text for each version.
    fn mk_copy(version: u64) -> RecordCopy {
        let stamp =
            CopyStamp { lineage: Lineage(1), generation: Generation(1), version: RecordVersion(version) };
        let json = format!("{{\"version\":{version}}}").repeat(400);
        RecordCopy { stamp, json: json.into_bytes().into() }
    }

    fn mk_disk() -> SimDisk {
        let disk = SimDisk::default();
        disk.create_dir(Path::new(DIR)).unwrap();
        disk
    }

    fn found(disk: &SimDisk) -> Result<Option<RecordCopy>, PoolError> {
        read(&Disk::Sim(disk.clone()), Path::new(DIR), REPLICA)
    }

    /// Keeps versions 1 to 4, and tells how many were answered.
    fn workload(disk: &SimDisk) -> u64 {
        let mut file = RecordFile::open(&Disk::Sim(disk.clone()), Path::new(DIR), REPLICA);
        (1..=4).take_while(|version| file.keep(&mk_copy(*version)).is_ok()).count() as u64
    }

    #[test]
    fn after_a_cut_at_any_change_a_whole_copy_is_there_and_none_that_was_answered_is_lost() {
        let whole = mk_disk();
        let before = mk_disk().changes();
        assert_eq!(workload(&whole), 4);
        assert!(whole.changes() - before > 12, "each copy is some changes");
        for cut in before..whole.changes() {
            let (disk, tmpfs) = (mk_disk(), tempfile::tempdir().unwrap());
            disk.cut_after(cut, tmpfs.path(), tmpfs.path());
            let answered = workload(&disk);
            for after in [disk.after_kill(), disk.after_power_loss(cut), disk.after_power_loss(cut + 1_000)] {
                let kept = found(&after).unwrap_or_else(|error| panic!("cut {cut}: {error}"));
                let version = kept.as_ref().map_or(0, |copy| copy.stamp.version.0);
                assert!((answered..=answered + 1).contains(&version), "cut {cut}: {version} of {answered}");
                assert!(kept.is_none_or(|copy| copy == mk_copy(version)), "cut {cut}");
                // Whatever is there, the next copy takes its place.
                let mut file = RecordFile::open(&Disk::Sim(after.clone()), Path::new(DIR), REPLICA);
                file.keep(&mk_copy(9)).unwrap();
                assert_eq!(found(&after).unwrap(), Some(mk_copy(9)));
            }
        }
    }

    #[test]
    fn an_older_copy_that_comes_late_changes_nothing_and_one_that_rotted_is_replaced() {
        let disk = mk_disk();
        let path = Path::new(DIR).join(FILE);
        let mut file = RecordFile::open(&Disk::Sim(disk.clone()), Path::new(DIR), REPLICA);
        file.keep(&mk_copy(5)).unwrap();
        file.keep(&mk_copy(4)).unwrap();
        assert_eq!(found(&disk).unwrap(), Some(mk_copy(5)));
        let mut again = RecordFile::open(&Disk::Sim(disk.clone()), Path::new(DIR), REPLICA);
        again.keep(&mk_copy(4)).unwrap();
        assert_eq!(found(&disk).unwrap(), Some(mk_copy(5)), "also after a restart");
        let other = read(&Disk::Sim(disk.clone()), Path::new(DIR), ReplicaId(4));
        assert!(matches!(other, Err(PoolError::Corrupt { .. })), "{other:?}");
        for byte in [0, 9, 30, 70, 5_000] {
            disk.flip_bit(&path, byte);
            assert!(found(&disk).is_err(), "a flipped bit in byte {byte}");
            disk.flip_bit(&path, byte);
        }
        disk.flip_bit(&path, 5_000);
        let mut again = RecordFile::open(&Disk::Sim(disk.clone()), Path::new(DIR), REPLICA);
        again.keep(&mk_copy(4)).unwrap();
        assert_eq!(found(&disk).unwrap(), Some(mk_copy(4)), "nothing is known of what rotted");
    }
}
