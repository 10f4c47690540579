//! Bad input through the real interfaces: the specification's code, a sentence with the cause, nothing changed.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_proto::csi;
use holdfast_tests::cleanup::Logs;
use holdfast_tests::cluster::NETD_SOCKET;
use holdfast_tests::cni::{self, Answer, Call};
use holdfast_tests::csi::create_request;
use holdfast_tests::pod::{self, Pod, PodSpec};
use holdfast_tests::{Cluster, ClusterOptions, process};
use libtest_mimic::Trial;
use tonic::{Code, Status};

use crate::trial;

const MIB: i64 = 1 << 20;
/// Pod addresses of a /29 without network, broadcast and the node's own are at most this many.
const SMALL_RANGE_MAX: usize = 8;

/// Between two counts of its files, 2 s apart, a pool estimates what it fills.
const COUNTED_ANEW: Duration = Duration::from_secs(5);

type Check = fn(&Cluster) -> Result<()>;

/// Trials of this file; all on one cluster, so they are one trial with one cluster and several checks.
pub fn trials() -> Vec<Trial> {
    vec![trial("bad_input_is_refused_with_its_cause_and_changes_nothing", bad_input)]
}

fn bad_input() -> Result<()> {
    let options = ClusterOptions {
        kind: "bad-input".to_owned(),
        nodes: vec!["node-a".to_owned()],
        pool_bytes: 256 << 20,
        pod_prefix: 29,
        ..ClusterOptions::default()
    };
    let cluster = Cluster::start(&options)?;
    let outcome = check_all(&cluster);
    cluster.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep })?;
    outcome
}

fn check_all(cluster: &Cluster) -> Result<()> {
    let checks: [(&str, Check); 7] = [
        ("malformed CNI JSON", malformed_cni_json),
        ("unknown cniVersion", unknown_cni_version),
        ("missing network namespace", missing_namespace),
        ("volumes that cannot be made", refused_volumes),
        ("name reused with another size", name_reused_with_another_size),
        ("store locked by another process", locked_store),
        ("address range used up", used_up_range),
    ];
    for (name, check) in checks {
        let before = picture(cluster)?;
        check(cluster).context(name)?;
        let mut after = picture(cluster)?;
        let _ = process::wait_until(COUNTED_ANEW, || {
            after = picture(cluster)?;
            Ok(before == after)
        });
        ensure!(before == after, "{name}: something changed:\n{before}\n--- became ---\n{after}");
    }
    Ok(())
}

/// Volumes, links and sandboxes: what bad input must not change.
fn picture(cluster: &Cluster) -> Result<String> {
    let request = csi::ListVolumesRequest::default();
    let volumes = cluster
        .controller
        .csi
        .controller(|mut client| async move { client.list_volumes(request).await })
        .map_err(|status| anyhow::anyhow!("ListVolumes: {status}"))?;
    let mut ids: Vec<String> =
        volumes.entries.into_iter().filter_map(|entry| Some(entry.volume?.volume_id)).collect();
    ids.sort();
    let node = &cluster.nodes[0].spaces;
    // Names only: a bridge is up while it has a port that is.
    let links = node.run("ip", &["-br", "link"])?;
    let links: Vec<&str> = links.lines().filter_map(|line| line.split_whitespace().next()).collect();
    let pool = cluster.largest_volume_bytes(1)?;
    Ok(format!("{ids:?}\n{pool} bytes free\n{links:?}"))
}

fn add(cluster: &Cluster, netns: &str, stdin: &str) -> Result<Answer> {
    let call = Call { command: "ADD", container_id: "bad-1", netns, ifname: "eth0", args: "" };
    cni::execute(&cluster.nodes[0].spaces, &call, stdin)
}

/// The answer is an error object of the specification with this code and a sentence that holds the word.
fn expect_error(answer: &Answer, code: u64, word: &str) -> Result<()> {
    let json = answer.json()?;
    ensure!(answer.error_code() == Some(code), "wanted code {code}, got {json}");
    let text = format!("{} {}", json["msg"].as_str().unwrap_or(""), json["details"].as_str().unwrap_or(""));
    ensure!(text.contains(word), "{text:?} does not name {word:?}");
    ensure!(json["cniVersion"].is_string(), "no cniVersion in {json}");
    Ok(())
}

fn malformed_cni_json(cluster: &Cluster) -> Result<()> {
    expect_error(&add(cluster, "/run/netns/none", "{\"cniVersion\": \"1.1.0\", \"name\"")?, 6, "")
}

fn unknown_cni_version(cluster: &Cluster) -> Result<()> {
    let mut config = cni::network_config(NETD_SOCKET, &pod::pending_dir(cluster, &cluster.nodes[0])?);
    config["cniVersion"] = "9.9.9".into();
    expect_error(&add(cluster, "/run/netns/none", &config.to_string())?, 1, "9.9.9")
}

