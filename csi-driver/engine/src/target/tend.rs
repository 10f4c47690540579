//! A target for a volume that nobody attaches, so that its replicas come in sync: what its own target does for an attached one.
//!
//! It gives way to whoever attaches the volume here; one that is attached elsewhere fences it. Jobs that come meanwhile are
//! done by it.

use std::sync::Arc;
use std::time::Duration;

use holdfast_storage_core::ids::VolumeId;
use holdfast_storage_core::target::ReplicaStatus;
use tokio::time::Instant;

use super::table::{VolumeJobError, Volumes};
use super::volume::Volume;

/// How often its replicas are looked at.
const LOOK_INTERVAL: Duration = Duration::from_millis(200);
/// For so long none of them may get any nearer; then the target ends. More than a session's opening takes.
const NEARER_WITHIN: Duration = Duration::from_secs(15);

impl Volumes {
    /// Runs a target until every replica that was not given up is in sync. A volume that is attached here is a success at once.
    /// Not cancel-safe: run it as a task of its own.
    ///
    /// # Errors
    /// [`VolumeJobError`]: none gets nearer any more, or the volume is being attached. What was reached stays.
    pub async fn bring_in_sync(&self, volume_id: VolumeId) -> Result<(), VolumeJobError> {
        let slot = self.slot(volume_id);
        let _gate = slot.gate().await;
        if slot.current().is_some() {
            return Ok(());
        }
        let volume = self.start_detached(volume_id).await?;
        let _over = slot.tend(Arc::clone(&volume));
        let work = async {
            volume.wait_serving(self.attach_timeout()).await?;
            until_in_sync(&volume).await
        };
        let done = tokio::select! {
            done = work => done,
            () = slot.is_wanted() => Err(VolumeJobError::Overtaken(volume_id)),
        };
        // There is no front end that could be busy.
        let _ = volume.stop().await;
        done
    }
}

async fn until_in_sync(volume: &Volume) -> Result<(), VolumeJobError> {
    let (mut reached, mut since) = (None, Instant::now());
    loop {
        if let Some(error) = volume.end() {
            return Err(error.into());
        }
        let replicas = volume.status().replicas;
        if replicas.iter().all(|replica| matches!(replica.state, "in_sync" | "faulted")) {
            return Ok(());
        }
        let now = Some(how_far(&replicas));
        if now != reached {
            (reached, since) = (now, Instant::now());
        } else if since.elapsed() >= NEARER_WITHIN {
            return Err(VolumeJobError::NoNearer(volume.volume_id));
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

/// Changes with each step that a replica takes.
fn how_far(replicas: &[ReplicaStatus]) -> Vec<(&'static str, u64)> {
    replicas.iter().map(|replica| (replica.state, replica.resync_bytes_copied)).collect()
}
