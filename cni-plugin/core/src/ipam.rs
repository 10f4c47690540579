//! Address leases of one node: which addresses of its pod ranges are free.
//!
//! Pure: the table of leases is the agent's (sled); this is the free space beside it, rebuilt from the leases at start.
//!
//! **Promise**: an address that a runtime was told of goes to nobody else before every node that follows the objects has had
//! the time to see that its pod is gone ([`Quarantine`]); until then they would apply the old pod's rights to the new one.
//! Not promised: anything about a node that has been cut off from the objects for longer than that time.
//!
//! ```text
//! free --allocate--> leased --release--> held back --time, while objects are there--> free
//!   ^------------------give_back----------'  (an ADD that was never answered: nobody was told)
//! ```
//!
//! Free addresses go round (next fit), so that a late believer in an old owner is wrong as rarely as possible. Each step costs
//! one look into a tree of free intervals and one into a queue, whatever the number of leases or the size of the range.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

/// Why no address was taken. Nothing was taken then, of no family.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AllocateError {
    /// No free address is left in the ranges of a family.
    #[error(transparent)]
    UsedUp(#[from] UsedUp),
    /// The address that was asked for is leased.
    #[error("the address {0} is leased to another container")]
    Taken(IpAddr),
    /// The address that was asked for was freed a moment ago.
    #[error("the address {0} was freed a moment ago; other nodes may still know its old pod")]
    HeldBack(IpAddr),
    /// It is none that this node leases.
    #[error("the address {address} is in none of this node's ranges ({ranges}), or names one of them")]
    Foreign {
        /// The address.
        address: IpAddr,
        /// The node's ranges.
        ranges: String,
    },
    /// A range that was asked for is none of this node's.
    #[error("the range {range} is not within this node's ranges ({ranges})")]
    ForeignRange {
        /// The range.
        range: IpNetwork,
        /// The node's ranges.
        ranges: String,
    },
    /// Two addresses of one family were asked for, in `ips` or as sets of `ipRanges`.
    #[error("{0} were asked for; an interface gets one address of each family")]
    OneOfEachFamily(&'static str),
}

/// The ranges of a family have no free address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the address range {} is used up: {}", self.ranges, self.how())]
pub struct UsedUp {
    /// The ranges, as text.
    pub ranges: String,
    /// How many addresses they can lease.
    pub total: u128,
    /// How many of those were freed and are held back.
    pub held_back: usize,
    /// Held back because the objects are away.
    pub objects_away: bool,
}

impl UsedUp {
    fn how(&self) -> String {
        match (self.held_back, self.objects_away) {
            (0, _) => format!("all {} usable addresses are leased", self.total),
            (held, false) => format!(
                "of {} usable addresses {held} were freed a moment ago and wait until all nodes know, the rest is leased",
                self.total
            ),
            (held, true) => format!(
                "of {} usable addresses {held} are freed, but none is given out again while objects cannot be read",
                self.total
            ),
        }
    }
}

/// What an attachment asks for beside the defaults.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct AddressRequest {
    /// These very addresses (capability `ips`), at most one of a family. The other family is allocated if `ips` has none of it.
    pub ips: Vec<IpAddr>,
    /// For each address to be given, the pieces that it may come from, as `first..=last` (capability `ipRanges`); at most one
    /// set of a family. Where there is a set, families without one get no address.
    pub range_sets: Vec<Vec<(IpAddr, IpAddr)>>,
}

/// When a freed address may be leased again.
///
/// It is once it has been held back for the whole time while the objects could be read. That clock starts anew whenever the objects
/// come back: who was away as long as we were has to catch up first. It needs no clock of the day and starts anew with the agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Quarantine {
    /// Milliseconds; 0 turns it off.
    pub time_ms: u64,
    /// Since when the objects have been there without a break, on the caller's monotonic clock; `None`: they are not.
    pub objects_since_ms: Option<u64>,
}

