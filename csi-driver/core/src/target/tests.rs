//! One test per rule, named after it. The simulation under `tests/sim` covers their interplay.

mod background;
mod catch_up;
mod history;
mod idle;
mod jobs;
mod record_copies;
mod remove;
mod repair;

use std::collections::BTreeSet;

use super::*;
use crate::ids::{Attachment, Lineage, NodeName, RecordVersion, VolumeId};
use crate::record::VolumeParams;
use crate::record_store::StoreError;
use crate::replica::{DataOp, OpenRefusal};
use crate::transitions::{self, NewVolume};

/// A target with a store that answers at once and replicas that do what the test says.
struct Bench {
    target: Target,
    now_ms: u64,
    store: Versioned,
    actions: Vec<TargetAction>,
    /// What a replica says it has logged when it is opened.
    logged: Vec<Region>,
    /// Copies of the record are kept at once; else the test answers.
    keeps: bool,
}

fn mk_bench(replicas: u128) -> Bench {
    let node = NodeName("n1".to_owned());
    let record = transitions::create(NewVolume {
        volume_id: VolumeId(1),
        name: "v".to_owned(),
        lineage: Lineage(9),
        size_bytes: 8 << 20,
        epoch_nonce: 50,
        replicas: (1..=replicas).map(|n| (ReplicaId(n), NodeName(format!("n{n}")))).collect(),
        params: VolumeParams::new(3, ""),
        encryption: None,
        source: None,
    });
    let record = transitions::publish(&record, &node, false).unwrap();
    let config = TargetConfig {
        volume_id: VolumeId(1),
        node,
        attachment: Attachment(1),
        target_id: TargetId(7),
        seed: 3,
        detached: false,
    };
    let store = Versioned { version: RecordVersion(1), record };
    Bench {
        target: Target::new(0, config),
        now_ms: 0,
        store,
        actions: Vec::new(),
        logged: Vec::new(),
        keeps: true,
    }
}

impl Bench {
    fn event(&mut self, event: TargetEvent) {
        self.target.handle_event(self.now_ms, event);
        self.collect();
    }

    fn collect(&mut self) {
        loop {
            self.actions.extend(std::iter::from_fn(|| self.target.poll_action()));
            let keep =
                |a: &TargetAction| matches!(a, TargetAction::Control { op: Control::KeepRecord(_), .. });
            let at = self.actions.iter().position(keep).filter(|_| self.keeps);
            let Some(TargetAction::Control { call, .. }) = at.map(|at| self.actions.remove(at)) else {
                return;
            };
            self.target.handle_event(self.now_ms, TargetEvent::ControlDone { call });
        }
    }

    fn take(&mut self, wanted: impl Fn(&TargetAction) -> bool) -> Option<TargetAction> {
        self.collect();
        let at = self.actions.iter().position(wanted)?;
        Some(self.actions.remove(at))
    }

    /// Answers store calls until there are none.
    fn store(&mut self) {
        loop {
            match self.take(|a| matches!(a, TargetAction::ReadRecord { .. } | TargetAction::Swap { .. })) {
                Some(TargetAction::ReadRecord { call }) => {
                    let result = Ok(self.store.clone());
                    self.event(TargetEvent::RecordRead { call, result });
                }
                Some(TargetAction::Swap { call, expected, record }) => {
                    let result = if expected == self.store.version {
                        self.store = Versioned { version: expected.next(), record: *record };
                        Ok(self.store.version)
                    } else {
                        Err(StoreError::Conflict(VolumeId(1)))
                    };
                    self.event(TargetEvent::SwapAnswered { call, result });
                }
                _ => return,
            }
        }
    }

    /// Somebody changes the parameters, and the target is told.
    fn change_params(&mut self, change: impl FnOnce(&mut VolumeParams)) {
        change(&mut self.store.record.params);
        self.store.version = self.store.version.next();
        self.job(1, Job::Reload);
        self.store();
    }

    fn open(&mut self, replica: u128, cache_lost: bool) {
        let wanted =
            |a: &TargetAction| matches!(a, TargetAction::Open(open) if open.replica == ReplicaId(replica));
        let Some(TargetAction::Open(open)) = self.take(wanted) else {
            panic!("replica {replica} is not asked")
        };
        let opened = Opened {
            cache_lost,
            logged: self.logged.clone(),
            size_bytes: self.store.record.size_bytes,
            epoch: open.epoch,
            snapshots: vec![],
        };
        self.event(TargetEvent::Opened { session: open.session, opened });
    }

