//! Where replicas go by the rules of a StorageClass, when a volume is made, cloned and given more replicas.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use holdfast_proto::csi::*;
use holdfast_service::topology::NODE_KEY;
use holdfast_storage_core::node_directory::NodeInfo;
use tonic::Code;

use crate::support::requests::{Controller, mk_create, mk_from_volume, mk_with};
use crate::support::world::World;

/// From a controller's start until it takes the nodes that it knows for all that there are.
const NODES_ARE_KNOWN: Duration = Duration::from_millis(6500);

/// A node's zone is the first letter of its name; its pool's class follows the last digit.
async fn mk_world(nodes: &[&'static str]) -> World {
    let world = World::start(nodes).await;
    for node in nodes {
        let zone = Some(node[..1].to_owned());
        let class = if node.ends_with('1') { "fast" } else { "slow" };
        let pool_class = Some(class.to_owned());
        world
            .announce_again(node, |info| NodeInfo {
                zone: zone.clone(),
                pool_class: pool_class.clone(),
                ..info
            })
            .await;
    }
    tokio::time::sleep(NODES_ARE_KNOWN).await;
    world
}

fn with_local(mut request: CreateVolumeRequest, node: &str) -> CreateVolumeRequest {
    let topology = Topology { segments: HashMap::from([(NODE_KEY.to_owned(), node.to_owned())]) };
    request.accessibility_requirements =
        Some(TopologyRequirement { requisite: vec![topology.clone()], preferred: vec![topology] });
    request
}

async fn nodes(world: &World, volume: &str) -> BTreeSet<String> {
    world.record(volume).await.replicas.values().map(|replica| replica.node.0.clone()).collect()
}

async fn largest(controller: &Controller, parameters: &[(&str, &str)]) -> i64 {
    let pairs = parameters.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned()));
    let request = GetCapacityRequest { parameters: pairs.collect(), ..GetCapacityRequest::default() };
    controller.0.clone().get_capacity(request).await.unwrap().into_inner().available_capacity
}

#[tokio::test(flavor = "multi_thread")]
async fn required_zones_hold_at_creation_and_when_replicas_are_added() {
    let world = mk_world(&["a1", "a2", "b1", "c1"]).await;
    let controller = world.controller().await;
    let wanted = |name: &str, replicas: &str| {
        mk_with(mk_with(mk_create(name), "zones", "required"), "replicas", replicas)
    };
    let refused = controller.create(&wanted("four", "4")).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("a, b, c"), "{refused}");
    assert_eq!(largest(&controller, &[("zones", "required"), ("replicas", "4")]).await, 0);
    assert!(largest(&controller, &[("replicas", "4")]).await > 0);

    let id = controller.create(&wanted("three", "3")).await.unwrap().volume_id;
    let zones: BTreeSet<String> = nodes(&world, &id).await.iter().map(|node| node[..1].to_owned()).collect();
    assert_eq!(zones.len(), 3);
    let refused = controller.modify(&id, &[("replicas", "4")]).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("zones"), "{refused}");
    assert_eq!(world.record(&id).await.params.replicas, 3, "nothing of it was done");
    let id = controller.create(&mk_with(mk_create("any"), "replicas", "3")).await.unwrap().volume_id;
    controller
        .modify(&id, &[("replicas", "4")])
        .await
        .expect("fewer zones are no obstacle where none is required");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_first_pod_s_node_gets_a_replica_or_the_call_is_refused_or_it_gets_none() {
    let world = mk_world(&["a1", "b1", "c1", "d1"]).await;
    let controller = world.controller().await;
    for node in ["a1", "b1", "c1", "d1"] {
        for (rule, local) in [("required", true), ("none", false)] {
            let request = mk_with(mk_create(&format!("{node}-{rule}")), "localReplica", rule);
            let id = controller.create(&with_local(request, node)).await.unwrap().volume_id;
            assert_eq!(nodes(&world, &id).await.contains(node), local, "{node}, {rule}");
        }
    }
    let required = mk_with(mk_with(mk_create("full"), "localReplica", "required"), "poolClass", "fast");
    world.announce_again("a1", |info| NodeInfo { pool_class: None, ..info }).await;
    let refused = controller.create(&with_local(required, "a1")).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("local replica") && refused.message().contains("a1"), "{refused}");

    // A clone's replicas come to where the snapshot is, but for the one that must be local.
    let source = with_local(mk_with(mk_create("source"), "localReplica", "none"), "d1");
    let source = controller.create(&source).await.unwrap().volume_id;
    let clone = mk_with(mk_from_volume("clone", &source), "localReplica", "required");
    let clone = controller.create(&with_local(clone, "d1")).await.unwrap().volume_id;
    let record = world.record(&clone).await;
    let rebuilt: Vec<_> = record.replicas.iter().filter(|(id, _)| !record.in_sync.contains(id)).collect();
    assert!(matches!(&rebuilt[..], [(_, replica)] if replica.node.0 == "d1"), "{record:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_go_to_pools_of_the_class_only() {
    let world = mk_world(&["a1", "a2", "b1", "b2", "c2"]).await;
    let controller = world.controller().await;
    let of_class = |name: &str, class: &str, replicas: &str| {
        mk_with(mk_with(mk_create(name), "poolClass", class), "replicas", replicas)
    };
    let id = controller.create(&of_class("fast", "fast", "2")).await.unwrap().volume_id;
    assert_eq!(nodes(&world, &id).await, ["a1", "b1"].map(str::to_owned).into());
    let id = controller.create(&of_class("slow", "slow", "2")).await.unwrap().volume_id;
    controller.modify(&id, &[("replicas", "3")]).await.unwrap();
    assert_eq!(nodes(&world, &id).await, ["a2", "b2", "c2"].map(str::to_owned).into());
    let refused = controller.create(&of_class("more", "fast", "3")).await.unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted);
    assert!(refused.message().contains("of pool class \"fast\""), "{refused}");
    assert_eq!(largest(&controller, &[("poolClass", "fast"), ("replicas", "3")]).await, 0);
    assert!(largest(&controller, &[("poolClass", "slow"), ("replicas", "3")]).await > 0);
    let clone = mk_with(mk_with(mk_from_volume("clone", &id), "poolClass", "fast"), "replicas", "1");
    let refused = controller.create(&clone).await.unwrap_err();
    assert_eq!(refused.code(), Code::Unavailable, "no pool of the class holds the source: {refused}");
}
