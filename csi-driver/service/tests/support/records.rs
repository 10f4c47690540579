//! Records for tests.

use std::collections::{BTreeMap, BTreeSet};

use holdfast_storage_core::ids::{Attachment, Epoch, Generation, Lineage, NodeName, ReplicaId, VolumeId};
use holdfast_storage_core::record::{
    Formatted, RECORD_FORMAT, ReplicaRecord, ReplicaState, VolumeParams, VolumeRecord,
};

/// A record of an unpublished volume with one replica on each node.
pub fn mk_record(id: u128, name: &str, nodes: &[&str]) -> VolumeRecord {
    let mut replicas = BTreeMap::new();
    for (number, node) in (1_u128..).zip(nodes) {
        let replica = ReplicaRecord { node: NodeName((*node).to_owned()), state: ReplicaState::InSync };
        replicas.insert(ReplicaId(id << 64 | number), replica);
    }
    let in_sync: BTreeSet<ReplicaId> = replicas.keys().copied().collect();
    VolumeRecord {
        format: RECORD_FORMAT,
        volume_id: VolumeId(id),
        name: name.to_owned(),
        lineage: Lineage(id + 1),
        size_bytes: 64 << 20,
        attachment: Attachment(0),
        attached_to: None,
        read_only: false,
        generation: Generation(0),
        generation_attachment: Attachment(0),
        target_id: None,
        epoch: Epoch { number: 1, nonce: 42 },
        params: VolumeParams {
            limits: holdfast_storage_core::io_limits::IoLimits { iops: 0, bytes_per_s: 1 << 40 },
            ..VolumeParams::new(u32::try_from(nodes.len()).unwrap(), "ext4")
        },
        in_sync,
        replicas,
        snapshots: Vec::new(),
        requested: Vec::new(),
        retired: false,
        source: None,
        restored: false,
        promoted: None,
        formatted: Formatted::Never,
        encryption: None,
        deleting: false,
    }
}
