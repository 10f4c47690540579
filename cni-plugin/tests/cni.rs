//! The CNI verbs as a runtime calls them, on the real binaries, a real agent and a real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

pub(crate) mod support;

use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Cluster, Netns, address_of, eventually, is_empty, is_routed, plugin, pod_end};

fn mk_config(change: Value) -> String {
    let mut config = json!({
        "cniVersion": "1.1.0", "name": "pods", "type": "holdfast-cni",
        "agentSocket": "/nonexistent/netd.sock", "pendingDir": "/nonexistent/pending",
    });
    config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    config.to_string()
}

#[test]
fn bad_input_gives_the_specs_codes_without_an_agent() {
    let full = [("CNI_CONTAINERID", "c"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "/proc/self/ns/net")];
    let good = mk_config(json!({}));
    let gc = mk_config(json!({ "cni.dev/valid-attachments": [] }));
    let check = mk_config(json!({ "prevResult": { "cniVersion": "1.1.0" } }));
    let cases: [(&str, &str, &str, String, u64); 18] = [
        ("ADD", "", "", "{ not json".into(), 6),
        ("DEL", "", "", "[]".into(), 6),
        ("ADD", "", "", mk_config(json!({ "cniVersion": "7.0.0" })), 1),
        ("CHECK", "", "", mk_config(json!({ "cniVersion": "0.3.1" })), 1),
        ("STATUS", "", "", mk_config(json!({ "cniVersion": "1.0.0" })), 1),
        ("ADD", "CNI_NETNS", "", good.clone(), 4),
        ("ADD", "CNI_NETNS", "/nonexistent/netns", good.clone(), 4),
        ("CHECK", "CNI_NETNS", "", check.clone(), 4),
        ("ADD", "CNI_CONTAINERID", "", good.clone(), 4),
        ("ADD", "CNI_IFNAME", "no/slash", good.clone(), 4),
        ("FROB", "", "", good.clone(), 4),
        ("ADD", "", "", mk_config(json!({ "name": "" })), 7),
        ("ADD", "", "", mk_config(json!({ "ipam": { "type": "host-local" } })), 2),
        ("ADD", "", "", good.clone(), 11),
        ("CHECK", "", "", check, 11),
        ("GC", "", "", gc, 11),
        ("STATUS", "", "", good.clone(), 50),
        // The folder for delete records cannot be made below a device.
        ("DEL", "", "", mk_config(json!({ "pendingDir": "/dev/null/pending" })), 5),
    ];
    for (command, name, value, input, code) in cases {
        let mut variables = vec![("CNI_COMMAND", command)];
        variables.extend(full.iter().map(|&(k, v)| (k, if k == name { value } else { v })));
        let error = plugin(None, &variables, &input).expect_err(command);
        assert_eq!(error["code"], code, "{command} {name}={value} {input}: {error}");
        assert!(error["msg"].as_str().is_some_and(|msg| !msg.is_empty()), "{error}");
        assert!(error["cniVersion"].is_string(), "{error}");
    }
}

#[test]
fn version_needs_no_agent() {
    let reply = plugin(None, &[("CNI_COMMAND", "VERSION")], "{\"cniVersion\":\"1.0.0\"}").unwrap();
    let expected =
        json!({ "cniVersion": "1.0.0", "supportedVersions": ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] });
    assert_eq!(reply, expected);
}

