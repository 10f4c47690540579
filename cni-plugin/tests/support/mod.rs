//! Nodes and sandboxes as network namespaces, with the real binaries in them.

// Each test file uses its own part.
#![allow(dead_code)]

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use holdfast_proto::agent::agent_client::AgentClient;
use nix::sys::signal::Signal;
use serde_json::{Value, json};

/// Where an agent serves metrics, on its node's loopback.
pub const METRICS_PORT: u16 = 9480;

pub mod sockets;

static NAMES: AtomicU32 = AtomicU32::new(0);

/// Whether pods are attached without a bridge: the suites run once more as modules of `routed.rs`.
pub fn is_routed() -> bool {
    module_path!().starts_with("routed::")
}

/// The mode of this run, as the agent's option has it.
pub fn attachment() -> &'static str {
    if is_routed() { "routed" } else { "bridge" }
}

/// A network namespace that lives as long as this value.
pub struct Netns {
    pub name: String,
}

impl Netns {
    pub fn new() -> Self {
        assert!(nix::unistd::geteuid().is_root(), "these tests make network namespaces: run them as root");
        // Several copies of this module, each counting for itself, are in the program of mode `routed`.
        let number = NAMES.fetch_add(1, Ordering::Relaxed);
        let name = format!("hft{}-{}-{number}", std::process::id(), module_path!().len());
        run("ip", &["netns", "add", &name]);
        run("ip", &["-n", &name, "link", "set", "lo", "up"]);
        Self { name }
    }

    pub fn path(&self) -> String {
        format!("/run/netns/{}", self.name)
    }

    pub fn ip(&self, args: &str) -> String {
        let mut all = vec!["-n", self.name.as_str()];
        all.extend(args.split(' '));
        run("ip", &all)
    }

    pub fn exec(&self, program: &str) -> Command {
        let mut command = Command::new("ip");
        command.args(["netns", "exec", &self.name, program]);
        command
    }

    pub fn pings(&self, address: &str) -> bool {
        let mut command = self.exec("ping");
        command.args(["-c1", "-W1", address]).stdout(Stdio::null()).stderr(Stdio::null());
        command.status().unwrap().success()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).stderr(Stdio::null()).status();
    }
}

/// A folder of objects and an underlay that nodes are plugged into.
pub struct Cluster {
    pub folder: tempfile::TempDir,
    pub underlay: Netns,
}

