//! podman with its CNI back end. It passes a container's name as the pod's and no namespace.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_tests::Reach;
use holdfast_tests::process::{run as run_command, run_within};
use serde_json::Value;

use super::bed::{Machine, mk_image_tree, server_command};

/// What must be installed.
pub const PROGRAMS: [&str; 3] = ["podman", "conmon", "runc"];
const IMAGE: &str = "holdfast.test/box:1";
/// What podman 4 speaks.
const VERSION: &str = "1.0.0";
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

/// podman with private folders.
struct Podman<'a> {
    machine: &'a Machine,
    folder: PathBuf,
}

/// Three containers and a policy, a restart, removal.
pub fn containers(machine: &mut Machine) -> Result<()> {
    let podman = Podman::new(machine)?;
    for app in ["web", "client", "stranger"] {
        machine.put_pod(&format!("default/{app}"), app, 0, &[])?;
    }
    machine.put_policy("default", "web", "client")?;
    for name in ["web", "client", "stranger"] {
        podman.run(name)?;
    }
    reach(machine, &podman)?;

    let before = machine.lease("default/web")?.1;
    podman.call(&["restart", "-t", "0", "web"])?;
    ensure!(machine.lease("default/web")?.1 != before, "the restarted container has its old attachment");
    reach(machine, &podman).context("after a restart")?;
    podman.call(&["stop", "-t", "0", "client"])?;
    ensure!(machine.lease("default/client").is_err(), "a stopped container holds an address");
    podman.call(&["start", "client"])?;
    reach(machine, &podman).context("after stop and start")?;

    podman.call(&["rm", "-f", "-t", "0", "web", "client", "stranger"])?;
    let left = podman.call(&["ps", "-a", "-q"])?;
    ensure!(left.is_empty(), "containers are left: {left}");
    Ok(())
}

fn reach(machine: &Machine, podman: &Podman<'_>) -> Result<()> {
    let place = |name: &str| machine.lease(&format!("default/{name}"));
    let (web, client, stranger) = (place("web")?, place("client")?, place("stranger")?);
    let told = podman.call(&["inspect", "web", "--format", "{{json .NetworkSettings.Networks}}"])?;
    let told: Value = serde_json::from_str(&told)?;
    let told = [&told["holdfast"]["IPAddress"], &told["holdfast"]["GlobalIPv6Address"]];
    let leased: Vec<String> = web.1.iter().map(ToString::to_string).collect();
    ensure!(
        told.iter().zip(&leased).all(|(told, leased)| *told == leased),
        "podman tells {told:?}, leased {leased:?}"
    );
    machine.expect(0, &client.0, "client to web", &web.1, Reach::Open)?;
    machine.expect(0, &stranger.0, "stranger to web", &web.1, Reach::Dropped)?;
    machine.expect(0, &web.0, "web to stranger", &stranger.1, Reach::Open)?;
    for address in &stranger.1 {
        let address = address.to_string();
        podman.call(&["exec", "client", "/bin/busybox", "ping", "-c1", "-W2", &address])?;
    }
    Ok(())
}

impl<'a> Podman<'a> {
    fn new(machine: &'a Machine) -> Result<Self> {
        machine.mount_cgroups()?;
        let folder = machine.folder("podman")?;
        let conflists = machine.write_conflist("conflists", VERSION, &[])?;
        fs::write(folder.join("containers.conf"), settings(machine, &conflists)?)?;
        let tree = folder.join("tree");
        mk_image_tree(&tree)?;
        run_command(
            Command::new("tar").arg("-C").arg(&tree).arg("-cf").arg(folder.join("tree.tar")).arg("."),
        )?;
        let podman = Self { machine, folder };
        podman.call(&["import", &podman.folder.join("tree.tar").display().to_string(), IMAGE])?;
        Ok(podman)
    }

    fn run(&self, name: &str) -> Result<()> {
        let command = server_command();
        let mut arguments = vec!["run", "-d", "--name", name, "--network", "holdfast"];
        arguments.extend(["--cgroup-parent", &self.machine.cgroup, IMAGE]);
        arguments.extend(command.iter().map(String::as_str));
        self.call(&arguments).map(drop)
    }

    fn call(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.machine.node().spaces.command("env");
        command.arg(format!("CONTAINERS_CONF={}", self.folder.join("containers.conf").display()));
        command.arg(format!("TMPDIR={}", self.folder.display()));
        command.arg("podman").arg("--root").arg(self.folder.join("root"));
        command.args(["--runroot", "/run/podman", "--storage-driver", "vfs"]).args(arguments);
        run_within(CALL_TIMEOUT, &mut command)
    }
}

/// Machines of tests often lack CAP_SYS_RESOURCE, keyrings and AppArmor.
fn settings(machine: &Machine, conflists: &Path) -> Result<String> {
    Ok(format!(
        r#"[network]
network_backend = "cni"
cni_plugin_dirs = ["{}"]
network_config_dir = "{}"
default_network = "holdfast"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "none"
runtime = "runc"
tmp_dir = "/run/libpod"
[containers]
log_driver = "k8s-file"
keyring = false
oom_score_adj = 0
pids_limit = 0
seccomp_profile = "unconfined"
apparmor_profile = "unconfined"
"#,
        machine.plugin_folder()?,
        conflists.display()
    ))
}