#[test]
fn each_verb_keeps_its_promise_on_a_node() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/30");
    cluster.put_pod("one", "");
    cluster.put_pod("two", "");
    let node = cluster.start_node("a", 1);
    let (one, two, three) = (Netns::new(), Netns::new(), Netns::new());

    let result = node.add("one", &one).unwrap();
    let address = address_of(&result);
    assert_eq!(result["interfaces"][pod_end(&result)]["sandbox"], json!(one.path()));
    let bridges = result["interfaces"].as_array().unwrap().len() - 2;
    assert_eq!(bridges, usize::from(!is_routed()), "{result}");
    assert!(node.netns.pings(&address), "the node reaches its pod");

    let prev = json!({ "prevResult": result });
    node.cni("CHECK", "one", Some(&one.path()), prev.clone()).unwrap();
    let again = node.add("one", &one).unwrap_err();
    assert_eq!(again["code"], 4, "{again}");
    assert_eq!(node.cni("CHECK", "nobody", Some(&one.path()), prev.clone()).unwrap_err()["code"], 3);

    // The sandbox has an interface of that name: refused, and neither lease nor interface stays.
    two.ip("link add eth0 type veth peer name x");
    assert_eq!(node.add("two", &two).unwrap_err()["code"], 4);
    assert_eq!(node.ports(), 1);
    two.ip("link del eth0");

    // Two addresses in the range.
    node.add("two", &two).unwrap();
    let full = node.add("three", &three).unwrap_err();
    assert_eq!(full["code"], 11, "{full}");
    assert!(full["msg"].as_str().unwrap().contains("10.42.1.0/30 is used up"), "{full}");
    assert_eq!(node.cni("STATUS", "", None, json!({})).unwrap_err()["code"], 50);
    assert_eq!(node.ports(), 2);

    // CHECK sees what changed behind its back.
    one.ip("route del default");
    node.cni("CHECK", "one", Some(&one.path()), prev).unwrap_err();

    for _ in 0..2 {
        node.del("one").unwrap();
    }
    node.del("never-attached").unwrap();
    drop(two);
    node.del("two").unwrap();
    assert_eq!(node.ports(), 0);
    node.cni("STATUS", "", None, json!({})).unwrap();
}

#[test]
fn results_have_the_shape_of_the_asked_version_and_follow_a_chain() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    let node = cluster.start_node("a", 1);
    for (version, family, mtu) in
        [("0.3.1", true, false), ("0.4.0", true, false), ("1.0.0", false, false), ("1.1.0", false, true)]
    {
        let sandbox = Netns::new();
        let extra = json!({
            "cniVersion": version, "dns": { "nameservers": ["10.0.0.53"] },
            "prevResult": { "cniVersion": version, "interfaces": [{ "name": "before" }] },
        });
        let result = node.cni("ADD", "c", Some(&sandbox.path()), extra).unwrap();
        assert_eq!(result["cniVersion"], version);
        assert_eq!(result["interfaces"][0]["name"], "before");
        let pod = pod_end(&result);
        assert_eq!(pod, 3 - usize::from(is_routed()));
        assert_eq!(result["ips"][0]["interface"], pod, "indices move behind the earlier interfaces");
        assert_eq!(result["ips"][0].get("version").is_some(), family, "{result}");
        assert_eq!(result["interfaces"][pod].get("mtu").is_some(), mtu, "{result}");
        assert_eq!(result["dns"]["nameservers"][0], "10.0.0.53");
        node.del("c").unwrap();
    }
}

#[test]
fn gc_frees_what_is_not_valid_and_nothing_else() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    let node = cluster.start_node("a", 1);
    let sandboxes = [Netns::new(), Netns::new(), Netns::new()];
    for (id, sandbox) in ["a", "b", "c"].into_iter().zip(&sandboxes) {
        node.cni("ADD", id, Some(&sandbox.path()), json!({})).unwrap();
    }
    let other = json!({ "name": "other", "cni.dev/valid-attachments": [] });
    node.cni("GC", "", None, other).unwrap();
    assert_eq!(node.ports(), 3, "another network's list says nothing about ours");
    let valid = json!({ "cni.dev/valid-attachments": [{ "containerID": "b", "ifname": "eth0" }] });
    node.cni("GC", "", None, valid).unwrap();
    assert_eq!(node.ports(), 1);
    assert!(sandboxes[1].ip("-o addr show eth0").contains("10.42.1.2"));
}

#[test]
fn without_its_node_object_the_agent_asks_to_try_again() {
    let cluster = Cluster::new();
    let node = cluster.start_node("a", 1);
    let sandbox = Netns::new();
    let error = node.cni("ADD", "c", Some(&sandbox.path()), json!({})).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    assert!(error["details"].as_str().unwrap().contains("no Node object"), "{error}");
    assert_eq!(node.cni("STATUS", "", None, json!({})).unwrap_err()["code"], 50);
    cluster.put_node("a", 1, "10.42.1.0/24");
    eventually("ready", || node.cni("STATUS", "", None, json!({})).is_ok());
    node.cni("ADD", "c", Some(&sandbox.path()), json!({})).unwrap();
}

