//! The situations of the conformance list of the network-policy-api for ClusterNetworkPolicy: 92 sub-tests, 58 of tier Admin,
//! 34 of tier Baseline. Our own policies; every table is written by hand for the protocols and ports that the case is
//! about, and held against the oracle; the kernel is compared over everything.
//!
//! Four namespaces take the four parts, in another order for each protocol: the subject, the first (rules about all of its
//! traffic contradict each other), the second (denied at port 80), the third (accepted at port 81, else denied).

use anyhow::{Result, ensure};

use crate::bed::Bed;
use crate::cases::{Action, Case, Step, case, run_list, step};
use crate::world::{PodName, Protocol};

const TCP: Protocol = Protocol::Tcp;
const UDP: Protocol = Protocol::Udp;
const SCTP: Protocol = Protocol::Sctp;
/// The namespace that the other lists do not have, and its pods.
const NAMESPACE: &str = "w";
const PODS: [&str; 2] = ["w/a", "w/b"];
const EVERYWHERE: &str = "networks: [0.0.0.0/0, '::/0']";
const LINUX: &str = "nodes: {matchLabels: {kubernetes.io/os: linux}}";

/// Runs the list.
///
/// # Errors
/// A case fails.
pub fn run(bed: &mut Bed) -> Result<()> {
    let mut cases = ordered_rules();
    cases.extend(networks());
    cases.extend(named_ports());
    cases.extend(nodes());
    cases.extend(together_with_network_policies());
    cases.extend(priorities());
    ensure!(cases.len() == 92, "the list has 92 situations, not {}", cases.len());
    with_fourth_namespace(bed, |bed| {
        run_list(bed, "the conformance list of the network-policy-api", &cases, false)
    })
}

/// What the list leaves out: peers of a kind that nobody knows yet, and ranges of ports.
///
/// # Errors
/// A case fails.
pub fn run_beyond(bed: &mut Bed) -> Result<()> {
    let mut cases = unknown_peers();
    cases.extend(ranges_and_all_ports());
    with_fourth_namespace(bed, |bed| run_list(bed, "cluster policies beyond the list", &cases, false))
}

fn with_fourth_namespace(bed: &mut Bed, run: impl FnOnce(&mut Bed) -> Result<()>) -> Result<()> {
    bed.add_namespace(NAMESPACE, &PODS)?;
    let outcome = run(bed);
    bed.remove_namespace(NAMESPACE)?;
    outcome
}

/// The part that each namespace takes.
#[derive(Clone, Copy)]
struct Parts {
    subject: &'static str,
    first: &'static str,
    second: &'static str,
    third: &'static str,
}

impl Parts {
    fn new(turn: usize) -> Self {
        let mut names = ["x", "y", "z", "w"];
        names.rotate_left(turn);
        let [subject, first, second, third] = names;
        Self { subject, first, second, third }
    }
}

/// What a case is about: the rules that it puts first.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Order {
    AcceptAll,
    AcceptAtPort,
    DenyAll,
    DenyAtPort,
    PassAll,
    PassAtPort,
}

impl Order {
    const ALL: [Self; 6] = [
        Self::AcceptAll,
        Self::AcceptAtPort,
        Self::DenyAll,
        Self::DenyAtPort,
        Self::PassAll,
        Self::PassAtPort,
    ];

    /// Order of the seven rules.
    fn rules(self) -> [usize; 7] {
        match self {
            Self::AcceptAll => [0, 1, 2, 3, 4, 5, 6],
            Self::AcceptAtPort => [5, 6, 0, 1, 2, 3, 4],
            Self::DenyAll => [1, 0, 2, 3, 4, 5, 6],
            Self::DenyAtPort => [3, 4, 0, 1, 2, 5, 6],
            Self::PassAll => [2, 1, 0, 3, 4, 5, 6],
            Self::PassAtPort => [0, 1, 2, 4, 3, 5, 6],
        }
    }

    fn name(self) -> &'static str {
        match self {
            Self::AcceptAll => "Accept for everything comes first",
            Self::AcceptAtPort => "Accept at a port comes first",
            Self::DenyAll => "Deny for everything comes first",
            Self::DenyAtPort => "Deny at a port comes first",
            Self::PassAll => "Pass for everything comes first",
            Self::PassAtPort => "Pass at a port comes first",
        }
    }

    fn is_pass(self) -> bool {
        matches!(self, Self::PassAll | Self::PassAtPort)
    }
}

