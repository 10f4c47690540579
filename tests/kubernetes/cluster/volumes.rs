//! What people do with claims: snapshot, restore, clone, growth in use, raw block, another class of attributes.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_tests::go_tools::{self, Skip};
use holdfast_tests::k8s::{KubeCluster, SHELL_IMAGE, SNAPSHOT_CONTROLLER_IMAGE, Tools, has_condition};
use libtest_mimic::Trial;

use super::ready::repository;
use super::trial;

/// For each step: a volume is made, attached and mounted, or changed.
const STEP_TIMEOUT: Duration = Duration::from_secs(90);
const NAMESPACE: &str = "volumes";
/// Modules that have the definitions of snapshots, and their controller's rights.
const CLIENT_MODULE: &str = "github.com/kubernetes-csi/external-snapshotter/client/v8";
const CONTROLLER_MODULE: &str = "github.com/kubernetes-csi/external-snapshotter/v8";

pub fn trials(tools: &Result<Tools, Skip>) -> Vec<Trial> {
    vec![
        trial(tools, "snapshots_restore_and_clones_have_the_content_of_their_moment", snapshots),
        trial(tools, "a_volume_grows_and_takes_other_attributes_in_use", growth),
        trial(tools, "a_raw_block_volume_moves_with_its_content", raw_block),
    ]
}

/// Installs what a cluster with snapshots has before any driver comes.
pub fn install_snapshot_controller(cluster: &KubeCluster) -> Result<()> {
    let module = |name: &str| go_tools::pod_module(name)?.map_err(|skip| anyhow::anyhow!(skip.0));
    let definitions = module(CLIENT_MODULE)?.join("config/crd");
    cluster.kubectl(&["apply", "-k", &definitions.display().to_string()])?;
    let deploy = module(CONTROLLER_MODULE)?.join("deploy/kubernetes/snapshot-controller");
    cluster.kubectl(&["apply", "-f", &deploy.join("rbac-snapshot-controller.yaml").display().to_string()])?;
    cluster.apply(&format!(
        "apiVersion: apps/v1
kind: Deployment
metadata: {{name: snapshot-controller, namespace: kube-system}}
spec:
  selector: {{matchLabels: {{app: snapshot-controller}}}}
  template:
    metadata: {{labels: {{app: snapshot-controller}}}}
    spec:
      serviceAccountName: snapshot-controller
      containers:
        - {{name: controller, image: '{SNAPSHOT_CONTROLLER_IMAGE}', imagePullPolicy: Never, args: [--leader-election=false]}}
"
    ))?;
    Ok(())
}

fn snapshots(cluster: &mut KubeCluster) -> Result<()> {
    take_snapshot(cluster)?;
    restore_snapshot(cluster)
}

/// A volume with a snapshot, and written to since; no pod uses it.
pub fn take_snapshot(cluster: &KubeCluster) -> Result<()> {
    // Its class needs the definitions, so it is applied after them.
    let class = repository().join("manifests/snapshots");
    cluster.kubectl(&["apply", "-k", &class.display().to_string()])?;
    begin(cluster)?;
    cluster.apply(&(mk_claim("source", "64Mi", "") + &mk_pod("writer", "source", "")))?;
    ready(cluster, "writer")?;
    write(cluster, "writer", "before")?;
    cluster.apply(&format!(
        "apiVersion: snapshot.storage.k8s.io/v1
kind: VolumeSnapshot
metadata: {{name: moment, namespace: {NAMESPACE}}}
spec:
  volumeSnapshotClassName: holdfast
  source: {{persistentVolumeClaimName: source}}
"
    ))?;
    cluster.wait("the snapshot is ready", STEP_TIMEOUT, || {
        Ok(cluster.get(&["volumesnapshot", "-n", NAMESPACE, "moment"])?["status"]["readyToUse"] == true)
    })?;
    write(cluster, "writer", "after")?;
    cluster.kubectl(&["delete", "pod", "-n", NAMESPACE, "writer", "--wait=true", "--timeout=60s"]).map(drop)
}