#[test]
fn a_delete_while_the_agent_is_down_is_done_before_it_serves_again() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    let mut node = cluster.start_node("a", 1);
    let (one, two) = (Netns::new(), Netns::new());
    node.cni("ADD", "one", Some(&one.path()), json!({})).unwrap();
    let kept = address_of(&node.cni("ADD", "two", Some(&two.path()), json!({})).unwrap());
    let rules = node.rules_text();
    node.kill();
    assert_eq!(node.rules_text(), rules, "rules stay in force without the agent");
    node.del("one").unwrap();
    assert!(!is_empty(&node.pending()));
    node.start();
    assert!(is_empty(&node.pending()));
    assert_eq!(node.ports(), 1);
    assert!(node.netns.pings(&kept));
}

#[test]
fn a_restart_with_an_unchanged_state_changes_nothing() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    for name in ["db", "api"] {
        cluster.put_pod(name, "");
    }
    cluster.put_policy("db", "api");
    let mut node = cluster.start_node("a", 1);
    let (db, api) = (Netns::new(), Netns::new());
    let address = address_of(&node.add("db", &db).unwrap());
    node.add("api", &api).unwrap();
    assert!(api.pings(&address));
    let (rules, links) = (node.rules_text(), node.netns.ip("-o link show"));
    for _ in 0..2 {
        node.kill();
        node.start();
        assert_eq!(node.rules_text(), rules);
        assert_eq!(node.netns.ip("-o link show"), links);
    }
    assert!(api.pings(&address));
}

#[test]
fn while_objects_are_away_rules_stay_new_pods_wait_and_deletes_succeed() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    for name in ["db", "api", "web", "late"] {
        cluster.put_pod(name, "");
    }
    cluster.put_policy("db", "api");
    let mut node = cluster.start_node("a", 1);
    let (db, api, web, late) = (Netns::new(), Netns::new(), Netns::new(), Netns::new());
    let address = address_of(&node.add("db", &db).unwrap());
    node.add("api", &api).unwrap();
    node.add("web", &web).unwrap();
    let rules = node.rules_text();

    node.kill();
    let away = cluster.folder.path().join("away");
    std::fs::rename(cluster.objects(), &away).unwrap();
    node.start();
    assert_eq!(node.rules_text(), rules);
    assert!(api.pings(&address) && !web.pings(&address));
    let error = node.add("late", &late).unwrap_err();
    assert_eq!(error["code"], 11, "{error}");
    node.del("web").unwrap();
    assert_eq!(node.ports(), 2);
    assert!(!is_empty(&node.pending()), "the lease is still to be released");
    assert_eq!(node.dump()["leases"].as_array().unwrap().len(), 2, "the endpoint has left the model");

    std::fs::rename(&away, cluster.objects()).unwrap();
    eventually("ready", || node.cni("STATUS", "", None, json!({})).is_ok());
    eventually("the record is replayed", || is_empty(&node.pending()));
    node.add("late", &late).unwrap();
    assert!(api.pings(&address));
}

#[test]
fn a_kill_in_the_middle_of_adds_leaves_nothing_that_restart_and_del_do_not_clean_up() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/26");
    let mut node = cluster.start_node("a", 1);
    let clean = node.pod_state();
    let mut interrupted = 0;
    for round in 0..8_u64 {
        let sandboxes: Vec<Netns> = (0..6).map(|_| Netns::new()).collect();
        let ids: Vec<String> = (0..6).map(|index| format!("r{round}-{index}")).collect();
        interrupted += std::thread::scope(|scope| {
            let adds: Vec<_> = ids
                .iter()
                .zip(&sandboxes)
                .map(|(id, sandbox)| {
                    let node = &node;
                    // Its failure is the runtime's to answer with DEL.
                    scope.spawn(move || node.cni("ADD", id, Some(&sandbox.path()), json!({})).is_err())
                })
                .collect();
            std::thread::sleep(Duration::from_millis(15 + 7 * round));
            node.kill_by_signal();
            adds.into_iter().filter_map(|add| add.join().unwrap().then_some(())).count()
        });
        node.kill();
        node.start();
        for id in &ids {
            node.del(id).unwrap();
        }
        assert_eq!(node.ports(), 0, "round {round}: {}", node.log());
        assert_eq!(node.pod_state(), clean, "round {round}");
    }
    assert!(interrupted > 0, "no kill hit an ADD");
    // All 62 addresses are free again.
    let state = node.dump();
    assert_eq!(state["leases"], json!([]), "{state}");
}

