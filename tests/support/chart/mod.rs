//! The Helm chart, written from what kustomize makes of the overlays: one source, two ways to install it.
//!
//! ```text
//!   overlays/full     -- objects -->  templates/{storage,network}.yaml, by which of the two overlays has the object
//!   overlays/storage  -- names --^    each with the expressions of `rules` in place of what a value sets
//!   overlays/network  -- names --^
//!   crds              -- objects -->  crds/: Helm installs them once and never removes them, and with them all records
//! ```
//!
//! With its default values the chart renders to the overlay `full`, but for the namespace, which is the release's, and the
//! definitions.

mod rules;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::go_tools::Skip;
use crate::kustomize::build;
use rules::{Marks, RULES, VALUES};

/// The namespace of the overlays; in the chart it is the release's.
pub const NAMESPACE: &str = "holdfast-system";

const HEADER: &str =
    "# Written by `cargo run --example chart` from manifests/overlays: change those, not this.\n";

/// Files of a chart by their paths in it.
pub type Files = BTreeMap<String, String>;

/// What names an object within a cluster.
pub type Key = (String, String, String);

/// Writes the chart.
///
/// # Errors
/// kustomize refuses an overlay, or a rule meets nothing. That kustomize cannot be had is the inner one.
pub fn write() -> Result<Result<Files, Skip>> {
    let mut built = BTreeMap::new();
    for folder in ["overlays/full", "overlays/storage", "overlays/network", "crds"] {
        match build(folder)? {
            Ok(objects) => built.insert(folder, objects),
            Err(skip) => return Ok(Err(skip)),
        };
    }
    let take = |folder: &str| built.get(folder).cloned().unwrap_or_default();
    let keys = |folder: &str| take(folder).iter().map(key).collect::<BTreeSet<Key>>();
    let (storage, network, crds) = (keys("overlays/storage"), keys("overlays/network"), take("crds"));
    let mut marks = Marks::default();
    let mut used = BTreeSet::new();
    let mut templates: BTreeMap<&str, String> = BTreeMap::new();
    for mut object in take("overlays/full") {
        if ["Namespace", "CustomResourceDefinition"].contains(&text(&object, "/kind")) {
            continue;
        }
        let half = match (storage.contains(&key(&object)), network.contains(&key(&object))) {
            (true, false) => "storage",
            (false, true) => "network",
            _ => "common",
        };
        for (number, rule) in RULES.iter().enumerate() {
            if rule.mark(&mut object, &mut marks)? {
                used.insert(number);
            }
        }
        let template = templates.entry(half).or_default();
        writeln!(template, "---\n{}", marks.render(&object)?.trim_end())?;
    }
    ensure!(used.len() == RULES.len(), "of {} rules only {used:?} meet something", RULES.len());
    let mut files =
        Files::from([("Chart.yaml".to_owned(), description()), ("values.yaml".to_owned(), values(&marks)?)]);
    for (half, template) in templates {
        let template = match half {
            "common" => format!("{HEADER}{template}"),
            half => format!("{HEADER}{{{{- if .Values.{half}.enabled }}}}\n{template}{{{{- end }}}}\n"),
        };
        files.insert(format!("templates/{half}.yaml"), template);
    }
    for crd in crds {
        let name = format!("crds/{}.yaml", text(&crd, "/metadata/name"));
        files.insert(name, format!("{HEADER}{}", serde_norway::to_string(&crd)?));
    }
    Ok(Ok(files))
}

/// What names `object` within a cluster: kind, namespace, name.
#[must_use]
pub fn key(object: &Value) -> Key {
    let part = |place| text(object, place).to_owned();
    (part("/kind"), part("/metadata/namespace"), part("/metadata/name"))
}

fn description() -> String {
    let version = env!("CARGO_PKG_VERSION");
    format!(
        "{HEADER}apiVersion: v2\nname: holdfast\ndescription: Replicated block storage, pod networking and network policy\n\
         type: application\nversion: {version}\nappVersion: {version}\nkubeVersion: \">=1.32.0-0\"\n"
    )
}

/// The default of each value, from where it stands in the overlays.
fn values(marks: &Marks) -> Result<String> {
    let mut written = HEADER.to_owned();
    let mut group = "";
    for (name, comment) in VALUES {
        let (of, key) = name.split_once('.').unwrap_or(("", name));
        if of != group {
            writeln!(written, "{of}:")?;
            group = of;
        }
        let indent = if of.is_empty() { "" } else { "  " };
        let default = marks.default_of(name).with_context(|| format!("no rule uses {name}"))?;
        writeln!(written, "{indent}# {comment}\n{indent}{key}: {default}")?;
    }
    Ok(written)
}

pub(super) fn text<'a>(object: &'a Value, place: &str) -> &'a str {
    object.pointer(place).and_then(Value::as_str).unwrap_or_default()
}
