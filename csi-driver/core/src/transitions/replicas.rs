//! How many replicas a volume has, changed while it is in use.
//!
//! ```text
//! raise:  params.replicas = n, new replicas listed out of sync     one swap by the controller; the target rebuilds them
//! lower:  params.replicas = n, those that go and are not in sync   one swap by the controller
//!         are given up
//!         one member after the other is taken out for good         one swap each, by the target (R7): remove_member
//! move:   one more than wanted is listed, on another node          one swap by the controller: add_spare
//!         once it is in sync, the one that goes is taken out       one swap by the target: remove_member
//! ```
//!
//! *Promised of [`remove_member`]:* no acknowledged write is lost, as every member that stays has it; as many members stay
//! as the volume is to have, so that the set never becomes empty (P6) and no redundancy that is wanted is given away, also
//! where another member failed in the meantime or a twin asks for another one; whom it took out is given up (R34): no target
//! opens it again, so it is neither read nor served, and its data may be deleted.

use std::collections::BTreeSet;

use crate::ids::{Epoch, NodeName, ReplicaId, TargetId};
use crate::record::{RECORD_FORMAT, ReplicaRecord, ReplicaState, VolumeParams, VolumeRecord};

use super::{TransitionError, check_live, check_owner, wrong_state};

/// Replicas that were not given up.
pub fn kept(record: &VolumeRecord) -> impl Iterator<Item = ReplicaId> {
    let replicas = record.replicas.iter();
    replicas.filter(|(_, entry)| entry.state != ReplicaState::Faulted).map(|(replica, _)| *replica)
}

/// Nodes with a replica that was not given up: none of them gets another one.
#[must_use]
pub fn nodes_taken(record: &VolumeRecord) -> BTreeSet<NodeName> {
    kept(record).map(|replica| record.replicas[&replica].node.clone()).collect()
}

/// The replicas that a volume with so many wanted has too many, in the order in which they go: first those that are not in
/// sync, of them those that were away for longest, new ones that were never in sync before all; then members; in both groups
/// the one on the node that the volume is published to last, and equal ones by their ids.
#[must_use]
pub fn surplus(record: &VolumeRecord, wanted: u32) -> Vec<ReplicaId> {
    let mut replicas: Vec<ReplicaId> = kept(record).collect();
    let order = |replica: &ReplicaId| {
        let entry = &record.replicas[replica];
        let here = record.attached_to.as_ref() == Some(&entry.node);
        let left = match entry.state {
            ReplicaState::Offline { left_epoch } => left_epoch.number,
            ReplicaState::InSync | ReplicaState::Faulted => 0,
        };
        (entry.state == ReplicaState::InSync, here, left, *replica)
    };
    replicas.sort_by_key(order);
    let more = replicas.len().saturating_sub(wanted as usize);
    replicas.truncate(more);
    replicas
}

/// Lists a new, empty replica, to be rebuilt by the volume's target: it left at an epoch before all others, so that no
/// dirty map says anything about it (R21). It is to be created with that epoch ([`Epoch::default`]), which no record of a
/// volume has (R35).
pub fn add_replica(
    record: &VolumeRecord,
    replica: ReplicaId,
    node: &NodeName,
) -> Result<VolumeRecord, TransitionError> {
    add_up_to(record, replica, node, record.params.replicas)
}

/// [`add_replica`] of one more than wanted: another one is to leave its node, and does once this one is in sync.
pub fn add_spare(
    record: &VolumeRecord,
    replica: ReplicaId,
    node: &NodeName,
) -> Result<VolumeRecord, TransitionError> {
    add_up_to(record, replica, node, record.params.replicas + 1)
}

