//! What the NBD servers give of this node's replicas: to targets a session's connections, by the name
//! `volume/replica/token`, and to a snapshot of it, read-only, by the name `volume/replica/token@snapshot`; to people on this
//! machine each replica as it is, read-only, by the name `volume/replica`, and each snapshot that it holds by the name
//! `volume/replica@snapshot`.

use std::sync::{Arc, Weak};

use holdfast_io::{BlockDevice, BlockError, BlockOp, Completion};
use holdfast_nbd::{
    BlockStatus, Context, Export, ExportProvider, Extent, ExtentsCompletion, OpenError, PeerIdentity,
};
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::dirty_map::Dirty;
use holdfast_storage_core::ids::{ReplicaId, SessionToken, SnapshotId, VolumeId};
use holdfast_store::AllocState;

use crate::errno;

use super::host::ReplicaHost;
use super::machine::{ReplicaActor, ReplicaInput};

/// Longest range whose allocation is looked up for one request: the tables of so much are read from the disk.
const ALLOCATION_BYTES_MAX: u64 = 1 << 30;
/// Regions with dirty blocks that are looked at for one request, under the replica's lock.
const DIRTY_REGIONS_MAX: usize = 256;

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
        let session = actor.peek(|machine| machine.connections(token, names)).ok_or_else(unknown)?;
        let connections = session.map_err(|owner| {
            let names = names.join(", ");
            tracing::warn!(%replica, owner, names, "an NBD connection to another node's session was refused");
            OpenError::NotAllowed(format!("node {owner} opened the session, the certificate names {names}"))
        })?;
        let connections = if at.is_some() { connections.snapshots } else { connections.data };
        let device = Arc::new(SessionDevice { actor: Arc::clone(&actor), token, at });
        // A snapshot that is not here has no size.
        if at.is_some() && device.size_bytes() == 0 {
            return Err(unknown());
        }
        Ok(Export {
            contexts: contexts(&actor, at),
            read_only: at.is_some(),
            multi_conn: true,
            // Entries in tables, and space given back: no data is written.
            fast_zero: true,
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
        size_of(&self.actor.env.disk, self.at)
    }

    fn submit(&self, op: BlockOp, done: Completion) {
        self.actor.post(ReplicaInput::Data { token: self.token, at: self.at, op, done });
    }
}

/// Tells what a replica, or a snapshot of it, has allocated.
struct AllocationOf(Arc<ReplicaActor>, Option<SnapshotId>);

impl BlockStatus for AllocationOf {
    fn block_status(&self, offset: u64, len: u64, extents_max: usize, done: ExtentsCompletion) {
        allocation(&self.0.env.disk, self.1, offset, len, extents_max, done);
    }
}

/// Bytes of a replica, or of a snapshot of it; 0 for a snapshot that is not here.
fn size_of(disk: &holdfast_store::Replica, at: Option<SnapshotId>) -> u64 {
    match at {
        None => disk.size_bytes(),
        Some(snapshot) => disk.snapshot_size_bytes(snapshot).unwrap_or(0),
    }
}

/// The allocation states of a prefix of the range, in the bits of `base:allocation`.
pub fn allocation(
    disk: &holdfast_store::Replica,
    at: Option<SnapshotId>,
    offset: u64,
    len: u64,
    extents_max: usize,
    done: ExtentsCompletion,
) {
    let size_bytes = size_of(disk, at);
    let len = len.min(ALLOCATION_BYTES_MAX).min(size_bytes.saturating_sub(offset));
    if len == 0 {
        return done(Err(BlockError(errno::EINVAL)));
    }
    let range = BlockRange::covering(offset, len);
    let answer = move |result: Result<Vec<holdfast_store::Extent>, holdfast_store::StoreError>| match result {
        Ok(extents) => done(Ok(extents.iter().take(extents_max.max(1)).map(extent).collect())),
        Err(error) => done(Err(BlockError(error.errno()))),
    };
    disk.allocation_at(at, range, Box::new(answer));
}

/// Absent blocks are holes, blocks that were zeroed are allocated zeroes: R36 must tell them apart.
fn extent(extent: &holdfast_store::Extent) -> Extent {
    let state = match extent.state {
        AllocState::Absent => Extent::HOLE | Extent::ZERO,
        AllocState::Zero => Extent::ZERO,
        AllocState::Data => 0,
    };
    Extent { len: extent.range.len_bytes(), state }
}

/// Tells what an absent replica lacks, as this one knows it.
struct DirtyBlocks {
    actor: Arc<ReplicaActor>,
    absent: ReplicaId,
}

