//! The network controller on a real server, with the token that its pod would have: which taints it takes off, and that it may do
//! nothing else.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use holdfast_tests::work::binaries_dir;
use k8s_openapi::api::core::v1::{Node, Pod};
use kube::api::{Api, DeleteParams, Patch, PatchParams};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::bed::{Bed, NAMESPACE};
use crate::trial;

const ACCOUNT: &str = "holdfast-network-controller";
const TAINT: &str = "network.holdfast.dev/not-ready";
/// The start of the controller, and a change's way through it.
const SEEN_WITHIN: Duration = Duration::from_secs(30);
/// Something that should not happen did not for so long.
const QUIET: Duration = Duration::from_secs(3);
/// From a policy's installation until the server heeds it.
const HEEDED_WITHIN: Duration = Duration::from_secs(60);

pub fn trials() -> Vec<Trial> {
    vec![
        trial("taints::go_when_the_nodes_agent_is_ready", taints_go_when_the_agent_is_ready),
        trial("taints::nothing_else_of_a_node_may_be_changed", nothing_else_may_be_changed),
    ]
}

struct Controller(Child);

impl Controller {
    fn start(bed: &Bed) -> Result<Self> {
        let kubeconfig = bed.pod_kubeconfig(ACCOUNT, "node-of-the-controller", None)?;
        let mut command = Command::new(binaries_dir()?.join("holdfast-netd"));
        command.arg("controller").arg(format!("--namespace={NAMESPACE}")).stdin(Stdio::null());
        Ok(Self(command.arg("--kubeconfig").arg(kubeconfig).spawn()?))
    }
}

impl Drop for Controller {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

struct Objects {
    nodes: Api<Node>,
    pods: Api<Pod>,
}

impl Objects {
    fn of(bed: &Bed) -> Result<Self> {
        let kube = bed.kube()?;
        Ok(Self { nodes: Api::all(kube.clone()), pods: Api::namespaced(kube, NAMESPACE) })
    }

