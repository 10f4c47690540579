//! Raw block volumes that are published read-only, each target with a read-only twin of the device.

use std::fs::OpenOptions;
use std::io::Write;

use super::*;

const GROWN_BYTES: u64 = 2 * DEVICE_BYTES;

fn mk_block(mode: Mode) -> VolumeCapability {
    VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..mk_mount(mode) }
}

fn many() -> VolumeCapability {
    mk_block(Mode::SingleNodeMultiWriter)
}

/// A raw block volume, staged.
async fn staged() -> Option<(World, Node)> {
    let world = World::start(Formatted::Never).await?;
    world.change(|record| record.params.fs_type = String::new()).await;
    let node = world.node().await;
    stage(&world, &node).await;
    Some((world, node))
}

async fn stage(world: &World, node: &Node) {
    let request = NodeStageVolumeRequest {
        volume_capability: Some(mk_block(Mode::SingleNodeWriter)),
        ..world.stage_request()
    };
    node.0.clone().node_stage_volume(request).await.unwrap();
}

fn twins(world: &World) -> Vec<PathBuf> {
    let found = ReadOnlyTwin::all_of(Path::new(&world.device())).unwrap();
    found.into_iter().map(|twin| twin.path).collect()
}

fn write(device: &Path, letter: char) {
    let script = format!(
        "head -c 4096 /dev/zero | tr '\\0' {letter} | dd of={} bs=4096 iflag=fullblock oflag=direct conv=notrunc status=none",
        device.display()
    );
    run("sh", &["-c", &script]);
}

fn read(device: &Path) -> String {
    let from = format!("if={}", device.display());
    run("dd", &[&from, "bs=4096", "count=1", "iflag=direct", "status=none"])[..3].to_owned()
}

