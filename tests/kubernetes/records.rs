//! The store's own rules on a real server: the suite, races, creators that die.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_service::registry_server::RegistryServer;
use holdfast_service::serve::{serve_tcp, server};
use holdfast_service::{KubernetesStore, NodeBook, RegistryClient};
use holdfast_storage_core::group::{GROUP_FORMAT, GroupRecord, GroupState};
use holdfast_storage_core::ids::{GroupId, RecordVersion, SnapshotId, TargetId, VolumeId};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::{GroupStore, RecordStore, StoreError};
use holdfast_tests::api_server::ADMIN;
use libtest_mimic::Trial;
use rand::Rng;

use crate::bed::{Bed, STRANGER};
use crate::suite::records::mk_record;
use crate::suite::store_suite::conformance;
use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("records::kubernetes_obeys_the_rules_of_every_store", kubernetes_obeys_the_rules),
        trial("records::the_registry_over_kubernetes_obeys_them_too", the_registry_obeys_the_rules),
        trial("records::of_twenty_writers_none_loses_a_swap", of_twenty_writers_none_loses_a_swap),
        trial("records::creators_that_die_leave_a_name_to_one_volume", creators_that_die_leave_a_name_to_one),
        trial("records::groups_are_swapped_by_versions_that_are_used_once", groups_are_swapped),
        trial("records::a_user_without_rights_is_refused", a_user_without_rights_is_refused),
        trial("records::a_label_that_somebody_sets_disturbs_no_swap", a_label_disturbs_no_swap),
    ]
}

fn kubernetes_obeys_the_rules(bed: &Bed) -> Result<()> {
    let store = bed.store()?;
    bed.run(async {
        tokio::spawn(conformance(Arc::new(store))).await?;
        Ok(())
    })
}

fn the_registry_obeys_the_rules(bed: &Bed) -> Result<()> {
    let store = bed.store()?;
    bed.run(async {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await?;
        let address = listener.local_addr()?.to_string();
        let service = RegistryServer::new(Arc::new(store), Arc::new(NodeBook::new()), false).into_service();
        let router = server().add_service(service);
        let serving = tokio::spawn(serve_tcp(router, listener, None, std::future::pending::<()>()));
        let client = RegistryClient::new(&address, None)?;
        tokio::spawn(conformance(Arc::new(client))).await?;
        serving.abort();
        Ok(())
    })
}

/// Each writer swaps in generation + 1 until it did so ten times: every swap that was answered must be in the count.
fn of_twenty_writers_none_loses_a_swap(bed: &Bed) -> Result<()> {
    const WRITERS: u128 = 20;
    const SWAPS: u64 = 10;
    let first = bed.store()?;
    // Stores of their own, as controllers and data processes have.
    let stores =
        (0..WRITERS).map(|_| Ok(KubernetesStore::new(bed.client(ADMIN)?))).collect::<Result<Vec<_>>>()?;
    bed.run(async {
        let record = mk_record(1, "raced", &["node-a"]);
        first.create(record.clone()).await?;
        let writers =
            (1..).zip(stores).map(|(number, store)| tokio::spawn(write(store, TargetId(number), SWAPS)));
        let mut conflicts = 0;
        for writer in writers.collect::<Vec<_>>() {
            conflicts += writer.await??;
        }
        let found = first.read(record.volume_id).await?;
        println!("{conflicts} conflicts");
        ensure!(found.record.generation.0 == u64::try_from(WRITERS)? * SWAPS, "lost: {found:?}");
        ensure!(found.version.0 == found.record.generation.0 + 1, "one swap, one version: {found:?}");
        ensure!(conflicts > 0, "they never met");
        Ok(())
    })
}

