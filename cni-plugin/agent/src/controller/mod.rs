//! `holdfast-netd controller`: takes the start-up taint off nodes whose agent is ready. One Deployment for the cluster.
//!
//! ```text
//! API server --watch--> Index (pods of the agent, nodes with the taint) --due--> patch of one node
//! ```
//!
//! Promised: the taint goes only from a node whose agent's pod is Ready, nothing else of a node is ever changed, and no change of
//! others is lost. Who could break it: another controller of ours, kubelet, a person, each changing the same list of
//! taints between our look and our write. So a write names the resourceVersion that it was made from; the API server refuses
//! it (409) when the node was changed since, and the change itself comes by the watch. For the same reason two controllers
//! need no lease: each write is a compare-and-swap whose outcome is the same whoever makes it.
//!
//! A kubelet that is dead leaves its agent's pod Ready for up to a minute. A node that came back with the taint meanwhile may
//! lose it early: its pods are then refused with "try again" (CNI code 11) until the agent serves, never without policy.
//!
//! It never adds a taint: a pod could be placed between the node's registration and our write. Kubelet's
//! `--register-with-taints`, or the cloud's node template, sets it in the same write that makes the node.

mod index;

use std::path::PathBuf;
use std::time::Duration;

use anyhow::Context;
use futures::{StreamExt, TryStreamExt};
use kube::api::{Api, DynamicObject, ListParams, Patch, PatchParams, WatchEvent, WatchParams};
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ApiResource, GroupVersionKind};
use kube::{Client, Config};
use serde_json::json;
use tracing::{debug, info, warn};

use crate::engine::sentence;
use index::{Due, Index};

pub use index::START_UP_TAINT;

/// The agent's pods carry it.
const AGENT_LABEL: &str = "app.kubernetes.io/name=holdfast-netd";
/// How we sign our changes (Kubernetes' managed fields).
const FIELD_MANAGER: &str = "holdfast-network-controller";
/// A watch ends after this, and everything is listed anew: what a silent server or proxy swallowed is seen then at the latest.
const WATCH_S: u32 = 60;
/// A watch that did not end by itself so long after it should have is given up.
const WATCH_GRACE: Duration = Duration::from_secs(10);
/// After a failure, and while a node is due that could not be written.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// Settings of the controller.
#[derive(Debug, Clone)]
pub struct ControllerSettings {
    /// Namespace of the agents' pods.
    pub namespace: String,
    /// The way to the API server; `None`: `KUBECONFIG`, or the pod's service account.
    pub kubeconfig: Option<PathBuf>,
}

