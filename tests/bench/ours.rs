//! Ours: a controller and three data processes that speak TCP on loopback, one volume with three replicas.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_proto::csi;
use holdfast_proto::storage::{AttachRequest, DetachRequest};
use holdfast_tests::csi::{Socket, block_capability, create_request, named};
use holdfast_tests::work::binaries_dir;
use holdfast_tests::{Authority, Program};

use crate::fio::Access;
use crate::place::{Place, wait_until};

const NODES: [&str; 3] = ["bench-a", "bench-b", "bench-c"];
const CONTROLLER: &str = "holdfast-controller";
/// How long the nodes may take to be announced.
const ANNOUNCED_TIMEOUT: Duration = Duration::from_secs(30);

/// Whether connections between the processes are encrypted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tls {
    Off,
    On,
}

/// The processes and their one volume, attached.
pub struct Ours {
    /// The target's NBD server for local clients.
    pub nbd: Access,
    /// The target's FUSE file under a loop device.
    pub block: Access,
    volume_id: String,
    data: Socket,
    _programs: Vec<Program>,
}

impl Ours {
    /// Starts everything and attaches a volume.
    pub fn start(place: &Place, runtime: &tokio::runtime::Runtime, tls: Tls, size_mib: u64) -> Result<Self> {
        let layout = Layout::new(place, tls)?;
        let mut programs = layout.start_all(place, size_mib)?;
        let socket = |path: &Path| Socket::new(runtime.handle().clone(), place.host_path(path));
        let controller = socket(&layout.controller_socket());
        let (volume_id, attachment) = make_volume(place, &controller, size_mib)?;
        let data = socket(&layout.data_socket(NODES[0]));
        let request = AttachRequest { volume_id: volume_id.clone(), attachment };
        let attached =
            data.data(|mut client| async move { client.attach(request).await }).map_err(|status| {
                anyhow::anyhow!(
                    "Attach: {:?}: {}\n{}",
                    status.code(),
                    status.message(),
                    programs[1].log_tail()
                )
            })?;
        let nbd_socket = layout.nbd_dir(NODES[0]).join(format!("{volume_id}.sock"));
        place.wait_for(&mut programs[1], &nbd_socket)?;
        let nbd = Access::Nbd(format!("nbd+unix:///{volume_id}?socket={}", nbd_socket.display()));
        Ok(Self { nbd, block: Access::Block(attached.device), volume_id, data, _programs: programs })
    }

    /// Detaches the volume: everything of it is flushed and its block device vanishes.
    pub fn detach(&self) -> Result<()> {
        let request = DetachRequest { volume_id: self.volume_id.clone() };
        let detached = self.data.data(|mut client| async move { client.detach(request).await });
        named("Detach", detached).map(drop)
    }
}

/// Creates the volume, waits for the nodes it needs, and publishes it to the first.
fn make_volume(place: &Place, controller: &Socket, size_mib: u64) -> Result<(String, u64)> {
    let bytes = i64::try_from(size_mib << 20).context("the size is too large")?;
    wait_until(ANNOUNCED_TIMEOUT, || {
        let parameters = [("replicas".to_owned(), "3".to_owned())].into();
        let request = csi::GetCapacityRequest { parameters, ..Default::default() };
        let told = controller.controller(|mut client| async move { client.get_capacity(request).await });
        Ok(told.is_ok_and(|reply| reply.available_capacity >= bytes))
    })
    .context("the nodes are not announced to the controller")?;
    let mut request = create_request("bench", bytes, 3, "ext4");
    request.volume_capabilities = vec![block_capability()];
    let created = controller.controller(|mut client| async move { client.create_volume(request).await });
    let volume_id =
        named("CreateVolume", created)?.volume.context("CreateVolume answered no volume")?.volume_id;
    place.work.change_state(|state| state.volume_ids.push(volume_id.clone()))?;
    let request = csi::ControllerPublishVolumeRequest {
        volume_id: volume_id.clone(),
        node_id: NODES[0].to_owned(),
        volume_capability: Some(block_capability()),
        ..Default::default()
    };
    let published =
        controller.controller(|mut client| async move { client.controller_publish_volume(request).await });
    let context = named("ControllerPublishVolume", published)?.publish_context;
    let attachment = context.get("attachment").context("the publish context names no attachment")?;
    Ok((volume_id, attachment.parse().context("the attachment is no number")?))
}

/// Folders, sockets and ports of one set of processes; the set with TLS has its own.
struct Layout {
    dir: PathBuf,
    name: &'static str,
    first_port: u16,
    tls: Tls,
}

impl Layout {
    fn new(place: &Place, tls: Tls) -> Result<Self> {
        let (name, first_port) = match tls {
            Tls::Off => ("ours", 9470),
            Tls::On => ("ours-tls", 9480),
        };
        Ok(Self { dir: place.work.folder(name)?, name, first_port, tls })
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

    fn start_all(&self, place: &Place, size_mib: u64) -> Result<Vec<Program>> {
        let authority = Authority::new(self.name)?;
        let binary = binaries_dir()?.join("holdfast-csi");
        let registry = format!("127.0.0.1:{}", self.first_port);
        let mut arguments = vec![
            "controller".to_owned(),
            format!("--csi-socket={}", self.controller_socket().display()),
            format!("--store-dir={}", self.dir.join("records").display()),
            format!("--registry-listen={registry}"),
        ];
        arguments.push(self.tls_argument(&authority, CONTROLLER)?);
        let mut controller = place.start(&format!("{}-controller", self.name), &binary, arguments)?;
        place.wait_for(&mut controller, &self.controller_socket())?;
        let mut programs = vec![controller];
        for (node, port) in NODES.into_iter().zip((self.first_port + 1..).step_by(2)) {
            let mut arguments = vec![
                "data".to_owned(),
                format!("--node={node}"),
                format!("--pool-dir={}", self.dir.join(format!("{node}-pool")).display()),
                format!("--pool-capacity={}", (size_mib + 1024) << 20),
                format!("--control-listen=127.0.0.1:{port}"),
                format!("--nbd-listen=127.0.0.1:{}", port + 1),
                "--advertise-ip=127.0.0.1".to_owned(),
                format!("--data-socket={}", self.data_socket(node).display()),
                format!("--cookie-dir=/run/{}-{node}/cookies", self.name),
                format!("--run-dir=/run/{}-{node}/front-end", self.name),
                format!("--nbd-client-dir={}", self.nbd_dir(node).display()),
                format!("--registry={registry}"),
            ];
            arguments.push(self.tls_argument(&authority, node)?);
            let mut program = place.start(&format!("{}-{node}", self.name), &binary, arguments)?;
            place.wait_for(&mut program, &self.data_socket(node))?;
            programs.push(program);
        }
        Ok(programs)
    }

    fn tls_argument(&self, authority: &Authority, name: &str) -> Result<String> {
        match self.tls {
            Tls::Off => Ok("--insecure".to_owned()),
            Tls::On => {
                let dir = self.dir.join("tls").join(name);
                authority.issue(name, &dir)?;
                Ok(format!("--tls-dir={}", dir.display()))
            }
        }
    }
}
