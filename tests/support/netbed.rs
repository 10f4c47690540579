//! Nodes with nothing but their network agents, and pods attached by the real plugin: what policy tests need.
//!
//! Two families throughout: every node has an IPv4 and an IPv6 address and range. The objects are the caller's to write:
//! a pod's object must be in the folder before [`NetBed::attach`], as under a real runtime.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::cleanup::{self, Guard, Logs};
use crate::cluster::{NETD_SOCKET, plug_in, start_program, wait_for_socket};
use crate::cni::{self, Call};
use crate::kubernetes_records::{API_URL, KubernetesRecords};
use crate::namespaces::Namespaces;
use crate::node::{netd_arguments, netd_places};
use crate::objects::Objects;
use crate::process::{Program, run, wait_until};
use crate::work::Work;

/// How long an agent may take until pods can be attached.
const READY_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(20);

/// Agents on an underlay of their own; ending it ends everything it made.
pub struct NetBed {
    /// The nodes.
    pub nodes: Vec<AgentNode>,
    /// The folder that the agents watch.
    pub objects: Objects,
    work: Work,
    underlay: Namespaces,
    /// Of every agent, beside those that say where things are.
    netd_settings: Vec<String>,
    /// The API server that the agents watch in place of the folder, with their way to it.
    api: Option<ApiAccess>,
    guard: Option<Guard>,
}

/// How agents get to an API server that runs on the host.
pub struct ApiAccess {
    /// Where it listens.
    pub server: std::net::SocketAddr,
    /// A kubeconfig that leads to [`ApiAccess::URL`] for each agent, by its node's name.
    pub kubeconfigs: std::collections::BTreeMap<String, PathBuf>,
    /// Passes connections on.
    pub runtime: tokio::runtime::Runtime,
}

impl ApiAccess {
    /// Where the agents reach it.
    pub const URL: &'static str = API_URL;
}

/// A node with its agent.
pub struct AgentNode {
    /// Its name.
    pub name: String,
    /// Its addresses on the underlay, IPv4 first.
    pub addresses: [IpAddr; 2],
    /// Its namespaces.
    pub spaces: Namespaces,
    /// `holdfast-netd`.
    pub netd: Program,
    pending_dir: String,
}

/// A pod's attachment.
pub struct Attachment {
    /// Number of its node.
    pub node: usize,
    /// Its addresses, IPv4 first.
    pub addresses: [IpAddr; 2],
    /// Its network namespace as the host sees it.
    pub netns: PathBuf,
    container_id: String,
    args: String,
    result: Value,
}

impl NetBed {
    /// Starts nodes and waits until their agents can attach pods.
    ///
    /// # Errors
    /// Something does not start; what was started is ended.
    pub fn start(kind: &str, nodes: u8) -> Result<Self> {
        // Thousands of pods start and end here, and nobody believes in the old ones: the objects are changed before that.
        Self::start_with(kind, nodes, &["--address-quarantine-s=0"])
    }

    /// The same with other settings of the agents.
    ///
    /// # Errors
    /// As for [`NetBed::start`].
    pub fn start_with(kind: &str, nodes: u8, netd_settings: &[&str]) -> Result<Self> {
        Self::start_at(kind, nodes, netd_settings, None)
    }

    /// The same with agents that watch an API server. It must have their Nodes ([`NetBed::node_object`]).
    ///
    /// # Errors
    /// As for [`NetBed::start`].
    pub fn start_at(kind: &str, nodes: u8, netd_settings: &[&str], api: Option<ApiAccess>) -> Result<Self> {
        cleanup::sweep_dead_runs()?;
        let work = Work::create(kind)?;
        cleanup::set_active(Some(work.dir()));
        let guard = Guard::start(work.dir())?;
        match Self::start_in(work.clone(), nodes, netd_settings, api) {
            Ok(mut bed) => {
                bed.guard = Some(guard);
                Ok(bed)
            }
            Err(error) => {
                cleanup::sweep(work.dir(), Logs::Keep)?;
                cleanup::set_active(None);
                guard.dismiss();
                Err(error)
            }
        }
    }

