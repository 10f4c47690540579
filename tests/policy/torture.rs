//! The torture test: a pod network of three nodes under kills, cut cables, lost packets, tampering, churn and edits, in a random
//! order with a seed. Every probe that should pass passes, nothing that is denied or forged arrives, and nothing is left at the end.
//!
//! ```text
//!   driver: draws a step, says beforehand what it may cost, does it, undoes it later
//!   prober: every pair of pods, both families, five times a second, judged by the oracle and the excuses (probes.rs)
//! ```
//!
//! What costs nothing, and is excused by nothing: a killed or restarting agent, other pods' start and end, nodes that join or leave,
//! edits that do not change a pair's verdict. `HOLDFAST_TORTURE_S` says how long it goes on.

mod faults;
mod objects;
mod probes;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::effort::{rounds, seed};
use holdfast_tests::netbed::{Attachment, NetBed};
use holdfast_tests::process::wait_until;
use holdfast_tests::traces;
use rand::rngs::StdRng;
use rand::seq::{IndexedRandom as _, IteratorRandom as _};
use rand::{Rng as _, SeedableRng as _};
use serde_json::{Value, json};

use self::faults::{Cost, Target};
use self::objects::{NAMESPACE, put_pod, put_policies};
use self::probes::{Edit, NODES, Network, Role, TICK};

/// How long the agent may take to notice and mend what somebody took away, on a busy machine.
const HEAL_SETTLE: Duration = Duration::from_secs(1);
/// After a cable is plugged in, the kernel asks for its neighbours again within this.
const CABLE_SETTLE: Duration = Duration::from_secs(4);
/// An edit, and a new pod's address, are in force on every node within this.
const OBJECTS_SETTLE: Duration = Duration::from_secs(2);
/// Time of a run, and with `--long`.
const RUN: Duration = Duration::from_secs(60);
const LONG_RUN: Duration = Duration::from_secs(3600);
/// The probes notice what must not be within this.
const NOTICE_TIMEOUT: Duration = Duration::from_secs(10);
/// Pods that come and go, beside those that stay.
const CHURN_PODS_MAX: usize = 6;
/// The plugin's calls end within this; kills are drawn from it.
const CALL_MS: u64 = 20;
/// Longer than an agent is away, so that no node believes in an address's last owner.
const SETTINGS: [&str; 1] = ["--address-quarantine-s=10"];
/// New connections stay new: conntrack forgets one before its socket's turn comes again.
const SHORT_TIMEOUTS: &str = "for name in udp_timeout udp_timeout_stream; do \
    echo 3 > /proc/sys/net/netfilter/nf_conntrack_$name; done";

/// The whole run on nodes of its own.
pub fn run() -> Result<()> {
    let seed = seed()?;
    let time = match std::env::var("HOLDFAST_TORTURE_S") {
        Ok(text) => Duration::from_secs(text.parse().context("HOLDFAST_TORTURE_S is no number")?),
        Err(_) => rounds(RUN, LONG_RUN),
    };
    let bed = NetBed::start_with("torture", 3, &SETTINGS)?;
    let mut torture = Torture::new(bed, seed);
    let outcome = torture.whole(time);
    if outcome.is_err() {
        torture.show_nodes();
    }
    let ended = torture.bed.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep });
    outcome.and(ended)
}

struct Pod {
    attachment: Attachment,
    station: u32,
    /// Only a leaving node takes it away.
    stays: bool,
}

struct Torture {
    bed: NetBed,
    network: Arc<Mutex<Network>>,
    random: StdRng,
    started: Instant,
    pods: BTreeMap<String, Pod>,
    next_pod: u32,
    edit: Edit,
    /// Killed agents, and when they start again.
    agents_back: [Option<Instant>; NODES],
    cables_back: [Option<Instant>; NODES],
    loss_ends: [Option<Instant>; NODES],
    /// Nobody mends a node whose agent is away.
    broken: [Vec<Cost>; NODES],
    /// A node that left, and when it joins again.
    gone: Option<(usize, Instant)>,
    counts: BTreeMap<&'static str, u64>,
    tampered: u64,
}

impl Torture {
    fn new(bed: NetBed, seed: u64) -> Self {
        Self {
            bed,
            network: Arc::new(Mutex::new(Network::new(Edit::Open))),
            random: StdRng::seed_from_u64(seed),
            started: Instant::now(),
            pods: BTreeMap::new(),
            next_pod: 1,
            edit: Edit::Open,
            agents_back: [None; NODES],
            cables_back: [None; NODES],
            loss_ends: [None; NODES],
            broken: [const { Vec::new() }; NODES],
            gone: None,
            counts: BTreeMap::new(),
            tampered: 0,
        }
    }

