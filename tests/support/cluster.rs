//! A cluster on one machine: an underlay, a controller and nodes with their three processes each.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_proto::csi as csi_proto;

use crate::certs::Authority;
use crate::cleanup::{self, Guard, Logs};
use crate::csi::{self, Socket};
use crate::forgetful::{Cut, Disks, DisksOptions, Tear};
use crate::kubernetes_records::KubernetesRecords;
use crate::namespaces::Namespaces;
use crate::node::{Node, NodeBuilder};
use crate::objects::Objects;
use crate::process::{Program, ProgramSpec, maker, run, wait_until};
use crate::work::{Work, binaries_dir};

/// How long the processes of a new cluster may take until they answer.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Of the underlay's bridge. Without one of its own it has its least port's, which changes with each node that is plugged in: whoever
/// speaks to an address of the bridge then waits some seconds for its neighbour entry.
pub(crate) const UNDERLAY_MAC: &str = "02:00:00:00:77:01";
/// Name in the controller's certificate.
const CONTROLLER_NAME: &str = "holdfast-controller";
/// Port of the registry on the controller.
pub(crate) const REGISTRY_PORT: u16 = 9470;
/// Socket of the data process, inside a node.
pub const DATA_SOCKET: &str = "/run/holdfast/data.sock";
/// Socket of the CSI process, inside a node or the controller.
pub const CSI_SOCKET: &str = "/run/holdfast/csi.sock";
/// Socket of the network agent, inside a node.
pub const NETD_SOCKET: &str = "/run/holdfast/netd.sock";

/// Folder below which volumes are staged and published, inside a node.
pub const KUBELET_DIR: &str = "/run/kubelet";

/// What a cluster is made of.
#[derive(Debug, Clone)]
pub struct ClusterOptions {
    /// Word at the start of the work folder's name.
    pub kind: String,
    /// Names of the nodes; at most 9.
    pub nodes: Vec<String>,
    /// Bytes that each node's pool may use.
    pub pool_bytes: u64,
    /// Length of each node's pod range.
    pub pod_prefix: u8,
    /// Disks of the tests' own under the pools, whose power can be cut; none: the pools lie on the host's disk.
    pub disks: Option<DisksOptions>,
    /// Where records are kept; none: in the controller's own store.
    pub kubernetes: Option<KubernetesRecords>,
    /// Most volumes that may be attached to a node; none: no limit.
    pub volumes_max: Option<u32>,
}

impl Default for ClusterOptions {
    fn default() -> Self {
        let nodes = ["node-a", "node-b", "node-c"].map(str::to_owned).to_vec();
        Self {
            kind: "cluster".to_owned(),
            nodes,
            pool_bytes: 4 << 30,
            pod_prefix: 24,
            disks: None,
            kubernetes: None,
            volumes_max: None,
        }
    }
}

/// The whole; ending it ends everything it made.
pub struct Cluster {
    /// The controller.
    pub controller: Controller,
    /// The nodes, in the order of their names.
    pub nodes: Vec<Node>,
    /// The objects that the agents watch.
    pub objects: Objects,
    disks: Option<Disks>,
    work: Work,
    underlay: Namespaces,
    authority: Authority,
    options: ClusterOptions,
    runtime: tokio::runtime::Runtime,
    guard: Option<Guard>,
}

/// The controller in its own namespace.
pub struct Controller {
    /// Its namespaces.
    pub spaces: Namespaces,
    /// `holdfast-csi controller`.
    pub program: Program,
    /// Its CSI socket.
    pub csi: Socket,
    store: PathBuf,
    tls: PathBuf,
}

impl Cluster {
    /// Starts a cluster and waits until it can be used: all answer, all nodes are announced.
    ///
    /// # Errors
    /// Something does not start; what was started is ended.
    pub fn start(options: &ClusterOptions) -> Result<Self> {
        cleanup::sweep_dead_runs()?;
        let work = Work::create(&options.kind)?;
        cleanup::set_active(Some(work.dir()));
        let guard = Guard::start(work.dir())?;
        match Self::start_in(work.clone(), options) {
            Ok(mut cluster) => {
                cluster.guard = Some(guard);
                Ok(cluster)
            }
            Err(error) => {
                end_run(&work, Some(guard), Logs::Keep)?;
                Err(error)
            }
        }
    }

    /// Where the run's files are.
    #[must_use]
    pub fn work(&self) -> &Work {
        &self.work
    }