fn add_up_to(
    record: &VolumeRecord,
    replica: ReplicaId,
    node: &NodeName,
    most: u32,
) -> Result<VolumeRecord, TransitionError> {
    check_live(record)?;
    let volume = record.volume_id;
    if kept(record).count() >= most as usize {
        return Err(TransitionError::EnoughReplicas { volume, wanted: record.params.replicas });
    }
    if nodes_taken(record).contains(node) {
        return Err(TransitionError::NodeTaken { volume, node: node.clone() });
    }
    if record.replicas.contains_key(&replica) {
        return Err(wrong_state(record, replica, "new"));
    }
    let mut next = record.clone();
    let state = ReplicaState::Offline { left_epoch: Epoch::default() };
    next.replicas.insert(replica, ReplicaRecord { node: node.clone(), state });
    Ok(next)
}

/// Sets the volume's parameters and gives up replicas that are too many and not in sync ([`surplus`]); the members among them
/// are the target's to take out ([`remove_member`]). Repeating it is a success.
pub fn set_params(record: &VolumeRecord, params: VolumeParams) -> Result<VolumeRecord, TransitionError> {
    check_live(record)?;
    let mut next = record.clone();
    next.params = params;
    for replica in surplus(&next, next.params.replicas) {
        give_up(&mut next, replica, |state| state != ReplicaState::InSync);
    }
    if next != *record {
        next.format = RECORD_FORMAT;
    }
    Ok(next)
}

/// Takes a member out for good: epoch+1, and the replica is given up. By the current generation's target only (R7), which
/// makes sure that the others are there with their caches (R9). Refused where fewer members than wanted would stay.
pub fn remove_member(
    record: &VolumeRecord,
    owner: TargetId,
    replica: ReplicaId,
    nonce: u64,
) -> Result<VolumeRecord, TransitionError> {
    check_owner(record, owner)?;
    if !record.in_sync.contains(&replica) {
        return Err(wrong_state(record, replica, "in sync"));
    }
    let stay = record.in_sync.len() - 1;
    if stay == 0 {
        return Err(TransitionError::LastMember(record.volume_id));
    }
    if stay < record.params.replicas as usize {
        return Err(TransitionError::TooFewStay {
            volume: record.volume_id,
            replica,
            stay,
            wanted: record.params.replicas,
        });
    }
    let mut next = record.clone();
    next.format = RECORD_FORMAT;
    next.in_sync.remove(&replica);
    give_up(&mut next, replica, |_| true);
    next.epoch = Epoch { number: record.epoch.number + 1, nonce };
    Ok(next)
}

