//! Elements of the ruleset as the kernel's keys and values, and back.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use holdfast_net_core::nat::NatElement;
use holdfast_net_core::plan::MacAddr;
use holdfast_net_core::ports::{PortRule, Proto};
use holdfast_net_core::ruleset::{AddrRange, ClassId, Element, IdentityId, Pin, ProfileId, Ruleset};

use super::nat;
use super::wire::{from_host32, host32};

/// What an element of the kernel yields.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Data {
    /// A set's element, or the end of a range.
    None,
    /// A number.
    Mark(u32),
    /// An address and a port.
    Socket(Vec<u8>),
    /// `return` of the profile map: allowed.
    Allow,
    /// `goto deny`, the profile map's catch-all.
    Deny,
}

/// An element of a kernel set.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Raw {
    /// The set's name.
    pub set: &'static str,
    /// The key; empty for the catch-all element.
    pub key: Vec<u8>,
    /// The end of a range of a concatenated key.
    pub key_end: Option<Vec<u8>>,
    /// What it yields.
    pub data: Data,
    /// The first address after a range.
    pub interval_end: bool,
}

impl Raw {
    /// An element of a key alone.
    pub fn new(set: &'static str, key: Vec<u8>, data: Data) -> Self {
        Self { set, key, key_end: None, data, interval_end: false }
    }

    /// What every profile lookup that matches nothing else yields.
    pub fn profile_catch_all() -> Self {
        Self::new("profile", Vec::new(), Data::Deny)
    }
}

fn by_family(address: IpAddr, v4: &'static str, v6: &'static str) -> &'static str {
    match address {
        IpAddr::V4(_) => v4,
        IpAddr::V6(_) => v6,
    }
}

/// An address as a key.
pub fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(a) => a.octets().to_vec(),
        IpAddr::V6(a) => a.octets().to_vec(),
    }
}

/// The kernel's elements for one of ours: one, or two for a range of addresses.
pub fn to_raw(element: &Element) -> Vec<Raw> {
    match element {
        Element::ClsIn(a, c) => vec![by_address(*a, "cls_in4", "cls_in6", c.0)],
        Element::ClsEg(a, c) => vec![by_address(*a, "cls_eg4", "cls_eg6", c.0)],
        Element::Ident(a, i) => vec![by_address(*a, "ident4", "ident6", i.0)],
        Element::Cidr(range, i) => range_raws(range, ["cidr4", "cidr6"], Data::Mark(i.0)),
        Element::PairIn(c, i, p) => vec![pair("pair_in", *c, *i, *p)],
        Element::PairEg(c, i, p) => vec![pair("pair_eg", *c, *i, *p)],
        Element::Profile(id, rule) => vec![profile(*id, rule)],
        Element::Pin(pin) => vec![pinned(pin)],
        Element::Nat(element) => nat::to_raw(element),
    }
}

fn by_address(address: IpAddr, v4: &'static str, v6: &'static str, number: u32) -> Raw {
    Raw::new(by_family(address, v4, v6), octets(address), Data::Mark(number))
}

/// The two elements of a range, of the set of its family.
pub fn range_raws(range: &AddrRange, [v4, v6]: [&'static str; 2], data: Data) -> Vec<Raw> {
    let set = by_family(range.first, v4, v6);
    let mut raws = vec![Raw::new(set, octets(range.first), data)];
    // A range up to the highest address has no end element: there is no address after it.
    if let Some(after) = successor(range.last) {
        let mut end = Raw::new(set, octets(after), Data::None);
        end.interval_end = true;
        raws.push(end);
    }
    raws
}

/// The address after, if there is one.
pub fn successor(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(a) => u32::from(a).checked_add(1).map(|n| IpAddr::V4(Ipv4Addr::from(n))),
        IpAddr::V6(a) => u128::from(a).checked_add(1).map(|n| IpAddr::V6(Ipv6Addr::from(n))),
    }
}

/// The address before, if there is one.
pub fn predecessor(address: IpAddr) -> Option<IpAddr> {
    match address {
        IpAddr::V4(a) => u32::from(a).checked_sub(1).map(|n| IpAddr::V4(Ipv4Addr::from(n))),
        IpAddr::V6(a) => u128::from(a).checked_sub(1).map(|n| IpAddr::V6(Ipv6Addr::from(n))),
    }
}

fn pair(set: &'static str, class: ClassId, identity: IdentityId, profile: ProfileId) -> Raw {
    let key = [host32(class.0), host32(identity.0)].concat();
    Raw::new(set, key, Data::Mark(profile.0))
}

