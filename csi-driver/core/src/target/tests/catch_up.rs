//! Bringing replicas back: what is copied, what is taken back when, whose turn it is.

use super::*;
use crate::block_range::BlockRange;
use crate::dirty_map::{BlockSet, Dirty, DirtyMap};
use crate::ids::{BLOCK_BYTES, BLOCKS_PER_REGION, REGION_BYTES};
use crate::target::tests::jobs::SNAPSHOT;
use crate::timers;

pub(super) const AWAY: ReplicaId = ReplicaId(3);

impl Bench {
    /// Replicas lose their sessions and leave the set.
    pub(super) fn lose(&mut self, replicas: &[u128]) {
        for replica in replicas {
            let session = self.target.peers[&ReplicaId(*replica)].session().unwrap().id;
            self.event(TargetEvent::SessionLost { session });
        }
        self.store();
        self.tell_all();
        // Members are opened again at once, and given up when the swap is done.
        self.actions.retain(|a| !matches!(a, TargetAction::CloseSession { .. } | TargetAction::Open(_)));
    }

    fn opening(&mut self, replica: u128) -> Option<SessionId> {
        let wanted =
            |a: &TargetAction| matches!(a, TargetAction::Open(open) if open.replica == ReplicaId(replica));
        match self.take(wanted) {
            Some(TargetAction::Open(open)) => Some(open.session),
            _ => None,
        }
    }

    pub(super) fn wait(&mut self, ms: u64) {
        for _ in 0..ms / 100 {
            self.now_ms += 100;
            self.event(TargetEvent::Tick);
            self.beat();
        }
    }

    pub(super) fn control_of(
        &mut self,
        wanted: impl Fn(&Control) -> bool,
    ) -> Option<(CallId, ReplicaId, Control)> {
        match self.take(|a| matches!(a, TargetAction::Control { op, .. } if wanted(op))) {
            Some(TargetAction::Control { call, replica, op, .. }) => Some((call, replica, op)),
            _ => None,
        }
    }

    /// Answers every question for a map of an absent replica with these blocks; `None` is void.
    pub(super) fn maps(&mut self, blocks: Option<&[(u64, u64)]>) {
        while let Some((call, _, Control::ReadMap(of))) =
            self.control_of(|op| matches!(op, Control::ReadMap(_)))
        {
            let ReplicaState::Offline { left_epoch: base } = self.store.record.replicas[&of].state else {
                panic!("{of} is not away")
            };
            let mut set = BlockSet::new();
            blocks.iter().flat_map(|b| b.iter()).for_each(|(start, count)| {
                set.insert(BlockRange::new(*start, *count));
            });
            let dirty = if blocks.is_some() { Dirty::Blocks(set) } else { Dirty::Void };
            self.event(TargetEvent::MapRead { call, map: DirtyMap { base, dirty } });
        }
    }

    /// Answers the questions where data is: at the members as given, at the returning replica nowhere.
    pub(super) fn extents(&mut self, data: &[(u64, u64)]) -> usize {
        let mut asked = 0;
        while let Some((call, of, Control::ReadExtents(_))) =
            self.control_of(|op| matches!(op, Control::ReadExtents(_)))
        {
            asked += 1;
            let has = data.iter().map(|(start, count)| (BlockRange::new(*start, *count), Allocation::Data));
            let extents = has.filter(|_| of != AWAY).collect();
            self.event(TargetEvent::ExtentsRead { call, extents });
        }
        asked
    }

    /// Lets copies run until none is sent any more; answers what was written to the returning replica.
    fn copy_all(&mut self) -> Vec<BlockRange> {
        let mut written = Vec::new();
        loop {
            let ios = self.ios();
            if ios.is_empty() {
                return written;
            }
            for (io, replica, session, op) in ios {
                match op {
                    DataOp::Flush => {
                        self.actions.push(TargetAction::Io {
                            io,
                            session,
                            replica,
                            op,
                            payload: Payload::None,
                        });
                        return written;
                    }
                    DataOp::Write { range, .. } if replica == AWAY => written.push(range),
                    _ => {}
                }
                self.event(TargetEvent::IoDone { io, result: Ok(()) });
            }
        }
    }
}

/// Three replicas, the third away and opened again.
pub(super) fn mk_returning() -> Bench {
    mk_returning_with(mk_serving(3))
}

fn mk_returning_with(mut bench: Bench) -> Bench {
    bench.lose(&[3]);
    assert_eq!(bench.store.record.in_sync.len(), 2);
    bench.wait(300);
    bench.open(3, false);
    bench
}

