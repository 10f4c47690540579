//! etcd, API server, controllers and scheduler, in a network of their own where the underlay's bridge is.

use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

use super::{NODES, Tools};
use crate::api_server::{ADMIN, ApiServer, Place, User};
use crate::certs::Authority;
use crate::cluster::UNDERLAY_MAC;
use crate::namespaces::Namespaces;
use crate::process::{Program, ProgramSpec, maker, process_start_time, run};
use crate::work::{HolderState, Work};

/// Addresses of pods.
pub const POD_RANGE: &str = "10.244.0.0/16";
/// Addresses of Services.
pub const SERVICE_RANGE: &str = "10.96.0.0/16";
/// The first of them: the API server as pods see it.
const API_SERVICE: &str = "10.96.0.1";
/// The control plane on the underlay.
pub const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
/// A node without a sign of life is not ready after this; kubelets give one every quarter of it.
const NODE_GRACE: &str = "20s";

const CONTROLLERS: &str = "system:kube-controller-manager";
const SCHEDULER: &str = "system:kube-scheduler";
const PROXY: &str = "system:kube-proxy";

/// The control plane.
pub struct ControlPlane {
    /// Its namespaces.
    pub spaces: Namespaces,
    api: ApiServer,
    programs: [Program; 2],
}

/// What a node signs in with.
pub struct NodeKubeconfigs {
    /// kubelet's.
    pub kubelet: PathBuf,
    /// kube-proxy's.
    pub proxy: PathBuf,
}

impl ControlPlane {
    /// Starts it and waits until the API server is ready.
    ///
    /// # Errors
    /// Something does not start.
    pub fn start(work: &Work, tools: &Tools, authority: &Authority) -> Result<Self> {
        let spaces = Namespaces::create("control", work)?;
        let address = format!("{ADDRESS}/24");
        let bridge: [&[&str]; 3] = [
            &["link", "add", "underlay", "address", UNDERLAY_MAC, "type", "bridge"],
            &["addr", "add", &address, "dev", "underlay"],
            &["link", "set", "underlay", "up"],
        ];
        for arguments in bridge {
            run(spaces.network_command("ip").args(arguments))?;
        }
        let client = work.dir().join("tls/api-server");
        authority.issue("kube-apiserver", &client)?;
        let place = Place {
            spaces: &spaces,
            address: ADDRESS,
            dir: work.dir(),
            authority,
            more_names: &[API_SERVICE, "kubernetes.default.svc"],
            arguments: server_arguments(&client),
        };
        let api = ApiServer::start_in(place, &users())?.map_err(|skip| anyhow::anyhow!(skip.0))?;
        remember(work, &api)?;
        let start = |name: &str, user: &str, more: Vec<String>| -> Result<Program> {
            let kubeconfig = api.kubeconfig(user, None)?;
            let arguments = [common_arguments(&kubeconfig), more].concat();
            let command = maker(&spaces.command(tools.kubernetes.join(name)), arguments);
            let log = work.folder("logs")?.join(format!("{name}.log"));
            Program::start(ProgramSpec { name: name.to_owned(), log, command })
        };
        let controllers = start("kube-controller-manager", CONTROLLERS, controller_arguments(&api))?;
        let scheduler = start("kube-scheduler", SCHEDULER, Vec::new())?;
        Ok(Self { spaces, api, programs: [controllers, scheduler] })
    }

    /// `kill -9` of a part, such as `kube-scheduler`, and its start. etcd stays.
    ///
    /// # Errors
    /// There is no such part, or it does not end or start.
    pub fn restart(&mut self, part: &str, work: &Work) -> Result<()> {
        if part == "kube-apiserver" {
            self.api.kill()?;
            self.api.start_again()?;
            return remember(work, &self.api);
        }
        let found = self.programs.iter_mut().find(|program| program.name() == part);
        let program = found.with_context(|| format!("there is no {part}"))?;
        program.kill()?;
        program.start_again()
    }

    /// The administrator's.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn admin_kubeconfig(&self) -> Result<PathBuf> {
        self.api.kubeconfig(ADMIN, None)
    }

    /// A node's.
    ///
    /// # Errors
    /// A file cannot be written.
    pub fn node_kubeconfigs(&self, node: &str) -> Result<NodeKubeconfigs> {
        let kubelet = self.api.kubeconfig(&format!("system:node:{node}"), None).context("kubelet's")?;
        Ok(NodeKubeconfigs { kubelet, proxy: self.api.kubeconfig(PROXY, None)? })
    }
}

/// They are in no PID namespace of ours, so whoever ends the run must know them by their numbers.
fn remember(work: &Work, api: &ApiServer) -> Result<()> {
    for process in api.processes() {
        let pid = process.cast_signed();
        let name = format!("process {pid} of the API server");
        let start_time = process_start_time(pid)?;
        let none = u64::MAX;
        let holder = HolderState { name, pid, start_time, pid_namespace: none, net_namespace: none };
        work.change_state(|state| state.holders.push(holder))?;
    }
    Ok(())
}

fn users() -> Vec<User> {
    let user = |name: &str, groups: &[&str]| User {
        name: name.to_owned(),
        groups: groups.iter().map(|group| (*group).to_owned()).collect(),
    };
    let nodes = NODES.iter().map(|node| user(&format!("system:node:{node}"), &["system:nodes"]));
    [user(CONTROLLERS, &[]), user(SCHEDULER, &[]), user(PROXY, &[])].into_iter().chain(nodes).collect()
}

fn server_arguments(client: &Path) -> Vec<String> {
    let file = |flag: &str, name: &str| format!("--{flag}={}", client.join(name).display());
    vec![
        format!("--service-cluster-ip-range={SERVICE_RANGE}"),
        format!("--advertise-address={ADDRESS}"),
        "--kubelet-preferred-address-types=InternalIP".to_owned(),
        file("kubelet-client-certificate", "node.pem"),
        file("kubelet-client-key", "node.key"),
    ]
}

fn common_arguments(kubeconfig: &Path) -> Vec<String> {
    let mut arguments = vec!["--leader-elect=false".to_owned(), "--bind-address=127.0.0.1".to_owned()];
    for flag in ["kubeconfig", "authentication-kubeconfig", "authorization-kubeconfig"] {
        arguments.push(format!("--{flag}={}", kubeconfig.display()));
    }
    arguments
}

fn controller_arguments(api: &ApiServer) -> Vec<String> {
    vec![
        "--use-service-account-credentials=true".to_owned(),
        format!("--service-account-private-key-file={}", api.service_account_key().display()),
        format!("--root-ca-file={}", api.ca_file().display()),
        "--allocate-node-cidrs=true".to_owned(),
        format!("--cluster-cidr={POD_RANGE}"),
        format!("--service-cluster-ip-range={SERVICE_RANGE}"),
        format!("--node-monitor-grace-period={NODE_GRACE}"),
    ]
}
