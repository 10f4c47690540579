//! CreateVolume.
//!
//! 1. The record is created with every replica listed. A crash before: nothing happened.
//! 2. Each listed replica is made on its node; making one twice is one. A crash before or between: the caller repeats
//!    by name, the record is found, and this step is done again.
//! 3. Success is answered.
//!
//! A volume that is made from a snapshot takes further steps around these: [`super::clone`].
//!
//! A node that fails in step 2 is replaced by another: its replica stays listed as faulted, because it may have been
//! made after all, and DeleteVolume asks that node too.

use std::collections::{BTreeMap, HashMap, HashSet};

use futures::future::join_all;
use holdfast_proto::csi::{CreateVolumeRequest, CreateVolumeResponse, Volume};
use holdfast_proto::storage::{CreateReplicaRequest, Epoch as WireEpoch};
use holdfast_storage_core::encryption::{Encryption, EncryptionKind};
use holdfast_storage_core::ids::{
    Attachment, Epoch, Generation, Lineage, NodeName, ReplicaId, Salt, VolumeId,
};
use holdfast_storage_core::node_directory::NodeState;
use holdfast_storage_core::placement::{NodeSpace, PlacementError, PlacementRequest, place};
use holdfast_storage_core::record::{ReplicaRecord, ReplicaState, VolumeRecord};
use holdfast_storage_core::record_store::Versioned;
use holdfast_storage_core::transitions::{self, NewVolume};
use tonic::Status;

use super::Inner;
use super::clone::{CloneLayers, content_source, same_source};
use super::pools::PoolSpace;
use crate::record_copies;
use crate::status::{from_store, from_transition};
use crate::topology;
use crate::volume_request::VolumeRequest;

/// How often replicas on failing nodes are replaced within one call; then the caller is told to repeat.
const REPLACEMENT_ROUNDS_MAX: u32 = 3;
/// Nodes listed in a sentence about missing space.
const LISTED_NODES_MAX: usize = 10;

impl Inner {
    pub(super) async fn create_volume(
        &self,
        request: CreateVolumeRequest,
    ) -> Result<CreateVolumeResponse, Status> {
        let wanted = VolumeRequest::parse(&request)?;
        topology::check_requirement(request.accessibility_requirements.as_ref(), &self.book)?;
        let _by_name = self.in_flight.begin(format!("the volume named \"{}\"", wanted.name))?;
        let found = match (self.find_by_name(&wanted.name).await?, wanted.source) {
            (Some(found), _) => {
                check_same(&found.record, &wanted)?;
                found
            }
            (None, None) => self.create_record(&wanted).await?,
            (None, Some(source)) => {
                let made = self.create_clone_record(&wanted, source).await;
                // A snapshot that was cut for a try that failed is of no use to the next one.
                made.inspect_err(|_| self.sweep_soon.notify_one())?
            }
        };
        let volume_id = found.record.volume_id;
        let _by_id = self.in_flight.begin(format!("volume {volume_id}"))?;
        self.claim_source(&found.record).await?;
        let record = self.make_replicas(volume_id).await?;
        let record = self.link_source(record).await?;
        tracing::info!(volume = %volume_id, name = record.name, bytes = record.size_bytes, "volume created");
        Ok(CreateVolumeResponse { volume: Some(to_csi(&record)) })
    }

    async fn find_by_name(&self, name: &str) -> Result<Option<Versioned>, Status> {
        let all = self.store.list().await.map_err(from_store)?;
        let found = all.iter().find(|found| !found.record.is_gone() && found.record.name == name);
        Ok(found.map(|found| Versioned::clone(found)))
    }

    async fn create_record(&self, wanted: &VolumeRequest) -> Result<Versioned, Status> {
        let placing = self.placing.lock().await;
        let nodes = self.choose_nodes(&first_replicas(wanted, wanted.size_bytes)).await?;
        let record = new_record(wanted, nodes);
        // The next call chooses while this record is on its way to the disk, and counts it all the same.
        let _promised = self.promises.begin(&record);
        drop(placing);
        let version = self.store.create(record.clone()).await.map_err(from_store)?;
        Ok(Versioned { version, record })
    }

    /// Nodes for replicas.
    pub(super) async fn choose_nodes(&self, request: &PlacementRequest) -> Result<Vec<NodeName>, Status> {
        let choose = |pools: Vec<PoolSpace>| {
            let spaces = self.spaces(&pools);
            place(request, &spaces).map_err(|error| self.unplaceable(&error, request, &spaces))
        };
        // What was surveyed for another call will do where it suffices; nobody is refused on it. A holder that did not answer
        // then is worth being asked again.
        if request.holders.is_empty()
            && let Some(pools) = self.pools.surveyed_lately()
            && let Ok(nodes) = choose(self.left_of(pools).await?)
        {
            return Ok(nodes);
        }
        choose(self.free_space().await?)
    }

