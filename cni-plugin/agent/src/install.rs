//! The CNI plugin's files on a node: put there by each start of the agent's pod, removed by [`crate::uninstall()`] only.
//!
//! A runtime may read or execute the files at any moment, also while a node is upgraded or loses its power. So nothing is
//! written in place:
//!
//! 1. Lock the folder of programs. A twin (the old pod and the new one) waits; a crash frees the lock.
//! 2. Remove temporary files of ours that a crash left. Nobody reads them.
//! 3. The plugin, if it differs: a temporary file, fsync, rename, fsync of the folder. A crash leaves the old one or the new one.
//! 4. The conflist in the same way. It comes last, because kubelet calls the node Ready as soon as it is there: every network
//!    that the runtime reads of has its plugin. What keeps pods off until the agent serves, too, is the start-up taint.

use std::ffi::OsStr;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde_json::Value;

/// Name of the plugin's program, and of its type in a conflist.
pub const CNI_PLUGIN: &str = "holdfast-cni";
/// Runtimes read files with these endings, in the order of their names, and take the first.
const CONFIG_ENDINGS: [&str; 3] = ["conf", "conflist", "json"];
/// Ours are hidden and end so, which no runtime reads.
const TEMPORARY: (&str, &str) = (".holdfast-", ".new");
/// A file that is compared is not larger; one that is, differs.
const FILE_BYTES_MAX: u64 = 256 << 20;

/// What to install.
#[derive(Debug, Clone)]
pub struct InstallOptions {
    /// The plugin's program.
    pub plugin: PathBuf,
    /// The runtime's folder of plugins.
    pub bin_dir: PathBuf,
    /// The runtime's folder of network configurations.
    pub conf_dir: PathBuf,
    /// The network configuration; it keeps its name.
    pub conflist: PathBuf,
}

/// What was done.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub struct Installed {
    /// Files that were put in place; none when all were as they should be.
    pub written: Vec<PathBuf>,
    /// Files of crashed predecessors that are gone.
    pub swept: Vec<PathBuf>,
    /// Network configurations of others that the runtime takes instead of ours.
    pub before_ours: Vec<PathBuf>,
}

/// Installs plugin and conflist; see the module's numbered steps. Waits for a twin.
///
/// # Errors
/// The conflist is none of ours, a file cannot be read or written. What was in place before still is.
pub fn install_cni(options: &InstallOptions) -> anyhow::Result<Installed> {
    let name = options.conflist.file_name().context("the conflist has no file name")?;
    let conflist = fs::read(&options.conflist)
        .with_context(|| format!("cannot read the conflist {}", options.conflist.display()))?;
    if !names_our_plugin(&conflist) {
        bail!("{} is no conflist with a plugin of type {CNI_PLUGIN}", options.conflist.display());
    }
    if !has_config_ending(Path::new(name)) {
        bail!("{} must end with .conflist, or no runtime reads it", options.conflist.display());
    }
    let plugin = fs::read(&options.plugin)
        .with_context(|| format!("cannot read the plugin {}", options.plugin.display()))?;
    for folder in [&options.bin_dir, &options.conf_dir] {
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
    }
    let lock = File::open(&options.bin_dir)?;
    lock.lock().with_context(|| format!("cannot lock {}", options.bin_dir.display()))?;
    let mut done = Installed::default();
    for folder in [&options.bin_dir, &options.conf_dir] {
        done.swept.extend(sweep_temporary(folder)?);
    }
    for (folder, name, content, mode) in [
        (&options.bin_dir, OsStr::new(CNI_PLUGIN), &plugin, 0o755),
        (&options.conf_dir, name, &conflist, 0o644),
    ] {
        let path = folder.join(name);
        if replace(&path, content, mode).with_context(|| format!("cannot put {} in place", path.display()))? {
            done.written.push(path);
        }
    }
    let ours = Path::new(name);
    done.before_ours = configurations(&options.conf_dir)?
        .into_iter()
        .filter(|path| path.file_name().is_some_and(|found| Path::new(found) < ours))
        .collect();
    Ok(done)
}

/// Whether a network configuration has our plugin in its list, or is of its type.
pub(crate) fn names_our_plugin(conflist: &[u8]) -> bool {
    let Ok(list) = serde_json::from_slice::<Value>(conflist) else { return false };
    let plugins = list["plugins"].as_array().into_iter().flatten();
    plugins.chain([&list]).any(|plugin| plugin["type"] == CNI_PLUGIN)
}

/// What a runtime reads in a folder, in its order. None where there is no folder.
pub(crate) fn configurations(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found: Vec<PathBuf> = files(folder)?.into_iter().filter(|path| has_config_ending(path)).collect();
    found.sort();
    Ok(found)
}

/// Removes what a crash left.
pub(crate) fn sweep_temporary(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let (start, end) = TEMPORARY;
    let is_ours = |path: &PathBuf| {
        path.file_name().and_then(OsStr::to_str).is_some_and(|n| n.starts_with(start) && n.ends_with(end))
    };
    let stale: Vec<PathBuf> = files(folder)?.into_iter().filter(is_ours).collect();
    for path in &stale {
        fs::remove_file(path)?;
    }
    Ok(stale)
}

fn has_config_ending(path: &Path) -> bool {
    path.extension().and_then(OsStr::to_str).is_some_and(|ending| CONFIG_ENDINGS.contains(&ending))
}

