//! The record as the object holds it, and back. Nothing is left out on either way: a field that is added to the record
//! does not compile until it is here.

use holdfast_storage_core::background::Background;
use holdfast_storage_core::encryption::{Encryption, EncryptionKind};
use holdfast_storage_core::ids::{Attachment, Epoch, Generation, NodeName, RecordVersion};
use holdfast_storage_core::io_limits::IoLimits;
use holdfast_storage_core::placement::{LocalReplica, PlacementRules, ZoneRule};
use holdfast_storage_core::record::{
    CloneSource, Formatted, FrontEndChoice, Promotion, RECORD_FORMAT, ReplicaRecord, ReplicaState,
    RequestedSnapshot, SnapshotRecord, SnapshotState, VolumeParams, VolumeRecord,
};
use holdfast_storage_core::record_store::{StoreError, Versioned};

use super::objects::{
    BackgroundSpec, EncryptionKindSpec, EncryptionSpec, EpochSpec, FormattedSpec, FrontEndSpec, LimitsSpec,
    LocalReplicaSpec, ParamsSpec, PlacementSpec, PromotionSpec, ReplicaSpec, ReplicaStateSpec, RequestedSpec,
    SWAP_IDS, SnapshotSpec, SourceSpec, VolumeRecordSpec, ZoneRuleSpec,
};

/// The object's spec of a record, as a new change after the `earlier` ones (oldest first). `version` 0 is a record whose name
/// is still being reserved.
pub(super) fn to_spec(
    version: RecordVersion,
    record: &VolumeRecord,
    earlier: &[String],
) -> Result<VolumeRecordSpec, StoreError> {
    let VolumeRecord {
        format,
        volume_id,
        name,
        lineage,
        size_bytes,
        attachment,
        attached_to,
        read_only,
        generation,
        generation_attachment,
        target_id,
        epoch,
        in_sync,
        replicas,
        snapshots,
        requested,
        retired,
        source,
        restored,
        promoted,
        formatted,
        encryption,
        deleting,
        params,
    } = record;
    let replica_specs = replicas
        .iter()
        .map(|(id, replica)| Ok((id.to_string(), replica_to_spec(replica)?)))
        .collect::<Result<_, _>>()?;
    Ok(VolumeRecordSpec {
        version: number("version", version.0)?,
        swap_ids: earlier[earlier.len().saturating_sub(SWAP_IDS - 1)..]
            .iter()
            .cloned()
            .chain([new_swap_id()])
            .collect(),
        pending: version.0 == 0,
        format: i64::from(*format),
        volume_id: volume_id.to_string(),
        name: name.clone(),
        lineage: lineage.to_string(),
        size_bytes: number("size_bytes", *size_bytes)?,
        attachment: number("attachment", attachment.0)?,
        attached_to: attached_to.as_ref().map(|node| node.0.clone()),
        read_only: *read_only,
        generation: number("generation", generation.0)?,
        generation_attachment: number("generation_attachment", generation_attachment.0)?,
        target_id: target_id.map(|id| id.to_string()),
        epoch: epoch_to_spec(*epoch)?,
        in_sync: in_sync.iter().map(ToString::to_string).collect(),
        replicas: replica_specs,
        snapshots: snapshots.iter().map(snapshot_to_spec).collect::<Result<_, _>>()?,
        requested: requested.iter().map(requested_to_spec).collect::<Result<_, _>>()?,
        retired: *retired,
        source: source.as_ref().map(source_to_spec),
        restored: *restored,
        promoted: promoted.map(|Promotion { replica, from }| PromotionSpec {
            replica: replica.to_string(),
            from: from.to_string(),
        }),
        formatted: formatted_to_spec(*formatted),
        encryption: encryption.map(encryption_to_spec),
        deleting: *deleting,
        params: params_to_spec(params)?,
    })
}

