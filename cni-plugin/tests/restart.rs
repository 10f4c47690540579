//! The agent killed, upgraded and restarted: traffic of running pods goes on, what is right in the kernel is not touched, and policy
//! is in force throughout. On the real binaries, real agents and a real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use support::{Cluster, Netns, Node, address_of, eventually};

const KILLS: usize = 20;
/// A transfer that stands still for longer has stopped. Scheduling on a machine that builds beside takes some of it.
const STILL_MAX: Duration = Duration::from_secs(1);

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

/// What a restart must not touch: interfaces with their numbers, addresses, routes, neighbours, forwarding entries, rules.
fn kernel_state(node: &Node) -> String {
    let mut text = node.rules_text();
    for args in ["-o link show", "-o addr show", "route show table all", "neigh show nud permanent"] {
        text.push_str(&node.netns.ip(args));
    }
    for args in [["-d", "link", "show"], ["-d", "fdb", "show"]] {
        text.push_str(
            &String::from_utf8(node.netns.exec("bridge").args(args).output().unwrap().stdout).unwrap(),
        );
    }
    text
}

/// Numbers one after the other, a steady flow rather than all that the machine can do, until `stop`.
fn send_numbers(sender: &mut TcpStream, stop: &AtomicBool) {
    let mut count = 0_u64;
    while !stop.load(Ordering::Relaxed) {
        let block: Vec<u8> = (count..count + 256).flat_map(u64::to_be_bytes).collect();
        sender.write_all(&block).unwrap();
        count += 256;
        std::thread::sleep(Duration::from_millis(1));
    }
    sender.shutdown(std::net::Shutdown::Write).unwrap();
}

/// How many came until the end, and the longest time in which none did.
fn read_numbers(receiver: &mut TcpStream) -> (u64, Duration) {
    let (mut count, mut longest, mut last) = (0_u64, Duration::ZERO, Instant::now());
    let mut block = [0; 2048];
    while receiver.read_exact(&mut block).is_ok() {
        for number in block.chunks_exact(8) {
            assert_eq!(u64::from_be_bytes(number.try_into().unwrap()), count, "a byte is lost or changed");
            count += 1;
        }
        longest = longest.max(last.elapsed());
        last = Instant::now();
    }
    (count, longest)
}

#[test]
fn a_transfer_between_pods_goes_on_across_20_kills_and_the_kernel_is_not_touched() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    cluster.put_node("b", 2, "10.42.2.0/24");
    for pod in ["api", "db"] {
        cluster.put_pod(pod, "");
    }
    let (mut a, mut b) = (cluster.start_node("a", 1), cluster.start_node("b", 2));
    let (api, db) = (Netns::new(), Netns::new());
    let api_address = address_of(&a.add("api", &api).unwrap());
    let db_address = address_of(&b.add("db", &db).unwrap());
    cluster.put_pod("api", &api_address);
    cluster.put_pod("db", &db_address);
    cluster.put_policy("db", "api");
    let listener = inside(&db, || TcpListener::bind(format!("{db_address}:5432")).unwrap());
    let mut sender = inside(&api, || {
        let connected =
            || TcpStream::connect_timeout(&listener.local_addr().unwrap(), Duration::from_secs(1));
        let deadline = Instant::now() + Duration::from_secs(10);
        loop {
            match connected() {
                Ok(stream) => return stream,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
        }
    });
    let mut receiver = listener.accept().unwrap().0;
    receiver.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    // Rules follow the objects before anything is compared.
    std::thread::sleep(Duration::from_secs(3));
    let before = [&a, &b].map(kernel_state);

    let stop = AtomicBool::new(false);
    let (received, longest) = std::thread::scope(|scope| {
        scope.spawn(|| send_numbers(&mut sender, &stop));
        let read = scope.spawn(|| read_numbers(&mut receiver));
        for nth in 0..KILLS {
            let node = if nth % 2 == 0 { &mut a } else { &mut b };
            node.kill();
            std::thread::sleep(Duration::from_millis(20 * nth as u64 % 100));
            node.start();
        }
        stop.store(true, Ordering::Relaxed);
        read.join().unwrap()
    });
    println!(
        "{received} numbers passed across {KILLS} kills; the transfer stood still for {longest:?} at most"
    );
    assert!(received > 1000 && longest < STILL_MAX, "{received} {longest:?}");
    for (node, before) in [&a, &b].into_iter().zip(before) {
        assert_eq!(kernel_state(node), before, "a restart changed something");
    }
}

