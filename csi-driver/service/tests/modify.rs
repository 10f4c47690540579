//! ControllerModifyVolume through the controller, killed between any two changes and repeated, with data processes that obey
//! the record's rules. Limits that hold and replicas with data in them are tested with real data processes.

use std::collections::BTreeSet;
use std::time::Duration;

use holdfast_storage_core::ids::{Epoch, TargetId};
use holdfast_storage_core::io_limits::IoLimits;
use holdfast_storage_core::record::{ReplicaState, VolumeRecord};
use holdfast_storage_core::transitions;
use tonic::Code;

use crate::support::fakes::Cut;
use crate::support::killed::killed_anywhere;
use crate::support::requests::{mk_create, mk_with};
use crate::support::world::{GIB, World};

/// A volume with three replicas, in use on node a.
async fn mk_used(world: &World) -> String {
    let controller = world.controller().await;
    let id = controller.create(&mk_create("data")).await.unwrap().volume_id;
    controller.publish(&id, "a").await.unwrap();
    id
}

fn kept(record: &VolumeRecord) -> Vec<(&str, ReplicaState)> {
    let kept = record.replicas.values().filter(|replica| replica.state != ReplicaState::Faulted);
    kept.map(|replica| (replica.node.0.as_str(), replica.state)).collect()
}

