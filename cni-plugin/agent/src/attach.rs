//! The CNI verbs on the node: leases, interfaces and policy in their order.
//!
//! ADD: lease -> interface with deny-all (dataplane) -> policy of the pod -> lease on disk -> answer.
//! DEL: endpoint out of the model -> interface gone -> rules without it -> lease released.
//!
//! Each step may be the last one before a kill; [`Attacher::reconcile`] and DEL start over from what they find.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use holdfast_dataplane::{Dataplane, Error as DataplaneError};
use holdfast_net_core::cni::{CniError, code};
use holdfast_net_core::nat::PortMapping;
use holdfast_net_core::objects::ObjectName;
use holdfast_net_core::plan::{Attachment, EndpointPlan, host_ifname};
use holdfast_net_core::ports::Proto;
use ipnetwork::IpNetwork;
use tokio::sync::{Mutex, OwnedMutexGuard, RwLock};
use tracing::{info, warn};

use crate::engine::{EngineHandle, sentence};
use crate::garbage;
use crate::leases::{AttachmentKey, Lease, LeaseError, Leases, Wanted};
use crate::pending;

/// How long ADD waits for the pod's object. After that it answers; the pod stays denied until the object appears.
const POD_WAIT_MAX: Duration = Duration::from_secs(5);

/// What ADD needs to know.
#[derive(Debug, Clone)]
pub(crate) struct AddInput {
    pub key: AttachmentKey,
    pub netns: String,
    pub network: String,
    pub pod: Option<ObjectName>,
    pub pod_uid: String,
    pub wanted: Wanted,
}

/// What a previous result says of an attachment.
#[derive(Debug, Clone, Default)]
pub(crate) struct Previous {
    pub addresses: Vec<String>,
    /// Destinations.
    pub routes: Vec<String>,
    /// Of the pod's end, where it is told.
    pub mac: Option<String>,
    /// The same; a later plugin of the chain may have lowered it.
    pub mtu: Option<u32>,
}

/// Serves the verbs.
pub(crate) struct Attacher {
    pub(crate) dataplane: Arc<Dataplane>,
    pub(crate) leases: Arc<Leases>,
    pub(crate) engine: EngineHandle,
    settings: Verbs,
    /// One verb at a time for one attachment: a runtime that gave up on an ADD sends DEL while the ADD still works.
    busy: Mutex<BTreeMap<AttachmentKey, Weak<Mutex<()>>>>,
    /// GC excludes ADD and DEL (spec, "GC").
    pub(crate) gc: RwLock<()>,
}

/// Settings of the verbs.
pub(crate) struct Verbs {
    /// Folder of the plugin's delete records.
    pub pending_dir: PathBuf,
    /// UDP port of the overlay.
    pub overlay_port: u16,
    /// Only pods are attached, each named with its uid: on a cluster everything that is attached is one, and what is not named
    /// has no policy that could be looked up.
    pub needs_pod: bool,
}

impl Attacher {
    pub(crate) fn new(
        dataplane: Arc<Dataplane>,
        leases: Arc<Leases>,
        engine: EngineHandle,
        settings: Verbs,
    ) -> Self {
        let (busy, gc) = (Mutex::default(), RwLock::default());
        Self { dataplane, leases, engine, settings, busy, gc }
    }

