//! Leaving out of a catch-up what is on neither side (R23): nothing is copied where both have nothing.

use std::collections::BTreeSet;

use crate::block_range::BlockRange;
use crate::dirty_map::BlockSet;
use crate::ids::{BLOCK_BYTES, BLOCKS_PER_REGION, Region};
use crate::timers;

use super::calls::{Call, CallKind};
use super::catch_up::Stage;
use super::{Allocation, CallId, Control, Target};

/// Asking source and replica, part by part, where there is nothing.
#[derive(Debug, Default)]
pub(super) struct Extents {
    /// Regions before it are known, but for the part under way.
    next: u64,
    /// In the part under way: answers of source and replica.
    answers: u32,
    /// In the part under way: not absent at the source or at the replica.
    present: BlockSet,
    /// In the part under way: without data at the source.
    holes: BlockSet,
}

impl Target {
    /// Leaves out what is absent at a member and at the replica: both read as zeroes there. Whatever is written from the
    /// replica's open on goes to both; what began before goes to members only, and must have reached them before one is
    /// asked, or its answer is too old.
    pub(super) fn pump_extents(&mut self) {
        if self.has_calls(|kind| kind == CallKind::Extents) || !self.is_drained() {
            return;
        }
        let size_bytes = self.size_bytes().unwrap_or(0);
        let Some(source) = self.choose_reader(&BTreeSet::new()) else { return };
        let Some(catch_up) = &mut self.catch_up else { return };
        let known = |regions: u64| Region(u32::try_from(regions).unwrap_or(u32::MAX));
        if catch_up.extents.next > 0 {
            let part = known(catch_up.extents.next - timers::EXTENTS_REGIONS)..known(catch_up.extents.next);
            let present = std::mem::take(&mut catch_up.extents.present);
            let holes = std::mem::take(&mut catch_up.extents.holes);
            if std::mem::take(&mut catch_up.extents.answers) == 2 {
                catch_up.plan.leave_out(part, &present, holes);
            } else {
                // The source is gone, and with it what it has that the replica lacks: another is asked.
                catch_up.extents.next -= timers::EXTENTS_REGIONS;
            }
        }
        let next = catch_up.plan.to_copy().first_region_from(known(catch_up.extents.next));
        let Some(next) = next else { return self.start_copying() };
        let part = u64::from(next.0) / timers::EXTENTS_REGIONS;
        let start = part * timers::EXTENTS_REGIONS * BLOCKS_PER_REGION;
        let end = (start + timers::EXTENTS_REGIONS * BLOCKS_PER_REGION).min(size_bytes / BLOCK_BYTES);
        catch_up.extents.next = (part + 1) * timers::EXTENTS_REGIONS;
        let (replica, range) = (catch_up.replica, BlockRange::new(start, end - start));
        for of in [source, replica] {
            self.send_control(of, CallKind::Extents, Control::ReadExtents(range));
        }
    }

    pub(super) fn on_extents_read(&mut self, call: CallId, extents: &[(BlockRange, Allocation)]) {
        let Some(Call { replica: of, kind: CallKind::Extents }) = self.take_call(call) else { return };
        let Some(catch_up) = self.catch_up.as_mut().filter(|c| c.stage == Stage::Extents) else { return };
        catch_up.extents.answers += 1;
        for (range, allocation) in extents {
            if *allocation != Allocation::Absent {
                catch_up.extents.present.insert(*range);
            }
            if of != catch_up.replica && *allocation != Allocation::Data {
                catch_up.extents.holes.insert(*range);
            }
        }
    }
}
