//! Snapshots of several volumes at one instant through the controller, killed between any two changes.

use std::sync::Arc;

use holdfast_proto::csi::*;
use holdfast_storage_core::ids::NodeName;
use holdfast_storage_core::transitions;
use tonic::{Code, Status};

use crate::support::killed::{all, killed_anywhere};
use crate::support::requests::{Controller, mk_create};
use crate::support::world::World;

fn mk_group(name: &str, volumes: &[&str]) -> CreateVolumeGroupSnapshotRequest {
    CreateVolumeGroupSnapshotRequest {
        name: name.to_owned(),
        source_volume_ids: volumes.iter().map(|id| (*id).to_owned()).collect(),
        ..CreateVolumeGroupSnapshotRequest::default()
    }
}

async fn create_group(
    controller: &Controller,
    request: CreateVolumeGroupSnapshotRequest,
) -> Result<VolumeGroupSnapshot, Status> {
    let answer = controller.groups().create_volume_group_snapshot(request).await?;
    Ok(answer.into_inner().group_snapshot.unwrap())
}

async fn delete_group(controller: &Controller, id: &str) -> Result<(), Status> {
    let request = DeleteVolumeGroupSnapshotRequest {
        group_snapshot_id: id.to_owned(),
        ..DeleteVolumeGroupSnapshotRequest::default()
    };
    controller.groups().delete_volume_group_snapshot(request).await.map(drop)
}

/// Two volumes, the first attached to a node, the second to nobody.
async fn mk_pair(world: &World) -> String {
    let controller = world.controller().await;
    let one = controller.create(&mk_create("one")).await.unwrap().volume_id;
    let two = controller.create(&mk_create("two")).await.unwrap().volume_id;
    controller.publish(&one, "b").await.unwrap();
    format!("{one} {two}")
}

