//! Single elements of the kernel: what decides about one connection, without a look at anything else.
//!
//! `NFT_MSG_GETSETELEM` with a key instead of a dump. What the kernel answers depends on the kind of set:
//!
//! - a hash (`cls_*`, `ident*`, `pair_*`): the element of that key, or ENOENT;
//! - a tree of ranges (`cidr*`): to a key the start of the range that it is in, as a packet's lookup finds it; with
//!   `NFT_SET_ELEM_INTERVAL_END` the first element above that ends a range. So one question tells what a packet finds and
//!   another one where the range ends. An element at the key itself may come first ([`Reader::end_of_range`]);
//! - ranges of a concatenation (`profile`): to a point the element whose ranges hold it. The catch-all is asked for apart.
//!
//! Each is one `send` and one `recv`. Nothing is written, and our lock for transactions is not taken.

use std::collections::{BTreeMap, BTreeSet};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use holdfast_net_core::nat::{HostSocket, NatElement, PodSocket};
use holdfast_net_core::policy::{Direction, Elements, Lookup, PortLookup, Trace};
use holdfast_net_core::ports::{PortRule, Proto};
use holdfast_net_core::ruleset::{AddrRange, ClassId, Delta, Element, IdentityId, Pin, ProfileId};

use super::elements::{Data, Raw, address, octets, predecessor, successor, to_raw};
use super::load::{MSG_GETSETELEM, damage, raw};
use super::nat;
use super::program::encode_element;
use super::skeleton::set;
use super::socket::{NetfilterSocket, nft_message};
use super::wire::Attrs;
use crate::error::{Error, Result};

const MSG_GETGEN: u16 = 16;
/// NFTA_GEN_ID
const ATTR_GENERATION: u16 = 1;
/// Somebody's commit between two answers makes them no state at all: then all are asked for again, this often.
const TRIES: usize = 5;

/// What a kernel does about some lookups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Live {
    /// Our rules are in place, and find these; one per lookup.
    Whole(Vec<Trace>),
    /// They are not; why. What elements say does not count then.
    Damaged(String),
}

/// Reads single elements of our tables.
pub struct Reader {
    socket: NetfilterSocket,
    table: String,
}

impl Reader {
    /// A reader in the calling thread's network namespace.
    pub fn open(table: &str) -> Result<Self> {
        Ok(Self { socket: NetfilterSocket::open()?, table: table.to_owned() })
    }

    /// What the kernel's chains would find, all from one generation of its rules.
    pub fn trace(&mut self, lookups: &[Lookup]) -> Result<Live> {
        for _ in 0..TRIES {
            let before = self.generation()?;
            let live = match damage(&mut self.socket, &self.table)? {
                Some(reason) => Live::Damaged(reason),
                None => {
                    let traces = lookups.iter().map(|lookup| Trace::of(self, lookup));
                    Live::Whole(traces.collect::<Result<_>>()?)
                }
            };
            if self.generation()? == before {
                return Ok(live);
            }
        }
        Err(Error::Protocol(format!("the rules changed during {TRIES} looks in a row; ask again")))
    }

    /// Sentences on what the kernel has otherwise than wanted: numbers of keys that have some or none, and source pins. The keys are
    /// those of classes, identities and pairs. `host_ports` must lead where they are said to.
    pub fn differences(
        &mut self,
        wanted: &Delta,
        pins: &BTreeSet<Pin>,
        host_ports: &BTreeMap<HostSocket, PodSocket>,
    ) -> Result<Vec<String>> {
        if let Some(reason) = damage(&mut self.socket, &self.table)? {
            return Ok(vec![format!("the rules are not whole: {reason}")]);
        }
        let mut found = Vec::new();
        for (key, value) in &wanted.keys {
            let has = self.number(&key.element(0))?;
            if has != *value {
                let text = |number: Option<u32>| number.map_or("nothing".to_owned(), |n| n.to_string());
                found.push(format!("{key:?} is {} in the kernel, not {}", text(has), text(*value)));
            }
        }
        for pin in pins {
            let Some(wanted) = to_raw(&Element::Pin(pin.clone())).into_iter().next() else { continue };
            if self.get(&wanted)?.is_none() {
                found.push(format!("the source pin of {} is missing", pin.address));
            }
        }
        for (socket, pod) in host_ports {
            let elements = [NatElement::HostPort(*socket, *pod), NatElement::Hairpin(pod.address)];
            for wanted in elements.iter().flat_map(nat::to_raw) {
                if self.get(&wanted)?.is_none_or(|raw| raw.data != wanted.data) {
                    found.push(format!(
                        "the host port {socket} does not lead to the pod: {} lacks it",
                        wanted.set
                    ));
                }
            }
        }
        Ok(found)
    }