/// The record in an object's spec.
pub(super) fn from_spec(spec: &VolumeRecordSpec) -> Result<Versioned, StoreError> {
    // Looked at first: what follows is this format's shape.
    if spec.format > i64::from(RECORD_FORMAT) {
        return Err(StoreError::Refused(format!(
            "the record of volume {} has format {}, this program knows up to {RECORD_FORMAT}: use the newer program",
            spec.volume_id, spec.format
        )));
    }
    let record = VolumeRecord {
        format: small("format", spec.format)?,
        volume_id: id("volumeId", &spec.volume_id)?,
        name: spec.name.clone(),
        lineage: id("lineage", &spec.lineage)?,
        size_bytes: counter("sizeBytes", spec.size_bytes)?,
        attachment: Attachment(counter("attachment", spec.attachment)?),
        attached_to: spec.attached_to.clone().map(NodeName),
        read_only: spec.read_only,
        generation: Generation(counter("generation", spec.generation)?),
        generation_attachment: Attachment(counter("generationAttachment", spec.generation_attachment)?),
        target_id: spec.target_id.as_deref().map(|text| id("targetId", text)).transpose()?,
        epoch: epoch_from_spec(&spec.epoch)?,
        in_sync: ids("inSync", &spec.in_sync)?,
        replicas: spec
            .replicas
            .iter()
            .map(|(key, replica)| Ok((id("replicas", key)?, replica_from_spec(replica)?)))
            .collect::<Result<_, _>>()?,
        snapshots: spec.snapshots.iter().map(snapshot_from_spec).collect::<Result<_, _>>()?,
        requested: spec.requested.iter().map(requested_from_spec).collect::<Result<_, _>>()?,
        retired: spec.retired,
        source: spec.source.as_ref().map(source_from_spec).transpose()?,
        restored: spec.restored,
        promoted: spec.promoted.as_ref().map(promotion_from_spec).transpose()?,
        formatted: formatted_from_spec(spec.formatted),
        encryption: spec.encryption.as_ref().map(encryption_from_spec).transpose()?,
        deleting: spec.deleting,
        params: params_from_spec(&spec.params)?,
    };
    Ok(Versioned { version: RecordVersion(counter("version", spec.version)?), record })
}

fn new_swap_id() -> String {
    format!("{:032x}", rand::random::<u128>())
}

fn replica_to_spec(replica: &ReplicaRecord) -> Result<ReplicaSpec, StoreError> {
    let ReplicaRecord { node, state } = replica;
    let (state, left_epoch) = match state {
        ReplicaState::InSync => (ReplicaStateSpec::InSync, None),
        ReplicaState::Offline { left_epoch } => {
            (ReplicaStateSpec::Offline, Some(epoch_to_spec(*left_epoch)?))
        }
        ReplicaState::Faulted => (ReplicaStateSpec::Faulted, None),
    };
    Ok(ReplicaSpec { node: node.0.clone(), state, left_epoch })
}

fn replica_from_spec(spec: &ReplicaSpec) -> Result<ReplicaRecord, StoreError> {
    let state = match (spec.state, &spec.left_epoch) {
        (ReplicaStateSpec::InSync, _) => ReplicaState::InSync,
        (ReplicaStateSpec::Faulted, _) => ReplicaState::Faulted,
        (ReplicaStateSpec::Offline, Some(epoch)) => {
            ReplicaState::Offline { left_epoch: epoch_from_spec(epoch)? }
        }
        (ReplicaStateSpec::Offline, None) => {
            return Err(unreadable("replicas: one is Offline without leftEpoch"));
        }
    };
    Ok(ReplicaRecord { node: NodeName(spec.node.clone()), state })
}

fn snapshot_to_spec(snapshot: &SnapshotRecord) -> Result<SnapshotSpec, StoreError> {
    let SnapshotRecord { id, state, size_bytes, holders, clones, formatted } = snapshot;
    Ok(SnapshotSpec {
        id: id.to_string(),
        cutting_generation: match state {
            SnapshotState::Cutting { generation } => Some(number("cutting generation", generation.0)?),
            SnapshotState::Committed => None,
        },
        size_bytes: number("snapshot size_bytes", *size_bytes)?,
        holders: holders.iter().map(ToString::to_string).collect(),
        clones: clones.iter().map(ToString::to_string).collect(),
        formatted: formatted_to_spec(*formatted),
    })
}

fn snapshot_from_spec(spec: &SnapshotSpec) -> Result<SnapshotRecord, StoreError> {
    Ok(SnapshotRecord {
        id: id("snapshots", &spec.id)?,
        state: match spec.cutting_generation {
            Some(generation) => {
                SnapshotState::Cutting { generation: Generation(counter("cuttingGeneration", generation)?) }
            }
            None => SnapshotState::Committed,
        },
        size_bytes: counter("snapshots.sizeBytes", spec.size_bytes)?,
        holders: ids("holders", &spec.holders)?,
        clones: ids("clones", &spec.clones)?,
        formatted: formatted_from_spec(spec.formatted),
    })
}

fn requested_to_spec(request: &RequestedSnapshot) -> Result<RequestedSpec, StoreError> {
    let RequestedSnapshot { id, name, asked_unix_ms, for_clone } = request;
    Ok(RequestedSpec {
        id: id.to_string(),
        name: name.clone(),
        asked_unix_ms: number("asked_unix_ms", *asked_unix_ms)?,
        for_clone: for_clone.map(|volume| volume.to_string()),
    })
}

