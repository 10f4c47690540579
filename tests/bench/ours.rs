//! Ours: a controller and three data processes that speak TCP on loopback, with volumes of three replicas.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_proto::csi;
use holdfast_proto::storage::{AttachRequest, DetachRequest, GetStatusReply};
use holdfast_tests::csi::{Socket, block_capability, create_request, named};
use holdfast_tests::work::binaries_dir;
use holdfast_tests::{Authority, Program};

use crate::fio::Access;
use crate::place::{Place, wait_until};

const NODES: [&str; 3] = ["bench-a", "bench-b", "bench-c"];
const CONTROLLER: &str = "holdfast-controller";
/// How long the nodes may take to be announced.
const ANNOUNCED_TIMEOUT: Duration = Duration::from_secs(30);
/// How long a replica that was away may take to be in sync again.
const IN_SYNC_TIMEOUT: Duration = Duration::from_secs(180);

/// Whether connections between the processes are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    Off,
    On,
}

/// Whether blocks have checksums, which are verified by every read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Checksums {
    Off,
    On,
}

/// One set of processes.
#[derive(Debug, Clone, Copy)]
pub struct Setup {
    /// Names its folder and its logs.
    pub name: &'static str,
    /// The first of seven ports.
    pub first_port: u16,
    pub tls: Tls,
    pub checksums: Checksums,
    pub volumes: usize,
    /// Of each volume.
    pub size_mib: u64,
}

/// The processes and their volumes, attached.
pub struct Ours {
    layout: Layout,
    controller: Socket,
    data: Vec<Socket>,
    controller_program: Program,
    programs: Vec<Program>,
    volumes: Vec<Attached>,
}

struct Attached {
    volume_id: String,
    /// Number of the node where it is attached.
    node: usize,
    device: String,
}

impl Ours {
    /// Starts everything and attaches the volumes to the first node.
    pub fn start(place: &Place, runtime: &tokio::runtime::Runtime, setup: Setup) -> Result<Self> {
        let layout = Layout { dir: place.work.folder(setup.name)?, setup };
        let (controller_program, programs) = layout.start_all(place)?;
        let socket = |path: &Path| Socket::new(runtime.handle().clone(), place.host_path(path));
        let controller = socket(&layout.controller_socket());
        let data = NODES.map(|node| socket(&layout.data_socket(node))).into();
        let mut ours = Self { layout, controller, data, controller_program, programs, volumes: Vec::new() };
        ours.wait_announced()?;
        for number in 0..setup.volumes {
            let volume_id = ours.make_volume(place, number)?;
            let device = ours.publish_and_attach(&volume_id, 0)?;
            ours.volumes.push(Attached { volume_id, node: 0, device });
        }
        let first = ours.nbd_socket(0);
        place.wait_for(&mut ours.programs[0], &first)?;
        Ok(ours)
    }

    /// The first volume's target, as an NBD server for local clients.
    pub fn nbd(&self) -> Access {
        let volume_id = &self.volumes[0].volume_id;
        Access::Nbd(format!("nbd+unix:///{volume_id}?socket={}", self.nbd_socket(0).display()))
    }

    /// The first volume's target, as a FUSE file under a loop device.
    pub fn block(&self) -> Access {
        Access::Block(self.volumes[0].device.clone())
    }

    /// Process numbers of the data processes.
    pub fn data_pids(&self) -> Vec<i32> {
        self.programs.iter().map(Program::pid).collect()
    }

    /// The data process of a node (0 to 2).
    pub fn data_program(&mut self, node: usize) -> &mut Program {
        &mut self.programs[node]
    }

    /// The node where the first volume is attached.
    pub fn writer(&self) -> usize {
        self.volumes[0].node
    }

    /// Moves the first volume to another node, whatever became of the one it is on, and gives its device there.
    pub fn move_writer(&mut self, to: usize) -> Result<String> {
        let Attached { volume_id, node, .. } = &self.volumes[0];
        let (volume_id, from) = (volume_id.clone(), *node);
        let request = csi::ControllerUnpublishVolumeRequest {
            volume_id: volume_id.clone(),
            node_id: NODES[from].to_owned(),
            ..Default::default()
        };
        let unpublished = self
            .controller
            .controller(|mut client| async move { client.controller_unpublish_volume(request).await });
        named("ControllerUnpublishVolume", unpublished)?;
        let device = self.publish_and_attach(&volume_id, to)?;
        self.volumes[0] = Attached { volume_id, node: to, device: device.clone() };
        Ok(device)
    }

    /// What the target of the first volume tells.
    pub fn status(&self) -> Result<GetStatusReply> {
        let Attached { volume_id, node, .. } = &self.volumes[0];
        named("GetStatus", self.data[*node].volume_status(volume_id))
    }

    /// Waits until all three replicas of the first volume are in sync.
    pub fn wait_in_sync(&self) -> Result<()> {
        wait_until(IN_SYNC_TIMEOUT, || {
            let replicas = self.status()?.replicas;
            Ok(replicas.len() == NODES.len() && replicas.iter().all(|replica| replica.state == "in_sync"))
        })
        .context("a replica does not come back in sync")
    }

    /// Detaches the volumes: everything of them is flushed and their block devices vanish.
    pub fn detach(&self) -> Result<()> {
        for Attached { volume_id, node, .. } in &self.volumes {
            let request = DetachRequest { volume_id: volume_id.clone() };
            let detached = self.data[*node].data(|mut client| async move { client.detach(request).await });
            named("Detach", detached)?;
        }
        Ok(())
    }