impl Quarantine {
    fn is_over(&self, freed_ms: u64, now_ms: u64) -> bool {
        if self.time_ms == 0 {
            return true;
        }
        let since = self.objects_since_ms.map(|since| since.max(freed_ms));
        since.is_some_and(|since| now_ms.saturating_sub(since) >= self.time_ms)
    }
}

/// The free addresses of a node's pod ranges.
#[derive(Debug, Clone)]
pub struct Allocator {
    /// As they were given; one that overlaps an earlier one is not leased from.
    given: Vec<IpNetwork>,
    ranges: Vec<Range>,
    quarantine: Quarantine,
    /// Freed addresses in the order of their freeing, with the time.
    held_back: VecDeque<(u64, IpAddr)>,
    /// The same, to look one up.
    held: BTreeSet<IpAddr>,
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
    /// Addresses of it that are held back.
    held: usize,
}

impl Allocator {
    /// The free space of `ranges` beside `leased`, whose last entry is the newest lease, and beside `freed`, which are held back
    /// from `now_ms` on. Leases outside the ranges are of an earlier configuration and take nothing. Several ranges of one family
    /// are one pool: the first that has a free address gives it. A range that shares addresses with an earlier one is left out:
    /// each would give them away once.
    #[must_use]
    pub fn new(
        ranges: &[IpNetwork],
        leased: &[IpAddr],
        freed: impl IntoIterator<Item = (u64, IpAddr)>,
        quarantine: Quarantine,
    ) -> Self {
        let given = ranges.to_vec();
        let mut ranges: Vec<Range> = Vec::new();
        for network in &given {
            if !ranges.iter().any(|earlier| overlap(&earlier.network, network)) {
                ranges.push(Range::new(*network));
            }
        }
        for range in &mut ranges {
            for address in leased {
                if let Some(value) = range.usable(*address) {
                    range.take(value);
                    range.cursor = value.saturating_add(1);
                }
            }
        }
        let mut allocator =
            Self { given, ranges, quarantine, held_back: VecDeque::new(), held: BTreeSet::new() };
        let leased: BTreeSet<&IpAddr> = leased.iter().collect();
        for (freed_ms, address) in freed {
            // One that is leased must not become free when its time is over.
            if !leased.contains(&address) {
                allocator.take(address);
                allocator.hold_back(address, freed_ms);
            }
        }
        allocator
    }

    /// Takes one address of each family that there are ranges of, or what `request` says.
    ///
    /// # Errors
    /// [`AllocateError`]; then nothing was taken.
    pub fn allocate(&mut self, request: &AddressRequest, now_ms: u64) -> Result<Vec<IpAddr>, AllocateError> {
        self.free_what_is_over(now_ms);
        let mut taken = Vec::new();
        for v4 in [true, false] {
            match self.allocate_family(request, v4) {
                Ok(address) => taken.extend(address),
                Err(error) => {
                    taken.into_iter().for_each(|address| self.give_back(address));
                    return Err(error);
                }
            }
        }
        Ok(taken)
    }

    /// One address of a family, or none if there is to be none.
    fn allocate_family(
        &mut self,
        request: &AddressRequest,
        v4: bool,
    ) -> Result<Option<IpAddr>, AllocateError> {
        let mut asked = request.ips.iter().filter(|address| address.is_ipv4() == v4);
        let mut sets =
            request.range_sets.iter().filter(|set| set.iter().any(|(first, _)| first.is_ipv4() == v4));
        let (asked, set) = match (asked.next(), asked.next(), sets.next(), sets.next()) {
            (_, Some(_), ..) => return Err(AllocateError::OneOfEachFamily("two addresses of one family")),
            (.., Some(_)) => return Err(AllocateError::OneOfEachFamily("two sets of ranges of one family")),
            (asked, None, set, None) => (asked, set),
        };
        if let Some(address) = asked {
            return self.take_asked(*address).map(Some);
        }
        if let Some(set) = set {
            return self.take_within(set, v4).map(Some);
        }
        let has_range = self.ranges.iter().any(|range| range.network.is_ipv4() == v4);
        if !has_range || !request.range_sets.is_empty() {
            return Ok(None);
        }
        let found =
            self.ranges.iter_mut().filter(|range| range.network.is_ipv4() == v4).find_map(Range::next);
        found.map(Some).ok_or_else(|| self.used_up_family(v4).into())
    }

