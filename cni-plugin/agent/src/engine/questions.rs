//! What the engine is asked about its state. Nothing here changes anything.

use std::collections::BTreeSet;
use std::net::IpAddr;

use holdfast_net_core::nat::translations_of;
use holdfast_net_core::objects::ObjectName;
use holdfast_net_core::plan::Attachment;
use holdfast_net_core::policy::{Compiler, Explanation, Party, PolicyStanding};
use holdfast_net_core::ports::Proto;
use holdfast_net_core::ruleset::pins_of;
use holdfast_proto::agent as pb;
use serde_json::{Value, json};
use tokio::sync::oneshot;

use super::{Command, Engine, EngineHandle, NOT_READ, Why, sentence};
use crate::leases::AttachmentKey;
use crate::metrics::Gauges;
use crate::objects::{CLUSTER_POLICY, NETWORK_POLICY, ObjectKey};

/// Pods that a question about all of them may name.
const PODS_MAX: usize = 100_000;
/// Policies that the kernel does not have and that a dump names; all are told by [`EngineHandle::policies`].
const DUMPED_POLICIES_MAX: usize = 100;

/// Questions.
pub(super) enum Ask {
    /// Why the network is not whole, if it is not.
    Health(oneshot::Sender<Health>),
    /// Who decides about a connection, by the model alone.
    Explain(Box<Question>, oneshot::Sender<Result<Explanation, String>>),
    /// The same, and what the kernel holds.
    Why(Box<Question>, oneshot::Sender<Result<Why, String>>),
    /// How policies stand: all of them, or that of a name.
    Policies(Option<ObjectName>, oneshot::Sender<Vec<pb::PolicyState>>),
    /// What metrics tell of the state.
    Gauges(oneshot::Sender<Gauges>),
    /// State for people.
    Dump(oneshot::Sender<Value>),
    /// Pods that have an address and that policies concern.
    Pods(oneshot::Sender<Vec<ObjectName>>),
    /// Which endpoints' pods have their objects; nothing while objects cannot be read.
    Claimed(BTreeSet<String>, oneshot::Sender<Option<BTreeSet<String>>>),
    /// What the kernel lacks of an endpoint's policy, or has too much.
    Verify(AttachmentKey, oneshot::Sender<Result<Vec<String>, String>>),
    /// The pods that have these addresses.
    PodsAt([IpAddr; 2], oneshot::Sender<[Option<ObjectName>; 2]>),
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

impl EngineHandle {
    pub(crate) async fn health(&self) -> Result<Health, String> {
        self.ask(|reply| Command::Ask(Ask::Health(reply))).await
    }

    pub(crate) async fn explain(&self, question: Question) -> Result<Explanation, String> {
        self.ask(|reply| Command::Ask(Ask::Explain(Box::new(question), reply))).await.unwrap_or_else(Err)
    }

    /// Explains, and compares with the kernel.
    pub(crate) async fn why(&self, question: Question) -> Result<Why, String> {
        let _alone = self.alone.lock().await;
        self.ask(|reply| Command::Ask(Ask::Why(Box::new(question), reply))).await.unwrap_or_else(Err)
    }

    /// How all policies stand, or the one of that name; empty if there is none. The namespace of a ClusterNetworkPolicy is
    /// empty.
    pub(crate) async fn policies(&self, name: Option<ObjectName>) -> Result<Vec<pb::PolicyState>, String> {
        self.ask(|reply| Command::Ask(Ask::Policies(name, reply))).await
    }

    pub(crate) async fn gauges(&self) -> Result<Gauges, String> {
        self.ask(|reply| Command::Ask(Ask::Gauges(reply))).await
    }

    pub(crate) async fn dump(&self) -> Result<Value, String> {
        self.ask(|reply| Command::Ask(Ask::Dump(reply))).await
    }

    /// Pods that have an address and that policies concern, here or elsewhere.
    pub(crate) async fn pods(&self) -> Result<Vec<ObjectName>, String> {
        self.ask(|reply| Command::Ask(Ask::Pods(reply))).await
    }

    /// Of these endpoints those whose pods' objects are there; `None` while objects cannot be read.
    pub(crate) async fn claimed(
        &self,
        endpoints: BTreeSet<String>,
    ) -> Result<Option<BTreeSet<String>>, String> {
        self.ask(|reply| Command::Ask(Ask::Claimed(endpoints, reply))).await
    }

    /// Sentences on what the kernel lacks of an endpoint's policy or has too much, read element by element.
    pub(crate) async fn verify(&self, key: &AttachmentKey) -> Result<Vec<String>, String> {
        self.ask(|reply| Command::Ask(Ask::Verify(key.clone(), reply))).await.unwrap_or_else(Err)
    }

