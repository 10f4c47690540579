//! An encrypted volume through its life: what a pod wrote is read back on another node, after growth and from a snapshot; a
//! wrong secret opens nothing; and nothing of it, nor of the secret, is found in any file that a node or the controller keeps.
//! The same search finds it where the volume is not encrypted.

use std::collections::HashMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use holdfast_proto::csi;
use holdfast_tests::cleanup::Logs;
use holdfast_tests::csi::create_request;
use holdfast_tests::{Cluster, ClusterOptions};
use libtest_mimic::Trial;
use tonic::Code;

use crate::csi_volume::{Volume, delete_snapshot, from_snapshot, fs_bytes, get, put};
use crate::trial;

const MIB: u64 = 1 << 20;
const VOLUME_BYTES: u64 = 64 * MIB;
const GROWN_BYTES: u64 = 96 * MIB;
const SECRET: &str = "a passphrase for one volume";
/// Nothing else on the machine has these bytes.
const MARK: &[u8; 48] = b"what a pod wrote on its volume, and nobody else.";

/// Trials of this file.
pub fn trials() -> Vec<Trial> {
    vec![trial("an_encrypted_volume_is_read_with_its_secret_only_and_nothing_of_it_is_on_any_disk", || {
        let options = ClusterOptions { kind: "encryption".to_owned(), ..ClusterOptions::default() };
        let cluster = Cluster::start(&options)?;
        let outcome = whole(&cluster);
        let ended = cluster.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep });
        outcome.and(ended)
    })]
}

fn whole(cluster: &Cluster) -> Result<()> {
    let encrypted = live(cluster, "aes-xts").context("encrypted")?;
    ensure!(encrypted.is_empty(), "plaintext of an encrypted volume is on {encrypted:?}");
    let plain = live(cluster, "none").context("not encrypted")?;
    ensure!(plain.len() == 3, "the search finds plaintext on {plain:?} only: it proves nothing");
    let logs = files_with(cluster.work().dir(), SECRET.as_bytes())?;
    ensure!(logs.is_empty(), "the secret is in {logs:?}");
    Ok(())
}

/// A volume's life; gives the nodes that have what was written in a file of theirs.
fn live(cluster: &Cluster, encryption: &str) -> Result<Vec<String>> {
    let name = format!("life-{encryption}");
    let mut volume =
        Volume::create(cluster, with(create_request(&name, VOLUME_BYTES as i64, 3, "ext4"), encryption))?;
    volume.secrets = secret(SECRET);
    if encryption != "none" {
        // Nobody has bound it to a secret yet; one that is missing or too short does not.
        refused(cluster, &mut volume, "node-a", HashMap::new(), "secrets[encryption-passphrase] is missing")?;
        refused(cluster, &mut volume, "node-a", secret("short"), "it has 5 bytes")?;
    }
    let first = content(1);
    let root = volume.stage(cluster, "node-a")?;
    put(&root, "first", &first)?;
    let snapshot = volume.snapshot(cluster, &format!("{name}-snapshot"))?;
    put(&root, "second", &content(2))?;
    volume.unstage(cluster, "node-a")?;
    if encryption != "none" {
        refused(
            cluster,
            &mut volume,
            "node-b",
            secret("another passphrase"),
            "first staged with another one",
        )?;
        refused(cluster, &mut volume, "node-b", HashMap::new(), "is missing")?;
    }

    let root = volume.stage(cluster, "node-b")?;
    ensure!(get(&root, "first")? == first && get(&root, "second")? == content(2), "read on node-b");
    volume.expand(cluster, GROWN_BYTES)?;
    volume.unstage(cluster, "node-b")?;
    // The stage grows the file system, as the nodes here may not grow a mounted one.
    let root = volume.stage(cluster, "node-a")?;
    ensure!(fs_bytes(&root)? > VOLUME_BYTES, "the file system did not grow");
    for number in 3..40 {
        put(&root, &format!("file-{number}"), &content(number))?;
    }
    volume.unstage(cluster, "node-a")?;
    let root = volume.stage(cluster, "node-c")?;
    for number in 3..40 {
        ensure!(get(&root, &format!("file-{number}"))? == content(number), "file {number} on the grown part");
    }
    volume.unstage(cluster, "node-c")?;

    let found = nodes_with_mark(cluster)?;
    clone(cluster, encryption, &snapshot, &first)?;
    delete_snapshot(cluster, &snapshot)?;
    volume.delete(cluster)?;
    Ok(found)
}

