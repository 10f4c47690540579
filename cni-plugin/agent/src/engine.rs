//! The single writer: it alone compiles policy and applies node plans and rulesets.
//!
//! ```text
//! objects --changes--> engine --Delta, NodePlan--> dataplane
//! ADD, DEL --command-->   |
//!                         +--> answers: health (STATUS), explain, how policies stand, dump
//! ```
//!
//! Commands that arrive while the engine works are taken together, so a burst of pods costs a few transactions and not
//! one each; each waits for the commit that covers it.

mod follow;
mod handle;
mod heal;
mod questions;
mod ranges;
mod why;

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use holdfast_dataplane::Dataplane;
use holdfast_net_core::nat::{self, MasqueradeRanges};
use holdfast_net_core::objects::{Node, ObjectChange, ObjectName};
use holdfast_net_core::overlay;
use holdfast_net_core::plan::{Attachment, NodePlan};
use holdfast_net_core::pod_ranges::PodRangeSpec;
use holdfast_net_core::policy::{Compiler, Subject};
use holdfast_net_core::ruleset::pins_of;
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};

use crate::batch::Batch;
use crate::claims::Claims;
use crate::leases::{AttachmentKey, Lease, Leases};
use crate::metrics::Metrics;
use crate::objects::ObjectKey;
use crate::settings::{Mode, Settings};
use crate::uplink;

use handle::Command;
use heal::Heal;

pub(crate) use handle::{EngineHandle, Seen};
pub(crate) use questions::Question;
pub(crate) use why::{LiveAnswer, Why};

/// Commands that wait; a full queue makes callers wait.
const COMMANDS_MAX: usize = 1024;
/// Commands taken in one pass.
const BATCH_MAX: usize = 256;
/// Without any change links and routes are compared with the plan this often.
const RESYNC_INTERVAL: Duration = Duration::from_secs(10);
/// A failed pass is repeated after this.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);
/// Profiles that nobody uses are deleted, and memory given back, when nothing changed for so long.
const SWEEP_AFTER: Duration = Duration::from_secs(2);
/// After so many elements in one commit, or a first reading, memory is given back.
const TRIM_ELEMENTS: usize = 10_000;
/// The same after so many attachments and detachments.
const TRIM_ENDPOINTS: usize = 32;
/// How long so many of the last changes took is kept for people and tests.
const DURATIONS_MAX: usize = 1000;

const NOT_READ: &str = "objects were not read yet";

/// The single writer's state.
pub(crate) struct Engine {
    settings: Settings,
    dataplane: Arc<Dataplane>,
    leases: Arc<Leases>,
    batches: mpsc::Receiver<Batch>,
    claims: Arc<Claims>,
    commands: mpsc::Receiver<Command>,
    attachment: watch::Sender<Option<Attachment>>,
    seen: watch::Sender<Seen>,
    endpoints: BTreeMap<AttachmentKey, Lease>,
    nodes: BTreeMap<String, Node>,
    /// Claimed blocks, by the names of their objects.
    pod_ranges: BTreeMap<String, PodRangeSpec>,
    /// A Node changed, and the node's network was not planned since.
    nodes_changed: bool,
    /// A part of a reading is taken in, and its end is not.
    mid_reading: bool,
    /// The objects could be read when they were looked at last.
    readable: bool,
    problems: Vec<String>,
    /// Objects that are wrong, each with what is wrong; those that were good once count as they were.
    refused: BTreeMap<ObjectKey, String>,
    compiler: Compiler,
    /// Numbers of what the kernel holds were taken over.
    adopted: bool,
    /// The kernel holds what was compiled, but for what changed since.
    in_force: bool,
    /// Much was allocated and freed since memory was given back.
    owes_trim: bool,
    /// Attachments and detachments since.
    untrimmed: usize,
    /// How many contested addresses were reported.
    contested: usize,
    node_plan: Option<NodePlan>,
    /// Of the node list that was planned last.
    masquerade: Option<MasqueradeRanges>,
    node_error: Option<String>,
    rules_error: Option<String>,
    left_out: Vec<String>,
    passes: u64,
    /// From a change's notice to its commit, in microseconds; those that wrote to the kernel.
    durations_us: VecDeque<u64>,
    last_change: Instant,
    /// The policy revision is owed: see [`Dataplane::settle`].
    settle_at: Option<Instant>,
    /// The notification socket fails: said once.
    deaf: bool,
    heal: Heal,
    /// Of the VXLAN device; `None`: as the kernel has it.
    checksum_offload: Option<bool>,
    metrics: Arc<Metrics>,
}

