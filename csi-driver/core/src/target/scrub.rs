//! The scrub: every block of the volume is verified on every member, region by region, at a low rate (R33).
//!
//! A pass begins when one is asked for, or by itself `SCRUB_EVERY_MS` after the target's start or the end of the pass
//! before. Where it stands is not kept over a restart; each start begins at another place, drawn from its seed, so that
//! a target that never lives as long as a pass takes still gets everywhere in the end.
//!
//! It gives way to reconciling and to a replica that catches up, and to nothing else: it is slow enough.

use crate::block_range::BlockRange;
use crate::ids::{REGION_BYTES, Region};
use crate::timers;

use super::checks::CheckFor;
use super::{ScrubStatus, Target, TargetState};

#[derive(Debug, Default)]
pub(super) struct Scrub {
    /// Where the next region is.
    next: u64,
    /// Regions of the pass under way that are not verified.
    left: u64,
    total: u64,
    passes: u64,
    /// When the next region, or the next pass, is due.
    due_ms: Option<u64>,
}

impl Scrub {
    pub(super) fn status(&self) -> ScrubStatus {
        ScrubStatus { regions_done: self.total - self.left, regions_total: self.total, passes: self.passes }
    }
}

impl Target {
    /// A pass begins now; one that is under way starts over.
    pub(super) fn on_scrub(&mut self) {
        let regions = self.size_bytes().unwrap_or(0) / REGION_BYTES;
        self.scrub.total = regions;
        self.scrub.left = regions;
        self.scrub.due_ms = Some(self.now_ms);
        self.dirty = true;
    }

    /// When the next step is due.
    pub(super) fn scrub_timeout(&self) -> Option<u64> {
        self.scrub.due_ms.filter(|_| self.may_scrub())
    }

    fn may_scrub(&self) -> bool {
        self.state == TargetState::Serving
            && self.gates.begin
            && self.reconcile.left() == 0
            && self.catch_up.is_none()
            && self.stopping.is_none()
            && !self.checks.scrubs()
    }

    pub(super) fn pump_scrub(&mut self) {
        if self.state != TargetState::Serving {
            return;
        }
        let due_ms = *self.scrub.due_ms.get_or_insert(self.now_ms + timers::SCRUB_EVERY_MS);
        if self.now_ms < due_ms || !self.may_scrub() {
            return;
        }
        if self.scrub.left == 0 {
            self.on_scrub();
            self.scrub.next = self.next_random();
        }
        if self.scrub.total == 0 {
            return;
        }
        let region = self.scrub.next % self.scrub.total;
        self.scrub.next = region + 1;
        let region = Region(u32::try_from(region).expect("volumes end below 2^32 regions"));
        self.start_check(CheckFor::Scrub, BlockRange::of_region(region));
    }

    pub(super) fn region_scrubbed(&mut self) {
        self.scrub.left = self.scrub.left.saturating_sub(1);
        let pause_ms = if self.scrub.left == 0 {
            self.scrub.passes += 1;
            timers::SCRUB_EVERY_MS
        } else {
            timers::SCRUB_REGION_EVERY_MS
        };
        self.scrub.due_ms = Some(self.now_ms + pause_ms);
    }
}
