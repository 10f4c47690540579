//! Each way in which copies can be wrong, late or missing.

use super::*;
use crate::encryption::{Encryption, EncryptionKind};
use crate::ids::{Epoch, KeyCheck, RecordVersion, Salt, SnapshotId, TargetId};
use crate::record::{CloneSource, Promotion, VolumeParams};
use crate::transitions::{self, NewVolume};

const VOLUME: VolumeId = VolumeId(7);
const NODES: [&str; 3] = ["a", "b", "c"];

fn node(name: &str) -> NodeName {
    NodeName(name.to_owned())
}

/// Published to a, owned by a target, with replicas 1 to 3 in sync on a to c.
fn mk_record(volume: VolumeId, name: &str) -> VolumeRecord {
    let replicas = (1..).zip(NODES).map(|(id, at)| (ReplicaId(volume.0 * 10 + id), node(at)));
    let created = transitions::create(NewVolume {
        volume_id: volume,
        name: name.to_owned(),
        lineage: Lineage(9),
        size_bytes: 1 << 20,
        epoch_nonce: 5,
        replicas: replicas.collect(),
        params: VolumeParams::new(3, "ext4"),
        encryption: None,
        source: None,
    });
    let published = transitions::publish(&created, &node("a"), false).unwrap();
    let attachment = published.attachment;
    transitions::take_generation(&published, &node("a"), attachment, TargetId(4)).unwrap()
}

fn mk_found(record: &VolumeRecord, at: usize, version: u64) -> Found {
    let replica = ReplicaId(record.volume_id.0 * 10 + at as u128 + 1);
    let mut meta =
        ReplicaMeta::new(record.volume_id, replica, record.lineage, record.size_bytes, record.epoch);
    meta.generation = record.generation;
    Found {
        node: node(NODES[at]),
        replica,
        volume: record.volume_id,
        meta: Some(meta),
        holds_data: Some(true),
        copy: FoundCopy::Record(Box::new(Versioned {
            version: RecordVersion(version),
            record: record.clone(),
        })),
    }
}

fn mk_survey(found: Vec<Found>) -> Survey {
    Survey { found, answered: NODES.map(node).into(), present: Vec::new() }
}

fn whole(record: &VolumeRecord) -> Survey {
    mk_survey((0..3).map(|at| mk_found(record, at, 3)).collect())
}

fn only(survey: &Survey) -> Rescue {
    let mut plan = plan(survey);
    assert_eq!(plan.len(), 1, "{plan:?}");
    plan.remove(0)
}

fn assert_doubt(survey: &Survey, why: &str) -> Rescue {
    let rescue = only(survey);
    assert_eq!(rescue.verdict, Verdict::Doubtful, "{:?}", rescue.notes);
    assert!(rescue.notes.iter().any(|note| note.contains(why)), "{:?}", rescue.notes);
    rescue
}

fn assert_impossible(survey: &Survey, why: &str) {
    let rescue = only(survey);
    assert_eq!(rescue.verdict, Verdict::Impossible, "{:?}", rescue.notes);
    assert!(rescue.notes.iter().any(|note| note.contains(why)), "{:?}", rescue.notes);
    assert_eq!(rescue.record, None);
}

#[test]
fn a_volume_comes_back_as_it_was_suspected_unpublished_and_ahead_of_every_target() {
    let mut record = mk_record(VOLUME, "data");
    record.encryption = Some(Encryption { salt: Salt(3), key_check: Some(KeyCheck(4)) });
    record.params.encryption = EncryptionKind::AesXts;
    record.formatted = Formatted::Yes;
    let mut survey = whole(&record);
    // Opened by a target whose copy never got anywhere.
    survey.found[1].meta.as_mut().unwrap().generation = Generation(6);
    let rescue = only(&survey);
    assert_eq!((rescue.verdict, &rescue.notes), (Verdict::Sound, &Vec::new()));
    let wanted = VolumeRecord {
        restored: true,
        attached_to: None,
        target_id: None,
        generation: Generation(6 + GENERATION_LEAP),
        ..record.clone()
    };
    assert_eq!(rescue.record, Some(wanted.clone()));
    // The target that ran is fenced by it, and a new one can start.
    assert_ne!(wanted.target_id, record.target_id);
    let published = transitions::publish(&wanted, &node("b"), false).unwrap();
    transitions::take_generation(&published, &node("b"), published.attachment, TargetId(5)).unwrap();
}