    /// The node with that name.
    ///
    /// # Panics
    /// There is none: a mistake of the test.
    #[must_use]
    pub fn node(&self, name: &str) -> &Node {
        self.nodes.iter().find(|node| node.name == name).expect("the cluster was made with this node")
    }

    /// The node with that name, to change it.
    ///
    /// # Panics
    /// There is none: a mistake of the test.
    pub fn node_mut(&mut self, name: &str) -> &mut Node {
        self.nodes.iter_mut().find(|node| node.name == name).expect("the cluster was made with this node")
    }

    /// Where the controller's registry listens, HOST:PORT.
    #[must_use]
    pub fn registry_address(&self) -> String {
        format!("{}:{REGISTRY_PORT}", controller_address())
    }

    /// Creates a volume and remembers it for the clean-up.
    ///
    /// # Errors
    /// The controller's status.
    pub fn create_volume(
        &self,
        name: &str,
        bytes: i64,
        replicas: u32,
        fs_type: &str,
    ) -> Result<csi_proto::Volume> {
        let request = csi::create_request(name, bytes, replicas, fs_type);
        let reply = csi::named(
            "CreateVolume",
            self.controller.csi.controller(|mut client| async move { client.create_volume(request).await }),
        )?;
        let volume = reply.volume.context("CreateVolume answered no volume")?;
        self.work.change_state(|state| state.volume_ids.push(volume.volume_id.clone()))?;
        Ok(volume)
    }

    /// Takes a node's cable out or puts it back: its link on the underlay's bridge goes down, everything on it runs on.
    ///
    /// # Errors
    /// The link cannot be changed.
    pub fn set_link(&self, node: &str, up: bool) -> Result<()> {
        set_port(&self.underlay, node, if up { "up" } else { "down" })
    }

    /// Takes a node's power away: everything in its memory is gone at once, what it wrote to its disk stays.
    ///
    /// # Errors
    /// There is no such node.
    pub fn power_off(&mut self, node: &str) -> Result<()> {
        let index =
            self.nodes.iter().position(|other| other.name == node).context("there is no such node")?;
        drop(self.nodes.remove(index));
        // The kernel takes dead namespaces apart in its own time; the cable goes now.
        let _ = run(self.underlay.network_command("ip").args(["link", "delete", &port_name(node)]));
        Ok(())
    }

    /// Cuts the power of every node and its disk at once; what was not flushed is dropped or torn, memory is gone. The
    /// controller is elsewhere and lives on.
    ///
    /// # Errors
    /// The nodes have no such disks, or something of them stays.
    pub fn cut_power_of_all(&mut self, tear: Tear) -> Result<Cut> {
        let disks = self.disks()?;
        let cut = disks.cut(tear)?;
        // Dead before their requests are let go: nobody may act on an error that a machine without power never sees.
        for node in &self.nodes {
            node.spaces.kill();
        }
        disks.fail()?;
        for node in std::mem::take(&mut self.nodes) {
            let _ = run(self.underlay.network_command("ip").args(["link", "delete", &port_name(&node.name)]));
        }
        self.disks()?.on()?;
        Ok(cut)
    }

    /// The disks under the pools.
    ///
    /// # Errors
    /// The cluster was made without.
    pub fn disks(&self) -> Result<&Disks> {
        self.disks.as_ref().context("the cluster was made without disks of its own")
    }

    /// Starts a node that was powered off, with the disk it had.
    ///
    /// # Errors
    /// Something does not start.
    pub fn power_on(&mut self, name: &str) -> Result<()> {
        let mut node = self.start_node(name)?;
        node.wait_for_all()?;
        self.nodes.push(node);
        Ok(())
    }

    /// Starts every node that was powered off.
    ///
    /// # Errors
    /// Something does not start.
    pub fn power_on_all(&mut self) -> Result<()> {
        let first_new = self.nodes.len();
        for name in self.options.nodes.clone() {
            if self.nodes.iter().all(|node| node.name != name) {
                let node = self.start_node(&name)?;
                self.nodes.push(node);
            }
        }
        self.nodes[first_new..].iter_mut().try_for_each(Node::wait_for_all)
    }

    fn start_node(&self, name: &str) -> Result<Node> {
        let mut numbered = (1u8..=9).zip(&self.options.nodes);
        let (index, _) = numbered.find(|(_, other)| *other == name).context("there is no such node")?;
        let builder = NodeBuilder {
            work: &self.work,
            underlay: &self.underlay,
            objects: &self.objects,
            options: &self.options,
            disks: self.disks.as_ref(),
        };
        builder.start(index, name, &self.authority, &self.runtime)
    }

