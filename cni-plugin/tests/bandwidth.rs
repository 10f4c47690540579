//! The capability `bandwidth`: the rate to a pod and from it. On the real binaries, a real agent and a real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use support::{Cluster, Netns, Node, address_of, host_end, inside};

const RATE: u64 = 40_000_000;
const BURST: u64 = 800_000;

fn limits(ingress: u64, egress: u64) -> Value {
    let burst = |rate: u64| if rate > 0 { BURST } else { 0 };
    json!({ "runtimeConfig": { "bandwidth": {
        "ingressRate": ingress, "ingressBurst": burst(ingress), "egressRate": egress, "egressBurst": burst(egress),
    } } })
}

fn mk_node() -> (Cluster, Node) {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    let node = cluster.start_node("a", 1);
    (cluster, node)
}

/// Bits per second that arrive from one namespace at `address` of another one, after half a second.
fn measure(from: &Netns, to: &Netns, address: &str) -> f64 {
    let (ready, is_ready) = std::sync::mpsc::channel();
    let sink = inside(to, move || {
        let listener = TcpListener::bind("0.0.0.0:0").unwrap();
        ready.send(listener.local_addr().unwrap().port()).unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(100))).unwrap();
        let (begin, mut buffer) = (Instant::now(), vec![0; 1 << 16]);
        let (warm, length) = (Duration::from_millis(500), Duration::from_millis(2000));
        let mut bytes = 0_u32;
        while begin.elapsed() < warm + length {
            let read = stream.read(&mut buffer).unwrap_or(0);
            if begin.elapsed() >= warm {
                bytes += u32::try_from(read).unwrap();
            }
        }
        f64::from(bytes) * 8.0 / length.as_secs_f64()
    });
    let to: SocketAddr = format!("{address}:{}", is_ready.recv().unwrap()).parse().unwrap();
    let source = inside(from, move || {
        let mut stream = TcpStream::connect(to).unwrap();
        while stream.write_all(&[0; 1 << 15]).is_ok() {}
    });
    let rate = sink.join().unwrap();
    source.join().unwrap();
    rate
}

fn is_near(found: f64) -> bool {
    let wanted = 40_000_000.0;
    (found - wanted).abs() <= 0.15 * wanted
}

#[test]
fn each_direction_has_the_rate_that_was_asked_for_and_the_neighbour_is_not_slowed() {
    let (_cluster, node) = mk_node();
    let (to, from, free) = (Netns::new(), Netns::new(), Netns::new());
    let add = |id: &str, sandbox: &Netns, extra: Value| {
        address_of(&node.cni("ADD", id, Some(&sandbox.path()), extra).unwrap())
    };
    let to_address = add("to", &to, limits(RATE, 0));
    let from_address = add("from", &from, limits(0, RATE));
    let free_address = add("free", &free, json!({}));
    let slow = measure(&free, &to, &to_address);
    assert!(is_near(slow), "to the pod: {slow}");
    let slow = measure(&from, &free, &free_address);
    assert!(is_near(slow), "from the pod: {slow}");
    // The other directions of the same pods, and a neighbour beside a pod at its limit.
    let fast = measure(&to, &free, &free_address).min(measure(&free, &from, &from_address));
    assert!(fast > 5.0 * 40_000_000.0, "the direction without a limit: {fast}");
    let (slow, fast) = std::thread::scope(|scope| {
        let slow = scope.spawn(|| measure(&from, &node.netns, "192.0.2.1"));
        let fast = scope.spawn(|| measure(&free, &node.netns, "192.0.2.1"));
        (slow.join().unwrap(), fast.join().unwrap())
    });
    assert!(is_near(slow), "beside another pod: {slow}");
    assert!(fast > 5.0 * 40_000_000.0, "the neighbour: {fast}");
    println!("measured {slow:.0} of {RATE} bit/s, the neighbour {fast:.0}");
}

/// What outlives or belongs to a pod's host end.
fn limiters(node: &Node) -> usize {
    node.netns.ip("-o link show").lines().filter(|line| line.contains(": hfb")).count()
}