    /// Where the run's files are.
    #[must_use]
    pub fn work(&self) -> &Work {
        &self.work
    }

    /// Where the nodes' cables end, each at a port `p-NODE` of one bridge.
    #[must_use]
    pub fn underlay(&self) -> &Namespaces {
        &self.underlay
    }

    /// Writes a node's object again, which a test removed.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put_node_again(&self, node: usize) -> Result<()> {
        self.put_node(&self.nodes[node].name, u8::try_from(node)?)
    }

    /// Executes ADD for a sandbox and kills the plugin after a time, unless it ended before; the runtime's DEL must follow.
    ///
    /// # Errors
    /// It cannot be executed.
    pub fn add_killed(&self, attachment: &Attachment, after: std::time::Duration) -> Result<()> {
        let netns = inside_path(&attachment.container_id).display().to_string();
        let (container_id, args) = (&attachment.container_id, &attachment.args);
        let call = Call { command: "ADD", container_id, netns: &netns, ifname: "eth0", args };
        let node = &self.nodes[attachment.node];
        cni::execute_killed(&node.spaces, &call, &node.network_config().to_string(), after).map(drop)
    }

    /// Makes a sandbox and executes ADD for a pod whose object is in the folder.
    ///
    /// # Errors
    /// The plugin's sentence, or what went wrong around it.
    pub fn attach(&self, node: usize, namespace: &str, name: &str) -> Result<Attachment> {
        let mut attachment = self.sandbox(node, namespace, name)?;
        self.add(&mut attachment)?;
        Ok(attachment)
    }

    /// Makes an empty sandbox.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn sandbox(&self, node: usize, namespace: &str, name: &str) -> Result<Attachment> {
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name}");
        self.sandbox_with(node, &format!("{namespace}-{name}"), args)
    }

    /// Makes an empty sandbox of any name, for an ADD with these `CNI_ARGS`.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn sandbox_with(&self, node: usize, container_id: &str, args: String) -> Result<Attachment> {
        let spaces = &self.nodes[node].spaces;
        let container_id = container_id.to_owned();
        spaces.run("ip", &["netns", "add", &container_id])?;
        spaces.run("ip", &["-netns", &container_id, "link", "set", "lo", "up"])?;
        Ok(Attachment {
            node,
            addresses: [IpAddr::V4(Ipv4Addr::UNSPECIFIED), IpAddr::V6(Ipv6Addr::UNSPECIFIED)],
            netns: spaces.host_path(inside_path(&container_id)),
            container_id,
            args,
            result: Value::Null,
        })
    }

    /// Executes ADD for a sandbox.
    ///
    /// # Errors
    /// The plugin's sentence.
    pub fn add(&self, attachment: &mut Attachment) -> Result<()> {
        attachment.result = self.call("ADD", attachment)?;
        attachment.addresses = both_addresses(&attachment.result)?;
        Ok(())
    }

    /// Executes DEL and removes the sandbox.
    ///
    /// # Errors
    /// The plugin's sentence, or what went wrong around it.
    pub fn detach(&self, attachment: &Attachment) -> Result<()> {
        self.delete(attachment)?;
        let spaces = &self.nodes[attachment.node].spaces;
        spaces.run("ip", &["netns", "delete", &attachment.container_id]).map(drop)
    }

    /// Executes DEL and leaves the sandbox.
    ///
    /// # Errors
    /// The plugin's sentence.
    pub fn delete(&self, attachment: &Attachment) -> Result<()> {
        self.call("DEL", attachment).map(drop)
    }

    /// Ends everything and checks that nothing is left.
    ///
    /// # Errors
    /// Something is left; the error lists it.
    pub fn end(mut self, logs: Logs) -> Result<()> {
        cleanup::leave_it_to_the_interrupt_handler();
        let swept = cleanup::sweep(self.work.dir(), logs);
        cleanup::set_active(None);
        if let Some(guard) = self.guard.take() {
            guard.dismiss();
        }
        swept
    }

    fn start_in(work: Work, nodes: u8, netd_settings: &[&str], api: Option<ApiAccess>) -> Result<Self> {
        let objects = Objects::new(work.folder("objects")?);
        let underlay = Namespaces::create("underlay", &work)?;
        for arguments in
            [["link", "add", "underlay", "type", "bridge"].as_slice(), &["link", "set", "underlay", "up"]]
        {
            run(underlay.network_command("ip").args(arguments))?;
        }
        if let Some(api) = &api {
            let (server, kubeconfigs) = (api.server, api.kubeconfigs.clone());
            let records = KubernetesRecords { server, kubeconfigs, certificate_life_s: None, signer: None };
            records.forward(&underlay, &api.runtime)?;
        }
        let netd_settings = netd_settings.iter().map(|setting| (*setting).to_owned()).collect();
        let mut bed = Self { nodes: Vec::new(), objects, work, underlay, netd_settings, api, guard: None };
        // Every agent shall find the whole list of nodes at its start.
        let names: Vec<String> =
            (0..nodes).map(|index| format!("node-{}", char::from(b'a' + index))).collect();
        for (index, name) in (0..).zip(&names) {
            bed.put_node(name, index)?;
        }
        for (index, name) in (0..).zip(&names) {
            let node = bed.start_node(name, index)?;
            bed.nodes.push(node);
        }
        bed.wait_until_ready()?;
        Ok(bed)
    }

    fn put_node(&self, name: &str, index: u8) -> Result<()> {
        self.objects.put(&format!("node-{name}"), &Self::node_object(name, index))
    }

    /// The object of a node.
    #[must_use]
    pub fn node_object(name: &str, index: u8) -> Value {
        let [v4, v6] = node_addresses(index);
        let ranges = [format!("10.244.{}.0/24", index + 1), format!("fd00:244:{}::/64", index + 1)];
        json!({
            "apiVersion": "v1", "kind": "Node",
            "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name, "kubernetes.io/os": "linux"}},
            "spec": {"podCIDR": ranges[0], "podCIDRs": ranges},
            "status": {"addresses": [
                {"type": "InternalIP", "address": v4.to_string()},
                {"type": "InternalIP", "address": v6.to_string()},
            ]},
        })
    }

    fn start_node(&self, name: &str, index: u8) -> Result<AgentNode> {
        let addresses = node_addresses(index);
        let spaces = Namespaces::create(name, &self.work)?;
        // Else the node asks for no neighbours on behalf of pods until its link-local address is known to be unique.
        spaces.run("sh", &["-c", "echo 0 > /proc/sys/net/ipv6/conf/default/dad_transmits"])?;
        let IpAddr::V4(v4) = addresses[0] else { unreachable!("the first address is IPv4") };
        plug_in(&self.underlay, &spaces, v4)?;
        let v6 = format!("{}/64", addresses[1]);
        spaces.run("ip", &["addr", "add", &v6, "dev", "eth0", "nodad"])?;
        let dir = self.work.folder(name)?;
        let mut arguments = match &self.api {
            None => netd_arguments(name, &dir, &self.objects),
            Some(api) => {
                let kubeconfig =
                    api.kubeconfigs.get(name).with_context(|| format!("no kubeconfig for {name}"))?;
                let mut arguments = netd_places(name, &dir);
                arguments.push("--object-source=kubernetes".to_owned());
                arguments.push(format!("--kubeconfig={}", kubeconfig.display()));
                arguments
            }
        };
        arguments.extend(self.netd_settings.iter().cloned());
        let netd =
            start_program(&self.work, &spaces, &format!("{name}-netd"), "holdfast-netd", arguments, None)?;
        let pending_dir = dir.join("netd/pending").display().to_string();
        Ok(AgentNode { name: name.to_owned(), addresses, spaces, netd, pending_dir })
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        for node in &mut self.nodes {
            node.wait()?;
        }
        Ok(())
    }

    /// Executes a verb and gives the plugin's answer as it is.
    ///
    /// # Errors
    /// It cannot be executed.
    pub fn answer(&self, verb: &str, attachment: &Attachment) -> Result<cni::Answer> {
        let node = &self.nodes[attachment.node];
        let mut config = node.network_config();
        if verb == "DEL" {
            config["prevResult"] = attachment.result.clone();
        }
        let netns = inside_path(&attachment.container_id).display().to_string();
        let (container_id, args) = (&attachment.container_id, &attachment.args);
        let call = Call { command: verb, container_id, netns: &netns, ifname: "eth0", args };
        cni::execute(&node.spaces, &call, &config.to_string())
    }

    fn call(&self, verb: &str, attachment: &Attachment) -> Result<Value> {
        let answer = self.answer(verb, attachment)?;
        let answer = answer.result().with_context(|| format!("{verb} of {}", attachment.container_id))?;
        if verb == "ADD" { answer.json() } else { Ok(Value::Null) }
    }
}