    fn take_asked(&mut self, address: IpAddr) -> Result<IpAddr, AllocateError> {
        let Some(range) = self.ranges.iter_mut().find(|range| range.usable(address).is_some()) else {
            return Err(AllocateError::Foreign { address, ranges: self.text_of(|_| true) });
        };
        let value = range.usable(address).unwrap_or_default();
        if range.is_free(value) {
            range.take(value);
            return Ok(address);
        }
        Err(if self.held.contains(&address) {
            AllocateError::HeldBack(address)
        } else {
            AllocateError::Taken(address)
        })
    }

    /// Takes an address of the first piece that has one.
    fn take_within(&mut self, pieces: &[(IpAddr, IpAddr)], v4: bool) -> Result<IpAddr, AllocateError> {
        for (first, last) in pieces {
            let range = self.ranges.iter_mut().find(|range| range.holds(*first) && range.holds(*last));
            let Some(range) = range else {
                // The smallest network that has both tells the reader best.
                let range = IpNetwork::from(*first);
                return Err(AllocateError::ForeignRange { range, ranges: self.text_of(|_| true) });
            };
            if let Some(address) = range.next_within(*first, *last) {
                return Ok(address);
            }
        }
        Err(self.used_up_family(v4).into())
    }

    /// Gives back an address that nobody outside was told of. It is free at once. An address that is free already, held back,
    /// or of no range, changes nothing.
    pub fn give_back(&mut self, address: IpAddr) {
        if self.held.contains(&address) {
            return;
        }
        for range in &mut self.ranges {
            if let Some(value) = range.usable(address) {
                range.give(value);
            }
        }
    }

    /// Takes an address back that was in use. It is held back. One that is free already, or of no range, changes nothing.
    pub fn release(&mut self, address: IpAddr, now_ms: u64) {
        if self.quarantine.time_ms == 0 {
            self.give_back(address);
        } else {
            self.hold_back(address, now_ms);
        }
    }

    fn hold_back(&mut self, address: IpAddr, freed_ms: u64) {
        let Some(range) = self.ranges.iter_mut().find(|range| range.usable(address).is_some()) else {
            return;
        };
        let value = range.usable(address).unwrap_or_default();
        if !range.is_free(value) && self.held.insert(address) {
            range.held += 1;
            self.held_back.push_back((freed_ms, address));
        }
    }

    fn take(&mut self, address: IpAddr) {
        for range in &mut self.ranges {
            if let Some(value) = range.usable(address) {
                range.take(value);
            }
        }
    }

    /// Whether an address is one that the ranges give.
    #[must_use]
    pub fn has(&self, address: IpAddr) -> bool {
        self.ranges.iter().any(|range| range.usable(address).is_some())
    }

    /// Whether an address is held back, as far as [`Allocator::free_what_is_over`] has seen.
    #[must_use]
    pub fn is_held_back(&self, address: IpAddr) -> bool {
        self.held.contains(&address)
    }

    /// Frees what was held back long enough by `now_ms`.
    pub fn free_what_is_over(&mut self, now_ms: u64) {
        while let Some((freed_ms, address)) = self.held_back.front().copied() {
            if !self.quarantine.is_over(freed_ms, now_ms) {
                return;
            }
            self.held_back.pop_front();
            self.held.remove(&address);
            if let Some(range) = self.ranges.iter_mut().find(|range| range.usable(address).is_some()) {
                range.held -= 1;
            }
            self.give_back(address);
        }
    }

    /// Says whether the objects can be read, from `now_ms` on.
    pub fn set_objects(&mut self, are_there: bool, now_ms: u64) {
        let since = self.quarantine.objects_since_ms;
        self.quarantine.objects_since_ms = are_there.then(|| since.unwrap_or(now_ms));
    }

