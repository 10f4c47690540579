//! One node: its namespaces and its three processes.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::certs::Authority;
use crate::cluster::{
    CSI_SOCKET, ClusterOptions, DATA_SOCKET, KUBELET_DIR, NETD_SOCKET, REGISTRY_PORT, controller_address,
    plug_in, start_program, wait_for_probe, wait_for_socket,
};
use crate::csi::Socket;
use crate::forgetful::Disks;
use crate::namespaces::Namespaces;
use crate::objects::Objects;
use crate::process::Program;
use crate::work::Work;

/// Port of the control services on each node.
const CONTROL_PORT: u16 = 9471;
/// Port of NBD on each node.
const NBD_PORT: u16 = 9472;

/// Folder of a node in which its disk is mounted, where it has one of its own.
const DISK_FOLDER: &str = "disk";

/// One node.
pub struct Node {
    /// Its name.
    pub name: String,
    /// Its address on the underlay.
    pub address: Ipv4Addr,
    /// Its range of pod addresses.
    pub pod_cidr: String,
    /// Its namespaces.
    pub spaces: Namespaces,
    /// `holdfast-csi data`.
    pub data: Program,
    /// `holdfast-csi node`.
    pub csi: Program,
    /// `holdfast-netd`.
    pub netd: Program,
    /// Its folder on the host.
    dir: PathBuf,
    /// Socket of the data process.
    pub data_socket: Socket,
    /// Socket of the CSI node service.
    pub csi_socket: Socket,
}

impl Node {
    /// Folder of its pool on the host; empty where the node has a disk of its own, which only the node sees.
    #[must_use]
    pub fn pool_dir(&self) -> PathBuf {
        pool_dir(&self.dir)
    }

    /// Waits until every process of a node that was just started answers.
    ///
    /// # Errors
    /// One ended, or does not answer.
    pub fn wait_for_all(&mut self) -> Result<()> {
        self.wait_for_data()?;
        self.wait_for_csi()?;
        self.wait_for_netd()
    }

    /// Waits until the data process answers again, after a restart.
    ///
    /// # Errors
    /// It ended, or does not answer.
    pub fn wait_for_data(&mut self) -> Result<()> {
        let path = self.spaces.host_path(DATA_SOCKET);
        wait_for_socket(&mut self.data, &path)
    }

    /// Waits until the CSI node process answers again.
    ///
    /// # Errors
    /// It ended, or does not answer.
    pub fn wait_for_csi(&mut self) -> Result<()> {
        wait_for_probe(&mut self.csi, &self.csi_socket)
    }

    /// Waits until the network agent answers again.
    ///
    /// # Errors
    /// It ended, or does not answer.
    pub fn wait_for_netd(&mut self) -> Result<()> {
        let path = self.spaces.host_path(NETD_SOCKET);
        wait_for_socket(&mut self.netd, &path)
    }
}

/// Makes nodes and brings dead ones back.
pub(crate) struct NodeBuilder<'a> {
    pub(crate) work: &'a Work,
    pub(crate) underlay: &'a Namespaces,
    pub(crate) objects: &'a Objects,
    pub(crate) options: &'a ClusterOptions,
    pub(crate) disks: Option<&'a Disks>,
}