/// Runs until `stop` is done. An API server that is away is waited for. Cancellation safe.
///
/// # Errors
/// No way to an API server is known.
pub async fn run_controller(
    settings: ControllerSettings,
    stop: impl Future<Output = ()> + Send,
) -> anyhow::Result<()> {
    let cluster = Cluster::new(client(&settings).await?, &settings.namespace);
    let work = async {
        let mut told = String::new();
        loop {
            match cluster.follow().await {
                Ok(()) => told.clear(),
                Err(error) => {
                    let error = sentence(&error);
                    if error != told {
                        warn!(error, "the API server cannot be read; start-up taints stay until it can");
                        told = error;
                    }
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
    };
    info!(namespace = settings.namespace, taint = START_UP_TAINT, "network controller started");
    tokio::select! {
        () = stop => Ok(()),
        () = work => Ok(()),
    }
}

async fn client(settings: &ControllerSettings) -> anyhow::Result<Client> {
    let config = match &settings.kubeconfig {
        Some(path) => {
            let kubeconfig = Kubeconfig::read_from(path)
                .with_context(|| format!("the kubeconfig {} cannot be read", path.display()))?;
            Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default()).await?
        }
        None => Config::infer().await.context("no way to the API server was found")?,
    };
    Ok(Client::try_from(config)?)
}

/// The two kinds that matter.
struct Cluster {
    pods: Api<DynamicObject>,
    nodes: Api<DynamicObject>,
}

impl Cluster {
    fn new(client: Client, namespace: &str) -> Self {
        let kind = |kind: &str, plural: &str| {
            ApiResource::from_gvk_with_plural(&GroupVersionKind::gvk("", "v1", kind), plural)
        };
        Self {
            pods: Api::namespaced_with(client.clone(), namespace, &kind("Pod", "pods")),
            nodes: Api::all_with(client, &kind("Node", "nodes")),
        }
    }

    /// Lists, and then follows the changes for a minute.
    async fn follow(&self) -> kube::Result<()> {
        let mut index = Index::default();
        let pods = self.pods.list(&ListParams::default().labels(AGENT_LABEL)).await?;
        let nodes = self.nodes.list(&ListParams::default()).await?;
        pods.items.iter().for_each(|pod| index.put_pod(pod));
        nodes.items.iter().for_each(|node| index.put_node(node));
        let version = |meta: &kube::core::ListMeta| meta.resource_version.clone().unwrap_or_default();
        let (pods_from, nodes_from) = (version(&pods.metadata), version(&nodes.metadata));
        drop((pods, nodes));
        let params = WatchParams::default().timeout(WATCH_S);
        let mut pods = self.pods.watch(&params.clone().labels(AGENT_LABEL), &pods_from).await?.boxed();
        let mut nodes = self.nodes.watch(&params, &nodes_from).await?.boxed();
        let end = tokio::time::Instant::now() + Duration::from_secs(WATCH_S.into()) + WATCH_GRACE;
        loop {
            let is_owing = self.settle(&mut index).await;
            let event = tokio::select! {
                event = pods.try_next() => event?.map(|event| apply(&mut index, event, Index::put_pod, Index::remove_pod)),
                event = nodes.try_next() => event?.map(|event| apply(&mut index, event, Index::put_node, Index::remove_node)),
                () = tokio::time::sleep(RETRY_INTERVAL), if is_owing => continue,
                () = tokio::time::sleep_until(end) => None,
            };
            match event {
                Some(Ok(())) => {}
                Some(Err(error)) => return Err(error),
                None => return Ok(()),
            }
        }
    }

    /// Writes to the nodes that are due; tells whether one of them has to be tried again without a change of it.
    async fn settle(&self, index: &mut Index) -> bool {
        let mut is_owing = false;
        for Due { node, version, taints } in index.due() {
            let fields = json!({"metadata": {"resourceVersion": version}, "spec": {"taints": taints}});
            let params =
                PatchParams { field_manager: Some(FIELD_MANAGER.to_owned()), ..PatchParams::default() };
            match self.nodes.patch(&node, &params, &Patch::Merge(&fields)).await {
                Ok(changed) => {
                    info!(node, "the start-up taint is gone: the node's agent is ready");
                    index.put_node(&changed);
                }
                // It was changed, or is gone: the watch tells.
                Err(kube::Error::Api(status)) if matches!(status.code, 404 | 409) => {
                    debug!(node, "the node changed meanwhile");
                    index.remove_name(&node);
                }
                Err(error) => {
                    warn!(node, error = sentence(&error), "the start-up taint could not be taken off");
                    is_owing = true;
                }
            }
        }
        is_owing
    }
}

/// What an event says. One that says that the watch is over comes back as the error that it carries.
fn apply(
    index: &mut Index,
    event: WatchEvent<DynamicObject>,
    put: fn(&mut Index, &DynamicObject),
    remove: fn(&mut Index, &DynamicObject),
) -> kube::Result<()> {
    match event {
        WatchEvent::Added(object) | WatchEvent::Modified(object) => put(index, &object),
        WatchEvent::Deleted(object) => remove(index, &object),
        WatchEvent::Bookmark(_) => {}
        WatchEvent::Error(status) => return Err(kube::Error::Api(status)),
    }
    Ok(())
}
