//! Control groups: the machine's mounts of them, and groups of a run that end with it.
//!
//! A run's groups lie in one folder of each hierarchy, whose name is in the run's state file.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};

/// A mount of control groups.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CgroupMount {
    /// Where.
    pub path: String,
    /// `cgroup` or `cgroup2`.
    pub kind: String,
    /// Options for `mount`, with their flag; empty where there are none.
    pub options: String,
}

/// The machine's mounts, of either version.
#[must_use]
pub fn mounts() -> Vec<CgroupMount> {
    let text = fs::read_to_string("/proc/self/mountinfo").unwrap_or_default();
    text.lines().filter_map(cgroup_mount).collect()
}

/// The mounts of version 1, where every controller has a hierarchy.
#[must_use]
pub fn hierarchies() -> Vec<CgroupMount> {
    mounts().into_iter().filter(|mount| mount.kind == "cgroup").collect()
}

/// Lines of a shell script that mount them at the same paths, for whoever has a `/sys` of its own.
#[must_use]
pub fn mount_script(mounts: &[CgroupMount]) -> String {
    let mut script = "set -e\n".to_owned();
    if mounts.iter().all(|mount| mount.path != "/sys/fs/cgroup") {
        script.push_str("mount -t tmpfs tmpfs /sys/fs/cgroup\n");
    }
    for CgroupMount { path, kind, options } in mounts {
        let _ = write!(script, "mkdir -p {path}\nmount -t {kind} {options} {kind} {path}\n");
    }
    script
}

/// Makes a group `GROUP/NAME` in every hierarchy, empty and with all processors and memory.
///
/// # Errors
/// The kernel refuses.
pub fn make(group: &str, name: &str) -> Result<()> {
    for mount in hierarchies() {
        let top = Path::new(&mount.path);
        fill(top, &top.join(group)).with_context(|| format!("cannot make {group} in {}", mount.path))?;
        fill(&top.join(group), &top.join(group).join(name))
            .with_context(|| format!("cannot make {group}/{name} in {}", mount.path))?;
    }
    Ok(())
}

/// Lines of a shell script that move the shell into a group of every hierarchy.
#[must_use]
pub fn enter_script(group: &str, name: &str) -> String {
    let mut script = String::new();
    for mount in hierarchies() {
        let _ = writeln!(script, "echo 0 > {}/{group}/{name}/cgroup.procs", mount.path);
    }
    script
}

/// Removes a group with all below it, as far as no process is in it. It may be absent.
pub fn remove(group: &str) {
    for folder in existing(group) {
        remove_below(&folder);
    }
}

/// Where a group still is.
#[must_use]
pub fn existing(group: &str) -> Vec<PathBuf> {
    let folders = hierarchies().into_iter().map(|mount| Path::new(&mount.path).join(group));
    folders.filter(|folder| folder.is_dir()).collect()
}

fn remove_below(folder: &Path) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_below(&entry.path());
        }
    }
    // One that is in use stays, and the caller looks.
    let _ = fs::remove_dir(folder);
}

/// A new group of cpuset has nothing that it may use; other hierarchies have no such files.
fn fill(parent: &Path, folder: &Path) -> Result<()> {
    fs::create_dir_all(folder)?;
    for file in ["cpuset.cpus", "cpuset.mems"] {
        if parent.join(file).exists() {
            fs::write(folder.join(file), fs::read(parent.join(file))?)?;
        }
    }
    Ok(())
}

/// One line of mountinfo: `ID PARENT DEVICE ROOT PATH OPTIONS... - KIND SOURCE SUPER-OPTIONS`.
fn cgroup_mount(line: &str) -> Option<CgroupMount> {
    let (front, back) = line.split_once(" - ")?;
    let mut back = back.split(' ');
    let kind = back.next().filter(|kind| kind.starts_with("cgroup"))?.to_owned();
    let own = back.nth(1)?.split(',').filter(|option| !matches!(*option, "rw" | "ro"));
    // A hierarchy without controllers is asked for as such.
    let options: Vec<&str> = own
        .flat_map(|option| if option.starts_with("name=") { vec!["none", option] } else { vec![option] })
        .collect();
    let options = if options.is_empty() { String::new() } else { format!("-o {}", options.join(",")) };
    Some(CgroupMount { path: front.split(' ').nth(4)?.to_owned(), kind, options })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_hierarchy_without_controllers_is_mounted_as_such() {
        let line = "31 24 0:27 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,name=systemd";

        let mount = cgroup_mount(line).unwrap();

        assert_eq!(
            (mount.path.as_str(), mount.options.as_str()),
            ("/sys/fs/cgroup/systemd", "-o none,name=systemd")
        );
        assert!(cgroup_mount("22 1 254:0 / / rw - ext4 /dev/vda rw").is_none());
    }
}
