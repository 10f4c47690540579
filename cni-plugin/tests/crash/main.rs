//! The plugin killed before each of its system calls in ADD and DEL, the agent before each that changes something; then DEL or GC. In
//! every case no lease, interface, rule, route, neighbour or reference to a namespace is left, and another pod is not touched. On the
//! real binaries, a real agent and a real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod plan;
#[path = "../support/mod.rs"]
mod support;
mod tracer;

use std::os::unix::fs::MetadataExt;
use std::process::Stdio;
use std::sync::atomic::{AtomicBool, Ordering};

use serde_json::{Value, json};
use support::{Cluster, Netns, Node, address_of, is_empty};
use tracer::{Outcome, Watched, kill_program_at};

/// No verb makes more: then something is wrong with the count.
const CALLS_MAX: usize = 5000;

/// A node with one pod that nothing may happen to, and a sandbox for another one.
struct Bed {
    cluster: Cluster,
    node: Node,
    sandbox: Netns,
    bystander: String,
    _bystander: Netns,
    /// What is there without the other pod.
    clean: String,
    links: String,
}

/// What the victim asks for: all that leaves something outside its namespace.
fn wanted() -> Value {
    let ports = json!([{ "hostPort": 8080, "containerPort": 80 }, { "hostPort": 53, "containerPort": 53, "protocol": "udp" }]);
    let limits = json!({
        "ingressRate": 80_000_000, "ingressBurst": 800_000, "egressRate": 80_000_000, "egressBurst": 800_000,
    });
    json!({ "runtimeConfig": { "portMappings": ports, "bandwidth": limits } })
}

/// How a runtime goes on after a failure.
#[derive(Debug, Clone, Copy)]
enum Remedy {
    Del,
    Gc,
}

impl Bed {
    fn new() -> Self {
        Self::with(&["--address-quarantine-s=0", "--collect-after-s=0"])
    }

    fn with(settings: &'static [&'static str]) -> Self {
        let cluster = Cluster::new();
        cluster.put_node("a", 1, "10.42.1.0/24");
        let node = cluster.start_node_with("a", 1, settings);
        let (sandbox, other) = (Netns::new(), Netns::new());
        let result = node.cni("ADD", "bystander", Some(&other.path()), json!({})).unwrap();
        let (clean, links) = (node.pod_state(), sandbox.ip("-o link show"));
        let bystander = address_of(&result);
        Self { cluster, node, sandbox, bystander, _bystander: other, clean, links }
    }

    fn add(&self) -> Result<Value, Value> {
        self.node.cni("ADD", "victim", Some(&self.sandbox.path()), wanted())
    }

    /// The plugin, killed before its nth system call.
    fn kill_plugin_at(&self, verb: &str, nth: usize) -> Outcome {
        let mut command = self.node.netns.exec("sh");
        command.args(["-c", "kill -STOP $$; exec \"$0\"", env!("CARGO_BIN_EXE_holdfast-cni")]);
        command.env_remove("CNI_ARGS");
        command.envs([("CNI_COMMAND", verb), ("CNI_CONTAINERID", "victim"), ("CNI_IFNAME", "eth0")]);
        command.env("CNI_NETNS", self.sandbox.path());
        command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
        kill_program_at(command, &self.node.config(wanted()).to_string(), nth)
    }

    fn go_on(&self, remedy: Remedy) {
        match remedy {
            Remedy::Del => self.node.del("victim").unwrap(),
            Remedy::Gc => {
                let valid = json!([{ "containerID": "bystander", "ifname": "eth0" }]);
                self.node.cni("GC", "", None, json!({ "cni.dev/valid-attachments": valid })).unwrap()
            }
        };
    }

    /// Something of the victim is there: the kill has left work to do.
    fn is_dirty(&self) -> bool {
        self.node.ports() > 1 || self.node.dump()["leases"].as_array().unwrap().len() > 1
    }

    /// Nothing of the victim is left, and all of the bystander.
    fn is_clean(&self, case: &str) {
        let node = &self.node;
        let leases = node.dump()["leases"].clone();
        assert_eq!(leases.as_array().unwrap().len(), 1, "{case}: {leases}");
        assert_eq!(leases[0]["key"]["container_id"], "bystander", "{case}");
        assert_eq!(node.ports(), 1, "{case}: {}", node.log());
        assert_eq!(node.pod_state(), self.clean, "{case}");
        assert!(!node.netns.ip("-o link show").contains(": hfb"), "{case}: the interface of a limit");
        assert_eq!(self.sandbox.ip("-o link show"), self.links, "{case}");
        assert!(is_empty(&node.pending()), "{case}");
        assert_eq!(self.references(), [""; 0], "{case}");
    }

    /// What of the agent holds the victim's namespace: descriptors and threads.
    fn references(&self) -> Vec<String> {
        let inode = std::fs::metadata(self.sandbox.path()).unwrap().ino();
        let own = format!("net:[{inode}]");
        let agent = format!("/proc/{}", self.node.pid());
        let mut links: Vec<_> = Vec::new();
        for entry in std::fs::read_dir(format!("{agent}/fd")).unwrap().flatten() {
            links.push(entry.path());
        }
        for entry in std::fs::read_dir(format!("{agent}/task")).unwrap().flatten() {
            links.push(entry.path().join("ns/net"));
        }
        let is_it = |path: &std::path::PathBuf| {
            std::fs::read_link(path).is_ok_and(|target| target.as_os_str().to_str() == Some(own.as_str()))
        };
        links.into_iter().filter(is_it).map(|path| path.display().to_string()).collect()
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("{}", self.node.log());
        }
    }
}

