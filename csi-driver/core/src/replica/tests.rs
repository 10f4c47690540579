//! One test per rule, named after it.

mod record_copy;

use std::collections::{BTreeMap, BTreeSet};

use super::*;
use crate::block_range::BlockRange;
use crate::ids::{Block, Epoch, Generation, Lineage, TargetId, VolumeId};
use crate::timers::LEASE_MS;

const EPOCH: Epoch = Epoch { number: 5, nonce: 50 };

fn mk_start() -> ReplicaStart {
    let meta = ReplicaMeta::new(VolumeId(1), ReplicaId(1), Lineage(9), 8 << 20, EPOCH);
    ReplicaStart {
        meta,
        log: BTreeSet::new(),
        maps: BTreeMap::new(),
        boot_cookie: Some(0),
        snapshots: vec![],
    }
}

fn mk_open(generation: u64, target: u128) -> OpenRequest {
    OpenRequest {
        volume_id: VolumeId(1),
        replica_id: ReplicaId(1),
        generation: Generation(generation),
        target_id: TargetId(target),
        lineage: Lineage(9),
        epoch: EPOCH,
        in_sync: BTreeSet::from([ReplicaId(1), ReplicaId(2)]),
        size_bytes: 8 << 20,
        snapshots: BTreeSet::new(),
        promoted_from: None,
        sequence: 0,
        copy: None,
    }
}

fn mk_key(generation: u64, target: u128) -> SessionKey {
    SessionKey {
        generation: Generation(generation),
        target_id: TargetId(target),
        token: mk_token(generation),
    }
}

fn mk_token(generation: u64) -> SessionToken {
    SessionToken(u128::from(generation) + 100)
}

fn actions(replica: &mut Replica) -> Vec<ReplicaAction> {
    std::iter::from_fn(|| replica.poll_action()).collect()
}

/// Feeds an event and lets every disk operation succeed; returns everything but those.
fn drive(replica: &mut Replica, now_ms: u64, event: ReplicaEvent) -> Vec<ReplicaAction> {
    replica.handle_event(now_ms, event);
    let mut out = Vec::new();
    while let Some(action) = replica.poll_action() {
        if let ReplicaAction::Disk { id, .. } = action {
            replica.handle_event(now_ms, ReplicaEvent::DiskDone { id, result: Ok(()) });
        } else {
            out.push(action);
        }
    }
    out
}

fn open(replica: &mut Replica, now_ms: u64, generation: u64, target: u128) -> Vec<ReplicaAction> {
    let (call, request, token) = (ReplicaCall(generation), mk_open(generation, target), mk_token(generation));
    drive(replica, now_ms, ReplicaEvent::Open { call, request, token })
}

fn control(replica: &mut Replica, now_ms: u64, key: SessionKey, op: ControlOp) -> Vec<ReplicaAction> {
    drive(replica, now_ms, ReplicaEvent::Control { call: ReplicaCall(900), key, op })
}

fn write(replica: &mut Replica, start: u64) -> Vec<ReplicaAction> {
    let op = DataOp::Write { range: BlockRange::new(start, 1), fua: false };
    replica.handle_event(1, ReplicaEvent::Data { call: ReplicaCall(800), token: mk_token(1), op });
    actions(replica)
}

fn opened(actions: &[ReplicaAction]) -> Option<&OpenReply> {
    actions.iter().find_map(|action| match action {
        ReplicaAction::Reply { reply: ReplicaReply::Open(Ok(reply)), .. } => Some(reply),
        _ => None,
    })
}

fn refused(actions: &[ReplicaAction]) -> Option<OpenRefusal> {
    actions.iter().find_map(|action| match action {
        ReplicaAction::Reply { reply: ReplicaReply::Open(Err(refusal)), .. } => Some(*refusal),
        _ => None,
    })
}

