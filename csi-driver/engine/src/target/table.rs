//! The volumes attached to this node, one attach or detach of each at a time.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use holdfast_io::BlockError;
use holdfast_storage_core::encryption::{EncryptionKind, VolumeKey};
use holdfast_storage_core::ids::{Attachment, VolumeId};
use holdfast_storage_core::record::{FrontEndChoice, VolumeRecord};
use holdfast_storage_core::target::{Job, JobError};
use tokio::sync::watch;

use crate::config::FrontEndKind;
use crate::errno;
use crate::node::NodeContext;

use super::volume::{AttachError, Volume};

/// How long a volume that nobody uses has a target for one job; more than the members' deadlines take together.
const DETACHED_JOB_PATIENCE: Duration = Duration::from_secs(60);

/// Why a job on a volume was not done.
#[derive(Debug, thiserror::Error)]
pub enum VolumeJobError {
    /// There is no target to do it.
    #[error(transparent)]
    Target(#[from] AttachError),
    /// The target did not do it.
    #[error(transparent)]
    Job(#[from] JobError),
    /// It is published, to another node.
    #[error("volume {volume} is published to node {node}: ask there")]
    Elsewhere {
        /// The volume.
        volume: VolumeId,
        /// Where.
        node: String,
    },
    /// A hold of a volume that nobody writes to.
    #[error("volume {0} is not attached here: there are no writes to hold")]
    NotAttached(VolumeId),
    /// It took too long.
    #[error("the job on volume {0} is not done after {seconds} s: a replica does not answer, or is being reconciled; ask again", seconds = DETACHED_JOB_PATIENCE.as_secs())]
    TooLong(VolumeId),
    /// The volume is being attached.
    #[error("volume {0} is being attached: ask again")]
    Overtaken(VolumeId),
    /// A replica does not come back.
    #[error(
        "volume {0} has replicas out of sync that get no nearer: their nodes, or their disks, do not answer"
    )]
    NoNearer(VolumeId),
}

/// The attached volumes.
pub struct Volumes {
    node: Arc<NodeContext>,
    // One entry per volume ever attached here since the start; an idle one is two pointers.
    slots: Mutex<HashMap<VolumeId, Arc<Slot>>>,
}

#[derive(Default)]
pub(super) struct Slot {
    /// Held for the whole of an attach or detach: a duplicate waits and then finds the work done.
    gate: tokio::sync::Mutex<()>,
    volume: Mutex<Option<Arc<Volume>>>,
    /// The target that brings the replicas of the detached volume in sync ([`super::tend`]).
    tended: Mutex<Option<Arc<Volume>>>,
    /// Attaches that wait for the gate or hold it: work on the detached volume gives way.
    attaching: watch::Sender<usize>,
    /// Likewise detaches: what may take as long as a rebuild gives way to them, too.
    detaching: watch::Sender<usize>,
}

/// One of [`Slot::attaching`] or [`Slot::detaching`].
struct Wanted<'a>(&'a watch::Sender<usize>);

impl<'a> Wanted<'a> {
    fn new(count: &'a watch::Sender<usize>) -> Self {
        count.send_modify(|count| *count += 1);
        Self(count)
    }
}

impl Drop for Wanted<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|count| *count -= 1);
    }
}

impl Volumes {
    /// No volume.
    #[must_use]
    pub fn new(node: Arc<NodeContext>) -> Self {
        Self { node, slots: Mutex::default() }
    }

    /// Starts the volume's target and exposes it; idempotent within one attachment, and safe to be called twice at
    /// once. An encrypted volume needs its key, which is checked before anything is started.
    ///
    /// # Errors
    /// The record says otherwise, the target does not come up, or the kernel gives no device. Nothing keeps running
    /// then.
    pub async fn attach(
        &self,
        volume_id: VolumeId,
        attachment: Attachment,
        key: Option<VolumeKey>,
    ) -> Result<Arc<Volume>, AttachError> {
        let slot = self.slot(volume_id);
        let _wanted = Wanted::new(&slot.attaching);
        let _gate = slot.gate.lock().await;
        if let Some(volume) = slot.current() {
            if volume.attachment != attachment {
                return Err(AttachError::OtherAttachment {
                    volume: volume_id,
                    attachment: volume.attachment,
                });
            }
            if volume.key_check != key.as_ref().map(VolumeKey::check) {
                let reason = "it is attached here already, and not with this key";
                return Err(AttachError::Key { volume: volume_id, reason });
            }
            return volume.end().map_or(Ok(volume), Err);
        }
        let record = self.node.store.read(volume_id).await?.record;
        self.check_published(&record, attachment)?;
        self.check_front_end(&record)?;
        check_key(&record, key.as_ref())?;
        let volume = Volume::start(&self.node, volume_id, attachment, false, key.as_ref())
            .map_err(|error| AttachError::FrontEnd { volume: volume_id, reason: error.to_string() })?;
        // From here on a caller that gives up leaves nothing half done: the slot owns the volume.
        slot.put(Some(Arc::clone(&volume)));
        let up = async {
            volume.wait_serving(self.node.config.attach_timeout).await?;
            volume.expose(&self.node, record.read_only).await
        };
        if let Err(error) = up.await {
            slot.put(None);
            // What came up goes down in order; why it failed is the answer.
            let _ = volume.stop().await;
            return Err(error);
        }
        Ok(volume)
    }

