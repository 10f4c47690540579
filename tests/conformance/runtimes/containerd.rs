//! containerd: pods through CRI, as kubelet asks for them.

use std::collections::BTreeSet;
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use holdfast_tests::cni::{self, Call};
use holdfast_tests::effort::{rounds, seed};
use holdfast_tests::images;
use holdfast_tests::process::{maker, wait_until};
use holdfast_tests::{Program, ProgramSpec, Reach, traces};
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use serde_json::json;

use super::bed::{Machine, PORT, mk_image_tree, server_command};
use super::cri::{Cri, LinuxConfig, Metadata, PortMapping, SandboxConfig};

/// What must be installed.
pub const PROGRAMS: [&str; 3] = ["containerd", "ctr", "runc"];
/// Image of every sandbox.
const IMAGE: &str = "holdfast.test/pause:1";
/// Ports of the node that lead to web and to stranger.
const WEB_PORT: i32 = 8088;
const OPEN_PORT: i32 = 8089;
/// Inside the node.
const SOCKET: &str = "/run/containerd/containerd.sock";
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Processes of a removed sandbox end within this.
const END_TIMEOUT: Duration = Duration::from_secs(10);
/// What containerd 1.6 speaks.
const VERSION: &str = "1.0.0";
/// Kills of a run, and with `--long`.
const KILLS: usize = 6;
const LONG_KILLS: usize = 100;
/// A whole RunPodSandbox takes about half of this on a busy machine.
const RUN_MS: u64 = 200;

/// A containerd of our own.
struct Containerd {
    program: Program,
    socket: PathBuf,
    cri: Cri,
}

/// Three pods on this node and two on the other, a policy, removal.
pub fn pods(machine: &mut Machine) -> Result<()> {
    let runtime = Containerd::start(machine)?;
    for app in ["web", "client", "stranger"] {
        machine.put_pod(&format!("shop/{app}"), app, 0, &[])?;
    }
    machine.put_policy("shop", "web", "client")?;
    let mut ids = Vec::new();
    for name in ["web", "client", "stranger"] {
        ids.push(runtime.cri.run(mk_config(machine, name)).with_context(|| format!("pod {name}"))?);
        told_as_leased(machine, &runtime.cri.status(ids.last().context("just pushed")?)?, name)?;
    }
    let far = [
        machine.attach_far("shop/far-client", "client")?,
        machine.attach_far("shop/far-stranger", "stranger")?,
    ];
    let place = |name: &str| machine.lease(&format!("shop/{name}"));
    let (web, client, stranger) = (place("web")?, place("client")?, place("stranger")?);
    machine.expect(0, &client.0, "client to web", &web.1, Reach::Open)?;
    machine.expect(0, &stranger.0, "stranger to web", &web.1, Reach::Dropped)?;
    machine.expect(0, &web.0, "web to stranger", &stranger.1, Reach::Open)?;
    for (attachment, name, reach) in
        [(&far[0], "far-client", Reach::Open), (&far[1], "far-stranger", Reach::Dropped)]
    {
        let netns = Path::new("/run/netns").join(format!("shop-{name}"));
        machine.expect(1, &netns, &format!("{name} to web"), &web.1, reach)?;
        machine.net.detach(attachment)?;
    }
    host_ports(machine)?;
    for id in &ids {
        runtime.cri.stop_and_remove(id)?;
    }
    runtime.end(machine)
}

/// From the other node the open pod is reached through this node's port and the closed one is not; both are held to their rate.
fn host_ports(machine: &Machine) -> Result<()> {
    let port = |port: i32| u16::try_from(port).map(|port| SocketAddr::new(machine.node().addresses[0], port));
    let (far, itself) = (&machine.net.nodes[1].spaces, Path::new("/proc/1/ns/net"));
    let found = holdfast_tests::probe(far, itself, &[port(OPEN_PORT)?, port(WEB_PORT)?])?;
    ensure!(found == [Reach::Open, Reach::Dropped], "through the host ports: {found:?}");
    let shaped = machine.node().spaces.run("tc", &["qdisc", "show"])?;
    ensure!(shaped.contains("rate 80Mbit"), "nobody is held to 80 Mbit/s:\n{shaped}");
    Ok(())
}

