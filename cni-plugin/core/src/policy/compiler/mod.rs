//! The compiler: changes of objects and of local pods in, changes of the kernel's elements out.
//!
//! ```text
//! ObjectChange --apply--> cluster, policies ----\
//! endpoints ---put/remove--> locals ------------ commit --> Delta --> dataplane
//!                                                  |
//!   classes (policies of a local pod) x identities (peers that match an address) -> pairs -> profiles
//! ```
//!
//! It keeps what it compiled and recomputes what a change reaches: cost follows the change, not the cluster. Nothing that
//! it holds depends on the order in which objects came, but for numbers.
//!
//! Numbers rise, so that one that a change frees is not given another meaning in that change: the lookups of one packet
//! may straddle the commit. A restarted agent adopts the numbers that the kernel has ([`Compiler::adopt`]).

mod address_table;
mod addresses;
mod adopt;
mod apply;
mod arena;
mod classes;
mod cluster;
mod commit;
mod elements;
mod numbers;
mod pairs;
mod peers;
mod revocation;
mod standing;
mod state;
mod subjects;
mod succession;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;

use hashbrown::HashTable;

use super::lookup::Direction;
use super::reference::PolicyRef;
use super::rules::{NamedPort, PeerRef, PolicyRules, ResolvedPorts};
use crate::objects::{ClusterSubject, LabelSelector, ObjectName};
use crate::ports::PortSet;
use crate::ruleset::{AddrRange, ClassId, Delta, IdentityId, ProfileId};

use address_table::AddressTable;
use arena::Arena;
use cluster::Cluster;
use numbers::Numbers;
pub(super) use peers::Peers;
pub use standing::PolicyStanding;
pub use state::Counts;
use subjects::Subjects;

/// A local endpoint: addresses that were leased, and the pod they were leased to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Subject {
    /// The pod; `None` for an attachment that no pod was named for, which no policy isolates and no selector matches.
    pub pod: Option<ObjectName>,
    /// Uid the runtime gave; empty matches every object of that name.
    pub uid: String,
    /// Its addresses; they win over what any object's status says.
    pub addresses: Vec<IpAddr>,
}

/// Compiled policy of one node, and what it was compiled from.
#[derive(Debug, Default)]
pub struct Compiler {
    pub(super) cluster: Cluster,
    pub(super) peers: Peers,
    pub(super) policies: BTreeMap<Arc<PolicyRef>, Policy>,
    subjects: Subjects,
    /// ClusterNetworkPolicies by name: their tier and priority may change.
    cluster_refs: BTreeMap<String, Arc<PolicyRef>>,
    /// Endpoints by the name that the caller gave them.
    pub(super) locals: BTreeMap<String, Local>,
    /// Which endpoint an address is leased to.
    leased: BTreeMap<IpAddr, String>,
    addresses: AddressTable,
    /// Addresses that several live pods claim. They match no pod selector until the claim is settled.
    contested: BTreeSet<IpAddr>,
    pub(super) classes: Arena<Class>,
    class_keys: BTreeMap<ClassKey, u32>,
    identities: Arena<Identity>,
    /// Identities by content.
    identity_keys: HashTable<u32>,
    profiles: Arena<Profile>,
    profile_keys: BTreeMap<PortSet, u32>,
    /// Profiles that no pair uses.
    retired: BTreeSet<u32>,
    ranges: Vec<Range>,
    /// Port names that egress rules in force use, with the classes.
    names: BTreeMap<NamedPort, BTreeSet<u32>>,
    class_numbers: Numbers,
    identity_numbers: Numbers,
    profile_numbers: Numbers,
    dirty: Dirty,
    /// Policies whose content, or first pod here, no kernel was said to have.
    unconfirmed: BTreeSet<Arc<PolicyRef>>,
}

/// A policy of either kind.
#[derive(Debug)]
pub(super) struct Policy {
    subject: PolicySubject,
    /// `None`: it says nothing about the direction.
    ingress: Option<PolicyRules>,
    egress: Option<PolicyRules>,
    /// Classes that have it.
    classes: BTreeSet<u32>,
    origin: Origin,
    /// When the kernel was said to have it as it is; milliseconds since 1970.
    since_ms: Option<u64>,
}

/// Which object a policy was read from.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Origin {
    uid: Box<str>,
    metadata_generation: i64,
}

impl Policy {
    pub(super) fn rules(&self, direction: Direction) -> Option<&PolicyRules> {
        match direction {
            Direction::Ingress => self.ingress.as_ref(),
            Direction::Egress => self.egress.as_ref(),
        }
    }
}

/// The pods that a policy selects.
#[derive(Debug, PartialEq, Eq)]
enum PolicySubject {
    /// Of the policy's namespace.
    Namespaced(LabelSelector),
    Cluster(Box<ClusterSubject>),
}

