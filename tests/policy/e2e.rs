//! The situations of Kubernetes' own end-to-end list for NetworkPolicy: 42 over TCP, 3 over UDP, 3 over SCTP. Our own
//! policies and names; each step's table is written by hand, held against the oracle, tried with a whole table of packets,
//! and, for TCP and UDP, with real connections.

use anyhow::{Result, ensure};

use crate::bed::Bed;
use crate::cases::{Action, Case, Step, case, run_list, step};
use crate::world::{PodName, Protocol};

const TCP: Protocol = Protocol::Tcp;
const UDP: Protocol = Protocol::Udp;
const SCTP: Protocol = Protocol::Sctp;

/// Runs the list.
///
/// # Errors
/// A case fails.
pub fn run(bed: &mut Bed) -> Result<()> {
    let cases = cases();
    ensure!(cases.len() == 48, "the list has 48 situations, not {}", cases.len());
    run_list(bed, "Kubernetes' e2e list", &cases, true)
}

fn cases() -> Vec<Case> {
    let mut cases = whole_namespaces();
    cases.extend(peers());
    cases.extend(peers_of_other_namespaces());
    cases.extend(ports());
    cases.extend(changes());
    cases.extend(egress());
    cases.extend(blocks());
    cases.extend(protocols());
    for protocol in [UDP, SCTP] {
        cases.extend(of_one_protocol(protocol));
    }
    cases
}

/// A policy for pod x/a, ingress.
fn for_x_a(rules: &str) -> String {
    format!("{{podSelector: {{matchLabels: {{pod: a}}}}, policyTypes: [Ingress], ingress: {rules}}}")
}

/// A policy for all of namespace x, ingress.
fn for_x(rules: &str) -> String {
    format!("{{podSelector: {{}}, policyTypes: [Ingress], ingress: {rules}}}")
}

fn egress_of_x_a(rules: &str) -> String {
    format!("{{podSelector: {{matchLabels: {{pod: a}}}}, policyTypes: [Egress], egress: {rules}}}")
}

fn egress_of_x(rules: &str) -> String {
    format!("{{podSelector: {{}}, policyTypes: [Egress], egress: {rules}}}")
}

const NAME_OF_Y: &str = "namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: y}}";
const NOT_X: &str = "namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: NotIn, values: [x]}]}";
const POD_B: &str = "podSelector: {matchLabels: {pod: b}}";

/// One policy `x/only` and one table.
fn simple(name: &str, spec: &str, protocol: Protocol, port: u16, table: &str) -> Case {
    case(name, vec![step().policy("x/only", spec).expect(protocol, port, table)])
}

fn whole_namespaces() -> Vec<Case> {
    let everything = "{podSelector: {}, policyTypes: [Ingress, Egress]}";
    let to_all = "[{from: [{podSelector: {}, namespaceSelector: {}}]}]";
    vec![
        simple("a namespace that denies all ingress", &for_x("[]"), TCP, 80, "deny * > x/*"),
        simple("a namespace that denies everything", everything, TCP, 80, "deny * > x/*; deny x/* > *"),
        simple(
            "a namespace that admits its own pods only",
            &for_x("[{from: [{podSelector: {}}]}]"),
            TCP,
            80,
            "deny y/* > x/*; deny z/* > x/*",
        ),
        case(
            "one target opened in a namespace that denies all ingress",
            vec![step().policy("x/none", &for_x("[]")).policy("x/to-a", &for_x_a(to_all)).expect(
                TCP,
                80,
                "deny * > x/b; deny * > x/c",
            )],
        ),
        case(
            "a policy that allows all",
            vec![step().policy("x/all", &for_x("[{}]")).expect(TCP, 80, "").expect(TCP, 81, "")],
        ),
        case(
            "a deleted policy is enforced no longer",
            vec![
                step().policy("x/none", everything).expect(TCP, 80, "deny * > x/*; deny x/* > *"),
                step().act(Action::NoPolicy(PodName::new("x/none"))).expect(TCP, 80, ""),
            ],
        ),
    ]
}

