//! A real Kubernetes on one machine: control plane, kubelets, containerd and kube-proxy, each unmodified.
//!
//! ```text
//!   network of the control plane: etcd, kube-apiserver, kube-controller-manager, kube-scheduler, and the underlay's bridge
//!    |  veth
//!    +-- node-a: net, mount, PID, UTS, IPC and cgroup namespaces; containerd, kubelet, kube-proxy; pods
//!    +-- node-b, node-c: the same
//! ```
//!
//! Whoever holds a [`KubeCluster`] uses it as people do, with `kubectl`. It ends as every run does (see [`crate::cleanup`]): with
//! its holder, also when that is killed, and nothing of it stays: processes, mounts, links, control groups, loop devices.
//!
//! What it does not do: name resolution in pods, load balancers, and devices of its own for a node (`/dev` is shared).

mod control_plane;
mod node;
mod pod_images;
mod settings;
pub mod suites;

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::Value;

pub use control_plane::{POD_RANGE, SERVICE_RANGE};
pub use node::KubeNode;
pub use pod_images::{SHELL_IMAGE, SNAPSHOT_CONTROLLER_IMAGE};

use crate::certs::Authority;
use crate::cgroups;
use crate::cleanup::{self, Guard, Logs};
use crate::cluster::set_port;
use crate::go_tools::{self, Skip};
use crate::process::{Program, ProgramSpec, maker, run_within, wait_until};
use crate::work::Work;
use control_plane::ControlPlane;

/// The longest that one kubectl may take, beside its own waiting.
const KUBECTL_TIMEOUT: Duration = Duration::from_secs(240);
/// Lines of each log that a failure's text quotes.
const QUOTED_LINES: usize = 12;

/// Names of the nodes.
pub const NODES: [&str; 3] = ["node-a", "node-b", "node-c"];

/// Programs of others that a cluster consists of; each a folder.
#[derive(Debug, Clone)]
pub struct Tools {
    /// The control plane's, kubelet, kube-proxy, kubectl.
    pub kubernetes: PathBuf,
    /// containerd, its shim and ctr.
    pub containerd: PathBuf,
    /// What runs in pods.
    pub pods: PathBuf,
}

/// The whole; ending it ends everything it made.
pub struct KubeCluster {
    nodes: Vec<KubeNode>,
    control: ControlPlane,
    tools: Tools,
    images: Vec<PathBuf>,
    authority: Authority,
    work: Work,
    guard: Option<Guard>,
    started: Instant,
}

impl Tools {
    /// Builds what is not built yet.
    ///
    /// # Errors
    /// A tool does not build although everything for it is there.
    pub fn get() -> Result<Result<Self, Skip>> {
        if let Some(missing) = missing_here() {
            return Ok(Err(Skip(missing.to_owned())));
        }
        for tool in [go_tools::etcd()?, go_tools::kube_apiserver()?] {
            if let Err(skip) = tool {
                return Ok(Err(skip));
            }
        }
        let tools = (go_tools::kubernetes()?, go_tools::containerd()?, go_tools::pod_programs()?);
        Ok(match tools {
            (Ok(kubernetes), Ok(containerd), Ok(pods)) => Ok(Self { kubernetes, containerd, pods }),
            (Err(skip), ..) | (_, Err(skip), _) | (.., Err(skip)) => Err(skip),
        })
    }
}

/// What this machine lacks for a cluster.
fn missing_here() -> Option<&'static str> {
    if cgroups::hierarchies().is_empty() {
        return Some("the harness knows control groups of version 1 only");
    }
    let overlay = fs::read_to_string("/proc/filesystems").unwrap_or_default().contains("\toverlay\n");
    if !overlay {
        return Some("the kernel has no overlay file system");
    }
    (!Path::new(crate::images::BUSYBOX).is_file()).then_some("there is no busybox: install busybox-static")
}

