//! The Helm chart says what the overlays say: it is current, and Helm renders it to them.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use holdfast_tests::chart::{self, Key, NAMESPACE, key};
use holdfast_tests::go_tools::{self, Skip};
use holdfast_tests::kustomize::{build, documents, manifests};
use holdfast_tests::process::run;
use libtest_mimic::Trial;
use serde_json::{Value, json};

/// Trials of this file.
pub fn trials() -> Vec<Trial> {
    let one = |name: &str, check: fn() -> Result<Option<Skip>>| {
        Trial::test(name, move || match check() {
            Ok(None) => Ok(()),
            Ok(Some(skip)) => {
                println!("{skip}");
                Ok(())
            }
            Err(error) => Err(format!("{error:#}").into()),
        })
    };
    vec![
        one("the_chart_is_what_the_overlays_make_it", the_chart_is_current),
        one("helm_renders_the_chart_to_the_overlays", helm_renders_the_overlays),
        one("each_value_of_the_chart_changes_something", each_value_changes_something),
    ]
}

/// Run `cargo run --release --example chart` where this fails.
fn the_chart_is_current() -> Result<Option<Skip>> {
    let files = match chart::write()? {
        Ok(files) => files,
        Err(skip) => return Ok(Some(skip)),
    };
    let mut present = BTreeSet::new();
    let mut folders = vec![manifests().join("chart")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder)? {
            let path = entry?.path();
            if path.is_dir() {
                folders.push(path);
            } else {
                present.insert(path.strip_prefix(manifests().join("chart"))?.display().to_string());
            }
        }
    }
    ensure!(present == files.keys().cloned().collect(), "there are {present:?}");
    for (name, text) in files {
        let there = fs::read_to_string(manifests().join("chart").join(&name))?;
        ensure!(there == text, "{name} is not current");
    }
    Ok(None)
}

fn helm_renders_the_overlays() -> Result<Option<Skip>> {
    let helm = match go_tools::helm()? {
        Ok(helm) => helm,
        Err(skip) => return Ok(Some(skip)),
    };
    let cases: [(&str, &[&str]); 4] = [
        ("full", &[]),
        ("storage", &["network.enabled=false"]),
        ("network", &["storage.enabled=false"]),
        ("single-node", &["storage.replicas=1", "storage.controllerReplicas=1"]),
    ];
    for (overlay, values) in cases {
        let wanted = match overlay_objects(overlay)? {
            Ok(wanted) => wanted,
            Err(skip) => return Ok(Some(skip)),
        };
        let rendered = render(&helm, NAMESPACE, values)?;
        let keys = |map: &BTreeMap<Key, Value>| map.keys().cloned().collect::<BTreeSet<_>>();
        ensure!(keys(&rendered) == keys(&wanted), "{overlay}: {:?}", keys(&rendered));
        for (name, object) in &rendered {
            ensure!(wanted.get(name) == Some(object), "{overlay}: {name:?} is {object}");
        }
    }
    // What names the namespace names the release's, in rights and in admission policies too.
    let text = run(Command::new(&helm).args(["template", "x", "--namespace", "elsewhere"]).arg(folder()))?;
    ensure!(!text.contains(NAMESPACE) && text.contains("system:serviceaccount:elsewhere:"), "{text}");
    Ok(None)
}

fn each_value_changes_something() -> Result<Option<Skip>> {
    let helm = match go_tools::helm()? {
        Ok(helm) => helm,
        Err(skip) => return Ok(Some(skip)),
    };
    let values: Value = serde_norway::from_str(&fs::read_to_string(folder().join("values.yaml"))?)?;
    let mut names: Vec<(String, &Value)> = Vec::new();
    for (name, value) in values.as_object().context("values")? {
        match value.as_object() {
            Some(group) => names.extend(group.iter().map(|(key, value)| (format!("{name}.{key}"), value))),
            None => names.push((name.clone(), value)),
        }
    }
    ensure!(names.len() > 10, "{names:?}");
    let before = render(&helm, NAMESPACE, &[])?;
    for (name, value) in names {
        let other = match value {
            Value::Bool(value) => json!(!value),
            Value::Number(_) => json!(7),
            Value::Array(_) => json!([{ "key": "other" }]),
            Value::Object(_) => json!({ "other": "other" }),
            Value::Null | Value::String(_) => json!("other"),
        };
        let mut helm = Command::new(&helm);
        helm.args(["template", "x", "--namespace", NAMESPACE, "--set-json", &format!("{name}={other}")]);
        let after = by_key(documents(&run(helm.arg(folder()))?)?);
        ensure!(after != before, "{name} changes nothing");
        let text = serde_json::to_string(&after.values().collect::<Vec<_>>())?;
        ensure!(
            value.is_boolean() || text.contains(other.as_str().unwrap_or("other")) || other == json!(7),
            "{name}"
        );
    }
    Ok(None)
}

fn folder() -> std::path::PathBuf {
    manifests().join("chart")
}

/// Without what the chart leaves to others: the namespace, and the definitions, which it has in a folder of their own.
fn overlay_objects(overlay: &str) -> Result<Result<BTreeMap<Key, Value>, Skip>> {
    let objects = build(&format!("overlays/{overlay}"))?;
    Ok(objects.map(|objects| {
        let mut objects = by_key(objects);
        objects.retain(|(kind, ..), _| kind != "Namespace" && kind != "CustomResourceDefinition");
        objects
    }))
}

fn render(helm: &Path, namespace: &str, values: &[&str]) -> Result<BTreeMap<Key, Value>> {
    let mut command = Command::new(helm);
    command.args(["template", "x", "--namespace", namespace]);
    for value in values {
        command.args(["--set", value]);
    }
    Ok(by_key(documents(&run(command.arg(folder()))?)?))
}

fn by_key(objects: Vec<Value>) -> BTreeMap<Key, Value> {
    objects.into_iter().map(|object| (key(&object), object)).collect()
}
