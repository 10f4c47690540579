//! One node: namespaces, the file tree that a node's programs expect, containerd, kubelet, kube-proxy.
//!
//! A node sees the machine's files. What it writes to `/etc`, `/opt`, `/var/lib` and `/var/log` goes to folders of its own (the
//! upper layers of overlays), which stay over a power cut like a disk; `/run` is memory.

use std::fmt::Write as _;
use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

use super::Tools;
use super::control_plane::{ADDRESS, NodeKubeconfigs};
use super::settings::{self, CONTAINERD_SOCKET};
use crate::certs::Authority;
use crate::cgroups;
use crate::cluster::plug_in;
use crate::namespaces::Namespaces;
use crate::process::{Program, ProgramSpec, maker, run, run_within, wait_until};
use crate::work::Work;

const CONTAINERD_TIMEOUT: Duration = Duration::from_secs(60);
const IMPORT_TIMEOUT: Duration = Duration::from_secs(180);
/// Folders of which a node has a layer of its own.
const LAYERS: [&str; 4] = ["etc", "opt", "var/lib", "var/log"];
/// Folders that lie on the disk directly: layers of images, direct I/O, mounts that pods share.
const BINDS: [&str; 3] = ["/var/lib/kubelet", "/var/lib/containerd", "/var/lib/holdfast"];

/// A node that runs.
pub struct KubeNode {
    /// Its name.
    pub name: String,
    /// Its address.
    pub address: Ipv4Addr,
    /// Its namespaces.
    pub spaces: Namespaces,
    folder: PathBuf,
    tools: Tools,
    kubelet: ProgramSpec,
    programs: Vec<Program>,
}

/// What every node needs.
pub struct Builder<'a> {
    /// The run.
    pub work: &'a Work,
    /// Its programs.
    pub tools: &'a Tools,
    /// Signs what kubelet trusts.
    pub authority: &'a Authority,
}

impl Builder<'_> {
    /// Starts it, but for kubelet.
    ///
    /// # Errors
    /// Something does not start.
    pub fn start(
        &self,
        name: &str,
        address: Ipv4Addr,
        underlay: &Namespaces,
        kubeconfigs: &NodeKubeconfigs,
    ) -> Result<KubeNode> {
        let folder = self.work.folder(name)?;
        let group = group_of(self.work)?;
        self.work.change_state(|state| {
            if !state.cgroups.contains(&group) {
                state.cgroups.push(group.clone());
            }
        })?;
        // What it had before a power cut is empty.
        cgroups::remove(&format!("{group}/{name}"));
        cgroups::make(&group, name)?;
        let spaces = Namespaces::create(name, self.work)?;
        prepare(&spaces, &folder, &group).with_context(|| format!("the file tree of {name}"))?;
        plug_in(underlay, &spaces, address)?;
        spaces.run("ip", &["route", "add", "default", "via", &ADDRESS.to_string()])?;
        let tls = folder.join("tls");
        if !tls.exists() {
            self.authority.issue(name, &tls)?;
        }
        let config = folder.join("kubelet.yaml");
        fs::write(&config, settings::kubelet(&tls.join("ca.pem")))?;
        fs::write(folder.join("containerd.toml"), settings::containerd())?;
        let arguments = settings::kubelet_arguments(name, address, &config, kubeconfigs);
        let kubelet = self.spec(&spaces, "kubelet", &self.tools.kubernetes, arguments)?;
        let toml = folder.join("containerd.toml").display().to_string();
        let containerd =
            self.spec(&spaces, "containerd", &self.tools.containerd, vec!["--config".to_owned(), toml])?;
        let proxy = settings::proxy_arguments(name, kubeconfigs);
        let proxy = self.spec(&spaces, "kube-proxy", &self.tools.kubernetes, proxy)?;
        let programs = vec![Program::start(containerd)?, Program::start(proxy)?];
        Ok(KubeNode {
            name: name.to_owned(),
            address,
            spaces,
            folder,
            tools: self.tools.clone(),
            kubelet,
            programs,
        })
    }

    fn spec(
        &self,
        spaces: &Namespaces,
        name: &str,
        tools: &Path,
        arguments: Vec<String>,
    ) -> Result<ProgramSpec> {
        let log = self.work.folder("logs")?.join(format!("{}-{name}.log", spaces.name()));
        // From inside, the mounts show the node's groups only.
        let enter = "for group in /sys/fs/cgroup/*/cgroup.procs; do echo 0 >$group; done; \
                     PATH=$0:/usr/sbin:/usr/bin:/sbin:/bin exec unshare --cgroup -- \"$@\"";
        let mut command = spaces.command("/bin/sh");
        command.args(["-c", enter]).arg(tools).arg(tools.join(name));
        Ok(ProgramSpec {
            name: format!("{name} of {}", spaces.name()),
            log,
            command: maker(&command, arguments),
        })
    }
}

