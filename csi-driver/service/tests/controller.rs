//! The controller through real gRPC on a Unix socket, with pools that obey the real rules.

use std::collections::HashMap;
use std::time::Duration;

use holdfast_proto::csi::identity_client::IdentityClient;
use holdfast_proto::csi::volume_capability::access_mode::Mode;
use holdfast_proto::csi::*;
use holdfast_storage_core::record::ReplicaState;
use tonic::Code;

use crate::support::fakes::{Cut, announce};
use crate::support::requests::{mk_block, mk_create, mk_mode, mk_mount, mk_publish, mk_sized, mk_with};
use crate::support::world::{GIB, World};

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_is_made_on_distinct_nodes_and_deleted_from_all_of_them() {
    let world = World::start(&["a", "b", "c", "d"]).await;
    let volume = world.controller().await.create(&mk_create("data")).await.unwrap();
    assert_eq!(volume.capacity_bytes, 1 << 30);
    assert_eq!(world.count(&volume.volume_id), 3);
    let record = world.record(&volume.volume_id).await;
    assert_eq!(
        (record.in_sync.len(), record.params.replicas, record.params.fs_type.as_str()),
        (3, 3, "ext4")
    );
    for replica in record.replicas.keys() {
        let holders = world.pools.iter().filter(|p| p.replicas().contains_key(&replica.to_string())).count();
        assert_eq!(holders, 1);
    }
    let controller = world.controller().await;
    controller.delete(&volume.volume_id).await.unwrap();
    controller.delete(&volume.volume_id).await.expect("deleted twice is deleted");
    world.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn creating_twice_by_one_name_is_one_volume_and_with_other_wishes_it_already_exists() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let volume = controller.create(&mk_create("data")).await.unwrap();
    assert_eq!(controller.create(&mk_create("data")).await.unwrap().volume_id, volume.volume_id);
    for (what, request) in [
        ("a larger size", mk_sized("data", 2 << 30, 0)),
        ("a smaller limit", mk_sized("data", 0, 64 << 20)),
        ("fewer replicas", mk_with(mk_create("data"), "replicas", "2")),
        ("another file system", mk_with(mk_create("data"), "fsType", "xfs")),
        (
            "a raw block volume",
            CreateVolumeRequest { volume_capabilities: vec![mk_block()], ..mk_create("data") },
        ),
    ] {
        let status = controller.create(&request).await.unwrap_err();
        assert_eq!(status.code(), Code::AlreadyExists, "{what}: {status}");
        assert!(status.message().contains(&volume.volume_id), "{status}");
    }
    assert_eq!(world.count(&volume.volume_id), 3);
    assert_eq!(world.store.list().await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_by_field_and_changes_nothing() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let no_mode = VolumeCapability { access_mode: None, ..mk_mount("") };
    let no_type = VolumeCapability { access_type: None, ..mk_mount("") };
    let with = |capability: VolumeCapability| CreateVolumeRequest {
        volume_capabilities: vec![capability],
        ..mk_create("data")
    };
    let source = VolumeContentSource { r#type: None };
    for (request, code, named) in [
        (CreateVolumeRequest { name: String::new(), ..mk_create("") }, Code::InvalidArgument, "name"),
        (mk_create(&"n".repeat(200)), Code::InvalidArgument, "name"),
        (
            CreateVolumeRequest { volume_capabilities: vec![], ..mk_create("data") },
            Code::InvalidArgument,
            "capabilities",
        ),
        (with(no_mode), Code::InvalidArgument, "access_mode"),
        (with(no_type), Code::InvalidArgument, "access_type"),
        (with(mk_mode(Mode::MultiNodeMultiWriter)), Code::InvalidArgument, "MULTI_NODE_MULTI_WRITER"),
        (with(mk_mount("ntfs")), Code::InvalidArgument, "ntfs"),
        (mk_sized("data", 0, 0), Code::InvalidArgument, "capacity_range"),
        (mk_sized("data", -5, 0), Code::InvalidArgument, "required_bytes"),
        (mk_sized("data", 10 << 20, 5 << 20), Code::OutOfRange, "limit_bytes"),
        (mk_sized("data", 1 << 60, 0), Code::OutOfRange, "required_bytes"),
        (mk_with(mk_create("data"), "replicas", "0"), Code::InvalidArgument, "replicas"),
        (mk_with(mk_create("data"), "color", "red"), Code::InvalidArgument, "color"),
        (mk_with(mk_create("data"), "fsType", "ext2"), Code::InvalidArgument, "ext2"),
        (
            CreateVolumeRequest { volume_content_source: Some(source), ..mk_create("data") },
            Code::InvalidArgument,
            "source",
        ),
        (mk_sized("data", 200 << 30, 0), Code::ResourceExhausted, "free"),
        (mk_with(mk_create("data"), "replicas", "4"), Code::Unavailable, "4 replicas"),
    ] {
        let status = controller.create(&request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(named), "{named}: {status}");
    }
    world.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pool_without_space_is_named_with_what_it_has() {
    let world = World::start_with(&[("a", 10 * GIB), ("b", 10 * GIB), ("c", GIB / 2)]).await;
    let controller = world.controller().await;
    let status = controller.create(&mk_create("data")).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    assert!(status.message().contains(&format!("c has {} bytes free", GIB / 2)), "{status}");
    world.assert_empty().await;
    controller.create(&mk_sized("small", 128 << 20, 0)).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn space_is_promised_once_also_to_concurrent_calls() {
    let world = World::start_with(&[("a", 2 * GIB), ("b", 2 * GIB), ("c", 2 * GIB)]).await;
    let controller = world.controller().await;
    let calls = (0..6).map(|n| {
        let controller = controller.clone();
        tokio::spawn(async move { controller.create(&mk_create(&format!("data-{n}"))).await })
    });
    let mut made = 0;
    for call in calls.collect::<Vec<_>>() {
        match call.await.unwrap() {
            Ok(_) => made += 1,
            Err(status) => assert_eq!(status.code(), Code::ResourceExhausted, "{status}"),
        }
    }
    assert_eq!(made, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_is_down_or_fails_is_passed_over_and_never_forgotten() {
    let world = World::start(&["a", "b", "c", "d"]).await;
    // Announced, but nobody listens there.
    announce(&world.book, "dead", "127.0.0.1:9", 100 * GIB).await;
    world.pool("b").set_create_fails(Some((true, "the disk is odd")));
    let controller = world.controller().await;
    let volume = controller.create(&mk_create("data")).await.unwrap();
    let record = world.record(&volume.volume_id).await;
    assert_eq!(record.in_sync.len(), 3);
    for id in &record.in_sync {
        let node = &record.replicas[id].node.0;
        assert!(node != "dead" && node != "b", "{node}");
    }
    let faulted: Vec<_> = record.replicas.values().filter(|r| r.state == ReplicaState::Faulted).collect();
    assert_eq!(faulted.len(), 1, "b may hold one after all");
    assert_eq!(world.pool("b").replicas().len(), 1);
    world.pool("b").set_create_fails(None);
    controller.delete(&volume.volume_id).await.unwrap();
    world.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_no_node_to_spare_creation_fails_and_completes_when_repeated() {
    let world = World::start(&["a", "b", "c"]).await;
    world.pool("b").set_create_fails(Some((false, "")));
    let controller = world.controller().await;
    let status = controller.create(&mk_create("data")).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("node b"), "{status}");
    world.pool("b").set_create_fails(None);
    let volume = controller.create(&mk_create("data")).await.unwrap();
    assert_eq!(world.count(&volume.volume_id), 3);
    world.assert_nothing_unlisted().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_create_that_is_cut_at_any_step_is_completed_by_the_next_and_leaks_nothing() {
    let mut steps = 0;
    for happens in [false, true] {
        for step in 0.. {
            let world = World::start(&["a", "b", "c", "d"]).await;
            let cut = Cut::after(step, happens);
            let first = world.cut_controller(&cut).await.create(&mk_create("data")).await;
            if !cut.was_reached() {
                first.unwrap();
                break;
            }
            steps += 1;
            world.heal();
            let volume = world.controller().await.create(&mk_create("data")).await.unwrap();
            let record = world.record(&volume.volume_id).await;
            assert_eq!(record.in_sync.len(), 3, "step {step}");
            for id in &record.in_sync {
                let replica = &record.replicas[id];
                assert!(world.pool(&replica.node.0).replicas().contains_key(&id.to_string()), "step {step}");
            }
            world.assert_nothing_unlisted().await;
            assert_eq!(world.store.list().await.unwrap().len(), 1, "step {step}");
        }
    }
    assert_eq!(steps, 2 * 4, "one record and three replicas, each before and after");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_that_is_cut_at_any_step_is_completed_by_the_next_and_leaks_nothing() {
    let mut steps = 0;
    for happens in [false, true] {
        for step in 0.. {
            let world = World::start(&["a", "b", "c"]).await;
            let volume = world.controller().await.create(&mk_create("data")).await.unwrap();
            let cut = Cut::after(step, happens);
            let first = world.cut_controller(&cut).await.delete(&volume.volume_id).await;
            if !cut.was_reached() {
                first.unwrap();
                break;
            }
            steps += 1;
            world.heal();
            world.assert_nothing_unlisted().await;
            world.controller().await.delete(&volume.volume_id).await.unwrap();
            world.assert_empty().await;
        }
    }
    assert_eq!(steps, 2 * 5, "tombstone, three replicas, record, each before and after");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_delete_needs_every_node_and_keeps_the_tombstone_until_then() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let volume = controller.create(&mk_create("data")).await.unwrap();
    world.pool("c").set_cut(Cut::after(0, false));
    let status = controller.delete(&volume.volume_id).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("node c"), "{status}");
    let status = controller.publish(&volume.volume_id, "a").await.unwrap_err();
    assert_eq!(status.code(), Code::NotFound, "{status}");
    assert!(controller.list(0, "").await.unwrap().entries.is_empty());
    // The name is free at once, for a volume of its own.
    world.heal();
    let other = controller.create(&mk_create("data")).await.unwrap();
    assert_ne!(other.volume_id, volume.volume_id);
    controller.delete(&volume.volume_id).await.unwrap();
    world.assert_nothing_unlisted().await;
    assert_eq!(world.count(&other.volume_id), 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn publishing_is_to_one_node_and_counts_attachments() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let id = controller.create(&mk_create("data")).await.unwrap().volume_id;
    let first = controller.publish(&id, "a").await.unwrap();
    assert_eq!(first["attachment"], "1");
    assert_eq!(controller.publish(&id, "a").await.unwrap(), first, "twice is once");
    let status = controller.publish(&id, "b").await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(status.message().contains("node a"), "{status}");
    let read_only = ControllerPublishVolumeRequest { readonly: true, ..mk_publish(&id, "a") };
    let status = controller.publish_as(read_only).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists, "{status}");
    let status = controller.delete(&id).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(status.message().contains("node a"), "{status}");

    let listed = controller.list(0, "").await.unwrap();
    assert_eq!(listed.entries[0].status.as_ref().unwrap().published_node_ids, ["a"]);
    controller.unpublish(&id, "b").await.expect("it is not at b: nothing to do");
    assert!(world.record(&id).await.attached_to.is_some());
    controller.unpublish(&id, "a").await.unwrap();
    controller.unpublish(&id, "a").await.expect("twice is once");
    let second = controller.publish(&id, "b").await.unwrap();
    assert_eq!(second["attachment"], "2");
    controller.unpublish(&id, "").await.expect("no node means every node");
    assert_eq!(world.record(&id).await.attached_to, None);
    controller
        .unpublish("0123456789abcdef0123456789abcdef", "a")
        .await
        .expect("an absent volume is unpublished");
    controller.unpublish("../../etc", "a").await.expect("an impossible volume too");
}

#[tokio::test(flavor = "multi_thread")]
async fn publishing_needs_a_volume_a_node_and_a_fitting_capability() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let id = controller.create(&mk_create("data")).await.unwrap().volume_id;
    let absent = "0123456789abcdef0123456789abcdef";
    let block =
        ControllerPublishVolumeRequest { volume_capability: Some(mk_block()), ..mk_publish(&id, "a") };
    let none = ControllerPublishVolumeRequest { volume_capability: None, ..mk_publish(&id, "a") };
    let xfs =
        ControllerPublishVolumeRequest { volume_capability: Some(mk_mount("xfs")), ..mk_publish(&id, "a") };
    for (request, code, named) in [
        (mk_publish("", "a"), Code::InvalidArgument, "volume_id"),
        (mk_publish(&id, ""), Code::InvalidArgument, "node_id"),
        (none, Code::InvalidArgument, "volume_capability"),
        (block, Code::InvalidArgument, "block"),
        (xfs, Code::InvalidArgument, "ext4"),
        (mk_publish(absent, "a"), Code::NotFound, absent),
        (mk_publish("../x", "a"), Code::NotFound, "volume_id"),
        // The book is young: the node may still announce itself.
        (mk_publish(&id, "nowhere"), Code::Unavailable, "nowhere"),
    ] {
        let status = controller.publish_as(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(named), "{status}");
    }
    assert_eq!(world.record(&id).await.attached_to, None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_beside_one_under_way_is_aborted_and_the_first_one_ends_even_if_its_caller_leaves() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    for pool in &world.pools {
        pool.set_delay(Duration::from_millis(500));
    }
    let impatient = controller.clone();
    let gone = tokio::time::timeout(Duration::from_millis(200), async move {
        impatient.create(&mk_create("data")).await
    });
    gone.await.unwrap_err();
    let status = controller.create(&mk_create("data")).await.unwrap_err();
    assert_eq!(status.code(), Code::Aborted, "{status}");
    for pool in &world.pools {
        pool.set_delay(Duration::ZERO);
    }
    tokio::time::sleep(Duration::from_millis(1200)).await;
    let [only] = world.store.list().await.unwrap().try_into().unwrap();
    assert_eq!(world.count(&only.record.volume_id.to_string()), 3, "the first call was carried to its end");
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_are_paged_and_tokens_outlive_the_volume_they_name() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    for n in 0..5 {
        controller.create(&mk_sized(&format!("data-{n}"), 16 << 20, 0)).await.unwrap();
    }
    let ids = |page: &ListVolumesResponse| -> Vec<String> {
        page.entries.iter().map(|e| e.volume.as_ref().unwrap().volume_id.clone()).collect()
    };
    let all = ids(&controller.list(0, "").await.unwrap());
    let first = controller.list(2, "").await.unwrap();
    let second = controller.list(2, &first.next_token).await.unwrap();
    controller.delete(&second.next_token).await.unwrap();
    let third = controller.list(2, &second.next_token).await.unwrap();
    assert_eq!([ids(&first), ids(&second), ids(&third)].concat(), all);
    assert_eq!(third.next_token, "");
    assert_eq!(controller.list(0, "bogus").await.unwrap_err().code(), Code::Aborted);
    assert_eq!(controller.list(-1, "").await.unwrap_err().code(), Code::InvalidArgument);
}

#[tokio::test(flavor = "multi_thread")]
async fn capacity_is_what_the_nth_roomiest_pool_has() {
    let world = World::start_with(&[("a", 9 * GIB), ("b", 5 * GIB), ("c", 2 * GIB)]).await;
    let controller = world.controller().await;
    for (replicas, gib) in [("1", 9), ("2", 5), ("3", 2), ("4", 0)] {
        let request = GetCapacityRequest {
            parameters: HashMap::from([("replicas".to_owned(), replicas.to_owned())]),
            ..GetCapacityRequest::default()
        };
        let answer = controller.0.clone().get_capacity(request).await.unwrap().into_inner();
        assert_eq!(answer.available_capacity, gib << 30, "{replicas}");
    }
    let request = GetCapacityRequest {
        volume_capabilities: vec![mk_mode(Mode::MultiNodeMultiWriter)],
        ..GetCapacityRequest::default()
    };
    assert_eq!(controller.0.clone().get_capacity(request).await.unwrap().into_inner().available_capacity, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn capabilities_are_confirmed_or_the_cause_is_told() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let id = controller.create(&mk_create("data")).await.unwrap().volume_id;
    let ask = |id: &str, capabilities: Vec<VolumeCapability>| {
        let request = ValidateVolumeCapabilitiesRequest {
            volume_id: id.to_owned(),
            volume_capabilities: capabilities,
            ..ValidateVolumeCapabilitiesRequest::default()
        };
        let mut client = controller.0.clone();
        async move { client.validate_volume_capabilities(request).await.map(tonic::Response::into_inner) }
    };
    let confirmed = ask(&id, vec![mk_mount("ext4")]).await.unwrap().confirmed.unwrap();
    assert_eq!(confirmed.volume_capabilities, [mk_mount("ext4")]);
    for capability in [mk_mount("xfs"), mk_block(), mk_mode(Mode::MultiNodeReaderOnly)] {
        let answer = ask(&id, vec![capability]).await.unwrap();
        assert!(answer.confirmed.is_none() && !answer.message.is_empty());
    }
    assert_eq!(ask("", vec![mk_mount("")]).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(ask(&id, vec![]).await.unwrap_err().code(), Code::InvalidArgument);
    assert_eq!(ask("nope", vec![mk_mount("")]).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_plugin_names_itself_and_what_it_can() {
    let world = World::start(&["a"]).await;
    let controller = world.controller().await;
    let mut identity = IdentityClient::new(controller.1.clone());
    let info = identity.get_plugin_info(GetPluginInfoRequest {}).await.unwrap().into_inner();
    assert_eq!(info.name, "csi.holdfast.dev");
    assert!(!info.vendor_version.is_empty());
    assert_eq!(identity.probe(ProbeRequest {}).await.unwrap().into_inner().ready, Some(true));
    let own = identity.get_plugin_capabilities(GetPluginCapabilitiesRequest {}).await.unwrap().into_inner();
    assert_eq!(own.capabilities.len(), 6);
    let mut client = controller.0.clone();
    let can =
        client.controller_get_capabilities(ControllerGetCapabilitiesRequest {}).await.unwrap().into_inner();
    assert_eq!(can.capabilities.len(), 16);
}

/// Whoever asked for the deletion died, and nobody asks again.
#[tokio::test(flavor = "multi_thread")]
async fn a_deletion_that_was_begun_is_ended_by_the_sweep_once_all_nodes_answer() {
    // As long as a controller that has just started does not judge the silence of nodes, and they are not silent.
    const NODES_ARE_KNOWN: Duration = Duration::from_millis(6500);
    let world = World::start(&["a", "b", "c"]).await;
    let id = world.controller().await.create(&mk_create("data")).await.unwrap().volume_id;
    world.pool("b").set_cut(Cut::after(0, false));
    world.controller().await.delete(&id).await.unwrap_err();
    assert!(world.record(&id).await.deleting);
    world.heal();
    let controller = world.controller().await;
    controller.2.sweep_once().await.unwrap();
    assert!(world.record(&id).await.deleting, "nothing is known of the nodes yet");
    tokio::time::sleep(NODES_ARE_KNOWN).await;
    controller.2.sweep_once().await.unwrap();
    world.assert_empty().await;
}
