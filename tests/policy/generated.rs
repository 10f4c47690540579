//! The 230 situations that policy-assistant's generator makes of one base policy: its subject, rules, peers, ports and
//! protocols varied one by one, changes of objects, contradicting policies, namespaces by name. Our own generator; the
//! expected tables are the oracle's, over all protocols, ports and both families.

use anyhow::{Result, ensure};

use crate::bed::Bed;
use crate::cases::{Action, Case, Step, case, run_list, step};
use crate::world::PodName;

/// A group's name, how many situations the list counts in it, and what makes them.
type Group = (&'static str, usize, fn() -> Vec<Case>);

const GROUPS: [Group; 9] = [
    ("target", 6, targets),
    ("rule", 4, rules),
    ("peer", 112, peers),
    ("port and protocol", 70, ports),
    ("example", 1, example),
    ("action", 6, actions),
    ("conflict", 16, conflicts),
    ("namespace", 2, namespaces),
    ("e2e", 13, e2e),
];

const POD_A: &str = "{matchLabels: {pod: a}}";
const POD_C: &str = "{matchLabels: {pod: c}}";
const PODS_A_B: &str = "{matchExpressions: [{key: pod, operator: In, values: [a, b]}]}";
const PODS_B_C: &str = "{matchExpressions: [{key: pod, operator: In, values: [b, c]}]}";
const NS_X: &str = "{matchLabels: {ns: x}}";
const NS_Y: &str = "{matchLabels: {ns: y}}";
const NS_X_Y: &str = "{matchExpressions: [{key: ns, operator: In, values: [x, y]}]}";
const NS_Y_Z: &str = "{matchExpressions: [{key: ns, operator: In, values: [y, z]}]}";
const DNS: &str = "{ports: [{protocol: UDP, port: 53}, {protocol: TCP, port: 53}]}";

/// Runs the list.
///
/// # Errors
/// A case fails.
pub fn run(bed: &mut Bed) -> Result<()> {
    let mut cases = Vec::new();
    for (group, count, make) in GROUPS {
        let made = make();
        ensure!(made.len() == count, "group {group} has {count} situations, not {}", made.len());
        cases.extend(made.into_iter().map(|case| Case { name: format!("{group}: {}", case.name), ..case }));
    }
    ensure!(cases.len() == 230, "the list has 230 situations, not {}", cases.len());
    run_list(bed, "policy-assistant's generator", &cases, false)
}

/// The base policy, before or after a variation.
struct Base {
    namespace: &'static str,
    subject: String,
    /// Peers and ports of the first rule; none: no rule at all.
    ingress: Option<(String, String)>,
    egress: Option<(String, String)>,
}

impl Base {
    fn new() -> Self {
        let peers = |pods: &str, namespaces: &str| {
            format!("{{podSelector: {pods}, namespaceSelector: {namespaces}}}")
        };
        let port = || "{protocol: TCP, port: 80}".to_owned();
        Self {
            namespace: "x",
            subject: POD_A.to_owned(),
            ingress: Some((peers(PODS_B_C, NS_X_Y), port())),
            egress: Some((peers(PODS_A_B, NS_Y_Z), port())),
        }
    }

    fn rule(&mut self, ingress: bool) -> &mut Option<(String, String)> {
        if ingress { &mut self.ingress } else { &mut self.egress }
    }

    fn with_peers(ingress: bool, peers: &str) -> Self {
        let mut base = Self::new();
        if let Some((own, _)) = base.rule(ingress) {
            peers.clone_into(own);
        }
        base
    }

    fn with_ports(ingress: bool, ports: &str) -> Self {
        let mut base = Self::new();
        if let Some((_, own)) = base.rule(ingress) {
            ports.clone_into(own);
        }
        base
    }

    fn spec(&self) -> String {
        let first = |word: &str, rule: &Option<(String, String)>| {
            rule.as_ref().map(|(peers, ports)| format!("{{{word}: [{peers}], ports: [{ports}]}}"))
        };
        let ingress = first("from", &self.ingress).unwrap_or_default();
        let mut egress = first("to", &self.egress).unwrap_or_default();
        if self.egress.is_some() {
            egress = format!("{egress}, {DNS}");
        }
        format!(
            "{{podSelector: {}, policyTypes: [Ingress, Egress], ingress: [{ingress}], egress: [{egress}]}}",
            self.subject
        )
    }

    fn step(&self) -> Step {
        step().policy(&format!("{}/base", self.namespace), &self.spec())
    }

    fn case(&self, name: &str) -> Case {
        case(name, vec![self.step()])
    }
}

fn direction(ingress: bool) -> &'static str {
    if ingress { "ingress" } else { "egress" }
}

