//! The folder of Kubernetes objects that stands for the API server on one machine.

use std::fs;
use std::net::Ipv4Addr;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};

/// Writes objects as YAML files, each by rename, so that a reader never sees half of one.
#[derive(Clone)]
pub struct Objects {
    dir: PathBuf,
}

impl Objects {
    /// Objects in `dir`.
    #[must_use]
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A node with its address and its range of pod addresses.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put_node(&self, name: &str, address: Ipv4Addr, pod_cidr: &str) -> Result<()> {
        self.put(
            &format!("node-{name}"),
            &json!({
                "apiVersion": "v1", "kind": "Node",
                "metadata": {"name": name, "labels": {"kubernetes.io/hostname": name}},
                "spec": {"podCIDR": pod_cidr, "podCIDRs": [pod_cidr]},
                "status": {"addresses": [
                    {"type": "InternalIP", "address": address.to_string()},
                    {"type": "Hostname", "address": name},
                ]},
            }),
        )
    }

    /// A namespace with the label that Kubernetes gives it.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put_namespace(&self, name: &str) -> Result<()> {
        self.put(
            &format!("namespace-{name}"),
            &json!({
                "apiVersion": "v1", "kind": "Namespace",
                "metadata": {"name": name, "labels": {"kubernetes.io/metadata.name": name}},
            }),
        )
    }

    /// A pod; without an address it is pending.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put_pod(&self, pod: &PodObject<'_>) -> Result<()> {
        let mut status = json!({"phase": "Pending", "hostIP": pod.host_ip.to_string()});
        if let Some(address) = pod.pod_ip {
            status = json!({
                "phase": "Running", "hostIP": pod.host_ip.to_string(), "podIP": address.to_string(),
                "podIPs": [{"ip": address.to_string()}],
            });
        }
        self.put(
            &format!("pod-{}-{}", pod.namespace, pod.name),
            &json!({
                "apiVersion": "v1", "kind": "Pod",
                "metadata": {
                    "name": pod.name, "namespace": pod.namespace, "uid": pod.uid, "labels": {"app": pod.app},
                },
                "spec": {"nodeName": pod.node, "containers": [{"name": "main", "image": "none"}]},
                "status": status,
            }),
        )
    }

    /// Any object, as YAML.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put(&self, name: &str, object: &Value) -> Result<()> {
        self.put_text(name, &serde_norway::to_string(object)?)
    }

    /// An object as text.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn put_text(&self, name: &str, yaml: &str) -> Result<()> {
        let path = self.dir.join(format!("{name}.yaml"));
        let temporary = self.dir.join(format!(".{name}.new"));
        fs::write(&temporary, yaml)
            .and_then(|()| fs::rename(&temporary, &path))
            .with_context(|| format!("cannot write {}", path.display()))
    }

    /// Removes an object; an absent one is fine.
    ///
    /// # Errors
    /// The file cannot be removed.
    pub fn remove(&self, name: &str) -> Result<()> {
        match fs::remove_file(self.dir.join(format!("{name}.yaml"))) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error.into()),
            _ => Ok(()),
        }
    }
}

/// What a pod's object says.
pub struct PodObject<'a> {
    /// Its namespace.
    pub namespace: &'a str,
    /// Its name.
    pub name: &'a str,
    /// Its uid.
    pub uid: &'a str,
    /// Value of its label `app`.
    pub app: &'a str,
    /// Its node.
    pub node: &'a str,
    /// The node's address.
    pub host_ip: Ipv4Addr,
    /// Its address, once it has one.
    pub pod_ip: Option<Ipv4Addr>,
}
