//! The data path of a node: applies plans and rulesets to the Linux kernel.
//!
//! Links, routes and neighbours go through rtnetlink; policy goes through nf_tables netlink, spoken here, without the
//! `nft` program. Everything compares with the kernel first and writes only the difference, so every call may be
//! repeated after a kill at any point.
//!
//! ```text
//! NodePlan, EndpointPlan --> links (rtnetlink), sandbox (own thread in the pod's namespace)
//! Ruleset --diff--> one transaction --> nft (table inet holdfast, table bridge holdfast)
//! ```
//!
//! A [`Dataplane`] acts in the network namespace of the thread that opened it. Netlink sockets stay there; sysctls are
//! written through `/proc/sys/net`, which follows the calling thread, so call it from threads of that namespace only.
#![allow(unsafe_code)] // setns in the sandbox thread; each use is argued at its place.

mod dump;
mod endpoint;
mod error;
mod heal;
mod hold;
mod host_ports;
mod hygiene;
mod limits;
mod links;
mod memory;
mod nft;
mod node;
mod offload;
mod routed;
mod sandbox;
mod sysctls;
mod teardown;
mod unlink;
mod watch;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use holdfast_net_core::nat::{HostSocket, MasqueradeRanges, PodSocket, translations_of};
use holdfast_net_core::plan::{BRIDGE_NAME, EndpointPlan, NodePlan, VXLAN_NAME};
use holdfast_net_core::policy::Lookup;
use holdfast_net_core::ruleset::{Delta, Pin, Ruleset, pins_of};

use host_ports::Change;
use links::Links;
use nft::socket::NetfilterSocket;
use nft::{Nft, Reader};
use tokio::sync::{Notify, Semaphore};
use watch::{Interests, Watch};

pub use error::{Error, Result};
pub use heal::Healed;
pub use hygiene::Hygiene;
pub use memory::{share_one_heap, trim_memory};
pub use nft::{FlowBatch, FlowEvent, FlowLog, FlowVerdict, Live};
pub use nft::{ForeignChain, ForeignHook, ForeignRule, ForeignVerdict, foreign_chains};
pub use offload::{checksum_offload, hold_checksum_offload};
pub use teardown::{Teardown, attached_endpoints, remove_everything};

/// Settings of the data path.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of our nf_tables tables (families inet and bridge).
    pub table: String,
    /// Bits of the ct mark that hold the policy revision; one contiguous run of at least 4 bits.
    pub ct_mark_mask: u32,
    /// NFLOG group of the rate-limited log of denied packets.
    pub log_group: u16,
    /// The bridge of the pods.
    pub bridge: String,
    /// The VXLAN device.
    pub vxlan_device: String,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            table: "holdfast".to_string(),
            ct_mark_mask: 0x00ff_0000,
            log_group: 4807,
            bridge: BRIDGE_NAME.to_string(),
            vxlan_device: VXLAN_NAME.to_string(),
        }
    }
}

/// An interface of ours on the node, as found in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundEndpoint {
    /// The host end's name.
    pub host_ifname: String,
    /// The attachment it was made for, from the interface's alias; `None` if the alias is missing or not ours.
    pub attachment: Option<(String, String)>,
}

/// The policy revision is advanced at most this often, but at once after a pause: each advance costs every live connection
/// one slow path.
const REVISION_INTERVAL: Duration = Duration::from_millis(50);

/// What [`Dataplane::apply_ruleset`] or [`Dataplane::apply_delta`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Applied {
    /// Elements added and removed; 0 means no kernel write.
    pub elements: usize,
    /// The policy revision was advanced: every live connection is judged again at its next packet.
    pub revoked: bool,
    /// Somebody else had changed our tables and they were mended.
    pub mended: bool,
}

/// Pods that are attached at one time; others wait. Each needs a thread inside its sandbox, and the kernel makes one link at a time
/// anyway.
const ATTACHING_MAX: usize = 8;

/// The kernel's data path in the namespace where this was opened.
pub struct Dataplane {
    links: Links,
    /// For passes over the whole node, which must not wait for dumps of attachments: see [`heal`].
    whole: Links,
    watch: Watch,
    interests: Arc<Interests>,
    sysctls: Mutex<sysctls::Poll>,
    policy: Arc<Mutex<Policy>>,
    /// For reading and deleting conntrack entries beside transactions.
    conntrack: Arc<Mutex<NetfilterSocket>>,
    revoked: Arc<Notify>,
    /// Behind a lock of its own: whoever asks does not wait for a transaction, and no transaction waits for him.
    reader: Arc<Mutex<Reader>>,
    ours: node::Ours,
    /// For [`ATTACHING_MAX`].
    attaching: Semaphore,
}