    /// The pods that have these addresses, here or elsewhere.
    pub(crate) async fn pods_at(&self, addresses: [IpAddr; 2]) -> Result<[Option<ObjectName>; 2], String> {
        self.ask(|reply| Command::Ask(Ask::PodsAt(addresses, reply))).await
    }
}

impl Engine {
    /// Answers. Whoever asked may be gone.
    pub(super) async fn answer(&mut self, question: Ask) {
        match question {
            Ask::Health(reply) => _ = reply.send(self.health()),
            Ask::Explain(question, reply) => _ = reply.send(self.explain(&question)),
            Ask::Why(question, reply) => {
                let why = self.why(&question).await;
                _ = reply.send(why);
            }
            Ask::Policies(name, reply) => _ = reply.send(self.policies(name.as_ref())),
            Ask::Gauges(reply) => _ = reply.send(self.gauges()),
            Ask::Dump(reply) => {
                let held_back = self.leases.held_back().await;
                _ = reply.send(self.dump(held_back));
            }
            Ask::Claimed(endpoints, reply) => _ = reply.send(self.claimed(endpoints)),
            Ask::Verify(key, reply) => {
                let lost = self.verify(&key).await;
                _ = reply.send(lost);
            }
            Ask::PodsAt(addresses, reply) => {
                _ = reply.send(addresses.map(|address| self.compiler.pod_at(address)));
            }
            Ask::Pods(reply) => _ = reply.send(self.compiler.concerned_pods(PODS_MAX)),
        }
    }

    fn health(&self) -> Health {
        let not_ready = (self.node_plan.is_none()).then(|| {
            let unread = || self.problems.first().filter(|_| !self.seen.borrow().ready);
            let why = self.node_error.clone().or_else(|| unread().map(|why| format!("{NOT_READ}: {why}")));
            why.unwrap_or_else(|| "the node's network is being set up".to_owned())
        });
        let broken = self.rules_error.clone().or_else(|| self.node_error.clone());
        Health { not_ready, broken }
    }

    fn explain(&self, question: &Question) -> Result<Explanation, String> {
        let (from, to) = self.parties(question)?;
        Ok(self.compiler.explain(&from, &to, question.proto, question.port))
    }

    /// The ends of a connection.
    pub(super) fn parties(&self, question: &Question) -> Result<(Party, Party), String> {
        let from = party(&self.compiler, &question.from, None)?;
        let to = party(&self.compiler, &question.to, Some(from.address))?;
        Ok((from, to))
    }

    /// How policies stand; those that were refused and never good come last.
    fn policies(&self, name: Option<&ObjectName>) -> Vec<pb::PolicyState> {
        let mut states: Vec<pb::PolicyState> = match name {
            Some(name) => {
                self.compiler.standing_of(name).iter().map(|policy| self.state_of(policy)).collect()
            }
            None => self.compiler.standings().map(|policy| self.state_of(&policy)).collect(),
        };
        let never_good = self.refused.iter().filter(|(key, _)| self.is_policy_never_good(key));
        let wanted = never_good.filter(|(key, _)| name.is_none_or(|name| *name == key.name));
        states.extend(wanted.map(|(key, problem)| pb::PolicyState {
            kind: key.kind.to_owned(),
            namespace: key.name.namespace.clone(),
            name: key.name.name.clone(),
            reason: problem.clone(),
            ..pb::PolicyState::default()
        }));
        states
    }

    fn is_policy_never_good(&self, key: &ObjectKey) -> bool {
        [NETWORK_POLICY, CLUSTER_POLICY].contains(&key.kind) && self.compiler.standing_of(&key.name).is_none()
    }

    fn state_of(&self, standing: &PolicyStanding<'_>) -> pb::PolicyState {
        let name = &standing.policy.name;
        let mut reasons = Vec::new();
        if !self.refused.is_empty() {
            let key = ObjectKey { kind: standing.kind(), name: name.clone() };
            reasons.extend(self.refused.get(&key).cloned());
        }
        let in_force = standing.since_ms.is_some() && standing.selects_here();
        if standing.since_ms.is_none() {
            reasons.push(self.rules_error.clone().unwrap_or_else(|| "not applied yet".to_owned()));
        } else if !in_force {
            reasons.push("selects no pod of this node".to_owned());
        }
        pb::PolicyState {
            kind: standing.kind().to_owned(),
            namespace: name.namespace.clone(),
            name: name.name.clone(),
            uid: standing.uid.to_owned(),
            metadata_generation: standing.metadata_generation,
            tier: standing.policy.tier.to_string(),
            priority: standing.policy.priority,
            in_force,
            reason: reasons.join("; "),
            since_ms: standing.since_ms.filter(|_| in_force).unwrap_or_default(),
            ingress_pods: standing.ingress_pods,
            egress_pods: standing.egress_pods,
        }
    }

