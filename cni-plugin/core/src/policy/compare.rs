//! What a kernel holds against what was compiled, for one direction of one connection.

use std::net::IpAddr;

use super::lookup::{Direction, Lookup, PairStep, PortLookup, Trace};
use crate::ports::Proto;
use crate::ruleset::{AddrRange, ClassId, IdentityId, ProfileId};

/// An element that is not as it was compiled; as text it says what the kernel has and what it should have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Difference {
    /// The class of the subject.
    Class {
        /// The map's direction.
        direction: Direction,
        /// The subject.
        address: IpAddr,
        /// In the kernel.
        kernel: Option<ClassId>,
        /// As compiled.
        compiled: Option<ClassId>,
    },
    /// The peer's own identity.
    Identity {
        /// The peer.
        address: IpAddr,
        /// In the kernel.
        kernel: Option<IdentityId>,
        /// As compiled.
        compiled: Option<IdentityId>,
    },
    /// The range that the peer is in.
    Range {
        /// The peer.
        address: IpAddr,
        /// In the kernel.
        kernel: Option<(AddrRange, IdentityId)>,
        /// As compiled.
        compiled: Option<(AddrRange, IdentityId)>,
    },
    /// The profile of a pair.
    Pair {
        /// The map's direction.
        direction: Direction,
        /// The pair.
        class: ClassId,
        /// The pair.
        identity: IdentityId,
        /// In the kernel.
        kernel: Option<ProfileId>,
        /// As compiled.
        compiled: Option<ProfileId>,
    },
    /// What a profile says of the port.
    Port {
        /// The profile.
        profile: ProfileId,
        /// The protocol.
        proto: Proto,
        /// The server's port.
        port: u16,
        /// In the kernel.
        kernel: PortLookup,
        /// As compiled.
        compiled: PortLookup,
    },
}

/// The elements that differ, in the order of the data path. Lookups that follow from one that differs are not compared: they
/// were for other keys.
#[must_use]
pub fn differences(lookup: &Lookup, compiled: &Trace, kernel: &Trace) -> Vec<Difference> {
    let Lookup { direction, subject, peer, .. } = *lookup;
    let mut found = Vec::new();
    if kernel.class != compiled.class {
        let (kernel, compiled) = (kernel.class, compiled.class);
        found.push(Difference::Class { direction, address: subject, kernel, compiled });
    }
    if kernel.exact != compiled.exact {
        let (kernel, compiled) = (kernel.exact, compiled.exact);
        found.push(Difference::Identity { address: peer, kernel, compiled });
    }
    if kernel.range != compiled.range {
        let (kernel, compiled) = (kernel.range, compiled.range);
        found.push(Difference::Range { address: peer, kernel, compiled });
    }
    if let (Some(class), Some(of)) = (kernel.class, compiled.class)
        && class == of
    {
        found.extend(pair_differences(lookup, class, &compiled.pairs, &kernel.pairs));
    }
    found
}

/// Compares the pairs with identities that both looked for.
fn pair_differences(
    lookup: &Lookup,
    class: ClassId,
    compiled: &[PairStep],
    kernel: &[PairStep],
) -> Vec<Difference> {
    let Lookup { direction, proto, port, .. } = *lookup;
    let mut found = Vec::new();
    for step in kernel {
        let Some(wanted) = compiled.iter().find(|wanted| wanted.identity == step.identity) else { continue };
        let profile = |step: &PairStep| step.found.map(|(profile, _)| profile);
        match (step.found, wanted.found) {
            (Some((profile, kernel)), Some((same, compiled))) if profile == same => {
                if kernel != compiled {
                    found.push(Difference::Port { profile, proto, port, kernel, compiled });
                }
            }
            _ if profile(step) == profile(wanted) => {}
            _ => {
                let (kernel, compiled) = (profile(step), profile(wanted));
                found.push(Difference::Pair { direction, class, identity: step.identity, kernel, compiled });
            }
        }
    }
    found
}

