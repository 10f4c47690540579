//! Address leases of one node: which addresses of its pod ranges are free.
//!
//! Pure: the table of leases is the agent's (sled); this is the free space beside it, rebuilt from the leases at start.
//! A released address comes round again only after all others (next fit), so that a peer that still believes in the old
//! owner of an address is wrong as rarely as possible. Allocating and releasing cost one look into a tree of free
//! intervals, whatever the number of leases or the size of the range.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

/// No free address is left in a range.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the address range {range} is used up: all {total} usable addresses are leased")]
pub struct RangeUsedUp {
    /// The range.
    pub range: IpNetwork,
    /// How many addresses it can lease.
    pub total: u128,
}

/// The free addresses of a node's pod ranges.
#[derive(Debug, Clone)]
pub struct Allocator {
    ranges: Vec<Range>,
}

#[derive(Debug, Clone)]
struct Range {
    network: IpNetwork,
    first: u128,
    last: u128,
    total: u128,
    /// Free intervals, first to last, disjoint and not adjacent.
    free: BTreeMap<u128, u128>,
    /// Where the search goes on.
    cursor: u128,
}

impl Allocator {
    /// The free space of `ranges` beside `leased`, whose last entry is the newest lease. Leases outside the ranges are
    /// of an earlier configuration and take nothing.
    #[must_use]
    pub fn new(ranges: &[IpNetwork], leased: &[IpAddr]) -> Self {
        let mut ranges: Vec<Range> = ranges.iter().map(|network| Range::new(*network)).collect();
        for range in &mut ranges {
            for address in leased {
                if let Some(value) = range.usable(*address) {
                    range.take(value);
                    range.cursor = value.saturating_add(1);
                }
            }
        }
        Self { ranges }
    }

    /// Takes one address of each range.
    ///
    /// # Errors
    /// A range has none left; then nothing was taken.
    pub fn allocate(&mut self) -> Result<Vec<IpAddr>, RangeUsedUp> {
        if let Some(range) = self.ranges.iter().find(|range| range.free.is_empty()) {
            return Err(RangeUsedUp { range: range.network, total: range.total });
        }
        Ok(self.ranges.iter_mut().filter_map(Range::next).collect())
    }

    /// Gives an address back. An address that is free already, or of no range, changes nothing.
    pub fn release(&mut self, address: IpAddr) {
        for range in &mut self.ranges {
            if let Some(value) = range.usable(address) {
                range.give(value);
            }
        }
    }

    /// The range without a free address, if there is one.
    #[must_use]
    pub fn used_up(&self) -> Option<RangeUsedUp> {
        let full = self.ranges.iter().find(|range| range.free.is_empty());
        full.map(|range| RangeUsedUp { range: range.network, total: range.total })
    }

    /// The ranges.
    #[must_use]
    pub fn ranges(&self) -> Vec<IpNetwork> {
        self.ranges.iter().map(|range| range.network).collect()
    }
}

impl Range {
    /// The first address (which names the network; for IPv6 the routers' anycast address) and IPv4's broadcast are not
    /// leased.
    fn new(network: IpNetwork) -> Self {
        let (start, end) = match network {
            IpNetwork::V4(network) => {
                (u128::from(u32::from(network.network())), u128::from(u32::from(network.broadcast())))
            }
            IpNetwork::V6(network) => (u128::from(network.network()), u128::from(network.broadcast())),
        };
        let first = start.saturating_add(1);
        let last = if network.is_ipv4() { end.saturating_sub(1) } else { end };
        let mut free = BTreeMap::new();
        let mut total = 0;
        if first <= last {
            free.insert(first, last);
            total = last - first + 1;
        }
        Self { network, first, last, total, free, cursor: first }
    }

    fn usable(&self, address: IpAddr) -> Option<u128> {
        let value = match (self.network, address) {
            (IpNetwork::V4(_), IpAddr::V4(address)) => u128::from(u32::from(address)),
            (IpNetwork::V6(_), IpAddr::V6(address)) => u128::from(address),
            _ => return None,
        };
        (self.first <= value && value <= self.last).then_some(value)
    }

    fn next(&mut self) -> Option<IpAddr> {
        let cursor = self.cursor;
        // The interval that holds the cursor, else the next one, else the first one.
        let holding =
            self.free.range(..=cursor).next_back().filter(|(_, last)| **last >= cursor).map(|_| cursor);
        let value = holding
            .or_else(|| self.free.range(cursor..).next().map(|(first, _)| *first))
            .or_else(|| self.free.first_key_value().map(|(first, _)| *first))?;
        self.take(value);
        self.cursor = value.saturating_add(1);
        Some(self.address(value))
    }

