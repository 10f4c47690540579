//! What a caller may ask of a volume, checked before anything is changed: names, sizes, capabilities, parameters.

use std::collections::HashMap;
use std::fmt;
use std::str::FromStr;

use holdfast_proto::csi::volume_capability::AccessType;
use holdfast_proto::csi::volume_capability::access_mode::Mode;
use holdfast_proto::csi::volume_content_source::Type as SourceType;
use holdfast_proto::csi::{CapacityRange, CreateVolumeRequest, VolumeCapability, VolumeContentSource};
use holdfast_storage_core::ids::{InvalidId, NodeName, REGION_BYTES, SnapshotId, VolumeId};
use holdfast_storage_core::placement::LocalReplica;
use holdfast_storage_core::record::{VolumeParams, VolumeRecord};
use tonic::Status;

use crate::fixed_params::{self, Fixed, check_fs_type};
use crate::mutable_params::{self, Changes};
use crate::topology;

/// Size of a volume for which none was asked.
pub const DEFAULT_SIZE_BYTES: u64 = 1 << 30;
/// Smallest volume; smaller wishes are rounded up where the limit allows it.
pub const SIZE_BYTES_MIN: u64 = 16 << 20;
/// Smallest volume that mkfs.xfs accepts.
pub const XFS_SIZE_BYTES_MIN: u64 = 300 << 20;
/// Largest volume: its in-memory maps must stay small beside its data.
pub const SIZE_BYTES_MAX: u64 = 64 << 40;
/// Replicas of a volume where the StorageClass says nothing.
pub const DEFAULT_REPLICAS: u32 = 3;
/// Most replicas a volume may have.
pub const REPLICAS_MAX: u32 = 8;
/// Longest name the specification lets a caller send.
const NAME_BYTES_MAX: usize = 128;
/// File system of a mounted volume where nobody names one.
const DEFAULT_FS_TYPE: &str = "ext4";
/// Keys that external-provisioner adds by itself and that change nothing about the volume.
const METADATA_KEYS: [&str; 3] =
    ["csi.storage.k8s.io/pvc/name", "csi.storage.k8s.io/pvc/namespace", "csi.storage.k8s.io/pv/name"];

/// Start of the keys that are for the sidecars.
const SIDECARS_PREFIX: &str = "csi.storage.k8s.io/";

/// A CreateVolume request that passed every check.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumeRequest {
    /// The caller's name for it.
    pub name: String,
    /// What a volume that exists already must offer.
    pub range: SizeRange,
    /// Size of a volume made for this request.
    pub size_bytes: u64,
    /// Everything else.
    pub params: VolumeParams,
    /// What it is to begin as; none: without data.
    pub source: Option<VolumeSource>,
    /// The node that is to hold a replica if it can, as its first pod will run there.
    pub prefer: Option<NodeName>,
}

/// What a volume begins as.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum VolumeSource {
    /// A snapshot.
    Snapshot(SnapshotHandle),
    /// Another volume, as it is at some moment of the call.
    Volume(VolumeId),
}

/// CSI's snapshot id: the volume's id, `@`, the snapshot's own.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct SnapshotHandle {
    /// The volume that the snapshot is of.
    pub volume: VolumeId,
    /// The snapshot.
    pub snapshot: SnapshotId,
}

impl fmt::Display for SnapshotHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.volume, self.snapshot)
    }
}

impl FromStr for SnapshotHandle {
    type Err = InvalidId;

    fn from_str(text: &str) -> Result<Self, InvalidId> {
        let (volume, snapshot) = text.split_once('@').ok_or_else(|| InvalidId(text.to_owned()))?;
        Ok(Self { volume: volume.parse()?, snapshot: snapshot.parse()? })
    }
}

/// The bounds of a CapacityRange; an absent bound is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SizeRange {
    /// At least this many bytes.
    pub required_bytes: u64,
    /// At most this many bytes.
    pub limit_bytes: Option<u64>,
}

impl SizeRange {
    /// Whether a volume of that size is within the bounds.
    #[must_use]
    pub fn contains(&self, size_bytes: u64) -> bool {
        size_bytes >= self.required_bytes && self.limit_bytes.is_none_or(|limit| size_bytes <= limit)
    }
}

