//! The volume jobs of a fake data process: the record's own transitions, without any data.

use std::sync::Arc;

use holdfast_proto::storage::volume_jobs_server::VolumeJobs;
use holdfast_proto::storage::*;
use holdfast_storage_core::ids::{NodeName, ReplicaId, TargetId, VolumeId};
use holdfast_storage_core::record::{ReplicaState, VolumeRecord};
use holdfast_storage_core::record_store::{RecordStore, StoreError};
use holdfast_storage_core::transitions::{self, TransitionError};
use tonic::{Request, Response, Status};

use super::fakes::{FakePool, Fate};

impl FakePool {
    fn store(&self) -> Arc<dyn RecordStore> {
        self.store.clone().unwrap()
    }

    async fn read(&self, volume: VolumeId) -> Result<VolumeRecord, Status> {
        match self.store().read(volume).await {
            Ok(found) => Ok(found.record),
            Err(error) => Err(Status::failed_precondition(error.to_string())),
        }
    }

    /// The source of a new replica must be there, and hold the snapshot by the record.
    pub async fn check_source(&self, request: &CreateReplicaRequest) -> Result<(), Status> {
        let replica = request.source_replica_id.parse().unwrap();
        let snapshot = request.source_snapshot_id.parse().unwrap();
        let all = self.store().list().await.unwrap();
        let holds = all.iter().any(|found| found.record.held_by(replica).contains(&snapshot));
        if holds && self.replicas().contains_key(&request.source_replica_id) {
            return Ok(());
        }
        Err(Status::not_found(format!("replica {replica} has no snapshot {snapshot}")))
    }

    async fn swap(
        &self,
        volume: VolumeId,
        change: impl Fn(&VolumeRecord) -> Result<VolumeRecord, TransitionError>,
    ) -> Result<VolumeRecord, Status> {
        loop {
            let found = self.store().read(volume).await;
            let found = found.map_err(|error| Status::failed_precondition(error.to_string()))?;
            let refused = |error: TransitionError| Status::failed_precondition(error.to_string());
            let record = change(&found.record).map_err(refused)?;
            match self.store().swap(found.version, record.clone()).await {
                Ok(_) => return Ok(record),
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(Status::unavailable(error.to_string())),
            }
        }
    }

    /// A start of a target, here.
    async fn own(&self, volume: VolumeId) -> Result<TargetId, Status> {
        let target = TargetId(rand::random());
        let here = NodeName(self.node.to_owned());
        self.swap(volume, |record| match record.attached_to {
            None => transitions::take_detached_generation(record, target),
            Some(_) => transitions::take_generation(record, &here, record.attachment, target),
        })
        .await
        .map(|_| target)
    }

    async fn run<T>(
        &self,
        done: T,
        work: impl Future<Output = Result<(), Status>>,
    ) -> Result<Response<T>, Status> {
        let fate = self.state.lock().unwrap().cut.next();
        match fate {
            Fate::Nothing => Err(Status::unavailable("cut")),
            Fate::Normal => work.await.map(|()| Response::new(done)),
            Fate::AnswerLost => {
                let _ = work.await;
                Err(Status::unavailable("cut"))
            }
        }
    }