    /// Attaches a pod.
    pub(crate) async fn add(&self, input: AddInput) -> Result<Lease, CniError> {
        if self.settings.needs_pod && (input.pod.is_none() || input.pod_uid.is_empty()) {
            let msg = "CNI_ARGS name no pod: K8S_POD_NAMESPACE, K8S_POD_NAME and K8S_POD_UID are needed here";
            return Err(CniError::new(code::INVALID_ENVIRONMENT, msg));
        }
        let _gc = self.gc.read().await;
        let _busy = self.lock(&input.key).await;
        let unfinished = |error: String| {
            let msg = "an earlier DEL of this container is not finished";
            CniError::new(code::TRY_AGAIN_LATER, msg).details(error)
        };
        match pending::find(&self.settings.pending_dir, &input.key) {
            Ok(None) => {}
            Ok(Some(record)) => self.replay(&record).await.map_err(unfinished)?,
            Err(error) => return Err(unfinished(error.to_string())),
        }
        // It would take what comes from the other nodes away from the overlay.
        let overlay =
            |port: &PortMapping| (port.proto, port.host_port) == (Proto::Udp, self.settings.overlay_port);
        if let Some(port) = input.wanted.host_ports.iter().copied().find(overlay) {
            let msg = format!("the host port {port} is the overlay's; choose another one");
            return Err(CniError::new(code::INVALID_CONFIG, msg));
        }
        let Some(attachment) = self.engine.attachment() else {
            let why = self.engine.health().await.ok().and_then(|health| health.not_ready);
            return Err(CniError::new(code::TRY_AGAIN_LATER, "the node's network is not ready")
                .details(why.unwrap_or_default()));
        };
        if let Some(why) = input.wanted.bandwidth.too_small_for(attachment.mtu()) {
            return Err(CniError::new(code::INVALID_CONFIG, format!("runtimeConfig.{why}")));
        }
        let reserved = self.leases.reserve(&input.key, &input.wanted, |sequence, addresses| {
            mk_lease(&input, sequence, addresses, &attachment)
        });
        let mut lease = reserved.await.map_err(|error| lease_failure(&error))?;
        let completed = async {
            self.complete(&mut lease).await?;
            self.leases.mark_attached(&lease.key, &lease.plan).await.map_err(|error| lease_failure(&error))
        };
        match completed.await {
            Ok(()) => Ok(lease),
            Err(error) => {
                if let Err(cleanup) = self.remove(&lease.key).await {
                    warn!(attachment = %lease.key, error = %cleanup, "cleaning up after a failed ADD failed; DEL or GC will");
                }
                Err(error)
            }
        }
    }

    async fn complete(&self, lease: &mut Lease) -> Result<(), CniError> {
        let attached = self.dataplane.attach(&lease.plan, Path::new(&lease.netns)).await;
        lease.plan.default_routes = attached.map_err(|error| attach_failure(&error))?;
        let mut seen = self.engine.seen();
        let deadline = tokio::time::Instant::now() + POD_WAIT_MAX;
        loop {
            seen.borrow_and_update();
            let known = self.engine.put(lease.clone()).await;
            let known = known.map_err(|error| {
                CniError::new(code::TRY_AGAIN_LATER, "the pod's policy could not be applied").details(error)
            })?;
            if known {
                return Ok(());
            }
            match tokio::time::timeout_at(deadline, seen.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => {
                    warn!(attachment = %lease.key, pod = ?lease.pod, "the pod's object did not appear; it is denied everything until it does");
                    return Ok(());
                }
            }
        }
    }

    /// Detaches a pod. Idempotent. An attachment of another network is not touched: a runtime that undoes an ADD which was refused
    /// because the interface exists must not take the living one away. Where rules cannot be applied now, a delete record
    /// keeps what is left to do, so that no pod hangs in Terminating.
    pub(crate) async fn del(&self, key: &AttachmentKey, network: &str) -> Result<(), CniError> {
        let _gc = self.gc.read().await;
        let _busy = self.lock(key).await;
        let lease = self.leases.get(key).await;
        if lease.is_some_and(|lease| !is_of_network(&lease, network)) {
            info!(attachment = %key, network, "DEL names another network; nothing is done");
            return Ok(());
        }
        let unfinished =
            |error: String| CniError::new(code::TRY_AGAIN_LATER, "DEL did not finish").details(error);
        self.unplug(key).await.map_err(unfinished)?;
        if let Err(error) = self.settle(key).await {
            warn!(attachment = %key, %error, "the interface is gone, the lease follows when rules can be applied");
            pending::write(&self.settings.pending_dir, key, network)
                .map_err(|write| unfinished(format!("{error}; {write}")))?;
        }
        Ok(())
    }

    pub(crate) async fn remove(&self, key: &AttachmentKey) -> Result<(), String> {
        self.unplug(key).await?;
        self.settle(key).await
    }

    /// The endpoint leaves the model, then the node: no later pass can bring its port back.
    async fn unplug(&self, key: &AttachmentKey) -> Result<(), String> {
        self.engine.forget(key).await?;
        let ifname = host_ifname(&key.container_id, &key.ifname);
        self.dataplane.detach(&ifname).await.map_err(|error| sentence(&error))
    }

    /// Rules without the endpoint, then the lease: an address must have lost its class and identity before another pod
    /// can get it.
    async fn settle(&self, key: &AttachmentKey) -> Result<(), String> {
        if self.leases.get(key).await.is_none() {
            return Ok(());
        }
        self.engine.sync().await?;
        self.leases.release(key).await.map_err(|error| sentence(&error))?;
        info!(attachment = %key, "detached");
        Ok(())
    }