fn profile(id: ProfileId, rule: &PortRule) -> Raw {
    // Each field is padded to a register: number, protocol, port.
    let key = |proto: u8, port: u16| {
        let [high, low] = port.to_be_bytes();
        [host32(id.0), [proto, 0, 0, 0], [high, low, 0, 0]].concat()
    };
    let (from, to) = match *rule {
        PortRule::All => (key(0, 0), key(u8::MAX, u16::MAX)),
        PortRule::Protos { first, last } => (key(first, 0), key(last, u16::MAX)),
        PortRule::Ports { proto, first, last } => (key(proto.number(), first), key(proto.number(), last)),
    };
    let mut raw = Raw::new("profile", from, Data::Allow);
    raw.key_end = Some(to);
    raw
}

fn pinned(pin: &Pin) -> Raw {
    let mut key = vec![0u8; 16];
    let name = pin.ifname.as_bytes();
    let len = name.len().min(15);
    key[..len].copy_from_slice(&name[..len]);
    key.extend_from_slice(&pin.mac.0);
    key.extend_from_slice(&[0, 0]);
    key.extend_from_slice(&octets(pin.address));
    let (v4, v6) = if pin.routed { ("pin_routed4", "pin_routed6") } else { ("pin4", "pin6") };
    Raw::new(by_family(pin.address, v4, v6), key, Data::None)
}