fn peers() -> Vec<Case> {
    let in_b = "podSelector: {matchExpressions: [{key: pod, operator: In, values: [b]}]}";
    let any = format!("[{{from: [{{{POD_B}}}, {{podSelector: {{matchLabels: {{pod: c}}}}}}]}}]");
    vec![
        simple(
            "a pod of the same namespace by label",
            &for_x_a(&format!("[{{from: [{{{POD_B}}}]}}]")),
            TCP,
            80,
            "deny * > x/a; allow x/b > x/a",
        ),
        simple(
            "a pod of the same namespace by expression",
            &for_x_a(&format!("[{{from: [{{{in_b}}}]}}]")),
            TCP,
            80,
            "deny * > x/a; allow x/b > x/a",
        ),
        simple(
            "any of several pod selectors",
            &for_x_a(&any),
            TCP,
            80,
            "deny * > x/a; allow x/b > x/a; allow x/c > x/a",
        ),
        simple("pods of all namespaces", &for_x_a("[{from: [{namespaceSelector: {}}]}]"), TCP, 80, ""),
    ]
}

fn peers_of_other_namespaces() -> Vec<Case> {
    let in_y = "namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: In, values: [y]}]}";
    let b_or_c = "podSelector: {matchExpressions: [{key: pod, operator: In, values: [b, c]}]}";
    let only_y = "deny x/* > x/a; deny z/* > x/a";
    let from = |peers: &str| for_x_a(&format!("[{{from: [{peers}]}}]"));
    vec![
        simple("another namespace by label", &from(&format!("{{{NAME_OF_Y}}}")), TCP, 80, only_y),
        simple("another namespace by expression", &from(&format!("{{{in_y}}}")), TCP, 80, only_y),
        simple(
            "another namespace by the label that every namespace has",
            &from("{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: y}}}"),
            TCP,
            80,
            only_y,
        ),
        simple(
            "another namespace or a pod of the own one",
            &from(&format!("{{{NOT_X}}}, {{{POD_B}}}")),
            TCP,
            80,
            "deny x/* > x/a; allow x/b > x/a",
        ),
        simple(
            "a pod by label in other namespaces",
            &from(&format!("{{{NOT_X}, {POD_B}}}")),
            TCP,
            80,
            "deny * > x/a; allow y/b > x/a; allow z/b > x/a",
        ),
        simple(
            "several pods by expression in other namespaces",
            &from(&format!("{{{NOT_X}, {b_or_c}}}")),
            TCP,
            80,
            "deny x/* > x/a; deny y/a > x/a; deny z/a > x/a",
        ),
        simple(
            "one pod of one other namespace",
            &from(&format!("{{{NAME_OF_Y}, podSelector: {{matchLabels: {{pod: a}}}}}}")),
            TCP,
            80,
            "deny * > x/a; allow y/a > x/a",
        ),
    ]
}

fn ports() -> Vec<Case> {
    let y_at = |port: &str| {
        for_x_a(&format!("[{{from: [{{{NAME_OF_Y}}}], ports: [{{protocol: TCP, port: {port}}}]}}]"))
    };
    let only_y = "deny x/* > x/a; deny z/* > x/a";
    vec![
        simple("one port for another namespace", &y_at("81"), TCP, 81, only_y),
        case(
            "policies for one pod add up",
            vec![
                step().policy("x/port-81", &y_at("81")).expect(TCP, 81, only_y).expect(
                    TCP,
                    80,
                    "deny * > x/a",
                ),
                step().policy("x/port-80", &y_at("80")).expect(TCP, 80, only_y),
            ],
        ),
        case(
            "one named port for everybody",
            vec![
                step()
                    .policy("x/named", &for_x("[{ports: [{port: serve-81-tcp}]}]"))
                    .expect(TCP, 81, "")
                    .expect(TCP, 80, "deny * > x/*"),
            ],
        ),
        case(
            "one named port for another namespace",
            vec![step().policy("x/named", &y_at("serve-80-tcp")).expect(TCP, 80, only_y).expect(
                TCP,
                81,
                "deny * > x/a",
            )],
        ),
        case(
            "egress to one named port",
            vec![
                step()
                    // Nodes document no ports.
                    .policy("x/named", &egress_of_x("[{ports: [{port: serve-80-tcp}]}]"))
                    .expect(TCP, 80, "deny x/* > nodes")
                    .expect(TCP, 81, "deny x/* > *"),
            ],
        ),
        case(
            "ingress to everybody beats ingress to one port",
            vec![
                step().policy("x/port-80", &for_x("[{ports: [{port: 80}]}]")).expect(TCP, 81, "deny * > x/*"),
                step().policy("x/all", &for_x("[{}]")).expect(TCP, 81, ""),
            ],
        ),
        case(
            "egress to everybody beats egress to one port",
            vec![
                step().policy("x/port-80", &egress_of_x("[{ports: [{port: 80}]}]")).expect(
                    TCP,
                    81,
                    "deny x/* > *",
                ),
                step().policy("x/all", &egress_of_x("[{}]")).expect(TCP, 81, ""),
            ],
        ),
    ]
}

