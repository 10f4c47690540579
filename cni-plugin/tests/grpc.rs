//! The agent's socket under garbage: random bytes, messages with absurd fields, many at once, connections that are cut. The agent
//! lives, answers with the specification's codes, and keeps nothing. Needs root.
//!
//! `HOLDFAST_LONG` makes it long, `HOLDFAST_SEED` repeats a run.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use holdfast_proto::agent as pb;
use holdfast_proto::agent::agent_client::AgentClient;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom as _;
use rand::{Rng as _, SeedableRng as _};
use tonic::transport::Channel;

use support::{Cluster, Netns, Node, eventually};

/// Time of each test, and of a long one.
const RUN: Duration = Duration::from_secs(4);
const LONG_RUN: Duration = Duration::from_secs(600);
/// Calls under way at once.
const AT_ONCE: usize = 16;
/// Codes of the specification that a call may answer.
const CODES: [u32; 9] = [1, 2, 3, 4, 5, 6, 7, 11, 999];
/// An ADD of a pod without an object waits for it, so few of them name one.
const UNKNOWN_POD: f64 = 0.01;

fn run_time() -> Duration {
    if std::env::var_os("HOLDFAST_LONG").is_some() { LONG_RUN } else { RUN }
}

fn mk_random() -> StdRng {
    let seed = std::env::var("HOLDFAST_SEED").map_or_else(|_| rand::random(), |text| text.parse().unwrap());
    println!("seed {seed}; to replay: HOLDFAST_SEED={seed}");
    StdRng::seed_from_u64(seed)
}

/// A node whose agent is watched, a living pod beside the garbage, and what the node holds without the garbage.
struct Bed {
    node: Node,
    pod: Netns,
    result: serde_json::Value,
    clean: String,
    agent: u32,
    // Keeps the underlay and the folder.
    _cluster: Cluster,
}

impl Bed {
    fn new() -> Self {
        let cluster = Cluster::new();
        cluster.put_node("a", 1, "10.42.1.0/24");
        let node = cluster.start_node("a", 1);
        cluster.put_pod("web", "");
        let pod = Netns::new();
        let result = node.add("web", &pod).unwrap();
        let (clean, agent) = (state(&node), node.pid());
        Self { node, pod, result, clean, agent, _cluster: cluster }
    }

    /// The agent never ended, the living pod is whole, and nothing else is there.
    fn is_as_it_was(&self) {
        assert!(
            std::path::Path::new(&format!("/proc/{}", self.agent)).exists(),
            "the agent ended: {}",
            self.node.log()
        );
        assert!(!self.node.log().contains("panicked"), "{}", self.node.log());
        self.node.cni("STATUS", "", None, serde_json::json!({})).unwrap();
        eventually("nothing of the garbage is left", || state(&self.node) == self.clean);
        let previous = serde_json::json!({ "prevResult": self.result });
        self.node.cni("CHECK", "web", Some(&self.pod.path()), previous).unwrap();
    }
}

/// Leases, ports, elements, routes, neighbours, delete records.
fn state(node: &Node) -> String {
    let leases = node.dump()["leases"].to_string();
    let records = std::fs::read_dir(node.pending()).map_or(0, Iterator::count);
    format!("{leases}\n{}\n{}\n{records}", node.ports(), node.pod_state())
}

#[test]
fn bytes_that_are_no_grpc_are_survived() {
    let mut random = mk_random();
    let bed = Bed::new();
    let (start, mut connections) = (Instant::now(), 0);
    let preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";
    while start.elapsed() < run_time() {
        let mut stream = UnixStream::connect(bed.node.socket()).unwrap();
        stream.set_read_timeout(Some(Duration::from_millis(2))).unwrap();
        stream.set_write_timeout(Some(Duration::from_millis(100))).unwrap();
        if random.random_bool(0.7) {
            let _ = stream.write_all(preface);
        }
        for _ in 0..random.random_range(1..8) {
            let bytes: Vec<u8> = if random.random_bool(0.5) {
                (0..random.random_range(0..2000)).map(|_| random.random()).collect()
            } else {
                mk_frame(&mut random)
            };
            // A server that has hung up takes no more.
            let _ = stream.write_all(&bytes);
        }
        let _ = stream.read(&mut [0; 256]);
        connections += 1;
    }
    println!("{connections} connections");
    bed.is_as_it_was();
}

