//! Each text field of each controller call, with what it must never be: missing, too long, a path, another object's id; and each
//! number with what it cannot be. The answer is the specification's code and names the field, and nothing is changed.

use std::future::Future;
use std::pin::Pin;
use std::time::Duration;

use holdfast_proto::csi::volume_content_source::{SnapshotSource, Type as SourceType, VolumeSource};
use holdfast_proto::csi::*;
use holdfast_storage_core::ids::VolumeId;
use tonic::{Code, Status};

use crate::support::fakes::FakePool;
use crate::support::requests::{Controller, mk_create, mk_mount, mk_publish};
use crate::support::world::World;

type Answer = Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;
type Call = fn(Controller, Known, String) -> Answer;

/// From a controller's start until it judges that a node is unknown.
const NODES_ARE_KNOWN: Duration = Duration::from_millis(6500);

/// What exists, for the fields beside the one that is tried.
#[derive(Clone)]
struct Known {
    volume: String,
    /// An older snapshot of it.
    base: String,
    snapshot: String,
}

impl Known {
    async fn make(controller: &Controller) -> Self {
        let volume = controller.create(&mk_create("data")).await.unwrap().volume_id;
        let base = controller.snapshot(&volume, "older").await.unwrap().snapshot_id;
        let snapshot = controller.snapshot(&volume, "nightly").await.unwrap().snapshot_id;
        Self { volume, base, snapshot }
    }
}

/// What a field names.
#[derive(Clone, Copy, PartialEq)]
enum Field {
    /// Something that must exist.
    Existing,
    /// Something that is gone afterwards; what cannot exist is gone.
    Gone,
    /// A name that the caller gives.
    Name,
    /// A filter: what cannot exist matches nothing; empty matches all.
    Filter,
    /// A place in a list, from an earlier answer; empty is the start.
    Token,
}

/// A unary call with one of its fields filled with the text.
macro_rules! call {
    ($client:expr, $method:ident, $request:expr) => {
        Box::pin(async move { $client.$method($request).await.map(drop) })
    };
}