    fn whole(&mut self, time: Duration) -> Result<()> {
        for node in &self.bed.nodes {
            node.spaces.run("sh", &["-c", SHORT_TIMEOUTS])?;
        }
        let before = self.bed.nodes.iter().map(traces::of).collect::<Result<Vec<BTreeSet<String>>>>()?;
        self.bed.objects.put_namespace(NAMESPACE)?;
        put_policies(&self.bed, self.edit)?;
        for node in 0..NODES {
            self.attach_staying(node)?;
        }
        std::thread::sleep(OBJECTS_SETTLE);
        let prober = start_prober(self.network.clone());
        let outcome = self.steps(time).and_then(|()| self.calm()).and_then(|()| self.notices());
        self.lock().stop = true;
        prober.join().map_err(|_| anyhow::anyhow!("the prober panicked"))?;
        self.tell();
        outcome?;
        self.take_down()?;
        self.bed.nodes.iter().zip(&before).try_for_each(|(node, before)| {
            let processes = node.spaces.run("ps", &["-e", "-o", "comm="])?;
            ensure!(!processes.contains("holdfast-cni"), "a plugin is left on {}:\n{processes}", node.name);
            traces::expect_nothing_more(node, before)
        })
    }

    fn steps(&mut self, time: Duration) -> Result<()> {
        self.started = Instant::now();
        self.lock().started = self.started;
        while self.started.elapsed() < time {
            self.go_on()?;
            self.step()?;
            let pause = Duration::from_millis(self.random.random_range(50..600));
            std::thread::sleep(pause);
        }
        Ok(())
    }

    /// Undoes everything and demands that everything passes.
    fn calm(&mut self) -> Result<()> {
        let now = Instant::now();
        for ends in self.agents_back.iter_mut().chain(&mut self.cables_back).chain(&mut self.loss_ends) {
            *ends = ends.map(|_| now);
        }
        self.gone = self.gone.map(|(node, _)| (node, now));
        self.go_on()?;
        std::thread::sleep(HEAL_SETTLE.max(CABLE_SETTLE));
        self.check()?;
        let lost = self.lock().counts.lost;
        std::thread::sleep(TICK * 15);
        self.check()?;
        let lost = self.lock().counts.lost - lost;
        ensure!(lost == 0, "{lost} probes were lost after everything had calmed down");
        Ok(())
    }

    /// The probes notice what they are for: without agents and rules, what is denied and forged arrives; without a route, what is
    /// allowed does not.
    fn notices(&mut self) -> Result<()> {
        let counts = self.lock().counts.clone();
        self.lock().is_sabotaged = true;
        for node in &mut self.bed.nodes {
            node.netd.kill()?;
            node.spaces.run("nft", &["flush", "ruleset"])?;
        }
        let mut missing = BTreeSet::from(["a denied packet arrived", "a forged packet arrived"]);
        let noticed = wait_until(NOTICE_TIMEOUT, || {
            for breach in std::mem::take(&mut self.lock().breaches) {
                missing.retain(|sign| !breach.starts_with(sign));
            }
            Ok(missing.is_empty())
        });
        noticed.with_context(|| format!("not noticed: {missing:?}"))?;
        self.bed.nodes[0].spaces.run("ip", &["-4", "route", "del", "10.244.2.0/24"])?;
        let cut = || {
            let breaches = std::mem::take(&mut self.lock().breaches);
            Ok(breaches.iter().any(|breach| breach.starts_with("no answer")))
        };
        wait_until(NOTICE_TIMEOUT, cut).context("no cut was noticed")?;
        for node in &mut self.bed.nodes {
            node.netd.start_again()?;
            node.wait()?;
        }
        let mut network = self.lock();
        network.breaches.clear();
        network.counts = counts;
        Ok(())
    }

    /// Ends what has had its time.
    fn go_on(&mut self) -> Result<()> {
        self.check()?;
        let now = Instant::now();
        for node in 0..NODES {
            if self.cables_back[node].is_some_and(|back| back <= now) {
                faults::set_cable(&self.bed, node, "up")?;
                self.cables_back[node] = None;
                self.release(node, Cost::Others, "cable out", CABLE_SETTLE);
            }
            if self.loss_ends[node].is_some_and(|end| end <= now) {
                faults::set_loss(&self.bed, node, 0)?;
                self.loss_ends[node] = None;
                self.release(node, Cost::Others, "packets lost", CABLE_SETTLE);
            }
            if self.agents_back[node].is_some_and(|back| back <= now) {
                self.bed.nodes[node].netd.start_again()?;
                self.bed.nodes[node].wait()?;
                self.agents_back[node] = None;
                for cost in std::mem::take(&mut self.broken[node]) {
                    self.release(node, cost, "broken without an agent", HEAL_SETTLE);
                }
                let away = self.agents_back.iter().any(Option::is_some);
                self.lock().set_agent_away(away, Instant::now() + OBJECTS_SETTLE);
            }
        }
        if let Some((node, _)) = self.gone.filter(|(_, back)| *back <= now) {
            self.join(node)?;
        }
        Ok(())
    }