fn targets() -> Vec<Case> {
    let in_namespace = |namespace| Base { namespace, ..Base::new() }.case(&format!("namespace {namespace}"));
    let mut cases: Vec<Case> = ["x", "y", "z"].map(in_namespace).into();
    let selectors = [("all pods", "{}"), ("a pod by label", POD_A), ("pods by expression", PODS_A_B)];
    let with_subject =
        |(name, selector): (&str, &str)| Base { subject: selector.to_owned(), ..Base::new() }.case(name);
    cases.extend(selectors.map(with_subject));
    cases
}

fn rules() -> Vec<Case> {
    let mut cases = Vec::new();
    for ingress in [false, true] {
        let mut none = Base::new();
        *none.rule(ingress) = None;
        cases.push(none.case(&format!("{}: deny all", direction(ingress))));
        let mut all = Base::new();
        *all.rule(ingress) = Some((String::new(), String::new()));
        cases.push(all.case(&format!("{}: allow all", direction(ingress))));
    }
    cases
}

/// A peer by name, as entries of a rule. Blocks come once per family.
fn single_peers() -> Vec<(&'static str, String)> {
    let pods = |parts: &str| format!("{{{parts}}}");
    vec![
        ("all pods of the own namespace", pods("podSelector: {}")),
        ("pods by label of the own namespace", pods(&format!("podSelector: {POD_C}"))),
        ("all namespaces", pods("namespaceSelector: {}")),
        ("all pods of all namespaces", pods("podSelector: {}, namespaceSelector: {}")),
        ("pods by label of all namespaces", pods(&format!("podSelector: {POD_C}, namespaceSelector: {{}}"))),
        ("a namespace by label", pods(&format!("namespaceSelector: {NS_X}"))),
        ("all pods of a namespace by label", pods(&format!("podSelector: {{}}, namespaceSelector: {NS_X}"))),
        (
            "pods by label of a namespace by label",
            pods(&format!("podSelector: {POD_C}, namespaceSelector: {NS_X}")),
        ),
        ("a block", "{ipBlock: {cidr: <z/c v4 24>}}, {ipBlock: {cidr: <z/c v6 120>}}".to_owned()),
        (
            "a block without a part of it",
            "{ipBlock: {cidr: <z/c v4 24>, except: [<z/c v4 30>]}}, \
             {ipBlock: {cidr: <z/c v6 120>, except: [<z/c v6 126>]}}"
                .to_owned(),
        ),
    ]
}

fn peers() -> Vec<Case> {
    let mut cases = Vec::new();
    for ingress in [true, false] {
        cases.push(Base::with_peers(ingress, "").case(&format!("{}: anybody", direction(ingress))));
        let peers = single_peers();
        for (number, (name, peer)) in peers.iter().enumerate() {
            cases.push(Base::with_peers(ingress, peer).case(&format!("{}: {name}", direction(ingress))));
            for (other_name, other) in &peers[number + 1..] {
                let both = format!("{peer}, {other}");
                let name = format!("{}: {name}, or {other_name}", direction(ingress));
                cases.push(Base::with_peers(ingress, &both).case(&name));
            }
        }
    }
    cases
}

