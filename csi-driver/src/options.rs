//! The command line.

use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use caps::Capability;
use clap::{Args, Parser, Subcommand, ValueEnum};
use holdfast_service::kubernetes::certificates;
use holdfast_service::topology::is_topology_value;

use crate::inspect::InspectOptions;
use crate::uninstall::UninstallOptions;

/// Replicated block volumes for Kubernetes: a CSI driver and its data process.
#[derive(Debug, Parser)]
#[command(name = "holdfast-csi", version)]
pub struct Options {
    /// How lines on standard error look; what is logged is set by RUST_LOG (default: info).
    #[arg(long, global = true, value_enum, default_value = "text")]
    pub log_format: LogFormat,
    /// What this process does.
    #[command(subcommand)]
    pub role: Role,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum LogFormat {
    /// For people.
    Text,
    /// One JSON object per line.
    Json,
}

/// What this process does.
#[derive(Debug, Subcommand)]
pub enum Role {
    /// CSI controller and the registry of volume records; one per cluster.
    Controller(ControllerOptions),
    /// CSI node service; one per node.
    Node(NodeOptions),
    /// Replicas and targets; one per node.
    Data(DataOptions),
    /// Takes the storage half off this node, except the pools, which it names. To be run once no data process is to start
    /// again; may be repeated.
    Uninstall(UninstallOptions),
    /// Tells which volumes the replicas in pool folders are of, and what a rescue of their records would find. Needs no cluster
    /// and no running process; changes nothing.
    Inspect(InspectOptions),
}

impl Role {
    /// The role as it is typed.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Controller(_) => "controller",
            Self::Node(_) => "node",
            Self::Data(_) => "data",
            Self::Uninstall(_) => "uninstall",
            Self::Inspect(_) => "inspect",
        }
    }

    /// What the role needs of root's powers.
    pub fn capabilities(&self) -> &'static [Capability] {
        match self {
            Self::Controller(_) => &[],
            // Mounts; kubelet's folders may belong to others; ext4 grows while it is mounted only with the last one.
            Self::Node(_) => {
                &[Capability::CAP_SYS_ADMIN, Capability::CAP_DAC_OVERRIDE, Capability::CAP_SYS_RESOURCE]
            }
            // FUSE and loop devices; locked memory; I/O flusher; pools may belong to others.
            Self::Data(_) => &[
                Capability::CAP_SYS_ADMIN,
                Capability::CAP_IPC_LOCK,
                Capability::CAP_SYS_RESOURCE,
                Capability::CAP_SYS_NICE,
                Capability::CAP_DAC_OVERRIDE,
            ],
            // Loop devices, or io_uring where it is not for everybody; folders may belong to others.
            Self::Uninstall(_) | Self::Inspect(_) => {
                &[Capability::CAP_SYS_ADMIN, Capability::CAP_DAC_OVERRIDE]
            }
        }
    }
}

/// How connections between processes are protected, and by whose certificates.
#[derive(Debug, Args)]
pub struct TlsOptions {
    #[command(flatten)]
    pub protection: Protection,
    /// With --tls-issuer: folder for key and certificate, a tmpfs.
    #[arg(long, default_value = "/run/holdfast/tls")]
    pub tls_state_dir: PathBuf,
    /// With --tls-issuer: who signs. For another one than the built-in issuer the controller only approves requests, and the
    /// authority's certificate must be in the ConfigMap holdfast-ca.
    #[arg(long, default_value = certificates::OWN_SIGNER)]
    pub tls_signer: String,
    /// With --tls-issuer: how many seconds a certificate lives; it is renewed after two thirds. The same for all processes.
    #[arg(long, default_value_t = certificates::LIFE.as_secs(), value_parser = clap::value_parser!(u64).range(5..))]
    pub tls_life_s: u64,
}

/// How connections are protected: one of the three must be chosen. All fields are in one group of the command line.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
pub struct Protection {
    /// Folder with ca.pem, node.pem and node.key: mutual TLS 1.3 on every connection. A node's certificate carries
    /// the node's name as DNS name, the controller's carries "holdfast-controller". Files that change are read again.
    #[arg(long)]
    pub tls_dir: Option<PathBuf>,
    /// Get the certificate, and each next one, from the issuer beside the controller: the same mutual TLS.
    #[arg(long, value_enum)]
    pub tls_issuer: Option<TlsIssuer>,
    /// Plain text, no checks: for tests and for networks that nobody else is on.
    #[arg(long)]
    pub insecure: bool,
}

