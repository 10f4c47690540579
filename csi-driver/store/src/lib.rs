//! A replica on disk: pools, layers with checksums and allocation maps, the intent log, dirty maps and recovery.
//!
//! ```text
//!  Pool ── create, clone, delete, list, space   POOL/pool, POOL/lock
//!   └── Replica ── read, write, zero, flush ──> layer-N        data, checksums, allocation map; the top one is written
//!         │        freeze, drop, grow, merge ─> manifest       which layers are stacked, which are snapshots
//!         │        log_add, log_remove ───────> log            regions that may differ after a crash
//!         │        persist_meta ──────────────> meta           the replica's state, two slots
//!         ├─────── keep_record ───────────> record         a copy of the volume's record (ADR 0011)
//!         └─────── put_map, update_map, … ────> map-<replica>  blocks written since a replica left
//! ```
//!
//! Requests of a [`Replica`] take a callback and never block; callbacks run on an I/O thread and must not block either.
//! [`wait`] turns any such call into a future. Calls of a [`Pool`] block: use a thread that may.
//!
//! What it refuses: a write into a region that is not durably in the intent log (R18), data that does not match its
//! checksum, any request after a failed write or flush until the replica is opened again, a pool that another process
//! holds, files of a later format version, files that are cut short or damaged.
//!
//! What it does not do: order overlapping requests (the target's range lock does, R13), fence sessions (the replica
//! server does), decide when the log may be cleared (R18 leaves that to the target).
//!
//! The format is drawn byte by byte in `docs/on-disk-format.md`, with every crash point argued.

mod bit_sectors;
mod clone;
mod control;
mod cookie;
#[cfg(test)]
mod crash_tests;
mod data;
mod disk;
mod error;
mod gather;
#[doc(hidden)]
pub mod hot;
mod intent_log;
mod layer;
#[cfg(test)]
mod layer_crash_tests;
mod layout;
mod manifest;
mod map_file;
mod merge;
mod merge_cursor;
mod merge_thread;
mod meta_file;
mod pool;
mod record_file;
mod replica;
mod sealed;
mod shadow;
mod space;
mod stack_files;
mod sums;
mod survey;
mod tables;

pub use error::{PoolError, StoreError};
pub use pool::{KeptRecord, Pool, PoolOptions, Space};
pub use replica::{AllocState, Done, Extent, META_BYTES_MAX, Replica, UncheckedRead, VERIFY_BYTES_MAX, wait};
pub use survey::{Surveyed, survey, survey_records};