    /// Stops the volume's target. Idempotent.
    ///
    /// # Errors
    /// The block device is still in use; the volume is gone nevertheless.
    pub async fn detach(&self, volume_id: VolumeId) -> Result<(), AttachError> {
        let slot = self.slot(volume_id);
        let _wanted = Wanted::new(&slot.detaching);
        let _gate = slot.gate.lock().await;
        match slot.take() {
            Some(volume) => volume.stop().await,
            None => Ok(()),
        }
    }

    /// Does a job on a volume that is attached here, or to nobody: then a target is started for it, which takes a
    /// generation (R7) and ends with the job. Not cancel-safe: run it as a task of its own.
    ///
    /// # Errors
    /// [`VolumeJobError`], which tells whether the job may have been done.
    pub async fn job(&self, volume_id: VolumeId, what: Job) -> Result<(), VolumeJobError> {
        if let Some(volume) = self.get(volume_id) {
            return run(&volume, what).await;
        }
        if matches!(what, Job::Hold { .. } | Job::Cut { .. }) {
            return Err(VolumeJobError::NotAttached(volume_id));
        }
        if matches!(what, Job::Release { .. }) {
            return Ok(());
        }
        let slot = self.slot(volume_id);
        if let Some(volume) = slot.tended() {
            return run(&volume, what).await;
        }
        let mut attaching = slot.attaching.subscribe();
        // No attach meanwhile: its target and this one would fence each other.
        let _gate = slot.gate.lock().await;
        if let Some(volume) = slot.current() {
            return run(&volume, what).await;
        }
        if matches!(what, Job::Reload) {
            // The next target reads the record before it does anything.
            return Ok(());
        }
        let volume = self.start_detached(volume_id).await?;
        // The data process may be stopped in the middle of it.
        let _over = AbandonOnDrop(Arc::clone(&volume));
        let work = async {
            volume.wait_serving(self.node.config.attach_timeout).await?;
            run(&volume, what).await
        };
        let done = tokio::select! {
            done = work => done,
            _ = attaching.wait_for(|count| *count > 0) => Err(VolumeJobError::Overtaken(volume_id)),
            () = tokio::time::sleep(DETACHED_JOB_PATIENCE) => Err(VolumeJobError::TooLong(volume_id)),
        };
        // There is no front end that could be busy.
        let _ = volume.stop().await;
        done
    }

    /// Starts a target for work on a volume that is published to nobody (R7).
    pub(super) async fn start_detached(&self, volume_id: VolumeId) -> Result<Arc<Volume>, VolumeJobError> {
        let record = self.node.store.read(volume_id).await.map_err(AttachError::Store)?.record;
        if let Some(node) = record.attached_to {
            return Err(VolumeJobError::Elsewhere { volume: volume_id, node: node.0 });
        }
        let failed =
            |error: std::io::Error| AttachError::FrontEnd { volume: volume_id, reason: error.to_string() };
        Ok(Volume::start(&self.node, volume_id, record.attachment, true, None).map_err(failed)?)
    }

    pub(super) fn attach_timeout(&self) -> Duration {
        self.node.config.attach_timeout
    }

    /// An attached volume.
    #[must_use]
    pub fn get(&self, volume_id: VolumeId) -> Option<Arc<Volume>> {
        self.lock().get(&volume_id).and_then(|slot| slot.current())
    }

    /// Detaches every volume.
    pub async fn detach_all(&self) {
        let attached: Vec<VolumeId> =
            self.lock().iter().filter(|(_, slot)| slot.current().is_some()).map(|(id, _)| *id).collect();
        for volume_id in attached {
            if let Err(error) = self.detach(volume_id).await {
                tracing::warn!(volume = %volume_id, %error, "a volume did not detach in order");
            }
        }
    }

    /// Drops every volume as a crash does.
    pub fn abandon_all(&self) {
        let slots = std::mem::take(&mut *self.lock());
        for volume in slots.values().filter_map(|slot| slot.take()) {
            volume.abandon();
        }
    }