/// Who gives certificates.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum TlsIssuer {
    /// The controller, through CertificateSigningRequests at the API server.
    Kubernetes,
}

/// Settings of the controller.
#[derive(Debug, Args)]
pub struct ControllerOptions {
    /// Unix socket of the CSI services.
    #[arg(long, default_value = "/run/holdfast/csi-controller.sock")]
    pub csi_socket: PathBuf,
    /// Where volume records are kept.
    #[arg(long, value_enum, default_value = "sled")]
    pub record_store: ControllerStore,
    /// Folder of the record store sled.
    #[arg(long, default_value = "/var/lib/holdfast/controller")]
    pub store_dir: PathBuf,
    /// Where the registry listens.
    #[arg(long, default_value = "0.0.0.0:9470")]
    pub registry_listen: SocketAddr,
    /// Replicas that are out of sync are replaced on other nodes once their own has been silent for so many seconds, at least
    /// 60; 0: never.
    #[arg(long, default_value_t = 1800, value_parser = parse_patience)]
    pub replace_after_s: u64,
    /// How much of each pool's capacity may be promised to volumes, which take space as they are written. Above 100 a pool
    /// may be full before its volumes are; writes fail then.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=1000))]
    pub overprovision_percent: u32,
    /// Replicas move, one at a time, from the fullest node to the emptiest one while they differ by more than so many percent of
    /// what they may promise, at least 5; 0: never.
    #[arg(long, default_value_t = 0, value_parser = parse_difference)]
    pub rebalance_above_percent: u32,
    /// With --tls-issuer: how many seconds an authority lives; its follower is made after two thirds.
    #[arg(long, default_value_t = certificates::AUTHORITY_LIFE.as_secs(), value_parser = clap::value_parser!(u64).range(60..))]
    pub tls_authority_life_s: u64,
    /// With --tls-issuer: how many seconds an authority is trusted before it signs; longer than any node may be without the API
    /// server.
    #[arg(long, default_value_t = certificates::AUTHORITY_OVERLAP.as_secs())]
    pub tls_authority_overlap_s: u64,
    #[command(flatten)]
    pub tls: TlsOptions,
}

/// Where a controller keeps volume records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum ControllerStore {
    /// In a folder of its own.
    Sled,
    /// At the API server that KUBECONFIG or the pod's service account leads to.
    Kubernetes,
}

/// Where a node finds volume records and the other nodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum NodeStore {
    /// At the controller's registry.
    Registry,
    /// At the API server that KUBECONFIG or the pod's service account leads to.
    Kubernetes,
}

/// How a node reaches volume records.
#[derive(Debug, Args)]
pub struct RegistryOptions {
    /// Where volume records are; the same for all processes of a cluster.
    #[arg(long, value_enum, default_value = "registry")]
    pub record_store: NodeStore,
    /// Registry of the controller, HOST:PORT; needed with --record-store registry.
    #[arg(long)]
    pub registry: Option<String>,
    /// DNS name that the registry's certificate must carry.
    #[arg(long, default_value = holdfast_service::tls::CONTROLLER_NAME)]
    pub registry_name: String,
}

/// What is said of a node; the same for its node service, which tells Kubernetes, and its data process, which tells the
/// controller.
#[derive(Debug, Args)]
pub struct PlaceOptions {
    /// Zone that the node stands in: a part of the cluster that may fail as one. Replicas of a volume are spread over zones.
    #[arg(long, value_parser = parse_zone)]
    pub zone: Option<String>,
    /// Most volumes that may be attached to the node at the same time; no limit where absent.
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..))]
    pub volumes_max: Option<u32>,
}

/// Settings of the node service.
#[derive(Debug, Args)]
pub struct NodeOptions {
    /// Unix socket of the CSI services.
    #[arg(long, default_value = "/run/holdfast/csi.sock")]
    pub csi_socket: PathBuf,
    /// This node's name.
    #[arg(long)]
    pub node: String,
    /// Unix socket of this node's data process.
    #[arg(long, default_value = "/run/holdfast/data.sock")]
    pub data_socket: PathBuf,
    /// Kubelet's folder; staging and target paths must lie below it.
    #[arg(long, default_value = "/var/lib/kubelet")]
    pub kubelet_dir: PathBuf,
    #[command(flatten)]
    pub place: PlaceOptions,
    #[command(flatten)]
    pub registry: RegistryOptions,
    #[command(flatten)]
    pub tls: TlsOptions,
}