fn assert_refuses_writes(device: &Path) {
    let written = OpenOptions::new().write(true).open(device).and_then(|mut file| {
        file.write_all(&[7; 4096])?;
        file.sync_all()
    });
    assert!(written.is_err(), "{} takes writes", device.display());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_block_volume_is_read_at_one_target_and_written_at_another() {
    let Some((world, node)) = staged().await else { return };
    let (writer, reader) = (world.target("writer"), world.target("reader"));
    for _ in 0..2 {
        node.publish(&world, "writer", many(), false).await.unwrap();
        node.publish(&world, "reader", many(), true).await.unwrap();
        assert_eq!(twins(&world).len(), 1);
    }
    for letter in ['a', 'b'] {
        write(&writer, letter);
        assert_eq!(read(&reader), String::from(letter).repeat(3));
        assert_refuses_writes(&reader);
    }
    assert_eq!(read(&writer), "bbb");
    for (pod, readonly) in [("writer", true), ("reader", false)] {
        let status = node.publish(&world, pod, many(), readonly).await.unwrap_err();
        assert_eq!(status.code(), Code::AlreadyExists, "{status}");
    }
    let request = NodeGetVolumeStatsRequest {
        volume_id: world.id(),
        volume_path: reader.display().to_string(),
        ..NodeGetVolumeStatsRequest::default()
    };
    let usage = node.0.clone().node_get_volume_stats(request).await.unwrap().into_inner().usage;
    assert_eq!(usage[0].total, i64::try_from(DEVICE_BYTES).unwrap());
    for last in ["writer", "reader"] {
        let status = node.unstage(&world).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
        node.unpublish(&world, last).await.unwrap();
        node.unpublish(&world, last).await.expect("twice is once");
        assert!(!world.target(last).exists());
    }
    assert_eq!(twins(&world), Vec::<PathBuf>::new());
    node.unstage(&world).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_single_writer_has_no_reader_beside_it() {
    let Some((world, node)) = staged().await else { return };
    node.publish(&world, "reader", many(), true).await.unwrap();
    for readonly in [false, true] {
        let alone = mk_block(Mode::SingleNodeSingleWriter);
        let status = node.publish(&world, "other", alone, readonly).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
        assert!(status.message().contains("SINGLE_NODE_SINGLE_WRITER"), "{status}");
    }
    assert_eq!(twins(&world).len(), 1, "a refusal makes none");
    node.publish(&world, "reader", mk_block(Mode::SingleNodeSingleWriter), true)
        .await
        .expect("the only target");
    node.unpublish(&world, "reader").await.unwrap();
}

/// What a node service leaves that is killed after so many steps of a read-only publish, or before as many of an unpublish.
fn leave(world: &World, steps: usize) {
    let (target, device) = (world.target("pod"), world.device());
    fs::create_dir_all(target.parent().unwrap()).unwrap();
    if steps > 0 {
        File::create_new(&target).unwrap();
    }
    if steps > 1 {
        let target = target.canonicalize().unwrap();
        let twin = ReadOnlyTwin::ensure(&world.id(), &target, Path::new(&device)).unwrap();
        if steps > 2 {
            run("mount", &["--bind", twin.path.to_str().unwrap(), target.to_str().unwrap()]);
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_kill_at_any_step_leaves_nothing_that_the_next_call_does_not_find() {
    let Some((world, _)) = staged().await else { return };
    for steps in 0..=3 {
        for publishes_again in [true, false] {
            leave(&world, steps);
            assert_eq!(twins(&world).len(), usize::from(steps > 1));
            // It knows of nothing.
            let node = world.node().await;
            if publishes_again {
                node.publish(&world, "pod", many(), true).await.unwrap();
                assert_eq!(twins(&world).len(), 1, "after {steps} steps");
                assert_refuses_writes(&world.target("pod"));
            }
            node.unpublish(&world, "pod").await.unwrap();
            assert_eq!(twins(&world).len(), 0, "after {steps} steps, published again: {publishes_again}");
            assert!(!world.target("pod").exists());
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn unpublishing_does_not_wait_for_the_data_process_and_its_twin_is_found_later() {
    let Some((world, node)) = staged().await else { return };
    node.publish(&world, "pod", many(), true).await.unwrap();
    let (socket, away) = (world.dir.path().join("data.sock"), world.dir.path().join("away.sock"));
    fs::rename(&socket, &away).unwrap();
    let alone = world.node().await;
    alone.unpublish(&world, "pod").await.unwrap();
    assert!(!world.target("pod").exists());
    fs::rename(&away, &socket).unwrap();
    let left = twins(&world);
    assert_eq!(left.len(), 1, "it is the data process's to clear, with the device");
    node.publish(&world, "pod", many(), true).await.unwrap();
    assert_eq!(twins(&world), left, "the same one");
    node.unpublish(&world, "pod").await.unwrap();
    assert_eq!(twins(&world).len(), 0);
}

/// As after a data process's restart: the target shows a twin of a device that is not the volume's any more.
#[tokio::test(flavor = "multi_thread")]
async fn a_target_that_shows_a_twin_of_an_earlier_device_is_not_taken_for_published() {
    let Some((world, node)) = staged().await else { return };
    node.publish(&world, "pod", many(), true).await.unwrap();
    let earlier = world.device();
    let file = world.dir.path().join("later");
    File::create(&file).unwrap().set_len(DEVICE_BYTES).unwrap();
    let later = run("losetup", &["--find", "--show", "--sector-size=4096", file.to_str().unwrap()]);
    world.data.lock().unwrap().device = later.trim().to_owned();
    write(Path::new(later.trim()), 'n');

    let status = node.publish(&world, "pod", many(), true).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    node.unpublish(&world, "pod").await.unwrap();
    node.publish(&world, "pod", many(), true).await.unwrap();
    assert_eq!(read(&world.target("pod")), "nnn");
    node.unpublish(&world, "pod").await.unwrap();
    assert_eq!(twins(&world).len(), 0);
    // The data process's part, at its start.
    for twin in ReadOnlyTwin::all_of(Path::new(&earlier)).unwrap() {
        run("losetup", &["-d", twin.path.to_str().unwrap()]);
    }
    run("losetup", &["-d", &earlier]);
}

#[tokio::test(flavor = "multi_thread")]
async fn expanding_on_the_node_is_for_read_only_targets_too() {
    let Some((world, node)) = staged().await else { return };
    node.publish(&world, "reader", many(), true).await.unwrap();
    let expand = |path: PathBuf| {
        let request = NodeExpandVolumeRequest {
            volume_id: world.id(),
            volume_path: path.display().to_string(),
            capacity_range: Some(CapacityRange { required_bytes: GROWN_BYTES as i64, limit_bytes: 0 }),
            ..NodeExpandVolumeRequest::default()
        };
        let mut client = node.0.clone();
        async move { client.node_expand_volume(request).await.map(|reply| reply.into_inner().capacity_bytes) }
    };
    assert_eq!(expand(world.target("reader")).await.unwrap_err().code(), Code::OutOfRange);
    OpenOptions::new()
        .write(true)
        .open(world.dir.path().join("content"))
        .unwrap()
        .set_len(GROWN_BYTES)
        .unwrap();
    run("losetup", &["-c", &world.device()]);
    assert_eq!(expand(world.target("reader")).await.unwrap(), GROWN_BYTES as i64);
    let told = run("blockdev", &["--getsize64", world.target("reader").to_str().unwrap()]);
    assert_eq!(told.trim(), GROWN_BYTES.to_string());
    // Another device's node is not the volume.
    let foreign = world.target("foreign");
    File::create_new(&foreign).unwrap();
    run("mount", &["--bind", "/dev/loop-control", foreign.to_str().unwrap()]);
    assert_eq!(expand(foreign).await.unwrap_err().code(), Code::NotFound);
    node.unpublish(&world, "reader").await.unwrap();
}
