//! Reading our tables back: after a restart, and when somebody else changed them.

use holdfast_net_core::ruleset::Ruleset;

use super::elements::{Data, Raw, from_raw};
use super::program::{RuleRef, comment};
use super::skeleton::{CHAINS, ChainDef, Params, SETS, SetDef, Table, Value, rules};
use super::socket::{NetfilterSocket, nft_message};
use super::wire::{Attrs, Message, from_host32};
use crate::error::Result;

const MSG_GETTABLE: u16 = 1;
const MSG_GETRULE: u16 = 7;
const MSG_GETSET: u16 = 10;
pub const MSG_GETSETELEM: u16 = 13;
const ELEM_INTERVAL_END: u32 = 1;
/// NFT_RETURN
const VERDICT_RETURN: u32 = i32::cast_unsigned(-5);

/// What was found.
pub enum Loaded {
    /// Neither table exists.
    Absent,
    /// Something of the skeleton is missing, altered or of another version.
    Damaged {
        /// The elements that are left.
        ruleset: Ruleset,
        /// What is wrong.
        reason: String,
    },
    /// The skeleton is as this program makes it.
    Whole {
        /// The elements.
        ruleset: Ruleset,
        /// The policy revision in force.
        revision: u32,
        /// The rules that carry it.
        rules: Vec<RuleRef>,
    },
}

/// Which of our tables there are.
pub fn present(socket: &mut NetfilterSocket, table: &str) -> Result<Vec<Table>> {
    let mut present = Vec::new();
    for t in Table::ALL {
        let names = socket.dump(
            nft_message(MSG_GETTABLE),
            t.family(),
            |_| {},
            |m| m.attrs().string(1).map(str::to_string),
        )?;
        present.extend(names.iter().any(|n| n == table).then_some(t));
    }
    Ok(present)
}

/// Reads both tables.
pub fn load(socket: &mut NetfilterSocket, table: &str) -> Result<Loaded> {
    let present = present(socket, table)?.len();
    if present == 0 {
        return Ok(Loaded::Absent);
    }
    let mut reason = (present != Table::ALL.len()).then(|| "a table is missing".to_string());
    let mut raws = Vec::new();
    let existing = sets(socket, table)?;
    for def in &SETS {
        if existing.iter().any(|(family, name)| *family == def.table.family() && name == def.name) {
            raws.extend(elements(socket, table, def)?);
        } else {
            reason.get_or_insert_with(|| format!("set {} is missing", def.name));
        }
    }
    let (ruleset, strange) = from_raw(&raws);
    if strange > 0 {
        reason.get_or_insert_with(|| format!("{strange} elements are not ours"));
    }
    if !raws.contains(&Raw::profile_catch_all()) {
        reason.get_or_insert_with(|| "the profile map's catch-all is missing".to_string());
    }
    let found = found_rules(socket, table)?;
    let (revision, rules) = match whole_rules(&found) {
        Ok(found) => found,
        Err(what) => {
            reason.get_or_insert(what);
            (0, Vec::new())
        }
    };
    Ok(match reason {
        Some(reason) => Loaded::Damaged { ruleset, reason },
        None => Loaded::Whole { ruleset, revision, rules },
    })
}

/// The rules that carry the revision, in tables just made.
pub fn revision_rules(socket: &mut NetfilterSocket, table: &str) -> Result<Vec<RuleRef>> {
    let found = found_rules(socket, table)?;
    whole_rules(&found).map(|(_, rules)| rules).map_err(crate::Error::Protocol)
}

/// Why our rules are not this program's, if they are not. They use all sets, which the kernel keeps as long as they do.
pub fn damage(socket: &mut NetfilterSocket, table: &str) -> Result<Option<String>> {
    let found = found_rules(socket, table)?;
    Ok(whole_rules(&found).err())
}

/// Packets dropped by policy, and by the source pin.
pub fn denied(socket: &mut NetfilterSocket, table: &str) -> Result<(u64, u64)> {
    let found = found_rules(socket, table)?;
    let of = |chain: &str| -> u64 {
        found.iter().filter(|f| f.chain.name == chain).filter_map(|f| f.packets).sum()
    };
    let pinned: u64 = ["pin", "pin_routed"].into_iter().map(of).sum();
    Ok((of("deny"), pinned))
}

/// A rule of ours as the kernel has it.
struct Found {
    chain: &'static ChainDef,
    handle: u64,
    comment: String,
    packets: Option<u64>,
}

fn found_rules(socket: &mut NetfilterSocket, table: &str) -> Result<Vec<Found>> {
    let mut found = Vec::new();
    for t in Table::ALL {
        found.extend(socket.dump(
            nft_message(MSG_GETRULE),
            t.family(),
            |out| out.string(1, table),
            |m| found_rule(t, table, m),
        )?);
    }
    Ok(found)
}

