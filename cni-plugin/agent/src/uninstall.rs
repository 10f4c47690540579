//! Takes the network half off a node.
//!
//! The order: conflist (the runtime asks no more of us), plugin, interfaces and rules, leases, sockets. Each step may be repeated after
//! a kill at any point: what is gone is passed over, so the second call ends what the first began. Refused before the first
//! step: while the agent runs, and while pods of ours are attached, because they would be cut off.
//!
//! Kept, and named: sysctls, whose values of before nobody knows; configurations of others that have our plugin in their list.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use holdfast_dataplane::{Config, FoundEndpoint, attached_endpoints, remove_everything};

use crate::engine::sentence;
use crate::install::{CNI_PLUGIN, configurations, names_our_plugin, sweep_temporary};
use crate::leases::{AttachmentKey, Lease, Leases};
use crate::result_cache::results_of_ours;

/// Pods that a refusal names; the rest is counted.
const NAMED_MAX: usize = 20;

/// Where things are.
#[derive(Debug, Clone)]
pub struct UninstallOptions {
    /// The runtime's folder of plugins.
    pub bin_dir: PathBuf,
    /// The runtime's folder of network configurations.
    pub conf_dir: PathBuf,
    /// Name of our conflist in it.
    pub conflist_name: String,
    /// Folder of the lease store.
    pub state_dir: PathBuf,
    /// Folder of the plugin's delete records.
    pub pending_dir: PathBuf,
    /// The agent's socket.
    pub socket: PathBuf,
    /// Where the runtime keeps results.
    pub cache_dir: PathBuf,
    /// The bridge.
    pub bridge: String,
    /// The VXLAN device.
    pub vxlan_device: String,
    /// Cut off pods that are attached.
    pub force: bool,
}

/// What an uninstallation did.
#[derive(Debug, Default)]
pub struct Removal {
    /// What is gone now.
    pub removed: Vec<String>,
    /// What was left alone, and why.
    pub kept: Vec<String>,
    /// What should be gone and is not, and why.
    pub failed: Vec<String>,
}

impl Removal {
    fn note(&mut self, what: String, done: io::Result<bool>) {
        match done {
            Ok(true) => self.removed.push(what),
            Ok(false) => {}
            Err(error) => self.failed.push(format!("{what}: {error}")),
        }
    }

    fn remove_file(&mut self, path: &Path) {
        self.note(path.display().to_string(), gone(fs::remove_file(path)));
    }

    fn remove_tree(&mut self, path: &Path) {
        self.note(path.display().to_string(), gone(fs::remove_dir_all(path)));
    }

    /// A folder that has something of others in it, or that is mounted here, stays.
    fn remove_folder(&mut self, path: &Path) {
        let removed = match fs::remove_dir(path) {
            Err(error)
                if matches!(error.kind(), io::ErrorKind::DirectoryNotEmpty | io::ErrorKind::ResourceBusy) =>
            {
                Ok(false)
            }
            other => gone(other),
        };
        self.note(path.display().to_string(), removed);
    }
}

/// Takes everything of the network half off this node; see the module. Acts in the network namespace of its thread.
///
/// # Errors
/// Refused, with a sentence: nothing was changed then.
pub async fn uninstall(options: &UninstallOptions) -> anyhow::Result<Removal> {
    let leases = stored_leases(options).await?;
    let attached = attached_endpoints().await.context("cannot list the pods' interfaces")?;
    if !attached.is_empty() && !options.force {
        bail!(
            "pods are attached to this network and would be cut off: {}; move them away or use --force",
            names(&attached, &leases)
        );
    }
    let mut done = Removal::default();
    remove_cni_files(options, &mut done);
    let config = Config {
        bridge: options.bridge.clone(),
        vxlan_device: options.vxlan_device.clone(),
        ..Config::default()
    };
    match remove_everything(&config).await {
        Ok(teardown) => {
            done.removed.extend(teardown.removed);
            done.failed.extend(teardown.failed.iter().map(|error| sentence(error)));
        }
        Err(error) => done.failed.push(sentence(&error)),
    }
    // Without interfaces of ours no lease is needed; with one left it still tells whose the address is.
    if done.failed.is_empty() {
        remove_state(options, &mut done);
        match results_of_ours(&options.cache_dir) {
            Ok(found) => found.iter().for_each(|path| done.remove_file(path)),
            Err(error) => done.failed.push(format!("{}: {error}", options.cache_dir.display())),
        }
    }
    done.kept.push(
        "sysctls such as net.ipv4.ip_forward stay as they are: what they were before is not known".to_owned(),
    );
    Ok(done)
}

