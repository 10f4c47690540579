//! The capability `portMappings`: ports of the node that lead to a pod. On the real binaries, a real agent and a real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::Duration;

use serde_json::{Value, json};
use support::sockets::{Server, ask_from, ask_tcp, ask_udp};
use support::{Cluster, Netns, Node, eventually, inside, is_routed};

const NODE: &str = "192.0.2.1";
const NODE_6: &str = "2001:db8::1";

/// Two nodes with pods of both families.
fn mk_cluster() -> (Cluster, Node, Node) {
    let cluster = Cluster::new();
    for (name, number) in [("a", 1), ("b", 2)] {
        let ranges = [format!("10.42.{number}.0/24"), format!("fd00:{number}::/64")];
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": { "name": name }, "spec": { "podCIDRs": ranges },
            "status": { "addresses": [
                { "type": "InternalIP", "address": format!("192.0.2.{number}") },
                { "type": "InternalIP", "address": format!("2001:db8::{number}") },
            ] },
        });
        cluster.put(&format!("node-{name}"), &node);
    }
    let (a, b) = (cluster.start_node("a", 1), cluster.start_node("b", 2));
    (cluster, a, b)
}

/// ADD with host ports; the result.
fn add(node: &Node, id: &str, sandbox: &Netns, mappings: Value) -> Result<Value, Value> {
    let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={id}");
    let extra = json!({ "runtimeConfig": { "portMappings": mappings } });
    node.cni_with("ADD", id, Some(&sandbox.path()), &args, extra)
}

/// Both addresses of a result.
fn addresses_of(result: &Value) -> (String, String) {
    let text = |index: usize| {
        let text = result["ips"][index]["address"].as_str().unwrap();
        text.split('/').next().unwrap().to_owned()
    };
    (text(0), text(1))
}

fn both_protocols(port: u16) -> Value {
    json!([
        { "hostPort": port, "containerPort": 80, "protocol": "tcp" },
        { "hostPort": port, "containerPort": 80, "protocol": "udp" },
    ])
}

#[test]
fn a_host_port_leads_to_its_pod_from_everywhere_and_the_clients_address_stays() {
    let (cluster, a, b) = mk_cluster();
    for name in ["web", "near", "far"] {
        cluster.put_pod(name, "");
    }
    let (web, near, far, outside) = (Netns::new(), Netns::new(), Netns::new(), cluster.outside(100));
    let (own, own_6) = addresses_of(&add(&a, "web", &web, both_protocols(8080)).unwrap());
    let (near_4, near_6) = addresses_of(&a.add("near", &near).unwrap());
    let (far_4, far_6) = addresses_of(&b.add("far", &far).unwrap());
    let _server = Server::new(&web, "web", "[::]:80");
    let (on_node, on_node_6) = (format!("{NODE}:8080"), format!("[{NODE_6}]:8080"));
    let cases = [
        ("outside", &outside, &on_node, "192.0.2.100"),
        ("outside", &outside, &on_node_6, "2001:db8::100"),
        ("the other node", &b.netns, &on_node, "192.0.2.2"),
        ("the other node", &b.netns, &on_node_6, "2001:db8::2"),
        ("a pod of the other node", &far, &on_node, far_4.as_str()),
        ("a pod of the other node", &far, &on_node_6, far_6.as_str()),
        ("a pod of the node", &near, &on_node, near_4.as_str()),
        ("a pod of the node", &near, &on_node_6, near_6.as_str()),
        ("the node", &a.netns, &on_node, NODE),
        ("the node", &a.netns, &on_node_6, NODE_6),
    ];
    for (who, from, to, source) in cases {
        assert_eq!(ask_tcp(from, to), Some(format!("web {source}")), "tcp from {who} to {to}");
        assert_eq!(ask_udp(from, to), Some(format!("web {source}")), "udp from {who} to {to}");
    }
    // Masqueraded, as the pod would not take its own address, nor the loopback's, from outside.
    let loopback = "127.0.0.1:8080".to_owned();
    for (who, from, to) in [
        ("itself", &web, &on_node),
        ("itself", &web, &on_node_6),
        ("the node's loopback", &a.netns, &loopback),
    ] {
        for found in [ask_tcp(from, to), ask_udp(from, to)] {
            let found = found.unwrap_or_else(|| panic!("nobody answers {who} at {to}"));
            let source = found.strip_prefix("web ").unwrap();
            assert!(source != own && source != own_6 && !source.starts_with("127."), "{who}: {found}");
        }
    }
    // What the node itself serves on the other families' loopback, and pods' own ports, stay what they are.
    let _node_server = Server::new(&a.netns, "node", "[::1]:8080");
    assert_eq!(ask_tcp(&a.netns, "[::1]:8080"), Some("node ::1".to_owned()));
    assert_eq!(ask_tcp(&near, &format!("{own}:80")), Some(format!("web {near_4}")));
    assert_eq!(ask_tcp(&near, &format!("{own}:8080")), None, "a pod's address has no host port");
}

