//! The release before this one is installed and used, and upgraded as docs/operations.md says, under a client.

use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use holdfast_tests::go_tools::Skip;
use holdfast_tests::image::REFERENCE;
use holdfast_tests::k8s::{KubeCluster, Tools};
use holdfast_tests::work::binaries_dir;
use libtest_mimic::Trial;

use super::bank::Bank;
use super::moves::wait_for_replicas;
use super::ready::{NAMESPACE, OVERLAY, image, image_of, install, repository, wait_for_workloads};
use super::steady::no_restarts;
use super::upgrade::{PAUSE_MAX, ROLLED, renew_data_processes, wait_for_rollout};
use super::{on_fresh, skippable, volumes};

/// The release's version and commit.
const PREVIOUS: &str = include_str!("../previous-release");
/// What the old pods' image is called, so that both are on the nodes whatever their own names are.
const BEFORE: &str = "holdfast:before";

/// The release before this one, as `scripts/test` builds it.
struct Release {
    version: String,
    programs: PathBuf,
    source: PathBuf,
}

pub fn trials(tools: &Result<Tools, Skip>) -> Vec<Trial> {
    let needs = tools.clone().and_then(|tools| Ok((tools, Release::find()?)));
    let name = "the_previous_release_is_upgraded_without_a_lost_connection_or_entry";
    vec![skippable(name, needs, |(tools, release)| upgraded(tools, release))]
}

impl Release {
    fn find() -> Result<Self, Skip> {
        let (version, commit) = PREVIOUS
            .trim()
            .split_once(' ')
            .ok_or_else(|| Skip("tests/kubernetes/previous-release is not VERSION COMMIT".to_owned()))?;
        let folder =
            binaries_dir().map_err(|error| Skip(format!("{error:#}")))?.join("../previous").join(commit);
        if !folder.exists() {
            let skip =
                format!("{version} is not built: scripts/test builds it where the history has {commit}");
            return Err(Skip(skip));
        }
        let (programs, source) = (folder.join("programs"), folder.join("source"));
        Ok(Self { version: version.to_owned(), programs, source })
    }

    /// Its overlay, with its image's other name.
    fn overlay(&self) -> Result<PathBuf> {
        let folder = self.source.join("manifests/overlays/before");
        std::fs::create_dir_all(&folder)?;
        let tag = BEFORE.split_once(':').context("a reference is NAME:TAG")?.1;
        let kustomization = format!(
            "apiVersion: kustomize.config.k8s.io/v1beta1
kind: Kustomization
resources: [../full]
images: [{{name: holdfast, newTag: {tag}}}]
"
        );
        std::fs::write(folder.join("kustomization.yaml"), kustomization)?;
        Ok(folder)
    }
}

fn upgraded(tools: &Tools, release: &Release) -> Result<()> {
    let before = image_of(&release.programs, &release.programs.join("../image"), BEFORE)?;
    on_fresh(tools, vec![before, image()?], |cluster| {
        install(cluster, &release.overlay()?)?;
        wait_for_workloads(cluster)?;
        expect_images(cluster, BEFORE)?;
        volumes::take_snapshot(cluster)?;
        let bank = Bank::start(cluster, "releases", 1)?;
        wait_for_replicas(cluster)?;
        let (node, _) = bank.place(cluster)?;
        let client = bank.client(cluster, "releases-client", &node, 1)?;
        let complaints = client.complaints()?;
        cluster.kubectl(&["apply", "-k", &repository().join(OVERLAY).display().to_string()])?;
        ROLLED.iter().try_for_each(|workload| wait_for_rollout(cluster, workload))?;
        client.wait_for(100)?;
        let (now, pause) = (client.complaints()?, client.longest_pause()?);
        ensure!(now == complaints, "the client's connection did not hold:\n{now}");
        ensure!(pause < PAUSE_MAX, "no commit for {:.1} s", pause.as_secs_f64());
        // Old data processes and new ones serve one volume together until the last is replaced.
        renew_data_processes(cluster, &bank, &client)?;
        wait_for_workloads(cluster)?;
        expect_images(cluster, REFERENCE)?;
        no_restarts(cluster)?;
        let kept = client.end(|| bank.numbers(cluster, ""))?;
        println!(
            "Upgrade from {}: {kept} acknowledged entries, all there, longest pause while agents, CSI pods and controllers were replaced {:.2} s",
            release.version,
            pause.as_secs_f64()
        );
        bank.remove(cluster)?;
        volumes::restore_snapshot(cluster)
    })
}

/// Every container of our own in the namespace runs that image.
fn expect_images(cluster: &KubeCluster, reference: &str) -> Result<()> {
    let pods = cluster.get(&["pods", "-n", NAMESPACE])?;
    let mut seen = 0;
    for pod in pods["items"].as_array().context("a list")? {
        for container in pod["status"]["containerStatuses"].as_array().into_iter().flatten() {
            let image = container["image"].as_str().unwrap_or_default();
            let Some(own) = image.rsplit('/').next().filter(|name| name.starts_with("holdfast:")) else {
                continue;
            };
            ensure!(own == reference, "{} of {} runs {own}", container["name"], pod["metadata"]["name"]);
            seen += 1;
        }
    }
    ensure!(seen > 0, "no container runs {reference}");
    Ok(())
}
