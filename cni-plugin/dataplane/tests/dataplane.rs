//! The data path against the kernel: nodes and pods are network namespaces, made here and gone with the test.
//! These tests run as root; without it they fail, they do not skip.

#![allow(unsafe_code)] // one lifetime extension in the support module, argued there
#![allow(clippy::unwrap_used)] // a test's failure is its panic

pub(crate) mod support;

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::time::Duration;

use holdfast_dataplane::{Applied, Dataplane, Error};
use holdfast_net_core::plan::{
    EndpointPlan, NodePlan, PeerPlan, VXLAN_NAME, VXLAN_PORT, VXLAN_VNI, VxlanPlan, vtep_mac,
};
use holdfast_net_core::ports::{PortRule, Proto};
use holdfast_net_core::ruleset::{ClassId, IdentityId, ProfileId, Ruleset, pins_of};
use support::{Netns, Node, connects, link_nodes, mk_policy, serve_bytes};

#[test]
fn pods_on_one_node_reach_each_other_as_their_classes_say_and_nothing_is_left_behind() {
    let node = Node::new("hft-one");
    let (db, api, web) = (Netns::new("hft-one-db"), Netns::new("hft-one-api"), Netns::new("hft-one-web"));
    let plan_db = node.endpoint(&db, "10.77.0.2,fd77::2");
    let plan_api = node.endpoint(&api, "10.77.0.3,fd77::3");
    let plan_web = node.endpoint(&web, "10.77.0.4,fd77::4");
    let node_plan = node.alone_plan();
    let before = node.netns.run("ip -o addr; ip route; ip neigh; ip -6 route");
    node.runtime.block_on(async |dp: &Dataplane| {
        assert!(dp.apply_node(&node_plan).await.unwrap() > 0);
        assert_eq!(dp.apply_node(&node_plan).await.unwrap(), 0, "a second apply writes nothing");
        for (plan, pod) in [(&plan_db, &db), (&plan_api, &api), (&plan_web, &web)] {
            dp.attach(plan, pod.path()).await.unwrap();
            dp.check(plan, plan, pod.path()).await.unwrap();
        }
    });
    let _v4 = serve_bytes(&db, "10.77.0.2:5432");
    let _v6 = serve_bytes(&db, "[fd77::2]:5432");
    let _other = serve_bytes(&db, "10.77.0.2:5433");
    assert!(!connects(&api, "10.77.0.2:5432"), "pods start in deny-all");
    assert!(!connects(&api, "[fd77::2]:5432"));

    let policy = mk_policy(&[&plan_db, &plan_api, &plan_web], &plan_db, &[(&plan_api, 5432)]);
    node.runtime.block_on(async |dp: &Dataplane| {
        assert!(dp.apply_ruleset(&policy).await.unwrap().elements > 0);
        let generation = node.netns.nft_generation();
        assert_eq!(dp.apply_ruleset(&policy).await.unwrap(), Applied::default());
        assert_eq!(node.netns.nft_generation(), generation, "an unchanged state makes no kernel write");
    });
    assert!(connects(&api, "10.77.0.2:5432"));
    assert!(connects(&api, "[fd77::2]:5432"));
    assert!(!connects(&api, "10.77.0.2:5433"), "another port");
    assert!(!connects(&web, "10.77.0.2:5432"), "another pod");
    assert!(!connects(&web, "[fd77::2]:5432"));
    node.netns.run("ping -c1 -W1 10.77.0.4");
    web.run("ping -c1 -W1 10.77.0.3");
    web.run("ping -6 -c1 -W1 fd77::3");

    node.runtime.block_on(async |dp: &Dataplane| {
        assert!(dp.denied().await.unwrap().0 > 0);
        let found = dp.list_endpoints().await.unwrap();
        assert_eq!(found.len(), 3);
        assert!(found.iter().any(|f| f.attachment == Some((db.name().to_string(), "eth0".into()))));
        for plan in [&plan_db, &plan_api, &plan_web] {
            dp.detach(&plan.host_ifname).await.unwrap();
            dp.detach(&plan.host_ifname).await.unwrap();
        }
        assert!(dp.list_endpoints().await.unwrap().is_empty());
        let left = dp.load_ruleset().await.unwrap();
        assert!(left.pins.is_empty() && left.cls_in.is_empty() && left.cls_eg.is_empty());
    });
    node.netns.run("[ ! -d /sys/class/net/hf0 ] || ip link del hf0; ip -6 route del unreachable fd99::/64");
    assert_eq!(node.netns.run("ip -o addr; ip route; ip neigh; ip -6 route"), before);
}