fn ports() -> Vec<Case> {
    let mut lists = vec![String::new()];
    for protocol in ["", "protocol: TCP", "protocol: UDP", "protocol: SCTP"] {
        for port in ["", "port: 80", "port: 81"] {
            let parts: Vec<&str> = [protocol, port].into_iter().filter(|part| !part.is_empty()).collect();
            lists.push(format!("{{{}}}", parts.join(", ")));
        }
    }
    for protocol in ["TCP", "UDP", "SCTP"] {
        for port in [80, 81] {
            lists.push(format!("{{protocol: {protocol}, port: serve-{port}-{}}}", protocol.to_lowercase()));
        }
        for last in [80, 84] {
            lists.push(format!("{{protocol: {protocol}, port: 53, endPort: {last}}}"));
        }
    }
    // Names and numbers behind which nothing listens.
    for port in ["serve-81-udp", "serve-7981-udp", "7981"] {
        lists.push(format!("{{protocol: TCP, port: {port}}}"));
    }
    for pair in [
        "{}, {port: 80}",
        "{}, {port: serve-80-tcp}",
        "{}, {protocol: UDP}",
        "{port: 80}, {port: 81}",
        "{port: 80}, {port: serve-81-tcp}",
        "{port: 80}, {protocol: UDP, port: serve-81-udp}",
        "{protocol: UDP, port: 80}, {protocol: UDP, port: serve-81-udp}",
    ] {
        lists.push(pair.to_owned());
    }
    let mut cases = Vec::new();
    for ingress in [false, true] {
        for list in &lists {
            cases.push(Base::with_ports(ingress, list).case(&format!("{}: [{list}]", direction(ingress))));
        }
    }
    cases
}

/// Pods and a namespace that come and go under a policy with a named port.
fn example() -> Vec<Case> {
    let pod = PodName::new("w/a");
    let named = "{podSelector: {}, policyTypes: [Ingress], ingress: [{ports: [{port: serve-81-tcp}]}]}";
    let steps = vec![
        step().policy("x/named", named),
        step()
            .act(Action::Namespace("w".to_owned(), "ns=w".to_owned()))
            .act(Action::Pod(pod.clone(), "pod=a".to_owned())),
        step().act(Action::NoPod(pod)),
        step().act(Action::NoNamespace("w".to_owned())),
        step(),
    ];
    vec![case("a named port, while pods and a namespace come and go", steps)]
}

fn actions() -> Vec<Case> {
    let base = || Base::new().step();
    let name = PodName::new;
    let namespace = |name: &str, labels: &str| Action::Namespace(name.to_owned(), labels.to_owned());
    let from = |peer: &str| Base::with_peers(true, peer).step();
    let pod = |text: &str, labels: &str| Action::Pod(name(text), labels.to_owned());
    let relabel = |labels: &str| step().act(Action::PodLabels(name("y/b"), labels.to_owned()));
    vec![
        case("a policy comes and goes", vec![base(), step().act(Action::NoPolicy(name("x/base")))]),
        case(
            "a policy is changed",
            vec![base(), Base::with_ports(true, "{protocol: UDP, port: serve-81-udp}").step()],
        ),
        case(
            "a namespace with pods comes and goes",
            vec![
                base(),
                step().act(namespace("y-2", "ns=y")).act(pod("y-2/a", "pod=a")).act(pod("y-2/b", "pod=b")),
                step().act(Action::NoNamespace("y-2".to_owned())),
            ],
        ),
        case(
            "a namespace gets a label and loses it",
            vec![
                from("{namespaceSelector: {matchLabels: {new-ns: qrs}}}"),
                step().act(namespace("y", "ns=y,new-ns=qrs")),
                step().act(namespace("y", "ns=y")),
            ],
        ),
        case(
            "a pod comes and goes",
            vec![base(), step().act(pod("x/d", "pod=d")), step().act(Action::NoPod(name("x/d")))],
        ),
        case(
            "a pod gets a label and loses it",
            vec![
                from(&format!(
                    "{{podSelector: {{matchLabels: {{new-label: abc}}}}, namespaceSelector: {NS_Y_Z}}}"
                )),
                relabel("pod=b,new-label=abc"),
                relabel("pod=b"),
            ],
        ),
    ]
}

/// What one policy of a contradiction says.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Says {
    Nothing,
    All,
    AllPods,
    AllAddresses,
    NoAddress,
    NoPod,
}

