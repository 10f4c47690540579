//! Wrong objects, too large ones, and somebody who takes our tables away: the last good state stays in force, what is wrong is
//! named, and the next good state is applied. On the real binaries and a real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]
#![allow(clippy::host_endian_bytes)] // netlink's headers are in the host's byte order

mod support;

use std::fmt::Write as _;
use std::sync::mpsc::{Receiver, channel};

use serde_json::{Value, json};
use support::{Cluster, Netns, Node, address_of, eventually};

/// A node with three pods; `to-db` admits `web` to `db`.
struct Bed {
    cluster: Cluster,
    node: Node,
    db: String,
    web: Netns,
    api: Netns,
    _db: Netns,
}

impl Bed {
    fn new() -> Self {
        let cluster = Cluster::new();
        cluster.put_node("a", 1, "10.42.1.0/24");
        for pod in ["db", "web", "api"] {
            cluster.put_pod(pod, "");
        }
        cluster.put_policy("db", "web");
        let node = cluster.start_node("a", 1);
        let (db, web, api) = (Netns::new(), Netns::new(), Netns::new());
        let address = address_of(&node.add("db", &db).unwrap());
        node.add("web", &web).unwrap();
        node.add("api", &api).unwrap();
        let bed = Self { cluster, node, db: address, web, api, _db: db };
        bed.admits_only("web");
        bed
    }

    /// Within a while, `db` is reached by this pod and not by the other one.
    fn admits_only(&self, pod: &str) {
        let (may, may_not) = if pod == "web" { (&self.web, &self.api) } else { (&self.api, &self.web) };
        eventually(&format!("only {pod} reaches db"), || may.pings(&self.db) && !may_not.pings(&self.db));
    }

    /// Writes the policy `to-db` as text.
    fn write_policy(&self, spec: &str) {
        let text = format!(
            "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\n\
             metadata: {{name: to-db, namespace: shop}}\nspec: {spec}\n"
        );
        self.write("policy-db.yaml", &text);
    }

    fn write(&self, file: &str, text: &str) {
        let temporary = self.cluster.folder.path().join(file);
        std::fs::write(&temporary, text).unwrap();
        std::fs::rename(&temporary, self.cluster.objects().join(file)).unwrap();
    }

    fn problems(&self) -> Vec<String> {
        let dump = self.node.dump();
        let problems = dump["objects"]["problems"].as_array().unwrap();
        problems.iter().map(|problem| problem.as_str().unwrap().to_owned()).collect()
    }
}

#[test]
fn a_wrong_policy_is_named_and_its_last_good_state_stays_until_the_next_good_one() {
    let bed = Bed::new();
    let before = bed.node.rules_text();
    let to_db = "podSelector: {matchLabels: {app: db}}";
    let from = "from: [{podSelector: {matchLabels: {app: api}}}]";
    for (spec, expected) in [
        (format!("{{{to_db}, ingress: [{{from: [{{ipBlock: {{cidr: 10.0.0.0/33}}}}]}}]}}"), "33"),
        (
            format!(
                "{{{to_db}, ingress: [{{from: [{{ipBlock: {{cidr: 10.0.0.0/8, except: [11.0.0.0/8]}}}}]}}]}}"
            ),
            "except",
        ),
        (format!("{{{to_db}, ingress: [{{{from}, ports: [{{port: 90, endPort: 80}}]}}]}}"), "endPort"),
        (format!("{{{to_db}, ingress: [{{{from}, ports: [{{port: 0}}]}}]}}"), "port"),
        (format!("{{{to_db}, ingress: [{{{from}, ports: [{{port: 70000}}]}}]}}"), "ports"),
        (format!("{{{to_db}, ingress: [{{from: [{{podSelectr: {{}}}}]}}]}}"), "selector or an ipBlock"),
        (format!("{{{to_db}, policyTypes: [Sideways]}}"), "Sideways"),
        (format!("{{{to_db}, ingress: 7}}"), "invalid type"),
        ("{podSelector: {matchExpressions: [{key: app, operator: Like, values: [a]}]}}".to_owned(), "Like"),
        ("{podSelector: {matchExpressions: [{key: app, operator: In}]}}".to_owned(), "values"),
        (format!("{{{to_db}, ingress: [{{from: ["), "not valid YAML"),
    ] {
        bed.write_policy(&spec);
        eventually(&format!("{expected:?} is reported"), || {
            let problems = bed.problems();
            problems.len() == 1 && problems[0].contains("policy-db.yaml") && problems[0].contains(expected)
        });
        assert!(bed.node.log().contains("its last good state stays"));
        assert_eq!(bed.node.rules_text(), before, "{spec}");
    }
    bed.admits_only("web");
    // A field that nobody knows is none of ours: the rest counts.
    bed.write_policy(&format!("{{{to_db}, ingress: [{{{from}}}], surprise: [1, 2]}}"));
    bed.admits_only("api");
    assert_eq!(bed.problems(), [""; 0]);
}

