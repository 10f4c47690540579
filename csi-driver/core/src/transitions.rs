//! Every change of a volume's record, as a pure function: record in, changed record out, or why not.
//!
//! The caller swaps the result in under the version it read; on a conflict it reads again and decides anew (R7).

use crate::encryption::Encryption;
use crate::ids::{
    Attachment, Epoch, Generation, Lineage, NodeName, ReplicaId, SnapshotId, TargetId, VolumeId,
};
use crate::record::{
    CloneSource, Formatted, RECORD_FORMAT, REQUESTED_MAX, ReplicaRecord, ReplicaState, SNAPSHOTS_MAX,
    VolumeParams, VolumeRecord,
};

mod history;
mod keys;
mod replicas;
mod requests;
mod snapshots;

pub use history::*;
pub use keys::*;
pub use replicas::*;
pub use requests::*;
pub use snapshots::*;

/// Why a record cannot be changed as asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransitionError {
    /// The record's format is later than this program.
    #[error(
        "the record of volume {volume} has format {format}, this program knows up to {RECORD_FORMAT}: upgrade it"
    )]
    Format {
        /// The volume.
        volume: VolumeId,
        /// Its record's format.
        format: u32,
    },
    /// The volume is being deleted.
    #[error("volume {0} is being deleted")]
    Deleting(VolumeId),
    /// The volume was deleted while it had snapshots.
    #[error("volume {0} was deleted; only its snapshots are kept")]
    Retired(VolumeId),
    /// The volume is published to another node.
    #[error("volume {volume} is published to node {node}")]
    PublishedElsewhere {
        /// The volume.
        volume: VolumeId,
        /// Where it is published.
        node: NodeName,
    },
    /// The volume is published, to this node, with the other access mode.
    #[error("volume {0} is published to this node already with another access mode")]
    OtherMode(VolumeId),
    /// The volume is published to no node, or under another attachment than the caller's.
    #[error("volume {volume} is not published to node {node} as attachment {attachment}")]
    NotPublishedHere {
        /// The volume.
        volume: VolumeId,
        /// The caller's node.
        node: NodeName,
        /// The caller's attachment.
        attachment: Attachment,
    },
    /// Another target took a later generation (R7).
    #[error("volume {volume} belongs to generation {generation} now")]
    GenerationMoved {
        /// The volume.
        volume: VolumeId,
        /// The record's generation.
        generation: Generation,
    },
    /// The change would empty the in-sync set (P6).
    #[error("the change would leave volume {0} without an in-sync replica")]
    LastMember(VolumeId),
    /// The record does not know the replica, or not in the needed state.
    #[error("replica {replica} of volume {volume} is not {expected}")]
    ReplicaState {
        /// The volume.
        volume: VolumeId,
        /// The replica.
        replica: ReplicaId,
        /// What it would have to be.
        expected: &'static str,
    },
    /// A further replica would be one too many.
    #[error("volume {volume} has the {wanted} replicas it is to have: replace one of them instead")]
    EnoughReplicas {
        /// The volume.
        volume: VolumeId,
        /// Replicas wanted.
        wanted: u32,
    },
    /// Taking a member out would leave fewer than the volume is to have.
    #[error(
        "without replica {replica} volume {volume} would have {stay} replicas in sync, it is to have {wanted}"
    )]
    TooFewStay {
        /// The volume.
        volume: VolumeId,
        /// The replica.
        replica: ReplicaId,
        /// Members that would stay.
        stay: usize,
        /// Replicas wanted.
        wanted: u32,
    },
    /// Two replicas on one node die together.
    #[error("node {node} holds another replica of volume {volume}")]
    NodeTaken {
        /// The volume.
        volume: VolumeId,
        /// The node.
        node: NodeName,
    },
    /// Formatting goes never, formatting, yes, and never back (R36).
    #[error("volume {volume} cannot go from format state {from:?} to {to:?}")]
    Format36 {
        /// The volume.
        volume: VolumeId,
        /// State in the record.
        from: Formatted,
        /// State asked for.
        to: Formatted,
    },
    /// The volume is not encrypted, so that no key is its key.
    #[error("volume {0} is not encrypted")]
    NotEncrypted(VolumeId),
    /// Its data, if there is any, was written with another key.
    #[error("the secret is not that of volume {0}, which was first staged with another one")]
    OtherKey(VolumeId),
    /// The snapshot is not there, or not in the needed state.
    #[error("snapshot {snapshot} of volume {volume} is not {expected}")]
    SnapshotState {
        /// The volume.
        volume: VolumeId,
        /// The snapshot.
        snapshot: SnapshotId,
        /// What it would have to be.
        expected: &'static str,
    },
    /// Volumes were made from the snapshot (R30).
    #[error("snapshot {snapshot} of volume {volume} has {clones} clones: delete them first")]
    SnapshotInUse {
        /// The volume.
        volume: VolumeId,
        /// The snapshot.
        snapshot: SnapshotId,
        /// How many.
        clones: usize,
    },
    /// A volume's snapshots outlive it.
    #[error("volume {volume} has {snapshots} snapshots: they are deleted first")]
    HasSnapshots {
        /// The volume.
        volume: VolumeId,
        /// How many.
        snapshots: usize,
    },
    /// No further snapshot fits.
    #[error("volume {0} has {SNAPSHOTS_MAX} snapshots, the most it can have: delete one first")]
    SnapshotsFull(VolumeId),
    /// No further snapshot can be asked for.
    #[error("of volume {0} {REQUESTED_MAX} snapshots are asked for, the most there can be: delete one first")]
    RequestsFull(VolumeId),
    /// A replica returns without having all snapshots (R28).
    #[error("replica {replica} of volume {volume} lacks snapshot {snapshot}")]
    SnapshotMissing {
        /// The volume.
        volume: VolumeId,
        /// The replica.
        replica: ReplicaId,
        /// What it lacks.
        snapshot: SnapshotId,
    },
    /// A promotion begins a history of its own (R26).
    #[error("volume {0} has this lineage already: a promotion needs a new one")]
    LineageUsed(VolumeId),
    /// A volume only grows, by whole regions (R31).
    #[error("volume {volume} of {from_bytes} bytes cannot be made {to_bytes} bytes large")]
    Size {
        /// The volume.
        volume: VolumeId,
        /// Its size.
        from_bytes: u64,
        /// The size asked for.
        to_bytes: u64,
    },
    /// The volume is published, so its target belongs on that node (R7).
    #[error("volume {volume} is published to node {node}: its target there does the work")]
    Published {
        /// The volume.
        volume: VolumeId,
        /// Where.
        node: NodeName,
    },
}

