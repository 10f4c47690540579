//! A raw block volume read at one target and written at another, with real data processes.

use std::os::unix::fs::MetadataExt;

use holdfast_frontend::ReadOnlyTwin;

use super::*;

/// `/dev/loopM` behind a target.
fn device_at(target: &Path) -> PathBuf {
    let number = fs::metadata(target).unwrap().rdev();
    fs::canonicalize(format!("/dev/loop{}", nix::sys::stat::minor(number))).unwrap()
}

/// What a loop device stands over.
fn backing(device: &Path) -> Option<String> {
    let name = device.file_name().unwrap().to_str().unwrap();
    fs::read_to_string(format!("/sys/block/{name}/loop/backing_file")).ok()
}

fn dd(arguments: &[String]) -> Vec<u8> {
    let done =
        Command::new("dd").args(["bs=4096", "count=1", "status=none"]).args(arguments).output().unwrap();
    assert!(done.status.success(), "dd {arguments:?}: {}", String::from_utf8_lossy(&done.stderr));
    done.stdout
}

fn read(target: &Path) -> Vec<u8> {
    dd(&[format!("if={}", target.display()), "iflag=direct".to_owned()])
}

fn write(target: &Path, from: &Path) {
    let of = format!("of={}", target.display());
    dd(&[format!("if={}", from.display()), of, "oflag=direct".to_owned(), "conv=notrunc,fsync".to_owned()]);
}

fn takes_writes(target: &Path) -> bool {
    let file = fs::OpenOptions::new().write(true).open(target);
    file.and_then(|mut file| std::io::Write::write_all(&mut file, &[7; 4096]).and_then(|()| file.sync_all()))
        .is_ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_block_volume_is_read_beside_its_writer_and_leaves_no_device() {
    if !is_root() {
        return;
    }
    let mut cluster = Cluster::start().await;
    let mode = AccessMode { mode: Mode::SingleNodeMultiWriter.into() };
    let capability = VolumeCapability { access_mode: Some(mode), ..mk_block() };
    let volume_id = cluster.create("read", &capability).await;
    let context = cluster.publish(&volume_id, "node-a", &capability).await;
    cluster.stage(&volume_id, &context, &capability).await.unwrap();
    let writer = cluster.publish_at(&volume_id, "writer", &capability, false).await.unwrap();
    let reader = cluster.publish_at(&volume_id, "reader", &capability, true).await.unwrap();
    let content = cluster.dir.path().join("block");
    for round in 1..=3_u8 {
        fs::write(&content, [round; 4096]).unwrap();
        write(&writer, &content);
        assert_eq!(read(&reader), [round; 4096]);
    }
    assert!(!takes_writes(&reader) && read(&writer) == [3; 4096]);

    // A node service that knows of nothing.
    for process in cluster.others.drain(..) {
        process.kill();
    }
    cluster.start_others().await;
    let (device, twin) = (device_at(&writer), device_at(&reader));
    cluster.publish_at(&volume_id, "reader", &capability, true).await.expect("it is published");
    assert_eq!(ReadOnlyTwin::all_of(&device).unwrap(), [ReadOnlyTwin { path: twin.clone() }]);

    // Nobody calls the node service where only readers are.
    let required_bytes = SIZE_BYTES + (64 << 20);
    let request = ControllerExpandVolumeRequest {
        volume_id: volume_id.clone(),
        capacity_range: Some(CapacityRange { required_bytes, limit_bytes: 0 }),
        ..ControllerExpandVolumeRequest::default()
    };
    cluster.controller.clone().controller_expand_volume(request).await.unwrap();
    let sectors = format!("/sys/block/{}/size", twin.file_name().unwrap().to_str().unwrap());
    let grown = (required_bytes / 512).to_string();
    wait_until("the twin grows", || fs::read_to_string(&sectors).unwrap().trim() == grown);

    let over = backing(&twin);
    cluster.restart_data_by_kill("node-a").await;
    wait_until("the dead twin is cleared", || backing(&twin) != over);
    for target in [&writer, &reader] {
        cluster.unpublish_at(&volume_id, target).await;
    }
    cluster.stage(&volume_id, &context, &capability).await.unwrap();
    let reader = cluster.publish_at(&volume_id, "reader", &capability, true).await.unwrap();
    assert_eq!(read(&reader), [3; 4096]);
    let (twin, early) = (device_at(&reader), cluster.unstage(&volume_id).await.unwrap_err());
    assert_eq!(early.code(), Code::FailedPrecondition, "{early}");
    let over = backing(&twin);
    cluster.unpublish_at(&volume_id, &reader).await;
    assert!(!reader.exists() && backing(&twin) != over);
    cluster.unstage(&volume_id).await.unwrap();
    cluster.unpublish(&volume_id).await;
    cluster.delete(&volume_id).await;
    cluster.stop();
}
