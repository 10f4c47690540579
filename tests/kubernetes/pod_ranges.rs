//! Claims of address ranges at the API server: the definition, the rights, and many nodes at once.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_agent::{Claims, ObjectSource, Swapped, open_objects};
use holdfast_net_core::pod_ranges::{PodRange, Proposal, object_name};
use holdfast_tests::api_server::ADMIN;
use kube::api::{Api, DeleteParams, DynamicObject, PostParams};
use kube::core::{ApiResource, GroupVersionKind};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::bed::{Bed, apply_manifest};
use crate::objects::{View, install_pod_ranges, put};
use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("pod_ranges::of_many_nodes_that_claim_one_block_at_once_one_gets_it", one_gets_it),
        trial(
            "pod_ranges::the_definition_keeps_out_what_an_agent_would_not_believe",
            wrong_ones_are_kept_out,
        ),
        trial("pod_ranges::a_node_claims_for_itself_only_and_reads_what_it_needs", rights),
    ]
}

/// Of the trial with many nodes, and of that with rights.
const RANGE: &str = "10.203.7.0/24";
/// A server that is busy may not answer a claim in its time; then it is made again, as agents do.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(30);

fn ranges(bed: &Bed, of: Option<kube::Client>) -> Result<Api<DynamicObject>> {
    let kind = GroupVersionKind::gvk("network.holdfast.dev", "v1alpha1", "PodRange");
    let kube = match of {
        Some(kube) => kube,
        None => bed.kube()?,
    };
    Ok(Api::all_with(kube, &ApiResource::from_gvk(&kind)))
}

fn proposal(from: Option<&str>) -> Result<Proposal> {
    Ok(Proposal { range: RANGE.parse()?, from: from.map(str::to_owned) })
}

fn one_gets_it(bed: &Bed) -> Result<()> {
    const ROUNDS: u32 = 10;
    const NODES: u32 = 12;
    install_pod_ranges(bed)?;
    let ranges = ranges(bed, None)?;
    let name = object_name(&RANGE.parse()?);
    let kubeconfig = bed.server().kubeconfig(ADMIN, None)?;
    let source = ObjectSource::Kubernetes { kubeconfig: Some(kubeconfig) };
    bed.run(async {
        let (_batches, claims) = open_objects(&source, "node-a").await?;
        let claims = Arc::new(claims);
        let mut owner: Option<String> = None;
        for round in 0..ROUNDS {
            let barrier = Arc::new(tokio::sync::Barrier::new(NODES as usize));
            let proposal = proposal(owner.as_deref())?;
            let tasks: Vec<_> = (0..NODES)
                .map(|number| {
                    let (claims, barrier, proposal) =
                        (Arc::clone(&claims), Arc::clone(&barrier), proposal.clone());
                    let node = format!("claimant-{round}-{number}");
                    tokio::spawn(async move {
                        barrier.wait().await;
                        (claimed(&claims, &proposal, &node).await, node)
                    })
                })
                .collect();
            let mut winners = BTreeSet::new();
            let mut others = BTreeSet::new();
            for task in tasks {
                match task.await? {
                    (Ok(Swapped::Done), node) => _ = winners.insert(node),
                    (Ok(Swapped::Is(owner)), _) => _ = others.insert(owner.context("an owner")?),
                    (Err(error), node) => anyhow::bail!("{node}: {error}"),
                }
            }
            ensure!(
                winners.len() == 1 && winners == others,
                "round {round}: {winners:?} won, {others:?} own it"
            );
            let found = ranges.get(&name).await?;
            owner = winners.pop_first();
            ensure!(found.data["spec"]["node"].as_str() == owner.as_deref(), "{found:?}");
        }
        ranges.delete(&name, &DeleteParams::default()).await?;
        Ok(())
    })
}

/// What becomes of a claim in the end.
async fn claimed(claims: &Claims, proposal: &Proposal, node: &str) -> Result<Swapped, String> {
    let begun = Instant::now();
    loop {
        match claims.swap(proposal, node).await {
            Err(_) if begun.elapsed() < CLAIM_TIMEOUT => {}
            answer => return answer,
        }
    }
}