fn missing_namespace(cluster: &Cluster) -> Result<()> {
    let config = cni::network_config(NETD_SOCKET, &pod::pending_dir(cluster, &cluster.nodes[0])?);
    expect_error(&add(cluster, "", &config.to_string())?, 4, "CNI_NETNS")?;
    expect_error(&add(cluster, "/run/netns/none", &config.to_string())?, 4, "CNI_NETNS")
}

fn create(cluster: &Cluster, request: csi::CreateVolumeRequest) -> Result<csi::CreateVolumeResponse, Status> {
    cluster.controller.csi.controller(|mut client| async move { client.create_volume(request).await })
}

fn expect_status<T>(outcome: Result<T, Status>, code: Code, word: &str) -> Result<()> {
    let status = outcome.err().context("it succeeded")?;
    ensure!(status.code() == code, "wanted {code:?}, got {:?}: {}", status.code(), status.message());
    ensure!(status.message().contains(word), "{:?} does not name {word:?}", status.message());
    Ok(())
}

fn refused_volumes(cluster: &Cluster) -> Result<()> {
    let zero = create_request("zero", 0, 1, "ext4");
    expect_status(create(cluster, zero), Code::InvalidArgument, "zero").context("a size of zero")?;
    let unknown = create_request("unknown-fs", 64 * MIB, 1, "ntfs");
    expect_status(create(cluster, unknown), Code::InvalidArgument, "ntfs").context("an unknown fsType")?;
    let large = create_request("large", 1024 * MIB, 1, "ext4");
    expect_status(create(cluster, large), Code::ResourceExhausted, "").context("a pool without space")?;
    let many = create_request("many", 64 * MIB, 3, "ext4");
    // A controller that has just started cannot know yet that no other node will announce itself.
    let mut outcome = create(cluster, many.clone());
    let _ = process::wait_until(Duration::from_secs(15), || {
        outcome = create(cluster, many.clone());
        Ok(!outcome.as_ref().is_err_and(|status| status.code() == Code::Unavailable))
    });
    expect_status(outcome, Code::ResourceExhausted, "node-a").context("fewer nodes than replicas")
}

fn name_reused_with_another_size(cluster: &Cluster) -> Result<()> {
    let volume = cluster.create_volume("reused", 64 * MIB, 1, "ext4")?;
    let again = cluster.create_volume("reused", 64 * MIB, 1, "ext4")?;
    ensure!(volume.volume_id == again.volume_id, "the same request made two volumes");
    let larger = create_request("reused", 128 * MIB, 1, "ext4");
    expect_status(create(cluster, larger), Code::AlreadyExists, "reused")?;
    let request = csi::DeleteVolumeRequest { volume_id: volume.volume_id, ..Default::default() };
    let delete = |request: csi::DeleteVolumeRequest| {
        cluster.controller.csi.controller(|mut client| async move { client.delete_volume(request).await })
    };
    delete(request.clone()).map_err(|status| anyhow::anyhow!("DeleteVolume: {status}"))?;
    delete(request).map_err(|status| anyhow::anyhow!("DeleteVolume again: {status}"))?;
    Ok(())
}

fn locked_store(cluster: &Cluster) -> Result<()> {
    let mut second = cluster.controller.second_command("/run/holdfast/second.sock", 9480)?;
    let outcome = process::run_within(Duration::from_secs(20), &mut second);
    let error = format!("{:#}", outcome.err().context("a second controller started on the same store")?);
    ensure!(error.contains("lock") || error.contains("another process"), "the cause is not named: {error}");
    Ok(())
}

fn used_up_range(cluster: &Cluster) -> Result<()> {
    let node = "node-a";
    let mut pods = Vec::new();
    let names: Vec<String> = (0..=SMALL_RANGE_MAX).map(|number| format!("filler-{number}")).collect();
    let mut refusal = None;
    for name in &names {
        match Pod::create(cluster, PodSpec { name, app: "filler", node }) {
            Ok(pod) => pods.push(pod),
            Err(error) => {
                refusal = Some((name.clone(), format!("{error:#}")));
                break;
            }
        }
    }
    let (name, sentence) = refusal.context("a /29 gave more addresses than it has")?;
    ensure!(sentence.contains("used up"), "the cause is not named: {sentence}");
    cluster.nodes[0].spaces.run("ip", &["netns", "delete", &format!("{name}-{node}")])?;
    cluster.objects.remove(&format!("pod-{}-{name}", pod::NAMESPACE))?;
    ensure!(pods.len() >= 4, "a /29 gave only {} addresses", pods.len());
    for pod in pods {
        pod.delete(cluster)?;
    }
    Ok(())
}
