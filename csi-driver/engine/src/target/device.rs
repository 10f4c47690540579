//! The target as a block device.

use std::sync::Arc;

use holdfast_io::{BlockDevice, BlockOp, Completion};
use holdfast_nbd::{
    BlockStatus, Context, Export, ExportProvider, ExtentsCompletion, OpenError, PeerIdentity,
};

use super::allocation::AllocationQuery;
use super::machine::{TargetActor, TargetInput};

/// Smallest unit that clients may use; the target completes blocks itself.
pub const CLIENT_BLOCK_BYTES: u32 = 512;
/// Longest range of one allocation query: writes to it wait meanwhile. Clients ask on from where an answer ends.
const STATUS_BYTES_MAX: u64 = 64 << 20;

/// Takes client requests for a target. It keeps answering (with errors) after the target ended.
pub struct TargetDevice {
    actor: Arc<TargetActor>,
}

impl TargetDevice {
    /// The device of a target that serves.
    #[must_use]
    pub fn new(actor: Arc<TargetActor>) -> Self {
        Self { actor }
    }
}

impl BlockDevice for TargetDevice {
    fn size_bytes(&self) -> u64 {
        *self.actor.env.size_bytes.borrow()
    }

    fn submit(&self, op: BlockOp, done: Completion) {
        self.actor.post(TargetInput::Request(op, done));
    }
}

impl BlockStatus for TargetDevice {
    /// Allocation on the member that would answer a read, in the order of reads: under the range lock, after the range's
    /// regions are reconciled, and under the ack set's leases. A client takes "reads as zeroes" for what it has read.
    fn block_status(&self, offset: u64, len: u64, extents_max: usize, done: ExtentsCompletion) {
        let query = AllocationQuery { offset, len: len.min(STATUS_BYTES_MAX), extents_max };
        self.actor.post(TargetInput::Allocation(query, done));
    }
}

/// Serves one target to local NBD clients, under any export name: the socket names the volume.
pub struct TargetExport {
    /// What answers their I/O.
    pub device: Arc<dyn BlockDevice>,
    /// What tells them what is allocated.
    pub status: Arc<dyn BlockStatus>,
    /// Smallest unit that they may use.
    pub block_bytes: u32,
    /// The volume is published read-only.
    pub read_only: bool,
}

impl ExportProvider for TargetExport {
    fn open(&self, _name: &str, _peer: &PeerIdentity) -> Result<Export, OpenError> {
        Ok(Export {
            read_only: self.read_only,
            // One state machine sees the requests of all connections: a flush covers every write answered before.
            multi_conn: true,
            block_bytes: self.block_bytes,
            // Whole blocks are entries in every replica's tables.
            fast_zero: true,
            contexts: vec![Context::allocation(Arc::clone(&self.status))],
            ..Export::new(Arc::clone(&self.device))
        })
    }
}
