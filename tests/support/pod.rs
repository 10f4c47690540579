//! Pods: sandboxes made as a container runtime makes them, with processes in them.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::cluster::{Cluster, NETD_SOCKET};
use crate::cni::{self, Answer, Call};
use crate::helper;
use crate::node::Node;
use crate::objects::PodObject;
use crate::process::{Program, ProgramSpec, maker};

/// Kubernetes namespace of the harness's pods.
pub const NAMESPACE: &str = "default";

/// One pod with its own network.
pub struct Pod {
    /// Its name.
    pub name: String,
    /// Its node.
    pub node: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its network namespace, a path inside the node.
    pub netns: PathBuf,
    /// The plugin's result of ADD.
    pub result: Value,
    /// The small server that every pod runs.
    pub server: Program,
    container_id: String,
}

/// What a pod is made from.
#[derive(Debug, Clone, Copy)]
pub struct PodSpec<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its label `app`.
    pub app: &'a str,
    /// Its node.
    pub node: &'a str,
}

impl Pod {
    /// Writes the pod's object, makes its sandbox, executes ADD, writes its address back and starts its server.
    ///
    /// # Errors
    /// The plugin's sentence, or what went wrong around it.
    pub fn create(cluster: &Cluster, spec: PodSpec<'_>) -> Result<Self> {
        let node = cluster.node(spec.node);
        let container_id = format!("{}-{}", spec.name, spec.node);
        let netns = make_sandbox(node, &container_id)?;
        let uid = format!("uid-{container_id}");
        let mut object = PodObject {
            namespace: NAMESPACE,
            name: spec.name,
            uid: &uid,
            app: spec.app,
            node: spec.node,
            host_ip: node.address,
            pod_ip: None,
        };
        cluster.objects.put_pod(&object)?;
        let answer = call(cluster, node, "ADD", &container_id, &netns, spec.name, None)?;
        let result = answer.result().with_context(|| format!("ADD of pod {}", spec.name))?.json()?;
        let address = first_address(&result)?;
        object.pod_ip = Some(address);
        cluster.objects.put_pod(&object)?;
        let listen = SocketAddr::new(IpAddr::V4(address), crate::probe::POD_PORT).to_string();
        let arguments = vec![helper::argument("pod"), listen];
        let name = format!("pod-{container_id}");
        let server = start_in_pod(cluster, node, &netns, &name, &helper::program()?, arguments)?;
        Ok(Self {
            name: spec.name.to_owned(),
            node: spec.node.to_owned(),
            address,
            netns,
            result,
            server,
            container_id,
        })
    }

    /// Executes another verb of the plugin for this pod.
    ///
    /// # Errors
    /// The plugin cannot be executed.
    pub fn call(&self, cluster: &Cluster, verb: &str) -> Result<Answer> {
        let previous = (verb == "CHECK" || verb == "DEL").then_some(&self.result);
        call(cluster, cluster.node(&self.node), verb, &self.container_id, &self.netns, &self.name, previous)
    }

    /// Ends the pod as a runtime does: processes, DEL, sandbox, object.
    ///
    /// # Errors
    /// The plugin's sentence, or what went wrong around it.
    pub fn delete(mut self, cluster: &Cluster) -> Result<()> {
        self.server.kill()?;
        self.call(cluster, "DEL")?.result().with_context(|| format!("DEL of pod {}", self.name))?;
        cluster.node(&self.node).spaces.run("ip", &["netns", "delete", &self.container_id])?;
        cluster.objects.remove(&format!("pod-{NAMESPACE}-{}", self.name))
    }

    /// Starts a program in the pod.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start(
        &self,
        cluster: &Cluster,
        name: &str,
        program: &Path,
        arguments: Vec<String>,
    ) -> Result<Program> {
        start_in_pod(cluster, cluster.node(&self.node), &self.netns, name, program, arguments)
    }

    /// A command that will run in the pod.
    #[must_use]
    pub fn command(&self, cluster: &Cluster, program: &Path) -> Command {
        cluster.node(&self.node).spaces.command_in(&self.netns, program)
    }
}

/// Makes an empty sandbox on a node and returns its path inside the node.
///
/// # Errors
/// It cannot be made.
pub fn make_sandbox(node: &Node, container_id: &str) -> Result<PathBuf> {
    node.spaces.run("ip", &["netns", "add", container_id])?;
    node.spaces.run("ip", &["-netns", container_id, "link", "set", "lo", "up"])?;
    Ok(Path::new("/run/netns").join(container_id))
}

fn call(
    cluster: &Cluster,
    node: &Node,
    verb: &str,
    container_id: &str,
    netns: &Path,
    pod: &str,
    previous: Option<&Value>,
) -> Result<Answer> {
    let mut config = cni::network_config(NETD_SOCKET, &pending_dir(cluster, node)?);
    if let Some(previous) = previous {
        config["prevResult"] = previous.clone();
    }
    let args = format!(
        "IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={pod};K8S_POD_INFRA_CONTAINER_ID={container_id};\
         K8S_POD_UID=uid-{container_id}"
    );
    let netns = netns.display().to_string();
    let call = Call { command: verb, container_id, netns: &netns, ifname: "eth0", args: &args };
    cni::execute(&node.spaces, &call, &config.to_string())
}

/// Where the plugin leaves delete records while the agent is down.
///
/// # Errors
/// The folder cannot be made.
pub fn pending_dir(cluster: &Cluster, node: &Node) -> Result<String> {
    Ok(cluster.work().dir().join(&node.name).join("netd/pending").display().to_string())
}

fn start_in_pod(
    cluster: &Cluster,
    node: &Node,
    netns: &Path,
    name: &str,
    program: &Path,
    arguments: Vec<String>,
) -> Result<Program> {
    let log = cluster.work().folder("logs")?.join(format!("{name}.log"));
    let command = maker(&node.spaces.command_in(netns, program), arguments);
    Program::start(ProgramSpec { name: name.to_owned(), log, command })
}

fn first_address(result: &Value) -> Result<Ipv4Addr> {
    let text = result["ips"][0]["address"].as_str().context("the result has no address")?;
    let address = text.split('/').next().unwrap_or(text);
    address.parse().with_context(|| format!("the result's address is {text:?}"))
}