fn requested_from_spec(spec: &RequestedSpec) -> Result<RequestedSnapshot, StoreError> {
    Ok(RequestedSnapshot {
        id: id("requested.id", &spec.id)?,
        name: spec.name.clone(),
        asked_unix_ms: counter("requested.askedUnixMs", spec.asked_unix_ms)?,
        for_clone: spec.for_clone.as_deref().map(|text| id("requested.forClone", text)).transpose()?,
    })
}

fn source_to_spec(source: &CloneSource) -> SourceSpec {
    let CloneSource { volume, snapshot, of_volume, linked } = source;
    SourceSpec {
        volume: volume.to_string(),
        snapshot: snapshot.to_string(),
        of_volume: *of_volume,
        linked: *linked,
    }
}

fn params_to_spec(params: &VolumeParams) -> Result<ParamsSpec, StoreError> {
    let VolumeParams { replicas, fs_type, min_in_sync, limits, background, placement, front_end, encryption } =
        params;
    let IoLimits { iops, bytes_per_s } = limits;
    let Background { scrub_interval_s, resync_bytes_per_s } = background;
    let seconds = |seconds: u64| number("params.background.scrub_interval_s", seconds);
    Ok(ParamsSpec {
        replicas: i64::from(*replicas),
        fs_type: fs_type.clone(),
        min_in_sync: i64::from(*min_in_sync),
        limits: LimitsSpec {
            iops: number("params.limits.iops", *iops)?,
            bytes_per_s: number("params.limits.bytes_per_s", *bytes_per_s)?,
        },
        background: BackgroundSpec {
            scrub_interval_s: scrub_interval_s.map(seconds).transpose()?,
            resync_bytes_per_s: number("params.background.resync_bytes_per_s", *resync_bytes_per_s)?,
        },
        placement: placement_to_spec(placement),
        front_end: match front_end {
            FrontEndChoice::Auto => FrontEndSpec::Auto,
            FrontEndChoice::FuseLoop => FrontEndSpec::FuseLoop,
        },
        encryption: match encryption {
            EncryptionKind::None => EncryptionKindSpec::None,
            EncryptionKind::AesXts => EncryptionKindSpec::AesXts,
        },
    })
}

fn params_from_spec(spec: &ParamsSpec) -> Result<VolumeParams, StoreError> {
    let seconds = |seconds: i64| counter("params.background.scrubIntervalS", seconds);
    Ok(VolumeParams {
        replicas: small("params.replicas", spec.replicas)?,
        fs_type: spec.fs_type.clone(),
        min_in_sync: small("params.minInSync", spec.min_in_sync)?,
        limits: IoLimits {
            iops: counter("params.limits.iops", spec.limits.iops)?,
            bytes_per_s: counter("params.limits.bytesPerS", spec.limits.bytes_per_s)?,
        },
        background: Background {
            scrub_interval_s: spec.background.scrub_interval_s.map(seconds).transpose()?,
            resync_bytes_per_s: counter(
                "params.background.resyncBytesPerS",
                spec.background.resync_bytes_per_s,
            )?,
        },
        placement: placement_from_spec(&spec.placement),
        front_end: match spec.front_end {
            FrontEndSpec::Auto => FrontEndChoice::Auto,
            FrontEndSpec::FuseLoop => FrontEndChoice::FuseLoop,
        },
        encryption: match spec.encryption {
            EncryptionKindSpec::None => EncryptionKind::None,
            EncryptionKindSpec::AesXts => EncryptionKind::AesXts,
        },
    })
}

fn encryption_to_spec(encryption: Encryption) -> EncryptionSpec {
    let Encryption { salt, key_check } = encryption;
    EncryptionSpec { salt: salt.to_string(), key_check: key_check.map(|check| check.to_string()) }
}

fn encryption_from_spec(spec: &EncryptionSpec) -> Result<Encryption, StoreError> {
    Ok(Encryption {
        salt: id("encryption.salt", &spec.salt)?,
        key_check: spec.key_check.as_deref().map(|text| id("encryption.keyCheck", text)).transpose()?,
    })
}

fn placement_to_spec(rules: &PlacementRules) -> PlacementSpec {
    let PlacementRules { zones, local_replica, pool_class } = rules;
    PlacementSpec {
        zones: match zones {
            ZoneRule::Preferred => ZoneRuleSpec::Preferred,
            ZoneRule::Required => ZoneRuleSpec::Required,
        },
        local_replica: match local_replica {
            LocalReplica::Preferred => LocalReplicaSpec::Preferred,
            LocalReplica::Required => LocalReplicaSpec::Required,
            LocalReplica::None => LocalReplicaSpec::None,
        },
        pool_class: pool_class.clone(),
    }
}

