//! Real agents on nodes of their own, the real plugin, a real API server: pods are attached, policies hold, also while the server
//! is away and when an agent starts without it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, ensure};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::netbed::{ApiAccess, Attachment, NetBed};
use holdfast_tests::process::wait_until;
use k8s_openapi::api::core::v1::Node;
use kube::api::{Api, DynamicObject, ListParams};
use kube::core::{ApiResource, GroupVersionKind};
use libtest_mimic::Trial;
use nix::sched::{CloneFlags, setns};
use serde_json::{Value, json};

use crate::bed::{Bed, apply_manifest};
use crate::objects::{install_pod_ranges, put, remove};
use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("agents::pods_are_attached_and_policies_outlive_the_server_and_the_agent", outages),
        trial("agents::only_the_pod_that_was_named_by_its_uid_gets_its_rights", uids),
        trial("agents::nodes_without_a_pod_cidr_claim_theirs", claims),
    ]
}

/// An agent that lost the server asks again within 15 s.
const CHANGE_TIMEOUT: Duration = Duration::from_secs(40);
/// A connection that is dropped shows by silence.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(700);
/// CNI's codes.
const INVALID_ENVIRONMENT: u64 = 4;
const TRY_AGAIN_LATER: u64 = 11;

/// Agents that watch the shared server, and a namespace of their own there.
pub struct Cluster<'a> {
    pub bed: &'a Bed,
    net: Option<NetBed>,
    pub namespace: String,
    pub kube: kube::Client,
    nodes: Vec<Value>,
}

impl<'a> Cluster<'a> {
    pub fn start(bed: &'a Bed, nodes: Vec<Value>, settings: &[&str]) -> Result<Self> {
        install_pod_ranges(bed)?;
        let kube = bed.kube()?;
        let namespace = format!("agents-{:04x}", rand::random::<u16>());
        bed.run(async {
            let object = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}});
            put(&kube, &object).await?;
            let known: Api<Node> = Api::all(kube.clone());
            for node in &nodes {
                // Of another trial, with another range: a range is for life.
                let name = node["metadata"]["name"].as_str().context("a name")?;
                if known.get_opt(name).await?.is_some() {
                    remove(&kube, node).await?;
                }
            }
            for file in ["common/namespace.yaml", "network/rbac.yaml"] {
                apply_manifest(&kube, file).await.with_context(|| file.to_owned())?;
            }
            Ok(())
        })?;
        let mut kubeconfigs = BTreeMap::new();
        for node in &nodes {
            let name = node["metadata"]["name"].as_str().context("a name")?;
            let kubeconfig = bed.pod_kubeconfig("holdfast-netd", name, Some(ApiAccess::URL))?;
            kubeconfigs.insert(name.to_owned(), kubeconfig);
        }
        // After the tokens: who asks for them makes a Node too, and would take the range back.
        bed.run(async {
            for node in &nodes {
                put(&kube, node).await?;
            }
            Ok(())
        })?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let access = ApiAccess { server: bed.server().socket(), kubeconfigs, runtime };
        let count = u8::try_from(nodes.len())?;
        let net = NetBed::start_at("kubernetes-agents", count, settings, Some(access))?;
        Ok(Self { bed, net: Some(net), namespace, kube, nodes })
    }

    pub fn net(&mut self) -> Result<&mut NetBed> {
        self.net.as_mut().context("it was ended")
    }

    pub fn put(&self, object: &Value) -> Result<()> {
        self.bed.run(async { put(&self.kube, object).await })
    }

    fn pod(&self, name: &str, node: &str) -> Value {
        json!({
            "apiVersion": "v1", "kind": "Pod",
            "metadata": {"name": name, "namespace": self.namespace, "labels": {"app": name}},
            "spec": {"nodeName": node, "containers": [{"name": "main", "image": "none"}]},
        })
    }

    fn uid(&self, name: &str) -> Result<String> {
        let pods: Api<k8s_openapi::api::core::v1::Pod> = Api::namespaced(self.kube.clone(), &self.namespace);
        self.bed.run(async { pods.get(name).await?.metadata.uid.context("a uid") })
    }

    fn sandbox(&mut self, node: usize, id: &str, name: &str, uid: &str) -> Result<Attachment> {
        let namespace = self.namespace.clone();
        let args = format!(
            "IgnoreUnknown=1;K8S_POD_NAMESPACE={namespace};K8S_POD_NAME={name};K8S_POD_INFRA_CONTAINER_ID={id};K8S_POD_UID={uid}"
        );
        self.net()?.sandbox_with(node, id, args)
    }

    /// What scheduler, kubelet and runtime do for a pod.
    pub fn attach(&mut self, node: usize, name: &str) -> Result<Attachment> {
        let node_name = self.nodes[node]["metadata"]["name"].as_str().context("a name")?.to_owned();
        let mut pod = self.pod(name, &node_name);
        self.put(&pod)?;
        let uid = self.uid(name)?;
        let id = format!("{}-{name}", self.namespace);
        let mut attachment = self.sandbox(node, &id, name, &uid)?;
        self.net()?.add(&mut attachment)?;
        let ips: Vec<Value> = attachment.addresses.iter().map(|ip| json!({"ip": ip})).collect();
        pod["status"] = json!({"phase": "Running", "podIP": attachment.addresses[0], "podIPs": ips});
        self.put(&pod)?;
        Ok(attachment)
    }

    /// Who is not called `client` reaches no port of `server`, and it only this one.
    fn policy(&self, port: u16) -> Value {
        json!({
            "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy",
            "metadata": {"name": "to-server", "namespace": self.namespace},
            "spec": {
                "podSelector": {"matchLabels": {"app": "server"}}, "policyTypes": ["Ingress"],
                "ingress": [{
                    "from": [{"podSelector": {"matchLabels": {"app": "client"}}}], "ports": [{"port": port}],
                }],
            },
        })
    }

    pub fn end(mut self) -> Result<()> {
        if let Some(net) = self.net.take() {
            net.end(Logs::Remove)?;
        }
        self.clean()
    }

    fn clean(&self) -> Result<()> {
        let namespace =
            json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": self.namespace}});
        self.bed.run(async {
            for node in &self.nodes {
                remove(&self.kube, node).await?;
            }
            remove(&self.kube, &namespace).await
        })
    }
}

