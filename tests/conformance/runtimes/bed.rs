//! Two nodes with agents; on the first one runs the runtime, the second one is what it must be reached from.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_tests::cgroups;
use holdfast_tests::cleanup::Logs;
use holdfast_tests::go_tools::Skip;
use holdfast_tests::images::BUSYBOX;
use holdfast_tests::netbed::{AgentNode, Attachment, NetBed};
use holdfast_tests::process::wait_until;
use holdfast_tests::work::binaries_dir;
use holdfast_tests::{Reach, traces};
use serde_json::{Value, json};

/// How long a cgroup may take to become empty.
const CGROUP_TIMEOUT: Duration = Duration::from_secs(10);
/// Where a pod's server listens.
pub const PORT: u16 = 8080;

/// The nodes.
pub struct Machine {
    pub net: NetBed,
    /// Name of the cgroup that the runtime's are below, with a slash in front.
    pub cgroup: String,
}

/// Starts the nodes, runs `body`, and checks that nothing of its pods is left on either.
pub fn run(body: impl FnOnce(&mut Machine) -> Result<()>) -> Result<()> {
    let net = NetBed::start("runtimes", 2)?;
    let mut machine = Machine { net, cgroup: format!("/holdfast-test-{}", std::process::id()) };
    let outcome = run_on(&mut machine, body);
    let ended = machine.net.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep });
    outcome.and(ended)
}

fn run_on(machine: &mut Machine, body: impl FnOnce(&mut Machine) -> Result<()>) -> Result<()> {
    let script = "mkdir -p /var/lib/cni && mount -t tmpfs tmpfs /var/lib/cni";
    machine.node().spaces.run("sh", &["-c", script]).context("libcni's cache cannot be made private")?;
    let before = machine.net.nodes.iter().map(traces::of).collect::<Result<Vec<BTreeSet<String>>>>()?;
    let outcome = body(machine);
    let cgroups = machine.remove_cgroups();
    outcome?;
    cgroups?;
    machine
        .net
        .nodes
        .iter()
        .zip(&before)
        .try_for_each(|(node, before)| traces::expect_nothing_more(node, before))
}

/// Why these programs cannot run here; none if they can.
pub fn skip_without(programs: &[&str]) -> Option<Skip> {
    let folders: Vec<PathBuf> = std::env::split_paths(&std::env::var_os("PATH").unwrap_or_default())
        .chain(["/usr/sbin".into()])
        .collect();
    let is_there = |program: &str| folders.iter().any(|folder| folder.join(program).is_file());
    if let Some(missing) = programs.iter().find(|program| !is_there(program)) {
        return Some(Skip(format!(
            "there is no {missing}: install Debian's packages containerd, runc, podman"
        )));
    }
    if !Path::new("/usr/lib/cni/loopback").is_file() {
        return Some(Skip("there is no plugin loopback: install containernetworking-plugins".to_owned()));
    }
    if !Path::new(BUSYBOX).is_file() {
        return Some(Skip(format!("there is no {BUSYBOX} to make an image of: install busybox-static")));
    }
    cgroups::mounts().is_empty().then(|| Skip("no cgroups are mounted, and runc needs them".to_owned()))
}

impl Machine {
    /// The node that the runtime runs on.
    pub fn node(&self) -> &AgentNode {
        &self.net.nodes[0]
    }

    /// A folder of this run, made if absent.
    pub fn folder(&self, name: &str) -> Result<PathBuf> {
        self.net.work().folder(name)
    }

    /// A folder with our plugin and with `loopback`, which containerd executes for every sandbox.
    pub fn plugin_folder(&self) -> Result<String> {
        let folder = self.folder("plugins")?;
        for plugin in [binaries_dir()?.join("holdfast-cni"), PathBuf::from("/usr/lib/cni/loopback")] {
            let link = folder.join(plugin.file_name().unwrap_or_default());
            if !link.exists() {
                std::os::unix::fs::symlink(&plugin, link)?;
            }
        }
        Ok(folder.display().to_string())
    }

    /// Writes the network configuration list of our network, in a folder of its own; `more` follows our plugin.
    pub fn write_conflist(&self, folder: &str, version: &str, more: &[Value]) -> Result<PathBuf> {
        let mut ours = self.node().network_config();
        let name = ours["name"].take();
        if let Some(ours) = ours.as_object_mut() {
            // A list's plugins get both from the list.
            ours.remove("name");
            ours.remove("cniVersion");
            // In a chain these are for the partners.
            if more.is_empty() {
                ours.insert("capabilities".to_owned(), json!({ "portMappings": true, "bandwidth": true }));
            }
        }
        let plugins: Vec<&Value> = std::iter::once(&ours).chain(more).collect();
        let list = json!({ "cniVersion": version, "name": name, "plugins": plugins });
        let folder = self.folder(folder)?;
        fs::write(folder.join("10-holdfast.conflist"), list.to_string())?;
        Ok(folder)
    }

