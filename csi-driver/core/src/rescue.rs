//! What can be restored of a record store that is lost, from the copies of the records that replicas keep (ADR 0011).
//!
//! ```text
//!  a volume's copies ── newest ──> every member found, and none knows better ──> sound: restored
//!                          │                        └ else ──> in doubt: restored if an operator names it
//!                          └ none, two histories, a later format, a tombstone, a name that is taken ──> not restored
//! ```
//!
//! *Promised:* what is restored is marked `restored` and fences every target that still runs, so that nobody serves before all
//! its replicas agree with it (R35), whichever copy was taken. A sound one is what the store said last of whatever was
//! acknowledged: sets follow one another only by swaps that a member of the one before is told of, with the record, before
//! anything is acknowledged (R10).

use std::collections::{BTreeMap, BTreeSet};

use crate::ids::{Generation, Lineage, NodeName, ReplicaId, VolumeId};
use crate::record::{Formatted, RECORD_FORMAT, ReplicaState, VolumeRecord};
use crate::record_copy::CopyStamp;
use crate::record_store::Versioned;
use crate::replica::ReplicaMeta;

#[cfg(test)]
mod tests;

/// So many generations a restored record is ahead of every one that was seen: more than targets can have started on nodes that
/// are away.
pub const GENERATION_LEAP: u64 = 1 << 20;

/// A replica that a node holds.
#[derive(Debug, Clone)]
pub struct Found {
    /// Where.
    pub node: NodeName,
    /// Which.
    pub replica: ReplicaId,
    /// Of which volume.
    pub volume: VolumeId,
    /// What it knows; none: it cannot be read.
    pub meta: Option<ReplicaMeta>,
    /// Whether a block of it is zero or data, where that matters; none: nobody knows.
    pub holds_data: Option<bool>,
    /// Its copy of the record.
    pub copy: FoundCopy,
}

/// A replica's copy of the record.
#[derive(Debug, Clone)]
pub enum FoundCopy {
    /// It has none: no target of this release was started since.
    Absent,
    /// It cannot be read.
    Unreadable(String),
    /// It is of a later record format.
    Later(u32),
    /// The record.
    Record(Box<Versioned>),
}

/// What nodes and store were found to hold.
#[derive(Debug, Default)]
pub struct Survey {
    /// Every replica of every node that answered.
    pub found: Vec<Found>,
    /// The nodes that answered.
    pub answered: BTreeSet<NodeName>,
    /// The records that are there.
    pub present: Vec<Present>,
}

/// A record that the store has.
#[derive(Debug, Clone)]
pub struct Present {
    /// Its volume.
    pub volume: VolumeId,
    /// Its name, unless that is free.
    pub name: Option<String>,
}

/// What becomes of one volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Its record is there: nothing is done.
    Present,
    /// It can be restored.
    Sound,
    /// It can be restored if an operator names it.
    Doubtful,
    /// It cannot.
    Impossible,
}

/// Where a replica of a volume is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Whereabouts {
    /// Its node has it.
    Here,
    /// Its node does not answer.
    Silent,
    /// Its node answers and does not have it.
    Gone,
    /// A node has it, and the record does not list it.
    Unlisted,
}

/// One volume of a plan.
#[derive(Debug, Clone)]
pub struct Rescue {
    /// The volume.
    pub volume: VolumeId,
    /// What becomes of it.
    pub verdict: Verdict,
    /// Why it is in doubt or impossible, and what else is to be known; a sentence each.
    pub notes: Vec<String>,
    /// Its replicas with their nodes.
    pub replicas: BTreeMap<ReplicaId, (NodeName, Whereabouts)>,
    /// The newest copy, as a sentence about which one.
    pub newest: Option<CopyStamp>,
    /// What is to be written, of sound and doubtful ones.
    pub record: Option<VolumeRecord>,
}

/// What can be restored: every volume that a replica was found of.
#[must_use]
pub fn plan(survey: &Survey) -> Vec<Rescue> {
    let mut volumes: BTreeMap<VolumeId, Vec<&Found>> = BTreeMap::new();
    for found in &survey.found {
        volumes.entry(found.volume).or_default().push(found);
    }
    let mut plan: Vec<Rescue> = volumes.iter().map(|(volume, found)| judge(survey, *volume, found)).collect();
    doubt_names(&mut plan);
    plan
}