/// Settings of the data process.
#[derive(Debug, Args)]
pub struct DataOptions {
    /// This node's name.
    #[arg(long)]
    pub node: String,
    /// Folder of this node's replicas.
    #[arg(long, default_value = "/var/lib/holdfast/pool")]
    pub pool_dir: PathBuf,
    /// Bytes that the pool may use; a number with or without Ki, Mi, Gi or Ti.
    #[arg(long, value_parser = parse_quantity)]
    pub pool_capacity: u64,
    /// Where the control services listen.
    #[arg(long, default_value = "0.0.0.0:9471", value_parser = parse_listen)]
    pub control_listen: SocketAddr,
    /// Where the NBD server listens.
    #[arg(long, default_value = "0.0.0.0:9472", value_parser = parse_listen)]
    pub nbd_listen: SocketAddr,
    /// Address that other nodes are told; needed where the listen addresses are wildcards.
    #[arg(long)]
    pub advertise_ip: Option<IpAddr>,
    /// Unix socket of the service for this node's CSI node process.
    #[arg(long, default_value = "/run/holdfast/data.sock")]
    pub data_socket: PathBuf,
    /// Folder of the continuity cookies; must be a tmpfs, so that a reboot empties it.
    #[arg(long, default_value = "/run/holdfast/cookies")]
    pub cookie_dir: PathBuf,
    /// Folder in which each attached volume is also served to local NBD clients as VOLUME_ID.sock, and this node's
    /// replicas, to be looked at, as replicas.sock.
    #[arg(long)]
    pub nbd_client_dir: Option<PathBuf>,
    /// Folder for the front ends' own mounts.
    #[arg(long, default_value = "/run/holdfast/front-ends")]
    pub run_dir: PathBuf,
    /// Only for an empty pool that is thrown away afterwards.
    #[arg(long, hide = true)]
    pub measure_without_checksums: bool,
    /// Class of the pool, such as "nvme": a StorageClass's poolClass has a volume's replicas on pools of that class only.
    #[arg(long, value_parser = parse_pool_class)]
    pub pool_class: Option<String>,
    /// How attached volumes become block devices.
    #[arg(long, value_enum, default_value = "fuse-loop")]
    pub front_end: FrontEnd,
    #[command(flatten)]
    pub place: PlaceOptions,
    #[command(flatten)]
    pub registry: RegistryOptions,
    #[command(flatten)]
    pub tls: TlsOptions,
}

/// How attached volumes become block devices.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub enum FrontEnd {
    /// A FUSE file with a loop device over it.
    FuseLoop,
    /// Not at all: local NBD clients only.
    None,
}

fn parse_patience(text: &str) -> Result<u64, String> {
    match text.parse() {
        Ok(seconds) if seconds == 0 || seconds >= 60 => Ok(seconds),
        _ => Err(format!("\"{text}\" is no number of seconds from 60 on, nor 0")),
    }
}

fn parse_difference(text: &str) -> Result<u32, String> {
    match text.parse() {
        Ok(percent) if percent == 0 || (5..=100).contains(&percent) => Ok(percent),
        _ => Err(format!("\"{text}\" is no number of percent from 5 to 100, nor 0")),
    }
}

fn parse_zone(text: &str) -> Result<String, String> {
    parse_label("zone", text)
}

fn parse_pool_class(text: &str) -> Result<String, String> {
    parse_label("pool class", text)
}

fn parse_label(what: &str, text: &str) -> Result<String, String> {
    if is_topology_value(text) {
        return Ok(text.to_owned());
    }
    Err(format!("\"{text}\" is no {what}: letters, digits, \"-\", \"_\" and \".\", at most 63 of them"))
}

/// Also an IPv6 address without brackets: a manifest writes `$(NODE_IP):9471` and does not know which one it gets.
fn parse_listen(text: &str) -> Result<SocketAddr, String> {
    let bare = || {
        let (ip, port) = text.rsplit_once(':')?;
        Some(SocketAddr::new(ip.parse().ok()?, port.parse().ok()?))
    };
    text.parse().ok().or_else(bare).ok_or_else(|| format!("\"{text}\" is no address and port"))
}