impl Engine {
    /// An engine for the endpoints that exist already.
    pub(crate) async fn new(
        settings: Settings,
        dataplane: Arc<Dataplane>,
        leases: Arc<Leases>,
        (batches, claims): (mpsc::Receiver<Batch>, Claims),
        metrics: Arc<Metrics>,
    ) -> (Self, EngineHandle) {
        let (sender, commands) = mpsc::channel(COMMANDS_MAX);
        let (attachment, attachment_receiver) = watch::channel(None);
        let (seen, seen_receiver) = watch::channel(Seen::default());
        let handle = EngineHandle {
            commands: sender,
            attachment: attachment_receiver,
            seen: seen_receiver,
            alone: Arc::default(),
        };
        let endpoints: BTreeMap<AttachmentKey, Lease> =
            leases.all().await.into_iter().map(|lease| (lease.key.clone(), lease)).collect();
        let mut compiler = Compiler::default();
        for lease in endpoints.values() {
            compiler.put(&lease.plan.host_ifname, subject(&settings, lease));
        }
        let engine = Self {
            settings,
            dataplane,
            leases,
            batches,
            claims: Arc::new(claims),
            commands,
            attachment,
            seen,
            endpoints,
            nodes: BTreeMap::new(),
            pod_ranges: BTreeMap::new(),
            nodes_changed: false,
            mid_reading: false,
            readable: false,
            problems: Vec::new(),
            refused: BTreeMap::new(),
            compiler,
            adopted: false,
            in_force: false,
            owes_trim: false,
            untrimmed: 0,
            contested: 0,
            node_plan: None,
            masquerade: None,
            node_error: None,
            rules_error: Some(NOT_READ.to_owned()),
            left_out: Vec::new(),
            passes: 0,
            durations_us: VecDeque::new(),
            last_change: Instant::now(),
            settle_at: None,
            deaf: false,
            heal: Heal::default(),
            checksum_offload: None,
            metrics,
        };
        (engine, handle)
    }

    /// Works until every handle is gone.
    pub(crate) async fn run(mut self) {
        let mut objects_gone = false;
        let dataplane = Arc::clone(&self.dataplane);
        let mut poll = tokio::time::interval(heal::POLL_INTERVAL);
        poll.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut last_full = Instant::now();
        loop {
            let failed = self.rules_error.is_some() || self.node_error.is_some();
            let pause = if failed { RETRY_INTERVAL } else { RESYNC_INTERVAL };
            let due = tokio::time::Instant::from_std(last_full + pause);
            let settle_at = self.settle_at.map(tokio::time::Instant::from_std);
            let heal_at = self.heal.due().map(tokio::time::Instant::from_std);
            let mut commands = Vec::new();
            tokio::select! {
                taken = self.commands.recv_many(&mut commands, BATCH_MAX) => {
                    if taken == 0 {
                        return;
                    }
                    self.handle(commands).await;
                }
                batch = self.batches.recv(), if !objects_gone => {
                    match batch {
                        Some(batch) => self.take_in(batch).await,
                        None => objects_gone = true,
                    }
                }
                heard = dataplane.disturbed(), if self.heal.listens_to_links() => self.hear(heal::What::Links, heard),
                heard = dataplane.tables_touched(), if self.heal.listens_to_tables() => {
                    self.hear(heal::What::Tables, heard);
                }
                () = tokio::time::sleep_until(heal_at.unwrap_or(due)), if heal_at.is_some() => self.heal().await,
                _ = poll.tick() => {
                    self.poll();
                    self.sweep().await;
                }
                () = tokio::time::sleep_until(settle_at.unwrap_or(due)), if settle_at.is_some() => {
                    self.settle().await;
                }
                () = tokio::time::sleep_until(due) => {
                    last_full = Instant::now();
                    if self.seen.borrow().ready {
                        self.finish_reading().await;
                        self.apply_node().await;
                        self.commit(None).await;
                    }
                }
            }
        }
    }

