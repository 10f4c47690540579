//! Every time and limit of the protocol, in one table. The data process states them at start ([`table`]).

/// A target asks each replica for a sign of life and a lease this often.
pub const HEARTBEAT_MS: u64 = 250;
/// The same for a volume that nobody uses. One that is not answered within [`HEARTBEAT_MS`] ends the idling, and three of the
/// usual ones follow before a lease that was counted from the last answered one ends.
pub const HEARTBEAT_IDLE_MS: u64 = 1_000;
/// A volume is idle when nothing was under way for so long.
pub const IDLE_AFTER_MS: u64 = 2_000;
/// A replica that answered no heartbeat for so long is swapped out.
pub const SILENT_MS: u64 = 800;
/// A replica that still talks, but does not answer an I/O or a control request for so long, is swapped out.
pub const IO_DEADLINE_MS: u64 = 5_000;
/// The same for a replica that nobody can replace: its session is opened anew, and what it had not answered sent again.
pub const SOLE_IO_DEADLINE_MS: u64 = 15_000;
/// Term of a read lease, counted by the replica from processing the heartbeat (R4).
pub const LEASE_MS: u64 = 2_000;
/// The target's own margin on a lease, on top of the clock drift (R4).
pub const LEASE_MARGIN_MS: u64 = 50;
/// Bound on how far two clocks' rates differ, in parts per thousand.
pub const DRIFT_PER_MILLE: u64 = 10;
/// A new attachment whose members all lost their caches waits so long for the unopened ones (R12).
pub const CACHE_GRACE_MS: u64 = 60_000;
/// Most regions in an intent log. At the limit a write to a further region waits at the target until cold regions are
/// flushed and cleared.
pub const INTENT_LOG_REGIONS_MAX: usize = 1_000;
/// Most regions one replica's log has room for: the target's limit counts the union of all logs when it opens, so a
/// returning replica may hold as many of its own again. Beyond, the replica refuses the write; no correct target asks.
pub const REPLICA_LOG_REGIONS_MAX: usize = 4 * INTENT_LOG_REGIONS_MAX;
/// The target starts clearing regions, hot or not, when the log is so full.
pub const INTENT_LOG_PRESSURE_PERCENT: usize = 80;
/// A logged region is cold after so long without a write.
pub const LOG_COLD_MS: u64 = 2_000;
/// The target looks for cold regions this often.
pub const LOG_CLEAR_EVERY_MS: u64 = 1_000;
/// Most regions cleared by one ClearLog.
pub const LOG_CLEAR_BATCH: usize = 400;

/// A member that failed to open is swapped out this long after the start, if another member is open.
pub const OPEN_UNREACHABLE_MS: u64 = 800;
/// A member whose Open is still unanswered is swapped out after so long; longer than a lease and its drain.
pub const OPEN_PATIENCE_MS: u64 = 6_000;
/// First pause before a failed Open is repeated; doubled each time.
pub const REOPEN_MIN_MS: u64 = 250;
/// Longest pause between two tries to open a replica.
pub const REOPEN_MAX_MS: u64 = 4_000;
/// While fewer replicas are in sync than wanted the record is read this often: somebody may have listed a new one.
pub const RECORD_POLL_MS: u64 = 5_000;
/// Pause before a store call that gave no answer is repeated; doubled each time.
pub const STORE_RETRY_MIN_MS: u64 = 50;
/// Longest pause between two tries of a store call.
pub const STORE_RETRY_MAX_MS: u64 = 1_000;
/// A record store that gives only versions older than one seen before for so long was restored from a backup.
pub const OLDER_READS_MS: u64 = 10_000;
/// An operator promotes a replica (R26) no sooner than so long after the volume's last member was lost and the volume was
/// unpublished. So a target that heard of a member, or read that the volume is its own, since then knows that the member was
/// not given up; one that did not reads the record before it goes on.
pub const GIVEN_UP_AFTER_MS: u64 = 60_000;
/// Two calls of the core further apart than this, with a timer due between, were a pause of the process: timers then
/// wait until the queued input was handled (R6).
pub const TICK_GAP_MS: u64 = 300;

/// A cut holds writes at most so long (R27): longer than [`IO_DEADLINE_MS`], so that one member that hangs is swapped
/// out and the cut goes on. At the limit the writes go on and the cut is given up.
pub const CUT_HOLD_MS: u64 = 7_000;
/// Longest hold of a group that a volume accepts (R29).
pub const GROUP_HOLD_MAX_MS: u64 = 10_000;
/// Most volumes of a group; a larger one is refused.
pub const GROUP_MEMBERS_MAX: usize = 32;
/// A member's target that has not answered a group's coordinator for so long counts as silent: longer than any hold and a
/// swap of the record after it.
pub const GROUP_ANSWER_MS: u64 = 30_000;
/// Pause before a group's coordinator tries again what the store or a member did not answer.
pub const GROUP_RETRY_MS: u64 = 250;
/// Tries of one start of a coordinator, for the store and for deletions; then the group's next start goes on.
pub const GROUP_TRIES_MAX: u32 = 20;
/// A replica that rebuilds a layer empties its intent log whenever so many regions were copied to it; with what it came
/// with, that is within [`REPLICA_LOG_REGIONS_MAX`].
pub const LAYER_LOG_REGIONS: usize = INTENT_LOG_REGIONS_MAX;
/// Jobs (snapshots, growth) that wait at a target; a further one is refused as busy.
pub const JOBS_MAX: usize = 16;