/// What [`create`] needs to know.
#[derive(Debug, Clone)]
pub struct NewVolume {
    /// Random id.
    pub volume_id: VolumeId,
    /// CreateVolume's name.
    pub name: String,
    /// Random nonce.
    pub lineage: Lineage,
    /// Bytes, a multiple of the region size.
    pub size_bytes: u64,
    /// Random nonce of the first epoch.
    pub epoch_nonce: u64,
    /// Random replica ids with the nodes that [`crate::placement::place`] chose; each created empty.
    pub replicas: Vec<(ReplicaId, NodeName)>,
    /// Parameters.
    pub params: VolumeParams,
    /// What makes the key, where it is to be encrypted.
    pub encryption: Option<Encryption>,
    /// The snapshot that the replicas begin as, with its format state; none: they begin without data.
    pub source: Option<(CloneSource, Formatted)>,
}

/// The record of a new volume: all replicas in sync, epoch 1. The replicas are created with that epoch.
#[must_use]
pub fn create(volume: NewVolume) -> VolumeRecord {
    let (source, formatted) = volume.source.map_or((None, Formatted::Never), |(s, f)| (Some(s), f));
    VolumeRecord {
        format: RECORD_FORMAT,
        volume_id: volume.volume_id,
        name: volume.name,
        lineage: volume.lineage,
        size_bytes: volume.size_bytes,
        attachment: Attachment(0),
        attached_to: None,
        read_only: false,
        generation: Generation(0),
        generation_attachment: Attachment(0),
        target_id: None,
        epoch: Epoch { number: 1, nonce: volume.epoch_nonce },
        in_sync: volume.replicas.iter().map(|(id, _)| *id).collect(),
        replicas: volume
            .replicas
            .into_iter()
            .map(|(id, node)| (id, ReplicaRecord { node, state: ReplicaState::InSync }))
            .collect(),
        snapshots: Vec::new(),
        requested: Vec::new(),
        retired: false,
        source,
        restored: false,
        promoted: None,
        formatted,
        encryption: volume.encryption,
        deleting: false,
        params: volume.params,
    }
}

