//! Blocks that do not verify: who is asked, what is copied, what is reported.

use super::*;
use crate::block_range::BlockRange;
use crate::timers;

const FAILED: Result<(), IoError> = Err(IoError::Failed);

impl Bench {
    /// Answers every Verify: `bad` gives for a replica the blocks that do not verify, `digest` what the others hold.
    pub(super) fn verify(&mut self, bad: &[(u128, u64)], digest: impl Fn(ReplicaId, u64) -> u64) -> usize {
        let mut asked = 0;
        while let Some(TargetAction::Control { call, replica, op: Control::Verify(range), .. }) =
            self.take(|a| matches!(a, TargetAction::Control { op: Control::Verify(_), .. }))
        {
            asked += 1;
            let blocks = (range.start.0..range.end())
                .map(|block| (!bad.contains(&(replica.0, block))).then(|| digest(replica, block)))
                .collect();
            self.event(TargetEvent::Verified { call, blocks });
        }
        asked
    }

    /// The I/O under way as replica and range, with its number.
    fn sent(&mut self) -> Vec<(IoId, u128, DataOp)> {
        self.ios().into_iter().map(|(io, replica, _, op)| (io, replica.0, op)).collect()
    }

    fn answer(&mut self, io: IoId, result: Result<(), IoError>) {
        self.event(TargetEvent::IoDone { io, result });
    }
}

fn write_of(range: BlockRange) -> DataOp {
    DataOp::Write { range, fua: false }
}

#[test]
fn r33_a_block_that_fails_on_one_member_is_answered_from_another_and_repaired() {
    let mut bench = mk_serving(2);
    bench.request(1, ClientOp::Read { offset: 0, len: 8192 });
    let first = bench.sent();
    assert_eq!(first[0].1, 1, "the local member");
    bench.answer(first[0].0, FAILED);
    let second = bench.sent();
    assert_eq!(second[0].1, 2);
    bench.answer(second[0].0, Ok(()));
    assert_eq!(bench.completed(), Some(Ok(())));

    assert_eq!(bench.verify(&[(1, 1)], |_, block| block), 2, "every member is asked");
    let read = bench.sent();
    let bad = BlockRange::new(1, 1);
    assert_eq!(read.iter().map(|(_, of, op)| (*of, *op)).collect::<Vec<_>>(), [(2, DataOp::Read(bad))]);
    bench.answer(read[0].0, Ok(()));
    let written = bench.sent();
    assert_eq!(written.iter().map(|(_, of, op)| (*of, *op)).collect::<Vec<_>>(), [(1, write_of(bad))]);
    bench.answer(written[0].0, Ok(()));
    let counts = bench.target.status().corruption;
    assert_eq!((counts.found, counts.repaired, counts.unrepairable), (1, 1, 0));
}

#[test]
fn r33_what_no_member_can_read_whole_is_mended_block_by_block_and_read_again() {
    let mut bench = mk_serving(2);
    bench.request(1, ClientOp::Read { offset: 0, len: 8192 });
    for _ in 0..2 {
        let io = bench.sent()[0].0;
        bench.answer(io, FAILED);
    }
    assert_eq!(bench.completed(), None);
    bench.verify(&[(1, 0), (2, 1)], |_, block| block);
    for _ in 0..2 {
        for (io, ..) in bench.sent() {
            bench.answer(io, Ok(()));
        }
    }
    let again = bench.sent();
    assert_eq!(again[0].2, DataOp::Read(BlockRange::new(0, 2)));
    bench.answer(again[0].0, Ok(()));
    assert_eq!(bench.completed(), Some(Ok(())));
    assert_eq!(bench.target.status().corruption.repaired, 2);
}

#[test]
fn r33_a_block_that_verifies_nowhere_is_an_error_to_its_reader() {
    let mut bench = mk_serving(2);
    bench.request(1, READ);
    for _ in 0..2 {
        let io = bench.sent()[0].0;
        bench.answer(io, FAILED);
    }
    bench.verify(&[(1, 0), (2, 0)], |_, block| block);
    for _ in 0..2 {
        let io = bench.sent()[0].0;
        bench.answer(io, FAILED);
    }
    assert_eq!(bench.completed(), Some(Err(RequestError::Failed)));
    assert_eq!(bench.target.status().corruption.unrepairable, 1);
    assert!(bench.ios().is_empty(), "nothing is copied");
}

