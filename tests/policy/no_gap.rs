//! No packet before its policy: pods that send without a pause from before their ADD on, and are sent to, get out and in
//! only what their policy lets.
//!
//! The sending starts earlier than any program of a pod could: in the sandbox, before the plugin is called. The other side
//! captures; that the capture works is shown by the allowed packets of the same pod, and by the twin, whose policy the
//! agents do not have.

use std::collections::BTreeSet;
use std::net::{IpAddr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, ensure};
use holdfast_tests::effort::rounds;

use crate::bed::Bed;
use crate::connects::enter;
use crate::packets::Tuple;
use crate::prober::Capture;
use crate::world::{Pod, PodName, World, labels};

/// Pod starts of a run.
const STARTS: usize = 80;
/// The same with `--long`.
const LONG_STARTS: usize = 10_000;
/// Pod starts of the twin.
const TWIN_STARTS: usize = 3;
/// How long after ADD a pod goes on.
const GO_ON: Duration = Duration::from_millis(5);
/// An allowed packet of each family must come within this time after ADD.
const ALLOWED_TIMEOUT: Duration = Duration::from_secs(2);
/// Pause between two packets to the same target.
const CYCLE: Duration = Duration::from_micros(50);
/// How many addresses after the last one are sent to before an ADD.
const GUESSES: u8 = 3;
/// Where the pods send to; nobody needs to listen.
const PORT: u16 = 80;
/// Namespace of the pods that start.
const NAMESPACE: &str = "starting";
/// They may send to x/a and be sent to by x/a.
const ONLY_X_A: &str = "{podSelector: {}, policyTypes: [Ingress, Egress], \
    ingress: [{from: [{namespaceSelector: {matchLabels: {ns: x}}, podSelector: {matchLabels: {pod: a}}}]}], \
    egress: [{to: [{namespaceSelector: {matchLabels: {ns: x}}, podSelector: {matchLabels: {pod: a}}}]}]}";

/// Starts pods one after another.
pub fn run(bed: &mut Bed) -> Result<()> {
    let starts = rounds(STARTS, LONG_STARTS);
    let mut world = bed.base();
    world.namespaces.insert(NAMESPACE.to_owned(), labels(""));
    bed.show(&world)?;
    let mut twin = Totals::default();
    for number in 0..TWIN_STARTS {
        start_one(bed, &mut world, number, &mut twin)?;
    }
    println!("{TWIN_STARTS} pod starts without the policy: {}", twin.packets());
    ensure!(twin.forbidden_out > 0, "without the policy nothing forbidden got out: the capture sees nothing");
    ensure!(twin.forbidden_in > 0, "without the policy nothing forbidden got in: the capture sees nothing");

    world.put_policy(&PodName::new(&format!("{NAMESPACE}/only")), ONLY_X_A)?;
    bed.show(&world)?;
    let mut totals = Totals { next: twin.next, ..Totals::default() };
    for number in 0..starts {
        start_one(bed, &mut world, number, &mut totals)?;
        ensure!(
            totals.forbidden_out == 0 && totals.forbidden_in == 0,
            "start {number}: a forbidden packet passed: {}",
            totals.packets()
        );
    }
    println!("{starts} pod starts, {} of them sent to before ADD: {}", totals.guessed, totals.packets());
    ensure!(totals.guessed * 2 > starts, "most pods were not sent to before their ADD");
    Ok(())
}

/// Packets that arrived, and what is known of the addresses.
#[derive(Default)]
struct Totals {
    allowed_out: u64,
    forbidden_out: u64,
    forbidden_in: u64,
    /// Starts whose address was sent to before the ADD.
    guessed: usize,
    /// Per node, the addresses that the next pod may get: those after the last one's.
    next: [Vec<IpAddr>; 2],
}

impl Totals {
    fn packets(&self) -> String {
        let Self { allowed_out, forbidden_out, forbidden_in, .. } = self;
        format!("{allowed_out} allowed packets out, {forbidden_out} forbidden ones out, {forbidden_in} in")
    }
}