#[test]
fn a_host_port_of_one_address_is_no_others() {
    let (cluster, a, _b) = mk_cluster();
    a.netns.ip("addr add 192.0.2.50/24 dev eth0");
    a.netns.ip("addr add 2001:db8::50/64 dev eth0 nodad");
    let (one, two, outside) = (Netns::new(), Netns::new(), cluster.outside(100));
    let at = |address: &str| json!({ "hostPort": 8080, "containerPort": 80, "hostIP": address });
    cluster.put_pod("one", "");
    cluster.put_pod("two", "");
    add(&a, "one", &one, json!([at("192.0.2.50"), at("2001:db8::50")])).unwrap();
    // The rest of one family, and nothing of the other one.
    let refused = add(&a, "two", &two, json!([at("0.0.0.0")])).unwrap_err();
    assert_eq!(refused["code"], 11, "all addresses hold the other pod's: {refused}");
    add(&a, "two", &two, json!([at(NODE)])).unwrap();
    let _servers = (Server::new(&one, "one", "[::]:80"), Server::new(&two, "two", "[::]:80"));
    let name = |to: &str| ask_tcp(&outside, to).map(|text| text.split(' ').next().unwrap().to_owned());
    assert_eq!(name("192.0.2.50:8080").as_deref(), Some("one"));
    assert_eq!(name("[2001:db8::50]:8080").as_deref(), Some("one"));
    assert_eq!(name("192.0.2.1:8080").as_deref(), Some("two"));
    assert_eq!(name("[2001:db8::1]:8080"), None);
    // An address that is not the node's is nobody's to take: the packet goes on its way.
    let (three, elsewhere) = (Netns::new(), cluster.outside(101));
    cluster.put_pod("three", "");
    add(&a, "three", &three, json!([{ "hostPort": 8081, "containerPort": 80, "hostIP": "192.0.2.101" }]))
        .unwrap();
    let _others =
        (Server::new(&three, "three", "[::]:80"), Server::new(&elsewhere, "elsewhere", "[::]:8081"));
    let asked = ask_tcp(&one, "192.0.2.101:8081").expect("the host outside answers");
    assert!(asked.starts_with("elsewhere "), "{asked}");
}

#[test]
fn policy_judges_a_host_ports_client_and_the_pods_own_port() {
    let (cluster, a, b) = mk_cluster();
    for name in ["db", "api", "web"] {
        cluster.put_pod(name, "");
    }
    let (db, api, web, outside) = (Netns::new(), Netns::new(), Netns::new(), cluster.outside(100));
    add(&a, "db", &db, both_protocols(8080)).unwrap();
    a.add("api", &api).unwrap();
    let (far, far_6) = addresses_of(&b.add("web", &web).unwrap());
    cluster.put(
        "pod-web",
        &json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": "web", "namespace": "shop", "labels": { "app": "web" } },
            "status": { "phase": "Running", "podIPs": [{ "ip": far }, { "ip": far_6 }] },
        }),
    );
    let _server = Server::new(&db, "db", "[::]:80");
    let to = format!("{NODE}:8080");
    let reached = |from: &Netns| (ask_tcp(from, &to).is_some(), ask_udp(from, &to).is_some());
    assert_eq!(reached(&outside), (true, true), "no policy selects it");
    cluster.put_policy("db", "api");
    eventually("outside is cut off", || reached(&outside) == (false, false));
    assert_eq!(reached(&web), (false, false));
    assert_eq!(reached(&api), (true, true), "the pod that the policy names");
    assert_eq!(reached(&db), (false, false), "itself, as by a Service");
    assert_eq!(reached(&a.netns), (true, true), "a node reaches its own pods");
    cluster.put_policy("db", "web");
    eventually("the pod of the other node is let in", || reached(&web) == (true, true));
    assert_eq!(reached(&api), (false, false));
    // The port that counts is the pod's, not the node's.
    let of_port = |port: u16| {
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": { "name": "to-db", "namespace": "shop" },
            "spec": { "podSelector": { "matchLabels": { "app": "db" } }, "ingress": [{ "ports": [{ "port": port }] }] },
        })
    };
    cluster.put("policy-db", &of_port(80));
    eventually("by the pod's port", || ask_tcp(&outside, &to).is_some());
    cluster.put("policy-db", &of_port(8080));
    eventually("not by the node's", || ask_tcp(&outside, &to).is_none());
}