impl KubeNode {
    /// Starts kubelet, once containerd answers.
    ///
    /// # Errors
    /// One of them does not.
    pub fn start_kubelet(&mut self) -> Result<()> {
        let containerd = self.programs.first_mut().context("it has no containerd")?;
        let socket = self.spaces.host_path(CONTAINERD_SOCKET);
        wait_until(CONTAINERD_TIMEOUT, || {
            ensure!(containerd.is_alive(), "it ended:\n{}", containerd.log_tail());
            Ok(std::os::unix::net::UnixStream::connect(&socket).is_ok())
        })
        .with_context(|| {
            format!("containerd of {} does not answer:\n{}", self.name, containerd.log_tail())
        })?;
        self.programs.push(Program::start(self.kubelet.clone())?);
        Ok(())
    }

    /// Puts images in its store.
    ///
    /// # Errors
    /// containerd refuses one.
    pub fn import(&self, images: &[PathBuf]) -> Result<()> {
        for image in images {
            let image = image.display().to_string();
            self.ctr(&["images", "import", "--local", "--digests=false", &image])
                .with_context(|| format!("{image} on {}", self.name))?;
        }
        Ok(())
    }

    /// `ctr` in the namespace of Kubernetes.
    ///
    /// # Errors
    /// It fails.
    pub fn ctr(&self, arguments: &[&str]) -> Result<String> {
        let mut command = self.spaces.command(self.tools.containerd.join("ctr"));
        command.args(["-a", CONTAINERD_SOCKET, "-n", "k8s.io"]).args(arguments);
        run_within(IMPORT_TIMEOUT, &mut command)
    }

    /// Its programs, for their logs.
    #[must_use]
    pub fn programs(&self) -> &[Program] {
        &self.programs
    }

    /// A program of it, such as `kubelet`, to kill it or to start it again.
    ///
    /// # Errors
    /// It has no such program.
    pub fn program(&mut self, name: &str) -> Result<&mut Program> {
        let programs = &mut self.programs;
        let found = programs.iter_mut().find(|program| program.name().starts_with(name));
        found.with_context(|| format!("no {name} on {}", self.name))
    }

    /// Where its folders of the disk lie: `etc`, `opt`, `var-lib`, `var-log`, `kubelet`, `containerd`, `holdfast`.
    #[must_use]
    pub fn folder(&self) -> &Path {
        &self.folder
    }
}

/// Ids of the volumes that have or had a replica in a node's pool.
pub fn volumes_of(work: &Work, node: &str) -> Vec<String> {
    let pool = work.dir().join(node).join("holdfast/pool");
    let mut found = Vec::new();
    for level in [pool.clone(), pool.join("volumes"), pool.join("replicas")] {
        let folders = fs::read_dir(level).into_iter().flatten().flatten();
        let names = folders.map(|entry| entry.file_name().display().to_string());
        // Short names are of the pool's own folders.
        found.extend(names.filter(|name| name.len() >= 16));
    }
    found
}

fn group_of(work: &Work) -> Result<String> {
    let name = work.dir().file_name().context("a work folder has a name")?;
    Ok(format!("holdfast-{}", name.display()))
}

/// Mounts what a node needs, in the node's mount namespace and seen from the node's control group.
fn prepare(spaces: &Namespaces, folder: &Path, group: &str) -> Result<()> {
    if LAYERS.iter().any(|layer| folder.starts_with(Path::new("/").join(layer))) {
        bail!("the work folder {} lies where nodes have layers of their own", folder.display());
    }
    let mut inside = cgroups::mount_script(&cgroups::hierarchies());
    for layer in LAYERS {
        let key = layer.replace('/', "-");
        let _ = writeln!(
            inside,
            "mkdir -p \"$1/{key}\" \"$1/.{key}\"\n\
             mount -t overlay overlay -o \"lowerdir=/{layer},upperdir=$1/{key},workdir=$1/.{key}\" /{layer}"
        );
    }
    for bind in BINDS {
        let key = Path::new(bind).file_name().unwrap_or_default().display();
        // Shared only now: else every mount in it would show at both of its places.
        let _ = writeln!(
            inside,
            "mkdir -p \"$1/{key}\" {bind}\nmount --bind \"$1/{key}\" {bind}\n\
             mount --make-private {bind}\nmount --make-shared {bind}"
        );
    }
    // What the machine has there for runtimes of its own is not the node's; a node that comes back keeps what it has.
    let foreign = "/etc/cni /opt/cni /var/lib/cni /etc/holdfast /etc/kubernetes";
    let _ = writeln!(inside, "[ -e \"$1/.known\" ] || rm -rf {foreign}\ntouch \"$1/.known\"");
    inside.push_str(&settings::kernel_settings_script());
    let script = format!(
        "set -e\n{}exec unshare --cgroup nsenter --target {} --mount -- /bin/sh -ec \"$2\" sh \"$1\"",
        cgroups::enter_script(group, spaces.name()),
        spaces.pid()
    );
    run(Command::new("sh").args(["-c", &script, "sh"]).arg(folder).arg(inside)).map(drop)
}
