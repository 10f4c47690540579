//! A volume that nobody uses: fewer heartbeats, the same promises (R4, R6).

use super::*;

fn is_heartbeat(action: &TargetAction) -> bool {
    matches!(action, TargetAction::Heartbeat { .. })
}

fn is_close(action: &TargetAction) -> bool {
    matches!(action, TargetAction::CloseSession { .. })
}

/// Lets time pass, with ticks as they are wanted; gives the heartbeats sent. `answers`: which replicas answer.
fn pass(bench: &mut Bench, ms: u64, answers: &[u128]) -> usize {
    let (until, mut sent) = (bench.now_ms + ms, 0);
    loop {
        bench.now_ms = bench.target.next_timeout().unwrap().clamp(bench.now_ms + 1, until);
        bench.event(TargetEvent::Tick);
        while let Some(TargetAction::Heartbeat { session, replica, sequence }) = bench.take(is_heartbeat) {
            sent += 1;
            if answers.contains(&replica.0) {
                bench.event(TargetEvent::HeartbeatAnswered { session, sequence, cache_lost: false });
            }
        }
        if bench.now_ms >= until {
            return sent;
        }
    }
}

fn mk_idle() -> Bench {
    let mut bench = mk_serving(3);
    pass(&mut bench, 10_000, &[1, 2, 3]);
    bench
}

#[test]
fn an_idle_volume_asks_seldom_and_keeps_its_leases() {
    let mut bench = mk_idle();
    assert_eq!(pass(&mut bench, 20_000, &[1, 2, 3]), 3 * 20);
    for _ in 0..7 {
        pass(&mut bench, 333, &[1, 2, 3]);
        assert!(bench.target.leases_hold());
    }
    assert!(bench.take(is_close).is_none());
}

#[test]
fn a_heartbeat_that_is_lost_costs_an_idle_volume_neither_its_leases_nor_a_replica() {
    let mut bench = mk_idle();
    // The one at the next mark, and the first of the faster ones that follow.
    pass(&mut bench, timers::HEARTBEAT_IDLE_MS + timers::HEARTBEAT_MS, &[]);
    for _ in 0..20 {
        assert!(bench.target.leases_hold(), "at {}", bench.now_ms);
        pass(&mut bench, 100, &[1, 2, 3]);
    }
    assert!(bench.take(is_close).is_none());
}

#[test]
fn the_first_request_after_a_long_pause_drops_no_healthy_replica_and_waits_for_nothing() {
    let mut bench = mk_idle();
    pass(&mut bench, 990, &[1, 2, 3]);
    bench.request(1, READ);
    let (io, ..) = bench.ios()[0];
    bench.event(TargetEvent::IoDone { io, result: Ok(()) });
    assert_eq!(bench.completed(), Some(Ok(())));
    assert_eq!(pass(&mut bench, 1_000, &[1, 2, 3]), 3 * 5, "as often as ever");
    assert!(bench.take(is_close).is_none());
}

#[test]
fn a_replica_that_falls_silent_is_given_up_as_fast_as_ever_once_the_volume_is_used() {
    let mut bench = mk_idle();
    pass(&mut bench, 990, &[1, 2, 3]);
    bench.request(1, WRITE);
    pass(&mut bench, timers::SILENT_MS, &[1, 2]);
    assert!(matches!(bench.take(is_close), Some(TargetAction::CloseSession { replica: ReplicaId(3), .. })));
    assert!(bench.take(is_close).is_none());
}

#[test]
fn a_replica_that_dies_while_nobody_uses_the_volume_is_noticed_at_the_next_heartbeat() {
    let mut bench = mk_idle();
    pass(&mut bench, timers::HEARTBEAT_IDLE_MS + timers::SILENT_MS, &[1, 3]);
    assert!(matches!(bench.take(is_close), Some(TargetAction::CloseSession { replica: ReplicaId(2), .. })));
    assert!(bench.take(is_close).is_none());
}

#[test]
fn r6_an_idle_target_that_slept_does_not_drop_healthy_replicas() {
    let mut bench = mk_idle();
    bench.now_ms += 60_000;
    bench.event(TargetEvent::Tick);
    bench.beat();
    assert!(bench.take(is_close).is_none());
    pass(&mut bench, 5_000, &[1, 2, 3]);
    assert!(bench.take(is_close).is_none());
}
