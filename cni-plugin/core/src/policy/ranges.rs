//! Disjoint ranges from overlapping IP blocks with exceptions.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnetwork::IpNetwork;

use crate::objects::IpBlock;
use crate::ruleset::AddrRange;

/// Cuts the address space where the set of matching blocks changes; ranges that no block matches are left out, and
/// neighbours with the same set are one range. `blocks` maps a block's number to the block.
pub(super) fn disjoint(blocks: &BTreeMap<u32, &IpBlock>) -> Vec<(AddrRange, Vec<u32>)> {
    let mut ranges = family(blocks, true);
    ranges.extend(family(blocks, false));
    ranges
}

/// A change at an address: the block begins or ends, or one of its exceptions does.
#[derive(Clone, Copy)]
enum Edge {
    Block { number: u32, delta: i32 },
    Except { number: u32, delta: i32 },
}

fn family(blocks: &BTreeMap<u32, &IpBlock>, v4: bool) -> Vec<(AddrRange, Vec<u32>)> {
    let edges = edges(blocks, v4);
    let last_address = if v4 { u128::from(u32::MAX) } else { u128::MAX };
    // Per block: how many times it and its exceptions cover the current address.
    let mut covers: BTreeMap<u32, (i32, i32)> = BTreeMap::new();
    let mut active: BTreeSet<u32> = BTreeSet::new();
    let mut ranges: Vec<(u128, u128, Vec<u32>)> = Vec::new();
    let mut points = edges.iter().peekable();
    while let Some((first, edges)) = points.next() {
        for edge in edges {
            let (number, block_delta, except_delta) = match *edge {
                Edge::Block { number, delta } => (number, delta, 0),
                Edge::Except { number, delta } => (number, 0, delta),
            };
            let entry = covers.entry(number).or_default();
            entry.0 += block_delta;
            entry.1 += except_delta;
            if entry.0 > 0 && entry.1 == 0 {
                active.insert(number);
            } else {
                active.remove(&number);
            }
        }
        let last = points.peek().map_or(last_address, |(next, _)| *next - 1);
        if active.is_empty() {
            continue;
        }
        let set: Vec<u32> = active.iter().copied().collect();
        match ranges.last_mut() {
            Some((_, end, before)) if *before == set && end.checked_add(1) == Some(*first) => *end = last,
            _ => ranges.push((*first, last, set)),
        }
    }
    let range = |first, last| AddrRange { first: address(first, v4), last: address(last, v4) };
    ranges.into_iter().map(|(first, last, set)| (range(first, last), set)).collect()
}

fn edges(blocks: &BTreeMap<u32, &IpBlock>, v4: bool) -> BTreeMap<u128, Vec<Edge>> {
    let mut edges: BTreeMap<u128, Vec<Edge>> = BTreeMap::new();
    for (&number, block) in blocks {
        if block.cidr.is_ipv4() != v4 {
            continue;
        }
        let (first, after) = bounds(block.cidr);
        edges.entry(first).or_default().push(Edge::Block { number, delta: 1 });
        if let Some(after) = after {
            edges.entry(after).or_default().push(Edge::Block { number, delta: -1 });
        }
        for except in block.except.iter().filter(|except| except.is_ipv4() == v4) {
            let (first, after) = bounds(*except);
            edges.entry(first).or_default().push(Edge::Except { number, delta: 1 });
            if let Some(after) = after {
                edges.entry(after).or_default().push(Edge::Except { number, delta: -1 });
            }
        }
    }
    edges
}

/// First address and the one after the last; none after the end of the family's space.
fn bounds(network: IpNetwork) -> (u128, Option<u128>) {
    match network {
        IpNetwork::V4(network) => {
            let last = u32::from(network.broadcast());
            (u128::from(u32::from(network.network())), last.checked_add(1).map(u128::from))
        }
        IpNetwork::V6(network) => {
            let last = u128::from(network.broadcast());
            (u128::from(network.network()), last.checked_add(1))
        }
    }
}

fn address(value: u128, v4: bool) -> IpAddr {
    if v4 {
        let value = u32::try_from(value).expect("an IPv4 range ends within 32 bits");
        IpAddr::V4(Ipv4Addr::from(value))
    } else {
        IpAddr::V6(Ipv6Addr::from(value))
    }
}

/// The address after this one; none after the highest of its family.
pub(super) fn successor(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(a) => u32::from(a).checked_add(1).map(|n| IpAddr::V4(Ipv4Addr::from(n))),
        IpAddr::V6(a) => u128::from(a).checked_add(1).map(|n| IpAddr::V6(Ipv6Addr::from(n))),
    }
}

/// The address before this one, or the lowest of its family.
pub(super) fn predecessor(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(a) => IpAddr::V4(Ipv4Addr::from(u32::from(a).saturating_sub(1))),
        IpAddr::V6(a) => IpAddr::V6(Ipv6Addr::from(u128::from(a).saturating_sub(1))),
    }
}

/// The highest address of this one's family.
pub(super) fn last_of_family(address: IpAddr) -> IpAddr {
    match address {
        IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::BROADCAST),
        IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from(u128::MAX)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_block(cidr: &str, except: &[&str]) -> IpBlock {
        IpBlock {
            cidr: cidr.parse().unwrap(),
            except: except.iter().map(|text| text.parse().unwrap()).collect(),
        }
    }

    fn text(blocks: &[IpBlock]) -> Vec<String> {
        let numbered = (1..).zip(blocks).collect();
        disjoint(&numbered)
            .iter()
            .map(|(range, set)| format!("{}-{} {set:?}", range.first, range.last))
            .collect()
    }

    #[test]
    fn overlaps_are_cut_and_equal_neighbours_joined() {
        let blocks = [mk_block("10.0.0.0/24", &["10.0.0.128/25"]), mk_block("10.0.0.0/16", &[])];
        assert_eq!(text(&blocks), ["10.0.0.0-10.0.0.127 [1, 2]", "10.0.0.128-10.0.255.255 [2]"]);
    }

    #[test]
    fn everything_with_overlapping_exceptions_and_both_families() {
        let blocks =
            [mk_block("0.0.0.0/0", &["10.0.0.0/8", "10.1.0.0/16", "255.0.0.0/8"]), mk_block("::/0", &[])];
        let expected = [
            "0.0.0.0-9.255.255.255 [1]",
            "11.0.0.0-254.255.255.255 [1]",
            "::-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff [2]",
        ];
        assert_eq!(text(&blocks), expected);
    }

    #[test]
    fn host_bits_in_a_range_are_ignored() {
        assert_eq!(text(&[mk_block("10.0.0.7/31", &[])]), ["10.0.0.6-10.0.0.7 [1]"]);
    }
}