    /// Does what a delete record asks, then removes it.
    async fn replay(&self, record: &pending::Record) -> Result<(), String> {
        let key = &record.key;
        let lease = self.leases.get(key).await;
        if lease.is_none_or(|lease| record.covers(&lease.network)) {
            self.remove(key).await?;
            info!(attachment = %key, "a delete record was replayed");
        }
        pending::remove(&self.settings.pending_dir, key)
            .map_err(|error| format!("cannot remove the record: {error}"))
    }

    /// Replays all records. What fails stays for the next time.
    pub(crate) async fn replay_all(&self) {
        let records = match pending::list(&self.settings.pending_dir) {
            Ok(records) => records,
            Err(error) => {
                warn!(folder = %self.settings.pending_dir.display(), %error, "cannot list delete records");
                return;
            }
        };
        for key in records.into_iter().map(|record| record.key) {
            let _gc = self.gc.read().await;
            let _busy = self.lock(&key).await;
            // Read again: an ADD may have replayed it while this one waited, and attached anew.
            let Ok(Some(record)) = pending::find(&self.settings.pending_dir, &key) else { continue };
            if let Err(error) = self.replay(&record).await {
                warn!(attachment = %key, %error, "a delete record could not be replayed; it stays");
            }
        }
    }

    /// Compares an attachment with the lease, the kernel and the previous result.
    pub(crate) async fn check(
        &self,
        key: &AttachmentKey,
        network: &str,
        netns: &str,
        previous: &Previous,
    ) -> Result<(), CniError> {
        let _gc = self.gc.read().await;
        let _busy = self.lock(key).await;
        let lease = self.leases.get(key).await.filter(|lease| is_of_network(lease, network));
        let lease = lease.ok_or_else(|| {
            let msg = format!("container {key} is not attached: it holds no address");
            CniError::new(code::UNKNOWN_CONTAINER, msg)
        })?;
        let differs = |what: String| CniError::new(code::INTERNAL, format!("container {key}: {what}"));
        let inside = expected_inside(&lease, previous).map_err(differs)?;
        // All that can be is mended first: a runtime may take a failed CHECK for a container that is lost for good. What is still not so was not
        // noticed, or cannot be mended; the first look makes the second pass compare everything.
        self.engine.hold().await.map_err(differs)?;
        let mut lost = Vec::new();
        for _ in 0..2 {
            self.engine.sync().await.map_err(differs)?;
            lost = self.engine.verify(key).await.map_err(differs)?;
            if lost.is_empty() {
                break;
            }
        }
        if !lost.is_empty() {
            return Err(differs(lost.join("; ")));
        }
        let compared = self.dataplane.check(&lease.plan, &inside, Path::new(netns)).await;
        compared.map_err(|error| differs(sentence(&error)))
    }

    /// Brings leases and interfaces together after a start: a lease whose ADD did not end is undone, an interface without
    /// a lease is removed.
    ///
    /// The mark alone decides. It is durable before ADD answers, so a runtime was told of every attachment that has it,
    /// and of none that lacks it: those a runtime must DEL before it tries again (spec, "ADD"). What the kernel holds of
    /// an attachment is not asked: an error on the way to the answer must not take a pod's network away.
    pub(crate) async fn reconcile(&self) -> Result<(), String> {
        for lease in self.leases.all().await.into_iter().filter(|lease| !lease.attached) {
            info!(attachment = %lease.key, "an ADD did not end before the last stop; it is undone");
            self.undo(&lease.key).await?;
        }
        self.remove_strays(&BTreeSet::new()).await
    }

    /// [`Attacher::remove`] for a start, when rules may not be applied yet because objects are not read. Rules of before
    /// may still hold the address's identity; whoever gets it next is in deny-all until rules without it are in force.
    async fn undo(&self, key: &AttachmentKey) -> Result<(), String> {
        self.unplug(key).await?;
        self.leases.release(key).await.map_err(|error| sentence(&error))
    }

    pub(crate) async fn lock(&self, key: &AttachmentKey) -> OwnedMutexGuard<()> {
        let lock = {
            let mut busy = self.busy.lock().await;
            // Entries of verbs that have ended hold nothing alive.
            busy.retain(|_, lock| lock.strong_count() > 0);
            match busy.get(key).and_then(Weak::upgrade) {
                Some(lock) => lock,
                None => {
                    let lock = Arc::new(Mutex::new(()));
                    busy.insert(key.clone(), Arc::downgrade(&lock));
                    lock
                }
            }
        };
        lock.lock_owned().await
    }
}