    /// Pools as candidates.
    pub(super) fn spaces(&self, pools: &[PoolSpace]) -> Vec<NodeSpace> {
        let space = |pool: &PoolSpace| {
            let info = self.book.get(&pool.node);
            let (zone, pool_class) = info.map_or((None, None), |info| (info.zone, info.pool_class));
            NodeSpace { name: pool.node.clone(), available_bytes: pool.available_bytes, zone, pool_class }
        };
        pools.iter().map(space).collect()
    }

    /// What each answering pool of an active node can still promise: by its own word, and not beyond what the records leave of it.
    pub(super) async fn free_space(&self) -> Result<Vec<PoolSpace>, Status> {
        let pools = self.pools.survey().await;
        self.left_of(pools).await
    }

    /// Takes off what the records promise, and what a record promises that is being written. Under `placing` nothing is
    /// missed: what was chosen before is among the promises or, taken from there, among the records, which are read later.
    async fn left_of(&self, mut pools: Vec<PoolSpace>) -> Result<Vec<PoolSpace>, Status> {
        pools.retain(|pool| self.book.state(&pool.node) == NodeState::Active);
        let coming = self.promises.all();
        let records = self.store.list().await.map_err(from_store)?;
        let mut promised: HashMap<&NodeName, u64> = HashMap::new();
        let mut promise = |node, bytes: u64| {
            let sum = promised.entry(node).or_default();
            *sum = sum.saturating_add(bytes);
        };
        let mut written: HashSet<VolumeId> = HashSet::new();
        for Versioned { record, .. } in records.iter().map(AsRef::as_ref) {
            record.replicas.values().for_each(|replica| promise(&replica.node, record.size_bytes));
            if coming.contains_key(&record.volume_id) {
                written.insert(record.volume_id);
            }
        }
        for (_, (nodes, bytes)) in coming.iter().filter(|(volume, _)| !written.contains(volume)) {
            nodes.iter().for_each(|node| promise(node, *bytes));
        }
        for pool in &mut pools {
            let taken = promised.get(&pool.node).copied().unwrap_or(0);
            let left = promisable(pool.capacity_bytes, self.overprovision_percent).saturating_sub(taken);
            pool.available_bytes = pool.available_bytes.min(left);
        }
        Ok(pools)
    }

    fn unplaceable(
        &self,
        error: &PlacementError,
        request: &PlacementRequest,
        spaces: &[NodeSpace],
    ) -> Status {
        let taken = |node: &NodeName| request.kept.contains(node) || request.excluded.contains(node);
        let of_class = |class: Option<&str>| request.rules.admits(class);
        let others: Vec<&NodeSpace> = spaces
            .iter()
            .filter(|space| !taken(&space.name) && of_class(space.pool_class.as_deref()))
            .collect();
        let mut listed: Vec<String> = others
            .iter()
            .take(LISTED_NODES_MAX)
            .map(|space| format!("{} has {} bytes free", space.name, space.available_bytes))
            .collect();
        if others.len() > LISTED_NODES_MAX {
            listed.push(format!("and {} more nodes", others.len() - LISTED_NODES_MAX));
        }
        let class = request.rules.pool_class.as_ref();
        let class = class.map_or_else(String::new, |class| format!("of pool class \"{class}\" "));
        let listed = if listed.is_empty() { "no node answers".to_owned() } else { listed.join(", ") };
        let sentence = format!("{error} ({class}{listed})");
        let known = || {
            let mut all = self.book.all();
            all.retain(|info| self.book.state(&info.name) == NodeState::Active && !taken(&info.name));
            all.iter().filter(|info| of_class(info.pool_class.as_deref())).count()
        };
        match error {
            // Nodes that are known but silent, or not yet heard of, may come back.
            PlacementError::TooFewNodes { wanted, .. }
                if self.book.is_filling() || known() >= *wanted as usize =>
            {
                Status::unavailable(sentence)
            }
            PlacementError::TooFewZones { .. } | PlacementError::NoLocalReplica(_)
                if self.book.is_filling() =>
            {
                Status::unavailable(sentence)
            }
            PlacementError::TooFewNodes { .. }
            | PlacementError::NoSpace { .. }
            | PlacementError::TooFewZones { .. }
            | PlacementError::NoLocalReplica(_) => Status::resource_exhausted(sentence),
            PlacementError::NoReplicas => Status::invalid_argument(sentence),
        }
    }

