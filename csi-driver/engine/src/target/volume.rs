//! An attached volume: its target, the thread of its connections, and its front end.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use holdfast_frontend::{FuseLoop, FuseLoopOptions};
use holdfast_io::thread_ring::LoneIo;
use holdfast_io::{BlockDevice, BlockOp};
use holdfast_nbd::{BlockStatus, Server};
use holdfast_storage_core::encryption::{BlockCipher, VolumeKey};
use holdfast_storage_core::ids::{Attachment, BLOCK_BYTES, KeyCheck, TargetId, VolumeId};
use holdfast_storage_core::record_store::StoreError;
use holdfast_storage_core::target::{
    Job, JobError, Target, TargetConfig, TargetEvent, TargetState, TargetStatus,
};
use holdfast_storage_core::timers::STOP_DEADLINE_MS;
use tokio::sync::{oneshot, watch};

use crate::clock::now_ms;
use crate::config::FrontEndKind;
use crate::host::{listen_unix, remove_if_present};
use crate::nbd_listener;
use crate::node::NodeContext;
use crate::thread_runtime::ThreadRuntime;

use super::device::{CLIENT_BLOCK_BYTES, TargetDevice, TargetExport};
use super::encrypted::EncryptedDevice;
use super::machine::{TargetActor, TargetEnv, TargetInput, TargetMachine};

/// A target that could not even flush in this time is given up; the next start reconciles.
const STOP_PATIENCE: Duration = Duration::from_millis(STOP_DEADLINE_MS + 2_000);
/// How long Detach waits for its flush: the I/O deadlines of all replicas, one after the other.
const FLUSH_PATIENCE: Duration = Duration::from_secs(20);

/// Why a volume is not attached.
#[derive(Debug, thiserror::Error)]
pub enum AttachError {
    /// The record says otherwise.
    #[error(
        "volume {volume} is not published to node {node} as attachment {attachment}; the record says {found}"
    )]
    NotPublished {
        /// The volume.
        volume: VolumeId,
        /// This node.
        node: String,
        /// The attachment asked for.
        attachment: Attachment,
        /// What the record says.
        found: String,
    },
    /// It is attached here under another attachment.
    #[error("volume {volume} is still attached here as attachment {attachment}: detach it first")]
    OtherAttachment {
        /// The volume.
        volume: VolumeId,
        /// The attachment that is.
        attachment: Attachment,
    },
    /// The target of this attachment ended.
    #[error("volume {volume} has a target that is {state}: {reason}; detach it first")]
    Ended {
        /// The volume.
        volume: VolumeId,
        /// The state's word.
        state: &'static str,
        /// Why.
        reason: String,
    },
    /// The target did not come up in time.
    #[error(
        "volume {volume} did not come up within {seconds} s, its target is {state}; it is stopped, try again"
    )]
    Timeout {
        /// The volume.
        volume: VolumeId,
        /// How long was waited.
        seconds: u64,
        /// Where it stood.
        state: &'static str,
    },
    /// The volume asks for a front end that this process does not have.
    #[error(
        "volume {volume} is to be attached by FUSE and a loop device (frontEnd fuse-loop), and the data process of node {node} \
         was started without (--front-end none)"
    )]
    NoSuchFrontEnd {
        /// The volume.
        volume: VolumeId,
        /// This node.
        node: String,
    },
    /// The key does not fit the volume.
    #[error("volume {volume}: {reason}")]
    Key {
        /// The volume.
        volume: VolumeId,
        /// What is wrong with it, without the key.
        reason: &'static str,
    },
    /// The record could not be read.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The front end could not be made.
    #[error("volume {volume} has no block device: {reason}")]
    FrontEnd {
        /// The volume.
        volume: VolumeId,
        /// Why.
        reason: String,
    },
}

/// A target with everything that hangs on it.
pub struct Volume {
    /// Its id.
    pub volume_id: VolumeId,
    /// The attachment it was started for.
    pub attachment: Attachment,
    /// Of an encrypted volume: which key it was attached with.
    pub key_check: Option<KeyCheck>,
    cipher: Option<Arc<BlockCipher>>,
    actor: Arc<TargetActor>,
    state: watch::Receiver<TargetState>,
    runtime: Mutex<ThreadRuntime>,
    outside: Mutex<Outside>,
}

/// What the outside sees of it.
#[derive(Default)]
struct Outside {
    device: Option<Arc<dyn BlockDevice>>,
    front_end: Option<FuseLoop>,
    path: Option<PathBuf>,
    client_socket: Option<PathBuf>,
}

