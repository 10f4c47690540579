//! holdfast-netd: the node agent's process. Settings, privileges, logging and signals; the work is in `holdfast-agent`.

// Beside this file it would be a program of its own.
#[path = "netd/lifecycle.rs"]
mod lifecycle;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use caps::{CapSet, Capability, CapsHashSet};
use clap::{Parser, ValueEnum};
use holdfast_agent::{ChecksumOffload, DoctorOptions, Mode, ObjectSource, Settings};
use holdfast_net_core::nat::{MasqueradeMode, MasqueradeSettings};
use holdfast_net_core::overlay::{OverlaySettings, Routing};
use holdfast_net_core::pod_ranges::ClusterRange;
use ipnetwork::IpNetwork;
use tokio::signal::unix::{SignalKind, signal};

/// What is kept: links, routes and rules; entering sandboxes; and sandboxes that are named by a process.
const CAPABILITIES: [Capability; 3] =
    [Capability::CAP_NET_ADMIN, Capability::CAP_SYS_ADMIN, Capability::CAP_SYS_PTRACE];

/// Holdfast's node agent: addresses, interfaces, overlay and network policy of one node.
#[derive(Parser)]
#[command(
    version,
    after_help = "Other words, each with a --help of its own: `doctor` names what interferes with this node's network, \
        `install-cni` installs the CNI plugin's files, `ready` tells whether pods can be attached, `controller` takes the start-up taint \
        off nodes whose agent is ready (once for a cluster), `uninstall` takes everything off \
        the node."
)]
struct Args {
    /// Name of this node's Node object.
    #[arg(long)]
    node: String,
    /// Where Kubernetes' objects come from.
    #[arg(long, value_enum, default_value = "folder")]
    object_source: ObjectSourceArg,
    /// Folder of Kubernetes YAML (Node, Namespace, Pod, NetworkPolicy). Whoever runs the pods writes it.
    #[arg(long, required_if_eq("object_source", "folder"), value_name = "DIR")]
    objects: Option<PathBuf>,
    /// How to get to the API server; by default with the service account of the pod.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Folder of the lease store.
    #[arg(long, default_value = "/var/lib/holdfast/netd")]
    state_dir: PathBuf,
    /// Unix socket to serve on.
    #[arg(long, default_value = "/run/holdfast/netd.sock")]
    socket: PathBuf,
    /// Folder of the plugin's delete records.
    #[arg(long, default_value = "/var/lib/holdfast/netd/pending")]
    pending_dir: PathBuf,
    /// How new pods are attached. Those that are keep what they have.
    #[arg(long, value_enum, default_value = "bridge")]
    attachment: AttachmentArg,
    /// Interface of the underlay; by default the one that has the node's InternalIP.
    #[arg(long)]
    uplink: Option<String>,
    /// How packets go to pods of other nodes. The same on all nodes.
    #[arg(long, value_enum, default_value = "vxlan")]
    overlay: OverlayArg,
    /// Name of the bridge.
    #[arg(long, default_value = "hf0")]
    bridge: String,
    /// Name of the VXLAN device.
    #[arg(long, default_value = "hf.vx")]
    vxlan_device: String,
    /// VXLAN network identifier.
    #[arg(long, default_value_t = 4807, value_parser = clap::value_parser!(u32).range(1..1 << 24))]
    vni: u32,
    /// UDP port of the overlay.
    #[arg(long, default_value_t = 4789, value_parser = clap::value_parser!(u16).range(1..))]
    vxlan_port: u16,
    /// Ranges of the cluster, separated by commas: a node whose Node object has no podCIDR takes a block of each.
    #[arg(long, value_delimiter = ',')]
    cluster_cidr: Vec<IpNetwork>,
    /// Prefix length of such a block, IPv4.
    #[arg(long, default_value_t = 24)]
    node_cidr_mask_size_ipv4: u8,
    /// The same, IPv6.
    #[arg(long, default_value_t = 64)]
    node_cidr_mask_size_ipv6: u8,
    /// Whose packets leave the node with its own address as source: pods' to destinations outside all pod ranges and other than nodes'
    /// InternalIPs, the same and those to other nodes (for networks that drop what comes from a pod's address), or nobody's.
    #[arg(long, value_enum, default_value = "outside")]
    masquerade: MasqueradeArg,
    /// Destinations that see pods' own addresses besides: separated by commas.
    #[arg(long, value_delimiter = ',', value_name = "CIDR")]
    masquerade_exempt: Vec<IpNetwork>,
    /// Whether the VXLAN device leaves checksums to the hardware, which some kernels and network cards do wrong: then ping works
    /// between pods of different nodes, and TCP stalls. `auto` turns it off where that is known to be so, and else leaves it alone.
    #[arg(long, value_enum, default_value = "auto")]
    vxlan_checksum_offload: OffloadArg,
    /// How many seconds a freed address goes to no other pod: longer than any node takes to see that a pod is gone. They count only
    /// while objects can be read. 0: freed addresses may be given out at once.
    #[arg(long, default_value_t = 30)]
    address_quarantine_s: u32,
    /// How many seconds an attachment must look dead before it is freed without the runtime asking for it. 0: never.
    #[arg(long, default_value_t = 60)]
    collect_after_s: u32,
    /// Serve metrics for Prometheus on this address and port, as /metrics, to whoever asks; not at all by default.
    #[arg(long)]
    metrics: Option<SocketAddr>,
}