fn clone(cluster: &Cluster, encryption: &str, snapshot: &str, first: &[u8]) -> Result<()> {
    let other = if encryption == "none" { "aes-xts" } else { "none" };
    let request =
        |name: &str, encryption| with(from_snapshot(name, VOLUME_BYTES, "ext4", snapshot), encryption);
    let wrong = Volume::create(cluster, request(&format!("{other}-of-{encryption}"), other)).err();
    let sentence = wrong.map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(sentence.contains("contradicts the source"), "a clone with encryption {other}: {sentence}");
    let mut clone = Volume::create(cluster, request(&format!("clone-{encryption}"), encryption))?;
    if encryption != "none" {
        refused(
            cluster,
            &mut clone,
            "node-c",
            secret("another passphrase"),
            "first staged with another one",
        )?;
    }
    clone.secrets = secret(SECRET);
    let root = clone.stage(cluster, "node-c")?;
    ensure!(get(&root, "first")? == first, "the clone does not read as the snapshot");
    ensure!(!root.join("second").exists(), "the clone has what was written after the snapshot");
    clone.unstage(cluster, "node-c")?;
    clone.delete(cluster)
}

/// A stage with these secrets is refused, and neither target nor device is left.
fn refused(
    cluster: &Cluster,
    volume: &mut Volume,
    node: &str,
    secrets: HashMap<String, String>,
    why: &str,
) -> Result<()> {
    let right = std::mem::replace(&mut volume.secrets, secrets);
    let sentence = volume.stage(cluster, node).err().map(|error| format!("{error:#}")).unwrap_or_default();
    ensure!(sentence.contains(why), "a stage that must be refused, {why}: {sentence}");
    let left = cluster.node(node).data_socket.volume_status(&volume.id);
    ensure!(left.as_ref().is_err_and(|status| status.code() == Code::NotFound), "a target is left: {left:?}");
    volume.secrets = right;
    volume.unstage(cluster, node)
}

fn with(mut request: csi::CreateVolumeRequest, encryption: &str) -> csi::CreateVolumeRequest {
    request.parameters.insert("encryption".to_owned(), encryption.to_owned());
    request
}

fn secret(text: &str) -> HashMap<String, String> {
    HashMap::from([("encryption-passphrase".to_owned(), text.to_owned())])
}

/// A MiB in which every block has the mark, with a number.
fn content(number: u8) -> Vec<u8> {
    let mut unit = MARK.to_vec();
    unit.extend([number; 16]);
    unit.repeat(MIB as usize / unit.len())
}

fn nodes_with_mark(cluster: &Cluster) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for node in &cluster.nodes {
        if !files_with(&node.pool_dir(), MARK)?.is_empty() {
            found.push(node.name.clone());
        }
    }
    Ok(found)
}

/// The files below a folder that have these bytes.
fn files_with(folder: &Path, bytes: &[u8]) -> Result<Vec<String>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).with_context(|| folder.display().to_string())? {
        let (path, kind) = entry.and_then(|entry| Ok((entry.path(), entry.file_type()?)))?;
        if kind.is_dir() {
            found.extend(files_with(&path, bytes)?);
        } else if kind.is_file() {
            let content = std::fs::read(&path).with_context(|| path.display().to_string())?;
            if content.windows(bytes.len()).any(|part| part == bytes) {
                found.push(path.display().to_string());
            }
        }
    }
    Ok(found)
}