#[test]
fn r33_the_scrub_verifies_every_region_once_and_leaves_members_alone_that_verify_and_differ() {
    let mut bench = mk_serving(2);
    bench.event(TargetEvent::Scrub);
    let mut asked = 0;
    for _ in 0..8 {
        asked += bench
            .verify(&[], |replica, block| if block == 300 { u64::try_from(replica.0).unwrap() } else { 7 });
        bench.now_ms += timers::SCRUB_REGION_EVERY_MS;
        bench.event(TargetEvent::Tick);
        bench.beat();
    }
    assert_eq!(asked, 16);
    let status = bench.target.status();
    assert_eq!((status.scrub.regions_done, status.scrub.regions_total, status.scrub.passes), (8, 8, 1));
    assert_eq!((status.corruption.differing, status.corruption.found), (1, 0));
    assert!(bench.ios().is_empty(), "nothing is copied");
}

#[test]
fn r33_a_repair_waits_for_a_write_to_its_block() {
    let mut bench = mk_serving(2);
    bench.event(TargetEvent::Scrub);
    let block = bench.target.scrub.status();
    assert_eq!(block.regions_total, 8);
    // The region under scrub is drawn; whichever it is, its first block is bad and being written.
    let Some(TargetAction::Control { op: Control::Verify(range), .. }) = bench
        .actions
        .iter()
        .find(|a| matches!(a, TargetAction::Control { op: Control::Verify(_), .. }))
        .cloned()
    else {
        panic!("no region is verified")
    };
    bench.request(1, ClientOp::Write { offset: range.offset_bytes(), len: 4096, fua: false });
    assert!(bench.ios().is_empty(), "the write waits for the verdict");
    bench.verify(&[(1, range.start.0)], |_, _| 7);
    let writes = bench.sent();
    assert!(writes.iter().all(|(_, _, op)| *op == write_of(BlockRange { start: range.start, count: 1 })));
    assert_eq!(writes.len(), 2, "the client's write goes first, to both; no repair yet");
    for (io, ..) in writes {
        bench.answer(io, Ok(()));
    }
    let read = bench.sent();
    assert_eq!((read[0].1, read.len()), (2, 1), "the repair reads what the client wrote");
}

/// A start after a crash that left region 0 logged on both members.
fn mk_reconciling() -> Bench {
    let mut bench = mk_bench(2);
    bench.store();
    for replica in [1, 2] {
        bench.logged = vec![Region(0)];
        bench.open(replica, false);
    }
    bench.store();
    bench.tell_all();
    bench.beat();
    bench
}

#[test]
fn r32_a_logged_block_that_does_not_verify_is_taken_from_a_member_where_it_does() {
    let mut bench = mk_reconciling();
    let source = bench.sent();
    assert_eq!((source[0].1, source[0].2), (1, DataOp::Read(BlockRange::new(0, 256))));
    bench.answer(source[0].0, FAILED);
    let other = bench.sent();
    assert_eq!((other[0].1, other[0].2), (2, DataOp::Read(BlockRange::new(0, 256))), "not adopted");
    bench.answer(other[0].0, Ok(()));
    assert_eq!((bench.sent()[0].1, bench.target.status().corruption.adopted), (1, 0));
}

#[test]
fn r32_only_a_block_that_verifies_nowhere_is_adopted_and_counted() {
    let mut bench = mk_reconciling();
    // Whole region, then each block on its own: block 3 fails on both until it is adopted, block 5 on the source.
    let mut adopted = Vec::new();
    loop {
        if let Some(TargetAction::Control { call, replica, op: Control::Adopt(range), .. }) =
            bench.take(|a| matches!(a, TargetAction::Control { op: Control::Adopt(_), .. }))
        {
            adopted.push((replica.0, range));
            bench.event(TargetEvent::ControlDone { call });
        }
        let sent = bench.sent();
        if sent.is_empty() || sent.iter().all(|(_, _, op)| *op == DataOp::Flush) {
            break;
        }
        for (io, of, op) in sent {
            let fails = |range: BlockRange| {
                range.count > 1
                    || (range.start.0 == 3 && adopted.is_empty())
                    || (range.start.0 == 5 && of == 1)
            };
            let failed = matches!(op, DataOp::Read(range) if fails(range));
            bench.answer(io, if failed { FAILED } else { Ok(()) });
        }
    }
    assert_eq!(adopted, [(1, BlockRange::new(3, 1))]);
    assert_eq!(bench.target.status().corruption.adopted, 1);
}
