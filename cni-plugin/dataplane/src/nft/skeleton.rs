//! The fixed chains, sets and maps. Elements change; these do not, but for the four rules that carry the revision.
//!
//! ```text
//! table inet NAME                                      table bridge NAME
//!   forward (hook forward) --> egress, ingress           pin (hook prerouting): a port of ours may send only from
//!   input   (hook input)   --> egress                    its own MAC with its own addresses (IPv4, ARP, IPv6);
//!   egress/ingress: class, identity, profile             all else it sends is dropped
//!   pickup: the same for the reversed reading of a TCP packet that opens nothing
//!   stateless: packets without a conntrack entry
//!   deny: log (rate-limited, deny_log), count, drop
//!   pin_routed (hook prerouting): what pin does, for ports that are no bridge's
//!   hostports*, sources: see `nat`
//! ```
//!
//! `forward` and `input` end with a log of new connections (rate-limited, like that of denied packets) and the mark of the
//! revision. Both logs go to one group, which costs a packet next to nothing while nobody reads it.
//!
//! Keys are conntrack tuple fields, never packet fields: client = `ct original saddr`, server after DNAT =
//! `ct reply saddr` and `ct reply proto-src`. So a packet of either direction of a connection is judged alike.
//! Whoever changes anything here raises [`VERSION`]: an agent that finds another version replaces the tables, with
//! their elements, in one transaction.

use super::expr::{Base, Cmp, Ct, Dir, Expr, Meta, Reg, Verdict};
use super::wire::host32;
use super::{nat, pins};

/// Version of this skeleton, part of every rule's comment.
pub const VERSION: u32 = 4;
/// Packets per second that each of the two logs passes on, so that a reader costs few of the new connections per second.
const LOG_PER_SECOND: u64 = 100;

/// What the log tells by its prefix.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Logged {
    /// A new connection was let through.
    Allowed,
    /// A packet that goes as its connection was opened was dropped by policy.
    Denied,
    /// A packet of the other direction was: its connection is not allowed any more.
    DeniedReply,
    /// A packet of no connection was.
    DeniedStateless,
}

impl Logged {
    const ALL: [Logged; 4] = [Logged::Allowed, Logged::Denied, Logged::DeniedReply, Logged::DeniedStateless];

    /// The prefix.
    pub const fn prefix(self) -> &'static str {
        match self {
            Logged::Allowed => "holdfast allow ",
            Logged::Denied => "holdfast deny ",
            Logged::DeniedReply => "holdfast deny reply ",
            Logged::DeniedStateless => "holdfast deny stateless ",
        }
    }
}

/// The inverse of [`Logged::prefix`].
pub fn logged(prefix: &str) -> Option<Logged> {
    Logged::ALL.into_iter().find(|logged| logged.prefix() == prefix)
}

/// `NFPROTO_INET`
pub const FAMILY_INET: u8 = 1;
/// `NFPROTO_BRIDGE`
pub const FAMILY_BRIDGE: u8 = 7;

/// Our two tables.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Table {
    /// Policy.
    Inet,
    /// Source pins.
    Bridge,
}

impl Table {
    /// Both.
    pub const ALL: [Table; 2] = [Table::Inet, Table::Bridge];

    /// The netfilter family.
    pub fn family(self) -> u8 {
        match self {
            Table::Inet => FAMILY_INET,
            Table::Bridge => FAMILY_BRIDGE,
        }
    }
}

/// Types as `nft` numbers them, so that it prints elements well.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Type {
    /// `ipv4_addr`
    Ipv4,
    /// `ipv6_addr`
    Ipv6,
    /// `ether_addr`
    Ether,
    /// `inet_proto`
    Proto,
    /// `inet_service`
    Port,
    /// `mark`
    Mark,
    /// `ifname`
    IfName,
}

impl Type {
    /// `nft`'s number.
    pub fn number(self) -> u32 {
        match self {
            Type::Ipv4 => 7,
            Type::Ipv6 => 8,
            Type::Ether => 9,
            Type::Proto => 12,
            Type::Port => 13,
            Type::Mark => 19,
            Type::IfName => 41,
        }
    }

    /// Bytes.
    pub fn len(self) -> u32 {
        match self {
            Type::Proto => 1,
            Type::Port => 2,
            Type::Ipv4 | Type::Mark => 4,
            Type::Ether => 6,
            Type::Ipv6 | Type::IfName => 16,
        }
    }

