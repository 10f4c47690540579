//! The single writer: it alone compiles policy and applies node plans and rulesets.
//!
//! ```text
//! folder --snapshot--> engine --Ruleset, NodePlan--> dataplane
//! ADD, DEL --command-->   |
//!                         +--> health (STATUS), dump, explain
//! ```
//!
//! Commands that arrive while the engine works are taken together, so a burst of pods costs a few compilations and not
//! one each; each waits for the pass that covers it.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use holdfast_dataplane::Dataplane;
use holdfast_net_core::objects::{ObjectName, Objects};
use holdfast_net_core::overlay;
use holdfast_net_core::plan::{BridgePlan, NodePlan};
use holdfast_net_core::policy::{Explanation, Floor, Model, Numbering, Party, Subject, explain};
use holdfast_net_core::ports::Proto;
use holdfast_net_core::ruleset::{Ruleset, pins_of};
use serde_json::{Value, json};
use tokio::sync::{mpsc, oneshot, watch};
use tracing::{debug, info, warn};

use crate::folder::Snapshot;
use crate::leases::{AttachmentKey, Lease, Leases};
use crate::settings::Settings;
use crate::uplink;

/// Commands that wait; a full queue makes callers wait.
const COMMANDS_MAX: usize = 1024;
/// Commands taken in one pass.
const BATCH_MAX: usize = 256;
/// Without any change links and routes are compared with the plan this often.
const RESYNC_INTERVAL: Duration = Duration::from_secs(10);
/// The kernel's notifications about foreign changes to our tables are looked at this often.
const TAMPER_INTERVAL: Duration = Duration::from_millis(250);
/// A failed pass is repeated after this.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// What the engine is asked.
enum Command {
    /// A new endpoint; answered when its policy is in the kernel. `true`: its pod is known.
    Put(Box<Lease>, oneshot::Sender<Result<bool, String>>),
    /// An endpoint is gone. Answered when no later pass can bring it back; the rules follow with [`Command::Sync`].
    Forget(AttachmentKey, oneshot::Sender<()>),
    /// Answered when everything known before is in the kernel.
    Sync(oneshot::Sender<Result<(), String>>),
    /// Why the network is not whole, if it is not.
    Health(oneshot::Sender<Health>),
    /// Who decides about a connection?
    Explain(Box<Question>, oneshot::Sender<Result<Explanation, String>>),
    /// State for people.
    Dump(oneshot::Sender<Value>),
}

/// A question to the policy model.
pub(crate) struct Question {
    pub from: String,
    pub to: String,
    pub proto: Proto,
    pub port: u16,
}

/// Whether pods can be attached and are connected.
#[derive(Debug, Clone, Default)]
pub(crate) struct Health {
    /// Why ADD cannot be served.
    pub not_ready: Option<String>,
    /// What could not be applied: existing pods may be cut.
    pub broken: Option<String>,
}

/// Talks to the engine.
#[derive(Clone)]
pub(crate) struct EngineHandle {
    commands: mpsc::Sender<Command>,
    bridge: watch::Receiver<Option<BridgePlan>>,
    snapshots: watch::Receiver<Snapshot>,
}

const ENDED: &str = "the agent is ending";

impl EngineHandle {
    /// Adds an endpoint (again) and waits until its policy is applied.
    pub(crate) async fn put(&self, lease: Lease) -> Result<bool, String> {
        self.ask(|reply| Command::Put(Box::new(lease), reply)).await.unwrap_or_else(Err)
    }

    pub(crate) async fn forget(&self, key: &AttachmentKey) -> Result<(), String> {
        self.ask(|reply| Command::Forget(key.clone(), reply)).await
    }

    pub(crate) async fn sync(&self) -> Result<(), String> {
        self.ask(Command::Sync).await.unwrap_or_else(Err)
    }

    pub(crate) async fn health(&self) -> Result<Health, String> {
        self.ask(Command::Health).await
    }

    pub(crate) async fn explain(&self, question: Question) -> Result<Explanation, String> {
        self.ask(|reply| Command::Explain(Box::new(question), reply)).await.unwrap_or_else(Err)
    }

    pub(crate) async fn dump(&self) -> Result<Value, String> {
        self.ask(Command::Dump).await
    }

    /// The bridge, once the node's plan is applied.
    pub(crate) fn bridge(&self) -> Option<BridgePlan> {
        self.bridge.borrow().clone()
    }