/// The policy side, behind one lock: transactions are microseconds, and one at a time is what makes them a sequence.
struct Policy {
    nft: Nft,
    /// Ports attached since the last ruleset that pinned them: they stay pinned and in deny-all whatever comes.
    quarantined: BTreeMap<String, EndpointPlan>,
    /// When the revision was advanced last.
    advanced: Option<Instant>,
    /// A change that revokes is in force, and the revision still to be advanced for it.
    owes_revision: bool,
    /// Told at every advance of the revision.
    revoked: Arc<Notify>,
}

impl Dataplane {
    /// Opens the netlink sockets, adopts our tables as they are in the kernel, and makes them (empty, so without
    /// effect) when they are absent. Never opens a gap: rules in force stay in force. Needs a tokio runtime.
    ///
    /// # Errors
    /// The settings make no sense, or the kernel refuses: no privilege, no nf_tables.
    pub async fn new(config: Config) -> Result<Self> {
        let (links, whole) = (Links::open()?, Links::open_with_journal()?);
        let ours = node::Ours { bridge: config.bridge.clone(), vxlan_device: config.vxlan_device.clone() };
        // A new thread begins in the namespace of the one that starts it.
        let open = move || Ok((NetfilterSocket::open()?, Reader::open(&config.table)?, Nft::open(config)?));
        let opened = tokio::task::spawn_blocking(open).await;
        let (conntrack, reader, nft) =
            opened.unwrap_or_else(|_| Err(Error::Protocol("opening nf_tables was cut off".into())))?;
        let revoked = Arc::new(Notify::new());
        let interests = Arc::<Interests>::default();
        let own = vec![links.port(), whole.port()];
        let watch = Watch::open(nft.notifications()?, Arc::clone(&interests), own)?;
        let policy = Policy {
            nft,
            quarantined: BTreeMap::new(),
            advanced: None,
            owes_revision: false,
            revoked: Arc::clone(&revoked),
        };
        Ok(Self {
            links,
            whole,
            watch,
            interests,
            sysctls: Mutex::default(),
            policy: Arc::new(Mutex::new(policy)),
            conntrack: Arc::new(Mutex::new(conntrack)),
            revoked,
            reader: Arc::new(Mutex::new(reader)),
            ours,
            attaching: Semaphore::new(ATTACHING_MAX),
        })
    }

    /// The ruleset in the kernel, ours of an earlier run included.
    ///
    /// # Errors
    /// The policy side was lost to a panic.
    pub async fn load_ruleset(&self) -> Result<Ruleset> {
        self.with_policy(|policy| Ok(policy.nft.applied().clone())).await
    }

    /// Makes bridge, overlay, routes, neighbours and forwarding entries as planned; a bridge or an overlay that the plan lacks goes. Returns the number of writes, 0 when
    /// all was as planned.
    ///
    /// # Errors
    /// The kernel refuses a step; those before it stay, the next call goes on.
    pub async fn apply_node(&self, plan: &NodePlan) -> Result<usize> {
        node::apply(&self.whole, plan, &self.ours).await
    }

    /// Attaches a pod: pins and deny-all (unless the applied ruleset already knows the port) before the link comes up.
    /// Packets pass, as far as policy lets them, from the first one after this returns. Undoes itself on failure. Not cancellation
    /// safe: a caller that drops the future must detach. Returns whether the pod got the planned default routes: where another
    /// interface has one they are left to it.
    ///
    /// # Errors
    /// [`Error::Exists`] if the sandbox has an interface of that name, or another one of ours; [`Error::Sandbox`] if there is no sandbox; else
    /// what the kernel refused.
    pub async fn attach(&self, plan: &EndpointPlan, netns: &Path) -> Result<bool> {
        let sandbox = sandbox::open(netns)?;
        // Never closed, so there is nothing to fail.
        let _turn = self.attaching.acquire().await;
        let wanted = plan.clone();
        self.with_policy(move |policy| policy.quarantine(wanted)).await?;
        let made = async {
            self.flush_host_ports(translations_of(plan), Change::Appeared).await?;
            let host_end = endpoint::make(&self.links, plan, &sandbox).await?;
            let has_defaults = sandbox::configure(&sandbox, plan).await?;
            endpoint::wait_until_open(&self.links, plan).await?;
            self.interests.add([host_end]);
            Ok(has_defaults)
        };
        match made.await {
            Ok(has_defaults) => Ok(has_defaults),
            // Another attachment's interface of that name is not ours to remove.
            Err(error @ Error::Exists { .. }) if error.is_on_node() => Err(error),
            Err(error) => {
                if let Err(undo) = self.detach(&plan.host_ifname).await {
                    tracing::warn!(ifname = plan.host_ifname, %undo, "a failed attachment could not be undone");
                }
                Err(error)
            }
        }
    }

