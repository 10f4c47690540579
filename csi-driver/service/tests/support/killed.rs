//! The controller dies after each change of a call in turn.

use holdfast_proto::csi::ListSnapshotsRequest;
use tonic::Status;

use super::fakes::Cut;
use super::requests::{Controller, mk_create};
use super::world::World;

/// More changes than any call here makes.
const CHANGES_MAX: i64 = 40;

/// All snapshots.
pub fn all() -> ListSnapshotsRequest {
    ListSnapshotsRequest::default()
}

/// Kills the controller after each change of `call` in turn, with that change done or not, repeats the call by a new one,
/// and has the outcome judged.
pub async fn killed_anywhere<T>(
    nodes: &[&'static str],
    prepare: impl AsyncFn(&World) -> String,
    call: impl AsyncFn(&Controller, &str) -> Result<T, Status>,
    judge: impl AsyncFn(&World, &Controller, &str, T),
) {
    for happens in [false, true] {
        for changes in 0.. {
            assert!(changes < CHANGES_MAX, "the call never ends");
            let world = World::start(nodes).await;
            let id = prepare(&world).await;
            let cut = Cut::after(changes, happens);
            let first = call(&world.cut_controller(&cut).await, &id).await;
            let was_reached = cut.was_reached();
            world.heal();
            let controller = world.controller().await;
            let done = call(&controller, &id).await.unwrap_or_else(|status| {
                panic!("after {changes} changes ({happens}): {status}");
            });
            controller.2.sweep_once().await.unwrap();
            judge(&world, &controller, &id, done).await;
            world.assert_nothing_unlisted().await;
            if !was_reached {
                assert!(first.is_ok());
                break;
            }
        }
    }
}

pub async fn mk_volume(world: &World) -> String {
    world.controller().await.create(&mk_create("data")).await.unwrap().volume_id
}

pub async fn mk_snapshot(world: &World) -> String {
    let volume = mk_volume(world).await;
    world.controller().await.snapshot(&volume, "nightly").await.unwrap().snapshot_id
}