impl Drop for Cluster<'_> {
    fn drop(&mut self) {
        if let Some(net) = self.net.take() {
            // A trial that failed; its error says more.
            let _ = net.end(Logs::Keep);
            let _ = self.clean();
        }
    }
}

pub fn nodes(count: u8) -> Vec<Value> {
    (0..count).map(|index| NetBed::node_object(&node_name(index), index)).collect()
}

fn node_name(index: u8) -> String {
    format!("node-{}", char::from(b'a' + index))
}

fn outages(bed: &Bed) -> Result<()> {
    let mut cluster = Cluster::start(bed, nodes(2), &[])?;
    let server = cluster.attach(0, "server")?;
    let client = cluster.attach(1, "client")?;
    let _listeners = [listen(&server, 80)?, listen(&server, 81)?];
    until(|| Ok(reaches(&client, &server, 80)? && reaches(&client, &server, 81)?), "all is open")?;
    cluster.put(&cluster.policy(80))?;
    until(|| Ok(!reaches(&client, &server, 81)?), "port 81 is closed")?;
    ensure!(reaches(&client, &server, 80)?, "port 80 is closed too");

    bed.server().kill()?;
    std::thread::sleep(Duration::from_secs(3));
    ensure!(reaches(&client, &server, 80)? && !reaches(&client, &server, 81)?, "while the server is away");
    // STATUS is fine: what is there is as it should be.
    cluster.net()?.nodes[0].wait()?;
    // A pod that nobody knows yet is denied everything until somebody does.
    let mut ghost = cluster.sandbox(0, &format!("{}-ghost", cluster.namespace), "ghost", "uid-of-a-ghost")?;
    cluster.net()?.add(&mut ghost)?;
    ensure!(!reaches(&ghost, &server, 80)? && !reaches(&ghost, &server, 81)?, "a ghost gets through");
    cluster.net()?.detach(&ghost)?;

    let namespace = cluster.namespace.clone();
    let netd = &mut cluster.net()?.nodes[0].netd;
    netd.kill()?;
    netd.start_again()?;
    let late = cluster.sandbox(0, &format!("{namespace}-late"), "late", "uid")?;
    until(
        || Ok(cluster.net.as_ref().context("a net")?.answer("STATUS", &late).is_ok()),
        "the agent answers",
    )?;
    let mut attached = false;
    until(
        || {
            let answer = cluster.net.as_ref().context("a net")?.answer("ADD", &late)?;
            attached |= answer.success;
            let says_why = answer.stdout.contains("not read yet");
            Ok(attached || answer.error_code() == Some(TRY_AGAIN_LATER) && says_why)
        },
        "ADD is answered with 11 and why",
    )?;
    ensure!(!attached, "a pod was attached before anything was read");
    ensure!(
        reaches(&client, &server, 80)? && !reaches(&client, &server, 81)?,
        "the agent started without a server"
    );

    bed.server().start_again()?;
    cluster.net()?.nodes[0].wait()?;
    ensure!(reaches(&client, &server, 80)? && !reaches(&client, &server, 81)?, "the server is back");
    cluster.put(&cluster.policy(81))?;
    until(|| Ok(reaches(&client, &server, 81)? && !reaches(&client, &server, 80)?), "the policy changed")?;
    let other = cluster.attach(0, "other")?;
    ensure!(!reaches(&other, &server, 81)?, "another pod gets through");
    cluster.end()
}

