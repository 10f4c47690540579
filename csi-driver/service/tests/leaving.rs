//! Replicas leave nodes that drain or that were removed; what a node had that never comes back holds nothing up.

use std::time::Duration;

use holdfast_proto::csi::DeleteVolumeRequest;
use holdfast_proto::storage::operator_server::Operator;
use holdfast_proto::storage::{ListStorageNodesRequest, NodeState, SetNodeStateRequest, StorageNode};
use holdfast_storage_core::record::VolumeRecord;
use tonic::{Code, Request, Status};

use crate::support::fakes::Cut;
use crate::support::requests::{Controller, mk_create, mk_sized, mk_with};
use crate::support::world::World;

/// From a controller's start until it judges the silence of nodes.
const NODES_ARE_KNOWN: Duration = Duration::from_millis(6500);
/// A node that has not announced itself for so long counts as silent.
const SILENT: Duration = Duration::from_millis(10_500);
const ALL: [&str; 4] = ["a", "b", "c", "d"];
/// More sweeps than any of these moves needs.
const SWEEPS_MAX: usize = 8;

async fn set_state(controller: &Controller, node: &str, state: NodeState) -> Result<(), Status> {
    let request = SetNodeStateRequest { node: node.to_owned(), state: state.into() };
    controller.2.set_node_state(Request::new(request)).await.map(drop)
}

async fn node(controller: &Controller, name: &str) -> StorageNode {
    let reply = controller.2.list_storage_nodes(Request::new(ListStorageNodesRequest {})).await.unwrap();
    reply.into_inner().nodes.into_iter().find(|node| node.name == name).unwrap()
}

fn nodes_of(record: &VolumeRecord) -> Vec<&str> {
    let mut nodes: Vec<_> = record.replicas.values().map(|replica| replica.node.0.as_str()).collect();
    nodes.sort_unstable();
    nodes
}

async fn announce_all(world: &World, but: &str) {
    for pool in world.pools.iter().filter(|pool| pool.node != but) {
        pool.announce(&world.book).await;
    }
}

