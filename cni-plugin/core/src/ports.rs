//! Sets of protocols and ports: what a policy rule names, and what a profile allows.

use serde::{Deserialize, Serialize};

/// A transport protocol of Kubernetes policies.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Proto {
    /// TCP, the API's default.
    Tcp,
    /// UDP.
    Udp,
    /// SCTP.
    Sctp,
}

impl Proto {
    /// All of them.
    pub const ALL: [Proto; 3] = [Proto::Tcp, Proto::Udp, Proto::Sctp];

    /// The IANA protocol number.
    pub fn number(self) -> u8 {
        match self {
            Proto::Tcp => 6,
            Proto::Udp => 17,
            Proto::Sctp => 132,
        }
    }

    /// The protocol with IANA `number`, if it is one of ours.
    pub fn from_number(number: u8) -> Option<Self> {
        Proto::ALL.into_iter().find(|p| p.number() == number)
    }
}

impl std::fmt::Display for Proto {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Proto::Tcp => "tcp",
            Proto::Udp => "udp",
            Proto::Sctp => "sctp",
        })
    }
}

/// One thing a profile allows: one element of the kernel's map.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum PortRule {
    /// Every protocol (ICMP too) and every port.
    All,
    /// Every port of the protocols `first..=last`, none of which is TCP, UDP or SCTP.
    Protos {
        /// Lowest protocol number.
        first: u8,
        /// Highest protocol number.
        last: u8,
    },
    /// Ports `first..=last` of `proto`.
    Ports {
        /// The protocol.
        proto: Proto,
        /// Lowest port.
        first: u16,
        /// Highest port, not below `first`.
        last: u16,
    },
}

impl PortRule {
    /// One port.
    pub fn port(proto: Proto, port: u16) -> Self {
        Self::Ports { proto, first: port, last: port }
    }
}

/// The protocols between TCP, UDP and SCTP.
const OTHERS: [PortRule; 4] = [
    PortRule::Protos { first: 0, last: 5 },
    PortRule::Protos { first: 7, last: 16 },
    PortRule::Protos { first: 18, last: 131 },
    PortRule::Protos { first: 133, last: u8::MAX },
];

/// A set of (protocol, port). Protocols other than TCP, UDP and SCTP are in it all or none: policies do not tell them
/// apart.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PortSet {
    /// For each of [`Proto::ALL`]: sorted ranges with gaps between them.
    ranges: [Vec<(u16, u16)>; 3],
    others: bool,
}

impl PortSet {
    /// Everything.
    #[must_use]
    pub fn all() -> Self {
        Self { ranges: std::array::from_fn(|_| vec![(0, u16::MAX)]), others: true }
    }

    /// `first..=last` of one protocol; nothing where `first` is above `last`.
    #[must_use]
    pub fn ports(proto: Proto, first: u16, last: u16) -> Self {
        let mut set = Self::default();
        if first <= last {
            set.ranges[proto as usize].push((first, last));
        }
        set
    }

    /// All of these ranges together; one whose first port is above its last adds nothing.
    #[must_use]
    pub fn of_ranges(ranges: impl IntoIterator<Item = (Proto, u16, u16)>) -> Self {
        let mut set = Self::default();
        for (proto, first, last) in ranges.into_iter().filter(|(_, first, last)| first <= last) {
            set.ranges[proto as usize].push((first, last));
        }
        for ranges in &mut set.ranges {
            ranges.sort_unstable();
            *ranges = merged(ranges);
        }
        set
    }

    /// Whether nothing is in it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        !self.others && self.ranges.iter().all(Vec::is_empty)
    }

    /// Whether a port is in it.
    #[must_use]
    pub fn contains(&self, proto: Proto, port: u16) -> bool {
        self.ranges[proto as usize].iter().any(|(first, last)| (*first..=*last).contains(&port))
    }

    /// What is in either.
    #[must_use]
    pub fn union(&self, other: &Self) -> Self {
        self.combine(other, self.others || other.others, union)
    }

    /// What is in both.
    #[must_use]
    pub fn intersection(&self, other: &Self) -> Self {
        self.combine(other, self.others && other.others, intersection)
    }

    /// What is here and not there.
    #[must_use]
    pub fn difference(&self, other: &Self) -> Self {
        self.combine(other, self.others && !other.others, |a, b| intersection(a, &complement(b)))
    }

    fn combine(
        &self,
        other: &Self,
        others: bool,
        each: impl Fn(&Ranges, &Ranges) -> Vec<(u16, u16)>,
    ) -> Self {
        let ranges = std::array::from_fn(|proto| each(&self.ranges[proto], &other.ranges[proto]));
        Self { ranges, others }
    }

    /// The set as a profile's rules, sorted and disjoint: equal sets are equal lists.
    #[must_use]
    pub fn rules(&self) -> Vec<PortRule> {
        if *self == Self::all() {
            return vec![PortRule::All];
        }
        let others = OTHERS.into_iter().filter(|_| self.others);
        let ports = Proto::ALL.into_iter().flat_map(|proto| {
            let ranges = self.ranges[proto as usize].iter();
            ranges.map(move |(first, last)| PortRule::Ports { proto, first: *first, last: *last })
        });
        others.chain(ports).collect()
    }
}

type Ranges = [(u16, u16)];

fn union(a: &Ranges, b: &Ranges) -> Vec<(u16, u16)> {
    let mut all = [a, b].concat();
    all.sort_unstable();
    merged(&all)
}

