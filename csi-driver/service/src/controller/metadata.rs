//! CSI SnapshotMetadata: which bytes of a snapshot hold data, and in which two snapshots of a volume differ.
//!
//! A node that holds the snapshots is asked for one range after the other; one that fails is followed by the next holder, from
//! the same place on. Tuples are ascending, none overlaps or touches another one of its message, and a call that is
//! interrupted goes on at any offset.

use std::sync::Arc;

use futures::Stream;
use holdfast_proto::csi::snapshot_metadata_server::SnapshotMetadata;
use holdfast_proto::csi::{
    BlockMetadata, BlockMetadataType, GetMetadataAllocatedRequest, GetMetadataAllocatedResponse,
    GetMetadataDeltaRequest, GetMetadataDeltaResponse,
};
use holdfast_proto::storage::{BlockRun, ReadSnapshotBlocksRequest};
use holdfast_storage_core::ids::{BLOCK_BYTES, NodeName, ReplicaId, SnapshotId};
use holdfast_storage_core::record::{SnapshotRecord, VolumeRecord};
use tokio::sync::mpsc;
use tokio_stream::StreamExt;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::{ControllerService, Inner};
use crate::volume_request::{SnapshotHandle, existing_snapshot};

/// Blocks asked for at once: 64 MiB.
const STEP_BLOCKS: u64 = 16 * 1024;
/// Tuples in one message where the caller sets no limit, and at most.
const TUPLES_MAX: usize = 4096;
/// Messages that wait for a slow reader; the walk waits at more.
const MESSAGES_MAX: usize = 4;

type Tuples = Vec<BlockMetadata>;
type Answers<T> = std::pin::Pin<Box<dyn Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl SnapshotMetadata for ControllerService {
    type GetMetadataAllocatedStream = Answers<GetMetadataAllocatedResponse>;
    type GetMetadataDeltaStream = Answers<GetMetadataDeltaResponse>;

    async fn get_metadata_allocated(
        &self,
        request: Request<GetMetadataAllocatedRequest>,
    ) -> Result<Response<Self::GetMetadataAllocatedStream>, Status> {
        let request = request.into_inner();
        let handle = existing_snapshot(&request.snapshot_id)?;
        let walk = self.inner.walk(None, handle, request.starting_offset, request.max_results).await?;
        let volume_capacity_bytes = walk.capacity_bytes();
        let answer = move |block_metadata: Tuples| GetMetadataAllocatedResponse {
            block_metadata_type: BlockMetadataType::VariableLength.into(),
            volume_capacity_bytes,
            block_metadata,
        };
        Ok(Response::new(Box::pin(walk.start(Arc::clone(&self.inner)).map(move |part| part.map(answer)))))
    }

    async fn get_metadata_delta(
        &self,
        request: Request<GetMetadataDeltaRequest>,
    ) -> Result<Response<Self::GetMetadataDeltaStream>, Status> {
        let request = request.into_inner();
        let named = |field: &str, status: Status| {
            Status::new(status.code(), format!("{field}: {}", status.message()))
        };
        let base = existing_snapshot(&request.base_snapshot_id)
            .map_err(|status| named("base_snapshot_id", status))?;
        let target = existing_snapshot(&request.target_snapshot_id)
            .map_err(|status| named("target_snapshot_id", status))?;
        let walk = self.inner.walk(Some(base), target, request.starting_offset, request.max_results).await?;
        let volume_capacity_bytes = walk.capacity_bytes();
        let answer = move |block_metadata: Tuples| GetMetadataDeltaResponse {
            block_metadata_type: BlockMetadataType::VariableLength.into(),
            volume_capacity_bytes,
            block_metadata,
        };
        Ok(Response::new(Box::pin(walk.start(Arc::clone(&self.inner)).map(move |part| part.map(answer)))))
    }
}

/// One walk over a snapshot.
struct Walk {
    handle: SnapshotHandle,
    base: Option<SnapshotId>,
    /// Who can be asked, with the replica there.
    holders: Vec<(NodeName, ReplicaId)>,
    size_bytes: u64,
    next_block: u64,
    tuples_max: usize,
}

impl Inner {
    async fn walk(
        &self,
        base: Option<SnapshotHandle>,
        target: SnapshotHandle,
        starting_offset: i64,
        max_results: i32,
    ) -> Result<Walk, Status> {
        let tuples_max = usize::try_from(max_results)
            .map_err(|_| Status::invalid_argument(format!("max_results is negative ({max_results})")))?;
        let (record, _) = self.find_snapshot(target).await?;
        let absent = || Status::not_found(format!("there is no snapshot {target}"));
        let entry = record.snapshot(target.snapshot).ok_or_else(absent)?;
        let older = match base {
            None => None,
            Some(base) => {
                self.find_snapshot(base).await?;
                Some(older(&record, base, entry)?)
            }
        };
        let start_bytes = u64::try_from(starting_offset).ok().filter(|offset| *offset <= entry.size_bytes);
        let start_bytes = start_bytes.ok_or_else(|| {
            Status::out_of_range(format!(
                "starting_offset {starting_offset} is not within the {} bytes of the snapshot",
                entry.size_bytes
            ))
        })?;
        let holds = |id: &ReplicaId| {
            entry.holders.contains(id) && older.is_none_or(|older| older.holders.contains(id))
        };
        let holders = record.replicas.iter().filter(|(id, _)| holds(id));
        Ok(Walk {
            handle: target,
            base: older.map(|older| older.id),
            holders: holders.map(|(id, replica)| (replica.node.clone(), *id)).collect(),
            size_bytes: entry.size_bytes,
            next_block: start_bytes / BLOCK_BYTES,
            tuples_max: if tuples_max == 0 { TUPLES_MAX } else { tuples_max.min(TUPLES_MAX) },
        })
    }
}