    /// Wakes on new objects.
    pub(crate) fn snapshots(&self) -> watch::Receiver<Snapshot> {
        self.snapshots.clone()
    }

    async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T, String> {
        let (reply, answer) = oneshot::channel();
        self.commands.send(command(reply)).await.map_err(|_| ENDED.to_owned())?;
        answer.await.map_err(|_| ENDED.to_owned())
    }
}

/// The single writer's state.
pub(crate) struct Engine {
    settings: Settings,
    dataplane: Arc<Dataplane>,
    leases: Arc<Leases>,
    snapshots: watch::Receiver<Snapshot>,
    commands: mpsc::Receiver<Command>,
    bridge: watch::Sender<Option<BridgePlan>>,
    endpoints: BTreeMap<AttachmentKey, Lease>,
    numbering: Numbering,
    model: Model,
    node_plan: Option<NodePlan>,
    node_error: Option<String>,
    rules_error: Option<String>,
    left_out: Vec<String>,
    passes: u64,
    /// The notification socket fails: said once.
    deaf: bool,
}

impl Engine {
    /// An engine for the endpoints that exist already.
    pub(crate) async fn new(
        settings: Settings,
        dataplane: Arc<Dataplane>,
        leases: Arc<Leases>,
        snapshots: watch::Receiver<Snapshot>,
    ) -> (Self, EngineHandle) {
        let (sender, commands) = mpsc::channel(COMMANDS_MAX);
        let (bridge, bridge_receiver) = watch::channel(None);
        let handle = EngineHandle { commands: sender, bridge: bridge_receiver, snapshots: snapshots.clone() };
        let numbering = match leases.numbering() {
            Some(numbering) => numbering,
            None => Numbering::above(floor(&dataplane.load_ruleset().await.unwrap_or_default())),
        };
        let endpoints = leases.all().await.into_iter().map(|lease| (lease.key.clone(), lease)).collect();
        let engine = Self {
            settings,
            dataplane,
            leases,
            snapshots,
            commands,
            bridge,
            endpoints,
            numbering,
            model: Model::default(),
            node_plan: None,
            node_error: None,
            rules_error: None,
            left_out: Vec::new(),
            passes: 0,
            deaf: false,
        };
        (engine, handle)
    }

    /// Works until every handle is gone.
    pub(crate) async fn run(mut self) {
        let mut objects_gone = false;
        let mut tamper = tokio::time::interval(TAMPER_INTERVAL);
        tamper.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        self.pass(true).await;
        let mut last_full = Instant::now();
        loop {
            let failed = self.rules_error.is_some() || self.node_error.is_some();
            let pause = if failed { RETRY_INTERVAL } else { RESYNC_INTERVAL };
            let due = tokio::time::Instant::from_std(last_full + pause);
            let mut batch = Vec::new();
            let full = tokio::select! {
                taken = self.commands.recv_many(&mut batch, BATCH_MAX) => {
                    if taken == 0 {
                        return;
                    }
                    false
                }
                changed = self.snapshots.changed(), if !objects_gone => {
                    objects_gone = changed.is_err();
                    true
                }
                _ = tamper.tick() => {
                    self.mend_rules().await;
                    continue;
                }
                () = tokio::time::sleep_until(due) => true,
            };
            if full {
                last_full = Instant::now();
            }
            self.handle(batch, full).await;
        }
    }

    /// One pass for a batch of commands: first all changes, then one compilation, then all answers.
    async fn handle(&mut self, batch: Vec<Command>, full: bool) {
        let mut puts = Vec::new();
        let mut syncs = Vec::new();
        for command in batch {
            match command {
                Command::Put(lease, reply) => {
                    puts.push((lease.subject(), reply));
                    self.endpoints.insert(lease.key.clone(), *lease);
                }
                Command::Forget(key, reply) => {
                    self.endpoints.remove(&key);
                    let _ = reply.send(());
                }
                Command::Sync(reply) => syncs.push(reply),
                Command::Health(reply) => {
                    let _ = reply.send(self.health());
                }
                Command::Explain(question, reply) => {
                    let _ = reply.send(self.explain(&question));
                }
                Command::Dump(reply) => {
                    let _ = reply.send(self.dump());
                }
            }
        }
        if full || !puts.is_empty() || !syncs.is_empty() {
            self.pass(full).await;
        }
        let objects = self.snapshots.borrow().objects.clone();
        let result = self.rules_error.clone().map_or(Ok(()), Err);
        for (subject, reply) in puts {
            let known = Model::is_known(&objects, &subject);
            let _ = reply.send(result.clone().map(|()| known));
        }
        for reply in syncs {
            let _ = reply.send(result.clone());
        }
    }

