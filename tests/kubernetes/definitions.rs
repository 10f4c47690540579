//! The definitions of our kinds: what the server does without them, what they keep out, what people see.

use anyhow::{Result, ensure};
use holdfast_service::KubernetesStore;
use holdfast_storage_core::ids::VolumeId;
use holdfast_storage_core::record_store::{RecordStore, StoreError};
use holdfast_tests::api_server::ADMIN;
use kube::api::{Patch, PatchParams};
use libtest_mimic::Trial;
use serde_json::{Value, json};

use crate::bed::Bed;
use crate::suite::records::mk_record;
use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        // First of all: nothing is installed yet.
        trial("definitions::without_them_no_volume_is_said_to_be_missing", without_them_nothing_is_missing),
        trial("definitions::keep_wrong_changes_out", wrong_changes_are_kept_out),
        trial("definitions::show_people_the_state", columns_are_shown),
    ]
}

/// "No record" ends replicas; "not installed", as on a server that has just started, must not.
fn without_them_nothing_is_missing(bed: &Bed) -> Result<()> {
    let store = KubernetesStore::new(bed.client(ADMIN)?);
    bed.run(async {
        let answer = store.read(VolumeId(1)).await;
        ensure!(matches!(answer, Err(StoreError::Unknown(_))), "{answer:?}");
        let answer = store.list().await;
        ensure!(matches!(answer, Err(StoreError::Unknown(_))), "{answer:?}");
        Ok(())
    })
}

fn wrong_changes_are_kept_out(bed: &Bed) -> Result<()> {
    let (store, objects) = (bed.store()?, bed.objects("VolumeRecord")?);
    bed.run(async {
        let mut record = mk_record(5, "kept", &["node-a", "node-b"]);
        record.generation.0 = 3;
        let version = store.create(record.clone()).await?;
        let name = record.volume_id.to_string();
        let next = version.0 + 1;
        let stranger = "f".repeat(32);
        for (what, spec) in [
            ("a change that does not count", json!({"readOnly": true})),
            ("a change that counts too far", json!({"readOnly": true, "version": next + 1})),
            ("an empty in-sync set", json!({"inSync": [], "version": next})),
            ("a member that is no replica", json!({"inSync": [stranger], "version": next})),
            ("a replica that comes twice", json!({"inSync": [stranger, stranger], "version": next})),
            ("a generation that goes back", json!({"generation": 2, "version": next})),
            ("another name", json!({"name": "other", "version": next})),
            ("a state that does not exist", json!({"formatted": "Perhaps", "version": next})),
            ("an id that is none", json!({"targetId": "../etc", "version": next})),
            (
                "a nonce that would be rounded",
                json!({"epoch": {"number": 1, "nonce": 18_446_744_073_709_551_615_u64}, "version": next}),
            ),
            ("a field that nobody knows", json!({"surprise": 1, "version": next})),
            ("pending again", json!({"pending": true, "version": next})),
        ] {
            let params = PatchParams { field_manager: Some("test".to_owned()), ..PatchParams::default() };
            let params = params.validation_strict();
            let answer = objects.patch(&name, &params, &Patch::Merge(json!({"spec": spec}))).await;
            let code = if let Err(kube::Error::Api(status)) = &answer { status.code } else { 0 };
            ensure!(code == 422 || code == 400, "{what}: {answer:?}");
            ensure!(store.read(record.volume_id).await?.version == version, "{what} changed something");
        }
        let buried = holdfast_storage_core::record::VolumeRecord { deleting: true, ..record.clone() };
        let version = store.swap(version, buried).await?;
        let back = json!({"spec": {"deleting": false, "version": version.0 + 1}});
        let answer = objects.patch(&name, &PatchParams::default(), &Patch::Merge(back)).await;
        ensure!(answer.is_err(), "a tombstone was taken back");
        Ok(())
    })
}

/// What `kubectl get` prints is a table that the server makes.
fn columns_are_shown(bed: &Bed) -> Result<()> {
    let (store, kube) = (bed.store()?, bed.kube()?);
    bed.run(async {
        store.create(mk_record(6, "shown", &["node-a"])).await?;
        let request = http::Request::get("/apis/storage.holdfast.dev/v1alpha1/volumerecords")
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
            names == ["Name", "Volume", "Attached", "Epoch", "Generation", "Version", "Age"],
            "{names:?}"
        );
        let cells = &table["rows"][0]["cells"];
        ensure!(cells[1] == "shown" && cells[3] == 1 && cells[5] == 1, "{cells}");
        Ok(())
    })
}
