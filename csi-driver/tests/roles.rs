//! The real binary in its three roles on one machine: a volume is made, published, staged, mounted, used and deleted
//! through CSI. Needs root, /dev/fuse and loop devices.

// Tests and what they share may panic.
#![allow(clippy::unwrap_used)]

mod read_only;

use std::fs;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use holdfast_proto::csi::controller_client::ControllerClient;
use holdfast_proto::csi::identity_client::IdentityClient;
use holdfast_proto::csi::node_client::NodeClient;
use holdfast_proto::csi::volume_capability::access_mode::Mode;
use holdfast_proto::csi::volume_capability::{AccessMode, AccessType, BlockVolume, MountVolume};
use holdfast_proto::csi::*;
use tempfile::TempDir;
use tonic::Code;
use tonic::transport::{Channel, Endpoint};

const NODES: [&str; 3] = ["node-a", "node-b", "node-c"];
const SIZE_BYTES: i64 = 320 << 20;

#[tokio::test(flavor = "multi_thread")]
async fn a_volume_lives_from_create_to_delete() {
    if !is_root() {
        return;
    }
    let cluster = Cluster::start().await;
    for fs_type in ["ext4", "xfs"] {
        let capability = mk_mount(fs_type);
        let volume_id = cluster.create(fs_type, &capability).await;
        let context = cluster.publish(&volume_id, "node-a", &capability).await;
        let begun = Instant::now();
        cluster.stage(&volume_id, &context, &capability).await.unwrap();
        println!("{fs_type}: staged after {:?}", begun.elapsed());
        cluster.stage(&volume_id, &context, &capability).await.expect("staging twice is staging once");
        let target = cluster.publish_at(&volume_id, "one", &capability, false).await.unwrap();
        fs::write(target.join("file"), b"kept").unwrap();
        let read_only = cluster.publish_at(&volume_id, "two", &capability, true).await.unwrap();
        assert_eq!(fs::read(read_only.join("file")).unwrap(), b"kept");
        assert!(fs::write(read_only.join("other"), b"x").is_err(), "a read-only publish takes no writes");
        let usage = cluster.stats(&volume_id, &target).await.unwrap();
        assert!(usage[0].total > SIZE_BYTES / 2 && usage[0].total <= SIZE_BYTES, "{usage:?}");
        let early = cluster.unstage(&volume_id).await.unwrap_err();
        assert_eq!(early.code(), Code::FailedPrecondition, "{early}");
        cluster.unpublish_at(&volume_id, &target).await;
        cluster.unpublish_at(&volume_id, &target).await;
        cluster.unpublish_at(&volume_id, &read_only).await;
        assert!(!target.exists());
        cluster.unstage(&volume_id).await.unwrap();
        cluster.unstage(&volume_id).await.unwrap();

        // The next attachment finds the data and does not format.
        cluster.unpublish(&volume_id).await;
        let context = cluster.publish(&volume_id, "node-a", &capability).await;
        cluster.stage(&volume_id, &context, &capability).await.unwrap();
        let target = cluster.publish_at(&volume_id, "one", &capability, false).await.unwrap();
        assert_eq!(fs::read(target.join("file")).unwrap(), b"kept");
        cluster.unpublish_at(&volume_id, &target).await;
        cluster.unstage(&volume_id).await.unwrap();
        cluster.unpublish(&volume_id).await;
        cluster.delete(&volume_id).await;
        cluster.delete(&volume_id).await;
    }
    cluster.assert_pools_are_empty().await;
    cluster.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_raw_block_volume_is_shown_as_a_device() {
    if !is_root() {
        return;
    }
    let cluster = Cluster::start().await;
    let capability = mk_block();
    let volume_id = cluster.create("raw", &capability).await;
    let context = cluster.publish(&volume_id, "node-a", &capability).await;
    let early = cluster.publish_at(&volume_id, "device", &capability, false).await.unwrap_err();
    assert_eq!(early.code(), Code::FailedPrecondition, "{early}");
    cluster.stage(&volume_id, &context, &capability).await.unwrap();
    let target = cluster.publish_at(&volume_id, "device", &capability, false).await.unwrap();
    cluster.publish_at(&volume_id, "device", &capability, false).await.expect("twice is once");
    let usage = cluster.stats(&volume_id, &target).await.unwrap();
    assert_eq!(usage[0].total, SIZE_BYTES);
    cluster.unpublish_at(&volume_id, &target).await;
    assert!(!target.exists());
    cluster.unstage(&volume_id).await.unwrap();
    cluster.unpublish(&volume_id).await;
    cluster.delete(&volume_id).await;
    cluster.stop();
}

/// What is used is not touched, pools are named and stay, and the rest goes.
#[tokio::test(flavor = "multi_thread")]
async fn uninstalling_a_node_refuses_what_is_in_use_and_keeps_the_pools() {
    if !is_root() {
        return;
    }
    let mut cluster = Cluster::start().await;
    let capability = mk_mount("ext4");
    let volume_id = cluster.create("kept", &capability).await;
    let context = cluster.publish(&volume_id, "node-a", &capability).await;
    cluster.stage(&volume_id, &context, &capability).await.unwrap();
    let (own, cookies) = (cluster.dir.path().join("node-a"), cluster.memory.path().join("node-a"));
    let uninstall = |more: &[&str]| {
        let flags = [
            format!("--pool-dir={}", own.join("pool").display()),
            format!("--data-socket={}", own.join("data.sock").display()),
            format!("--cookie-dir={}", cookies.display()),
            format!("--run-dir={}", own.join("run").display()),
            format!("--csi-dir={}", own.join("csi").display()),
            format!("--registration-socket={}", own.join("registration.sock").display()),
            format!("--tls-dir={}", own.join("tls").display()),
            format!("--kubelet-dir={}", own.join("kubelet").display()),
        ];
        let mut command = Command::new(env!("CARGO_BIN_EXE_holdfast-csi"));
        let done = command.arg("uninstall").args(flags).args(more).output().unwrap();
        let text = [done.stdout, done.stderr].concat();
        (done.status.success(), String::from_utf8(text).unwrap())
    };
    let (done, told) = uninstall(&["--force"]);
    assert!(!done && told.contains("a data process answers on"), "{told}");
    let (_, killed) = cluster.data.remove(0);
    killed.kill();
    let pool = || walk(&own.join("pool"));
    let before = pool();
    let (done, told) = uninstall(&[]);
    let staging = cluster.dir.path().join("kubelet");
    assert!(!done && told.contains(&format!("mounted at {}", staging.display())), "{told}");
    assert!(cookies.exists() && own.join("run/owner").exists(), "a refusal removed something");

    // The mount's user gives up; the device goes with it.
    cluster.unmount_all();
    let deadline = Instant::now() + Duration::from_secs(15);
    let told = loop {
        match uninstall(&[]) {
            (true, told) => break told,
            (false, told) => assert!(Instant::now() < deadline, "{told}"),
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    assert!(told.contains("kept: the pool") && told.contains(&volume_id), "{told}");
    assert_eq!(pool(), before, "the pool was touched");
    for gone in [own.join("data.sock"), own.join("run"), cookies.clone()] {
        assert!(!gone.exists(), "{} is left", gone.display());
    }
    let (done, told) = uninstall(&[]);
    assert!(done && told.contains("nothing of ours"), "{told}");
}

#[tokio::test(flavor = "multi_thread")]
async fn staging_again_repairs_what_a_killed_data_process_left_dead() {
    if !is_root() {
        return;
    }
    let mut cluster = Cluster::start().await;
    let capability = mk_mount("ext4");
    let volume_id = cluster.create("repaired", &capability).await;
    let context = cluster.publish(&volume_id, "node-a", &capability).await;
    cluster.stage(&volume_id, &context, &capability).await.unwrap();
    let target = cluster.publish_at(&volume_id, "one", &capability, false).await.unwrap();
    fs::write(target.join("file"), b"kept").unwrap();
    fs::File::open(target.join("file")).unwrap().sync_all().unwrap();

    cluster.restart_data_by_kill("node-a").await;
    let stale = cluster.publish_at(&volume_id, "two", &capability, false).await.unwrap_err();
    assert_eq!(stale.code(), Code::FailedPrecondition, "{stale}");
    cluster.unpublish_at(&volume_id, &target).await;
    cluster.stage(&volume_id, &context, &capability).await.unwrap();
    let target = cluster.publish_at(&volume_id, "one", &capability, false).await.unwrap();
    assert_eq!(fs::read(target.join("file")).unwrap(), b"kept");
    cluster.unpublish_at(&volume_id, &target).await;
    cluster.unstage(&volume_id).await.unwrap();
    cluster.unpublish(&volume_id).await;
    cluster.delete(&volume_id).await;
    cluster.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_controller_and_node_service_touches_no_io_and_loses_nothing() {
    if !is_root() {
        return;
    }
    let mut cluster = Cluster::start().await;
    let capability = mk_mount("ext4");
    let volume_id = cluster.create("steady", &capability).await;
    let context = cluster.publish(&volume_id, "node-a", &capability).await;
    cluster.stage(&volume_id, &context, &capability).await.unwrap();
    let target = cluster.publish_at(&volume_id, "one", &capability, false).await.unwrap();
    let file = fs::File::create(target.join("file")).unwrap();

    for process in cluster.others.drain(..) {
        process.kill();
    }
    for number in 0..20_u8 {
        std::io::Write::write_all(&mut &file, &[number; 4096]).unwrap();
        file.sync_all().expect("I/O needs neither of the two");
    }
    cluster.start_others().await;
    cluster.stage(&volume_id, &context, &capability).await.expect("it is staged");
    cluster.publish_at(&volume_id, "one", &capability, false).await.expect("it is published");
    assert_eq!(fs::read(target.join("file")).unwrap().len(), 20 * 4096);
    drop(file);
    cluster.unpublish_at(&volume_id, &target).await;
    cluster.unstage(&volume_id).await.unwrap();
    cluster.unpublish(&volume_id).await;
    cluster.delete(&volume_id).await;
    cluster.assert_pools_are_empty().await;
    cluster.stop();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_controller_on_one_store_is_refused_with_the_cause() {
    let dir = tempfile::tempdir().unwrap();
    let first = Process::controller(dir.path(), free_address());
    wait_until("the controller listens", || dir.path().join("csi.sock").exists());
    let status = fs::read_to_string(format!("/proc/{}/status", first.child.id())).unwrap();
    for set in ["CapEff", "CapPrm", "CapInh", "CapAmb"] {
        assert!(
            status.contains(&format!("{set}:\t0000000000000000")),
            "the controller needs no powers: {status}"
        );
    }
    let second = Command::new(env!("CARGO_BIN_EXE_holdfast-csi"))
        .args(["controller", "--insecure", "--registry-listen=127.0.0.1:0"])
        .arg(format!("--store-dir={}", dir.path().join("store").display()))
        .arg(format!("--csi-socket={}", dir.path().join("other.sock").display()))
        .output()
        .unwrap();
    assert!(!second.status.success());
    let said = String::from_utf8_lossy(&second.stderr);
    assert!(said.contains("locked by another process"), "{said}");
    assert!(!dir.path().join("other.sock").exists());
    first.terminate();
}

/// One controller and three data processes; one node service, on node-a.
struct Cluster {
    dir: TempDir,
    /// On tmpfs, as the data process demands of its cookies.
    memory: TempDir,
    registry: SocketAddr,
    data: Vec<(&'static str, Process)>,
    others: Vec<Process>,
    controller: ControllerClient<Channel>,
    node: NodeClient<Channel>,
}

impl Cluster {
    async fn start() -> Self {
        let dir = tempfile::Builder::new().prefix("holdfast-roles-").tempdir_in("/var/tmp").unwrap();
        fs::create_dir(dir.path().join("kubelet")).unwrap();
        let memory = tempfile::Builder::new().prefix("holdfast-roles-").tempdir_in("/dev/shm").unwrap();
        let registry = free_address();
        let mut others = vec![Process::controller(dir.path(), registry)];
        let data = NODES
            .iter()
            .map(|node| (*node, Process::data(dir.path(), memory.path(), node, registry)))
            .collect();
        others.push(Process::node(dir.path(), registry));
        let controller = ControllerClient::new(connect(&dir.path().join("csi.sock")).await);
        let node_channel = connect(&dir.path().join("node.sock")).await;
        let info =
            IdentityClient::new(node_channel.clone()).get_plugin_info(GetPluginInfoRequest {}).await.unwrap();
        assert_eq!(info.get_ref().name, "csi.holdfast.dev");
        Self { dir, memory, registry, data, others, controller, node: NodeClient::new(node_channel) }
    }

    /// Controller and node service anew, after they were killed.
    async fn start_others(&mut self) {
        let dir = self.dir.path();
        self.others = vec![Process::controller(dir, self.registry), Process::node(dir, self.registry)];
        self.controller = ControllerClient::new(connect(&dir.join("csi.sock")).await);
        self.node = NodeClient::new(connect(&dir.join("node.sock")).await);
        // The nodes announce themselves to the new one.
        tokio::time::sleep(Duration::from_secs(3)).await;
    }

    fn stop(mut self) {
        for (_, process) in self.data.drain(..) {
            process.terminate();
        }
        for process in self.others.drain(..) {
            process.terminate();
        }
    }

    async fn restart_data_by_kill(&mut self, node: &'static str) {
        let at = self.data.iter().position(|(name, _)| *name == node).unwrap();
        let (_, killed) = self.data.remove(at);
        killed.kill();
        self.data.push((node, Process::data(self.dir.path(), self.memory.path(), node, self.registry)));
        connect(&self.dir.path().join(node).join("data.sock")).await;
    }

    async fn create(&self, name: &str, capability: &VolumeCapability) -> String {
        let request = CreateVolumeRequest {
            name: name.to_owned(),
            capacity_range: Some(CapacityRange { required_bytes: SIZE_BYTES, limit_bytes: 0 }),
            volume_capabilities: vec![capability.clone()],
            ..CreateVolumeRequest::default()
        };
        // The nodes announce themselves in their first seconds.
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match self.controller.clone().create_volume(request.clone()).await {
                Ok(reply) => return reply.into_inner().volume.unwrap().volume_id,
                Err(status) if status.code() == Code::Unavailable && Instant::now() < deadline => {
                    tokio::time::sleep(Duration::from_millis(200)).await;
                }
                Err(status) => panic!("{status}"),
            }
        }
    }

    async fn delete(&self, volume_id: &str) {
        let request =
            DeleteVolumeRequest { volume_id: volume_id.to_owned(), ..DeleteVolumeRequest::default() };
        self.controller.clone().delete_volume(request).await.unwrap();
    }

    async fn publish(
        &self,
        volume_id: &str,
        node: &str,
        capability: &VolumeCapability,
    ) -> std::collections::HashMap<String, String> {
        let request = ControllerPublishVolumeRequest {
            volume_id: volume_id.to_owned(),
            node_id: node.to_owned(),
            volume_capability: Some(capability.clone()),
            ..ControllerPublishVolumeRequest::default()
        };
        self.controller.clone().controller_publish_volume(request).await.unwrap().into_inner().publish_context
    }

    async fn unpublish(&self, volume_id: &str) {
        let request = ControllerUnpublishVolumeRequest {
            volume_id: volume_id.to_owned(),
            ..ControllerUnpublishVolumeRequest::default()
        };
        self.controller.clone().controller_unpublish_volume(request).await.unwrap();
    }

    fn staging(&self, volume_id: &str) -> String {
        self.dir.path().join("kubelet").join(volume_id).join("staging").display().to_string()
    }

    async fn stage(
        &self,
        volume_id: &str,
        context: &std::collections::HashMap<String, String>,
        capability: &VolumeCapability,
    ) -> Result<(), tonic::Status> {
        let request = NodeStageVolumeRequest {
            volume_id: volume_id.to_owned(),
            publish_context: context.clone(),
            staging_target_path: self.staging(volume_id),
            volume_capability: Some(capability.clone()),
            ..NodeStageVolumeRequest::default()
        };
        self.node.clone().node_stage_volume(request).await.map(drop)
    }

    async fn unstage(&self, volume_id: &str) -> Result<(), tonic::Status> {
        let request = NodeUnstageVolumeRequest {
            volume_id: volume_id.to_owned(),
            staging_target_path: self.staging(volume_id),
        };
        self.node.clone().node_unstage_volume(request).await.map(drop)
    }

    async fn publish_at(
        &self,
        volume_id: &str,
        pod: &str,
        capability: &VolumeCapability,
        readonly: bool,
    ) -> Result<PathBuf, tonic::Status> {
        let target = self.dir.path().join("kubelet").join(volume_id).join("pods").join(pod);
        let request = NodePublishVolumeRequest {
            volume_id: volume_id.to_owned(),
            staging_target_path: self.staging(volume_id),
            target_path: target.display().to_string(),
            volume_capability: Some(capability.clone()),
            readonly,
            ..NodePublishVolumeRequest::default()
        };
        self.node.clone().node_publish_volume(request).await.map(|_| target)
    }

    async fn unpublish_at(&self, volume_id: &str, target: &Path) {
        let request = NodeUnpublishVolumeRequest {
            volume_id: volume_id.to_owned(),
            target_path: target.display().to_string(),
        };
        self.node.clone().node_unpublish_volume(request).await.unwrap();
    }

    async fn stats(&self, volume_id: &str, path: &Path) -> Result<Vec<VolumeUsage>, tonic::Status> {
        let request = NodeGetVolumeStatsRequest {
            volume_id: volume_id.to_owned(),
            volume_path: path.display().to_string(),
            ..NodeGetVolumeStatsRequest::default()
        };
        Ok(self.node.clone().node_get_volume_stats(request).await?.into_inner().usage)
    }

    async fn assert_pools_are_empty(&self) {
        let listed = self.controller.clone().list_volumes(ListVolumesRequest::default()).await.unwrap();
        assert!(listed.into_inner().entries.is_empty());
        for node in NODES {
            let left: Vec<_> = walk(&self.dir.path().join(node).join("pool"))
                .into_iter()
                .filter(|path| path.metadata().is_ok_and(|found| found.is_file() && found.len() > 1 << 20))
                .collect();
            assert!(left.is_empty(), "{node} keeps {left:?}");
        }
    }
}

impl Cluster {
    fn unmount_all(&self) {
        let below = self.dir.path().display().to_string();
        let table = fs::read_to_string("/proc/mounts").unwrap_or_default();
        for target in table.lines().rev().filter_map(|line| line.split(' ').nth(1)) {
            if target.starts_with(&below) {
                drop(Command::new("umount").args(["-l", target]).status());
            }
        }
    }
}

impl Drop for Cluster {
    /// Nothing stays mounted after a failed test.
    fn drop(&mut self) {
        self.unmount_all();
    }
}

/// A running role. Killed when dropped.
struct Process {
    child: Child,
}

impl Process {
    fn spawn(role: &str, arguments: impl IntoIterator<Item = String>) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_holdfast-csi"))
            .arg(role)
            .args(arguments)
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        Self { child }
    }

    fn controller(dir: &Path, registry: SocketAddr) -> Self {
        Self::spawn(
            "controller",
            [
                format!("--csi-socket={}", dir.join("csi.sock").display()),
                format!("--store-dir={}", dir.join("store").display()),
                format!("--registry-listen={registry}"),
                "--insecure".to_owned(),
            ],
        )
    }

    fn node(dir: &Path, registry: SocketAddr) -> Self {
        Self::spawn(
            "node",
            [
                format!("--node={}", NODES[0]),
                format!("--csi-socket={}", dir.join("node.sock").display()),
                format!("--data-socket={}", dir.join("node-a/data.sock").display()),
                format!("--registry={registry}"),
                format!("--kubelet-dir={}", dir.join("kubelet").display()),
                "--insecure".to_owned(),
            ],
        )
    }

    fn data(dir: &Path, memory: &Path, node: &str, registry: SocketAddr) -> Self {
        let own = dir.join(node);
        Self::spawn(
            "data",
            [
                format!("--node={node}"),
                format!("--pool-dir={}", own.join("pool").display()),
                "--pool-capacity=2Gi".to_owned(),
                "--control-listen=127.0.0.1:0".to_owned(),
                "--nbd-listen=127.0.0.1:0".to_owned(),
                format!("--registry={registry}"),
                format!("--data-socket={}", own.join("data.sock").display()),
                format!("--cookie-dir={}", memory.join(node).display()),
                format!("--run-dir={}", own.join("run").display()),
                "--insecure".to_owned(),
            ],
        )
    }

    /// SIGTERM must end it, and soon.
    fn terminate(mut self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            match self.child.try_wait().unwrap() {
                Some(status) => return assert!(status.success(), "{status}"),
                None if Instant::now() > deadline => panic!("process {pid} ignores SIGTERM"),
                None => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Ended already where the test went well.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}

async fn connect(socket: &Path) -> Channel {
    let deadline = Instant::now() + Duration::from_secs(15);
    loop {
        match Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap().connect().await {
            Ok(channel) => return channel,
            Err(error) => assert!(Instant::now() < deadline, "{}: {error}", socket.display()),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

fn wait_until(what: &str, ready: impl Fn() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(15);
    while !ready() {
        assert!(Instant::now() < deadline, "{what}: not in time");
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// One that this process alone uses: on 127.0.0.1 a connection that goes out could take the port before the listener does.
fn free_address() -> SocketAddr {
    static USED: AtomicU16 = AtomicU16::new(0);
    let [_, a, b, c] = std::process::id().to_be_bytes();
    SocketAddr::from(([127, a, b, c], 9470 + USED.fetch_add(1, Ordering::Relaxed)))
}

fn walk(dir: &Path) -> Vec<PathBuf> {
    let mut all = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            all.extend(walk(&path));
        }
        all.push(path);
    }
    all
}

fn is_root() -> bool {
    if nix::unistd::geteuid().is_root() {
        return true;
    }
    eprintln!("SKIPPED: needs root for mounts and loop devices");
    false
}

fn mk_mount(fs_type: &str) -> VolumeCapability {
    VolumeCapability {
        access_mode: Some(AccessMode { mode: Mode::SingleNodeWriter.into() }),
        access_type: Some(AccessType::Mount(MountVolume {
            fs_type: fs_type.to_owned(),
            ..MountVolume::default()
        })),
    }
}

fn mk_block() -> VolumeCapability {
    VolumeCapability { access_type: Some(AccessType::Block(BlockVolume {})), ..mk_mount("") }
}