/// Seven rules whose order decides; in tier Baseline, where Pass would be the end, five.
fn rules(parts: Parts, ingress: bool, protocols: &[Protocol], order: Order, tier: &str) -> String {
    let word = if ingress { "from" } else { "to" };
    let at = |port: u16| {
        let each = protocols.iter().map(|protocol| {
            format!("{{{}: {{destinationPort: {{number: {port}}}}}}}", protocol.word().to_lowercase())
        });
        format!(", protocols: [{}]", each.collect::<Vec<_>>().join(", "))
    };
    let rule = |action: &str, namespace: &str, protocols: &str| {
        format!(
            "{{action: {action}, {word}: [{{namespaces: {{matchLabels: {{kubernetes.io/metadata.name: {namespace}}}}}}}]\
             {protocols}}}"
        )
    };
    let all = [
        rule("Accept", parts.first, ""),
        rule("Deny", parts.first, ""),
        rule("Pass", parts.first, ""),
        rule("Deny", parts.second, &at(80)),
        rule("Pass", parts.second, &at(80)),
        rule("Accept", parts.third, &at(81)),
        rule("Deny", parts.third, ""),
    ];
    let ordered = order.rules().into_iter().filter(|rule| tier == "Admin" || ![2, 4].contains(rule));
    format!("[{}]", ordered.map(|rule| all[rule].clone()).collect::<Vec<_>>().join(", "))
}

/// What the rules above make of one protocol and port.
fn table(parts: Parts, ingress: bool, named: bool, port: u16, order: Order) -> String {
    let deny = |namespace: &str| match ingress {
        true => format!("deny {namespace}/* > {}/*", parts.subject),
        false => format!("deny {}/* > {namespace}/*", parts.subject),
    };
    let mut denied = Vec::new();
    if order == Order::DenyAll {
        denied.push(deny(parts.first));
    }
    if named && port == 80 && order != Order::PassAtPort {
        denied.push(deny(parts.second));
    }
    if !named || port == 80 {
        denied.push(deny(parts.third));
    }
    denied.join("; ")
}

fn ordered_rules() -> Vec<Case> {
    let mut cases = Vec::new();
    for tier in ["Admin", "Baseline"] {
        for order in Order::ALL.into_iter().filter(|order| tier == "Admin" || !order.is_pass()) {
            for (turn, protocol) in Protocol::ALL.into_iter().enumerate() {
                for ingress in [true, false] {
                    cases.push(ordered(tier, order, Parts::new(turn), &[protocol], &[ingress]));
                }
            }
            cases.push(ordered(tier, order, Parts::new(3), &Protocol::ALL, &[true, false]));
        }
    }
    cases
}

fn ordered(tier: &str, order: Order, parts: Parts, protocols: &[Protocol], directions: &[bool]) -> Case {
    let mut spec = format!(
        "{{tier: {tier}, priority: 10, subject: {{namespaces: {{matchLabels: {{kubernetes.io/metadata.name: {}}}}}}}",
        parts.subject
    );
    for ingress in directions {
        let word = if *ingress { "ingress" } else { "egress" };
        spec.push_str(&format!(", {word}: {}", rules(parts, *ingress, protocols, order, tier)));
    }
    spec.push('}');
    let mut only = step().cluster_policy("rules", &spec);
    for protocol in Protocol::ALL {
        for port in [80, 81] {
            let named = protocols.contains(&protocol);
            let of_directions = directions.iter().map(|ingress| table(parts, *ingress, named, port, order));
            only = only.expect(protocol, port, &of_directions.collect::<Vec<_>>().join("; "));
        }
    }
    let words: Vec<&str> = protocols.iter().map(|protocol| protocol.word()).collect();
    let direction = match directions {
        [true] => "ingress",
        [false] => "egress",
        _ => "both directions",
    };
    case(&format!("{tier}, {direction}, {}: {}", words.join(" and "), order.name()), vec![only])
}

/// Expects the same table at every protocol and port.
fn everywhere(to: Step, table: &str) -> Step {
    let each = Protocol::ALL.into_iter().flat_map(|protocol| [80, 81].map(|port| (protocol, port)));
    each.fold(to, |step, (protocol, port)| step.expect(protocol, port, table))
}

/// A policy of x/a and x/b: namespace y is accepted, then `more`, the rest of all addresses denied.
fn of_x_a_b(tier: &str, more: &str) -> String {
    format!(
        "{{tier: {tier}, priority: 85, subject: {{pods: {{namespaceSelector: {{matchLabels: {{ns: x}}}}, \
         podSelector: {{matchExpressions: [{{key: pod, operator: NotIn, values: [c]}}]}}}}}}, egress: [{more} \
         {{action: Accept, to: [{{pods: {{namespaceSelector: {{matchLabels: {{ns: y}}}}, podSelector: {{}}}}}}]}}, \
         {{action: Deny, to: [{{{EVERYWHERE}}}]}}]}}"
    )
}