#[test]
fn r23_exactly_what_the_maps_name_is_copied() {
    let mut bench = mk_returning();
    bench.maps(Some(&[(5, 1), (9, 1), (300, 20)]));
    bench.extents(&[(0, 2048)]);
    let copied = bench.copy_all();
    assert_eq!(copied, [(5, 1), (9, 1), (300, 20)].map(|(start, count)| BlockRange::new(start, count)));
    let status = bench.target.status().replicas.pop().unwrap();
    assert_eq!((status.resync_bytes_done, status.resync_bytes_total), (22 * 4096, 22 * 4096));
}

#[test]
fn below_min_in_sync_a_write_is_made_and_not_told_and_does_not_keep_a_replica_from_coming_back() {
    let mut bench = mk_bench(3);
    bench.store.record.params.min_in_sync = 3;
    let mut bench = mk_serving_with(bench, 3);
    bench.request(1, WRITE);
    let writes = bench.ios();
    bench.lose(&[3]);
    for (io, ..) in writes.into_iter().filter(|(_, replica, ..)| *replica != AWAY) {
        bench.event(TargetEvent::IoDone { io, result: Ok(()) });
    }
    bench.request(2, ClientOp::Flush);
    bench.flushed();
    assert_eq!(bench.completed(), None, "two members are too few");
    bench.wait(300);
    // The log is cleared meanwhile.
    bench.flushed();
    while let Some((call, ..)) = bench.control_of(|op| matches!(op, Control::ClearLog(_))) {
        bench.event(TargetEvent::ControlDone { call });
    }
    bench.open(3, false);
    bench.maps(Some(&[(0, 1)]));
    bench.extents(&[(0, 2048)]);
    assert_eq!(bench.copy_all(), [BlockRange::new(0, 1)], "the range of the write is free");
    assert_eq!(bench.completed(), None);
    bench.change_params(|params| params.min_in_sync = 2);
    assert_eq!(bench.completed(), Some(Ok(())), "the write");
    assert_eq!(bench.completed(), Some(Ok(())), "the flush");
}

#[test]
fn r21_a_void_map_means_everything_but_what_is_absent_on_both_sides() {
    let mut bench = mk_returning();
    bench.maps(None);
    let mut filled = Vec::new();
    while let Some((call, member, _)) = bench.control_of(|op| *op == Control::FillMap(AWAY)) {
        filled.push(member.0);
        bench.event(TargetEvent::ControlDone { call });
    }
    assert_eq!(filled, [1, 2], "a restart must not begin from nothing");
    bench.extents(&[(256, 3), (700, 1)]);
    let copied = bench.copy_all();
    assert_eq!(copied, [(256, 3), (700, 1)].map(|(start, count)| BlockRange::new(start, count)));
}

#[test]
fn r23_bits_are_taken_back_only_after_the_replica_flushed_and_not_where_somebody_writes() {
    let mut bench = mk_returning();
    bench.maps(Some(&[(0, 1), (256, 1), (512, 1), (1024, 1)]));
    bench.extents(&[(0, 2048)]);
    bench.request(9, ClientOp::Write { offset: 513 * 4096, len: 4096, fua: false });
    // The client's write stays under way, and so does one copy: else the join would begin.
    for _ in 0..2 {
        for (io, _, _, op) in bench.ios() {
            let range = op.range().unwrap();
            if range.start.0 != 1024 && range.start.0 != 513 {
                bench.event(TargetEvent::IoDone { io, result: Ok(()) });
            }
        }
    }
    bench.now_ms += timers::CHECKPOINT_MS;
    bench.event(TargetEvent::Tick);
    bench.beat();
    let flushes: Vec<_> = bench.ios().into_iter().filter(|(_, _, _, op)| *op == DataOp::Flush).collect();
    assert_eq!(flushes.iter().map(|(_, replica, ..)| *replica).collect::<Vec<_>>(), [AWAY]);
    assert!(bench.control_of(|op| matches!(op, Control::ClearMap { .. })).is_none(), "before the flush");
    bench.event(TargetEvent::IoDone { io: flushes[0].0, result: Ok(()) });
    let mut cleared = Vec::new();
    while let Some((_, member, op)) = bench.control_of(|op| matches!(op, Control::ClearMap { .. })) {
        assert_eq!(op, Control::ClearMap { absent: AWAY, regions: vec![Region(0), Region(1)] });
        cleared.push(member.0);
    }
    assert_eq!(cleared, [1, 2]);
    assert_eq!(
        bench.control_of(|op| matches!(op, Control::ClearLog(_))).map(|(_, of, op)| (of, op)),
        Some((AWAY, Control::ClearLog(vec![Region(0), Region(1)])))
    );
}