/// containerd is killed at random moments of RunPodSandbox, and started again. Removing what it still knows, and GC for what it
/// forgot, leaves nothing.
pub fn killed(machine: &mut Machine) -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed()?);
    let mut runtime = Containerd::start(machine)?;
    machine.put_pod("shop/web", "web", 0, &[])?;
    let clean = traces::of(machine.node())?;
    let (mut whole, mut known, mut forgotten) = (0, 0, 0);
    let kills = rounds(KILLS, LONG_KILLS);
    for kill in 0..kills {
        let after = Duration::from_millis(random.random_range(0..RUN_MS));
        whole += usize::from(runtime.kill_in_mid_run(machine, after)?);
        wait_until(START_TIMEOUT, || Ok(!is_running(machine, "holdfast-cni")?))
            .context("a plugin call goes on")?;
        let ids = runtime.cri.list()?;
        known += ids.len();
        for id in &ids {
            runtime
                .cri
                .stop_and_remove(id)
                .with_context(|| format!("removal after kill {kill}, after {after:?}"))?;
        }
        forgotten += collect(machine, &clean)?;
        traces::expect_nothing_more(machine.node(), &clean)
            .with_context(|| format!("kill {kill}, after {after:?}"))?;
    }
    println!(
        "{kills} kills, {whole} of them after the answer; containerd still knew {known} sandboxes, and had forgotten {forgotten} attachments"
    );
    runtime.program.terminate()?;
    // It may forget a shim as well, which is not ours to judge. The node has process numbers of its own.
    let script = "for pid in $(pgrep -f '[c]ontainerd-shim'; pgrep '[b]usybox'); do kill -9 $pid; done";
    machine.node().spaces.run("sh", &["-c", script]).map(drop)
}

/// What a newer containerd does at its start: GC with the attachments that it knows, here none; and the namespaces that nobody
/// unmounts. Answers how many attachments that were.
fn collect(machine: &Machine, clean: &BTreeSet<String>) -> Result<usize> {
    let node = machine.node();
    let forgotten = traces::leases(node)?.len();
    let mut config = node.network_config();
    config["cni.dev/valid-attachments"] = json!([]);
    let call = Call { command: "GC", container_id: "", netns: "", ifname: "", args: "" };
    cni::execute(&node.spaces, &call, &config.to_string())?.result()?;
    for entry in fs::read_dir(node.spaces.host_path("/run/netns")).into_iter().flatten().flatten() {
        let name = entry.file_name().display().to_string();
        if !clean.contains(&format!("namespace {name}")) {
            node.spaces.run("ip", &["netns", "delete", &name])?;
        }
    }
    Ok(forgotten)
}

fn told_as_leased(machine: &Machine, status: &super::cri::SandboxStatus, name: &str) -> Result<()> {
    let network = status.network.clone().unwrap_or_default();
    let told = std::iter::once(&network.ip).chain(network.additional.iter().map(|other| &other.ip));
    let mut told = told.map(|text| text.parse::<IpAddr>()).collect::<Result<Vec<_>, _>>()?;
    told.sort_by_key(IpAddr::is_ipv6);
    let leased = machine.lease(&format!("shop/{name}"))?.1;
    ensure!(status.state == 0, "{name} is not ready");
    ensure!(told == leased, "containerd tells {told:?} of {name}, its lease has {leased:?}");
    Ok(())
}

fn mk_config(machine: &Machine, name: &str) -> SandboxConfig {
    // Web's leads to a pod that lets only clients in.
    let mapped = match name {
        "web" => Some(WEB_PORT),
        "stranger" => Some(OPEN_PORT),
        _ => None,
    };
    let container_port = i32::from(PORT);
    let metadata =
        Metadata { name: name.to_owned(), uid: String::new(), namespace: "shop".to_owned(), attempt: 0 };
    SandboxConfig {
        metadata: Some(metadata),
        hostname: name.to_owned(),
        port_mappings: mapped
            .into_iter()
            .map(|host_port| PortMapping { container_port, host_port })
            .collect(),
        annotations: [("kubernetes.io/ingress-bandwidth".to_owned(), "80M".to_owned())].into(),
        linux: Some(LinuxConfig { cgroup_parent: machine.cgroup.clone() }),
    }
}

