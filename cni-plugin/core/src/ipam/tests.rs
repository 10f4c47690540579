//! The allocator, against what it promises and against a naive oracle.

use std::collections::BTreeSet;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use super::*;

const OFF: Quarantine = Quarantine { time_ms: 0, objects_since_ms: None };
const HALF_A_MINUTE: Quarantine = Quarantine { time_ms: 30_000, objects_since_ms: Some(0) };

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

fn mk_allocator(ranges: &[&str], leased: &[&str], quarantine: Quarantine) -> Allocator {
    let ranges: Vec<IpNetwork> = ranges.iter().map(|text| text.parse().unwrap()).collect();
    let leased: Vec<IpAddr> = leased.iter().map(|text| ip(text)).collect();
    Allocator::new(&ranges, &leased, [], quarantine)
}

fn at(allocator: &mut Allocator, now_ms: u64) -> Result<String, AllocateError> {
    let addresses = allocator.allocate(&AddressRequest::default(), now_ms)?;
    Ok(addresses.iter().map(IpAddr::to_string).collect::<Vec<_>>().join(" "))
}

fn one(allocator: &mut Allocator) -> String {
    at(allocator, 0).unwrap()
}

#[test]
fn addresses_come_in_order_and_a_released_one_comes_last() {
    let mut allocator = mk_allocator(&["10.0.0.0/29"], &[], OFF);
    assert_eq!([one(&mut allocator), one(&mut allocator)], ["10.0.0.1", "10.0.0.2"]);
    allocator.release(ip("10.0.0.1"), 0);
    let rest: Vec<String> = (0..5).map(|_| one(&mut allocator)).collect();
    assert_eq!(rest, ["10.0.0.3", "10.0.0.4", "10.0.0.5", "10.0.0.6", "10.0.0.1"]);
    let error = at(&mut allocator, 0).unwrap_err();
    assert_eq!(
        error.to_string(),
        "the address range 10.0.0.0/29 is used up: all 6 usable addresses are leased"
    );
}

#[test]
fn leases_are_respected_after_a_restart_and_the_search_goes_on_after_the_newest() {
    let mut allocator = mk_allocator(&["10.0.0.0/29"], &["10.0.0.5", "10.0.0.3", "192.0.2.1"], OFF);
    let rest: Vec<String> = (0..4).map(|_| one(&mut allocator)).collect();
    assert_eq!(rest, ["10.0.0.4", "10.0.0.6", "10.0.0.1", "10.0.0.2"]);
    assert!(allocator.used_up(0).is_some());
}

#[test]
fn dual_stack_takes_one_of_each_or_nothing() {
    let mut allocator = mk_allocator(&["fd00::/64", "10.0.0.0/30"], &[], OFF);
    assert_eq!(one(&mut allocator), "10.0.0.1 fd00::1");
    assert_eq!(one(&mut allocator), "10.0.0.2 fd00::2");
    assert!(at(&mut allocator, 0).is_err());
    allocator.release(ip("10.0.0.1"), 0);
    assert_eq!(one(&mut allocator), "10.0.0.1 fd00::3", "the failure took no IPv6 address");

    let mut narrow = mk_allocator(&["10.0.0.0/24", "fd00::/127"], &["fd00::1"], OFF);
    assert!(narrow.used_up(0).unwrap().ranges.contains("fd00::/127"));
    assert!(at(&mut narrow, 0).is_err());
    narrow.release(ip("fd00::1"), 0);
    assert_eq!(one(&mut narrow), "10.0.0.2 fd00::1", "the IPv4 address of the failure was given back");
}

#[test]
fn several_ranges_of_a_family_are_one_pool() {
    let mut allocator = mk_allocator(&["10.0.0.0/30", "10.9.0.0/30", "fd00::/64"], &[], OFF);
    let all: Vec<String> = (0..4).map(|_| one(&mut allocator)).collect();
    assert_eq!(all, ["10.0.0.1 fd00::1", "10.0.0.2 fd00::2", "10.9.0.1 fd00::3", "10.9.0.2 fd00::4"]);
    let error = at(&mut allocator, 0).unwrap_err().to_string();
    assert_eq!(
        error,
        "the address range 10.0.0.0/30, 10.9.0.0/30 is used up: all 4 usable addresses are leased"
    );
}

