//! Transactions: the skeleton, element changes, the revision.

use holdfast_net_core::ruleset::{Changes, Ruleset, diff};

use super::elements::{Data, Raw, to_raw};
use super::expr::Verdict;
use super::skeleton::{
    CHAINS, ChainDef, Params, Rule, SETS, SetDef, Table, Type, VERSION, Value, rules, set,
};
use super::socket::Batch;
use super::wire::{ATTR_BYTES_MAX, Buffer, F_APPEND, F_CREATE, F_REPLACE, host32};

const MSG_NEWTABLE: u16 = 0;
/// `NFT_MSG_DELTABLE`
pub const MSG_DELTABLE: u16 = 2;
const MSG_NEWCHAIN: u16 = 3;
const MSG_NEWRULE: u16 = 6;
const MSG_NEWSET: u16 = 9;
const MSG_NEWSETELEM: u16 = 12;
const MSG_DELSETELEM: u16 = 14;

/// Set flags: interval, map, concatenation.
const SET_INTERVAL: u32 = 0x4;
const SET_MAP: u32 = 0x8;
const SET_CONCAT: u32 = 0x80;
/// Element flags.
const ELEM_INTERVAL_END: u32 = 1;
const ELEM_CATCH_ALL: u32 = 2;
/// `nft`'s number of the verdict type.
const TYPE_VERDICT: u32 = 0xffff_ff00;
/// Bits per field in `nft`'s number of a concatenated type.
const TYPE_BITS: u32 = 6;

/// A rule that carries the revision, where it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RuleRef {
    /// Its chain.
    pub chain: &'static ChainDef,
    /// Its index in the chain.
    pub index: usize,
    /// The kernel's handle.
    pub handle: u64,
}

/// Makes both tables anew with `ruleset` in them, replacing what is there.
pub fn rebuild(batch: &mut Batch, table: &str, ruleset: &Ruleset, params: Params, revision: u32) {
    for t in Table::ALL {
        // Added first, so that the deletion never fails.
        for (message, flags, what) in
            [(MSG_NEWTABLE, F_CREATE, "add"), (MSG_DELTABLE, 0, "delete"), (MSG_NEWTABLE, F_CREATE, "add")]
        {
            batch.push(message, flags, t.family(), format!("{what} {t:?} table {table}"), |out| {
                out.string(1, table);
            });
        }
    }
    for (id, def) in (1u32..).zip(&SETS) {
        let label = format!("add set {}", def.name);
        batch.push(MSG_NEWSET, F_CREATE, def.table.family(), label, |out| encode_set(out, table, def, id));
    }
    for def in &CHAINS {
        let label = format!("add chain {}", def.name);
        batch.push(MSG_NEWCHAIN, F_CREATE, def.table.family(), label, |out| encode_chain(out, table, def));
    }
    for def in &CHAINS {
        for (index, rule) in rules(def.name, params).iter().enumerate() {
            let label = format!("add rule {index} of chain {}", def.name);
            batch.push(MSG_NEWRULE, F_CREATE | F_APPEND, def.table.family(), label, |out| {
                encode_rule(out, table, def, index, rule, None, revision);
            });
        }
    }
    change_raw(batch, table, MSG_NEWSETELEM, vec![Raw::profile_catch_all()]);
    change(batch, table, &diff(&Ruleset::default(), ruleset));
}

/// Element changes: removals first, so that a changed value is both.
pub fn change(batch: &mut Batch, table: &str, changes: &Changes) {
    change_raw(batch, table, MSG_DELSETELEM, changes.remove.iter().flat_map(to_raw).collect());
    change_raw(batch, table, MSG_NEWSETELEM, changes.add.iter().flat_map(to_raw).collect());
}

/// Replaces the rules that carry the revision.
pub fn replace_revision(batch: &mut Batch, table: &str, at: &[RuleRef], params: Params, revision: u32) {
    for r in at {
        let all = rules(r.chain.name, params);
        let Some(rule) = all.get(r.index) else { continue };
        let label = format!("advance the policy revision in chain {}", r.chain.name);
        batch.push(MSG_NEWRULE, F_REPLACE, r.chain.table.family(), label, |out| {
            encode_rule(out, table, r.chain, r.index, rule, Some(r.handle), revision);
        });
    }
}

/// The comment that marks rule `index` of its chain; revision rules carry the revision's number.
pub fn comment(index: usize, revision: Option<u32>) -> String {
    match revision {
        Some(n) => format!("holdfast v{VERSION} rule {index} revision {n}"),
        None => format!("holdfast v{VERSION} rule {index}"),
    }
}