    fn take(&mut self, value: u128) {
        let Some((&first, &last)) = self.free.range(..=value).next_back() else { return };
        if last < value {
            return;
        }
        self.free.remove(&first);
        if first < value {
            self.free.insert(first, value - 1);
        }
        if value < last {
            self.free.insert(value + 1, last);
        }
    }

    fn give(&mut self, value: u128) {
        let before = self.free.range(..=value).next_back().map(|(first, last)| (*first, *last));
        if before.is_some_and(|(_, last)| last >= value) {
            return;
        }
        let (mut first, mut last) = (value, value);
        if let Some((start, end)) = before.filter(|(_, end)| end + 1 == value) {
            self.free.remove(&start);
            debug_assert!(end < value);
            first = start;
        }
        if let Some(end) = value.checked_add(1).and_then(|next| self.free.remove(&next)) {
            last = end;
        }
        self.free.insert(first, last);
    }

    fn address(&self, value: u128) -> IpAddr {
        match self.network {
            IpNetwork::V4(_) => {
                IpAddr::V4(Ipv4Addr::from(u32::try_from(value).expect("an IPv4 range ends within 32 bits")))
            }
            IpNetwork::V6(_) => IpAddr::V6(Ipv6Addr::from(value)),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::rngs::StdRng;
    use rand::{Rng, SeedableRng};
    use std::collections::BTreeSet;

    fn mk_allocator(ranges: &[&str], leased: &[&str]) -> Allocator {
        let ranges: Vec<IpNetwork> = ranges.iter().map(|text| text.parse().unwrap()).collect();
        let leased: Vec<IpAddr> = leased.iter().map(|text| text.parse().unwrap()).collect();
        Allocator::new(&ranges, &leased)
    }

    fn one(allocator: &mut Allocator) -> String {
        allocator.allocate().unwrap()[0].to_string()
    }

    #[test]
    fn addresses_come_in_order_and_a_released_one_comes_last() {
        let mut allocator = mk_allocator(&["10.0.0.0/29"], &[]);
        assert_eq!([one(&mut allocator), one(&mut allocator)], ["10.0.0.1", "10.0.0.2"]);
        allocator.release("10.0.0.1".parse().unwrap());
        let rest: Vec<String> = (0..5).map(|_| one(&mut allocator)).collect();
        assert_eq!(rest, ["10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.0.1"]);
        let error = allocator.allocate().unwrap_err();
        assert_eq!(
            error.to_string(),
            "the address range 10.0.0.0/29 is used up: all 6 usable addresses are leased"
        );
    }

    #[test]
    fn leases_are_respected_after_a_restart_and_the_search_goes_on_after_the_newest() {
        let mut allocator = mk_allocator(&["10.0.0.0/29"], &["10.0.0.5", "10.0.0.3", "192.0.2.1"]);
        let rest: Vec<String> = (0..4).map(|_| one(&mut allocator)).collect();
        assert_eq!(rest, ["10.0.0.4", "10.0.0.6", "10.0.0.1", "10.0.0.2"]);
        assert!(allocator.used_up().is_some());
    }

    #[test]
    fn dual_stack_takes_one_of_each_or_nothing() {
        let mut allocator = mk_allocator(&["10.0.0.0/30", "fd00::/64"], &[]);
        assert_eq!(allocator.allocate().unwrap().len(), 2);
        assert_eq!(allocator.allocate().unwrap()[1].to_string(), "fd00::2");
        assert!(allocator.allocate().is_err());
        allocator.release("10.0.0.1".parse().unwrap());
        assert_eq!(
            allocator.allocate().unwrap()[1].to_string(),
            "fd00::3",
            "the failure took no IPv6 address"
        );
    }

    #[test]
    fn a_random_history_never_leases_an_address_twice() {
        for seed in 0..200 {
            let mut rng = StdRng::seed_from_u64(seed);
            let mut allocator = mk_allocator(&["10.0.0.0/26"], &[]);
            let mut held: BTreeSet<IpAddr> = BTreeSet::new();
            for step in 0..500 {
                if rng.random_bool(0.55) {
                    match allocator.allocate() {
                        Ok(addresses) => assert!(held.insert(addresses[0]), "seed {seed} step {step}"),
                        Err(_) => assert_eq!(held.len(), 62, "seed {seed} step {step}"),
                    }
                } else if let Some(address) = held.iter().nth(rng.random_range(0..62)).copied() {
                    held.remove(&address);
                    allocator.release(address);
                    allocator.release(address);
                }
            }
        }
    }
}
