//! Images of what pods run, under the names that the manifests give them.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};

use super::Tools;
use crate::images;

/// Image of every sandbox.
pub const PAUSE_IMAGE: &str = "holdfast.test/pause:1";
/// A shell, its tools and the ledger.
pub const SHELL_IMAGE: &str = "holdfast.test/shell:1";
/// What the examples for users run; the machine's own busybox under that name.
const EXAMPLES_IMAGE: &str = "docker.io/library/busybox:1.37";
/// What a cluster has whose storage can make snapshots; not part of any driver.
pub const SNAPSHOT_CONTROLLER_IMAGE: &str = "registry.k8s.io/sig-storage/snapshot-controller:v8.7.0";
/// Where the sidecars come from.
const SIDECARS: &str = "registry.k8s.io/sig-storage/";

/// Makes the images of the sidecars that the manifests name, of the sandboxes and of the tests' own pods.
///
/// # Errors
/// The manifests name a sidecar that is not built.
pub fn make(folder: &Path, tools: &Tools) -> Result<Vec<PathBuf>> {
    let pause = images::of_program(&folder.join("pause"), PAUSE_IMAGE, &tools.pods.join("pause"))?;
    let shell = images::of_busybox(&folder.join("shell"), SHELL_IMAGE, &[tools.pods.join("ledger")])?;
    let examples = images::of_busybox(&folder.join("examples"), EXAMPLES_IMAGE, &[])?;
    let mut made = vec![pause, shell, examples];
    for reference in sidecars()?.into_iter().chain([SNAPSHOT_CONTROLLER_IMAGE.to_owned()]) {
        let name = reference.strip_prefix(SIDECARS).and_then(|rest| rest.split(':').next());
        let name = name.with_context(|| format!("{reference} has no tag"))?;
        let program = tools.pods.join(name);
        ensure!(program.is_file(), "the manifests name {reference}, and {name} is not built");
        made.push(images::of_program(&folder.join(name), &reference, &program)?);
    }
    Ok(made)
}

/// References of sidecars in the manifests, each once.
fn sidecars() -> Result<Vec<String>> {
    let mut found = Vec::new();
    let mut folders = vec![Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|end| end == "yaml") {
                let text = std::fs::read_to_string(&path)?;
                let images = text
                    .lines()
                    .filter_map(|line| line.trim_start_matches([' ', '-']).strip_prefix("image:"));
                let images = images.map(|image| image.trim().trim_matches('"').to_owned());
                found.extend(images.filter(|image| image.starts_with(SIDECARS) && !image.contains('{')));
            }
        }
    }
    found.sort();
    found.dedup();
    Ok(found)
}
