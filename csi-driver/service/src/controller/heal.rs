//! Replicas that do not come back, and what is left of those that were given up; part of the sweep.
//!
//! - A volume lists fewer replicas than wanted: one is added. Listed ones that were never in sync are made, if they were not.
//! - A replica is out of sync, and its node has been silent for as long as the operator set: it is given up, and a new one is
//!   listed on another node.
//! - A replica was given up, its node answers, and as many members as wanted are in sync: it is deleted and forgotten. Not
//!   before: until then it may be the only other copy, old as it is. Not what an operator's promotion gave up
//!   (R26): if the wrong one was promoted, it is all that is left of the data. ModifyVolume with `replicas` deletes it.
//!
//! **Promise**: no member of the in-sync set is ever given up here, whatever a node's silence means: the transition refuses
//! one, judged by the record that is swapped. So a node that was only cut off costs a rebuild, never data. A controller
//! that has just started counts each node's silence from its own start.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::PoisonError;

use holdfast_proto::storage::ReplaceReplicaRequest;
use holdfast_storage_core::ids::{NodeName, ReplicaId, VolumeId};
use holdfast_storage_core::record::{ReplicaState, VolumeRecord};
use tonic::{Code, Status};

use super::Inner;
use super::replace::never_in_sync;
use crate::status::from_store;

/// New replicas of all volumes that are being rebuilt at most before a further one is listed: a rack that is gone must not
/// turn into as many rebuilds at once as it had replicas.
const REBUILDS_MAX: usize = 8;

/// What is to be done about one replica, or one that is missing.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Step {
    Forget(ReplicaId),
    Make(ReplicaId),
    Replace(ReplicaId),
    Add,
}

impl Inner {
    /// Does what can be done now; what cannot is told in the volume's conditions.
    pub(super) async fn heal(&self, records: &[VolumeRecord]) -> Result<(), Status> {
        let Some(alive) = self.alive_nodes() else { return Ok(()) };
        let lost =
            |node: &NodeName| self.replace_after.is_some_and(|after| self.book.silent_for(node) >= after);
        let mut rebuilds =
            records.iter().flat_map(|r| r.replicas.values()).filter(|r| never_in_sync(r)).count();
        let (mut outcome, mut failures) = (Ok(()), BTreeMap::new());
        for record in records {
            for step in steps(record, &alive, lost) {
                let makes_one = matches!(step, Step::Replace(_) | Step::Add);
                if makes_one && rebuilds >= REBUILDS_MAX {
                    failures.insert(record.volume_id, format!("{rebuilds} replicas are being rebuilt first"));
                    continue;
                }
                match self.take(record.volume_id, step).await {
                    Ok(()) => rebuilds += usize::from(makes_one),
                    // A call is at it, or the record moved: the next sweep looks again.
                    Err(status) if status.code() == Code::Aborted => {}
                    Err(status) => {
                        failures.insert(record.volume_id, status.message().to_owned());
                        outcome = Err(status);
                    }
                }
            }
        }
        *self.unhealed.lock().unwrap_or_else(PoisonError::into_inner) = failures;
        outcome
    }

    async fn take(&self, volume: VolumeId, step: Step) -> Result<(), Status> {
        let replica_id = match step {
            Step::Forget(replica) => {
                let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
                return self.remove_old(volume, replica).await;
            }
            Step::Make(replica) => {
                let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
                let record = self.store.read(volume).await.map_err(from_store)?.record;
                if record.deleting || !record.replicas.get(&replica).is_some_and(never_in_sync) {
                    return Ok(());
                }
                return self.make_empty(&record, replica).await;
            }
            Step::Replace(replica) => replica.to_string(),
            Step::Add => String::new(),
        };
        let request = ReplaceReplicaRequest { volume_id: volume.to_string(), replica_id };
        self.replace_replica(request).await.map(drop)
    }
}

