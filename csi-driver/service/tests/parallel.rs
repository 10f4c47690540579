//! Many calls at the same time: all that differ succeed, twins are one, limits hold, nothing is left.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use holdfast_proto::csi::*;
use holdfast_service::topology::{NODE_KEY, ZONE_KEY};
use holdfast_storage_core::node_directory::NodeInfo;
use tonic::{Code, Status};

use crate::support::fakes::SlowStore;
use crate::support::requests::{Controller, mk_create, mk_sized, mk_with};
use crate::support::world::{GIB, World};

const MANY: usize = 100;
const NODES: [&str; 3] = ["a", "b", "c"];
/// Long enough that all calls have decided before the first change of a slow store is made.
const SLOW: Duration = Duration::from_millis(100);

#[tokio::test(flavor = "multi_thread")]
async fn a_hundred_volumes_are_made_attached_snapshotted_and_deleted_at_once_and_leave_nothing() {
    let world = World::start(&NODES).await;
    let controller = world.controller().await;
    let before = capacity(&controller, None).await;
    let volumes = all(0..MANY, |n| {
        let controller = controller.clone();
        async move { Ok(controller.create(&mk_sized(&format!("data-{n}"), 64 << 20, 0)).await?.volume_id) }
    })
    .await;
    let volumes: Vec<String> = volumes.into_iter().map(Result::unwrap).collect();
    assert_eq!(volumes.iter().collect::<BTreeSet<_>>().len(), MANY, "each name has a volume of its own");
    assert!(volumes.iter().all(|id| world.count(id) == 3));

    let each = |n: usize| (controller.clone(), volumes[n].clone(), NODES[n % NODES.len()]);
    let published = all(0..MANY, |n| {
        let (controller, id, node) = each(n);
        async move { controller.publish(&id, node).await }
    });
    assert!(published.await.iter().all(|answer| answer.as_ref().unwrap()["attachment"] == "1"));
    let snapshots = all(0..MANY, |n| {
        let (controller, id, _) = each(n);
        async move { controller.snapshot(&id, &format!("snapshot-{n}")).await }
    });
    let snapshots: Vec<Snapshot> = snapshots.await.into_iter().map(Result::unwrap).collect();
    assert!(snapshots.iter().zip(&volumes).all(|(snapshot, volume)| snapshot.source_volume_id == *volume));

    let gone = all(0..MANY, |n| {
        let (controller, id, node) = each(n);
        let snapshot = snapshots[n].snapshot_id.clone();
        async move {
            controller.delete_snapshot(&snapshot).await?;
            controller.unpublish(&id, node).await?;
            controller.delete(&id).await
        }
    });
    gone.await.into_iter().for_each(Result::unwrap);
    world.assert_empty().await;
    assert_eq!(capacity(&controller, None).await, before, "all space is given back");
}

