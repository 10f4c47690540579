//! Whoever writes objects: into a folder, or to an API server.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_agent::ObjectSource;
use holdfast_tests::api_server::ADMIN;
use holdfast_tests::relay::Relay;
use kube::api::{Api, DeleteParams, DynamicObject, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde::Deserialize;
use serde_json::{Value, json};

use crate::bed::Bed;

/// From a definition's installation to its first use.
const SERVED_TIMEOUT: Duration = Duration::from_secs(30);
/// As long as a whole range is used up by none: pods of a test are never run.
const GONE_TIMEOUT: Duration = Duration::from_secs(30);

/// One of them.
pub trait Side {
    /// Where an agent reads.
    fn source(&self) -> ObjectSource;
    /// What the names of the trial's objects begin with.
    fn prefix(&self) -> &str;
    /// Makes an object what this says.
    fn put(&self, bed: &Bed, object: &Value) -> Result<()>;
    /// Removes it.
    fn remove(&self, bed: &Bed, object: &Value) -> Result<()>;
    /// From now on nothing can be read. Objects can be written.
    fn begin_outage(&mut self) -> Result<()>;
    /// Ends it.
    fn end_outage(&mut self) -> Result<()>;
}

/// A folder.
pub struct FolderSide {
    folder: tempfile::TempDir,
    prefix: String,
    is_away: bool,
}

impl FolderSide {
    pub fn new(prefix: &str) -> Result<Self> {
        let folder = tempfile::tempdir()?;
        std::fs::create_dir(folder.path().join("objects"))?;
        Ok(Self { folder, prefix: prefix.to_owned(), is_away: false })
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join(if self.is_away { "away" } else { "objects" })
    }

    fn file(&self, object: &Value) -> PathBuf {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let meta = &object["metadata"];
        let name = format!("{}-{}-{}", text(&object["kind"]), text(&meta["namespace"]), text(&meta["name"]));
        self.path().join(format!("{name}.json"))
    }
}

impl Side for FolderSide {
    fn source(&self) -> ObjectSource {
        ObjectSource::Folder(self.folder.path().join("objects"))
    }

    fn prefix(&self) -> &str {
        &self.prefix
    }

    fn put(&self, _: &Bed, object: &Value) -> Result<()> {
        let file = self.file(object);
        let new = file.with_extension("new");
        std::fs::write(&new, object.to_string())?;
        Ok(std::fs::rename(new, file)?)
    }

    fn remove(&self, _: &Bed, object: &Value) -> Result<()> {
        Ok(std::fs::remove_file(self.file(object))?)
    }

    fn begin_outage(&mut self) -> Result<()> {
        let from = self.path();
        self.is_away = true;
        Ok(std::fs::rename(from, self.path())?)
    }

    fn end_outage(&mut self) -> Result<()> {
        let from = self.path();
        self.is_away = false;
        Ok(std::fs::rename(from, self.path())?)
    }
}

/// The API server, with a link that can be cut.
pub struct KubernetesSide {
    pub relay: Relay,
    kubeconfig: PathBuf,
    prefix: String,
}

impl KubernetesSide {
    pub fn new(bed: &Bed, prefix: &str) -> Result<Self> {
        install_pod_ranges(bed)?;
        install_definition(bed, &cluster_policies())?;
        Self::without_definitions(bed, prefix)
    }

    pub fn without_definitions(bed: &Bed, prefix: &str) -> Result<Self> {
        let relay = Relay::start(&bed.handle(), bed.server().socket())?;
        let kubeconfig = bed.server().kubeconfig(ADMIN, Some(&relay.url()))?;
        Ok(Self { relay, kubeconfig, prefix: prefix.to_owned() })
    }
}

impl Side for KubernetesSide {
    fn source(&self) -> ObjectSource {
        ObjectSource::Kubernetes { kubeconfig: Some(self.kubeconfig.clone()) }
    }

    fn prefix(&self) -> &str {
        &self.prefix
    }

    fn put(&self, bed: &Bed, object: &Value) -> Result<()> {
        let kube = bed.kube()?;
        bed.run(async { put(&kube, object).await })
    }

    fn remove(&self, bed: &Bed, object: &Value) -> Result<()> {
        let kube = bed.kube()?;
        bed.run(async { remove(&kube, object).await })
    }

    fn begin_outage(&mut self) -> Result<()> {
        self.relay.close();
        Ok(())
    }

    fn end_outage(&mut self) -> Result<()> {
        self.relay.open();
        Ok(())
    }
}

fn api_of(kube: &kube::Client, object: &Value) -> Result<(Api<DynamicObject>, String)> {
    let types: kube::core::TypeMeta = serde_json::from_value(object.clone())?;
    let kind = GroupVersionKind::try_from(types)?;
    let resource = ApiResource::from_gvk_with_plural(&kind, &crate::bed::plural(&kind.kind));
    let meta = &object["metadata"];
    let name = meta["name"].as_str().context("a name")?.to_owned();
    let api = match meta["namespace"].as_str() {
        Some(namespace) => Api::namespaced_with(kube.clone(), namespace, &resource),
        None => Api::all_with(kube.clone(), &resource),
    };
    Ok((api, name))
}

/// Makes an object what this says, with its status; and what the server's missing controllers would make for a namespace.
pub async fn put(kube: &kube::Client, object: &Value) -> Result<()> {
    let (api, name) = api_of(kube, object)?;
    let params = PatchParams::apply("test").force();
    let mut spec = object.clone();
    let status = spec.as_object_mut().context("an object")?.remove("status");
    // Pods keep most of their spec for life, and a uid is the server's to give.
    spec["metadata"].as_object_mut().context("metadata")?.remove("uid");
    api.patch(&name, &params, &Patch::Apply(&spec)).await.with_context(|| format!("put {name}"))?;
    if let Some(status) = status {
        // By merging: a Node may have two addresses of one type, which may not be applied.
        let part = Patch::Merge(json!({"status": status}));
        let params = PatchParams::default();
        api.patch_status(&name, &params, &part).await.with_context(|| format!("status of {name}"))?;
    }
    if object["kind"] == "Namespace" {
        let account = json!({
            "apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "default", "namespace": name},
        });
        let (api, name) = api_of(kube, &account)?;
        api.patch(&name, &params, &Patch::Apply(&account)).await.context("the default account")?;
    }
    Ok(())
}

/// Removes an object at once.
pub async fn remove(kube: &kube::Client, object: &Value) -> Result<()> {
    let (api, name) = api_of(kube, object)?;
    api.delete(&name, &DeleteParams::default().grace_period(0))
        .await
        .with_context(|| format!("remove {name}"))?;
    if object["kind"] == "Namespace" {
        // As the namespace controller does it once nothing is in it.
        let body = json!({
            "apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}, "spec": {"finalizers": []},
        });
        let request = http::Request::put(format!("/api/v1/namespaces/{name}/finalize"))
            .header("content-type", "application/json")
            .body(serde_json::to_vec(&body)?)?;
        kube.request_text(request).await.context("finalize")?;
    }
    let begun = Instant::now();
    while api.get_opt(&name).await?.is_some() {
        ensure!(begun.elapsed() < GONE_TIMEOUT, "{name} does not go");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(())
}

/// Installs the definition of PodRanges that we ship.
pub fn install_pod_ranges(bed: &Bed) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/crds/network/podranges.yaml");
    let definition =
        Value::deserialize(serde_norway::Deserializer::from_str(&std::fs::read_to_string(path)?))?;
    install_definition(bed, &definition)
}

/// Installs a definition and waits until its kind is served.
pub fn install_definition(bed: &Bed, definition: &Value) -> Result<()> {
    let kube = bed.kube()?;
    let spec = &definition["spec"];
    let path = format!(
        "/apis/{}/{}/{}?limit=1",
        spec["group"].as_str().context("a group")?,
        spec["versions"][0]["name"].as_str().context("a version")?,
        spec["names"]["plural"].as_str().context("a plural")?
    );
    bed.run(async {
        put(&kube, definition).await?;
        let begun = Instant::now();
        while let Err(error) = kube.request_text(http::Request::get(&path).body(Vec::new())?).await {
            ensure!(begun.elapsed() < SERVED_TIMEOUT, "{path} is not served: {error}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Ok(())
    })
}

/// ClusterNetworkPolicies without a schema: also what a later version of their definition lets through.
pub fn cluster_policies() -> Value {
    json!({
        "apiVersion": "apiextensions.k8s.io/v1", "kind": "CustomResourceDefinition",
        "metadata": {
            "name": "clusternetworkpolicies.policy.networking.k8s.io",
            "annotations": {"api-approved.kubernetes.io": "unapproved, for tests"},
        },
        "spec": {
            "group": "policy.networking.k8s.io", "scope": "Cluster",
            "names": {
                "kind": "ClusterNetworkPolicy", "plural": "clusternetworkpolicies", "singular": "clusternetworkpolicy",
            },
            "versions": [{
                "name": "v1alpha2", "served": true, "storage": true,
                "schema": {"openAPIV3Schema": {
                    "type": "object", "x-kubernetes-preserve-unknown-fields": true,
                }},
            }],
        },
    })
}
