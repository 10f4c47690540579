//! Other programs' base chains and what they may do to a packet, for people who look for the reason of lost packets.
//!
//! A rule is read roughly: the interface names and the port that it compares, and its verdict. What else it compares is not
//! looked at, so a rule that drops is one that *may* drop. Not seen: verdict maps, and rules of legacy iptables, which are no nf_tables.

use super::socket::{NetfilterSocket, nft_message};
use super::wire::{Attrs, Message};
use crate::error::Result;

const MSG_GETCHAIN: u16 = 4;
const MSG_GETRULE: u16 = 7;
const FAMILY_ANY: u8 = 0;

/// `NFT_META_IIFNAME`, `NFT_META_OIFNAME`
const META_IIFNAME: u32 = 6;
const META_OIFNAME: u32 = 7;
/// `NFT_CT_STATE`
const CT_STATE: u32 = 0;
/// `NFT_PAYLOAD_TRANSPORT_HEADER`; the destination port is 2 bytes at 2.
const PAYLOAD_TRANSPORT: u32 = 2;
/// `NFT_CMP_EQ`
const CMP_EQ: u32 = 0;
/// `NF_DROP`, `NF_ACCEPT`, `NFT_JUMP`, `NFT_GOTO`
const DROP: i32 = 0;
const ACCEPT: i32 = 1;
const JUMP: i32 = -3;
const GOTO: i32 = -4;

/// Where a base chain stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ForeignHook {
    /// Before routing.
    Prerouting,
    /// To the node itself.
    Input,
    /// Through the node.
    Forward,
    /// From the node itself.
    Output,
    /// After routing.
    Postrouting,
}

/// What a rule does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ForeignVerdict {
    /// Lets pass.
    Accept,
    /// Drops or rejects.
    Drop,
    /// Goes on in another chain.
    Chain(String),
    /// Something else.
    Other,
}

/// A rule.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignRule {
    /// The input interface that it wants, if it names one; `*` at the end stands for any rest.
    pub iifname: Option<String>,
    /// The output interface.
    pub oifname: Option<String>,
    /// The destination port that it wants, if it names one.
    pub port: Option<u16>,
    /// It looks at the state of connections.
    pub has_state: bool,
    /// It compares anything at all.
    pub has_condition: bool,
    /// What it does.
    pub verdict: ForeignVerdict,
}

/// A chain of another program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ForeignChain {
    /// "ip", "ip6", "inet", "bridge", "arp" or "netdev".
    pub family: &'static str,
    /// Its table.
    pub table: String,
    /// Its name.
    pub name: String,
    /// Where it stands; `None`: others lead to it.
    pub hook: Option<ForeignHook>,
    /// What no rule accepts is dropped.
    pub drops_by_default: bool,
    /// In their order.
    pub rules: Vec<ForeignRule>,
}

/// All chains of the calling thread's network namespace that are not in a table called `own`.
///
/// # Errors
/// The kernel refuses to list: no privilege, or no nf_tables.
pub fn foreign_chains(own: &str) -> Result<Vec<ForeignChain>> {
    let mut socket = NetfilterSocket::open()?;
    let mut chains =
        socket.dump(nft_message(MSG_GETCHAIN), FAMILY_ANY, |_| {}, |message| chain(own, message))?;
    let rules = socket.dump(nft_message(MSG_GETRULE), FAMILY_ANY, |_| {}, rule)?;
    for (family, table, name, rule) in rules {
        let of =
            |chain: &&mut ForeignChain| chain.family == family && chain.table == table && chain.name == name;
        if let Some(chain) = chains.iter_mut().find(of) {
            chain.rules.push(rule);
        }
    }
    Ok(chains)
}