#[test]
fn the_newest_copy_counts_by_generation_first_and_then_by_version() {
    let old = mk_record(VOLUME, "data");
    let bare = transitions::unpublish(&old, None).unwrap();
    let new = transitions::take_detached_generation(&bare, TargetId(8)).unwrap();
    let later = VolumeRecord { formatted: Formatted::Yes, ..new.clone() };
    // The store was rescued in between, so the later generation has the lower version.
    let mut survey = mk_survey(vec![mk_found(&old, 0, 90), mk_found(&new, 1, 2), mk_found(&later, 2, 3)]);
    for found in &mut survey.found {
        found.holds_data = Some(false);
    }
    let rescue = only(&survey);
    assert_eq!(rescue.newest.unwrap().order(), (new.generation, RecordVersion(3)));
    assert_eq!(rescue.record.unwrap().formatted, Formatted::Yes);
    // The same order and another content is no order.
    survey.found[1] = mk_found(&VolumeRecord { size_bytes: 2 << 20, ..later }, 1, 3);
    assert_impossible(&survey, "of one version and differ");
}

#[test]
fn a_member_that_was_not_found_may_know_better() {
    let record = mk_record(VOLUME, "data");
    let mut survey = whole(&record);
    survey.found.remove(2);
    survey.answered.remove(&node("c"));
    let rescue = assert_doubt(&survey, "node c does not answer");
    assert_eq!(rescue.replicas[&ReplicaId(73)], (node("c"), Whereabouts::Silent));
    assert!(rescue.record.unwrap().restored);
}

#[test]
fn a_volume_whose_other_nodes_have_no_replica_was_deleted_and_stays_so() {
    let record = mk_record(VOLUME, "data");
    let survey = mk_survey(vec![mk_found(&record, 2, 3)]);
    assert_doubt(&survey, "node a answers and does not have replica");
    let deleting = VolumeRecord { deleting: true, ..record };
    assert_impossible(&whole(&deleting), "it was being deleted");
}

#[test]
fn a_replica_that_knows_better_than_the_newest_copy_speaks_against_it() {
    let record = mk_record(VOLUME, "data");
    let with = |change: fn(&mut ReplicaMeta)| {
        let mut survey = whole(&record);
        change(survey.found[1].meta.as_mut().unwrap());
        survey
    };
    assert_doubt(&with(|meta| meta.epoch.number += 1), "knows epoch 2, the newest copy 1");
    assert_doubt(&with(|meta| meta.epoch.nonce += 1), "knows epoch 1");
    assert_doubt(&with(|meta| meta.lineage = Lineage(10)), "knows another history");
    assert_doubt(&with(|meta| meta.size_bytes /= 2), "is smaller");
    assert_eq!(only(&with(|meta| meta.epoch.number -= 1)).verdict, Verdict::Sound);
    // Also one that the newest copy does not list: the copy is from before it was.
    let mut survey = whole(&record);
    let mut stranger = mk_found(&record, 0, 1);
    stranger.replica = ReplicaId(99);
    stranger.node = node("d");
    stranger.meta.as_mut().unwrap().epoch.number += 1;
    survey.found.push(stranger);
    assert_doubt(&survey, "a node that is away has a newer one");
}

#[test]
fn a_member_without_a_copy_that_can_be_read_may_have_known_better() {
    let record = mk_record(VOLUME, "data");
    for (copy, why) in [
        (FoundCopy::Unreadable("its checksum".to_owned()), "cannot be read (its checksum)"),
        (FoundCopy::Absent, "has no copy"),
    ] {
        let mut survey = whole(&record);
        survey.found[0].copy = copy.clone();
        assert_doubt(&survey, why);
        for found in &mut survey.found {
            found.copy = copy.clone();
        }
        assert_impossible(&survey, "no replica that was found has a copy");
    }
    let mut survey = whole(&record);
    survey.found[0].copy = FoundCopy::Later(RECORD_FORMAT + 1);
    assert_impossible(&survey, "rescue it with the release that wrote it");
}

#[test]
fn a_record_that_is_there_and_a_name_that_is_taken_are_left_alone() {
    let record = mk_record(VOLUME, "data");
    let with = |volume, name: Option<&str>| {
        let mut survey = whole(&record);
        survey.present.push(Present { volume, name: name.map(str::to_owned) });
        survey
    };
    let there = only(&with(VOLUME, None));
    assert_eq!((there.verdict, there.record), (Verdict::Present, None));
    assert_impossible(&with(VolumeId(8), Some("data")), "belongs to volume");
    assert_eq!(only(&with(VolumeId(8), Some("other"))).verdict, Verdict::Sound);
    // A retired volume's name is free.
    let mut survey = whole(&VolumeRecord { retired: true, ..record.clone() });
    survey.present.push(Present { volume: VolumeId(8), name: Some("data".to_owned()) });
    assert_eq!(only(&survey).verdict, Verdict::Sound);
}