    /// Takes in changes of objects; what they change is in the kernel when this returns, unless more are on their way.
    async fn take_in(&mut self, batch: Batch) {
        if let Some(noticed) = self.absorb(batch).await {
            self.commit(Some(noticed)).await;
            self.seen.send_modify(|seen| seen.batches += 1);
        }
    }

    /// Takes in what is left of a reading that has begun. Nothing may be compiled between its parts: an object that moves
    /// from one file to another is gone there. A reading ends soon: nothing that it waits for is the engine's.
    async fn finish_reading(&mut self) {
        while self.mid_reading {
            let Some(batch) = self.batches.recv().await else { return };
            if self.absorb(batch).await.is_some() {
                self.seen.send_modify(|seen| seen.batches += 1);
            }
        }
    }

    /// Takes in changes of objects, not compiled yet. At the end of a reading it tells when its first change was noticed.
    async fn absorb(&mut self, batch: Batch) -> Option<Instant> {
        for change in &batch.changes {
            match change {
                ObjectChange::Node(name, node) => self.take_in_node(name, node.as_deref()),
                ObjectChange::PodRange(name, range) => self.take_in_range(name, range.as_deref()),
                ObjectChange::Namespace(..)
                | ObjectChange::Pod(..)
                | ObjectChange::Policy(..)
                | ObjectChange::ClusterPolicy(..) => {}
            }
            self.compiler.apply(change);
        }
        drop(batch.changes);
        self.mid_reading = !batch.complete;
        if !batch.complete {
            if !self.seen.borrow().ready {
                // Why nothing is read yet.
                self.problems = batch.problems;
            }
            return None;
        }
        self.readable = batch.readable;
        // A source that went away and came back is told by its problem, which comes and goes.
        self.leases.set_objects(self.readable).await;
        self.problems = batch.problems;
        self.refused = batch.refused;
        self.metrics.note_objects(self.problems.len(), &self.refused);
        let first = !self.seen.borrow().ready;
        self.owes_trim |= first;
        if self.nodes_changed || first {
            self.apply_node().await;
        }
        // From here on the absence of an object means something.
        self.seen.send_modify(|seen| seen.ready = true);
        Some(batch.noticed)
    }

    /// One commit for a batch of commands: first all changes, then the commit, then all answers.
    async fn handle(&mut self, batch: Vec<Command>) {
        let mut puts = Vec::new();
        let mut syncs = Vec::new();
        let (mut questions, mut holds) = (Vec::new(), Vec::new());
        for command in batch {
            match command {
                Command::Put(lease, reply) => {
                    self.count_endpoint();
                    let endpoint = lease.plan.host_ifname.clone();
                    self.note_mtu(&lease);
                    self.compiler.put(&endpoint, subject(&self.settings, &lease));
                    self.endpoints.insert(lease.key.clone(), *lease);
                    puts.push((endpoint, reply));
                }
                Command::Forget(key, reply) => {
                    self.count_endpoint();
                    if let Some(lease) = self.endpoints.remove(&key) {
                        self.compiler.remove(&lease.plan.host_ifname);
                    }
                    let _ = reply.send(());
                }
                Command::Sync(reply) => syncs.push(reply),
                Command::Hold(reply) => holds.push(reply),
                Command::Ask(question) => questions.push(question),
            }
        }
        if !holds.is_empty() && self.seen.borrow().ready {
            self.finish_reading().await;
            self.apply_node().await;
        }
        for reply in holds {
            let _ = reply.send(());
        }
        if !puts.is_empty() || !syncs.is_empty() {
            if self.node_plan.is_none() && self.seen.borrow().ready {
                self.apply_node().await;
            }
            self.commit(None).await;
        }
        let result = self.rules_error.clone().map_or(Ok(()), Err);
        for (endpoint, reply) in puts {
            let known = self.compiler.is_known(&endpoint);
            let _ = reply.send(result.clone().map(|()| known));
        }
        for reply in syncs {
            let _ = reply.send(result.clone());
        }
        for question in questions {
            self.answer(question).await;
        }
    }

