//! A port of ours may send only from its own MAC with its own addresses.

use super::expr::{Base, Cmp, Expr, Meta, Reg, Verdict};
use super::skeleton::{NFPROTO_IPV4, NFPROTO_IPV6, R0};
use holdfast_net_core::plan::HOST_IFNAME_PREFIX;

const ETH_IPV4: [u8; 2] = [0x08, 0x00];
const ETH_ARP: [u8; 2] = [0x08, 0x06];
const ETH_IPV6: [u8; 2] = [0x86, 0xdd];

/// The interface name fills R0..R3, the MAC R4..R5, the address follows at R6.
const PIN_MAC: Reg = Reg::new(4);
const PIN_ADDRESS: Reg = Reg::new(6);

/// By prefix, not by a set of ports: one of ours without pins sends nothing.
fn of_no_pod() -> Vec<Expr> {
    vec![
        Expr::MetaLoad(Meta::IifName, R0),
        Expr::Cmp(R0, Cmp::Neq, HOST_IFNAME_PREFIX.as_bytes().to_vec()),
        Expr::Verdict(Verdict::Accept),
    ]
}

/// The node's loopback may be a source on the pods' side (host ports), so it must never be a destination there.
fn not_to_loopback(pinned: Vec<Expr>) -> Vec<Expr> {
    [vec![Expr::Payload(Base::Network, 16, 1, R0), Expr::Cmp(R0, Cmp::Neq, vec![127])], pinned].concat()
}

/// The same as [`rules`] for ports that the node's own IP stack has. ARP does not come by: what a pod says there counts on its own port only.
pub(super) fn routed_rules() -> Vec<Vec<Expr>> {
    let pinned = |family: u8, at: u32, len: u32, set: &'static str| {
        vec![
            Expr::MetaLoad(Meta::NfProto, R0),
            Expr::Cmp(R0, Cmp::Eq, vec![family]),
            Expr::MetaLoad(Meta::IifName, R0),
            Expr::Payload(Base::Link, 6, 6, PIN_MAC),
            Expr::Payload(Base::Network, at, len, PIN_ADDRESS),
            Expr::Contains(set, R0),
            Expr::Verdict(Verdict::Accept),
        ]
    };
    vec![
        of_no_pod(),
        not_to_loopback(pinned(NFPROTO_IPV4, 12, 4, "pin_routed4")),
        pinned(NFPROTO_IPV6, 8, 16, "pin_routed6"),
        vec![Expr::Counter, Expr::Verdict(Verdict::Drop)],
    ]
}

pub(super) fn rules() -> Vec<Vec<Expr>> {
    let pinned = |ethertype: [u8; 2], mac_at: (Base, u32), addr_at: u32, len: u32, set: &'static str| {
        vec![
            Expr::Payload(Base::Link, 12, 2, R0),
            Expr::Cmp(R0, Cmp::Eq, ethertype.to_vec()),
            Expr::MetaLoad(Meta::IifName, R0),
            Expr::Payload(mac_at.0, mac_at.1, 6, PIN_MAC),
            Expr::Payload(Base::Network, addr_at, len, PIN_ADDRESS),
            Expr::Contains(set, R0),
            Expr::Verdict(Verdict::Accept),
        ]
    };
    vec![
        of_no_pod(),
        not_to_loopback(pinned(ETH_IPV4, (Base::Link, 6), 12, 4, "pin4")),
        pinned(ETH_ARP, (Base::Network, 8), 14, 4, "pin4"),
        pinned(ETH_IPV6, (Base::Link, 6), 8, 16, "pin6"),
        vec![Expr::Counter, Expr::Verdict(Verdict::Drop)],
    ]
}