/// Publishes to `node`: attachment+1. Published there already in the same mode: the record unchanged.
pub fn publish(
    record: &VolumeRecord,
    node: &NodeName,
    read_only: bool,
) -> Result<VolumeRecord, TransitionError> {
    check_live(record)?;
    if record.retired {
        return Err(TransitionError::Retired(record.volume_id));
    }
    match &record.attached_to {
        Some(at) if at != node => {
            Err(TransitionError::PublishedElsewhere { volume: record.volume_id, node: at.clone() })
        }
        Some(_) if record.read_only != read_only => Err(TransitionError::OtherMode(record.volume_id)),
        Some(_) => Ok(record.clone()),
        None => {
            let mut next = record.clone();
            next.attachment = record.attachment.next();
            next.attached_to = Some(node.clone());
            next.read_only = read_only;
            Ok(next)
        }
    }
}

/// Ends the publication to `node` (to any, if `None`), without asking that node. Not published there: unchanged.
pub fn unpublish(record: &VolumeRecord, node: Option<&NodeName>) -> Result<VolumeRecord, TransitionError> {
    check_format(record)?;
    let mut next = record.clone();
    if node.is_none() || record.attached_to.as_ref() == node {
        next.attached_to = None;
        next.read_only = false;
    }
    Ok(next)
}

/// A start of a target on `node` for `attachment`: generation+1 (R1).
pub fn take_generation(
    record: &VolumeRecord,
    node: &NodeName,
    attachment: Attachment,
    target_id: TargetId,
) -> Result<VolumeRecord, TransitionError> {
    check_live(record)?;
    if record.attached_to.as_ref() != Some(node) || record.attachment != attachment {
        return Err(TransitionError::NotPublishedHere {
            volume: record.volume_id,
            node: node.clone(),
            attachment,
        });
    }
    let mut next = record.clone();
    next.generation = record.generation.next();
    next.generation_attachment = attachment;
    next.target_id = Some(target_id);
    Ok(next)
}

/// A start of a target for work on a volume that is published to nobody: a snapshot, growth (R7). Generation+1; the
/// attachment stays, as there is no client.
pub fn take_detached_generation(
    record: &VolumeRecord,
    target_id: TargetId,
) -> Result<VolumeRecord, TransitionError> {
    check_live(record)?;
    if let Some(node) = &record.attached_to {
        return Err(TransitionError::Published { volume: record.volume_id, node: node.clone() });
    }
    let mut next = record.clone();
    next.generation = record.generation.next();
    next.generation_attachment = record.attachment;
    next.target_id = Some(target_id);
    Ok(next)
}

/// Takes members out of the in-sync set: epoch+1. By the current generation's target only (R7, R9).
pub fn swap_out(
    record: &VolumeRecord,
    owner: TargetId,
    leaving: &[ReplicaId],
    nonce: u64,
) -> Result<VolumeRecord, TransitionError> {
    check_owner(record, owner)?;
    let mut next = record.clone();
    for replica in leaving {
        let state = next.replicas.get_mut(replica).filter(|_| next.in_sync.remove(replica));
        let Some(entry) = state else {
            return Err(wrong_state(record, *replica, "in sync"));
        };
        entry.state = ReplicaState::Offline { left_epoch: record.epoch };
    }
    if next.in_sync.is_empty() {
        return Err(TransitionError::LastMember(record.volume_id));
    }
    next.epoch = Epoch { number: record.epoch.number + 1, nonce };
    Ok(next)
}

/// Takes a caught-up replica into the in-sync set: epoch+1 (R24). It has every committed snapshot (R28).
pub fn join(
    record: &VolumeRecord,
    owner: TargetId,
    replica: ReplicaId,
    nonce: u64,
) -> Result<VolumeRecord, TransitionError> {
    check_owner(record, owner)?;
    if let Some(missing) = record.committed().find(|s| !s.holders.contains(&replica)) {
        return Err(TransitionError::SnapshotMissing {
            volume: record.volume_id,
            replica,
            snapshot: missing.id,
        });
    }
    let mut next = record.clone();
    match next.replicas.get_mut(&replica) {
        Some(entry) if matches!(entry.state, ReplicaState::Offline { .. }) => {
            entry.state = ReplicaState::InSync
        }
        _ => return Err(wrong_state(record, replica, "offline")),
    }
    next.in_sync.insert(replica);
    next.epoch = Epoch { number: record.epoch.number + 1, nonce };
    Ok(next)
}