#[test]
fn r2_a_lower_generation_and_another_target_of_the_same_are_refused_for_ever() {
    let mut replica = Replica::new(0, mk_start());
    assert!(opened(&open(&mut replica, 0, 3, 30)).is_some());
    assert_eq!(refused(&open(&mut replica, 1, 2, 20)), Some(OpenRefusal::Fenced(Generation(3))));
    let other = ReplicaEvent::Open { call: ReplicaCall(7), request: mk_open(3, 31), token: mk_token(9) };
    assert_eq!(refused(&drive(&mut replica, 2, other)), Some(OpenRefusal::Fenced(Generation(3))));
}

#[test]
fn r2_a_new_generation_waits_for_lease_connections_and_io_and_is_durable_before_the_answer() {
    let mut replica = Replica::new(0, mk_start());
    open(&mut replica, 0, 1, 10);
    control(&mut replica, 100, mk_key(1, 10), ControlOp::Lease);
    let io = write(&mut replica, 0);
    assert!(matches!(io[..], [ReplicaAction::Disk { op: DiskOp::LogAdd(_), .. }]));
    assert!(open(&mut replica, 200, 2, 20).is_empty(), "the lease runs");
    // A renewal is not answered while somebody waits.
    assert!(control(&mut replica, 300, mk_key(1, 10), ControlOp::Lease).is_empty());
    assert_eq!(replica.next_timeout(), Some(100 + LEASE_MS));
    let closing = drive(&mut replica, 100 + LEASE_MS, ReplicaEvent::Tick);
    assert_eq!(closing, [ReplicaAction::CloseConnections { token: mk_token(1) }]);
    replica.handle_event(2_200, ReplicaEvent::ConnectionsClosed { token: mk_token(1) });
    let persist = actions(&mut replica);
    let Some(ReplicaAction::Disk { op: DiskOp::PersistMeta(meta), id }) = persist.first() else {
        panic!("{persist:?}")
    };
    assert_eq!(meta.generation, Generation(2));
    replica.handle_event(2_201, ReplicaEvent::DiskDone { id: *id, result: Ok(()) });
    assert!(actions(&mut replica).is_empty(), "the cookie is not set yet");
}

#[test]
fn r2_the_old_lease_is_renewed_again_if_the_asker_vanishes() {
    let mut replica = Replica::new(0, mk_start());
    open(&mut replica, 0, 1, 10);
    control(&mut replica, 100, mk_key(1, 10), ControlOp::Lease);
    open(&mut replica, 200, 2, 20);
    control(&mut replica, 300, mk_key(1, 10), ControlOp::Lease);
    let after = drive(&mut replica, 400, ReplicaEvent::OpenCancelled { call: ReplicaCall(2) });
    assert!(matches!(after[..], [ReplicaAction::Reply { reply: ReplicaReply::Lease(Ok(false)), .. }]));
}

#[test]
fn r3_a_restarted_replica_lets_no_new_generation_in_for_a_lease_term() {
    let mut start = mk_start();
    start.meta.generation = Generation(1);
    start.meta.target_id = Some(TargetId(10));
    let mut replica = Replica::new(1_000, start.clone());
    assert!(open(&mut replica, 1_001, 2, 20).is_empty());
    let after = drive(&mut replica, 1_000 + LEASE_MS, ReplicaEvent::Tick);
    assert!(opened(&after).is_some());
    let mut same = Replica::new(1_000, start);
    assert!(opened(&open(&mut same, 1_001, 1, 10)).is_some(), "its own target may come back at once");
}

#[test]
fn r5_one_lost_connection_ends_the_session_for_data_and_control() {
    let mut replica = Replica::new(0, mk_start());
    open(&mut replica, 0, 1, 10);
    let closing = drive(&mut replica, 1, ReplicaEvent::ConnectionLost { token: mk_token(1) });
    assert_eq!(closing, [ReplicaAction::CloseConnections { token: mk_token(1) }]);
    assert!(!replica.accepts(mk_token(1)));
    let late = control(&mut replica, 2, mk_key(1, 10), ControlOp::ClearLog(vec![]));
    assert!(matches!(
        late[..],
        [ReplicaAction::Reply { reply: ReplicaReply::Done(Err(RequestRefusal::NoSession)), .. }]
    ));
}