impl BlockStatus for DirtyBlocks {
    fn block_status(&self, offset: u64, len: u64, extents_max: usize, done: ExtentsCompletion) {
        let range = BlockRange::covering(offset, len);
        let runs = self.actor.peek(|machine| {
            machine.maps().get(&self.absent).map(|map| match &map.dirty {
                // R21: everything, never nothing.
                Dirty::Void => vec![(range, true)],
                Dirty::Blocks(blocks) => blocks.runs_in(range, extents_max, DIRTY_REGIONS_MAX),
            })
        });
        let extent = |(run, dirty): &(BlockRange, bool)| Extent {
            len: run.len_bytes(),
            state: if *dirty { Extent::DIRTY } else { 0 },
        };
        // The replica came back or was replaced meanwhile: its map is gone, which is not "nothing is missing".
        let told = runs.ok_or(BlockError(errno::EIO));
        done(told.map(|runs| runs.iter().map(extent).collect()));
    }
}

/// The contexts of a replica: what is allocated, and what each absent replica lacks; of a snapshot the first alone.
fn contexts(actor: &Arc<ReplicaActor>, at: Option<SnapshotId>) -> Vec<Context> {
    let mut contexts = vec![Context::allocation(Arc::new(AllocationOf(Arc::clone(actor), at)))];
    if at.is_none() {
        let absent: Vec<ReplicaId> = actor.peek(|machine| machine.maps().keys().copied().collect());
        contexts.extend(absent.into_iter().map(|absent| {
            Context::dirty(absent, Arc::new(DirtyBlocks { actor: Arc::clone(actor), absent }))
        }));
    }
    contexts
}

/// Gives out this node's replicas for a look: read-only, outside every session, so that looking disturbs none. What is read
/// is what this replica holds at that moment, also while writes go on or another replica holds newer data.
pub struct InspectExports(Weak<ReplicaHost>);

impl InspectExports {
    /// Exports of `host`, as long as it lives.
    #[must_use]
    pub fn new(host: &Arc<ReplicaHost>) -> Self {
        Self(Arc::downgrade(host))
    }
}

impl ExportProvider for InspectExports {
    fn open(&self, name: &str, _: &PeerIdentity) -> Result<Export, OpenError> {
        let unknown = || OpenError::Unknown(name.to_owned());
        let host = self.0.upgrade().ok_or_else(unknown)?;
        let known = host.served().into_iter().find_map(|(volume, replica)| {
            let rest = name.strip_prefix(&format!("{volume}/{replica}"))?;
            let at = match rest.strip_prefix('@') {
                Some(snapshot) => Some(snapshot.parse::<SnapshotId>().ok()?),
                None => rest.is_empty().then_some(None)?,
            };
            Some((volume, replica, at))
        });
        let (volume, replica, at) = known.ok_or_else(unknown)?;
        let actor = host.get(replica).ok_or_else(unknown)?;
        let what = at.map_or("as it is".to_owned(), |snapshot| format!("in snapshot {snapshot}"));
        let device = Arc::new(InspectDevice { actor: Arc::clone(&actor), at });
        if at.is_some() && device.size_bytes() == 0 {
            return Err(unknown());
        }
        Ok(Export {
            contexts: contexts(&actor, at),
            description: format!("replica {replica} of volume {volume} {what} on this node"),
            read_only: true,
            ..Export::new(device)
        })
    }

    fn list(&self, _: &PeerIdentity) -> Vec<String> {
        let Some(host) = self.0.upgrade() else { return Vec::new() };
        let mut names = Vec::new();
        for (volume, replica) in host.served() {
            let name = format!("{volume}/{replica}");
            let snapshots = host.get(replica).map(|actor| actor.env.disk.snapshots()).unwrap_or_default();
            names.extend(snapshots.iter().map(|snapshot| format!("{name}@{snapshot}")));
            names.push(name);
        }
        names
    }
}

/// A replica's disk, or a snapshot on it, for reads alone.
struct InspectDevice {
    actor: Arc<ReplicaActor>,
    at: Option<SnapshotId>,
}

impl BlockDevice for InspectDevice {
    fn size_bytes(&self) -> u64 {
        size_of(&self.actor.env.disk, self.at)
    }

    fn submit(&self, op: BlockOp, done: Completion) {
        match op {
            BlockOp::Read { offset, len } => {
                let answer = move |result: Result<_, holdfast_store::StoreError>| {
                    done(result.map_err(|error| BlockError(error.errno())));
                };
                let disk = &self.actor.env.disk;
                match self.at {
                    None => disk.read(offset, len, Box::new(answer)),
                    Some(snapshot) => disk.read_snapshot(snapshot, offset, len, Box::new(answer)),
                }
            }
            BlockOp::Flush => done(Ok(bytes::Bytes::new())),
            BlockOp::Write { .. } | BlockOp::Zero { .. } => done(Err(BlockError(errno::EPERM))),
        }
    }
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
        host.create(&meta, None, None).unwrap();
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
            promoted_from: None,
            epoch: Epoch::default(),
            in_sync: BTreeSet::from([REPLICA]),
            size_bytes: SIZE_BYTES,
            snapshots: BTreeSet::new(),
            sequence: 1,
            copy: None,
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
