//! A large cluster's objects, coming and going, and one real agent: what it costs, and how long a change takes.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, ensure};
use futures::{StreamExt, TryStreamExt};
use holdfast_proto::agent::agent_client::AgentClient;
use holdfast_proto::agent::{ExplainRequest, PoliciesRequest};
use holdfast_tests::effort::rounds;
use holdfast_tests::netbed::NetBed;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use libtest_mimic::Trial;
use rand::Rng;
use serde_json::{Value, json};
use tonic::transport::{Channel, Endpoint, Uri};

use crate::agents::Cluster;
use crate::bed::Bed;
use crate::objects::put;
use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![trial("soak::an_agent_follows_a_large_cluster_in_little_memory", soak)]
}

/// Requests that make the objects at a time.
const MAKERS: usize = 16;
/// As each namespace has pods and policies of its own.
const PODS_PER_NAMESPACE: usize = 100;
/// An agent that reads all this for the first time, on a busy machine.
const READY_TIMEOUT: Duration = Duration::from_secs(300);
/// On a machine that does other things as well; measured were 44 ms.
const LAG_P99_MAX_S: f64 = 2.0;
/// From a change's request to its effect.
const LAG_TIMEOUT: Duration = Duration::from_secs(60);

/// How much there is.
struct Size {
    nodes: usize,
    pods: usize,
    policies: usize,
    /// Changes a second, of pods and policies that are nobody's here.
    changes_per_second: u64,
    /// For how long.
    lasts: Duration,
    /// Changes that are timed meanwhile, of each sort.
    samples: u32,
    /// What the agent may have at most.
    rss_mib_max: f64,
}

fn size() -> Size {
    let short = Size {
        nodes: 100,
        pods: 1000,
        policies: 200,
        changes_per_second: 30,
        lasts: Duration::from_secs(10),
        samples: 20,
        rss_mib_max: 35.0,
    };
    let long = Size {
        nodes: 1000,
        pods: 10_000,
        policies: 2000,
        changes_per_second: 50,
        lasts: Duration::from_secs(600),
        samples: 200,
        rss_mib_max: 45.0,
    };
    rounds(short, long)
}

fn soak(bed: &Bed) -> Result<()> {
    let size = size();
    let mut cluster = Cluster::start(bed, crate::agents::nodes(1), &[])?;
    let made = Instant::now();
    let outcome = fill(&cluster, &size).and_then(|()| {
        println!("objects made in {:.1} s", made.elapsed().as_secs_f64());
        measure(&mut cluster, &size)
    });
    empty(&cluster, &size)?;
    outcome?;
    cluster.end()
}

fn measure(cluster: &mut Cluster<'_>, size: &Size) -> Result<()> {
    cluster.attach(0, "server")?;
    let first = first_reading(cluster.net()?)?;
    let socket = cluster.net()?.nodes[0].spaces.host_path("/run/holdfast/netd.sock");
    let (kube, namespace) = (cluster.kube.clone(), cluster.namespace.clone());
    let stop = Arc::new(AtomicBool::new(false));
    let changes = Arc::new(AtomicU64::new(0));
    let (policies, labels, failed) = cluster.bed.run(async {
        let mut agent = AgentClient::new(connect(socket).await?);
        let churn = tokio::spawn(churn(
            kube.clone(),
            Churn::of(size, &namespace),
            Arc::clone(&stop),
            Arc::clone(&changes),
        ));
        put(&kube, &policy(&namespace, "to-server", 80)).await?;
        let (mut policies, mut labels) = (Vec::new(), Vec::new());
        let mut turns = tokio::time::interval(size.lasts / size.samples);
        for number in 0..size.samples {
            turns.tick().await;
            policies.push(policy_lag(&kube, &mut agent, &namespace, 80 + u16::from(number % 2 == 0)).await?);
            labels.push(label_lag(&kube, &mut agent, &namespace, number % 2 == 0).await?);
        }
        stop.store(true, Ordering::SeqCst);
        Ok((policies, labels, churn.await?.err()))
    })?;
    if let Some(error) = failed {
        return Err(error.context("churn"));
    }
    let (now, most) = cluster.net()?.nodes[0].netd.rss_mib()?;
    println!(
        "{} nodes, {} pods, {} policies, {} changes meanwhile: ready {:.1} s after the start; {now:.1} MiB, at most {most:.1}",
        size.nodes,
        size.pods,
        size.policies,
        changes.load(Ordering::SeqCst),
        first.as_secs_f64()
    );
    for (what, lags) in
        [("a policy's change until it is in force", policies), ("a pod's label until it counts", labels)]
    {
        let (p50, p99) = (at(&lags, 50), at(&lags, 99));
        println!("{what}: p50 {:.0} ms, p99 {:.0} ms, of {}", p50 * 1e3, p99 * 1e3, lags.len());
        ensure!(p99 < LAG_P99_MAX_S, "{what}: p99 {p99:.1} s");
    }
    ensure!(most < size.rss_mib_max, "{most:.1} MiB");
    Ok(())
}