    fn step(&mut self) -> Result<()> {
        let node = self.random.random_range(0..NODES);
        if self.gone.is_some_and(|(gone, _)| gone == node) {
            return Ok(());
        }
        match self.random.random_range(0..100) {
            0..14 => self.kill_agent(node),
            14..18 => self.cut_cable(node),
            18..21 => self.lose_packets(node),
            21..38 => self.tamper(node),
            38..54 => self.start_pod(node),
            54..70 => self.end_pod(),
            70..82 => self.kill_call(node),
            82..96 => self.edit(),
            _ => self.leave(node),
        }
    }

    fn kill_agent(&mut self, node: usize) -> Result<()> {
        if self.agents_back[node].is_some() {
            return Ok(());
        }
        self.count("agents killed");
        println!("                 on node {node}");
        self.lock().set_agent_away(true, Instant::now() + OBJECTS_SETTLE);
        self.bed.nodes[node].netd.kill()?;
        let away = Duration::from_millis(self.random.random_range(0..3000));
        self.agents_back[node] = Some(Instant::now() + away);
        Ok(())
    }

    fn cut_cable(&mut self, node: usize) -> Result<()> {
        if self.cables_back[node].is_some() {
            return Ok(());
        }
        self.count("cables cut");
        println!("                 of node {node}");
        self.hold(node, Cost::Others);
        faults::set_cable(&self.bed, node, "down")?;
        let away = Duration::from_millis(self.random.random_range(100..3000));
        self.cables_back[node] = Some(Instant::now() + away);
        Ok(())
    }

    fn lose_packets(&mut self, node: usize) -> Result<()> {
        if self.loss_ends[node].is_some() {
            return Ok(());
        }
        self.count("periods of loss");
        self.hold(node, Cost::Others);
        let percent = self.random.random_range(5..60);
        faults::set_loss(&self.bed, node, percent)?;
        let time = Duration::from_millis(self.random.random_range(200..3000));
        self.loss_ends[node] = Some(Instant::now() + time);
        Ok(())
    }

    fn tamper(&mut self, node: usize) -> Result<()> {
        let here = self.pods.iter().filter(|(_, pod)| pod.attachment.node == node);
        let hit = here.choose(&mut self.random).map(|(_, pod)| pod);
        let station = hit.map(|pod| pod.station);
        let target = hit.and_then(|pod| {
            let host_ifname = pod.attachment.host_ifname()?;
            Some(Target { host_ifname, addresses: pod.attachment.addresses })
        });
        let peer = (node + self.random.random_range(1..NODES)) % NODES;
        let tampering = faults::draw(&mut self.random, node, peer, target.as_ref());
        self.excuse(node, station, tampering.cost, tampering.what, HEAL_SETTLE);
        if !faults::tamper(&self.bed.nodes[node], &tampering) {
            return Ok(());
        }
        self.count(tampering.what);
        self.tampered += 1;
        println!("                 on node {node}: {}", tampering.command);
        if self.agents_back[node].is_some() {
            // Nobody mends it before the agent is back; several may add up to anything.
            let cost = if tampering.cost == Cost::Rules { Cost::Rules } else { Cost::Node };
            self.broken[node].push(cost);
            self.hold(node, cost);
        }
        Ok(())
    }

    fn start_pod(&mut self, node: usize) -> Result<()> {
        if self.pods.values().filter(|pod| !pod.stays).count() >= CHURN_PODS_MAX {
            return Ok(());
        }
        let role = *Role::ALL.choose(&mut self.random).context("there are roles")?;
        let name = self.next_name();
        put_pod(&self.bed, &name, role, node, &Value::Null)?;
        let mut attachment = self.bed.sandbox(node, NAMESPACE, &name)?;
        match self.bed.add(&mut attachment) {
            Ok(()) => {
                self.count("pods started");
                self.attached(name, role, attachment, false)
            }
            Err(error) => {
                let excused = self.agents_back[node].is_some() || self.lock().is_excused(node);
                ensure!(excused, "ADD on a node that is well: {error:#}");
                self.count("ADDs refused");
                self.undo(&name, &attachment)
            }
        }
    }