    /// Compares an attachment with the kernel: both ends, and the pins. `inside` is the plan of the pod's end, which plugins that
    /// came later may have changed. Neighbour entries that are not seen are set again, because the kernel cannot tell for sure
    /// that one is missing.
    ///
    /// # Errors
    /// [`Error::Differs`] names the first difference; any other error says that no comparison was made.
    pub async fn check(&self, plan: &EndpointPlan, inside: &EndpointPlan, netns: &Path) -> Result<()> {
        let sandbox = sandbox::open(netns)?;
        endpoint::check(&self.links, plan).await?;
        sandbox::check(&sandbox, inside).await?;
        let pins = pins_of(plan);
        let lost = self.with_policy(move |policy| {
            policy.nft.refresh_if_changed()?;
            Ok(pins.difference(&policy.nft.applied().pins).next().cloned())
        });
        match lost.await? {
            Some(pin) => Err(Error::Differs(format!("the source pin of {} is missing", pin.address))),
            None => Ok(()),
        }
    }

    /// Removes the host end (and with it the pod's end), its pins, classes, route and neighbours. Idempotent; needs no
    /// sandbox.
    ///
    /// # Errors
    /// What the kernel refused; the rest was removed all the same.
    pub async fn detach(&self, host_ifname: &str) -> Result<()> {
        let name = host_ifname.to_string();
        let known = self.with_policy(move |policy| Ok(policy.addresses_of(&name))).await?;
        let addresses = known.clone();
        let host_ports =
            self.with_policy(move |policy| Ok(policy.nft.applied().nat.leading_to(&addresses))).await?;
        self.unwatch_link(host_ifname).await?;
        let removed = endpoint::remove(&self.links, &self.ours.bridge, host_ifname, &known).await;
        let name = host_ifname.to_string();
        // Last, so that the pins outlive the link.
        self.with_policy(move |policy| policy.forget(&name)).await?;
        self.flush_host_ports(host_ports, Change::Gone).await?;
        removed
    }

    /// See [`host_ports`].
    async fn flush_host_ports(
        &self,
        host_ports: BTreeMap<HostSocket, PodSocket>,
        change: Change,
    ) -> Result<()> {
        if host_ports.is_empty() {
            return Ok(());
        }
        let own = self.links.own_addresses().await?;
        let flushed =
            with_locked(&self.conntrack, move |socket| host_ports::flush(socket, &host_ports, change, &own));
        let flushed = flushed.await?;
        if flushed > 0 {
            tracing::info!(flushed, ?change, "stale conntrack entries of host ports are deleted");
        }
        Ok(())
    }

    /// Sets whose traffic is masqueraded; writes nothing when that is so already.
    ///
    /// # Errors
    /// [`Error::Nft`] if the kernel refuses: nothing was changed.
    pub async fn set_masquerade(&self, ranges: MasqueradeRanges) -> Result<()> {
        self.with_policy(move |policy| {
            let changes = policy.nft.applied().nat.masquerade_changes(&ranges);
            policy.nft.change(&changes).map(drop)
        })
        .await
    }

    /// Sentences on what the kernel has otherwise than wanted, read element by element and without regard to notifications. What is
    /// found makes the next change compare everything.
    ///
    /// # Errors
    /// The kernel refuses to tell.
    pub async fn differences(
        &self,
        wanted: Delta,
        pins: BTreeSet<Pin>,
        host_ports: BTreeMap<HostSocket, PodSocket>,
    ) -> Result<Vec<String>> {
        let read = with_locked(&self.reader, move |reader| reader.differences(&wanted, &pins, &host_ports));
        let found = read.await?;
        if !found.is_empty() {
            self.with_policy(|policy| {
                policy.nft.distrust();
                Ok(())
            })
            .await?;
        }
        Ok(found)
    }

