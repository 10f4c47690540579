//! The node service with a real loop device, real mkfs and real mounts; only the data process is a stand-in that
//! hands out the loop device. What a real data process adds is tested with the binary's roles.

mod read_only;

use std::collections::{BTreeMap, HashMap};
use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use holdfast_frontend::ReadOnlyTwin;
use holdfast_proto::csi::node_client::NodeClient;
use holdfast_proto::csi::node_server::NodeServer;
use holdfast_proto::csi::volume_capability::access_mode::Mode;
use holdfast_proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use holdfast_proto::csi::*;
use holdfast_proto::storage::data_server::{Data, DataServer};
use holdfast_proto::storage::{
    AttachReply, AttachRequest, CountAllocatedReply, CountAllocatedRequest, DetachReply, DetachRequest,
    GetStatusReply, GetStatusRequest,
};
use holdfast_service::serve::{bind_unix, serve_unix, server};
use holdfast_service::topology::{NODE_KEY, ZONE_KEY};
use holdfast_service::{NodeConfig, NodeService, SledStore};
use holdfast_storage_core::ids::{Attachment, NodeName};
use holdfast_storage_core::record::{Formatted, VolumeRecord};
use holdfast_storage_core::record_store::RecordStore;
use tempfile::TempDir;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request, Response, Status};

use crate::support::fakes::{Cut, CutStore};
use crate::support::mk_record;

const DEVICE_BYTES: u64 = 64 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_node_tells_where_it_is_and_how_many_volumes_it_takes() {
    let Some(world) = World::start(Formatted::Never).await else { return };
    let info = world.node().await.0.node_get_info(NodeGetInfoRequest {}).await.unwrap().into_inner();
    assert_eq!((info.node_id.as_str(), info.max_volumes_per_node), ("node-a", 7));
    let segments: BTreeMap<_, _> = info.accessible_topology.unwrap().segments.into_iter().collect();
    let wanted =
        [(NODE_KEY, "node-a"), (ZONE_KEY, "zone-1")].map(|(key, value)| (key.to_owned(), value.to_owned()));
    assert_eq!(segments, BTreeMap::from(wanted));
}

#[tokio::test(flavor = "multi_thread")]
async fn r36_a_blank_volume_is_formatted_once_and_recorded_before_it_is_mounted() {
    let Some(world) = World::start(Formatted::Never).await else { return };
    let node = world.node().await;
    node.stage(&world).await.unwrap();
    assert_eq!(world.formatted().await, Formatted::Yes);
    fs::write(world.staging().join("file"), b"kept").unwrap();
    node.stage(&world).await.expect("staged twice is staged");
    node.unstage(&world).await.unwrap();
    assert!(!is_mounted(&world.staging()));
    node.stage(&world).await.unwrap();
    assert_eq!(fs::read(world.staging().join("file")).unwrap(), b"kept");
    node.unstage(&world).await.unwrap();
    node.unstage(&world).await.expect("unstaged twice is unstaged");
}

#[tokio::test(flavor = "multi_thread")]
async fn r36_allocated_blocks_forbid_the_first_format() {
    let Some(world) = World::start(Formatted::Never).await else { return };
    fs::write(world.device(), [7; 4096]).unwrap();
    world.data.lock().unwrap().allocated_blocks = 1;
    let before = world.content();
    let status = world.node().await.stage(&world).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(status.message().contains("1 blocks"), "{status}");
    assert_eq!(world.formatted().await, Formatted::Never);
    assert_eq!(world.content(), before, "not a byte was written");
}

/// A half-dead target: it serves, and does not say what is allocated.
#[tokio::test(flavor = "multi_thread")]
async fn r36_without_an_answer_on_what_is_allocated_nothing_is_formatted() {
    let Some(world) = World::start(Formatted::Never).await else { return };
    world.data.lock().unwrap().count_fails = true;
    let before = world.content();
    let status = world.node().await.stage(&world).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert_eq!(world.formatted().await, Formatted::Never);
    assert_eq!(world.content(), before, "not a byte was written");
}

