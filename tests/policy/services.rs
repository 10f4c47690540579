//! Services: both directions are judged by the two real ends, whatever address the client asked for. Holdfast routes no
//! Services, so the nodes get here what a service proxy would put there: address translation in foreign tables.
//!
//! ```text
//!   near      -> y/b, on node-a              far  -> y/a, on node-b
//!   snat      -> y/a, and the client's node puts its own address in the client's place
//!   nodeport  -> y/b, by a port of node-a    host -> node-b itself
//! ```
//!
//! Clients are x/a and y/b on node-a, x/b and y/a on node-b. A server that is its own client is a hairpin: its node puts its
//! own address in the client's place, as proxies must, or the pod would drop a packet from itself.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::path::PathBuf;

use anyhow::{Context, Result, bail, ensure};

use crate::bed::Bed;
use crate::cases::{fill, matches_pod};
use crate::connects::{Attempt, Servers};
use crate::oracle::{End, Question, allows, allows_behind};
use crate::world::{PodName, Protocol, World};

/// Port of a Service, and its first node port.
const SERVICE_PORT: u16 = 8080;
const NODE_PORT: u16 = 30_080;
/// Port of the servers behind it.
const TARGET_PORT: u16 = 80;
/// Name of the foreign tables.
const TABLE: &str = "services";
/// What a service proxy marks a connection with whose source it will replace; outside our own bits.
const MASQUERADE_MARK: u32 = 0x4000;
const CLIENTS: [&str; 4] = ["x/a", "x/b", "y/b", "y/a"];

/// A Service with one server.
pub struct Service {
    name: &'static str,
    /// Where clients ask for it, IPv4 first.
    pub front: [SocketAddr; 2],
    server: End,
    /// Where it listens.
    addresses: [IpAddr; 2],
    masquerades: bool,
    /// Only this node, by number, knows it.
    only_node: Option<usize>,
}

/// Tries every client with every Service under every set of policies.
///
/// # Errors
/// A case fails.
pub fn run(bed: &mut Bed) -> Result<()> {
    let cases = cases();
    let node = &bed.net().nodes[1];
    let netns: PathBuf = format!("/proc/{}/ns/net", node.spaces.pid()).into();
    // A datagram's answer must come from the address that was asked.
    let host = (PodName::new("nodes/node-b"), netns, node.addresses.to_vec());
    let any = || vec![IpAddr::V6(Ipv6Addr::UNSPECIFIED)];
    let pods = bed.sandboxes().map(|(name, netns)| (name.clone(), netns.to_path_buf(), any()));
    let places: Vec<(PodName, PathBuf, Vec<IpAddr>)> = pods.chain([host]).collect();
    with_services(bed, |bed, services| {
        let servers = Servers::start_at(places.into_iter())?;
        let (mut failed, mut tried, mut denied) = (Vec::new(), 0, 0);
        for case in &cases {
            match run_case(bed, services, &servers, case) {
                Ok(counts) => (tried, denied) = (tried + counts.0, denied + counts.1),
                Err(error) => {
                    println!("Services: {}: {error:#}", case.name);
                    failed.push(case.name);
                }
            }
        }
        println!("Services: {} cases, {tried} connections, {denied} of them denied", cases.len());
        ensure!(failed.is_empty(), "{} of {} cases failed: {}", failed.len(), cases.len(), failed.join(", "));
        ensure!(denied > 0 && denied < tried, "nothing was allowed, or nothing denied");
        Ok(())
    })
}

/// Gives the nodes what a service proxy would, runs `body`, and takes it away again.
///
/// # Errors
/// The tables cannot be written, or `body` fails.
pub fn with_services(bed: &mut Bed, body: impl FnOnce(&mut Bed, &[Service]) -> Result<()>) -> Result<()> {
    let services = services(bed)?;
    let mut outcome = Ok(());
    for number in 0..bed.net().nodes.len() {
        for family in 0..2 {
            let text = table_text(&services, family, number)?;
            let written = bed.net().nodes[number].spaces.run("nft", &[&text]);
            outcome = outcome.and(written.map(drop).with_context(|| text));
        }
    }
    let outcome = outcome.and_then(|()| body(bed, &services));
    for node in &bed.net().nodes {
        for family in ["ip", "ip6"] {
            // A table that could not be written is not there.
            let _ = node.spaces.run("nft", &["delete", "table", family, TABLE]);
        }
    }
    outcome
}