impl Cluster {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join("objects")).unwrap();
        let underlay = Netns::new();
        underlay.ip("link add br0 type bridge");
        underlay.ip("link set br0 up");
        Self { folder, underlay }
    }

    pub fn objects(&self) -> PathBuf {
        self.folder.path().join("objects")
    }

    /// Writes an object as a runner does: whole, by rename.
    pub fn put(&self, file: &str, object: &Value) {
        let temporary = self.folder.path().join(file);
        std::fs::write(&temporary, object.to_string()).unwrap();
        std::fs::rename(&temporary, self.objects().join(format!("{file}.yaml"))).unwrap();
    }

    pub fn remove(&self, file: &str) {
        std::fs::remove_file(self.objects().join(format!("{file}.yaml"))).unwrap();
    }

    pub fn put_node(&self, name: &str, number: u8, range: &str) {
        self.put(
            &format!("node-{name}"),
            &json!({
                "apiVersion": "v1", "kind": "Node", "metadata": { "name": name }, "spec": { "podCIDR": range },
                "status": { "addresses": [{ "type": "InternalIP", "address": format!("192.0.2.{number}") }] },
            }),
        );
    }

    /// A Node object without a range.
    pub fn put_bare_node(&self, name: &str, number: u8) {
        self.put(
            &format!("node-{name}"),
            &json!({
                "apiVersion": "v1", "kind": "Node", "metadata": { "name": name },
                "status": { "addresses": [{ "type": "InternalIP", "address": format!("192.0.2.{number}") }] },
            }),
        );
    }

    pub fn put_pod(&self, name: &str, address: &str) {
        self.put(
            &format!("pod-{name}"),
            &json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": { "name": name, "namespace": "shop", "labels": { "app": name } },
                "status": { "phase": "Running", "podIP": address },
            }),
        );
    }

    /// Only pods labelled `from` may reach those labelled `to`.
    pub fn put_policy(&self, to: &str, from: &str) {
        self.put(
            &format!("policy-{to}"),
            &json!({
                "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
                "metadata": { "name": format!("to-{to}"), "namespace": "shop" },
                "spec": {
                    "podSelector": { "matchLabels": { "app": to } },
                    "ingress": [{ "from": [{ "podSelector": { "matchLabels": { "app": from } } }] }],
                },
            }),
        );
    }

    /// A host on the underlay that is no node, as 192.0.2.`number` and 2001:db8::`number`.
    pub fn outside(&self, number: u8) -> Netns {
        let netns = self.plug_in(number);
        netns.ip(&format!("addr add 192.0.2.{number}/24 dev eth0"));
        netns.ip(&format!("addr add 2001:db8::{number}/64 dev eth0 nodad"));
        netns
    }

    /// A node with its agent, on the underlay as 192.0.2.`number`. Addresses are free as soon as they are freed, and nothing is
    /// collected without being asked for.
    pub fn start_node(&self, name: &str, number: u8) -> Node {
        self.start_node_with(name, number, &["--address-quarantine-s=0", "--collect-after-s=0"])
    }

    /// The same with other settings.
    pub fn start_node_with(&self, name: &str, number: u8, settings: &'static [&'static str]) -> Node {
        self.start_in(self.outside(number), name, settings)
    }

    /// Makes the underlay a router with these addresses; it has no services.
    pub fn route_underlay(&self, addresses: &[&str]) {
        for address in addresses {
            self.underlay.ip(&format!("addr add {address} dev br0"));
        }
        let mut command = self.underlay.exec("sh");
        command.args([
            "-c",
            "echo 1 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv4/conf/br0/send_redirects; \
            echo 0 > /proc/sys/net/ipv4/conf/all/send_redirects",
        ]);
        assert!(command.status().unwrap().success());
    }

    /// The same with other addresses and routes: arguments of `ip`, executed in the node.
    pub fn start_node_on(
        &self,
        name: &str,
        number: u8,
        settings: &'static [&'static str],
        commands: &[&str],
    ) -> Node {
        let netns = self.plug_in(number);
        for command in commands {
            netns.ip(command);
        }
        self.start_in(netns, name, settings)
    }

    /// A namespace whose eth0 is on the underlay and up, without addresses.
    fn plug_in(&self, number: u8) -> Netns {
        let netns = Netns::new();
        let port = format!("p{number}");
        run(
            "ip",
            &[
                "link",
                "add",
                "eth0",
                "netns",
                &netns.name,
                "type",
                "veth",
                "peer",
                "name",
                &port,
                "netns",
                &self.underlay.name,
            ],
        );
        self.underlay.ip(&format!("link set {port} master br0 up"));
        // An interface that still looks for duplicates of its address asks for no neighbours.
        let mut sysctl = netns.exec("sh");
        sysctl.args(["-c", "echo 0 > /proc/sys/net/ipv6/conf/eth0/accept_dad"]);
        assert!(sysctl.status().unwrap().success());
        netns.ip("link set eth0 up");
        netns
    }

    fn start_in(&self, netns: Netns, name: &str, settings: &'static [&'static str]) -> Node {
        let state = self.folder.path().join(name);
        let (name, objects) = (name.to_owned(), self.objects());
        let mut node = Node { name, objects, netns, state, settings, attachment: attachment(), agent: None };
        node.start();
        node
    }
}

/// A node.
pub struct Node {
    name: String,
    objects: PathBuf,
    pub netns: Netns,
    pub state: PathBuf,
    /// Arguments of the agent from the next start on.
    pub settings: &'static [&'static str],
    /// Its mode from the next start on.
    pub attachment: &'static str,
    agent: Option<Child>,
}