/// Gives up a replica that is not in sync: its id is never used again (R34). It stays listed until [`forget_replica`], as
/// its node may still have it. One that is given up already: the record unchanged.
pub fn fault_replica(record: &VolumeRecord, replica: ReplicaId) -> Result<VolumeRecord, TransitionError> {
    check_live(record)?;
    let mut next = record.clone();
    match next.replicas.get_mut(&replica) {
        Some(entry) if entry.state != ReplicaState::InSync => entry.state = ReplicaState::Faulted,
        _ => return Err(wrong_state(record, replica, "out of sync")),
    }
    Ok(next)
}

/// Takes a replica that was given up off the list: its node confirmed that it has nothing of it (R34).
pub fn forget_replica(record: &VolumeRecord, replica: ReplicaId) -> Result<VolumeRecord, TransitionError> {
    check_format(record)?;
    let mut next = record.clone();
    match next.replicas.remove(&replica) {
        Some(entry) if entry.state == ReplicaState::Faulted => Ok(next),
        None => Ok(next),
        Some(_) => Err(wrong_state(record, replica, "faulted")),
    }
}

/// Moves the format state on (R36); the state it has already is a success.
pub fn set_formatted(record: &VolumeRecord, to: Formatted) -> Result<VolumeRecord, TransitionError> {
    check_live(record)?;
    let from = record.formatted;
    let allowed = from == to
        || matches!(
            (from, to),
            (Formatted::Never, Formatted::Formatting) | (Formatted::Formatting, Formatted::Yes)
        );
    if !allowed {
        return Err(TransitionError::Format36 { volume: record.volume_id, from, to });
    }
    let mut next = record.clone();
    next.formatted = to;
    Ok(next)
}

/// Sets the tombstone (R34). A published volume is not deleted, nor one that has snapshots: whoever was told of one may rely
/// on it ([`retire`]). A second call is a success.
pub fn begin_delete(record: &VolumeRecord) -> Result<VolumeRecord, TransitionError> {
    check_format(record)?;
    let snapshots = record.committed().count();
    if snapshots > 0 && !record.deleting {
        return Err(TransitionError::HasSnapshots { volume: record.volume_id, snapshots });
    }
    if let Some(node) = &record.attached_to {
        return Err(TransitionError::PublishedElsewhere { volume: record.volume_id, node: node.clone() });
    }
    let mut next = record.clone();
    next.deleting = true;
    Ok(next)
}

/// Refuses a record of a later format.
pub fn check_format(record: &VolumeRecord) -> Result<(), TransitionError> {
    if record.format > RECORD_FORMAT {
        return Err(TransitionError::Format { volume: record.volume_id, format: record.format });
    }
    Ok(())
}

fn check_live(record: &VolumeRecord) -> Result<(), TransitionError> {
    check_format(record)?;
    if record.deleting { Err(TransitionError::Deleting(record.volume_id)) } else { Ok(()) }
}

fn check_owner(record: &VolumeRecord, owner: TargetId) -> Result<(), TransitionError> {
    check_format(record)?;
    if record.target_id == Some(owner) {
        return Ok(());
    }
    Err(TransitionError::GenerationMoved { volume: record.volume_id, generation: record.generation })
}

