//! What the NBD server gives to targets: a session's connections to a replica, by the name `volume/replica/token`, and to
//! a snapshot of it, read-only, by the name `volume/replica/token@snapshot`.

use std::sync::{Arc, Weak};

use holdfast_io::{BlockDevice, BlockError, BlockOp, Completion};
use holdfast_nbd::{BlockStatus, Export, ExportProvider, Extent, ExtentsCompletion, OpenError, PeerIdentity};
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::{BLOCK_BYTES, ReplicaId, SessionToken, SnapshotId, VolumeId};
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
        let (replica, token, at) = parse_name(name).ok_or_else(unknown)?;
        let actor = self.host.upgrade().and_then(|host| host.get(replica)).ok_or_else(unknown)?;
        let names = match peer {
            PeerIdentity::Anonymous => &[][..],
            PeerIdentity::Named(names) => names,
        };
        let connections = actor.peek(|machine| machine.connections(token, names)).ok_or_else(unknown)?;
        let device = Arc::new(SessionDevice { actor, token, at });
        // A snapshot that is not here has no size.
        if at.is_some() && device.size_bytes() == 0 {
            return Err(unknown());
        }
        Ok(Export {
            block_status: Some(Arc::clone(&device) as Arc<dyn BlockStatus>),
            read_only: at.is_some(),
            multi_conn: true,
            connections,
            ..Export::new(device)
        })
    }
}

fn parse_name(name: &str) -> Option<(ReplicaId, SessionToken, Option<SnapshotId>)> {
    let (session, at) = match name.split_once('@') {
        Some((session, snapshot)) => (session, Some(snapshot.parse().ok()?)),
        None => (name, None),
    };
    let mut parts = session.split('/');
    let _: VolumeId = parts.next()?.parse().ok()?;
    let (replica, token) = (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?);
    parts.next().is_none().then_some((replica, token, at))
}

/// One session's view of a replica or of a snapshot; refuses everything once the session is over.
pub struct SessionDevice {
    actor: Arc<ReplicaActor>,
    token: SessionToken,
    at: Option<SnapshotId>,
}

impl BlockDevice for SessionDevice {
    fn size_bytes(&self) -> u64 {
        let disk = &self.actor.env.disk;
        match self.at {
            None => disk.size_bytes(),
            Some(snapshot) => disk.snapshot_size_bytes(snapshot).unwrap_or(0),
        }
    }