/// Takes the replica on a node out of the set, as its target does when it fails.
async fn lose(world: &World, id: &str, node: &str) {
    let target = TargetId(rand::random());
    world
        .change(id, |record| {
            let at = record.attached_to.clone().unwrap();
            let owned = transitions::take_generation(record, &at, record.attachment, target).unwrap();
            let replica = *record.replicas.iter().find(|(_, replica)| replica.node.0 == node).unwrap().0;
            transitions::swap_out(&owned, target, &[replica], rand::random()).unwrap()
        })
        .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn fewer_replicas_and_limits_are_in_force_whatever_is_killed_and_the_user_s_node_keeps_its_own() {
    killed_anywhere(
        &["a", "b", "c"],
        mk_used,
        async |controller, id| {
            controller.modify(id, &[("replicas", "2"), ("iopsLimit", "500"), ("bandwidthLimit", "1Gi")]).await
        },
        async |world, _, id, ()| {
            let record = world.record(id).await;
            assert_eq!(record.params.limits, IoLimits { iops: 500, bytes_per_s: GIB });
            assert_eq!((record.params.replicas, record.in_sync.len(), record.replicas.len()), (2, 2, 2));
            assert!(kept(&record).contains(&("a", ReplicaState::InSync)), "{record:?}");
            assert_eq!(world.count(id), 2, "what went is deleted");
            assert!(world.pool("a").state.lock().unwrap().applied.contains(&id.to_owned()));
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn more_replicas_are_listed_once_made_and_on_nodes_of_their_own_whatever_is_killed() {
    killed_anywhere(
        &["a", "b", "c", "d", "e"],
        mk_used,
        async |controller, id| controller.modify(id, &[("replicas", "5"), ("minInSync", "3")]).await,
        async |world, controller, id, ()| {
            let record = world.record(id).await;
            let new = ReplicaState::Offline { left_epoch: Epoch::default() };
            assert_eq!((record.params.replicas, record.params.min_in_sync), (5, 3));
            assert_eq!((record.in_sync.len(), record.replicas.len()), (3, 5));
            assert_eq!(kept(&record).iter().filter(|(_, state)| *state == new).count(), 2);
            assert_eq!(kept(&record).iter().map(|(node, _)| node).collect::<BTreeSet<_>>().len(), 5);
            assert_eq!(world.count(id), 5);
            controller.modify(id, &[("replicas", "5"), ("minInSync", "3")]).await.unwrap();
            assert_eq!(world.record(id).await, record, "asked for again");
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_that_is_out_of_sync_goes_before_a_member_whatever_is_killed() {
    killed_anywhere(
        &["a", "b", "c"],
        async |world: &World| {
            let id = mk_used(world).await;
            lose(world, &id, "b").await;
            id
        },
        async |controller, id| controller.modify(id, &[("replicas", "2")]).await,
        async |world, _, id, ()| {
            let record = world.record(id).await;
            assert!(kept(&record).iter().all(|(node, state)| *node != "b" && *state == ReplicaState::InSync));
            assert_eq!((record.epoch.number, record.replicas.len()), (2, 2), "no further change of the set");
        },
    )
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_that_nobody_uses_is_modified_too() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let id = controller.create(&mk_create("data")).await.unwrap().volume_id;
    controller.modify(&id, &[("replicas", "1"), ("iopsLimit", "100")]).await.unwrap();
    let record = world.record(&id).await;
    assert_eq!((record.in_sync.len(), record.replicas.len(), record.params.limits.iops), (1, 1, 100));
    controller.modify(&id, &[("iopsLimit", "0")]).await.unwrap();
    assert!(world.record(&id).await.params.limits.is_none());
    controller.delete(&id).await.unwrap();
    world.assert_empty().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_is_refused_whole_and_changes_nothing() {
    let world = World::start_with(&[("a", 2 * GIB), ("b", 2 * GIB), ("c", 2 * GIB), ("d", GIB / 2)]).await;
    let id = mk_used(&world).await;
    lose(&world, &id, "c").await;
    let controller = world.controller().await;
    let before = world.record(&id).await;
    for (parameters, code, named) in [
        (&[("iopsLimit", "100"), ("fsType", "xfs")][..], Code::InvalidArgument, "fsType"),
        (&[("iopsLimit", "100"), ("color", "red")], Code::InvalidArgument, "color"),
        (&[("iopsLimit", "100"), ("bandwidthLimit", "-1")], Code::InvalidArgument, "bandwidthLimit"),
        (&[("iopsLimit", "100"), ("replicas", "9")], Code::InvalidArgument, "replicas"),
        (&[("iopsLimit", "100"), ("replicas", "")], Code::InvalidArgument, "replicas"),
        (&[("replicas", "1"), ("minInSync", "2")], Code::InvalidArgument, "minInSync"),
        (&[("iopsLimit", "100"), ("replicas", "4")], Code::ResourceExhausted, "d has"),
        // A controller that has just started may not have heard of every node.
        (&[("iopsLimit", "100"), ("replicas", "5")], Code::Unavailable, "2 nodes"),
        (&[("iopsLimit", "100"), ("minInSync", "3")], Code::FailedPrecondition, "minInSync"),
    ] {
        let status = controller.modify(&id, parameters).await.unwrap_err();
        assert_eq!(status.code(), code, "{parameters:?}: {status}");
        assert!(status.message().contains(named), "{parameters:?}: {status}");
    }
    for (id, code) in
        [("", Code::InvalidArgument), ("nope", Code::NotFound), (&*"0".repeat(32), Code::NotFound)]
    {
        assert_eq!(controller.modify(id, &[("replicas", "2")]).await.unwrap_err().code(), code);
    }
    assert_eq!(world.record(&id).await, before);
    controller.unpublish(&id, "a").await.unwrap();
    controller.delete(&id).await.unwrap();
    assert_eq!(controller.modify(&id, &[("replicas", "2")]).await.unwrap_err().code(), Code::NotFound);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_does_not_answer_follows_at_the_next_call() {
    let world = World::start(&["a", "b", "c"]).await;
    let id = mk_used(&world).await;
    let controller = world.controller().await;
    world.pool("a").set_cut(Cut::after(0, false));
    let status = controller.modify(&id, &[("iopsLimit", "100")]).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert_eq!(world.record(&id).await.params.limits.iops, 100, "it is decided");
    assert!(world.pool("a").state.lock().unwrap().applied.is_empty());
    world.heal();
    controller.modify(&id, &[("iopsLimit", "100")]).await.unwrap();
    assert_eq!(world.pool("a").state.lock().unwrap().applied, [id]);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_silent_node_keeps_stays_listed_until_it_is_deleted() {
    let world = World::start(&["a", "b", "c"]).await;
    let id = mk_used(&world).await;
    lose(&world, &id, "b").await;
    let controller = world.controller().await;
    world.pool("b").set_cut(Cut::after(0, false));
    controller.modify(&id, &[("replicas", "2")]).await.expect("nothing waits for it");
    assert_eq!(world.record(&id).await.replicas.len(), 3);
    world.heal();
    controller.modify(&id, &[("replicas", "2")]).await.unwrap();
    assert_eq!((world.record(&id).await.replicas.len(), world.count(&id)), (2, 2));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_twin_is_aborted_and_a_created_volume_has_its_mutable_parameters() {
    let world = World::start(&["a", "b", "c", "d"]).await;
    let mut request = mk_with(mk_create("data"), "iopsLimit", "100");
    request.mutable_parameters.insert("bandwidthLimit".to_owned(), "50M".to_owned());
    let controller = world.controller().await;
    let id = controller.create(&request).await.unwrap().volume_id;
    let limits = IoLimits { iops: 100, bytes_per_s: 50_000_000 };
    assert_eq!(world.record(&id).await.params.limits, limits);
    assert_eq!(controller.create(&request).await.unwrap().volume_id, id, "asked for again");
    request.mutable_parameters.clear();
    assert_eq!(controller.create(&request).await.unwrap_err().code(), Code::AlreadyExists);
    world.pool("d").set_delay(Duration::from_millis(500));
    let twin = async {
        tokio::time::sleep(Duration::from_millis(100)).await;
        controller.modify(&id, &[("replicas", "4")]).await
    };
    let parameters = [("replicas", "4")];
    let (first, twin) = tokio::join!(controller.modify(&id, &parameters), twin);
    first.unwrap();
    assert_eq!(twin.unwrap_err().code(), Code::Aborted);
    assert_eq!(world.record(&id).await.replicas.len(), 4);
}