#[test]
fn pods_on_two_nodes_meet_over_vxlan_and_policy_holds_there() {
    let nodes = [Node::new("hft-va"), Node::new("hft-vb")];
    let underlay = link_nodes(&nodes[0].netns, "192.0.2.1/24", &nodes[1].netns, "192.0.2.2/24");
    let pods = [Netns::new("hft-va-p"), Netns::new("hft-vb-p")];
    let addresses = ["10.78.1.2,fd78:1::2", "10.78.2.2,fd78:2::2"];
    let ranges = |n: usize| -> Vec<ipnetwork::IpNetwork> {
        vec![format!("10.78.{n}.0/24").parse().unwrap(), format!("fd78:{n}::/64").parse().unwrap()]
    };
    let plans: Vec<EndpointPlan> = (0..2).map(|n| nodes[n].endpoint(&pods[n], addresses[n])).collect();
    for n in 0..2 {
        let (own, other) = (n, 1 - n);
        let name = ["hft-va", "hft-vb"];
        let plan = NodePlan {
            bridge: nodes[n].bridge(),
            vxlan: Some(VxlanPlan {
                name: VXLAN_NAME.into(),
                vni: VXLAN_VNI,
                port: VXLAN_PORT,
                local: underlay[own],
                mac: vtep_mac(name[own], underlay[own]),
                mtu: 1450,
            }),
            uplink: "up0".into(),
            peers: vec![PeerPlan::new(name[other], underlay[other], ranges(other + 1))],
            pod_ranges: ranges(own + 1),
        };
        nodes[n].runtime.block_on(async |dp: &Dataplane| {
            dp.apply_node(&plan).await.unwrap();
            assert_eq!(dp.apply_node(&plan).await.unwrap(), 0, "a second apply writes nothing");
            dp.attach(&plans[n], pods[n].path()).await.unwrap();
            let r = Ruleset { pins: pins_of(&plans[n]), ..Ruleset::default() };
            dp.apply_ruleset(&r).await.unwrap();
            // A lost forwarding entry is mended.
            nodes[n].netns.run("bridge fdb flush dev hf.vx || true; ip route flush dev hf.vx");
            assert!(dp.apply_node(&plan).await.unwrap() > 0);
            assert_eq!(dp.apply_node(&plan).await.unwrap(), 0);
        });
    }
    let _v4 = serve_bytes(&pods[1], "10.78.2.2:80");
    let _v6 = serve_bytes(&pods[1], "[fd78:2::2]:80");
    assert!(connects(&pods[0], "10.78.2.2:80"));
    assert!(connects(&pods[0], "[fd78:2::2]:80"));
    pods[0].run("ping -c1 -W1 -M do -s 1422 10.78.2.2");
    nodes[0].netns.run("ping -c1 -W1 10.78.2.2");
    pods[0].run("ping -c1 -W1 192.0.2.2");
    let mut deny = mk_policy(&[&plans[1]], &plans[1], &[]);
    nodes[1].runtime.block_on(async |dp: &Dataplane| dp.apply_ruleset(&deny).await.unwrap());
    assert!(!connects(&pods[0], "10.78.2.2:80"));
    deny.ident.insert(plans[0].addresses[0], IdentityId(1));
    deny.pair_in.insert((ClassId(2), IdentityId(1)), ProfileId(1));
    deny.profiles.insert(ProfileId(1), vec![PortRule::port(Proto::Tcp, 80)]);
    nodes[1].runtime.block_on(async |dp: &Dataplane| dp.apply_ruleset(&deny).await.unwrap());
    assert!(connects(&pods[0], "10.78.2.2:80"));
    assert!(!connects(&pods[0], "[fd78:2::2]:80"));
}