/// Whether a program of that name runs on the first node.
fn is_running(machine: &Machine, name: &str) -> Result<bool> {
    let script = format!("pgrep -f '{name}' >/dev/null && echo yes || echo no");
    // The shell's own command line names it, too; a class of characters does not match itself.
    let script = script.replace(name, &format!("[{}]{}", &name[..1], &name[1..]));
    Ok(machine.node().spaces.run("sh", &["-c", &script])?.trim() == "yes")
}

impl Containerd {
    fn start(machine: &Machine) -> Result<Self> {
        machine.mount_cgroups()?;
        let folder = machine.folder("containerd")?;
        let conflists = machine.write_conflist("conflists", VERSION, &[])?;
        fs::write(folder.join("config.toml"), settings(machine, &folder, &conflists)?)?;
        let arguments = vec!["--config".to_owned(), folder.join("config.toml").display().to_string()];
        let spec = ProgramSpec {
            name: "containerd".to_owned(),
            log: machine.folder("logs")?.join("containerd.log"),
            command: maker(&machine.node().spaces.command("containerd"), arguments),
        };
        let mut program = Program::start(spec)?;
        let socket = machine.node().spaces.host_path(SOCKET);
        let cri = answering(&mut program, &socket)?;
        let image = mk_image(&folder.join("image"))?.display().to_string();
        machine.node().spaces.run("ctr", &["-a", SOCKET, "-n", "k8s.io", "images", "import", &image])?;
        Ok(Self { program, socket, cri })
    }

    /// Kills it some time after it was asked for a sandbox, and starts it again; true if it had answered before.
    fn kill_in_mid_run(&mut self, machine: &Machine, after: Duration) -> Result<bool> {
        let (socket, config) = (self.socket.clone(), mk_config(machine, "web"));
        let asking = std::thread::spawn(move || Ok(Cri::connect(&socket)?.run(config).is_ok()));
        std::thread::sleep(after);
        self.program.kill()?;
        let answered: Result<bool> = asking.join().map_err(|_| anyhow::anyhow!("the caller panicked"))?;
        self.program.start_again()?;
        self.cri = answering(&mut self.program, &self.socket)?;
        answered
    }

    /// Ends it; no process of a sandbox may be left then.
    fn end(mut self, machine: &Machine) -> Result<()> {
        for name in ["containerd-shim", "busybox"] {
            wait_until(END_TIMEOUT, || Ok(!is_running(machine, name)?))
                .with_context(|| format!("a {name} is left"))?;
        }
        self.program.terminate()
    }
}

fn answering(program: &mut Program, socket: &Path) -> Result<Cri> {
    let mut found = None;
    wait_until(START_TIMEOUT, || {
        if !program.is_alive() {
            bail!("containerd ended:\n{}", program.log_tail());
        }
        let cri = Cri::connect(socket)?;
        if let Some(why) = cri.not_ready()? {
            bail!("containerd is not ready: {why}");
        }
        found = Some(cri);
        Ok(true)
    })
    .with_context(|| program.log_tail())?;
    found.context("no client")
}

/// Nothing in it reaches out of the run: folders, state and socket are private. Machines of tests often lack CAP_SYS_RESOURCE
/// and AppArmor.
fn settings(machine: &Machine, folder: &Path, conflists: &Path) -> Result<String> {
    let (root, conflists, plugins) = (folder.join("root"), conflists.display(), machine.plugin_folder()?);
    Ok(format!(
        r#"version = 2
root = "{}"
state = "/run/containerd"
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs",
  "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
  address = "{SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{IMAGE}"
  restrict_oom_score_adj = true
  disable_apparmor = true
  disable_tcp_service = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{plugins}"
    conf_dir = "{conflists}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "native"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        NoNewKeyring = true
"#,
        root.display()
    ))
}

fn mk_image(folder: &Path) -> Result<PathBuf> {
    mk_image_tree(&folder.join("tree"))?;
    images::pack(folder, IMAGE, &server_command())
}
