//! The uplink's MTU and the nodes' addresses are followed while pods live. On the real binaries, real agents and a real kernel. Needs
//! root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde_json::json;
use support::{Cluster, Netns, Node, address_of, eventually, host_end, is_routed, pod_end};

fn mtu_of(netns: &Netns, link: &str) -> u64 {
    let text = netns.ip(&format!("-o link show dev {link}"));
    text.split(" mtu ").nth(1).unwrap().split(' ').next().unwrap().parse().unwrap()
}

/// Runs `work` on a thread in a namespace.
fn inside<T: Send>(netns: &Netns, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let entered = scope.spawn(|| {
            let file = std::fs::File::open(netns.path()).unwrap();
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        entered.join().unwrap()
    })
}

/// A connection from `client` to `server`, of which both ends are here.
fn connect(client: &Netns, server: &Netns, address: &str) -> (TcpStream, TcpStream) {
    let listener = inside(server, || TcpListener::bind(format!("{address}:5432")).unwrap());
    let stream = inside(client, || TcpStream::connect(listener.local_addr().unwrap()).unwrap());
    let accepted = listener.accept().unwrap().0;
    for end in [&stream, &accepted] {
        end.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
        end.set_nodelay(true).unwrap();
    }
    (stream, accepted)
}

/// A megabyte each way, so that full packets are sent.
fn exchange(ends: &mut (TcpStream, TcpStream)) {
    let (one, two) = ends;
    for (from, to) in [(&*one, &*two), (&*two, &*one)] {
        let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
        let sender = std::thread::spawn(move || from.write_all(&vec![7; 1 << 20]).unwrap());
        to.read_exact(&mut vec![0; 1 << 20]).unwrap();
        sender.join().unwrap();
    }
}

/// A single packet and its answer, without a long wait for it.
fn passes(from: &Netns, to: &str) -> bool {
    from.exec("ping").args(["-c1", "-W0.1", to]).output().unwrap().status.success()
}

/// How long it takes until something holds.
fn within(what: &str, limit: Duration, mut holds: impl FnMut() -> bool) -> Duration {
    let started = Instant::now();
    eventually(what, &mut holds);
    let took = started.elapsed();
    println!("{what}: after {took:?}");
    assert!(took < limit, "{what}: after {took:?}");
    took
}

/// The promise is a second; machines that build something beside get more.
const LIMIT: Duration = Duration::from_secs(3);

fn two_nodes(cluster: &Cluster) -> (Node, Node) {
    cluster.put_node("a", 1, "10.42.1.0/24");
    cluster.put_node("b", 2, "10.42.2.0/24");
    for pod in ["one", "tuned", "far"] {
        cluster.put_pod(pod, "");
    }
    (cluster.start_node("a", 1), cluster.start_node("b", 2))
}