#[tokio::test(flavor = "multi_thread")]
async fn r36_an_interrupted_format_is_repeated() {
    let Some(world) = World::start(Formatted::Formatting).await else { return };
    fs::write(world.device(), [7; 1 << 20]).unwrap();
    world.data.lock().unwrap().allocated_blocks = 256;
    let node = world.node().await;
    node.stage(&world).await.unwrap();
    assert_eq!(world.formatted().await, Formatted::Yes);
    node.unstage(&world).await.unwrap();
}

/// A device that reads as blank is what a device that cannot be read looks like to blkid: never a reason to format.
#[tokio::test(flavor = "multi_thread")]
async fn r36_a_formatted_volume_is_never_formatted_again_whatever_its_device_shows() {
    let Some(world) = World::start(Formatted::Yes).await else { return };
    let before = world.content();
    let status = world.node().await.stage(&world).await.unwrap_err();
    assert_eq!(status.code(), Code::Internal, "{status}");
    assert!(status.message().contains("cannot be mounted"), "{status}");
    assert_eq!(world.content(), before, "not a byte was written");
    assert!(!is_mounted(&world.staging()));
}

#[tokio::test(flavor = "multi_thread")]
async fn r36_a_swap_without_an_answer_leads_to_no_mount_and_is_found_out_by_the_next_call() {
    for (step, happens) in [(0, false), (0, true), (1, false), (1, true)] {
        let Some(world) = World::start(Formatted::Never).await else { return };
        let cut = Cut::after(step, happens);
        let store = Arc::new(CutStore { store: Arc::clone(&world.store), cut: cut.clone() });
        let status = world.node_with(store).await.stage(&world).await.unwrap_err();
        assert!(cut.was_reached());
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        assert!(!is_mounted(&world.staging()), "step {step}");
        let node = world.node().await;
        node.stage(&world).await.unwrap();
        assert_eq!(world.formatted().await, Formatted::Yes);
        node.unstage(&world).await.unwrap();
    }
}