fn family(message: &Message<'_>) -> Option<&'static str> {
    Some(match message.body.first()? {
        1 => "inet",
        2 => "ip",
        3 => "arp",
        5 => "netdev",
        7 => "bridge",
        10 => "ip6",
        _ => return None,
    })
}

fn chain(own: &str, message: Message<'_>) -> Option<ForeignChain> {
    let attrs = message.attrs();
    let (family, table) = (family(&message)?, attrs.string(1)?);
    if table == own {
        return None;
    }
    let hook = attrs.nested(4).and_then(|hook| hook.u32(1)).filter(|_| !["arp", "netdev"].contains(&family));
    Some(ForeignChain {
        family,
        table: table.to_owned(),
        name: attrs.string(3)?.to_owned(),
        hook: hook.and_then(|number| match number {
            0 => Some(ForeignHook::Prerouting),
            1 => Some(ForeignHook::Input),
            2 => Some(ForeignHook::Forward),
            3 => Some(ForeignHook::Output),
            4 => Some(ForeignHook::Postrouting),
            _ => None,
        }),
        drops_by_default: attrs.u32(5) == Some(DROP.cast_unsigned()),
        rules: Vec::new(),
    })
}

fn rule(message: Message<'_>) -> Option<(&'static str, String, String, ForeignRule)> {
    let attrs = message.attrs();
    let of = (family(&message)?, attrs.string(1)?.to_owned(), attrs.string(2)?.to_owned());
    let mut rule = ForeignRule {
        iifname: None,
        oifname: None,
        port: None,
        has_state: false,
        has_condition: false,
        verdict: ForeignVerdict::Other,
    };
    let mut loaded = Loaded::Other;
    for (_, expression) in attrs.nested(4).into_iter().flatten() {
        let expression = Attrs::of(expression);
        let (Some(name), Some(data)) = (expression.string(1), expression.nested(2)) else { continue };
        read(&mut rule, &mut loaded, name, data);
    }
    Some((of.0, of.1, of.2, rule))
}

/// What the last expression put into its register.
enum Loaded {
    Iifname,
    Oifname,
    Port,
    Other,
}

fn read(rule: &mut ForeignRule, loaded: &mut Loaded, name: &str, data: Attrs<'_>) {
    match name {
        "meta" => {
            *loaded = match data.u32(2) {
                Some(META_IIFNAME) => Loaded::Iifname,
                Some(META_OIFNAME) => Loaded::Oifname,
                _ => Loaded::Other,
            };
        }
        "payload" => {
            let is_port =
                (data.u32(2), data.u32(3), data.u32(4)) == (Some(PAYLOAD_TRANSPORT), Some(2), Some(2));
            *loaded = if is_port { Loaded::Port } else { Loaded::Other };
        }
        "ct" => {
            rule.has_state |= data.u32(2) == Some(CT_STATE);
            *loaded = Loaded::Other;
        }
        "cmp" => {
            rule.has_condition = true;
            let value = data.nested(3).and_then(|value| value.find(1)).unwrap_or_default();
            if data.u32(2) != Some(CMP_EQ) {
                return;
            }
            match loaded {
                Loaded::Iifname => rule.iifname = Some(interface(value)),
                Loaded::Oifname => rule.oifname = Some(interface(value)),
                Loaded::Port => rule.port = value.try_into().ok().map(u16::from_be_bytes),
                Loaded::Other => {}
            }
        }
        "lookup" | "range" | "fib" | "limit" | "match" => {
            rule.has_condition = true;
            // iptables' "-m conntrack" and "-m state".
            rule.has_state |= name == "match" && matches!(data.string(1), Some("conntrack" | "state"));
        }
        "immediate" => {
            if let Some(verdict) = data.nested(2).and_then(|value| value.nested(2)) {
                rule.verdict = verdict_of(verdict);
            }
        }
        "reject" => rule.verdict = ForeignVerdict::Drop,
        "target" if data.string(1) == Some("REJECT") => rule.verdict = ForeignVerdict::Drop,
        _ => {}
    }
}

fn verdict_of(verdict: Attrs<'_>) -> ForeignVerdict {
    match verdict.u32(1).map(u32::cast_signed) {
        Some(DROP) => ForeignVerdict::Drop,
        Some(ACCEPT) => ForeignVerdict::Accept,
        Some(JUMP | GOTO) => match verdict.string(2) {
            Some(chain) => ForeignVerdict::Chain(chain.to_owned()),
            None => ForeignVerdict::Other,
        },
        _ => ForeignVerdict::Other,
    }
}

/// Whole names end with a zero byte, beginnings do not.
fn interface(value: &[u8]) -> String {
    let len = value.iter().position(|byte| *byte == 0);
    let text = String::from_utf8_lossy(&value[..len.unwrap_or(value.len())]).into_owned();
    if len.is_some() || value.len() == 16 { text } else { format!("{text}*") }
}
