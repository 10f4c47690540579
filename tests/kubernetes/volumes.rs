//! What people see of a volume: the kind `Volume`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use holdfast_service::kubernetes::VolumeBoard;
use holdfast_service::{ControllerService, KubernetesClient, KubernetesDirectory, KubernetesStore, NodeBook};
use holdfast_storage_core::node_directory::NodeDirectory;
use holdfast_storage_core::record::{ReplicaState, VolumeRecord};
use holdfast_storage_core::record_store::RecordStore;
use holdfast_tests::api_server::ADMIN;
use kube::api::{Api, DynamicObject, Patch, PatchParams};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::nodes::mk_node;
use crate::suite::records::mk_record;
use crate::trial;

/// In this time a volume must say why it does not converge.
const SAID_WITHIN: Duration = Duration::from_secs(60);

pub fn trials() -> Vec<Trial> {
    vec![
        trial("volumes::say_within_a_minute_why_they_do_not_converge", reasons_are_said_in_time),
        trial("volumes::are_made_anew_from_their_records", objects_follow_their_records),
    ]
}

fn mk_controller(
    client: KubernetesClient,
    store: &KubernetesStore,
    book: &Arc<NodeBook>,
) -> ControllerService {
    let (store, groups) = (Arc::new(store.clone()), Arc::new(store.clone()));
    let node_states = Arc::new(KubernetesDirectory::new(client));
    ControllerService::new(store, groups, node_states, Arc::clone(book), Default::default())
}

async fn announce(book: &NodeBook, nodes: &[&str]) -> Result<()> {
    for name in nodes {
        book.announce(mk_node(name)).await?;
    }
    Ok(())
}

/// The two replicas of a new volume, of which the second one's node is dead.
async fn make_degraded(store: &KubernetesStore) -> Result<VolumeRecord> {
    let mut record = mk_record(7, "lame", &["node-a", "node-b"]);
    let version = store.create(record.clone()).await?;
    let (id, replica) =
        record.replicas.iter_mut().find(|(_, r)| r.node.0 == "node-b").context("a replica on node-b")?;
    replica.state = ReplicaState::Offline { left_epoch: record.epoch };
    record.in_sync.remove(id);
    record.epoch.number += 1;
    store.swap(version, record.clone()).await?;
    Ok(record)
}

/// From the controller's start on, while it does not know yet who is alive.
fn reasons_are_said_in_time(bed: &Bed) -> Result<()> {
    let (store, volumes) = (bed.store()?, bed.objects("Volume")?);
    let (client, kube) = (bed.client(ADMIN)?, bed.kube()?);
    bed.run(async {
        let record = make_degraded(&store).await?;
        let book = Arc::new(NodeBook::new());
        let controller = mk_controller(client.clone(), &store, &book);
        let begun = Instant::now();
        let publishing = tokio::spawn(VolumeBoard::new(client).keep_publishing(controller));
        let said = loop {
            announce(&book, &["node-a"]).await?;
            if let Some(object) = volumes.get_opt(&record.volume_id.to_string()).await?
                && object.data["status"].is_object()
            {
                break object;
            }
            ensure!(begun.elapsed() < SAID_WITHIN, "nothing was said");
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        publishing.abort();
        ensure!(begun.elapsed() < SAID_WITHIN, "{:?}", begun.elapsed());
        let status = &said.data["status"];
        ensure!(status["state"] == "Degraded" && status["inSync"] == "1/2", "{status}");
        let converged = condition(status, "Converged")?;
        ensure!(converged["status"] == "False" && converged["reason"] == "ReplicaOffline", "{converged}");
        let message = converged["message"].as_str().unwrap_or_default();
        ensure!(message.contains("node node-b, which does not answer"), "{message}");
        columns_tell_the_state(kube).await
    })
}

/// What `kubectl get volumes.storage.holdfast.dev` prints.
async fn columns_tell_the_state(kube: kube::Client) -> Result<()> {
    let request = http::Request::get("/apis/storage.holdfast.dev/v1alpha1/volumes")
        .header("Accept", "application/json;as=Table;v=v1;g=meta.k8s.io")
        .body(Vec::new())?;
    let table: Value = kube.request(request).await?;
    let names: Vec<&str> = table["columnDefinitions"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(|c| c["name"].as_str())
        .collect();
    ensure!(
        names == ["Name", "Volume", "Size", "State", "In Sync", "Attached", "Age", "Waits For"],
        "{names:?}"
    );
    let cells = &table["rows"][0]["cells"];
    ensure!(cells[1] == "lame" && cells[3] == "Degraded" && cells[4] == "1/2", "{cells}");
    ensure!(cells[7].as_str().is_some_and(|text| text.contains("replicas are in sync")), "{cells}");
    Ok(())
}

fn objects_follow_their_records(bed: &Bed) -> Result<()> {
    let (store, volumes) = (bed.store()?, bed.objects("Volume")?);
    let client = bed.client(ADMIN)?;
    bed.run(async {
        let record = make_degraded(&store).await?;
        let name = record.volume_id.to_string();
        let book = Arc::new(NodeBook::new());
        announce(&book, &["node-a", "node-b"]).await?;
        let controller = mk_controller(client.clone(), &store, &book);
        let reports = loop {
            announce(&book, &["node-a", "node-b"]).await?;
            if let Some(reports) = controller.reports().await? {
                break reports;
            }
            tokio::time::sleep(Duration::from_millis(200)).await;
        };
        let mut board = VolumeBoard::new(client.clone());
        board.publish(&reports).await?;
        let first = volumes.get(&name).await?;
        ensure!(condition(&first.data["status"], "Converged")?["reason"] == "Rebuilding", "{first:?}");
        // Unchanged: nothing is written.
        board.publish(&reports).await?;
        ensure!(volumes.get(&name).await?.metadata.resource_version == first.metadata.resource_version);
        // Somebody's hand, and a controller that starts anew: it is as the record says, and since when is kept.
        spoil(&volumes, &name).await?;
        let mut board = VolumeBoard::new(client);
        board.publish(&reports).await?;
        let mended = volumes.get(&name).await?;
        ensure!(mended.data["spec"] == first.data["spec"], "{mended:?}");
        ensure!(mended.data["status"] == first.data["status"], "{mended:?}");
        // Without a record there is no volume.
        board.publish(&[]).await?;
        ensure!(volumes.get_opt(&name).await?.is_none());
        ensure!(store.read(record.volume_id).await?.record == record, "a record was touched");
        Ok(())
    })
}

async fn spoil(volumes: &Api<DynamicObject>, name: &str) -> Result<()> {
    let patch = Patch::Merge(json!({"spec": {"replicas": 7}}));
    volumes.patch(name, &PatchParams::default(), &patch).await?;
    let patch = Patch::Merge(json!({"status": {"state": "Healthy"}}));
    volumes.patch_status(name, &PatchParams::default(), &patch).await?;
    Ok(())
}

fn condition<'a>(status: &'a Value, kind: &str) -> Result<&'a Value> {
    let all = status["conditions"].as_array().context("conditions")?;
    all.iter().find(|c| c["type"] == kind).with_context(|| format!("no condition {kind}: {status}"))
}