/// Each system call, until the plugin ends before it.
fn each_call(mut case: impl FnMut(usize) -> Outcome) -> usize {
    for nth in 0..CALLS_MAX {
        if case(nth) == Outcome::Ended {
            return nth;
        }
    }
    panic!("more than {CALLS_MAX} system calls");
}

#[test]
fn an_add_that_is_killed_before_any_system_call_of_the_plugin_is_undone_by_del_or_gc() {
    let bed = Bed::new();
    for remedy in [Remedy::Del, Remedy::Gc] {
        let mut dirty = 0;
        let calls = each_call(|nth| {
            let outcome = bed.kill_plugin_at("ADD", nth);
            dirty += usize::from(outcome == Outcome::Killed && bed.is_dirty());
            bed.go_on(remedy);
            bed.is_clean(&format!("ADD killed before call {nth}, {remedy:?}"));
            outcome
        });
        println!("ADD: killed before each of {calls} system calls, {dirty} left something, then {remedy:?}");
        assert!(calls > 20 && dirty > 0, "{calls} system calls were seen, {dirty} left something");
    }
    assert!(bed.node.netns.pings(&bed.bystander));
}

#[test]
fn a_del_that_is_killed_before_any_system_call_of_the_plugin_is_finished_by_del_or_gc() {
    let bed = Bed::new();
    for remedy in [Remedy::Del, Remedy::Gc] {
        let mut dirty = 0;
        let calls = each_call(|nth| {
            bed.add().unwrap();
            let outcome = bed.kill_plugin_at("DEL", nth);
            dirty += usize::from(outcome == Outcome::Killed && bed.is_dirty());
            bed.go_on(remedy);
            bed.is_clean(&format!("DEL killed before call {nth}, {remedy:?}"));
            outcome
        });
        println!("DEL: killed before each of {calls} system calls, {dirty} left something, then {remedy:?}");
        assert!(calls > 20 && dirty > 0, "{calls} system calls were seen, {dirty} left something");
    }
    assert!(bed.node.netns.pings(&bed.bystander));
}

#[test]
fn a_del_without_the_agent_that_is_killed_before_any_system_call_leaves_a_whole_record_or_none() {
    let mut bed = Bed::new();
    let calls = each_call(|nth| {
        bed.add().unwrap();
        bed.node.kill();
        let outcome = bed.kill_plugin_at("DEL", nth);
        // The runtime repeats it; then it may forget the container.
        bed.node.del("victim").unwrap();
        bed.node.start();
        // What a kill leaves of a record is a hidden file that nobody reads.
        let left = std::fs::read_dir(bed.node.pending()).unwrap().flatten().map(|entry| entry.file_name());
        let left: Vec<_> = left.filter(|name| !name.as_encoded_bytes().starts_with(b".")).collect();
        assert!(left.is_empty(), "call {nth}: {left:?}");
        let _ = std::fs::remove_dir_all(bed.node.pending());
        bed.is_clean(&format!("DEL without agent killed before call {nth}"));
        outcome
    });
    println!("DEL without the agent: killed before each of {calls} system calls");
    assert!(calls > 20, "only {calls} system calls were seen");
    assert!(bed.node.netns.pings(&bed.bystander));
}