impl Node {
    /// Starts the agent and waits until it serves.
    pub fn start(&mut self) {
        self.spawn();
        let deadline = Instant::now() + Duration::from_secs(20);
        while self.cni("STATUS", "", None, json!({})).is_err_and(|error| is_down(&error)) {
            assert!(Instant::now() < deadline, "the agent does not serve: {}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Starts the agent without waiting.
    pub fn spawn(&mut self) {
        std::fs::create_dir_all(&self.state).unwrap();
        let log = std::fs::File::options().create(true).append(true).open(self.state.join("log")).unwrap();
        let mut command = self.netns.exec(env!("CARGO_BIN_EXE_holdfast-netd"));
        command.args(["--node", &self.name]).arg("--objects").arg(&self.objects);
        command.arg("--state-dir").arg(self.state.join("state")).arg("--socket").arg(self.socket());
        command.arg("--pending-dir").arg(self.pending());
        command.args(self.settings).args(["--attachment", self.attachment]);
        // Each node has a loopback of its own.
        command.arg("--metrics").arg(format!("127.0.0.1:{METRICS_PORT}"));
        self.agent = Some(command.stderr(log).spawn().unwrap());
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.state.join("log")).unwrap_or_default()
    }

    pub fn socket(&self) -> PathBuf {
        self.state.join("netd.sock")
    }

    pub fn pending(&self) -> PathBuf {
        self.state.join("pending")
    }

    /// kill -9.
    pub fn kill(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            agent.kill().unwrap();
            agent.wait().unwrap();
        }
    }

    /// The agent was killed and reaped by somebody else.
    pub fn forget_agent(&mut self) {
        self.agent = None;
    }

    /// Waits for the end of an agent that was asked to end.
    pub fn wait(&mut self) -> std::process::ExitStatus {
        let mut agent = self.agent.take().unwrap();
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            if let Some(status) = agent.try_wait().unwrap() {
                return status;
            }
            if Instant::now() > deadline {
                agent.kill().unwrap();
                panic!("the agent does not end: {}", self.log());
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// kill -9 without waiting, while others use the node.
    pub fn kill_by_signal(&self) {
        self.signal(Signal::SIGKILL);
    }

    /// Does `work` while the agent stands still, so that it mends nothing meanwhile.
    pub fn paused(&self, work: impl FnOnce()) {
        self.signal(Signal::SIGSTOP);
        work();
        self.signal(Signal::SIGCONT);
    }

    fn signal(&self, signal: Signal) {
        let pid = nix::unistd::Pid::from_raw(i32::try_from(self.pid()).unwrap());
        nix::sys::signal::kill(pid, signal).unwrap();
    }

    /// `ip netns exec` becomes the agent, so the child is the agent.
    pub fn pid(&self) -> u32 {
        self.agent.as_ref().unwrap().id()
    }

    /// The agent's state.
    pub fn dump(&self) -> Value {
        let text = self.ask(async |mut client| {
            client.dump(holdfast_proto::agent::DumpRequest {}).await.unwrap().into_inner().json
        });
        serde_json::from_str(&text).unwrap()
    }

    /// Runs `calls` with a client of the agent.
    pub fn ask<T>(&self, calls: impl AsyncFnOnce(AgentClient<tonic::transport::Channel>) -> T) -> T {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let path = self.socket();
        let connector = tower::service_fn(move |_: tonic::transport::Uri| {
            let path = path.clone();
            async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
        });
        runtime.block_on(async {
            let endpoint = tonic::transport::Endpoint::from_static("http://agent");
            let client = AgentClient::new(endpoint.connect_with_connector(connector).await.unwrap());
            calls(client.max_decoding_message_size(64 << 20)).await
        })
    }

    /// Executes the plugin in the node. `extra` is merged into the configuration.
    pub fn cni(&self, command: &str, id: &str, sandbox: Option<&str>, extra: Value) -> Result<Value, Value> {
        self.cni_with(command, id, sandbox, "", extra)
    }

    /// The configuration of the network `pods`; `extra` is merged into it.
    pub fn config(&self, extra: Value) -> Value {
        let mut config = json!({
            "cniVersion": "1.1.0", "name": "pods", "type": "holdfast-cni",
            "agentSocket": self.socket(), "pendingDir": self.pending(),
        });
        config.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        config
    }

    pub fn cni_with(
        &self,
        command: &str,
        id: &str,
        sandbox: Option<&str>,
        args: &str,
        extra: Value,
    ) -> Result<Value, Value> {
        let config = self.config(extra);
        let mut variables = vec![("CNI_COMMAND", command), ("CNI_ARGS", args)];
        if !id.is_empty() {
            variables.extend([("CNI_CONTAINERID", id), ("CNI_IFNAME", "eth0")]);
        }
        if let Some(sandbox) = sandbox {
            variables.push(("CNI_NETNS", sandbox));
        }
        plugin(Some(&self.netns), &variables, &config.to_string())
    }

    /// ADD for the pod `name` of namespace shop; the container's id is the pod's name.
    pub fn add(&self, name: &str, sandbox: &Netns) -> Result<Value, Value> {
        let args = format!("IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME={name}");
        self.cni_with("ADD", name, Some(&sandbox.path()), &args, json!({}))
    }

    pub fn del(&self, id: &str) -> Result<Value, Value> {
        self.cni("DEL", id, None, json!({}))
    }

    /// Host ends of pods on this node.
    pub fn ports(&self) -> usize {
        let links = self.netns.ip("-o link show");
        links
            .lines()
            .filter(|line| line.split(": ").nth(1).is_some_and(|name| name.starts_with("hfv")))
            .count()
    }

    /// Elements and routes that belong to pods; a revision moves on with every revoking change.
    pub fn pod_state(&self) -> String {
        let rules = self.rules_text();
        let mut text: String =
            rules.lines().filter(|line| !line.contains("revision")).flat_map(|line| [line, "\n"]).collect();
        text.push_str(&self.netns.ip("route show"));
        text.push_str(&self.netns.ip("neigh show"));
        text
    }

    /// Both tables as `nft` lists them.
    pub fn rules_text(&self) -> String {
        let mut text = String::new();
        for table in [["inet", "holdfast"], ["bridge", "holdfast"]] {
            let output = self.netns.exec("nft").args(["list", "table", table[0], table[1]]).output().unwrap();
            // Counters move by themselves.
            let lines = String::from_utf8(output.stdout).unwrap();
            text.extend(lines.lines().filter(|line| !line.contains("counter")).flat_map(|line| [line, "\n"]));
        }
        text
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("agent of {}:\n{}", self.name, self.log());
        }
        self.kill();
    }
}

pub fn is_down(error: &Value) -> bool {
    error["msg"] == "the node agent is down"
}

/// Executes the plugin; `Err` holds the error object. Output must be one JSON object or nothing.
pub fn plugin(netns: Option<&Netns>, variables: &[(&str, &str)], input: &str) -> Result<Value, Value> {
    let path = env!("CARGO_BIN_EXE_holdfast-cni");
    let mut command = netns.map_or_else(|| Command::new(path), |netns| netns.exec(path));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    for name in ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_ARGS"] {
        command.env_remove(name);
    }
    command.envs(variables.iter().filter(|(_, value)| !value.is_empty()).copied());
    let mut child = command.spawn().unwrap();
    // A call that is refused early may leave its input unread.
    let _ = child.stdin.take().unwrap().write_all(input.as_bytes());
    let output = child.wait_with_output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.stderr.is_empty(), "{}", String::from_utf8_lossy(&output.stderr));
    let value = if text.is_empty() { Value::Null } else { serde_json::from_str(&text).expect(&text) };
    if output.status.success() { Ok(value) } else { Err(value) }
}

