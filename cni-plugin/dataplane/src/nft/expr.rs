//! The few nf_tables expressions the skeleton uses, and rules made of them.
//!
//! Attribute numbers are those of `linux/netfilter/nf_tables.h`. Registers are the 4-byte ones, `NFT_REG32_00` = 8.

use super::wire::{Buffer, host32};

/// The verdict register.
const REG_VERDICT: u32 = 0;
/// `NFT_REG32_00`
const REG32_00: u32 = 8;

/// A 4-byte register; wider values take the following ones too.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reg(u32);

impl Reg {
    /// `NFT_REG32_00` + `n`; n below 16.
    pub const fn new(n: u32) -> Self {
        Self(REG32_00 + n)
    }
}

/// Which packet field, by header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Base {
    /// Link layer.
    Link,
    /// Network layer.
    Network,
    /// Transport layer.
    Transport,
}

/// Packet metadata.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Meta {
    /// `meta mark`
    Mark,
    /// `iifname`, 16 bytes
    IifName,
    /// `meta nfproto`, 1 byte
    NfProto,
    /// `meta l4proto`, 1 byte
    L4Proto,
}

impl Meta {
    fn key(self) -> u32 {
        match self {
            Meta::Mark => 3,
            Meta::IifName => 6,
            Meta::NfProto => 15,
            Meta::L4Proto => 16,
        }
    }
}

/// Direction of a conntrack tuple.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dir {
    /// As the first packet went.
    Original,
    /// As answers go; its source is the server after DNAT.
    Reply,
}

/// Conntrack keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ct {
    /// `ct state`
    State,
    /// `ct direction`, 1 byte
    Direction,
    /// `ct mark`
    Mark,
    /// `ct DIR ip saddr`
    Src4(Dir),
    /// `ct DIR ip6 saddr`
    Src6(Dir),
    /// `ct DIR proto-src`, 2 bytes
    ProtoSrc(Dir),
}

impl Ct {
    fn key(self) -> (u32, Option<Dir>) {
        match self {
            Ct::State => (0, None),
            Ct::Direction => (1, None),
            Ct::Mark => (3, None),
            Ct::ProtoSrc(dir) => (11, Some(dir)),
            Ct::Src4(dir) => (19, Some(dir)),
            Ct::Src6(dir) => (21, Some(dir)),
        }
    }
}

/// Comparison operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cmp {
    /// `==`
    Eq,
    /// `!=`
    Neq,
    /// `<=`
    Lte,
    /// `>=`
    Gte,
}

impl Cmp {
    fn code(self) -> u32 {
        match self {
            Cmp::Eq => 0,
            Cmp::Neq => 1,
            Cmp::Lte => 3,
            Cmp::Gte => 5,
        }
    }
}