fn uids(bed: &Bed) -> Result<()> {
    let mut cluster = Cluster::start(bed, nodes(1), &[])?;
    let server = cluster.attach(0, "server")?;
    let _listener = listen(&server, 80)?;
    cluster.put(&cluster.policy(80))?;
    let client = cluster.attach(0, "client")?;
    until(|| reaches(&client, &server, 80), "the client gets through")?;
    // The pod was made again: its sandbox comes before the watch has told of it.
    cluster.net()?.detach(&client)?;
    let id = format!("{}-again", cluster.namespace);
    let mut again = cluster.sandbox(0, &id, "client", "another-uid")?;
    cluster.net()?.add(&mut again)?;
    ensure!(!reaches(&again, &server, 80)?, "a pod has the rights of its forerunner");
    cluster.net()?.detach(&again)?;
    // Nobody is attached without a name.
    for (number, args) in
        ["", "IgnoreUnknown=1;K8S_POD_NAMESPACE=default;K8S_POD_NAME=client"].into_iter().enumerate()
    {
        let id = format!("{}-nameless-{number}", cluster.namespace);
        let nameless = cluster.net()?.sandbox_with(0, &id, args.to_owned())?;
        let answer = cluster.net()?.answer("ADD", &nameless)?;
        ensure!(answer.error_code() == Some(INVALID_ENVIRONMENT), "{args:?}: {answer:?}");
    }
    cluster.end()
}

fn claims(bed: &Bed) -> Result<()> {
    let without = nodes(2).into_iter().map(|mut node| {
        node["spec"] = json!({});
        node
    });
    let settings = ["--cluster-cidr=10.200.0.0/16,fd00:200::/48"];
    let mut cluster = Cluster::start(bed, without.collect(), &settings)?;
    let (server, client) = (cluster.attach(0, "server")?, cluster.attach(1, "client")?);
    let _listener = listen(&server, 80)?;
    until(|| reaches(&client, &server, 80), "pods of both nodes reach each other")?;
    let kind = GroupVersionKind::gvk("network.holdfast.dev", "v1alpha1", "PodRange");
    let ranges: Api<DynamicObject> = Api::all_with(cluster.kube.clone(), &ApiResource::from_gvk(&kind));
    let found = bed.run(async { Ok(ranges.list(&ListParams::default()).await?.items) })?;
    let of = |node: &str| found.iter().filter(|range| range.data["spec"]["node"] == node).count();
    ensure!(of("node-a") == 2 && of("node-b") == 2, "{found:?}");
    bed.run(async {
        Ok(ranges.delete_collection(&Default::default(), &ListParams::default()).await.map(drop)?)
    })?;
    cluster.end()
}

fn until(is_so: impl FnMut() -> Result<bool>, what: &str) -> Result<()> {
    wait_until(CHANGE_TIMEOUT, is_so).with_context(|| what.to_owned())
}

/// Serves a port of a pod, to whoever gets there.
pub fn listen(pod: &Attachment, port: u16) -> Result<std::thread::JoinHandle<()>> {
    let address = SocketAddr::new(pod.addresses[0], port);
    let listener =
        inside(&pod.netns, move || TcpListener::bind(address))?.with_context(|| address.to_string())?;
    Ok(std::thread::spawn(move || {
        // Ends with the process, as the pod does.
        for stream in listener.incoming() {
            drop(stream);
        }
    }))
}

fn reaches(from: &Attachment, to: &Attachment, port: u16) -> Result<bool> {
    let address: IpAddr = to.addresses[0];
    inside(&from.netns, move || {
        TcpStream::connect_timeout(&SocketAddr::new(address, port), CONNECT_TIMEOUT).is_ok()
    })
}

/// Does something in a network namespace, on a thread of its own.
fn inside<T: Send>(netns: &Path, act: impl FnOnce() -> T + Send) -> Result<T> {
    let file = std::fs::File::open(netns).with_context(|| netns.display().to_string())?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(move || -> Result<T> {
            setns(file, CloneFlags::CLONE_NEWNET)?;
            Ok(act())
        });
        thread.join().map_err(|_| anyhow!("a thread ended"))?
    })
}