fn wrong_state(record: &VolumeRecord, replica: ReplicaId, expected: &'static str) -> TransitionError {
    TransitionError::ReplicaState { volume: record.volume_id, replica, expected }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn mk_record(replicas: u128) -> VolumeRecord {
        create(NewVolume {
            volume_id: VolumeId(1),
            name: "data".to_owned(),
            lineage: Lineage(9),
            size_bytes: 1 << 20,
            epoch_nonce: 5,
            replicas: (1..=replicas).map(|n| (ReplicaId(n), NodeName(format!("n{n}")))).collect(),
            params: VolumeParams::new(3, "ext4"),
            encryption: None,
            source: None,
        })
    }

    pub(crate) fn mk_owned(replicas: u128) -> VolumeRecord {
        let published = publish(&mk_record(replicas), &NodeName("n1".to_owned()), false).unwrap();
        take_generation(&published, &NodeName("n1".to_owned()), Attachment(1), TargetId(7)).unwrap()
    }

    #[test]
    fn r1_every_start_is_a_generation_and_only_a_publish_an_attachment() {
        let first = mk_owned(3);
        let second = take_generation(&first, &NodeName("n1".to_owned()), Attachment(1), TargetId(8)).unwrap();
        assert_eq!((second.generation, second.attachment), (Generation(2), Attachment(1)));
        let stale = take_generation(&first, &NodeName("n2".to_owned()), Attachment(1), TargetId(8));
        assert!(matches!(stale, Err(TransitionError::NotPublishedHere { .. })));
    }

    #[test]
    fn publishing_is_idempotent_and_names_the_other_node() {
        let record = mk_owned(3);
        assert_eq!(publish(&record, &NodeName("n1".to_owned()), false).as_ref(), Ok(&record));
        let elsewhere = publish(&record, &NodeName("n2".to_owned()), false).unwrap_err();
        assert!(elsewhere.to_string().contains("n1"), "{elsewhere}");
        let moved = unpublish(&record, Some(&NodeName("n1".to_owned()))).unwrap();
        assert_eq!(publish(&moved, &NodeName("n2".to_owned()), false).unwrap().attachment, Attachment(2));
        assert_eq!(unpublish(&record, Some(&NodeName("n3".to_owned()))).as_ref(), Ok(&record));
    }

    #[test]
    fn r7_only_the_owner_changes_the_set() {
        let refused = swap_out(&mk_owned(3), TargetId(6), &[ReplicaId(1)], 1);
        assert!(matches!(refused, Err(TransitionError::GenerationMoved { .. })));
    }

    #[test]
    fn p6_the_set_is_never_emptied_and_a_leaver_keeps_its_epoch() {
        let record = mk_owned(2);
        let left = swap_out(&record, TargetId(7), &[ReplicaId(1)], 1).unwrap();
        assert_eq!(left.replicas[&ReplicaId(1)].state, ReplicaState::Offline { left_epoch: record.epoch });
        assert_eq!(left.epoch, Epoch { number: 2, nonce: 1 });
        assert_eq!(
            swap_out(&left, TargetId(7), &[ReplicaId(2)], 1),
            Err(TransitionError::LastMember(VolumeId(1)))
        );
        let back = join(&left, TargetId(7), ReplicaId(1), 2).unwrap();
        assert_eq!(back.in_sync, record.in_sync);
    }

    #[test]
    fn r34_a_replica_is_replaced_under_a_new_id_and_no_member_is_given_up() {
        let record = mk_owned(3);
        let node = |name: &str| NodeName(name.to_owned());
        assert!(matches!(
            add_replica(&record, ReplicaId(4), &node("n4")),
            Err(TransitionError::EnoughReplicas { wanted: 3, .. })
        ));
        assert!(matches!(
            fault_replica(&record, ReplicaId(1)),
            Err(TransitionError::ReplicaState { expected: "out of sync", .. })
        ));
        let left = swap_out(&record, TargetId(7), &[ReplicaId(1)], 1).unwrap();
        let faulted = fault_replica(&left, ReplicaId(1)).unwrap();
        assert_eq!(faulted.epoch, left.epoch, "no change of the in-sync set (R7)");
        assert!(matches!(
            add_replica(&faulted, ReplicaId(4), &node("n2")),
            Err(TransitionError::NodeTaken { .. })
        ));
        assert!(add_replica(&faulted, ReplicaId(1), &node("n1")).is_err(), "ids are never reused");
        let added = add_replica(&faulted, ReplicaId(4), &node("n1")).unwrap();
        let state = ReplicaState::Offline { left_epoch: Epoch::default() };
        assert_eq!(added.replicas[&ReplicaId(4)].state, state);
        let forgotten = forget_replica(&added, ReplicaId(1)).unwrap();
        assert!(!forgotten.replicas.contains_key(&ReplicaId(1)));
        assert!(forget_replica(&added, ReplicaId(4)).is_err());
        assert!(join(&forgotten, TargetId(7), ReplicaId(4), 2).is_ok());
    }

    #[test]
    fn r36_formatting_never_goes_back() {
        let record = mk_record(1);
        assert!(set_formatted(&record, Formatted::Yes).is_err());
        let formatting = set_formatted(&record, Formatted::Formatting).unwrap();
        let yes = set_formatted(&formatting, Formatted::Yes).unwrap();
        assert!(set_formatted(&yes, Formatted::Formatting).is_err());
    }
}