#[test]
fn r18_the_log_bit_is_durable_before_the_first_write_and_costs_later_ones_nothing() {
    let mut replica = Replica::new(0, mk_start());
    open(&mut replica, 0, 1, 10);
    let first = write(&mut replica, 3);
    let [ReplicaAction::Disk { id, op: DiskOp::LogAdd(regions) }] = &first[..] else { panic!("{first:?}") };
    assert_eq!(regions[..], [Region(0)]);
    replica.handle_event(1, ReplicaEvent::DiskDone { id: *id, result: Ok(()) });
    assert!(matches!(actions(&mut replica)[..], [ReplicaAction::Disk { op: DiskOp::Data { .. }, .. }]));
    assert!(matches!(write(&mut replica, 4)[..], [ReplicaAction::Disk { op: DiskOp::Data { .. }, .. }]));
}

#[test]
fn r18_a_region_under_write_stays_logged_and_map_bits_go_first() {
    let mut start = mk_start();
    start.log = BTreeSet::from([Region(0), Region(1)]);
    let mut replica = Replica::new(0, start);
    open(&mut replica, 0, 1, 10);
    let absent = BTreeMap::from([(ReplicaId(2), EPOCH)]);
    let epoch = Epoch { number: 6, nonce: 60 };
    let in_sync = BTreeSet::from([ReplicaId(1)]);
    control(&mut replica, 1, mk_key(1, 10), ControlOp::SetEpoch { epoch, in_sync, absent, copy: None });
    write(&mut replica, 3);
    let op = ControlOp::ClearLog(vec![Region(0), Region(1)]);
    replica.handle_event(2, ReplicaEvent::Control { call: ReplicaCall(5), key: mk_key(1, 10), op });
    let ops: Vec<DiskOp> = actions(&mut replica)
        .into_iter()
        .filter_map(|a| if let ReplicaAction::Disk { op, .. } = a { Some(op) } else { None })
        .collect();
    assert!(ops.contains(&DiskOp::LogRemove(vec![Region(1)])), "{ops:?}");
}

#[test]
fn r19_a_differing_cookie_with_a_log_is_a_lost_cache_until_its_regions_are_cleared() {
    let mut start = mk_start();
    start.log = BTreeSet::from([Region(2)]);
    start.boot_cookie = None;
    let mut replica = Replica::new(0, start);
    let after = open(&mut replica, 0, 1, 10);
    assert!(opened(&after).is_some_and(|reply| reply.cache_lost));
    control(&mut replica, 1, mk_key(1, 10), ControlOp::ClearLog(vec![Region(2)]));
    assert!(!replica.meta().cache_lost);
}

#[test]
fn r19_the_cookie_is_removed_before_a_failed_flush_is_told() {
    let mut replica = Replica::new(0, mk_start());
    open(&mut replica, 0, 1, 10);
    let (call, token) = (ReplicaCall(8), mk_token(1));
    replica.handle_event(1, ReplicaEvent::Data { call, token, op: DataOp::Flush });
    let Some(ReplicaAction::Disk { id, .. }) = replica.poll_action() else { panic!("no flush") };
    replica.handle_event(2, ReplicaEvent::DiskDone { id, result: Err(DiskError::Device) });
    let after = actions(&mut replica);
    let [ReplicaAction::Disk { id, op: DiskOp::RemoveBootCookie }] = after[..] else { panic!("{after:?}") };
    replica.handle_event(3, ReplicaEvent::DiskDone { id, result: Ok(()) });
    assert!(matches!(actions(&mut replica)[..], [ReplicaAction::Reply { .. }, ReplicaAction::Failed]));
}

