//! What containerd, kubelet and kube-proxy are told.

use std::fmt::Write as _;
use std::net::Ipv4Addr;
use std::path::Path;

use super::control_plane::{NodeKubeconfigs, POD_RANGE};
use super::pod_images::PAUSE_IMAGE;

/// containerd's socket, inside a node.
pub const CONTAINERD_SOCKET: &str = "/run/containerd/containerd.sock";
/// What kubelet writes to the machine's kernel unless it is there already: a node has files with these in their place.
pub const KERNEL_SETTINGS: [(&str, &str); 6] = [
    ("vm/overcommit_memory", "1"),
    ("vm/panic_on_oom", "0"),
    ("kernel/panic", "10"),
    ("kernel/panic_on_oops", "1"),
    ("kernel/keys/root_maxkeys", "1000000"),
    ("kernel/keys/root_maxbytes", "25000000"),
];

/// Machines of tests have no CAP_SYS_RESOURCE, no AppArmor and control groups of version 1.
pub fn containerd() -> String {
    format!(
        r#"version = 3
root = "/var/lib/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.blockfile", "io.containerd.snapshotter.v1.erofs", "io.containerd.nri.v1.nri", "io.containerd.internal.v1.tracing"]
[grpc]
  address = "{CONTAINERD_SOCKET}"
[plugins."io.containerd.cri.v1.images"]
  snapshotter = "overlayfs"
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = "{PAUSE_IMAGE}"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/opt/cni/bin"]
    conf_dir = "/etc/cni/net.d"
    use_internal_loopback = true
  [plugins."io.containerd.cri.v1.runtime".containerd]
    default_runtime_name = "runc"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
        SystemdCgroup = false
        NoNewKeyring = true
"#
    )
}

/// kubelet's file. A full disk or little memory of the machine is not the tests' subject: nothing is evicted early.
pub fn kubelet(ca: &Path) -> String {
    format!(
        "apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
authentication:
  anonymous: {{enabled: false}}
  webhook: {{enabled: false}}
  x509: {{clientCAFile: {}}}
authorization: {{mode: AlwaysAllow}}
containerRuntimeEndpoint: unix://{CONTAINERD_SOCKET}
cgroupDriver: cgroupfs
failCgroupV1: false
failSwapOn: false
volumePluginDir: /var/lib/kubelet/volume-plugins
readOnlyPort: 0
maxOpenFiles: 20000
oomScoreAdj: 0
enforceNodeAllocatable: []
evictionHard: {{memory.available: 50Mi, nodefs.available: 1%, nodefs.inodesFree: 1%, imagefs.available: 1%, imagefs.inodesFree: 1%}}
imageGCHighThresholdPercent: 100
imageGCLowThresholdPercent: 99
nodeStatusUpdateFrequency: 5s
nodeLeaseDurationSeconds: 20
syncFrequency: 10s
volumeStatsAggPeriod: 10s
shutdownGracePeriod: 0s
",
        ca.display()
    )
}

/// kubelet's command line.
pub fn kubelet_arguments(
    name: &str,
    address: Ipv4Addr,
    config: &Path,
    kubeconfigs: &NodeKubeconfigs,
) -> Vec<String> {
    vec![
        format!("--config={}", config.display()),
        format!("--kubeconfig={}", kubeconfigs.kubelet.display()),
        format!("--hostname-override={name}"),
        format!("--node-ip={address}"),
        // As docs/operations.md says, so that no pod comes before the network.
        "--register-with-taints=network.holdfast.dev/not-ready=:NoSchedule".to_owned(),
    ]
}

/// kube-proxy's command line.
pub fn proxy_arguments(name: &str, kubeconfigs: &NodeKubeconfigs) -> Vec<String> {
    vec![
        format!("--kubeconfig={}", kubeconfigs.proxy.display()),
        format!("--hostname-override={name}"),
        format!("--cluster-cidr={POD_RANGE}"),
        "--proxy-mode=nftables".to_owned(),
        // Limits of connection tracking are the machine's, not a namespace's.
        "--conntrack-max-per-core=0".to_owned(),
        "--conntrack-tcp-timeout-established=0s".to_owned(),
        "--conntrack-tcp-timeout-close-wait=0s".to_owned(),
    ]
}

/// Puts files in the place of those settings; the first argument is a folder for them.
pub fn kernel_settings_script() -> String {
    let mut script = String::new();
    for (path, value) in KERNEL_SETTINGS {
        let name = path.replace('/', "-");
        let _ =
            writeln!(script, "echo {value} >\"$1/{name}\" && mount --bind \"$1/{name}\" /proc/sys/{path}");
    }
    script
}