impl Attachment {
    /// Name of its end on the node, once ADD has succeeded.
    #[must_use]
    pub fn host_ifname(&self) -> Option<&str> {
        let names = self.result["interfaces"].as_array()?.iter().filter_map(|entry| entry["name"].as_str());
        names.into_iter().find(|name| name.starts_with("hfv"))
    }
}

impl AgentNode {
    /// The network configuration that a runtime on this node hands to the plugin.
    #[must_use]
    pub fn network_config(&self) -> Value {
        cni::network_config(NETD_SOCKET, &self.pending_dir)
    }

    /// Where the plugin leaves delete records.
    #[must_use]
    pub fn pending_dir(&self) -> &Path {
        Path::new(&self.pending_dir)
    }

    /// Waits until the agent can attach pods, after its start or a restart.
    ///
    /// # Errors
    /// It ended, or does not answer.
    pub fn wait(&mut self) -> Result<()> {
        let path = self.spaces.host_path(NETD_SOCKET);
        wait_for_socket(&mut self.netd, &path)?;
        let config = self.network_config().to_string();
        let status = Call { command: "STATUS", container_id: "", netns: "", ifname: "", args: "" };
        wait_until(READY_TIMEOUT, || {
            cni::execute(&self.spaces, &status, &config)?.result()?;
            Ok(true)
        })
        .with_context(|| format!("the agent of {} is not ready:\n{}", self.name, self.netd.log_tail()))
    }
}

fn node_addresses(index: u8) -> [IpAddr; 2] {
    let host = 11 + u16::from(index);
    [
        IpAddr::V4(Ipv4Addr::new(192, 168, 77, 11 + index)),
        IpAddr::V6(Ipv6Addr::new(0xfd00, 0x77, 0, 0, 0, 0, 0, host)),
    ]
}

fn inside_path(container_id: &str) -> PathBuf {
    Path::new("/run/netns").join(container_id)
}

/// The addresses of a result of ADD, IPv4 first.
fn both_addresses(result: &Value) -> Result<[IpAddr; 2]> {
    let mut addresses: Vec<IpAddr> = Vec::new();
    for entry in result["ips"].as_array().context("the result has no ips")? {
        let text = entry["address"].as_str().context("an entry of ips has no address")?;
        let address = text.split('/').next().unwrap_or(text);
        addresses.push(address.parse().with_context(|| format!("{text:?} is no address"))?);
    }
    addresses.sort_by_key(IpAddr::is_ipv6);
    match addresses.as_slice() {
        [v4, v6] if v4.is_ipv4() && v6.is_ipv6() => Ok([*v4, *v6]),
        other => anyhow::bail!("a pod needs one address of each family, not {other:?}"),
    }
}