#[test]
fn r21_a_map_starts_as_the_log_and_is_void_if_the_epoch_was_missed() {
    for (left, void) in [(EPOCH, false), (Epoch { number: 4, nonce: 40 }, true)] {
        let mut start = mk_start();
        start.log = BTreeSet::from([Region(1)]);
        let mut replica = Replica::new(0, start);
        open(&mut replica, 0, 1, 10);
        let op = ControlOp::SetEpoch {
            epoch: Epoch { number: 6, nonce: 60 },
            in_sync: BTreeSet::from([ReplicaId(1)]),
            absent: BTreeMap::from([(ReplicaId(2), left)]),
            copy: None,
        };
        control(&mut replica, 1, mk_key(1, 10), op);
        let map = control(&mut replica, 2, mk_key(1, 10), ControlOp::ReadMap(ReplicaId(2)));
        let [ReplicaAction::Reply { reply: ReplicaReply::Map(Ok(map)), .. }] = &map[..] else {
            panic!("{map:?}")
        };
        assert_eq!(map.base, left);
        match &map.dirty {
            Dirty::Void => assert!(void),
            Dirty::Blocks(blocks) => {
                assert!(!void && blocks.contains(Block(256)) && !blocks.contains(Block(0)))
            }
        }
    }
}

#[test]
fn r23_a_void_map_is_filled_and_loses_the_regions_that_are_flushed_and_not_under_write() {
    let mut start = mk_start();
    start.maps.insert(ReplicaId(2), DirtyMap { base: EPOCH, dirty: Dirty::Void });
    let mut replica = Replica::new(0, start);
    open(&mut replica, 0, 1, 10);
    control(&mut replica, 1, mk_key(1, 10), ControlOp::FillMap(ReplicaId(2)));
    let touched = |replica: &Replica| match &replica.maps[&ReplicaId(2)].dirty {
        Dirty::Blocks(blocks) => blocks.regions().map(|(region, _)| region.0).collect::<Vec<_>>(),
        Dirty::Void => panic!("void"),
    };
    assert_eq!(touched(&replica), [0, 1, 2, 3, 4, 5, 6, 7]);
    write(&mut replica, 3);
    let regions = vec![Region(0), Region(1), Region(2)];
    let op = ControlOp::ClearMap { absent: ReplicaId(2), regions };
    replica.handle_event(2, ReplicaEvent::Control { call: ReplicaCall(5), key: mk_key(1, 10), op });
    assert_eq!(touched(&replica), [0, 3, 4, 5, 6, 7], "region 0 is being written");
    let saved = actions(&mut replica);
    let none = Default::default();
    let regions = vec![(Region(1), none), (Region(2), none)];
    let op = DiskOp::MapUpdate { absent: ReplicaId(2), regions };
    assert!(
        matches!(&saved[..], [ReplicaAction::Disk { op: saved, .. }] if *saved == op),
        "answered only once it is durable: {saved:?}"
    );
}

#[test]
fn r22_after_a_crash_a_map_takes_the_log_in() {
    let mut start = mk_start();
    start.log = BTreeSet::from([Region(1)]);
    let dirty = Dirty::Blocks(crate::dirty_map::BlockSet::new());
    start.maps.insert(ReplicaId(2), DirtyMap { base: EPOCH, dirty });
    let replica = Replica::new(0, start);
    let Dirty::Blocks(blocks) = &replica.maps[&ReplicaId(2)].dirty else { panic!("void") };
    assert!(blocks.touches(Region(1)));
}

#[test]
fn r35_a_record_that_knows_less_or_something_else_is_refused() {
    let refusal = |change: fn(&mut OpenRequest)| {
        let mut replica = Replica::new(0, mk_start());
        let mut request = mk_open(1, 10);
        change(&mut request);
        refused(&drive(
            &mut replica,
            0,
            ReplicaEvent::Open { call: ReplicaCall(1), request, token: mk_token(1) },
        ))
    };
    assert_eq!(refusal(|r| r.epoch.number = 4), Some(OpenRefusal::Restored(EPOCH)));
    assert_eq!(refusal(|r| r.epoch.nonce = 51), Some(OpenRefusal::Restored(EPOCH)));
    assert_eq!(refusal(|r| r.lineage = Lineage(8)), Some(OpenRefusal::Restored(EPOCH)));
    assert_eq!(refusal(|r| r.replica_id = ReplicaId(2)), Some(OpenRefusal::WrongReplica));
}