fn wrong_ones_are_kept_out(bed: &Bed) -> Result<()> {
    install_pod_ranges(bed)?;
    let ranges = ranges(bed, None)?;
    let mk = |name: &str, range: &str, node: &str| {
        json!({
            "apiVersion": "network.holdfast.dev/v1alpha1", "kind": "PodRange",
            "metadata": {"name": name}, "spec": {"range": range, "node": node},
        })
    };
    bed.run(async {
        for (name, range, node) in [
            ("0ac90700-24", "10.201.7.1/24", "a"),
            ("0ac90700-24", "10.201.7.0", "a"),
            ("0ac90700-24", "10.201.7.0/24", ""),
            ("0ac90700-24", "10.201.7.0/24", "Node A"),
            ("0ac90700-25", "10.201.7.0/24", "a"),
            ("block", "10.201.7.0/24", "a"),
            ("0ac90700-64", "fd00:9::/64", "a"),
            ("0ac90700-24", "elsewhere", "a"),
        ] {
            let object: DynamicObject = serde_json::from_value(mk(name, range, node))?;
            let answer = ranges.create(&PostParams::default(), &object).await;
            let code = if let Err(kube::Error::Api(status)) = &answer { status.code } else { 0 };
            ensure!(code == 422, "{name} {range:?} {node:?}: {answer:?}");
        }
        // What the agent's type makes is let in, and not made another block's later.
        for range in ["10.201.7.0/24", "fd00:201:7::/64"] {
            let made = PodRange::new(range.parse()?, "node-a.example");
            let object = mk(&made.metadata.name, range, &made.spec.node);
            let object: DynamicObject = serde_json::from_value(object)?;
            let mut made = ranges.create(&PostParams::default(), &object).await.context(range)?;
            let name = made.metadata.name.clone().context("a name")?;
            made.data["spec"]["range"] = json!("10.202.0.0/24");
            let answer = ranges.replace(&name, &PostParams::default(), &made).await;
            ensure!(answer.is_err(), "{answer:?}");
            ranges.delete(&name, &DeleteParams::default()).await?;
        }
        Ok(())
    })
}

/// As an agent in a pod, with nothing but the rights that we ship.
fn rights(bed: &Bed) -> Result<()> {
    install_pod_ranges(bed)?;
    let admin = bed.kube()?;
    bed.run(async {
        for file in ["common/namespace.yaml", "network/rbac.yaml", "network/netd-admission.yaml"] {
            apply_manifest(&admin, file).await.with_context(|| file.to_owned())?;
        }
        let namespace = json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "rights-pods"}});
        put(&admin, &namespace).await
    })?;
    let kubeconfig = bed.pod_kubeconfig("holdfast-netd", "rights-node", None)?;
    let source = ObjectSource::Kubernetes { kubeconfig: Some(kubeconfig.clone()) };
    // Everything that it watches can be watched.
    let mut view = View::open(bed, &source, "rights-")?;
    view.until(bed, "all kinds are read", |view| view.complete && view.readable)?;
    ensure!(view.get("Node", "rights-node").is_some() && view.get("Namespace", "rights-pods").is_some());
    let (claims, range) = (bed.run(async { open_objects(&source, "rights-node").await })?.1, proposal(None)?);
    bed.run(async {
        // A policy takes a moment until it is enforced.
        let mut refused = String::new();
        for _ in 0..100 {
            match claims.swap(&range, "other-node").await {
                Err(error) => {
                    refused = error;
                    if refused.contains("itself only") {
                        break;
                    }
                }
                Ok(_) => {
                    let ranges = ranges(bed, Some(admin.clone()))?;
                    ranges.delete(&object_name(&range.range), &DeleteParams::default()).await?;
                }
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        ensure!(refused.contains("claims blocks for itself only"), "{refused:?}");
        let swapped = claimed(&claims, &range, "rights-node").await.map_err(anyhow::Error::msg)?;
        ensure!(swapped == Swapped::Done);
        Ok(())
    })?;
    let kube = bed.run(async {
        let kubeconfig = kube::config::Kubeconfig::read_from(&kubeconfig)?;
        let config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await?;
        Ok(kube::Client::try_from(config)?)
    })?;
    let own = ranges(bed, Some(kube.clone()))?;
    bed.run(async {
        let answer = own.delete(&object_name(&range.range), &DeleteParams::default()).await;
        ensure!(answer.is_err(), "an agent may remove claims: {answer:?}");
        for path in
            ["/api/v1/secrets", "/api/v1/configmaps", "/apis/storage.holdfast.dev/v1alpha1/volumerecords"]
        {
            let answer: kube::Result<Value> = kube.request(http::Request::get(path).body(Vec::new())?).await;
            ensure!(
                matches!(&answer, Err(kube::Error::Api(status)) if status.code == 403),
                "{path}: {answer:?}"
            );
        }
        let ranges = ranges(bed, Some(admin.clone()))?;
        ranges.delete(&object_name(&range.range), &DeleteParams::default()).await?;
        Ok(())
    })
}