/// The base of a delta: a snapshot of the same volume that was cut before.
fn older<'a>(
    record: &'a VolumeRecord,
    base: SnapshotHandle,
    target: &SnapshotRecord,
) -> Result<&'a SnapshotRecord, Status> {
    if base.volume != record.volume_id {
        return Err(Status::invalid_argument(
            "base_snapshot_id is of another volume than target_snapshot_id",
        ));
    }
    let place = |id: SnapshotId| record.snapshots.iter().position(|snapshot| snapshot.id == id);
    match (place(base.snapshot), place(target.id)) {
        (Some(before), Some(after)) if before < after => Ok(&record.snapshots[before]),
        (Some(_), Some(_)) => {
            Err(Status::invalid_argument("base_snapshot_id was not cut before target_snapshot_id"))
        }
        _ => Err(Status::not_found(format!("base_snapshot_id: there is no snapshot {base}"))),
    }
}

impl Walk {
    fn capacity_bytes(&self) -> i64 {
        i64::try_from(self.size_bytes).unwrap_or(i64::MAX)
    }

    /// Walks in a task of its own, which ends with its reader.
    fn start(self, inner: Arc<Inner>) -> ReceiverStream<Result<Tuples, Status>> {
        let (sender, receiver) = mpsc::channel(MESSAGES_MAX);
        tokio::spawn(async move {
            if let Err(status) = self.go(&inner, &sender).await {
                // Nobody hears it only if the reader has gone.
                let _ = sender.send(Err(status)).await;
            }
        });
        ReceiverStream::new(receiver)
    }

    async fn go(
        mut self,
        inner: &Inner,
        answers: &mpsc::Sender<Result<Tuples, Status>>,
    ) -> Result<(), Status> {
        let end = self.size_bytes / BLOCK_BYTES;
        let mut tuples = Tuples::new();
        let mut sent = false;
        while self.next_block < end {
            let blocks = STEP_BLOCKS.min(end - self.next_block);
            for run in self.ask(inner, blocks).await? {
                add(&mut tuples, &run);
                while tuples.len() > self.tuples_max {
                    let rest = tuples.split_off(self.tuples_max);
                    let part = std::mem::replace(&mut tuples, rest);
                    if answers.send(Ok(part)).await.is_err() {
                        return Ok(());
                    }
                    sent = true;
                }
            }
            self.next_block += blocks;
        }
        // The last tuples; of a snapshot without any, one empty message that tells its size.
        if !tuples.is_empty() || !sent {
            let _ = answers.send(Ok(tuples)).await;
        }
        Ok(())
    }

    /// Asks one holder after the other for the next range; one that answered is asked first from then on.
    async fn ask(&mut self, inner: &Inner, blocks: u64) -> Result<Vec<BlockRun>, Status> {
        let mut failed = Vec::new();
        for index in 0..self.holders.len() {
            let (node, replica) = &self.holders[index];
            let request = ReadSnapshotBlocksRequest {
                volume_id: self.handle.volume.to_string(),
                replica_id: replica.to_string(),
                base_snapshot_id: self.base.map(|base| base.to_string()).unwrap_or_default(),
                snapshot_id: self.handle.snapshot.to_string(),
                start_block: self.next_block,
                blocks,
            };
            match inner.pools.snapshot_blocks(node, request).await {
                Ok(runs) => {
                    self.holders.swap(0, index);
                    return Ok(runs);
                }
                Err(status) => failed.push(status.message().to_owned()),
            }
        }
        Err(Status::unavailable(format!(
            "snapshot {}: no node that holds it can tell its blocks ({}); go on from the last byte received",
            self.handle,
            failed.join("; ")
        )))
    }
}

/// Adds a run; one that touches the last tuple becomes part of it.
fn add(tuples: &mut Tuples, run: &BlockRun) {
    let bytes = |blocks: u64| i64::try_from(blocks.saturating_mul(BLOCK_BYTES)).unwrap_or(i64::MAX);
    let (byte_offset, size_bytes) = (bytes(run.start_block), bytes(run.blocks));
    match tuples.last_mut() {
        Some(last) if last.byte_offset + last.size_bytes == byte_offset => last.size_bytes += size_bytes,
        _ => tuples.push(BlockMetadata { byte_offset, size_bytes }),
    }
}