/// The leases; opening the store is also what tells whether an agent runs.
async fn stored_leases(options: &UninstallOptions) -> anyhow::Result<BTreeMap<AttachmentKey, Lease>> {
    if !options.state_dir.join("leases").exists() {
        return Ok(BTreeMap::new());
    }
    let leases = Leases::open(&options.state_dir, Duration::ZERO)
        .context("the agent must be stopped first, and not come back")?;
    Ok(leases.all().await.into_iter().map(|lease| (lease.key.clone(), lease)).collect())
}

/// "shop/web (hfv1234), container abc (hfv5678) and 3 more".
fn names(attached: &[FoundEndpoint], leases: &BTreeMap<AttachmentKey, Lease>) -> String {
    let mut text = String::new();
    for endpoint in attached.iter().take(NAMED_MAX) {
        if !text.is_empty() {
            text.push_str(", ");
        }
        let key = endpoint.attachment.as_ref().map(|(container_id, ifname)| AttachmentKey {
            container_id: container_id.clone(),
            ifname: ifname.clone(),
        });
        let pod = key.as_ref().and_then(|key| leases.get(key)).and_then(|lease| lease.pod.as_ref());
        let who = match (pod, &key) {
            (Some(pod), _) => format!("pod {pod}"),
            (None, Some(key)) => format!("container {}", key.container_id),
            (None, None) => "an unknown container".to_owned(),
        };
        // Writing to a string does not fail.
        let _ = write!(text, "{who} ({})", endpoint.host_ifname);
    }
    if let Some(more @ 1..) = attached.len().checked_sub(NAMED_MAX) {
        let _ = write!(text, " and {more} more");
    }
    text
}

fn remove_cni_files(options: &UninstallOptions, done: &mut Removal) {
    let ours = options.conf_dir.join(&options.conflist_name);
    match configurations(&options.conf_dir) {
        Ok(found) => {
            for path in found {
                let has_us = fs::read(&path).is_ok_and(|text| names_our_plugin(&text));
                if path == ours && has_us {
                    done.remove_file(&path);
                } else if path == ours {
                    done.kept.push(format!("{}: it does not name {CNI_PLUGIN}", path.display()));
                } else if has_us {
                    done.kept.push(format!(
                        "{}: somebody else's list, which names {CNI_PLUGIN}; the runtime fails with it now",
                        path.display()
                    ));
                }
            }
        }
        Err(error) => done.failed.push(format!("{}: {error}", options.conf_dir.display())),
    }
    done.remove_file(&options.bin_dir.join(CNI_PLUGIN));
    for folder in [&options.conf_dir, &options.bin_dir] {
        match sweep_temporary(folder) {
            Ok(swept) => done.removed.extend(swept.iter().map(|path| path.display().to_string())),
            Err(error) => done.failed.push(format!("{}: {error}", folder.display())),
        }
    }
}

/// Only what is known by name goes: the folders may be shared, and a mistyped one must not be emptied.
fn remove_state(options: &UninstallOptions, done: &mut Removal) {
    match crate::pending::all_files(&options.pending_dir) {
        Ok(found) => found.iter().for_each(|path| done.remove_file(path)),
        Err(error) => done.failed.push(format!("{}: {error}", options.pending_dir.display())),
    }
    done.remove_folder(&options.pending_dir);
    done.remove_tree(&options.state_dir.join("leases"));
    done.remove_folder(&options.state_dir);
    if fs::symlink_metadata(&options.socket).is_ok_and(|found| found.file_type().is_socket()) {
        done.remove_file(&options.socket);
    }
    // Shared with the storage half: whoever goes last takes them.
    for folder in [options.state_dir.parent(), options.socket.parent()].into_iter().flatten() {
        done.remove_folder(folder);
    }
}

/// That it is gone already is fine.
fn gone(result: io::Result<()>) -> io::Result<bool> {
    match result {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}