#[test]
fn a_restart_undoes_an_add_that_was_not_answered_and_keeps_one_that_was() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    cluster.put_pod("db", "");
    let mut node = cluster.start_node("a", 1);
    let (db, late) = (Netns::new(), Netns::new());
    let address = address_of(&node.add("db", &db).unwrap());
    let kept = node.pod_state();
    for _ in 0..3 {
        std::thread::scope(|scope| {
            // Its object never appears, so ADD waits for it with everything else done.
            let add = scope.spawn(|| node.add("late", &late));
            eventually("the pod's end is configured", || {
                late.ip("-o link show").contains("eth0") && late.ip("route show").contains("default")
            });
            node.kill_by_signal();
            add.join().unwrap().unwrap_err();
        });
        node.kill();
        node.start();
        assert_eq!(node.ports(), 1, "{}", node.log());
        assert_eq!(node.dump()["leases"].as_array().unwrap().len(), 1);
        assert_eq!(node.pod_state(), kept);
    }
    assert!(node.netns.pings(&address));
    node.add("late", &late).unwrap();
}

#[test]
fn a_pod_is_denied_until_its_object_is_known_and_policy_follows_the_objects() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    cluster.put_node("b", 2, "10.42.2.0/24");
    cluster.put_pod("api", "");
    let (a, b) = (cluster.start_node("a", 1), cluster.start_node("b", 2));
    let (db, api, web) = (Netns::new(), Netns::new(), Netns::new());

    let started = Instant::now();
    let db_address = address_of(&a.add("db", &db).unwrap());
    assert!(started.elapsed() >= Duration::from_secs(4), "ADD waits for the object, but not for ever");
    assert!(started.elapsed() < Duration::from_secs(8));
    let api_address = address_of(&b.add("api", &api).unwrap());
    cluster.put_pod("api", &api_address);
    assert!(!api.pings(&db_address) && !db.pings(&api_address), "denied both ways while it is unknown");
    assert!(a.netns.pings(&db_address), "a node always reaches its own pods");

    cluster.put_pod("db", &db_address);
    eventually("the object opens the pod", || api.pings(&db_address));

    cluster.put_pod("web", "");
    let web_address = address_of(&b.add("web", &web).unwrap());
    cluster.put_pod("web", &web_address);
    cluster.put_policy("db", "api");
    eventually("web is cut off", || !web.pings(&db_address));
    assert!(api.pings(&db_address));
    assert!(db.pings(&web_address), "egress is not isolated");

    // An invalid policy is reported and the last good one stays.
    std::fs::write(cluster.objects().join("policy-db.yaml"), "kind: NetworkPolicy\napiVersion: [").unwrap();
    eventually("the problem is reported", || a.dump()["objects"]["problems"].as_array().unwrap().len() == 1);
    assert!(!web.pings(&db_address) && api.pings(&db_address));

    // Tampering is noticed and mended, the whole table included.
    for what in
        [["flush", "chain", "inet", "holdfast", "forward"], ["flush", "map", "inet", "holdfast", "cls_in4"]]
    {
        assert!(a.netns.exec("nft").args(what).status().unwrap().success());
        eventually("rules are mended", || !web.pings(&db_address));
    }
    assert!(a.netns.exec("nft").args(["delete", "table", "inet", "holdfast"]).status().unwrap().success());
    eventually("the table is back", || !web.pings(&db_address));
    assert!(api.pings(&db_address));
    for table in ["bridge", "inet"] {
        assert!(
            a.netns.exec("nft").args(["list", "table", table, "holdfast"]).output().unwrap().status.success()
        );
    }

    cluster.put_policy("db", "web");
    eventually("roles change", || web.pings(&db_address) && !api.pings(&db_address));
    cluster.remove("policy-db");
    eventually("open again", || api.pings(&db_address) && web.pings(&db_address));
}