#[test]
fn the_uplinks_mtu_reaches_overlay_and_living_pods_and_check_agrees() {
    let cluster = Cluster::new();
    let (mut a, b) = two_nodes(&cluster);
    let pods = [Netns::new(), Netns::new(), Netns::new()];
    let one = a.add("one", &pods[0]).unwrap();
    let tuned = a.add("tuned", &pods[1]).unwrap();
    let far = b.add("far", &pods[2]).unwrap();
    let mut connection = connect(&pods[0], &pods[2], &address_of(&far));
    exchange(&mut connection);
    for port in ["p1", "p2", "br0"] {
        cluster.underlay.ip(&format!("link set {port} mtu 1600"));
    }
    // As the plugin `tuning` does.
    pods[1].ip("link set eth0 mtu 1200");
    let mut tuned_result = tuned.clone();
    let inside_at = pod_end(&tuned);
    tuned_result["interfaces"][inside_at]["mtu"] = json!(1200);
    let ends = [host_end(&one), host_end(&tuned)];
    let bridge = if is_routed() { "hf.vx" } else { "hf0" };

    for (uplink, inside, lowered) in
        [(1400_u64, 1350_u64, 1200_u64), (1600, 1550, 1200), (1200, 1150, 1150), (1500, 1450, 1200)]
    {
        for node in [&a, &b] {
            node.netns.ip(&format!("link set eth0 mtu {uplink}"));
        }
        within(&format!("an uplink with MTU {uplink} is followed"), LIMIT, || {
            let of_node = [bridge, "hf.vx", ends[0], ends[1]].map(|link| mtu_of(&a.netns, link));
            of_node == [inside; 4]
                && mtu_of(&pods[0], "eth0") == inside
                && mtu_of(&pods[1], "eth0") == lowered
        });
        eventually("the other node follows, too", || mtu_of(&pods[2], "eth0") == inside);
        exchange(&mut connection);
        let size = (inside - 28).to_string();
        let ping = |size: &str| {
            let mut ping = pods[0].exec("ping");
            ping.args(["-c1", "-W1", "-Mdo", "-s", size, &address_of(&far)])
                .output()
                .unwrap()
                .status
                .success()
        };
        assert!(ping(&size), "the largest packet passes");
        let lease = |index: usize| a.dump()["leases"][index]["plan"]["mtu"].as_u64().unwrap();
        assert_eq!((lease(0), lease(1)), (inside, inside));
        a.cni("CHECK", "one", Some(&pods[0].path()), json!({ "prevResult": one })).unwrap();
        a.cni("CHECK", "tuned", Some(&pods[1].path()), json!({ "prevResult": tuned_result })).unwrap();
    }
    // Durably: a restart finds nothing to do, and CHECK of the result of ADD still agrees.
    for node in [&a, &b] {
        node.netns.ip("link set eth0 mtu 1400");
    }
    within("the last change is followed", LIMIT, || mtu_of(&pods[0], "eth0") == 1350);
    eventually("the lease has it", || a.dump()["leases"][0]["plan"]["mtu"] == 1350);
    a.kill();
    a.start();
    assert_eq!(mtu_of(&pods[0], "eth0"), 1350);
    assert_eq!(a.dump()["leases"][0]["plan"]["mtu"], 1350);
    a.cni("CHECK", "one", Some(&pods[0].path()), json!({ "prevResult": one })).unwrap();
    exchange(&mut connection);
}

#[test]
fn an_mtu_that_changed_while_the_agent_was_away_is_followed_at_its_start() {
    let cluster = Cluster::new();
    let (mut a, _b) = two_nodes(&cluster);
    let pod = Netns::new();
    a.add("one", &pod).unwrap();
    a.kill();
    a.netns.ip("link set eth0 mtu 1300");
    a.start();
    within("it is followed", LIMIT, || mtu_of(&pod, "eth0") == 1250 && mtu_of(&a.netns, "hf.vx") == 1250);
}

#[test]
fn a_nodes_new_address_is_followed_by_itself_and_by_its_peers_and_connections_survive() {
    let cluster = Cluster::new();
    let (a, b) = two_nodes(&cluster);
    let pods = [Netns::new(), Netns::new()];
    a.add("one", &pods[0]).unwrap();
    let far = address_of(&b.add("far", &pods[1]).unwrap());
    let mut connection = connect(&pods[0], &pods[1], &far);
    exchange(&mut connection);
    let underlay = |node: &Node| node.dump()["peers"][0]["underlay"].clone();
    for (old, new) in [(2_u8, 7_u8), (7, 9)] {
        // The interface first, then the object, as a kubelet does; the old address goes with the new one's arrival.
        b.netns.ip(&format!("addr add 192.0.2.{new}/24 dev eth0"));
        b.netns.ip(&format!("addr del 192.0.2.{old}/24 dev eth0"));
        b.netns.ip(&format!("addr replace 192.0.2.{new}/24 dev eth0"));
        cluster.put_node("b", new, "10.42.2.0/24");
        let took = within("traffic passes over the new address", LIMIT, || passes(&pods[0], &far));
        assert_eq!(underlay(&a), format!("192.0.2.{new}"), "after {took:?}");
        assert!(b.netns.ip("-d link show hf.vx").contains(&format!("local 192.0.2.{new} ")));
        exchange(&mut connection);
        let entries = String::from_utf8(
            a.netns.exec("bridge").args(["fdb", "show", "dev", "hf.vx"]).output().unwrap().stdout,
        );
        assert!(!entries.unwrap().contains(&format!("dst 192.0.2.{old} ")), "nothing of the old one is left");
    }
    // The object first: the agent waits for the address.
    cluster.put_node("b", 11, "10.42.2.0/24");
    eventually("the agent misses its address", || b.dump()["nodeError"].is_string());
    b.netns.ip("addr add 192.0.2.11/24 dev eth0");
    b.netns.ip("addr del 192.0.2.9/24 dev eth0");
    b.netns.ip("addr replace 192.0.2.11/24 dev eth0");
    within("traffic passes once the address is there", LIMIT, || passes(&pods[0], &far));
    exchange(&mut connection);
}
