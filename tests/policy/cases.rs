//! Cases of the tables: what is changed step by step, and what is expected after each step.

use std::fmt::Write as _;

use anyhow::{Context, Result, bail, ensure};
use ipnetwork::IpNetwork;

use crate::bed::Bed;
use crate::connects;
use crate::oracle::{End, Question, allows};
use crate::world::{PodName, Protocol, World, labels};

/// How many mismatches of a case are printed.
const MISMATCHES_PRINTED: usize = 6;

/// One situation.
pub struct Case {
    /// What it shows.
    pub name: String,
    /// One after another.
    pub steps: Vec<Step>,
}

/// A change and what holds after it.
#[derive(Default)]
pub struct Step {
    actions: Vec<Action>,
    expected: Vec<Expected>,
}

/// One change.
#[derive(Debug, Clone)]
pub enum Action {
    /// A namespaced policy, added or replaced: namespace/name and its spec as YAML.
    Policy(PodName, String),
    /// It is deleted.
    NoPolicy(PodName),
    /// A cluster-scoped policy, added or replaced.
    ClusterPolicy(String, String),
    /// A namespace, added or with other labels.
    Namespace(String, String),
    /// A namespace is deleted, with its pods.
    NoNamespace(String),
    /// A pod is added.
    Pod(PodName, String),
    /// A pod's labels are replaced.
    PodLabels(PodName, String),
    /// A pod is deleted.
    NoPod(PodName),
}

/// What somebody thought should hold for one protocol and port, written by hand.
struct Expected {
    protocol: Protocol,
    port: u16,
    table: String,
    /// Both families, or only one.
    v6: Option<bool>,
}

/// What was done, for the summary line.
#[derive(Debug, Default, Clone, Copy)]
pub struct Tally {
    /// Cases.
    pub cases: usize,
    /// Steps of all cases.
    pub steps: usize,
    /// Cells of tables that were written by hand and agree with the oracle.
    pub by_hand: usize,
    /// Real TCP connections and UDP exchanges.
    pub connections: usize,
}

/// A case of steps.
#[must_use]
pub fn case(name: &str, steps: Vec<Step>) -> Case {
    Case { name: name.to_owned(), steps }
}

/// A step without anything.
#[must_use]
pub fn step() -> Step {
    Step::default()
}

impl Step {
    /// Adds or replaces a policy: `namespace/name` and its spec as YAML.
    ///
    /// In the spec `<x/a v4 24>` stands for the range of that length that holds the pod's address.
    #[must_use]
    pub fn policy(self, name: &str, spec: &str) -> Self {
        self.act(Action::Policy(PodName::new(name), spec.to_owned()))
    }

    /// Adds or replaces a cluster-scoped policy; its spec as for [`Step::policy`].
    #[must_use]
    pub fn cluster_policy(self, name: &str, spec: &str) -> Self {
        self.act(Action::ClusterPolicy(name.to_owned(), spec.to_owned()))
    }

    /// Any change.
    #[must_use]
    pub fn act(mut self, action: Action) -> Self {
        self.actions.push(action);
        self
    }

    /// Expects a table for one protocol and port: first everything is open, then each part `deny FROM > TO` or
    /// `allow FROM > TO` is applied; FROM and TO are pods, `x/*` or `*`, and TO may be `nodes`, which `*` means too.
    #[must_use]
    pub fn expect(mut self, protocol: Protocol, port: u16, table: &str) -> Self {
        self.expected.push(Expected { protocol, port, table: table.to_owned(), v6: None });
        self
    }

    /// The same for one family only.
    #[must_use]
    pub fn expect_family(mut self, v6: bool, protocol: Protocol, port: u16, table: &str) -> Self {
        self.expected.push(Expected { protocol, port, table: table.to_owned(), v6: Some(v6) });
        self
    }
}