#[test]
fn ranges_that_overlap_give_no_address_twice() {
    let mut allocator = mk_allocator(&["10.0.0.0/29", "10.0.0.0/30", "10.0.0.0/29"], &[], OFF);
    let all: BTreeSet<String> = (0..6).map(|_| one(&mut allocator)).collect();
    assert_eq!(all.len(), 6);
    assert!(at(&mut allocator, 0).is_err());
    assert_eq!(allocator.ranges().len(), 3, "unchanged ranges are recognised");
}

#[test]
fn a_released_address_is_held_back_for_the_whole_time_and_one_that_nobody_was_told_of_is_not() {
    let mut allocator = mk_allocator(&["10.0.0.0/30"], &[], HALF_A_MINUTE);
    assert_eq!([one(&mut allocator), one(&mut allocator)], ["10.0.0.1", "10.0.0.2"]);
    allocator.give_back(ip("10.0.0.2"));
    assert_eq!(one(&mut allocator), "10.0.0.2");
    allocator.release(ip("10.0.0.1"), 5_000);
    allocator.release(ip("10.0.0.1"), 6_000);
    let error = at(&mut allocator, 34_999).unwrap_err().to_string();
    assert!(error.contains("of 2 usable addresses 1 were freed a moment ago"), "{error}");
    assert!(allocator.used_up(34_999).is_some());
    assert_eq!(allocator.used_up(35_000), None);
    assert_eq!(at(&mut allocator, 35_000).unwrap(), "10.0.0.1");
}

#[test]
fn nothing_freed_is_given_out_while_objects_are_away_nor_until_others_caught_up() {
    let mut allocator = mk_allocator(&["10.0.0.0/30"], &[], HALF_A_MINUTE);
    assert_eq!([one(&mut allocator), one(&mut allocator)], ["10.0.0.1", "10.0.0.2"]);
    allocator.release(ip("10.0.0.1"), 0);
    allocator.set_objects(false, 29_000);
    let error = at(&mut allocator, 1_000_000).unwrap_err().to_string();
    assert!(error.contains("none is given out again while objects cannot be read"), "{error}");
    allocator.set_objects(true, 1_000_000);
    allocator.set_objects(true, 1_020_000);
    assert!(at(&mut allocator, 1_029_999).is_err());
    assert_eq!(at(&mut allocator, 1_030_000).unwrap(), "10.0.0.1");
}

#[test]
fn freed_addresses_of_before_a_restart_are_held_back_anew() {
    let ranges: Vec<IpNetwork> = vec!["10.0.0.0/30".parse().unwrap()];
    let freed = [(7_000, ip("10.0.0.2")), (7_000, ip("192.0.2.1"))];
    let mut allocator = Allocator::new(&ranges, &[ip("10.0.0.1")], freed, HALF_A_MINUTE);
    assert!(at(&mut allocator, 36_999).is_err());
    assert_eq!(allocator.held_back().collect::<Vec<_>>(), [(7_000, ip("10.0.0.2"))]);
    assert_eq!(at(&mut allocator, 37_000).unwrap(), "10.0.0.2");
}

#[test]
fn an_address_that_is_asked_for_is_given_or_the_reason_is_told() {
    let mut allocator = mk_allocator(&["10.0.0.0/29", "fd00::/64"], &[], HALF_A_MINUTE);
    let mut ask = |ips: &[&str]| {
        let request = AddressRequest { ips: ips.iter().map(|text| ip(text)).collect(), ..Default::default() };
        allocator.allocate(&request, 0)
    };
    assert_eq!(ask(&["10.0.0.4"]).unwrap(), [ip("10.0.0.4"), ip("fd00::1")]);
    assert_eq!(ask(&["10.0.0.5", "fd00::77"]).unwrap(), [ip("10.0.0.5"), ip("fd00::77")]);
    assert_eq!(ask(&["10.0.0.4"]).unwrap_err(), AllocateError::Taken(ip("10.0.0.4")));
    assert_eq!(ask(&["10.0.0.6", "fd00::77"]).unwrap_err(), AllocateError::Taken(ip("fd00::77")));
    assert!(matches!(ask(&["10.0.1.1"]).unwrap_err(), AllocateError::Foreign { .. }));
    assert!(matches!(ask(&["10.0.0.0"]).unwrap_err(), AllocateError::Foreign { .. }), "it names the range");
    assert!(matches!(ask(&["10.0.0.1", "10.0.0.2"]).unwrap_err(), AllocateError::OneOfEachFamily(_)));
    allocator.release(ip("10.0.0.4"), 0);
    let request = AddressRequest { ips: vec![ip("10.0.0.4")], ..Default::default() };
    assert_eq!(allocator.allocate(&request, 1).unwrap_err(), AllocateError::HeldBack(ip("10.0.0.4")));
    // What failures took on the way is free.
    let request = AddressRequest { ips: vec![ip("10.0.0.6")], ..Default::default() };
    assert_eq!(allocator.allocate(&request, 1).unwrap()[0], ip("10.0.0.6"));
}