#[test]
fn dual_stack_pods_reach_each_other_over_the_overlay_in_both_families() {
    let cluster = Cluster::new();
    for (name, number) in [("a", 1), ("b", 2)] {
        cluster.put(
            &format!("node-{name}"),
            &json!({
                "apiVersion": "v1", "kind": "Node", "metadata": { "name": name },
                "spec": { "podCIDRs": [format!("10.42.{number}.0/24"), format!("fd42:{number}::/64")] },
                "status": { "addresses": [{ "type": "InternalIP", "address": format!("192.0.2.{number}") }] },
            }),
        );
    }
    let (a, b) = (cluster.start_node("a", 1), cluster.start_node("b", 2));
    let (one, two, three) = (Netns::new(), Netns::new(), Netns::new());
    let add = |node: &support::Node, id: &str, sandbox: &Netns| {
        let result = node.cni("ADD", id, Some(&sandbox.path()), json!({})).unwrap();
        let text = |index: usize| result["ips"][index]["address"].as_str().unwrap().to_owned();
        [text(0), text(1)].map(|address| address.split('/').next().unwrap().to_owned())
    };
    let (first, second, third) = (add(&a, "one", &one), add(&b, "two", &two), add(&a, "three", &three));
    for address in first.iter().chain(&third) {
        assert!(two.pings(address), "{address} from another node");
    }
    for address in second.iter().chain(&third) {
        assert!(one.pings(address), "{address} from the same and another node");
    }
    assert!(a.netns.pings(&first[1]), "the node reaches its pod by IPv6");
}

#[test]
fn the_agent_gives_up_privileges_and_its_socket_is_private() {
    use std::os::unix::fs::PermissionsExt;
    let cluster = Cluster::new();
    let node = cluster.start_node("a", 1);
    let mode = std::fs::metadata(node.socket()).unwrap().permissions().mode();
    assert_eq!(mode & 0o777, 0o600);
    let status = std::fs::read_to_string(format!("/proc/{}/status", node.pid())).unwrap();
    // CAP_NET_ADMIN 12, CAP_SYS_PTRACE 19, CAP_SYS_ADMIN 21.
    let kept = format!("{:016x}", (1_u64 << 12) | (1 << 19) | (1 << 21));
    for set in ["CapPrm", "CapEff", "CapBnd"] {
        let line = status.lines().find(|line| line.starts_with(set)).unwrap();
        assert!(line.ends_with(&kept), "{line}");
    }
}

#[test]
fn a_namespace_that_vanishes_in_mid_add_is_an_error_of_the_spec_or_none_and_leaves_nothing() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/26");
    let node = cluster.start_node("a", 1);
    let clean = node.pod_state();
    for round in 0..16_u64 {
        let sandbox = Netns::new();
        let path = sandbox.path();
        let added = std::thread::scope(|scope| {
            let add = scope.spawn(|| node.cni("ADD", "c", Some(&path), json!({})));
            std::thread::sleep(Duration::from_micros(600 * round));
            drop(sandbox);
            add.join().unwrap()
        });
        if let Err(error) = added {
            assert!([4, 11, 999].contains(&error["code"].as_i64().unwrap()), "round {round}: {error}");
            let said = format!("{}{}", error["msg"], error["details"]);
            assert!(["CNI_NETNS", "namespace", "vanished"].iter().any(|word| said.contains(word)), "{error}");
        }
        node.del("c").unwrap();
        assert_eq!(node.ports(), 0, "round {round}: {}", node.log());
        assert_eq!(node.pod_state(), clean, "round {round}");
        assert_eq!(node.dump()["leases"], json!([]), "round {round}");
    }
}