fn networks() -> Vec<Case> {
    let only_y = "deny x/a > *; deny x/b > *; allow x/a > y/*; allow x/b > y/*";
    let and_two = "allow x/a > z/a; allow x/b > z/a; allow x/a > w/a; allow x/b > w/a";
    let two = "{action: Accept, to: [{networks: [<z/a v4 32>, <z/a v6 128>, <w/a v4 32>, <w/a v6 128>]}]},";
    let relabel = |labels: &str| step().act(Action::Namespace("y".to_owned(), labels.to_owned()));
    let mut cases = Vec::new();
    for tier in ["Admin", "Baseline"] {
        cases.push(case(
            &format!("{tier}: all addresses are denied but a namespace, whose label goes and comes back"),
            vec![
                everywhere(step().cluster_policy("networks", &of_x_a_b(tier, "")), only_y),
                everywhere(relabel("ns=denied"), "deny x/a > *; deny x/b > *"),
                everywhere(relabel("ns=y"), only_y),
            ],
        ));
        cases.push(case(
            &format!("{tier}: single addresses are accepted before all are denied"),
            vec![everywhere(
                step().cluster_policy("networks", &of_x_a_b(tier, two)),
                &format!("{only_y}; {and_two}"),
            )],
        ));
    }
    cases
}

fn named_ports() -> Vec<Case> {
    let mut cases = Vec::new();
    for (tier, ingress, protocol) in
        [("Admin", false, TCP), ("Admin", true, UDP), ("Baseline", false, UDP), ("Baseline", true, TCP)]
    {
        let (word, list) = if ingress { ("from", "ingress") } else { ("to", "egress") };
        let peer = format!("{word}: [{{namespaces: {{matchLabels: {{ns: w}}}}}}]");
        let name = format!("serve-80-{}", protocol.word().to_lowercase());
        let spec = format!(
            "{{tier: {tier}, priority: 7, subject: {{namespaces: {{matchLabels: {{ns: x}}}}}}, {list}: [\
             {{action: Accept, {peer}, protocols: [{{destinationNamedPort: {name}}}]}}, {{action: Deny, {peer}}}]}}"
        );
        let mut only = step().cluster_policy("named", &spec);
        for other in Protocol::ALL {
            for port in [80, 81] {
                let open = other == protocol && port == 80;
                let denied = if ingress { "deny w/* > x/*" } else { "deny x/* > w/*" };
                only = only.expect(other, port, if open { "" } else { denied });
            }
        }
        cases.push(case(&format!("{tier}, {list}: a port by name ({})", protocol.word()), vec![only]));
    }
    cases
}

fn nodes() -> Vec<Case> {
    let at = |protocol: &str| format!("protocols: [{{{protocol}: {{destinationPort: {{number: 80}}}}}}]");
    let accept = format!("{{action: Accept, to: [{{{LINUX}}}], {}}}", at("tcp"));
    let pass = format!("{{action: Pass, to: [{{{LINUX}}}], {}}}", at("udp"));
    let deny_nodes = format!("{{action: Deny, to: [{{{LINUX}}}]}}");
    let deny = format!(
        "{{action: Deny, to: [{{namespaces: {{matchLabels: {{ns: y}}}}}}, {{{LINUX}}}, {{{EVERYWHERE}}}]}}"
    );
    let range = format!(
        "{{action: Accept, to: [{{{LINUX}}}], protocols: [{{tcp: {{destinationPort: {{range: {{start: 80, end: 81}}}}}}}}]}}"
    );
    let of_x = |tier: &str, rules: &str| {
        let spec = format!(
            "{{tier: {tier}, priority: 75, subject: {{namespaces: {{matchLabels: {{ns: x}}}}}}, egress: [{rules}]}}"
        );
        step().cluster_policy("nodes", &spec)
    };
    let none = "deny x/* > nodes";
    vec![
        case(
            "Admin: nodes are accepted at a port",
            vec![
                of_x("Admin", &format!("{accept}, {deny_nodes}"))
                    .expect(TCP, 80, "")
                    .expect(TCP, 81, none)
                    .expect(UDP, 80, none),
            ],
        ),
        case(
            "Admin: nodes are passed on at a port",
            vec![
                of_x("Admin", &format!("{accept}, {pass}, {deny_nodes}"))
                    .expect(TCP, 80, "")
                    .expect(UDP, 80, "")
                    .expect(UDP, 81, none)
                    .expect(SCTP, 80, none),
            ],
        ),
        case(
            "Admin: nodes, a namespace and all addresses are denied",
            vec![
                of_x("Admin", &format!("{accept}, {pass}, {deny}"))
                    .expect(TCP, 80, "deny x/* > *; allow x/* > nodes")
                    .expect(UDP, 80, "deny x/* > *; allow x/* > nodes")
                    .expect(TCP, 81, "deny x/* > *")
                    .expect(SCTP, 81, "deny x/* > *"),
            ],
        ),
        case(
            "Baseline: nodes are accepted at a range of ports",
            vec![
                of_x("Baseline", &format!("{range}, {deny_nodes}"))
                    .expect(TCP, 80, "")
                    .expect(TCP, 81, "")
                    .expect(UDP, 80, none),
            ],
        ),
        case(
            "Baseline: nodes and all addresses are denied",
            vec![
                of_x("Baseline", &format!("{range}, {deny}"))
                    .expect(TCP, 80, "deny x/* > *; allow x/* > nodes")
                    .expect(UDP, 80, "deny x/* > *")
                    .expect(SCTP, 80, "deny x/* > *"),
            ],
        ),
    ]
}