#[tokio::test(flavor = "multi_thread")]
async fn twins_of_one_name_are_one_volume_and_one_snapshot_or_aborted() {
    const NAMES: usize = 10;
    let world = World::start(&NODES).await;
    let controller = world.controller().await;
    let name = |n: usize| format!("data-{}", n % NAMES);
    let twins = all(0..MANY, |n| {
        let (controller, name) = (controller.clone(), name(n));
        async move { Ok(controller.create(&mk_sized(&name, 64 << 20, 0)).await?.volume_id) }
    });
    let volumes = one_of_each(twins.await, name);
    assert_eq!(volumes.len(), NAMES, "of twins one succeeds");
    assert_eq!(world.store.list().await.unwrap().len(), NAMES);
    world.assert_nothing_unlisted().await;

    let snapshots = all(0..MANY, |n| {
        let (controller, id, name) = (controller.clone(), volumes[&name(n)].clone(), name(n));
        async move { Ok(controller.snapshot(&id, &name).await?.snapshot_id) }
    });
    let snapshots = one_of_each(snapshots.await, name);
    assert_eq!(snapshots.len(), NAMES);
    for (name, id) in &volumes {
        let record = world.record(id).await;
        assert_eq!((record.snapshots.len(), record.requested.len()), (1, 1), "{name}");
    }

    let attached = all(0..MANY, |n| {
        let (controller, id) = (controller.clone(), volumes[&name(n)].clone());
        async move { controller.publish(&id, NODES[n % NODES.len()]).await }
    });
    for answer in attached.await {
        match answer {
            Ok(context) => assert_eq!(context["attachment"], "1", "to one node, once"),
            Err(status) => {
                assert!(matches!(status.code(), Code::Aborted | Code::FailedPrecondition), "{status}");
            }
        }
    }
    for id in volumes.values() {
        assert!(world.record(id).await.attached_to.is_some());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn space_is_promised_once_also_while_records_are_on_their_way_to_the_disk() {
    const FIT: usize = 37;
    let pools = NODES.map(|node| (node, FIT as u64 * (64 << 20) + (63 << 20)));
    let world = World::start_with(&pools).await;
    let store = Arc::new(SlowStore { store: Arc::clone(&world.store), delay: SLOW });
    let controller = world.serve(store, Arc::clone(&world.groups)).await;
    for round in 0..2 {
        let answers = all(0..MANY, |n| {
            let controller = controller.clone();
            async move { Ok(controller.create(&mk_sized(&format!("data-{n}"), 64 << 20, 0)).await?.volume_id) }
        });
        let (made, refused): (Vec<_>, Vec<_>) = answers.await.into_iter().partition(Result::is_ok);
        assert_eq!(made.len(), FIT, "round {round}: what fits is made, and no more");
        for status in refused.into_iter().map(Result::unwrap_err) {
            assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        }
        let gone = all(made, |id| {
            let controller = controller.clone();
            async move { controller.delete(&id.unwrap()).await }
        });
        gone.await.into_iter().for_each(Result::unwrap);
        world.assert_empty().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_operator_decides_how_much_of_a_pool_is_promised() {
    for (percent, fit) in [(50, 2), (100, 4), (250, 10)] {
        let mut world = World::start_with(&NODES.map(|node| (node, 4 * GIB))).await;
        world.pools.iter().for_each(|pool| pool.state.lock().unwrap().thin = true);
        world.settings.overprovision_percent = percent;
        let controller = world.controller().await;
        for n in 0..fit {
            controller.create(&mk_create(&format!("data-{n}"))).await.unwrap();
        }
        let status = controller.create(&mk_create("one-more")).await.unwrap_err();
        assert_eq!(status.code(), Code::ResourceExhausted, "{percent} %: {status}");
        assert_eq!(capacity(&controller, None).await, 0, "{percent} %");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_volumes_are_attached_to_a_node_than_it_takes() {
    const MOST: u32 = 5;
    let world = World::start(&NODES).await;
    world.announce_again("a", |info| NodeInfo { volumes_max: Some(MOST), ..info }).await;
    let store = Arc::new(SlowStore { store: Arc::clone(&world.store), delay: SLOW });
    let controller = world.serve(store, Arc::clone(&world.groups)).await;
    let volumes = all(0..20, |n| {
        let controller = controller.clone();
        async move { Ok(controller.create(&mk_sized(&format!("data-{n}"), 64 << 20, 0)).await?.volume_id) }
    });
    let volumes: Vec<String> = volumes.await.into_iter().map(Result::unwrap).collect();
    let answers = all(volumes.clone(), |id| {
        let controller = controller.clone();
        async move { controller.publish(&id, "a").await.map(|_| id) }
    });
    let (there, refused): (Vec<_>, Vec<_>) = answers.await.into_iter().partition(Result::is_ok);
    let there: Vec<String> = there.into_iter().map(Result::unwrap).collect();
    assert_eq!(there.len(), MOST as usize, "as many as it takes");
    for status in refused.into_iter().map(Result::unwrap_err) {
        assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
        assert!(status.message().contains("node a") && status.message().contains("5 at most"), "{status}");
    }

    controller.publish(&there[0], "a").await.expect("what is attached already may be published again");
    let left: Vec<&String> = volumes.iter().filter(|id| !there.contains(id)).collect();
    controller.publish(left[0], "b").await.expect("another node has no limit");
    let status = controller.publish(left[1], "a").await.unwrap_err();
    assert_eq!(status.code(), Code::ResourceExhausted, "{status}");
    controller.unpublish(&there[0], "a").await.unwrap();
    controller.publish(left[1], "a").await.expect("a place is free again");
}

#[tokio::test(flavor = "multi_thread")]
async fn replicas_stand_in_as_many_zones_as_there_are_and_one_where_the_pod_will_run() {
    let world = World::start(&["a1", "a2", "a3", "b1", "c1"]).await;
    for node in ["a1", "a2", "a3", "b1", "c1"] {
        world.announce_again(node, |info| NodeInfo { zone: Some(node[..1].to_owned()), ..info }).await;
    }
    let controller = world.controller().await;
    for (n, preferred) in ["a1", "a2", "a3", "b1", "c1"].into_iter().enumerate() {
        let mut request = mk_create(&format!("data-{n}"));
        request.accessibility_requirements = Some(mk_requirement(&[(NODE_KEY, preferred)]));
        let volume = controller.create(&request).await.unwrap();
        assert!(volume.accessible_topology.is_empty(), "every node reaches it");
        let record = world.record(&volume.volume_id).await;
        let nodes: BTreeSet<&str> = record.replicas.values().map(|r| r.node.0.as_str()).collect();
        let zones: BTreeSet<&str> = nodes.iter().map(|node| &node[..1]).collect();
        assert!(nodes.contains(preferred) && zones.len() == 3, "{preferred}: {nodes:?}");
    }
    let five = controller.create(&mk_with(mk_create("five"), "replicas", "5")).await.unwrap();
    assert_eq!(world.count(&five.volume_id), 5, "fewer zones than replicas are no obstacle");
}

#[tokio::test(flavor = "multi_thread")]
async fn topologies_are_of_this_cluster_or_refused_by_name() {
    let world = World::start(&NODES).await;
    world.announce_again("a", |info| NodeInfo { zone: Some("z1".to_owned()), ..info }).await;
    let controller = world.controller().await;
    let whole = capacity(&controller, None).await;
    let volume = controller.create(&mk_create("source")).await.unwrap();
    for (segments, code) in [
        ([("topology.kubernetes.io/zone", "z1")].as_slice(), Code::InvalidArgument),
        ([(NODE_KEY, "nowhere")].as_slice(), Code::ResourceExhausted),
        ([(ZONE_KEY, "z2")].as_slice(), Code::ResourceExhausted),
        ([(NODE_KEY, "b"), (ZONE_KEY, "z1")].as_slice(), Code::ResourceExhausted),
        ([(NODE_KEY, "a"), (ZONE_KEY, "z1")].as_slice(), Code::Ok),
        ([(ZONE_KEY, "z1")].as_slice(), Code::Ok),
    ] {
        let requirement = Some(mk_requirement(segments));
        let request = CreateVolumeRequest {
            accessibility_requirements: requirement.clone(),
            ..mk_sized("data", 64 << 20, 0)
        };
        let made = controller.create(&request).await.map(drop);
        assert_eq!(outcome(&made), code, "{segments:?}: {made:?}");
        let request = CreateSnapshotRequest {
            source_volume_id: volume.volume_id.clone(),
            name: "snapshot".to_owned(),
            accessibility_requirements: requirement,
            ..CreateSnapshotRequest::default()
        };
        let cut = controller.0.clone().create_snapshot(request).await.map(|answer| answer.into_inner());
        assert_eq!(outcome(&cut), code, "{segments:?}: {cut:?}");
        let topology = mk_requirement(segments).requisite.remove(0);
        let told = controller.0.clone().get_capacity(mk_capacity(Some(topology))).await;
        match code {
            Code::InvalidArgument => assert_eq!(told.unwrap_err().code(), code),
            Code::Ok => assert!(told.unwrap().into_inner().available_capacity > 0),
            _ => assert_eq!(told.unwrap().into_inner().available_capacity, 0, "{segments:?}"),
        }
    }
    assert!(capacity(&controller, None).await < whole);
    assert_eq!(world.store.list().await.unwrap().len(), 2, "what was refused changed nothing");
}

/// While the controller is young, a node that it does not know may still announce itself.
fn outcome<T>(answer: &Result<T, Status>) -> Code {
    match answer.as_ref().err().map_or(Code::Ok, Status::code) {
        Code::Unavailable => Code::ResourceExhausted,
        code => code,
    }
}

/// The answers of calls that run at the same time, in order.
async fn all<I, T: Send + 'static, F>(
    each: impl IntoIterator<Item = I>,
    call: impl Fn(I) -> F,
) -> Vec<Result<T, Status>>
where
    F: Future<Output = Result<T, Status>> + Send + 'static,
{
    let calls: Vec<_> = each.into_iter().map(|item| tokio::spawn(call(item))).collect();
    let mut answers = Vec::new();
    for call in calls {
        answers.push(call.await.unwrap());
    }
    answers
}

/// What each name got; twins got the same or were aborted.
fn one_of_each(
    answers: Vec<Result<String, Status>>,
    name: impl Fn(usize) -> String,
) -> BTreeMap<String, String> {
    let mut got = BTreeMap::new();
    for (n, answer) in answers.into_iter().enumerate() {
        match answer {
            Ok(id) => {
                let first = got.entry(name(n)).or_insert_with(|| id.clone());
                assert_eq!(*first, id, "{} is one", name(n));
            }
            Err(status) => assert_eq!(status.code(), Code::Aborted, "{status}"),
        }
    }
    got
}

async fn capacity(controller: &Controller, topology: Option<Topology>) -> i64 {
    let answer = controller.0.clone().get_capacity(mk_capacity(topology)).await.unwrap();
    answer.into_inner().available_capacity
}

fn mk_capacity(accessible_topology: Option<Topology>) -> GetCapacityRequest {
    GetCapacityRequest { accessible_topology, ..GetCapacityRequest::default() }
}

fn mk_requirement(segments: &[(&str, &str)]) -> TopologyRequirement {
    let segments = segments.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
    let topology = Topology { segments };
    TopologyRequirement { requisite: vec![topology.clone()], preferred: vec![topology] }
}