#[test]
fn a_host_port_that_is_taken_is_refused_with_its_holders_name_and_nothing_stays() {
    let (cluster, a, _b) = mk_cluster();
    cluster.put_pod("one", "");
    cluster.put_pod("two", "");
    let (one, two, outside) = (Netns::new(), Netns::new(), cluster.outside(100));
    add(&a, "one", &one, both_protocols(8080)).unwrap();
    let before = a.pod_state();
    for mappings in [
        both_protocols(8080),
        json!([{ "hostPort": 9090, "containerPort": 80 }, { "hostPort": 8080, "containerPort": 81, "hostIP": NODE }]),
    ] {
        let error = add(&a, "two", &two, mappings).unwrap_err();
        assert_eq!(error["code"], 11, "{error}");
        let msg = error["msg"].as_str().unwrap();
        assert!(
            msg.contains("8080/tcp") && msg.contains("container one/eth0") && msg.contains("shop/one"),
            "{msg}"
        );
        assert_eq!(a.pod_state(), before);
        assert_eq!(a.dump()["leases"].as_array().unwrap().len(), 1);
    }
    let error = add(&a, "two", &two, json!([{ "hostPort": 4789, "containerPort": 80, "protocol": "udp" }]));
    assert_eq!(error.unwrap_err()["code"], 7, "the overlay's port");
    // Two at once: one of them gets it.
    let three = Netns::new();
    let won = std::thread::scope(|scope| {
        let adds = [("two", &two), ("three", &three)]
            .map(|(id, sandbox)| (id, scope.spawn(|| add(&a, id, sandbox, both_protocols(7070)))));
        adds.map(|(_, add)| add.join().unwrap().is_ok()).into_iter().filter(|won| *won).count()
    });
    assert_eq!(won, 1);
    for id in ["two", "three", "one"] {
        a.del(id).unwrap();
    }
    add(&a, "two", &two, both_protocols(8080)).unwrap();
    let _server = Server::new(&two, "two", "[::]:80");
    assert!(ask_tcp(&outside, &format!("{NODE}:8080")).is_some(), "free again after DEL");
}

fn nft(node: &Node, args: &str) {
    assert!(node.netns.exec("nft").args(args.split(' ')).status().unwrap().success(), "nft {args}");
}

