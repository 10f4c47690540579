//! The agent killed before each of its changes while the node's plan changes, and during GC. After its next start all is as
//! planned, and the pods of the node were reachable all the time.

use super::*;

use std::net::Ipv4Addr;
use std::sync::atomic::AtomicUsize;
use std::time::{Duration, Instant};

/// Pings an address from a namespace until it is dropped, and counts what was lost.
pub struct Probe {
    child: std::process::Child,
    file: tempfile::NamedTempFile,
}

impl Probe {
    pub fn start(from: &Netns, to: &str) -> Self {
        let file = tempfile::NamedTempFile::new().unwrap();
        let mut ping = from.exec("ping");
        ping.args(["-i", "0.02", "-W1", to]).stdout(file.reopen().unwrap()).stderr(Stdio::null());
        Self { child: ping.spawn().unwrap(), file }
    }

    /// Sent and answered.
    pub fn end(mut self) -> (u32, u32) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.child.id()).unwrap());
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGINT).unwrap();
        self.child.wait().unwrap();
        let text = std::fs::read_to_string(self.file.path()).unwrap();
        let line = text.lines().find(|line| line.contains("packets transmitted")).unwrap();
        let number = |word: &str| {
            line.split(", ")
                .find(|part| part.contains(word))
                .unwrap()
                .split(' ')
                .next()
                .unwrap()
                .parse()
                .unwrap()
        };
        (number("transmitted"), number("received"))
    }
}

/// Kills the agent before its nth change from the moment on at which `disturb` is called; it ends when `is_done` says so or after
/// a while.
fn kill_during(
    bed: &mut Bed,
    nth: usize,
    disturb: impl FnOnce(&Bed),
    mut is_done: impl FnMut(&Bed) -> bool,
) -> Outcome {
    let is_over = AtomicBool::new(false);
    let (seized, is_seized) = std::sync::mpsc::channel();
    let outcome = std::thread::scope(|scope| {
        let (pid, is_over) = (bed.node.pid(), &is_over);
        let tracer = scope.spawn(move || {
            let watched = Watched::seize(pid);
            seized.send(()).unwrap();
            watched.kill_at(nth, changes_the_kernel, || is_over.load(Ordering::Relaxed))
        });
        is_seized.recv().unwrap();
        disturb(bed);
        let deadline = Instant::now() + Duration::from_secs(3);
        while !tracer.is_finished() && Instant::now() < deadline && !is_done(bed) {
            std::thread::sleep(Duration::from_millis(5));
        }
        is_over.store(true, Ordering::Relaxed);
        tracer.join().unwrap()
    });
    bed.node.forget_agent();
    outcome
}

/// Messages to netlink, and writes: to sysctls, to the store.
fn changes_the_kernel(number: i64) -> bool {
    changes_something(number) && number != libc::SYS_openat
}

/// The way to peer `number` is complete, and only that.
fn has_peer(node: &Node, number: u8) -> bool {
    let underlay = Ipv4Addr::new(192, 0, 2, number);
    let routes = node.netns.ip("route show dev hf.vx");
    let neighbours = node.netns.ip("neigh show dev hf.vx");
    let entries = node.netns.exec("bridge").args(["fdb", "show", "dev", "hf.vx"]).output().unwrap().stdout;
    let entries = String::from_utf8(entries).unwrap();
    let is_only = |text: &str, word: &str| {
        text.matches(word).count() == 1 && text.contains(&format!("{word}{underlay} "))
    };
    is_only(&routes, "via ") && neighbours.starts_with(&format!("{underlay} ")) && is_only(&entries, "dst ")
}

#[test]
fn an_agent_that_is_killed_before_any_of_its_changes_of_a_plan_makes_it_whole_at_its_next_start() {
    let mut bed = Bed::new();
    bed.cluster.put_node("b", 20, "10.42.2.0/24");
    support::eventually("the first peer is there", || has_peer(&bed.node, 20));
    let probe = Probe::start(&bed.node.netns, &bed.bystander);
    let (mut killed, mut half, mut ended) = (0, 0, 0);
    let number = AtomicUsize::new(20);
    for nth in 0..CALLS_MAX {
        let next = u8::try_from(20 + (nth + 1) % 200).unwrap();
        // One route, one neighbour and one entry go, others come.
        let outcome = kill_during(
            &mut bed,
            nth,
            |bed| bed.cluster.put_node("b", next, "10.42.2.0/24"),
            |bed| has_peer(&bed.node, next),
        );
        let was = u8::try_from(number.swap(next.into(), Ordering::Relaxed)).unwrap();
        half += usize::from(!has_peer(&bed.node, was) && !has_peer(&bed.node, next));
        bed.node.start();
        support::eventually("the plan is whole", || has_peer(&bed.node, next));
        match outcome {
            Outcome::Killed => (killed, ended) = (killed + 1, 0),
            Outcome::Ended => ended += 1,
        }
        if ended == 3 {
            break;
        }
    }
    let (sent, answered) = probe.end();
    println!(
        "plan: killed before each of {killed} changes, {half} left it half done; {answered} of {sent} probes were answered"
    );
    assert!(killed > 3 && half > 0, "{killed} changes were seen, {half} left it half done");
    assert_eq!(sent, answered, "the pod was not reachable all the time");
}

#[test]
fn an_agent_that_is_killed_before_any_of_its_changes_of_a_gc_leaves_nothing_that_the_next_gc_does_not_remove()
{
    let mut bed = Bed::new();
    let probe = Probe::start(&bed.node.netns, &bed.bystander);
    let (mut killed, mut dirty, mut ended) = (0, 0, 0);
    for nth in 0..CALLS_MAX {
        bed.add().unwrap();
        let outcome = kill_during(
            &mut bed,
            nth,
            |bed| {
                let valid = json!([{ "containerID": "bystander", "ifname": "eth0" }]);
                // Killed or not: the runtime repeats it.
                let _ = bed.node.cni("GC", "", None, json!({ "cni.dev/valid-attachments": valid }));
            },
            |_| true,
        );
        bed.node.start();
        dirty += usize::from(bed.is_dirty());
        bed.go_on(Remedy::Gc);
        bed.is_clean(&format!("agent killed before change {nth} of GC"));
        match outcome {
            Outcome::Killed => (killed, ended) = (killed + 1, 0),
            Outcome::Ended => ended += 1,
        }
        if ended == 3 {
            break;
        }
    }
    let (sent, answered) = probe.end();
    println!(
        "GC: killed before each of {killed} changes, {dirty} left something; {answered} of {sent} probes were answered"
    );
    assert!(killed > 5 && dirty > 0, "{killed} changes were seen, {dirty} left something");
    assert_eq!(sent, answered, "the other pod was not reachable all the time");
}
