//! Address translation in the kernel: host ports before policy, masquerade after it.
//!
//! ```text
//! hostports_in  (hook prerouting, nat) \
//! hostports_out (hook output, nat)      --> hostports: protocol, port [, address] of this node --> a pod's address, port
//! sources       (hook postrouting, nat): a pod to itself, the loopback to a pod with host ports, pods to the outside
//! ```
//!
//! The kernel asks these chains about the first packet of a connection only; the entry translates the rest. Each answer is one look
//! into a map, whatever the number of host ports.

use std::net::IpAddr;

use holdfast_net_core::nat::{HostSocket, Nat, NatElement, PodSocket};
use holdfast_net_core::ports::Proto;

use super::elements::{Data, Raw, address, octets, range_raws};
use super::expr::{Base, Cmp, Expr, Meta, Reg, Verdict};
use super::skeleton::{ChainDef, Hook, NFPROTO_IPV4, NFPROTO_IPV6, SetDef, Table, Type, Value};
use super::wire::host32;

const fn set(name: &'static str, key: &'static [Type], value: Value, interval: bool) -> SetDef {
    SetDef { table: Table::Inet, name, key, value, interval }
}

/// `hostport*`: any address of this node; `hostip*`: one of them.
pub const SETS: [SetDef; 10] = [
    set("hostport4", &[Type::Proto, Type::Port], Value::Socket(Type::Ipv4), false),
    set("hostport6", &[Type::Proto, Type::Port], Value::Socket(Type::Ipv6), false),
    set("hostip4", &[Type::Ipv4, Type::Proto, Type::Port], Value::Socket(Type::Ipv4), false),
    set("hostip6", &[Type::Ipv6, Type::Proto, Type::Port], Value::Socket(Type::Ipv6), false),
    set("hairpin4", &[Type::Ipv4, Type::Ipv4], Value::None, false),
    set("hairpin6", &[Type::Ipv6, Type::Ipv6], Value::None, false),
    set("own4", &[Type::Ipv4], Value::None, true),
    set("own6", &[Type::Ipv6], Value::None, true),
    set("exempt4", &[Type::Ipv4], Value::None, true),
    set("exempt6", &[Type::Ipv6], Value::None, true),
];

const fn chain(name: &'static str, hook: Option<Hook>) -> ChainDef {
    ChainDef { table: Table::Inet, name, hook }
}

const fn nat_hook(number: u32, priority: i32) -> Option<Hook> {
    Some(Hook { number, priority, kind: "nat" })
}

/// NF_INET_PRE_ROUTING and NF_INET_LOCAL_OUT where destinations are translated, NF_INET_POST_ROUTING where sources are.
pub const CHAINS: [ChainDef; 4] = [
    chain("hostports", None),
    chain("hostports_in", nat_hook(0, -100)),
    chain("hostports_out", nat_hook(3, -100)),
    chain("sources", nat_hook(4, 100)),
];

/// The rules of a chain of ours, in order.
pub fn rules(chain: &str) -> Vec<Vec<Expr>> {
    match chain {
        "hostports_in" | "hostports_out" => vec![vec![Expr::Verdict(Verdict::Jump("hostports"))]],
        "hostports" => hostports(),
        "sources" => sources(),
        _ => Vec::new(),
    }
}

/// What the families differ in.
struct Family {
    nfproto: u8,
    /// Registers of an address.
    width: u32,
    len: u32,
    source_at: u32,
    destination_at: u32,
    port: &'static str,
    ip: &'static str,
    hairpin: &'static str,
    own: &'static str,
    exempt: &'static str,
}

const FAMILIES: [Family; 2] = [
    Family {
        nfproto: NFPROTO_IPV4,
        width: 1,
        len: 4,
        source_at: 12,
        destination_at: 16,
        port: "hostport4",
        ip: "hostip4",
        hairpin: "hairpin4",
        own: "own4",
        exempt: "exempt4",
    },
    Family {
        nfproto: NFPROTO_IPV6,
        width: 4,
        len: 16,
        source_at: 8,
        destination_at: 24,
        port: "hostport6",
        ip: "hostip6",
        hairpin: "hairpin6",
        own: "own6",
        exempt: "exempt6",
    },
];

const R0: Reg = Reg::new(0);
/// Behind the longest key: an IPv6 address, protocol and port.
const FOUND: u32 = 8;
/// RTN_LOCAL
const LOCAL: u32 = 2;
/// The destination port of TCP, UDP and SCTP.
const PORT_AT: u32 = 2;