    /// Compiles and applies. `full` also compares links and routes with the node list.
    async fn pass(&mut self, full: bool) {
        let snapshot = self.snapshots.borrow_and_update().clone();
        if !snapshot.ready {
            // Rules that an earlier run left in force stay; attach() denies new pods on its own.
            self.rules_error = Some("objects were not read yet".to_owned());
            return;
        }
        self.passes += 1;
        if full || self.node_plan.is_none() {
            self.apply_node(&snapshot.objects).await;
        }
        self.apply_rules(&snapshot.objects).await;
    }

    async fn apply_node(&mut self, objects: &Objects) {
        let result = self.plan_and_apply(objects).await;
        if let Err(error) = &result
            && self.node_error.as_ref() != Some(error)
        {
            warn!(%error, "the node's network is not as planned");
        }
        self.node_error = result.err();
    }

    async fn plan_and_apply(&mut self, objects: &Objects) -> Result<(), String> {
        let text = |error: &dyn std::error::Error| sentence(error);
        let node = &self.settings.node;
        let address = overlay::internal_ip(&objects.nodes, node).map_err(|error| text(&error))?;
        let uplink = self.settings.uplink.as_deref();
        let mtu = uplink::mtu(uplink, address).await.map_err(|error| format!("{error:#}"))?;
        let planned = overlay::plan_node(&objects.nodes, node, &self.settings.overlay, mtu)
            .map_err(|error| text(&error))?;
        if self.left_out != planned.left_out {
            for reason in &planned.left_out {
                warn!("{reason}; it is left out of the overlay");
            }
            self.left_out = planned.left_out;
        }
        let writes = self.dataplane.apply_node(&planned.plan).await.map_err(|error| text(&error))?;
        if writes > 0 {
            info!(writes, peers = planned.plan.peers.len(), "links, routes and neighbours are as planned");
        }
        self.leases.set_ranges(&planned.plan.pod_ranges).await;
        self.bridge.send_replace(Some(planned.plan.bridge.clone()));
        self.node_plan = Some(planned.plan);
        Ok(())
    }

    async fn apply_rules(&mut self, objects: &Objects) {
        let started = Instant::now();
        let subjects: Vec<Subject> = self.endpoints.values().map(Lease::subject).collect();
        let before = self.numbering.clone();
        let model = Model::compile(objects, &subjects, &mut self.numbering);
        if self.numbering != before
            && let Err(error) = self.leases.set_numbering(&self.numbering)
        {
            warn!(error = sentence(&error), "cannot keep the policy numbering");
        }
        let mut ruleset = model.ruleset.clone();
        for lease in self.endpoints.values() {
            ruleset.pins.extend(pins_of(&lease.plan));
        }
        if model.contested != self.model.contested && !model.contested.is_empty() {
            warn!(addresses = ?model.contested, "several live pods claim these addresses; no pod selector matches them");
        }
        let compiled = started.elapsed();
        match self.dataplane.apply_ruleset(&ruleset).await {
            Ok(applied) => {
                if applied.elements > 0 || applied.mended {
                    let (compiled_us, total_us) = (compiled.as_micros(), started.elapsed().as_micros());
                    info!(?applied, compiled_us, total_us, "rules are as compiled");
                }
                self.rules_error = None;
            }
            Err(error) => {
                let error = sentence(&error);
                warn!(%error, "the rules could not be applied; those of before stay in force");
                self.rules_error = Some(error);
            }
        }
        self.model = model;
        debug!(subjects = subjects.len(), "pass");
    }