impl KubeCluster {
    /// Starts the control plane and the nodes, with the images in their places. Nodes become Ready once something configures
    /// their network.
    ///
    /// # Errors
    /// Something does not start; what was started is ended.
    pub fn start(tools: &Tools, more_images: Vec<PathBuf>) -> Result<Self> {
        cleanup::sweep_dead_runs()?;
        let work = Work::create("kubernetes")?;
        cleanup::set_active(Some(work.dir()));
        let guard = Guard::start(work.dir())?;
        match Self::start_in(work.clone(), tools, more_images) {
            Ok(mut cluster) => {
                cluster.guard = Some(guard);
                Ok(cluster)
            }
            Err(error) => {
                cleanup::leave_it_to_the_interrupt_handler();
                let swept = cleanup::sweep(work.dir(), Logs::Keep);
                cleanup::set_active(None);
                guard.dismiss();
                swept.context(format!("{error:#}"))?;
                Err(error)
            }
        }
    }

    fn start_in(work: Work, tools: &Tools, more_images: Vec<PathBuf>) -> Result<Self> {
        let started = Instant::now();
        let authority = Authority::new("Kubernetes")?;
        let mut images = pod_images::make(&work.folder("images")?, tools)?;
        images.extend(more_images);
        let control = ControlPlane::start(&work, tools, &authority)?;
        let mut cluster = Self {
            nodes: Vec::new(),
            control,
            tools: tools.clone(),
            images,
            authority,
            work,
            guard: None,
            started,
        };
        let nodes: Vec<&str> = NODES.to_vec();
        cluster.start_nodes(&nodes)?;
        cluster.import_images(&nodes)?;
        Ok(cluster)
    }

    /// Where the run's files are.
    #[must_use]
    pub fn work(&self) -> &Work {
        &self.work
    }

    /// How long ago the start began.
    #[must_use]
    pub fn age(&self) -> Duration {
        self.started.elapsed()
    }

    /// A node that runs.
    ///
    /// # Errors
    /// It is off, or there is none of that name.
    pub fn node(&self, name: &str) -> Result<&KubeNode> {
        self.nodes.iter().find(|node| node.name == name).with_context(|| format!("{name} does not run"))
    }

    /// A command that runs in the network of the control plane, beside the nodes.
    #[must_use]
    pub fn outside(&self, program: &str) -> Command {
        self.control.spaces.network_command(program)
    }