/// From the start of an agent to when it is ready, with all objects there.
fn first_reading(net: &mut NetBed) -> Result<Duration> {
    let node = &mut net.nodes[0];
    node.netd.kill()?;
    let begun = Instant::now();
    node.netd.start_again()?;
    while let Err(error) = node.wait() {
        ensure!(begun.elapsed() < READY_TIMEOUT, "{error:#}");
    }
    Ok(begun.elapsed())
}

async fn connect(socket: std::path::PathBuf) -> Result<Channel> {
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move {
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(
                tokio::net::UnixStream::connect(socket).await?,
            ))
        }
    });
    Ok(Endpoint::from_static("http://agent").connect_with_connector(connector).await?)
}

/// By the agent's own clock, which is this machine's: when it saw the transaction succeed.
async fn policy_lag(
    kube: &kube::Client,
    agent: &mut AgentClient<Channel>,
    namespace: &str,
    port: u16,
) -> Result<Duration> {
    let api: Api<DynamicObject> = api_of(kube, "networking.k8s.io", "v1", "NetworkPolicy", Some(namespace));
    let change = json!({"spec": policy(namespace, "to-server", port)["spec"]});
    let begun = SystemTime::now().duration_since(UNIX_EPOCH)?;
    let changed = api.patch("to-server", &PatchParams::default(), &Patch::Merge(&change)).await?;
    let generation = changed.metadata.generation.context("a generation")?;
    let waited = Instant::now();
    loop {
        let question = PoliciesRequest { policy: format!("{namespace}/to-server") };
        let answer = agent.policies(question).await?.into_inner();
        let is_it = |state: &&holdfast_proto::agent::PolicyState| {
            state.metadata_generation >= generation && state.in_force
        };
        if let Some(state) = answer.policies.iter().find(is_it) {
            return Ok(Duration::from_millis(state.since_ms).saturating_sub(begun));
        }
        ensure!(waited.elapsed() < LAG_TIMEOUT, "{:?}", answer.policies);
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

/// A pod of another node is, or is not any more, one that the policy lets in.
async fn label_lag(
    kube: &kube::Client,
    agent: &mut AgentClient<Channel>,
    namespace: &str,
    is_client: bool,
) -> Result<Duration> {
    let api: Api<DynamicObject> = api_of(kube, "", "v1", "Pod", Some(namespace));
    let change = json!({"metadata": {"labels": {"app": if is_client { "client" } else { "other" }}}});
    let begun = Instant::now();
    api.patch("peer", &PatchParams::default(), &Patch::Merge(&change)).await?;
    loop {
        let question = ExplainRequest {
            from: format!("{namespace}/peer"),
            to: format!("{namespace}/server"),
            port: 80,
            protocol: "tcp".to_owned(),
        };
        let answer = agent.explain(question).await?.into_inner();
        ensure!(answer.failure.is_none(), "{answer:?}");
        if answer.ingress.starts_with("allowed") == is_client {
            return Ok(begun.elapsed());
        }
        ensure!(begun.elapsed() < LAG_TIMEOUT, "{answer:?}");
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

/// The lag, in seconds, that so many of a hundred do not exceed.
fn at(lags: &[Duration], share: usize) -> f64 {
    let mut lags = lags.to_vec();
    lags.sort_unstable();
    lags[(lags.len() * share / 100).min(lags.len() - 1)].as_secs_f64()
}

/// What changes beside what is timed.
struct Churn {
    namespaces: Vec<String>,
    policies_per_namespace: usize,
    pause: Duration,
}

impl Churn {
    fn of(size: &Size, namespace: &str) -> Self {
        let namespaces = size.pods / PODS_PER_NAMESPACE;
        Self {
            namespaces: (0..namespaces).map(|number| format!("{namespace}-{number}")).collect(),
            policies_per_namespace: size.policies / namespaces,
            pause: Duration::from_millis(1000 / size.changes_per_second),
        }
    }
}

async fn churn(
    kube: kube::Client,
    churn: Churn,
    stop: Arc<AtomicBool>,
    changes: Arc<AtomicU64>,
) -> Result<()> {
    while !stop.load(Ordering::SeqCst) {
        let (namespace, what, number) = {
            let mut random = rand::rng();
            let namespace = &churn.namespaces[random.random_range(0..churn.namespaces.len())];
            (namespace.clone(), random.random_range(0..10), random.random_range(0..PODS_PER_NAMESPACE))
        };
        let pods: Api<DynamicObject> = api_of(&kube, "", "v1", "Pod", Some(&namespace));
        let name = format!("pod-{number}");
        match what {
            0..6 => {
                let label =
                    json!({"metadata": {"labels": {"app": format!("app-{}", rand::random::<u8>() % 10)}}});
                pods.patch(&name, &PatchParams::default(), &Patch::Merge(&label)).await?;
            }
            6 | 7 => {
                let before = pods.get(&name).await?;
                pods.delete(&name, &DeleteParams::default().grace_period(0)).await?;
                let address = before.data["status"]["podIP"].as_str().unwrap_or_default().to_owned();
                let node = before.data["spec"]["nodeName"].as_str().unwrap_or_default().to_owned();
                make_pod(&kube, &namespace, &name, &node, &address).await?;
            }
            _ => {
                let api = api_of(&kube, "networking.k8s.io", "v1", "NetworkPolicy", Some(&namespace));
                let name = format!("policy-{}", number % churn.policies_per_namespace);
                let change =
                    json!({"spec": policy(&namespace, &name, 1000 + rand::random::<u16>() % 1000)["spec"]});
                let _: DynamicObject =
                    api.patch(&name, &PatchParams::default(), &Patch::Merge(&change)).await?;
            }
        }
        changes.fetch_add(1, Ordering::SeqCst);
        tokio::time::sleep(churn.pause).await;
    }
    Ok(())
}

fn api_of(
    kube: &kube::Client,
    group: &str,
    version: &str,
    kind: &str,
    namespace: Option<&str>,
) -> Api<DynamicObject> {
    let kind = GroupVersionKind::gvk(group, version, kind);
    let resource = ApiResource::from_gvk_with_plural(&kind, &crate::bed::plural(&kind.kind));
    match namespace {
        Some(namespace) => Api::namespaced_with(kube.clone(), namespace, &resource),
        None => Api::all_with(kube.clone(), &resource),
    }
}

fn policy(namespace: &str, name: &str, port: u16) -> Value {
    let subject = if name == "to-server" { "server".to_owned() } else { format!("app-{}", name.len() % 10) };
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "podSelector": {"matchLabels": {"app": subject}}, "policyTypes": ["Ingress"],
            "ingress": [{
                "from": [{"podSelector": {"matchLabels": {"app": "client"}}}],
                "ports": [{"port": port}, {"port": 80}],
            }],
        },
    })
}

async fn make_pod(kube: &kube::Client, namespace: &str, name: &str, node: &str, address: &str) -> Result<()> {
    let api = api_of(kube, "", "v1", "Pod", Some(namespace));
    let pod: DynamicObject = serde_json::from_value(json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": namespace, "labels": {
            "app": format!("app-{}", name.len() % 10), "tier": "back", "release": "r1", "team": namespace,
        }},
        "spec": {"nodeName": node, "containers": [{"name": "main", "image": "none", "ports": [
            {"name": "http", "containerPort": 80}, {"name": "metrics", "containerPort": 9090},
        ]}]},
    }))?;
    api.create(&PostParams::default(), &pod).await.with_context(|| format!("{namespace}/{name}"))?;
    let status = json!({"status": {"phase": "Running", "podIP": address, "podIPs": [{"ip": address}]}});
    api.patch_status(name, &PatchParams::default(), &Patch::Merge(&status)).await?;
    Ok(())
}