fn placement_from_spec(spec: &PlacementSpec) -> PlacementRules {
    PlacementRules {
        zones: match spec.zones {
            ZoneRuleSpec::Preferred => ZoneRule::Preferred,
            ZoneRuleSpec::Required => ZoneRule::Required,
        },
        local_replica: match spec.local_replica {
            LocalReplicaSpec::Preferred => LocalReplica::Preferred,
            LocalReplicaSpec::Required => LocalReplica::Required,
            LocalReplicaSpec::None => LocalReplica::None,
        },
        pool_class: spec.pool_class.clone(),
    }
}

fn source_from_spec(spec: &SourceSpec) -> Result<CloneSource, StoreError> {
    Ok(CloneSource {
        volume: id("source.volume", &spec.volume)?,
        snapshot: id("source.snapshot", &spec.snapshot)?,
        of_volume: spec.of_volume,
        linked: spec.linked,
    })
}

fn formatted_to_spec(formatted: Formatted) -> FormattedSpec {
    match formatted {
        Formatted::Never => FormattedSpec::Never,
        Formatted::Formatting => FormattedSpec::Formatting,
        Formatted::Yes => FormattedSpec::Yes,
    }
}

fn formatted_from_spec(spec: FormattedSpec) -> Formatted {
    match spec {
        FormattedSpec::Never => Formatted::Never,
        FormattedSpec::Formatting => Formatted::Formatting,
        FormattedSpec::Yes => Formatted::Yes,
    }
}

fn promotion_from_spec(spec: &PromotionSpec) -> Result<Promotion, StoreError> {
    Ok(Promotion { replica: id("promoted.replica", &spec.replica)?, from: id("promoted.from", &spec.from)? })
}

fn epoch_to_spec(epoch: Epoch) -> Result<EpochSpec, StoreError> {
    Ok(EpochSpec { number: number("epoch", epoch.number)?, nonce: format!("{:016x}", epoch.nonce) })
}

fn epoch_from_spec(spec: &EpochSpec) -> Result<Epoch, StoreError> {
    let nonce =
        u64::from_str_radix(&spec.nonce, 16).map_err(|_| unreadable("epoch.nonce is not hexadecimal"))?;
    Ok(Epoch { number: counter("epoch.number", spec.number)?, nonce })
}

/// Kubernetes' integers end at 63 bits, which no counter and no volume reaches.
pub(super) fn number(field: &str, value: u64) -> Result<i64, StoreError> {
    i64::try_from(value).map_err(|_| {
        StoreError::Refused(format!("{field} is {value}; Kubernetes keeps numbers below 2^63 only"))
    })
}

pub(super) fn counter(field: &str, value: i64) -> Result<u64, StoreError> {
    u64::try_from(value).map_err(|_| unreadable(&format!("{field} is negative")))
}

pub(super) fn small(field: &str, value: i64) -> Result<u32, StoreError> {
    u32::try_from(value).map_err(|_| unreadable(&format!("{field} is {value}, out of range")))
}

pub(super) fn id<T: std::str::FromStr>(field: &str, text: &str) -> Result<T, StoreError> {
    text.parse().map_err(|_| unreadable(&format!("{field}: \"{text}\" is no id")))
}

fn ids<T: std::str::FromStr + Ord>(
    field: &str,
    texts: &[String],
) -> Result<std::collections::BTreeSet<T>, StoreError> {
    texts.iter().map(|text| id(field, text)).collect()
}