    /// The rules of the quarantine as they are.
    #[must_use]
    pub fn quarantine(&self) -> Quarantine {
        self.quarantine
    }

    /// The freed addresses that are held back, oldest first, with the time of their freeing.
    pub fn held_back(&self) -> impl Iterator<Item = (u64, IpAddr)> {
        self.held_back.iter().copied()
    }

    /// The family without a free address, if there is one.
    pub fn used_up(&mut self, now_ms: u64) -> Option<UsedUp> {
        self.free_what_is_over(now_ms);
        [true, false].into_iter().find_map(|v4| {
            let mut of_family = self.ranges.iter().filter(|range| range.network.is_ipv4() == v4).peekable();
            let has_range = of_family.peek().is_some();
            (has_range && of_family.all(|range| range.free.is_empty())).then(|| self.used_up_family(v4))
        })
    }

    fn used_up_family(&self, v4: bool) -> UsedUp {
        let of_family = || self.ranges.iter().filter(move |range| range.network.is_ipv4() == v4);
        UsedUp {
            ranges: self.text_of(|network| network.is_ipv4() == v4),
            total: of_family().fold(0, |sum, range| sum.saturating_add(range.total)),
            held_back: of_family().map(|range| range.held).sum(),
            objects_away: self.quarantine.objects_since_ms.is_none(),
        }
    }

    fn text_of(&self, wanted: impl Fn(&IpNetwork) -> bool) -> String {
        let ranges = self.ranges.iter().map(|range| range.network).filter(wanted);
        ranges.map(|range| range.to_string()).collect::<Vec<_>>().join(", ")
    }

    /// The ranges as they were given.
    #[must_use]
    pub fn ranges(&self) -> &[IpNetwork] {
        &self.given
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
        Self { network, first, last, total, free, cursor: first, held: 0 }
    }

    fn usable(&self, address: IpAddr) -> Option<u128> {
        let value = number(address);
        let is_usable =
            self.network.is_ipv4() == address.is_ipv4() && self.first <= value && value <= self.last;
        is_usable.then_some(value)
    }

    /// Whether the address is in the range, those included that are never leased.
    fn holds(&self, address: IpAddr) -> bool {
        self.network.contains(address)
    }

    fn is_free(&self, value: u128) -> bool {
        self.free.range(..=value).next_back().is_some_and(|(_, last)| *last >= value)
    }

    fn next(&mut self) -> Option<IpAddr> {
        let value = self.at_or_after(self.cursor).or_else(|| self.at_or_after(self.first))?;
        self.take(value);
        self.cursor = value.saturating_add(1);
        Some(self.address(value))
    }

    /// Like [`Range::next`] between two addresses of the range, both included.
    fn next_within(&mut self, first: IpAddr, last: IpAddr) -> Option<IpAddr> {
        let (first, last) = (number(first).max(self.first), number(last).min(self.last));
        let from = if (first..=last).contains(&self.cursor) { self.cursor } else { first };
        let fits = |value: &u128| *value <= last;
        let value = self.at_or_after(from).filter(fits).or_else(|| self.at_or_after(first).filter(fits))?;
        self.take(value);
        self.cursor = value.saturating_add(1);
        Some(self.address(value))
    }

    /// The first free address that is not below `from`: in the interval that holds it, else the start of the next one.
    fn at_or_after(&self, from: u128) -> Option<u128> {
        let is_free = self.is_free(from).then_some(from);
        is_free.or_else(|| self.free.range(from..).next().map(|(first, _)| *first))
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

/// Whether two networks share addresses.
pub fn overlap(one: &IpNetwork, other: &IpNetwork) -> bool {
    one.contains(other.network()) || other.contains(one.network())
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(address) => u128::from(u32::from(address)),
        IpAddr::V6(address) => u128::from(address),
    }
}

#[cfg(test)]
mod tests;