impl VolumeRequest {
    /// Checks a request.
    ///
    /// # Errors
    /// INVALID_ARGUMENT or OUT_OF_RANGE with a sentence that names field and cause.
    pub fn parse(request: &CreateVolumeRequest) -> Result<Self, Status> {
        check_name(&request.name)?;
        let source = request.volume_content_source.as_ref().map(parse_source).transpose()?;
        let mutable = Changes::parse(&request.mutable_parameters)?;
        let capabilities = check_capabilities(&request.volume_capabilities)?;
        // Those win over the StorageClass's.
        let params =
            mutable.apply("mutable_parameters", &parse_params(&request.parameters, &capabilities)?)?;
        let range = parse_range(request.capacity_range.as_ref())?;
        let size_bytes = choose_size(range, request.capacity_range.is_some(), &params.fs_type)?;
        let prefer = topology::preferred_node(request.accessibility_requirements.as_ref());
        if prefer.is_none() && params.placement.local_replica == LocalReplica::Required {
            return Err(Status::invalid_argument(
                "parameters[localReplica] is \"required\", but accessibility_requirements names no node; use \
                 volumeBindingMode WaitForFirstConsumer",
            ));
        }
        Ok(Self { name: request.name.clone(), range, size_bytes, params, source, prefer })
    }
}

fn parse_source(source: &VolumeContentSource) -> Result<VolumeSource, Status> {
    let missing =
        |field: &str| Err(Status::invalid_argument(format!("volume_content_source.{field} is missing")));
    match &source.r#type {
        None => missing("type"),
        Some(SourceType::Snapshot(source)) if source.snapshot_id.is_empty() => {
            missing("snapshot.snapshot_id")
        }
        Some(SourceType::Snapshot(source)) => {
            existing_snapshot(&source.snapshot_id).map(VolumeSource::Snapshot)
        }
        Some(SourceType::Volume(source)) if source.volume_id.is_empty() => missing("volume.volume_id"),
        Some(SourceType::Volume(source)) => existing_volume_id(&source.volume_id).map(VolumeSource::Volume),
    }
}

/// Turns a snapshot id as a caller spells it into one of ours.
///
/// # Errors
/// `None` for everything that cannot be the id of a snapshot of ours; INVALID_ARGUMENT for an empty one.
pub fn parse_snapshot(text: &str) -> Result<Option<SnapshotHandle>, Status> {
    if text.is_empty() {
        return Err(Status::invalid_argument("snapshot_id is missing"));
    }
    Ok(text.parse().ok())
}

/// [`parse_snapshot`] for calls that need the snapshot to exist.
///
/// # Errors
/// NOT_FOUND for everything that cannot be the id of a snapshot of ours; INVALID_ARGUMENT for an empty one.
pub fn existing_snapshot(text: &str) -> Result<SnapshotHandle, Status> {
    parse_snapshot(text)?.ok_or_else(|| {
        let shown: String = text.chars().take(80).collect();
        Status::not_found(format!("snapshot_id: there is no snapshot \"{shown}\""))
    })
}

/// Checks a name that a caller gives to a new object.
///
/// # Errors
/// INVALID_ARGUMENT for an empty one and for one that is longer than the specification allows.
pub fn check_name(name: &str) -> Result<(), Status> {
    if name.is_empty() {
        return Err(Status::invalid_argument("name is missing"));
    }
    if name.len() > NAME_BYTES_MAX {
        return Err(Status::invalid_argument(format!("name is longer than {NAME_BYTES_MAX} bytes")));
    }
    Ok(())
}

/// What a list of capabilities comes to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// Raw block instead of a file system.
    pub block: bool,
    /// File system that a capability names.
    pub fs_type: Option<String>,
}