/// What a rule or an element decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// `drop`
    Drop,
    /// `accept`
    Accept,
    /// `return`
    Return,
    /// `jump`
    Jump(&'static str),
    /// `goto`
    Goto(&'static str),
}

impl Verdict {
    /// Writes NFTA_VERDICT_* attributes.
    pub fn encode(self, out: &mut Buffer) {
        let (code, chain) = match self {
            Verdict::Drop => (0, None),
            Verdict::Accept => (1, None),
            Verdict::Return => (-5, None),
            Verdict::Jump(chain) => (-3, Some(chain)),
            Verdict::Goto(chain) => (-4, Some(chain)),
        };
        out.be32(1, i32::cast_unsigned(code));
        if let Some(chain) = chain {
            out.string(2, chain);
        }
    }
}

/// One expression.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Expr {
    /// Metadata to register.
    MetaLoad(Meta, Reg),
    /// Register to metadata.
    MetaSet(Meta, Reg),
    /// Conntrack field to register.
    CtLoad(Ct, Reg),
    /// Register to `ct mark`.
    CtSetMark(Reg),
    /// Packet bytes to register.
    Payload(Base, u32, u32, Reg),
    /// Register against constant bytes.
    Cmp(Reg, Cmp, Vec<u8>),
    /// `reg = (reg & mask) ^ xor`, 32 bits in host byte order.
    Bitwise(Reg, u32, u32),
    /// The same with a mask for the first byte alone.
    MaskByte(Reg, u8),
    /// A 32-bit constant in host byte order to register.
    Constant(Reg, u32),
    /// Key in register; break if absent.
    Contains(&'static str, Reg),
    /// Key in register; break if present.
    Lacks(&'static str, Reg),
    /// Map value to register; break if absent.
    Map(&'static str, Reg, Reg),
    /// The map's verdict; break if absent.
    VerdictMap(&'static str, Reg),
    /// The rule's verdict.
    Verdict(Verdict),
    /// Packets and bytes.
    Counter,
    /// Packets per second; break beyond.
    Limit(u64),
    /// NFLOG with a prefix.
    Log(u16, &'static str),
    /// The destination's kind of route (`fib daddr type`) to register.
    FibType(Reg),
    /// Destination translation of a family to address and port in registers.
    Dnat(u8, Reg, Reg),
    /// Source translation to an address of the interface that the packet leaves by; flags are `NF_NAT_RANGE_*`.
    Masquerade(u32),
}

impl Expr {
    /// Writes one `NFTA_LIST_ELEM` of a rule's expression list.
    pub fn encode(&self, out: &mut Buffer) {
        out.nest(1, |out| {
            out.string(1, self.name());
            out.nest(2, |out| self.encode_data(out));
        });
    }

    fn name(&self) -> &'static str {
        match self {
            Expr::MetaLoad(..) | Expr::MetaSet(..) => "meta",
            Expr::CtLoad(..) | Expr::CtSetMark(..) => "ct",
            Expr::Payload(..) => "payload",
            Expr::Cmp(..) => "cmp",
            Expr::Bitwise(..) | Expr::MaskByte(..) => "bitwise",
            Expr::Constant(..) | Expr::Verdict(..) => "immediate",
            Expr::Contains(..) | Expr::Lacks(..) | Expr::Map(..) | Expr::VerdictMap(..) => "lookup",
            Expr::Counter => "counter",
            Expr::Limit(..) => "limit",
            Expr::Log(..) => "log",
            Expr::FibType(..) => "fib",
            Expr::Dnat(..) => "nat",
            Expr::Masquerade(..) => "masq",
        }
    }

    fn encode_data(&self, out: &mut Buffer) {
        match self {
            Expr::MetaLoad(key, reg) => {
                out.be32(1, reg.0);
                out.be32(2, key.key());
            }
            Expr::MetaSet(key, reg) => {
                out.be32(2, key.key());
                out.be32(3, reg.0);
            }
            Expr::CtLoad(key, reg) => encode_ct_load(*key, *reg, out),
            Expr::CtSetMark(reg) => {
                out.be32(2, Ct::Mark.key().0);
                out.be32(4, reg.0);
            }
            Expr::Payload(base, offset, len, reg) => {
                out.be32(1, reg.0);
                out.be32(2, *base as u32);
                out.be32(3, *offset);
                out.be32(4, *len);
            }
            Expr::Cmp(reg, op, bytes) => {
                out.be32(1, reg.0);
                out.be32(2, op.code());
                out.nest(3, |out| out.attr(1, bytes));
            }
            Expr::Bitwise(reg, mask, xor) => {
                out.be32(1, reg.0);
                out.be32(2, reg.0);
                out.be32(3, 4);
                out.nest(4, |out| out.attr(1, &host32(*mask)));
                out.nest(5, |out| out.attr(1, &host32(*xor)));
            }
            Expr::MaskByte(reg, mask) => {
                out.be32(1, reg.0);
                out.be32(2, reg.0);
                out.be32(3, 1);
                out.nest(4, |out| out.attr(1, &[*mask]));
                out.nest(5, |out| out.attr(1, &[0]));
            }
            Expr::Constant(reg, value) => {
                out.be32(1, reg.0);
                out.nest(2, |out| out.attr(1, &host32(*value)));
            }
            Expr::Contains(set, key) => encode_lookup(set, *key, None, false, out),
            Expr::Lacks(set, key) => encode_lookup(set, *key, None, true, out),
            Expr::Map(set, key, to) => encode_lookup(set, *key, Some(to.0), false, out),
            Expr::VerdictMap(set, key) => encode_lookup(set, *key, Some(REG_VERDICT), false, out),
            Expr::Verdict(verdict) => {
                out.be32(1, REG_VERDICT);
                out.nest(2, |out| out.nest(2, |out| verdict.encode(out)));
            }
            Expr::Counter => {
                out.be64(1, 0);
                out.be64(2, 0);
            }
            Expr::Limit(per_second) => {
                out.be64(1, *per_second);
                out.be64(2, 1);
                out.be32(3, 5);
                out.be32(4, 0);
                out.be32(5, 0);
            }
            Expr::Log(group, prefix) => {
                out.string(2, prefix);
                out.attr(1, &group.to_be_bytes());
            }
            Expr::FibType(reg) => encode_fib_type(*reg, out),
            Expr::Dnat(family, address, port) => encode_dnat(*family, *address, *port, out),
            Expr::Masquerade(0) => {}
            Expr::Masquerade(flags) => out.be32(1, *flags),
        }
    }
}

fn encode_fib_type(reg: Reg, out: &mut Buffer) {
    out.be32(1, reg.0);
    // NFT_FIB_RESULT_ADDRTYPE of NFTA_FIB_F_DADDR.
    out.be32(2, 3);
    out.be32(3, 2);
}

fn encode_dnat(family: u8, address: Reg, port: Reg, out: &mut Buffer) {
    // NFT_NAT_DNAT
    out.be32(1, 1);
    out.be32(2, u32::from(family));
    out.be32(3, address.0);
    out.be32(5, port.0);
}

fn encode_ct_load(key: Ct, reg: Reg, out: &mut Buffer) {
    let (key, dir) = key.key();
    out.be32(1, reg.0);
    out.be32(2, key);
    if let Some(dir) = dir {
        out.attr(3, &[dir as u8]);
    }
}

fn encode_lookup(set: &str, key: Reg, dreg: Option<u32>, invert: bool, out: &mut Buffer) {
    out.string(1, set);
    out.be32(2, key.0);
    if let Some(dreg) = dreg {
        out.be32(3, dreg);
    }
    if invert {
        out.be32(5, 1);
    }
}
