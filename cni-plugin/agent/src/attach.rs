//! The CNI verbs on the node: leases, interfaces and policy in their order.
//!
//! ADD: lease on disk -> interface with deny-all (dataplane) -> policy of the pod -> mark on disk -> answer.
//! DEL: endpoint out of the model -> interface gone -> rules without it -> lease released.
//!
//! Each step may be the last one before a kill; [`Attacher::reconcile`] and DEL start over from what they find.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use holdfast_dataplane::{Dataplane, Error as DataplaneError};
use holdfast_net_core::cni::{CniError, code};
use holdfast_net_core::objects::ObjectName;
use holdfast_net_core::plan::{EndpointPlan, host_ifname};
use tokio::sync::{Mutex, OwnedMutexGuard, RwLock};
use tracing::{info, warn};

use crate::engine::{EngineHandle, sentence};
use crate::leases::{AttachmentKey, Lease, LeaseError, Leases};
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
}

/// Serves the verbs.
pub(crate) struct Attacher {
    pub(crate) dataplane: Arc<Dataplane>,
    pub(crate) leases: Arc<Leases>,
    pub(crate) engine: EngineHandle,
    pending_dir: PathBuf,
    /// One verb at a time for one attachment: a runtime that gave up on an ADD sends DEL while the ADD still works.
    busy: Mutex<BTreeMap<AttachmentKey, Weak<Mutex<()>>>>,
    /// GC excludes ADD and DEL (spec, "GC").
    gc: RwLock<()>,
}

impl Attacher {
    pub(crate) fn new(
        dataplane: Arc<Dataplane>,
        leases: Arc<Leases>,
        engine: EngineHandle,
        pending_dir: PathBuf,
    ) -> Self {
        Self { dataplane, leases, engine, pending_dir, busy: Mutex::default(), gc: RwLock::default() }
    }