/// How many packets with the words "a" and others came until `stop`, and the longest time without an "a".
fn count_words(server: &UdpSocket, stop: &AtomicBool) -> (u32, u32, Duration) {
    let (mut allowed, mut forbidden, mut longest) = (0, 0, Duration::ZERO);
    let (mut last, mut word) = (Instant::now(), [0]);
    while !stop.load(Ordering::Relaxed) {
        match server.recv(&mut word) {
            Ok(_) if word == *b"a" => {
                allowed += 1;
                longest = longest.max(last.elapsed());
                last = Instant::now();
            }
            Ok(_) => forbidden += 1,
            Err(_) => {}
        }
    }
    (allowed, forbidden, longest.max(last.elapsed()))
}

/// Replaces a rule by one as an older version left it. Returns the comment of this version's.
fn make_older(node: &Node) -> String {
    let list = ["-a", "list", "chain", "inet", "holdfast", "deny"];
    let listed = String::from_utf8(node.netns.exec("nft").args(list).output().unwrap().stdout).unwrap();
    let last = listed.lines().rfind(|line| line.contains(" drop comment ")).unwrap();
    let (handle, comment) = (last.rsplit(' ').next().unwrap(), last.split('"').nth(1).unwrap());
    let older = comment.replacen(" v", " v0", 1);
    let replace = format!("replace rule inet holdfast deny handle {handle} counter drop comment \"{older}\"");
    assert!(node.netns.exec("nft").arg(&replace).status().unwrap().success(), "{replace}");
    comment.to_owned()
}

/// Rules of another version than the agent's are replaced at its start, in one transaction: what policy forbids is forbidden
/// throughout, and what it allows is allowed.
#[test]
fn an_upgrade_replaces_the_skeleton_without_a_gap() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    for pod in ["api", "db", "web"] {
        cluster.put_pod(pod, "");
    }
    let mut node = cluster.start_node("a", 1);
    let pods = [Netns::new(), Netns::new(), Netns::new()];
    let addresses = [("api", 0), ("db", 1), ("web", 2)].map(|(name, index): (&str, usize)| {
        let address = address_of(&node.add(name, &pods[index]).unwrap());
        cluster.put_pod(name, &address);
        address
    });
    cluster.put_policy("db", "api");
    let [api, db, web] = pods;
    eventually("policy is in force", || !web.pings(&addresses[1]) && api.pings(&addresses[1]));

    let server = inside(&db, || UdpSocket::bind(format!("{}:5000", addresses[1])).unwrap());
    server.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let stop = AtomicBool::new(false);
    let (allowed, forbidden, longest) = std::thread::scope(|scope| {
        let (stop, to) = (&stop, server.local_addr().unwrap());
        for (netns, word) in [(&api, b'a'), (&web, b'w')] {
            let socket = inside(netns, || UdpSocket::bind("0.0.0.0:0").unwrap());
            scope.spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    let _ = socket.send_to(&[word], to);
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
        }
        let counted = scope.spawn(|| count_words(&server, stop));
        for _ in 0..5 {
            node.kill();
            let comment = make_older(&node);
            node.start();
            eventually("the rules are this version's", || {
                let rules = node
                    .netns
                    .exec("nft")
                    .args(["list", "chain", "inet", "holdfast", "deny"])
                    .output()
                    .unwrap();
                String::from_utf8(rules.stdout).unwrap().contains(&format!("\"{comment}\""))
            });
            std::thread::sleep(Duration::from_millis(200));
        }
        stop.store(true, Ordering::Relaxed);
        counted.join().unwrap()
    });
    println!(
        "{allowed} allowed packets passed, with a pause of {longest:?} at most, and {forbidden} forbidden ones"
    );
    assert!(node.log().contains("not whole; replacing them in one transaction"), "{}", node.log());
    assert_eq!(forbidden, 0);
    assert!(allowed > 500 && longest < STILL_MAX, "{allowed} {longest:?}");
}