/// What it holds of snapshots is given up with it: every member holds all that are committed (R28).
fn give_up(record: &mut VolumeRecord, replica: ReplicaId, may: impl Fn(ReplicaState) -> bool) {
    let Some(entry) = record.replicas.get_mut(&replica).filter(|entry| may(entry.state)) else { return };
    entry.state = ReplicaState::Faulted;
    for snapshot in &mut record.snapshots {
        if snapshot.holders.len() > 1 {
            snapshot.holders.remove(&replica);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::SnapshotId;
    use crate::transitions::tests::mk_owned;
    use crate::transitions::{begin_cut, commit_cut, swap_out};

    const OWNER: TargetId = TargetId(7);

    fn id(number: u128) -> ReplicaId {
        ReplicaId(number)
    }

    fn set_wanted(record: &VolumeRecord, replicas: u32) -> Result<VolumeRecord, TransitionError> {
        set_params(record, VolumeParams { replicas, ..record.params.clone() })
    }

    fn mk_wanted(replicas: u128, wanted: u32) -> VolumeRecord {
        let mut record = mk_owned(replicas);
        record.params.replicas = wanted;
        record
    }

    #[test]
    fn those_out_of_sync_go_first_the_longest_away_of_them_and_the_publisher_s_node_last() {
        let record = mk_wanted(5, 5);
        assert_eq!(surplus(&record, 1), [id(2), id(3), id(4), id(5)], "n1 has the volume");
        let left = swap_out(&record, OWNER, &[id(4)], 1).unwrap();
        let left = swap_out(&left, OWNER, &[id(1), id(3)], 2).unwrap();
        assert_eq!(surplus(&left, 2), [id(4), id(3), id(1)]);
        assert_eq!(surplus(&left, 1), [id(4), id(3), id(1), id(2)]);
        assert_eq!(surplus(&left, 5), []);
        let never = crate::transitions::fault_replica(&left, id(4)).unwrap();
        let never = crate::transitions::add_replica(&never, id(9), &NodeName("n9".to_owned())).unwrap();
        assert_eq!(surplus(&never, 3), [id(9), id(3)]);
    }

    #[test]
    fn lowering_gives_up_who_is_not_in_sync_and_leaves_members_to_the_target() {
        let left = swap_out(&mk_wanted(4, 4), OWNER, &[id(3)], 1).unwrap();
        let lowered = set_wanted(&left, 2).unwrap();
        assert_eq!(lowered.params.replicas, 2);
        assert_eq!(
            (lowered.epoch, &lowered.in_sync),
            (left.epoch, &left.in_sync),
            "the set is the target's (R7)"
        );
        assert_eq!(lowered.replicas[&id(3)].state, ReplicaState::Faulted);
        assert_eq!(surplus(&lowered, 2), [id(2)]);
        assert_eq!(set_wanted(&lowered, 2).as_ref(), Ok(&lowered));
        let raised = set_wanted(&lowered, 4).unwrap();
        assert_eq!(raised.replicas, lowered.replicas, "what is given up stays so (R34)");
    }

    #[test]
    fn a_move_lists_one_more_than_wanted_and_no_second_one() {
        let record = mk_wanted(3, 3);
        let node = |n: u32| NodeName(format!("spare{n}"));
        let full = Err(TransitionError::EnoughReplicas { volume: record.volume_id, wanted: 3 });
        assert_eq!(add_replica(&record, id(4), &node(1)), full);
        let listed = add_spare(&record, id(4), &node(1)).unwrap();
        assert_eq!(listed.in_sync, record.in_sync);
        assert_eq!(add_spare(&listed, id(5), &node(2)), full);
        let taken = record.replicas[&id(2)].node.clone();
        assert!(matches!(add_spare(&record, id(4), &taken), Err(TransitionError::NodeTaken { .. })));
        assert!(remove_member(&listed, OWNER, id(1), 1).is_err(), "not before the new one is in sync");
    }

    #[test]
    fn p6_a_member_is_taken_out_only_while_as_many_as_are_wanted_stay() {
        let record = mk_wanted(3, 2);
        assert!(remove_member(&record, TargetId(8), id(3), 1).is_err(), "not its target (R7)");
        let removed = remove_member(&record, OWNER, id(3), 1).unwrap();
        assert_eq!(removed.replicas[&id(3)].state, ReplicaState::Faulted);
        assert_eq!(removed.epoch, Epoch { number: record.epoch.number + 1, nonce: 1 });
        assert!(matches!(
            remove_member(&removed, OWNER, id(2), 2),
            Err(TransitionError::TooFewStay { stay: 1, wanted: 2, .. })
        ));
        assert!(remove_member(&removed, OWNER, id(3), 2).is_err(), "it is no member any more");
        let failed = swap_out(&record, OWNER, &[id(2)], 1).unwrap();
        assert!(remove_member(&failed, OWNER, id(3), 2).is_err(), "another one failed meanwhile");
        let last = mk_wanted(1, 0);
        assert_eq!(remove_member(&last, OWNER, id(1), 2), Err(TransitionError::LastMember(last.volume_id)));
    }

    #[test]
    fn a_replica_that_goes_holds_no_snapshot_and_the_others_do() {
        let record = mk_wanted(3, 2);
        let cutting = begin_cut(&record, OWNER, SnapshotId(70)).unwrap();
        let cut = commit_cut(&cutting, OWNER, SnapshotId(70), &record.in_sync).unwrap();
        let removed = remove_member(&cut, OWNER, id(3), 1).unwrap();
        assert_eq!(removed.snapshots[0].holders, [id(1), id(2)].into());
    }
}
