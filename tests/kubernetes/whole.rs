//! A whole cluster with its records at the API server: a database on a replicated volume through the loss of a replica, an
//! outage of the API server, and the loss of its node. Each process has the token that kubelet would give its pod.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_service::kubernetes::LEASE_NAME;
use holdfast_tests::cleanup::Logs;
use holdfast_tests::process::wait_until;
use holdfast_tests::story::Story;
use holdfast_tests::{API_URL, ClusterOptions, KubernetesRecords, effort};
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, DeleteParams};
use libtest_mimic::Trial;

use crate::bed::{Bed, NAMESPACE};
use crate::trial;

/// A controller that lost its lease says so in this time.
const LEASE_LOST_WITHIN: Duration = Duration::from_secs(20);
/// From a controller's start until all nodes have announced themselves anew.
const NODES_KNOWN_WITHIN: Duration = Duration::from_secs(30);
/// How people see it: from a change to the object of kind `Volume`.
const SEEN_WITHIN: Duration = Duration::from_secs(60);

pub fn trials() -> Vec<Trial> {
    vec![trial(
        "whole::a_database_outlives_a_replica_an_outage_of_the_api_server_and_its_node",
        database_lives_on,
    )]
}

fn database_lives_on(bed: &Bed) -> Result<()> {
    let mut story = Story::begin_on(&mk_options(bed, None)?)?;
    let outcome = tell(bed, &mut story);
    match outcome {
        Ok(()) => story.end(),
        Err(error) => {
            // The processes need it to end in order.
            let server = bed.server().start_again_if_dead();
            story.cluster.end(Logs::Keep)?;
            server.and(Err(error))
        }
    }
}

/// With certificates of that life from the built-in issuer, or from the harness.
pub fn mk_options(bed: &Bed, certificate_life_s: Option<u64>) -> Result<ClusterOptions> {
    let defaults = ClusterOptions::default();
    bed.store()?;
    let mut kubeconfigs = BTreeMap::new();
    let controller = bed.pod_kubeconfig("holdfast-controller", "node-a", Some(API_URL))?;
    kubeconfigs.insert("controller".to_owned(), controller);
    for node in &defaults.nodes {
        for (process, account) in [("data", "holdfast-data"), ("csi", "holdfast-node")] {
            let kubeconfig = bed.pod_kubeconfig(account, node, Some(API_URL))?;
            kubeconfigs.insert(format!("{node}-{process}"), kubeconfig);
        }
    }
    let leases: Api<Lease> = Api::namespaced(bed.kube()?, NAMESPACE);
    bed.run(async {
        // None is there at first.
        drop(leases.delete(LEASE_NAME, &DeleteParams::default()).await);
        Ok(())
    })?;
    let kubernetes = Some(KubernetesRecords {
        server: bed.server().socket(),
        kubeconfigs,
        certificate_life_s,
        signer: None,
    });
    Ok(ClusterOptions { kind: "kubernetes".to_owned(), kubernetes, ..defaults })
}

fn tell(bed: &Bed, story: &mut Story) -> Result<()> {
    story.provision()?;
    story.run_pods()?;
    seen_as(bed, "Healthy", "3/3")?;
    story.lose_a_replica()?;
    survive_an_outage(bed, story)?;
    story.lose_a_node()?;
    seen_as(bed, "Healthy", "3/3")
}

/// Waits until the one volume stands as given in the object that people look at.
fn seen_as(bed: &Bed, state: &str, in_sync: &str) -> Result<()> {
    let (volumes, begun) = (bed.objects("Volume")?, Instant::now());
    loop {
        let status = bed.run(async {
            let all = volumes.list(&Default::default()).await?;
            ensure!(all.items.len() <= 1, "{} volumes", all.items.len());
            Ok(all.items.first().map(|volume| volume.data["status"].clone()))
        })?;
        if status.as_ref().is_some_and(|s| s["state"] == state && s["inSync"] == in_sync) {
            return Ok(());
        }
        ensure!(begun.elapsed() < SEEN_WITHIN, "it is not seen as {state} {in_sync}: {status:?}");
        std::thread::sleep(Duration::from_millis(500));
    }
}

/// Commits go on, nobody leaves the in-sync set, no target is started; afterwards all works without work by hand.
fn survive_an_outage(bed: &Bed, story: &mut Story) -> Result<()> {
    let outage = effort::rounds(Duration::from_secs(20), Duration::from_secs(600));
    let before = story.generation_and_members("node-a")?;
    let begun = Instant::now();
    bed.server().kill()?;
    while begun.elapsed() < outage {
        story.commit_for_a_moment().context("commits without an API server")?;
    }
    ensure!(story.generation_and_members("node-a")? == before, "something of the volume moved");
    bed.server().start_again()?;
    // It has no lease that it could renew, so it ended; its pod is started again.
    let controller = &mut story.cluster.controller.program;
    let died = Instant::now();
    while controller.is_alive() {
        ensure!(died.elapsed() < LEASE_LOST_WITHIN, "the controller serves on without its lease");
        std::thread::sleep(Duration::from_millis(100));
    }
    controller.start_again()?;
    story.cluster.controller.wait()?;
    ensure!(story.volumes()? == 1, "the volume is not known any more");
    wait_until(NODES_KNOWN_WITHIN, || Ok(story.cluster.largest_volume_bytes(3)? > 0))
        .context("the nodes are not known any more")?;
    story.attach_again()?;
    ensure!(story.generation_and_members("node-a")? == before, "something of the volume moved afterwards");
    story.compare("after the outage").map(drop)
}