/// Checks a non-empty list of capabilities that one volume must all offer.
///
/// # Errors
/// INVALID_ARGUMENT with a sentence that names field and cause.
pub fn check_capabilities(capabilities: &[VolumeCapability]) -> Result<Access, Status> {
    let (first, rest) = capabilities
        .split_first()
        .ok_or_else(|| Status::invalid_argument("volume_capabilities is missing"))?;
    let mut access = check_capability(first)?;
    for capability in rest {
        let other = check_capability(capability)?;
        if other.block != access.block {
            return Err(Status::invalid_argument(
                "volume_capabilities: a volume is either block or mount, not both",
            ));
        }
        match (&access.fs_type, other.fs_type) {
            (Some(one), Some(two)) if *one != two => {
                let sentence = format!("volume_capabilities: fs_type is both \"{one}\" and \"{two}\"");
                return Err(Status::invalid_argument(sentence));
            }
            (None, named) => access.fs_type = named,
            (Some(_), _) => {}
        }
    }
    Ok(access)
}

/// Checks one capability.
///
/// # Errors
/// INVALID_ARGUMENT with a sentence that names field and cause.
pub fn check_capability(capability: &VolumeCapability) -> Result<Access, Status> {
    let bad = |sentence: String| Err(Status::invalid_argument(format!("volume_capability: {sentence}")));
    let Some(mode) = &capability.access_mode else {
        return bad("access_mode is missing".to_owned());
    };
    match mode.mode() {
        Mode::SingleNodeWriter
        | Mode::SingleNodeReaderOnly
        | Mode::SingleNodeSingleWriter
        | Mode::SingleNodeMultiWriter => {}
        Mode::Unknown => return bad("access_mode.mode is missing or unknown".to_owned()),
        mode @ (Mode::MultiNodeReaderOnly | Mode::MultiNodeSingleWriter | Mode::MultiNodeMultiWriter) => {
            let name = mode.as_str_name();
            return bad(format!(
                "access mode {name} is not supported: a volume is used on one node at a time"
            ));
        }
    }
    match &capability.access_type {
        None => bad("access_type is missing: it must be block or mount".to_owned()),
        Some(AccessType::Block(_)) => Ok(Access { block: true, fs_type: None }),
        Some(AccessType::Mount(mount)) => {
            if !mount.volume_mount_group.is_empty() {
                return bad("volume_mount_group is not supported".to_owned());
            }
            if mount.fs_type.is_empty() {
                return Ok(Access { block: false, fs_type: None });
            }
            check_fs_type("volume_capability.mount.fs_type", &mount.fs_type)?;
            Ok(Access { block: false, fs_type: Some(mount.fs_type.clone()) })
        }
    }
}

/// Turns a volume id as a caller spells it into one that is safe in a path.
///
/// # Errors
/// `None` for everything that cannot be the id of a volume of ours; INVALID_ARGUMENT for an empty one.
pub fn parse_volume_id(text: &str) -> Result<Option<VolumeId>, Status> {
    if text.is_empty() {
        return Err(Status::invalid_argument("volume_id is missing"));
    }
    Ok(text.parse().ok())
}

/// [`parse_volume_id`] for calls that need the volume to exist.
///
/// # Errors
/// NOT_FOUND for everything that cannot be the id of a volume of ours; INVALID_ARGUMENT for an empty one.
pub fn existing_volume_id(text: &str) -> Result<VolumeId, Status> {
    existing_volume_id_in("volume_id", text)
}

/// [`existing_volume_id`] of another field than `volume_id`.
///
/// # Errors
/// As it says, with the field's name.
pub fn existing_volume_id_in(field: &str, text: &str) -> Result<VolumeId, Status> {
    if text.is_empty() {
        return Err(Status::invalid_argument(format!("{field} is missing")));
    }
    text.parse().map_err(|_| {
        let shown: String = text.chars().take(64).collect();
        Status::not_found(format!("{field}: there is no volume \"{shown}\"; ids are 32 hexadecimal digits"))
    })
}