fn parse_quantity(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let shift = match text.get(digits.len()..) {
        Some("") => 0,
        Some("Ki") => 10,
        Some("Mi") => 20,
        Some("Gi") => 30,
        Some("Ti") => 40,
        _ => return Err(format!("\"{text}\" is no size: a number, alone or with Ki, Mi, Gi or Ti")),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("\"{text}\" is no size: \"{digits}\" is no whole number"))?;
    number.checked_mul(1 << shift).ok_or_else(|| format!("\"{text}\" is too large"))
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_well_formed() {
        Options::command().debug_assert();
    }

    /// A flag that is renamed here and not there would be found on a cluster only.
    #[test]
    fn the_manifests_use_flags_that_exist() {
        let manifests = concat!(env!("CARGO_MANIFEST_DIR"), "/../manifests/base/storage");
        let mut roles = Vec::new();
        for entry in std::fs::read_dir(manifests).unwrap() {
            let text = std::fs::read_to_string(entry.unwrap().path()).unwrap();
            for document in serde_norway::Deserializer::from_str(&text) {
                let document: serde_json::Value = serde::Deserialize::deserialize(document).unwrap();
                let containers = document["spec"]["template"]["spec"]["containers"].as_array();
                for container in containers.into_iter().flatten() {
                    if container["command"][0] != "holdfast-csi" {
                        continue;
                    }
                    let texts =
                        container["args"].as_array().unwrap().iter().filter_map(serde_json::Value::as_str);
                    let texts: Vec<&str> = texts.collect();
                    for ip in ["192.0.2.1", "fd00::1"] {
                        let filled = texts
                            .iter()
                            .map(|text| text.replace("$(NODE_NAME)", "node-a").replace("$(NODE_IP)", ip));
                        let line = std::iter::once("holdfast-csi".to_owned()).chain(filled);
                        let options = Options::try_parse_from(line)
                            .unwrap_or_else(|e| panic!("{}: {e}", container["name"]));
                        roles.push(options.role.name());
                    }
                }
            }
        }
        roles.sort_unstable();
        roles.dedup();
        assert_eq!(roles, ["controller", "data", "node"]);
    }

    #[test]
    fn addresses_to_listen_on_are_of_either_family() {
        for (text, address) in [
            ("192.0.2.1:9471", "192.0.2.1:9471"),
            ("[fd00::1]:9471", "[fd00::1]:9471"),
            ("fd00::1:9471", "[fd00::1]:9471"),
        ] {
            assert_eq!(parse_listen(text), Ok(address.parse().unwrap()));
        }
        for bad in ["", "9471", "192.0.2.1", ":9471", "::1", "node-a:9471", "192.0.2.1:66000"] {
            assert!(parse_listen(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_bytes_or_binary_multiples() {
        for (text, bytes) in [("4096", 4096), ("1Ki", 1024), ("100Gi", 100 << 30), ("2Ti", 2 << 40)] {
            assert_eq!(parse_quantity(text), Ok(bytes));
        }
        for text in ["", "Gi", "-1", "1G", "1.5Gi", "99999999999Ti"] {
            assert!(parse_quantity(text).is_err(), "{text}");
        }
    }

    #[test]
    fn a_zone_is_the_value_of_a_label_and_limits_are_at_least_one() {
        let node = |tail: &[&str]| {
            Options::try_parse_from([&["holdfast-csi", "node", "--node=a", "--insecure"], tail].concat())
        };
        assert!(node(&["--zone=zone-1.a_B", "--volumes-max=1"]).is_ok());
        for bad in ["--zone=", "--zone=a/b", "--zone=-a", "--volumes-max=0"] {
            assert!(node(&[bad]).is_err(), "{bad}");
        }
    }

    #[test]
    fn plain_text_must_be_asked_for() {
        let controller =
            |tail: &[&str]| Options::try_parse_from([&["holdfast-csi", "controller"], tail].concat());
        assert!(controller(&[]).is_err());
        assert!(controller(&["--insecure", "--tls-dir=/x"]).is_err());
        assert!(controller(&["--insecure", "--tls-issuer=kubernetes"]).is_err());
        assert!(controller(&["--tls-issuer=kubernetes", "--tls-life-s=60"]).is_ok());
        assert!(controller(&["--tls-life-s=60"]).is_err());
        assert!(controller(&["--insecure"]).is_ok());
        assert!(controller(&["--insecure", "--replace-after-s=0"]).is_ok());
        assert!(controller(&["--insecure", "--replace-after-s=59"]).is_err());
    }
}