impl Volume {
    /// Starts a target; it is not serving yet. `detached`: for jobs on a volume that is published to nobody (R7). Without the
    /// `key` of an encrypted volume it must not be exposed.
    ///
    /// # Errors
    /// The kernel gives no thread.
    pub fn start(
        node: &NodeContext,
        volume_id: VolumeId,
        attachment: Attachment,
        detached: bool,
        key: Option<&VolumeKey>,
    ) -> std::io::Result<Arc<Self>> {
        let id = volume_id.to_string();
        // It never waits for the local disk: when that hangs, the other replicas go on.
        let runtime = ThreadRuntime::start_with_ring(&format!("hf-vol-{}", &id[..7]), LoneIo::Queued)?;
        let target_id = TargetId(rand::random());
        let config = TargetConfig {
            volume_id,
            node: node.config.node.clone(),
            attachment,
            target_id,
            seed: rand::random(),
            detached,
        };
        let (sender, state) = watch::channel(TargetState::Opening);
        let env = TargetEnv {
            volume_id,
            node: node.config.node.clone(),
            store: Arc::clone(&node.store),
            peers: Arc::clone(&node.peers),
            host: Arc::clone(&node.replicas),
            control: node.control.clone(),
            data: runtime.handle().clone(),
            state: sender,
            size_bytes: watch::Sender::new(0),
            opens: Mutex::default(),
        };
        tracing::info!(volume = %volume_id, %attachment, %target_id, "a target starts");
        let machine = TargetMachine::new(Target::new(now_ms(), config));
        let actor = TargetActor::new(machine, env, node.pulse.clone());
        actor.kick();
        Ok(Arc::new(Self {
            volume_id,
            attachment,
            key_check: key.map(VolumeKey::check),
            cipher: key.map(|key| Arc::new(key.cipher())),
            actor,
            state,
            runtime: Mutex::new(runtime),
            outside: Mutex::default(),
        }))
    }

    /// Waits until the target serves.
    ///
    /// # Errors
    /// It ended, or did not come up in time.
    pub async fn wait_serving(&self, patience: Duration) -> Result<(), AttachError> {
        let mut state = self.state.clone();
        let settled = state.wait_for(|state| *state == TargetState::Serving || state.is_final());
        let waited = tokio::time::timeout(patience, settled).await;
        let state = match waited {
            Ok(Ok(state)) => state.clone(),
            Ok(Err(_)) | Err(_) => {
                let state = self.state.borrow().word();
                return Err(AttachError::Timeout {
                    volume: self.volume_id,
                    seconds: patience.as_secs(),
                    state,
                });
            }
        };
        if state == TargetState::Serving { Ok(()) } else { Err(self.ended(&state)) }
    }

    /// The error that tells why the target ended; `None` while it has not.
    #[must_use]
    pub fn end(&self) -> Option<AttachError> {
        let state = self.state.borrow().clone();
        state.is_final().then(|| self.ended(&state))
    }

    fn ended(&self, state: &TargetState) -> AttachError {
        AttachError::Ended { volume: self.volume_id, state: state.word(), reason: state.reason().to_owned() }
    }

    /// Makes the target a block device of this machine and of local NBD clients.
    ///
    /// # Errors
    /// The kernel refuses.
    pub async fn expose(self: &Arc<Self>, node: &NodeContext, read_only: bool) -> Result<(), AttachError> {
        let failed = |reason: String| AttachError::FrontEnd { volume: self.volume_id, reason };
        let size = self.actor.peek(TargetMachine::size_bytes).unwrap_or_default();
        // Unless it grew since.
        self.actor.env.size_bytes.send_modify(|known| *known = size.max(*known));
        let target = Arc::new(TargetDevice::new(Arc::clone(&self.actor)));
        let device = self.plaintext(Arc::clone(&target) as Arc<dyn BlockDevice>);
        if let Some(dir) = &node.config.nbd_client_dir {
            let export = TargetExport {
                device: Arc::clone(&device),
                // What is a hole or zeroes below is zeroes above.
                status: target as Arc<dyn BlockStatus>,
                block_bytes: if self.cipher.is_some() { BLOCK_BYTES as u32 } else { CLIENT_BLOCK_BYTES },
                read_only,
            };
            let socket = self.serve_clients(dir, export).map_err(|e| failed(e.to_string()))?;
            self.outside().client_socket = Some(socket);
        }
        self.outside().device = Some(Arc::clone(&device));
        if node.config.front_end == FrontEndKind::FuseLoop {
            let options = FuseLoopOptions {
                volume_id: self.volume_id.to_string(),
                mount_dir: node.config.run_dir.clone(),
                read_only,
            };
            let front_end = tokio::task::spawn_blocking(move || FuseLoop::attach(device, options))
                .await
                .map_err(|e| failed(e.to_string()))?
                .map_err(|e| failed(e.to_string()))?;
            {
                let mut outside = self.outside();
                outside.path = Some(front_end.device_path().to_owned());
                outside.front_end = Some(front_end);
            }
            // The volume may have grown meanwhile.
            self.follow_growth().await?;
        }
        Ok(())
    }

    /// The device as clients see it.
    fn plaintext(&self, target: Arc<dyn BlockDevice>) -> Arc<dyn BlockDevice> {
        match &self.cipher {
            Some(cipher) => Arc::new(EncryptedDevice::new(target, Arc::clone(cipher))),
            None => target,
        }
    }