#[test]
fn a_set_of_ranges_narrows_the_choice_and_leaves_the_other_family_out() {
    let mut allocator = mk_allocator(&["10.0.0.0/24", "fd00::/64"], &[], OFF);
    let pieces = |pieces: &[(&str, &str)]| -> Vec<(IpAddr, IpAddr)> {
        pieces.iter().map(|(first, last)| (ip(first), ip(last))).collect()
    };
    let set = pieces(&[("10.0.0.8", "10.0.0.9"), ("10.0.0.254", "10.0.0.255")]);
    let request = AddressRequest { range_sets: vec![set.clone()], ..Default::default() };
    let all: Vec<IpAddr> = (0..3).flat_map(|_| allocator.allocate(&request, 0).unwrap()).collect();
    assert_eq!(all, [ip("10.0.0.8"), ip("10.0.0.9"), ip("10.0.0.254")]);
    assert!(matches!(allocator.allocate(&request, 0).unwrap_err(), AllocateError::UsedUp(_)));
    let both = vec![pieces(&[("10.0.0.16", "10.0.0.31")]), pieces(&[("fd00::100", "fd00::1ff")])];
    let request = AddressRequest { range_sets: both, ..Default::default() };
    assert_eq!(allocator.allocate(&request, 0).unwrap(), [ip("10.0.0.16"), ip("fd00::100")]);
    let foreign =
        AddressRequest { range_sets: vec![pieces(&[("10.0.1.1", "10.0.1.9")])], ..Default::default() };
    assert!(matches!(allocator.allocate(&foreign, 0).unwrap_err(), AllocateError::ForeignRange { .. }));
    let twice = AddressRequest { range_sets: vec![set.clone(), set], ..Default::default() };
    assert!(matches!(allocator.allocate(&twice, 0).unwrap_err(), AllocateError::OneOfEachFamily(_)));
}

/// Against a naive oracle: no address is held twice, none comes back early, none is lost.
#[test]
fn a_random_history_never_leases_an_address_twice_or_early_and_loses_none() {
    for seed in 0..200 {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut allocator =
            mk_allocator(&["10.0.0.0/26"], &[], Quarantine { time_ms: 40, objects_since_ms: Some(0) });
        let mut held: BTreeSet<IpAddr> = BTreeSet::new();
        let mut freed: BTreeMap<IpAddr, u64> = BTreeMap::new();
        let mut back_ms = Some(0);
        for now_ms in 0..800_u64 {
            if rng.random_bool(0.02) {
                back_ms = if back_ms.is_some() { None } else { Some(now_ms) };
                allocator.set_objects(back_ms.is_some(), now_ms);
            }
            // Who was held back for long enough once is free for good.
            allocator.used_up(now_ms);
            let is_over = |freed_ms: u64| back_ms.is_some_and(|back| now_ms >= freed_ms.max(back) + 40);
            freed.retain(|_, freed_ms| !is_over(*freed_ms));
            if rng.random_bool(0.55) {
                match allocator.allocate(&AddressRequest::default(), now_ms) {
                    Ok(addresses) => {
                        assert!(held.insert(addresses[0]), "seed {seed} step {now_ms}");
                        assert!(!freed.contains_key(&addresses[0]), "early: seed {seed} step {now_ms}");
                    }
                    Err(_) => {
                        assert_eq!(held.len() + freed.len(), 62, "seed {seed} step {now_ms}");
                    }
                }
            } else if let Some(address) = held.iter().nth(rng.random_range(0..62)).copied() {
                held.remove(&address);
                if rng.random_bool(0.5) {
                    allocator.give_back(address);
                    allocator.give_back(address);
                } else {
                    allocator.release(address, now_ms);
                    allocator.release(address, now_ms + 1);
                    freed.insert(address, now_ms);
                }
            }
        }
    }
}