    /// Removes routes to single addresses through the bridge or a host end, and permanent neighbours there, that are of none of
    /// `known`. Returns how many. Nobody may be attaching meanwhile.
    ///
    /// # Errors
    /// What the kernel refused; the rest was removed all the same.
    pub async fn sweep_addresses(&self, known: &BTreeSet<IpAddr>) -> Result<usize> {
        endpoint::sweep(&self.links, &self.ours.bridge, known).await
    }

    /// Removes interfaces that limit the rate of host ends other than `known`, which nobody else may do. Returns how many. Nobody may be
    /// attaching meanwhile.
    ///
    /// # Errors
    /// What the kernel refused.
    pub async fn sweep_limits(&self, known: &BTreeSet<String>) -> Result<usize> {
        limits::sweep(&self.links, known).await
    }

    /// All host ends of ours on the node, for garbage collection: by name, or by alias where somebody renamed one.
    ///
    /// # Errors
    /// The kernel refuses to list.
    pub async fn list_endpoints(&self) -> Result<Vec<FoundEndpoint>> {
        endpoint::list(&self.links).await
    }

    /// Makes the kernel's ruleset equal to `ruleset`, in one transaction; writes nothing when it already is.
    ///
    /// Ports attached since, which `ruleset` does not pin yet, stay pinned and in deny-all. If somebody else changed
    /// our tables, they are read back and mended.
    ///
    /// # Errors
    /// [`Error::Ruleset`] if it breaks an invariant; [`Error::Nft`] if the kernel refuses it: nothing was changed.
    pub async fn apply_ruleset(&self, ruleset: &Ruleset) -> Result<Applied> {
        let wanted = ruleset.clone();
        self.with_policy(move |policy| policy.apply(wanted)).await
    }

    /// Makes what a compiler found to differ; everything else stays. Cost follows the delta.
    ///
    /// New connections are judged by it when this returns. Live ones that it forbids stop at the next advance of the policy
    /// revision: in the same transaction, or within 50 ms of the one before by [`Dataplane::settle`].
    ///
    /// # Errors
    /// As for [`Dataplane::apply_ruleset`]; nothing was changed then.
    pub async fn apply_delta(&self, delta: Delta) -> Result<Applied> {
        self.with_policy(move |policy| policy.apply_delta(&delta)).await
    }

    /// Advances the policy revision if that is owed and due. Tells when to call again; `None`: nothing is owed.
    ///
    /// # Errors
    /// [`Error::Nft`] if the kernel refuses; it stays owed.
    pub async fn settle(&self) -> Result<Option<Duration>> {
        self.with_policy(Policy::settle).await
    }

    /// Waits for the next advance of the policy revision; returns at once if there was one since the last call. For one
    /// caller at a time.
    pub async fn revoked(&self) {
        self.revoked.notified().await;
    }

    /// Deletes conntrack entries of local pods' connections that the rules in the kernel forbid and whose next packet would
    /// be dropped without an entry, too. Nothing depends on it. Entries of others, and of the node itself, are not touched.
    /// Transactions go on meanwhile.
    ///
    /// # Errors
    /// The kernel refuses to list or to delete; some entries may be deleted.
    pub async fn delete_forbidden(&self) -> Result<Hygiene> {
        let own = self.links.own_addresses().await?;
        let (policy, socket) = (Arc::clone(&self.policy), Arc::clone(&self.conntrack));
        let run = move || match socket.lock() {
            Ok(mut socket) => hygiene::pass(&policy, &mut socket, &own),
            Err(_) => Err(Error::Protocol("the conntrack socket was lost in a panic; restart".into())),
        };
        tokio::task::spawn_blocking(run)
            .await
            .unwrap_or_else(|_| Err(Error::Protocol("deleting conntrack entries was cut off".into())))
    }

    /// Whether somebody else changed our tables since they were last read or written: a reason to call
    /// [`Dataplane::apply_ruleset`] now.
    ///
    /// # Errors
    /// The notification socket failed.
    pub async fn tables_changed(&self) -> Result<bool> {
        self.with_policy(|policy| policy.nft.foreign_change()).await
    }

