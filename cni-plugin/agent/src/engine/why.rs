//! Explaining against the kernel: what the policies say, and whether this node's kernel holds elements that do the same.
//!
//! The engine is the only writer, so no commit of ours falls between the compiled side and the kernel's; a commit of
//! somebody else has the kernel read again. Only single elements are read, some twenty for a connection.

use std::net::IpAddr;

use holdfast_dataplane::Live;
use holdfast_net_core::policy::{Direction, DirectionAnswer, Explanation, Lookup, Party, Trace, differences};

use super::{Engine, Question, sentence};
use crate::objects::{CLUSTER_POLICY, NETWORK_POLICY, ObjectKey};

/// Sentences beside an answer; the first ones are told.
const NOTES_MAX: usize = 20;

/// An answer with what the kernel holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Why {
    pub node: String,
    pub explanation: Explanation,
    pub egress: LiveAnswer,
    pub ingress: LiveAnswer,
    /// What else bears on the answer.
    pub notes: Vec<String>,
}

/// One direction in this node's kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum LiveAnswer {
    /// Its elements are as compiled and give the policies' verdict.
    Agrees(Trace),
    /// They are or do not: one sentence for each difference. Without a trace the rules that look them up are not in place.
    Differs(Option<Trace>, Vec<String>),
    /// This node does not judge the direction; who does.
    Elsewhere(String),
    /// The kernel could not be read; why.
    Unread(String),
}

/// One direction of the question.
struct Asked<'a> {
    direction: Direction,
    subject: &'a Party,
    peer: &'a Party,
    answer: &'a DirectionAnswer,
}

impl Engine {
    pub(super) async fn why(&mut self, question: &Question) -> Result<Why, String> {
        let (from, to) = self.parties(question)?;
        let explanation = self.compiler.explain(&from, &to, question.proto, question.port);
        let egress =
            Asked { direction: Direction::Egress, subject: &from, peer: &to, answer: &explanation.egress };
        let ingress =
            Asked { direction: Direction::Ingress, subject: &to, peer: &from, answer: &explanation.ingress };
        let lookups = [&egress, &ingress].map(|asked| self.lookup(asked, question));
        let wanted: Vec<Lookup> = lookups.iter().flatten().copied().collect();
        let live = if wanted.is_empty() {
            Ok(Live::Whole(Vec::new()))
        } else {
            self.dataplane.trace(wanted).await.map_err(|error| sentence(&error))
        };
        let mut traces = match &live {
            Ok(Live::Whole(traces)) => traces.iter(),
            Ok(Live::Damaged(_)) | Err(_) => [].iter(),
        };
        let mut judge = |asked: &Asked<'_>, lookup: &Result<Lookup, String>| match (lookup, &live) {
            (Err(elsewhere), _) => LiveAnswer::Elsewhere(elsewhere.clone()),
            (Ok(_), Err(error)) => LiveAnswer::Unread(error.clone()),
            (Ok(_), Ok(Live::Damaged(reason))) => {
                LiveAnswer::Differs(None, vec![format!("this node's rules are not in place: {reason}")])
            }
            (Ok(lookup), Ok(Live::Whole(_))) => match traces.next() {
                Some(held) => self.compare(asked, lookup, held),
                None => LiveAnswer::Unread("the kernel's answer is not whole".to_owned()),
            },
        };
        let (egress, ingress) = (judge(&egress, &lookups[0]), judge(&ingress, &lookups[1]));
        let notes = self.notes(&from, &to);
        Ok(Why { node: self.settings.node.clone(), explanation, egress, ingress, notes })
    }

    /// What this node's kernel would look up for a direction; or who judges it.
    fn lookup(&self, asked: &Asked<'_>, question: &Question) -> Result<Lookup, String> {
        let (subject, peer) = (asked.subject.address, asked.peer.address);
        if subject == peer {
            return Err("nobody judges what stays inside a pod".to_owned());
        }
        if subject.is_ipv4() != peer.is_ipv4() {
            return Err(format!("no connection joins {subject} and {peer}: they are of two families"));
        }
        if self.compiler.endpoint_at(subject).is_none() {
            return Err(self.judge_of(subject));
        }
        Ok(Lookup { direction: asked.direction, subject, peer, proto: question.proto, port: question.port })
    }

    /// Who judges an address that no endpoint of this node has.
    fn judge_of(&self, address: IpAddr) -> String {
        let owner = |(_, node): &(&String, &holdfast_net_core::objects::Node)| {
            node.pod_cidrs().iter().any(|range| range.contains(address))
        };
        if self.nodes.values().any(|node| node.addresses().any(|own| own == address)) {
            return format!("nobody judges {address}: it is a node's own");
        }
        match self.nodes.iter().find(owner) {
            Some((name, _)) if *name == self.settings.node => {
                format!("{address} is of this node's range, but no pod here has it")
            }
            Some((name, _)) => format!("judged on node {name}"),
            None => format!("nobody judges {address}: it is in no node's range"),
        }
    }

    fn compare(&self, asked: &Asked<'_>, lookup: &Lookup, held: &Trace) -> LiveAnswer {
        let compiled = match Trace::of(&mut &self.compiler, lookup) {
            Ok(compiled) => compiled,
            Err(never) => match never {},
        };
        let found = differences(lookup, &compiled, held);
        let mut sentences: Vec<String> = found.iter().map(ToString::to_string).collect();
        if held.is_allowed() != asked.answer.allowed {
            let word = |allowed| if allowed { "allow" } else { "deny" };
            let (kernel, policies) = (word(held.is_allowed()), word(asked.answer.allowed));
            sentences.push(format!("the kernel's elements {kernel} what the policies {policies}"));
        }
        if sentences.is_empty() {
            LiveAnswer::Agrees(held.clone())
        } else {
            LiveAnswer::Differs(Some(held.clone()), sentences)
        }
    }

    /// What else bears on an answer about two ends.
    fn notes(&self, from: &Party, to: &Party) -> Vec<String> {
        let mut notes = Vec::new();
        if let Some(error) = &self.rules_error {
            notes.push(format!("the rules could not be applied, those of before stay in force: {error}"));
        }
        if self.compiler.has_uncommitted() {
            notes.push("changes of objects are being read; they are applied together".to_owned());
        }
        for end in [from, to].into_iter().filter(|end| self.compiler.contested().contains(&end.address)) {
            let address = end.address;
            notes.push(format!(
                "several live pods claim {address}; no pod selector matches it until that is settled"
            ));
        }
        let bears = |key: &ObjectKey| [from, to].into_iter().any(|end| bears_on(key, end));
        let refused = self.refused.iter().filter(|(key, _)| bears(key));
        notes.extend(refused.map(|(key, problem)| format!("{key} is {problem}")));
        notes.truncate(NOTES_MAX);
        notes
    }
}