impl Says {
    fn rules(self, ingress: bool) -> String {
        let word = if ingress { "from" } else { "to" };
        let peers = match self {
            Self::Nothing => return "[]".to_owned(),
            Self::All => return "[{}]".to_owned(),
            Self::AllPods => "{namespaceSelector: {}}",
            Self::AllAddresses => "{ipBlock: {cidr: 0.0.0.0/0}}, {ipBlock: {cidr: '::/0'}}",
            Self::NoAddress => "{ipBlock: {cidr: 0.0.0.0/31}}, {ipBlock: {cidr: '::/127'}}",
            Self::NoPod => "{namespaceSelector: {matchLabels: {this-will-never-happen: qrs123}}}",
        };
        format!("[{{{word}: [{peers}]}}]")
    }

    fn name(self) -> &'static str {
        match self {
            Self::Nothing => "nothing",
            Self::All => "everything",
            Self::AllPods => "all pods",
            Self::AllAddresses => "all addresses",
            Self::NoAddress => "addresses of nobody",
            Self::NoPod => "pods that do not exist",
        }
    }
}

/// The sender is x/b, the receiver y/c; ingress alone is tried on x/b too.
fn conflicts() -> Vec<Case> {
    let policy = |to: Step, number: usize, namespace: &str, pod: &str, ingress: bool, says: Says| {
        let (kind, word) = if ingress { ("Ingress", "ingress") } else { ("Egress", "egress") };
        let spec = format!(
            "{{podSelector: {{matchLabels: {{pod: {pod}}}}}, policyTypes: [{kind}], {word}: {}}}",
            says.rules(ingress)
        );
        to.policy(&format!("{namespace}/p{number}-{word}"), &spec)
    };
    let with_dns = |to: Step| {
        let spec =
            format!("{{podSelector: {{matchLabels: {{pod: b}}}}, policyTypes: [Egress], egress: [{DNS}]}}");
        to.policy("x/allow-dns", &spec)
    };
    let mut cases = Vec::new();
    for (out, into) in [(Says::Nothing, Says::All), (Says::All, Says::Nothing)] {
        let steps = policy(policy(step(), 1, "x", "b", false, out), 2, "y", "c", true, into);
        let name = format!("{} from the sender, {} to the receiver", out.name(), into.name());
        cases.push(case(&name, vec![with_dns(steps)]));
    }
    let pairs = [
        (Says::Nothing, Says::All),
        (Says::Nothing, Says::AllPods),
        (Says::Nothing, Says::AllAddresses),
        (Says::NoAddress, Says::AllPods),
        (Says::NoPod, Says::AllAddresses),
    ];
    for ingress in [false, true] {
        for (one, other) in pairs {
            let (namespace, pod) = if ingress && other == Says::All { ("y", "c") } else { ("x", "b") };
            let steps =
                policy(policy(step(), 1, namespace, pod, ingress, one), 2, namespace, pod, ingress, other);
            let name = format!("{}: {} and {}", direction(ingress), one.name(), other.name());
            cases.push(case(&name, vec![if ingress { steps } else { with_dns(steps) }]));
        }
        for only in [Says::NoAddress, Says::NoPod] {
            let steps = policy(step(), 1, "x", "b", ingress, only);
            let name = format!("{}: only {}", direction(ingress), only.name());
            cases.push(case(&name, vec![if ingress { steps } else { with_dns(steps) }]));
        }
    }
    cases
}

fn namespaces() -> Vec<Case> {
    let peer = "{namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: z}}}";
    let of = |ingress| {
        Base::with_peers(ingress, peer)
            .case(&format!("{}: by the label that every namespace has", direction(ingress)))
    };
    vec![of(true), of(false)]
}

/// Situations of the end-to-end list, here over all protocols, ports and both families.
fn e2e() -> Vec<Case> {
    let mut cases = e2e_of_one_step();
    cases.extend(e2e_of_several_steps());
    cases
}

fn ingress_of(subject: &str, rules: &str) -> String {
    format!("{{podSelector: {subject}, policyTypes: [Ingress], ingress: {rules}}}")
}