fn changes() -> Vec<Case> {
    let none_to_a = "deny * > x/a";
    let updated_pod = "[{from: [{podSelector: {matchLabels: {pod: b, pod2: updated}}}]}]";
    let pod = |name: &str, labels: &str| Action::PodLabels(PodName::new(name), labels.to_owned());
    vec![
        case(
            "a policy that is changed",
            vec![
                step().policy("x/changing", &for_x("[{}]")).expect(TCP, 81, ""),
                step().policy("x/changing", &for_x("[]")).expect(TCP, 81, "deny * > x/*"),
            ],
        ),
        case(
            "a namespace that gets the label of a peer",
            vec![
                step()
                    .policy(
                        "x/ns2",
                        &for_x_a("[{from: [{namespaceSelector: {matchLabels: {ns2: updated}}}]}]"),
                    )
                    .expect(TCP, 80, none_to_a),
                step().act(Action::Namespace("y".to_owned(), "ns=y,ns2=updated".to_owned())).expect(
                    TCP,
                    80,
                    "deny * > x/a; allow y/* > x/a",
                ),
            ],
        ),
        case(
            "a pod that gets the label of a peer",
            vec![
                step().policy("x/pod2", &for_x_a(updated_pod)).expect(TCP, 80, none_to_a),
                step().act(pod("x/b", "pod=b,pod2=updated")).expect(TCP, 80, "deny * > x/a; allow x/b > x/a"),
            ],
        ),
        case(
            "a pod that gets the label of a subject",
            vec![
                step()
                    .policy(
                        "x/target",
                        "{podSelector: {matchLabels: {target: isolated}}, policyTypes: [Ingress]}",
                    )
                    .expect(TCP, 80, ""),
                step().act(pod("x/a", "pod=a,target=isolated")).expect(TCP, 80, none_to_a),
            ],
        ),
    ]
}

fn egress() -> Vec<Case> {
    let to_y_a = format!("[{{to: [{{{NAME_OF_Y}, podSelector: {{matchLabels: {{pod: a}}}}}}]}}]");
    let from_x_a = "ingress: [{from: [{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: x}}, \
                    podSelector: {matchLabels: {pod: a}}}]}]";
    let of_y = |pod: &str| {
        format!("{{podSelector: {{matchLabels: {{pod: {pod}}}}}, policyTypes: [Ingress], {from_x_a}}}")
    };
    let not_y = "[{to: [{namespaceSelector: {matchExpressions: [{key: kubernetes.io/metadata.name, operator: NotIn, values: [y]}]}}]}]";
    let both = format!(
        "{{podSelector: {{matchLabels: {{pod: a}}}}, policyTypes: [Ingress, Egress], \
         ingress: [{{from: [{{{POD_B}}}]}}], egress: [{{ports: [{{port: 80}}]}}]}}"
    );
    vec![
        simple("a pod that may send nothing", &egress_of_x_a("[]"), TCP, 80, "deny x/a > *"),
        simple("a namespace that may send nothing", &egress_of_x("[]"), TCP, 80, "deny x/* > *"),
        simple(
            "egress to one pod of another namespace",
            &egress_of_x_a(&to_y_a),
            TCP,
            80,
            "deny x/a > *; allow x/a > y/a",
        ),
        simple(
            "egress to all namespaces but one by the label that every namespace has",
            &egress_of_x_a(not_y),
            TCP,
            80,
            "deny x/a > y/*; deny x/a > nodes",
        ),
        case(
            "ingress and egress in one policy",
            vec![step().policy("x/both", &both).expect(TCP, 80, "deny * > x/a; allow x/b > x/a").expect(
                TCP,
                81,
                "deny * > x/a; deny x/a > *; allow x/b > x/a",
            )],
        ),
        case(
            "egress is denied although the server's ingress allows it",
            vec![
                step()
                    .policy("x/to-y-a", &egress_of_x_a(&to_y_a))
                    .policy("y/a-from-x-a", &of_y("a"))
                    .policy("y/b-from-x-a", &of_y("b"))
                    .expect(TCP, 80, "deny x/a > *; deny * > y/a; deny * > y/b; allow x/a > y/a"),
            ],
        ),
        case(
            "ingress and egress of one pod are independent",
            vec![
                step().policy("x/out", &egress_of_x_a("[{}]")).expect(TCP, 80, ""),
                step().policy("x/in", &for_x_a("[]")).expect(TCP, 80, "deny * > x/a"),
            ],
        ),
    ]
}

