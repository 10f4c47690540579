//! Conntrack entries after a revocation: what is deleted, what stays, and that a deletion opens nothing.
//! These tests run as root; without it they fail, they do not skip.

#![allow(unsafe_code)] // one lifetime extension in the support module, argued there
#![allow(clippy::unwrap_used)] // a test's failure is its panic

mod support;

use std::io::{ErrorKind, Read};
use std::net::{TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use holdfast_dataplane::{Dataplane, Hygiene};
use holdfast_net_core::plan::EndpointPlan;
use holdfast_net_core::ports::{PortRule, Proto};
use holdfast_net_core::ruleset::{ClassId, ProfileId, Ruleset};
use support::{Netns, Node, mk_policy, serve_bytes};

const SERVER: &str = "10.83.0.2:80";
const SERVICE: &str = "10.96.0.1:8080";
const API: &str = "10.83.0.3";
const WEB: &str = "10.83.0.4";

/// A node with a server and two clients, and a Service in front of the server.
struct Bed {
    node: Node,
    pods: [Netns; 3],
    plans: [EndpointPlan; 3],
}

impl Bed {
    fn new(name: &str) -> Self {
        let node = Node::new(name);
        let pods = ["s", "a", "w"].map(|pod| Netns::new(&format!("{name}-{pod}")));
        let plans = [(&pods[0], "10.83.0.2"), (&pods[1], API), (&pods[2], WEB)]
            .map(|(pod, address)| node.endpoint(pod, address));
        let bed = Self { node, pods, plans };
        let (plan, both) = (bed.node.alone_plan(), bed.policy(&[1, 2]));
        bed.node.runtime.block_on(async |dp: &Dataplane| {
            dp.apply_node(&plan).await.unwrap();
            for number in 0..3 {
                dp.attach(&bed.plans[number], bed.pods[number].path()).await.unwrap();
            }
            dp.apply_ruleset(&both).await.unwrap();
        });
        bed.node.netns.run(
            "nft 'table ip services { chain prerouting { type nat hook prerouting priority -100; \
             ip daddr 10.96.0.1 tcp dport 8080 dnat to 10.83.0.2:80; }; }'",
        );
        bed
    }

    /// Admits these clients to the server, by number.
    fn policy(&self, clients: &[usize]) -> Ruleset {
        let allowed: Vec<(&EndpointPlan, u16)> =
            clients.iter().map(|number| (&self.plans[*number], 80)).collect();
        mk_policy(&[&self.plans[0], &self.plans[1], &self.plans[2]], &self.plans[0], &allowed)
    }

    fn apply(&self, ruleset: &Ruleset) {
        self.node.runtime.block_on(async |dp: &Dataplane| {
            assert!(dp.apply_ruleset(ruleset).await.unwrap().revoked);
        });
    }

    fn clean(&self) -> Hygiene {
        self.node.runtime.block_on(async |dp: &Dataplane| {
            // A revocation is told, also when nobody waited yet.
            tokio::time::timeout(Duration::from_secs(5), dp.revoked()).await.expect("nobody was told");
            dp.delete_forbidden().await.unwrap()
        })
    }

    /// Entries of connections with `client`, whoever is taken for the one that opened them.
    fn entries_of(&self, client: &str) -> usize {
        let all = self.node.netns.run("cat /proc/net/nf_conntrack");
        let source = format!("src={client}");
        all.lines().filter(|line| line.split(' ').any(|word| word == source)).count()
    }
}

/// A stream that brings bytes.
fn open(from: &Netns, to: &str) -> TcpStream {
    let mut stream = support::connect(from, to).unwrap();
    stream.set_read_timeout(Some(Duration::from_millis(500))).unwrap();
    stream.read_exact(&mut [0u8; 65536]).unwrap();
    stream
}

/// Whether bytes come for 1.5 s on end. What was on its way or in the socket may still be read by one that is cut.
fn flows(stream: &mut TcpStream) -> bool {
    let until = Instant::now() + Duration::from_millis(1500);
    let mut buffer = vec![0u8; 1 << 20];
    while Instant::now() < until {
        match stream.read(&mut buffer) {
            Ok(0) => {
                eprintln!("the connection was closed");
                return false;
            }
            Ok(_) => {}
            // A read with a timeout is not taken up again after a signal, such as that by which libc enters all threads.
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => {
                eprintln!("no byte comes: {error}");
                return false;
            }
        }
    }
    true
}

#[test]
fn forbidden_entries_go_and_do_not_come_back_and_all_others_stay() {
    let bed = Bed::new("hft-hyg");
    let _server = serve_bytes(&bed.pods[0], SERVER);
    let [_, api, web] = &bed.pods;
    let mut forbidden = [open(web, SERVER), open(web, SERVICE)];
    let mut allowed = [open(api, SERVER), open(api, SERVICE)];
    // The node reaches its pod whatever the rules say of its address, so its entry is not judged by them.
    bed.node.netns.run("ip addr add 203.0.113.1/32 dev lo; ip link set lo up");
    let mut of_node = open(&bed.node.netns, SERVER);
    assert_eq!((bed.entries_of(WEB), bed.entries_of(API)), (2, 2));

    bed.apply(&bed.policy(&[1]));
    assert_eq!(bed.clean(), Hygiene { deleted: 2, more: false });
    assert_eq!((bed.entries_of(WEB), bed.entries_of(API)), (0, 2));
    // The server goes on sending: without an entry that must not look like a connection that it opens.
    assert!(!forbidden.iter_mut().any(flows), "a forbidden connection came back");
    assert!(allowed.iter_mut().all(flows) && flows(&mut of_node), "another connection stopped");
    assert_eq!(bed.entries_of(WEB), 0);
    let again = bed.node.runtime.block_on(async |dp: &Dataplane| dp.delete_forbidden().await.unwrap());
    assert_eq!(again, Hygiene::default(), "a second pass finds nothing");
}

#[test]
fn a_datagrams_entry_stays_while_its_server_may_open_the_exchange_itself() {
    let bed = Bed::new("hft-hygu");
    let [server, _, web] = &bed.pods;
    let mut both = bed.policy(&[1, 2]);
    both.profiles.insert(ProfileId(2), vec![PortRule::port(Proto::Udp, 80)]);
    bed.node.runtime.block_on(async |dp: &Dataplane| dp.apply_ruleset(&both).await.unwrap());
    let at = |pod: &Netns, address: &'static str| {
        let socket = pod.inside(move || UdpSocket::bind(address).unwrap()).join().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(700))).unwrap();
        socket
    };
    let (socket, client) = (at(server, SERVER), at(web, "10.83.0.4:4000"));
    client.send_to(b"?", SERVER).unwrap();
    let (_, from) = socket.recv_from(&mut [0; 8]).unwrap();
    socket.send_to(b"!", from).unwrap();
    client.recv_from(&mut [0; 8]).unwrap();

    // The server may send to anybody: without the entry its next datagram would pass, and with it the answers.
    bed.apply(&bed.policy(&[1]));
    assert_eq!(bed.clean().deleted, 0);
    assert_eq!(bed.entries_of(WEB), 1);
    socket.send_to(b"!", from).unwrap();
    assert!(client.recv_from(&mut [0; 8]).is_err(), "the exchange went on");

    let mut closed = bed.policy(&[1]);
    closed.cls_eg.insert(bed.plans[0].addresses[0], ClassId(3));
    bed.apply(&closed);
    assert_eq!(bed.clean().deleted, 1);
    assert_eq!(bed.entries_of(WEB), 0);
    socket.send_to(b"!", from).unwrap();
    assert!(client.recv_from(&mut [0; 8]).is_err(), "the exchange came back");
}

/// A connection that lost its entry is picked up where both readings of its next packet are allowed.
#[test]
fn an_allowed_connection_survives_the_loss_of_its_entry_and_a_forbidden_one_does_not_use_it() {
    let bed = Bed::new("hft-hygp");
    let _server = serve_bytes(&bed.pods[0], SERVER);
    let [_, api, web] = &bed.pods;
    let (mut allowed, mut forbidden) = (open(api, SERVER), open(web, SERVER));
    // Forbidden both, and deleted; then one is allowed again.
    bed.apply(&bed.policy(&[]));
    assert_eq!(bed.clean().deleted, 2);
    let only_api = bed.policy(&[1]);
    bed.node.runtime.block_on(async |dp: &Dataplane| dp.apply_ruleset(&only_api).await.unwrap());
    // TCP repeats what was lost, each time after twice the pause: on a busy machine that was more than 5 s once.
    allowed.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    assert!(flows(&mut allowed), "an allowed connection is not picked up");
    assert!(!flows(&mut forbidden), "a forbidden connection is picked up");
    assert_eq!((bed.entries_of(API) > 0, bed.entries_of(WEB)), (true, 0));
}