impl std::fmt::Display for Difference {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match *self {
            Self::Class { direction, address, kernel, compiled } => {
                let text = |class: Option<ClassId>| class.map_or("no class".to_owned(), class_text);
                let (kernel, compiled) = (text(kernel), text(compiled));
                write!(f, "the kernel has {kernel} for {address} ({direction}), compiled is {compiled}")
            }
            Self::Identity { address, kernel, compiled } => {
                let (kernel, compiled) = (identity_text(kernel), identity_text(compiled));
                write!(f, "the kernel has {kernel} for {address}, compiled is {compiled}")
            }
            Self::Range { address, kernel, compiled } => {
                let (kernel, compiled) = (range_text(kernel), range_text(compiled));
                write!(f, "the kernel has {kernel} around {address}, compiled is {compiled}")
            }
            Self::Pair { direction, class, identity, kernel, compiled } => {
                let text = |profile: Option<ProfileId>| {
                    profile.map_or("no profile".to_owned(), |profile| format!("profile {}", profile.0))
                };
                let pair = format!("{} and identity {}", class_text(class), identity.0);
                let (kernel, compiled) = (text(kernel), text(compiled));
                write!(f, "the kernel has {kernel} for {pair} ({direction}), compiled is {compiled}")
            }
            Self::Port { profile, proto, port, kernel, compiled } => {
                let profile = profile.0;
                let (kernel, compiled) = (port_text(kernel), port_text(compiled));
                write!(
                    f,
                    "profile {profile} {kernel} {proto} port {port} in the kernel, as compiled it {compiled} it"
                )
            }
        }
    }
}

impl std::fmt::Display for Trace {
    /// What was found, in one line.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Some(class) = self.class else { return f.write_str("no class: nothing isolates it") };
        write!(f, "{}, {}", class_text(class), identity_text(self.exact))?;
        if let Some((range, identity)) = self.range {
            write!(f, ", range {}-{} identity {}", range.first, range.last, identity.0)?;
        }
        match self.pairs.last() {
            Some(PairStep { identity, found: Some((profile, port)) }) => {
                write!(
                    f,
                    ", pair with {} profile {} {} it",
                    peer_text(*identity),
                    profile.0,
                    port_text(*port)
                )
            }
            Some(PairStep { found: None, .. }) | None => f.write_str(", no pair denies it"),
        }
    }
}

fn class_text(class: ClassId) -> String {
    match class {
        ClassId::DENY_ALL => "class 1 (deny all)".to_owned(),
        ClassId(number) => format!("class {number}"),
    }
}

fn identity_text(identity: Option<IdentityId>) -> String {
    identity.map_or("no identity".to_owned(), |identity| format!("identity {}", identity.0))
}

fn peer_text(identity: IdentityId) -> String {
    match identity {
        IdentityId::ANY => "anybody".to_owned(),
        IdentityId(number) => format!("identity {number}"),
    }
}

fn range_text(range: Option<(AddrRange, IdentityId)>) -> String {
    range.map_or("no range".to_owned(), |(range, identity)| {
        format!("range {}-{} with identity {}", range.first, range.last, identity.0)
    })
}