#[tokio::test(flavor = "multi_thread")]
async fn r29_a_group_is_whole_or_nothing_whatever_is_killed() {
    killed_anywhere(
        &["a", "b", "c"],
        mk_pair,
        async |controller, ids| {
            create_group(controller, mk_group("all", &ids.split(' ').collect::<Vec<_>>())).await
        },
        async |world, controller, ids, group| {
            assert!(group.ready_to_use);
            assert_eq!(group.snapshots.len(), 2);
            for snapshot in &group.snapshots {
                assert_eq!(snapshot.group_snapshot_id, group.group_snapshot_id);
                assert_eq!(snapshot.creation_time, group.creation_time, "one instant");
                let alone = controller.delete_snapshot(&snapshot.snapshot_id).await.unwrap_err();
                assert_eq!(alone.code(), Code::InvalidArgument, "{alone}");
            }
            assert_eq!(controller.snapshots(all()).await.unwrap().len(), 2);
            for id in ids.split(' ') {
                assert_eq!(world.record(id).await.snapshots.len(), 1, "of the try that counts");
            }
            delete_group(controller, &group.group_snapshot_id).await.unwrap();
            delete_group(controller, &group.group_snapshot_id).await.expect("deleted twice is deleted");
            assert!(world.groups.list_groups().await.unwrap().is_empty());
            for id in ids.split(' ') {
                assert!(world.record(id).await.snapshots.is_empty());
            }
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r29_a_client_that_comes_to_a_detached_member_during_the_cut_costs_the_group() {
    let world = World::start(&["a", "b", "c"]).await;
    let ids = mk_pair(&world).await;
    let (one, two) = ids.split_once(' ').unwrap();
    let store = Arc::clone(&world.store);
    let volume = two.parse().unwrap();
    let publish = Arc::new(move || {
        let store = Arc::clone(&store);
        let work = async move {
            loop {
                let found = store.read(volume).await.unwrap();
                let Ok(record) = transitions::publish(&found.record, &NodeName("c".to_owned()), false) else {
                    return;
                };
                if record == found.record || store.swap(found.version, record).await.is_ok() {
                    return;
                }
            }
        };
        Box::pin(work) as std::pin::Pin<Box<dyn Future<Output = ()> + Send>>
    });
    for pool in &world.pools {
        pool.state.lock().unwrap().during_cut = Some(publish.clone());
    }
    let controller = world.controller().await;
    let status = create_group(&controller, mk_group("all", &[one, two])).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted, "{status}");
    for id in [one, two] {
        assert!(world.record(id).await.snapshots.is_empty(), "nothing is left of it");
    }
    let both = create_group(&controller, mk_group("all", &[one, two])).await.unwrap();
    assert_eq!(both.snapshots.len(), 2, "both are attached now");
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_group_requests_are_refused_by_field() {
    let world = World::start(&["a", "b", "c"]).await;
    let ids = mk_pair(&world).await;
    let (one, two) = ids.split_once(' ').unwrap();
    let controller = world.controller().await;
    let group = create_group(&controller, mk_group("all", &[one, two])).await.unwrap();
    assert_eq!(create_group(&controller, mk_group("all", &[two, one])).await.unwrap(), group);
    let with = |key: &str| {
        let parameters = [(key.to_owned(), "Delete".to_owned())].into();
        CreateVolumeGroupSnapshotRequest { parameters, ..mk_group("all", &[one, two]) }
    };
    assert_eq!(create_group(&controller, with("deletionPolicy")).await.unwrap(), group, "as a class has it");
    let many: Vec<&str> = vec![one; 33];
    for (request, code, named) in [
        (mk_group("", &[one]), Code::InvalidArgument, "name"),
        (mk_group("x", &[]), Code::InvalidArgument, "source_volume_ids"),
        (with("deletionpolicy"), Code::InvalidArgument, "deletionpolicy"),
        (mk_group("x", &many), Code::InvalidArgument, "source_volume_ids"),
        (mk_group("x", &[one, one]), Code::InvalidArgument, "twice"),
        (mk_group("x", &[one, "nonsense"]), Code::NotFound, "nonsense"),
        (mk_group("all", &[one]), Code::AlreadyExists, "all"),
    ] {
        let status = create_group(&controller, request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(named), "{status}");
    }
    let mut client = controller.groups();
    let mk = |id: &str, members: &[&str]| GetVolumeGroupSnapshotRequest {
        group_snapshot_id: id.to_owned(),
        snapshot_ids: members.iter().map(|id| (*id).to_owned()).collect(),
        ..GetVolumeGroupSnapshotRequest::default()
    };
    let id = group.group_snapshot_id.as_str();
    let got = client.get_volume_group_snapshot(mk(id, &[])).await.unwrap().into_inner();
    assert_eq!(got.group_snapshot.unwrap(), group);
    for (request, code) in [
        (mk("", &[]), Code::InvalidArgument),
        (mk("nonsense", &[]), Code::NotFound),
        (mk(id, &["nonsense"]), Code::InvalidArgument),
    ] {
        assert_eq!(client.get_volume_group_snapshot(request).await.unwrap_err().code(), code);
    }
    delete_group(&controller, "nonsense").await.expect("what cannot exist is deleted");
    assert_eq!(delete_group(&controller, "").await.unwrap_err().code(), Code::InvalidArgument);
}

/// A group of two, of which the volumes stay.
#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_group_is_gone_with_its_snapshots_whatever_is_killed() {
    killed_anywhere(
        &["a", "b", "c"],
        async |world| {
            let ids = mk_pair(world).await;
            let request = mk_group("all", &ids.split(' ').collect::<Vec<_>>());
            let group = create_group(&world.controller().await, request).await.unwrap();
            format!("{} {ids}", group.group_snapshot_id)
        },
        async |controller, ids| delete_group(controller, ids.split(' ').next().unwrap()).await,
        async |world, controller, ids, ()| {
            assert!(world.groups.list_groups().await.unwrap().is_empty());
            assert_eq!(controller.snapshots(all()).await.unwrap(), Vec::<String>::new());
            for id in ids.split(' ').skip(1) {
                let record = world.record(id).await;
                assert!(record.snapshots.is_empty() && record.requested.is_empty());
                assert_eq!(world.count(id), 3);
            }
        },
    )
    .await;
}