    /// Rises with every commit of anybody in this network namespace.
    fn generation(&mut self) -> Result<u32> {
        let read = |message: super::wire::Message<'_>| message.attrs().u32(ATTR_GENERATION);
        let asked =
            self.socket.ask(nft_message(MSG_GETGEN), 0, "read the rules' generation", |_| {}, read)?;
        asked.ok_or_else(|| Error::Protocol("the kernel's rules have no generation".into()))
    }

    /// The element that the kernel finds for a key; only set, key and flags of `wanted` count.
    fn get(&mut self, wanted: &Raw) -> Result<Option<Raw>> {
        let def = set(wanted.set);
        let what = format!("read an element of {}", def.name);
        let table = &self.table;
        let fill = |out: &mut super::wire::Buffer| {
            out.string(1, table);
            out.string(2, def.name);
            out.nest(3, |out| encode_element(out, wanted, false));
        };
        let read = |message: super::wire::Message<'_>| {
            let (_, element) = message.attrs().nested(3)?.next()?;
            raw(def, Attrs::of(element))
        };
        self.socket.ask(nft_message(MSG_GETSETELEM), def.table.family(), &what, fill, read)
    }

    /// The number that a key has in a map.
    fn number(&mut self, wanted: &Element) -> Result<Option<u32>> {
        let Some(wanted) = to_raw(wanted).into_iter().next() else { return Ok(None) };
        match self.get(&wanted)?.map(|found| found.data) {
            None => Ok(None),
            Some(Data::Mark(number)) => Ok(Some(number)),
            Some(Data::None | Data::Socket(_) | Data::Allow | Data::Deny) => {
                Err(Error::Protocol(format!("an element of {} has no number", wanted.set)))
            }
        }
    }

    /// The last address of the range that `inside` is in: before the first element above it, which ends the range. The end
    /// of a neighbour that is at `inside` itself, and the start that is there, may come in its place; then `inside` is the
    /// first of its range, and what is above is asked for from the next address on.
    fn end_of_range(&mut self, inside: IpAddr) -> Result<IpAddr> {
        let highest = match inside {
            IpAddr::V4(_) => IpAddr::V4(Ipv4Addr::BROADCAST),
            IpAddr::V6(_) => IpAddr::V6(Ipv6Addr::from(u128::MAX)),
        };
        let above = |found: Option<Raw>| found.map_or(Some(highest), |raw| predecessor(address(&raw.key)?));
        let found = self.get(&range_key(inside, true))?;
        if found.as_ref().is_none_or(|raw| address(&raw.key) != Some(inside)) {
            return Ok(above(found).unwrap_or(highest));
        }
        let Some(next) = successor(inside) else { return Ok(highest) };
        // A neighbour that starts there hides the end that is there.
        if self.get(&range_key(next, false))?.is_some_and(|raw| address(&raw.key) == Some(next)) {
            return Ok(inside);
        }
        let found = self.get(&range_key(next, true))?;
        Ok(above(found).unwrap_or(highest))
    }
}

/// The question for the start of the range that an address is in, or for the first end from it on.
fn range_key(at: IpAddr, interval_end: bool) -> Raw {
    let set = match at {
        IpAddr::V4(_) => "cidr4",
        IpAddr::V6(_) => "cidr6",
    };
    Raw { set, key: octets(at), key_end: None, data: Data::None, interval_end }
}

impl Elements for Reader {
    type Error = Error;

    fn class(&mut self, direction: Direction, subject: IpAddr) -> Result<Option<ClassId>> {
        let any = ClassId::DENY_ALL;
        let element = match direction {
            Direction::Ingress => Element::ClsIn(subject, any),
            Direction::Egress => Element::ClsEg(subject, any),
        };
        Ok(self.number(&element)?.map(ClassId))
    }

    fn exact(&mut self, peer: IpAddr) -> Result<Option<IdentityId>> {
        Ok(self.number(&Element::Ident(peer, IdentityId::ANY))?.map(IdentityId))
    }

    fn range(&mut self, peer: IpAddr) -> Result<Option<(AddrRange, IdentityId)>> {
        let asked = range_key(peer, false);
        let Some(found) = self.get(&asked)? else { return Ok(None) };
        let (Some(first), Data::Mark(identity), false) =
            (address(&found.key), &found.data, found.interval_end)
        else {
            return Err(Error::Protocol(format!("the start of a range in {} is none of ours", asked.set)));
        };
        let last = self.end_of_range(peer)?;
        Ok(Some((AddrRange { first, last }, IdentityId(*identity))))
    }

    fn pair(
        &mut self,
        direction: Direction,
        class: ClassId,
        identity: IdentityId,
    ) -> Result<Option<ProfileId>> {
        let any = ProfileId(0);
        let element = match direction {
            Direction::Ingress => Element::PairIn(class, identity, any),
            Direction::Egress => Element::PairEg(class, identity, any),
        };
        Ok(self.number(&element)?.map(ProfileId))
    }