impl Family {
    fn begin(&self) -> Vec<Expr> {
        vec![Expr::MetaLoad(Meta::NfProto, R0), Expr::Cmp(R0, Cmp::Eq, vec![self.nfproto])]
    }

    fn source(&self, to: u32) -> Expr {
        Expr::Payload(Base::Network, self.source_at, self.len, Reg::new(to))
    }

    fn destination(&self, to: u32) -> Expr {
        Expr::Payload(Base::Network, self.destination_at, self.len, Reg::new(to))
    }

    /// Protocol and port of the packet from a register on.
    fn service(from: u32) -> [Expr; 2] {
        [
            Expr::MetaLoad(Meta::L4Proto, Reg::new(from)),
            Expr::Payload(Base::Transport, PORT_AT, 2, Reg::new(from + 1)),
        ]
    }

    /// The map first: a packet to no host port is done with after one look. That the address is this node's own comes second, so that
    /// nobody's host port takes what is on its way to others.
    fn translate(&self, map: &'static str, key: Vec<Expr>) -> Vec<Expr> {
        let mut rule = self.begin();
        rule.extend(key);
        rule.push(Expr::Map(map, R0, Reg::new(FOUND)));
        rule.extend([Expr::FibType(R0), Expr::Cmp(R0, Cmp::Eq, host32(LOCAL).to_vec())]);
        if self.nfproto == NFPROTO_IPV6 {
            // The kernel sends nothing from ::1 to another host: who dials it means the node itself.
            let mut loopback = vec![0; 16];
            loopback[15] = 1;
            rule.extend([self.destination(0), Expr::Cmp(R0, Cmp::Neq, loopback)]);
        }
        let (to, port) = (Reg::new(FOUND), Reg::new(FOUND + self.width));
        rule.push(Expr::Dnat(self.nfproto, to, port));
        rule
    }
}

fn hostports() -> Vec<Vec<Expr>> {
    let by_address = FAMILIES.iter().map(|family| {
        let mut key = vec![family.destination(0)];
        key.extend(Family::service(family.width));
        family.translate(family.ip, key)
    });
    let by_port = FAMILIES.iter().map(|family| family.translate(family.port, Family::service(0).to_vec()));
    by_address.chain(by_port).collect()
}

fn sources() -> Vec<Vec<Expr>> {
    // A pod that reaches itself by its host port would get its own address as source, which no host takes from outside.
    let hairpin = FAMILIES.iter().map(|family| {
        let mut rule = family.begin();
        rule.extend([
            family.source(0),
            family.destination(family.width),
            Expr::Contains(family.hairpin, R0),
            Expr::Masquerade(0),
        ]);
        rule
    });
    // The node's loopback to a pod with host ports; IPv4 only, see above.
    let family = &FAMILIES[0];
    let mut loopback = family.begin();
    loopback.extend([
        Expr::Payload(Base::Network, family.source_at, 1, R0),
        Expr::Cmp(R0, Cmp::Eq, vec![127]),
        family.destination(0),
        family.destination(1),
        Expr::Contains(family.hairpin, R0),
        Expr::Masquerade(0),
    ]);
    let outside = FAMILIES.iter().map(|family| {
        let mut rule = family.begin();
        rule.extend([
            family.source(0),
            Expr::Contains(family.own, R0),
            family.destination(0),
            Expr::Lacks(family.exempt, R0),
            Expr::Masquerade(RANDOM_FULLY),
        ]);
        rule
    });
    hairpin.chain([loopback]).chain(outside).collect()
}

/// NF_NAT_RANGE_PROTO_RANDOM_FULLY: two packets that are translated at once must not choose one port, of which the second would be lost.
const RANDOM_FULLY: u32 = 1 << 4;

/// The kernel's elements for one of ours.
pub fn to_raw(element: &NatElement) -> Vec<Raw> {
    match element {
        NatElement::HostPort(socket, pod) => vec![host_port(socket, pod)],
        NatElement::Hairpin(address) => {
            let set = if address.is_ipv4() { "hairpin4" } else { "hairpin6" };
            vec![Raw::new(set, octets(*address).repeat(2), Data::None)]
        }
        NatElement::Own(range) => range_raws(range, ["own4", "own6"], Data::None),
        NatElement::Exempt(range) => range_raws(range, ["exempt4", "exempt6"], Data::None),
    }
}