    /// Ends everything and checks that nothing is left.
    ///
    /// # Errors
    /// Something is left; the error lists it.
    pub fn end(mut self, logs: Logs) -> Result<()> {
        end_run(&self.work, self.guard.take(), logs)
    }

    /// Lets the cluster run on after this process and tells how to look at it.
    ///
    /// # Errors
    /// A holder is gone.
    pub fn keep(mut self) -> Result<String> {
        let mut text = String::new();
        cleanup::mark_kept(self.work.dir())?;
        self.underlay.keep()?;
        self.controller.spaces.keep()?;
        let _ = writeln!(text, "controller  CSI socket {}", self.controller.csi.path().display());
        for node in &mut self.nodes {
            node.spaces.keep()?;
            let _ =
                writeln!(text, "{}      a shell: nsenter -t {} -m -u -i -n -p", node.name, node.spaces.pid());
            let _ = writeln!(text, "            CSI socket {}", node.csi_socket.path().display());
        }
        let _ = writeln!(text, "work folder {} (logs, objects, pools)", self.work.dir().display());
        let _ = write!(text, "in a node   ip -d link; nft list ruleset; losetup -l; ip netns");
        cleanup::set_active(None);
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
        // Dropping the holders' handles would end them.
        std::mem::forget(self);
        Ok(text)
    }

    fn start_in(work: Work, options: &ClusterOptions) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let authority = Authority::new(&options.kind)?;
        let objects = Objects::new(work.folder("objects")?);
        objects.put_namespace("default")?;
        let underlay = Namespaces::create("underlay", &work)?;
        let bridge = [
            ["link", "add", "underlay", "address", UNDERLAY_MAC, "type", "bridge"].as_slice(),
            ["link", "set", "underlay", "up"].as_slice(),
        ];
        for arguments in bridge {
            run(underlay.network_command("ip").args(arguments))?;
        }
        if let Some(kubernetes) = &options.kubernetes {
            kubernetes.forward(&underlay, &runtime)?;
        }
        let controller = start_controller(&work, &underlay, &authority, &runtime, options)?;
        let disks = options
            .disks
            .as_ref()
            .map(|wanted| Disks::start(&work, &options.nodes, wanted.clone()))
            .transpose()?;
        let options = options.clone();
        let nodes = Vec::new();
        let mut cluster = Self {
            controller,
            nodes,
            objects,
            disks,
            work,
            underlay,
            authority,
            options,
            runtime,
            guard: None,
        };
        for name in cluster.options.nodes.clone() {
            let node = cluster.start_node(&name)?;
            cluster.nodes.push(node);
        }
        cluster.wait_until_ready()?;
        Ok(cluster)
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        wait_for_probe(&mut self.controller.program, &self.controller.csi)?;
        self.nodes.iter_mut().try_for_each(Node::wait_for_all)?;
        wait_until(START_TIMEOUT, || Ok(self.largest_volume_bytes(self.nodes.len())? > 0))
            .context("not every node is announced to the controller")?;
        Ok(())
    }

    /// The largest volume that could be made with so many replicas; 0 with fewer nodes.
    ///
    /// # Errors
    /// The controller's status.
    pub fn largest_volume_bytes(&self, replicas: usize) -> Result<i64> {
        let parameters = std::collections::HashMap::from([("replicas".to_owned(), replicas.to_string())]);
        let request = csi_proto::GetCapacityRequest { parameters, ..Default::default() };
        let reply =
            self.controller.csi.controller(|mut client| async move { client.get_capacity(request).await });
        Ok(csi::named("GetCapacity", reply)?.available_capacity)
    }

    /// The runtime for calls without a wrapper.
    #[must_use]
    pub fn runtime(&self) -> &tokio::runtime::Runtime {
        &self.runtime
    }
}

fn end_run(work: &Work, guard: Option<Guard>, logs: Logs) -> Result<()> {
    cleanup::leave_it_to_the_interrupt_handler();
    let swept = cleanup::sweep(work.dir(), logs);
    cleanup::set_active(None);
    if let Some(guard) = guard {
        guard.dismiss();
    }
    swept
}