#[test]
fn a_policy_of_100_000_rules_closes_what_it_selects_and_others_go_on() {
    let bed = Bed::new();
    let mut rules = String::new();
    for number in 0..100_000 {
        let _ = write!(
            rules,
            "{}{{\"ports\":[{{\"port\":{}}}]}}",
            if number == 0 { "" } else { "," },
            number % 60_000 + 1
        );
    }
    let big = |name: &str, subject: &str, rules: &str| {
        format!(
            "{{\"apiVersion\": \"networking.k8s.io/v1\", \"kind\": \"NetworkPolicy\", \
             \"metadata\": {{\"name\": \"{name}\", \"namespace\": \"shop\"}}, \
             \"spec\": {{\"podSelector\": {{\"matchLabels\": {{\"app\": \"{subject}\"}}}}, \"ingress\": [{rules}]}}}}"
        )
    };
    let web = bed.web.ip("-4 -o addr show dev eth0");
    let web = web.split("inet ").nth(1).and_then(|rest| rest.split('/').next()).unwrap();
    assert!(bed.api.pings(web), "nothing selects web");
    bed.write("huge.json", &big("huge", "web", &rules));
    // Its neighbour's change does not wait for somebody to mend it.
    bed.cluster.put_policy("db", "api");
    bed.admits_only("api");
    eventually("the large policy is reported", || {
        let problems = bed.problems();
        problems.iter().any(|problem| problem.contains("shop/huge") && problem.contains("200001 rules"))
    });
    assert!(bed.node.log().contains("NetworkPolicy shop/huge is too large"));
    assert!(!bed.api.pings(web), "what it selects is not isolated");

    // As large as it may be: a range and a pair for each of its rules.
    let blocks = (0..6_000u32).map(|number| {
        let address = std::net::Ipv4Addr::from(0x0a80_0000 + 2 * number);
        let port = number % 250 + 1;
        format!(
            "{{\"from\":[{{\"ipBlock\":{{\"cidr\":\"{address}/32\"}}}}],\"ports\":[{{\"port\":{port}}}]}}"
        )
    });
    bed.write("huge.json", &big("huge", "web", &blocks.collect::<Vec<_>>().join(",")));
    eventually("the large policy is in force", || bed.node.dump()["rules"]["ranges"] == 6_000);
    assert_eq!(bed.problems(), [""; 0]);
    let passes = bed.node.dump()["passes"].as_u64().unwrap();
    bed.cluster.put_policy("db", "web");
    bed.admits_only("web");
    let line =
        |log: String| log.lines().rfind(|line| line.contains("rules are as compiled")).unwrap().to_owned();
    let last = line(bed.node.log());
    let elements: usize =
        last.split("elements: ").nth(1).unwrap().split(',').next().unwrap().parse().unwrap();
    assert!(elements < 20, "{elements} elements for one small policy: {last}");
    assert!(bed.node.dump()["passes"].as_u64().unwrap() > passes);
    assert!(!bed.api.pings(web));
}