/// What a mkfs does that outlived its service.
#[tokio::test(flavor = "multi_thread")]
async fn r36_no_mkfs_runs_beside_an_earlier_one_that_was_left_behind() {
    let Some(world) = World::start(Formatted::Formatting).await else { return };
    let mut earlier = Command::new("flock").args([&world.device(), "sleep", "1"]).spawn().unwrap();
    tokio::time::sleep(std::time::Duration::from_millis(200)).await;
    let node = world.node().await;
    node.stage(&world).await.unwrap();
    let ended = earlier.try_wait().unwrap();
    assert!(ended.is_some_and(|status| status.success()), "mkfs waited for the lock");
    node.unstage(&world).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn r36_a_read_only_volume_is_not_formatted() {
    let Some(world) = World::start(Formatted::Never).await else { return };
    world.change(|record| record.read_only = true).await;
    let status = world.node().await.stage(&world).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert_eq!(world.formatted().await, Formatted::Never);
}

#[tokio::test(flavor = "multi_thread")]
async fn staging_under_an_attachment_that_is_over_reaches_no_device() {
    let Some(world) = World::start(Formatted::Never).await else { return };
    let node = world.node().await;
    for (attached_to, attachment) in [(None, 7), (Some("other"), 7), (Some("node-a"), 8)] {
        world
            .change(|record| {
                record.attached_to = attached_to.map(|name| NodeName(name.to_owned()));
                record.attachment = Attachment(attachment);
            })
            .await;
        let status = node.stage(&world).await.unwrap_err();
        assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    }
    assert!(world.data.lock().unwrap().attached.is_empty());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_somebody_else_mounted_is_left_alone() {
    let Some(world) = World::start(Formatted::Never).await else { return };
    let node = world.node().await;
    fs::create_dir_all(world.staging()).unwrap();
    run("mount", &["-t", "tmpfs", "foreign", world.staging().to_str().unwrap()]);
    let status = node.stage(&world).await.unwrap_err();
    run("umount", &[world.staging().to_str().unwrap()]);
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(status.message().contains("foreign"), "{status}");

    node.stage(&world).await.unwrap();
    let target = world.target("pod");
    fs::create_dir_all(&target).unwrap();
    run("mount", &["-t", "tmpfs", "foreign", target.to_str().unwrap()]);
    let status = node.publish(&world, "pod", mk_mount(Mode::SingleNodeWriter), false).await.unwrap_err();
    run("umount", &[target.to_str().unwrap()]);
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    node.unstage(&world).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn publishing_follows_the_access_mode_and_readonly() {
    let Some(world) = World::start(Formatted::Never).await else { return };
    let node = world.node().await;
    let many = || mk_mount(Mode::SingleNodeMultiWriter);
    let status = node.publish(&world, "one", many(), false).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "not staged: {status}");
    node.stage(&world).await.unwrap();
    node.publish(&world, "one", many(), false).await.unwrap();
    node.publish(&world, "one", many(), false).await.expect("twice is once");
    node.publish(&world, "two", many(), true).await.unwrap();
    node.publish(&world, "two", many(), true).await.expect("twice is once");
    assert!(fs::write(world.target("one").join("file"), b"x").is_ok());
    assert!(fs::write(world.target("two").join("file"), b"x").is_err());
    let status = node.publish(&world, "two", many(), false).await.unwrap_err();
    assert_eq!(status.code(), Code::AlreadyExists, "{status}");
    let status =
        node.publish(&world, "three", mk_mount(Mode::SingleNodeSingleWriter), false).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "{status}");
    assert!(status.message().contains("SINGLE_NODE_SINGLE_WRITER"), "{status}");
    node.unpublish(&world, "two").await.unwrap();
    node.publish(&world, "one", mk_mount(Mode::SingleNodeSingleWriter), false)
        .await
        .expect("the only target");
    let status = node.unstage(&world).await.unwrap_err();
    assert_eq!(status.code(), Code::FailedPrecondition, "still published: {status}");
    node.unpublish(&world, "one").await.unwrap();
    node.unpublish(&world, "one").await.expect("twice is once");
    assert!(!world.target("one").exists());
    node.unstage(&world).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn unpublishing_never_deletes_what_it_did_not_make() {
    let Some(world) = World::start(Formatted::Never).await else { return };
    let node = world.node().await;
    let target = world.target("pod");
    fs::create_dir_all(&target).unwrap();
    fs::write(target.join("precious"), b"x").unwrap();
    let status = node.unpublish(&world, "pod").await.unwrap_err();
    assert_eq!(status.code(), Code::Internal, "{status}");
    assert!(target.join("precious").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn staging_refuses_bad_input_by_field_and_attaches_nothing() {
    let Some(world) = World::start(Formatted::Never).await else { return };
    let node = world.node().await;
    let stage = world.stage_request();
    let mut no_attachment = stage.clone();
    no_attachment.publish_context.clear();
    let mut odd_attachment = stage.clone();
    odd_attachment.publish_context.insert("attachment".to_owned(), "x".to_owned());
    let block = VolumeCapability {
        access_type: Some(AccessType::Block(BlockVolume {})),
        ..mk_mount(Mode::SingleNodeWriter)
    };
    for (request, code, named) in [
        (
            NodeStageVolumeRequest { volume_id: String::new(), ..stage.clone() },
            Code::InvalidArgument,
            "volume_id",
        ),
        (
            NodeStageVolumeRequest { volume_id: "../x".to_owned(), ..stage.clone() },
            Code::NotFound,
            "volume_id",
        ),
        (NodeStageVolumeRequest { volume_id: "0".repeat(32), ..stage.clone() }, Code::NotFound, "record"),
        (
            NodeStageVolumeRequest { staging_target_path: String::new(), ..stage.clone() },
            Code::InvalidArgument,
            "staging_target_path",
        ),
        (
            NodeStageVolumeRequest { staging_target_path: "/etc/x".to_owned(), ..stage.clone() },
            Code::InvalidArgument,
            "kubelet folder",
        ),
        (
            NodeStageVolumeRequest { volume_capability: None, ..stage.clone() },
            Code::InvalidArgument,
            "volume_capability",
        ),
        (
            NodeStageVolumeRequest { volume_capability: Some(block), ..stage.clone() },
            Code::InvalidArgument,
            "block",
        ),
        (no_attachment, Code::InvalidArgument, "publish_context"),
        (odd_attachment, Code::InvalidArgument, "publish_context"),
    ] {
        let status = node.0.clone().node_stage_volume(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(named), "{named}: {status}");
    }
    assert!(world.data.lock().unwrap().attached.is_empty(), "nothing was attached");
    assert_eq!(world.formatted().await, Formatted::Never);
}

#[tokio::test(flavor = "multi_thread")]
async fn publishing_refuses_bad_input_by_field() {
    let Some(world) = World::start(Formatted::Never).await else { return };
    let node = world.node().await;
    let publish = world.publish_request("pod", mk_mount(Mode::SingleNodeWriter), false);
    for (request, code) in [
        (NodePublishVolumeRequest { volume_id: String::new(), ..publish.clone() }, Code::InvalidArgument),
        (NodePublishVolumeRequest { target_path: String::new(), ..publish.clone() }, Code::InvalidArgument),
        (
            NodePublishVolumeRequest { target_path: "/etc/x".to_owned(), ..publish.clone() },
            Code::InvalidArgument,
        ),
        (NodePublishVolumeRequest { volume_capability: None, ..publish.clone() }, Code::InvalidArgument),
        (
            NodePublishVolumeRequest { staging_target_path: String::new(), ..publish.clone() },
            Code::FailedPrecondition,
        ),
    ] {
        let status = node.0.clone().node_publish_volume(request).await.unwrap_err();
        assert_eq!(status.code(), code, "{status}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn stats_are_of_volumes_that_are_where_the_caller_says() {
    let Some(world) = World::start(Formatted::Never).await else { return };
    let node = world.node().await;
    for (volume_id, path, code) in [
        ("", "/x", Code::InvalidArgument),
        ("x", "", Code::InvalidArgument),
        ("x", "/x", Code::NotFound),
        (world.id().as_str(), "/etc", Code::NotFound),
        (world.id().as_str(), world.target("no").to_str().unwrap(), Code::NotFound),
    ] {
        let request = NodeGetVolumeStatsRequest {
            volume_id: volume_id.to_owned(),
            volume_path: path.to_owned(),
            ..NodeGetVolumeStatsRequest::default()
        };
        assert_eq!(node.0.clone().node_get_volume_stats(request).await.unwrap_err().code(), code);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_data_process_that_is_away_is_named_and_nothing_is_changed() {
    let Some(world) = World::start(Formatted::Never).await else { return };
    fs::remove_file(world.dir.path().join("data.sock")).unwrap();
    let status = world.node().await.stage(&world).await.unwrap_err();
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    assert!(status.message().contains("data process"), "{status}");
    assert_eq!(world.formatted().await, Formatted::Never);
}

/// A record published to node-a with attachment 7, and the loop device that is its content.
struct World {
    store: Arc<dyn RecordStore>,
    record: VolumeRecord,
    data: Arc<Mutex<FakeData>>,
    dir: TempDir,
}

/// Stands in for the data process.
#[derive(Default)]
struct FakeData {
    device: String,
    allocated_blocks: u64,
    count_fails: bool,
    /// Volumes attached now.
    attached: Vec<String>,
}

struct DataEnd(Arc<Mutex<FakeData>>);

impl World {
    /// `None` without root: said aloud, so that a skip is not taken for a pass.
    async fn start(formatted: Formatted) -> Option<Self> {
        if !nix::unistd::geteuid().is_root() {
            eprintln!("SKIPPED: needs root for loop devices and mounts");
            return None;
        }
        let dir = tempfile::Builder::new().prefix("holdfast-node-").tempdir_in("/var/tmp").unwrap();
        fs::create_dir(dir.path().join("kubelet")).unwrap();
        let file = dir.path().join("content");
        File::create(&file).unwrap().set_len(DEVICE_BYTES).unwrap();
        let device = run("losetup", &["--find", "--show", "--sector-size=4096", file.to_str().unwrap()]);
        let data = Arc::new(Mutex::new(FakeData { device: device.trim().to_owned(), ..FakeData::default() }));
        let listener = bind_unix(&dir.path().join("data.sock")).await.unwrap();
        let router = server().add_service(DataServer::new(DataEnd(Arc::clone(&data))));
        tokio::spawn(serve_unix(router, listener, std::future::pending()));
        let record = VolumeRecord {
            attached_to: Some(NodeName("node-a".to_owned())),
            attachment: Attachment(7),
            formatted,
            ..mk_record(0xab, "data", &["node-a"])
        };
        let store = Arc::new(SledStore::open(&dir.path().join("store")).unwrap());
        store.create(record.clone()).await.unwrap();
        Some(Self { store, record, data, dir })
    }

    async fn node(&self) -> Node {
        self.node_with(Arc::clone(&self.store)).await
    }

    async fn node_with(&self, store: Arc<dyn RecordStore>) -> Node {
        let config = NodeConfig {
            node: NodeName("node-a".to_owned()),
            zone: Some("zone-1".to_owned()),
            volumes_max: Some(7),
            data_socket: self.dir.path().join("data.sock"),
            kubelet_dir: self.dir.path().join("kubelet"),
        };
        let socket = tempfile::Builder::new().tempdir_in(self.dir.path()).unwrap().keep().join("csi.sock");
        let listener = bind_unix(&socket).await.unwrap();
        let router = server().add_service(NodeServer::new(NodeService::new(config, store).unwrap()));
        tokio::spawn(serve_unix(router, listener, std::future::pending()));
        let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
        Node(NodeClient::new(endpoint.connect().await.unwrap()))
    }

    fn id(&self) -> String {
        self.record.volume_id.to_string()
    }

    fn device(&self) -> String {
        self.data.lock().unwrap().device.clone()
    }

    fn staging(&self) -> PathBuf {
        self.dir.path().join("kubelet/plugins/staging")
    }

    fn target(&self, pod: &str) -> PathBuf {
        self.dir.path().join("kubelet/pods").join(pod)
    }

    fn stage_request(&self) -> NodeStageVolumeRequest {
        NodeStageVolumeRequest {
            volume_id: self.id(),
            publish_context: HashMap::from([("attachment".to_owned(), "7".to_owned())]),
            staging_target_path: self.staging().display().to_string(),
            volume_capability: Some(mk_mount(Mode::SingleNodeWriter)),
            ..NodeStageVolumeRequest::default()
        }
    }

    fn publish_request(
        &self,
        pod: &str,
        capability: VolumeCapability,
        readonly: bool,
    ) -> NodePublishVolumeRequest {
        NodePublishVolumeRequest {
            volume_id: self.id(),
            staging_target_path: self.staging().display().to_string(),
            target_path: self.target(pod).display().to_string(),
            volume_capability: Some(capability),
            readonly,
            ..NodePublishVolumeRequest::default()
        }
    }

    async fn formatted(&self) -> Formatted {
        self.store.read(self.record.volume_id).await.unwrap().record.formatted
    }

    async fn change(&self, change: impl FnOnce(&mut VolumeRecord)) {
        let mut found = self.store.read(self.record.volume_id).await.unwrap();
        change(&mut found.record);
        self.store.swap(found.version, found.record).await.unwrap();
    }

    fn content(&self) -> Vec<u8> {
        run("sync", &[&self.device()]);
        let mut bytes = Vec::new();
        File::open(self.device()).unwrap().read_to_end(&mut bytes).unwrap();
        bytes
    }
}

impl Drop for World {
    fn drop(&mut self) {
        let below = self.dir.path().display().to_string();
        let table = fs::read_to_string("/proc/mounts").unwrap_or_default();
        for target in table.lines().rev().filter_map(|line| line.split(' ').nth(1)) {
            if target.starts_with(&below) {
                drop(Command::new("umount").args(["-l", target]).status());
            }
        }
        let device = self.device();
        for twin in ReadOnlyTwin::all_of(Path::new(&device)).into_iter().flatten() {
            drop(Command::new("losetup").arg("-d").arg(twin.path).status());
        }
        drop(Command::new("losetup").args(["-d", &device]).status());
    }
}

struct Node(NodeClient<Channel>);

impl Node {
    async fn stage(&self, world: &World) -> Result<(), Status> {
        self.0.clone().node_stage_volume(world.stage_request()).await.map(drop)
    }

    async fn unstage(&self, world: &World) -> Result<(), Status> {
        let staging_target_path = world.staging().display().to_string();
        let request = NodeUnstageVolumeRequest { volume_id: world.id(), staging_target_path };
        self.0.clone().node_unstage_volume(request).await.map(drop)
    }

    async fn publish(
        &self,
        world: &World,
        pod: &str,
        capability: VolumeCapability,
        readonly: bool,
    ) -> Result<(), Status> {
        self.0.clone().node_publish_volume(world.publish_request(pod, capability, readonly)).await.map(drop)
    }

    async fn unpublish(&self, world: &World, pod: &str) -> Result<(), Status> {
        let target_path = world.target(pod).display().to_string();
        let request = NodeUnpublishVolumeRequest { volume_id: world.id(), target_path };
        self.0.clone().node_unpublish_volume(request).await.map(drop)
    }
}

#[tonic::async_trait]
impl Data for DataEnd {
    async fn scrub(
        &self,
        _: Request<holdfast_proto::storage::ScrubRequest>,
    ) -> Result<Response<holdfast_proto::storage::ScrubReply>, Status> {
        Err(Status::unimplemented("nobody asks for it here"))
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Result<Response<AttachReply>, Status> {
        let mut data = self.0.lock().unwrap();
        assert_eq!(request.get_ref().attachment, 7);
        data.attached.push(request.into_inner().volume_id);
        Ok(Response::new(AttachReply { device: data.device.clone(), generation: 1 }))
    }

    async fn detach(&self, request: Request<DetachRequest>) -> Result<Response<DetachReply>, Status> {
        let volume_id = request.into_inner().volume_id;
        self.0.lock().unwrap().attached.retain(|attached| *attached != volume_id);
        Ok(Response::new(DetachReply {}))
    }

    async fn get_status(
        &self,
        request: Request<GetStatusRequest>,
    ) -> Result<Response<GetStatusReply>, Status> {
        let data = self.0.lock().unwrap();
        if !data.attached.contains(&request.into_inner().volume_id) {
            return Err(Status::not_found("not attached"));
        }
        Ok(Response::new(GetStatusReply { device: data.device.clone(), ..GetStatusReply::default() }))
    }

    async fn count_allocated(
        &self,
        _: Request<CountAllocatedRequest>,
    ) -> Result<Response<CountAllocatedReply>, Status> {
        let data = self.0.lock().unwrap();
        if data.count_fails {
            return Err(Status::unavailable("a member does not answer"));
        }
        Ok(Response::new(CountAllocatedReply { blocks: data.allocated_blocks }))
    }
}

fn is_mounted(path: &Path) -> bool {
    fs::read_to_string("/proc/mounts").unwrap().lines().any(|line| line.split(' ').nth(1) == path.to_str())
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

fn mk_mount(mode: Mode) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: mode.into() }),
        access_type: Some(AccessType::Mount(MountVolume {
            fs_type: "ext4".to_owned(),
            ..MountVolume::default()
        })),
    }
}