/// Snapshot, clone and the volume itself have what they had; then all of it is removed.
pub fn restore_snapshot(cluster: &KubeCluster) -> Result<()> {
    let restored = "dataSource: {apiGroup: snapshot.storage.k8s.io, kind: VolumeSnapshot, name: moment}";
    let cloned = "dataSource: {kind: PersistentVolumeClaim, name: source}";
    cluster.apply(&mk_pod("writer", "source", ""))?;
    cluster.apply(&(mk_claim("restored", "64Mi", restored) + &mk_pod("reader", "restored", "")))?;
    cluster.apply(&(mk_claim("cloned", "64Mi", cloned) + &mk_pod("twin", "cloned", "")))?;
    for (pod, wanted) in [("reader", "before"), ("twin", "after"), ("writer", "after")] {
        ready(cluster, pod)?;
        let content = in_pod(cluster, pod, "cat /data/word")?;
        ensure!(content.trim() == wanted, "{pod} reads {content}, not {wanted}");
    }
    cluster.kubectl(&["delete", "volumesnapshot", "-n", NAMESPACE, "moment", "--timeout=60s"])?;
    finish(cluster)
}

fn growth(cluster: &mut KubeCluster) -> Result<()> {
    begin(cluster)?;
    cluster.apply(
        "apiVersion: storage.k8s.io/v1
kind: VolumeAttributesClass
metadata: {name: slow}
driverName: csi.holdfast.dev
parameters: {iopsLimit: '777'}
",
    )?;
    // A mounted ext4 grows only where the node service has CAP_SYS_RESOURCE, which machines of tests do not give.
    let claim = mk_claim("growing", "320Mi", "").replace(": holdfast\n", ": holdfast-xfs\n");
    cluster.apply(&(claim + &mk_pod("user", "growing", "")))?;
    ready(cluster, "user")?;
    let size = || -> Result<u64> {
        let shown = in_pod(cluster, "user", "df -k /data | tail -1")?;
        Ok(shown.split_whitespace().nth(1).context("a size")?.parse()?)
    };
    let before = size()?;
    patch(cluster, "growing", r#"{"spec":{"resources":{"requests":{"storage":"448Mi"}}}}"#)?;
    cluster.wait("the file system has grown", STEP_TIMEOUT, || Ok(size()? > before + 100 * 1024))?;
    let claim = cluster.get(&["pvc", "-n", NAMESPACE, "growing"])?;
    ensure!(claim["status"]["capacity"]["storage"] == "448Mi", "the claim says {}", claim["status"]);
    patch(cluster, "growing", r#"{"spec":{"volumeAttributesClassName":"slow"}}"#)?;
    cluster.wait("the claim has the class", STEP_TIMEOUT, || {
        let claim = cluster.get(&["pvc", "-n", NAMESPACE, "growing"])?;
        Ok(claim["status"]["currentVolumeAttributesClassName"] == "slow")
    })?;
    let records = cluster.get(&["volumerecords.storage.holdfast.dev"])?.to_string();
    ensure!(records.contains("777"), "no record has the limit: {records}");
    cluster.kubectl(&["delete", "pod", "-n", NAMESPACE, "user", "--wait=true"])?;
    finish(cluster)?;
    cluster.kubectl(&["delete", "volumeattributesclass", "slow"]).map(drop)
}

fn raw_block(cluster: &mut KubeCluster) -> Result<()> {
    begin(cluster)?;
    cluster.apply(&(mk_claim("raw", "32Mi", "volumeMode: Block") + &mk_raw_pod("first", "node-a")))?;
    ready(cluster, "first")?;
    // Written to the device and read from it, not from a cache.
    in_pod(
        cluster,
        "first",
        "yes holdfast | dd of=/dev/volume bs=4096 count=1024 iflag=fullblock conv=fsync 2>/dev/null",
    )?;
    let sum = "dd if=/dev/volume bs=4096 count=1024 2>/dev/null | md5sum";
    let written = in_pod(cluster, "first", sum)?;
    // Beside the writer, on its node.
    let reader = mk_raw_pod("reader", "node-a");
    cluster.apply(&reader.replace("claimName: raw}", "claimName: raw, readOnly: true}"))?;
    ready(cluster, "reader")?;
    let read = in_pod(cluster, "reader", sum)?;
    ensure!(read == written, "{read} is not {written}, read beside the writer");
    let overwrite = "yes other | dd of=/dev/volume bs=4096 count=1 iflag=fullblock conv=notrunc,fsync";
    ensure!(in_pod(cluster, "reader", overwrite).is_err(), "a pod that only reads has written");
    cluster.kubectl(&[
        "delete",
        "pod",
        "-n",
        NAMESPACE,
        "first",
        "reader",
        "--wait=true",
        "--timeout=60s",
    ])?;
    cluster.apply(&mk_raw_pod("second", "node-b"))?;
    ready(cluster, "second")?;
    let read = in_pod(cluster, "second", sum)?;
    ensure!(read == written, "{read} is not {written}");
    finish(cluster)
}

fn begin(cluster: &KubeCluster) -> Result<()> {
    cluster.apply(&format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n")).map(drop)
}

/// Removes what a trial made; nothing of it may stay.
fn finish(cluster: &KubeCluster) -> Result<()> {
    cluster.kubectl(&["delete", "namespace", NAMESPACE, "--wait=true", "--timeout=120s"])?;
    cluster.wait("its volumes are gone", STEP_TIMEOUT, || {
        let left = cluster.kubectl(&[
            "get",
            "persistentvolumes,volumes.storage.holdfast.dev,volumerecords.storage.holdfast.dev",
            "-o",
            "name",
        ])?;
        ensure!(left.trim().is_empty(), "{left}");
        Ok(true)
    })
}

fn ready(cluster: &KubeCluster, pod: &str) -> Result<()> {
    cluster.wait(&format!("{pod} runs"), STEP_TIMEOUT, || {
        Ok(has_condition(&cluster.get(&["pod", "-n", NAMESPACE, pod])?, "Ready"))
    })
}

fn in_pod(cluster: &KubeCluster, pod: &str, script: &str) -> Result<String> {
    cluster.exec(&format!("{NAMESPACE}/{pod}"), &["sh", "-c", script])
}

fn write(cluster: &KubeCluster, pod: &str, word: &str) -> Result<()> {
    in_pod(cluster, pod, &format!("echo {word} > /data/word && sync")).map(drop)
}

fn patch(cluster: &KubeCluster, claim: &str, change: &str) -> Result<()> {
    cluster.kubectl(&["patch", "pvc", "-n", NAMESPACE, claim, "--type=merge", "-p", change]).map(drop)
}

fn mk_claim(name: &str, size: &str, more: &str) -> String {
    format!(
        "apiVersion: v1
kind: PersistentVolumeClaim
metadata: {{name: {name}, namespace: {NAMESPACE}}}
spec:
  accessModes: [ReadWriteOnce]
  storageClassName: holdfast
  resources: {{requests: {{storage: {size}}}}}
  {more}
---
"
    )
}

fn mk_pod(name: &str, claim: &str, more: &str) -> String {
    format!(
        "apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {NAMESPACE}}}
spec:
  {more}
  terminationGracePeriodSeconds: 0
  containers:
    - name: shell
      image: {SHELL_IMAGE}
      imagePullPolicy: Never
      command: [sleep, '100000']
      volumeMounts: [{{name: data, mountPath: /data}}]
  volumes: [{{name: data, persistentVolumeClaim: {{claimName: {claim}}}}}]
---
"
    )
}

fn mk_raw_pod(name: &str, node: &str) -> String {
    let pod = mk_pod(name, "raw", &format!("nodeSelector: {{kubernetes.io/hostname: {node}}}"));
    pod.replace(
        "volumeMounts: [{name: data, mountPath: /data}]",
        "volumeDevices: [{name: data, devicePath: /dev/volume}]",
    )
}