pub(crate) fn files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let entry = entry?;
        if !entry.file_type()?.is_dir() {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// Puts a file in place by rename, unless it is there already; tells whether it did.
fn replace(path: &Path, content: &[u8], mode: u32) -> io::Result<bool> {
    if is_same(path, content, mode)? {
        return Ok(false);
    }
    let (Some(folder), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(io::Error::other("it names no file"));
    };
    let (start, end) = TEMPORARY;
    let temporary = folder.join(format!("{start}{}{end}", name.to_string_lossy()));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(mode).open(&temporary)?;
    // The umask may have taken some.
    file.set_permissions(fs::Permissions::from_mode(mode))?;
    file.write_all(content)?;
    file.sync_all()?;
    drop(file);
    fs::rename(&temporary, path)?;
    File::open(folder)?.sync_all()?;
    Ok(true)
}

fn is_same(path: &Path, content: &[u8], mode: u32) -> io::Result<bool> {
    let found = match fs::symlink_metadata(path) {
        Ok(found) => found,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(error),
    };
    // A link of ours there is none: it is replaced by the file.
    if !found.is_file() || found.permissions().mode() & 0o7777 != mode || found.len() > FILE_BYTES_MAX {
        return Ok(false);
    }
    Ok(found.len() == content.len() as u64 && fs::read(path)? == content)
}

#[cfg(test)]
mod tests {
    use super::*;

    const OURS: &str = r#"{"cniVersion":"1.1.0","name":"holdfast","plugins":[{"type":"holdfast-cni"}]}"#;

    struct Node(tempfile::TempDir);

    impl Node {
        fn new() -> Self {
            let node = Self(tempfile::tempdir().unwrap());
            for folder in ["image", "bin", "conf"] {
                fs::create_dir(node.0.path().join(folder)).unwrap();
            }
            node.put("image/holdfast-cni", "program 1");
            node.put("image/10-holdfast.conflist", OURS);
            node
        }

        fn path(&self, name: &str) -> PathBuf {
            self.0.path().join(name)
        }

        fn put(&self, name: &str, text: &str) {
            fs::write(self.path(name), text).unwrap();
        }

        fn text(&self, name: &str) -> String {
            fs::read_to_string(self.path(name)).unwrap()
        }

        fn install(&self) -> anyhow::Result<Installed> {
            install_cni(&InstallOptions {
                plugin: self.path("image/holdfast-cni"),
                bin_dir: self.path("bin"),
                conf_dir: self.path("conf"),
                conflist: self.path("image/10-holdfast.conflist"),
            })
        }
    }

    #[test]
    fn only_what_differs_is_written_and_the_conflist_is_last() {
        let node = Node::new();
        let done = node.install().unwrap();
        assert_eq!(done.written, [node.path("bin/holdfast-cni"), node.path("conf/10-holdfast.conflist")]);
        assert_eq!(fs::metadata(node.path("bin/holdfast-cni")).unwrap().permissions().mode() & 0o7777, 0o755);
        assert_eq!(node.install().unwrap(), Installed::default());

        node.put("image/holdfast-cni", "program 2");
        assert_eq!(node.install().unwrap().written, [node.path("bin/holdfast-cni")]);
        assert_eq!(node.text("bin/holdfast-cni"), "program 2");
        // A plugin that may not be executed is none.
        fs::set_permissions(node.path("bin/holdfast-cni"), fs::Permissions::from_mode(0o644)).unwrap();
        assert_eq!(node.install().unwrap().written, [node.path("bin/holdfast-cni")]);
    }

    #[test]
    fn a_running_program_is_replaced_and_keeps_running() {
        let node = Node::new();
        fs::copy("/bin/sleep", node.path("bin/holdfast-cni")).unwrap();
        let mut running =
            std::process::Command::new(node.path("bin/holdfast-cni")).arg("60").spawn().unwrap();
        // In place the kernel would refuse to write it (ETXTBSY).
        let installed = node.install();
        let was_running = running.try_wait().unwrap().is_none();
        running.kill().unwrap();
        running.wait().unwrap();
        assert_eq!(installed.unwrap().written.len(), 2);
        assert!(was_running);
    }

    #[test]
    fn temporary_files_of_a_crash_go_and_others_stay() {
        let node = Node::new();
        for name in
            ["bin/.holdfast-holdfast-cni.new", "conf/.holdfast-10-holdfast.conflist.new", "conf/.x.new"]
        {
            node.put(name, "half a fi");
        }
        assert_eq!(node.install().unwrap().swept.len(), 2);
        assert_eq!(files(&node.path("bin")).unwrap(), [node.path("bin/holdfast-cni")]);
        assert!(node.path("conf/.x.new").exists());
    }

    #[test]
    fn a_conflist_that_is_none_of_ours_is_refused_before_anything_is_changed() {
        let node = Node::new();
        for text in ["", "{", r#"{"plugins":[{"type":"bridge"}]}"#] {
            node.put("image/10-holdfast.conflist", text);
            assert!(node.install().is_err(), "{text}");
        }
        assert!(
            files(&node.path("bin")).unwrap().is_empty() && files(&node.path("conf")).unwrap().is_empty()
        );
    }

    #[test]
    fn a_foreign_configuration_that_sorts_before_ours_is_named() {
        let node = Node::new();
        for name in ["conf/05-other.conflist", "conf/20-later.conf", "conf/00-notes.txt"] {
            node.put(name, "{}");
        }
        assert_eq!(node.install().unwrap().before_ours, [node.path("conf/05-other.conflist")]);
    }

    /// Two pods of an upgrade install at the same time, again and again.
    #[test]
    fn twins_never_hinder_each_other() {
        let node = Node::new();
        std::thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| {
                    for _ in 0..50 {
                        node.install().unwrap();
                        fs::set_permissions(node.path("bin/holdfast-cni"), fs::Permissions::from_mode(0o644))
                            .unwrap();
                    }
                });
            }
        });
        node.install().unwrap();
        assert_eq!(node.text("bin/holdfast-cni"), "program 1");
    }
}