/// A frame of HTTP/2 with a believable head: length, kind, flags, stream.
fn mk_frame(random: &mut StdRng) -> Vec<u8> {
    let length: usize = random.random_range(0..64);
    let told = if random.random_bool(0.1) { random.random_range(0..1 << 24) } else { length };
    let mut frame = u32::try_from(told).unwrap().to_be_bytes()[1..].to_vec();
    frame.extend([random.random_range(0..12), random.random()]);
    frame.extend(random.random_range(0..8u32).to_be_bytes());
    frame.extend((0..length).map(|_| random.random::<u8>()));
    frame
}

#[test]
fn absurd_messages_get_a_code_of_the_specification_and_leave_nothing() {
    let mut random = mk_random();
    let bed = Bed::new();
    let paths = mk_paths(&bed);
    let (start, mut calls, mut cut) = (Instant::now(), 0u64, 0u64);
    bed.node.ask(async |client| {
        while start.elapsed() < run_time() {
            let seeds: Vec<u64> = (0..AT_ONCE).map(|_| random.random()).collect();
            let mut under_way = tokio::task::JoinSet::new();
            for seed in seeds {
                under_way.spawn(one_call(client.clone(), seed, paths.clone()));
            }
            while let Some(end) = under_way.join_next().await {
                *(if end.unwrap() { &mut calls } else { &mut cut }) += 1;
            }
        }
    });
    println!("{calls} calls answered, {cut} cut off");
    assert!(calls > 100, "only {calls} calls");
    // What a cut ADD had begun ends by itself; a runtime deletes it.
    bed.node.ask(async |mut client| {
        let valid = vec![pb::Attachment { container_id: "web".to_owned(), ifname: "eth0".to_owned() }];
        let request = pb::GcRequest { valid, network: "pods".to_owned() };
        assert_eq!(client.gc(request).await.unwrap().into_inner().failure, None);
    });
    bed.is_as_it_was();
}

#[test]
fn only_a_network_namespace_other_than_the_nodes_is_a_sandbox() {
    let bed = Bed::new();
    let fifo = mk_paths(&bed).into_iter().find(|path| path.ends_with("/fifo")).unwrap();
    for path in [fifo, "/dev/null".to_owned(), "/proc/self/ns/net".to_owned(), "/proc/self/ns/mnt".to_owned()]
    {
        let attachment = Some(pb::Attachment { container_id: "c".to_owned(), ifname: "pod0".to_owned() });
        let request = pb::AddRequest {
            attachment,
            netns: path.clone(),
            network: "pods".to_owned(),
            ..Default::default()
        };
        let reply = bed.node.ask(async |mut client| {
            tokio::time::timeout(Duration::from_secs(5), client.add(request)).await.expect(&path).unwrap()
        });
        let failure = reply.into_inner().failure.unwrap();
        assert_eq!(failure.code, 4, "{path}: {failure:?}");
    }
    bed.is_as_it_was();
}