#[test]
fn revocation_cuts_a_live_connection_whose_server_is_sending_and_spares_the_allowed_one() {
    let node = Node::new("hft-rev");
    let (server, api, web) = (Netns::new("hft-rev-s"), Netns::new("hft-rev-a"), Netns::new("hft-rev-w"));
    let plan_s = node.endpoint(&server, "10.79.0.2");
    let plan_a = node.endpoint(&api, "10.79.0.3");
    let plan_w = node.endpoint(&web, "10.79.0.4");
    let plans = [&plan_s, &plan_a, &plan_w];
    let both = mk_policy(&plans, &plan_s, &[(&plan_a, 80), (&plan_w, 80)]);
    let only_api = mk_policy(&plans, &plan_s, &[(&plan_a, 80)]);
    let node_plan = node.alone_plan();
    node.runtime.block_on(async |dp: &Dataplane| {
        dp.apply_node(&node_plan).await.unwrap();
        for (plan, pod) in [(&plan_s, &server), (&plan_a, &api), (&plan_w, &web)] {
            dp.attach(plan, pod.path()).await.unwrap();
        }
        dp.apply_ruleset(&both).await.unwrap();
    });
    let _server = serve_bytes(&server, "10.79.0.2:80");
    let mut streams: BTreeMap<&str, std::net::TcpStream> = BTreeMap::new();
    for (name, pod) in [("api", &api), ("web", &web)] {
        let mut stream = support::connect(pod, "10.79.0.2:80").unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(800))).unwrap();
        stream.read_exact(&mut [0u8; 65536]).unwrap();
        streams.insert(name, stream);
    }
    node.runtime.block_on(async |dp: &Dataplane| {
        assert!(dp.apply_ruleset(&only_api).await.unwrap().revoked);
    });
    let flows = |stream: &mut std::net::TcpStream| {
        // What was on its way or in the socket may still be read.
        let until = std::time::Instant::now() + Duration::from_millis(1500);
        let mut buffer = vec![0u8; 1 << 20];
        while std::time::Instant::now() < until {
            if stream.read(&mut buffer).is_err() {
                return false;
            }
        }
        true
    };
    assert!(!flows(streams.get_mut("web").unwrap()), "the revoked connection still gets data");
    assert!(flows(streams.get_mut("api").unwrap()), "the allowed connection was cut");
    assert!(streams.get_mut("api").unwrap().write_all(b"x").is_ok());
}

#[test]
fn a_forged_source_is_dropped_at_the_port() {
    let node = Node::new("hft-pin");
    let (a, b) = (Netns::new("hft-pin-a"), Netns::new("hft-pin-b"));
    let (plan_a, plan_b) = (node.endpoint(&a, "10.80.0.2,fd80::2"), node.endpoint(&b, "10.80.0.3,fd80::3"));
    let node_plan = node.alone_plan();
    let mut open = Ruleset::default();
    open.pins.extend(pins_of(&plan_a));
    open.pins.extend(pins_of(&plan_b));
    node.runtime.block_on(async |dp: &Dataplane| {
        dp.apply_node(&node_plan).await.unwrap();
        dp.attach(&plan_a, a.path()).await.unwrap();
        dp.attach(&plan_b, b.path()).await.unwrap();
        dp.apply_ruleset(&open).await.unwrap();
    });
    a.run("ping -c1 -W1 10.80.0.3 && ping -6 -c1 -W1 fd80::3");
    let dropped = |_: ()| node.runtime.block_on(async |dp: &Dataplane| dp.denied().await.unwrap().1);
    let before = dropped(());
    a.run("ip addr add 10.80.0.99/32 dev eth0; ip -6 addr add fd80::99/128 dev eth0 nodad");
    a.run("! ping -c1 -W1 -I 10.80.0.99 10.80.0.3; ! ping -6 -c1 -W1 -I fd80::99 fd80::3");
    assert!(dropped(()) >= before + 2);
    a.run("ip link set eth0 address 02:00:00:00:00:77; ip neigh show; ! ping -c1 -W1 10.80.0.3");
    assert!(dropped(()) >= before + 3);
}