    /// A node as kubelet registers it, with an agent's pod that is not ready.
    async fn put_node(&self, name: &str) -> Result<()> {
        drop(self.nodes.delete(name, &DeleteParams::default()).await);
        let taint = |key: &str, effect: &str| json!({"key": key, "effect": effect});
        let node = json!({
            "apiVersion": "v1", "kind": "Node", "metadata": {"name": name, "labels": {"kept": "yes"}},
            "spec": {"taints": [
                taint("example.org/other", "NoSchedule"), taint(TAINT, "NoSchedule"), taint(TAINT, "NoExecute"),
            ]},
        });
        let params = PatchParams::apply("test").force();
        self.nodes.patch(name, &params, &Patch::Apply(node)).await?;
        let pod = json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": agent(name), "labels": {"app.kubernetes.io/name": "holdfast-netd"}},
            "spec": {"serviceAccountName": ACCOUNT, "nodeName": name, "containers": [{"name": "c", "image": "none"}]},
        });
        self.pods.patch(&agent(name), &params, &Patch::Apply(pod)).await?;
        self.set_ready(name, false).await
    }

    async fn set_ready(&self, node: &str, is_ready: bool) -> Result<()> {
        let status = if is_ready { "True" } else { "False" };
        let status = json!({"status": {"conditions": [{"type": "Ready", "status": status}]}});
        self.pods.patch_status(&agent(node), &PatchParams::default(), &Patch::Merge(status)).await?;
        Ok(())
    }

    async fn taints(&self, node: &str) -> Result<Vec<String>> {
        let node = self.nodes.get(node).await?;
        Ok(node
            .spec
            .unwrap_or_default()
            .taints
            .unwrap_or_default()
            .into_iter()
            .map(|taint| taint.key)
            .collect())
    }

    /// How many of its taints are ours.
    async fn ours(&self, node: &str) -> Result<usize> {
        Ok(self.taints(node).await?.iter().filter(|key| *key == TAINT).count())
    }

    async fn wait_for_the_end(&self, node: &str) -> Result<()> {
        let begun = Instant::now();
        loop {
            let taints = self.taints(node).await?;
            if !taints.iter().any(|key| key == TAINT) {
                ensure!(taints.iter().any(|key| key == "example.org/other"), "another's taint went, too");
                return Ok(());
            }
            ensure!(begun.elapsed() < SEEN_WITHIN, "{node} has {taints:?}");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn remove(&self, node: &str) {
        let delete = DeleteParams { grace_period_seconds: Some(0), ..DeleteParams::default() };
        drop(self.pods.delete(&agent(node), &delete).await);
        drop(self.nodes.delete(node, &delete).await);
    }
}

fn agent(node: &str) -> String {
    format!("holdfast-netd-{node}")
}

fn taints_go_when_the_agent_is_ready(bed: &Bed) -> Result<()> {
    let objects = Objects::of(bed)?;
    let nodes = ["tainted-1", "tainted-2"];
    let _controller = Controller::start(bed)?;
    bed.run(async {
        for node in nodes {
            objects.put_node(node).await?;
        }
        tokio::time::sleep(QUIET).await;
        for node in nodes {
            ensure!(objects.ours(node).await? == 2, "{node}'s agent is not ready");
        }
        objects.set_ready("tainted-1", true).await?;
        objects.wait_for_the_end("tainted-1").await?;
        ensure!(objects.ours("tainted-2").await? == 2, "the other node's went, too");
        Ok(())
    })?;
    // What happens while the server is away is seen afterwards; the controller lives on.
    bed.server().kill()?;
    std::thread::sleep(QUIET);
    bed.server().start_again()?;
    bed.run(async {
        objects.set_ready("tainted-2", true).await?;
        objects.wait_for_the_end("tainted-2").await?;
        for node in nodes {
            objects.remove(node).await;
        }
        Ok(())
    })
}

fn nothing_else_may_be_changed(bed: &Bed) -> Result<()> {
    let objects = Objects::of(bed)?;
    let kubeconfig =
        kube::config::Kubeconfig::read_from(bed.pod_kubeconfig(ACCOUNT, "node-of-the-controller", None)?)?;
    bed.run(async {
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await?;
        let own = kube::Client::try_from(config)?;
        let (nodes, pods) = (Api::<Node>::all(own.clone()), Api::<Pod>::all(own));
        objects.put_node("guarded").await?;
        let patch = async |fields: Value| {
            nodes.patch("guarded", &PatchParams::default(), &Patch::Merge(fields)).await.map(drop)
        };
        heeded(&patch).await?;
        let taint = |key: &str| json!({"key": key, "effect": "NoSchedule"});
        for (what, fields) in [
            ("a label", json!({"metadata": {"labels": {"kept": "no"}}})),
            ("an annotation", json!({"metadata": {"annotations": {"a": "b"}}})),
            ("a finalizer", json!({"metadata": {"finalizers": ["example.org/x"]}})),
            ("cordoning", json!({"spec": {"unschedulable": true}})),
            ("a range", json!({"spec": {"podCIDR": "10.0.0.0/24", "podCIDRs": ["10.0.0.0/24"]}})),
            ("a provider", json!({"spec": {"providerID": "x"}})),
            ("another's taint taken off", json!({"spec": {"taints": [taint(TAINT)]}})),
            (
                "another taint",
                json!({"spec": {"taints": [taint("example.org/other"), taint("example.org/new")]}}),
            ),
        ] {
            match patch(fields).await {
                Err(kube::Error::Api(status)) if status.message.contains("ValidatingAdmissionPolicy") => {}
                answer => bail!("{what}: {answer:?}"),
            }
        }
        let listed = pods.list(&Default::default()).await;
        ensure!(matches!(&listed, Err(kube::Error::Api(status)) if status.code == 403), "it lists all pods");
        let deleted = nodes.delete("guarded", &DeleteParams::default()).await;
        ensure!(matches!(&deleted, Err(kube::Error::Api(status)) if status.code == 403), "it deletes nodes");
        // What it is for. The server itself adds a taint to nodes that are not Ready.
        let mut rest =
            objects.nodes.get("guarded").await?.spec.unwrap_or_default().taints.unwrap_or_default();
        rest.retain(|taint| taint.key != TAINT);
        patch(json!({"spec": {"taints": rest}})).await.context("its own work")?;
        ensure!(objects.ours("guarded").await? == 0);
        objects.remove("guarded").await;
        Ok(())
    })
}

/// Waits until the server knows the policy.
async fn heeded(patch: &impl AsyncFn(Value) -> kube::Result<()>) -> Result<()> {
    let begun = Instant::now();
    loop {
        match patch(json!({"metadata": {"labels": {"probe": format!("p{}", begun.elapsed().as_millis())}}}))
            .await
        {
            Err(kube::Error::Api(status)) if status.message.contains("ValidatingAdmissionPolicy") => {
                return Ok(());
            }
            answer => answer?,
        }
        ensure!(begun.elapsed() < HEEDED_WITHIN, "the policy is not heeded");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}