/// Sorted ranges without overlaps and neighbours.
fn merged(sorted: &Ranges) -> Vec<(u16, u16)> {
    let mut merged: Vec<(u16, u16)> = Vec::new();
    for &(first, last) in sorted {
        match merged.last_mut() {
            Some((_, end)) if u32::from(first) <= u32::from(*end) + 1 => *end = (*end).max(last),
            _ => merged.push((first, last)),
        }
    }
    merged
}

fn intersection(a: &Ranges, b: &Ranges) -> Vec<(u16, u16)> {
    let (mut left, mut right) = (a.iter().peekable(), b.iter().peekable());
    let mut common = Vec::new();
    while let (Some(x), Some(y)) = (left.peek(), right.peek()) {
        let (first, last) = (x.0.max(y.0), x.1.min(y.1));
        if first <= last {
            common.push((first, last));
        }
        // The one that ends first has met all that it can.
        if x.1 < y.1 {
            left.next();
        } else {
            right.next();
        }
    }
    common
}

fn complement(a: &Ranges) -> Vec<(u16, u16)> {
    let mut gaps = Vec::new();
    let mut next = Some(0);
    for &(first, last) in a {
        if let Some(start) = next.filter(|start| *start < first) {
            gaps.push((start, first - 1));
        }
        next = last.checked_add(1);
    }
    gaps.extend(next.map(|start| (start, u16::MAX)));
    gaps
}

impl FromIterator<PortRule> for PortSet {
    fn from_iter<I: IntoIterator<Item = PortRule>>(rules: I) -> Self {
        let (mut all, mut others) = (false, false);
        let ranges = rules.into_iter().filter_map(|rule| match rule {
            PortRule::All => {
                all = true;
                None
            }
            PortRule::Protos { .. } => {
                others = true;
                None
            }
            PortRule::Ports { proto, first, last } => Some((proto, first, last)),
        });
        let set = Self::of_ranges(ranges);
        if all { Self::all() } else { Self { others, ..set } }
    }
}

/// The rules sorted, merged and disjoint: the one form in which equal profiles are equal, and the only form the kernel
/// takes (it refuses overlapping ranges).
pub fn normalise(rules: impl IntoIterator<Item = PortRule>) -> Vec<PortRule> {
    rules.into_iter().collect::<PortSet>().rules()
}

/// Whether `wide` allows all that `narrow` allows.
pub fn covers(wide: &[PortRule], narrow: &[PortRule]) -> bool {
    let set = |rules: &[PortRule]| rules.iter().copied().collect::<PortSet>();
    set(narrow).difference(&set(wide)).is_empty()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tcp(first: u16, last: u16) -> PortRule {
        PortRule::Ports { proto: Proto::Tcp, first, last }
    }

    #[test]
    fn normal_form_merges_neighbours_and_overlaps_and_keeps_protocols_apart() {
        let udp = PortRule::port(Proto::Udp, 82);
        assert_eq!(
            normalise([tcp(80, 81), udp, tcp(82, 90), tcp(85, 86), tcp(92, 92)]),
            vec![tcp(80, 90), tcp(92, 92), udp]
        );
        assert_eq!(normalise([udp, PortRule::All]), vec![PortRule::All]);
        assert_eq!(normalise([tcp(65535, 65535), tcp(0, 65535)]), vec![tcp(0, 65535)]);
    }

    #[test]
    fn what_is_left_of_everything_names_each_piece() {
        let left = PortSet::all().difference(&[tcp(0, 79), tcp(90, 65535)].into_iter().collect());
        assert!(
            left.contains(Proto::Tcp, 80) && left.contains(Proto::Udp, 1) && !left.contains(Proto::Tcp, 90)
        );
        let whole = |proto| PortRule::Ports { proto, first: 0, last: u16::MAX };
        let mut expected = OTHERS.to_vec();
        expected.extend([tcp(80, 89), whole(Proto::Udp), whole(Proto::Sctp)]);
        assert_eq!(left.rules(), expected);
        assert_eq!(left.rules().into_iter().collect::<PortSet>(), left);
        assert_eq!(left.union(&PortSet::ports(Proto::Tcp, 0, 65535)).rules(), [PortRule::All]);
    }

    #[test]
    fn set_operations_agree_with_sets_of_single_ports() {
        // Few ports, all subsets of ranges: every pair of sets over eight ports, as bits.
        let of_bits = |bits: u32| -> PortSet {
            (0..8).filter(|port| bits >> port & 1 == 1).map(|port| PortRule::port(Proto::Udp, port)).collect()
        };
        for a in 0..256 {
            for b in 0..256 {
                let (x, y) = (of_bits(a), of_bits(b));
                assert_eq!(x.union(&y), of_bits(a | b));
                assert_eq!(x.intersection(&y), of_bits(a & b));
                assert_eq!(x.difference(&y), of_bits(a & !b));
            }
        }
    }

    #[test]
    fn a_set_covers_what_lies_in_it() {
        assert!(covers(&[PortRule::All], &[tcp(1, 2)]) && !covers(&[tcp(1, 2)], &[PortRule::All]));
        assert!(covers(&[tcp(1, 9)], &[tcp(2, 3), tcp(5, 9)]) && !covers(&[tcp(1, 9)], &[tcp(9, 10)]));
        assert!(covers(&[], &[]) && !covers(&[], &[tcp(1, 1)]));
    }
}