fn e2e_of_one_step() -> Vec<Case> {
    let one = |name: &str, policies: &[(&str, String)]| {
        let all = policies.iter().fold(step(), |step, (name, spec)| step.policy(name, spec));
        case(name, vec![all])
    };
    let x_a = format!("{{namespaceSelector: {NS_X}, podSelector: {POD_A}}}");
    let y_a = format!("{{namespaceSelector: {NS_Y}, podSelector: {POD_A}}}");
    let not_x = format!(
        "[{{from: [{{namespaceSelector: {{matchExpressions: [{{key: ns, operator: NotIn, values: [x]}}]}}, \
         podSelector: {PODS_B_C}}}]}}]"
    );
    let both = format!(
        "{{podSelector: {POD_A}, policyTypes: [Ingress, Egress], \
         ingress: [{{from: [{{podSelector: {{matchLabels: {{pod: b}}}}}}]}}], \
         egress: [{{ports: [{{port: 80}}, {{protocol: UDP, port: 53}}]}}]}}"
    );
    let to_y_a = format!(
        "{{podSelector: {POD_A}, policyTypes: [Egress], \
         egress: [{{to: [{y_a}]}}, {{ports: [{{protocol: UDP, port: 53}}]}}]}}"
    );
    let from_x_a = format!("[{{from: [{x_a}]}}]");
    let y_b = "{matchLabels: {pod: b}}";
    vec![
        one("deny all ingress", &[("x/none", ingress_of("{}", "[]"))]),
        one(
            "deny everything but DNS",
            &[("x/none", format!("{{podSelector: {{}}, policyTypes: [Egress, Ingress], egress: [{DNS}]}}"))],
        ),
        one("pods and namespaces by expression", &[("x/not-x", ingress_of(POD_A, &not_x))]),
        one("ingress and egress together", &[("x/both", both)]),
        one(
            "egress denied although ingress is allowed",
            &[("x/out", to_y_a), ("y/a", ingress_of(POD_A, &from_x_a)), ("y/b", ingress_of(y_b, &from_x_a))],
        ),
    ]
}

fn e2e_of_several_steps() -> Vec<Case> {
    let from_y = |port: u16| {
        let rules =
            format!("[{{from: [{{namespaceSelector: {NS_Y}}}], ports: [{{port: {port}, protocol: TCP}}]}}]");
        ingress_of(POD_A, &rules)
    };
    let from = |peer: &str| ingress_of(POD_A, &format!("[{{from: [{peer}]}}]"));
    let relabel =
        |pod: &str, labels: &str| step().act(Action::PodLabels(PodName::new(pod), labels.to_owned()));
    let isolated = "{podSelector: {matchLabels: {target: isolated}}, policyTypes: [Ingress]}";
    let nothing = "{podSelector: {}, policyTypes: [Ingress, Egress]}";
    vec![
        case(
            "policies add up",
            vec![step().policy("x/p81", &from_y(81)), step(), step().policy("x/p80", &from_y(80))],
        ),
        case("allow all", vec![step().policy("x/all", &ingress_of("{}", "[{}]")), step()]),
        case(
            "one named port",
            vec![step().policy("x/named", &ingress_of("{}", "[{ports: [{port: serve-81-tcp}]}]")), step()],
        ),
        case(
            "a policy is changed",
            vec![
                step().policy("x/p", &ingress_of("{}", "[{}]")),
                step().policy("x/p", &ingress_of("{}", "[]")),
            ],
        ),
        case(
            "a namespace gets the label of a peer",
            vec![
                step().policy("x/p", &from("{namespaceSelector: {matchLabels: {ns2: updated}}}")),
                step().act(Action::Namespace("y".to_owned(), "ns=y,ns2=updated".to_owned())),
            ],
        ),
        case(
            "a pod gets the label of a peer",
            vec![
                step().policy("x/p", &from("{podSelector: {matchLabels: {pod: b, pod2: updated}}}")),
                relabel("x/b", "pod=b,pod2=updated"),
            ],
        ),
        case(
            "a pod gets the label of a subject",
            vec![step().policy("x/p", isolated), relabel("x/a", "target=isolated")],
        ),
        case(
            "a deleted policy",
            vec![step().policy("x/p", nothing), step().act(Action::NoPolicy(PodName::new("x/p")))],
        ),
    ]
}
