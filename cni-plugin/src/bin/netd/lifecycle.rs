//! Words of `holdfast-netd` that bring the network half onto a node and off it.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;
use holdfast_agent::{CNI_PLUGIN, ControllerSettings, InstallOptions, UninstallOptions};

/// Installs the CNI plugin's files on this node: the plugin, and then its network configuration, each whole or not at all, and only
/// if it differs. They stay until `holdfast-netd uninstall`.
#[derive(Parser)]
#[command(name = "holdfast-netd install-cni", version)]
pub struct InstallArgs {
    /// The runtime's folder of plugins.
    #[arg(long, default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// The runtime's folder of network configurations.
    #[arg(long, default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
    /// The network configuration; it keeps its name.
    #[arg(long)]
    conflist: PathBuf,
    /// The plugin's program; by default the one beside this program.
    #[arg(long)]
    plugin: Option<PathBuf>,
}

/// Whether this node's agent could attach a pod now: exits with 0, or with 1 and says why not.
#[derive(Parser)]
#[command(name = "holdfast-netd ready", version)]
pub struct ReadyArgs {
    /// Socket of the node agent.
    #[arg(long, default_value = "/run/holdfast/netd.sock")]
    socket: PathBuf,
}

/// Takes the start-up taint network.holdfast.dev/not-ready off each node whose agent's pod is Ready. Changes nothing else, and never
/// adds a taint: kubelet's --register-with-taints does. Several may run at the same time.
#[derive(Parser)]
#[command(name = "holdfast-netd controller", version)]
pub struct ControllerArgs {
    /// Namespace of the agents' pods.
    #[arg(long, default_value = "holdfast-system")]
    namespace: String,
    /// The way to the API server; by default KUBECONFIG or the pod's service account.
    #[arg(long)]
    kubeconfig: Option<PathBuf>,
}

impl From<ControllerArgs> for ControllerSettings {
    fn from(args: ControllerArgs) -> Self {
        Self { namespace: args.namespace, kubeconfig: args.kubeconfig }
    }
}

/// Takes the network half off this node: network configuration, plugin, interfaces, routes, rules, leases, sockets, in this order. To
/// be run in the node's network namespace once no agent is to start again. Prints what is gone; may be repeated.
#[derive(Parser)]
#[command(name = "holdfast-netd uninstall", version)]
pub struct UninstallArgs {
    /// Where the node's file system is; all other paths are in it.
    #[arg(long, default_value = "/")]
    root: PathBuf,
    /// The runtime's folder of plugins.
    #[arg(long, default_value = "/opt/cni/bin")]
    bin_dir: PathBuf,
    /// The runtime's folder of network configurations.
    #[arg(long, default_value = "/etc/cni/net.d")]
    conf_dir: PathBuf,
    /// Name of our network configuration in it.
    #[arg(long, default_value = "10-holdfast.conflist")]
    conflist_name: String,
    /// Folder of the lease store.
    #[arg(long, default_value = "/var/lib/holdfast/netd")]
    state_dir: PathBuf,
    /// Folder of the plugin's delete records.
    #[arg(long, default_value = "/var/lib/holdfast/netd/pending")]
    pending_dir: PathBuf,
    /// The agent's socket.
    #[arg(long, default_value = "/run/holdfast/netd.sock")]
    socket: PathBuf,
    /// Where the runtime keeps the results of attachments: those of pods that died with their node go.
    #[arg(long, default_value = "/var/lib/cni")]
    cache_dir: PathBuf,
    /// Name of the bridge.
    #[arg(long, default_value = "hf0")]
    bridge: String,
    /// Name of the VXLAN device.
    #[arg(long, default_value = "hf.vx")]
    vxlan_device: String,
    /// Cut off pods that are attached.
    #[arg(long)]
    force: bool,
    /// Stay until a signal once all is gone: for a DaemonSet, whose pods must not end.
    #[arg(long)]
    stay: bool,
}

/// Installs, and says what was done.
pub fn install(args: InstallArgs) -> anyhow::Result<ExitCode> {
    let plugin = match args.plugin {
        Some(plugin) => plugin,
        None => std::env::current_exe()?.with_file_name(CNI_PLUGIN),
    };
    let options =
        InstallOptions { plugin, bin_dir: args.bin_dir, conf_dir: args.conf_dir, conflist: args.conflist };
    let done = holdfast_agent::install_cni(&options)?;
    for path in &done.swept {
        println!("removed {}, which a crash left", path.display());
    }
    for path in &done.written {
        println!("installed {}", path.display());
    }
    if done.written.is_empty() {
        println!("all files are as they should be");
    }
    for path in &done.before_ours {
        eprintln!(
            "warning: {} sorts before ours: the runtime takes it, and pods are not attached to this network; remove it or \
            rename it",
            path.display()
        );
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks the agent.
pub fn ready(args: &ReadyArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match runtime.block_on(holdfast_agent::ready(&args.socket)) {
        Ok(()) => {
            println!("ready");
            Ok(ExitCode::SUCCESS)
        }
        Err(why) => {
            println!("not ready: {why}");
            Ok(ExitCode::FAILURE)
        }
    }
}

/// Removes, and says what is gone and what is not.
pub fn uninstall(args: UninstallArgs) -> anyhow::Result<ExitCode> {
    let root = args.root;
    // join() of an absolute path would leave the root.
    let on_node = |path: &Path| root.join(path.strip_prefix("/").unwrap_or(path));
    let options = UninstallOptions {
        bin_dir: on_node(&args.bin_dir),
        conf_dir: on_node(&args.conf_dir),
        conflist_name: args.conflist_name,
        state_dir: on_node(&args.state_dir),
        pending_dir: on_node(&args.pending_dir),
        socket: on_node(&args.socket),
        cache_dir: on_node(&args.cache_dir),
        bridge: args.bridge,
        vxlan_device: args.vxlan_device,
        force: args.force,
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (done, stop) = runtime.block_on(async {
        let stop = crate::signalled()?;
        anyhow::Ok((holdfast_agent::uninstall(&options).await?, stop))
    })?;
    for what in &done.removed {
        println!("removed {what}");
    }
    if done.removed.is_empty() {
        println!("nothing of ours was left to remove");
    }
    for what in &done.kept {
        println!("kept: {what}");
    }
    for what in &done.failed {
        eprintln!("not removed: {what}");
    }
    if !done.failed.is_empty() {
        return Ok(ExitCode::FAILURE);
    }
    if args.stay {
        runtime.block_on(stop);
    }
    Ok(ExitCode::SUCCESS)
}