    fn end_pod(&mut self) -> Result<()> {
        let churned = self.pods.iter().filter(|(_, pod)| !pod.stays);
        let Some(name) = churned.map(|(name, _)| name.clone()).choose(&mut self.random) else {
            return Ok(());
        };
        self.count("pods ended");
        self.detach(&name)
    }

    /// A runtime's call dies half-way; it deletes what it began.
    fn kill_call(&mut self, node: usize) -> Result<()> {
        let name = self.next_name();
        put_pod(&self.bed, &name, Role::Stranger, node, &Value::Null)?;
        let attachment = self.bed.sandbox(node, NAMESPACE, &name)?;
        let after = Duration::from_micros(self.random.random_range(0..CALL_MS * 1000));
        self.bed.add_killed(&attachment, after)?;
        self.count("plugin calls killed");
        // An ADD that goes on in the agent waits for an object that is gone, and DEL waits for the ADD.
        let deleted = self.bed.delete(&attachment);
        self.undo(&name, &attachment)?;
        let excused = self.lock().is_excused(node);
        if excused { Ok(()) } else { deleted.context("DEL on a node that is well") }
    }

    fn edit(&mut self) -> Result<()> {
        self.count("policy edits");
        self.edit = *Edit::ALL.choose(&mut self.random).context("there are edits")?;
        self.lock().edit(self.edit, Instant::now() + OBJECTS_SETTLE);
        put_policies(&self.bed, self.edit)
    }

    /// A node leaves in good order: its pods first. Others forget it.
    fn leave(&mut self, node: usize) -> Result<()> {
        if self.gone.is_some() || self.agents_back.iter().any(Option::is_some) {
            return Ok(());
        }
        self.count("nodes left and joined");
        let here = self.pods.iter().filter(|(_, pod)| pod.attachment.node == node);
        let names: Vec<String> = here.map(|(name, _)| name.clone()).collect();
        names.iter().try_for_each(|name| self.detach(name))?;
        self.bed.nodes[node].netd.kill()?;
        self.bed.objects.remove(&format!("node-{}", self.bed.nodes[node].name))?;
        let range = format!("10.244.{}.0/24", node + 1);
        for other in (0..NODES).filter(|other| *other != node) {
            let forgotten =
                || Ok(!self.bed.nodes[other].spaces.run("ip", &["route", "show"])?.contains(&range));
            wait_until(OBJECTS_SETTLE, forgotten)
                .with_context(|| format!("node {other} keeps the way to {range}"))?;
        }
        let away = Duration::from_millis(self.random.random_range(0..5000));
        self.gone = Some((node, Instant::now() + away));
        Ok(())
    }

    fn join(&mut self, node: usize) -> Result<()> {
        self.bed.put_node_again(node)?;
        self.bed.nodes[node].netd.start_again()?;
        self.bed.nodes[node].wait()?;
        self.gone = None;
        self.attach_staying(node)
    }

    /// One pod of each role on a node.
    fn attach_staying(&mut self, node: usize) -> Result<()> {
        for role in Role::ALL {
            let name = format!("{}-{node}", role.word());
            put_pod(&self.bed, &name, role, node, &Value::Null)?;
            let attachment = self.bed.attach(node, NAMESPACE, &name);
            let attachment = attachment.with_context(|| format!("ADD of {name}"))?;
            self.attached(name, role, attachment, true)?;
        }
        Ok(())
    }

    fn attached(&mut self, name: String, role: Role, attachment: Attachment, stays: bool) -> Result<()> {
        let [v4, v6] = attachment.addresses.map(|address| address.to_string());
        let status = json!({ "phase": "Running", "podIP": v4, "podIPs": [{ "ip": v4 }, { "ip": v6 }] });
        put_pod(&self.bed, &name, role, attachment.node, &status)?;
        let station = {
            let mut network = self.lock();
            let station = network.add(&name, role, &attachment)?;
            network.excuse_pod(station, Instant::now() + OBJECTS_SETTLE, "new pod");
            station
        };
        self.pods.insert(name, Pod { attachment, station, stays });
        Ok(())
    }

    fn detach(&mut self, name: &str) -> Result<()> {
        let pod = self.pods.remove(name).with_context(|| format!("there is no {name}"))?;
        self.lock().remove(pod.station);
        self.undo(name, &pod.attachment)
    }