/// Sweeps until nothing is left on the node; in between no moment with fewer members than wanted.
async fn sweep_until_empty(world: &World, controller: &Controller, volume: &str, leaves: &str, dead: bool) {
    for _ in 0..SWEEPS_MAX {
        announce_all(world, if dead { leaves } else { "" }).await;
        let _ = controller.2.sweep_once().await;
        let record = world.record(volume).await;
        assert!(dead || record.in_sync.len() >= 3, "redundancy is lost on the way: {record:?}");
        if !nodes_of(&record).contains(&leaves) {
            return;
        }
    }
    panic!("node {leaves} keeps a replica: {:?}", world.record(volume).await);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_is_drained_while_three_members_stay_in_sync_at_every_moment() {
    let world = World::start(&ALL).await;
    let volume = world.controller().await.create(&mk_create("data")).await.unwrap().volume_id;
    let leaves = world.record(&volume).await.replicas.values().next().unwrap().node.0.clone();
    tokio::time::sleep(NODES_ARE_KNOWN).await;
    let controller = world.controller().await;
    set_state(&controller, &leaves, NodeState::Draining).await.unwrap();
    let told = node(&controller, &leaves).await;
    assert_eq!((told.state(), told.replicas, told.in_sync), (NodeState::Draining, 1, 1));
    drop(controller);
    // It is durable: another controller goes on.
    let states = world.node_states.node_states().await.unwrap();
    assert_eq!(states.len(), 1, "{states:?}");
    let controller = world.controller().await;
    sweep_until_empty(&world, &controller, &volume, &leaves, false).await;
    let record = world.record(&volume).await;
    assert_eq!((record.replicas.len(), record.in_sync.len()), (3, 3), "{record:?}");
    assert!(world.pool(&leaves).replicas().is_empty(), "its data is deleted");
    world.assert_nothing_unlisted().await;
    // It gets no replica while it drains, and does again afterwards.
    announce_all(&world, "").await;
    let four = mk_with(mk_create("four"), "replicas", "4");
    let status = controller.create(&four).await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    set_state(&controller, &leaves, NodeState::Active).await.unwrap();
    controller.create(&four).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_without_a_node_to_spare_changes_nothing_and_says_why() {
    let world = World::start(&["a", "b", "c"]).await;
    let volume = world.controller().await.create(&mk_create("data")).await.unwrap().volume_id;
    let before = world.record(&volume).await;
    tokio::time::sleep(NODES_ARE_KNOWN).await;
    announce_all(&world, "").await;
    let controller = world.controller().await;
    set_state(&controller, "b", NodeState::Draining).await.unwrap();
    controller.2.sweep_once().await.unwrap_err();
    assert_eq!(world.record(&volume).await, before);
    let stuck = node(&controller, "b").await.stuck;
    assert!(stuck.len() == 1 && stuck[0].volume_id == volume, "{stuck:?}");
    assert!(stuck[0].reason.contains("only 0 can be used"), "{stuck:?}");
    let reports = controller.2.reports().await.unwrap().unwrap();
    let converged = &reports[0].conditions[2];
    assert!(converged.message.contains("to leave node b"), "{converged:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_never_comes_back_is_replaced_and_nothing_waits_for_it() {
    let world = World::start(&ALL).await;
    let controller = world.controller().await;
    let volume = controller.create(&mk_create("data")).await.unwrap().volume_id;
    let doomed = controller.create(&mk_create("doomed")).await.unwrap().volume_id;
    let both = |record: &VolumeRecord, other: &VolumeRecord| {
        nodes_of(record).into_iter().find(|node| nodes_of(other).contains(node)).unwrap().to_owned()
    };
    let dead = both(&world.record(&volume).await, &world.record(&doomed).await);
    let refusal = set_state(&controller, &dead, NodeState::Removed).await.unwrap_err();
    assert_eq!(refusal.code(), Code::FailedPrecondition, "it answers: {refusal}");
    world.pool(&dead).set_cut(Cut::after(-1, false));
    tokio::time::sleep(SILENT).await;
    announce_all(&world, &dead).await;
    // A deletion waits for the dead node, until it is removed.
    let request = DeleteVolumeRequest { volume_id: doomed.clone(), ..Default::default() };
    let mut client = controller.0.clone();
    assert_eq!(client.delete_volume(request.clone()).await.unwrap_err().code(), Code::Unavailable);
    set_state(&controller, &dead, NodeState::Removed).await.unwrap();
    client.delete_volume(request).await.unwrap();
    assert_eq!(world.store.list().await.unwrap().len(), 1);
    sweep_until_empty(&world, &controller, &volume, &dead, true).await;
    let record = world.record(&volume).await;
    assert_eq!((record.replicas.len(), record.in_sync.len()), (3, 3), "{record:?}");
    let told = node(&controller, &dead).await;
    assert_eq!((told.state(), told.replicas, told.alive), (NodeState::Removed, 0, false));
    // It is not let in again before somebody says so.
    world.heal();
    let info = world.book.get(&holdfast_storage_core::ids::NodeName(dead.clone())).unwrap();
    let directory: &dyn holdfast_storage_core::node_directory::NodeDirectory = &*world.book;
    let refusal = directory.announce(info.clone()).await.unwrap_err();
    assert!(refusal.to_string().contains("removed"), "{refusal}");
    set_state(&controller, &dead, NodeState::Active).await.unwrap();
    directory.announce(info).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_move_from_a_full_node_to_an_empty_one_until_they_are_alike() {
    let mut world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    for node in ["b", "c"] {
        set_state(&controller, node, NodeState::Draining).await.unwrap();
    }
    let mut volumes = Vec::new();
    for number in 0..6 {
        // 5 of 100 GiB each, all on a.
        let request = mk_with(mk_sized(&format!("v{number}"), 5 << 30, 0), "replicas", "1");
        volumes.push(controller.create(&request).await.unwrap().volume_id);
    }
    for node in ["b", "c"] {
        set_state(&controller, node, NodeState::Active).await.unwrap();
    }
    tokio::time::sleep(NODES_ARE_KNOWN).await;
    announce_all(&world, "").await;
    let before = world.store.list().await.unwrap();
    controller.2.sweep_once().await.unwrap();
    assert_eq!(world.store.list().await.unwrap(), before, "not unless it is asked for");
    world.settings.rebalance_above_percent = Some(5);
    let controller = world.controller().await;
    for _ in 0..4 * SWEEPS_MAX {
        announce_all(&world, "").await;
        controller.2.sweep_once().await.unwrap();
        for volume in &volumes {
            assert!(!world.record(volume).await.in_sync.is_empty());
        }
    }
    let mut on: Vec<String> = Vec::new();
    for volume in &volumes {
        on.extend(nodes_of(&world.record(volume).await).into_iter().map(str::to_owned));
    }
    on.sort_unstable();
    assert_eq!(on, ["a", "a", "b", "b", "c", "c"]);
    world.assert_nothing_unlisted().await;
}

/// A call that dies after the record is there, and is not repeated: a target would take what was never made for lost.
#[tokio::test(flavor = "multi_thread")]
async fn what_a_dead_call_did_not_make_is_made_before_a_target_looks_for_it() {
    let world = World::start(&ALL).await;
    let cut = Cut::after(1, false);
    let dead = world.cut_controller(&cut).await;
    dead.create(&mk_create("data")).await.unwrap_err();
    world.heal();
    let volume = world.store.list().await.unwrap()[0].record.volume_id.to_string();
    assert_eq!(world.count(&volume), 0, "no test: the replicas were made");
    let leaves = world.record(&volume).await.replicas.values().next().unwrap().node.0.clone();
    tokio::time::sleep(NODES_ARE_KNOWN).await;
    let controller = world.controller().await;
    set_state(&controller, &leaves, NodeState::Draining).await.unwrap();
    sweep_until_empty(&world, &controller, &volume, &leaves, false).await;
    assert_eq!((world.record(&volume).await.in_sync.len(), world.count(&volume)), (3, 3));
    world.assert_nothing_unlisted().await;
    assert_eq!(controller.create(&mk_create("data")).await.unwrap().volume_id, volume);
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_input_is_refused_by_name() {
    let world = World::start(&["a"]).await;
    let controller = world.controller().await;
    for (name, state, code, word) in [
        ("", NodeState::Draining, Code::InvalidArgument, "node is missing"),
        ("nobody", NodeState::Draining, Code::NotFound, "nobody"),
        ("a", NodeState::Unspecified, Code::InvalidArgument, "state"),
    ] {
        let status = set_state(&controller, name, state).await.unwrap_err();
        assert!(status.code() == code && status.message().contains(word), "{status}");
    }
    assert!(world.node_states.node_states().await.unwrap().is_empty());
}