#[test]
fn host_ports_survive_the_agent_are_mended_and_checked_and_go_with_del_and_gc() {
    let (cluster, mut a, _b) = mk_cluster();
    for name in ["one", "two"] {
        cluster.put_pod(name, "");
    }
    let clean = a.pod_state();
    let (one, two, outside) = (Netns::new(), Netns::new(), cluster.outside(100));
    let result = add(&a, "one", &one, both_protocols(8080)).unwrap();
    add(&a, "two", &two, both_protocols(8081)).unwrap();
    let _servers = (Server::new(&one, "one", "[::]:80"), Server::new(&two, "two", "[::]:80"));
    let reached = |port: u16| ask_tcp(&outside, &format!("{NODE}:{port}")).is_some();
    assert!(reached(8080) && reached(8081));
    let rules = a.rules_text();
    a.kill();
    assert!(reached(8080), "without an agent");
    a.start();
    assert_eq!(a.rules_text(), rules, "an unchanged state is not written");
    // What goes missing while the agent is away is put back by its start.
    a.kill();
    nft(&a, "flush map inet holdfast hostport4");
    assert!(!reached(8080), "the map is what leads there");
    a.start();
    assert!(reached(8080) && reached(8081));
    for tampering in [
        "flush map inet holdfast hostport4",
        "flush set inet holdfast hairpin4",
        "flush chain inet holdfast hostports",
        "delete table inet holdfast",
    ] {
        nft(&a, tampering);
        eventually(tampering, || a.rules_text() == rules || reached(8080) && a.rules_text().contains("8081"));
        assert!(reached(8080) && reached(8081), "{tampering}");
        nft(&a, tampering);
        let check = json!({ "prevResult": result });
        a.cni("CHECK", "one", Some(&one.path()), check).unwrap();
        assert!(reached(8080), "CHECK mends before it looks: {tampering}");
    }
    let valid = json!({ "cni.dev/valid-attachments": [{ "containerID": "one", "ifname": "eth0" }] });
    a.cni("GC", "", None, valid).unwrap();
    assert!(reached(8080) && !reached(8081), "GC takes what is not valid");
    assert!(!a.rules_text().contains("8081"));
    a.kill();
    a.del("one").unwrap();
    assert!(reached(8080), "the record is kept for later");
    a.start();
    assert!(!reached(8080));
    // Neighbours on the underlay come with the traffic.
    let lines = |text: &str| -> Vec<String> {
        text.lines().filter(|line| !line.contains(" dev eth0 ")).map(str::to_owned).collect()
    };
    eventually("nothing is left", || lines(&a.pod_state()) == lines(&clean));
}

/// A client that never changes its port, as DNS forwarders and syslog senders are. Its entry in conntrack lives as long as it sends.
#[test]
fn a_udp_client_that_goes_on_sending_follows_a_host_port_that_comes_and_goes() {
    let (cluster, a, _b) = mk_cluster();
    cluster.put_pod("one", "");
    cluster.put_pod("two", "");
    let (one, two, outside) = (Netns::new(), Netns::new(), cluster.outside(100));
    let to: SocketAddr = format!("{NODE}:5353").parse().unwrap();
    let socket = inside(&outside, || UdpSocket::bind("192.0.2.100:4000").unwrap()).join().unwrap();
    let asked = || (0..4).find_map(|_| ask_from(&socket, to));
    let other: SocketAddr = format!("{NODE}:5454").parse().unwrap();
    let _node_server = Server::new(&a.netns, "node", "0.0.0.0:5454");
    assert_eq!(ask_from(&socket, other).as_deref(), Some("node 192.0.2.100"));
    assert_eq!(asked(), None, "nobody is there yet, and conntrack has an entry that says so");
    for (id, sandbox) in [("one", &one), ("two", &two)] {
        add(&a, id, sandbox, both_protocols(5353)).unwrap();
        let server = Server::new(sandbox, id, "[::]:80");
        assert_eq!(asked(), Some(format!("{id} 192.0.2.100")));
        drop(server);
        a.del(id).unwrap();
        assert_eq!(asked(), None);
    }
    assert_eq!(ask_from(&socket, other).as_deref(), Some("node 192.0.2.100"), "other ports are left alone");
}

/// `route_localnet` of the bridge or the host's end is what lets the node's loopback reach host ports. It must not let pods reach the node's loopback.
#[test]
fn no_pod_reaches_what_the_node_serves_on_its_loopback() {
    let (cluster, mut a, _b) = mk_cluster();
    cluster.put_pod("one", "");
    let one = Netns::new();
    add(&a, "one", &one, both_protocols(8080)).unwrap();
    let seen = inside(&a.netns, || UdpSocket::bind("127.0.0.1:9000").unwrap()).join().unwrap();
    seen.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    // The pod's own loopback is gone, so that the packet leaves.
    one.ip("addr flush dev lo");
    one.ip("route add 127.0.0.1 via 169.254.1.1 dev eth0 onlink");
    let arrives = || {
        let sent = inside(&one, || {
            let socket = UdpSocket::bind("0.0.0.0:0").unwrap();
            for _ in 0..3 {
                socket.send_to(b"!", "127.0.0.1:9000").unwrap();
            }
        });
        sent.join().unwrap();
        seen.recv_from(&mut [0; 8]).is_ok()
    };
    assert!(!arrives());
    // The packets are such that they would.
    a.kill();
    nft(&a, if is_routed() { "delete table inet holdfast" } else { "delete table bridge holdfast" });
    assert!(arrives(), "the test sends nothing that the pin could stop");
}