    fn port(&mut self, profile: ProfileId, proto: Proto, port: u16) -> Result<PortLookup> {
        let point = to_raw(&Element::Profile(profile, PortRule::port(proto, port))).into_iter();
        let point = point.map(|raw| Raw { key_end: None, ..raw });
        for wanted in point.chain([Raw::profile_catch_all()]) {
            match self.get(&wanted)?.map(|found| found.data) {
                Some(Data::Allow) => return Ok(PortLookup::Allow),
                Some(Data::Deny) => return Ok(PortLookup::Deny),
                Some(Data::None | Data::Mark(_) | Data::Socket(_)) => {
                    return Err(Error::Protocol("an element of profile has no verdict".into()));
                }
                None => {}
            }
        }
        Ok(PortLookup::Nothing)
    }
}

#[cfg(test)]
mod tests {
    use holdfast_net_core::ruleset::Ruleset;

    use super::super::Nft;
    use super::super::tests::{in_own_netns, nft_text};
    use super::*;
    use crate::Config;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn range(first: &str, last: &str) -> AddrRange {
        AddrRange { first: ip(first), last: ip(last) }
    }

    /// A namespace with a ruleset in its kernel and a reader.
    fn with_reader(ruleset: Ruleset, test: impl FnOnce(&mut Reader) + Send + 'static) {
        in_own_netns(move || {
            Nft::open(Config::default()).unwrap().apply(&ruleset).unwrap();
            test(&mut Reader::open("holdfast").unwrap());
        });
    }

    #[test]
    fn a_class_and_an_identity_are_found_by_their_address_alone() {
        let mut ruleset = Ruleset::default();
        for (address, number) in [("10.0.0.1", 2), ("10.0.0.2", 3), ("fd00::1", 4)] {
            ruleset.cls_in.insert(ip(address), ClassId(number));
            ruleset.cls_eg.insert(ip(address), ClassId(number + 10));
            ruleset.ident.insert(ip(address), IdentityId(number + 20));
        }
        with_reader(ruleset, |reader| {
            for (address, number) in [("10.0.0.1", 2), ("10.0.0.2", 3), ("fd00::1", 4)] {
                let class = |reader: &mut Reader, direction| reader.class(direction, ip(address)).unwrap();
                assert_eq!(class(reader, Direction::Ingress), Some(ClassId(number)));
                assert_eq!(class(reader, Direction::Egress), Some(ClassId(number + 10)));
                assert_eq!(reader.exact(ip(address)).unwrap(), Some(IdentityId(number + 20)));
            }
            for absent in ["10.0.0.3", "fd00::2"] {
                assert_eq!(reader.class(Direction::Ingress, ip(absent)).unwrap(), None);
                assert_eq!(reader.class(Direction::Egress, ip(absent)).unwrap(), None);
                assert_eq!(reader.exact(ip(absent)).unwrap(), None);
            }
        });
    }

    #[test]
    fn a_pair_is_found_by_class_and_identity_in_its_direction() {
        let mut ruleset = Ruleset::default();
        ruleset.pair_in.insert((ClassId(2), IdentityId(5)), ProfileId(7));
        ruleset.pair_eg.insert((ClassId(2), IdentityId::ANY), ProfileId(8));
        with_reader(ruleset, |reader| {
            let mut pair = |direction, identity| {
                reader.pair(direction, ClassId(2), IdentityId(identity)).unwrap().map(|profile| profile.0)
            };
            assert_eq!(pair(Direction::Ingress, 5), Some(7));
            assert_eq!(pair(Direction::Ingress, 0), None);
            assert_eq!(pair(Direction::Egress, 0), Some(8));
            assert_eq!(pair(Direction::Egress, 5), None);
        });
    }