const SNAPSHOT: SnapshotId = SnapshotId(70);

/// The disk operations asked for, with their numbers.
fn disk_ops(actions: Vec<ReplicaAction>) -> Vec<(DiskId, DiskOp)> {
    actions
        .into_iter()
        .filter_map(|action| match action {
            ReplicaAction::Disk { id, op } => Some((id, op)),
            _ => None,
        })
        .collect()
}

fn freeze(replica: &mut Replica, key: SessionKey) -> Vec<ReplicaAction> {
    let (call, op) = (ReplicaCall(950), ControlOp::Freeze { snapshot: SNAPSHOT });
    replica.handle_event(1, ReplicaEvent::Control { call, key, op });
    actions(replica)
}

#[test]
fn r27_a_freeze_waits_for_writes_then_flushes_and_only_then_freezes() {
    let mut replica = Replica::new(0, mk_start());
    open(&mut replica, 0, 1, 7);
    let [(log_add, DiskOp::LogAdd(_))] = disk_ops(write(&mut replica, 0))[..] else { panic!("no log first") };
    assert_eq!(freeze(&mut replica, mk_key(1, 7)), [], "a write waits for the log");
    replica.handle_event(1, ReplicaEvent::DiskDone { id: log_add, result: Ok(()) });
    let [(data, DiskOp::Data { .. })] = disk_ops(actions(&mut replica))[..] else { panic!("no write") };
    replica.handle_event(1, ReplicaEvent::DiskDone { id: data, result: Ok(()) });
    let [(flush, DiskOp::Data { op: DataOp::Flush, .. })] = disk_ops(actions(&mut replica))[..] else {
        panic!("no flush before the freeze")
    };
    replica.handle_event(1, ReplicaEvent::DiskDone { id: flush, result: Ok(()) });
    let [(frozen, DiskOp::Freeze { snapshot: SNAPSHOT })] = disk_ops(actions(&mut replica))[..] else {
        panic!("no freeze")
    };
    replica.handle_event(1, ReplicaEvent::DiskDone { id: frozen, result: Ok(()) });
    let done = ReplicaAction::Reply { call: ReplicaCall(950), reply: ReplicaReply::Done(Ok(())) };
    assert_eq!(actions(&mut replica), [done]);
}

#[test]
fn r27_open_merges_back_every_layer_that_the_record_does_not_name() {
    let mut start = mk_start();
    start.snapshots = vec![SnapshotId(1), SNAPSHOT, SnapshotId(2)];
    let mut replica = Replica::new(0, start);
    let mut request = mk_open(1, 7);
    request.snapshots = BTreeSet::from([SnapshotId(1), SnapshotId(2)]);
    replica.handle_event(0, ReplicaEvent::Open { call: ReplicaCall(1), request, token: mk_token(1) });
    let ops = disk_ops(actions(&mut replica));
    assert!(ops.iter().any(|(_, op)| *op == DiskOp::DropSnapshot { snapshot: SNAPSHOT }), "{ops:?}");
    let mut last = Vec::new();
    for (id, _) in ops {
        assert_eq!(last, [], "Open was answered before all was durable");
        replica.handle_event(0, ReplicaEvent::DiskDone { id, result: Ok(()) });
        last = actions(&mut replica);
    }
    assert_eq!(opened(&last).map(|reply| reply.snapshots.clone()), Some(vec![SnapshotId(1), SnapshotId(2)]));
}

#[test]
fn r27_a_layer_of_an_older_try_is_never_taken_for_this_one() {
    let mut replica = Replica::new(0, mk_start());
    open(&mut replica, 0, 1, 7);
    let op = || ControlOp::Freeze { snapshot: SNAPSHOT };
    let refused = ReplicaReply::Done(Err(RequestRefusal::Disk(DiskError::SnapshotExists)));
    assert_eq!(control(&mut replica, 1, mk_key(1, 7), op()).len(), 1);
    let again = control(&mut replica, 1, mk_key(1, 7), op());
    assert_eq!(again, [ReplicaAction::Reply { call: ReplicaCall(900), reply: refused }]);
    control(&mut replica, 1, mk_key(1, 7), ControlOp::DropSnapshot { snapshot: SNAPSHOT });
    let anew = control(&mut replica, 1, mk_key(1, 7), op());
    assert_eq!(anew, [ReplicaAction::Reply { call: ReplicaCall(900), reply: ReplicaReply::Done(Ok(())) }]);
}

