//! What this node's replicas know of their volumes, for whoever restores a record store that is lost (ADR 0011).

use holdfast_proto::storage as pb;
use holdfast_service::record_copies;
use holdfast_storage_core::ids::ReplicaId;
use holdfast_storage_core::record::Formatted;
use holdfast_storage_core::record_copy::RecordCopy;
use holdfast_storage_core::rescue::FoundCopy;
use holdfast_store::KeptRecord;

use super::host::ReplicaHost;
use crate::wire;

/// Copies of one answer: records of a hundred snapshots have some 50 KiB, and a client takes 4 MiB unless it is told otherwise.
pub const REPLICAS_MAX: usize = 64;

/// What [`ReplicaHost::records`] found, as it travels.
pub async fn reply(host: &ReplicaHost, kept: Vec<KeptRecord>, more: bool) -> pb::ReadRecordsReply {
    let mut replicas = Vec::new();
    for kept in kept {
        let holds_data = match &kept.copy {
            Ok(Some(copy)) if is_unformatted(copy) => holds_data(host, kept.replica_id).await,
            _ => None,
        };
        replicas.push(kept_pb(kept, holds_data));
    }
    pb::ReadRecordsReply { replicas, more }
}

/// A record that is not of this release is for whoever knows it.
fn is_unformatted(copy: &RecordCopy) -> bool {
    matches!(record_copies::read(copy), FoundCopy::Record(read) if read.record.formatted != Formatted::Yes)
}

async fn holds_data(host: &ReplicaHost, replica: ReplicaId) -> Option<bool> {
    let actor = host.get(replica)?;
    let disk = &actor.env.disk;
    let counted = holdfast_store::wait(disk, |done| disk.allocated_blocks(done)).await;
    counted.ok().map(|blocks| blocks > 0)
}

fn kept_pb(kept: KeptRecord, holds_data: Option<bool>) -> pb::KeptRecord {
    let (copy, copy_error) = match kept.copy {
        Ok(copy) => (copy, String::new()),
        Err(error) => (None, error.to_string()),
    };
    let meta = kept.meta.ok().map(|meta| pb::KnownMeta {
        lineage: meta.lineage.to_string(),
        generation: meta.generation.0,
        epoch: Some(wire::epoch_pb(meta.epoch)),
        size_bytes: meta.size_bytes,
    });
    pb::KeptRecord {
        replica_id: kept.replica_id.to_string(),
        volume_id: kept.volume_id.map(|volume| volume.to_string()).unwrap_or_default(),
        copy: copy.as_ref().map(record_copies::to_wire),
        copy_error,
        meta,
        holds_data,
    }
}