    /// Whether numbers of this type are in host byte order.
    pub fn host_order(self) -> bool {
        matches!(self, Type::Mark | Type::IfName)
    }
}

/// What a map yields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Value {
    /// A set: nothing.
    None,
    /// A number as a mark.
    Mark,
    /// A verdict.
    Verdict,
    /// An address of this type and a port.
    Socket(Type),
}

/// A set or map of the skeleton.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SetDef {
    /// Its table.
    pub table: Table,
    /// Its name.
    pub name: &'static str,
    /// Key fields.
    pub key: &'static [Type],
    /// What it yields.
    pub value: Value,
    /// Holds ranges.
    pub interval: bool,
}

const fn map(name: &'static str, key: &'static [Type]) -> SetDef {
    SetDef { table: Table::Inet, name, key, value: Value::Mark, interval: false }
}

const fn cidr_map(name: &'static str, key: &'static [Type]) -> SetDef {
    SetDef { table: Table::Inet, name, key, value: Value::Mark, interval: true }
}

const fn pin(table: Table, name: &'static str, key: &'static [Type]) -> SetDef {
    SetDef { table, name, key, value: Value::None, interval: false }
}

/// All sets and maps.
pub const SETS: [SetDef; 25] = [
    map("cls_in4", &[Type::Ipv4]),
    map("cls_in6", &[Type::Ipv6]),
    map("cls_eg4", &[Type::Ipv4]),
    map("cls_eg6", &[Type::Ipv6]),
    map("ident4", &[Type::Ipv4]),
    map("ident6", &[Type::Ipv6]),
    cidr_map("cidr4", &[Type::Ipv4]),
    cidr_map("cidr6", &[Type::Ipv6]),
    map("pair_in", &[Type::Mark, Type::Mark]),
    map("pair_eg", &[Type::Mark, Type::Mark]),
    SetDef {
        table: Table::Inet,
        name: "profile",
        key: &[Type::Mark, Type::Proto, Type::Port],
        value: Value::Verdict,
        interval: true,
    },
    pin(Table::Bridge, "pin4", &[Type::IfName, Type::Ether, Type::Ipv4]),
    pin(Table::Bridge, "pin6", &[Type::IfName, Type::Ether, Type::Ipv6]),
    pin(Table::Inet, "pin_routed4", &[Type::IfName, Type::Ether, Type::Ipv4]),
    pin(Table::Inet, "pin_routed6", &[Type::IfName, Type::Ether, Type::Ipv6]),
    nat::SETS[0],
    nat::SETS[1],
    nat::SETS[2],
    nat::SETS[3],
    nat::SETS[4],
    nat::SETS[5],
    nat::SETS[6],
    nat::SETS[7],
    nat::SETS[8],
    nat::SETS[9],
];

/// The definition of the set called `name`.
pub fn set(name: &str) -> &'static SetDef {
    SETS.iter().find(|s| s.name == name).expect("every set used in the code is in SETS")
}

/// A hook of a base chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Hook {
    /// `NF_INET_*` or `NF_BR_*`.
    pub number: u32,
    /// Priority, lower is earlier.
    pub priority: i32,
    /// `filter` or `nat`.
    pub kind: &'static str,
}

const fn filter(number: u32, priority: i32) -> Option<Hook> {
    Some(Hook { number, priority, kind: "filter" })
}

/// Prerouting, before conntrack: what is dropped there leaves no entry.
const PIN_HOOK: Option<Hook> = filter(0, -300);

/// A chain.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChainDef {
    /// Its table.
    pub table: Table,
    /// Its name.
    pub name: &'static str,
    /// Where it is hooked, if a base chain.
    pub hook: Option<Hook>,
}

const fn chain(name: &'static str, hook: Option<Hook>) -> ChainDef {
    ChainDef { table: Table::Inet, name, hook }
}

/// All chains, those that are jumped to first.
pub const CHAINS: [ChainDef; 16] = [
    chain("deny_log", None),
    chain("deny", None),
    chain("stateless", None),
    chain("egress", None),
    chain("ingress", None),
    chain("egress_back", None),
    chain("ingress_back", None),
    chain("pickup", None),
    // NF_INET_FORWARD after DNAT, before SNAT; NF_INET_LOCAL_IN.
    chain("forward", filter(2, 0)),
    chain("input", filter(1, 0)),
    ChainDef { table: Table::Bridge, name: "pin", hook: PIN_HOOK },
    chain("pin_routed", PIN_HOOK),
    nat::CHAINS[0],
    nat::CHAINS[1],
    nat::CHAINS[2],
    nat::CHAINS[3],
];