#[test]
fn r5_a_late_freeze_of_an_older_session_is_refused() {
    let mut replica = Replica::new(0, mk_start());
    open(&mut replica, 0, 1, 7);
    let refused = ReplicaReply::Done(Err(RequestRefusal::NoSession));
    let reply = control(&mut replica, 1, mk_key(0, 6), ControlOp::Freeze { snapshot: SNAPSHOT });
    assert_eq!(reply, [ReplicaAction::Reply { call: ReplicaCall(900), reply: refused }]);
}

#[test]
fn r27_a_freeze_without_room_changes_nothing_and_leaves_the_session_whole() {
    let mut replica = Replica::new(0, mk_start());
    open(&mut replica, 0, 1, 7);
    let [(flush, _)] = disk_ops(freeze(&mut replica, mk_key(1, 7)))[..] else { panic!("no flush") };
    replica.handle_event(1, ReplicaEvent::DiskDone { id: flush, result: Ok(()) });
    let [(frozen, _)] = disk_ops(actions(&mut replica))[..] else { panic!("no freeze") };
    replica.handle_event(1, ReplicaEvent::DiskDone { id: frozen, result: Err(DiskError::LayersFull) });
    let refused = ReplicaReply::Done(Err(RequestRefusal::Disk(DiskError::LayersFull)));
    assert_eq!(actions(&mut replica), [ReplicaAction::Reply { call: ReplicaCall(950), reply: refused }]);
    assert!(replica.accepts(mk_token(1)));
}

#[test]
fn r31_the_files_grow_before_the_size_that_is_told() {
    let mut replica = Replica::new(0, mk_start());
    open(&mut replica, 0, 1, 7);
    let grow = ControlOp::Grow { size_bytes: 16 << 20 };
    replica.handle_event(1, ReplicaEvent::Control { call: ReplicaCall(1), key: mk_key(1, 7), op: grow });
    let [(files, DiskOp::Grow { size_bytes: 16_777_216 })] = disk_ops(actions(&mut replica))[..] else {
        panic!("no growth")
    };
    assert_eq!(replica.meta().size_bytes, 8 << 20);
    replica.handle_event(1, ReplicaEvent::DiskDone { id: files, result: Ok(()) });
    let [(_, DiskOp::PersistMeta(ref meta))] = disk_ops(actions(&mut replica))[..] else { panic!("no meta") };
    assert_eq!(meta.size_bytes, 16 << 20);
}

#[test]
fn r31_a_replica_never_gets_smaller_whichever_of_two_growths_ends_last() {
    let mut replica = Replica::new(0, mk_start());
    open(&mut replica, 0, 1, 7);
    for (call, size_bytes) in [(1, 24 << 20), (2, 16 << 20)] {
        let op = ControlOp::Grow { size_bytes };
        replica.handle_event(1, ReplicaEvent::Control { call: ReplicaCall(call), key: mk_key(1, 7), op });
    }
    for (id, _) in disk_ops(actions(&mut replica)) {
        replica.handle_event(1, ReplicaEvent::DiskDone { id, result: Ok(()) });
    }
    let sizes: Vec<u64> = disk_ops(actions(&mut replica))
        .into_iter()
        .map(|(_, op)| if let DiskOp::PersistMeta(meta) = op { meta.size_bytes } else { panic!("{op:?}") })
        .collect();
    assert_eq!(sizes, [24 << 20, 24 << 20]);
}