fn steps(record: &VolumeRecord, alive: &BTreeSet<NodeName>, lost: impl Fn(&NodeName) -> bool) -> Vec<Step> {
    if record.deleting {
        return Vec::new();
    }
    let given_up = record.replicas.iter().filter(|(_, r)| r.state == ReplicaState::Faulted);
    let whole = record.in_sync.len() >= record.params.replicas as usize;
    let mut steps: Vec<Step> = given_up
        .clone()
        .filter(|(_, r)| whole && record.promoted.is_none() && alive.contains(&r.node))
        .map(|(id, _)| Step::Forget(*id))
        .collect();
    // What nobody attaches is not rebuilt, and of a volume without a member that answers there is nothing to rebuild from.
    let source =
        record.in_sync.iter().filter_map(|id| record.replicas.get(id)).any(|r| alive.contains(&r.node));
    if record.retired || !source {
        return steps;
    }
    let away = record.replicas.iter().filter(|(_, r)| matches!(r.state, ReplicaState::Offline { .. }));
    steps.extend(away.filter_map(|(id, r)| {
        let made = || (never_in_sync(r) && alive.contains(&r.node)).then_some(Step::Make(*id));
        if lost(&r.node) { Some(Step::Replace(*id)) } else { made() }
    }));
    let kept = record.replicas.len() - given_up.count();
    if kept < record.params.replicas as usize {
        steps.push(Step::Add);
    }
    steps
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use holdfast_storage_core::ids::{Epoch, Lineage};
    use holdfast_storage_core::record::Promotion;
    use holdfast_storage_core::transitions::{self, NewVolume};

    use super::*;
    use crate::volume_request::{Access, parse_params};

    fn mk_record() -> VolumeRecord {
        let nodes = ["a", "b", "c"].map(|node| NodeName(node.to_owned()));
        transitions::create(NewVolume {
            volume_id: VolumeId(1),
            name: "v".to_owned(),
            lineage: Lineage(1),
            size_bytes: 1 << 30,
            epoch_nonce: 1,
            replicas: (1..).map(ReplicaId).zip(nodes).collect(),
            params: parse_params(&HashMap::new(), &Access { block: true, fs_type: None }).unwrap(),
            encryption: None,
            source: None,
        })
    }

    fn told(record: &VolumeRecord, alive: &[&str]) -> Vec<Step> {
        let alive: BTreeSet<NodeName> = alive.iter().map(|node| NodeName((*node).to_owned())).collect();
        steps(record, &alive, |node| !alive.contains(node))
    }

    fn leave(record: &mut VolumeRecord, replica: u128, state: ReplicaState) {
        record.in_sync.remove(&ReplicaId(replica));
        record.replicas.get_mut(&ReplicaId(replica)).unwrap().state = state;
    }

    #[test]
    fn a_member_is_never_given_up_however_silent_its_node_is() {
        assert_eq!(told(&mk_record(), &["a"]), []);
        assert_eq!(told(&mk_record(), &[]), []);
    }

    #[test]
    fn what_left_is_replaced_once_its_node_is_lost_and_while_a_member_answers() {
        let mut record = mk_record();
        let left_epoch = record.epoch;
        leave(&mut record, 2, ReplicaState::Offline { left_epoch });
        assert_eq!(told(&record, &["a", "b", "c"]), [], "its target brings it back");
        assert_eq!(told(&record, &["a"]), [Step::Replace(ReplicaId(2))]);
        assert_eq!(told(&record, &["x"]), [], "there is nothing to rebuild from");
        let new = ReplicaState::Offline { left_epoch: Epoch::default() };
        leave(&mut record, 3, new);
        assert_eq!(told(&record, &["a", "b", "c"]), [Step::Make(ReplicaId(3))], "it may not be there");
        record.retired = true;
        assert_eq!(told(&record, &["a"]), []);
    }

    #[test]
    fn what_was_given_up_is_forgotten_once_its_node_answers_and_a_missing_one_is_added() {
        let mut record = mk_record();
        leave(&mut record, 2, ReplicaState::Faulted);
        assert_eq!(told(&record, &["a", "c"]), [Step::Add]);
        assert_eq!(told(&record, &["a", "b", "c"]), [Step::Add], "kept until the volume is whole");
        record.params.replicas = 2;
        assert_eq!(told(&record, &["a", "c"]), []);
        assert_eq!(told(&record, &["a", "b", "c"]), [Step::Forget(ReplicaId(2))]);
        record.retired = true;
        assert_eq!(told(&record, &["a", "b", "c"]), [Step::Forget(ReplicaId(2))]);
        record.promoted = Some(Promotion { replica: ReplicaId(1), from: Lineage(2) });
        assert_eq!(told(&record, &["a", "b", "c"]), [], "a promotion gave it up");
        record.promoted = None;
        record.deleting = true;
        assert_eq!(told(&record, &["a", "b", "c"]), []);
    }
}
