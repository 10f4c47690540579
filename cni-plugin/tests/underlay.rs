//! Ways between nodes: the overlay on an underlay of IPv6 alone, and direct routes beside it. On the real binaries, real agents and a
//! real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::process::Stdio;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use serde_json::json;
use support::{Cluster, Netns, Node, eventually, inside};

const SETTINGS: &[&str] = &["--address-quarantine-s=0", "--collect-after-s=0"];
const AUTO: &[&str] = &["--address-quarantine-s=0", "--collect-after-s=0", "--overlay=auto"];
const DIRECT: &[&str] = &["--address-quarantine-s=0", "--collect-after-s=0", "--overlay=direct"];
const PORT: u16 = 5432;
/// Bytes of a transfer: many segments, also with offloads.
const TRANSFER_BYTES: usize = 8 << 20;

/// A node with pods of both families.
fn put_node(cluster: &Cluster, name: &str, number: u8, addresses: &[&str]) {
    let addresses: Vec<_> =
        addresses.iter().map(|address| json!({ "type": "InternalIP", "address": address })).collect();
    cluster.put(
        &format!("node-{name}"),
        &json!({
            "apiVersion": "v1", "kind": "Node", "metadata": { "name": name },
            "spec": { "podCIDRs": [format!("10.42.{number}.0/24"), format!("fd42:{number}::/64")] },
            "status": { "addresses": addresses },
        }),
    );
}

/// A pod with its addresses, IPv4 first.
struct Pod {
    netns: Netns,
    addresses: [IpAddr; 2],
}

fn add(cluster: &Cluster, node: &Node, name: &str) -> Pod {
    cluster.put_pod(name, "");
    let netns = Netns::new();
    let result = node.add(name, &netns).unwrap();
    let address = |index: usize| {
        let text = result["ips"][index]["address"].as_str().unwrap();
        text.split('/').next().unwrap().parse().unwrap()
    };
    let addresses: [IpAddr; 2] = [address(0), address(1)];
    cluster.put(
        &format!("pod-{name}"),
        &json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": "shop", "labels": { "app": name } },
            "status": { "phase": "Running", "podIP": addresses[0], "podIPs": addresses.map(|ip| json!({ "ip": ip })) },
        }),
    );
    Pod { netns, addresses }
}

/// Sends all it has to whoever connects, and says who that was.
fn serve(pod: &Pod) -> std::sync::mpsc::Receiver<IpAddr> {
    let (tell, told) = std::sync::mpsc::channel();
    let (ready, is_ready) = std::sync::mpsc::channel();
    drop(inside(&pod.netns, move || {
        let listener = TcpListener::bind(("::", PORT)).unwrap();
        ready.send(()).unwrap();
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            if tell.send(stream.peer_addr().unwrap().ip().to_canonical()).is_err() {
                return;
            }
            let _ = stream.write_all(&vec![7u8; TRANSFER_BYTES]);
        }
    }));
    is_ready.recv().unwrap();
    told
}

/// Bytes that a connection gives; `None` if there is none.
fn transfer(from: &Pod, to: IpAddr) -> Option<usize> {
    let work = move || {
        let mut stream =
            TcpStream::connect_timeout(&SocketAddr::new(to, PORT), Duration::from_millis(700)).ok()?;
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let mut all = Vec::new();
        stream.read_to_end(&mut all).ok().map(|_| all.len())
    };
    inside(&from.netns, work).join().unwrap()
}

fn shell(netns: &Netns, script: &str) -> bool {
    let mut command = netns.exec("sh");
    command.args(["-c", script]).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().unwrap().success()
}

