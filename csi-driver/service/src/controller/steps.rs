//! What is to be done about a volume's replicas, decided on its record and on what is known of the nodes; pure.
//!
//! - It lists fewer replicas than wanted: one is added. Listed ones that were never in sync are made, if they were not.
//! - A replica is out of sync, and its node is lost: it is given up, and a new one is listed elsewhere.
//! - A replica's node leaves: one more than wanted is listed elsewhere. Once more members than wanted are in sync the leaving
//!   one is taken out, which is the target's work (R7); one that is not in sync is given up once as many as wanted are. Two that
//!   leave go one after the other.
//! - More members than wanted with no such reason, as after a ModifyVolume that nobody repeated or a drain that was taken back:
//!   the one on the fullest node is taken out, not the one where the volume is attached. One that is too many and lost is given up.
//! - A replica was given up, its node answers, and as many members as wanted are in sync: it is deleted and forgotten. Not
//!   before: until then it may be the only other copy, old as it is. Not what an operator's promotion gave up (R26): if the
//!   wrong one was promoted, it is all that is left of the data. ModifyVolume with `replicas` deletes it.
//! - Nobody has the volume attached, and a replica could be brought back, or a member's node is lost: a target is run for it.
//!
//! **Promise**: no member of the in-sync set is given up here, whatever a node's silence means, and none is taken out before
//! as many others as wanted are in sync: both transitions judge that by the record that is swapped. A target is run for a
//! lost member's sake only while all other members' nodes answer: it takes out who does not answer, and of members that are
//! equal, as nobody wrote since, none shall be lost to a bad moment. A node that was only cut off costs a rebuild, never data.

use std::collections::BTreeSet;

use holdfast_storage_core::ids::{NodeName, ReplicaId};
use holdfast_storage_core::record::{ReplicaRecord, ReplicaState, VolumeRecord};
use holdfast_storage_core::transitions;

use super::replace::{Because, is_whole, never_in_sync};

/// What is to be done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Step {
    /// Delete what was given up, and forget it.
    Forget(ReplicaId),
    /// Make a listed replica on its node.
    Make(ReplicaId),
    /// List a new one.
    Renew(Because),
    /// Take a member out; as many as wanted stay.
    TakeOut(ReplicaId),
    /// Give up one that is lost, and that nobody misses.
    GiveUp(ReplicaId),
    /// Run a target until all are in sync.
    BringInSync,
}

/// Whether something holds of a node.
pub(super) type Judge<'a> = &'a (dyn Fn(&NodeName) -> bool + Sync);

/// What is known of the nodes.
pub(super) struct Nodes<'a> {
    /// They announced themselves lately.
    pub alive: &'a BTreeSet<NodeName>,
    /// Silent for as long as the operator set, or removed.
    pub lost: Judge<'a>,
    /// Draining or removed.
    pub leaving: Judge<'a>,
    /// Removed.
    pub removed: Judge<'a>,
    /// How much of what they may promise they have promised, in thousandths.
    pub filled: &'a (dyn Fn(&NodeName) -> u64 + Sync),
}

/// All that can be done now, in an order in which it may be done.
pub(super) fn steps(record: &VolumeRecord, nodes: &Nodes<'_>) -> Vec<Step> {
    // R35: of a record that may be of another history nobody is given up, however long its node is silent: it may know better,
    // and all must answer.
    if record.deleting || record.restored {
        return Vec::new();
    }
    let node_of = |id: &ReplicaId| record.replicas.get(id).map(|replica| &replica.node);
    let mut steps = to_forget(record, nodes);
    // Of a volume without a member that answers there is nothing to rebuild from.
    let source = record.in_sync.iter().filter_map(node_of).any(|node| nodes.alive.contains(node));
    if !source {
        return steps;
    }
    let (kept, wanted) = (transitions::kept(record).count(), record.params.replicas as usize);
    for (id, replica) in &record.replicas {
        if !matches!(replica.state, ReplicaState::Offline { .. }) {
            continue;
        }
        let missed = kept <= wanted || !is_whole(record);
        if (nodes.lost)(&replica.node) && missed {
            steps.push(Step::Renew(Because::Lost(*id)));
        } else if (nodes.lost)(&replica.node) || (nodes.leaving)(&replica.node) {
            // One that only leaves may be back in a moment, with what it missed: it goes once another one has its place.
            if !missed {
                steps.push(Step::GiveUp(*id));
            }
        } else if never_in_sync(replica) && nodes.alive.contains(&replica.node) {
            steps.push(Step::Make(*id));
        }
    }
    steps.extend(count(record, nodes));
    if record.attached_to.is_none() && wants_target(record, nodes) {
        steps.push(Step::BringInSync);
    }
    steps
}

