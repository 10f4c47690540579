//! Rule sets of the kind that others generate, for the same pods, policies and peers. Each is made as cheap for a packet as
//! its kind allows: no marks, no logs, no port sets, an established connection first.

use std::fmt::Write as _;
use std::net::Ipv4Addr;

use super::world::{OPEN_PORT, SERVER_SLOT, World};

/// Name of the table.
pub const TABLE: &str = "peer";
/// First address of pods on the node that exist in rules only.
const FIRST_OTHER: Ipv4Addr = Ipv4Addr::new(10, 245, 0, 1);

/// Which kind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// A chain per pod and per policy, a set of peers per policy; packets find their pod's chain rule by rule.
    ChainPerPod,
    /// A chain per policy with a rule per peer; packets find their pod's policies by one map.
    ChainPerPolicy,
}

impl Shape {
    /// For figures.
    pub fn name(self) -> &'static str {
        match self {
            Shape::ChainPerPod => "chain per pod and policy, set per policy",
            Shape::ChainPerPolicy => "chain per policy, rule per peer",
        }
    }

    /// The rule set as `nft -f` reads it.
    pub fn rules(self, world: &World, client: Ipv4Addr, server: Ipv4Addr) -> String {
        let mut text = format!("table inet {TABLE} {{\n chain deny {{ counter drop; }}\n");
        for policy in 0..world.policies {
            self.policy(&mut text, world, policy, client);
        }
        let mut by_slot: Vec<Vec<usize>> = vec![Vec::new(); world.slots];
        for policy in 0..world.policies {
            by_slot[world.slot_of(policy)].push(policy);
        }
        for (slot, policies) in by_slot.iter().enumerate() {
            let _ = writeln!(text, " chain pod{slot} {{");
            for policy in policies {
                let _ = writeln!(text, "  jump policy{policy}");
            }
            text.push_str("  goto deny\n }\n");
        }
        text.push_str(" chain forward {\n  type filter hook forward priority 0;\n");
        text.push_str("  ct state established,related accept\n");
        self.dispatch(&mut text, world, server);
        text.push_str(" }\n}\n");
        text
    }

    fn policy(self, text: &mut String, world: &World, policy: usize, client: Ipv4Addr) {
        let [one, other] = world.groups_of(policy);
        let peers: Vec<String> =
            world.group(one).chain(world.group(other)).map(|peer| peer.to_string()).collect();
        let port = World::port_of(policy);
        if self == Shape::ChainPerPod && !peers.is_empty() {
            let peers = peers.join(", ");
            let _ = writeln!(text, " set peers{policy} {{ type ipv4_addr; elements = {{ {peers} }}; }}");
        }
        let _ = writeln!(text, " chain policy{policy} {{");
        match self {
            Shape::ChainPerPod if peers.is_empty() => {}
            Shape::ChainPerPod => {
                let _ = writeln!(text, "  ip saddr @peers{policy} tcp dport {port} accept");
            }
            Shape::ChainPerPolicy => {
                for peer in &peers {
                    let _ = writeln!(text, "  ip saddr {peer} tcp dport {port} accept");
                }
            }
        }
        if policy == world.admitting() {
            let _ = writeln!(text, "  ip saddr {client} tcp dport {OPEN_PORT} accept");
        }
        text.push_str(" }\n");
    }

    /// The server stands in the middle of the pods.
    fn dispatch(self, text: &mut String, world: &World, server: Ipv4Addr) {
        let mut slots: Vec<usize> = (0..world.slots).filter(|slot| *slot != SERVER_SLOT).collect();
        slots.insert(slots.len() / 2, SERVER_SLOT);
        let address = |slot: usize| match slot {
            SERVER_SLOT => server,
            other => Ipv4Addr::from(u32::from(FIRST_OTHER) + u32::try_from(other).unwrap_or(0)),
        };
        match self {
            Shape::ChainPerPod => {
                for slot in slots {
                    let _ = writeln!(text, "  ip daddr {} goto pod{slot}", address(slot));
                }
            }
            Shape::ChainPerPolicy => {
                let entries: Vec<String> =
                    slots.iter().map(|slot| format!("{} : goto pod{slot}", address(*slot))).collect();
                let _ = writeln!(text, "  ip daddr vmap {{ {} }}", entries.join(", "));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMALL: World = World { policies: 4, peers: 8, slots: 3, on_server: 2 };

    fn rules(shape: Shape) -> String {
        shape.rules(&SMALL, Ipv4Addr::new(10, 0, 0, 1), Ipv4Addr::new(10, 0, 0, 2))
    }

    #[test]
    fn the_client_is_admitted_by_one_policy_of_the_server_in_both_shapes() {
        for shape in [Shape::ChainPerPod, Shape::ChainPerPolicy] {
            let text = rules(shape);
            assert_eq!(text.matches("ip saddr 10.0.0.1 tcp dport 5000 accept").count(), 1, "{text}");
            let server = text.split_once("chain pod0 {").unwrap().1.split_once('}').unwrap().0;
            assert_eq!(
                server.split_whitespace().collect::<Vec<_>>().join(" "),
                "jump policy0 jump policy1 goto deny"
            );
        }
    }

    #[test]
    fn one_shape_has_a_set_per_policy_and_the_other_a_rule_per_peer() {
        let (sets, plain) = (rules(Shape::ChainPerPod), rules(Shape::ChainPerPolicy));
        assert_eq!(sets.matches(" set peers").count(), SMALL.policies);
        assert_eq!(sets.matches("ip daddr").count(), SMALL.slots);
        assert_eq!(plain.matches("ip saddr 10.128.").count(), SMALL.policies * 4);
        assert_eq!(plain.matches("ip daddr").count(), 1);
    }
}