fn found_rule(t: Table, table: &str, message: Message<'_>) -> Option<Found> {
    let attrs = message.attrs();
    let of_family = message.body.first() == Some(&t.family());
    if !of_family || attrs.string(1)? != table {
        return None;
    }
    let name = attrs.string(2)?;
    let chain = CHAINS.iter().find(|c| c.table == t && c.name == name)?;
    let userdata = attrs.find(7).unwrap_or(&[]);
    let comment = match userdata {
        [0, _, text @ ..] => String::from_utf8_lossy(text).trim_end_matches('\0').to_string(),
        _ => String::new(),
    };
    Some(Found { chain, handle: attrs.u64(3)?, comment, packets: attrs.nested(4).and_then(packets) })
}

/// The packets of the first counter in a rule's expressions.
fn packets(mut exprs: Attrs<'_>) -> Option<u64> {
    exprs.find_map(|(_, expr)| {
        let expr = Attrs::of(expr);
        (expr.string(1)? == "counter").then(|| expr.nested(2)?.u64(2))?
    })
}

/// Compares the rules' comments with the skeleton's; gives the revision and the rules that carry it.
fn whole_rules(found: &[Found]) -> std::result::Result<(u32, Vec<RuleRef>), String> {
    let mut refs = Vec::new();
    let mut revision = None;
    for chain in &CHAINS {
        let here: Vec<&Found> = found.iter().filter(|f| f.chain == chain).collect();
        let wanted = rules(chain.name, Params { mask: 0, mark: 0, log_group: 0 });
        if here.len() != wanted.len() {
            return Err(format!("chain {} has {} rules instead of {}", chain.name, here.len(), wanted.len()));
        }
        for (index, (f, rule)) in here.iter().zip(&wanted).enumerate() {
            let number = rule.revision.then(|| f.comment.rsplit(' ').next()?.parse::<u32>().ok()).flatten();
            let consistent = number.is_none() || revision.is_none() || revision == number;
            if f.comment != comment(index, number) || rule.revision != number.is_some() || !consistent {
                return Err(format!("rule {index} of chain {} is not this version's", chain.name));
            }
            if let Some(number) = number {
                revision = Some(number);
                refs.push(RuleRef { chain, index, handle: f.handle });
            }
        }
    }
    revision.map(|n| (n, refs)).ok_or_else(|| "no rule carries the policy revision".to_string())
}

fn sets(socket: &mut NetfilterSocket, table: &str) -> Result<Vec<(u8, String)>> {
    let mut found = Vec::new();
    for t in Table::ALL {
        found.extend(
            socket
                .dump(
                    nft_message(MSG_GETSET),
                    t.family(),
                    |out| out.string(1, table),
                    |m| {
                        let ours = m.attrs().string(1)? == table;
                        ours.then(|| Some((*m.body.first()?, m.attrs().string(2)?.to_string())))?
                    },
                )
                .or_else(absent_is_empty)?,
        );
    }
    Ok(found)
}

/// A dump of what is in a table that does not exist.
fn absent_is_empty<T>(error: crate::Error) -> Result<Vec<T>> {
    match error {
        crate::Error::Nft { errno: libc::ENOENT, .. } => Ok(Vec::new()),
        other => Err(other),
    }
}

fn elements(socket: &mut NetfilterSocket, table: &str, def: &'static SetDef) -> Result<Vec<Raw>> {
    let lists = socket.dump(
        nft_message(MSG_GETSETELEM),
        def.table.family(),
        |out| {
            out.string(1, table);
            out.string(2, def.name);
        },
        |m| Some(m.attrs().nested(3)?.filter_map(|(_, element)| raw(def, Attrs::of(element))).collect()),
    )?;
    Ok(lists.into_iter().flat_map(|list: Vec<Raw>| list).collect())
}

/// An element as the kernel tells it; `None` for data that is none of ours.
pub fn raw(def: &'static SetDef, element: Attrs<'_>) -> Option<Raw> {
    let value = |kind: u16| Some(element.nested(kind)?.find(1)?.to_vec());
    let data = match element.nested(2) {
        None => Data::None,
        Some(data) => match (data.find(1), data.nested(2)) {
            (Some(socket), _) if matches!(def.value, Value::Socket(_)) => Data::Socket(socket.to_vec()),
            (Some(mark), _) => Data::Mark(from_host32(mark.try_into().ok()?)),
            (None, Some(verdict)) if verdict.u32(1) == Some(VERDICT_RETURN) => Data::Allow,
            (None, Some(verdict)) if verdict.string(2) == Some("deny") => Data::Deny,
            (None, _) => return None,
        },
    };
    let interval_end = element.u32(3).is_some_and(|flags| flags & ELEM_INTERVAL_END != 0);
    Some(Raw { set: def.name, key: value(1).unwrap_or_default(), key_end: value(10), data, interval_end })
}