    fn tell_all(&mut self) {
        while let Some(TargetAction::Control { call, .. }) =
            self.take(|a| matches!(a, TargetAction::Control { op: Control::SetEpoch { .. }, .. }))
        {
            self.event(TargetEvent::ControlDone { call });
        }
    }

    fn beat(&mut self) {
        while let Some(TargetAction::Heartbeat { session, sequence, .. }) =
            self.take(|a| matches!(a, TargetAction::Heartbeat { .. }))
        {
            self.event(TargetEvent::HeartbeatAnswered { session, sequence, cache_lost: false });
        }
    }

    fn ios(&mut self) -> Vec<(IoId, ReplicaId, SessionId, DataOp)> {
        let mut out = Vec::new();
        while let Some(TargetAction::Io { io, replica, session, op, .. }) =
            self.take(|a| matches!(a, TargetAction::Io { .. }))
        {
            out.push((io, replica, session, op));
        }
        out
    }

    fn completed(&mut self) -> Option<Result<(), RequestError>> {
        match self.take(|a| matches!(a, TargetAction::Complete { .. })) {
            Some(TargetAction::Complete { result, .. }) => Some(result),
            _ => None,
        }
    }

    fn request(&mut self, number: u64, op: ClientOp) {
        self.event(TargetEvent::Request { request: RequestId(number), op });
    }
}

fn mk_serving(replicas: u128) -> Bench {
    mk_serving_with(mk_bench(replicas), replicas)
}

fn mk_serving_with(mut bench: Bench, replicas: u128) -> Bench {
    bench.store();
    for replica in 1..=replicas {
        bench.open(replica, false);
    }
    bench.store();
    bench.tell_all();
    bench.beat();
    assert_eq!(*bench.target.state(), TargetState::Serving);
    bench
}

const WRITE: ClientOp = ClientOp::Write { offset: 0, len: 4096, fua: false };
const READ: ClientOp = ClientOp::Read { offset: 0, len: 4096 };

#[test]
fn r4_heartbeats_go_out_on_common_marks_whenever_their_sessions_were_opened() {
    let mut bench = mk_bench(3);
    bench.store();
    for (replica, opened_at_ms) in [(1, 130), (2, 210), (3, 240)] {
        bench.now_ms = opened_at_ms;
        bench.open(replica, false);
    }
    bench.store();
    bench.beat();
    let is_heartbeat = |action: &TargetAction| matches!(action, TargetAction::Heartbeat { .. });
    bench.now_ms = timers::HEARTBEAT_MS - 1;
    bench.event(TargetEvent::Tick);
    assert!(bench.take(is_heartbeat).is_none());
    assert_eq!(bench.target.next_timeout(), Some(timers::HEARTBEAT_MS));
    bench.now_ms = timers::HEARTBEAT_MS;
    bench.event(TargetEvent::Tick);
    let sent = std::iter::from_fn(|| bench.take(is_heartbeat)).count();
    assert_eq!(sent, 3, "one wake-up sends all");
}

#[test]
fn r1_a_start_takes_the_next_generation_and_knows_its_success_by_the_target_id() {
    let mut bench = mk_bench(1);
    let Some(TargetAction::ReadRecord { call }) =
        bench.take(|a| matches!(a, TargetAction::ReadRecord { .. }))
    else {
        panic!("no read")
    };
    let result = Ok(bench.store.clone());
    bench.event(TargetEvent::RecordRead { call, result });
    let Some(TargetAction::Swap { call, record, .. }) =
        bench.take(|a| matches!(a, TargetAction::Swap { .. }))
    else {
        panic!("no swap")
    };
    // Applied, but the answer got lost.
    bench.store = Versioned { version: RecordVersion(2), record: *record };
    bench.event(TargetEvent::SwapAnswered { call, result: Err(StoreError::Unknown("lost".to_owned())) });
    bench.now_ms = 100;
    bench.event(TargetEvent::Tick);
    bench.store();
    assert_eq!(bench.target.generation(), Some(Generation(1)));
    assert_eq!(bench.store.version, RecordVersion(2), "no second swap");
}

#[test]
fn r2_a_refusal_for_a_later_generation_fences() {
    let mut bench = mk_bench(2);
    bench.store();
    bench.request(1, READ);
    let Some(TargetAction::Open(open)) = bench.take(|a| matches!(a, TargetAction::Open(_))) else {
        panic!("no open")
    };
    bench.event(TargetEvent::OpenRefused {
        session: open.session,
        refusal: OpenRefusal::Fenced(Generation(5)),
    });
    assert_eq!(bench.completed(), Some(Err(RequestError::Fenced)));
    assert_eq!(bench.target.state().word(), "fenced");
}