/// The calls by which a process changes anything outside itself.
fn changes_something(number: i64) -> bool {
    [
        libc::SYS_sendto,
        libc::SYS_sendmsg,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_pwrite64,
        libc::SYS_pwritev,
        libc::SYS_fsync,
        libc::SYS_fdatasync,
        libc::SYS_sync_file_range,
        libc::SYS_ftruncate,
        libc::SYS_renameat,
        libc::SYS_renameat2,
        libc::SYS_unlinkat,
        libc::SYS_mkdirat,
        libc::SYS_openat,
        libc::SYS_setns,
    ]
    .contains(&number)
}

/// Kills the agent before the nth of its changes while a verb of the victim runs, and starts it again. Also says whether that left
/// something.
fn kill_agent_at(bed: &mut Bed, verb: &str, nth: usize) -> (Outcome, bool) {
    let is_over = AtomicBool::new(false);
    let (seized, is_seized) = std::sync::mpsc::channel();
    let outcome = std::thread::scope(|scope| {
        let (pid, is_over) = (bed.node.pid(), &is_over);
        let tracer = scope.spawn(move || {
            let watched = Watched::seize(pid);
            assert!(watched.threads() > 2);
            seized.send(()).unwrap();
            watched.kill_at(nth, changes_something, || is_over.load(Ordering::Relaxed))
        });
        is_seized.recv().unwrap();
        // Killed or not: what it answers is the runtime's to handle.
        let _ = match verb {
            "ADD" => bed.add(),
            _ => bed.node.del("victim"),
        };
        is_over.store(true, Ordering::Relaxed);
        tracer.join().unwrap()
    });
    let ports = bed.node.ports();
    bed.node.forget_agent();
    bed.node.start();
    (outcome, ports > 1 || bed.is_dirty())
}

/// No address comes back: each was told to a runtime, and its time is not over, whatever is killed.
fn kill_agent_everywhere(verb: &str) {
    let mut bed = Bed::with(&["--address-quarantine-s=3600", "--collect-after-s=0"]);
    let (mut killed, mut dirty, mut ended) = (0, 0, 0);
    let mut told = std::collections::BTreeSet::new();
    for nth in 0..CALLS_MAX {
        if verb == "DEL" {
            let address = address_of(&bed.add().unwrap());
            assert!(told.insert(address.clone()), "{address} was given out again before change {nth}");
        }
        let (outcome, left_something) = kill_agent_at(&mut bed, verb, nth);
        let remedy = if nth % 2 == 0 { Remedy::Del } else { Remedy::Gc };
        bed.go_on(remedy);
        bed.is_clean(&format!("agent killed before change {nth} of {verb}, {remedy:?}"));
        assert!(bed.node.netns.pings(&bed.bystander), "{verb} {nth}");
        match outcome {
            Outcome::Killed => (killed, ended, dirty) = (killed + 1, 0, dirty + usize::from(left_something)),
            // The agent's threads make their calls in changing order and number: more than one miss says that none is left.
            Outcome::Ended => ended += 1,
        }
        if ended == 3 {
            break;
        }
    }
    println!(
        "{verb}: the agent was killed before each of {killed} calls that change something, {dirty} left something"
    );
    assert!(killed > 10 && dirty > 0, "{killed} calls were seen, {dirty} left something");
}

#[test]
fn an_agent_that_is_killed_before_any_of_its_changes_of_an_add_leaves_nothing_that_del_or_gc_does_not_remove()
{
    kill_agent_everywhere("ADD");
}

#[test]
fn an_agent_that_is_killed_before_any_of_its_changes_of_a_del_leaves_nothing_that_del_or_gc_does_not_remove()
{
    kill_agent_everywhere("DEL");
}