fn host_port(socket: &HostSocket, pod: &PodSocket) -> Raw {
    let [high, low] = socket.port.to_be_bytes();
    let service = [socket.proto.number(), 0, 0, 0, high, low, 0, 0];
    let (set, key) = match (socket.address, socket.address.is_unspecified()) {
        (IpAddr::V4(_), true) => ("hostport4", service.to_vec()),
        (IpAddr::V6(_), true) => ("hostport6", service.to_vec()),
        (IpAddr::V4(_), false) => ("hostip4", [octets(socket.address), service.to_vec()].concat()),
        (IpAddr::V6(_), false) => ("hostip6", [octets(socket.address), service.to_vec()].concat()),
    };
    let [high, low] = pod.port.to_be_bytes();
    let value = [octets(pod.address), vec![high, low, 0, 0]].concat();
    Raw::new(set, key, Data::Socket(value))
}

/// Puts an element of the kernel where it belongs; `None` for one that is none of ours.
pub fn add_raw(nat: &mut Nat, raw: &Raw) -> Option<()> {
    let element = match (raw.set, &raw.data) {
        ("hairpin4" | "hairpin6", Data::None) => {
            let (one, other) = raw.key.split_at(raw.key.len() / 2);
            (one == other).then_some(NatElement::Hairpin(address(one)?))?
        }
        ("hostport4" | "hostport6" | "hostip4" | "hostip6", Data::Socket(value)) => {
            let (host, service) = raw.key.split_at_checked(raw.key.len().checked_sub(8)?)?;
            let any = IpAddr::from([0; 4]);
            let any = if raw.set == "hostport6" { IpAddr::from([0; 16]) } else { any };
            let host = if host.is_empty() { any } else { address(host)? };
            let port = |bytes: &[u8]| Some(u16::from_be_bytes(bytes.get(..2)?.try_into().ok()?));
            let proto = Proto::from_number(*service.first()?)?;
            let (pod, pod_port) = value.split_at_checked(value.len().checked_sub(4)?)?;
            let pod = PodSocket { address: address(pod)?, port: port(pod_port)? };
            NatElement::HostPort(HostSocket { proto, address: host, port: port(&service[4..])? }, pod)
        }
        _ => return None,
    };
    nat.put_in(&element);
    Some(())
}

#[cfg(test)]
pub(super) mod tests {
    use holdfast_net_core::ruleset::AddrRange;

    use super::*;

    /// Something in every set.
    pub fn mk_nat() -> Nat {
        let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
        let mut nat = Nat::default();
        for (proto, host, port, pod, pod_port) in [
            (Proto::Tcp, "0.0.0.0", 8080, "10.0.0.1", 80),
            (Proto::Sctp, "::", 8080, "fd00::1", 80),
            (Proto::Udp, "192.0.2.1", 53, "10.0.0.1", 5353),
            (Proto::Udp, "2001:db8::1", 65535, "fd00::1", 65534),
        ] {
            let pod = PodSocket { address: ip(pod), port: pod_port };
            nat.put_in(&NatElement::HostPort(HostSocket { proto, address: ip(host), port }, pod));
            nat.put_in(&NatElement::Hairpin(pod.address));
        }
        let range = |first, last| AddrRange { first: ip(first), last: ip(last) };
        for (first, last) in
            [("10.0.0.0", "10.0.255.255"), ("255.0.0.0", "255.255.255.255"), ("fd00::", "fd00::ffff")]
        {
            nat.put_in(&NatElement::Own(range(first, last)));
            nat.put_in(&NatElement::Exempt(range(first, last)));
        }
        nat.put_in(&NatElement::Exempt(range("ff00::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff")));
        nat
    }

    #[test]
    fn an_element_that_is_none_of_ours_is_told() {
        let mut nat = Nat::default();
        for raw in [
            Raw::new("hairpin4", vec![10, 0, 0, 1, 10, 0, 0, 2], Data::None),
            Raw::new(
                "hostport4",
                vec![1, 0, 0, 0, 0, 80, 0, 0],
                Data::Socket(vec![10, 0, 0, 1, 0, 80, 0, 0]),
            ),
            Raw::new("hostport4", vec![6, 0, 0, 0, 0, 80, 0, 0], Data::Socket(vec![10, 0])),
            Raw::new("hostip6", vec![6, 0, 0], Data::Socket(vec![0; 20])),
        ] {
            assert_eq!(add_raw(&mut nat, &raw), None, "{raw:?}");
        }
        assert_eq!(nat, Nat::default());
    }
}