#[test]
fn a_failed_attachment_undoes_itself_and_an_existing_interface_is_refused() {
    let node = Node::new("hft-bad");
    let pod = Netns::new("hft-bad-p");
    let plan = node.endpoint(&pod, "10.81.0.2");
    let node_plan = node.alone_plan();
    pod.run("ip link add eth0 type veth peer name other");
    node.runtime.block_on(async |dp: &Dataplane| {
        dp.apply_node(&node_plan).await.unwrap();
        let error = dp.attach(&plan, pod.path()).await.unwrap_err();
        assert!(matches!(&error, Error::Exists { ifname, .. } if ifname == "eth0"), "{error}");
        assert!(dp.list_endpoints().await.unwrap().is_empty());
        assert!(dp.load_ruleset().await.unwrap().pins.is_empty());

        pod.run("ip link del eth0");
        let missing = std::path::Path::new("/run/netns/hft-no-such");
        assert!(matches!(dp.attach(&plan, missing).await.unwrap_err(), Error::Sandbox { .. }));
        let mut bad = plan.clone();
        bad.extra_routes = vec!["10.81.0.0/24".parse().unwrap()];
        bad.mtu = 20;
        assert!(dp.attach(&bad, pod.path()).await.is_err());
        assert!(dp.list_endpoints().await.unwrap().is_empty());
        assert!(dp.load_ruleset().await.unwrap().pins.is_empty());

        dp.attach(&plan, pod.path()).await.unwrap();
        let again = dp.attach(&plan, pod.path()).await.unwrap_err();
        assert!(matches!(&again, Error::Exists { .. }), "{again}");
        dp.check(&plan, &plan, pod.path()).await.unwrap();
        pod.run("ip route del default");
        assert!(matches!(dp.check(&plan, &plan, pod.path()).await.unwrap_err(), Error::Differs(_)));
        // The sandbox goes first, as when a pod's node process died.
        pod.run("ip link del eth0");
        dp.detach(&plan.host_ifname).await.unwrap();
        dp.detach(&plan.host_ifname).await.unwrap();
    });
    assert!(!node.netns.run("ip route; ip neigh").contains("10.81.0.2"));
}

#[test]
fn passes_checks_and_lists_at_the_same_time_do_not_disturb_each_other() {
    let node = Node::new("hft-same");
    let pod = Netns::new("hft-same-p");
    let plan = node.endpoint(&pod, "10.83.0.2,fd83::2");
    let node_plan = node.alone_plan();
    let path = pod.path().to_owned();
    // The kernel runs one dump on a socket and refuses a second (EBUSY). Several workers, as the agent has them: one
    // alone happens to read an answer before it sends the next request.
    let all_at_once = move || {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(4).enable_all().build().unwrap();
        runtime.block_on(async {
            let dp =
                std::sync::Arc::new(Dataplane::new(holdfast_dataplane::Config::default()).await.unwrap());
            dp.apply_node(&node_plan).await.unwrap();
            dp.attach(&plan, &path).await.unwrap();
            let tasks = (0..8).map(|_| {
                let (dp, plan, node_plan, path) = (dp.clone(), plan.clone(), node_plan.clone(), path.clone());
                tokio::spawn(async move {
                    for _ in 0..20 {
                        dp.check(&plan, &plan, &path).await.unwrap();
                        assert_eq!(dp.apply_node(&node_plan).await.unwrap(), 0);
                        assert_eq!(dp.list_endpoints().await.unwrap().len(), 1);
                        // One whose caller goes away is in nobody's way either.
                        let _ = futures::poll!(Box::pin(dp.list_endpoints()));
                    }
                })
            });
            for task in tasks.collect::<Vec<_>>() {
                task.await.unwrap();
            }
        });
    };
    node.netns.inside(all_at_once).join().unwrap();
}