fn source(kind: SourceType) -> CreateVolumeRequest {
    let volume_content_source = Some(VolumeContentSource { r#type: Some(kind) });
    CreateVolumeRequest { volume_content_source, ..mk_create("copy") }
}

fn controller_fields() -> Vec<(&'static str, &'static str, Field, Call)> {
    use Field::{Existing, Gone, Name, Token};
    vec![
        ("CreateVolume", "name", Name, |c, _, text| {
            call!(c.0.clone(), create_volume, CreateVolumeRequest { name: text, ..mk_create("") })
        }),
        ("CreateVolume", "volume_id", Existing, |c, _, volume_id| {
            call!(c.0.clone(), create_volume, source(SourceType::Volume(VolumeSource { volume_id })))
        }),
        ("CreateVolume", "snapshot_id", Existing, |c, _, snapshot_id| {
            call!(c.0.clone(), create_volume, source(SourceType::Snapshot(SnapshotSource { snapshot_id })))
        }),
        ("DeleteVolume", "volume_id", Gone, |c, _, volume_id| {
            call!(c.0.clone(), delete_volume, DeleteVolumeRequest { volume_id, ..Default::default() })
        }),
        ("ControllerPublishVolume", "volume_id", Existing, |c, _, text| {
            call!(c.0.clone(), controller_publish_volume, mk_publish(&text, "a"))
        }),
        ("ControllerPublishVolume", "node_id", Existing, |c, known, text| {
            call!(c.0.clone(), controller_publish_volume, mk_publish(&known.volume, &text))
        }),
        ("ControllerUnpublishVolume", "volume_id", Gone, |c, _, volume_id| {
            let request =
                ControllerUnpublishVolumeRequest { volume_id, node_id: "a".to_owned(), ..Default::default() };
            call!(c.0.clone(), controller_unpublish_volume, request)
        }),
        ("ValidateVolumeCapabilities", "volume_id", Existing, |c, _, volume_id| {
            let request = ValidateVolumeCapabilitiesRequest {
                volume_id,
                volume_capabilities: vec![mk_mount("")],
                ..Default::default()
            };
            call!(c.0.clone(), validate_volume_capabilities, request)
        }),
        ("ListVolumes", "starting_token", Token, |c, _, starting_token| {
            call!(c.0.clone(), list_volumes, ListVolumesRequest { max_entries: 0, starting_token })
        }),
        ("ControllerExpandVolume", "volume_id", Existing, |c, _, volume_id| {
            let capacity_range = Some(CapacityRange { required_bytes: 2 << 30, limit_bytes: 0 });
            let request = ControllerExpandVolumeRequest { volume_id, capacity_range, ..Default::default() };
            call!(c.0.clone(), controller_expand_volume, request)
        }),
        ("ControllerModifyVolume", "volume_id", Existing, |c, _, volume_id| {
            let request = ControllerModifyVolumeRequest { volume_id, ..Default::default() };
            call!(c.0.clone(), controller_modify_volume, request)
        }),
        ("ControllerGetVolume", "volume_id", Existing, |c, _, volume_id| {
            call!(c.0.clone(), controller_get_volume, ControllerGetVolumeRequest { volume_id })
        }),
        ("ControllerGetVolumeHealth", "volume_id", Existing, |c, _, volume_id| {
            let request = ControllerGetVolumeHealthRequest { volume_id, ..Default::default() };
            call!(c.0.clone(), controller_get_volume_health, request)
        }),
        ("ControllerListVolumeHealth", "starting_token", Token, |c, _, starting_token| {
            let request = ControllerListVolumeHealthRequest { starting_token, ..Default::default() };
            call!(c.0.clone(), controller_list_volume_health, request)
        }),
    ]
}

fn snapshot_fields() -> Vec<(&'static str, &'static str, Field, Call)> {
    use Field::{Existing, Filter, Gone, Name, Token};
    vec![
        ("CreateSnapshot", "source_volume_id", Existing, |c, _, source_volume_id| {
            let request =
                CreateSnapshotRequest { source_volume_id, name: "new".to_owned(), ..Default::default() };
            call!(c.0.clone(), create_snapshot, request)
        }),
        ("CreateSnapshot", "name", Name, |c, known, name| {
            let request =
                CreateSnapshotRequest { source_volume_id: known.volume, name, ..Default::default() };
            call!(c.0.clone(), create_snapshot, request)
        }),
        ("DeleteSnapshot", "snapshot_id", Gone, |c, _, snapshot_id| {
            call!(c.0.clone(), delete_snapshot, DeleteSnapshotRequest { snapshot_id, ..Default::default() })
        }),
        ("GetSnapshot", "snapshot_id", Existing, |c, _, snapshot_id| {
            call!(c.0.clone(), get_snapshot, GetSnapshotRequest { snapshot_id, ..Default::default() })
        }),
        ("ListSnapshots", "snapshot_id", Filter, |c, _, snapshot_id| {
            call!(c.0.clone(), list_snapshots, ListSnapshotsRequest { snapshot_id, ..Default::default() })
        }),
        ("ListSnapshots", "source_volume_id", Filter, |c, _, source_volume_id| {
            let request = ListSnapshotsRequest { source_volume_id, ..Default::default() };
            call!(c.0.clone(), list_snapshots, request)
        }),
        ("ListSnapshots", "starting_token", Token, |c, _, starting_token| {
            call!(c.0.clone(), list_snapshots, ListSnapshotsRequest { starting_token, ..Default::default() })
        }),
    ]
}

fn group_and_metadata_fields() -> Vec<(&'static str, &'static str, Field, Call)> {
    use Field::{Existing, Gone, Name};
    vec![
        ("CreateVolumeGroupSnapshot", "name", Name, |c, known, name| {
            let source_volume_ids = vec![known.volume];
            let request = CreateVolumeGroupSnapshotRequest { name, source_volume_ids, ..Default::default() };
            call!(c.groups(), create_volume_group_snapshot, request)
        }),
        ("CreateVolumeGroupSnapshot", "source_volume_ids", Existing, |c, _, text| {
            let (name, source_volume_ids) = ("new".to_owned(), vec![text]);
            let request = CreateVolumeGroupSnapshotRequest { name, source_volume_ids, ..Default::default() };
            call!(c.groups(), create_volume_group_snapshot, request)
        }),
        ("DeleteVolumeGroupSnapshot", "group_snapshot_id", Gone, |c, _, group_snapshot_id| {
            let request = DeleteVolumeGroupSnapshotRequest { group_snapshot_id, ..Default::default() };
            call!(c.groups(), delete_volume_group_snapshot, request)
        }),
        ("GetVolumeGroupSnapshot", "group_snapshot_id", Existing, |c, _, group_snapshot_id| {
            let request = GetVolumeGroupSnapshotRequest { group_snapshot_id, ..Default::default() };
            call!(c.groups(), get_volume_group_snapshot, request)
        }),
        ("GetMetadataAllocated", "snapshot_id", Existing, |c, _, snapshot_id| {
            let request = GetMetadataAllocatedRequest { snapshot_id, ..Default::default() };
            Box::pin(async move { first(c.metadata().get_metadata_allocated(request).await?).await })
        }),
        ("GetMetadataDelta", "base_snapshot_id", Existing, |c, known, base_snapshot_id| {
            let target_snapshot_id = known.snapshot;
            let request =
                GetMetadataDeltaRequest { base_snapshot_id, target_snapshot_id, ..Default::default() };
            Box::pin(async move { first(c.metadata().get_metadata_delta(request).await?).await })
        }),
        ("GetMetadataDelta", "target_snapshot_id", Existing, |c, known, target_snapshot_id| {
            let base_snapshot_id = known.snapshot;
            let request =
                GetMetadataDeltaRequest { base_snapshot_id, target_snapshot_id, ..Default::default() };
            Box::pin(async move { first(c.metadata().get_metadata_delta(request).await?).await })
        }),
    ]
}

/// A stream may answer its error as its first message.
async fn first<T>(answer: tonic::Response<tonic::Streaming<T>>) -> Result<(), Status> {
    answer.into_inner().message().await.map(drop)
}

/// The code that the specification gives, and a sentence that names the field and repeats no long text.
fn is_right(kind: Field, field: &str, empty: bool, answer: Result<(), Status>) -> bool {
    let Err(status) = answer else {
        return match kind {
            Field::Gone => !empty,
            Field::Filter => true,
            Field::Token => empty,
            Field::Existing | Field::Name => false,
        };
    };
    let code = status.code();
    let right = match kind {
        Field::Token => code == Code::Aborted,
        Field::Existing if !empty => code == Code::NotFound || code == Code::InvalidArgument,
        Field::Filter => false,
        Field::Existing | Field::Gone | Field::Name => code == Code::InvalidArgument,
    };
    right && status.message().contains(field) && status.message().len() < 1000
}

async fn everything(world: &World) -> String {
    let replicas: Vec<_> = world.pools.iter().map(FakePool::replicas).collect();
    let groups = world.groups.list_groups().await.unwrap();
    format!("{:?} {groups:?} {replicas:?}", world.store.list().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn no_text_field_takes_what_it_must_not_be_and_nothing_is_changed() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let known = Known::make(&controller).await;
    let volume = known.volume.clone();
    let before = everything(&world).await;
    let texts = [
        String::new(),
        "x".repeat(4096),
        "../../../etc/passwd".to_owned(),
        "/".to_owned(),
        "line\nbreak".to_owned(),
        "\u{202e}\u{1f4a9}".to_owned(),
        "0".repeat(32),
        format!("{}@{}", "0".repeat(32), "1".repeat(32)),
        // One that exists, spelt as none is; and one beside an end that is none.
        volume.to_uppercase().replace(char::is_numeric, "F"),
        format!("{volume}@"),
        format!("{volume}/.."),
    ];
    // A controller that has just started does not say of a node that it does not exist.
    tokio::time::sleep(NODES_ARE_KNOWN).await;
    let (mut tried, mut wrong) = (0, Vec::new());
    for (rpc, field, kind, call) in
        controller_fields().into_iter().chain(snapshot_fields()).chain(group_and_metadata_fields())
    {
        for text in &texts {
            let text = if kind == Field::Name && !text.is_empty() { "x".repeat(129) } else { text.clone() };
            let answer = call(controller.clone(), known.clone(), text.clone()).await;
            let shown: String = text.chars().take(40).collect();
            let what = format!("{rpc} {field} \"{shown}\": {answer:?}");
            tried += 1;
            // What could be the id of something is not wrong in itself: there is none, or it is a place in a list.
            let could_be = text.split('@').all(|part| part.len() == 32 && part.parse::<VolumeId>().is_ok());
            let fits = match &answer {
                Ok(()) => kind == Field::Token,
                Err(status) => kind == Field::Existing && status.code() == Code::NotFound,
            };
            let right = (could_be && fits) || is_right(kind, field, text.is_empty(), answer);
            if !right {
                wrong.push(what);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(tried > 250, "{tried}");
    assert_eq!(everything(&world).await, before, "something was changed");
}

type NumberCall = fn(Controller, Known, i64) -> Answer;

fn mk_range(required_bytes: i64, limit_bytes: i64) -> Option<CapacityRange> {
    Some(CapacityRange { required_bytes, limit_bytes })
}

fn sized(capacity_range: Option<CapacityRange>) -> CreateVolumeRequest {
    CreateVolumeRequest { capacity_range, ..mk_create("sized") }
}

fn expanded(volume_id: String, capacity_range: Option<CapacityRange>) -> ControllerExpandVolumeRequest {
    ControllerExpandVolumeRequest { volume_id, capacity_range, ..Default::default() }
}

fn small(number: i64) -> i32 {
    i32::try_from(number).unwrap_or(if number < 0 { i32::MIN } else { i32::MAX })
}

/// The call, the field, the numbers that it must not have, and how it is called with one.
fn numbers() -> Vec<(&'static str, &'static str, &'static [i64], NumberCall)> {
    const NEGATIVE: &[i64] = &[-1, i64::MIN];
    const NO_SIZE: &[i64] = &[-1, i64::MIN, i64::MAX];
    const NO_MODE: &[i64] = &[-1, 0, 5, 99];
    vec![
        ("CreateVolume", "required_bytes", NO_SIZE, |c, _, number| {
            call!(c.0.clone(), create_volume, sized(mk_range(number, 0)))
        }),
        ("CreateVolume", "limit_bytes", &[-1, i64::MIN, 1, (1 << 30) - 1], |c, _, number| {
            call!(c.0.clone(), create_volume, sized(mk_range(1 << 30, number)))
        }),
        ("CreateVolume", "mode", NO_MODE, |c, _, number| {
            let access_mode = Some(volume_capability::AccessMode { mode: small(number) });
            let capability = VolumeCapability { access_mode, ..mk_mount("") };
            let request = CreateVolumeRequest { volume_capabilities: vec![capability], ..mk_create("mode") };
            call!(c.0.clone(), create_volume, request)
        }),
        ("ControllerPublishVolume", "mode", NO_MODE, |c, known, number| {
            let access_mode = Some(volume_capability::AccessMode { mode: small(number) });
            let volume_capability = Some(VolumeCapability { access_mode, ..mk_mount("") });
            let request =
                ControllerPublishVolumeRequest { volume_capability, ..mk_publish(&known.volume, "a") };
            call!(c.0.clone(), controller_publish_volume, request)
        }),
        ("ControllerExpandVolume", "required_bytes", NO_SIZE, |c, known, number| {
            call!(c.0.clone(), controller_expand_volume, expanded(known.volume, mk_range(number, 0)))
        }),
        ("ControllerExpandVolume", "limit_bytes", &[-1, i64::MIN, 1], |c, known, number| {
            call!(c.0.clone(), controller_expand_volume, expanded(known.volume, mk_range(2 << 30, number)))
        }),
        ("ListVolumes", "max_entries", NEGATIVE, |c, _, number| {
            let request = ListVolumesRequest { max_entries: small(number), starting_token: String::new() };
            call!(c.0.clone(), list_volumes, request)
        }),
        ("ListSnapshots", "max_entries", NEGATIVE, |c, _, number| {
            let request = ListSnapshotsRequest { max_entries: small(number), ..Default::default() };
            call!(c.0.clone(), list_snapshots, request)
        }),
        ("ControllerListVolumeHealth", "max_entries", NEGATIVE, |c, _, number| {
            let request =
                ControllerListVolumeHealthRequest { max_entries: small(number), ..Default::default() };
            call!(c.0.clone(), controller_list_volume_health, request)
        }),
        ("GetMetadataAllocated", "starting_offset", NO_SIZE, |c, known, starting_offset| {
            let snapshot_id = known.snapshot;
            let request = GetMetadataAllocatedRequest { snapshot_id, starting_offset, ..Default::default() };
            Box::pin(async move { first(c.metadata().get_metadata_allocated(request).await?).await })
        }),
        ("GetMetadataAllocated", "max_results", NEGATIVE, |c, known, number| {
            let (snapshot_id, max_results) = (known.snapshot, small(number));
            let request = GetMetadataAllocatedRequest { snapshot_id, max_results, ..Default::default() };
            Box::pin(async move { first(c.metadata().get_metadata_allocated(request).await?).await })
        }),
        ("GetMetadataDelta", "starting_offset", NO_SIZE, |c, known, starting_offset| {
            let request = delta(known, starting_offset, 0);
            Box::pin(async move { first(c.metadata().get_metadata_delta(request).await?).await })
        }),
        ("GetMetadataDelta", "max_results", NEGATIVE, |c, known, number| {
            let request = delta(known, 0, small(number));
            Box::pin(async move { first(c.metadata().get_metadata_delta(request).await?).await })
        }),
    ]
}

fn delta(known: Known, starting_offset: i64, max_results: i32) -> GetMetadataDeltaRequest {
    GetMetadataDeltaRequest {
        base_snapshot_id: known.base,
        target_snapshot_id: known.snapshot,
        starting_offset,
        max_results,
        ..Default::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_number_is_taken_that_cannot_be_and_nothing_is_changed() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let known = Known::make(&controller).await;
    let before = everything(&world).await;
    let (mut tried, mut wrong) = (0, Vec::new());
    for (rpc, field, numbers, call) in numbers() {
        for number in numbers {
            let answer = call(controller.clone(), known.clone(), *number).await;
            tried += 1;
            let right = answer.as_ref().is_err_and(|status| {
                matches!(status.code(), Code::InvalidArgument | Code::OutOfRange)
                    && status.message().contains(field)
            });
            if !right {
                wrong.push(format!("{rpc} {field} {number}: {answer:?}"));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert!(tried > 35, "{tried}");
    assert_eq!(everything(&world).await, before, "something was changed");
}