    /// Starts a program in the network of the control plane, until it is dropped with the cluster or ended.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_outside(&self, name: &str, program: &Path, arguments: Vec<String>) -> Result<Program> {
        let log = self.work.folder("logs")?.join(format!("{name}.log"));
        let command = maker(&self.control.spaces.command(program), arguments);
        Program::start(ProgramSpec { name: name.to_owned(), log, command })
    }

    /// Puts further images on every node.
    ///
    /// # Errors
    /// containerd refuses one.
    pub fn add_images(&self, images: &[PathBuf]) -> Result<()> {
        self.nodes.iter().try_for_each(|node| node.import(images))
    }

    /// A program that pods run, to be run outside of them.
    #[must_use]
    pub fn pod_program(&self, name: &str) -> PathBuf {
        self.tools.pods.join(name)
    }

    /// Signs the nodes' certificates.
    #[must_use]
    pub fn authority(&self) -> &Authority {
        &self.authority
    }

    /// `kubectl` of an administrator.
    ///
    /// # Errors
    /// It fails; the error has what it wrote.
    pub fn kubectl(&self, arguments: &[&str]) -> Result<String> {
        run_within(KUBECTL_TIMEOUT, &mut self.kubectl_command(arguments)?)
    }

    /// A command for an administrator's shell, which finds `kubectl` and its configuration as people's shells do.
    ///
    /// # Errors
    /// The configuration cannot be written.
    pub fn shell(&self, script: &str, folder: &Path) -> Result<Command> {
        let mut path = self.tools.kubernetes.clone().into_os_string();
        path.push(":");
        path.push(std::env::var_os("PATH").unwrap_or_default());
        let mut command = self.outside("bash");
        command.args(["-euo", "pipefail", "-c", script]).current_dir(folder);
        command
            .env("PATH", path)
            .env("HOME", self.work.dir())
            .env("KUBECONFIG", self.control.admin_kubeconfig()?);
        Ok(command)
    }

    /// What `kubectl get ... -o json` shows.
    ///
    /// # Errors
    /// It fails.
    pub fn get(&self, arguments: &[&str]) -> Result<Value> {
        let text = self.kubectl(&[&["get", "-o", "json"], arguments].concat())?;
        Ok(serde_json::from_str(&text)?)
    }

    /// `kubectl apply` of YAML.
    ///
    /// # Errors
    /// It fails.
    pub fn apply(&self, yaml: &str) -> Result<String> {
        let file = self.work.folder("applied")?.join(format!("{:08x}.yaml", crc32c::crc32c(yaml.as_bytes())));
        fs::File::create(&file)?.write_all(yaml.as_bytes())?;
        self.kubectl(&["apply", "-f", &file.display().to_string()])
    }

    /// Runs a command in a pod, such as `shop/web-0`, and answers its output.
    ///
    /// # Errors
    /// It fails.
    pub fn exec(&self, pod: &str, command: &[&str]) -> Result<String> {
        let (namespace, name) = pod.split_once('/').context("a pod is NAMESPACE/NAME")?;
        self.kubectl(&[&["exec", "-n", namespace, name, "--"], command].concat())
    }

    /// Waits until `ask` says yes; else the error tells the state of the cluster.
    ///
    /// # Errors
    /// Not in time.
    pub fn wait(&self, what: &str, timeout: Duration, ask: impl FnMut() -> Result<bool>) -> Result<()> {
        let mut ask = ask;
        let paced = || {
            let answer = ask();
            if !matches!(answer, Ok(true)) {
                // A kubectl costs more than what it asks for.
                std::thread::sleep(Duration::from_millis(200));
            }
            answer
        };
        wait_until(timeout, paced)
            .with_context(|| format!("{what}, {:.0} s after the start", self.age().as_secs_f64()))
    }

    /// Takes a node's cable out or puts it back; everything on it runs on.
    ///
    /// # Errors
    /// The link cannot be changed.
    pub fn set_link(&self, node: &str, up: bool) -> Result<()> {
        set_port(&self.control.spaces, node, if up { "up" } else { "down" })
    }

    /// Takes a node's power away: everything in its memory is gone at once, what it wrote to its disk stays.
    ///
    /// # Errors
    /// It does not run.
    pub fn power_off(&mut self, name: &str) -> Result<()> {
        let index = self.nodes.iter().position(|node| node.name == name).context("it does not run")?;
        drop(self.nodes.remove(index));
        // The kernel takes dead namespaces apart in its own time; the cable goes now.
        let _ = crate::process::run(self.outside("ip").args(["link", "delete", &format!("p-{name}")]));
        Ok(())
    }

    /// Starts a node that was powered off, with the disk it had.
    ///
    /// # Errors
    /// It does not start.
    pub fn power_on(&mut self, name: &str) -> Result<()> {
        self.start_nodes(&[name])
    }

    /// `kill -9` of a program of a node (`containerd`, `kubelet`, `kube-proxy`) and its start; without a node, of a part of the
    /// control plane.
    ///
    /// # Errors
    /// There is no such program, or it does not end or start.
    pub fn restart(&mut self, node: Option<&str>, program: &str) -> Result<()> {
        let Some(name) = node else { return self.control.restart(program, &self.work) };
        let node = self.nodes.iter_mut().find(|node| node.name == name);
        let program = node.with_context(|| format!("{name} does not run"))?.program(program)?;
        program.kill()?;
        program.start_again()
    }

    /// Ends everything and checks that nothing is left.
    ///
    /// # Errors
    /// Something is left; the error lists it.
    pub fn end(mut self, logs: Logs) -> Result<Duration> {
        let start = Instant::now();
        cleanup::leave_it_to_the_interrupt_handler();
        self.remember_volumes()?;
        let swept = cleanup::sweep(self.work.dir(), logs);
        cleanup::set_active(None);
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
        swept.map(|()| start.elapsed())
    }

    /// The state of nodes and pods, warnings, and the ends of the logs: for a failure's text.
    #[must_use]
    pub fn story(&self) -> String {
        let mut text = String::new();
        let shown: [&[&str]; 4] = [
            &["get", "nodes", "-o", "wide"],
            &["get", "pods", "-A", "-o", "wide"],
            &["get", "pvc,pv,volumeattachments", "-A"],
            &["get", "events", "-A", "--field-selector=type=Warning", "--sort-by=.lastTimestamp"],
        ];
        for arguments in shown {
            let answer = self.kubectl(arguments).unwrap_or_else(|error| format!("{error:#}"));
            let lines: Vec<&str> = answer.lines().collect();
            let from = lines.len().saturating_sub(40);
            let _ = writeln!(text, "--- kubectl {}\n{}", arguments.join(" "), lines[from..].join("\n"));
        }
        self.quote_pods(&mut text);
        for node in &self.nodes {
            for program in node.programs() {
                let log = program.log().unwrap_or_default();
                let errors: Vec<&str> = log.lines().filter(|line| is_error(line)).collect();
                let from = errors.len().saturating_sub(QUOTED_LINES);
                let _ = writeln!(text, "--- {}\n{}", program.name(), errors[from..].join("\n"));
            }
        }
        text
    }

    /// Logs of our own pods whose containers are not all ready.
    fn quote_pods(&self, text: &mut String) {
        let Ok(pods) = self.get(&["pods", "-n", "holdfast-system"]) else { return };
        for pod in pods["items"].as_array().into_iter().flatten() {
            let name = pod["metadata"]["name"].as_str().unwrap_or_default();
            for status in pod["status"]["containerStatuses"].as_array().into_iter().flatten() {
                if status["ready"] == true && status["restartCount"] == 0 {
                    continue;
                }
                let container = status["name"].as_str().unwrap_or_default();
                let lines = format!("--tail={QUOTED_LINES}");
                for earlier in [&["--previous"][..], &[]] {
                    let base = ["logs", "-n", "holdfast-system", name, "-c", container, &lines];
                    if let Ok(log) = self.kubectl(&[&base, earlier].concat()) {
                        let _ = writeln!(text, "--- {name} {container} {}\n{log}", earlier.join(""));
                    }
                }
            }
        }
    }

    fn kubectl_command(&self, arguments: &[&str]) -> Result<Command> {
        let mut command = self.outside(&self.tools.kubernetes.join("kubectl").display().to_string());
        command.arg("--kubeconfig").arg(self.control.admin_kubeconfig()?).args(arguments);
        // Nothing of the user's own may be read or written.
        command.env("HOME", self.work.dir()).env_remove("KUBECONFIG");
        Ok(command)
    }

    fn start_nodes(&mut self, names: &[&str]) -> Result<()> {
        for name in names {
            let index = NODES.iter().position(|node| node == name).context("there is no such node")?;
            let address = node_address(u8::try_from(index)?);
            let kubeconfigs = self.control.node_kubeconfigs(name)?;
            let builder = node::Builder { work: &self.work, tools: &self.tools, authority: &self.authority };
            let node = builder.start(name, address, &self.control.spaces, &kubeconfigs)?;
            self.nodes.push(node);
        }
        let new = self.nodes.len() - names.len();
        self.nodes[new..].iter_mut().try_for_each(KubeNode::start_kubelet)
    }

    /// Nodes are asked for at once: each unpacks into its own folder.
    fn import_images(&self, names: &[&str]) -> Result<()> {
        let outcomes: Vec<Result<()>> = std::thread::scope(|scope| {
            let nodes = names.iter().map(|name| self.node(name));
            let importing: Vec<_> =
                nodes.map(|node| scope.spawn(move || node?.import(&self.images))).collect();
            let join = |thread: std::thread::ScopedJoinHandle<'_, Result<()>>| {
                thread.join().unwrap_or_else(|_| bail!("the import panicked"))
            };
            importing.into_iter().map(join).collect()
        });
        outcomes.into_iter().collect()
    }

    /// Loop devices show the volumes by their ids, which are the names of folders in the pools.
    fn remember_volumes(&self) -> Result<()> {
        let ids = NODES.iter().flat_map(|name| node::volumes_of(&self.work, name)).collect::<Vec<_>>();
        self.work.change_state(|state| state.volume_ids.extend(ids))
    }
}

/// A node's address on the underlay.
fn node_address(index: u8) -> Ipv4Addr {
    Ipv4Addr::new(192, 168, 77, 11 + index)
}

fn is_error(line: &str) -> bool {
    line.starts_with('E')
        || line.contains("level=error")
        || line.contains("level=fatal")
        || line.contains("level=warning")
}

/// Whether a condition of an object is `True`.
#[must_use]
pub fn has_condition(object: &Value, condition: &str) -> bool {
    let conditions = object["status"]["conditions"].as_array();
    conditions.into_iter().flatten().any(|one| one["type"] == condition && one["status"] == "True")
}
