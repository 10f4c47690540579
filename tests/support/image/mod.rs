//! The container image: our four programs, the file system tools that they run, the libraries of both, and nothing else.
//!
//! ```text
//!   target/release/holdfast*  --strip-->  \
//!   Debian packages, by apt   --unpack-->  root/  --tar, gzip-->  layer  --JSON-->  OCI archive holdfast.tar
//!   licences of crates        ---------->  /
//! ```
//!
//! No shell, no package manager, no certificates: programs of ours replace what scripts would do, and the API server's
//! certificate comes with each pod's token. The Debian release is the building machine's, so that the C library is the one that the
//! programs were linked against.
//!
//! The archive is a function of its content: the same programs and the same packages make the same digest. What is not promised:
//! the same digest after Debian published a newer package, which the label `dev.holdfast.packages` would show.

mod licences;
pub mod oci;
mod packages;

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::go_tools::Skip;
use crate::process::run;
use packages::Packages;

/// What workloads refer to.
pub const REFERENCE: &str = concat!("holdfast:", env!("CARGO_PKG_VERSION"));
/// Our programs.
pub const PROGRAMS: [&str; 4] = ["holdfast", "holdfast-cni", "holdfast-csi", "holdfast-netd"];
/// What they run: formatting, growth, and the check before ext4 grows unmounted (`csi-driver/service/src/node`).
pub const TOOLS: [&str; 5] = ["mkfs.ext4", "mkfs.xfs", "e2fsck", "resize2fs", "xfs_growfs"];

/// Files that are taken of packages, as the image has them; libraries come by themselves. A name that ends with `/` is a folder.
const FILES: [(&str, &[&str]); 3] = [
    (
        "e2fsprogs",
        &[
            "usr/sbin/mke2fs",
            "usr/sbin/mkfs.ext4",
            "usr/sbin/e2fsck",
            "usr/sbin/resize2fs",
            // What mkfs.ext4 makes by default is written there.
            "etc/mke2fs.conf",
        ],
    ),
    ("xfsprogs", &["usr/sbin/mkfs.xfs", "usr/sbin/xfs_growfs"]),
    // Says which Debian the files are of, for scanners; and the licences that Debian's notices refer to.
    ("base-files", &["usr/lib/os-release", "etc/os-release", "usr/share/common-licenses/"]),
];
/// Mount points and what processes expect. Our hostPaths are mounted below them.
const FOLDERS: [&str; 11] = [
    "dev",
    "etc/holdfast",
    "opt",
    "proc",
    "root",
    "run",
    "sys",
    "usr/bin",
    "usr/sbin",
    "var/lib/holdfast",
    "tmp",
];

/// Where things are, for one build.
pub struct Build<'a> {
    /// Folder of our programs.
    pub programs: &'a Path,
    /// Packages that were downloaded stay here for the next build.
    pub packages: &'a Path,
    /// The root file system is made here, and the archive; what was there of an earlier build is replaced.
    pub folder: &'a Path,
    /// `NAME:TAG` that workloads refer to it by; [`REFERENCE`] but for another release's programs.
    pub reference: &'a str,
}

/// A finished image.
#[derive(Debug)]
pub struct Image {
    /// The OCI archive.
    pub archive: PathBuf,
    /// The root file system it was packed from.
    pub root: PathBuf,
    /// Digest of its manifest, `sha256:...`: what a cluster knows the image by.
    pub digest: String,
    /// Size of the archive, which is what is transferred.
    pub archive_bytes: u64,
    /// Size of the files in it.
    pub root_bytes: u64,
}

