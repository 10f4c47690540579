//! A record for the tests of this folder.

use std::collections::{BTreeSet, HashMap};

use holdfast_storage_core::ids::{Lineage, NodeName, ReplicaId, VolumeId};
use holdfast_storage_core::record::{ReplicaState, VolumeRecord};
use holdfast_storage_core::transitions::{self, NewVolume};

use crate::volume_request::{Access, parse_params};

/// A volume of three replicas, 1 to 3 on nodes a to c, all in sync, attached nowhere.
pub(super) fn mk_record() -> VolumeRecord {
    transitions::create(NewVolume {
        volume_id: VolumeId(1),
        name: "v".to_owned(),
        lineage: Lineage(1),
        size_bytes: 1 << 30,
        epoch_nonce: 1,
        replicas: (1..).map(ReplicaId).zip(["a", "b", "c"].map(mk_node)).collect(),
        params: parse_params(&HashMap::new(), &Access { block: true, fs_type: None }).unwrap(),
        encryption: None,
        source: None,
    })
}

pub(super) fn mk_node(name: &str) -> NodeName {
    NodeName(name.to_owned())
}

pub(super) fn mk_nodes(names: &[&str]) -> BTreeSet<NodeName> {
    names.iter().map(|name| mk_node(name)).collect()
}

/// Takes a replica out of the set.
pub(super) fn leave(record: &mut VolumeRecord, replica: u128, state: ReplicaState) {
    record.in_sync.remove(&ReplicaId(replica));
    record.replicas.get_mut(&ReplicaId(replica)).unwrap().state = state;
}