/// A local endpoint and what it is compiled to.
#[derive(Debug)]
pub(super) struct Local {
    pub(super) subject: Subject,
    pub(super) ingress: Membership,
    pub(super) egress: Membership,
    /// Not committed yet: nothing that it had can be revoked.
    fresh: bool,
}

impl Local {
    pub(super) fn membership(&self, direction: Direction) -> Membership {
        match direction {
            Direction::Ingress => self.ingress,
            Direction::Egress => self.egress,
        }
    }

    fn membership_mut(&mut self, direction: Direction) -> &mut Membership {
        match direction {
            Direction::Ingress => &mut self.ingress,
            Direction::Egress => &mut self.egress,
        }
    }
}

/// What an endpoint is in one direction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Membership {
    /// No policy selects it.
    Open,
    /// Its pod is not known.
    DenyAll,
    /// Of a class.
    In(u32),
}

/// The same policies select these pods in one direction, and port names mean the same at them.
#[derive(Debug)]
pub(super) struct Class {
    pub(super) key: ClassKey,
    number: ClassId,
    /// Endpoints in it.
    members: u32,
    /// An endpoint of it is gone, and its port may still be there with this class's number.
    bereft: bool,
    /// The peers that its rules name.
    peers: BTreeSet<PeerRef>,
    /// Port names of its egress rules.
    names: BTreeSet<NamedPort>,
    /// Profile by identity; `None` is anybody. Pairs for which the kernel's fallback gives the same are left out.
    pairs: BTreeMap<Option<u32>, u32>,
}

/// Content of a class.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ClassKey {
    pub direction: Direction,
    /// In the order in which they are asked.
    pub policies: Vec<Arc<PolicyRef>>,
    /// What the port names that the policies use mean for these pods. Ingress only.
    pub ports: ResolvedPorts,
}

/// The same peers match these addresses, and port names mean the same at them.
#[derive(Debug)]
struct Identity {
    key: IdentityKey,
    number: IdentityId,
    /// Addresses and ranges that have it.
    uses: u32,
    /// Classes with a pair for it.
    classes: BTreeSet<u32>,
}

/// Content of an identity; selectors and blocks by their numbers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
pub(super) struct IdentityKey {
    pub selectors: Vec<u32>,
    pub blocks: Vec<u32>,
    /// What the port names that egress rules use mean for these peers.
    pub ports: ResolvedPorts,
}

impl IdentityKey {
    /// What decides where no pair is for this one: what the address matches by its range alone.
    fn of_range(&self) -> Self {
        Self { blocks: self.blocks.clone(), ..Self::default() }
    }

    fn is_of_range(&self) -> bool {
        self.selectors.is_empty() && self.ports.is_empty()
    }
}

/// A set of allowed ports.
#[derive(Debug)]
struct Profile {
    allowed: PortSet,
    number: ProfileId,
    /// Pairs that have it.
    uses: u32,
}

/// Addresses that the same blocks contain.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Range {
    range: AddrRange,
    blocks: Vec<u32>,
    identity: u32,
}

/// What changes reach, until the next commit.
#[derive(Debug, Default, PartialEq, Eq)]
struct Dirty {
    locals: BTreeSet<String>,
    addresses: BTreeSet<IpAddr>,
    /// Groups whose selectors changed.
    groups: BTreeSet<u32>,
    /// Policies whose rules changed: the peers that the old or new rules name; `None`: rules for everybody changed.
    policies: BTreeMap<Arc<PolicyRef>, Option<BTreeSet<PeerRef>>>,
    /// Classes that an endpoint that is gone was in.
    left: BTreeSet<u32>,
    /// Blocks came into force, or are no more.
    blocks: bool,
    /// The same for selectors of nodes, and port names.
    nodes: bool,
    names: bool,
}

impl Compiler {
    /// Compiles what changed since the last commit.
    #[must_use]
    pub fn commit(&mut self) -> Delta {
        commit::commit(self)
    }

    /// Whether the pod of an endpoint is known, so that its policies are, too.
    #[must_use]
    pub fn is_known(&self, endpoint: &str) -> bool {
        self.locals
            .get(endpoint)
            .is_some_and(|local| local.subject.pod.is_none() || self.pod_of(&local.subject).is_some())
    }

    /// Addresses that several live pods claim.
    #[must_use]
    pub fn contested(&self) -> &BTreeSet<IpAddr> {
        &self.contested
    }

    /// The pod of an endpoint, if its object is there and policies concern it.
    pub(super) fn pod_of(&self, subject: &Subject) -> Option<u32> {
        let id = self.cluster.find(subject.pod.as_ref()?)?;
        let pod = &self.cluster.pods[id];
        (pod.concerned && pod.has_uid(&subject.uid)).then_some(id)
    }
}
