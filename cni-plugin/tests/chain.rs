//! In a chain with the reference plugins `tuning`, `bandwidth` and `portmap` (Debian's package containernetworking-plugins, which speaks
//! up to 1.0.0). On the real binaries, a real agent and a real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::{Value, json};
use support::{Cluster, Netns, Node, address_of, eventually, inside};

const PARTNERS: &str = "/usr/lib/cni";
const HOST_PORT: u16 = 8080;

/// What follows ours, in order.
fn partners(folder: &Path) -> [(&'static str, Value); 3] {
    let rate = json!({ "ingressRate": 80_000_000, "ingressBurst": 8_000_000, "egressRate": 80_000_000, "egressBurst": 8_000_000 });
    let mapping = json!([{ "hostPort": HOST_PORT, "containerPort": 80, "protocol": "tcp" }]);
    [
        ("tuning", json!({ "sysctl": { "net.ipv4.ip_default_ttl": "77" }, "dataDir": folder })),
        ("bandwidth", json!({ "runtimeConfig": { "bandwidth": rate } })),
        ("portmap", json!({ "snat": true, "runtimeConfig": { "portMappings": mapping } })),
    ]
}

/// Executes a partner as a runtime does.
fn partner(node: &Node, name: &str, verb: &str, sandbox: &Netns, config: &Value) -> String {
    let path = Path::new(PARTNERS).join(name);
    assert!(path.exists(), "{} is missing: install containernetworking-plugins", path.display());
    let mut command = node.netns.exec(path.to_str().unwrap());
    command.envs([
        ("CNI_COMMAND", verb),
        ("CNI_CONTAINERID", "c"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_PATH", PARTNERS),
    ]);
    command.env("CNI_NETNS", sandbox.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(config.to_string().as_bytes()).unwrap();
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{verb} of {name}: {text}");
    text
}

/// Whether a server in `sandbox` is reached from a namespace at `address`.
fn is_reached(from: &Netns, address: &str, sandbox: &Netns) -> bool {
    let (ready, is_ready) = std::sync::mpsc::channel();
    let server = inside(sandbox, move || {
        let listener = TcpListener::bind("0.0.0.0:80").unwrap();
        listener.set_nonblocking(true).unwrap();
        ready.send(()).unwrap();
        for _ in 0..150 {
            if let Ok((mut stream, _)) = listener.accept() {
                let _ = stream.write_all(b"pod");
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    });
    is_ready.recv().unwrap();
    let address: SocketAddr = format!("{address}:{HOST_PORT}").parse().unwrap();
    let client = inside(from, move || {
        let mut text = String::new();
        let connected = TcpStream::connect_timeout(&address, Duration::from_secs(1));
        let read = connected.and_then(|mut stream| {
            stream.set_read_timeout(Some(Duration::from_secs(1)))?;
            stream.read_to_string(&mut text)
        });
        read.is_ok() && text == "pod"
    });
    let reached = client.join().unwrap();
    server.join().unwrap();
    reached
}

#[test]
fn tuning_bandwidth_and_portmap_follow_ours_in_every_version_that_they_speak() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    cluster.put_node("b", 2, "10.42.2.0/24");
    let (node, other) = (cluster.start_node("a", 1), cluster.start_node("b", 2));
    // The nodes' own neighbours come with the traffic.
    let state = || -> Vec<String> {
        node.pod_state().lines().filter(|line| !line.starts_with("192.0.2.")).map(str::to_owned).collect()
    };
    let clean = state();
    for version in ["0.3.1", "0.4.0", "1.0.0"] {
        let sandbox = Netns::new();
        let ours = node.cni("ADD", "c", Some(&sandbox.path()), json!({ "cniVersion": version })).unwrap();
        let chain = partners(cluster.folder.path());
        let config = |name: &str, extra: &Value, previous: &Value| {
            let mut config =
                json!({ "cniVersion": version, "name": "pods", "type": name, "prevResult": previous });
            config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
            config
        };
        let mut result = ours.clone();
        for (name, extra) in &chain {
            let text = partner(&node, name, "ADD", &sandbox, &config(name, extra, &result));
            result = serde_json::from_str(&text).unwrap();
        }
        assert_eq!(address_of(&result), address_of(&ours), "{version}: {result}");
        if version >= "0.4.0" {
            let extra = json!({ "cniVersion": version, "prevResult": result });
            node.cni("CHECK", "c", Some(&sandbox.path()), extra).unwrap();
            // portmap 1.1.1 looks for rules of a family that the pod has no address of.
            for (name, extra) in chain.iter().filter(|(name, _)| *name != "portmap") {
                partner(&node, name, "CHECK", &sandbox, &config(name, extra, &result));
            }
        }
        assert!(is_reached(&other.netns, "192.0.2.1", &sandbox), "{version}: through the host port");
        for (name, extra) in chain.iter().rev() {
            partner(&node, name, "DEL", &sandbox, &config(name, extra, &result));
        }
        let extra = json!({ "cniVersion": version, "prevResult": result });
        node.cni("DEL", "c", Some(&sandbox.path()), extra).unwrap();
        assert_eq!(node.ports(), 0, "{version}");
        eventually("nothing is left", || state() == clean);
    }
}