/// Runs `work` on a thread inside a namespace.
pub fn inside<T: Send + 'static>(netns: &Netns, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let file = std::fs::File::open(netns.path()).unwrap();
    std::thread::spawn(move || {
        nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
        work()
    })
}

/// The first address of a result, without its prefix length.
pub fn address_of(result: &Value) -> String {
    let text = result["ips"][0]["address"].as_str().unwrap();
    text.split('/').next().unwrap().to_owned()
}

/// Where the pod's end is in the interfaces of a result.
pub fn pod_end(result: &Value) -> usize {
    let interfaces = result["interfaces"].as_array().unwrap();
    interfaces
        .iter()
        .position(|interface| interface["sandbox"] != Value::Null && interface["sandbox"] != "")
        .unwrap()
}

/// The name of the interface on the node.
pub fn host_end(result: &Value) -> &str {
    result["interfaces"][pod_end(result) - 1]["name"].as_str().unwrap()
}

/// Where the node's route to the pod leads.
pub fn pod_device(result: &Value) -> &str {
    if is_routed() { host_end(result) } else { "hf0" }
}

pub fn eventually(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !holds() {
        assert!(Instant::now() < deadline, "not within 10 s: {what}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn run(program: &str, args: &[&str]) -> String {
    let output = Command::new(program).args(args).output().unwrap();
    assert!(output.status.success(), "{program} {args:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Whether a folder holds no file.
pub fn is_empty(folder: &Path) -> bool {
    std::fs::read_dir(folder).map_or(true, |mut entries| entries.next().is_none())
}