fn judge(survey: &Survey, volume: VolumeId, found: &[&Found]) -> Rescue {
    let unlisted = found.iter().map(|found| (found.replica, (found.node.clone(), Whereabouts::Unlisted)));
    let mut rescue = Rescue {
        volume,
        verdict: Verdict::Impossible,
        notes: Vec::new(),
        replicas: unlisted.collect(),
        newest: None,
        record: None,
    };
    if survey.present.iter().any(|present| present.volume == volume) {
        rescue.verdict = Verdict::Present;
        return rescue;
    }
    let newest = match newest(volume, found) {
        Ok(newest) => newest,
        Err(sentence) => {
            rescue.notes.push(sentence);
            return rescue;
        }
    };
    let record = &newest.record;
    rescue.newest = Some(CopyStamp::of(newest));
    for (id, entry) in &record.replicas {
        let here = found.iter().any(|found| found.replica == *id && found.node == entry.node);
        let whereabouts = match (here, survey.answered.contains(&entry.node)) {
            (true, _) => Whereabouts::Here,
            (false, true) => Whereabouts::Gone,
            (false, false) => Whereabouts::Silent,
        };
        rescue.replicas.insert(*id, (entry.node.clone(), whereabouts));
    }
    if record.deleting {
        rescue.notes.push("it was being deleted: its replicas may be deleted by hand".to_owned());
        return rescue;
    }
    let taken = |present: &&Present| !record.is_gone() && present.name.as_ref() == Some(&record.name);
    if let Some(other) = survey.present.iter().find(taken) {
        let other = other.volume;
        rescue.notes.push(format!(
            "its name \"{}\" belongs to volume {other} now: delete that one, or leave this one be",
            record.name
        ));
        return rescue;
    }
    let (doubts, told) = look(record, found, &rescue.replicas);
    rescue.verdict = if doubts.is_empty() { Verdict::Sound } else { Verdict::Doubtful };
    rescue.notes = doubts.into_iter().chain(told).collect();
    rescue.record = Some(restored(record, found, &rescue.replicas));
    rescue
}

/// The record that counts, or why none does.
fn newest<'found>(volume: VolumeId, found: &[&'found Found]) -> Result<&'found Versioned, String> {
    let mut copies: Vec<&Versioned> = Vec::new();
    for Found { node, copy, .. } in found {
        match copy {
            FoundCopy::Absent | FoundCopy::Unreadable(_) => {}
            FoundCopy::Later(format) => {
                return Err(format!(
                    "the copy on node {node} has record format {format}, this release knows up to {RECORD_FORMAT}: rescue it \
                     with the release that wrote it"
                ));
            }
            FoundCopy::Record(copy) if copy.record.volume_id == volume => copies.push(copy),
            FoundCopy::Record(_) => return Err(format!("the copy on node {node} is of another volume")),
        }
    }
    // R26: a promotion ends the lineage that it names.
    let over: BTreeSet<Lineage> =
        copies.iter().filter_map(|copy| copy.record.promoted).map(|promotion| promotion.from).collect();
    copies.retain(|copy| !over.contains(&copy.record.lineage));
    let order = |copy: &&Versioned| CopyStamp::of(copy).order();
    let Some(newest) = copies.iter().copied().max_by_key(order) else {
        return Err("no replica that was found has a copy of the record that can be read: a replica of it elsewhere may; else \
                    its data can be read from the pools, but not served again"
            .to_owned());
    };
    if copies.iter().any(|copy| copy.record.lineage != newest.record.lineage) {
        return Err("its copies tell two histories, neither of which came from the other: stop the data processes that hold \
                    the one that does not count, and repeat this"
            .to_owned());
    }
    if copies.iter().any(|copy| order(copy) == order(&newest) && copy.record != newest.record) {
        return Err("two of its copies are of one version and differ: stop the data process that holds the one that does not \
                    count, and repeat this"
            .to_owned());
    }
    Ok(newest)
}

/// What speaks against a record, and what is only to be known.
fn look(
    record: &VolumeRecord,
    found: &[&Found],
    replicas: &BTreeMap<ReplicaId, (NodeName, Whereabouts)>,
) -> (Vec<String>, Vec<String>) {
    let (mut doubts, mut told) = (Vec::new(), Vec::new());
    for (replica, (node, whereabouts)) in replicas {
        let member = record.in_sync.contains(replica);
        let faulted = record.replicas.get(replica).is_some_and(|entry| entry.state == ReplicaState::Faulted);
        match whereabouts {
            Whereabouts::Gone if member => doubts.push(format!(
                "node {node} answers and does not have replica {replica}, which was in sync: the volume was deleted, or the \
                 pool was made anew"
            )),
            Whereabouts::Silent if member => doubts.push(format!(
                "node {node} does not answer, and its replica {replica} was in sync: it may know better, so wait for it. \
                 Restored without it, the volume is not served before it is back, or another replica is promoted"
            )),
            Whereabouts::Gone if !faulted => {
                told.push(format!("node {node} does not have replica {replica} any more: it counts as given up"));
            }
            Whereabouts::Silent if !faulted => told.push(format!(
                "node {node} does not answer: the volume is not served before its replica {replica} is back, or another one \
                 is promoted"
            )),
            Whereabouts::Unlisted => {
                told.push(format!("replica {replica} on node {node} is not listed by the newest copy: it stays as it is"));
            }
            Whereabouts::Here | Whereabouts::Gone | Whereabouts::Silent => {}
        }
    }
    for found in found {
        let member = record.in_sync.contains(&found.replica);
        let listed =
            record.replicas.get(&found.replica).is_some_and(|entry| entry.state != ReplicaState::Faulted);
        doubts.extend(doubt_copy(found).filter(|_| member));
        doubts.extend(doubt_meta(record, found, member, listed));
    }
    (doubts, told)
}