#[test]
fn of_two_volumes_of_one_name_neither_is_restored_unasked() {
    let (one, two) = (mk_record(VOLUME, "data"), mk_record(VolumeId(8), "data"));
    let found = (0..3).flat_map(|at| [mk_found(&one, at, 3), mk_found(&two, at, 3)]);
    let plan = plan(&mk_survey(found.collect()));
    assert_eq!(plan.len(), 2);
    for rescue in plan {
        assert_eq!(rescue.verdict, Verdict::Doubtful);
        assert!(rescue.notes[0].contains("is also that of volume"), "{:?}", rescue.notes);
    }
}

#[test]
fn a_promotion_ends_the_lineage_that_it_names_and_no_other() {
    let old = mk_record(VOLUME, "data");
    let bare = transitions::unpublish(&old, None).unwrap();
    let owned = transitions::take_detached_generation(&bare, TargetId(8)).unwrap();
    let offline = transitions::swap_out(&owned, TargetId(8), &[ReplicaId(73)], 6).unwrap();
    let promoted = transitions::promote(&offline, ReplicaId(73), Lineage(10), 7).unwrap();
    // The members of before are back, with later generations than the one that was promoted knew of.
    let ahead = VolumeRecord { generation: Generation(50), ..old.clone() };
    let survey = mk_survey(vec![mk_found(&ahead, 0, 9), mk_found(&ahead, 1, 9), mk_found(&promoted, 2, 4)]);
    let rescue = only(&survey);
    assert_eq!(rescue.verdict, Verdict::Sound, "{:?}", rescue.notes);
    assert_eq!(rescue.record.unwrap().lineage, Lineage(10));
    // Not opened yet, it still has the lineage that it is promoted from.
    let mut early = survey;
    early.found[2].meta.as_mut().unwrap().lineage = old.lineage;
    assert_eq!(only(&early).verdict, Verdict::Sound);
    let stranger =
        VolumeRecord { promoted: Some(Promotion { replica: ReplicaId(73), from: Lineage(77) }), ..promoted };
    early.found[2] = mk_found(&stranger, 2, 4);
    assert_impossible(&early, "two histories");
}

#[test]
fn r36_what_the_replicas_hold_decides_about_the_format_and_nothing_is_formatted_twice() {
    for (said, held, is) in [
        (Formatted::Yes, [Some(false); 3], Formatted::Yes),
        (Formatted::Never, [Some(false); 3], Formatted::Never),
        (Formatted::Never, [Some(false), Some(true), Some(false)], Formatted::Yes),
        (Formatted::Formatting, [Some(true); 3], Formatted::Yes),
        (Formatted::Formatting, [Some(false); 3], Formatted::Never),
        (Formatted::Formatting, [Some(false), None, Some(false)], Formatted::Yes),
    ] {
        let record = VolumeRecord { formatted: said, ..mk_record(VOLUME, "data") };
        let mut survey = whole(&record);
        for (found, held) in survey.found.iter_mut().zip(held) {
            found.holds_data = held;
        }
        assert_eq!(only(&survey).record.unwrap().formatted, is, "{said:?} {held:?}");
    }
    let mut raw = mk_record(VOLUME, "data");
    raw.params.fs_type.clear();
    assert_eq!(only(&whole(&raw)).record.unwrap().formatted, Formatted::Never, "raw block has none");
}

#[test]
fn a_clone_counts_as_finished_and_an_offline_replica_that_is_gone_as_given_up() {
    let mut record = mk_record(VOLUME, "data");
    record.source =
        Some(CloneSource { volume: VolumeId(1), snapshot: SnapshotId(1), of_volume: false, linked: false });
    let record = transitions::swap_out(&record, TargetId(4), &[ReplicaId(73)], 6).unwrap();
    let mut survey = whole(&record);
    survey.found.remove(2);
    let rescue = only(&survey);
    assert_eq!(rescue.verdict, Verdict::Sound, "{:?}", rescue.notes);
    assert!(rescue.notes[0].contains("counts as given up"), "{:?}", rescue.notes);
    let written = rescue.record.unwrap();
    assert!(written.source.unwrap().linked);
    assert_eq!(written.replicas[&ReplicaId(73)].state, ReplicaState::Faulted);
    // While its node is silent it may know better: R35 waits for it.
    survey.answered.remove(&node("c"));
    let rescue = only(&survey);
    assert_eq!(rescue.verdict, Verdict::Sound);
    let state = rescue.record.unwrap().replicas[&ReplicaId(73)].state;
    assert_eq!(state, ReplicaState::Offline { left_epoch: Epoch { number: 1, nonce: 5 } });
}