    /// Makes every listed replica that is not known to exist, replacing nodes that fail.
    async fn make_replicas(&self, volume: VolumeId) -> Result<VolumeRecord, Status> {
        for _ in 0..REPLACEMENT_ROUNDS_MAX {
            let found = self.store.read(volume).await.map_err(from_store)?;
            let record = &found.record;
            if record.deleting {
                return Err(Status::aborted(format!("volume {volume} is being deleted; repeat the call")));
            }
            if was_made(record) {
                return Ok(found.record);
            }
            let layers = self.source_replicas(record).await?;
            let failed = self.make_listed(&found, layers.as_ref()).await;
            if failed.is_empty() {
                return Ok(found.record);
            }
            self.replace(found, &failed, layers.as_ref()).await?;
        }
        Err(Status::unavailable(format!("volume {volume}: too many nodes failed in turn; repeat the call")))
    }

    /// Before a target is run that no caller asked for: its generation will say that all replicas were made, which a CreateVolume
    /// that nobody repeated did not. What is on nodes that are lost the target does without.
    pub(super) async fn make_reachable(&self, volume: VolumeId) -> Result<VolumeRecord, Status> {
        let found = self.store.read(volume).await.map_err(from_store)?;
        if was_made(&found.record) {
            return Ok(found.record);
        }
        let layers = self.source_replicas(&found.record).await?;
        let failed = self.make_listed(&found, layers.as_ref()).await;
        let record = found.record;
        let reachable = |id: &ReplicaId| record.replicas.get(id).is_some_and(|r| !self.is_lost(&r.node));
        match failed.into_iter().find(|(id, _)| reachable(id)) {
            Some((_, status)) => Err(status),
            None => Ok(record),
        }
    }

    async fn make_listed(
        &self,
        found: &Versioned,
        layers: Option<&CloneLayers>,
    ) -> BTreeMap<ReplicaId, Status> {
        let (record, copy) = (&found.record, record_copies::copy_of(found));
        let copy = copy.as_ref();
        let make = |(id, replica): (ReplicaId, ReplicaRecord)| async move {
            let member = record.in_sync.contains(&id);
            let from = layers.filter(|_| member).map(|layers| layers.by_node.get(&replica.node));
            if let Some(None) = from {
                let sentence = format!("node {} does not hold the snapshot any more", replica.node);
                return (id, Err(Status::unavailable(sentence)));
            }
            let source_replica_id = from.flatten().map(ToString::to_string).unwrap_or_default();
            let snapshot = layers.filter(|_| member).map(|layers| layers.entry.id.to_string());
            let epoch = if member { record.epoch } else { Epoch::default() };
            let request = CreateReplicaRequest {
                volume_id: record.volume_id.to_string(),
                replica_id: id.to_string(),
                lineage: record.lineage.to_string(),
                size_bytes: record.size_bytes,
                epoch: Some(WireEpoch { number: epoch.number, nonce: epoch.nonce }),
                source_replica_id,
                source_snapshot_id: snapshot.unwrap_or_default(),
                record: copy.map(record_copies::to_wire),
            };
            (id, self.pools.create_replica(&replica.node, request).await)
        };
        let listed = record.replicas.iter().filter(|(_, replica)| replica.state != ReplicaState::Faulted);
        let answers = join_all(listed.map(|(id, replica)| make((*id, replica.clone())))).await;
        answers.into_iter().filter_map(|(id, answer)| answer.err().map(|status| (id, status))).collect()
    }

    /// Lists new replicas on other nodes in place of the failed ones. Nothing was ever written to this volume, so
    /// the set may change without a target. A member of a clone needs a node that holds the snapshot; where there is none
    /// left, the new replica is listed out of sync, and the target rebuilds it.
    async fn replace(
        &self,
        found: Versioned,
        failed: &BTreeMap<ReplicaId, Status>,
        layers: Option<&CloneLayers>,
    ) -> Result<(), Status> {
        let Versioned { version, mut record } = found;
        let reasons: Vec<&str> = failed.values().map(Status::message).collect();
        let reasons = reasons.join("; ");
        tracing::warn!(volume = %record.volume_id, %reasons, "replicas could not be made; choosing other nodes");
        let _placing = self.placing.lock().await;
        let members = failed.keys().filter(|id| record.in_sync.contains(id)).count();
        let stays = |id: &ReplicaId, replica: &ReplicaRecord| {
            replica.state != ReplicaState::Faulted && !failed.contains_key(id)
        };
        let (kept, gone): (Vec<_>, Vec<_>) = record.replicas.iter().partition(|(id, r)| stays(id, r));
        let nodes_of = |replicas: Vec<(&ReplicaId, &ReplicaRecord)>| -> Vec<NodeName> {
            replicas.into_iter().map(|(_, replica)| replica.node.clone()).collect()
        };
        let request = PlacementRequest {
            replicas: u32::try_from(failed.len()).unwrap_or(u32::MAX),
            size_bytes: record.size_bytes,
            kept: nodes_of(kept),
            excluded: nodes_of(gone),
            holders: layers.map(CloneLayers::holders).unwrap_or_default(),
            rules: record.params.placement.clone(),
            ..PlacementRequest::default()
        };
        let chosen = self.choose_nodes(&request).await.map_err(|status| {
            Status::unavailable(format!(
                "volume {}: {reasons}; and no other node can take over: {}; repeat the call",
                record.volume_id,
                status.message()
            ))
        })?;
        let (mut nodes, mut others): (Vec<_>, Vec<_>) =
            chosen.into_iter().partition(|node| request.holders.contains(node));
        others.extend(nodes.split_off(members.min(nodes.len())));
        for id in failed.keys() {
            record.in_sync.remove(id);
            if let Some(replica) = record.replicas.get_mut(id) {
                replica.state = ReplicaState::Faulted;
            }
        }
        if layers.is_some() {
            list_replicas(&mut record, nodes);
            for node in others {
                record = transitions::add_replica(&record, ReplicaId(rand::random()), &node)
                    .map_err(from_transition)?;
            }
        } else {
            list_replicas(&mut record, others);
        }
        if record.in_sync.is_empty() {
            return Err(Status::unavailable(format!(
                "volume {}: {reasons}; no other node holds what it is to be made from; repeat the call",
                record.volume_id
            )));
        }
        self.store.swap(version, record).await.map_err(from_store)?;
        Ok(())
    }
}

