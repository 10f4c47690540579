//! The replica's meta in two slots: the older one is overwritten, so that after a crash one of them is whole.
//!
//! Slot payload: sequence 8, then the meta as JSON. The slot with the higher sequence counts.

use std::path::{Path, PathBuf};

use holdfast_io::{AlignedBuf, OpenMode};
use holdfast_storage_core::replica::ReplicaMeta;

use crate::disk::{Disk, DiskFile};
use crate::error::PoolError;
use crate::manifest::bad_page;
use crate::sealed::{BadPage, FRAME_BYTES, seal, u64_at, unseal};

const MAGIC: &[u8; 8] = b"HFMETASL";
const VERSION: u32 = 1;
const SLOT_BYTES: usize = 8192;
const SLOTS: u64 = 2;
const FIRST_SEQUENCE: u64 = 1;
/// Bytes of the largest meta in its JSON form.
pub const META_BYTES_MAX: usize = SLOT_BYTES - FRAME_BYTES - 8;
const FILE: &str = "meta";

/// The open file, knowing which slot is next.
#[derive(Debug)]
pub struct MetaFile {
    file: DiskFile,
    sequence: u64,
}

/// Why a meta was not persisted.
#[derive(Debug)]
pub enum MetaError {
    /// It does not fit; nothing was done.
    TooLarge(usize),
    /// The disk failed.
    Io(std::io::Error),
}

impl MetaFile {
    /// Makes the file with its first meta, to be synced by the caller.
    pub fn write_new(disk: &Disk, dir: &Path, meta: &ReplicaMeta) -> Result<DiskFile, PoolError> {
        let path = dir.join(FILE);
        let first = match slot_of(FIRST_SEQUENCE, meta) {
            Ok(first) => first,
            Err(MetaError::TooLarge(bytes)) => return Err(PoolError::MetaTooLarge(bytes)),
            Err(MetaError::Io(source)) => return Err(PoolError::Io { action: "writing", path, source }),
        };
        let mut slots = AlignedBuf::zeroed(SLOT_BYTES * 2);
        let at = slot_offset(FIRST_SEQUENCE);
        slots[at..at + SLOT_BYTES].copy_from_slice(&first);
        let file = disk.open(&path, OpenMode::New).map_err(PoolError::io("creating", &path))?;
        file.write_now(0, &slots).map_err(PoolError::io("writing", &path))?;
        Ok(file)
    }

    /// Opens the file and reads the newest whole slot.
    pub fn open(disk: &Disk, dir: &Path) -> Result<(Self, ReplicaMeta), PoolError> {
        let path = dir.join(FILE);
        let file = disk.open(&path, OpenMode::Existing).map_err(PoolError::io("opening", &path))?;
        let found_bytes = file.len_bytes().map_err(PoolError::io("reading", &path))?;
        let expected_bytes = SLOTS * SLOT_BYTES as u64;
        if found_bytes < expected_bytes {
            return Err(PoolError::Truncated { path, found_bytes, expected_bytes });
        }
        let mut newest: Option<(u64, Vec<u8>)> = None;
        for slot in 0..SLOTS {
            let page = file
                .read_now(slot * SLOT_BYTES as u64, SLOT_BYTES)
                .map_err(PoolError::io("reading", &path))?;
            match unseal(MAGIC, VERSION, &page) {
                Ok(payload) if payload.len() >= 8 => {
                    let sequence = u64_at(payload, 0);
                    if newest.as_ref().is_none_or(|(found, _)| *found < sequence) {
                        newest = Some((sequence, payload[8..].to_vec()));
                    }
                }
                // The slot that a crash tore, or that was never used.
                Ok(_) | Err(BadPage::Damaged(_)) => {}
                // An old release must not fall back to the older slot: it would forget a generation (R2).
                Err(future @ BadPage::Future { .. }) => return Err(bad_page(&path, VERSION, &future)),
            }
        }
        let (sequence, json) = newest.ok_or_else(|| PoolError::Corrupt {
            path: path.clone(),
            what: "neither slot is whole".to_owned(),
        })?;
        let meta = parse(&path, &json)?;
        Ok((Self { file, sequence }, meta))
    }

    /// Makes a new meta durable.
    pub fn persist(&mut self, meta: &ReplicaMeta) -> Result<(), MetaError> {
        let sequence = self.sequence + 1;
        let slot = slot_of(sequence, meta)?;
        self.file.write_durable_now(slot_offset(sequence) as u64, &slot).map_err(MetaError::Io)?;
        self.sequence = sequence;
        Ok(())
    }
}

fn slot_of(sequence: u64, meta: &ReplicaMeta) -> Result<AlignedBuf, MetaError> {
    let json = serde_json::to_vec(meta).map_err(|error| MetaError::Io(error.into()))?;
    if json.len() > META_BYTES_MAX {
        return Err(MetaError::TooLarge(json.len()));
    }
    let mut payload = sequence.to_le_bytes().to_vec();
    payload.extend(json);
    let mut slot = AlignedBuf::zeroed(SLOT_BYTES);
    seal(MAGIC, VERSION, &payload, &mut slot);
    Ok(slot)
}

fn slot_offset(sequence: u64) -> usize {
    usize::from(!sequence.is_multiple_of(SLOTS)) * SLOT_BYTES
}

fn parse(path: &Path, json: &[u8]) -> Result<ReplicaMeta, PoolError> {
    let corrupt = |what: String| PoolError::Corrupt { path: PathBuf::from(path), what };
    let meta: ReplicaMeta =
        serde_json::from_slice(json).map_err(|error| corrupt(format!("its meta cannot be read: {error}")))?;
    let known = holdfast_storage_core::replica::meta::META_FORMAT;
    if meta.format > known {
        return Err(PoolError::FutureVersion { path: path.to_owned(), found: meta.format, known });
    }
    Ok(meta)
}