#[test]
fn a_check_sets_a_neighbour_that_is_not_seen_and_reports_one_with_another_mac() {
    let node = Node::new("hft-ngh");
    let pod = Netns::new("hft-ngh-p");
    let plan = node.endpoint(&pod, "10.84.0.2,fd84::2");
    let node_plan = node.alone_plan();
    let on_node = format!("10.84.0.2 dev {}", node.pod_device(&plan));
    let places =
        [(&node.netns, on_node.as_str()), (&pod, "169.254.1.1 dev eth0"), (&pod, "fe80::1 dev eth0")];
    node.runtime.block_on(async |dp: &Dataplane| {
        dp.apply_node(&node_plan).await.unwrap();
        dp.attach(&plan, pod.path()).await.unwrap();
        for (netns, entry) in places {
            let before = netns.run("ip neigh show nud permanent | sort");
            netns.run(&format!("ip neigh del {entry}"));
            dp.check(&plan, &plan, pod.path()).await.unwrap();
            assert_eq!(netns.run("ip neigh show nud permanent | sort"), before, "{entry}");
            netns.run(&format!("ip neigh replace {entry} lladdr 02:00:00:00:00:07 nud permanent"));
            assert!(
                matches!(dp.check(&plan, &plan, pod.path()).await.unwrap_err(), Error::Differs(_)),
                "{entry}"
            );
            netns.run(&format!("ip neigh del {entry}"));
            dp.check(&plan, &plan, pod.path()).await.unwrap();
        }
    });
}

/// A port that is not in state forwarding drops what a pod sends from its first instruction. And a link is found nowhere once its
/// deletion is answered, though the kernel may still be freeing it: its names are free for the next round.
#[test]
fn a_port_forwards_when_its_attachment_is_answered_and_is_gone_when_its_removal_is() {
    let node = Node::new("hft-fwd");
    let pod = Netns::new("hft-fwd-pod");
    let plan = node.endpoint(&pod, "10.77.5.2");
    let node_plan = node.alone_plan();
    node.runtime.block_on(async |dp: &Dataplane| {
        dp.apply_node(&node_plan).await.unwrap();
    });
    for round in 0..20 {
        node.runtime.block_on(async |dp: &Dataplane| dp.attach(&plan, pod.path()).await.unwrap());
        let port = node.netns.run(&format!("ip -d link show {}", plan.host_ifname));
        let open = if support::is_routed() { "state UP" } else { "state forwarding" };
        assert!(port.contains(open), "round {round}: {port}");
        node.runtime.block_on(async |dp: &Dataplane| dp.detach(&plan.host_ifname).await.unwrap());
        for netns in [&node.netns, &pod] {
            let links = netns.run("ip -o link");
            assert!(!links.contains("hfv") && !links.contains("eth0"), "round {round}: {links}");
        }
    }
}

#[test]
fn a_restarted_agent_adopts_the_rules_and_a_stale_ruleset_does_not_open_a_new_pod() {
    let node = Node::new("hft-re");
    let (server, client) = (Netns::new("hft-re-s"), Netns::new("hft-re-c"));
    let (plan_s, plan_c) = (node.endpoint(&server, "10.82.0.2"), node.endpoint(&client, "10.82.0.3"));
    let policy = mk_policy(&[&plan_s, &plan_c], &plan_s, &[(&plan_c, 80)]);
    let stale = mk_policy(&[&plan_c], &plan_s, &[]);
    let node_plan = node.alone_plan();
    node.runtime.block_on(async |dp: &Dataplane| {
        dp.apply_node(&node_plan).await.unwrap();
        dp.attach(&plan_c, client.path()).await.unwrap();
        dp.attach(&plan_s, server.path()).await.unwrap();
        // Computed before the server was attached: it must stay pinned and closed.
        let mut stale = stale.clone();
        stale.cls_in.clear();
        dp.apply_ruleset(&stale).await.unwrap();
    });
    let _server = serve_bytes(&server, "10.82.0.2:80");
    assert!(!connects(&client, "10.82.0.2:80"));
    node.runtime.block_on(async |dp: &Dataplane| dp.apply_ruleset(&policy).await.unwrap());
    assert!(connects(&client, "10.82.0.2:80"));
    let generation = node.netns.nft_generation();
    let again = support::NodeRuntime::start(&node.netns);
    again.block_on(async |dp: &Dataplane| {
        assert_eq!(dp.load_ruleset().await.unwrap(), policy);
        assert_eq!(dp.apply_ruleset(&policy).await.unwrap(), Applied::default());
        assert_eq!(dp.apply_node(&node_plan).await.unwrap(), 0);
        dp.check(&plan_s, &plan_s, server.path()).await.unwrap();
    });
    assert_eq!(node.netns.nft_generation(), generation, "a restart writes nothing");
}