#[test]
fn r31_a_smaller_replica_is_let_in_only_while_it_is_no_member() {
    let mut start = mk_start();
    start.meta.size_bytes = 4 << 20;
    let mut replica = Replica::new(0, start);
    let refusal = ReplicaReply::Open(Err(OpenRefusal::WrongReplica));
    let refused = open(&mut replica, 0, 1, 7);
    assert_eq!(refused, [ReplicaAction::Reply { call: ReplicaCall(1), reply: refusal }]);
    let request = OpenRequest { in_sync: BTreeSet::from([ReplicaId(2)]), ..mk_open(1, 7) };
    let event = ReplicaEvent::Open { call: ReplicaCall(2), request, token: mk_token(1) };
    assert_eq!(opened(&drive(&mut replica, 0, event)).map(|reply| reply.size_bytes), Some(4 << 20));
}

#[test]
fn r27_an_open_that_was_overtaken_drops_no_snapshot_committed_since() {
    let mut replica = Replica::new(0, mk_start());
    let request = OpenRequest { sequence: 2, ..mk_open(1, 7) };
    let event = ReplicaEvent::Open { call: ReplicaCall(1), request, token: mk_token(1) };
    assert!(opened(&drive(&mut replica, 0, event)).is_some());
    control(&mut replica, 1, mk_key(1, 7), ControlOp::Freeze { snapshot: SNAPSHOT });
    let request = OpenRequest { sequence: 1, ..mk_open(1, 7) };
    let event = ReplicaEvent::Open { call: ReplicaCall(2), request, token: mk_token(2) };
    let refusal = ReplicaReply::Open(Err(OpenRefusal::Busy));
    assert_eq!(
        drive(&mut replica, 1, event),
        [ReplicaAction::Reply { call: ReplicaCall(2), reply: refusal }]
    );
    assert!(replica.accepts(mk_token(1)), "the session of the later Open goes on");
    assert_eq!(replica.snapshots, [SNAPSHOT]);
}

#[test]
fn r26_a_promoted_replica_takes_the_new_lineage_once_and_refuses_the_old_one_for_ever() {
    let open = |replica: &mut Replica, change: fn(&mut OpenRequest)| {
        let mut request = mk_open(1, 20);
        request.lineage = Lineage(10);
        request.promoted_from = Some(Lineage(9));
        request.epoch = Epoch { number: 3, nonce: 1 };
        request.in_sync = BTreeSet::from([ReplicaId(1)]);
        change(&mut request);
        let call = ReplicaCall(1);
        drive(replica, 10_000, ReplicaEvent::Open { call, request, token: mk_token(1) })
    };
    let mut start = mk_start();
    // As after a restore: what it knows is ahead of the record.
    start.meta.generation = Generation(8);
    start.meta.target_id = Some(TargetId(8));
    let mut replica = Replica::new(0, start);
    let not_meant = open(&mut replica, |r| r.promoted_from = None);
    assert_eq!(refused(&not_meant), Some(OpenRefusal::Fenced(Generation(8))));
    let of_another = open(&mut replica, |r| r.promoted_from = Some(Lineage(5)));
    assert_eq!(refused(&of_another), Some(OpenRefusal::Fenced(Generation(8))));
    let one_of_two = open(&mut replica, |r| {
        r.in_sync.insert(ReplicaId(2));
    });
    assert_eq!(refused(&one_of_two), Some(OpenRefusal::Fenced(Generation(8))));
    assert_eq!(replica.meta().lineage, Lineage(9));

    assert_eq!(refused(&open(&mut replica, |_| {})), None);
    let meta = replica.meta();
    assert_eq!((meta.lineage, meta.epoch.number, meta.generation), (Lineage(10), 3, Generation(1)));
    let old = open(&mut replica, |r| {
        (r.lineage, r.promoted_from, r.generation) = (Lineage(9), None, Generation(9));
    });
    assert_eq!(refused(&old), Some(OpenRefusal::Restored(Epoch { number: 3, nonce: 1 })));
    let again = open(&mut replica, |r| (r.generation, r.target_id) = (Generation(0), TargetId(21)));
    assert_eq!(refused(&again), Some(OpenRefusal::Fenced(Generation(1))));
}