fn mk_lease(input: &AddInput, sequence: u64, addresses: Vec<IpAddr>, attachment: &Attachment) -> Lease {
    let mut plan = attachment.endpoint(&input.key.container_id, &input.key.ifname, addresses);
    plan.mac = input.wanted.mac.unwrap_or(plan.mac);
    plan.host_ports.clone_from(&input.wanted.host_ports);
    plan.bandwidth = input.wanted.bandwidth;
    Lease {
        key: input.key.clone(),
        sequence,
        network: input.network.clone(),
        netns: input.netns.clone(),
        pod: input.pod.clone(),
        pod_uid: input.pod_uid.clone(),
        attached: false,
        boot_id: garbage::boot_id(),
        sandbox: garbage::sandbox_id(&input.netns),
        told_mtu: plan.mtu,
        lowered_mtu: 0,
        plan,
    }
}

/// `network` is empty where the caller does not know it.
fn is_of_network(lease: &Lease, network: &str) -> bool {
    network.is_empty() || lease.network == network
}

/// The pod's end as it should be now: as planned, but for what a later plugin of the chain changed by the previous result's own
/// word. What that does not list any more, or never could, is as planned.
///
/// # Errors
/// The previous result is not about what the lease is for.
fn expected_inside(lease: &Lease, previous: &Previous) -> Result<EndpointPlan, String> {
    let networks =
        |texts: &[String]| texts.iter().filter_map(|text| text.parse().ok()).collect::<Vec<IpNetwork>>();
    let addresses = networks(&previous.addresses);
    let is_listed = |address: &&IpAddr| addresses.iter().any(|network| network.ip() == **address);
    if let Some(address) = lease.plan.addresses.iter().find(|address| !is_listed(address)) {
        return Err(format!("its lease {address} is not in prevResult"));
    }
    let planned = lease.plan.mac.to_string();
    if let Some(mac) = previous.mac.as_ref().filter(|mac| !mac.eq_ignore_ascii_case(&planned)) {
        return Err(format!("prevResult names MAC {mac}, it was given {planned}"));
    }
    let mut inside = lease.plan.clone();
    let told = if lease.told_mtu == 0 { lease.plan.mtu } else { lease.told_mtu };
    // A later plugin's stays in force as far as the uplink lets it; ours has followed the uplink since.
    if let Some(tuned) = previous.mtu.filter(|mtu| *mtu != told) {
        inside.mtu = if lease.plan.mtu == told { tuned } else { tuned.min(lease.plan.mtu) };
    }
    let routes = networks(&previous.routes);
    let has_default = |address: &IpAddr| {
        routes.iter().any(|route| route.prefix() == 0 && route.is_ipv4() == address.is_ipv4())
    };
    inside.default_routes &= inside.addresses.iter().all(has_default);
    Ok(inside)
}

fn lease_failure(error: &LeaseError) -> CniError {
    use holdfast_net_core::ipam::AllocateError;
    match error {
        // Addresses come back as pods end, so the runtime may try again.
        LeaseError::Allocate(
            AllocateError::UsedUp(_) | AllocateError::Taken(_) | AllocateError::HeldBack(_),
        )
        | LeaseError::MacTaken(_)
        | LeaseError::HostPortTaken { .. } => CniError::new(code::TRY_AGAIN_LATER, error.to_string()),
        LeaseError::Allocate(
            AllocateError::Foreign { .. }
            | AllocateError::ForeignRange { .. }
            | AllocateError::OneOfEachFamily(_),
        )
        | LeaseError::HostPortFamily(_) => CniError::new(code::INVALID_CONFIG, error.to_string()),
        LeaseError::Exists(_) => {
            CniError::new(code::INVALID_ENVIRONMENT, format!("CNI_CONTAINERID, CNI_IFNAME: {error}"))
        }
        LeaseError::Open { .. } | LeaseError::Store(_) | LeaseError::Row { .. } => {
            CniError::new(code::IO_FAILURE, "no address could be leased").details(sentence(error))
        }
    }
}

fn attach_failure(error: &DataplaneError) -> CniError {
    match error {
        DataplaneError::Sandbox { .. } => {
            CniError::new(code::INVALID_ENVIRONMENT, "CNI_NETNS cannot be entered").details(sentence(error))
        }
        DataplaneError::Exists { .. } => {
            CniError::new(code::INVALID_ENVIRONMENT, "CNI_IFNAME is taken").details(sentence(error))
        }
        _ => CniError::new(code::INTERNAL, "the pod could not be attached").details(sentence(error)),
    }
}