    fn submit(&self, op: BlockOp, done: Completion) {
        self.actor.post(ReplicaInput::Data { token: self.token, at: self.at, op, done });
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
        self.actor.env.disk.allocation_at(self.at, range, Box::new(answer));
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends at the first failure")]

    use std::collections::BTreeSet;
    use std::time::Duration;

    use bytes::Bytes;
    use holdfast_storage_core::ids::{Epoch, Generation, Lineage, TargetId};
    use holdfast_storage_core::replica::{
        ControlOp, DiskError, OpenRequest, ReplicaMeta, ReplicaReply, RequestRefusal, SessionKey,
    };
    use holdfast_store::{Pool, PoolOptions};

    use super::*;
    use crate::pulse::Pulse;
    use crate::replica::grpc;

    const VOLUME: VolumeId = VolumeId(1);
    const REPLICA: ReplicaId = ReplicaId(2);
    const SNAPSHOT: SnapshotId = SnapshotId(3);
    const SIZE_BYTES: u64 = 4 << 20;

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_snapshot_is_served_read_only_as_a_part_of_its_session() {
        let (dir, cookies) = (tempfile::tempdir().unwrap(), tempfile::tempdir_in("/dev/shm").unwrap());
        let host = mk_host(dir.path(), cookies.path());
        let actor = host.get(REPLICA).unwrap();
        let key = open_session(&actor).await;
        let exports = ReplicaExports::new(&host);
        let name = format!("{VOLUME}/{REPLICA}/{}", key.token);
        let open = |name: &str| exports.open(name, &PeerIdentity::Anonymous);
        let live = open(&name).unwrap();
        let write = |value: u8| BlockOp::Write { offset: 4096, data: vec![value; 4096].into(), fua: false };
        submit(&live, write(1)).await.unwrap();
        let freeze = || ControlOp::Freeze { snapshot: SNAPSHOT };
        let frozen = grpc::control(&actor, key, freeze()).await;
        assert!(matches!(frozen, Some(ReplicaReply::Done(Ok(())))), "{frozen:?}");
        let again = grpc::control(&actor, key, freeze()).await;
        let exists = RequestRefusal::Disk(DiskError::SnapshotExists);
        assert!(matches!(&again, Some(ReplicaReply::Done(Err(found))) if *found == exists), "{again:?}");
        submit(&live, write(2)).await.unwrap();
        let grown = grpc::control(&actor, key, ControlOp::Grow { size_bytes: 2 * SIZE_BYTES }).await;
        assert!(matches!(grown, Some(ReplicaReply::Done(Ok(())))), "{grown:?}");

        let frozen = open(&format!("{name}@{SNAPSHOT}")).unwrap();
        assert!(frozen.read_only && !live.read_only);
        assert_eq!((frozen.device.size_bytes(), live.device.size_bytes()), (SIZE_BYTES, 2 * SIZE_BYTES));
        let read = || BlockOp::Read { offset: 4096, len: 4096 };
        assert_eq!(submit(&frozen, read()).await.unwrap(), vec![1; 4096]);
        assert_eq!(submit(&live, read()).await.unwrap(), vec![2; 4096]);
        assert_eq!(submit(&frozen, write(9)).await, Err(BlockError(errno::EINVAL)));
        for unknown in
            [format!("{name}@{}", SnapshotId(9)), format!("{name}@"), format!("{name}@{SNAPSHOT}@1")]
        {
            assert!(matches!(open(&unknown), Err(OpenError::Unknown(_))), "{unknown}");
        }
        let dropped = grpc::control(&actor, key, ControlOp::DropSnapshot { snapshot: SNAPSHOT }).await;
        assert!(matches!(dropped, Some(ReplicaReply::Done(Ok(())))), "{dropped:?}");
        assert!(submit(&frozen, read()).await.is_err(), "a dropped snapshot is not served");
        assert_eq!(submit(&live, read()).await.unwrap(), vec![2; 4096]);
        grpc::control(&actor, key, ControlOp::Release).await;
        assert_eq!(submit(&frozen, read()).await, Err(BlockError(errno::ESHUTDOWN)), "fenced like all data");
        host.stop();
    }

    fn mk_host(dir: &std::path::Path, cookies: &std::path::Path) -> Arc<ReplicaHost> {
        let options = PoolOptions {
            capacity_bytes: 1 << 30,
            reserve_bytes: 0,
            cookie_dir: Some(cookies.to_owned()),
            lock_wait: Duration::from_secs(5),
        };
        let pool = Pool::open(dir, options).unwrap();
        let pulse = Pulse::start().unwrap();
        let host = ReplicaHost::open(pool, pulse, tokio::runtime::Handle::current()).unwrap();
        let meta = ReplicaMeta::new(VOLUME, REPLICA, Lineage(7), SIZE_BYTES, Epoch::default());
        host.create(&meta).unwrap();
        host
    }

    async fn open_session(actor: &Arc<ReplicaActor>) -> SessionKey {
        let (generation, target_id) = (Generation(1), TargetId(8));
        let request = OpenRequest {
            volume_id: VOLUME,
            replica_id: REPLICA,
            generation,
            target_id,
            lineage: Lineage(7),
            epoch: Epoch::default(),
            in_sync: BTreeSet::from([REPLICA]),
            size_bytes: SIZE_BYTES,
            snapshots: BTreeSet::new(),
        };
        let opened = grpc::open(actor, request, Vec::new(), None).await.unwrap().unwrap();
        SessionKey { generation, target_id, token: opened.token }
    }

    async fn submit(export: &Export, op: BlockOp) -> Result<Bytes, BlockError> {
        let (sender, receiver) = tokio::sync::oneshot::channel();
        export.device.submit(op, Box::new(move |result| drop(sender.send(result))));
        receiver.await.unwrap()
    }
}