    /// The object goes first, then the attachment, then the sandbox. DEL succeeds whatever the agent does.
    fn undo(&self, name: &str, attachment: &Attachment) -> Result<()> {
        self.bed.objects.remove(&format!("pod-{NAMESPACE}-{name}"))?;
        let deleted = self.bed.delete(attachment);
        if let Err(error) = deleted {
            let excused = self.lock().is_excused(attachment.node);
            ensure!(excused, "DEL on a node that is well: {error:#}");
            // Runtimes repeat it.
            wait_until(OBJECTS_SETTLE, || self.bed.delete(attachment).map(|()| true))
                .context("DEL, repeated")?;
        }
        let node = &self.bed.nodes[attachment.node];
        node.spaces.run("ip", &["netns", "delete", &format!("{NAMESPACE}-{name}")]).map(drop)
    }

    fn take_down(&mut self) -> Result<()> {
        let names: Vec<String> = self.pods.keys().cloned().collect();
        names.iter().try_for_each(|name| self.detach(name))
    }

    /// What a fault costs until a time from now.
    fn excuse(&self, node: usize, pod: Option<u32>, cost: Cost, what: &'static str, settle: Duration) {
        let until = Instant::now() + settle;
        let mut network = self.lock();
        match (cost, pod) {
            (Cost::Pod, Some(station)) => network.excuse_pod(station, until, what),
            _ => paths(node, cost).for_each(|other| network.excuse_pair(node, other, until, what)),
        }
        if cost == Cost::Rules {
            network.excuse_leak(node, until);
        }
    }

    /// What a fault costs until it is released.
    fn hold(&self, node: usize, cost: Cost) {
        let mut network = self.lock();
        paths(node, cost).for_each(|other| network.hold_pair(node, other));
        if cost == Cost::Rules {
            network.hold_leak(node, true);
        }
    }

    fn release(&self, node: usize, cost: Cost, what: &'static str, settle: Duration) {
        let until = Instant::now() + settle;
        let mut network = self.lock();
        paths(node, cost).for_each(|other| network.release_pair(node, other, until, what));
        if cost == Cost::Rules {
            network.excuse_leak(node, until);
            network.hold_leak(node, false);
        }
    }

    fn check(&self) -> Result<()> {
        let breaches = self.lock().breaches.clone();
        if breaches.is_empty() {
            return Ok(());
        }
        bail!("after {:.1} s:\n{}", self.started.elapsed().as_secs_f64(), breaches.join("\n"))
    }

    fn next_name(&mut self) -> String {
        self.next_pod += 1;
        format!("p{}", self.next_pod)
    }

    fn count(&mut self, what: &'static str) {
        *self.counts.entry(what).or_default() += 1;
        println!("{:8.2} s  {what}", self.started.elapsed().as_secs_f64());
    }

    fn lock(&self) -> MutexGuard<'_, Network> {
        self.network.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        let counts = self.lock().counts.clone();
        println!("{:.0} s: {:?}", self.started.elapsed().as_secs_f64(), self.counts);
        println!("{} things were tampered with", self.tampered);
        println!(
            "allowed: {} answered, {} lost where a fault excuses it, {} lost one by one without; denied: {}, forged: {}, of these \
             {} arrived while rules were taken away",
            counts.passed, counts.excused, counts.lost, counts.denied, counts.forged, counts.leaked
        );
        println!("longest without an answer: {:.1?}", counts.outages);
    }

    /// What the nodes look like after a failure.
    fn show_nodes(&self) {
        let script = "ip -br link; ip route; ip -6 route; bridge fdb show dev hf.vx; bridge -d link; ip neigh; \
            sysctl net.ipv4.ip_forward net.ipv6.conf.all.forwarding";
        for node in &self.bed.nodes {
            let shown = node.spaces.run("sh", &["-c", script]);
            println!("==== {}\n{}", node.name, shown.unwrap_or_else(|error| format!("{error:#}")));
            println!("{}", node.netd.log_tail());
        }
    }
}

/// Nodes to which a fault costs a node the way; itself for its own pods.
fn paths(node: usize, cost: Cost) -> impl Iterator<Item = usize> {
    (0..NODES).filter(move |other| match cost {
        Cost::Peer(peer) => *other == peer,
        Cost::Others => *other != node,
        Cost::Pod | Cost::Node | Cost::Rules => true,
    })
}

fn start_prober(network: Arc<Mutex<Network>>) -> JoinHandle<()> {
    const LOOKS: u32 = 4;
    std::thread::spawn(move || {
        for turn in 0u64.. {
            {
                let mut network = network.lock().unwrap_or_else(PoisonError::into_inner);
                if network.stop {
                    return;
                }
                network.receive();
                if turn % u64::from(LOOKS) == 0 {
                    network.judge();
                    network.send();
                }
            }
            std::thread::sleep(TICK / LOOKS);
        }
    })
}
