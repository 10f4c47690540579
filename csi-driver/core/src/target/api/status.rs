//! What is told of a target: its state, its replicas, the integrity of the data.

use crate::block_range::BlockRange;
use crate::ids::{Epoch, Generation, NodeName, ReplicaId};

/// Where a target stands.
///
/// ```text
/// opening ─> settling ─> serving ─> stopped
///    └──────────┴───────────┴────> fenced | failed
/// ```
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetState {
    /// Taking the generation and opening the members (R1, R11).
    Opening,
    /// Swapping out those that did not open, telling the others the epoch (R10, R12).
    Settling,
    /// Serving I/O.
    Serving,
    /// A later target owns the volume; every I/O fails. Final.
    Fenced(String),
    /// It cannot serve; every I/O fails. Final for this target.
    Failed(String),
    /// Stopped as asked. Final.
    Stopped,
}

impl TargetState {
    /// The word that GetStatus answers.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Opening => "opening",
            Self::Settling => "settling",
            Self::Serving => "serving",
            Self::Fenced(_) => "fenced",
            Self::Failed(_) => "failed",
            Self::Stopped => "stopped",
        }
    }

    /// Why it is fenced or failed; empty otherwise.
    #[must_use]
    pub fn reason(&self) -> &str {
        match self {
            Self::Fenced(reason) | Self::Failed(reason) => reason,
            Self::Opening | Self::Settling | Self::Serving | Self::Stopped => "",
        }
    }

    /// Whether the target does nothing any more.
    #[must_use]
    pub fn is_final(&self) -> bool {
        matches!(self, Self::Fenced(_) | Self::Failed(_) | Self::Stopped)
    }
}

/// What an operator sees of a target; a copy, made on demand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TargetStatus {
    /// State.
    pub state: TargetState,
    /// Own generation; 0 before it was taken.
    pub generation: Generation,
    /// The epoch in force.
    pub epoch: Epoch,
    /// Volume size; 0 before the record was read.
    pub size_bytes: u64,
    /// Writes and zeroings acknowledged.
    pub writes_acknowledged: u64,
    /// Longest time one of them waited.
    pub longest_stall_ms: u64,
    /// Regions that the intent log holds.
    pub logged_regions: usize,
    /// Regions not yet reconciled.
    pub unreconciled_regions: usize,
    /// Bytes copied between members to reconcile them since the target started.
    pub reconcile_bytes_copied: u64,
    /// Unflushed acknowledged writes may have been lost at this start (R12).
    pub possible_loss: bool,
    /// What was found out about the data's integrity.
    pub corruption: CorruptionCounts,
    /// How far the scrub is.
    pub scrub: ScrubStatus,
    /// The replicas.
    pub replicas: Vec<ReplicaStatus>,
}

/// Something about the data's integrity.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finding {
    /// Blocks that do not verify on a replica, and are not explained by a crash.
    Corrupt {
        /// Where.
        replica: ReplicaId,
        /// Which.
        range: BlockRange,
    },
    /// They were written over with what another member has (R33).
    Repaired {
        /// Where.
        replica: ReplicaId,
        /// Which.
        range: BlockRange,
    },
    /// Blocks that verify on no member: reading them is an error.
    Unrepairable {
        /// Which.
        range: BlockRange,
    },
    /// Blocks that verify on several members with different content: nothing was copied (R33).
    Differing {
        /// Which.
        range: BlockRange,
    },
    /// Blocks that a crash left without a checksum that fits, on every member: taken as they are (R32).
    Adopted {
        /// From whom.
        replica: ReplicaId,
        /// Which.
        range: BlockRange,
    },
    /// Blocks that no member could give to a returning replica: an error there too (R25).
    MarkedBad {
        /// The returning replica.
        replica: ReplicaId,
        /// Which.
        range: BlockRange,
    },
}

/// Blocks by what was found out about them since the target's start; a block counts once for each replica.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CorruptionCounts {
    /// [`Finding::Corrupt`].
    pub found: u64,
    /// [`Finding::Repaired`].
    pub repaired: u64,
    /// [`Finding::Unrepairable`] and [`Finding::MarkedBad`].
    pub unrepairable: u64,
    /// [`Finding::Differing`].
    pub differing: u64,
    /// [`Finding::Adopted`].
    pub adopted: u64,
}

impl CorruptionCounts {
    pub(in crate::target) fn count(&mut self, finding: Finding) {
        let (counter, range) = match finding {
            Finding::Corrupt { range, .. } => (&mut self.found, range),
            Finding::Repaired { range, .. } => (&mut self.repaired, range),
            Finding::Unrepairable { range } | Finding::MarkedBad { range, .. } => {
                (&mut self.unrepairable, range)
            }
            Finding::Differing { range } => (&mut self.differing, range),
            Finding::Adopted { range, .. } => (&mut self.adopted, range),
        };
        *counter += range.count;
    }
}

/// How far the scrub is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ScrubStatus {
    /// Regions verified by the pass that runs or ran last.
    pub regions_done: u64,
    /// Regions of that pass; 0 before the first.
    pub regions_total: u64,
    /// Passes that ended since the target's start.
    pub passes: u64,
}

/// One replica of [`TargetStatus`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReplicaStatus {
    /// The replica.
    pub replica: ReplicaId,
    /// Its node.
    pub node: NodeName,
    /// `in_sync`, `offline`, `catching_up` or `faulted`.
    pub state: &'static str,
    /// Bytes copied by the resync that runs or ran last.
    pub resync_bytes_done: u64,
    /// Bytes that resync had to copy; what earlier ones had copied is not among them.
    pub resync_bytes_total: u64,
    /// Bytes copied by all resyncs since the target started, those of interrupted ones included.
    pub resync_bytes_copied: u64,
}