#[test]
fn r23_however_slow_the_flush_a_death_has_no_more_than_the_limit_copied_again() {
    // More regions than two checkpoints.
    let size_bytes = 64 << 20;
    let mut bench = mk_bench(3);
    bench.store.record.size_bytes = size_bytes;
    let mut bench = mk_returning_with(mk_serving_with(bench, 3));
    let blocks = size_bytes / BLOCK_BYTES;
    bench.maps(Some(&[(0, blocks)]));
    bench.extents(&[(0, blocks)]);
    let mut flushes = Vec::new();
    let mut copy = |bench: &mut Bench| loop {
        let (done, flush): (Vec<_>, Vec<_>) =
            bench.ios().into_iter().partition(|(_, _, _, op)| *op != DataOp::Flush);
        flushes.extend(flush.into_iter().map(|(io, ..)| io));
        if done.is_empty() {
            return std::mem::take(&mut flushes);
        }
        done.into_iter().for_each(|(io, ..)| bench.event(TargetEvent::IoDone { io, result: Ok(()) }));
    };
    let copied = |bench: &Bench| bench.target.status().replicas[2].resync_bytes_copied;
    let most = timers::AT_STAKE_REGIONS_MAX as u64 * REGION_BYTES;

    let flush = copy(&mut bench);

    assert_eq!(flush.len(), 1);
    assert!(copied(&bench) <= most, "{} MiB at stake", copied(&bench) >> 20);
    assert!(copied(&bench) > timers::CHECKPOINT_REGIONS as u64 * REGION_BYTES, "copies go on during a flush");
    bench.event(TargetEvent::IoDone { io: flush[0], result: Ok(()) });
    while let Some((call, ..)) =
        bench.control_of(|op| matches!(op, Control::ClearMap { .. } | Control::ClearLog(_)))
    {
        bench.event(TargetEvent::ControlDone { call });
    }
    assert_eq!(copy(&mut bench).len(), 1, "the next checkpoint's");
    assert!(copied(&bench) > most, "and on after it");
}

/// The third of three is away while a snapshot is cut, and comes back.
fn mk_missed_snapshot(size_bytes: u64) -> Bench {
    let mut bench = mk_bench(3);
    bench.store.record.size_bytes = size_bytes;
    let mut bench = mk_serving_with(bench, 3);
    bench.lose(&[3]);
    bench.job(1, Job::CreateSnapshot { snapshot: SNAPSHOT });
    bench.store();
    bench.flushed();
    let freezes = bench.asked(&Control::Freeze { snapshot: SNAPSHOT });
    bench.done(&freezes);
    bench.store();
    bench.wait(300);
    bench.open(3, false);
    bench.maps(None);
    bench
}

#[test]
fn r28_what_changed_in_a_large_volume_is_asked_part_by_part_and_of_another_member_when_one_goes() {
    let part = timers::EXTENTS_REGIONS * BLOCKS_PER_REGION;
    let size_bytes = (2 * part + BLOCKS_PER_REGION) * BLOCK_BYTES;
    let mut bench = mk_missed_snapshot(size_bytes);
    let ask = |bench: &mut Bench| {
        let asked = bench.control_of(|op| matches!(op, Control::ReadChanges { .. }));
        let Some((call, of, Control::ReadChanges { range, .. })) = asked else { panic!("nothing is asked") };
        (call, of, range)
    };
    let answer = |bench: &mut Bench, call, at| {
        let mut blocks = BlockSet::new();
        blocks.insert(BlockRange::new(at, 1));
        bench.event(TargetEvent::ChangesRead { call, blocks });
    };
    let (call, of, range) = ask(&mut bench);
    assert_eq!(range, BlockRange::new(0, part));
    answer(&mut bench, call, 7);
    let (_, source, range) = ask(&mut bench);
    assert_eq!((source, range), (of, BlockRange::new(part, part)));
    let session = bench.target.peers[&source].session().unwrap().id;
    bench.event(TargetEvent::SessionLost { session });
    bench.store();
    bench.tell_all();
    bench.wait(100);
    let (call, other, range) = ask(&mut bench);
    assert_eq!(range, BlockRange::new(part, part), "what is known is not asked again");
    assert_ne!(other, source);
    answer(&mut bench, call, part + 1);
    let (call, _, range) = ask(&mut bench);
    assert_eq!(range, BlockRange::new(2 * part, BLOCKS_PER_REGION));
    answer(&mut bench, call, 2 * part);
    let copied: Vec<u64> = bench.copy_all().iter().map(|range| range.start.0).collect();
    assert_eq!(copied, [7, part + 1, 2 * part]);
}

