//! Snapshots, clones, growth and groups through the controller, killed between any two changes and repeated, with data
//! processes that obey the record's rules. What is in the snapshots is tested with real data processes.

use std::sync::{Arc, Mutex};

use holdfast_proto::csi::*;
use holdfast_storage_core::ids::NodeName;
use holdfast_storage_core::record::{Formatted, VolumeRecord};
use holdfast_storage_core::transitions;
use tonic::{Code, Status};

use crate::support::fakes::{Meanwhile, MeddledStore};
use crate::support::killed::{all, killed_anywhere, mk_snapshot, mk_volume};
use crate::support::requests::{
    Controller, mk_block, mk_create, mk_from_snapshot, mk_from_volume, mk_sized, mk_with,
};
use crate::support::world::{GIB, World};

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_is_one_whatever_is_killed_and_however_often_it_is_asked_for() {
    killed_anywhere(
        &["a", "b", "c"],
        mk_volume,
        async |controller, id| controller.snapshot(id, "nightly").await,
        async |world, controller, id, snapshot| {
            assert!(snapshot.ready_to_use && snapshot.creation_time.is_some());
            assert_eq!((snapshot.size_bytes, snapshot.source_volume_id.as_str()), (1 << 30, id));
            assert_eq!(
                controller.snapshots(all()).await.unwrap(),
                std::slice::from_ref(&snapshot.snapshot_id)
            );
            assert_eq!(controller.snapshot(id, "nightly").await.unwrap(), snapshot, "asked for again");
            let record = world.record(id).await;
            assert_eq!((record.snapshots.len(), record.requested.len()), (1, 1));
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_snapshot_is_gone_with_its_name_whatever_is_killed() {
    killed_anywhere(
        &["a", "b", "c"],
        mk_snapshot,
        async |controller, id| controller.delete_snapshot(id).await,
        async |world, controller, id, ()| {
            assert_eq!(controller.snapshots(all()).await.unwrap(), Vec::<String>::new());
            let volume = id.split('@').next().unwrap();
            let record = world.record(volume).await;
            assert!(record.snapshots.is_empty() && record.requested.is_empty());
            let next = controller.snapshot(volume, "nightly").await.unwrap();
            assert_ne!(next.snapshot_id, id, "an id is never used again (R34)");
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r30_a_volume_from_a_snapshot_is_whole_and_needs_it_no_longer_whatever_is_killed() {
    killed_anywhere(
        &["a", "b", "c", "d"],
        mk_snapshot,
        async |controller, id| controller.create(&mk_from_snapshot("copy", id)).await,
        async |world, controller, id, copy| {
            assert_clone(world, &copy).await;
            let source = world.record(id.split('@').next().unwrap()).await;
            assert!(source.snapshots[0].clones.is_empty(), "the snapshot is free again");
            controller.delete_snapshot(id).await.unwrap();
            controller.delete(&copy.volume_id).await.unwrap();
            controller.delete(&source.volume_id.to_string()).await.unwrap();
            world.assert_empty().await;
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn r30_a_volume_from_a_volume_leaves_no_snapshot_behind_whatever_is_killed() {
    killed_anywhere(
        &["a", "b", "c", "d"],
        mk_volume,
        async |controller, id| controller.create(&mk_from_volume("copy", id)).await,
        async |world, controller, id, copy| {
            assert_clone(world, &copy).await;
            let source = world.record(id).await;
            assert!(source.snapshots.is_empty() && source.requested.is_empty(), "{source:?}");
            assert_eq!(controller.snapshots(all()).await.unwrap(), Vec::<String>::new());
            controller.delete(id).await.unwrap();
            controller.delete(&copy.volume_id).await.unwrap();
            world.assert_empty().await;
        },
    )
    .await;
}

/// Every replica in sync was made from a holder, on its node.
async fn assert_clone(world: &World, copy: &Volume) {
    assert!(copy.content_source.is_some());
    let record = world.record(&copy.volume_id).await;
    assert!(record.source.as_ref().is_some_and(|source| source.linked));
    let kept = record
        .replicas
        .iter()
        .filter(|(_, r)| r.state != holdfast_storage_core::record::ReplicaState::Faulted);
    assert_eq!(kept.count(), 3);
    for (id, replica) in record.replicas.iter().filter(|(id, _)| record.in_sync.contains(id)) {
        assert!(["a", "b", "c"].contains(&replica.node.0.as_str()), "{} never held it", replica.node);
        assert!(world.pool(static_name(&replica.node)).replicas().contains_key(&id.to_string()));
    }
}

fn static_name(node: &NodeName) -> &'static str {
    ["a", "b", "c", "d"].into_iter().find(|name| *name == node.0).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_wants_its_source_s_size_and_file_system_and_is_the_same_when_asked_for_again() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let source = controller.create(&mk_create("data")).await.unwrap().volume_id;
    let id = controller.snapshot(&source, "nightly").await.unwrap().snapshot_id;
    let sized = |required, limit| CreateVolumeRequest {
        capacity_range: Some(CapacityRange { required_bytes: required, limit_bytes: limit }),
        ..mk_from_snapshot("copy", &id)
    };
    for (request, code) in [
        (sized(16 << 20, 0), Code::OutOfRange),
        (sized(0, 16 << 20), Code::OutOfRange),
        (mk_with(mk_from_snapshot("copy", &id), "fsType", "xfs"), Code::InvalidArgument),
        (mk_from_snapshot("copy", "nonsense"), Code::NotFound),
        (mk_from_snapshot("copy", &format!("{source}@{source}")), Code::NotFound),
        (mk_from_snapshot("copy", ""), Code::InvalidArgument),
        (mk_from_volume("copy", "nonsense"), Code::NotFound),
        (mk_from_volume("copy", &"0".repeat(32)), Code::NotFound),
    ] {
        let status = controller.create(&request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
    }
    let copy = controller.create(&sized(2 << 30, 0)).await.unwrap();
    assert_eq!(copy.capacity_bytes, 2 << 30);
    assert_eq!(controller.create(&sized(2 << 30, 0)).await.unwrap(), copy);
    for other in [mk_from_volume("copy", &source), mk_sized("copy", 2 << 30, 0)] {
        let status = controller.create(&other).await.unwrap_err();
        assert_eq!(status.code(), Code::AlreadyExists, "{status}");
    }
    let plain = CreateVolumeRequest { capacity_range: None, ..mk_from_snapshot("plain", &id) };
    assert_eq!(controller.create(&plain).await.unwrap().capacity_bytes, 1 << 30, "the source's size");
    let raw = CreateVolumeRequest { volume_capabilities: vec![mk_block()], ..mk_from_snapshot("raw", &id) };
    let raw = controller.create(&raw).await.unwrap();
    assert_eq!(world.record(&raw.volume_id).await.formatted, Formatted::Yes, "never formatted (R36)");
}

#[tokio::test(flavor = "multi_thread")]
async fn r36_a_clone_is_formatted_only_if_its_snapshot_never_was() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let source = controller.create(&mk_create("data")).await.unwrap().volume_id;
    let before = controller.snapshot(&source, "before").await.unwrap().snapshot_id;
    world.change(&source, |record| transitions::set_formatted(record, Formatted::Formatting).unwrap()).await;
    world.change(&source, |record| transitions::set_formatted(record, Formatted::Yes).unwrap()).await;
    let after = controller.snapshot(&source, "after").await.unwrap().snapshot_id;
    for (name, snapshot, state) in [("one", before, Formatted::Never), ("two", after, Formatted::Yes)] {
        let copy = controller.create(&mk_from_snapshot(name, &snapshot)).await.unwrap();
        assert_eq!(world.record(&copy.volume_id).await.formatted, state);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn where_few_nodes_hold_the_snapshot_the_rest_of_the_clone_is_to_be_rebuilt() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let one = mk_with(mk_create("data"), "replicas", "1");
    let source = controller.create(&one).await.unwrap().volume_id;
    let id = controller.snapshot(&source, "nightly").await.unwrap().snapshot_id;
    let copy = controller.create(&mk_from_snapshot("copy", &id)).await.unwrap();
    let record = world.record(&copy.volume_id).await;
    assert_eq!((record.in_sync.len(), record.replicas.len()), (1, 3));
    assert_eq!(world.count(&copy.volume_id), 3);
    let request = ControllerGetVolumeHealthRequest {
        volume_id: copy.volume_id,
        ..ControllerGetVolumeHealthRequest::default()
    };
    let health = controller.0.clone().controller_get_volume_health(request).await.unwrap().into_inner();
    let health = health.volume_health.unwrap();
    assert_eq!(health.health_statuses[0].status(), VolumeHealthErrorType::Degraded);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_outlives_its_volume_and_takes_the_rest_of_it_along() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let volume = controller.create(&mk_create("data")).await.unwrap().volume_id;
    let id = controller.snapshot(&volume, "nightly").await.unwrap().snapshot_id;
    controller.delete(&volume).await.unwrap();
    controller.delete(&volume).await.expect("deleted twice is deleted");
    assert!(controller.list(0, "").await.unwrap().entries.is_empty());
    for code in [
        controller.publish(&volume, "a").await.map(drop).unwrap_err().code(),
        controller.snapshot(&volume, "later").await.map(drop).unwrap_err().code(),
        controller.expand(&volume, 2 << 30, 0).await.map(drop).unwrap_err().code(),
        controller.create(&mk_from_volume("copy", &volume)).await.map(drop).unwrap_err().code(),
    ] {
        assert_eq!(code, Code::NotFound);
    }
    let other = controller.create(&mk_create("data")).await.expect("the name is free");
    assert_ne!(other.volume_id, volume);
    assert_eq!(controller.snapshots(all()).await.unwrap(), std::slice::from_ref(&id));
    let restored = controller.create(&mk_from_snapshot("restored", &id)).await.unwrap();
    controller.delete_snapshot(&id).await.unwrap();
    assert_eq!(world.count(&volume), 0, "nothing keeps the volume any more");
    controller.delete(&restored.volume_id).await.unwrap();
    controller.delete(&other.volume_id).await.unwrap();
    world.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_snapshot_that_is_answered_while_its_volume_is_being_deleted_is_kept() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let volume = controller.create(&mk_create("data")).await.unwrap().volume_id;
    let (client, source) = (controller.clone(), volume.clone());
    let snapshot: Meanwhile = Arc::new(move || {
        let (client, source) = (client.clone(), source.clone());
        Box::pin(async move { drop(client.snapshot(&source, "nightly").await.unwrap()) })
    });
    let store = MeddledStore { store: Arc::clone(&world.store), after_read: Mutex::new(Some(snapshot)) };
    let deleting = world.serve(Arc::new(store), Arc::clone(&world.groups)).await;
    deleting.delete(&volume).await.unwrap();
    let [id] = controller.snapshots(all()).await.unwrap().try_into().unwrap();
    assert!(world.record(&volume).await.retired);
    controller.create(&mk_from_snapshot("restored", &id)).await.expect("it is all there");
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_of_snapshots_are_filtered_and_paged() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let mut ids = Vec::new();
    let mut volumes = Vec::new();
    for n in 0..2 {
        let volume = controller.create(&mk_create(&format!("data-{n}"))).await.unwrap().volume_id;
        for m in 0..2 {
            ids.push(controller.snapshot(&volume, &format!("s{n}{m}")).await.unwrap().snapshot_id);
        }
        volumes.push(volume);
    }
    let of = |source: &str, snapshot: &str| ListSnapshotsRequest {
        source_volume_id: source.to_owned(),
        snapshot_id: snapshot.to_owned(),
        ..all()
    };
    assert_eq!(controller.snapshots(of(&volumes[0], "")).await.unwrap().len(), 2);
    assert_eq!(controller.snapshots(of("", &ids[3])).await.unwrap(), [ids[3].clone()]);
    assert_eq!(controller.snapshots(of(&volumes[0], &ids[3])).await.unwrap(), Vec::<String>::new());
    assert_eq!(controller.snapshots(of("nonsense", "")).await.unwrap(), Vec::<String>::new());
    assert_eq!(controller.snapshots(of("", "nonsense")).await.unwrap(), Vec::<String>::new());
    let mut seen = Vec::new();
    let mut token = String::new();
    loop {
        let request = ListSnapshotsRequest { max_entries: 3, starting_token: token, ..all() };
        let page = controller.0.clone().list_snapshots(request).await.unwrap().into_inner();
        seen.extend(page.entries.into_iter().map(|e| e.snapshot.unwrap().snapshot_id));
        token = page.next_token;
        if token.is_empty() {
            break;
        }
        controller.delete_snapshot(&token).await.unwrap();
    }
    ids.sort();
    assert_eq!(seen, ids, "a token outlives the snapshot it names");
    let bogus = ListSnapshotsRequest { starting_token: "bogus".to_owned(), ..all() };
    assert_eq!(controller.snapshots(bogus).await.unwrap_err().code(), Code::Aborted);
    let get = |id: &str| GetSnapshotRequest { snapshot_id: id.to_owned(), ..GetSnapshotRequest::default() };
    let got = controller.0.clone().get_snapshot(get(&ids[3])).await.unwrap().into_inner().snapshot.unwrap();
    assert_eq!(got.snapshot_id, ids[3]);
    for (id, code) in [("", Code::InvalidArgument), ("nonsense", Code::NotFound)] {
        assert_eq!(controller.0.clone().get_snapshot(get(id)).await.unwrap_err().code(), code);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_snapshot_requests_are_refused_by_field_and_change_nothing() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let volume = controller.create(&mk_create("data")).await.unwrap().volume_id;
    let other = controller.create(&mk_create("other")).await.unwrap().volume_id;
    controller.snapshot(&volume, "taken").await.unwrap();
    let mk = |source: &str, name: &str| CreateSnapshotRequest {
        source_volume_id: source.to_owned(),
        name: name.to_owned(),
        ..CreateSnapshotRequest::default()
    };
    let mut odd = mk(&volume, "odd");
    odd.parameters.insert("color".to_owned(), "red".to_owned());
    for (request, code, named) in [
        (mk("", "x"), Code::InvalidArgument, "source_volume_id"),
        (mk(&volume, ""), Code::InvalidArgument, "name"),
        (mk(&volume, &"n".repeat(129)), Code::InvalidArgument, "name"),
        (mk("../../etc", "x"), Code::NotFound, "etc"),
        (mk(&"0".repeat(32), "x"), Code::NotFound, "0000"),
        (mk(&other, "taken"), Code::AlreadyExists, "taken"),
        (odd, Code::InvalidArgument, "color"),
    ] {
        let status = controller.0.clone().create_snapshot(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(named), "{status}");
    }
    assert_eq!(controller.delete_snapshot("").await.unwrap_err().code(), Code::InvalidArgument);
    controller.delete_snapshot("nonsense").await.expect("what cannot exist is deleted");
    assert_eq!(controller.snapshots(all()).await.unwrap().len(), 1);
    assert!(world.record(&other).await.requested.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn r31_a_volume_grows_by_whole_regions_within_its_bounds_and_never_shrinks() {
    let world = World::start_with(&[("a", 8 * GIB), ("b", 8 * GIB), ("c", 8 * GIB)]).await;
    let controller = world.controller().await;
    let volume = controller.create(&mk_create("data")).await.unwrap().volume_id;
    assert_eq!(controller.expand(&volume, (2 << 30) + 1, 0).await.unwrap(), (2 << 30) + (1 << 20));
    assert_eq!(controller.expand(&volume, 1 << 30, 0).await.unwrap(), (2 << 30) + (1 << 20), "large enough");
    controller.publish(&volume, "b").await.unwrap();
    assert_eq!(controller.expand(&volume, 3 << 30, 3 << 30).await.unwrap(), 3 << 30, "while it is attached");
    for (id, required, limit, code) in [
        (volume.as_str(), 0, 1 << 30, Code::OutOfRange),
        (&volume, -1, 0, Code::InvalidArgument),
        (&volume, 0, 0, Code::InvalidArgument),
        (&volume, 4 << 30, 2 << 30, Code::OutOfRange),
        (&volume, i64::MAX, 0, Code::OutOfRange),
        (&volume, 20 << 30, 0, Code::ResourceExhausted),
        ("", 4 << 30, 0, Code::InvalidArgument),
        ("nonsense", 4 << 30, 0, Code::NotFound),
    ] {
        let status = controller.expand(id, required, limit).await.unwrap_err();
        assert_eq!(status.code(), code, "{required} {limit}: {status}");
    }
    assert_eq!(world.record(&volume).await.size_bytes, 3 << 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn only_ill_volumes_are_listed_as_ill() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let sound = controller.create(&mk_create("sound")).await.unwrap().volume_id;
    let ill = controller.create(&mk_create("ill")).await.unwrap().volume_id;
    world.change(&ill, |record| VolumeRecord { restored: true, ..record.clone() }).await;
    let list = ControllerListVolumeHealthRequest::default();
    let found = controller.0.clone().controller_list_volume_health(list).await.unwrap().into_inner();
    let ids: Vec<&str> = found.entries.iter().map(|entry| entry.volume_id.as_str()).collect();
    assert_eq!(ids, [ill.as_str()]);
    let entry = &found.entries[0].health_statuses[0];
    assert_eq!(
        (entry.status(), entry.reason.as_str()),
        (VolumeHealthErrorType::Inaccessible, "RecordRestored")
    );
    for (id, code) in [("", Code::InvalidArgument), ("nonsense", Code::NotFound)] {
        let request = ControllerGetVolumeRequest { volume_id: id.to_owned() };
        assert_eq!(controller.0.clone().controller_get_volume(request).await.unwrap_err().code(), code);
        let request = ControllerGetVolumeHealthRequest {
            volume_id: id.to_owned(),
            ..ControllerGetVolumeHealthRequest::default()
        };
        assert_eq!(
            controller.0.clone().controller_get_volume_health(request).await.unwrap_err().code(),
            code
        );
    }
    controller.publish(&sound, "b").await.unwrap();
    let request = ControllerGetVolumeRequest { volume_id: sound.clone() };
    let got = controller.0.clone().controller_get_volume(request).await.unwrap().into_inner();
    assert_eq!(got.volume.unwrap().volume_id, sound);
    assert_eq!(got.status.unwrap().published_node_ids, ["b"]);
}

async fn allocated(
    controller: &Controller,
    snapshot_id: &str,
    starting_offset: i64,
    max_results: i32,
) -> Result<Vec<GetMetadataAllocatedResponse>, Status> {
    let request = GetMetadataAllocatedRequest {
        snapshot_id: snapshot_id.to_owned(),
        starting_offset,
        max_results,
        ..GetMetadataAllocatedRequest::default()
    };
    let mut stream = controller.metadata().get_metadata_allocated(request).await?.into_inner();
    let mut messages = Vec::new();
    while let Some(message) = stream.message().await? {
        messages.push(message);
    }
    Ok(messages)
}

fn tuples(messages: &[GetMetadataAllocatedResponse]) -> Vec<(i64, i64)> {
    let all = messages.iter().flat_map(|message| &message.block_metadata);
    all.map(|tuple| (tuple.byte_offset / 4096, tuple.size_bytes / 4096)).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn blocks_of_a_snapshot_are_told_in_order_in_pages_from_any_offset_and_by_any_holder() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let snapshot = mk_snapshot(&world).await;
    // Runs that touch, also across two ranges that a node is asked for.
    let blocks = vec![0, 1, 5, 16_383, 16_384, 40_000];
    for pool in &world.pools {
        pool.state.lock().unwrap().blocks = blocks.clone();
    }
    let all = [(0, 2), (5, 1), (16_383, 2), (40_000, 1)];
    let whole = allocated(&controller, &snapshot, 0, 0).await.unwrap();
    assert_eq!(tuples(&whole), all);
    assert_eq!(whole[0].volume_capacity_bytes, 1 << 30);
    assert_eq!(whole[0].block_metadata_type(), BlockMetadataType::VariableLength);
    let paged = allocated(&controller, &snapshot, 0, 1).await.unwrap();
    assert!(paged.iter().all(|message| message.block_metadata.len() == 1));
    assert_eq!(tuples(&paged), all);
    for (block, left) in [(2, &all[1..]), (6, &all[2..]), (40_001, &[])] {
        assert_eq!(tuples(&allocated(&controller, &snapshot, block * 4096, 0).await.unwrap()), left);
    }
    for pool in &world.pools[..2] {
        pool.state.lock().unwrap().blocks_fail = true;
    }
    assert_eq!(tuples(&allocated(&controller, &snapshot, 0, 0).await.unwrap()), all, "one holder is left");
    world.pools[2].state.lock().unwrap().blocks_fail = true;
    assert_eq!(allocated(&controller, &snapshot, 0, 0).await.unwrap_err().code(), Code::Unavailable);
    for (id, offset, max, code) in [
        ("", 0, 0, Code::InvalidArgument),
        ("nonsense", 0, 0, Code::NotFound),
        (snapshot.as_str(), -1, 0, Code::OutOfRange),
        (&snapshot, (1 << 30) + 1, 0, Code::OutOfRange),
        (&snapshot, 0, -1, Code::InvalidArgument),
    ] {
        assert_eq!(allocated(&controller, id, offset, max).await.unwrap_err().code(), code, "{id} {offset}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delta_is_between_two_snapshots_of_one_volume_the_older_one_first() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let one = controller.create(&mk_create("one")).await.unwrap().volume_id;
    let two = controller.create(&mk_create("two")).await.unwrap().volume_id;
    let first = controller.snapshot(&one, "first").await.unwrap().snapshot_id;
    let second = controller.snapshot(&one, "second").await.unwrap().snapshot_id;
    let other = controller.snapshot(&two, "other").await.unwrap().snapshot_id;
    let ask = async |base: &str, target: &str| {
        let request = GetMetadataDeltaRequest {
            base_snapshot_id: base.to_owned(),
            target_snapshot_id: target.to_owned(),
            ..GetMetadataDeltaRequest::default()
        };
        let mut stream = controller.metadata().get_metadata_delta(request).await?.into_inner();
        stream.message().await
    };
    for (base, target, code) in [
        ("", second.as_str(), Code::InvalidArgument),
        (&first, "", Code::InvalidArgument),
        ("nonsense", &second, Code::NotFound),
        (&first, "nonsense", Code::NotFound),
        (&second, &first, Code::InvalidArgument),
        (&first, &first, Code::InvalidArgument),
        (&other, &second, Code::InvalidArgument),
    ] {
        let status = ask(base, target).await.unwrap_err();
        assert_eq!(status.code(), code, "{base} {target}: {status}");
    }
    let empty = ask(&first, &second).await.unwrap().unwrap();
    assert!(empty.block_metadata.is_empty(), "equal snapshots have one message without tuples");
    assert_eq!(empty.volume_capacity_bytes, 1 << 30);
}

#[tokio::test(flavor = "multi_thread")]
async fn r31_a_volume_grows_once_whatever_is_killed() {
    killed_anywhere(
        &["a", "b", "c"],
        mk_volume,
        async |controller, id| controller.expand(id, 2 << 30, 2 << 30).await,
        async |world, controller, id, bytes| {
            assert_eq!((bytes, world.record(id).await.size_bytes), (2 << 30, 2 << 30));
            controller.publish(id, "a").await.unwrap();
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_volume_goes_with_the_last_of_its_snapshots_whatever_is_killed() {
    killed_anywhere(
        &["a", "b", "c"],
        async |world| {
            let id = mk_snapshot(world).await;
            world.controller().await.delete(id.split('@').next().unwrap()).await.unwrap();
            id
        },
        async |controller, id| controller.delete_snapshot(id).await,
        async |world, controller, _, ()| {
            assert_eq!(controller.snapshots(all()).await.unwrap(), Vec::<String>::new());
            world.assert_empty().await;
        },
    )
    .await;
}