/// The Service that translates to y/b.
///
/// # Errors
/// There is none.
pub fn near(services: &[Service]) -> Result<&Service> {
    services.iter().find(|service| service.name == "near").context("there is no Service near")
}

fn services(bed: &mut Bed) -> Result<Vec<Service>> {
    let world = bed.base();
    let node_addresses: Vec<[IpAddr; 2]> = bed.net().nodes.iter().map(|node| node.addresses).collect();
    let front = |number: u8| {
        let v4 = IpAddr::V4(Ipv4Addr::new(10, 96, 0, number));
        let v6 = IpAddr::V6(Ipv6Addr::new(0xfd00, 0x96, 0, 0, 0, 0, 0, number.into()));
        [SocketAddr::new(v4, SERVICE_PORT), SocketAddr::new(v6, SERVICE_PORT)]
    };
    let pod = |name: &str| -> Result<(End, [IpAddr; 2])> {
        let addresses = world.pods[&PodName::new(name)].addresses.as_slice().try_into()?;
        Ok((End::Pod(PodName::new(name)), addresses))
    };
    let service = |name, front, (server, addresses)| Service {
        name,
        front,
        server,
        addresses,
        masquerades: false,
        only_node: None,
    };
    let host = (End::Node("node-b".to_owned()), node_addresses[1]);
    let node_front = node_addresses[0].map(|address| SocketAddr::new(address, NODE_PORT));
    Ok(vec![
        service("near", front(1), pod("y/b")?),
        service("far", front(2), pod("y/a")?),
        Service { masquerades: true, ..service("snat", front(3), pod("y/a")?) },
        service("host", front(4), host),
        Service { only_node: Some(0), ..service("nodeport", node_front, pod("y/b")?) },
    ])
}