impl NodeBuilder<'_> {
    /// Starts a node; one that was started before in this run finds its disk, not its memory.
    pub(crate) fn start(
        &self,
        index: u8,
        name: &str,
        authority: &Authority,
        runtime: &tokio::runtime::Runtime,
    ) -> Result<Node> {
        let address = Ipv4Addr::new(192, 168, 77, 10 + index);
        let pod_cidr = format!("10.244.{index}.0/{}", self.options.pod_prefix);
        let spaces = Namespaces::create(name, self.work)?;
        plug_in(self.underlay, &spaces, address)?;
        spaces.run("mkdir", &["-p", KUBELET_DIR])?;
        self.objects.put_node(name, address, &pod_cidr)?;
        let tls = self.work.dir().join("tls").join(name);
        if !tls.exists() {
            authority.issue(name, &tls)?;
        }
        let dir = self.work.folder(name)?;
        if let Some(disks) = self.disks {
            disks.mount(&spaces, &dir.join(DISK_FOLDER))?;
        }
        let data =
            self.start_role(&spaces, name, "data", data_arguments(name, address, &dir, &tls, self.options))?;
        let csi = self.start_role(&spaces, name, "csi", node_arguments(name, &tls, self.options))?;
        let arguments = netd_arguments(name, &dir, self.objects);
        let netd =
            start_program(self.work, &spaces, &format!("{name}-netd"), "holdfast-netd", arguments, None)?;
        let socket = |path: &str| Socket::new(runtime.handle().clone(), spaces.host_path(path));
        let (data_socket, csi_socket) = (socket(DATA_SOCKET), socket(CSI_SOCKET));
        Ok(Node {
            name: name.to_owned(),
            address,
            pod_cidr,
            spaces,
            data,
            csi,
            netd,
            dir,
            data_socket,
            csi_socket,
        })
    }

    fn start_role(
        &self,
        spaces: &Namespaces,
        node: &str,
        role: &str,
        arguments: Vec<String>,
    ) -> Result<Program> {
        let (process, records) = (format!("{node}-{role}"), self.options.kubernetes.as_ref());
        start_program(self.work, spaces, &process, "holdfast-csi", arguments, records)
    }
}

fn pool_dir(node_dir: &Path) -> PathBuf {
    node_dir.join(DISK_FOLDER).join("pool")
}

fn data_arguments(
    name: &str,
    address: Ipv4Addr,
    dir: &Path,
    tls: &Path,
    options: &ClusterOptions,
) -> Vec<String> {
    let mut arguments = vec![
        "data".to_owned(),
        format!("--node={name}"),
        format!("--pool-dir={}", pool_dir(dir).display()),
        format!("--pool-capacity={}", options.pool_bytes),
        "--cookie-dir=/run/holdfast/cookies".to_owned(),
        format!("--control-listen={address}:{CONTROL_PORT}"),
        format!("--nbd-listen={address}:{NBD_PORT}"),
        format!("--data-socket={DATA_SOCKET}"),
        "--run-dir=/run/holdfast/front-ends".to_owned(),
        format!("--registry={}:{REGISTRY_PORT}", controller_address()),
        format!("--tls-dir={}", tls.display()),
    ];
    arguments.extend(place_arguments(name, options));
    arguments
}

/// What a node's two processes say of it.
fn place_arguments(name: &str, options: &ClusterOptions) -> Vec<String> {
    let limit = options.volumes_max.map(|most| format!("--volumes-max={most}"));
    std::iter::once(format!("--zone=zone-of-{name}")).chain(limit).collect()
}

fn node_arguments(name: &str, tls: &std::path::Path, options: &ClusterOptions) -> Vec<String> {
    let mut arguments = vec![
        "node".to_owned(),
        format!("--node={name}"),
        format!("--csi-socket={CSI_SOCKET}"),
        format!("--data-socket={DATA_SOCKET}"),
        format!("--kubelet-dir={KUBELET_DIR}"),
        format!("--registry={}:{REGISTRY_PORT}", controller_address()),
        format!("--tls-dir={}", tls.display()),
    ];
    arguments.extend(place_arguments(name, options));
    arguments
}

pub(crate) fn netd_arguments(name: &str, dir: &Path, objects: &Objects) -> Vec<String> {
    let mut arguments = vec![format!("--objects={}", objects.dir().display())];
    arguments.extend(netd_places(name, dir));
    arguments
}

/// What an agent is told but for the source of objects.
pub(crate) fn netd_places(name: &str, dir: &Path) -> Vec<String> {
    vec![
        format!("--node={name}"),
        format!("--state-dir={}", dir.join("netd").display()),
        format!("--pending-dir={}", dir.join("netd/pending").display()),
        format!("--socket={NETD_SOCKET}"),
    ]
}