fn unreadable(what: &str) -> StoreError {
    StoreError::Refused(format!("a stored record cannot be read: {what}; restore it from a backup"))
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use holdfast_storage_core::ids::{KeyCheck, Lineage, ReplicaId, Salt, SnapshotId, TargetId, VolumeId};

    use super::*;

    fn mk_params() -> VolumeParams {
        VolumeParams {
            replicas: 3,
            fs_type: "xfs".to_owned(),
            min_in_sync: 2,
            limits: IoLimits { iops: 500, bytes_per_s: 1 << 30 },
            background: Background { scrub_interval_s: Some(3_600), resync_bytes_per_s: 1 << 20 },
            placement: PlacementRules {
                zones: ZoneRule::Required,
                local_replica: LocalReplica::None,
                pool_class: Some("fast".to_owned()),
            },
            front_end: FrontEndChoice::FuseLoop,
            encryption: EncryptionKind::AesXts,
        }
    }

    fn mk_record() -> VolumeRecord {
        let left_epoch = Epoch { number: 6, nonce: u64::MAX - 1 };
        let replica = |node: &str, state| ReplicaRecord { node: NodeName(node.to_owned()), state };
        VolumeRecord {
            format: RECORD_FORMAT,
            volume_id: VolumeId(u128::MAX),
            name: "pvc".to_owned(),
            lineage: Lineage(3),
            size_bytes: 1 << 40,
            attachment: Attachment(4),
            attached_to: Some(NodeName("node-a".to_owned())),
            read_only: true,
            generation: Generation(5),
            generation_attachment: Attachment(3),
            target_id: Some(TargetId(9)),
            epoch: Epoch { number: 7, nonce: u64::MAX },
            in_sync: BTreeSet::from([ReplicaId(1)]),
            replicas: BTreeMap::from([
                (ReplicaId(1), replica("node-a", ReplicaState::InSync)),
                (ReplicaId(2), replica("node-b", ReplicaState::Offline { left_epoch })),
                (ReplicaId(3), replica("node-c", ReplicaState::Faulted)),
            ]),
            snapshots: vec![
                SnapshotRecord {
                    id: SnapshotId(11),
                    state: SnapshotState::Committed,
                    size_bytes: 1 << 30,
                    holders: BTreeSet::from([ReplicaId(1), ReplicaId(2)]),
                    clones: BTreeSet::from([VolumeId(12)]),
                    formatted: Formatted::Never,
                },
                SnapshotRecord {
                    id: SnapshotId(13),
                    state: SnapshotState::Cutting { generation: Generation(5) },
                    size_bytes: 1 << 30,
                    holders: BTreeSet::new(),
                    clones: BTreeSet::new(),
                    formatted: Formatted::Yes,
                },
            ],
            requested: vec![RequestedSnapshot {
                id: SnapshotId(11),
                name: "snap".to_owned(),
                asked_unix_ms: 1_800_000_000_000,
                for_clone: Some(VolumeId(12)),
            }],
            retired: true,
            source: Some(CloneSource {
                volume: VolumeId(21),
                snapshot: SnapshotId(22),
                of_volume: true,
                linked: false,
            }),
            restored: true,
            promoted: Some(Promotion { replica: ReplicaId(1), from: Lineage(2) }),
            formatted: Formatted::Formatting,
            encryption: Some(Encryption { salt: Salt(1), key_check: Some(KeyCheck(u128::MAX)) }),
            deleting: false,
            params: mk_params(),
        }
    }

    #[test]
    fn a_record_comes_back_as_it_was_through_json() {
        let record = mk_record();
        let spec = to_spec(RecordVersion(8), &record, &[]).unwrap();
        // The API server keeps numbers as 64-bit integers with a sign, or else rounds them.
        let json = serde_json::to_value(&spec).unwrap();
        assert!(numbers(&json).all(|number| number.is_i64()), "{json}");
        let back = from_spec(&serde_json::from_value(json).unwrap()).unwrap();
        assert_eq!(back, Versioned { version: RecordVersion(8), record });
    }

    #[test]
    fn what_kubernetes_would_round_is_refused_and_what_is_newer_is_not_read() {
        let record = VolumeRecord { size_bytes: 1 << 63, ..mk_record() };
        assert!(matches!(to_spec(RecordVersion(1), &record, &[]), Err(StoreError::Refused(_))));
        let mut spec = to_spec(RecordVersion(1), &mk_record(), &[]).unwrap();
        spec.format += 1;
        assert!(matches!(from_spec(&spec), Err(StoreError::Refused(why)) if why.contains("newer program")));
    }

    #[test]
    fn a_change_signs_itself_and_keeps_the_signs_of_the_last_ones() {
        let mut earlier = Vec::new();
        for _ in 0..2 * SWAP_IDS {
            let spec = to_spec(RecordVersion(1), &mk_record(), &earlier).unwrap();
            let kept = earlier.len().min(SWAP_IDS - 1);
            assert_eq!(spec.swap_ids[..kept], earlier[earlier.len() - kept..]);
            assert_eq!(spec.swap_ids.len(), kept + 1);
            earlier = spec.swap_ids;
        }
    }

    fn numbers(json: &serde_json::Value) -> Box<dyn Iterator<Item = &serde_json::Number> + '_> {
        match json {
            serde_json::Value::Number(number) => Box::new(std::iter::once(number)),
            serde_json::Value::Array(items) => Box::new(items.iter().flat_map(numbers)),
            serde_json::Value::Object(fields) => Box::new(fields.values().flat_map(numbers)),
            _ => Box::new(std::iter::empty()),
        }
    }
}
