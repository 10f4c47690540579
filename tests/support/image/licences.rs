//! Our own licence, and those of the crates that our programs are made of, as their terms ask for.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::Value;

use crate::process::run;

/// The packages of the workspace that our programs are built of.
const OURS: [&str; 3] = ["holdfast-cli", "holdfast-cni-plugin", "holdfast-csi"];
/// How names of files with licences and notices begin.
const NOTICES: [&str; 5] = ["LICENSE", "LICENCE", "COPYING", "COPYRIGHT", "NOTICE"];

/// Writes `copyright` and `third-party` into `folder`.
///
/// # Errors
/// Cargo does not know the crates, or a file cannot be read or written.
pub fn write(folder: &Path) -> Result<()> {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    fs::create_dir_all(folder)?;
    fs::copy(workspace.join("LICENSE"), folder.join("copyright"))?;
    let mut ask = Command::new("cargo");
    ask.args(["metadata", "--format-version=1", "--locked", "--filter-platform", &host()?]);
    let metadata: Value = serde_json::from_str(&run(ask.current_dir(&workspace))?)?;
    fs::write(folder.join("third-party"), third_party(&metadata)?)?;
    Ok(())
}

fn host() -> Result<String> {
    let said = run(Command::new("rustc").arg("-vV"))?;
    let host = said.lines().find_map(|line| line.strip_prefix("host: ")).context("rustc names no host")?;
    Ok(host.to_owned())
}

/// Each crate with its licence, then each text once with the crates it came with.
fn third_party(metadata: &Value) -> Result<String> {
    let packages = metadata["packages"].as_array().context("cargo lists no packages")?;
    let linked = linked(metadata)?;
    let mut written = String::from("The programs of Holdfast are built of these crates:\n\n");
    let mut texts: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for package in packages {
        let text = |key: &str| package[key].as_str().unwrap_or_default();
        // Without a source it is one of ours.
        if package["source"].is_null() || !linked.contains(text("id")) {
            continue;
        }
        let name = format!("{} {}", text("name"), text("version"));
        writeln!(written, "{name}: {}", package["license"].as_str().unwrap_or("see below"))?;
        for file in notices(Path::new(text("manifest_path")))? {
            let notice = String::from_utf8_lossy(&fs::read(file)?).trim_end().to_owned();
            texts.entry(notice).or_default().push(name.clone());
        }
    }
    for (text, names) in texts {
        write!(written, "\n{}\nof {}\n\n{text}\n", "-".repeat(80), names.join(", "))?;
    }
    Ok(written)
}

/// Ids of what our programs are linked of: not of what builds or tests them.
fn linked(metadata: &Value) -> Result<BTreeSet<&str>> {
    let nodes = metadata["resolve"]["nodes"].as_array().context("cargo resolved nothing")?;
    let by_id: BTreeMap<&str, &Value> =
        nodes.iter().filter_map(|node| Some((node["id"].as_str()?, node))).collect();
    let packages = metadata["packages"].as_array().context("cargo lists no packages")?;
    let ours = packages.iter().filter(|package| OURS.iter().any(|name| package["name"] == *name));
    let mut open: Vec<&str> = ours.filter_map(|package| package["id"].as_str()).collect();
    let mut found = BTreeSet::new();
    while let Some(id) = open.pop() {
        if !found.insert(id) {
            continue;
        }
        let dependencies = by_id.get(id).and_then(|node| node["deps"].as_array());
        for dependency in dependencies.into_iter().flatten() {
            let mut kinds = dependency["dep_kinds"].as_array().into_iter().flatten();
            if kinds.any(|kind| kind["kind"].is_null()) {
                open.extend(dependency["pkg"].as_str());
            }
        }
    }
    Ok(found)
}

fn notices(manifest: &Path) -> Result<Vec<PathBuf>> {
    let folder = manifest.parent().context("a crate without a folder")?;
    let mut files = Vec::new();
    for entry in fs::read_dir(folder)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_uppercase();
        if path.is_file() && NOTICES.iter().any(|start| name.starts_with(start)) {
            files.push(path);
        }
    }
    files.sort();
    Ok(files)
}