    /// Both families: inside, both edges, the addresses beside them, neighbours without a gap, a range of one address, one
    /// that reaches to the highest address. The kernel keeps the end of a range and the start of the next one at one key.
    #[test]
    fn the_range_that_an_address_is_in_is_found_with_its_borders() {
        let cidr = BTreeMap::from([
            (range("0.0.0.0", "0.255.255.255"), IdentityId(1)),
            (range("10.1.0.0", "10.1.255.255"), IdentityId(2)),
            (range("10.2.0.0", "10.2.255.255"), IdentityId(3)),
            (range("10.4.0.7", "10.4.0.7"), IdentityId(4)),
            (range("10.5.0.1", "10.5.0.1"), IdentityId(2)),
            (range("10.5.0.2", "10.5.0.2"), IdentityId(3)),
            (range("10.5.0.3", "10.5.0.3"), IdentityId(4)),
            (range("254.0.0.0", "254.255.255.255"), IdentityId(1)),
            (range("255.0.0.0", "255.255.255.255"), IdentityId(5)),
            (range("fd00::", "fd00::ffff"), IdentityId(6)),
            (range("fd00::1:0", "fd00::1:ffff"), IdentityId(7)),
            (range("ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"), IdentityId(8)),
        ]);
        let ruleset = Ruleset { cidr: cidr.clone(), ..Ruleset::default() };
        with_reader(ruleset, move |reader| {
            for (range, identity) in cidr {
                for inside in [range.first, range.last] {
                    let found = reader.range(inside).unwrap();
                    assert_eq!(found, Some((range, identity)), "{inside}");
                }
            }
            for (inside, number) in [("10.1.3.4", 2), ("10.2.0.1", 3), ("255.3.0.0", 5), ("fd00::1:1", 7)] {
                assert_eq!(reader.range(ip(inside)).unwrap().unwrap().1, IdentityId(number), "{inside}");
            }
            for outside in ["1.0.0.0", "10.0.255.255", "10.3.0.0", "10.4.0.6", "10.4.0.8", "253.255.255.255"]
            {
                assert_eq!(reader.range(ip(outside)).unwrap(), None, "{outside}");
            }
            for outside in ["fcff::", "fd00::2:0", "feff::", "::"] {
                assert_eq!(reader.range(ip(outside)).unwrap(), None, "{outside}");
            }
        });
    }

    #[test]
    fn a_port_is_found_in_the_ranges_of_its_profile_and_no_other() {
        let mut ruleset = Ruleset::default();
        let rules =
            vec![PortRule::Ports { proto: Proto::Tcp, first: 80, last: 90 }, PortRule::port(Proto::Udp, 53)];
        ruleset.profiles.insert(ProfileId(2), rules);
        ruleset.profiles.insert(ProfileId(3), vec![PortRule::All]);
        with_reader(ruleset, |reader| {
            let mut port = |profile, proto, port| reader.port(ProfileId(profile), proto, port).unwrap();
            for allowed in [80, 85, 90] {
                assert_eq!(port(2, Proto::Tcp, allowed), PortLookup::Allow, "{allowed}");
            }
            for denied in [79, 91, 53] {
                assert_eq!(port(2, Proto::Tcp, denied), PortLookup::Deny, "{denied}");
            }
            assert_eq!(port(2, Proto::Udp, 53), PortLookup::Allow);
            assert_eq!(port(2, Proto::Sctp, 80), PortLookup::Deny);
            assert_eq!(port(3, Proto::Sctp, 65_535), PortLookup::Allow);
            assert_eq!(port(4, Proto::Tcp, 80), PortLookup::Deny, "a profile without elements");
            nft_text(&["delete", "element", "inet", "holdfast", "profile", "{ * }"]);
            assert_eq!(reader.port(ProfileId(2), Proto::Tcp, 79).unwrap(), PortLookup::Nothing);
        });
    }

    #[test]
    fn rules_that_are_not_ours_are_told_before_any_element() {
        with_reader(Ruleset::default(), |reader| {
            let lookup = Lookup {
                direction: Direction::Ingress,
                subject: ip("10.0.0.1"),
                peer: ip("10.0.0.2"),
                proto: Proto::Tcp,
                port: 80,
            };
            let Live::Whole(traces) = reader.trace(&[lookup, lookup]).unwrap() else {
                panic!("the rules are whole")
            };
            assert_eq!(traces.len(), 2);
            assert!(traces[0].is_allowed() && traces[0].class.is_none());
            nft_text(&["flush", "chain", "inet", "holdfast", "ingress"]);
            let damaged = reader.trace(&[lookup]).unwrap();
            assert!(matches!(&damaged, Live::Damaged(why) if why.contains("chain ingress")), "{damaged:?}");
            nft_text(&["flush", "ruleset"]);
            assert!(matches!(reader.trace(&[lookup]).unwrap(), Live::Damaged(_)));
        });
    }

    #[test]
    fn reading_writes_nothing() {
        let mut ruleset = Ruleset::default();
        ruleset.cls_in.insert(ip("10.0.0.1"), ClassId(2));
        with_reader(ruleset, |reader| {
            let (before, text) = (reader.generation().unwrap(), nft_text(&["list", "ruleset"]));
            let lookup = Lookup {
                direction: Direction::Ingress,
                subject: ip("10.0.0.1"),
                peer: ip("10.0.0.2"),
                proto: Proto::Tcp,
                port: 80,
            };
            reader.trace(&[lookup]).unwrap();
            assert_eq!(reader.generation().unwrap(), before);
            assert_eq!(nft_text(&["list", "ruleset"]), text);
        });
    }
}