/// A cluster policy of namespace x about namespace y.
fn about_y(tier: &str, priority: u32, ingress: Option<&str>, egress: Option<&str>) -> String {
    let peer = "[{namespaces: {matchLabels: {ns: y}}}]";
    let mut spec =
        format!("{{tier: {tier}, priority: {priority}, subject: {{namespaces: {{matchLabels: {{ns: x}}}}}}");
    if let Some(action) = ingress {
        spec.push_str(&format!(", ingress: [{{action: {action}, from: {peer}}}]"));
    }
    if let Some(action) = egress {
        spec.push_str(&format!(", egress: [{{action: {action}, to: {peer}}}]"));
    }
    spec + "}"
}

fn together_with_network_policies() -> Vec<Case> {
    let peer = "[{namespaceSelector: {matchLabels: {ns: y}}}]";
    let allow = format!(
        "{{podSelector: {{}}, policyTypes: [Ingress, Egress], ingress: [{{from: {peer}}}], egress: [{{to: {peer}}}]}}"
    );
    let isolated = "deny * > x/*; deny x/* > *";
    let out = format!("{isolated}; allow x/* > y/*");
    let into = format!("{isolated}; allow y/* > x/*");
    let both = format!("{isolated}; allow x/* > y/*; allow y/* > x/*");
    let begin = |ingress, egress| {
        step()
            .cluster_policy("admin", &about_y("Admin", 10, ingress, egress))
            .cluster_policy("baseline", &about_y("Baseline", 10, Some("Deny"), Some("Deny")))
            .policy("x/allow-y", &allow)
    };
    let change =
        |ingress, egress| step().cluster_policy("admin", &about_y("Admin", 10, Some(ingress), Some(egress)));
    let without = || step().act(Action::NoPolicy(PodName::new("x/allow-y")));
    let only = |ingress, egress| step().cluster_policy("baseline", &about_y("Baseline", 10, ingress, egress));
    vec![
        case(
            "an Admin deny of ingress beats a NetworkPolicy",
            vec![everywhere(begin(Some("Deny"), None), &out)],
        ),
        case(
            "an Admin deny of egress beats a NetworkPolicy",
            vec![everywhere(begin(None, Some("Deny")), &into)],
        ),
        case(
            "an Admin pass of ingress leaves it to the NetworkPolicy",
            vec![
                everywhere(begin(Some("Deny"), Some("Deny")), isolated),
                everywhere(change("Pass", "Deny"), &into),
            ],
        ),
        case(
            "an Admin pass of egress leaves it to the NetworkPolicy",
            vec![
                everywhere(begin(Some("Deny"), Some("Deny")), isolated),
                everywhere(change("Deny", "Pass"), &out),
            ],
        ),
        case(
            "an Admin pass of ingress without a NetworkPolicy leaves it to Baseline",
            vec![
                everywhere(begin(Some("Pass"), Some("Pass")), &both),
                everywhere(without(), "deny x/* > y/*; deny y/* > x/*"),
                everywhere(only(Some("Deny"), None), "deny y/* > x/*"),
            ],
        ),
        case(
            "an Admin pass of egress without a NetworkPolicy leaves it to Baseline",
            vec![
                everywhere(begin(Some("Pass"), Some("Pass")), &both),
                everywhere(without(), "deny x/* > y/*; deny y/* > x/*"),
                everywhere(only(None, Some("Deny")), "deny x/* > y/*"),
            ],
        ),
    ]
}