/// Packets that a node had to cut or put together, of both families.
fn fragments(netns: &Netns) -> u64 {
    let mut command = netns.exec("cat");
    let output = command.args(["/proc/net/snmp", "/proc/net/snmp6"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut lines = text.lines().filter(|line| line.starts_with("Ip: "));
    let names: Vec<&str> = lines.next().unwrap().split(' ').collect();
    let values: Vec<&str> = lines.next().unwrap().split(' ').collect();
    let v4 =
        names.iter().zip(values).filter(|(name, _)| name.starts_with("Frag") || name.starts_with("Reasm"));
    let v4: u64 = v4.map(|(_, value)| value.parse::<u64>().unwrap()).sum();
    let v6 = text.lines().filter(|line| line.starts_with("Ip6Frag") || line.starts_with("Ip6Reasm"));
    v4 + v6.map(|line| line.split_whitespace().last().unwrap().parse::<u64>().unwrap()).sum::<u64>()
}

/// Packets that left by the overlay.
fn overlaid(node: &Node) -> u64 {
    let mut command = node.netns.exec("cat");
    let output = command.arg("/sys/class/net/hf.vx/statistics/tx_packets").output().unwrap();
    String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
}

/// `db` of one node lets `api` in, and not `web`, both of another one: by packets that arrive or not, in both families.
fn check_traffic_and_policy(cluster: &Cluster, nodes: [&Node; 2], mtu: u32) {
    let (db, api, web) =
        (add(cluster, nodes[1], "db"), add(cluster, nodes[0], "api"), add(cluster, nodes[0], "web"));
    let served = serve(&db);
    eventually("the pods' objects are known on both nodes", || {
        [&api, &web]
            .iter()
            .all(|pod| db.addresses.iter().all(|address| pod.netns.pings(&address.to_string())))
    });
    assert!(db.netns.ip("-o link show dev eth0").contains(&format!("mtu {mtu} ")));
    for (at, header) in [(0, 28), (1, 48)] {
        let (to, fits) = (db.addresses[at], mtu - header);
        assert!(shell(&api.netns, &format!("ping -M do -c1 -W1 -s {fits} {to}")), "{to} with {mtu} bytes");
        assert!(!shell(&api.netns, &format!("ping -M do -c1 -W1 -s {} {to}", fits + 1)), "{to} beyond");
        assert_eq!(transfer(&api, to), Some(TRANSFER_BYTES), "{to}");
        assert_eq!(served.recv().unwrap(), api.addresses[at], "the server sees the pod itself");
        assert!(nodes[0].netns.pings(&to.to_string()), "a node reaches a pod of another one");
    }
    cluster.put_policy("db", "api");
    eventually("web is cut off", || {
        db.addresses.iter().all(|address| !web.netns.pings(&address.to_string()))
    });
    for at in [0, 1] {
        assert_eq!(transfer(&api, db.addresses[at]), Some(TRANSFER_BYTES));
        assert_eq!(transfer(&web, db.addresses[at]), None, "{}", db.addresses[at]);
    }
    for node in nodes {
        assert_eq!(fragments(&node.netns), 0);
    }
    assert_eq!(fragments(&db.netns) + fragments(&api.netns), 0);
    cluster.remove("policy-db");
    for (node, name) in [(nodes[1], "db"), (nodes[0], "api"), (nodes[0], "web")] {
        node.del(name).unwrap();
        cluster.remove(&format!("pod-{name}"));
    }
}

#[test]
fn pods_of_both_families_meet_over_an_underlay_of_ipv6_alone_and_policy_holds() {
    let cluster = Cluster::new();
    put_node(&cluster, "a", 1, &["fd09::1"]);
    put_node(&cluster, "b", 2, &["fd09::2"]);
    let a = cluster.start_node_on("a", 1, SETTINGS, &["addr add fd09::1/64 dev eth0 nodad"]);
    let b = cluster.start_node_on("b", 2, SETTINGS, &["addr add fd09::2/64 dev eth0 nodad"]);
    assert!(!a.netns.ip("-4 addr show dev eth0").contains("inet "), "the underlay has no IPv4");
    let device = a.netns.ip("-d link show dev hf.vx");
    assert!(device.contains("noudp6zerocsumtx udp6zerocsumrx"), "{device}");
    check_traffic_and_policy(&cluster, [&a, &b], 1430);
    assert!(overlaid(&a) > 0);
}

#[test]
fn nodes_on_one_link_route_directly_with_the_whole_mtu_and_policy_holds() {
    let cluster = Cluster::new();
    let addresses = |number: u8| [format!("192.0.2.{number}"), format!("fd09::{number}")];
    for (name, number) in [("a", 1), ("b", 2)] {
        put_node(&cluster, name, number, &addresses(number).each_ref().map(String::as_str));
    }
    put_node(&cluster, "far", 9, &["198.51.100.9"]);
    let start = |name: &str, number: u8| {
        let v4 = format!("addr add 192.0.2.{number}/24 dev eth0");
        let v6 = format!("addr add fd09::{number}/64 dev eth0 nodad");
        cluster.start_node_on(name, number, DIRECT, &[&v4, &v6])
    };
    let (a, b) = (start("a", 1), start("b", 2));
    check_traffic_and_policy(&cluster, [&a, &b], 1500);
    assert!(!a.netns.ip("-o link show").contains("hf.vx"), "there is no overlay");
    assert!(!a.netns.ip("route show").contains("10.42.9.0/24"), "a node that cannot be reached is left out");
    assert!(a.log().contains("node far has no InternalIP on the link"), "{}", a.log());
}

/// A connection that takes data without end; ends with the value.
struct Stream {
    bytes: Arc<AtomicU64>,
    is_over: Arc<AtomicBool>,
}

impl Stream {
    fn open(from: &Pod, server: &Pod, to: IpAddr) -> Self {
        let (bytes, is_over) = (Arc::<AtomicU64>::default(), Arc::<AtomicBool>::default());
        let (ready, is_ready) = std::sync::mpsc::channel();
        let over = Arc::clone(&is_over);
        drop(inside(&server.netns, move || {
            let listener = TcpListener::bind(("::", PORT + 1)).unwrap();
            ready.send(()).unwrap();
            let mut stream = listener.accept().unwrap().0;
            while !over.load(Ordering::Relaxed) && stream.write_all(&[7; 4096]).is_ok() {
                std::thread::sleep(Duration::from_millis(1));
            }
        }));
        is_ready.recv().unwrap();
        let (counted, over) = (Arc::clone(&bytes), Arc::clone(&is_over));
        drop(inside(&from.netns, move || {
            let mut stream = TcpStream::connect((to, PORT + 1)).unwrap();
            stream.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
            let mut buffer = vec![0; 1 << 16];
            while !over.load(Ordering::Relaxed) {
                if let Ok(read) = stream.read(&mut buffer) {
                    counted.fetch_add(read as u64, Ordering::Relaxed);
                }
            }
        }));
        Self { bytes, is_over }
    }

    /// It goes on after this moment.
    fn goes_on(&self, what: &str) -> Duration {
        let (before, since) = (self.bytes.load(Ordering::Relaxed), Instant::now());
        // More than was on its way.
        eventually(what, || self.bytes.load(Ordering::Relaxed) > before + (1 << 19));
        since.elapsed()
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
    }
}

#[test]
fn a_peer_that_comes_onto_the_link_and_leaves_it_is_switched_under_a_running_connection() {
    let cluster = Cluster::new();
    cluster.route_underlay(&["192.0.2.254/24", "198.51.100.254/24"]);
    let [near, far] = [["192.0.2.2", "fd09::2"], ["198.51.100.2", "fd0a::2"]];
    put_node(&cluster, "a", 1, &["192.0.2.1", "fd09::1"]);
    put_node(&cluster, "b", 2, &far);
    put_node(&cluster, "c", 3, &["198.51.100.3"]);
    let commands = |own: [&str; 2], others: &str| {
        [
            format!("addr add {} dev eth0", own[0]),
            format!("addr add {} dev eth0 nodad", own[1]),
            format!("route add {others}"),
        ]
    };
    let start = |name: &str, number: u8, commands: &[String]| {
        let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
        cluster.start_node_on(name, number, AUTO, &commands)
    };
    let to_far = "198.51.100.0/24 via 192.0.2.254";
    let a = start("a", 1, &commands(["192.0.2.1/24", "fd09::1/64"], to_far));
    // One that has addresses of both links, of which its object names one at a time.
    let mut on_both = commands(["198.51.100.2/32", "fd09::2/64"], "192.0.2.0/24 dev eth0").to_vec();
    for more in ["addr add 192.0.2.2/32", "addr add fd0a::2/128 nodad", "route add 198.51.100.0/24"] {
        on_both.push(format!("{more} dev eth0"));
    }
    let b = start("b", 2, &on_both);
    let c = start("c", 3, &commands(["198.51.100.3/24", "fd0a::3/64"], "192.0.2.0/24 via 198.51.100.254"));
    let routes = |kind: &str| {
        let text = a.netns.ip("-4 route show proto 72") + &a.netns.ip("-6 route show proto 72");
        text.lines().filter(|line| line.contains(kind)).map(str::to_owned).collect::<Vec<_>>()
    };
    let of_c = routes("10.42.3.0/24");
    assert!(of_c.len() == 1 && of_c[0].contains("dev hf.vx"), "{of_c:?}");
    assert!(routes("10.42.2.0/24")[0].contains("dev hf.vx"), "{:?}", routes(""));
    let (db, api, other) = (add(&cluster, &b, "db"), add(&cluster, &a, "api"), add(&cluster, &c, "other"));
    eventually("all know each other", || {
        let targets = db.addresses.iter().chain(&other.addresses[..1]);
        targets.into_iter().all(|address| api.netns.pings(&address.to_string()))
    });
    let streams = [Stream::open(&api, &db, db.addresses[0]), Stream::open(&api, &other, other.addresses[0])];
    let mut monitor = a.netns.exec("ip");
    let mut monitor =
        monitor.args(["monitor", "route"]).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    for (addresses, device) in [(near, "dev eth0"), (far, "dev hf.vx"), (near, "dev eth0")] {
        put_node(&cluster, "b", 2, &addresses);
        for range in ["10.42.2.0/24", "fd42:2::/64"] {
            eventually(&format!("{range} {device}"), || {
                let routes = routes(range);
                routes.len() == 1 && routes[0].contains(device)
            });
        }
        for (stream, of) in streams.iter().zip(["b", "c"]) {
            let took = stream.goes_on(&format!("{device}: the connection to {of} goes on"));
            println!("{device}: the connection to {of} went on within {took:?}");
        }
        assert!(db.addresses.iter().all(|address| api.netns.pings(&address.to_string())), "{device}");
        assert_eq!(routes("10.42.3.0/24"), of_c, "the other peer's route is as it was");
    }
    drop(streams);
    monitor.kill().unwrap();
    let changes = String::from_utf8(monitor.wait_with_output().unwrap().stdout).unwrap();
    assert!(changes.contains("10.42.2.0/24"), "{changes}");
    assert!(!changes.contains("10.42.3.0/24"), "nobody touched the other peer's route: {changes}");
    assert!(
        !changes.lines().any(|line| line.starts_with("Deleted 10.42.2.0/24")),
        "never without a route: {changes}"
    );
}

/// From the overlay to none by way of `auto`, one node after the other.
#[test]
fn a_cluster_leaves_the_overlay_step_by_step_under_a_running_connection() {
    let cluster = Cluster::new();
    let mut nodes: Vec<Node> = Vec::new();
    for (name, number) in [("a", 1), ("b", 2)] {
        let addresses = [format!("192.0.2.{number}"), format!("fd09::{number}")];
        put_node(&cluster, name, number, &addresses.each_ref().map(String::as_str));
        let v4 = format!("addr add {}/24 dev eth0", addresses[0]);
        let v6 = format!("addr add {}/64 dev eth0 nodad", addresses[1]);
        nodes.push(cluster.start_node_on(name, number, SETTINGS, &[&v4, &v6]));
    }
    let (db, api) = (add(&cluster, &nodes[1], "db"), add(&cluster, &nodes[0], "api"));
    eventually("they know each other", || db.addresses.iter().all(|to| api.netns.pings(&to.to_string())));
    let stream = Stream::open(&api, &db, db.addresses[0]);
    for settings in [AUTO, DIRECT, AUTO, SETTINGS] {
        for node in &mut nodes {
            node.kill();
            node.settings = settings;
            node.start();
            stream.goes_on(&format!("the connection goes on with {settings:?}"));
        }
        let has_overlay = nodes[0].netns.ip("-o link show").contains("hf.vx");
        assert_eq!(has_overlay, settings != DIRECT, "{settings:?}");
        // A new next hop of IPv6 is asked for, which takes until the node's own link-local address is known to be unique.
        for to in db.addresses {
            eventually(&format!("{to} with {settings:?}"), || api.netns.pings(&to.to_string()));
        }
    }
}