#[test]
fn r4_a_read_is_handed_out_only_under_leases_of_the_whole_ack_set() {
    let mut bench = mk_serving(2);
    bench.now_ms = crate::timers::lease_end_at_target(0);
    bench.request(1, READ);
    let (io, replica, ..) = bench.ios()[0];
    assert_eq!(replica, ReplicaId(1), "the local replica is read");
    bench.event(TargetEvent::IoDone { io, result: Ok(()) });
    assert_eq!(bench.completed(), None);
    bench.event(TargetEvent::Tick);
    bench.beat();
    assert_eq!(bench.completed(), Some(Ok(())));
}

#[test]
fn r6_a_target_that_slept_does_not_drop_healthy_replicas() {
    let mut bench = mk_serving(2);
    bench.now_ms = 60_000;
    bench.event(TargetEvent::Tick);
    assert!(bench.take(|a| matches!(a, TargetAction::CloseSession { .. })).is_none());
    bench.beat();
    bench.now_ms += 400;
    bench.event(TargetEvent::Tick);
    assert!(bench.take(|a| matches!(a, TargetAction::CloseSession { .. })).is_none());
}

#[test]
fn r7_a_swap_that_finds_another_generation_fences() {
    let mut bench = mk_serving(2);
    let node = NodeName("n1".to_owned());
    let record =
        transitions::take_generation(&bench.store.record, &node, Attachment(1), TargetId(8)).unwrap();
    bench.store = Versioned { version: bench.store.version.next(), record };
    bench.request(1, WRITE);
    let (_, _, session, _) = bench.ios()[1];
    bench.event(TargetEvent::SessionLost { session });
    bench.store();
    assert_eq!(bench.completed(), Some(Err(RequestError::Fenced)));
}

#[test]
fn r10_a_write_is_acknowledged_only_after_every_member_has_the_new_epoch() {
    let mut bench = mk_serving(3);
    bench.request(1, WRITE);
    let ios = bench.ios();
    for (io, replica, session, _) in ios {
        if replica == ReplicaId(3) {
            bench.event(TargetEvent::SessionLost { session });
        } else {
            bench.event(TargetEvent::IoDone { io, result: Ok(()) });
        }
    }
    assert_eq!(bench.completed(), None, "the swap is not answered");
    bench.store();
    assert_eq!(bench.store.record.in_sync, BTreeSet::from([ReplicaId(1), ReplicaId(2)]));
    assert_eq!(bench.completed(), None, "the epoch is not told");
    bench.tell_all();
    assert_eq!(bench.completed(), Some(Ok(())));
}

#[test]
fn r12_under_a_live_client_nothing_is_served_from_lost_caches() {
    let mut bench = mk_bench(2);
    // The attachment had a target before.
    bench.store.record.generation_attachment = Attachment(1);
    bench.store();
    bench.open(1, true);
    assert_eq!(bench.target.state().word(), "opening");
    bench.open(2, true);
    assert_eq!(bench.target.state().word(), "failed");
}

#[test]
fn r12_a_new_client_goes_on_from_lost_caches_and_is_told() {
    let mut bench = mk_bench(2);
    bench.store();
    bench.open(1, true);
    bench.open(2, true);
    bench.store();
    bench.tell_all();
    assert_eq!(*bench.target.state(), TargetState::Serving);
    assert!(bench.target.status().possible_loss);
}

#[test]
fn r13_an_unaligned_write_reads_its_edges_under_the_lock_before_it_is_sent() {
    let mut bench = mk_serving(1);
    bench.request(1, ClientOp::Write { offset: 100, len: 8192, fua: false });
    bench.request(2, WRITE);
    let edges = bench.ios();
    assert!(edges.len() == 2 && edges.iter().all(|(_, _, _, op)| matches!(op, DataOp::Read(_))), "{edges:?}");
    for (io, ..) in edges {
        bench.event(TargetEvent::IoDone { io, result: Ok(()) });
    }
    let sent = bench.ios();
    let [(io, _, _, DataOp::Write { range, .. })] = sent[..] else { panic!("{sent:?}") };
    assert_eq!((range.start.0, range.count), (0, 3));
    bench.event(TargetEvent::IoDone { io, result: Ok(()) });
    assert_eq!(bench.completed(), Some(Ok(())));
    assert_eq!(bench.ios().len(), 1, "the overlapping write follows");
}