    fn nbd_socket(&self, volume: usize) -> PathBuf {
        let Attached { volume_id, node, .. } = &self.volumes[volume];
        self.layout.nbd_dir(NODES[*node]).join(format!("{volume_id}.sock"))
    }

    fn wait_announced(&mut self) -> Result<()> {
        let bytes = self.layout.volume_bytes()?;
        let program = &mut self.controller_program;
        let controller = &self.controller;
        wait_until(ANNOUNCED_TIMEOUT, || {
            anyhow::ensure!(program.is_alive(), "the controller ended:\n{}", program.log_tail());
            let parameters = [("replicas".to_owned(), NODES.len().to_string())].into();
            let request = csi::GetCapacityRequest { parameters, ..Default::default() };
            let told = controller.controller(|mut client| async move { client.get_capacity(request).await });
            Ok(told.is_ok_and(|reply| reply.available_capacity >= bytes))
        })
        .context("the nodes are not announced to the controller")
    }

    fn make_volume(&self, place: &Place, number: usize) -> Result<String> {
        let name = format!("bench-{number}");
        let mut request = create_request(&name, self.layout.volume_bytes()?, 3, "ext4");
        request.volume_capabilities = vec![block_capability()];
        let created =
            self.controller.controller(|mut client| async move { client.create_volume(request).await });
        let volume = named("CreateVolume", created)?.volume.context("CreateVolume answered no volume")?;
        place.work.change_state(|state| state.volume_ids.push(volume.volume_id.clone()))?;
        Ok(volume.volume_id)
    }

    /// Gives the block device.
    fn publish_and_attach(&self, volume_id: &str, node: usize) -> Result<String> {
        let request = csi::ControllerPublishVolumeRequest {
            volume_id: volume_id.to_owned(),
            node_id: NODES[node].to_owned(),
            volume_capability: Some(block_capability()),
            ..Default::default()
        };
        let published = self
            .controller
            .controller(|mut client| async move { client.controller_publish_volume(request).await });
        let context = named("ControllerPublishVolume", published)?.publish_context;
        let attachment = context.get("attachment").context("the publish context names no attachment")?;
        let attachment = attachment.parse().context("the attachment is no number")?;
        let request = AttachRequest { volume_id: volume_id.to_owned(), attachment, key: Vec::new() };
        let attached = self.data[node].data(|mut client| async move { client.attach(request).await });
        let log = || format!("the end of the data process's log:\n{}", self.programs[node].log_tail());
        Ok(named("Attach", attached).with_context(log)?.device)
    }
}

/// Folders, sockets and ports of one set of processes.
struct Layout {
    dir: PathBuf,
    setup: Setup,
}

impl Layout {
    fn volume_bytes(&self) -> Result<i64> {
        i64::try_from(self.setup.size_mib << 20).context("the size is too large")
    }

    fn controller_socket(&self) -> PathBuf {
        self.dir.join("controller.sock")
    }

    fn data_socket(&self, node: &str) -> PathBuf {
        self.dir.join(format!("{node}.sock"))
    }

    fn nbd_dir(&self, node: &str) -> PathBuf {
        self.dir.join(format!("{node}-nbd"))
    }

    fn start_all(&self, place: &Place) -> Result<(Program, Vec<Program>)> {
        let Setup { name, first_port, volumes, size_mib, .. } = self.setup;
        let authority = Authority::new(name)?;
        let binary = binaries_dir()?.join("holdfast-csi");
        let registry = format!("127.0.0.1:{first_port}");
        let mut arguments = vec![
            "controller".to_owned(),
            format!("--csi-socket={}", self.controller_socket().display()),
            format!("--store-dir={}", self.dir.join("records").display()),
            format!("--registry-listen={registry}"),
        ];
        arguments.push(self.tls_argument(&authority, CONTROLLER)?);
        let mut controller = place.start(&format!("{name}-controller"), &binary, arguments)?;
        place.wait_for(&mut controller, &self.controller_socket())?;
        let mut programs = Vec::new();
        for (node, port) in NODES.into_iter().zip((first_port + 1..).step_by(2)) {
            let mut arguments = vec![
                "data".to_owned(),
                format!("--node={node}"),
                format!("--pool-dir={}", self.dir.join(format!("{node}-pool")).display()),
                format!("--pool-capacity={}", (size_mib * volumes as u64 + 1024) << 20),
                format!("--control-listen=127.0.0.1:{port}"),
                format!("--nbd-listen=127.0.0.1:{}", port + 1),
                "--advertise-ip=127.0.0.1".to_owned(),
                format!("--data-socket={}", self.data_socket(node).display()),
                format!("--cookie-dir=/run/{name}-{node}/cookies"),
                format!("--run-dir=/run/{name}-{node}/front-end"),
                format!("--nbd-client-dir={}", self.nbd_dir(node).display()),
                format!("--registry={registry}"),
            ];
            arguments.push(self.tls_argument(&authority, node)?);
            if self.setup.checksums == Checksums::Off {
                arguments.push("--measure-without-checksums".to_owned());
            }
            let mut program = place.start(&format!("{name}-{node}"), &binary, arguments)?;
            place.wait_for(&mut program, &self.data_socket(node))?;
            programs.push(program);
        }
        Ok((controller, programs))
    }

    fn tls_argument(&self, authority: &Authority, name: &str) -> Result<String> {
        match self.setup.tls {
            Tls::Off => Ok("--insecure".to_owned()),
            Tls::On => {
                let dir = self.dir.join("tls").join(name);
                authority.issue(name, &dir)?;
                Ok(format!("--tls-dir={}", dir.display()))
            }
        }
    }
}