/// Why nothing can move from the nodes that the volume's replicas are to leave.
pub(super) fn stuck(record: &VolumeRecord, nodes: &Nodes<'_>) -> Option<&'static str> {
    let mut replicas = record.replicas.values();
    if record.deleting || !replicas.any(|replica| (nodes.leaving)(&replica.node)) {
        return None;
    }
    let members =
        || record.in_sync.iter().filter_map(|id| record.replicas.get(id)).map(|replica| &replica.node);
    if members().any(|node| nodes.alive.contains(node)) {
        return None;
    }
    Some(if members().all(|node| (nodes.removed)(node)) {
        "all its replicas in sync are on nodes that were removed: promote another one (PromoteReplica), or delete the volume"
    } else {
        "no node that holds a replica in sync answers: there is nothing to copy from"
    })
}

fn to_forget(record: &VolumeRecord, nodes: &Nodes<'_>) -> Vec<Step> {
    let may =
        |node: &NodeName| (nodes.removed)(node) || (record.promoted.is_none() && nodes.alive.contains(node));
    let given_up = record.replicas.iter().filter(|(_, r)| r.state == ReplicaState::Faulted);
    given_up.filter(|(_, r)| is_whole(record) && may(&r.node)).map(|(id, _)| Step::Forget(*id)).collect()
}

/// One too few, one too many, or one in a place that it leaves.
fn count(record: &VolumeRecord, nodes: &Nodes<'_>) -> Option<Step> {
    let wanted = record.params.replicas as usize;
    let kept = transitions::kept(record).count();
    if kept < wanted {
        return Some(Step::Renew(Because::Missing));
    }
    let leaves =
        |id: &ReplicaId| record.replicas.get(id).is_some_and(|replica| (nodes.leaving)(&replica.node));
    if record.in_sync.len() > wanted {
        let leaving = record.in_sync.iter().find(|id| leaves(id));
        return leaving.copied().or_else(|| fullest(record, nodes)).map(Step::TakeOut);
    }
    let coming = record.replicas.iter().any(|(id, replica)| never_in_sync(replica) && !leaves(id));
    // What is lost is replaced without one more.
    let lost = |id: &ReplicaId| record.replicas.get(id).is_some_and(|replica| (nodes.lost)(&replica.node));
    let leaving =
        transitions::kept(record).any(|id| leaves(&id) && (record.in_sync.contains(&id) || !lost(&id)));
    (leaving && kept == wanted && !coming).then_some(Step::Renew(Because::Leaving))
}

/// The member on the fullest node; the one where the volume is attached last of all.
fn fullest(record: &VolumeRecord, nodes: &Nodes<'_>) -> Option<ReplicaId> {
    let rank = |id: &&ReplicaId| {
        let node = record.replicas.get(id).map(|replica| &replica.node);
        (node != record.attached_to.as_ref(), node.map(|node| (nodes.filled)(node)))
    };
    record.in_sync.iter().max_by_key(rank).copied()
}

/// Whether a target, which a volume that nobody attaches has none of, would change something. Not of a clone whose layers may
/// not all be there yet.
fn wants_target(record: &VolumeRecord, nodes: &Nodes<'_>) -> bool {
    if record.source.as_ref().is_some_and(|source| !source.linked) {
        return false;
    }
    let (mut lost, mut silent) = (false, false);
    for replica in record.in_sync.iter().filter_map(|id| record.replicas.get(id)) {
        if !nodes.alive.contains(&replica.node) {
            lost |= (nodes.lost)(&replica.node);
            silent |= !(nodes.lost)(&replica.node);
        }
    }
    let comes_back = |replica: &ReplicaRecord| {
        matches!(replica.state, ReplicaState::Offline { .. })
            && nodes.alive.contains(&replica.node)
            && !(nodes.leaving)(&replica.node)
    };
    !silent && (lost || record.replicas.values().any(comes_back))
}

#[cfg(test)]
mod tests {
    use holdfast_storage_core::ids::{Epoch, Lineage, SnapshotId};
    use holdfast_storage_core::record::{CloneSource, Promotion};

    use super::*;
    use crate::controller::fixtures::{leave, mk_node, mk_nodes, mk_record};

    fn told(record: &VolumeRecord, alive: &[&str]) -> Vec<Step> {
        decided(record, alive, &[], &[])
    }

    /// With nodes that drain and that were removed; a silent one counts as lost.
    fn decided(record: &VolumeRecord, alive: &[&str], draining: &[&str], removed: &[&str]) -> Vec<Step> {
        let alive = mk_nodes(alive);
        let among = |list: &[&str], node: &NodeName| list.contains(&node.0.as_str());
        steps(
            record,
            &Nodes {
                alive: &alive,
                lost: &|node| !alive.contains(node),
                leaving: &|node| among(draining, node) || among(removed, node),
                removed: &|node| among(removed, node),
                filled: &|node| u64::from(node.0.as_bytes()[0]),
            },
        )
    }

    fn replace(replica: u128) -> Step {
        Step::Renew(Because::Lost(ReplicaId(replica)))
    }

    /// As its target leaves one that does not answer.
    fn drop_out(record: &mut VolumeRecord, replica: u128) {
        let left_epoch = record.epoch;
        leave(record, replica, ReplicaState::Offline { left_epoch });
    }

    const ADD: Step = Step::Renew(Because::Missing);
    const SPARE: Step = Step::Renew(Because::Leaving);

    /// Lists a new one, as [`SPARE`] does, on node d.
    fn list_spare(record: &mut VolumeRecord) {
        *record = transitions::add_spare(record, ReplicaId(4), &mk_node("d")).unwrap();
    }

    fn rebuild_spare(record: &mut VolumeRecord) {
        record.replicas.get_mut(&ReplicaId(4)).unwrap().state = ReplicaState::InSync;
        record.in_sync.insert(ReplicaId(4));
    }

    #[test]
    fn a_member_is_never_given_up_however_silent_its_node_is() {
        let mut record = mk_record();
        assert_eq!(told(&record, &["a", "b"]), [Step::BringInSync], "a target takes it out");
        assert_eq!(told(&record, &[]), []);
        record.attached_to = Some(mk_node("a"));
        assert_eq!(told(&record, &["a"]), [], "its target does");
    }

    #[test]
    fn what_left_is_replaced_once_its_node_is_lost_and_while_a_member_answers() {
        let mut record = mk_record();
        drop_out(&mut record, 2);
        assert_eq!(told(&record, &["a", "b", "c"]), [Step::BringInSync]);
        assert_eq!(told(&record, &["a", "c"]), [replace(2)], "nothing comes back yet");
        record.attached_to = Some(mk_node("a"));
        assert_eq!(told(&record, &["a", "b", "c"]), [], "its target brings it back");
        assert_eq!(told(&record, &["a"]), [replace(2)]);
        assert_eq!(told(&record, &["x"]), [], "there is nothing to rebuild from");
        let new = ReplicaState::Offline { left_epoch: Epoch::default() };
        leave(&mut record, 3, new);
        assert_eq!(told(&record, &["a", "b", "c"]), [Step::Make(ReplicaId(3))], "it may not be there");
    }

    #[test]
    fn of_members_that_are_equal_none_is_given_away_to_a_bad_moment() {
        let record = mk_record();
        let alive = mk_nodes(&["a"]);
        let told = |lost: &str| {
            let is_lost = |node: &NodeName| node.0 == lost;
            let no = |_: &NodeName| false;
            steps(
                &record,
                &Nodes { alive: &alive, lost: &is_lost, leaving: &no, removed: &no, filled: &|_| 0 },
            )
        };
        assert_eq!(told("b"), [], "c is silent, and may be back at once");
    }

    #[test]
    fn no_target_is_run_for_half_a_clone_and_none_before_an_operator_s_decision() {
        let mut record = mk_record();
        drop_out(&mut record, 2);
        let all = ["a", "b", "c"];
        record.restored = true;
        assert_eq!(told(&record, &all), []);
        assert_eq!(told(&record, &["a", "c"]), [], "R35: who is silent may know better, and is not given up");
        record.restored = false;
        let of = CloneSource {
            volume: record.volume_id,
            snapshot: SnapshotId(1),
            of_volume: false,
            linked: false,
        };
        record.source = Some(of.clone());
        assert_eq!(told(&record, &all), []);
        record.source = Some(CloneSource { linked: true, ..of });
        assert_eq!(told(&record, &all), [Step::BringInSync]);
    }

    #[test]
    fn what_was_given_up_is_forgotten_once_its_node_answers_and_a_missing_one_is_added() {
        let mut record = mk_record();
        record.attached_to = Some(mk_node("a"));
        leave(&mut record, 2, ReplicaState::Faulted);
        assert_eq!(told(&record, &["a", "c"]), [ADD]);
        assert_eq!(told(&record, &["a", "b", "c"]), [ADD], "kept until the volume is whole");
        record.params.replicas = 2;
        assert_eq!(told(&record, &["a", "c"]), []);
        assert_eq!(told(&record, &["a", "b", "c"]), [Step::Forget(ReplicaId(2))]);
        record.promoted = Some(Promotion { replica: ReplicaId(1), from: Lineage(2) });
        assert_eq!(told(&record, &["a", "b", "c"]), [], "a promotion gave it up");
        assert_eq!(decided(&record, &["a", "c"], &[], &["b"]), [Step::Forget(ReplicaId(2))], "it is no more");
        record.promoted = None;
        record.deleting = true;
        assert_eq!(told(&record, &["a", "b", "c"]), []);
    }

    #[test]
    fn a_member_leaves_its_node_once_another_one_is_in_sync_elsewhere() {
        const ALL: [&str; 4] = ["a", "b", "c", "d"];
        let mut record = mk_record();
        record.attached_to = Some(mk_node("a"));
        assert_eq!(decided(&record, &ALL, &["a", "b"], &[]), [SPARE], "one after the other");
        list_spare(&mut record);
        assert_eq!(decided(&record, &ALL, &["a", "b"], &[]), [Step::Make(ReplicaId(4))]);
        rebuild_spare(&mut record);
        assert_eq!(decided(&record, &ALL, &["b"], &[]), [Step::TakeOut(ReplicaId(2))]);
        assert_eq!(decided(&record, &ALL, &["d"], &[]), [Step::TakeOut(ReplicaId(4))]);
        let told = |record: &VolumeRecord| decided(record, &ALL, &[], &[]);
        assert_eq!(told(&record), [Step::TakeOut(ReplicaId(4))], "d is the fullest");
        record.attached_to = Some(mk_node("d"));
        assert_eq!(told(&record), [Step::TakeOut(ReplicaId(3))], "not the one where the volume is attached");
        drop_out(&mut record, 3);
        assert_eq!(decided(&record, &ALL, &["b"], &[]), [], "three are wanted, and three are in sync");
        assert_eq!(decided(&record, &["a", "b", "d"], &[], &["c"]), [Step::GiveUp(ReplicaId(3))]);
    }

    #[test]
    fn a_new_one_that_is_lost_is_given_up_and_not_replaced_unless_it_is_missed() {
        let mut record = mk_record();
        record.attached_to = Some(mk_node("a"));
        list_spare(&mut record);
        assert_eq!(decided(&record, &["a", "b", "c"], &["b"], &[]), [Step::GiveUp(ReplicaId(4))]);
        drop_out(&mut record, 1);
        assert_eq!(decided(&record, &["a", "b", "c"], &["b"], &[]), [replace(4)]);
    }

    #[test]
    fn what_a_removed_node_had_is_replaced_and_a_target_takes_its_member_out() {
        let mut record = mk_record();
        assert_eq!(decided(&record, &["a", "b", "d"], &[], &["c"]), [SPARE, Step::BringInSync]);
        drop_out(&mut record, 3);
        assert_eq!(decided(&record, &["a", "b", "d"], &[], &["c"]), [replace(3)]);
        let all = ["a", "b", "c", "d"];
        assert_eq!(decided(&record, &all, &["c"], &[]), [SPARE], "what it has may be needed until then");
        list_spare(&mut record);
        let made = [Step::Make(ReplicaId(4)), Step::BringInSync];
        assert_eq!(decided(&record, &all, &["c"], &[]), made, "not given up while two are in sync");
        rebuild_spare(&mut record);
        assert_eq!(decided(&record, &all, &["c"], &[]), [Step::GiveUp(ReplicaId(3))]);
        let alive = BTreeSet::new();
        let (all, no) = (|_: &NodeName| true, |_: &NodeName| false);
        let told = |removed: Judge<'_>| {
            stuck(&record, &Nodes { alive: &alive, lost: &all, leaving: &all, removed, filled: &|_| 0 })
        };
        assert!(told(&all).is_some_and(|why| why.contains("promote")));
        assert!(told(&no).is_some_and(|why| why.contains("nothing to copy")));
    }
}