/// A rule; `revision` says whether it carries the policy revision and is replaced by a revoking change.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rule {
    /// Its expressions.
    pub exprs: Vec<Expr>,
    /// Carries the revision.
    pub revision: bool,
}

/// The settings the rules depend on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Params {
    /// Bits of the ct mark that hold the revision.
    pub mask: u32,
    /// The revision in place, within the mask.
    pub mark: u32,
    /// NFLOG group.
    pub log_group: u16,
}

/// The rules of a chain, in order.
pub fn rules(chain: &str, params: Params) -> Vec<Rule> {
    match chain {
        "forward" => judge(params, &["egress", "ingress"], Some(pickup())),
        "input" => judge(params, &["egress"], None),
        "egress" => fixed(direction_rules(EGRESS, "pair_eg")),
        "ingress" => fixed(direction_rules(INGRESS, "pair_in")),
        "egress_back" => fixed(direction_rules(EGRESS.map(Keys::reversed), "pair_eg")),
        "ingress_back" => fixed(direction_rules(INGRESS.map(Keys::reversed), "pair_in")),
        "pickup" => fixed(
            ["egress_back", "ingress_back"].map(|chain| vec![Expr::Verdict(Verdict::Jump(chain))]).to_vec(),
        ),
        "stateless" => fixed(stateless()),
        "deny" => fixed(deny()),
        "deny_log" => fixed(deny_log(params.log_group)),
        "pin" => fixed(pins::rules()),
        "pin_routed" => fixed(pins::routed_rules()),
        _ => fixed(nat::rules(chain)),
    }
}

fn fixed(rules: Vec<Vec<Expr>>) -> Vec<Rule> {
    rules.into_iter().map(|exprs| Rule { exprs, revision: false }).collect()
}

pub(super) const R0: Reg = Reg::new(0);
const R1: Reg = Reg::new(1);
const R2: Reg = Reg::new(2);
/// Keeps `meta mark` while it is borrowed.
const SPARE: Reg = Reg::new(12);

/// `ct state` bits: invalid, established, related, new, untracked.
const INVALID_UNTRACKED: u32 = 0x41;
const ESTABLISHED_RELATED: u32 = 0x06;
const NEW: u32 = 0x08;

/// The packet's `ct state` is one of `bits`.
fn state(bits: u32) -> Vec<Expr> {
    vec![Expr::CtLoad(Ct::State, R0), Expr::Bitwise(R0, bits, 0), Expr::Cmp(R0, Cmp::Neq, host32(0).to_vec())]
}

/// A new TCP connection that does not begin with a SYN alone: its entry is gone, deleted or timed out. Who opened it is not
/// known any more, so both readings must be allowed. Else a server that goes on sending would turn a connection that is
/// forbidden into one that it opened itself.
fn pickup() -> Vec<Expr> {
    // The protocol first: other packets are done with after one comparison.
    let mut rule = vec![Expr::MetaLoad(Meta::L4Proto, R0), Expr::Cmp(R0, Cmp::Eq, vec![TCP])];
    rule.extend(state(NEW));
    rule.extend(opens_nothing(R0));
    rule.push(Expr::Verdict(Verdict::Jump("pickup")));
    rule
}

/// The TCP packet does not begin a connection.
pub fn opens_nothing(reg: Reg) -> [Expr; 3] {
    [
        Expr::Payload(Base::Transport, TCP_FLAGS_AT, 1, reg),
        Expr::MaskByte(reg, TCP_FIN | TCP_SYN | TCP_RST | TCP_ACK),
        Expr::Cmp(reg, Cmp::Neq, vec![TCP_SYN]),
    ]
}

/// RFC 9293, section 3.1.
pub const TCP: u8 = 6;
const TCP_FLAGS_AT: u32 = 13;
const TCP_FIN: u8 = 0x01;
const TCP_SYN: u8 = 0x02;
const TCP_RST: u8 = 0x04;
const TCP_ACK: u8 = 0x10;