    /// Counts zero and data blocks on every member; the largest count (R36 asks whether any is above zero).
    ///
    /// # Errors
    /// A member has no open session or does not answer.
    pub async fn count_allocated(&self, volume: &Volume) -> Result<u64, BlockError> {
        let actor = volume.actor();
        let (links, size_bytes) = actor.peek(|machine| (machine.member_links(), machine.size_bytes()));
        let mut most = 0;
        for link in links.ok_or(BlockError(errno::ENOTCONN))? {
            most = most.max(link.allocated_blocks(size_bytes.unwrap_or_default()).await?);
        }
        Ok(most)
    }

    fn check_published(&self, record: &VolumeRecord, attachment: Attachment) -> Result<(), AttachError> {
        let node = &self.node.config.node;
        if record.attached_to.as_ref() == Some(node) && record.attachment == attachment && !record.deleting {
            return Ok(());
        }
        let found = match &record.attached_to {
            _ if record.deleting => "that it is being deleted".to_owned(),
            Some(at) => format!("node {at}, attachment {}", record.attachment),
            None => format!("no node, last attachment {}", record.attachment),
        };
        Err(AttachError::NotPublished { volume: record.volume_id, node: node.0.clone(), attachment, found })
    }

    fn check_front_end(&self, record: &VolumeRecord) -> Result<(), AttachError> {
        match (record.params.front_end, self.node.config.front_end) {
            (FrontEndChoice::Auto, _) | (FrontEndChoice::FuseLoop, FrontEndKind::FuseLoop) => Ok(()),
            (FrontEndChoice::FuseLoop, FrontEndKind::None) => Err(AttachError::NoSuchFrontEnd {
                volume: record.volume_id,
                node: self.node.config.node.0.clone(),
            }),
        }
    }

    pub(super) fn slot(&self, volume_id: VolumeId) -> Arc<Slot> {
        Arc::clone(self.lock().entry(volume_id).or_default())
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<VolumeId, Arc<Slot>>> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A caller's mistake must not mix two keys, or plaintext and ciphertext, in one volume.
fn check_key(record: &VolumeRecord, key: Option<&VolumeKey>) -> Result<(), AttachError> {
    let check = record.encryption.and_then(|encryption| encryption.key_check);
    let reason = match (record.params.encryption, key) {
        (EncryptionKind::None, None) => return Ok(()),
        (EncryptionKind::None, Some(_)) => "it is not encrypted, and a key came with the call",
        (EncryptionKind::AesXts, None) => "it is encrypted, and no key came with the call",
        (EncryptionKind::AesXts, Some(_)) if check.is_none() => "its record is bound to no key yet",
        (EncryptionKind::AesXts, Some(key)) if check == Some(key.check()) => return Ok(()),
        (EncryptionKind::AesXts, Some(_)) => "the key is not the one that its record is bound to",
    };
    Err(AttachError::Key { volume: record.volume_id, reason })
}

async fn run(volume: &Arc<Volume>, what: Job) -> Result<(), VolumeJobError> {
    volume.job(what).await?;
    if matches!(what, Job::Grow { .. }) {
        volume.follow_growth().await?;
    }
    Ok(())
}

/// A target's end, in any case.
struct AbandonOnDrop(Arc<Volume>);

impl Drop for AbandonOnDrop {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// A slot's tended target, for as long as it is.
pub(super) struct Tended<'a> {
    slot: &'a Slot,
    _end: AbandonOnDrop,
}

impl Drop for Tended<'_> {
    fn drop(&mut self) {
        *self.slot.tended.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

impl Slot {
    pub(super) async fn gate(&self) -> tokio::sync::MutexGuard<'_, ()> {
        self.gate.lock().await
    }

    /// Waits until somebody wants to attach or detach.
    pub(super) async fn is_wanted(&self) {
        let (mut attaching, mut detaching) = (self.attaching.subscribe(), self.detaching.subscribe());
        // An error: the sender is gone, which the slot itself has.
        tokio::select! {
            _ = attaching.wait_for(|count| *count > 0) => {}
            _ = detaching.wait_for(|count| *count > 0) => {}
        }
    }

    pub(super) fn tend(&self, volume: Arc<Volume>) -> Tended<'_> {
        *self.tended.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::clone(&volume));
        Tended { slot: self, _end: AbandonOnDrop(volume) }
    }

    fn tended(&self) -> Option<Arc<Volume>> {
        self.tended.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn current(&self) -> Option<Arc<Volume>> {
        self.lock().clone()
    }

    fn put(&self, volume: Option<Arc<Volume>>) {
        *self.lock() = volume;
    }

    fn take(&self) -> Option<Arc<Volume>> {
        self.lock().take()
    }

    fn lock(&self) -> MutexGuard<'_, Option<Arc<Volume>>> {
        self.volume.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
