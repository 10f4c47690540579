//! The replicas of this node's pool, each opened, driven, and opened anew when its disk failed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use holdfast_storage_core::ids::{ReplicaId, SnapshotId, VolumeId};
use holdfast_storage_core::record_copy::RecordCopy;
use holdfast_storage_core::replica::{Replica, ReplicaMeta};
use holdfast_store::{KeptRecord, Pool, PoolError, Space, StoreError};
use tokio::runtime::Handle;

use crate::actor::Actor;
use crate::clock::now_ms;
use crate::pulse::Pulse;

use super::machine::{ReplicaActor, ReplicaEnv, ReplicaMachine};

/// Pause before a replica whose disk failed is opened again; doubled each time.
const REOPEN_MIN: Duration = Duration::from_millis(500);
/// Longest pause between two tries to open a failed replica; they go on while the process runs.
const REOPEN_MAX: Duration = Duration::from_secs(30);
/// How long a delete waits for the last I/O of a replica that it closed.
const CLOSE_WAIT: Duration = Duration::from_secs(5);

/// Why a replica is not there as asked.
#[derive(Debug, thiserror::Error)]
pub enum HostError {
    /// The store refused.
    #[error(transparent)]
    Pool(#[from] PoolError),
    /// The replica's disk failed while it was opened.
    #[error(transparent)]
    Disk(#[from] StoreError),
    /// The replica belongs to another volume.
    #[error("replica {replica} belongs to volume {volume}")]
    OtherVolume {
        /// The replica.
        replica: ReplicaId,
        /// Its volume.
        volume: VolumeId,
    },
    /// A worker thread ended before its work.
    #[error("the data process is stopping")]
    Stopping,
}

/// This node's replicas.
pub struct ReplicaHost {
    // None once stopped: the lock goes with the last I/O, not with the last one who holds this struct.
    pool: Mutex<Option<Pool>>,
    pulse: Pulse,
    runtime: Handle,
    me: Weak<Self>,
    state: Mutex<HostState>,
}

#[derive(Default)]
struct HostState {
    // As many as the pool holds.
    replicas: HashMap<ReplicaId, Hosted>,
    stopped: bool,
}

#[derive(Clone)]
struct Hosted {
    volume_id: VolumeId,
    disk: holdfast_store::Replica,
    actor: Arc<ReplicaActor>,
}

impl ReplicaHost {
    /// Opens every replica of the pool. One that cannot be opened is reported and left out: the others serve.
    ///
    /// # Errors
    /// The pool cannot be listed.
    pub fn open(pool: Pool, pulse: Pulse, runtime: Handle) -> Result<Arc<Self>, HostError> {
        let host = Arc::new_cyclic(|me| Self {
            pool: Mutex::new(Some(pool)),
            pulse,
            runtime,
            me: me.clone(),
            state: Mutex::default(),
        });
        for replica in host.pool()?.list()? {
            if let Err(error) = host.open_replica(replica) {
                tracing::error!(%replica, %error, "a replica cannot be opened and is not served");
            }
        }
        Ok(host)
    }

    /// A replica that is open here.
    #[must_use]
    pub fn get(&self, replica: ReplicaId) -> Option<Arc<ReplicaActor>> {
        self.lock().replicas.get(&replica).map(|hosted| Arc::clone(&hosted.actor))
    }

    /// The replicas that are open here, with their volumes.
    #[must_use]
    pub fn served(&self) -> Vec<(VolumeId, ReplicaId)> {
        self.lock().replicas.iter().map(|(replica, hosted)| (hosted.volume_id, *replica)).collect()
    }

    /// Room in the pool, by a count that may be a few seconds old.
    ///
    /// # Errors
    /// The file system does not tell.
    pub fn space(&self) -> Result<Space, HostError> {
        Ok(self.pool()?.space_lately()?)
    }

    /// What the replicas of the pool with ids above `after` know of their volumes, some of them, and whether there are more.
    /// Blocks.
    ///
    /// # Errors
    /// The pool's folder cannot be read.
    pub fn records(
        &self,
        after: Option<ReplicaId>,
        count_max: usize,
    ) -> Result<(Vec<KeptRecord>, bool), HostError> {
        Ok(self.pool()?.records(after, count_max)?)
    }

    /// Makes and opens a replica, empty or as a snapshot of another one of this pool (R30), with a copy of the record that lists
    /// it. Blocks. Idempotent.
    ///
    /// # Errors
    /// No space, no such snapshot, or a replica of that id with another volume or size.
    pub fn create(
        &self,
        meta: &ReplicaMeta,
        source: Option<(ReplicaId, SnapshotId)>,
        copy: Option<RecordCopy>,
    ) -> Result<(), HostError> {
        let replica_id = meta.replica_id;
        match source {
            None => self.pool()?.create_replica(meta)?,
            Some((source, snapshot)) => self.pool()?.create_clone(meta, source, snapshot)?,
        }
        if self.get(replica_id).is_none() {
            self.open_replica(replica_id)?;
        }
        let Some((actor, copy)) = self.get(replica_id).zip(copy) else { return Ok(()) };
        let (sender, receiver) = std::sync::mpsc::channel();
        actor.env.disk.keep_record(
            copy,
            Box::new(move |kept| {
                let _ = sender.send(kept);
            }),
        );
        receiver.recv().unwrap_or(Err(StoreError::Closed(replica_id))).map_err(HostError::Disk)
    }

    /// Closes and removes a replica. Blocks. Idempotent.
    ///
    /// # Errors
    /// It belongs to another volume, or the files cannot be removed.
    pub fn delete(&self, volume: VolumeId, replica: ReplicaId) -> Result<(), HostError> {
        let hosted = {
            let mut state = self.lock();
            if let Some(hosted) = state.replicas.get(&replica)
                && hosted.volume_id != volume
            {
                return Err(HostError::OtherVolume { replica, volume: hosted.volume_id });
            }
            state.replicas.remove(&replica)
        };
        if let Some(hosted) = hosted {
            hosted.actor.kill();
            close_and_wait(&hosted.disk);
        }
        Ok(self.pool()?.delete_replica(replica)?)
    }

    /// Stops serving and flushes every replica, so that the next start has nothing to take from tmpfs.
    pub async fn stop_in_order(&self) {
        let hosted: Vec<Hosted> = self.lock().replicas.values().cloned().collect();
        for Hosted { disk, actor, .. } in hosted {
            actor.kill();
            if let Err(error) = holdfast_store::wait(&disk, |done| disk.flush(done)).await {
                tracing::warn!(%error, "a replica could not be flushed at the stop");
            }
        }
        self.stop();
    }

    /// Stops serving: nothing more is answered. The files stay locked until the last I/O landed (R3).
    pub fn stop(&self) {
        let replicas = {
            let mut state = self.lock();
            state.stopped = true;
            std::mem::take(&mut state.replicas)
        };
        self.pool.lock().unwrap_or_else(PoisonError::into_inner).take();
        for hosted in replicas.values() {
            hosted.actor.kill();
            hosted.disk.close(Box::new(|_| ()));
        }
    }

    fn open_replica(&self, replica: ReplicaId) -> Result<(), HostError> {
        let disk = self.pool()?.open_replica(replica)?;
        let start = disk.start();
        let core = Replica::new(now_ms(), start);
        let me = self.me.clone();
        let env = ReplicaEnv {
            disk: disk.clone(),
            on_failed: Box::new(move || {
                if let Some(host) = me.upgrade() {
                    host.on_failed(replica);
                }
            }),
        };
        let actor = Actor::new(ReplicaMachine::new(core), env, self.pulse.clone());
        let hosted = Hosted { volume_id: disk.volume_id(), disk, actor };
        let mut state = self.lock();
        if !state.stopped {
            state.replicas.insert(replica, hosted);
        }
        Ok(())
    }

    /// A failed write or flush poisons the handle: only opening anew tells what is on the disk.
    fn on_failed(&self, replica: ReplicaId) {
        tracing::error!(%replica, "a replica's disk failed; it is closed and opened anew");
        let Some(hosted) = self.lock().replicas.remove(&replica) else { return };
        hosted.actor.kill();
        let me = self.me.clone();
        self.runtime.spawn(async move {
            let disk = hosted.disk;
            drop(hosted.actor);
            let _ = holdfast_store::wait(&disk, |done| disk.close(done)).await;
            drop(disk);
            let mut pause = REOPEN_MIN;
            loop {
                tokio::time::sleep(pause).await;
                pause = (pause * 2).min(REOPEN_MAX);
                let Some(host) = me.upgrade().filter(|host| !host.lock().stopped) else { return };
                let opened = tokio::task::spawn_blocking(move || host.open_replica(replica)).await;
                match opened {
                    Ok(Ok(())) => {
                        tracing::info!(%replica, "the replica is open again");
                        return;
                    }
                    Ok(Err(error)) => tracing::warn!(%replica, %error, "the replica cannot be opened yet"),
                    Err(_) => return,
                }
            }
        });
    }

    fn pool(&self) -> Result<Pool, HostError> {
        self.pool.lock().unwrap_or_else(PoisonError::into_inner).clone().ok_or(HostError::Stopping)
    }

    fn lock(&self) -> MutexGuard<'_, HostState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn close_and_wait(disk: &holdfast_store::Replica) {
    let (sender, receiver) = std::sync::mpsc::channel::<()>();
    disk.close(Box::new(move |_| drop(sender)));
    // The closing callback drops the sender; a disk that hangs longer fails the delete, which is repeated.
    let _ = receiver.recv_timeout(CLOSE_WAIT);
}
