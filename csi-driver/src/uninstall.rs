//! Takes the storage half off a node.
//!
//! Promised: no data goes, and nothing that somebody uses. Refused therefore while a data process runs (it holds the pool's lock or
//! the loop devices' mark, or answers on its socket), and while a device of ours is mounted or open, whose user would otherwise
//! see I/O errors instead of a sentence. What is removed is what a data process makes anew at its start; the continuity cookies
//! are among it, so a later installation counts each replica's write cache as lost (R19), which costs a resync and no data.
//!
//! Each step may be repeated after a kill at any point: what is gone is passed over.

use std::fs;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::Args;
use holdfast_frontend::FuseLoop;
use holdfast_service::node::mounted_at;
use holdfast_storage_core::ids::ReplicaId;
use holdfast_store::Surveyed;

use crate::kubelet_leftovers::sweep_kubelet;

/// Where things are. All paths are in the root.
#[derive(Debug, Args)]
pub struct UninstallOptions {
    /// Where the node's file system is.
    #[arg(long, default_value = "/")]
    root: PathBuf,
    /// Folder of this node's replicas; may be given several times. It stays as it is.
    #[arg(long, default_value = "/var/lib/holdfast/pool")]
    pool_dir: Vec<PathBuf>,
    /// Unix socket of the data process.
    #[arg(long, default_value = "/run/holdfast/data.sock")]
    data_socket: PathBuf,
    /// Folder of the continuity cookies.
    #[arg(long, default_value = "/run/holdfast/cookies")]
    cookie_dir: PathBuf,
    /// Folder of the front ends.
    #[arg(long, default_value = "/run/holdfast/front-ends")]
    run_dir: PathBuf,
    /// Folder of the sockets for local NBD clients, if there was one.
    #[arg(long)]
    nbd_client_dir: Option<PathBuf>,
    /// Folder of the certificate that the built-in issuer gave.
    #[arg(long, default_value = "/run/holdfast/tls")]
    tls_dir: PathBuf,
    /// Kubelet's folder of the CSI plugin.
    #[arg(long, default_value = "/var/lib/kubelet/plugins/csi.holdfast.dev")]
    csi_dir: PathBuf,
    /// The CSI plugin's registration with kubelet.
    #[arg(long, default_value = "/var/lib/kubelet/plugins_registry/csi.holdfast.dev-reg.sock")]
    registration_socket: PathBuf,
    /// Kubelet's folder: what it keeps of volumes of ours that nobody unstages any more goes.
    #[arg(long, default_value = "/var/lib/kubelet")]
    kubelet_dir: PathBuf,
    /// Go on although devices are in use: they vanish when their last user ends, whose I/O fails until then.
    #[arg(long)]
    force: bool,
    /// Stay until a signal once all is gone: for a DaemonSet, whose pods must not end.
    #[arg(long)]
    pub stay: bool,
}

/// Removes what is ours, and prints what is gone and what stays. Blocks.
///
/// # Errors
/// Refused, or something is left that should be gone.
pub fn uninstall(options: &UninstallOptions) -> anyhow::Result<()> {
    // join() of an absolute path would leave the root.
    let on_node = |path: &Path| options.root.join(path.strip_prefix("/").unwrap_or(path));
    if UnixStream::connect(on_node(&options.data_socket)).is_ok() {
        bail!("a data process answers on {}; end it first", options.data_socket.display());
    }
    let mut pools = Vec::new();
    for pool in options.pool_dir.iter().map(|dir| on_node(dir)) {
        let found = holdfast_store::survey(&pool).context("the data process must be ended first")?;
        pools.push((pool, found));
    }
    let run_dir = on_node(&options.run_dir);
    let devices = FuseLoop::clean_stale(&run_dir)?;
    if !devices.busy.is_empty() && !options.force {
        let named: Vec<String> = devices.busy.iter().map(|device| in_use(device)).collect();
        bail!(
            "devices of ours are in use: {}; stop their pods first, or use --force: they vanish with their last user",
            named.join(", ")
        );
    }
    let mut sweep = Sweep::default();
    sweep.removed.extend(devices.cleared.iter().map(|path| path.display().to_string()));
    sweep.kept.extend(devices.busy.iter().map(|device| in_use(device)));
    sweep.socket(&on_node(&options.data_socket));
    sweep.socket(&on_node(&options.registration_socket));
    sweep.files(&on_node(&options.cookie_dir), is_of_a_replica);
    // Without the mark nobody would find the devices that are in use.
    if devices.busy.is_empty() {
        sweep.files(&run_dir, |name| name == "owner" || name.starts_with("owner."));
    }
    sweep.files(&on_node(&options.tls_dir), |name| TLS_FILES.contains(&name));
    sweep.sockets(&on_node(&options.csi_dir));
    if let Some(dir) = &options.nbd_client_dir {
        sweep.sockets(&on_node(dir));
    }
    sweep_kubelet(&on_node(&options.kubelet_dir), &mut sweep);
    // Shared with the network half: whoever goes last takes them.
    for folder in options.pool_dir.iter().map(PathBuf::as_path).chain([options.data_socket.as_path()]) {
        sweep.folder(folder.parent().map(&on_node).as_deref());
    }
    sweep
        .kept
        .extend(pools.iter().filter(|(_, found)| !found.is_empty()).map(|(dir, found)| told(dir, found)));
    sweep.print()
}

