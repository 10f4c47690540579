//! The scrub: every block of the volume is verified on every member, region by region, at a low rate (R33).
//!
//! A pass begins when one is asked for, or by itself the volume's interval after the target's start or the beginning of the
//! pass before, once that one ended. The interval is the record's, whenever it changes; where that says never, a pass that
//! began by itself ends at once. Where it stands is not kept over a restart; each start begins at another place, drawn from its
//! seed, so that a target that never lives as long as a pass takes still gets everywhere in the end.
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
    /// Somebody asked for the pass under way.
    asked: bool,
    /// When the last pass began, or the target began to serve.
    since_ms: Option<u64>,
    /// When the next region of the pass under way is due.
    region_ms: u64,
}

impl Scrub {
    pub(super) fn status(&self) -> ScrubStatus {
        ScrubStatus { regions_done: self.total - self.left, regions_total: self.total, passes: self.passes }
    }
}

impl Target {
    /// A pass begins now; one that is under way starts over.
    pub(super) fn on_scrub(&mut self) {
        self.begin_pass();
        self.scrub.asked = true;
        self.dirty = true;
    }

    fn begin_pass(&mut self) {
        let regions = self.size_bytes().unwrap_or(0) / REGION_BYTES;
        let (next, passes) = (self.scrub.next, self.scrub.passes);
        self.scrub = Scrub {
            next,
            left: regions,
            total: regions,
            passes,
            asked: false,
            since_ms: Some(self.now_ms),
            region_ms: self.now_ms,
        };
    }

    /// When the next step is due.
    pub(super) fn scrub_timeout(&self) -> Option<u64> {
        self.scrub_due_ms().filter(|_| self.may_scrub())
    }

    /// When the next region, or else the next pass, is due.
    fn scrub_due_ms(&self) -> Option<u64> {
        if self.scrub.left > 0 {
            return Some(self.scrub.region_ms);
        }
        // What ended just now is not followed at once: the interval may be shorter than a pass takes.
        let next = self.scrub.since_ms?.saturating_add(self.scrub_every_ms()?);
        Some(next.max(self.scrub.region_ms))
    }

    fn scrub_every_ms(&self) -> Option<u64> {
        self.volume().and_then(|record| record.params.background.scrub_every_ms())
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
        self.scrub.since_ms.get_or_insert(self.now_ms);
        if self.scrub.left > 0 && !self.scrub.asked && self.scrub_every_ms().is_none() {
            (self.scrub.left, self.scrub.total) = (0, 0);
        }
        if self.scrub_due_ms().is_none_or(|due_ms| self.now_ms < due_ms) || !self.may_scrub() {
            return;
        }
        if self.scrub.left == 0 {
            self.begin_pass();
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
        self.scrub.passes += u64::from(self.scrub.left == 1);
        self.scrub.left = self.scrub.left.saturating_sub(1);
        self.scrub.region_ms = self.now_ms + timers::SCRUB_REGION_EVERY_MS;
    }
}
