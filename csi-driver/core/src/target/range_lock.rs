//! The range lock: one order for overlapping writes, zeroings, copies and reads (R13).
//!
//! Requests are granted in the order of their arrival; shared ones (reads) pass each other. Kept by region, so that
//! the cost of a request depends on what overlaps it, not on what else is in flight.

use std::collections::HashMap;

use crate::block_range::BlockRange;
use crate::ids::Region;

/// All locks of a volume, held and waited for.
#[derive(Debug, Default)]
pub struct RangeLock {
    entries: HashMap<u64, Entry>,
    by_region: HashMap<Region, Vec<u64>>,
}

#[derive(Debug)]
struct Entry {
    range: BlockRange,
    exclusive: bool,
    /// Earlier conflicting locks that are not released.
    blockers: usize,
    /// Later locks that count this one as a blocker.
    blocked: Vec<u64>,
}

impl RangeLock {
    /// Asks for a lock under a new id; tells whether it is held at once. If not, a later [`Self::release`] names it.
    pub fn acquire(&mut self, id: u64, range: BlockRange, exclusive: bool) -> bool {
        let mut blockers = 0;
        for region in range.regions() {
            let lane = self.by_region.entry(region).or_default();
            for other in lane.iter() {
                let Some(entry) = self.entries.get_mut(other) else { continue };
                // Two ranges that share several regions are counted in the first they share.
                let first = range.start.max(entry.range.start).region();
                if first == region && (exclusive || entry.exclusive) && entry.range.overlaps(range) {
                    entry.blocked.push(id);
                    blockers += 1;
                }
            }
            lane.push(id);
        }
        self.entries.insert(id, Entry { range, exclusive, blockers, blocked: Vec::new() });
        blockers == 0
    }

    /// Gives a lock up, held or not; returns those that are held now because of it, in order of arrival.
    pub fn release(&mut self, id: u64) -> Vec<u64> {
        let Some(entry) = self.entries.remove(&id) else { return Vec::new() };
        for region in entry.range.regions() {
            if let Some(lane) = self.by_region.get_mut(&region) {
                lane.retain(|other| *other != id);
                if lane.is_empty() {
                    self.by_region.remove(&region);
                }
            }
        }
        let mut granted = Vec::new();
        for blocked in entry.blocked {
            if let Some(waiter) = self.entries.get_mut(&blocked) {
                waiter.blockers -= 1;
                if waiter.blockers == 0 {
                    granted.push(blocked);
                }
            }
        }
        granted
    }

    /// Forgets everything.
    pub fn clear(&mut self) {
        self.entries.clear();
        self.by_region.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn r13_overlapping_locks_are_held_one_after_the_other_in_order() {
        let mut lock = RangeLock::default();
        assert!(lock.acquire(1, BlockRange::new(0, 600), true));
        assert!(!lock.acquire(2, BlockRange::new(100, 500), true));
        assert!(!lock.acquire(3, BlockRange::new(550, 10), false));
        assert!(lock.acquire(4, BlockRange::new(600, 1), true));
        assert_eq!(lock.release(1), [2]);
        assert_eq!(lock.release(2), [3]);
    }

    #[test]
    fn r13_reads_pass_each_other_but_no_writer_that_waits() {
        let mut lock = RangeLock::default();
        assert!(lock.acquire(1, BlockRange::new(0, 2), false));
        assert!(lock.acquire(2, BlockRange::new(1, 2), false));
        assert!(!lock.acquire(3, BlockRange::new(1, 1), true));
        assert!(!lock.acquire(4, BlockRange::new(0, 2), false));
        assert!(lock.release(1).is_empty());
        assert_eq!(lock.release(2), [3]);
        assert_eq!(lock.release(3), [4]);
    }

    #[test]
    fn agrees_with_a_naive_queue() {
        let mut seed = 3_u64;
        let mut next = |below: u64| {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (seed >> 33) % below
        };
        let mut lock = RangeLock::default();
        let mut naive: Vec<(u64, BlockRange, bool)> = Vec::new();
        let mut held = std::collections::BTreeSet::new();
        for id in 0..4_000 {
            if naive.len() > 12 {
                let (gone, ..) = naive.remove(usize::try_from(next(naive.len() as u64)).unwrap());
                held.remove(&gone);
                held.extend(lock.release(gone));
            }
            let range = BlockRange::new(next(1_000), 1 + next(700));
            let exclusive = next(2) == 0;
            naive.push((id, range, exclusive));
            if lock.acquire(id, range, exclusive) {
                held.insert(id);
            }
            let free = |at: usize| {
                let (_, range, exclusive) = naive[at];
                naive[..at].iter().all(|(_, other, x)| !(other.overlaps(range) && (exclusive || *x)))
            };
            let expected: std::collections::BTreeSet<u64> =
                (0..naive.len()).filter(|at| free(*at)).map(|at| naive[at.to_owned()].0).collect();
            assert_eq!(held, expected);
        }
    }
}
