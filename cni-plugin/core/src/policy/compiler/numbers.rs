//! Numbers for the kernel's elements: rising, so that one just freed is not used at once.

use std::collections::BTreeSet;

/// The numbers of one kind in use.
#[derive(Debug, Default)]
pub(super) struct Numbers {
    last: u32,
    used: BTreeSet<u32>,
}

impl Numbers {
    /// The next free number from `first` on; after the highest it goes on with the lowest.
    pub(super) fn take(&mut self, first: u32) -> u32 {
        loop {
            self.last = self.last.checked_add(1).unwrap_or(first).max(first);
            // Terminates: a map of 2^32 entries does not fit in memory.
            if self.used.insert(self.last) {
                return self.last;
            }
        }
    }

    pub(super) fn give_back(&mut self, number: u32) {
        self.used.remove(&number);
    }

    /// Gives one number back for another, which is in nobody else's use.
    pub(super) fn replace(&mut self, number: u32, by: u32) {
        self.used.remove(&number);
        self.used.insert(by);
    }

    /// Starts over with these in use and all up to `floor` passed over.
    pub(super) fn restart(&mut self, floor: u32, used: BTreeSet<u32>) {
        self.last = floor;
        self.used = used;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_number_is_not_used_again_at_once() {
        let mut numbers = Numbers::default();
        assert_eq!((numbers.take(2), numbers.take(2)), (2, 3));
        numbers.give_back(3);
        assert_eq!(numbers.take(2), 4);
    }

    #[test]
    fn numbers_wrap_over_those_in_use() {
        let mut numbers = Numbers::default();
        assert_eq!(numbers.take(1), 1);
        numbers.last = u32::MAX;
        assert_eq!(numbers.take(1), 2);
    }
}