    /// Compiles what changed and makes it so in the kernel. `noticed`: when the change was.
    async fn commit(&mut self, noticed: Option<Instant>) {
        if !self.seen.borrow().ready {
            // Rules that an earlier run left in force stay; attach() denies new pods on its own.
            return;
        }
        self.finish_reading().await;
        self.passes += 1;
        let started = Instant::now();
        let delta = self.compiler.commit();
        let compiled = started.elapsed();
        let applied =
            if self.in_force { self.dataplane.apply_delta(delta).await } else { self.put_in_force().await };
        match applied {
            Ok(applied) => {
                self.metrics.note_applied(&applied, noticed.unwrap_or(started).elapsed());
                if applied.revoked {
                    self.settle_at = None;
                }
                self.owes_trim |= applied.elements >= TRIM_ELEMENTS;
                if applied.elements > 0 || applied.mended {
                    self.last_change = Instant::now();
                    let total = noticed.unwrap_or(started).elapsed();
                    self.note_duration(total);
                    let (compiled_us, total_us) = (compiled.as_micros(), total.as_micros());
                    info!(?applied, compiled_us, total_us, "rules are as compiled");
                }
                self.rules_error = None;
                self.in_force = true;
                self.compiler.confirm(now_ms());
            }
            Err(error) => {
                self.metrics.note_failure();
                let error = sentence(&error);
                warn!(%error, "the rules could not be applied; those of before stay in force");
                self.rules_error = Some(error);
                // What this commit found is not in the kernel: the next one compares everything.
                self.in_force = false;
            }
        }
        self.settle().await;
        self.report_contested();
    }

    /// Makes the kernel equal to everything that is compiled, with the numbers that it has already.
    async fn put_in_force(&mut self) -> holdfast_dataplane::Result<holdfast_dataplane::Applied> {
        if !self.adopted {
            self.compiler.adopt(&self.dataplane.load_ruleset().await?);
            self.adopted = true;
        }
        let mut ruleset = self.compiler.ruleset();
        for lease in self.endpoints.values() {
            ruleset.pins.extend(pins_of(&lease.plan));
            ruleset.nat.insert(&lease.plan);
        }
        ruleset.nat.masquerade = match &self.masquerade {
            Some(ranges) => ranges.clone(),
            // Those of an earlier run, until the node list says more.
            None => self.dataplane.load_ruleset().await?.nat.masquerade,
        };
        self.dataplane.apply_ruleset(&ruleset).await
    }

    /// Advances the policy revision where a change that revokes came soon after another.
    async fn settle(&mut self) {
        let owed = self.settle_at.is_some();
        self.settle_at = match self.dataplane.settle().await {
            Ok(None) => {
                // What was owed is done now, or there was nothing.
                if owed {
                    self.metrics.note_revocation();
                }
                None
            }
            Ok(Some(wait)) => Some(Instant::now() + wait),
            Err(error) => {
                warn!(error = sentence(&error), "the policy revision could not be advanced");
                Some(Instant::now() + RETRY_INTERVAL)
            }
        };
    }

    /// A burst of calls leaves behind what its connections and threads used.
    fn count_endpoint(&mut self) {
        self.last_change = Instant::now();
        self.heal.note_pod();
        self.untrimmed += 1;
        self.owes_trim |= self.untrimmed >= TRIM_ENDPOINTS;
    }

    /// Deletes profiles that nobody uses, when there is time.
    async fn sweep(&mut self) {
        let quiet = self.last_change.elapsed() > SWEEP_AFTER;
        if quiet && std::mem::take(&mut self.owes_trim) {
            self.untrimmed = 0;
            let _ = tokio::task::spawn_blocking(holdfast_dataplane::trim_memory).await;
        }
        if !self.in_force || !(self.compiler.needs_sweep() || quiet && self.compiler.can_sweep()) {
            return;
        }
        if let Err(error) = self.dataplane.apply_delta(self.compiler.sweep()).await {
            self.metrics.note_failure();
            self.rules_error = Some(sentence(&error));
            self.in_force = false;
        }
    }