/// CRC32c, as SCTP has it (RFC 9260, appendix A).
fn crc32c(bytes: &[u8]) -> u32 {
    let step = |crc: u32, _| if crc & 1 == 1 { (crc >> 1) ^ 0x82f6_3b78 } else { crc >> 1 };
    !bytes.iter().fold(!0_u32, |crc, byte| (0..8).fold(crc ^ u32::from(*byte), step))
}

const SCTP: u8 = 132;

/// An IPv4 packet with an SCTP INIT (RFC 9260, section 3.3.2). The kernel completes the IP header.
fn mk_init(from: Ipv4Addr, to: Ipv4Addr, port: u16) -> Vec<u8> {
    let mut sctp = [&4000_u16.to_be_bytes()[..], &port.to_be_bytes(), &[0; 8]].concat();
    sctp.extend([1, 0, 0, 20, 0, 0, 0, 7, 0, 1, 0, 0, 0, 1, 0, 1, 0, 0, 0, 9]);
    let sum = crc32c(&sctp).to_le_bytes();
    sctp[8..12].copy_from_slice(&sum);
    let mut packet = vec![0x45, 0, 0, 52, 0, 0, 0, 0, 64, SCTP, 0, 0];
    packet.extend(from.octets());
    packet.extend(to.octets());
    packet.extend(sctp);
    packet
}

/// This kernel may have no SCTP sockets: an INIT is sent and looked for as a packet.
#[test]
fn an_sctp_packet_is_led_to_the_pod_with_a_right_checksum() {
    use nix::sys::socket::{
        AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrIn, recv, sendto, socket,
    };
    let (cluster, a, _b) = mk_cluster();
    cluster.put_pod("one", "");
    let (one, outside) = (Netns::new(), cluster.outside(100));
    let mapping = json!([{ "hostPort": 8080, "containerPort": 80, "protocol": "SCTP" }]);
    add(&a, "one", &one, mapping).unwrap();
    let (ready, is_ready) = std::sync::mpsc::channel();
    let capture = inside(&one, move || {
        let flags = SockFlag::SOCK_NONBLOCK;
        let all = socket(AddressFamily::Packet, SockType::Datagram, flags, SockProtocol::EthAll).unwrap();
        ready.send(()).unwrap();
        let mut packet = [0; 256];
        for _ in 0..300 {
            let length = recv(all.as_raw_fd(), &mut packet, MsgFlags::empty()).unwrap_or(0);
            if length >= 52 && packet[9] == SCTP {
                return Some(packet[..length].to_vec());
            }
            if length == 0 {
                std::thread::sleep(Duration::from_millis(10));
            }
        }
        None
    });
    is_ready.recv().unwrap();
    let sent = inside(&outside, || {
        let flags = SockFlag::empty();
        let raw = socket(AddressFamily::Inet, SockType::Raw, flags, SockProtocol::Raw).unwrap();
        let packet = mk_init([192, 0, 2, 100].into(), [192, 0, 2, 1].into(), 8080);
        sendto(raw.as_raw_fd(), &packet, &SockaddrIn::new(192, 0, 2, 1, 0), MsgFlags::empty()).unwrap();
    });
    sent.join().unwrap();
    let packet = capture.join().unwrap().expect("the INIT reaches the pod");
    assert_eq!(packet[12..16], [192, 0, 2, 100], "the client's address");
    let mut sctp = packet[20..].to_vec();
    assert_eq!(sctp[2..4], 80_u16.to_be_bytes(), "the pod's port");
    let sum: [u8; 4] = sctp[8..12].try_into().unwrap();
    sctp[8..12].fill(0);
    assert_eq!(u32::from_le_bytes(sum), crc32c(&sctp));
}