fn doubt_copy(found: &Found) -> Option<String> {
    let Found { node, replica, .. } = found;
    match &found.copy {
        FoundCopy::Record(_) | FoundCopy::Later(_) => None,
        FoundCopy::Absent => Some(format!(
            "replica {replica} on node {node}, which was in sync, has no copy: it may have known better"
        )),
        FoundCopy::Unreadable(why) => Some(format!(
            "the copy of replica {replica} on node {node}, which was in sync, cannot be read ({why}): it may have known better"
        )),
    }
}

/// R35: what a replica learned that the newest copy does not know.
fn doubt_meta(record: &VolumeRecord, found: &Found, member: bool, listed: bool) -> Option<String> {
    let Found { node, replica, .. } = found;
    let Some(meta) = &found.meta else {
        return listed.then(|| format!("replica {replica} on node {node} cannot be read"));
    };
    let promoted = record.promoted.is_some_and(|p| p.replica == *replica && p.from == meta.lineage);
    if promoted {
        return None;
    }
    if meta.lineage != record.lineage {
        // One that was given up keeps the lineage that it had.
        return listed
            .then(|| format!("replica {replica} on node {node} knows another history than the newest copy"));
    }
    let (knows, says) = (meta.epoch, record.epoch);
    if knows.number > says.number || (knows.number == says.number && knows.nonce != says.nonce) {
        return Some(format!(
            "replica {replica} on node {node} knows epoch {}, the newest copy {}: a node that is away has a newer one",
            knows.number, says.number
        ));
    }
    (member && meta.size_bytes < record.size_bytes)
        .then(|| format!("replica {replica} on node {node} is smaller than the newest copy says"))
}

/// The record as it is written: suspected of another history, nobody's, and later than whatever was seen of it.
fn restored(
    record: &VolumeRecord,
    found: &[&Found],
    replicas: &BTreeMap<ReplicaId, (NodeName, Whereabouts)>,
) -> VolumeRecord {
    let mut next = record.clone();
    let seen = found.iter().filter_map(|found| found.meta.as_ref()).map(|meta| meta.generation);
    let latest = seen.chain([record.generation]).max().unwrap_or_default();
    next.format = RECORD_FORMAT;
    next.restored = true;
    next.generation = Generation(latest.0.saturating_add(GENERATION_LEAP));
    next.target_id = None;
    next.attached_to = None;
    next.read_only = false;
    next.formatted = formatted(record, found);
    if let Some(source) = &mut next.source {
        source.linked = true;
    }
    for (replica, entry) in &mut next.replicas {
        let gone = replicas.get(replica).is_some_and(|(_, whereabouts)| *whereabouts == Whereabouts::Gone);
        if gone && matches!(entry.state, ReplicaState::Offline { .. }) {
            entry.state = ReplicaState::Faulted;
        }
    }
    next
}

/// R36: a copy may be of before mkfs began or ended, as no target is told; what the replicas hold decides. A block that holds
/// something forbids mkfs for ever.
fn formatted(record: &VolumeRecord, found: &[&Found]) -> Formatted {
    if record.params.fs_type.is_empty() || record.formatted == Formatted::Yes {
        return record.formatted;
    }
    let of = |replica: &ReplicaId| {
        found.iter().find(|found| found.replica == *replica).and_then(|found| found.holds_data)
    };
    let any = found.iter().any(|found| found.holds_data == Some(true));
    let all_blank = record.in_sync.iter().all(|replica| of(replica) == Some(false));
    match record.formatted {
        _ if any => Formatted::Yes,
        Formatted::Formatting if !all_blank => Formatted::Yes,
        Formatted::Never | Formatted::Formatting | Formatted::Yes => Formatted::Never,
    }
}

/// A name belongs to one volume that is not gone; which of several had it last no copy tells.
fn doubt_names(plan: &mut [Rescue]) {
    let mut named: BTreeMap<String, Vec<VolumeId>> = BTreeMap::new();
    for rescue in plan.iter() {
        if let Some(record) = rescue.record.as_ref().filter(|record| !record.is_gone()) {
            named.entry(record.name.clone()).or_default().push(rescue.volume);
        }
    }
    for rescue in plan {
        let Some(record) = rescue.record.as_ref().filter(|record| !record.is_gone()) else { continue };
        let others = named.get(&record.name).into_iter().flatten().filter(|other| **other != rescue.volume);
        let others: Vec<String> = others.map(ToString::to_string).collect();
        if !others.is_empty() {
            rescue.verdict = Verdict::Doubtful;
            rescue.notes.insert(
                0,
                format!(
                    "its name \"{}\" is also that of volume {}: name the one to restore",
                    record.name,
                    others.join(", ")
                ),
            );
        }
    }
}
