//! Container images made on the spot, without a registry: one layer each.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde_json::json;

use crate::image::oci;
use crate::process::run;

/// A static busybox: the only program of most images.
pub const BUSYBOX: &str = "/usr/bin/busybox";

/// Packs the file tree in `FOLDER/tree` and answers the archive.
///
/// # Errors
/// A file cannot be written, or a tool fails.
pub fn pack(folder: &Path, reference: &str, entrypoint: &[String]) -> Result<PathBuf> {
    let config = json!({ "Entrypoint": entrypoint, "Env": ["PATH=/usr/sbin:/usr/bin:/sbin:/bin"] });
    let archive = folder.join("image.tar");
    oci::pack(
        &folder.join("tree"),
        &oci::Words { reference, config, made_by: "a test", compress: false },
        &archive,
    )?;
    Ok(archive)
}

/// An image of one static program, which is its entry point.
///
/// # Errors
/// As for [`pack`].
pub fn of_program(folder: &Path, reference: &str, program: &Path) -> Result<PathBuf> {
    let name = program.file_name().context("a program has a name")?;
    let tree = folder.join("tree");
    fs::create_dir_all(&tree)?;
    fs::copy(program, tree.join(name)).with_context(|| format!("cannot copy {}", program.display()))?;
    pack(folder, reference, &[format!("/{}", name.display())])
}

/// An image with a shell and its tools, and more static programs in `/bin`.
///
/// # Errors
/// As for [`pack`].
pub fn of_busybox(folder: &Path, reference: &str, more: &[PathBuf]) -> Result<PathBuf> {
    lay_out_busybox(folder, more)?;
    pack(folder, reference, &[])
}

/// An image with a shell and its tools whose entry point is a static program, at the root as well as in `/bin`.
///
/// # Errors
/// As for [`pack`].
pub fn of_program_and_busybox(folder: &Path, reference: &str, program: &Path) -> Result<PathBuf> {
    lay_out_busybox(folder, &[program.to_owned()])?;
    let name = program.file_name().context("a program has a name")?.display().to_string();
    symlink(format!("bin/{name}"), folder.join("tree").join(&name))?;
    pack(folder, reference, &[format!("/{name}")])
}

/// An image with a shell and its tools, some of them the machine's own with their libraries in place of busybox's.
///
/// # Errors
/// As for [`pack`]; and a program is not linked as programs of the machine are.
pub fn of_busybox_and(folder: &Path, reference: &str, programs: &[&Path]) -> Result<PathBuf> {
    lay_out_busybox(folder, &[])?;
    let tree = folder.join("tree");
    for program in programs {
        let place = tree.join("bin").join(program.file_name().context("a program has a name")?);
        fs::remove_file(&place).with_context(|| format!("busybox has no {}", program.display()))?;
        fs::copy(program, place)?;
        let linked = run(Command::new("ldd").arg(program))?;
        for library in linked.split_whitespace().filter(|word| word.starts_with('/')) {
            let to = tree.join(library.trim_start_matches('/'));
            fs::create_dir_all(to.parent().context("a library lies in a folder")?)?;
            fs::copy(library, to)?;
        }
    }
    pack(folder, reference, &[])
}

fn lay_out_busybox(folder: &Path, more: &[PathBuf]) -> Result<()> {
    let bin = folder.join("tree/bin");
    for part in ["bin", "etc", "tmp", "www"] {
        fs::create_dir_all(folder.join("tree").join(part))?;
    }
    fs::write(folder.join("tree/www/index.html"), "ok\n")?;
    fs::copy(BUSYBOX, bin.join("busybox")).context("cannot copy busybox")?;
    for applet in run(Command::new(BUSYBOX).arg("--list"))?.lines().filter(|applet| *applet != "busybox") {
        symlink("busybox", bin.join(applet))?;
    }
    for program in more {
        fs::copy(program, bin.join(program.file_name().context("a program has a name")?))?;
    }
    Ok(())
}