fn node_name(cluster: &Cluster<'_>, number: usize) -> String {
    format!("{}-node-{number}", cluster.namespace)
}

fn fill(cluster: &Cluster<'_>, size: &Size) -> Result<()> {
    let (kube, own) = (&cluster.kube, &cluster.namespace);
    let namespaces = size.pods / PODS_PER_NAMESPACE;
    cluster.bed.run(async {
        let nodes = futures::stream::iter((0..size.nodes).map(|number| {
            let (high, low) = (number / 250, number % 250);
            let node = json!({
                "apiVersion": "v1", "kind": "Node", "metadata": {"name": node_name(cluster, number)},
                "spec": {"podCIDR": format!("10.{}.{low}.0/24", 100 + high), "podCIDRs": [format!("10.{}.{low}.0/24", 100 + high)]},
                "status": {"addresses": [{"type": "InternalIP", "address": format!("192.168.{}.{}", 80 + high, low + 1)}]},
            });
            async move { put(kube, &node).await }
        }));
        nodes.buffer_unordered(MAKERS).try_collect::<Vec<()>>().await?;
        let all = futures::stream::iter((0..namespaces).map(|number| async move {
            let namespace = format!("{own}-{number}");
            put(kube, &json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}})).await?;
            for pod in 0..PODS_PER_NAMESPACE {
                let index = number * PODS_PER_NAMESPACE + pod;
                let (node, host) = (index % size.nodes, 2 + index / size.nodes);
                let address = format!("10.{}.{}.{host}", 100 + node / 250, node % 250);
                make_pod(kube, &namespace, &format!("pod-{pod}"), &node_name(cluster, node), &address).await?;
            }
            let policies = api_of(kube, "networking.k8s.io", "v1", "NetworkPolicy", Some(&namespace));
            for index in 0..size.policies / namespaces {
                let object = policy(&namespace, &format!("policy-{index}"), 1000);
                policies.create(&PostParams::default(), &serde_json::from_value(object)?).await?;
            }
            Ok::<(), anyhow::Error>(())
        }));
        all.buffer_unordered(MAKERS).try_collect::<Vec<()>>().await?;
        make_pod(kube, own, "peer", &node_name(cluster, 0), "10.100.0.250").await
    })
}

fn empty(cluster: &Cluster<'_>, size: &Size) -> Result<()> {
    let (kube, own) = (&cluster.kube, &cluster.namespace);
    cluster.bed.run(async {
        let now = DeleteParams::default().grace_period(0);
        for number in 0..size.pods / PODS_PER_NAMESPACE {
            let namespace = format!("{own}-{number}");
            for (group, kind) in [("", "Pod"), ("networking.k8s.io", "NetworkPolicy")] {
                let api = api_of(kube, group, "v1", kind, Some(&namespace));
                api.delete_collection(&now, &ListParams::default()).await?;
            }
            let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
            crate::objects::remove(kube, &object).await?;
        }
        let nodes = api_of(kube, "", "v1", "Node", None);
        for number in 0..size.nodes {
            nodes.delete(&node_name(cluster, number), &now).await?;
        }
        Ok(())
    })
}