/// A class's parameters without those for sidecars, such as where a volume's secrets are: external-provisioner takes them out
/// for CreateVolume, and not for GetCapacity.
#[must_use]
pub fn without_sidecars_keys(parameters: &HashMap<String, String>) -> HashMap<String, String> {
    let ours = |key: &str| !key.starts_with(SIDECARS_PREFIX) || key == fixed_params::PROVISIONER_FS_TYPE_KEY;
    parameters.iter().filter(|(key, _)| ours(key)).map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// Reads StorageClass parameters; no key is ignored.
///
/// # Errors
/// INVALID_ARGUMENT naming the key.
pub fn parse_params(parameters: &HashMap<String, String>, access: &Access) -> Result<VolumeParams, Status> {
    let mut mutable = Changes::default();
    let mut fixed = Fixed::default();
    // In order, so that of several mistakes always the same one is reported.
    let mut sorted: Vec<_> = parameters.iter().collect();
    sorted.sort();
    for (key, value) in sorted {
        let known = mutable.take("parameters", key, value)? || fixed.take("parameters", key, value)?;
        if !known && !METADATA_KEYS.contains(&key.as_str()) {
            let shown: String = key.chars().take(64).collect();
            return Err(Status::invalid_argument(format!(
                "parameters: key \"{shown}\" is unknown; known are {}, {}",
                mutable_params::KNOWN,
                fixed_params::KNOWN
            )));
        }
    }
    let Fixed { fs_type, placement, front_end, encryption } = fixed;
    let fs_type = match (access.block, &access.fs_type, &fs_type) {
        (true, ..) => String::new(),
        (false, Some(named), Some(param)) if named != param => {
            return Err(Status::invalid_argument(format!(
                "the capability's fs_type \"{named}\" contradicts the parameter fsType \"{param}\""
            )));
        }
        (false, Some(named), _) => named.clone(),
        (false, None, Some(param)) => param.clone(),
        (false, None, None) => DEFAULT_FS_TYPE.to_owned(),
    };
    let params =
        VolumeParams { placement, front_end, encryption, ..VolumeParams::new(DEFAULT_REPLICAS, &fs_type) };
    mutable.apply("parameters", &params)
}

/// Whether a volume can be used in the way a capability says.
pub(crate) fn check_access(record: &VolumeRecord, access: &Access) -> Result<(), Status> {
    let made_for = |what: &str| {
        let sentence = format!("volume_capability: volume {} was made {what}", record.volume_id);
        Err(Status::invalid_argument(sentence))
    };
    match (&access.fs_type, access.block, record.params.fs_type.as_str()) {
        (_, true, "") | (None, false, "ext4" | "xfs") => Ok(()),
        (_, true, fs_type) => made_for(&format!("with the file system {fs_type}, not as a raw block volume")),
        (_, false, "") => made_for("as a raw block volume, without a file system"),
        (Some(wanted), false, fs_type) if wanted == fs_type => Ok(()),
        (_, false, fs_type) => made_for(&format!("with the file system {fs_type}, not with another")),
    }
}

/// Reads the bounds of a size.
///
/// # Errors
/// INVALID_ARGUMENT or OUT_OF_RANGE naming the field.
pub fn parse_range(range: Option<&CapacityRange>) -> Result<SizeRange, Status> {
    let Some(range) = range else {
        return Ok(SizeRange { required_bytes: 0, limit_bytes: None });
    };
    let bytes = |field: &str, value: i64| {
        u64::try_from(value)
            .map_err(|_| Status::invalid_argument(format!("capacity_range.{field} is negative ({value})")))
    };
    let required_bytes = bytes("required_bytes", range.required_bytes)?;
    let limit_bytes = bytes("limit_bytes", range.limit_bytes)?;
    if required_bytes == 0 && limit_bytes == 0 {
        return Err(Status::invalid_argument(
            "capacity_range: required_bytes and limit_bytes are both zero; a volume of no bytes cannot be made",
        ));
    }
    if limit_bytes != 0 && limit_bytes < required_bytes {
        return Err(Status::out_of_range(format!(
            "capacity_range: limit_bytes {limit_bytes} is below required_bytes {required_bytes}"
        )));
    }
    Ok(SizeRange { required_bytes, limit_bytes: (limit_bytes != 0).then_some(limit_bytes) })
}

/// Chooses a size; sizes are whole regions, the unit of the intent log.
///
/// # Errors
/// OUT_OF_RANGE naming the bound.
pub fn choose_size(range: SizeRange, asked: bool, fs_type: &str) -> Result<u64, Status> {
    if range.required_bytes > SIZE_BYTES_MAX {
        return Err(Status::out_of_range(format!(
            "capacity_range.required_bytes {} is above the largest volume, {SIZE_BYTES_MAX} bytes",
            range.required_bytes
        )));
    }
    let smallest = if fs_type == "xfs" { XFS_SIZE_BYTES_MIN } else { SIZE_BYTES_MIN };
    let wanted = if asked && range.required_bytes > 0 {
        range.required_bytes.max(smallest).next_multiple_of(REGION_BYTES)
    } else {
        let limit = range.limit_bytes.unwrap_or(DEFAULT_SIZE_BYTES);
        DEFAULT_SIZE_BYTES.min(limit / REGION_BYTES * REGION_BYTES).max(smallest)
    };
    match range.limit_bytes {
        Some(limit) if wanted > limit => Err(Status::out_of_range(format!(
            "capacity_range.limit_bytes {limit} is below {wanted}, the smallest possible size: volumes are whole MiB, \
             and at least {smallest} bytes"
        ))),
        _ => Ok(wanted),
    }
}

#[cfg(test)]
mod tests {
    use holdfast_proto::csi::volume_capability::{AccessMode, BlockVolume, MountVolume};
    use holdfast_storage_core::io_limits::IoLimits;
    use tonic::Code;

    use super::*;

    #[test]
    fn size_is_the_default_or_the_required_bytes_in_whole_regions() {
        for (range, size) in [
            (None, DEFAULT_SIZE_BYTES),
            (Some((1, 0)), SIZE_BYTES_MIN),
            (Some(((1 << 30) + 1, 0)), (1 << 30) + REGION_BYTES),
            (Some((0, (100 << 20) + 5)), 100 << 20),
            (Some((0, 1 << 40)), DEFAULT_SIZE_BYTES),
            (Some((64 << 20, 64 << 20)), 64 << 20),
        ] {
            assert_eq!(VolumeRequest::parse(&mk_request(range)).unwrap().size_bytes, size, "{range:?}");
        }
    }

    #[test]
    fn impossible_sizes_are_refused_with_the_field_named() {
        for (range, code) in [
            ((0, 0), Code::InvalidArgument),
            ((-1, 0), Code::InvalidArgument),
            ((1, -1), Code::InvalidArgument),
            ((2 << 30, 1 << 30), Code::OutOfRange),
            ((1, 4096), Code::OutOfRange),
            ((i64::MAX, 0), Code::OutOfRange),
            (((64 << 20) + 1, (64 << 20) + 2), Code::OutOfRange),
        ] {
            let status = VolumeRequest::parse(&mk_request(Some(range))).unwrap_err();
            assert_eq!(status.code(), code, "{range:?}: {status}");
            assert!(status.message().contains("capacity_range"), "{status}");
        }
    }

    #[test]
    fn file_system_comes_from_the_capability_then_the_parameters_then_the_default() {
        for (capability, parameter, answer) in
            [("xfs", "", "xfs"), ("", "xfs", "xfs"), ("", "", "ext4"), ("ext4", "ext4", "ext4")]
        {
            let mut request = mk_request(None);
            request.volume_capabilities = vec![mk_mount(capability)];
            if !parameter.is_empty() {
                request.parameters.insert("fsType".to_owned(), parameter.to_owned());
            }
            assert_eq!(VolumeRequest::parse(&request).unwrap().params.fs_type, answer);
        }
        let mut request = mk_request(None);
        request.volume_capabilities[0].access_type = Some(AccessType::Block(BlockVolume {}));
        assert_eq!(VolumeRequest::parse(&request).unwrap().params.fs_type, "");
    }

    #[test]
    fn bad_parameters_are_refused_by_name() {
        for (key, value, named) in [
            ("replica", "3", "replica"),
            ("replicas", "0", "replicas"),
            ("replicas", "9", "replicas"),
            ("replicas", "three", "replicas"),
            ("minInSync", "4", "parameters[minInSync]"),
            ("iopsLimit", "1", "parameters[iopsLimit]"),
            ("bandwidthLimit", "all", "parameters[bandwidthLimit]"),
            ("scrubInterval", "soon", "parameters[scrubInterval]"),
            ("resyncRate", "-1", "parameters[resyncRate]"),
            ("zones", "all", "parameters[zones] is \"all\"; it must be one of preferred, required"),
            ("localReplica", "never", "it must be one of preferred, required, none"),
            ("localReplica", "required", "WaitForFirstConsumer"),
            ("poolClass", "", "parameters[poolClass]"),
            ("encryption", "luks", "parameters[encryption] is \"luks\"; it must be one of none, aes-xts"),
            ("frontEnd", "ublk", "parameters[frontEnd] is \"ublk\"; it must be one of auto, fuse-loop"),
            ("poolClass", "fast pool", "parameters[poolClass]"),
            ("fsType", "btrfs", "btrfs"),
            ("csi.storage.k8s.io/fstype", "../ext4", "fstype"),
        ] {
            let mut request = mk_request(None);
            request.parameters.insert(key.to_owned(), value.to_owned());
            let status = VolumeRequest::parse(&request).unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument);
            assert!(status.message().contains(named), "{status}");
        }
    }

    #[test]
    fn mutable_parameters_win_over_the_storage_class_s_and_are_checked_with_them() {
        let mut request = mk_request(None);
        for (key, value) in [("replicas", "3"), ("minInSync", "2"), ("iopsLimit", "100")] {
            request.parameters.insert(key.to_owned(), value.to_owned());
        }
        request.mutable_parameters.insert("iopsLimit".to_owned(), "1k".to_owned());
        let params = VolumeRequest::parse(&request).unwrap().params;
        assert_eq!((params.replicas, params.min_in_sync), (3, 2));
        assert_eq!(params.limits, IoLimits { iops: 1_000, bytes_per_s: 0 });
        for (key, value) in [("replicas", "1"), ("fsType", "ext4"), ("nonsense", "")] {
            let mut request = request.clone();
            request.mutable_parameters.insert(key.to_owned(), value.to_owned());
            let status = VolumeRequest::parse(&request).unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument);
            assert!(status.message().contains("mutable_parameters"), "{status}");
        }
    }

    #[test]
    fn a_class_as_it_stands_is_read_without_what_is_for_the_sidecars() {
        let class = [
            ("replicas", "2"),
            ("csi.storage.k8s.io/fstype", "xfs"),
            ("csi.storage.k8s.io/node-stage-secret-name", "${pvc.name}-key"),
        ];
        let class = class.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let access = Access { block: false, fs_type: None };
        assert!(parse_params(&class, &access).is_err(), "CreateVolume has no such key");

        let params = parse_params(&without_sidecars_keys(&class), &access).unwrap();

        assert_eq!((params.replicas, params.fs_type.as_str()), (2, "xfs"));
    }

    #[test]
    fn ids_that_could_leave_a_folder_are_no_ids() {
        for text in ["../../etc", "a/b", ".", "0123"] {
            assert_eq!(existing_volume_id(text).unwrap_err().code(), Code::NotFound);
            assert_eq!(parse_volume_id(text).unwrap(), None);
        }
        assert_eq!(parse_volume_id("").unwrap_err().code(), Code::InvalidArgument);
    }

    fn mk_request(range: Option<(i64, i64)>) -> CreateVolumeRequest {
        CreateVolumeRequest {
            name: "v".to_owned(),
            capacity_range: range
                .map(|(required_bytes, limit_bytes)| CapacityRange { required_bytes, limit_bytes }),
            volume_capabilities: vec![mk_mount("")],
            ..CreateVolumeRequest::default()
        }
    }

    fn mk_mount(fs_type: &str) -> VolumeCapability {
        VolumeCapability {
            access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
            access_type: Some(AccessType::Mount(MountVolume {
                fs_type: fs_type.to_owned(),
                ..MountVolume::default()
            })),
        }
    }
}