    fn note_duration(&mut self, duration: Duration) {
        if self.durations_us.len() == DURATIONS_MAX {
            self.durations_us.pop_front();
        }
        self.durations_us.push_back(u64::try_from(duration.as_micros()).unwrap_or(u64::MAX));
    }

    fn report_contested(&mut self) {
        let contested = self.compiler.contested();
        if contested.len() > self.contested {
            warn!(addresses = ?contested, "several live pods claim these addresses; no pod selector matches them");
        }
        self.contested = contested.len();
    }

    async fn apply_node(&mut self) {
        self.nodes_changed = false;
        let result = self.plan_and_apply().await;
        if let Err(error) = &result
            && self.node_error.as_ref() != Some(error)
        {
            warn!(%error, "the node's network is not as planned");
        }
        self.node_error = result.err();
    }

    async fn plan_and_apply(&mut self) -> Result<(), String> {
        let text = |error: &dyn std::error::Error| sentence(error);
        self.claim_ranges().await?;
        let node = &self.settings.node;
        let address = overlay::internal_ip(&self.nodes, node).map_err(|error| text(&error))?;
        let uplink = match uplink::find(self.settings.uplink.as_deref(), address).await {
            Ok(uplink) => uplink,
            Err(error) => {
                // Pods of this node do not need it.
                if let Some(plan) = self.node_plan.clone() {
                    self.hold(&plan).await?;
                }
                return Err(format!("{error:#}"));
            }
        };
        self.dataplane.watch_uplink(uplink.index);
        self.checksum_offload = self.settings.checksum_offload.decide(&uplink.name);
        // Pods stay attached as they were when the mode changes, so a bridge stays as long as it has one.
        let needs_bridge = self.settings.mode == Mode::Bridge
            || self.endpoints.values().any(|lease| lease.plan.bridge.is_some());
        let planned = overlay::plan_node(&self.nodes, node, &self.settings.overlay, &uplink, needs_bridge)
            .map_err(|error| text(&error))?;
        if self.left_out != planned.left_out {
            for reason in &planned.left_out {
                warn!("{reason}; it is left out of the overlay");
            }
            self.left_out = planned.left_out;
        }
        self.hold(&planned.plan).await?;
        let ranges = nat::masquerade(&self.settings.masquerade, &self.nodes, &planned.plan.pod_ranges);
        self.dataplane.set_masquerade(ranges.clone()).await.map_err(|error| text(&error))?;
        self.masquerade = Some(ranges);
        self.leases.set_ranges(&planned.plan.pod_ranges).await;
        let bridge = planned.plan.bridge.clone().filter(|_| self.settings.mode == Mode::Bridge);
        let attachment = bridge.map_or(Attachment::Routed { mtu: planned.mtu }, Attachment::Bridge);
        self.attachment.send_replace(Some(attachment));
        self.node_plan = Some(planned.plan);
        self.follow_mtu(planned.mtu).await
    }

    /// Somebody else wrote into our tables: put back what belongs there.
    async fn mend_rules(&mut self) {
        match self.dataplane.tables_changed().await {
            Ok(false) => {}
            Ok(true) => {
                self.note_mended(vec!["put our nf_tables tables back".to_owned()]);
                self.commit(None).await;
            }
            Err(error) => {
                if !self.deaf {
                    warn!(
                        error = sentence(&error),
                        "cannot listen for changes to our tables; every pass compares them"
                    );
                }
                self.deaf = true;
                return;
            }
        }
        self.deaf = false;
    }
}

/// The endpoint as the policy compiler sees it. On a cluster an attachment without a pod, which an agent on a folder of objects made,
/// is denied like a pod that is not known.
fn subject(settings: &Settings, lease: &Lease) -> Subject {
    let mut subject = lease.subject();
    if subject.pod.is_none() && settings.objects.is_kubernetes() {
        subject.pod = Some(ObjectName { namespace: String::new(), name: String::new() });
    }
    subject
}

/// Milliseconds since 1970.
fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// An error with its causes as one sentence.
pub(crate) fn sentence(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
