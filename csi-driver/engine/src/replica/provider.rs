//! What the NBD server gives to targets: a session's connections to a replica, by the name `volume/replica/token`.

use std::sync::{Arc, Weak};

use holdfast_io::{BlockDevice, BlockError, BlockOp, Completion};
use holdfast_nbd::{BlockStatus, Export, ExportProvider, Extent, ExtentsCompletion, OpenError, PeerIdentity};
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::{BLOCK_BYTES, ReplicaId, SessionToken, VolumeId};
use holdfast_store::AllocState;

use crate::errno;

use super::host::ReplicaHost;
use super::machine::{ReplicaActor, ReplicaInput};

/// Gives out sessions of this node's replicas.
pub struct ReplicaExports {
    host: Weak<ReplicaHost>,
}

impl ReplicaExports {
    /// Exports of `host`, as long as it lives.
    #[must_use]
    pub fn new(host: &Arc<ReplicaHost>) -> Self {
        Self { host: Arc::downgrade(host) }
    }
}

impl ExportProvider for ReplicaExports {
    fn open(&self, name: &str, peer: &PeerIdentity) -> Result<Export, OpenError> {
        let unknown = || OpenError::Unknown(name.to_owned());
        let (_volume, replica, token) = parse_name(name).ok_or_else(unknown)?;
        let actor = self.host.upgrade().and_then(|host| host.get(replica)).ok_or_else(unknown)?;
        let names = match peer {
            PeerIdentity::Anonymous => &[][..],
            PeerIdentity::Named(names) => names,
        };
        let connections = actor.peek(|machine| machine.connections(token, names)).ok_or_else(unknown)?;
        let device = Arc::new(SessionDevice { actor, token });
        Ok(Export {
            block_status: Some(Arc::clone(&device) as Arc<dyn BlockStatus>),
            multi_conn: true,
            connections,
            ..Export::new(device)
        })
    }
}

fn parse_name(name: &str) -> Option<(VolumeId, ReplicaId, SessionToken)> {
    let mut parts = name.split('/');
    let ids = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().is_none().then_some(ids)
}

/// One session's view of a replica; refuses everything once the session is over.
pub struct SessionDevice {
    actor: Arc<ReplicaActor>,
    token: SessionToken,
}

impl BlockDevice for SessionDevice {
    fn size_bytes(&self) -> u64 {
        self.actor.env.disk.size_bytes()
    }

    fn submit(&self, op: BlockOp, done: Completion) {
        self.actor.post(ReplicaInput::Data { token: self.token, op, done });
    }
}

impl BlockStatus for SessionDevice {
    fn block_status(&self, offset: u64, len: u32, extents_max: usize, done: ExtentsCompletion) {
        let end = (offset + u64::from(len)).min(self.size_bytes());
        if offset >= end {
            return done(Err(BlockError(errno::EINVAL)));
        }
        let range = BlockRange::covering(offset, end - offset);
        let answer =
            move |result: Result<Vec<holdfast_store::Extent>, holdfast_store::StoreError>| match result {
                Ok(extents) => done(Ok(extents.iter().take(extents_max.max(1)).map(extent).collect())),
                Err(error) => done(Err(BlockError(error.errno()))),
            };
        self.actor.env.disk.allocation(range, Box::new(answer));
    }
}

/// Absent blocks are holes, blocks that were zeroed are allocated zeroes: R36 must tell them apart.
fn extent(extent: &holdfast_store::Extent) -> Extent {
    let (hole, zero) = match extent.state {
        AllocState::Absent => (true, true),
        AllocState::Zero => (false, true),
        AllocState::Data => (false, false),
    };
    let bytes = extent.range.count.saturating_mul(BLOCK_BYTES);
    // Shortened extents are allowed: the client asks again from where they end.
    Extent { len: u32::try_from(bytes).unwrap_or(u32::MAX / 4096 * 4096), hole, zero }
}