fn encode_rule(
    out: &mut Buffer,
    table: &str,
    chain: &ChainDef,
    index: usize,
    rule: &Rule,
    handle: Option<u64>,
    revision: u32,
) {
    out.string(1, table);
    out.string(2, chain.name);
    if let Some(handle) = handle {
        out.be64(3, handle);
    }
    out.nest(4, |out| {
        for expr in &rule.exprs {
            expr.encode(out);
        }
    });
    // NFTNL_UDATA_RULE_COMMENT: type, length, text with its zero.
    let text = comment(index, rule.revision.then_some(revision));
    let mut userdata = vec![0, u8::try_from(text.len() + 1).unwrap_or(u8::MAX)];
    userdata.extend_from_slice(text.as_bytes());
    userdata.push(0);
    out.attr(7, &userdata);
}

fn encode_chain(out: &mut Buffer, table: &str, def: &ChainDef) {
    out.string(1, table);
    out.string(3, def.name);
    if let Some(hook) = def.hook {
        out.nest(4, |out| {
            out.be32(1, hook.number);
            out.be32(2, i32::cast_unsigned(hook.priority));
        });
        // NF_ACCEPT: what no rule decides is none of our pods' traffic.
        out.be32(5, 1);
        out.string(7, hook.kind);
    }
}

fn encode_set(out: &mut Buffer, table: &str, def: &SetDef, id: u32) {
    let concat = def.key.len() > 1;
    let mut flags = 0;
    if def.interval {
        flags |= SET_INTERVAL;
    }
    if def.value != Value::None {
        flags |= SET_MAP;
    }
    if concat && def.interval {
        flags |= SET_CONCAT;
    }
    out.string(1, table);
    out.string(2, def.name);
    out.be32(3, flags);
    out.be32(4, def.key.iter().fold(0, |n, t| (n << TYPE_BITS) | t.number()));
    out.be32(5, def.key.iter().map(|t| t.len().next_multiple_of(4)).sum());
    match def.value {
        Value::None => {}
        Value::Mark => {
            out.be32(6, Type::Mark.number());
            out.be32(7, 4);
        }
        Value::Verdict => {
            out.be32(6, TYPE_VERDICT);
            out.be32(7, 0);
        }
        Value::Socket(address) => {
            out.be32(6, (address.number() << TYPE_BITS) | Type::Port.number());
            out.be32(7, address.len() + Type::Port.len().next_multiple_of(4));
        }
    }
    out.be32(10, id);
    if concat && def.interval {
        out.nest(9, |out| {
            out.nest(2, |out| {
                for t in def.key {
                    out.nest(1, |out| out.be32(1, t.len()));
                }
            });
        });
    }
    out.attr(13, &set_userdata(def));
}

/// Byte orders of key and value, without which `nft` prints marks byte-swapped: 1 is host, 2 network order, 0 several.
fn set_userdata(def: &SetDef) -> Vec<u8> {
    let key_order: u32 = match def.key {
        [one] if one.host_order() => 1,
        [_] => 2,
        _ => 0,
    };
    let mut userdata = vec![0, 4];
    userdata.extend_from_slice(&host32(key_order));
    if def.value != Value::None {
        userdata.extend_from_slice(&[1, 4]);
        userdata.extend_from_slice(&host32(u32::from(def.value == Value::Mark)));
    }
    userdata
}

/// Writes element messages, one list per set, split so that a list fits its attribute.
fn change_raw(batch: &mut Batch, table: &str, message: u16, raws: Vec<Raw>) {
    let verb = if message == MSG_NEWSETELEM { "add elements to" } else { "remove elements from" };
    let flags = if message == MSG_NEWSETELEM { F_CREATE } else { 0 };
    for def in &SETS {
        let mut rest: Vec<&Raw> = raws.iter().filter(|raw| raw.set == def.name).collect();
        while !rest.is_empty() {
            let mut taken = 0;
            batch.push(message, flags, def.table.family(), format!("{verb} {}", def.name), |out| {
                out.string(1, table);
                out.string(2, def.name);
                let list = out.begin_nest(3);
                let start = out.len();
                for raw in &rest {
                    if out.len() - start > ATTR_BYTES_MAX {
                        break;
                    }
                    encode_element(out, raw, message == MSG_NEWSETELEM);
                    taken += 1;
                }
                out.end_nest(list);
            });
            rest.drain(..taken);
        }
    }
    debug_assert!(raws.iter().all(|raw| set(raw.set).name == raw.set));
}