#[test]
fn tables_that_somebody_deletes_during_changes_are_mended_with_the_newest_rules() {
    let bed = Bed::new();
    for round in 0..12 {
        bed.cluster.put_policy("db", if round % 2 == 0 { "api" } else { "web" });
        let what = [
            &["delete", "table", "inet", "holdfast"][..],
            &["flush", "ruleset"],
            &["flush", "chain", "inet", "holdfast", "ingress"],
            &["flush", "map", "inet", "holdfast", "pair_in"],
        ][round / 2 % 4];
        // Some fall before, some into, some after the commit.
        std::thread::sleep(std::time::Duration::from_millis(3 * (round as u64)));
        // A table that is being mended may not be there.
        let _ = bed.node.netns.exec("nft").args(what).output().unwrap();
    }
    bed.admits_only("web");
    let dump = bed.node.dump();
    assert_eq!((&dump["rulesError"], &dump["objects"]["problems"]), (&Value::Null, &json!([])));
}

/// While another program owns a table of our name, the kernel refuses every change of it.
#[test]
fn a_kernel_that_refuses_is_reported_and_the_newest_rules_are_applied_once_it_does_not() {
    let bed = Bed::new();
    let (release, held) = channel::<()>();
    let (taken, is_taken) = channel();
    let owner = std::fs::File::open(bed.node.netns.path()).unwrap();
    let thread = std::thread::spawn(move || {
        nix::sched::setns(owner, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        take_over(&taken, &held);
    });
    is_taken.recv().unwrap();
    eventually("the refusal is reported", || {
        let error = bed.node.dump()["rulesError"].as_str().unwrap_or_default().to_owned();
        error.contains("table holdfast (errno 1)")
    });
    let status = bed.node.cni("STATUS", "", None, json!({})).unwrap_err();
    assert_eq!(status["code"], 51, "{status}");
    assert!(bed.node.log().contains("the rules could not be applied"));
    // Changes go on to be read.
    bed.cluster.put_policy("db", "api");
    release.send(()).unwrap();
    thread.join().unwrap();
    bed.admits_only("api");
    assert_eq!(bed.node.dump()["rulesError"], Value::Null);
    bed.node.cni("STATUS", "", None, json!({})).unwrap();
}

/// Replaces our table by one that belongs to a socket, which holds it until told to let go.
fn take_over(taken: &std::sync::mpsc::Sender<()>, held: &Receiver<()>) {
    const TABLE_NAME: &[u8] = b"holdfast\0";
    const NFPROTO_INET: u8 = 1;
    const OWNER: u32 = 2;
    let socket = netlink_sys::Socket::new(12).unwrap();
    let message = |kind: u16, flags: u16, family: u8, res_id: u16, attributes: &[(u16, &[u8])]| {
        let mut body = vec![family, 0];
        body.extend(res_id.to_be_bytes());
        for (kind, payload) in attributes {
            body.extend(u16::try_from(payload.len() + 4).unwrap().to_ne_bytes());
            body.extend(kind.to_ne_bytes());
            body.extend(*payload);
            body.resize(body.len().next_multiple_of(4), 0);
        }
        let mut bytes = u32::try_from(body.len() + 16).unwrap().to_ne_bytes().to_vec();
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags | 1).to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(body);
        bytes
    };
    let batch = [
        message(0x10, 0, 0, 10, &[]),
        message(0x0a02, 0, NFPROTO_INET, 0, &[(1, TABLE_NAME)]),
        message(0x0a00, 0x400 | 4, NFPROTO_INET, 0, &[(1, TABLE_NAME), (2, &OWNER.to_be_bytes())]),
        message(0x11, 0, 0, 10, &[]),
    ];
    socket.send(&batch.concat(), 0).unwrap();
    let (answer, _) = socket.recv_from_full().unwrap();
    assert_eq!(answer[16..20], [0; 4], "the table was not taken over");
    taken.send(()).unwrap();
    held.recv().unwrap();
}