    fn serve_clients(&self, dir: &Path, export: TargetExport) -> std::io::Result<PathBuf> {
        let path = dir.join(format!("{}.sock", self.volume_id));
        let server = Server::new(Arc::new(export));
        let runtime = self.runtime();
        let _inside = runtime.handle().enter();
        let listener = listen_unix(&path)?;
        runtime.handle().spawn(nbd_listener::serve_unix(listener, server));
        Ok(path)
    }

    /// The block device's path, once exposed through the kernel.
    #[must_use]
    pub fn path(&self) -> Option<PathBuf> {
        self.outside().path.clone()
    }

    /// The target as a block device, once exposed.
    #[must_use]
    pub fn device(&self) -> Option<Arc<dyn BlockDevice>> {
        self.outside().device.clone()
    }

    /// For GetStatus.
    #[must_use]
    pub fn status(&self) -> TargetStatus {
        self.actor.peek(TargetMachine::status)
    }

    /// The block device follows the target's growth. Safe to repeat.
    ///
    /// # Errors
    /// The kernel refuses; the volume has its new size nevertheless.
    pub async fn follow_growth(self: &Arc<Self>) -> Result<(), AttachError> {
        let me = Arc::clone(self);
        let grow = move || {
            // The size is read under the lock: of two that follow at once, none asks for less than the other got.
            let outside = me.outside();
            let size_bytes = *me.actor.env.size_bytes.borrow();
            outside.front_end.as_ref().map_or(Ok(()), |front_end| front_end.grow(size_bytes))
        };
        let failed = |reason: String| AttachError::FrontEnd { volume: self.volume_id, reason };
        match tokio::task::spawn_blocking(grow).await {
            Ok(grown) => grown.map_err(|error| failed(error.to_string())),
            Err(error) => Err(failed(error.to_string())),
        }
    }

    /// Begins a pass of the scrub.
    pub fn scrub(&self) {
        self.actor.post(TargetInput::core(TargetEvent::Scrub));
    }

    /// Does a job: a snapshot, growth.
    ///
    /// # Errors
    /// See [`JobError`]. Cancelling the call does not cancel the job; repeating it finds it done or does it.
    pub async fn job(&self, what: Job) -> Result<(), JobError> {
        let (sender, receiver) = oneshot::channel();
        self.actor.post(TargetInput::Job(what, Box::new(move |result| drop(sender.send(result)))));
        receiver.await.unwrap_or(Err(JobError::Ended))
    }

    /// The target's machine, for questions to its replicas.
    #[must_use]
    pub fn actor(&self) -> &Arc<TargetActor> {
        &self.actor
    }

    /// Flushes, takes the front end away, releases the replicas and stops. The volume is gone after it in any case.
    ///
    /// # Errors
    /// The block device is still in use: its I/O fails from now on, it vanishes with its last user.
    pub async fn stop(&self) -> Result<(), AttachError> {
        if *self.state.borrow() == TargetState::Serving {
            self.flush().await;
        }
        let (front_end, socket) = {
            let mut outside = self.outside();
            outside.device = None;
            (outside.front_end.take(), outside.client_socket.take())
        };
        let mut result = Ok(());
        if let Some(front_end) = front_end {
            let detached = tokio::task::spawn_blocking(move || front_end.detach()).await;
            let failed = |reason: String| AttachError::FrontEnd { volume: self.volume_id, reason };
            result = match detached {
                Ok(Ok(())) => Ok(()),
                Ok(Err(error)) => Err(failed(error.to_string())),
                Err(error) => Err(failed(error.to_string())),
            };
        }
        if let Some(socket) = socket
            && let Err(error) = remove_if_present(&socket)
        {
            tracing::warn!(path = %socket.display(), %error, "a client socket could not be removed");
        }
        self.actor.post(TargetInput::core(TargetEvent::Stop));
        let mut state = self.state.clone();
        if tokio::time::timeout(STOP_PATIENCE, state.wait_for(TargetState::is_final)).await.is_err() {
            tracing::warn!(volume = %self.volume_id, "the target did not stop in order; the next start reconciles");
        }
        self.abandon();
        result
    }

    async fn flush(&self) {
        let Some(device) = self.device() else { return };
        let (sender, receiver) = oneshot::channel();
        device.submit(BlockOp::Flush, Box::new(move |result| drop(sender.send(result))));
        match tokio::time::timeout(FLUSH_PATIENCE, receiver).await {
            Ok(Ok(Ok(_))) => {}
            Ok(Ok(Err(error))) => tracing::warn!(volume = %self.volume_id, %error, "the last flush failed"),
            Ok(Err(_)) | Err(_) => {
                tracing::warn!(volume = %self.volume_id, "the last flush was not answered")
            }
        }
    }

    /// Drops everything at once, as a crash does: connections close, nothing is released.
    pub fn abandon(&self) {
        self.actor.kill();
        self.runtime().stop();
    }

    fn outside(&self) -> std::sync::MutexGuard<'_, Outside> {
        self.outside.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn runtime(&self) -> std::sync::MutexGuard<'_, ThreadRuntime> {
        self.runtime.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