    /// Attaches a pod.
    pub(crate) async fn add(&self, input: AddInput) -> Result<Lease, CniError> {
        let _gc = self.gc.read().await;
        let _busy = self.lock(&input.key).await;
        if pending::exists(&self.pending_dir, &input.key) {
            self.replay(&input.key).await.map_err(|error| {
                CniError::new(code::TRY_AGAIN_LATER, "an earlier DEL of this container is not finished")
                    .details(error)
            })?;
        }
        let Some(bridge) = self.engine.bridge() else {
            let why = self.engine.health().await.ok().and_then(|health| health.not_ready);
            return Err(CniError::new(code::TRY_AGAIN_LATER, "the node's network is not ready")
                .details(why.unwrap_or_default()));
        };
        let mk_lease = |sequence, addresses| Lease {
            sequence,
            network: input.network.clone(),
            netns: input.netns.clone(),
            pod: input.pod.clone(),
            pod_uid: input.pod_uid.clone(),
            attached: false,
            plan: EndpointPlan::new(&input.key.container_id, &input.key.ifname, addresses, &bridge),
            key: input.key.clone(),
        };
        let lease = self.leases.reserve(&input.key, mk_lease).await.map_err(|error| lease_failure(&error))?;
        let completed = async {
            self.complete(&lease).await?;
            self.leases.mark_attached(&lease.key).await.map_err(|error| lease_failure(&error))
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

    async fn complete(&self, lease: &Lease) -> Result<(), CniError> {
        let attached = self.dataplane.attach(&lease.plan, Path::new(&lease.netns)).await;
        attached.map_err(|error| attach_failure(&error))?;
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

    /// Detaches a pod. Idempotent. Where rules cannot be applied now, a delete record keeps what is left to do, so that no
    /// pod hangs in Terminating.
    pub(crate) async fn del(&self, key: &AttachmentKey) -> Result<(), CniError> {
        let _gc = self.gc.read().await;
        let _busy = self.lock(key).await;
        let unfinished =
            |error: String| CniError::new(code::TRY_AGAIN_LATER, "DEL did not finish").details(error);
        self.unplug(key).await.map_err(unfinished)?;
        if let Err(error) = self.settle(key).await {
            warn!(attachment = %key, %error, "the interface is gone, the lease follows when rules can be applied");
            pending::write(&self.pending_dir, key)
                .map_err(|write| unfinished(format!("{error}; {write}")))?;
        }
        Ok(())
    }

    async fn remove(&self, key: &AttachmentKey) -> Result<(), String> {
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
    async fn replay(&self, key: &AttachmentKey) -> Result<(), String> {
        self.remove(key).await?;
        info!(attachment = %key, "a delete record was replayed");
        pending::remove(&self.pending_dir, key).map_err(|error| format!("cannot remove the record: {error}"))
    }

    /// Replays all records. What fails stays for the next time.
    pub(crate) async fn replay_all(&self) {
        let records = match pending::list(&self.pending_dir) {
            Ok(records) => records,
            Err(error) => {
                warn!(folder = %self.pending_dir.display(), %error, "cannot list delete records");
                return;
            }
        };
        for key in records {
            let _gc = self.gc.read().await;
            let _busy = self.lock(&key).await;
            // An ADD may have replayed it while this one waited, and attached anew.
            if !pending::exists(&self.pending_dir, &key) {
                continue;
            }
            if let Err(error) = self.replay(&key).await {
                warn!(attachment = %key, %error, "a delete record could not be replayed; it stays");
            }
        }
    }

    /// Compares an attachment with the lease, the kernel and the previous result.
    pub(crate) async fn check(
        &self,
        key: &AttachmentKey,
        netns: &str,
        addresses: &[String],
        mac: Option<&str>,
    ) -> Result<(), CniError> {
        let _gc = self.gc.read().await;
        let _busy = self.lock(key).await;
        let lease = self.leases.get(key).await.ok_or_else(|| {
            CniError::new(
                code::UNKNOWN_CONTAINER,
                format!("container {key} is not attached: it holds no address"),
            )
        })?;
        let differs = |what: String| CniError::new(code::INTERNAL, format!("container {key}: {what}"));
        for address in &lease.plan.addresses {
            let listed = addresses.iter().any(|text| {
                text.parse::<ipnetwork::IpNetwork>().is_ok_and(|network| network.ip() == *address)
            });
            if !listed {
                return Err(differs(format!("its lease {address} is not in prevResult")));
            }
        }
        if let Some(mac) = mac.filter(|mac| !mac.eq_ignore_ascii_case(&lease.plan.mac.to_string())) {
            return Err(differs(format!("prevResult names MAC {mac}, it was given {}", lease.plan.mac)));
        }
        let compared = self.dataplane.check(&lease.plan, Path::new(netns)).await;
        compared.map_err(|error| differs(sentence(&error)))?;
        // Compares the rules with the kernel's and mends them.
        self.engine.sync().await.map_err(differs)
    }

    /// Frees all attachments of `network` that are not valid any more. Goes on after errors; the last one is reported.
    pub(crate) async fn collect(
        &self,
        network: &str,
        valid: &BTreeSet<AttachmentKey>,
    ) -> Result<u32, CniError> {
        let _gc = self.gc.write().await;
        let mut freed = 0;
        let mut failure = None;
        for lease in self.leases.all().await {
            if lease.network != network || valid.contains(&lease.key) {
                continue;
            }
            match self.remove(&lease.key).await {
                Ok(()) => freed += 1,
                Err(error) => {
                    failure = Some(
                        CniError::new(code::INTERNAL, format!("cannot free {}", lease.key)).details(error),
                    );
                }
            }
        }
        if let Err(error) = self.remove_strays().await {
            failure = Some(CniError::new(code::INTERNAL, "cannot free stray interfaces").details(error));
        }
        failure.map_or(Ok(freed), Err)
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
        self.remove_strays().await
    }

    /// [`Attacher::remove`] for a start, when rules may not be applied yet because objects are not read. Rules of before
    /// may still hold the address's identity; whoever gets it next is in deny-all until rules without it are in force.
    async fn undo(&self, key: &AttachmentKey) -> Result<(), String> {
        self.unplug(key).await?;
        self.leases.release(key).await.map_err(|error| sentence(&error))
    }

    async fn remove_strays(&self) -> Result<(), String> {
        let leased: BTreeSet<String> =
            self.leases.all().await.into_iter().map(|lease| lease.plan.host_ifname).collect();
        for found in self.dataplane.list_endpoints().await.map_err(|error| sentence(&error))? {
            if !leased.contains(&found.host_ifname) {
                info!(interface = found.host_ifname, "an interface of ours has no lease; it is removed");
                self.dataplane.detach(&found.host_ifname).await.map_err(|error| sentence(&error))?;
            }
        }
        Ok(())
    }

    async fn lock(&self, key: &AttachmentKey) -> OwnedMutexGuard<()> {
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

fn lease_failure(error: &LeaseError) -> CniError {
    match error {
        // Addresses come back as pods end, so the runtime may try again.
        LeaseError::UsedUp(_) => CniError::new(code::TRY_AGAIN_LATER, error.to_string()),
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