impl Build<'_> {
    /// Makes the image.
    ///
    /// # Errors
    /// One of our programs is not built, a tool of the machine fails, or a library is in no package. That packages cannot be had is
    /// the inner one.
    pub fn run(&self) -> Result<Result<Image, Skip>> {
        let root = self.folder.join("root");
        if root.exists() {
            fs::remove_dir_all(&root)?;
        }
        let trees = tempfile::Builder::new().prefix("holdfast-packages-").tempdir()?;
        let mut packages = match Packages::new(self.packages, trees.path())? {
            Ok(packages) => packages,
            Err(skip) => return Ok(Err(skip)),
        };
        lay_out(&root)?;
        for program in PROGRAMS {
            let from = self.programs.join(program);
            ensure!(from.exists(), "{} is not built", from.display());
            run(Command::new("strip").arg("-o").arg(root.join("usr/bin").join(program)).arg(&from))?;
        }
        for (package, files) in FILES {
            if let Err(skip) = packages.fetch(&[package.to_owned()])? {
                return Ok(Err(skip));
            }
            for file in files {
                packages.install(package, file, &root)?;
            }
        }
        if let Err(skip) = packages.install_libraries(&root)? {
            return Ok(Err(skip));
        }
        let taken = packages.install_notices(&root)?;
        licences::write(&root.join("usr/share/doc/holdfast"))?;
        set_modes(&root)?;
        let archive = self.folder.join("holdfast.tar");
        let (config, made_by) = (config(&taken), "scripts/image");
        let words = oci::Words { reference: self.reference, config, made_by, compress: true };
        let digest = oci::pack(&root, &words, &archive)?;
        Ok(Ok(Image {
            archive_bytes: fs::metadata(&archive)?.len(),
            root_bytes: bytes_below(&root)?,
            archive,
            root,
            digest,
        }))
    }
}

/// How it is run, and what scanners read of it. `packages` is what it has of Debian.
fn config(packages: &[String]) -> Value {
    json!({
        "Env": ["PATH=/usr/sbin:/usr/bin"],
        "Cmd": ["holdfast", "--help"],
        "WorkingDir": "/",
        "Labels": {
            "org.opencontainers.image.title": "holdfast",
            "org.opencontainers.image.description":
                "Replicated block storage, pod networking and network policy for Kubernetes",
            "org.opencontainers.image.version": env!("CARGO_PKG_VERSION"),
            "org.opencontainers.image.licenses": "Apache-2.0",
            "dev.holdfast.packages": packages.join(" "),
        },
    })
}

/// Folders, links of the merged /usr, and the files that the C library looks into.
fn lay_out(root: &Path) -> Result<()> {
    for folder in FOLDERS {
        fs::create_dir_all(root.join(folder))?;
    }
    for folder in ["bin", "lib", "lib64", "sbin"] {
        fs::create_dir_all(root.join("usr").join(folder))?;
        symlink(format!("usr/{folder}"), root.join(folder))?;
    }
    let files = [
        ("etc/passwd", "root:x:0:0:root:/root:/sbin/nologin\nnobody:x:65534:65534:nobody:/:/sbin/nologin\n"),
        ("etc/group", "root:x:0:\nnogroup:x:65534:\n"),
        ("etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n"),
    ];
    for (name, text) in files {
        fs::write(root.join(name), text)?;
    }
    // e2fsprogs looks there for what is mounted.
    symlink("../proc/self/mounts", root.join("etc/mtab"))?;
    // Runtimes name pods' network namespaces by their old path.
    symlink("../run", root.join("var/run"))?;
    Ok(())
}

/// Modes that depend on neither the builder's umask nor the package.
fn set_modes(path: &Path) -> Result<()> {
    let kind = fs::symlink_metadata(path)?;
    if kind.is_symlink() {
        return Ok(());
    }
    let mode = if kind.is_dir() || kind.permissions().mode() & 0o100 != 0 { 0o755 } else { 0o644 };
    fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
    if kind.is_dir() {
        for entry in fs::read_dir(path)? {
            set_modes(&entry?.path())?;
        }
    }
    Ok(())
}

fn bytes_below(path: &Path) -> Result<u64> {
    let kind = fs::symlink_metadata(path).with_context(|| path.display().to_string())?;
    if !kind.is_dir() {
        return Ok(kind.len());
    }
    fs::read_dir(path)?.map(|entry| bytes_below(&entry?.path())).sum()
}
