//! What is to be said of a volume to people: its state at a glance, and where it is not what its record asks for, why not.
//!
//! The record is the truth. What differs from it is brought in line by calls, by the volume's target and by the sweep; each
//! reason here is one that those could not, or not yet, do away with.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::PoisonError;

use holdfast_proto::csi::VolumeHealthErrorType;
use holdfast_proto::csi::volume_health::VolumeHealthEntry;
use holdfast_storage_core::ids::NodeName;
use holdfast_storage_core::record::{ReplicaState, VolumeRecord};
use tonic::Status;

use super::health::judge;
use super::{ControllerService, Inner};

/// A volume and what is to be said of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeReport {
    /// Its record.
    pub record: VolumeRecord,
    /// At a glance.
    pub state: VolumeState,
    /// `Accessible`, `Redundant` and `Converged`, in this order.
    pub conditions: [VolumeCondition; 3],
}

/// A volume at a glance; the worst that holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeState {
    /// Deleted, and some of it is left on a node.
    Deleting,
    /// Deleted for its users, kept for its snapshots.
    Retired,
    /// Its I/O cannot be served.
    Inaccessible,
    /// It has fewer replicas in sync and alive than wanted.
    Degraded,
    /// All is as it was asked for.
    Healthy,
}

impl fmt::Display for VolumeState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(self, f)
    }
}

/// One thing that is so or not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeCondition {
    /// Its name.
    pub kind: &'static str,
    /// Whether it is so.
    pub holds: bool,
    /// One word for programs.
    pub reason: &'static str,
    /// A sentence for people: to what it happened, and what is waited for.
    pub message: String,
}

impl ControllerService {
    /// What is to be said of every volume; `None` right after the start, when the silence of nodes says nothing yet.
    ///
    /// # Errors
    /// The records cannot be listed.
    pub async fn reports(&self) -> Result<Option<Vec<VolumeReport>>, Status> {
        self.inner.reports().await
    }
}

impl Inner {
    async fn reports(&self) -> Result<Option<Vec<VolumeReport>>, Status> {
        let Some(alive) = self.alive_nodes() else { return Ok(None) };
        let records = self.all_records().await?;
        let unhealed = self.unhealed.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |record: VolumeRecord| {
            let why = unhealed.get(&record.volume_id).map(String::as_str);
            report(record, &alive, why)
        };
        Ok(Some(records.into_iter().map(of).collect()))
    }
}

fn report(record: VolumeRecord, alive: &BTreeSet<NodeName>, unhealed: Option<&str>) -> VolumeReport {
    let ills = judge(&record, Some(alive));
    let of = |kind: VolumeHealthErrorType| {
        let kind = i32::from(kind);
        ills.iter().filter(move |ill| ill.status == kind)
    };
    let (inaccessible, degraded) =
        (of(VolumeHealthErrorType::Inaccessible), of(VolumeHealthErrorType::Degraded));
    let accessible = condition("Accessible", "HasReplicas", "enough replicas are in sync", inaccessible);
    let redundant = condition("Redundant", "AsWanted", "as many replicas are in sync as wanted", degraded);
    let mut drifts = drifts(&record, alive);
    if let Some(why) = unhealed {
        drifts.push(("NotHealed", format!("nothing could be done about that: {why}")));
    }
    let converged = VolumeCondition {
        kind: "Converged",
        holds: drifts.is_empty(),
        reason: drifts.first().map_or("AsRecorded", |drift| drift.0),
        message: sentence(drifts.iter().map(|drift| drift.1.as_str()), "all is as the record says"),
    };
    let state = if record.deleting {
        VolumeState::Deleting
    } else if record.retired {
        VolumeState::Retired
    } else if !accessible.holds {
        VolumeState::Inaccessible
    } else if !redundant.holds {
        VolumeState::Degraded
    } else {
        VolumeState::Healthy
    };
    VolumeReport { state, conditions: [accessible, redundant, converged], record }
}

fn condition<'a>(
    kind: &'static str,
    well: &'static str,
    well_message: &str,
    ills: impl Iterator<Item = &'a VolumeHealthEntry>,
) -> VolumeCondition {
    let ills: Vec<&VolumeHealthEntry> = ills.collect();
    let reason = match ills.first().map(|ill| ill.reason.as_str()) {
        None => well,
        Some("BelowMinInSync") => "BelowMinInSync",
        Some("RecordRestored") => "RecordRestored",
        Some("NodesSilent") => "NodesSilent",
        Some(_) => "ReplicasOutOfSync",
    };
    let message = sentence(ills.iter().map(|ill| ill.message.as_str()), well_message);
    VolumeCondition { kind, holds: ills.is_empty(), reason, message }
}

fn sentence<'a>(parts: impl Iterator<Item = &'a str>, otherwise: &str) -> String {
    let text = parts.collect::<Vec<_>>().join("; ");
    if text.is_empty() { otherwise.to_owned() } else { text }
}

