//! The kernel's own NBD client on a volume of our data process.

use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_proto::csi as csi_proto;
use holdfast_proto::storage::AttachRequest;
use holdfast_tests::blocks::{BlockLedger, BlockWork, Crash};
use holdfast_tests::csi::{Socket, block_capability, create_request, named};
use holdfast_tests::process::wait_until;

use super::sh;

const VOLUME_BYTES: u64 = 32 << 20;
const VOLUME_BLOCKS: usize = 8192;
const START_TIMEOUT: Duration = Duration::from_secs(60);
const NODE: &str = "vm";
const DEVICE: &str = "/dev/nbd0";

/// Blocks through `/dev/nbd0` are as they were written, also after a reconnection; a file system on it is whole.
pub fn client_of_the_kernel() -> Result<()> {
    // The pool wants a file system that can preallocate.
    sh("mkfs.ext4", &["-q", "/dev/ram0"])?;
    sh("mount", &["-t", "ext4", "/dev/ram0", "/pool"])?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut processes = [start(&controller_arguments())?, start(&data_arguments())?];
    let outcome = use_volume(&runtime);
    processes.iter_mut().for_each(|process| drop(process.kill()));
    outcome
}

fn use_volume(runtime: &tokio::runtime::Runtime) -> Result<()> {
    let socket = |path: &str| Socket::new(runtime.handle().clone(), PathBuf::from(path));
    let (controller, data) = (socket("/run/controller.sock"), socket("/run/data.sock"));
    let volume_id = make_volume(&controller)?;
    let request = csi_proto::ControllerPublishVolumeRequest {
        volume_id: volume_id.clone(),
        node_id: NODE.to_owned(),
        volume_capability: Some(block_capability()),
        ..Default::default()
    };
    let published =
        controller.controller(|mut client| async move { client.controller_publish_volume(request).await });
    let context = named("ControllerPublishVolume", published)?.publish_context;
    let attachment = context.get("attachment").context("no attachment")?.parse()?;
    let request = AttachRequest { volume_id: volume_id.clone(), attachment, key: Vec::new() };
    named("Attach", data.data(|mut client| async move { client.attach(request).await }))?;
    let export = format!("/run/nbd/{volume_id}.sock");
    wait_until(START_TIMEOUT, || Ok(Path::new(&export).exists())).context("the export's socket")?;

    connect(&export, &volume_id)?;
    let device = Path::new(DEVICE);
    let mut ledger = BlockLedger::new(VOLUME_BLOCKS);
    ledger.check(device, Crash::Processes).context("a fresh volume")?;
    let work = BlockWork::start(device, ledger, 3)?;
    std::thread::sleep(Duration::from_secs(5));
    let (mut ledger, error) = work.finish()?;
    ensure!(error.is_none(), "a request failed: {error:?}");
    sh("nbd-client", &["-d", DEVICE])?;
    connect(&export, &volume_id)?;
    ledger.check(device, Crash::Processes).context("after a reconnection")?;
    println!(
        "VM: {} requests, {} flushes, {} MiB verified",
        ledger.requests,
        ledger.flushes,
        ledger.bytes_verified >> 20
    );
    ensure!(ledger.requests > 0 && ledger.flushes > 0, "nothing was done");

    sh("mkfs.ext4", &["-q", "-F", DEVICE])?;
    sh("mount", &["-t", "ext4", DEVICE, "/mnt"])?;
    std::fs::write("/mnt/file", vec![7; 1 << 20])?;
    sh("umount", &["/mnt"])?;
    sh("e2fsck", &["-fn", DEVICE])?;
    sh("nbd-client", &["-d", DEVICE]).map(drop)
}

fn connect(export: &str, name: &str) -> Result<()> {
    sh("nbd-client", &["-unix", export, "-name", name, "-block-size", "4096", DEVICE])?;
    let size = Path::new("/sys/block/nbd0/size");
    wait_until(
        START_TIMEOUT,
        || Ok(std::fs::read_to_string(size)?.trim() == (VOLUME_BYTES / 512).to_string()),
    )
    .context("the device's size")
}

fn make_volume(controller: &Socket) -> Result<String> {
    let mut request = create_request("vm", i64::try_from(VOLUME_BYTES)?, 1, "ext4");
    request.volume_capabilities = vec![block_capability()];
    let mut id = None;
    // The node announces itself some time after its start.
    wait_until(START_TIMEOUT, || {
        let request = request.clone();
        let created = controller.controller(|mut client| async move { client.create_volume(request).await });
        id = named("CreateVolume", created)?.volume.map(|volume| volume.volume_id);
        Ok(id.is_some())
    })?;
    id.context("CreateVolume answered no volume")
}

fn start(arguments: &[&str]) -> Result<Child> {
    Command::new("/bin/holdfast-csi").args(arguments).spawn().context("cannot start holdfast-csi")
}

fn controller_arguments() -> [&'static str; 5] {
    [
        "controller",
        "--csi-socket=/run/controller.sock",
        "--store-dir=/pool/records",
        "--registry-listen=127.0.0.1:9470",
        "--insecure",
    ]
}

fn data_arguments() -> [&'static str; 13] {
    [
        "data",
        "--node=vm",
        "--pool-dir=/pool/pool",
        "--pool-capacity=128Mi",
        "--control-listen=127.0.0.1:9471",
        "--nbd-listen=127.0.0.1:9472",
        "--data-socket=/run/data.sock",
        "--cookie-dir=/run/cookies",
        "--run-dir=/run/front-ends",
        "--nbd-client-dir=/run/nbd",
        "--front-end=none",
        "--registry=127.0.0.1:9470",
        "--insecure",
    ]
}