    /// Writes the object of a pod `NAMESPACE/NAME`; `addresses` as far as they are known.
    pub fn put_pod(&self, pod: &str, app: &str, node: usize, addresses: &[IpAddr]) -> Result<()> {
        let (namespace, name) = pod.split_once('/').context("a pod is NAMESPACE/NAME")?;
        let mut status = json!({ "phase": "Pending" });
        if let Some(first) = addresses.first() {
            let all: Vec<Value> =
                addresses.iter().map(|address| json!({ "ip": address.to_string() })).collect();
            status = json!({ "phase": "Running", "podIP": first.to_string(), "podIPs": all });
        }
        let object = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": { "name": name, "namespace": namespace, "labels": { "app": app } },
            "spec": { "nodeName": self.net.nodes[node].name, "containers": [{ "name": "main", "image": "none" }] },
            "status": status,
        });
        self.net.objects.put_namespace(namespace)?;
        self.net.objects.put(&format!("pod-{namespace}-{name}"), &object)
    }

    /// Only pods of `from`, in whatever namespace, may connect to pods of `to` in a namespace.
    pub fn put_policy(&self, namespace: &str, to: &str, from: &str) -> Result<()> {
        let peer = json!({ "namespaceSelector": {}, "podSelector": { "matchLabels": { "app": from } } });
        let object = json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": { "name": format!("to-{to}"), "namespace": namespace },
            "spec": { "podSelector": { "matchLabels": { "app": to } }, "ingress": [{ "from": [peer] }] },
        });
        self.net.objects.put(&format!("policy-{namespace}-{to}"), &object)
    }

    /// Attaches a pod to the second node, where no runtime is.
    pub fn attach_far(&self, pod: &str, app: &str) -> Result<Attachment> {
        self.put_pod(pod, app, 1, &[])?;
        let (namespace, name) = pod.split_once('/').context("a pod is NAMESPACE/NAME")?;
        let attachment = self.net.attach(1, namespace, name)?;
        self.put_pod(pod, app, 1, &attachment.addresses)?;
        Ok(attachment)
    }

    /// The lease of a pod: (path of its namespace, addresses with IPv4 first).
    pub fn lease(&self, pod: &str) -> Result<(PathBuf, Vec<IpAddr>)> {
        let leases = traces::leases(self.node())?;
        let named = |lease: &&Value| {
            let word = |key: &str| lease["pod"][key].as_str().unwrap_or_default().to_owned();
            format!("{}/{}", word("namespace"), word("name")) == pod
        };
        let lease = leases.iter().find(named).with_context(|| format!("{pod} has no lease: {leases:?}"))?;
        let mut addresses: Vec<IpAddr> = serde_json::from_value(lease["plan"]["addresses"].clone())?;
        addresses.sort_by_key(IpAddr::is_ipv6);
        let netns = lease["netns"].as_str().context("the lease has no namespace")?;
        // Seen from the host a link to /run would lead to the host's.
        Ok((PathBuf::from(netns.strip_prefix("/var").unwrap_or(netns)), addresses))
    }

    /// Tries connections from a network namespace of a node and compares them with what they should be.
    pub fn expect(
        &self,
        node: usize,
        netns: &Path,
        what: &str,
        targets: &[IpAddr],
        reach: Reach,
    ) -> Result<()> {
        let targets: Vec<SocketAddr> =
            targets.iter().map(|address| SocketAddr::new(*address, PORT)).collect();
        let found = holdfast_tests::probe(&self.net.nodes[node].spaces, netns, &targets)?;
        ensure!(found.iter().all(|found| *found == reach), "{what}: {found:?}, not {reach:?} at {targets:?}");
        Ok(())
    }

    /// Makes the host's cgroups visible in the first node: runtimes put containers into them.
    pub fn mount_cgroups(&self) -> Result<()> {
        let script = cgroups::mount_script(&cgroups::mounts());
        self.node().spaces.run("sh", &["-c", &script]).map(drop)
    }

    /// What is below our cgroup is a trace like any other, except for the empty folders that runtimes leave.
    fn remove_cgroups(&self) -> Result<()> {
        let name = self.cgroup.trim_start_matches('/');
        let script = format!(
            "find /sys/fs/cgroup -depth -type d -path '*/{name}*' -exec rmdir {{}} + 2>&1; \
             ! find /sys/fs/cgroup -type d -name '{name}' | grep ."
        );
        // The last process in it may be about to end.
        wait_until(CGROUP_TIMEOUT, || self.node().spaces.run("sh", &["-c", &script]).map(|_| true))
            .context("a cgroup cannot be removed")
    }
}

/// Makes the file tree of an image.
pub fn mk_image_tree(folder: &Path) -> Result<()> {
    fs::create_dir_all(folder.join("bin"))?;
    fs::create_dir_all(folder.join("etc"))?;
    fs::copy(BUSYBOX, folder.join("bin/busybox")).context("cannot copy busybox")?;
    Ok(())
}

/// What a container runs: a server on both families.
pub fn server_command() -> Vec<String> {
    let port = format!("[::]:{PORT}");
    ["/bin/busybox", "httpd", "-f", "-p", &port, "-h", "/etc"].map(str::to_owned).to_vec()
}