#[test]
fn r14_the_sole_replica_is_opened_again_and_asked_again() {
    let mut bench = mk_serving(1);
    bench.request(1, WRITE);
    let (_, _, session, op) = bench.ios()[0];
    bench.event(TargetEvent::SessionLost { session });
    bench.open(1, false);
    let again = bench.ios();
    assert_eq!(again[0].3, op);
    bench.event(TargetEvent::IoDone { io: again[0].0, result: Ok(()) });
    bench.tell_all();
    assert_eq!(bench.completed(), Some(Ok(())));
}

#[test]
fn r16_who_failed_a_write_that_another_has_leaves_the_set() {
    let mut bench = mk_serving(2);
    bench.request(1, WRITE);
    let ios = bench.ios();
    bench.event(TargetEvent::IoDone { io: ios[0].0, result: Ok(()) });
    bench.event(TargetEvent::IoDone { io: ios[1].0, result: Err(IoError::NoSpace) });
    bench.store();
    bench.tell_all();
    assert_eq!(bench.store.record.in_sync, BTreeSet::from([ios[0].1]));
    assert_eq!(bench.completed(), Some(Ok(())));
}

#[test]
fn a_stop_flushes_clears_the_log_and_releases() {
    let mut bench = mk_serving(1);
    bench.request(1, WRITE);
    let (io, ..) = bench.ios()[0];
    bench.event(TargetEvent::IoDone { io, result: Ok(()) });
    bench.event(TargetEvent::Stop);
    let flush = bench.ios();
    assert_eq!(flush[0].3, DataOp::Flush);
    bench.event(TargetEvent::IoDone { io: flush[0].0, result: Ok(()) });
    for _ in 0..2 {
        let Some(TargetAction::Control { call, .. }) =
            bench.take(|a| matches!(a, TargetAction::Control { .. }))
        else {
            panic!("neither ClearLog nor Release")
        };
        bench.event(TargetEvent::ControlDone { call });
    }
    assert_eq!(*bench.target.state(), TargetState::Stopped);
}

impl Bench {
    /// The target reads the record once more, and gets no answer: until then it decides nothing about its members.
    fn leave_the_store_silent(&mut self) {
        self.now_ms += timers::RECORD_POLL_MS;
        self.event(TargetEvent::Tick);
        self.beat();
        assert!(self.take(|a| matches!(a, TargetAction::ReadRecord { .. })).is_some());
    }
}

#[test]
fn r12_a_member_that_lost_its_cache_counts_for_nothing_while_nobody_can_judge_it() {
    let mut bench = mk_serving(1);
    bench.request(1, WRITE);
    let (io, _, session, _) = bench.ios()[0];
    bench.event(TargetEvent::IoDone { io, result: Ok(()) });
    assert_eq!(bench.completed(), Some(Ok(())));
    bench.leave_the_store_silent();
    bench.logged = vec![Region(0)];
    bench.event(TargetEvent::SessionLost { session });
    bench.open(1, true);
    bench.tell_all();
    bench.request(2, ClientOp::Flush);
    for (io, ..) in bench.ios() {
        bench.event(TargetEvent::IoDone { io, result: Ok(()) });
    }
    bench.now_ms += timers::HEARTBEAT_MS;
    bench.event(TargetEvent::Tick);
    assert_eq!(bench.completed(), None, "the write before the flush may be gone");
    let clears = |a: &TargetAction| matches!(a, TargetAction::Control { op: Control::ClearLog(_), .. });
    assert!(bench.take(clears).is_none(), "its log is what tells that its cache was lost");
}

#[test]
fn r16_a_write_that_one_member_refused_waits_for_the_one_that_is_away() {
    let mut bench = mk_serving(2);
    bench.leave_the_store_silent();
    bench.request(1, WRITE);
    let ios = bench.ios();
    let (away, refused) = if ios[0].1 == ReplicaId(2) { (ios[0], ios[1]) } else { (ios[1], ios[0]) };
    bench.event(TargetEvent::IoDone { io: refused.0, result: Err(IoError::NoSpace) });
    // Comes back at all only if the target does not look for ever at what it cannot decide.
    bench.event(TargetEvent::SessionLost { session: away.2 });
    assert_eq!(bench.completed(), None);
    bench.open(2, false);
    bench.tell_all();
    let again = bench.ios();
    assert_eq!((again[0].1, again[0].3), (ReplicaId(2), away.3));
    bench.event(TargetEvent::IoDone { io: again[0].0, result: Ok(()) });
    assert!(
        bench.take(|a| matches!(a, TargetAction::CloseSession { .. })).is_some(),
        "who refused it leaves"
    );
}