impl Expected {
    /// Whether the table lets `from` reach `to`.
    fn allows(&self, from: &PodName, to: &End) -> Result<bool> {
        let mut open = true;
        for part in self.table.split(';').map(str::trim).filter(|part| !part.is_empty()) {
            let (verb, rest) =
                part.split_once(' ').with_context(|| format!("{part:?} is no part of a table"))?;
            let (source, target) =
                rest.split_once('>').with_context(|| format!("{part:?} lacks an arrow"))?;
            if matches_pod(source.trim(), from) && matches(target.trim(), to) {
                open = match verb {
                    "deny" => false,
                    "allow" => true,
                    _ => bail!("{verb:?} is neither deny nor allow"),
                };
            }
        }
        Ok(open)
    }

    fn families(&self) -> impl Iterator<Item = bool> {
        [false, true].into_iter().filter(|v6| self.v6.is_none_or(|only| only == *v6))
    }
}

fn matches(pattern: &str, end: &End) -> bool {
    match end {
        End::Pod(pod) => matches_pod(pattern, pod),
        End::Node(_) => pattern == "*" || pattern == "nodes",
    }
}

/// Whether a pattern of a table names a pod.
pub fn matches_pod(pattern: &str, pod: &PodName) -> bool {
    pattern == "*"
        || pattern.strip_suffix("/*").is_some_and(|namespace| namespace == pod.namespace)
        || pattern == pod.to_string()
}

/// Runs a list of cases, prints what it was and fails with every case that failed. `real`: also real connections, for the
/// tables written by hand.
///
/// # Errors
/// A case fails.
pub fn run_list(bed: &mut Bed, list: &str, cases: &[Case], real: bool) -> Result<()> {
    let (packets, repeated) = (bed.prober.packets, bed.prober.repeated);
    let servers = real.then(|| connects::Servers::start(bed)).transpose()?;
    let mut tally = Tally::default();
    let mut failed = Vec::new();
    for case in cases {
        tally.cases += 1;
        if let Err(error) = run_case(bed, case, servers.as_ref(), &mut tally) {
            println!("{list}: {}: {error:#}", case.name);
            failed.push(case.name.as_str());
        }
        bed.detach_extra()?;
    }
    println!(
        "{list}: {} cases, {} steps, {} probe packets ({} tables sent again), {} cells by hand, {} real connections",
        tally.cases,
        tally.steps,
        bed.prober.packets - packets,
        bed.prober.repeated - repeated,
        tally.by_hand,
        tally.connections
    );
    ensure!(failed.is_empty(), "{} of {} cases failed: {}", failed.len(), cases.len(), failed.join(", "));
    Ok(())
}

fn run_case(
    bed: &mut Bed,
    case: &Case,
    servers: Option<&connects::Servers>,
    tally: &mut Tally,
) -> Result<()> {
    let mut world = bed.base();
    for (number, step) in case.steps.iter().enumerate() {
        tally.steps += 1;
        let label = format!("{} (step {})", case.name, number + 1);
        for action in &step.actions {
            apply(bed, &mut world, action).with_context(|| label.clone())?;
        }
        for expected in &step.expected {
            tally.by_hand += compare_by_hand(&world, expected).with_context(|| label.clone())?;
        }
        bed.show(&world).with_context(|| label.clone())?;
        let mismatches = bed.compare(&label, &world)?;
        if !mismatches.is_empty() {
            bail!(describe(&mismatches.iter().map(ToString::to_string).collect::<Vec<_>>(), &world)?);
        }
        let Some(servers) = servers else { continue };
        for expected in step.expected.iter().filter(|expected| expected.protocol != Protocol::Sctp) {
            let wrong = connect_all(bed, servers, &world, expected, tally)?;
            ensure!(wrong.is_empty(), "{label}: {}", describe(&wrong, &world)?);
        }
    }
    Ok(())
}

fn apply(bed: &mut Bed, world: &mut World, action: &Action) -> Result<()> {
    match action {
        Action::Policy(name, spec) => world.put_policy(name, &fill(world, spec)?)?,
        Action::NoPolicy(name) => {
            world.policies.remove(name).with_context(|| format!("there is no policy {name}"))?;
        }
        Action::ClusterPolicy(name, spec) => world.put_cluster_policy(name, &fill(world, spec)?)?,
        Action::Namespace(name, text) => {
            world.namespaces.insert(name.clone(), labels(text));
        }
        Action::NoNamespace(name) => {
            let pods: Vec<PodName> =
                world.pods.keys().filter(|pod| pod.namespace == *name).cloned().collect();
            for pod in pods {
                apply(bed, world, &Action::NoPod(pod))?;
            }
            world.namespaces.remove(name).with_context(|| format!("there is no namespace {name}"))?;
        }
        Action::Pod(name, text) => bed.attach(world, name, text)?,
        Action::PodLabels(name, text) => {
            world.pods.get_mut(name).with_context(|| format!("there is no pod {name}"))?.labels =
                labels(text);
        }
        Action::NoPod(name) => {
            bed.detach(name)?;
            world.pods.remove(name);
        }
    }
    Ok(())
}

