//! A root file system as an image of one layer: an OCI image layout in a tar archive, as `ctr images import`, podman and skopeo
//! read it (specification: OCI image-spec 1.1, `image-layout.md`, `manifest.md`, `config.md`).

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use super::packages::sha256;
use crate::process::run;

/// Everything in the image is of this time, so that its digest tells of its content only.
const CREATED: &str = "1970-01-01T00:00:00Z";
const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const CONFIG: &str = "application/vnd.oci.image.config.v1+json";
const LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
const GZIP_LAYER: &str = "application/vnd.oci.image.layer.v1.tar+gzip";

/// What is said of an image beside its files.
pub struct Words<'a> {
    /// `NAME:TAG` that workloads refer to it by, with or without a host.
    pub reference: &'a str,
    /// The `config` of the image's configuration: environment, command, labels.
    pub config: Value,
    /// How it was made.
    pub made_by: &'a str,
    /// Whether it is to be sent anywhere, so that its size matters more than the time to pack it.
    pub compress: bool,
}

/// Packs `root` into `archive`; answers the manifest's digest.
///
/// # Errors
/// A tool fails or a file cannot be written.
pub fn pack(root: &Path, words: &Words<'_>, archive: &Path) -> Result<String> {
    let beside = archive.parent().context("the archive has no folder")?;
    let layout = tempfile::Builder::new().prefix("layout-").tempdir_in(beside)?;
    let blobs = layout.path().join("blobs/sha256");
    fs::create_dir_all(&blobs)?;
    let plain = layout.path().join("layer.tar");
    tar(root, &plain)?;
    let diff = format!("sha256:{}", sha256(&plain)?);
    let layer = if words.compress {
        let packed = layout.path().join("layer.tar.gz");
        gzip(&plain, &packed)?;
        fs::remove_file(&plain)?;
        store(&blobs, &packed, GZIP_LAYER)?
    } else {
        store(&blobs, &plain, LAYER)?
    };
    let config = store_json(&blobs, &configuration(&diff, words)?, CONFIG)?;
    let manifest = json!({ "schemaVersion": 2, "mediaType": MANIFEST, "config": config, "layers": [layer] });
    let mut manifest = store_json(&blobs, &manifest, MANIFEST)?;
    let digest = manifest["digest"].as_str().context("no digest")?.to_owned();
    let (_, tag) = words.reference.rsplit_once(':').context("a reference is NAME:TAG")?;
    manifest["annotations"] = json!({
        "org.opencontainers.image.ref.name": tag,
        // What containerd names it by.
        "io.containerd.image.name": complete(words.reference),
    });
    let index = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [manifest],
    });
    fs::write(layout.path().join("index.json"), index.to_string())?;
    fs::write(layout.path().join("oci-layout"), json!({ "imageLayoutVersion": "1.0.0" }).to_string())?;
    let whole = layout.path().join("archive.tar");
    tar_names(layout.path(), &["blobs", "index.json", "oci-layout"], &whole)?;
    fs::rename(whole, archive)?;
    Ok(digest)
}

/// A reference without a host as kubelet completes it.
fn complete(reference: &str) -> String {
    if reference.contains('/') { reference.to_owned() } else { format!("docker.io/library/{reference}") }
}

fn configuration(diff: &str, words: &Words<'_>) -> Result<Value> {
    let architecture = run(Command::new("dpkg").arg("--print-architecture"))?;
    Ok(json!({
        "created": CREATED,
        "architecture": architecture.trim(),
        "os": "linux",
        "config": words.config,
        "rootfs": { "type": "layers", "diff_ids": [diff] },
        "history": [{ "created": CREATED, "created_by": words.made_by }],
    }))
}

fn tar(root: &Path, to: &Path) -> Result<()> {
    let mut names = Vec::new();
    for entry in fs::read_dir(root)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    tar_names(root, &names.iter().map(String::as_str).collect::<Vec<_>>(), to)
}

/// Names sorted by byte, one owner, one time, modes without the umask: nothing of the building machine.
fn tar_names(folder: &Path, names: &[&str], to: &Path) -> Result<()> {
    let mut tar = Command::new("tar");
    tar.args(["--sort=name", "--format=gnu", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"]);
    tar.arg("--mode=u+rwX,go+rX,go-w");
    run(tar.arg("-C").arg(folder).arg("-cf").arg(to).args(names).env("LC_ALL", "C"))?;
    Ok(())
}

fn gzip(from: &Path, to: &Path) -> Result<()> {
    let mut gzip = Command::new("gzip");
    gzip.args(["-n", "-6", "-c"]).arg(from).stdin(Stdio::null()).stdout(File::create(to)?);
    ensure!(gzip.status().context("cannot run gzip")?.success(), "gzip failed");
    Ok(())
}

fn store_json(blobs: &Path, value: &Value, media_type: &str) -> Result<Value> {
    let file = blobs.join("new");
    fs::write(&file, value.to_string())?;
    store(blobs, &file, media_type)
}

/// Moves a file to where its digest names it; answers its descriptor.
fn store(blobs: &Path, file: &Path, media_type: &str) -> Result<Value> {
    let (digest, size) = (sha256(file)?, fs::metadata(file)?.len());
    let to: PathBuf = blobs.join(&digest);
    fs::rename(file, to)?;
    Ok(json!({ "mediaType": media_type, "digest": format!("sha256:{digest}"), "size": size }))
}