/// What the built-in issuer's client writes.
const TLS_FILES: [&str; 4] = ["identity.pem", "ca.pem", "identity.pem.new", "ca.pem.new"];

/// Cookies, and what else is kept beside them: named after their replica.
fn is_of_a_replica(name: &str) -> bool {
    name.split('.').next().is_some_and(|id| id.parse::<ReplicaId>().is_ok())
}

/// "/dev/loop3 (mounted at /x)".
fn in_use(device: &Path) -> String {
    let places = mounted_at(device).unwrap_or_default();
    let places: Vec<String> = places.iter().map(|place| place.display().to_string()).collect();
    let how =
        if places.is_empty() { "open".to_owned() } else { format!("mounted at {}", places.join(" and ")) };
    format!("{} ({how})", device.display())
}

/// "the pool /p with 2 replicas: of volume X (10737418240 bytes), ...".
fn told(dir: &Path, replicas: &[Surveyed]) -> String {
    let one = |(id, meta): &Surveyed| match meta {
        Ok(meta) => format!("of volume {} ({} bytes)", meta.volume_id, meta.size_bytes),
        Err(error) => format!("replica {id}, whose meta cannot be read ({error})"),
    };
    let all: Vec<String> = replicas.iter().map(one).collect();
    format!("the pool {} with {} replicas: {}", dir.display(), replicas.len(), all.join(", "))
}

/// What was done.
#[derive(Default)]
pub struct Sweep {
    removed: Vec<String>,
    pub kept: Vec<String>,
    pub failed: Vec<String>,
}

impl Sweep {
    pub fn note(&mut self, path: &Path, result: io::Result<()>) {
        match result {
            Ok(()) => self.removed.push(path.display().to_string()),
            Err(error) if error.kind() == ErrorKind::NotFound => {}
            Err(error) => self.failed.push(format!("{}: {error}", path.display())),
        }
    }

    /// A file that is no socket is none of ours.
    fn socket(&mut self, path: &Path) {
        if fs::symlink_metadata(path).is_ok_and(|found| found.file_type().is_socket()) {
            self.note(path, fs::remove_file(path));
        }
    }

    /// The folder's files of these names, and then the folder, if nothing of others is in it.
    fn files(&mut self, dir: &Path, is_ours: impl Fn(&str) -> bool) {
        for name in names(dir) {
            if is_ours(&name) {
                self.note(&dir.join(&name), fs::remove_file(dir.join(&name)));
            }
        }
        self.folder(Some(dir));
    }

    fn sockets(&mut self, dir: &Path) {
        for name in names(dir) {
            self.socket(&dir.join(name));
        }
        self.folder(Some(dir));
    }

    pub fn folder(&mut self, dir: Option<&Path>) {
        let Some(dir) = dir else { return };
        match fs::remove_dir(dir) {
            // Others have something in it, or it is mounted here.
            Err(error) if matches!(error.kind(), ErrorKind::DirectoryNotEmpty | ErrorKind::ResourceBusy) => {}
            other => self.note(dir, other),
        }
    }

    fn print(self) -> anyhow::Result<()> {
        for what in &self.removed {
            println!("removed {what}");
        }
        if self.removed.is_empty() {
            println!("nothing of ours was left to remove");
        }
        for what in &self.kept {
            println!("kept: {what}");
        }
        if !self.failed.is_empty() {
            bail!("not removed: {}", self.failed.join(", "));
        }
        Ok(())
    }
}

/// Names in a folder; none where there is no folder.
pub fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
}
