//! Writes the Helm chart `manifests/chart` from the overlays: `cargo run --example chart`.

use std::fs;

use anyhow::{Context, Result, anyhow};
use holdfast_tests::chart;
use holdfast_tests::kustomize::manifests;

fn main() -> Result<()> {
    let folder = manifests().join("chart");
    let files = chart::write()?.map_err(|skip| anyhow!(skip.0))?;
    if folder.exists() {
        fs::remove_dir_all(&folder)?;
    }
    for (name, text) in files {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().context("no folder")?)?;
        fs::write(&path, text)?;
    }
    println!("{}", folder.display());
    Ok(())
}