/// A block of one family says nothing about the other: both families get a block of their own.
fn blocks() -> Vec<Case> {
    let to_b = |pod: &str| {
        format!("[{{to: [{{ipBlock: {{cidr: <{pod} v4 32>}}}}, {{ipBlock: {{cidr: <{pod} v6 128>}}}}]}}]")
    };
    let but_b = "[{to: [{ipBlock: {cidr: <x/a v4 4>, except: [<x/b v4 32>]}}, \
                 {ipBlock: {cidr: <x/a v6 4>, except: [<x/b v6 128>]}}]}]";
    // 0.0.0.0/4 holds the pods but not the nodes, f000::/4 holds both.
    let but_b = || {
        let step = step().policy("x/block", &egress_of_x_a(but_b));
        let step = step.expect_family(false, TCP, 80, "deny x/a > x/b; deny x/a > nodes");
        step.expect_family(true, TCP, 80, "deny x/a > x/b")
    };
    let only_b = "deny x/a > *; allow x/a > x/b";
    vec![
        simple(
            "egress to one address",
            &egress_of_x_a(&to_b("y/b")),
            TCP,
            80,
            "deny x/a > *; allow x/a > y/b",
        ),
        case("egress to a block without one address of it", vec![but_b()]),
        case(
            "an address that one rule excepts and another names",
            vec![but_b(), step().policy("x/block", &egress_of_x_a(&to_b("x/b"))).expect(TCP, 80, only_b)],
        ),
    ]
}

fn protocols() -> Vec<Case> {
    let a_at = |protocol: &str, port: u16| {
        for_x_a(&format!("[{{ports: [{{protocol: {protocol}, port: {port}}}]}}]"))
    };
    vec![
        case(
            "any port of one protocol",
            vec![
                step().policy("x/tcp", &for_x_a("[{ports: [{protocol: TCP}]}]")).expect(TCP, 80, "").expect(
                    UDP,
                    80,
                    "deny * > x/a",
                ),
            ],
        ),
        case(
            "a rule for SCTP opens nothing for TCP",
            vec![step().policy("x/none", &for_x("[]")).policy("x/sctp", &a_at("SCTP", 81)).expect(
                TCP,
                81,
                "deny * > x/*",
            )],
        ),
        simple("a rule for SCTP isolates the pod", &a_at("SCTP", 80), TCP, 81, "deny * > x/a"),
        simple("a rule for UDP opens nothing for TCP", &a_at("UDP", 81), TCP, 81, "deny * > x/a"),
    ]
}

/// The three situations that are tried over every transport.
fn of_one_protocol(protocol: Protocol) -> Vec<Case> {
    let word = protocol.word();
    let at_81 = for_x_a(&format!("[{{from: [{{{NAME_OF_Y}}}], ports: [{{protocol: {word}, port: 81}}]}}]"));
    let from_y_a =
        for_x_a(&format!("[{{from: [{{{NAME_OF_Y}, podSelector: {{matchLabels: {{pod: a}}}}}}]}}]"));
    let first = |name: &str, spec: &str, port: u16, table: &str| -> Case {
        let only: Step = step().policy("x/only", spec).expect(protocol, port, table);
        case(&format!("{name} ({word})"), vec![only])
    };
    vec![
        first("a namespace that denies all ingress", &for_x("[]"), 80, "deny * > x/*"),
        first("one port for another namespace", &at_81, 81, "deny x/* > x/a; deny z/* > x/a"),
        first("one pod of one other namespace", &from_y_a, 80, "deny * > x/a; allow y/a > x/a"),
    ]
}