/// Copies to a returning replica in flight at a time, per volume. Further ones wait.
pub const COPIES_MAX: usize = 4;
/// Most blocks of one copy while the client has I/O, which waits behind it: 128 KiB.
pub const COPY_BLOCKS_BUSY: u64 = 32;
/// What the smallest copy counts against the rate: it costs more than its bytes.
pub const COPY_COST_MIN_BYTES: u64 = 32 << 10;
/// Copies to a returning replica are not slowed below this by the client's I/O: 1 TiB within 37 hours.
pub const COPY_RATE_MIN_BYTES_PER_S: u64 = 8 << 20;
/// Where a client's first I/O meets copies at full speed, they go on with this.
pub const COPY_RATE_START_BYTES_PER_S: u64 = 32 << 20;
/// More is no throttle.
pub const COPY_RATE_MAX_BYTES_PER_S: u64 = 2 << 30;
/// A client without a request for so long has no I/O that copies could disturb.
pub const FOREGROUND_IDLE_MS: u64 = 200;
/// The rate of copies beside a client's I/O is adapted this often.
pub const THROTTLE_WINDOW_MS: u64 = 100;
/// Copies stop for so long to measure what the client's requests take alone.
pub const THROTTLE_QUIET_MS: u64 = 150;
/// That is done this often.
pub const THROTTLE_QUIET_EVERY_MS: u64 = 3_000;
/// So many copied regions are flushed at the returning replica and then need not be copied again, whoever dies.
pub const CHECKPOINT_REGIONS: usize = 8;
/// Most regions that are copied, or being copied, and in no ended checkpoint: what one death may have copied again. At the
/// limit copies wait for the checkpoint under way. Twice a checkpoint, so that copies go on during its flush.
pub const AT_STAKE_REGIONS_MAX: usize = 2 * CHECKPOINT_REGIONS;
/// Fewer of them are after this time.
pub const CHECKPOINT_MS: u64 = 1_000;
/// A replica that catches up for so long lets another have its turn, if that one can be opened; it goes on afterwards.
pub const CATCH_UP_TURN_MS: u64 = 60_000;
/// Ranges that are checked or repaired in the background at a time. A further one whose read failed on one member waits for
/// the scrub, or for its next reader.
pub const CHECKS_MAX: usize = 16;
/// A pass of the scrub begins so long after the beginning of the one before, or after the target's start, where the volume's
/// parameters say nothing else.
pub const SCRUB_EVERY_MS: u64 = 7 * 24 * 3_600 * 1_000;
/// Pause after each region that was scrubbed: at most 8 MiB/s of each replica's disk, 1 TiB in 36 hours.
pub const SCRUB_REGION_EVERY_MS: u64 = 125;
/// Regions whose allocation, or whose changes between two snapshots, are asked for in one call.
pub const EXTENTS_REGIONS: u64 = 1_024;
/// Most blocks of one copy; a region.
pub const COPY_BLOCKS_MAX: u64 = crate::ids::BLOCKS_PER_REGION;
/// Regions reconciled per flush of all members (R20).
pub const RECONCILE_BATCH: usize = 8;
/// A zeroing or trim request is cut into parts of so many blocks, one at a time, so that none fills the intent log.
pub const ZERO_PART_BLOCKS_MAX: u64 = 64 * crate::ids::BLOCKS_PER_REGION;
/// A stop that could not flush within this time gives up its sessions; the next start reconciles.
pub const STOP_DEADLINE_MS: u64 = 5_000;

/// The end of a lease as the target may use it, when the heartbeat was sent at `sent_ms` (R4).
#[must_use]
pub fn lease_end_at_target(sent_ms: u64) -> u64 {
    sent_ms + LEASE_MS - LEASE_MS * 2 * DRIFT_PER_MILLE / 1_000 - LEASE_MARGIN_MS
}

/// The table as `name=value` pairs, for the log line at start.
#[must_use]
pub fn table() -> Vec<(&'static str, u64)> {
    vec![
        ("heartbeat_ms", HEARTBEAT_MS),
        ("heartbeat_idle_ms", HEARTBEAT_IDLE_MS),
        ("silent_ms", SILENT_MS),
        ("io_deadline_ms", IO_DEADLINE_MS),
        ("lease_ms", LEASE_MS),
        ("drift_per_mille", DRIFT_PER_MILLE),
        ("cache_grace_ms", CACHE_GRACE_MS),
        ("cut_hold_ms", CUT_HOLD_MS),
        ("intent_log_regions_max", INTENT_LOG_REGIONS_MAX as u64),
        ("copies_max", COPIES_MAX as u64),
        ("copy_rate_min_bytes_per_s", COPY_RATE_MIN_BYTES_PER_S),
        ("catch_up_turn_ms", CATCH_UP_TURN_MS),
        ("scrub_every_ms", SCRUB_EVERY_MS),
        ("scrub_region_every_ms", SCRUB_REGION_EVERY_MS),
    ]
}