    /// Somebody else wrote into our tables: put back what belongs there.
    async fn mend_rules(&mut self) {
        match self.dataplane.tables_changed().await {
            Ok(false) => {}
            Ok(true) => {
                warn!("somebody else changed our tables; they are mended");
                self.pass(false).await;
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

    fn health(&self) -> Health {
        let not_ready = (self.node_plan.is_none()).then(|| {
            self.node_error.clone().unwrap_or_else(|| "the node's network is being set up".to_owned())
        });
        let broken = self.rules_error.clone().or_else(|| self.node_error.clone());
        Health { not_ready, broken }
    }

    fn explain(&self, question: &Question) -> Result<Explanation, String> {
        let objects = self.snapshots.borrow().objects.clone();
        let subjects: Vec<Subject> = self.endpoints.values().map(Lease::subject).collect();
        let from = party(&objects, &subjects, &question.from, None)?;
        let to = party(&objects, &subjects, &question.to, Some(from.address))?;
        Ok(explain(&objects, &subjects, &from, &to, question.proto, question.port))
    }

    fn dump(&self) -> Value {
        let snapshot = self.snapshots.borrow();
        let objects = &snapshot.objects;
        let rules = &self.model.ruleset;
        json!({
            "node": self.settings.node,
            "objects": {
                "ready": snapshot.ready,
                "nodes": objects.nodes.len(),
                "namespaces": objects.namespaces.len(),
                "pods": objects.pods.len(),
                "policies": objects.policies.len(),
                "clusterPolicies": objects.cluster_policies.len(),
                "problems": *snapshot.problems,
            },
            "leases": self.endpoints.values().collect::<Vec<_>>(),
            "peers": self.node_plan.iter().flat_map(|plan| &plan.peers).map(|peer| json!({
                "node": peer.node, "underlay": peer.underlay, "vtepMac": peer.vtep_mac, "podRanges": peer.pod_ranges,
            })).collect::<Vec<_>>(),
            "leftOut": self.left_out,
            "rules": {
                "isolatedIngress": rules.cls_in.len(),
                "isolatedEgress": rules.cls_eg.len(),
                "identities": rules.ident.len(),
                "ranges": rules.cidr.len(),
                "pairs": rules.pair_in.len() + rules.pair_eg.len(),
                "profiles": rules.profiles.len(),
            },
            "contested": self.model.contested,
            "nodeError": self.node_error,
            "rulesError": self.rules_error,
            "passes": self.passes,
        })
    }
}

/// Reads "namespace/pod" or an address. A pod with two families answers in that of `like`.
fn party(objects: &Objects, subjects: &[Subject], text: &str, like: Option<IpAddr>) -> Result<Party, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        let of_pod = |subject: &&Subject| subject.addresses.contains(&address);
        let local = subjects.iter().find(of_pod).and_then(|subject| subject.pod.clone());
        let claims = |pod: &&holdfast_net_core::objects::Pod| {
            pod.is_policy_pod() && pod.addresses().contains(&address)
        };
        let pod = local.or_else(|| objects.pods.values().find(claims).map(|pod| pod.object_name()));
        return Ok(Party { pod, address });
    }
    let Some((namespace, name)) = text.split_once('/') else {
        return Err(format!("\"{text}\" is neither an address nor namespace/pod"));
    };
    let name = ObjectName::new(namespace, name);
    let leased = subjects.iter().find(|subject| subject.pod.as_ref() == Some(&name));
    let status = || objects.pods.get(&name).map(|pod| pod.addresses());
    let addresses = leased.map(|subject| subject.addresses.clone()).or_else(status).unwrap_or_default();
    let fits = |address: &&IpAddr| like.is_none_or(|like| like.is_ipv4() == address.is_ipv4());
    let address = addresses.iter().find(fits).or(addresses.first());
    let address = address.ok_or_else(|| format!("pod {name} is not known or has no address yet"))?;
    Ok(Party { pod: Some(name), address: *address })
}

fn floor(ruleset: &Ruleset) -> Floor {
    let classes = ruleset.cls_in.values().chain(ruleset.cls_eg.values()).map(|class| class.0);
    let pairs = || ruleset.pair_in.keys().chain(ruleset.pair_eg.keys());
    let identities = ruleset.ident.values().chain(ruleset.cidr.values()).map(|identity| identity.0);
    Floor {
        class: classes.chain(pairs().map(|(class, _)| class.0)).max().unwrap_or_default(),
        identity: identities.chain(pairs().map(|(_, identity)| identity.0)).max().unwrap_or_default(),
        // A profile without rules is known by its pairs alone.
        profile: ruleset
            .profiles
            .keys()
            .chain(ruleset.pair_in.values())
            .chain(ruleset.pair_eg.values())
            .map(|profile| profile.0)
            .max()
            .unwrap_or_default(),
    }
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