async fn write(store: KubernetesStore, target: TargetId, swaps: u64) -> Result<u64> {
    let (mut done, mut conflicts) = (0, 0);
    while done < swaps {
        let found = store.read(VolumeId(1)).await?;
        let generation = found.record.generation.next();
        let record = VolumeRecord { generation, target_id: Some(target), ..found.record };
        match store.swap(found.version, record).await {
            Ok(version) => {
                ensure!(version == found.version.next());
                done += 1;
            }
            Err(StoreError::Conflict(_)) => conflicts += 1,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(conflicts)
}

/// Creators are cut off at random points; whatever they left, one volume has the name in the end.
fn creators_that_die_leave_a_name_to_one(bed: &Bed) -> Result<()> {
    const ROUNDS: u128 = 25;
    const CREATORS: u128 = 4;
    let store = bed.store()?;
    bed.run(async {
        let mut left_over = 0;
        for round in 0..ROUNDS {
            let name = format!("name-{round}");
            let creators = (0..CREATORS).map(|number| {
                let (store, record) =
                    (store.clone(), mk_record(1000 * (round + 1) + number, &name, &["node-a"]));
                let lives_for = Duration::from_micros(rand::rng().random_range(0..120_000));
                tokio::spawn(async move {
                    drop(tokio::time::timeout(lives_for, store.create(record)).await);
                })
            });
            for creator in creators.collect::<Vec<_>>() {
                creator.await?;
            }
            let volumes = |all: Vec<Arc<holdfast_storage_core::record_store::Versioned>>| {
                all.into_iter()
                    .filter(|v| v.record.name == name)
                    .map(|v| v.record.volume_id)
                    .collect::<Vec<_>>()
            };
            let before = volumes(store.list().await?);
            ensure!(before.len() <= 1, "{name} has {before:?}");
            left_over += usize::from(before.is_empty());
            let last = mk_record(1000 * (round + 1) + CREATORS, &name, &["node-a"]);
            match (store.create(last.clone()).await, before.first()) {
                (Ok(version), None) => ensure!(version == RecordVersion(1)),
                (Err(StoreError::Exists(holder)), Some(volume)) => ensure!(holder == *volume),
                // One that was cut off after its last request was sent.
                (Err(StoreError::Exists(_)), None) => {}
                (answer, before) => anyhow::bail!("{name}, {before:?}: {answer:?}"),
            }
            let after = volumes(store.list().await?);
            ensure!(after.len() == 1, "{name} has {after:?}");
        }
        println!("{left_over} of {ROUNDS} rounds left no volume behind");
        Ok(())
    })
}

fn groups_are_swapped(bed: &Bed) -> Result<()> {
    let store = bed.store()?;
    bed.run(async {
        let id = GroupId(7);
        ensure!(store.read_group(id).await?.is_none());
        let record = GroupRecord {
            format: GROUP_FORMAT,
            group_id: id,
            name: "nightly".to_owned(),
            asked_unix_ms: 1_800_000_000_000,
            snapshots: BTreeMap::from([(VolumeId(1), SnapshotId(2)), (VolumeId(3), SnapshotId(4))]),
            state: GroupState::Holding,
        };
        let conflict = Err(StoreError::GroupConflict(id));
        let first = store.swap_group(id, None, Some(record.clone())).await?;
        ensure!(store.swap_group(id, None, Some(record.clone())).await == conflict, "it was there already");
        let cutting = GroupRecord { state: GroupState::Cutting, ..record.clone() };
        let racers = (0..8).map(|_| {
            let (store, cutting) = (store.clone(), cutting.clone());
            tokio::spawn(async move { store.swap_group(id, Some(first), Some(cutting)).await })
        });
        let mut won = Vec::new();
        for racer in racers.collect::<Vec<_>>() {
            match racer.await? {
                Ok(version) => won.push(version),
                lost => ensure!(lost == conflict, "{lost:?}"),
            }
        }
        let found = store.read_group(id).await?.context("the group")?;
        ensure!(won == [found.version] && found.record == cutting, "{won:?}, {found:?}");
        ensure!(store.list_groups().await? == [found.clone()]);
        ensure!(store.swap_group(id, Some(first), None).await == conflict, "the old version removes nothing");
        store.swap_group(id, Some(found.version), None).await?;
        ensure!(store.read_group(id).await?.is_none());
        ensure!(
            store.swap_group(id, Some(found.version), Some(record.clone())).await == conflict,
            "it is gone"
        );
        let again = store.swap_group(id, None, Some(record)).await?;
        ensure!(again != first && again != found.version, "{again} was used before");
        store.swap_group(id, Some(again), None).await?;
        Ok(())
    })
}

fn a_user_without_rights_is_refused(bed: &Bed) -> Result<()> {
    bed.store()?;
    let store = KubernetesStore::new(bed.client(STRANGER)?);
    bed.run(async {
        let answer = store.read(VolumeId(1)).await;
        ensure!(matches!(&answer, Err(StoreError::Refused(why)) if why.contains(STRANGER)), "{answer:?}");
        let answer = store.create(mk_record(1, "mine", &["node-a"])).await;
        ensure!(matches!(&answer, Err(StoreError::Refused(_))), "{answer:?}");
        Ok(())
    })
}

fn a_label_disturbs_no_swap(bed: &Bed) -> Result<()> {
    let (store, objects) = (bed.store()?, bed.objects("VolumeRecord")?);
    bed.run(async {
        let mut record = mk_record(1, "labelled", &["node-a"]);
        let version = store.create(record.clone()).await?;
        let label = serde_json::json!({"metadata": {"labels": {"team": "a"}}});
        let name = record.volume_id.to_string();
        objects.patch(&name, &kube::api::PatchParams::default(), &kube::api::Patch::Merge(label)).await?;
        ensure!(store.read(record.volume_id).await?.version == version, "a label is no new version");
        record.generation = record.generation.next();
        store.swap(version, record).await?;
        let labels = objects.get(&name).await?.metadata.labels.context("labels")?;
        ensure!(labels.get("team").is_some_and(|team| team == "a"), "the label is kept: {labels:?}");
        Ok(())
    })
}