#[test]
fn r28_a_snapshot_of_more_regions_than_may_be_at_stake_is_rebuilt_to_its_end() {
    let size_bytes = 64 << 20;
    let mut bench = mk_missed_snapshot(size_bytes);
    let changes = bench.control_of(|op| matches!(op, Control::ReadChanges { .. }));
    let (call, ..) = changes.expect("asks what the layers name");
    bench.event(TargetEvent::ChangesRead { call, blocks: BlockSet::whole(size_bytes) });
    let copied: u64 = bench.copy_all().iter().map(|range| range.len_bytes()).sum();
    assert_eq!(copied, size_bytes);
    assert_eq!(bench.asked(&Control::Freeze { snapshot: SNAPSHOT }).len(), 1);
}

#[test]
fn a_replica_that_catches_up_for_long_lets_another_have_its_turn() {
    let mut bench = mk_serving(4);
    bench.lose(&[3, 4]);
    bench.wait(300);
    bench.open(3, false);
    bench.maps(Some(&[(0, 2048)]));
    bench.extents(&[(0, 2048)]);
    bench.wait(timers::CATCH_UP_TURN_MS / 2);
    assert!(bench.opening(4).is_none(), "it is not its turn yet");
    assert_eq!(bench.target.catching_up(), Some(AWAY));
    bench.wait(timers::CATCH_UP_TURN_MS / 2 + 100);
    bench.open(4, false);
    assert_eq!(bench.target.catching_up(), Some(ReplicaId(4)));
}

#[test]
fn one_that_cannot_be_opened_takes_no_turn() {
    let mut bench = mk_serving(4);
    bench.lose(&[3, 4]);
    bench.wait(300);
    bench.open(3, false);
    bench.maps(Some(&[(0, 2048)]));
    bench.extents(&[(0, 2048)]);
    bench.wait(timers::CATCH_UP_TURN_MS + 100);
    let session = bench.opening(4).unwrap();
    bench.event(TargetEvent::OpenFailed { session });
    assert_eq!(bench.target.catching_up(), Some(AWAY));
}

#[test]
fn r25_a_block_that_no_member_can_read_is_marked_bad_and_the_catch_up_goes_on() {
    let mut bench = mk_returning();
    bench.maps(Some(&[(8, 3)]));
    bench.extents(&[(0, 2048)]);
    let mut marked = Vec::new();
    loop {
        if let Some((call, of, Control::MarkBad(range))) =
            bench.control_of(|op| matches!(op, Control::MarkBad(_)))
        {
            marked.push((of, range));
            bench.event(TargetEvent::ControlDone { call });
        }
        let ios = bench.ios();
        if ios.is_empty() || ios.iter().all(|(_, _, _, op)| *op == DataOp::Flush) {
            break;
        }
        for (io, _, _, op) in ios {
            let bad = matches!(op, DataOp::Read(range) if (range.start.0..range.end()).contains(&9));
            bench.event(TargetEvent::IoDone { io, result: if bad { Err(IoError::Failed) } else { Ok(()) } });
        }
    }
    assert_eq!(marked, [(AWAY, BlockRange::new(9, 1))]);
    let status = bench.target.status();
    assert_eq!(status.replicas[2].resync_bytes_done, 3 * 4096);
    assert_eq!(status.corruption.unrepairable, 1);
}

#[test]
fn r34_a_replica_that_is_listed_anew_is_found_told_as_absent_and_opened() {
    let mut bench = mk_serving(3);
    bench.lose(&[3]);
    let record = transitions::fault_replica(&bench.store.record, AWAY).unwrap();
    let record = transitions::add_replica(&record, ReplicaId(4), &NodeName("n4".to_owned())).unwrap();
    bench.store = Versioned { version: bench.store.version.next(), record };
    bench.wait(timers::RECORD_POLL_MS + 200);
    bench.store();
    let told = bench.control_of(|op| matches!(op, Control::SetEpoch { .. }));
    let Some((call, _, Control::SetEpoch { absent, .. })) = told else { panic!("nobody is told") };
    assert_eq!(absent.into_iter().collect::<Vec<_>>(), [(ReplicaId(4), Epoch::default())]);
    bench.event(TargetEvent::ControlDone { call });
    bench.tell_all();
    bench.open(4, false);
    assert_eq!(bench.target.catching_up(), Some(ReplicaId(4)));
}