    async fn cut_snapshot(&self, volume: &str, snapshot: &str) -> Result<(), Status> {
        let (volume, snapshot) = (volume.parse().unwrap(), snapshot.parse().unwrap());
        if self.read(volume).await?.committed().any(|s| s.id == snapshot) {
            return Ok(());
        }
        let target = self.own(volume).await?;
        self.swap(volume, |record| transitions::begin_cut(record, target, snapshot)).await?;
        self.swap(volume, |record| transitions::commit_cut(record, target, snapshot, &record.in_sync))
            .await?;
        let meanwhile = self.state.lock().unwrap().during_cut.clone();
        if let Some(meanwhile) = meanwhile {
            meanwhile().await;
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl VolumeJobs for FakePool {
    async fn create_snapshot(
        &self,
        request: Request<CreateSnapshotRequest>,
    ) -> Result<Response<CreateSnapshotReply>, Status> {
        let request = request.into_inner();
        self.run(CreateSnapshotReply {}, self.cut_snapshot(&request.volume_id, &request.snapshot_id)).await
    }

    async fn delete_snapshot(
        &self,
        request: Request<DeleteSnapshotRequest>,
    ) -> Result<Response<DeleteSnapshotReply>, Status> {
        let request = request.into_inner();
        let (volume, snapshot) = (request.volume_id.parse().unwrap(), request.snapshot_id.parse().unwrap());
        let work = async {
            let target = self.own(volume).await?;
            self.swap(volume, |record| transitions::delete_snapshot(record, target, snapshot)).await.map(drop)
        };
        self.run(DeleteSnapshotReply {}, work).await
    }

    async fn grow_volume(
        &self,
        request: Request<GrowVolumeRequest>,
    ) -> Result<Response<GrowVolumeReply>, Status> {
        let request = request.into_inner();
        let volume = request.volume_id.parse().unwrap();
        let work = async {
            let target = self.own(volume).await?;
            self.swap(volume, |record| transitions::grow(record, target, request.size_bytes)).await.map(drop)
        };
        self.run(GrowVolumeReply {}, work).await
    }

    async fn remove_replica(
        &self,
        request: Request<RemoveReplicaRequest>,
    ) -> Result<Response<RemoveReplicaReply>, Status> {
        let request = request.into_inner();
        let (volume, replica) = (request.volume_id.parse().unwrap(), request.replica_id.parse().unwrap());
        let work = async {
            let target = self.own(volume).await?;
            let nonce = rand::random();
            let out = |record: &VolumeRecord| transitions::remove_member(record, target, replica, nonce);
            self.swap(volume, out).await.map(drop)
        };
        self.run(RemoveReplicaReply {}, work).await
    }

    /// Members whose nodes do not answer leave, and who is out of sync and answers joins.
    async fn bring_in_sync(
        &self,
        request: Request<BringInSyncRequest>,
    ) -> Result<Response<BringInSyncReply>, Status> {
        let volume = request.into_inner().volume_id.parse().unwrap();
        let work = async {
            let record = self.read(volume).await?;
            let alive: Vec<NodeName> = self.book.alive().into_iter().map(|info| info.name).collect();
            let answers = |id: &ReplicaId| alive.contains(&record.replicas[id].node);
            let target = self.own(volume).await?;
            let silent: Vec<ReplicaId> = record.in_sync.iter().filter(|id| !answers(id)).copied().collect();
            if !silent.is_empty() {
                self.swap(volume, |record| transitions::swap_out(record, target, &silent, 1)).await?;
            }
            for (id, replica) in &record.replicas {
                let back = matches!(replica.state, ReplicaState::Offline { .. }) && answers(id);
                if back {
                    self.swap(volume, |record| transitions::join(record, target, *id, 1)).await?;
                }
            }
            Ok(())
        };
        self.run(BringInSyncReply {}, work).await
    }

    async fn apply_params(
        &self,
        request: Request<ApplyParamsRequest>,
    ) -> Result<Response<ApplyParamsReply>, Status> {
        let volume = request.into_inner().volume_id;
        let work = async {
            self.state.lock().unwrap().applied.push(volume);
            Ok(())
        };
        self.run(ApplyParamsReply {}, work).await
    }

    async fn hold_writes(
        &self,
        request: Request<HoldWritesRequest>,
    ) -> Result<Response<HoldWritesReply>, Status> {
        let request = request.into_inner();
        let work = async {
            let record = self.read(request.volume_id.parse().unwrap()).await?;
            if record.attached_to.is_none_or(|node| node.0 != self.node) {
                return Err(Status::failed_precondition("not attached here"));
            }
            self.state.lock().unwrap().holds.insert(request.volume_id, request.snapshot_id);
            Ok(())
        };
        self.run(HoldWritesReply {}, work).await
    }

    async fn cut_held(&self, request: Request<CutHeldRequest>) -> Result<Response<CutHeldReply>, Status> {
        let request = request.into_inner();
        let work = async {
            let held = self.state.lock().unwrap().holds.remove(&request.volume_id);
            if held.as_ref() != Some(&request.snapshot_id) {
                return Err(Status::failed_precondition("the hold is over"));
            }
            self.cut_snapshot(&request.volume_id, &request.snapshot_id).await
        };
        self.run(CutHeldReply {}, work).await
    }

    async fn release_held(
        &self,
        request: Request<ReleaseHeldRequest>,
    ) -> Result<Response<ReleaseHeldReply>, Status> {
        self.state.lock().unwrap().holds.remove(&request.into_inner().volume_id);
        self.run(ReleaseHeldReply {}, async { Ok(()) }).await
    }
}