/// Names what interferes with this node's network and what is missing, one line each with what to do. Changes nothing. Exits
/// with 0 when nothing is wrong, 1 when something is, 2 when something could not be looked at.
#[derive(Parser)]
#[command(name = "holdfast-netd doctor", version)]
struct DoctorArgs {
    /// Socket of the node agent.
    #[arg(long, default_value = "/run/holdfast/netd.sock")]
    socket: PathBuf,
    /// Print one JSON object.
    #[arg(long)]
    json: bool,
    /// Where the node's /run and /etc are.
    #[arg(long, default_value = "/")]
    root: PathBuf,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum ObjectSourceArg {
    /// A folder, which stands for an API server on a machine that has none.
    Folder,
    /// The API server. Only pods are attached then.
    Kubernetes,
}

#[derive(Clone, Copy, ValueEnum)]
enum AttachmentArg {
    /// To a bridge of the node.
    Bridge,
    /// Without a bridge: the node's end of each pod's link is its gateway.
    Routed,
}

#[derive(Clone, Copy, ValueEnum)]
enum OffloadArg {
    Auto,
    On,
    Off,
}

impl From<OffloadArg> for ChecksumOffload {
    fn from(arg: OffloadArg) -> Self {
        match arg {
            OffloadArg::Auto => Self::Auto,
            OffloadArg::On => Self::On,
            OffloadArg::Off => Self::Off,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum MasqueradeArg {
    Outside,
    Nodes,
    Off,
}

impl From<MasqueradeArg> for MasqueradeMode {
    fn from(arg: MasqueradeArg) -> Self {
        match arg {
            MasqueradeArg::Outside => Self::Outside,
            MasqueradeArg::Nodes => Self::Nodes,
            MasqueradeArg::Off => Self::Off,
        }
    }
}

#[derive(Clone, Copy, ValueEnum)]
enum OverlayArg {
    /// Through a VXLAN device.
    Vxlan,
    /// By plain routes only: nodes that share no link are left out.
    Direct,
    /// By plain routes to nodes on the same link, through a VXLAN device to others.
    Auto,
}

impl Args {
    /// # Errors
    /// A sentence on a setting that makes no sense.
    fn into_settings(self) -> anyhow::Result<Settings> {
        let args = self;
        let cluster_range = |range: &IpNetwork| {
            let (v4, v6) = (args.node_cidr_mask_size_ipv4, args.node_cidr_mask_size_ipv6);
            ClusterRange::new(*range, if range.is_ipv4() { v4 } else { v6 }).map_err(anyhow::Error::msg)
        };
        let cluster_ranges = args.cluster_cidr.iter().map(cluster_range).collect::<Result<_, _>>()?;
        let objects = match args.object_source {
            ObjectSourceArg::Folder => {
                anyhow::ensure!(args.kubeconfig.is_none(), "--kubeconfig is for --object-source kubernetes");
                ObjectSource::Folder(args.objects.context("--objects names the folder of objects")?)
            }
            ObjectSourceArg::Kubernetes => {
                anyhow::ensure!(args.objects.is_none(), "--objects is for --object-source folder");
                ObjectSource::Kubernetes { kubeconfig: args.kubeconfig }
            }
        };
        let mode = match args.attachment {
            AttachmentArg::Bridge => Mode::Bridge,
            AttachmentArg::Routed => Mode::Routed,
        };
        let overlay = OverlaySettings {
            bridge: args.bridge,
            vxlan_device: args.vxlan_device,
            vni: args.vni,
            port: args.vxlan_port,
            routing: match args.overlay {
                OverlayArg::Vxlan => Routing::Vxlan,
                OverlayArg::Direct => Routing::Direct,
                OverlayArg::Auto => Routing::Auto,
            },
        };
        Ok(Settings {
            node: args.node,
            objects,
            state_dir: args.state_dir,
            socket: args.socket,
            pending_dir: args.pending_dir,
            mode,
            uplink: args.uplink,
            checksum_offload: args.vxlan_checksum_offload.into(),
            overlay,
            cluster_ranges,
            masquerade: MasqueradeSettings { mode: args.masquerade.into(), exempt: args.masquerade_exempt },
            address_quarantine: Duration::from_secs(args.address_quarantine_s.into()),
            collect_after: Duration::from_secs(args.collect_after_s.into()),
            metrics: args.metrics,
        })
    }
}

fn main() -> anyhow::Result<ExitCode> {
    holdfast_agent::share_one_heap();
    let rest = || std::env::args_os().skip(1);
    match std::env::args().nth(1).as_deref() {
        Some("doctor") => examine(DoctorArgs::parse_from(rest())),
        Some("install-cni") => lifecycle::install(lifecycle::InstallArgs::parse_from(rest())),
        Some("ready") => lifecycle::ready(&lifecycle::ReadyArgs::parse_from(rest())),
        Some("controller") => control(lifecycle::ControllerArgs::parse_from(rest())),
        Some("uninstall") => lifecycle::uninstall(lifecycle::UninstallArgs::parse_from(rest())),
        _ => serve(Args::parse()).map(|()| ExitCode::SUCCESS),
    }
}

fn examine(args: DoctorArgs) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let options = DoctorOptions { socket: args.socket, json: args.json, root: args.root };
    Ok(runtime.block_on(holdfast_agent::doctor(&options)))
}

fn serve(args: Args) -> anyhow::Result<()> {
    let settings = args.into_settings()?;
    start_logging();
    // Capabilities belong to threads: they are dropped before there is a second one.
    keep_only(&CAPABILITIES).context("cannot drop capabilities")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    runtime.block_on(async { holdfast_agent::run(settings, signalled()?).await })
}

/// The controller, which is nobody on its node.
fn control(args: lifecycle::ControllerArgs) -> anyhow::Result<ExitCode> {
    start_logging();
    keep_only(&[]).context("cannot drop capabilities")?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async { holdfast_agent::run_controller(args.into(), signalled()?).await })?;
    Ok(ExitCode::SUCCESS)
}

fn start_logging() {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info"));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .init();
}

/// SIGTERM or SIGINT, caught from the call on.
fn signalled() -> std::io::Result<impl Future<Output = ()> + Send> {
    let mut terminate = signal(SignalKind::terminate())?;
    let mut interrupt = signal(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// Keeps some capabilities and gives up the rest for good, also for programs that might be executed.
fn keep_only(needed: &[Capability]) -> Result<(), caps::errors::CapsError> {
    let permitted = caps::read(None, CapSet::Permitted)?;
    let kept: CapsHashSet = needed.iter().copied().filter(|cap| permitted.contains(cap)).collect();
    if caps::has_cap(None, CapSet::Effective, Capability::CAP_SETPCAP)? {
        for capability in caps::read(None, CapSet::Bounding)? {
            if !kept.contains(&capability) {
                caps::drop(None, CapSet::Bounding, capability)?;
            }
        }
    }
    caps::clear(None, CapSet::Ambient)?;
    caps::set(None, CapSet::Effective, &kept)?;
    caps::set(None, CapSet::Permitted, &kept)?;
    caps::clear(None, CapSet::Inheritable)
}
