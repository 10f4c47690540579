//! One controller at a time.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_proto::csi::{DeleteVolumeRequest, ProbeRequest};
use holdfast_service::kubernetes::{ControllerLease, LEASE_NAME};
use holdfast_service::{ControllerConfig, KubernetesClient, Process};
use holdfast_tests::api_server::ADMIN;
use holdfast_tests::csi::Socket;
use k8s_openapi::api::coordination::v1::Lease;
use kube::api::{Api, DeleteParams};
use libtest_mimic::Trial;

use crate::bed::Bed;
use crate::trial;

/// What a lease lasts that nobody renews, and a try and a busy machine.
const TAKEN_OVER_WITHIN: Duration = Duration::from_secs(25);
/// A holder that cannot renew says so after 10 s.
const LOST_WITHIN: Duration = Duration::from_secs(14);

pub fn trials() -> Vec<Trial> {
    vec![
        trial("lease::one_controller_serves_and_the_next_one_takes_over", the_next_one_takes_over),
        trial("lease::a_dead_holders_lease_is_taken_only_after_its_end", a_dead_holder_is_waited_for),
        trial("lease::a_holder_that_cannot_renew_ends_before_another_begins", a_cut_off_holder_ends_first),
    ]
}

fn leases(bed: &Bed) -> Result<Api<Lease>> {
    let leases: Api<Lease> = Api::default_namespaced(bed.kube()?);
    bed.run(async {
        // None is there at first.
        drop(leases.delete(LEASE_NAME, &DeleteParams::default()).await);
        Ok(leases)
    })
}

fn mk_config(client: KubernetesClient, dir: &Path, name: &str) -> ControllerConfig {
    ControllerConfig {
        csi_socket: dir.join(format!("{name}.sock")),
        kubernetes: Some(client),
        store_dir: dir.join("unused"),
        registry_listen: ([127, 0, 0, 1], 0).into(),
        replace_after: None,
        overprovision_percent: 100,
        rebalance_above_percent: None,
        tls: None,
    }
}

fn the_next_one_takes_over(bed: &Bed) -> Result<()> {
    leases(bed)?;
    bed.store()?;
    let (client, dir) = (bed.client(ADMIN)?, tempfile::tempdir()?);
    bed.run(async {
        let first = Process::start_controller(mk_config(client.clone(), dir.path(), "first")).await?;
        let second = Process::start_controller(mk_config(client.clone(), dir.path(), "second"));
        let mut second = Box::pin(second);
        let early = tokio::time::timeout(Duration::from_secs(5), &mut second).await;
        ensure!(early.is_err(), "two controllers served");
        waits_without_taking_calls(dir.path().join("second.sock")).await?;
        let begun = Instant::now();
        first.shutdown().await;
        // Well before the lease's end: it was given up.
        let second =
            tokio::time::timeout(Duration::from_secs(8), second).await.context("it still waits")??;
        println!("taken over after {:?}", begun.elapsed());
        second.shutdown().await;
        Ok(())
    })
}

/// It says that it is not ready, and carries out nothing: not even what would be found done.
async fn waits_without_taking_calls(socket: PathBuf) -> Result<()> {
    let socket = Socket::new(tokio::runtime::Handle::current(), socket);
    let asked = tokio::task::spawn_blocking(move || {
        let probe = socket.identity(|mut client| async move { client.probe(ProbeRequest {}).await });
        let request = DeleteVolumeRequest { volume_id: "0".repeat(32), ..Default::default() };
        let deleted = socket.controller(|mut client| async move { client.delete_volume(request).await });
        (probe, deleted)
    });
    let (probe, deleted) = asked.await?;
    ensure!(probe?.ready == Some(false), "it says that it is ready");
    let refused = deleted.err().context("a call was taken")?;
    ensure!(refused.code() == tonic::Code::Unavailable && refused.message().contains("lease"), "{refused}");
    Ok(())
}

fn a_dead_holder_is_waited_for(bed: &Bed) -> Result<()> {
    let leases = leases(bed)?;
    let client = bed.client(ADMIN)?;
    bed.run(async {
        drop(ControllerLease::acquire(client.clone(), "dead".to_owned()).await);
        let begun = Instant::now();
        let next = ControllerLease::acquire(client, "next".to_owned());
        let mut next = tokio::time::timeout(TAKEN_OVER_WITHIN, next).await.context("it still waits")?;
        ensure!(begun.elapsed() >= Duration::from_secs(15), "taken after {:?}", begun.elapsed());
        let spec = leases.get(LEASE_NAME).await?.spec.context("spec")?;
        ensure!(
            spec.holder_identity.as_deref() == Some("next") && spec.lease_transitions == Some(2),
            "{spec:?}"
        );
        let early = tokio::time::timeout(Duration::from_secs(5), next.hold()).await;
        ensure!(early.is_err(), "{early:?}");
        next.release().await;
        Ok(())
    })
}

fn a_cut_off_holder_ends_first(bed: &Bed) -> Result<()> {
    leases(bed)?;
    let client = bed.client(ADMIN)?;
    let mut held =
        bed.run(async { Ok(ControllerLease::acquire(client.clone(), "cut off".to_owned()).await) })?;
    bed.server().pause()?;
    let lost = bed.run(async { Ok(tokio::time::timeout(LOST_WITHIN, held.hold()).await) });
    bed.server().resume()?;
    let reason = lost?.context("it believes that it still holds the lease")?;
    ensure!(reason.contains("could not be renewed"), "{reason}");
    Ok(())
}