/// It was published once, or its clone's layers are linked, so an earlier call has made all replicas. Making one anew would put
/// an empty replica in the place of a full one.
fn was_made(record: &VolumeRecord) -> bool {
    let linked = record.source.as_ref().is_some_and(|source| source.linked);
    linked || record.attachment > Attachment(0) || record.generation > Generation(0)
}

/// Bytes of a pool that may be promised.
pub(super) fn promisable(capacity_bytes: u64, percent: u32) -> u64 {
    let bytes = u128::from(capacity_bytes) * u128::from(percent) / 100;
    u64::try_from(bytes).unwrap_or(u64::MAX)
}

/// A volume as CSI answers it.
pub(super) fn to_csi(record: &VolumeRecord) -> Volume {
    Volume {
        capacity_bytes: i64::try_from(record.size_bytes).unwrap_or(i64::MAX),
        volume_id: record.volume_id.to_string(),
        content_source: content_source(record),
        ..Volume::default()
    }
}

/// The replicas of a new volume.
pub(super) fn first_replicas(wanted: &VolumeRequest, size_bytes: u64) -> PlacementRequest {
    PlacementRequest {
        replicas: wanted.params.replicas,
        size_bytes,
        prefer: wanted.prefer.clone(),
        rules: wanted.params.placement.clone(),
        ..PlacementRequest::default()
    }
}

fn new_record(wanted: &VolumeRequest, nodes: Vec<NodeName>) -> VolumeRecord {
    transitions::create(NewVolume {
        volume_id: VolumeId(rand::random()),
        name: wanted.name.clone(),
        lineage: Lineage(rand::random()),
        size_bytes: wanted.size_bytes,
        epoch_nonce: rand::random(),
        replicas: nodes.into_iter().map(|node| (ReplicaId(rand::random()), node)).collect(),
        params: wanted.params.clone(),
        encryption: match wanted.params.encryption {
            EncryptionKind::None => None,
            EncryptionKind::AesXts => Some(Encryption { salt: Salt(rand::random()), key_check: None }),
        },
        source: None,
    })
}

fn list_replicas(record: &mut VolumeRecord, nodes: Vec<NodeName>) {
    for node in nodes {
        let id = ReplicaId(rand::random());
        record.replicas.insert(id, ReplicaRecord { node, state: ReplicaState::InSync });
        record.in_sync.insert(id);
    }
}

/// A name that is used again must mean the same volume.
fn check_same(record: &VolumeRecord, wanted: &VolumeRequest) -> Result<(), Status> {
    let differs = |what: String| {
        Err(Status::already_exists(format!(
            "a volume named \"{}\" exists already ({}), but {what}",
            record.name, record.volume_id
        )))
    };
    if !wanted.range.contains(record.size_bytes) {
        return differs(format!(
            "it has {} bytes, which capacity_range does not allow (required_bytes {}, limit_bytes {})",
            record.size_bytes,
            wanted.range.required_bytes,
            wanted.range.limit_bytes.unwrap_or(0)
        ));
    }
    if !same_source(record, wanted.source) {
        return differs("it was made from something else than volume_content_source names".to_owned());
    }
    if record.params != wanted.params {
        return differs(format!("it was made with {:?} and {:?} is asked for", record.params, wanted.params));
    }
    Ok(())
}
