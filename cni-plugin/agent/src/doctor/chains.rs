//! Which of other programs' chains may drop our packets.
//!
//! Our table accepting a packet ends only our own chain: each base chain of the same hook has its own say.

use std::collections::BTreeSet;

use holdfast_dataplane::{ForeignChain, ForeignHook, ForeignRule, ForeignVerdict};

use holdfast_net_core::plan::HOST_IFNAME_PREFIX;

use super::Finding;

/// The names that our packets carry.
pub(super) struct Ours<'a> {
    /// Bridge and VXLAN device.
    pub devices: Vec<&'a str>,
    pub uplink: Option<&'a str>,
    /// UDP port of the overlay.
    pub port: u16,
}

impl Ours<'_> {
    /// For people: pods' own links stand together.
    fn named(&self) -> String {
        let mut names: Vec<&str> =
            self.devices.iter().copied().filter(|name| !name.starts_with(HOST_IFNAME_PREFIX)).collect();
        names.extend((names.len() < self.devices.len()).then_some("hfv*"));
        names.join(", ")
    }

    fn is_device(&self, wanted: &str) -> bool {
        self.devices.iter().any(|name| covers(wanted, name))
    }

    fn is_any(&self, wanted: &str) -> bool {
        self.is_device(wanted) || self.uplink.is_some_and(|name| covers(wanted, name))
    }
}

/// "eth*" stands for all that begin so.
fn covers(wanted: &str, name: &str) -> bool {
    wanted.strip_suffix('*').map_or(wanted == name, |start| name.starts_with(start))
}

pub(super) fn judge_chains(chains: &[ForeignChain], ours: &Ours<'_>) -> Vec<Finding> {
    let bases = chains.iter().filter(|chain| chain.hook.is_some() && !is_companion(chain));
    bases.filter_map(|base| judge_base(base, chains, ours)).collect()
}

/// kube-proxy drops what is addressed to no Service's end, and what is invalid.
fn is_companion(chain: &ForeignChain) -> bool {
    chain.table == "kube-proxy" || chain.name.starts_with("KUBE-")
}

fn judge_base(base: &ForeignChain, chains: &[ForeignChain], ours: &Ours<'_>) -> Option<Finding> {
    let hook = base.hook?;
    let rules = reachable(base, chains);
    let where_it_is = format!("chain {} of table {} {}", base.name, base.family, base.table);
    if base.drops_by_default && !rules.iter().any(|rule| lets_ours_pass(rule, hook, ours)) {
        let (name, advice) = match hook {
            ForeignHook::Forward => {
                ("forward-drop", format!("accept there what comes in or goes out by {}", ours.named()))
            }
            ForeignHook::Input => (
                "input-drop",
                format!(
                    "accept there UDP port {} from the other nodes, and what comes in by {}",
                    ours.port,
                    ours.named()
                ),
            ),
            ForeignHook::Output | ForeignHook::Prerouting | ForeignHook::Postrouting => {
                ("policy-drop", "accept there the pods' addresses and the overlay's UDP port".to_owned())
            }
        };
        return Some(Finding { name, what: format!("{where_it_is} drops what it does not accept"), advice });
    }
    let dropping =
        rules.iter().filter(|rule| rule.verdict == ForeignVerdict::Drop && may_meet(rule, hook, ours));
    let count = dropping.count();
    (count > 0).then(|| Finding {
        name: "drop-rule",
        what: format!("{where_it_is} has {count} rules that may drop packets of pods or of the overlay"),
        advice: "see with `nft list ruleset` whether they mean them, and accept ours before".to_owned(),
    })
}

/// The rules of a base chain and of those that it leads to.
fn reachable<'a>(base: &'a ForeignChain, chains: &'a [ForeignChain]) -> Vec<&'a ForeignRule> {
    let mut rules: Vec<&ForeignRule> = Vec::new();
    let mut seen = BTreeSet::from([base.name.as_str()]);
    let mut next = vec![base];
    while let Some(chain) = next.pop() {
        rules.extend(&chain.rules);
        for rule in &chain.rules {
            let ForeignVerdict::Chain(to) = &rule.verdict else { continue };
            let of_table = |found: &&ForeignChain| {
                found.name == *to && found.table == base.table && found.family == base.family
            };
            if let Some(chain) = chains.iter().find(of_table).filter(|chain| !is_companion(chain))
                && seen.insert(to)
            {
                next.push(chain);
            }
        }
    }
    rules
}

fn lets_ours_pass(rule: &ForeignRule, hook: ForeignHook, ours: &Ours<'_>) -> bool {
    let names_ours = [&rule.iifname, &rule.oifname].into_iter().flatten().any(|name| ours.is_device(name));
    let is_overlay = hook != ForeignHook::Forward && rule.port == Some(ours.port);
    rule.verdict == ForeignVerdict::Accept && (!rule.has_condition || names_ours || is_overlay)
}

fn may_meet(rule: &ForeignRule, hook: ForeignHook, ours: &Ours<'_>) -> bool {
    // "ct state invalid drop" is in nearly every firewall, and meets none of ours.
    if rule.has_state {
        return false;
    }
    let fits = |wanted: &Option<String>| wanted.as_deref().is_none_or(|wanted| ours.is_any(wanted));
    let port_fits = hook == ForeignHook::Forward || rule.port.is_none_or(|port| port == ours.port);
    fits(&rule.iifname) && fits(&rule.oifname) && port_fits
}