/// A table of one family for one node.
fn table_text(services: &[Service], family: usize, node: usize) -> Result<String> {
    let word = ["ip", "ip6"][family];
    let mut rules = String::new();
    for service in services.iter().filter(|service| service.only_node.is_none_or(|only| only == node)) {
        let (front, server) =
            (service.front[family], SocketAddr::new(service.addresses[family], TARGET_PORT));
        for protocol in ["tcp", "udp"] {
            let asked = format!("{word} daddr {} {protocol} dport {}", front.ip(), front.port());
            let hairpin = format!("{word} saddr {}", server.ip());
            let marked = if service.masquerades { "" } else { &hairpin };
            writeln!(rules, "{asked} {marked} meta mark set meta mark or {MASQUERADE_MARK:#x}")?;
            writeln!(rules, "{asked} dnat to {server}")?;
        }
    }
    Ok(format!(
        "table {word} {TABLE} {{
            chain services {{ {rules} }}
            chain prerouting {{ type nat hook prerouting priority -100; jump services; }}
            chain output {{ type nat hook output priority -100; jump services; }}
            chain postrouting {{ type nat hook postrouting priority 100;
                meta mark and {MASQUERADE_MARK:#x} != 0 masquerade; }}
        }}"
    ))
}

/// Policies, and who reaches which Service: everybody all, but for the parts `deny CLIENT > SERVICE` and
/// `allow CLIENT > SERVICE`, the last that fits.
struct Case {
    name: &'static str,
    policies: Vec<(&'static str, String)>,
    table: &'static str,
}

impl Case {
    fn allows(&self, client: &PodName, service: &str) -> Result<bool> {
        let mut open = true;
        for part in self.table.split(';').map(str::trim).filter(|part| !part.is_empty()) {
            let words: Vec<&str> = part.split_whitespace().collect();
            let [verb, from, ">", to] = words.as_slice() else { bail!("{part:?} is no part of a table") };
            if matches_pod(from, client) && (*to == "*" || *to == service) {
                open = match *verb {
                    "deny" => false,
                    "allow" => true,
                    _ => bail!("{verb:?} is neither deny nor allow"),
                };
            }
        }
        Ok(open)
    }
}

/// Returns how many connections were tried and how many of them should be denied.
fn run_case(bed: &mut Bed, services: &[Service], servers: &Servers, case: &Case) -> Result<(usize, usize)> {
    let mut world = bed.base();
    for (name, spec) in &case.policies {
        let spec = fill(&world, spec)?;
        match name.contains('/') {
            true => world.put_policy(&PodName::new(name), &spec)?,
            false => world.put_cluster_policy(name, &spec)?,
        }
    }
    bed.show(&world)?;
    let mut counts = (0, 0);
    let mut wrong = Vec::new();
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let attempts = attempts(&world, services, case, protocol)?;
        counts.0 += attempts.len();
        counts.1 += attempts.iter().filter(|attempt| !attempt.passes).count();
        wrong.extend(servers.try_all(bed, protocol, attempts)?);
    }
    ensure!(wrong.is_empty(), "{}\n{}", wrong.join("\n"), world.policies_yaml()?);
    Ok(counts)
}

fn attempts(world: &World, services: &[Service], case: &Case, protocol: Protocol) -> Result<Vec<Attempt>> {
    let mut attempts = Vec::new();
    for client in CLIENTS.map(PodName::new) {
        let node = world.pods[&client].node.clone();
        for service in services {
            if service.only_node.is_some_and(|only| world.nodes.keys().nth(only) != Some(&node)) {
                continue;
            }
            for family in 0..2 {
                let question = Question {
                    source: &client,
                    target: &service.server,
                    target_address: service.addresses[family],
                    source_address: world.pods[&client].addresses[family],
                    protocol,
                    port: TARGET_PORT,
                };
                let elsewhere = match &service.server {
                    End::Pod(server) => world.pods[server].node != node,
                    End::Node(name) => *name != node,
                };
                let oracle = if service.masquerades && elsewhere {
                    allows_behind(world, &question, &node, own_in_overlay(question.source_address))
                } else {
                    allows(world, &question)
                };
                let hand = case.allows(&client, service.name)?;
                let (name, word) = (service.name, protocol.word());
                ensure!(
                    hand == oracle,
                    "{client} -> {name}/{word}: the table says {hand}, the oracle {oracle}"
                );
                let to = match &service.server {
                    End::Pod(server) => server.clone(),
                    End::Node(name) => PodName::new(&format!("nodes/{name}")),
                };
                attempts.push(Attempt {
                    from: client.clone(),
                    to,
                    target: service.front[family],
                    passes: oracle,
                });
            }
        }
    }
    Ok(attempts)
}

/// The address that a node sends from to pods of other nodes: the one that names its pods' range.
fn own_in_overlay(pod: IpAddr) -> IpAddr {
    match pod {
        IpAddr::V4(v4) => Ipv4Addr::from(v4.to_bits() & !0xff).into(),
        IpAddr::V6(v6) => Ipv6Addr::from(v6.to_bits() & !u128::from(u64::MAX)).into(),
    }
}

fn cases() -> Vec<Case> {
    let mut cases = by_labels();
    cases.extend(by_port());
    cases.extend(by_address());
    cases.extend(to_itself());
    cases.extend(cluster_policies());
    cases
}

const X_A: &str = "namespaceSelector: {matchLabels: {ns: x}}, podSelector: {matchLabels: {pod: a}}";
const Y_B: &str = "namespaceSelector: {matchLabels: {ns: y}}, podSelector: {matchLabels: {pod: b}}";

fn case(name: &'static str, policy: &'static str, spec: String, table: &'static str) -> Case {
    Case { name, policies: vec![(policy, spec)], table }
}

fn ingress_of_y(rules: &str) -> String {
    format!("{{podSelector: {{}}, policyTypes: [Ingress], ingress: [{rules}]}}")
}

fn egress_of_x_a(rules: &str) -> String {
    format!("{{podSelector: {{matchLabels: {{pod: a}}}}, policyTypes: [Egress], egress: [{rules}]}}")
}

fn by_labels() -> Vec<Case> {
    vec![
        Case { name: "no policy", policies: Vec::new(), table: "" },
        case(
            "servers that admit one client, which another node's address hides",
            "y/in",
            ingress_of_y(&format!("{{from: [{{{X_A}}}]}}")),
            "deny * > near; deny * > far; deny * > snat; deny * > nodeport; \
             allow x/a > near; allow x/a > far; allow x/a > nodeport",
        ),
        case(
            "servers that admit nobody, themselves neither",
            "y/in",
            ingress_of_y(""),
            "deny * > near; deny * > far; deny * > snat; deny * > nodeport",
        ),
        case(
            "a client that may reach one server",
            "x/out",
            egress_of_x_a(&format!("{{to: [{{{Y_B}}}]}}")),
            "deny x/a > *; allow x/a > near; allow x/a > nodeport",
        ),
        case("a client that may reach nobody", "x/out", egress_of_x_a(""), "deny x/a > *"),
    ]
}

/// The port of a Service means nothing: what counts is where the server listens.
fn by_port() -> Vec<Case> {
    let both = |tcp: &str, udp: &str| format!("{{ports: [{{port: {tcp}}}, {{protocol: UDP, port: {udp}}}]}}");
    let range = "{ports: [{port: 8000, endPort: 32000}, {protocol: UDP, port: 8000, endPort: 32000}]}";
    let denied = "deny * > near; deny * > far; deny * > snat; deny * > nodeport";
    vec![
        case("egress to the Service's port", "x/out", egress_of_x_a(&both("8080", "8080")), "deny x/a > *"),
        case("egress to a range that has the Service's port", "x/out", egress_of_x_a(range), "deny x/a > *"),
        case("egress to the server's port", "x/out", egress_of_x_a(&both("80", "80")), ""),
        case(
            "egress to the server's port by name, which a node has not",
            "x/out",
            egress_of_x_a(&both("serve-80-tcp", "serve-80-udp")),
            "deny x/a > host",
        ),
        case("ingress to the Service's port", "y/in", ingress_of_y(&both("8080", "8080")), denied),
        case("ingress to a range that has the Service's port", "y/in", ingress_of_y(range), denied),
        case("ingress to the server's port", "y/in", ingress_of_y(&both("80", "80")), ""),
    ]
}

/// So does its address: ranges are compared with the server's.
fn by_address() -> Vec<Case> {
    let to = |v4: &str, v6: &str| egress_of_x_a(&format!("{{to: [{{ipBlock: {v4}}}, {{ipBlock: {v6}}}]}}"));
    let from = |v4: &str, v6: &str| {
        ingress_of_y(&format!("{{from: [{{ipBlock: {{cidr: {v4}}}}}, {{ipBlock: {{cidr: '{v6}'}}}}]}}"))
    };
    vec![
        case(
            "egress to the range of the Services",
            "x/out",
            to("{cidr: 10.96.0.0/16}", "{cidr: 'fd00:96::/64'}"),
            "deny x/a > *",
        ),
        case(
            "egress to everything but the range of the Services",
            "x/out",
            to("{cidr: 0.0.0.0/0, except: [10.96.0.0/16]}", "{cidr: '::/0', except: ['fd00:96::/64']}"),
            "",
        ),
        case(
            "egress to a server's address",
            "x/out",
            to("{cidr: <y/b v4 32>}", "{cidr: <y/b v6 128>}"),
            "deny x/a > *; allow x/a > near; allow x/a > nodeport",
        ),
        case(
            "egress to a node's address",
            "x/out",
            to("{cidr: 192.168.77.12/32}", "{cidr: 'fd00:77::c/128'}"),
            "deny x/a > *; allow x/a > host",
        ),
        case(
            "ingress from a client's address, which another node's hides and the own one's does not",
            "y/in",
            from("<x/b v4 32>", "<x/b v6 128>"),
            "deny * > near; deny * > far; deny * > snat; deny * > nodeport; \
             allow x/b > near; allow x/b > far; allow x/b > snat",
        ),
        case(
            "ingress from the address that another node has in the overlay",
            "y/in",
            from("10.244.1.0/32", "fd00:244:1::/128"),
            "deny * > near; deny * > far; deny * > snat; deny * > nodeport; \
             allow x/a > snat; allow y/b > snat",
        ),
    ]
}

/// A pod that reaches itself through a Service is its own peer, though it sees its node's address.
fn to_itself() -> Vec<Case> {
    vec![
        case(
            "servers that admit their own kind, themselves too",
            "y/in",
            ingress_of_y("{from: [{podSelector: {}}]}"),
            "deny x/* > near; deny x/* > far; deny x/* > snat; deny x/* > nodeport; deny y/b > snat",
        ),
        case(
            "servers that admit their node's address, which is not what they are",
            "y/in",
            ingress_of_y("{from: [{ipBlock: {cidr: 192.168.77.0/24}}, {ipBlock: {cidr: 'fd00:77::/64'}}]}"),
            "deny * > near; deny * > far; deny * > snat; deny * > nodeport",
        ),
        case(
            "clients that may not reach their own kind, themselves neither",
            "y/out",
            "{podSelector: {}, policyTypes: [Egress], \
              egress: [{to: [{namespaceSelector: {matchLabels: {ns: x}}}]}]}"
                .to_owned(),
            "deny y/* > *",
        ),
    ]
}

fn cluster_policies() -> Vec<Case> {
    let of = |tier: &str, namespace: &str, rules: &str| {
        format!(
            "{{tier: {tier}, priority: 10, \
              subject: {{namespaces: {{matchLabels: {{ns: {namespace}}}}}}}, {rules}}}"
        )
    };
    let to_y_b =
        "to: [{pods: {namespaceSelector: {matchLabels: {ns: y}}, podSelector: {matchLabels: {pod: b}}}}]";
    let from_x = "from: [{namespaces: {matchLabels: {ns: x}}}]";
    let ports = |number: u16| {
        format!(
            "protocols: [{{tcp: {{destinationPort: {{number: {number}}}}}}}, \
             {{udp: {{destinationPort: {{number: {number}}}}}}}]"
        )
    };
    let deny =
        |port: u16| of("Admin", "x", &format!("egress: [{{action: Deny, {to_y_b}, {}}}]", ports(port)));
    let accept = of("Admin", "y", &format!("ingress: [{{action: Accept, {from_x}}}]"));
    vec![
        case("Deny at the server's port", "deny", deny(80), "deny x/* > near; deny x/* > nodeport"),
        case("Deny at the Service's port", "deny", deny(8080), ""),
        Case {
            name: "Accept before a policy that admits nobody",
            policies: vec![("accept", accept), ("y/in", ingress_of_y(""))],
            table: "deny * > near; deny * > far; deny * > snat; deny * > nodeport; \
                    allow x/* > near; allow x/* > far; allow x/b > snat; allow x/a > nodeport",
        },
        case(
            "Baseline: Deny from a namespace, which another node's address hides",
            "baseline",
            of("Baseline", "y", &format!("ingress: [{{action: Deny, {from_x}}}]")),
            "deny x/* > near; deny x/* > far; deny x/b > snat; deny x/* > nodeport",
        ),
        case(
            "Deny to nodes",
            "deny",
            of("Admin", "x", "egress: [{action: Deny, to: [{nodes: {}}]}]"),
            "deny x/* > host",
        ),
        case(
            "Deny to the range of the Services",
            "deny",
            of("Admin", "x", "egress: [{action: Deny, to: [{networks: [10.96.0.0/16, 'fd00:96::/64']}]}]"),
            "",
        ),
    ]
}