fn priorities() -> Vec<Case> {
    let two = |deny: (Option<&str>, Option<&str>), pass_priority: u32| {
        step()
            .cluster_policy("deny", &about_y("Admin", 50, deny.0, deny.1))
            .cluster_policy("pass", &about_y("Admin", pass_priority, Some("Pass"), Some("Pass")))
            .cluster_policy("default", &about_y("Baseline", 10, Some("Accept"), Some("Accept")))
            .cluster_policy("later", &about_y("Baseline", 20, Some("Deny"), Some("Deny")))
    };
    let pass_at =
        |priority| step().cluster_policy("pass", &about_y("Admin", priority, Some("Pass"), Some("Pass")));
    let (into, out) = ("deny y/* > x/*", "deny x/* > y/*");
    vec![
        case(
            "the lower Admin priority denies ingress, the rest is passed on",
            vec![everywhere(two((Some("Deny"), None), 60), into)],
        ),
        case(
            "the lower Admin priority denies egress, the rest is passed on",
            vec![everywhere(two((None, Some("Deny")), 60), out)],
        ),
        case(
            "a priority that is lowered comes first, and Baseline is asked",
            vec![
                everywhere(two((Some("Deny"), Some("Deny")), 60), &format!("{into}; {out}")),
                everywhere(pass_at(40), ""),
            ],
        ),
    ]
}

/// "Fail closed": an Accept rule with such a peer matches nothing, a Deny or Pass rule denies everything.
fn unknown_peers() -> Vec<Case> {
    let known = "{namespaces: {matchLabels: {ns: y}}}";
    let of_x = |action: &str, peers: &str| {
        let spec = format!(
            "{{tier: Admin, priority: 5, subject: {{namespaces: {{matchLabels: {{ns: x}}}}}}, \
             egress: [{{action: {action}, to: [{peers}]}}, {{action: Deny, to: [{known}]}}]}}"
        );
        step().cluster_policy("unknown", &spec)
    };
    let unknown = "{constellations: {matchLabels: {name: orion}}}";
    let both = format!("{known}, {unknown}");
    vec![
        case(
            "Accept with an unknown peer matches nothing",
            vec![everywhere(of_x("Accept", unknown), "deny x/* > y/*")],
        ),
        case(
            "Accept with an unknown peer does not match its known peers either",
            vec![everywhere(of_x("Accept", &both), "deny x/* > y/*")],
        ),
        case("Deny with an unknown peer denies all", vec![everywhere(of_x("Deny", &both), "deny x/* > *")]),
        case("Pass with an unknown peer denies all", vec![everywhere(of_x("Pass", unknown), "deny x/* > *")]),
    ]
}

fn ranges_and_all_ports() -> Vec<Case> {
    let of_x = |tier: &str, protocols: &str| {
        let spec = format!(
            "{{tier: {tier}, priority: 5, subject: {{pods: {{namespaceSelector: {{matchLabels: {{ns: x}}}}, \
             podSelector: {{matchLabels: {{pod: a}}}}}}}}, \
             ingress: [{{action: Deny, from: [{{namespaces: {{}}}}], protocols: [{protocols}]}}]}}"
        );
        step().cluster_policy("ranges", &spec)
    };
    let denied = "deny * > x/a";
    vec![
        case(
            "a range of ports of one protocol",
            vec![
                of_x("Admin", "{tcp: {destinationPort: {range: {start: 70, end: 80}}}}")
                    .expect(TCP, 80, denied)
                    .expect(TCP, 81, "")
                    .expect(UDP, 80, ""),
            ],
        ),
        case(
            "every port of one protocol",
            vec![
                of_x("Baseline", "{sctp: {}}")
                    .expect(SCTP, 80, denied)
                    .expect(SCTP, 81, denied)
                    .expect(TCP, 80, ""),
            ],
        ),
        case(
            "no protocols at all",
            vec![everywhere(
                step().cluster_policy(
                    "all",
                    "{tier: Admin, priority: 5, subject: {namespaces: {matchLabels: {ns: x}}}, \
                     ingress: [{action: Deny, from: [{namespaces: {}}]}]}",
                ),
                "deny * > x/*",
            )],
        ),
    ]
}
