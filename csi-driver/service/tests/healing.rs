//! Replicas that do not come back are replaced, and what was given up is deleted once its node answers.

use std::time::Duration;

use holdfast_storage_core::ids::ReplicaId;
use holdfast_storage_core::record::{ReplicaState, VolumeRecord};

use crate::support::fakes::Cut;
use crate::support::requests::mk_create;
use crate::support::world::World;

/// From a controller's start until it judges the silence of nodes; as short as the nodes' own announcements count.
const NODES_ARE_KNOWN: Duration = Duration::from_millis(6500);
const REPLACE_AFTER: Duration = Duration::from_secs(3);

/// The replica on a node, out of sync as the volume's target leaves it.
async fn drop_out(world: &World, volume: &str, node: &str) -> ReplicaId {
    let on_node = |record: &VolumeRecord| {
        let (id, _) = record.replicas.iter().find(|(_, r)| r.node.0 == node).unwrap();
        *id
    };
    let replica = on_node(&world.record(volume).await);
    world
        .change(volume, |record| {
            let mut next = record.clone();
            next.in_sync.remove(&replica);
            next.epoch.number += 1;
            next.replicas.get_mut(&replica).unwrap().state =
                ReplicaState::Offline { left_epoch: record.epoch };
            next
        })
        .await;
    replica
}

/// A volume whose own target brings replicas back, where there is one.
async fn create_attached(world: &World) -> String {
    let controller = world.controller().await;
    let volume = controller.create(&mk_create("data")).await.unwrap().volume_id;
    controller.publish(&volume, "a").await.unwrap();
    volume
}

fn states(record: &VolumeRecord) -> Vec<(&str, ReplicaState)> {
    let mut all: Vec<_> = record.replicas.values().map(|r| (r.node.0.as_str(), r.state)).collect();
    all.sort_by_key(|(node, _)| *node);
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replica_of_a_silent_node_is_replaced_elsewhere_and_deleted_when_the_node_answers() {
    let mut world = World::start(&["a", "b", "c", "d"]).await;
    world.settings.replace_after = Some(REPLACE_AFTER);
    let volume = create_attached(&world).await;
    let nodes: Vec<String> =
        world.record(&volume).await.replicas.values().map(|r| r.node.0.clone()).collect();
    let spare = ["a", "b", "c", "d"].into_iter().find(|n| !nodes.iter().any(|m| m == n)).unwrap();
    let dead = nodes[1].clone();
    let replica = drop_out(&world, &volume, &dead).await;
    world.pool(&dead).set_cut(Cut::after(-1, false));
    tokio::time::sleep(NODES_ARE_KNOWN).await;
    // A member on a node that is as silent stays.
    for pool in world.pools.iter().filter(|pool| pool.node != dead && pool.node != nodes[0]) {
        pool.announce(&world.book).await;
    }
    let controller = world.controller().await;
    let _ = controller.2.sweep_once().await;
    let record = world.record(&volume).await;
    assert_eq!(record.in_sync.len(), 2, "{:?}", states(&record));
    assert_eq!(record.replicas[&replica].state, ReplicaState::Faulted);
    let new = record.replicas.iter().find(|(_, r)| r.node.0 == spare).unwrap().0.to_string();
    assert!(world.pool(spare).replicas().contains_key(&new), "it is there to be rebuilt");
    assert!(world.pool(&dead).replicas().contains_key(&replica.to_string()));
    // Sweeping again changes nothing more.
    let _ = controller.2.sweep_once().await;
    assert_eq!(world.record(&volume).await, record);
    world.heal();
    world.pool(&dead).announce(&world.book).await;
    controller.2.sweep_once().await.unwrap();
    assert!(
        world.pool(&dead).replicas().contains_key(&replica.to_string()),
        "an old copy is better than none"
    );
    // The target has rebuilt the new one.
    let new: ReplicaId = new.parse().unwrap();
    world
        .change(&volume, |record| {
            let mut next = record.clone();
            next.replicas.get_mut(&new).unwrap().state = ReplicaState::InSync;
            next.in_sync.insert(new);
            next
        })
        .await;
    controller.2.sweep_once().await.unwrap();
    let record = world.record(&volume).await;
    assert!(!record.replicas.contains_key(&replica), "{:?}", states(&record));
    assert!(!world.pool(&dead).replicas().contains_key(&replica.to_string()));
    world.assert_nothing_unlisted().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_node_to_spare_the_replica_is_kept_and_the_reason_is_told() {
    let mut world = World::start(&["a", "b", "c"]).await;
    world.settings.replace_after = Some(REPLACE_AFTER);
    let volume = create_attached(&world).await;
    let replica = drop_out(&world, &volume, "b").await;
    world.pool("b").set_cut(Cut::after(-1, false));
    let controller = world.controller().await;
    tokio::time::sleep(NODES_ARE_KNOWN).await;
    for node in ["a", "c"] {
        world.pool(node).announce(&world.book).await;
    }
    controller.2.sweep_once().await.unwrap_err();
    let record = world.record(&volume).await;
    assert!(matches!(record.replicas[&replica].state, ReplicaState::Offline { .. }), "it may come back");
    let reports = controller.2.reports().await.unwrap().unwrap();
    let converged = &reports[0].conditions[2];
    assert!(!converged.holds && converged.message.contains("nothing could be done"), "{converged:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_missing_is_added_and_what_was_listed_is_made() {
    let world = World::start(&["a", "b", "c", "d"]).await;
    let volume = create_attached(&world).await;
    let node = world.record(&volume).await.replicas.values().next().unwrap().node.0.clone();
    let replica = drop_out(&world, &volume, &node).await;
    world
        .change(&volume, |record| {
            let mut next = record.clone();
            next.replicas.get_mut(&replica).unwrap().state = ReplicaState::Faulted;
            next
        })
        .await;
    // Listing works, making fails: as for a controller that dies between the two.
    for pool in &world.pools {
        pool.set_create_fails(Some((false, "not now")));
    }
    tokio::time::sleep(NODES_ARE_KNOWN).await;
    let controller = world.controller().await;
    let _ = controller.2.sweep_once().await;
    let listed = world.record(&volume).await;
    // What was given up stays until the volume is whole.
    assert_eq!(listed.replicas.len(), 4, "{:?}", states(&listed));
    assert_eq!(world.count(&volume), 3);
    for pool in &world.pools {
        pool.set_create_fails(None);
    }
    controller.2.sweep_once().await.unwrap();
    assert_eq!(world.record(&volume).await, listed);
    assert_eq!(world.count(&volume), 4);
    world.assert_nothing_unlisted().await;
}