fn port_text(port: PortLookup) -> &'static str {
    match port {
        PortLookup::Allow => "allows",
        PortLookup::Deny => "denies",
        PortLookup::Nothing => "says nothing of",
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ports::PortRule;
    use crate::ruleset::Ruleset;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    /// 10.0.0.1 is of class 7; 10.0.0.2 has identity 3, 10.9.0.0/16 identity 4. Identity 3 gets TCP 80, all others nothing.
    fn mk_ruleset() -> Ruleset {
        let mut ruleset = Ruleset::default();
        ruleset.cls_in.insert(ip("10.0.0.1"), ClassId(7));
        ruleset.ident.insert(ip("10.0.0.2"), IdentityId(3));
        ruleset.cidr.insert(AddrRange { first: ip("10.9.0.0"), last: ip("10.9.255.255") }, IdentityId(4));
        ruleset.pair_in.insert((ClassId(7), IdentityId(3)), ProfileId(5));
        ruleset.profiles.insert(ProfileId(5), vec![PortRule::port(Proto::Tcp, 80)]);
        ruleset
    }

    fn mk_lookup(peer: &str) -> Lookup {
        let (subject, peer) = (ip("10.0.0.1"), ip(peer));
        Lookup { direction: Direction::Ingress, subject, peer, proto: Proto::Tcp, port: 80 }
    }

    fn trace(mut ruleset: &Ruleset, lookup: &Lookup) -> Trace {
        Trace::of(&mut ruleset, lookup).unwrap()
    }

    /// What is told when the kernel holds what `change` makes of the compiled ruleset.
    fn told(peer: &str, change: impl FnOnce(&mut Ruleset)) -> Vec<String> {
        let compiled = mk_ruleset();
        let mut kernel = mk_ruleset();
        change(&mut kernel);
        let lookup = mk_lookup(peer);
        let found = differences(&lookup, &trace(&compiled, &lookup), &trace(&kernel, &lookup));
        found.iter().map(ToString::to_string).collect()
    }

    #[test]
    fn equal_elements_do_not_differ() {
        for peer in ["10.0.0.2", "10.9.0.1", "10.8.0.1"] {
            assert_eq!(told(peer, |_| {}), Vec::<String>::new(), "{peer}");
        }
    }

    #[test]
    fn each_element_that_differs_is_named_with_both_values() {
        let class = told("10.0.0.2", |kernel| _ = kernel.cls_in.insert(ip("10.0.0.1"), ClassId(9)));
        assert_eq!(class, ["the kernel has class 9 for 10.0.0.1 (ingress), compiled is class 7"]);
        let gone = told("10.0.0.2", |kernel| kernel.cls_in.clear());
        assert_eq!(gone, ["the kernel has no class for 10.0.0.1 (ingress), compiled is class 7"]);
        let identity = told("10.0.0.2", |kernel| _ = kernel.ident.insert(ip("10.0.0.2"), IdentityId(4)));
        assert_eq!(identity, ["the kernel has identity 4 for 10.0.0.2, compiled is identity 3"]);
        let range = told("10.9.0.1", |kernel| kernel.cidr.clear());
        let wanted = "the kernel has no range around 10.9.0.1, compiled is range 10.9.0.0-10.9.255.255 with identity 4";
        assert_eq!(range, [wanted]);
        let pair = told("10.0.0.2", |kernel| kernel.pair_in.clear());
        let wanted = "the kernel has no profile for class 7 and identity 3 (ingress), compiled is profile 5";
        assert_eq!(pair, [wanted]);
        let port = told("10.0.0.2", |kernel| kernel.profiles.clear());
        assert_eq!(port, ["profile 5 denies tcp port 80 in the kernel, as compiled it allows it"]);
    }

    #[test]
    fn a_range_that_has_a_pair_of_its_own_does_not_count_for_an_exact_one() {
        let found = told("10.0.0.2", |kernel| {
            let range = AddrRange { first: ip("10.0.0.0"), last: ip("10.0.0.255") };
            kernel.cidr.insert(range, IdentityId(8));
        });
        let wanted =
            "the kernel has range 10.0.0.0-10.0.0.255 with identity 8 around 10.0.0.2, compiled is no range";
        assert_eq!(found, [wanted], "it is told all the same");
    }

    #[test]
    fn a_trace_tells_what_decided() {
        let ruleset = mk_ruleset();
        let text = |peer: &str| trace(&ruleset, &mk_lookup(peer)).to_string();
        assert_eq!(text("10.0.0.2"), "class 7, identity 3, pair with identity 3 profile 5 allows it");
        let in_range = "class 7, no identity, range 10.9.0.0-10.9.255.255 identity 4, no pair denies it";
        assert_eq!(text("10.9.0.1"), in_range);
        assert_eq!(text("10.9.255.255"), in_range);
        assert_eq!(text("10.10.0.0"), "class 7, no identity, no pair denies it");
        assert_eq!(
            trace(&Ruleset::default(), &mk_lookup("10.9.0.1")).to_string(),
            "no class: nothing isolates it"
        );
    }
}