fn start_controller(
    work: &Work,
    underlay: &Namespaces,
    authority: &Authority,
    runtime: &tokio::runtime::Runtime,
    options: &ClusterOptions,
) -> Result<Controller> {
    let spaces = Namespaces::create("controller", work)?;
    plug_in(underlay, &spaces, controller_address())?;
    let tls = work.dir().join("tls/controller");
    authority.issue(CONTROLLER_NAME, &tls)?;
    let store = work.folder("controller")?.join("records");
    let arguments = controller_arguments(CSI_SOCKET, REGISTRY_PORT, &store, &tls);
    let records = options.kubernetes.as_ref();
    let program = start_program(work, &spaces, "controller", "holdfast-csi", arguments, records)?;
    let csi = Socket::new(runtime.handle().clone(), spaces.host_path(CSI_SOCKET));
    Ok(Controller { spaces, program, csi, store, tls })
}

fn controller_arguments(socket: &str, port: u16, store: &Path, tls: &Path) -> Vec<String> {
    vec![
        "controller".to_owned(),
        format!("--csi-socket={socket}"),
        format!("--registry-listen={}:{port}", controller_address()),
        format!("--store-dir={}", store.display()),
        format!("--tls-dir={}", tls.display()),
    ]
}

pub(crate) fn start_program(
    work: &Work,
    spaces: &Namespaces,
    name: &str,
    binary: &str,
    mut arguments: Vec<String>,
    records: Option<&KubernetesRecords>,
) -> Result<Program> {
    let log = work.folder("logs")?.join(format!("{name}.log"));
    let binary = binaries_dir()?.join(binary);
    let mut command = spaces.command(&binary);
    if let Some(records) = records {
        command = spaces.command("env");
        command.arg(format!("KUBECONFIG={}", records.kubeconfig(name)?.display())).arg(&binary);
        arguments = records.arguments(arguments);
    }
    let command = maker(&command, arguments);
    Program::start(ProgramSpec { name: name.to_owned(), log, command })
}

pub(crate) fn controller_address() -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, 10)
}

/// Sets a node's port on the underlay's bridge `up` or `down`.
pub(crate) fn set_port(underlay: &Namespaces, node: &str, state: &str) -> Result<()> {
    run(underlay.network_command("ip").args(["link", "set", &port_name(node), state])).map(drop)
}

/// Name of a node's port on the underlay's bridge.
fn port_name(node: &str) -> String {
    format!("p-{node}")
}

pub(crate) fn plug_in(underlay: &Namespaces, spaces: &Namespaces, address: Ipv4Addr) -> Result<()> {
    let port = port_name(spaces.name());
    let pid = spaces.pid().to_string();
    let ours = [
        vec!["link", "add", &port, "type", "veth", "peer", "name", "eth0", "netns", &pid],
        vec!["link", "set", &port, "master", "underlay", "up"],
    ];
    for arguments in ours {
        run(underlay.network_command("ip").args(arguments))?;
    }
    let address = format!("{address}/24");
    spaces.run("ip", &["addr", "add", &address, "dev", "eth0"])?;
    spaces.run("ip", &["link", "set", "eth0", "up"])?;
    Ok(())
}

pub(crate) fn wait_for_probe(program: &mut Program, socket: &Socket) -> Result<()> {
    wait_for_answer(program, || {
        let request = csi_proto::ProbeRequest {};
        let reply = socket.identity(|mut client| async move { client.probe(request).await });
        Ok(csi::named("Probe", reply)?.ready.unwrap_or(true))
    })
}

pub(crate) fn wait_for_socket(program: &mut Program, path: &PathBuf) -> Result<()> {
    wait_for_answer(program, || Ok(std::os::unix::net::UnixStream::connect(path).is_ok()))
}

fn wait_for_answer(program: &mut Program, mut ask: impl FnMut() -> Result<bool>) -> Result<()> {
    let mut dead = false;
    let waited = wait_until(START_TIMEOUT, || {
        dead = !program.is_alive();
        Ok(dead || ask()?)
    });
    if dead {
        anyhow::bail!("{} ended:\n{}", program.name(), program.log_tail());
    }
    waited.with_context(|| format!("{} does not answer:\n{}", program.name(), program.log_tail()))
}

impl Controller {
    /// A command that would start a second controller on the same store.
    ///
    /// # Errors
    /// The binaries' folder is unknown.
    pub fn second_command(&self, socket: &str, port: u16) -> Result<Command> {
        let mut command = self.spaces.command(binaries_dir()?.join("holdfast-csi"));
        command.args(controller_arguments(socket, port, &self.store, &self.tls));
        Ok(command)
    }

    /// Waits until the controller answers again.
    ///
    /// # Errors
    /// It ended, or does not answer.
    pub fn wait(&mut self) -> Result<()> {
        wait_for_probe(&mut self.program, &self.csi)
    }
}
