//! A record store that is lost whole, and what the replicas' copies give back (ADR 0011).

use std::sync::Arc;

use holdfast_proto::storage::operator_server::Operator;
use holdfast_proto::storage::{RescueRecordsReply, RescueRecordsRequest, RescueVerdict, RescuedVolume};
use holdfast_service::{NodeBook, SledStore};
use holdfast_storage_core::record::VolumeRecord;
use tonic::{Code, Request, Status};

use crate::support::requests::{Controller, mk_create};
use crate::support::world::World;

const NODES: [&str; 3] = ["a", "b", "c"];

/// A world with volumes of these names, whose store is replaced by an empty one. Gives the ids and the records of before.
async fn mk_lost(names: &[&str]) -> (World, Vec<(String, VolumeRecord)>, tempfile::TempDir) {
    let mut world = World::start(&NODES).await;
    let controller = world.controller().await;
    let mut made = Vec::new();
    for name in names {
        let id = controller.create(&mk_create(name)).await.unwrap().volume_id;
        let record = world.record(&id).await;
        made.push((id, record));
    }
    drop(controller);
    let dir = tempfile::tempdir().unwrap();
    let sled = SledStore::open(dir.path()).unwrap();
    (world.groups, world.node_states, world.store) =
        (Arc::new(sled.clone()), Arc::new(sled.clone()), Arc::new(sled));
    (world, made, dir)
}

async fn rescue(
    controller: &Controller,
    all_sound: bool,
    named: &[&str],
) -> Result<RescueRecordsReply, Status> {
    let volume_ids = named.iter().map(ToString::to_string).collect();
    let request = RescueRecordsRequest { all_sound, volume_ids };
    controller.2.rescue_records(Request::new(request)).await.map(tonic::Response::into_inner)
}

fn of<'reply>(reply: &'reply RescueRecordsReply, id: &str) -> &'reply RescuedVolume {
    reply.volumes.iter().find(|volume| volume.volume_id == id).expect("the volume is told of")
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_lost_store_knew_comes_back_once_asked_for_and_is_changed_by_no_repetition() {
    let (world, made, _dir) = mk_lost(&["one", "two"]).await;
    let controller = world.controller().await;
    let shown = rescue(&controller, false, &[]).await.unwrap();
    for (id, _) in &made {
        let volume = of(&shown, id);
        assert_eq!((volume.verdict(), volume.restored), (RescueVerdict::Sound, false), "{volume:?}");
    }
    assert!(world.store.list().await.unwrap().is_empty(), "it was only looked at");

    let reply = rescue(&controller, true, &[]).await.unwrap();
    for (id, before) in &made {
        assert!(of(&reply, id).restored, "{reply:?}");
        let after = world.record(id).await;
        assert!(after.restored && after.generation > before.generation);
        let same = VolumeRecord { restored: false, generation: before.generation, ..after };
        assert_eq!(same, *before);
    }
    let versions =
        || async { world.store.list().await.unwrap().iter().map(|r| r.version).collect::<Vec<_>>() };
    let before = versions().await;
    let again = rescue(&controller, true, &[]).await.unwrap();
    assert!(again.volumes.iter().all(|v| v.verdict() == RescueVerdict::Present && !v.restored), "{again:?}");
    assert_eq!(versions().await, before);
    // The names are theirs again.
    assert_eq!(controller.create(&mk_create("one")).await.unwrap().volume_id, made[0].0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_in_doubt_comes_back_only_by_its_name() {
    let (mut world, made, _dir) = mk_lost(&["data"]).await;
    let id = made[0].0.as_str();
    world.book = Arc::new(NodeBook::new());
    for pool in world.pools.iter().filter(|pool| pool.node != "c") {
        pool.announce(&world.book).await;
    }
    let controller = world.controller().await;
    let reply = rescue(&controller, true, &[]).await.unwrap();
    let volume = of(&reply, id);
    assert_eq!((volume.verdict(), volume.restored), (RescueVerdict::Doubtful, false));
    assert!(volume.notes[0].contains("node c does not answer"), "{volume:?}");
    assert!(world.store.list().await.unwrap().is_empty());
    let unknown = rescue(&controller, true, &["00000000000000000000000000000001"]).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown}");
    assert!(
        world.store.list().await.unwrap().is_empty(),
        "nothing is done of a call that names what is not there"
    );
    assert!(of(&rescue(&controller, false, &[id]).await.unwrap(), id).restored);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_store_that_was_not_lost_whole_gets_back_what_is_named_and_no_name_twice() {
    let (world, made, _dir) = mk_lost(&["one", "two"]).await;
    let controller = world.controller().await;
    // Somebody made a volume before the rescue, and took a name.
    let taken = controller.create(&mk_create("two")).await.unwrap().volume_id;
    let refused = rescue(&controller, true, &[]).await.unwrap_err();
    assert_eq!(refused.code(), Code::FailedPrecondition);
    assert!(refused.message().contains(&taken), "{refused}");
    assert_eq!(world.store.list().await.unwrap().len(), 1);

    let reply = rescue(&controller, false, &[&made[0].0, &made[1].0]).await.unwrap();
    assert!(of(&reply, &made[0].0).restored, "{reply:?}");
    let two = of(&reply, &made[1].0);
    assert_eq!((two.verdict(), two.restored), (RescueVerdict::Impossible, false));
    assert!(two.error.contains(&taken) && two.error.contains(&made[1].0), "{two:?}");
    assert_eq!(of(&reply, &taken).verdict(), RescueVerdict::Present);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deleted_volume_whose_node_was_away_stays_deleted() {
    let (world, made, _dir) = mk_lost(&["data"]).await;
    let id = made[0].0.as_str();
    for pool in world.pools.iter().filter(|pool| pool.node != "c") {
        pool.forget(id);
    }
    let controller = world.controller().await;
    let reply = rescue(&controller, true, &[]).await.unwrap();
    let volume = of(&reply, id);
    assert_eq!((volume.verdict(), volume.restored), (RescueVerdict::Doubtful, false), "{volume:?}");
    assert!(volume.notes.iter().any(|note| note.contains("the volume was deleted")), "{volume:?}");
}