    fn claimed(&self, mut endpoints: BTreeSet<String>) -> Option<BTreeSet<String>> {
        endpoints.retain(|endpoint| self.compiler.is_known(endpoint));
        (self.readable && self.seen.borrow().ready).then_some(endpoints)
    }

    async fn verify(&self, key: &AttachmentKey) -> Result<Vec<String>, String> {
        let Some(lease) = self.endpoints.get(key) else {
            return Err("its policy is not compiled: it is being detached".to_owned());
        };
        let wanted = self.compiler.classes_of(&lease.plan.host_ifname);
        let found =
            self.dataplane.differences(wanted, pins_of(&lease.plan), translations_of(&lease.plan)).await;
        found.map_err(|error| sentence(&error))
    }

    fn dump(&self, held_back: usize) -> Value {
        let counts = self.compiler.counts();
        json!({
            "node": self.settings.node,
            "objects": {
                "ready": self.seen.borrow().ready,
                "batches": self.seen.borrow().batches,
                "nodes": self.nodes.len(),
                "pods": counts.pods,
                "policies": counts.policies - counts.cluster_policies,
                "clusterPolicies": counts.cluster_policies,
                "problems": self.problems,
            },
            "readable": self.readable,
            "heldBack": held_back,
            "leases": self.endpoints.values().collect::<Vec<_>>(),
            "peers": self.node_plan.iter().flat_map(|plan| &plan.peers).map(|peer| json!({
                "node": peer.node, "underlay": peer.underlay, "vtepMac": peer.vtep_mac, "podRanges": peer.pod_ranges,
                "direct": peer.direct,
            })).collect::<Vec<_>>(),
            "network": self.node_plan.as_ref().map(|plan| json!({
                "bridge": plan.bridge.as_ref().map(|bridge| &bridge.name),
                "mtu": self.attachment.borrow().as_ref().map(Attachment::mtu), "podRanges": plan.pod_ranges,
                "vxlan": plan.vxlan.as_ref().map(|vxlan| &vxlan.name),
                "vni": plan.vxlan.as_ref().map(|vxlan| vxlan.vni),
                "port": plan.vxlan.as_ref().map(|vxlan| vxlan.port),
                "local": plan.vxlan.as_ref().map(|vxlan| vxlan.local),
            })),
            "leftOut": self.left_out,
            "rules": {
                "classes": counts.classes,
                "identities": counts.identities,
                "addresses": counts.addresses,
                "ranges": counts.ranges,
                "pairs": counts.pairs,
                "profiles": counts.profiles,
            },
            "policies": self.dumped_policies(),
            "changes": { "recentUs": self.durations_us },
            "contested": self.compiler.contested(),
            "nodeError": self.node_error,
            "rulesError": self.rules_error,
            "passes": self.passes,
            "healing": self.heal.tell(),
        })
    }

    fn gauges(&self) -> Gauges {
        let mut gauges = Gauges { contested: self.compiler.contested().len(), ..Gauges::default() };
        for standing in self.compiler.standings() {
            match (standing.since_ms, standing.selects_here()) {
                (None, _) => gauges.unapplied += 1,
                (Some(_), false) => gauges.idle += 1,
                (Some(_), true) => gauges.in_force += 1,
            }
        }
        gauges
    }

    /// How many policies stand how, and some of those that are meant to be in force and are not.
    fn dumped_policies(&self) -> Value {
        let Gauges { in_force, idle, unapplied, contested: _ } = self.gauges();
        let missing = self.compiler.standings().filter(|standing| standing.since_ms.is_none());
        let named = missing.take(DUMPED_POLICIES_MAX).map(|standing| {
            let state = self.state_of(&standing);
            json!({ "policy": standing.policy.to_string(), "reason": state.reason })
        });
        json!({
            "inForce": in_force, "idle": idle, "unapplied": unapplied,
            "someUnapplied": named.collect::<Vec<_>>(),
        })
    }
}

/// Reads "namespace/pod" or an address. A pod with two families answers in that of `like`.
fn party(compiler: &Compiler, text: &str, like: Option<IpAddr>) -> Result<Party, String> {
    if let Ok(address) = text.parse::<IpAddr>() {
        return Ok(Party { pod: compiler.pod_at(address), address });
    }
    let Some((namespace, name)) = text.split_once('/') else {
        return Err(format!("\"{text}\" is neither an address nor namespace/pod"));
    };
    let name = ObjectName::new(namespace, name);
    let addresses = compiler.addresses_of(&name);
    let fits = |address: &&IpAddr| like.is_none_or(|like| like.is_ipv4() == address.is_ipv4());
    let address = addresses.iter().find(fits).or(addresses.first());
    let address = address.ok_or_else(|| format!("pod {name} is not known or has no address yet"))?;
    Ok(Party { pod: Some(name), address: *address })
}