    /// What the kernel finds for some connections now, read element by element: at most fifteen questions for each lookup,
    /// and one look at our rules, whose number is fixed. Changes nothing and waits for no transaction.
    ///
    /// # Errors
    /// The kernel refuses to tell, an element is none of ours, or the rules change too fast for an answer of one moment.
    pub async fn trace(&self, lookups: Vec<Lookup>) -> Result<Live> {
        with_locked(&self.reader, move |reader| reader.trace(&lookups)).await
    }

    /// Packets dropped since the tables were made: by policy, and by the source pin.
    ///
    /// # Errors
    /// The kernel refuses to list.
    pub async fn denied(&self) -> Result<(u64, u64)> {
        self.with_policy(|policy| policy.nft.denied()).await
    }

    async fn with_policy<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Policy) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        with_locked(&self.policy, work).await
    }
}

/// Runs `work` on a thread that may wait: a transaction of a large ruleset takes the kernel a second.
async fn with_locked<S: Send + 'static, T: Send + 'static>(
    state: &Arc<Mutex<S>>,
    work: impl FnOnce(&mut S) -> Result<T> + Send + 'static,
) -> Result<T> {
    let state = Arc::clone(state);
    let run = move || match state.lock() {
        Ok(mut state) => work(&mut state),
        Err(_) => Err(Error::Protocol("the policy state was lost in a panic; restart".into())),
    };
    tokio::task::spawn_blocking(run)
        .await
        .unwrap_or_else(|_| Err(Error::Protocol("a policy transaction was cut off".into())))
}

impl Policy {
    fn quarantine(&mut self, plan: EndpointPlan) -> Result<()> {
        let applied = self.nft.applied();
        let leads_there =
            |(socket, pod): (HostSocket, PodSocket)| applied.nat.host_ports.get(&socket) == Some(&pod);
        if pins_of(&plan).is_subset(&applied.pins) && translations_of(&plan).into_iter().all(leads_there) {
            return Ok(());
        }
        let changes = applied.quarantine(&plan);
        self.nft.change(&changes)?;
        self.quarantined.insert(plan.host_ifname.clone(), plan);
        Ok(())
    }

    fn apply(&mut self, mut ruleset: Ruleset) -> Result<Applied> {
        self.quarantined.retain(|_, plan| !pins_of(plan).is_subset(&ruleset.pins));
        for plan in self.quarantined.values() {
            let changes = ruleset.quarantine(plan);
            ruleset.apply(&changes);
        }
        let applied = self.nft.apply(&ruleset)?;
        self.note(applied);
        Ok(applied)
    }

    fn apply_delta(&mut self, delta: &Delta) -> Result<Applied> {
        let mut changes = self.nft.applied().changes(delta);
        self.owes_revision |= changes.revokes;
        changes.revokes = self.owes_revision && self.until_due().is_zero();
        let applied = self.nft.change(&changes)?;
        self.note(applied);
        Ok(applied)
    }

    fn note(&mut self, applied: Applied) {
        if applied.revoked {
            self.advanced = Some(Instant::now());
            self.owes_revision = false;
            self.revoked.notify_one();
        }
    }

    fn settle(&mut self) -> Result<Option<Duration>> {
        if !self.owes_revision {
            return Ok(None);
        }
        let wait = self.until_due();
        if wait.is_zero() {
            self.apply_delta(&Delta::default())?;
            return Ok(None);
        }
        Ok(Some(wait))
    }

    fn until_due(&self) -> Duration {
        self.advanced.map_or(Duration::ZERO, |at| REVISION_INTERVAL.saturating_sub(at.elapsed()))
    }

    fn forget(&mut self, host_ifname: &str) -> Result<()> {
        self.quarantined.remove(host_ifname);
        let changes = self.nft.applied().forget_port(host_ifname);
        if changes.is_empty() {
            return Ok(());
        }
        self.nft.change(&changes).map(drop)
    }

    /// The pinned addresses of a port.
    fn addresses_of(&self, host_ifname: &str) -> BTreeSet<IpAddr> {
        let pins = &self.nft.applied().pins;
        pins.iter().filter(|pin| pin.ifname == host_ifname).map(|pin| pin.address).collect()
    }
}
