//! holdfast-image: makes the container image of the programs beside it. `scripts/image` builds them first.

use std::path::PathBuf;
use std::time::Instant;

use anyhow::{Result, anyhow};
use clap::Parser;
use holdfast_tests::image::{Build, REFERENCE};
use holdfast_tests::work::binaries_dir;

/// Makes the container image, as an OCI archive, of the programs beside this one and of Debian packages.
#[derive(Parser)]
#[command(name = "holdfast-image", version)]
struct Args {
    /// Folder for the archive holdfast.tar, and what it is made of.
    #[arg(long, default_value = "target/image")]
    folder: PathBuf,
}

fn main() -> Result<()> {
    let folder = Args::parse().folder;
    let start = Instant::now();
    std::fs::create_dir_all(&folder)?;
    let (programs, packages) = (binaries_dir()?, folder.join("packages"));
    let image =
        Build { programs: &programs, packages: &packages, folder: &folder, reference: REFERENCE }.run()?;
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
