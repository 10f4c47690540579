//! The pace of background work is the record's, whenever that changes.

use super::catch_up::{AWAY, mk_returning};
use super::*;
use crate::ids::BLOCK_BYTES;

impl Bench {
    /// Lets time pass; every block that is verified is good. Gives the passes of the scrub that ended.
    fn scrubbed(&mut self, ms: u64) -> u64 {
        let before = self.target.status().scrub.passes;
        for _ in 0..ms / 250 {
            self.now_ms += 250;
            self.event(TargetEvent::Tick);
            self.beat();
            self.verify(&[], |_, block| block);
        }
        self.target.status().scrub.passes - before
    }

    fn scrub_every(&mut self, seconds: u64) {
        self.change_params(|params| params.background.scrub_interval_s = Some(seconds));
    }

    /// Carries out what is asked for; gives the bytes that were written to the returning replica.
    fn copied(&mut self) -> u64 {
        let mut blocks = 0;
        loop {
            let ios = self.ios();
            while let Some((call, ..)) = self.control_of(|op| matches!(op, Control::ClearMap { .. })) {
                self.event(TargetEvent::ControlDone { call });
            }
            if ios.is_empty() {
                return blocks * BLOCK_BYTES;
            }
            for (io, replica, _, op) in ios {
                if let DataOp::Write { range, .. } = op
                    && replica == AWAY
                {
                    blocks += range.count;
                }
                self.event(TargetEvent::IoDone { io, result: Ok(()) });
            }
        }
    }
}

#[test]
fn passes_of_the_scrub_begin_at_the_volume_s_interval_from_beginning_to_beginning() {
    let mut bench = mk_serving(2);
    bench.scrub_every(60);
    assert_eq!(bench.scrubbed(59_000), 0, "the first begins an interval after the start");
    assert_eq!(bench.scrubbed(4_500), 1);
    assert_eq!(bench.scrubbed(55_500), 0);
    assert_eq!(bench.scrubbed(4_500), 1, "however long the one before took");
    bench.scrub_every(600);
    assert_eq!(bench.scrubbed(590_000), 0);
    assert_eq!(bench.scrubbed(20_000), 1, "counted from the beginning of the one before");
}

#[test]
fn a_scrub_that_is_off_begins_by_itself_no_more_and_one_that_is_asked_for_goes_to_its_end() {
    let mut bench = mk_serving(2);
    bench.scrub_every(60);
    assert_eq!(bench.scrubbed(61_000), 0);
    let under_way = bench.target.status().scrub;
    assert!((1..8).contains(&under_way.regions_done), "{under_way:?}");
    bench.scrub_every(0);
    assert_eq!(bench.scrubbed(200_000), 0);
    assert_eq!(bench.target.status().scrub.regions_total, 0, "it ended at once");
    bench.event(TargetEvent::Scrub);
    assert_eq!(bench.scrubbed(10_000), 1);
    assert_eq!(bench.scrubbed(200_000), 0);
    bench.scrub_every(60);
    assert_eq!(bench.scrubbed(3_000), 1, "the interval is over since long ago");
}

#[test]
fn a_returning_replica_is_copied_to_at_the_volume_s_own_rate_until_it_is_lifted() {
    let mut bench = mk_returning();
    bench.change_params(|params| params.background.resync_bytes_per_s = 1 << 20);
    bench.maps(Some(&[(0, 2048)]));
    bench.extents(&[(0, 2048)]);
    let mut copied = bench.copied();
    for _ in 0..30 {
        bench.wait(100);
        copied += bench.copied();
    }
    assert!((2 << 20..=3 << 20).contains(&copied), "{copied} bytes in 3 s");
    bench.change_params(|params| params.background.resync_bytes_per_s = 0);
    copied += bench.copied();
    assert_eq!(copied, 8 << 20, "the rest goes at once");
}