/// One element; without its data it is a key to look for or to delete.
pub fn encode_element(out: &mut Buffer, raw: &Raw, with_data: bool) {
    out.nest(1, |out| {
        let flags = if raw.interval_end {
            ELEM_INTERVAL_END
        } else if raw.key.is_empty() {
            ELEM_CATCH_ALL
        } else {
            0
        };
        if flags != 0 {
            out.be32(3, flags);
        }
        if !raw.key.is_empty() {
            out.nest(1, |out| out.attr(1, &raw.key));
        }
        if let Some(end) = &raw.key_end {
            out.nest(10, |out| out.attr(1, end));
        }
        if !with_data {
            return;
        }
        match raw.data {
            Data::None => {}
            Data::Mark(n) => out.nest(2, |out| out.attr(1, &host32(n))),
            Data::Socket(ref value) => out.nest(2, |out| out.attr(1, value)),
            Data::Allow => out.nest(2, |out| out.nest(2, |out| Verdict::Return.encode(out))),
            Data::Deny => out.nest(2, |out| out.nest(2, |out| Verdict::Goto("deny").encode(out))),
        }
    });
}

#[cfg(test)]
mod tests {
    use holdfast_net_core::ruleset::{ClassId, Element};

    use super::*;

    /// Bytes that `nft --debug=mnl` 1.0.6 shows for `table inet t { map cls_in4 { type ipv4_addr : mark; elements =
    /// { 10.0.0.1 : 2 } } }`, without the set ids that only refer within a transaction. Little-endian hosts.
    #[test]
    #[cfg(target_endian = "little")]
    fn sets_and_elements_are_the_bytes_that_nft_writes() {
        let mut out = Buffer::default();
        encode_set(&mut out, "t", set("cls_in4"), 1);
        let golden: &[&[u8]] = &[
            &[6, 0, 1, 0, b't', 0, 0, 0],
            &[12, 0, 2, 0, b'c', b'l', b's', b'_', b'i', b'n', b'4', 0],
            &[8, 0, 3, 0, 0, 0, 0, 8],
            &[8, 0, 4, 0, 0, 0, 0, 7],
            &[8, 0, 5, 0, 0, 0, 0, 4],
            &[8, 0, 6, 0, 0, 0, 0, 0x13],
            &[8, 0, 7, 0, 0, 0, 0, 4],
            &[8, 0, 10, 0, 0, 0, 0, 1],
            &[16, 0, 13, 0, 0, 4, 2, 0, 0, 0, 1, 4, 1, 0, 0, 0],
        ];
        assert_eq!(out.as_slice(), golden.concat());

        let raw = to_raw(&Element::ClsIn("10.0.0.1".parse().unwrap(), ClassId(2)));
        let mut out = Buffer::default();
        out.nest(3, |out| encode_element(out, &raw[0], true));
        let golden: &[&[u8]] = &[
            &[32, 0, 3, 0x80],
            &[28, 0, 1, 0x80],
            &[12, 0, 1, 0x80, 8, 0, 1, 0, 10, 0, 0, 1],
            &[12, 0, 2, 0x80, 8, 0, 1, 0, 2, 0, 0, 0],
        ];
        assert_eq!(out.as_slice(), golden.concat());
    }

    #[test]
    #[cfg(target_endian = "little")]
    fn a_range_of_a_profile_has_its_protocol_and_port_in_network_order_padded_to_registers() {
        use holdfast_net_core::ports::{PortRule, Proto};
        use holdfast_net_core::ruleset::ProfileId;
        let rule = PortRule::Ports { proto: Proto::Tcp, first: 80, last: 90 };
        let raw = to_raw(&Element::Profile(ProfileId(1), rule));
        assert_eq!(raw[0].key, [1, 0, 0, 0, 6, 0, 0, 0, 0, 80, 0, 0]);
        assert_eq!(raw[0].key_end.as_deref(), Some(&[1, 0, 0, 0, 6, 0, 0, 0, 0, 90, 0, 0][..]));
        let mut out = Buffer::default();
        encode_element(&mut out, &raw[0], true);
        // Key, end of the range (attribute 10), verdict return (-5).
        let golden: &[&[u8]] = &[
            &[60, 0, 1, 0x80],
            &[20, 0, 1, 0x80, 16, 0, 1, 0, 1, 0, 0, 0, 6, 0, 0, 0, 0, 80, 0, 0],
            &[20, 0, 10, 0x80, 16, 0, 1, 0, 1, 0, 0, 0, 6, 0, 0, 0, 0, 90, 0, 0],
            &[16, 0, 2, 0x80, 12, 0, 2, 0x80, 8, 0, 1, 0, 0xff, 0xff, 0xff, 0xfb],
        ];
        assert_eq!(out.as_slice(), golden.concat());
    }
}
