//! All manifests, as kustomize puts them together, applied to the API server as a dry run with strict checks of their fields.

use std::collections::BTreeSet;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_tests::go_tools;
use holdfast_tests::kustomize::{OVERLAYS, build, documents, manifests};
use kube::api::{Api, DynamicObject, Patch, PatchParams, ValidationDirective};
use kube::core::GroupVersionKind;
use kube::discovery::{Scope, pinned_kind};
use libtest_mimic::Trial;
use serde_json::Value;

use crate::bed::Bed;
use crate::trial;

/// For the server to serve a kind whose definition it has.
const SERVED_TIMEOUT: Duration = Duration::from_secs(30);
/// Definitions that belong to the cluster, not to us: the test's server has none of them.
const FOREIGN_GROUPS: [&str; 3] =
    ["snapshot.storage.k8s.io", "groupsnapshot.storage.k8s.io", "cert-manager.io"];

pub fn trials() -> Vec<Trial> {
    vec![
        trial("manifests::every_object_is_accepted_and_none_with_a_wrong_field", every_object_is_accepted),
        trial(
            "manifests::what_is_beside_the_overlays_is_accepted_too",
            what_is_beside_the_overlays_is_accepted,
        ),
    ]
}

fn every_object_is_accepted(bed: &Bed) -> Result<()> {
    let Some(first) = objects_of("crds")? else { return Ok(()) };
    let Some(common) = objects_of("base/common")? else { return Ok(()) };
    let client = bed.kube()?;
    bed.run(async {
        // A dry run makes no namespace and no definition that a later one could use.
        for object in first.iter().chain(&common) {
            apply(&client, object, false).await?;
        }
        Ok(())
    })?;
    let mut kinds: BTreeSet<String> = BTreeSet::new();
    for overlay in OVERLAYS {
        let objects = objects_of(&format!("overlays/{overlay}"))?.context("kustomize is there")?;
        ensure!(objects.len() > 3, "{overlay} has {} objects", objects.len());
        bed.run(async {
            for object in &objects {
                apply(&client, object, true).await.with_context(|| overlay.to_owned())?;
                if kinds.insert(text(object, "/kind").to_owned()) {
                    wrong_fields_are_refused(&client, object).await?;
                }
            }
            Ok(())
        })?;
        println!("{overlay}: {} objects", objects.len());
    }
    ensure!(kinds.len() > 8, "{kinds:?}");
    Ok(())
}

fn what_is_beside_the_overlays_is_accepted(bed: &Bed) -> Result<()> {
    let client = bed.kube()?;
    let Some(mut objects) = objects_of("base/common")? else { return Ok(()) };
    for folder in ["examples", "snapshots", "uninstall"] {
        for entry in std::fs::read_dir(manifests().join(folder))? {
            let path = entry?.path();
            if path.is_file() && path.file_name().is_some_and(|name| name != "kustomization.yaml") {
                objects.extend(documents(&std::fs::read_to_string(&path)?)?);
            }
        }
    }
    for folder in ["examples/own-settings", "examples/cert-manager"] {
        objects.extend(objects_of(folder)?.context("kustomize is there")?);
    }
    // First, and for good: a dry run makes no namespace that a later one could use.
    objects.sort_by_key(|object| text(object, "/kind") != "Namespace");
    let (mut asked, mut foreign) = (0, Vec::new());
    for object in &objects {
        let group = text(object, "/apiVersion").split_once('/').map_or("", |(group, _)| group);
        if FOREIGN_GROUPS.contains(&group) {
            foreign.push(text(object, "/kind").to_owned());
            continue;
        }
        bed.run(apply(&client, object, text(object, "/kind") != "Namespace"))?;
        asked += 1;
    }
    println!("{asked} objects; without a definition of their kind: {foreign:?}");
    ensure!(asked > 0);
    Ok(())
}

/// None where there is no kustomize, which is said.
pub fn objects_of(folder: &str) -> Result<Option<Vec<Value>>> {
    match build(folder)? {
        Ok(objects) => Ok(Some(objects)),
        Err(go_tools::Skip(reason)) => {
            println!("SKIP: {reason}");
            Ok(None)
        }
    }
}

/// The twins of an object, each with a field that there is not.
async fn wrong_fields_are_refused(client: &kube::Client, object: &Value) -> Result<()> {
    for place in ["", "/spec/template/spec/containers/0", "/metadata", "/webhooks/0", "/rules/0"] {
        let mut twin = object.clone();
        let Some(fields) = twin.pointer_mut(place).and_then(Value::as_object_mut) else { continue };
        fields.insert("livenesProbe".to_owned(), Value::from("typo"));
        let name = text(object, "/metadata/name");
        let refused = apply(client, &twin, true).await.err();
        let refused =
            refused.with_context(|| format!("{name} was accepted with a wrong field in \"{place}\""))?;
        ensure!(format!("{refused:#}").contains("livenesProbe"), "{name}, for another reason: {refused:#}");
    }
    Ok(())
}

/// What `kubectl apply --server-side --validate=strict` sends, with `--dry-run=server` where asked for.
pub async fn apply(client: &kube::Client, object: &Value, dry_run: bool) -> Result<()> {
    let kind = GroupVersionKind::try_from(kube::core::TypeMeta {
        api_version: text(object, "/apiVersion").to_owned(),
        kind: text(object, "/kind").to_owned(),
    })?;
    let name = text(object, "/metadata/name");
    let (resource, capabilities) = tokio::time::timeout(SERVED_TIMEOUT, served(client, &kind))
        .await
        .with_context(|| format!("{} is not served", kind.kind))?;
    let api: Api<DynamicObject> = match object.pointer("/metadata/namespace").and_then(Value::as_str) {
        Some(namespace) => Api::namespaced_with(client.clone(), namespace, &resource),
        None => Api::all_with(client.clone(), &resource),
    };
    ensure!(
        (capabilities.scope == Scope::Namespaced) == object.pointer("/metadata/namespace").is_some(),
        "{} {name} is in the wrong scope",
        kind.kind
    );
    let params = PatchParams {
        dry_run,
        force: true,
        field_manager: Some("manifests-test".to_owned()),
        field_validation: Some(ValidationDirective::Strict),
    };
    api.patch(name, &params, &Patch::Apply(object)).await.with_context(|| format!("{} {name}", kind.kind))?;
    Ok(())
}

async fn served(
    client: &kube::Client,
    kind: &GroupVersionKind,
) -> (kube::core::ApiResource, kube::discovery::ApiCapabilities) {
    loop {
        if let Ok(found) = pinned_kind(client, kind).await {
            return found;
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

pub fn text<'a>(object: &'a Value, place: &str) -> &'a str {
    object.pointer(place).and_then(Value::as_str).unwrap_or_default()
}