/// Puts the kernel's elements together again. Elements nobody of us wrote (another shape) are left out and counted, so
/// that the caller rebuilds.
pub fn from_raw(raws: &[Raw]) -> (Ruleset, usize) {
    let mut ruleset = Ruleset::default();
    let mut strange = 0;
    let mut ranges: Vec<(&'static str, IpAddr, Option<u32>)> = Vec::new();
    for raw in raws {
        match raw.set {
            "cidr4" | "cidr6" | "own4" | "own6" | "exempt4" | "exempt6" => {
                match (address(&raw.key), raw.interval_end, &raw.data) {
                    (Some(a), true, _) => ranges.push((raw.set, a, None)),
                    (Some(a), false, Data::Mark(n)) => ranges.push((raw.set, a, Some(*n))),
                    (Some(a), false, Data::None) => ranges.push((raw.set, a, Some(0))),
                    _ => strange += 1,
                }
            }
            _ => strange += usize::from(add_raw(&mut ruleset, raw).is_none()),
        }
    }
    strange += add_ranges(&mut ruleset, ranges);
    for rules in ruleset.profiles.values_mut() {
        // Not merged: what is compared with the wanted rules is what is there.
        rules.sort_unstable();
    }
    (ruleset, strange)
}

fn add_raw(ruleset: &mut Ruleset, raw: &Raw) -> Option<()> {
    match (raw.set, &raw.data) {
        ("cls_in4" | "cls_in6", Data::Mark(n)) => {
            ruleset.cls_in.insert(address(&raw.key)?, ClassId(*n));
        }
        ("cls_eg4" | "cls_eg6", Data::Mark(n)) => {
            ruleset.cls_eg.insert(address(&raw.key)?, ClassId(*n));
        }
        ("ident4" | "ident6", Data::Mark(n)) => {
            ruleset.ident.insert(address(&raw.key)?, IdentityId(*n));
        }
        ("pair_in", Data::Mark(n)) => {
            ruleset.pair_in.insert(pair_key(&raw.key)?, ProfileId(*n));
        }
        ("pair_eg", Data::Mark(n)) => {
            ruleset.pair_eg.insert(pair_key(&raw.key)?, ProfileId(*n));
        }
        ("profile", Data::Deny) if raw.key.is_empty() => {}
        ("profile", Data::Allow) => {
            let (id, rule) = profile_rule(&raw.key, raw.key_end.as_deref()?)?;
            ruleset.profiles.entry(id).or_default().push(rule);
        }
        ("pin4" | "pin6", Data::None) => {
            ruleset.pins.insert(pin_of(&raw.key, false)?);
        }
        ("pin_routed4" | "pin_routed6", Data::None) => {
            ruleset.pins.insert(pin_of(&raw.key, true)?);
        }
        _ => return nat::add_raw(&mut ruleset.nat, raw),
    }
    Some(())
}

/// Pairs the starts with the ends that follow them; a start without an end reaches to the highest address.
fn add_ranges(ruleset: &mut Ruleset, mut ranges: Vec<(&'static str, IpAddr, Option<u32>)>) -> usize {
    // At one address an end sorts before a start: adjacent ranges.
    ranges.sort_by_key(|(set, a, n)| (*set, *a, n.is_some()));
    let mut strange = 0;
    let mut open: Option<(&'static str, IpAddr, u32)> = None;
    let mut close = |open: &mut Option<(&'static str, IpAddr, u32)>, last: Option<IpAddr>| {
        let Some((set, first, n)) = open.take() else { return };
        // Without an end it reaches to the highest address.
        let highest = match first {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::BROADCAST),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from(u128::MAX)),
        };
        let range = AddrRange { first, last: last.unwrap_or(highest) };
        match set {
            "own4" | "own6" => ruleset.nat.put_in(&NatElement::Own(range)),
            "exempt4" | "exempt6" => ruleset.nat.put_in(&NatElement::Exempt(range)),
            _ => drop(ruleset.cidr.insert(range, IdentityId(n))),
        }
    };
    for (set, at, start) in ranges {
        if open.is_some_and(|(of, ..)| of != set) {
            close(&mut open, None);
        }
        match start {
            None => close(&mut open, predecessor(at)),
            Some(n) => {
                strange += usize::from(open.is_some());
                close(&mut open, predecessor(at));
                open = Some((set, at, n));
            }
        }
    }
    close(&mut open, None);
    strange
}

/// An address from a key.
pub fn address(key: &[u8]) -> Option<IpAddr> {
    match key.len() {
        4 => Some(IpAddr::from(<[u8; 4]>::try_from(key).ok()?)),
        16 => Some(IpAddr::from(<[u8; 16]>::try_from(key).ok()?)),
        _ => None,
    }
}

fn pair_key(key: &[u8]) -> Option<(ClassId, IdentityId)> {
    let number = |at: usize| Some(from_host32(key.get(at..at + 4)?.try_into().ok()?));
    Some((ClassId(number(0)?), IdentityId(number(4)?)))
}

fn profile_rule(from: &[u8], to: &[u8]) -> Option<(ProfileId, PortRule)> {
    let field = |key: &[u8]| -> Option<(u32, u8, u16)> {
        let id = from_host32(key.get(0..4)?.try_into().ok()?);
        Some((id, *key.get(4)?, u16::from_be_bytes(key.get(8..10)?.try_into().ok()?)))
    };
    let ((id, proto, first), (id_to, proto_to, last)) = (field(from)?, field(to)?);
    let rule = match (proto, proto_to, first, last) {
        (0, u8::MAX, 0, u16::MAX) => PortRule::All,
        _ if proto == proto_to && Proto::from_number(proto).is_some() => {
            PortRule::Ports { proto: Proto::from_number(proto)?, first, last }
        }
        (_, _, 0, u16::MAX) => PortRule::Protos { first: proto, last: proto_to },
        _ => return None,
    };
    (id == id_to).then_some((ProfileId(id), rule))
}

fn pin_of(key: &[u8], routed: bool) -> Option<Pin> {
    let name = key.get(..16)?;
    let end = name.iter().position(|b| *b == 0).unwrap_or(16);
    Some(Pin {
        ifname: std::str::from_utf8(&name[..end]).ok()?.to_string(),
        mac: MacAddr(key.get(16..22)?.try_into().ok()?),
        address: address(key.get(24..)?)?,
        routed,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    #[test]
    fn every_element_survives_the_way_to_the_kernel_and_back() {
        let mut r = Ruleset::default();
        for (a, n) in [("10.0.0.1", 2), ("fd00::1", 3)] {
            r.cls_in.insert(ip(a), ClassId(n));
            r.cls_eg.insert(ip(a), ClassId(n + 10));
            r.ident.insert(ip(a), IdentityId(n + 20));
            for routed in [false, true] {
                r.pins.insert(Pin {
                    ifname: "hfv0123456789ab".into(),
                    mac: MacAddr([2, 0, 0, 0, 0, 9]),
                    address: ip(a),
                    routed,
                });
            }
        }
        for (first, last, n) in [
            ("10.1.0.0", "10.1.255.255", 5),
            ("10.2.0.0", "10.2.255.255", 6),
            ("10.4.0.0", "10.4.0.0", 7),
            ("255.0.0.0", "255.255.255.255", 8),
            ("fd00::", "fd00::ffff", 5),
            ("ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 9),
        ] {
            r.cidr.insert(AddrRange { first: ip(first), last: ip(last) }, IdentityId(n));
        }
        r.profiles.insert(ProfileId(1), vec![PortRule::All]);
        r.profiles.insert(
            ProfileId(2),
            vec![
                PortRule::Protos { first: 133, last: 255 },
                PortRule::Ports { proto: Proto::Tcp, first: 80, last: 90 },
                PortRule::port(Proto::Sctp, 80),
            ],
        );
        r.nat = crate::nft::nat::tests::mk_nat();
        r.pair_in.insert((ClassId(2), IdentityId::ANY), ProfileId(2));
        r.pair_eg.insert((ClassId(3), IdentityId(5)), ProfileId(1));
        let changes = holdfast_net_core::ruleset::diff(&Ruleset::default(), &r);
        let mut raws: Vec<Raw> = changes.add.iter().flat_map(to_raw).collect();
        raws.push(Raw::profile_catch_all());
        assert_eq!(from_raw(&raws), (r, 0));
    }
}
