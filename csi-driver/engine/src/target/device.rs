//! The target as a block device.

use std::sync::Arc;

use holdfast_io::{BlockDevice, BlockOp, Completion};
use holdfast_nbd::{Export, ExportProvider, OpenError, PeerIdentity};

use super::machine::{TargetActor, TargetInput};

/// Smallest unit that clients may use; the target completes blocks itself.
const CLIENT_BLOCK_BYTES: u32 = 512;

/// Takes client requests for a target. It keeps answering (with errors) after the target ended.
pub struct TargetDevice {
    actor: Arc<TargetActor>,
    size_bytes: u64,
}

impl TargetDevice {
    /// The device of a target that serves.
    #[must_use]
    pub fn new(actor: Arc<TargetActor>, size_bytes: u64) -> Self {
        Self { actor, size_bytes }
    }
}

impl BlockDevice for TargetDevice {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn submit(&self, op: BlockOp, done: Completion) {
        self.actor.post(TargetInput::Request(op, done));
    }
}

/// Serves one target to local NBD clients, under any export name: the socket names the volume.
pub struct TargetExport {
    /// The target.
    pub device: Arc<dyn BlockDevice>,
    /// The volume is published read-only.
    pub read_only: bool,
}

impl ExportProvider for TargetExport {
    fn open(&self, _name: &str, _peer: &PeerIdentity) -> Result<Export, OpenError> {
        Ok(Export {
            read_only: self.read_only,
            // One state machine sees the requests of all connections: a flush covers every write answered before.
            multi_conn: true,
            block_bytes: CLIENT_BLOCK_BYTES,
            ..Export::new(Arc::clone(&self.device))
        })
    }
}