/// Whether an object might have changed what holds for an end: a policy may select it, or it is the pod or its namespace.
fn bears_on(key: &ObjectKey, end: &Party) -> bool {
    let Some(pod) = &end.pod else { return false };
    match key.kind {
        NETWORK_POLICY => key.name.namespace == pod.namespace,
        CLUSTER_POLICY => true,
        "Namespace" => key.name.name == pod.namespace,
        "Pod" => key.name == *pod,
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::process::{Command as Program, Stdio};
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use holdfast_dataplane::{Config, Dataplane};
    use holdfast_net_core::objects::{ObjectChange, ObjectName};
    use holdfast_net_core::overlay::{OverlaySettings, Routing};
    use holdfast_net_core::plan::{BridgePlan, EndpointPlan};
    use holdfast_net_core::ports::Proto;
    use serde_json::{Value, from_value, json};
    use tokio::sync::{mpsc, oneshot};

    use super::super::{Command, Engine, Question};
    use super::*;
    use crate::batch::Batch;
    use crate::claims::Claims;
    use crate::leases::{AttachmentKey, Lease, Leases};
    use crate::metrics::Metrics;
    use crate::settings::{Mode, ObjectSource, Settings};

    /// An engine that nobody runs: it does what a test asks it to and mends nothing by itself. In a network namespace of
    /// its own, which vanishes with its thread.
    fn with_engine(test: impl AsyncFnOnce(&mut Engine) + Send + 'static) {
        let thread = std::thread::spawn(move || {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("these tests run as root");
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                let folder = tempfile::tempdir().unwrap();
                let mut engine = mk_engine(folder.path()).await;
                test(&mut engine).await;
            });
        });
        thread.join().unwrap();
    }

    async fn mk_engine(folder: &std::path::Path) -> Engine {
        let overlay = OverlaySettings {
            bridge: "hf0".into(),
            vxlan_device: "hf.vx".into(),
            vni: 4807,
            port: 4789,
            routing: Routing::Vxlan,
        };
        let settings = Settings {
            node: "node-a".into(),
            objects: ObjectSource::Folder(folder.join("objects")),
            state_dir: folder.join("state"),
            socket: folder.join("socket"),
            pending_dir: folder.join("pending"),
            mode: Mode::Bridge,
            uplink: None,
            checksum_offload: crate::ChecksumOffload::Auto,
            overlay,
            cluster_ranges: Vec::new(),
            masquerade: Default::default(),
            address_quarantine: Duration::ZERO,
            collect_after: Duration::ZERO,
            metrics: None,
        };
        let dataplane = Arc::new(Dataplane::new(Config::default()).await.unwrap());
        let leases = Arc::new(Leases::open(&settings.state_dir, Duration::ZERO).unwrap());
        let (_, batches) = mpsc::channel(1);
        let source = (batches, Claims::in_folder(folder.join("objects")));
        let mut engine = Engine::new(settings, dataplane, leases, source, Metrics::new()).await.0;
        take_in(&mut engine, mk_world()).await;
        for (pod, address) in [("db", "10.10.1.2"), ("web", "10.10.1.3"), ("other", "10.10.1.4")] {
            attach(&mut engine, pod, address).await;
        }
        for (pod, address) in [("db6", "fd00:1::2"), ("web6", "fd00:1::3")] {
            attach(&mut engine, pod, address).await;
        }
        engine
    }

    /// Only pods labelled web may reach those labelled db, and there only port 80; a range may reach port 81.
    fn mk_world() -> Vec<ObjectChange> {
        let mut changes = vec![mk_policy("to-db", "10.77.0.0/16")];
        for (number, range) in [(1, "10.10.1.0/24"), (2, "10.10.2.0/24")] {
            let name = if number == 1 { "node-a" } else { "node-b" };
            let node = json!({
                "metadata": { "name": name }, "spec": { "podCIDR": range },
                "status": { "addresses": [{ "type": "InternalIP", "address": format!("192.0.2.{number}") }] },
            });
            changes.push(ObjectChange::Node(name.into(), Some(from_value(node).unwrap())));
        }
        let pods = [
            ("db", "db"),
            ("web", "web"),
            ("other", "other"),
            ("db6", "db"),
            ("web6", "web"),
            ("far", "web"),
        ];
        for (name, app) in pods {
            let address = if name == "far" { "10.10.2.9" } else { "" };
            let pod = json!({
                "metadata": { "name": name, "namespace": "shop", "labels": { "app": app } },
                "status": { "phase": "Running", "podIP": address },
            });
            let pod = Some(from_value(pod).unwrap());
            changes.push(ObjectChange::Pod(ObjectName::new("shop", name), pod));
        }
        changes
    }

    fn mk_policy(name: &str, block: &str) -> ObjectChange {
        let selector = |app: &str| json!({ "matchLabels": { "app": app } });
        let policy: Value = json!({
            "metadata": { "name": name, "namespace": "shop", "uid": "u-1" },
            "spec": {
                "podSelector": selector("db"),
                "ingress": [
                    { "from": [{ "podSelector": selector("web") }], "ports": [{ "port": 80 }] },
                    { "from": [{ "ipBlock": { "cidr": block } }], "ports": [{ "port": 81 }] },
                ],
            },
        });
        ObjectChange::Policy(ObjectName::new("shop", name), Some(from_value(policy).unwrap()))
    }

    async fn take_in(engine: &mut Engine, changes: Vec<ObjectChange>) {
        let refused = engine.refused.clone();
        let (problems, noticed) = (Vec::new(), Instant::now());
        let batch = Batch { changes, complete: true, readable: true, problems, refused, noticed };
        engine.take_in(batch).await;
    }

    async fn attach(engine: &mut Engine, pod: &str, address: &str) {
        let key = AttachmentKey { container_id: pod.into(), ifname: "eth0".into() };
        let bridge = BridgePlan::for_node("node-a", 1500);
        let lease = Lease {
            told_mtu: 0,
            lowered_mtu: 0,
            plan: EndpointPlan::new(pod, "eth0", vec![address.parse().unwrap()], &bridge),
            key,
            sequence: 1,
            network: "pods".into(),
            netns: String::new(),
            pod: Some(ObjectName::new("shop", pod)),
            pod_uid: String::new(),
            attached: true,
            boot_id: String::new(),
            sandbox: None,
        };
        let (reply, answer) = oneshot::channel();
        engine.handle(vec![Command::Put(Box::new(lease), reply)]).await;
        assert_eq!(answer.await.unwrap(), Ok(true), "{pod} is known and its rules are in the kernel");
    }

    async fn ask(engine: &mut Engine, from: &str, to: &str, port: u16) -> Why {
        let question = Question { from: from.into(), to: to.into(), proto: Proto::Tcp, port };
        engine.why(&question).await.unwrap()
    }

    fn nft(args: &str) {
        let output = Program::new("nft").arg(args).output().expect("nft is installed");
        assert!(output.status.success(), "{args}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn agrees(answer: &LiveAnswer) -> Option<bool> {
        match answer {
            LiveAnswer::Agrees(trace) => Some(trace.is_allowed()),
            LiveAnswer::Differs(..) | LiveAnswer::Elsewhere(_) | LiveAnswer::Unread(_) => None,
        }
    }

    fn differences(answer: LiveAnswer) -> Vec<String> {
        match answer {
            LiveAnswer::Differs(_, differences) => differences,
            other => panic!("{other:?} does not differ"),
        }
    }

    #[test]
    fn a_kernel_as_compiled_agrees_for_both_verdicts_directions_and_families() {
        with_engine(async |engine| {
            let cases = [
                ("shop/web", "shop/db", 80, true),
                ("shop/web", "shop/db", 81, false),
                ("shop/other", "shop/db", 80, false),
                ("shop/db", "shop/other", 80, true),
                ("shop/web6", "shop/db6", 80, true),
                ("shop/web6", "shop/db6", 81, false),
            ];
            for (from, to, port, allowed) in cases {
                let why = ask(engine, from, to, port).await;
                assert_eq!(why.explanation.is_allowed(), allowed, "{from} {to} {port}");
                assert_eq!(agrees(&why.egress), Some(true), "{from} {to} {port}: {why:?}");
                assert_eq!(agrees(&why.ingress), Some(allowed), "{from} {to} {port}: {why:?}");
                assert_eq!(why.notes, Vec::<String>::new());
            }
            // A range decides at its edges and inside, and not beside them.
            for (from, allowed) in [("10.77.0.0", true), ("10.77.255.255", true), ("10.78.0.0", false)] {
                let why = ask(engine, from, "shop/db", 81).await;
                assert_eq!(agrees(&why.ingress), Some(allowed), "{from}: {why:?}");
            }
        });
    }

    #[test]
    fn what_somebody_changed_in_the_kernel_is_named_until_it_is_mended() {
        with_engine(async |engine| {
            let class = "delete element inet holdfast cls_in4 { 10.10.1.2 }";
            nft(class);
            let why = ask(engine, "shop/other", "shop/db", 80).await;
            assert!(!why.explanation.is_allowed(), "the policies say what they said before");
            let told = differences(why.ingress);
            let gone = "the kernel has no class for 10.10.1.2 (ingress), compiled is class ";
            assert!(told[0].starts_with(gone), "{told:?}");
            assert_eq!(told[1], "the kernel's elements allow what the policies deny");
            assert!(agrees(&why.egress).is_some(), "the other direction was not touched");
            engine.commit(None).await;
            assert_eq!(agrees(&ask(engine, "shop/other", "shop/db", 80).await.ingress), Some(false));

            nft(
                "delete element inet holdfast ident4 { 10.10.1.3 }; add element inet holdfast ident4 { 10.10.1.3 : 0x63 }",
            );
            let told = differences(ask(engine, "shop/web", "shop/db", 80).await.ingress);
            let other = "the kernel has identity 99 for 10.10.1.3, compiled is identity ";
            assert!(told[0].starts_with(other), "{told:?}");
            assert_eq!(told[1], "the kernel's elements deny what the policies allow");
            engine.commit(None).await;

            nft("flush map inet holdfast pair_in");
            let told = differences(ask(engine, "shop/web", "shop/db", 80).await.ingress);
            assert!(told[0].starts_with("the kernel has no profile for class "), "{told:?}");
            engine.commit(None).await;

            nft("flush map inet holdfast cidr4");
            let told = differences(ask(engine, "10.77.3.4", "shop/db", 81).await.ingress);
            let range = "the kernel has no range around 10.77.3.4, compiled is range 10.77.0.0-10.77.255.255 with identity ";
            assert!(told[0].starts_with(range), "{told:?}");
            engine.commit(None).await;

            nft("flush map inet holdfast profile");
            let told = differences(ask(engine, "shop/web", "shop/db", 80).await.ingress);
            assert!(
                told[0].ends_with("says nothing of tcp port 80 in the kernel, as compiled it allows it"),
                "{told:?}"
            );
            engine.commit(None).await;
            assert_eq!(agrees(&ask(engine, "shop/web", "shop/db", 80).await.ingress), Some(true));
        });
    }

    #[test]
    fn rules_that_are_gone_are_told_though_every_element_is_there() {
        with_engine(async |engine| {
            nft("flush chain inet holdfast ingress");
            let why = ask(engine, "shop/web", "shop/db", 80).await;
            assert!(matches!(&why.ingress, LiveAnswer::Differs(None, _)), "{why:?}");
            let told = differences(why.ingress);
            assert!(told[0].starts_with("this node's rules are not in place: chain ingress"), "{told:?}");
            engine.commit(None).await;
            assert_eq!(agrees(&ask(engine, "shop/web", "shop/db", 80).await.ingress), Some(true));
        });
    }

    #[test]
    fn an_end_that_is_not_here_is_judged_elsewhere_or_by_nobody() {
        with_engine(async |engine| {
            let elsewhere = |answer: &LiveAnswer| match answer {
                LiveAnswer::Elsewhere(note) => note.clone(),
                other => panic!("{other:?} is judged here"),
            };
            let why = ask(engine, "shop/web", "shop/far", 80).await;
            assert_eq!(agrees(&why.egress), Some(true));
            assert_eq!(elsewhere(&why.ingress), "judged on node node-b");
            let why = ask(engine, "192.0.2.2", "shop/db", 80).await;
            assert_eq!(elsewhere(&why.egress), "nobody judges 192.0.2.2: it is a node's own");
            let why = ask(engine, "198.51.100.7", "10.10.1.77", 80).await;
            assert_eq!(elsewhere(&why.egress), "nobody judges 198.51.100.7: it is in no node's range");
            let unused = "10.10.1.77 is of this node's range, but no pod here has it";
            assert_eq!(elsewhere(&why.ingress), unused);
            let why = ask(engine, "shop/web", "shop/web", 80).await;
            assert_eq!(elsewhere(&why.egress), "nobody judges what stays inside a pod");
        });
    }

    #[test]
    fn a_commit_between_two_parts_of_a_reading_waits_for_the_last_and_nodes_count_of_every_part() {
        with_engine(async |engine| {
            let part = |changes, complete| Batch {
                changes,
                complete,
                readable: true,
                problems: Vec::new(),
                refused: BTreeMap::new(),
                noticed: Instant::now(),
            };
            let (sender, batches) = mpsc::channel(1);
            engine.batches = batches;
            assert!(engine.node_error.take().is_some(), "there is no uplink here: planning the node fails");
            // The policy moves from one file to another.
            let gone = ObjectChange::Policy(ObjectName::new("shop", "to-db"), None);
            engine.take_in(part(vec![gone, ObjectChange::Node("node-b".into(), None)], false)).await;
            sender.send(part(vec![mk_policy("to-db", "10.77.0.0/16")], true)).await.unwrap();
            engine.commit(None).await;
            let kernel = engine.dataplane.load_ruleset().await.unwrap();
            assert!(
                kernel.cls_in.contains_key(&"10.10.1.2".parse().unwrap()),
                "the policy was gone for a moment"
            );
            assert_eq!(engine.rules_error, None);
            assert!(engine.node_error.is_some(), "the node is planned anew for a Node of an earlier part");
        });
    }

    #[test]
    fn a_refused_object_is_told_where_it_may_matter_and_among_the_policies() {
        with_engine(async |engine| {
            let key = |kind, namespace: &str, name: &str| ObjectKey {
                kind,
                name: ObjectName { namespace: namespace.into(), name: name.into() },
            };
            let problem = "invalid (spec); it is ignored".to_owned();
            engine.refused = BTreeMap::from([
                (key(NETWORK_POLICY, "shop", "bad"), problem.clone()),
                (key(NETWORK_POLICY, "bank", "bad"), problem.clone()),
                (key(CLUSTER_POLICY, "", "bad"), problem.clone()),
                (key(NETWORK_POLICY, "shop", "to-db"), "invalid (spec); its last good state stays".into()),
            ]);
            let why = ask(engine, "shop/web", "shop/db", 80).await;
            let told = [
                "ClusterNetworkPolicy bad is invalid (spec); it is ignored",
                "NetworkPolicy shop/bad is invalid (spec); it is ignored",
                "NetworkPolicy shop/to-db is invalid (spec); its last good state stays",
            ];
            assert_eq!(why.notes, told);
            let states = policies(engine, None).await;
            let told: Vec<(String, bool, String)> = states
                .iter()
                .map(|state| {
                    (format!("{}/{}", state.namespace, state.name), state.in_force, state.reason.clone())
                })
                .collect();
            let kept = "invalid (spec); its last good state stays".to_owned();
            let wanted = [
                ("shop/to-db".to_owned(), true, kept),
                ("/bad".to_owned(), false, problem.clone()),
                ("bank/bad".to_owned(), false, problem.clone()),
                ("shop/bad".to_owned(), false, problem),
            ];
            assert_eq!(told, wanted);
        });
    }

    async fn policies(
        engine: &mut Engine,
        name: Option<ObjectName>,
    ) -> Vec<holdfast_proto::agent::PolicyState> {
        let (reply, answer) = oneshot::channel();
        let question = super::super::questions::Ask::Policies(name, reply);
        engine.handle(vec![Command::Ask(question)]).await;
        answer.await.unwrap()
    }

    /// Another program that owns a table of our name: every transaction of ours is refused until it ends.
    fn own_our_table() -> std::process::Child {
        let mut owner =
            Program::new("nft").arg("-i").stdin(Stdio::piped()).stdout(Stdio::null()).spawn().unwrap();
        let commands = b"delete table inet holdfast\nadd table inet holdfast { flags owner; }\n";
        std::io::Write::write_all(owner.stdin.as_mut().unwrap(), commands).unwrap();
        let deadline = Instant::now() + std::time::Duration::from_secs(10);
        while !list_tables().contains("owner") {
            assert!(Instant::now() < deadline, "nft does not take the table over: {}", list_tables());
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        owner
    }

    fn list_tables() -> String {
        let output = Program::new("nft").arg("list ruleset").output().unwrap();
        String::from_utf8(output.stdout).unwrap()
    }

    #[test]
    fn a_policy_that_the_kernel_refuses_is_not_in_force_with_the_error_and_is_when_it_takes_it() {
        with_engine(async |engine| {
            let name = Some(ObjectName::new("shop", "to-db"));
            let before = policies(engine, name.clone()).await;
            assert!(before[0].in_force && before[0].since_ms > 0 && before[0].reason.is_empty());
            assert_eq!((before[0].ingress_pods, before[0].egress_pods), (2, 0));
            assert_eq!(before[0].uid, "u-1");
            take_in(engine, vec![mk_policy("to-db", "10.77.0.0/16")]).await;
            assert_eq!(policies(engine, name.clone()).await, before, "a touch changes nothing");

            let mut owner = own_our_table();
            take_in(engine, vec![mk_policy("to-db", "10.88.0.0/16")]).await;
            let refused = policies(engine, name.clone()).await;
            let why = ask(engine, "shop/web", "shop/db", 80).await;
            owner.kill().unwrap();
            owner.wait().unwrap();
            assert!(!refused[0].in_force && refused[0].since_ms == 0, "{refused:?}");
            assert!(refused[0].reason.contains("nf_tables refused"), "{refused:?}");
            assert!(why.notes[0].contains("nf_tables refused"), "{why:?}");
            assert!(matches!(why.ingress, LiveAnswer::Differs(None, _)), "{why:?}");

            engine.commit(None).await;
            let after = policies(engine, name).await;
            assert!(after[0].in_force && after[0].since_ms >= before[0].since_ms, "{after:?}");
            assert_eq!(agrees(&ask(engine, "10.88.0.1", "shop/db", 81).await.ingress), Some(true));
        });
    }

    #[test]
    fn a_policy_that_selects_nobody_here_is_not_in_force_here() {
        with_engine(async |engine| {
            let mut policy = mk_policy("to-none", "10.77.0.0/16");
            if let ObjectChange::Policy(_, Some(policy)) = &mut policy {
                policy.spec.pod_selector.match_labels.insert("app".into(), "none".into());
            }
            take_in(engine, vec![policy]).await;
            let state = policies(engine, Some(ObjectName::new("shop", "to-none"))).await.remove(0);
            assert_eq!((state.in_force, state.since_ms), (false, 0));
            assert_eq!(state.reason, "selects no pod of this node");
            let absent = policies(engine, Some(ObjectName::new("shop", "nowhere"))).await;
            assert!(absent.is_empty());
        });
    }
}