fn start_one(bed: &mut Bed, world: &mut World, number: usize, totals: &mut Totals) -> Result<()> {
    let name = PodName::new(&format!("{NAMESPACE}/p{number}"));
    let node = number % 2;
    let pod = Pod {
        labels: labels("app=starting"),
        ports: Vec::new(),
        node: bed.net().nodes[node].name.clone(),
        addresses: Vec::new(),
        completed: false,
    };
    world.pods.insert(name.clone(), pod);
    bed.write(world)?;
    let sandbox = |bed: &Bed, pod: &str| -> Result<PathBuf> {
        let found = bed.sandboxes().find(|(other, _)| **other == PodName::new(pod));
        Ok(found.with_context(|| format!("{pod} has no sandbox"))?.1.to_path_buf())
    };
    let address = |pod: &str| world.pods[&PodName::new(pod)].addresses.clone();
    let (allowed, forbidden) = (address("x/a"), address("y/a"));
    let at_allowed = Capture::open(&sandbox(bed, "x/a")?)?;
    let at_forbidden = Capture::open(&sandbox(bed, "y/a")?)?;
    let mut attachment = bed.net().sandbox(node, &name.namespace, &name.name)?;
    let at_pod = Capture::open(&attachment.netns)?;

    let stop = Arc::new(AtomicBool::new(false));
    let targets: Vec<SocketAddr> =
        allowed.iter().chain(&forbidden).map(|address| SocketAddr::new(*address, PORT)).collect();
    let guesses: Vec<SocketAddr> =
        totals.next[node].iter().map(|address| SocketAddr::new(*address, PORT)).collect();
    let mut senders = vec![
        blast(attachment.netns.clone(), targets, stop.clone()),
        blast(sandbox(bed, "y/a")?, guesses, stop.clone()),
    ];
    let added = bed.net().add(&mut attachment);
    if added.is_ok() {
        let to_pod = attachment.addresses.iter().map(|address| SocketAddr::new(*address, PORT)).collect();
        senders.push(blast(sandbox(bed, "y/a")?, to_pod, stop.clone()));
        let guessed = attachment.addresses.iter().all(|address| totals.next[node].contains(address));
        totals.guessed += usize::from(guessed);
        totals.next[node] = attachment.addresses.into_iter().flat_map(following).collect();
    }
    let seen = added.and_then(|()| watch(&at_allowed, attachment.addresses));
    std::thread::sleep(GO_ON);
    stop.store(true, Ordering::SeqCst);
    for sender in senders {
        sender.join().map_err(|_| anyhow!("a sender panicked"))??;
    }
    totals.allowed_out += seen.with_context(|| name.to_string())?;
    let from_pod = |tuple: &Tuple| attachment.addresses.contains(&tuple.source);
    totals.forbidden_out += at_forbidden.drain().iter().filter(|tuple| from_pod(tuple)).count() as u64;
    totals.forbidden_in +=
        at_pod.drain().iter().filter(|tuple| forbidden.contains(&tuple.source)).count() as u64;
    bed.net().detach(&attachment)?;
    world.pods.remove(&name);
    Ok(())
}

/// The next addresses of a range.
fn following(address: IpAddr) -> Vec<IpAddr> {
    let steps = 1..=GUESSES;
    match address {
        IpAddr::V4(v4) => {
            steps.map(|step| IpAddr::from((v4.to_bits() + u32::from(step)).to_be_bytes())).collect()
        }
        IpAddr::V6(v6) => {
            steps.map(|step| IpAddr::from((v6.to_bits() + u128::from(step)).to_be_bytes())).collect()
        }
    }
}

/// Waits until an allowed packet of each family arrived.
fn watch(capture: &Capture, addresses: [IpAddr; 2]) -> Result<u64> {
    let until = Instant::now() + ALLOWED_TIMEOUT;
    let (mut count, mut families) = (0, BTreeSet::new());
    while families.len() < 2 {
        ensure!(Instant::now() < until, "of the allowed packets only those from {families:?} arrive");
        for tuple in capture.drain() {
            if addresses.contains(&tuple.source) {
                families.insert(tuple.source);
                count += 1;
            }
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(count)
}

/// Sends to all targets in turn until told to stop; while there is no network yet, that just fails.
fn blast(netns: PathBuf, targets: Vec<SocketAddr>, stop: Arc<AtomicBool>) -> JoinHandle<Result<()>> {
    std::thread::spawn(move || {
        enter(&netns)?;
        let v4 = UdpSocket::bind(("0.0.0.0", 0))?;
        let v6 = UdpSocket::bind(("::", 0))?;
        while !stop.load(Ordering::SeqCst) {
            for target in &targets {
                let socket = if target.is_ipv4() { &v4 } else { &v6 };
                let _ = socket.send_to(b"!", target);
            }
            std::thread::sleep(CYCLE);
        }
        Ok(())
    })
}