#[test]
fn limits_survive_the_agent_are_checked_and_go_with_del_and_gc() {
    let (_cluster, mut node) = mk_node();
    let sandbox = Netns::new();
    let result = node.cni("ADD", "c", Some(&sandbox.path()), limits(RATE, RATE)).unwrap();
    let host = host_end(&result).to_owned();
    let limiter = host.replace("hfv", "hfb");
    let tc = |node: &Node, args: &str| {
        let output = node.netns.exec("tc").args(args.split(' ')).output().unwrap();
        assert!(output.status.success(), "tc {args}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    };
    for device in [&host, &limiter] {
        let shown = tc(&node, &format!("qdisc show dev {device}"));
        assert!(shown.contains("tbf") && shown.contains("rate 40Mbit burst 100000b"), "{shown}");
    }
    let check = |node: &Node| {
        node.cni("CHECK", "c", Some(&sandbox.path()), json!({ "prevResult": result })).map(drop)
    };
    check(&node).unwrap();
    node.kill();
    node.start();
    check(&node).unwrap();
    assert_eq!(limiters(&node), 1);
    let redirect =
        format!("parent ffff: protocol all u32 match u8 0 0 action mirred egress redirect dev {limiter}");
    for (take, put, part) in [
        (
            format!("qdisc replace dev {host} root tbf rate 80mbit burst 100000 latency 25ms"),
            format!("qdisc replace dev {host} root tbf rate 40mbit burst 100000 latency 25ms"),
            "the rate to the pod",
        ),
        (
            format!("qdisc del dev {limiter} root"),
            format!("qdisc add dev {limiter} root tbf rate 40mbit burst 100000 latency 25ms"),
            "the rate from the pod",
        ),
        (
            format!("filter del dev {host} parent ffff:"),
            format!("filter add dev {host} {redirect}"),
            "led through",
        ),
    ] {
        tc(&node, &take);
        let error = check(&node).unwrap_err();
        assert!(error["msg"].as_str().unwrap().contains(part), "{error}");
        tc(&node, &put);
        check(&node).unwrap();
    }
    node.netns.ip(&format!("link del {limiter}"));
    let error = check(&node).unwrap_err();
    assert!(error["msg"].as_str().unwrap().contains("is missing"), "{error}");
    node.del("c").unwrap();
    assert_eq!((limiters(&node), node.ports()), (0, 0));

    // Its host end goes with the sandbox, the limiter does not.
    node.cni("ADD", "c", Some(&sandbox.path()), limits(RATE, RATE)).unwrap();
    drop(sandbox);
    support::eventually("the host end is gone", || node.ports() == 0);
    assert_eq!(limiters(&node), 1);
    for _ in 0..2 {
        node.del("c").unwrap();
    }
    assert_eq!(limiters(&node), 0);
    node.netns.ip("link add hfb0123456789ab type ifb");
    node.cni("GC", "", None, json!({ "cni.dev/valid-attachments": [] })).unwrap();
    assert_eq!(limiters(&node), 0, "GC takes what belongs to nobody");
}

#[test]
fn a_burst_that_holds_no_packet_is_refused_and_a_failed_add_leaves_no_limiter() {
    let (_cluster, node) = mk_node();
    let sandbox = Netns::new();
    let small = json!({ "runtimeConfig": { "bandwidth": { "egressRate": 8_000_000, "egressBurst": 8000 } } });
    let error = node.cni("ADD", "c", Some(&sandbox.path()), small).unwrap_err();
    assert_eq!(error["code"], 7, "{error}");
    assert!(error["msg"].as_str().unwrap().contains("bandwidth.egressBurst = 8000"), "{error}");
    assert_eq!(node.dump()["leases"], json!([]));
    // Something has the name of what it needs: refused, and removed with the rest.
    let result = node.cni("ADD", "c", Some(&sandbox.path()), limits(RATE, RATE)).unwrap();
    let limiter = host_end(&result).replace("hfv", "hfb");
    node.del("c").unwrap();
    node.netns.ip(&format!("link add {limiter} type ifb"));
    let error = node.cni("ADD", "c", Some(&sandbox.path()), limits(RATE, RATE)).unwrap_err();
    assert!(error.to_string().contains(&limiter), "{error}");
    assert_eq!((limiters(&node), node.ports()), (0, 0));
    assert_eq!(node.dump()["leases"], json!([]));
    node.cni("ADD", "c", Some(&sandbox.path()), limits(RATE, RATE)).unwrap();
}