/// Where the volume is not what its record asks for: a word and a sentence for each, the gravest first.
fn drifts(record: &VolumeRecord, alive: &BTreeSet<NodeName>) -> Vec<(&'static str, String)> {
    let silent = |node: &NodeName| if alive.contains(node) { "" } else { ", which does not answer" };
    let mut found = Vec::new();
    if record.deleting {
        let nodes: Vec<String> =
            record.replicas.values().map(|r| format!("node {}{}", r.node, silent(&r.node))).collect();
        found.push((
            "DeletionUnderWay",
            format!("it is deleted, and not confirmed yet by {}", nodes.join(", ")),
        ));
        return found;
    }
    if record.restored {
        let advice =
            "its replicas know another history than its record: wait for all of them, or promote one";
        found.push(("RecordRestored", advice.to_owned()));
    }
    let listed = record.replicas.values().filter(|r| r.state != ReplicaState::Faulted).count();
    let wanted = record.params.replicas as usize;
    if listed < wanted && !record.retired {
        found.push((
            "TooFewReplicas",
            format!("{listed} of {wanted} replicas exist: add one (ReplaceReplica)"),
        ));
    }
    for (id, replica) in &record.replicas {
        let (node, silent) = (&replica.node, silent(&replica.node));
        match replica.state {
            ReplicaState::InSync => {}
            ReplicaState::Faulted if record.promoted.is_some() => found.push((
                "ReplicaKept",
                format!("replica {id} on node {node} was given up by a promotion and is kept; ModifyVolume deletes it"),
            )),
            ReplicaState::Faulted => found.push((
                "ReplicaNotDeleted",
                format!("replica {id} was given up, and is not deleted yet by node {node}{silent}"),
            )),
            ReplicaState::Offline { .. } if !alive.contains(node) => {
                found.push(("ReplicaOffline", format!("replica {id} is out of sync on node {node}{silent}")))
            }
            ReplicaState::Offline { .. } => {
                let (reason, who) = match &record.attached_to {
                    Some(target) => ("Rebuilding", format!("node {target} brings it back")),
                    None => ("RebuildWaits", "it is brought back once the volume is attached".to_owned()),
                };
                found.push((reason, format!("replica {id} is out of sync on node {node}: {who}")));
            }
        }
    }
    if record.source.as_ref().is_some_and(|source| !source.linked) {
        found.push((
            "CloneUnfinished",
            "not all its replicas were made from their source yet: repeat CreateVolume".to_owned(),
        ));
    }
    found
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use holdfast_storage_core::ids::{Epoch, Lineage, ReplicaId, VolumeId};
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

    fn mk_alive(nodes: &[&str]) -> BTreeSet<NodeName> {
        nodes.iter().map(|node| NodeName((*node).to_owned())).collect()
    }

    fn leave(record: &mut VolumeRecord, replica: u128, state: ReplicaState) {
        record.in_sync.remove(&ReplicaId(replica));
        record.replicas.get_mut(&ReplicaId(replica)).unwrap().state = state;
    }

    fn told(record: &VolumeRecord, alive: &[&str]) -> (VolumeState, [(bool, &'static str); 3]) {
        let report = report(record.clone(), &mk_alive(alive), None);
        (report.state, report.conditions.map(|c| (c.holds, c.reason)))
    }

    #[test]
    fn a_volume_that_is_as_asked_for_is_healthy() {
        let expected = [(true, "HasReplicas"), (true, "AsWanted"), (true, "AsRecorded")];
        assert_eq!(told(&mk_record(), &["a", "b", "c"]), (VolumeState::Healthy, expected));
    }

    #[test]
    fn each_reason_why_a_volume_does_not_converge_is_told_with_the_node() {
        let all = ["a", "b", "c"];
        let offline = ReplicaState::Offline { left_epoch: Epoch::default() };
        let mut record = mk_record();
        leave(&mut record, 2, offline);
        let message = |record: &VolumeRecord, alive: &[&str]| {
            let [_, _, converged] = report(record.clone(), &mk_alive(alive), Some("no room")).conditions;
            assert!(converged.message.ends_with("no room"));
            assert!(!converged.holds);
            (converged.reason, converged.message)
        };
        let (reason, text) = message(&record, &all);
        assert!(reason == "RebuildWaits" && text.contains("node b"), "{text}");
        let (reason, text) = message(&record, &["a", "c"]);
        assert!(reason == "ReplicaOffline" && text.contains("node b, which does not answer"), "{text}");
        record.attached_to = Some(NodeName("c".to_owned()));
        let (reason, text) = message(&record, &all);
        assert!(reason == "Rebuilding" && text.contains("node c brings it back"), "{text}");
        leave(&mut record, 2, ReplicaState::Faulted);
        let (reason, text) = message(&record, &all);
        assert!(reason == "TooFewReplicas" && text.contains("not deleted yet by node b"), "{text}");
        record.deleting = true;
        let (reason, text) = message(&record, &["a", "b"]);
        assert!(reason == "DeletionUnderWay" && text.contains("node c, which does not answer"), "{text}");
        assert_eq!(told(&record, &all).0, VolumeState::Deleting);
    }

    #[test]
    fn a_volume_none_of_whose_members_answers_is_inaccessible() {
        let record = mk_record();
        let (state, [accessible, redundant, _]) = told(&record, &["x"]);
        assert_eq!((state, accessible), (VolumeState::Inaccessible, (false, "NodesSilent")));
        assert!(redundant.0, "one reason, told once");
        let (state, [accessible, redundant, converged]) = told(&record, &["a"]);
        assert_eq!(state, VolumeState::Degraded);
        assert_eq!((accessible.0, redundant), (true, (false, "NodesSilent")));
        assert!(converged.0, "the record still lists them in sync");
    }
}