/// What stands where a namespace should.
fn mk_paths(bed: &Bed) -> Vec<String> {
    let folder = bed.node.state.clone();
    let in_folder = |name: &str| folder.join(name).display().to_string();
    std::fs::write(folder.join("file"), "no namespace").unwrap();
    nix::unistd::mkfifo(&folder.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    std::os::unix::fs::symlink("loop", folder.join("loop")).unwrap();
    let mut paths: Vec<String> =
        ["file", "fifo", "loop", "absent", ".", "log"].iter().map(|name| in_folder(name)).collect();
    paths.extend(
        ["", "/", "relative", "/dev/null", "/dev/zero", "/proc/self/ns/mnt", "/proc/self/ns/net", "/a\0b"]
            .map(str::to_owned),
    );
    paths.push("/".repeat(1 << 20));
    paths.push(format!("/{}", "x".repeat(3 << 20)));
    paths
}

/// Sends one call drawn from the seed; false if it was cut off.
async fn one_call(mut client: AgentClient<Channel>, seed: u64, paths: Vec<String>) -> bool {
    let mut random = StdRng::seed_from_u64(seed);
    let patience = if random.random_bool(0.2) { random.random_range(0..3000) } else { 60_000_000 };
    // A real sandbox, which may vanish while it is being attached.
    let sandbox = random.random_bool(0.3).then(Netns::new);
    let netns = sandbox.as_ref().map_or_else(|| paths.choose(&mut random).unwrap().clone(), Netns::path);
    let vanishes = random.random_bool(0.5);
    let kept = if vanishes {
        drop(sandbox);
        None
    } else {
        sandbox
    };
    let call = async {
        match random.random_range(0..10) {
            0..5 => failure_of(client.add(mk_add(&mut random, netns)).await, |reply| reply.failure),
            5 => {
                let request = pb::DelRequest {
                    attachment: mk_attachment(&mut random),
                    netns,
                    network: mk_text(&mut random),
                };
                failure_of(client.del(request).await, |reply| reply.failure)
            }
            6 => {
                let interface = pb::Interface {
                    name: mk_text(&mut random),
                    mac: mk_text(&mut random),
                    mtu: random.random(),
                    sandbox: mk_text(&mut random),
                };
                let request = pb::CheckRequest {
                    attachment: mk_attachment(&mut random),
                    netns,
                    addresses: vec![mk_text(&mut random); random.random_range(0..20)],
                    interfaces: vec![interface; random.random_range(0..20)],
                    network: "pods".to_owned(),
                    routes: vec![mk_text(&mut random)],
                };
                failure_of(client.check(request).await, |reply| reply.failure)
            }
            7 => {
                // The list of the living pod's own network would have to name it.
                let valid =
                    (0..random.random_range(0..50)).filter_map(|_| mk_attachment(&mut random)).collect();
                let request = pb::GcRequest { valid, network: format!("not-pods{}", mk_text(&mut random)) };
                failure_of(client.gc(request).await, |reply| reply.failure)
            }
            8 => {
                let (from, to, protocol) = (mk_text(&mut random), mk_text(&mut random), mk_text(&mut random));
                let request = pb::ExplainRequest { from, to, port: random.random(), protocol };
                failure_of(client.explain(request).await, |reply| reply.failure)
            }
            _ => {
                let request = pb::MatrixRequest {
                    namespace: mk_text(&mut random),
                    port: random.random(),
                    protocol: mk_text(&mut random),
                };
                failure_of(client.matrix(request).await, |reply| reply.failure)
            }
        }
    };
    let ended = tokio::time::timeout(Duration::from_micros(patience), call).await;
    drop(kept);
    let Ok(failure) = ended else { return false };
    if let Some(failure) = failure {
        assert!(CODES.contains(&failure.code) && !failure.msg.is_empty(), "seed {seed}: {failure:?}");
        assert!(failure.msg != "the agent failed", "seed {seed}: {failure:?}");
    }
    true
}

/// The failure in a reply. A message beyond gRPC's own limit is refused by gRPC.
fn failure_of<T>(
    reply: Result<tonic::Response<T>, tonic::Status>,
    failure: impl FnOnce(T) -> Option<pb::Failure>,
) -> Option<pb::Failure> {
    match reply {
        Ok(reply) => failure(reply.into_inner()),
        Err(status) => {
            assert_eq!(status.code(), tonic::Code::OutOfRange, "{status}");
            None
        }
    }
}

fn mk_add(random: &mut StdRng, netns: String) -> pb::AddRequest {
    let pod = if random.random_bool(UNKNOWN_POD) {
        Some(pb::PodRef { namespace: mk_text(random), name: mk_text(random), uid: mk_text(random) })
    } else {
        None
    };
    let mac = ["", "", "", "ff:ff:ff:ff:ff:ff", "00:00:00:00:00:00", "02:00:00:00:00:01", "zz", "02:00"];
    let few = if random.random_bool(0.3) { random.random_range(1..4) } else { 0 };
    let ips = (0..few).map(|_| mk_address(random)).collect();
    pb::AddRequest {
        attachment: mk_attachment(random),
        netns,
        network: if random.random_bool(0.8) { "pods".to_owned() } else { mk_text(random) },
        pod,
        ips,
        mac: (*mac.choose(random).unwrap()).to_owned(),
        address_sets: if random.random_bool(0.3) { mk_sets(random) } else { Vec::new() },
        port_mappings: if random.random_bool(0.2) { mk_port_mappings(random) } else { Vec::new() },
        bandwidth: random.random_bool(0.2).then(|| mk_bandwidth(random)),
    }
}

fn mk_port_mappings(random: &mut StdRng) -> Vec<pb::PortMapping> {
    let mk_port = |random: &mut StdRng| match random.random_range(0..4) {
        0 => random.random(),
        1 => 0,
        _ => random.random_range(8000..8010),
    };
    let protocols = ["tcp", "udp", "sctp", "", "icmp", "TCP"];
    (0..random.random_range(1..4))
        .map(|_| pb::PortMapping {
            protocol: (*protocols.choose(random).unwrap()).to_owned(),
            host_ip: if random.random_bool(0.7) { String::new() } else { mk_address(random) },
            host_port: mk_port(random),
            container_port: mk_port(random),
        })
        .collect()
}

fn mk_bandwidth(random: &mut StdRng) -> pb::Bandwidth {
    let mut mk_number = || match random.random_range(0..4) {
        0 => random.random(),
        1 => 0,
        2 => random.random_range(0..100_000),
        _ => 1_000_000_000,
    };
    pb::Bandwidth {
        ingress_rate: mk_number(),
        ingress_burst: mk_number(),
        egress_rate: mk_number(),
        egress_burst: mk_number(),
    }
}

/// Never the living pod's.
fn mk_attachment(random: &mut StdRng) -> Option<pb::Attachment> {
    let ifname = match random.random_range(0..8) {
        0 => mk_text(random),
        1 => "lo".to_owned(),
        2 => "hf0".to_owned(),
        _ => "eth0".to_owned(),
    };
    let container_id =
        if random.random_bool(0.6) { format!("c{}", random.random_range(0..30)) } else { mk_text(random) };
    random.random_bool(0.95).then_some(pb::Attachment { container_id, ifname })
}

fn mk_sets(random: &mut StdRng) -> Vec<pb::AddressSet> {
    let piece =
        |random: &mut StdRng| pb::AddressPiece { first: mk_address(random), last: mk_address(random) };
    let set = |random: &mut StdRng| pb::AddressSet {
        pieces: (0..random.random_range(0..4)).map(|_| piece(random)).collect(),
    };
    (0..random.random_range(0..5)).map(|_| set(random)).collect()
}

fn mk_address(random: &mut StdRng) -> String {
    let known = [
        "0.0.0.0",
        "255.255.255.255",
        "10.42.1.0",
        "10.42.1.255",
        "10.42.1.7",
        "10.42.1.200",
        "10.42.2.1",
        "127.0.0.1",
        "::",
        "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff",
        "fe80::1",
        "::ffff:10.42.1.9",
        "169.254.1.1",
        "192.0.2.1",
        "10.42.1.9/24",
        "",
    ];
    if random.random_bool(0.3) {
        return format!("10.42.1.{}", random.random_range(0..300));
    }
    (*known.choose(random).unwrap()).to_owned()
}

fn mk_text(random: &mut StdRng) -> String {
    let known = [
        "",
        "/",
        "..",
        ".",
        "a/b",
        "../../etc/passwd",
        "\0",
        "a\0b",
        " ",
        "ü",
        "\u{202e}",
        "%s%n",
        "-",
        "eth0 up",
        "shop/absent",
        "tcp",
        "10.42.1.1",
    ];
    match random.random_range(0..10) {
        0 => "x".repeat(random.random_range(0..3 << 20)),
        1 => "/".repeat(random.random_range(0..5000)),
        2 => (0..random.random_range(0..40)).map(|_| random.random::<char>()).collect(),
        _ => (*known.choose(random).unwrap()).to_owned(),
    }
}