/// Puts ranges into a spec: `<x/a v4 24>`.
///
/// # Errors
/// What stands between the brackets is no such range.
pub fn fill(world: &World, spec: &str) -> Result<String> {
    let mut parts = spec.split('<');
    let mut text = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        let (inside, rest) = part.split_once('>').context("a < without its >")?;
        let words: Vec<&str> = inside.split(' ').collect();
        let [pod, family, prefix] = words.as_slice() else { bail!("<{inside}> is no range of a pod") };
        let pod = world.pods.get(&PodName::new(pod)).with_context(|| format!("there is no pod {pod}"))?;
        let range = IpNetwork::new(pod.addresses[usize::from(*family == "v6")], prefix.parse()?)?;
        let _ = write!(text, "{}/{}{rest}", range.network(), range.prefix());
    }
    Ok(text)
}

/// Holds a table that was written by hand against the oracle; one of the two may be wrong, and then nothing is proven.
fn compare_by_hand(world: &World, expected: &Expected) -> Result<usize> {
    let pods = world.pods.iter().map(|(name, pod)| (End::Pod(name.clone()), pod.addresses.as_slice()));
    let nodes = world.nodes.iter().map(|(name, node)| (End::Node(name.clone()), node.addresses.as_slice()));
    let targets: Vec<_> = pods.chain(nodes).collect();
    let mut cells = 0;
    for v6 in expected.families() {
        for (from, source) in &world.pods {
            for (to, addresses) in targets.iter().filter(|(to, _)| *to != End::Pod(from.clone())) {
                let question = Question {
                    source: from,
                    target: to,
                    target_address: addresses[usize::from(v6)],
                    source_address: source.addresses[usize::from(v6)],
                    protocol: expected.protocol,
                    port: expected.port,
                };
                let (hand, oracle) = (expected.allows(from, to)?, allows(world, &question));
                ensure!(
                    hand == oracle,
                    "{from} -> {to:?}:{}/{} over IPv{}: the table says {hand}, the oracle {oracle}",
                    expected.port,
                    expected.protocol.word(),
                    if v6 { 6 } else { 4 }
                );
                cells += 1;
            }
        }
    }
    Ok(cells)
}

fn connect_all(
    bed: &Bed,
    servers: &connects::Servers,
    world: &World,
    expected: &Expected,
    tally: &mut Tally,
) -> Result<Vec<String>> {
    let mut wanted = Vec::new();
    for v6 in expected.families() {
        for from in world.pods.keys() {
            for (to, target) in &world.pods {
                // A pod always reaches itself.
                let passes = from == to || expected.allows(from, &End::Pod(to.clone()))?;
                let address = target.addresses[usize::from(v6)];
                wanted.push(connects::Attempt {
                    from: from.clone(),
                    to: to.clone(),
                    target: (address, expected.port).into(),
                    passes,
                });
            }
        }
    }
    tally.connections += wanted.len();
    servers.try_all(bed, expected.protocol, wanted)
}

/// Mismatches with the policies that they are about.
///
/// # Errors
/// The policies cannot be written.
pub fn describe(mismatches: &[String], world: &World) -> Result<String> {
    let mut text = String::new();
    for mismatch in mismatches.iter().take(MISMATCHES_PRINTED) {
        let _ = writeln!(text, "{mismatch}");
    }
    if mismatches.len() > MISMATCHES_PRINTED {
        let _ = writeln!(text, "and {} more", mismatches.len() - MISMATCHES_PRINTED);
    }
    text.push_str(&world.policies_yaml()?);
    Ok(text)
}