fn judge(params: Params, jumps: &[&'static str], pickup: Option<Vec<Expr>>) -> Vec<Rule> {
    let mut stateless = state(INVALID_UNTRACKED);
    stateless.push(Expr::Verdict(Verdict::Goto("stateless")));
    let mut fast = state(ESTABLISHED_RELATED);
    fast.extend([
        Expr::CtLoad(Ct::Mark, R0),
        Expr::Bitwise(R0, params.mask, 0),
        Expr::Cmp(R0, Cmp::Eq, host32(params.mark).to_vec()),
        Expr::Verdict(Verdict::Accept),
    ]);
    // The fast path first: it is what nearly every packet takes.
    let mut rules = vec![Rule { exprs: fast, revision: true }, Rule { exprs: stateless, revision: false }];
    rules.extend(pickup.map(|exprs| Rule { exprs, revision: false }));
    rules
        .extend(jumps.iter().map(|c| Rule { exprs: vec![Expr::Verdict(Verdict::Jump(c))], revision: false }));
    // The state first: a connection that is judged again after a revocation is no new one and takes no token.
    let mut log = state(NEW);
    log.extend([Expr::Limit(LOG_PER_SECOND), Expr::Log(params.log_group, Logged::Allowed.prefix())]);
    rules.push(Rule { exprs: log, revision: false });
    let remark = vec![
        Expr::CtLoad(Ct::Mark, R0),
        Expr::Bitwise(R0, !params.mask, params.mark),
        Expr::CtSetMark(R0),
        Expr::Verdict(Verdict::Accept),
    ];
    rules.push(Rule { exprs: remark, revision: true });
    rules
}

/// One direction and family. For ingress the isolated pod is the server and the peer the client; for egress the
/// reverse. The port is the server's in both.
#[derive(Clone, Copy)]
struct Keys {
    subject: Ct,
    class: &'static str,
    peer: Ct,
    exact: &'static str,
    range: &'static str,
    port: Ct,
}

impl Keys {
    /// The same where the other side is taken for the one that opened the connection.
    fn reversed(self) -> Self {
        Self { subject: self.peer, peer: self.subject, port: Ct::ProtoSrc(Dir::Original), ..self }
    }
}

const INGRESS: [Keys; 2] = [
    Keys {
        subject: Ct::Src4(Dir::Reply),
        class: "cls_in4",
        peer: Ct::Src4(Dir::Original),
        exact: "ident4",
        range: "cidr4",
        port: Ct::ProtoSrc(Dir::Reply),
    },
    Keys {
        subject: Ct::Src6(Dir::Reply),
        class: "cls_in6",
        peer: Ct::Src6(Dir::Original),
        exact: "ident6",
        range: "cidr6",
        port: Ct::ProtoSrc(Dir::Reply),
    },
];
const EGRESS: [Keys; 2] = [
    Keys {
        subject: Ct::Src4(Dir::Original),
        class: "cls_eg4",
        peer: Ct::Src4(Dir::Reply),
        exact: "ident4",
        range: "cidr4",
        port: Ct::ProtoSrc(Dir::Reply),
    },
    Keys {
        subject: Ct::Src6(Dir::Original),
        class: "cls_eg6",
        peer: Ct::Src6(Dir::Reply),
        exact: "ident6",
        range: "cidr6",
        port: Ct::ProtoSrc(Dir::Reply),
    },
];

/// A conntrack key of the other family breaks a rule, so each family has its own rules.
fn direction_rules(families: [Keys; 2], pair: &'static str) -> Vec<Vec<Expr>> {
    let isolated = families
        .iter()
        .map(|k| vec![Expr::CtLoad(k.subject, R0), Expr::Lacks(k.class, R0), Expr::Verdict(Verdict::Return)]);
    // An IPv6 address takes R1..R4; what it maps to is in R1 alone, beside the class in R0.
    let exact = families
        .iter()
        .map(|k| pair_rule(k, pair, vec![Expr::CtLoad(k.peer, R1), Expr::Map(k.exact, R1, R1)]));
    let range = families
        .iter()
        .map(|k| pair_rule(k, pair, vec![Expr::CtLoad(k.peer, R1), Expr::Map(k.range, R1, R1)]));
    let any = families.iter().map(|k| pair_rule(k, pair, vec![Expr::Constant(R1, 0)]));
    let deny = std::iter::once(vec![Expr::Verdict(Verdict::Goto("deny"))]);
    isolated.chain(exact).chain(range).chain(any).chain(deny).collect()
}

/// class . identity -> profile; profile . protocol . port -> verdict.
fn pair_rule(keys: &Keys, pair: &'static str, identity: Vec<Expr>) -> Vec<Expr> {
    let mut rule = vec![
        Expr::MetaLoad(Meta::Mark, SPARE),
        Expr::CtLoad(keys.subject, R0),
        Expr::Map(keys.class, R0, R0),
    ];
    rule.extend(bounce(R0));
    rule.extend(identity);
    rule.extend(bounce(R1));
    rule.push(Expr::Map(pair, R0, R0));
    rule.extend(bounce(R0));
    rule.extend([
        Expr::MetaLoad(Meta::L4Proto, R1),
        Expr::CtLoad(keys.port, R2),
        Expr::VerdictMap("profile", R0),
    ]);
    rule
}

/// A map's result must not go straight into a concatenated key: `nft` 1.0.6 aborts on listing such a rule (and prints
/// a constant there as an invalid type). It goes
/// through `meta mark`, which is put back at once, so nobody sees it changed.
fn bounce(reg: Reg) -> [Expr; 3] {
    [Expr::MetaSet(Meta::Mark, reg), Expr::MetaLoad(Meta::Mark, reg), Expr::MetaSet(Meta::Mark, SPARE)]
}

/// `NFPROTO_IPV4`
pub const NFPROTO_IPV4: u8 = 2;
/// `NFPROTO_IPV6`
pub const NFPROTO_IPV6: u8 = 10;
const ICMPV6: u8 = 58;
/// Router and neighbour solicitation and advertisement (RFC 4861).
const ND_FIRST: u8 = 133;
const ND_LAST: u8 = 136;

fn stateless() -> Vec<Vec<Expr>> {
    let nfproto = |family| [Expr::MetaLoad(Meta::NfProto, R0), Expr::Cmp(R0, Cmp::Eq, vec![family])];
    let address = |family, offset, len, class| {
        let mut rule = nfproto(family).to_vec();
        rule.extend([
            Expr::Payload(Base::Network, offset, len, R0),
            Expr::Contains(class, R0),
            Expr::Verdict(Verdict::Goto("deny")),
        ]);
        rule
    };
    let mut nd = nfproto(NFPROTO_IPV6).to_vec();
    nd.extend([
        Expr::MetaLoad(Meta::L4Proto, R0),
        Expr::Cmp(R0, Cmp::Eq, vec![ICMPV6]),
        Expr::Payload(Base::Transport, 0, 1, R0),
        Expr::Cmp(R0, Cmp::Gte, vec![ND_FIRST]),
        Expr::Cmp(R0, Cmp::Lte, vec![ND_LAST]),
        Expr::Verdict(Verdict::Accept),
    ]);
    vec![
        nd,
        address(NFPROTO_IPV4, 12, 4, "cls_eg4"),
        address(NFPROTO_IPV4, 16, 4, "cls_in4"),
        address(NFPROTO_IPV6, 8, 16, "cls_eg6"),
        address(NFPROTO_IPV6, 24, 16, "cls_in6"),
        vec![Expr::Verdict(Verdict::Accept)],
    ]
}

fn deny() -> Vec<Vec<Expr>> {
    vec![
        vec![Expr::Limit(LOG_PER_SECOND), Expr::Verdict(Verdict::Jump("deny_log"))],
        vec![Expr::Counter, Expr::Verdict(Verdict::Drop)],
    ]
}

/// A packet of no connection has no direction, which breaks the first two rules.
fn deny_log(log_group: u16) -> Vec<Vec<Expr>> {
    let of = |direction: Dir, logged: Logged| {
        vec![
            Expr::CtLoad(Ct::Direction, R0),
            Expr::Cmp(R0, Cmp::Eq, vec![direction as u8]),
            Expr::Log(log_group, logged.prefix()),
        ]
    };
    let mut stateless = state(INVALID_UNTRACKED);
    stateless.push(Expr::Log(log_group, Logged::DeniedStateless.prefix()));
    vec![of(Dir::Original, Logged::Denied), of(Dir::Reply, Logged::DeniedReply), stateless]
}
