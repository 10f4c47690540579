//! holdfast-package: makes what users install, of what is in the repository: the container image and the Helm chart.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow};
use clap::Parser;
use holdfast_tests::image::{Build, REFERENCE};
use holdfast_tests::kustomize::manifests;
use holdfast_tests::{chart, work};

/// Makes what users install.
#[derive(Parser)]
#[command(name = "holdfast-package", version)]
enum Args {
    /// The container image, as an OCI archive, of the programs beside this one.
    Image {
        /// Folder for the archive holdfast.tar, and what it is made of.
        #[arg(long, default_value = "target/image")]
        folder: PathBuf,
    },
    /// The Helm chart manifests/chart, written anew from the overlays.
    Chart,
}

fn main() -> Result<()> {
    match Args::parse() {
        Args::Image { folder } => image(&folder),
        Args::Chart => write_chart(&manifests().join("chart")),
    }
}

fn image(folder: &Path) -> Result<()> {
    let start = Instant::now();
    fs::create_dir_all(folder)?;
    let (programs, packages) = (work::binaries_dir()?, folder.join("packages"));
    let image = Build { programs: &programs, packages: &packages, folder }.run()?;
    let image = image.map_err(|skip| anyhow!(skip.0))?;
    let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
    println!("{REFERENCE} {}", image.digest);
    println!(
        "{}: {:.1} MiB, {:.1} MiB unpacked, in {:.0} s",
        image.archive.display(),
        mib(image.archive_bytes),
        mib(image.root_bytes),
        start.elapsed().as_secs_f64()
    );
    println!("On a node: ctr --namespace k8s.io images import {}", image.archive.display());
    Ok(())
}

fn write_chart(folder: &Path) -> Result<()> {
    let files = chart::write()?.map_err(|skip| anyhow!(skip.0))?;
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    for (name, text) in files {
        let path = folder.join(name);
        fs::create_dir_all(path.parent().context("no folder")?)?;
        fs::write(&path, text)?;
    }
    println!("{}", folder.display());
    Ok(())
}
