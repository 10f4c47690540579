//! What `kubectl apply -k` would send: a folder of `manifests` put together by kustomize itself.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::Value;

use crate::go_tools::{self, Skip};
use crate::process::run;

/// The overlays that users install.
pub const OVERLAYS: [&str; 4] = ["full", "storage", "network", "single-node"];

/// The folder of all manifests.
#[must_use]
pub fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests")
}

/// The objects of a folder below `manifests`, in kustomize's order.
///
/// # Errors
/// kustomize refuses the folder. That it cannot be had is the inner one.
pub fn build(folder: &str) -> Result<Result<Vec<Value>, Skip>> {
    let program = match go_tools::kustomize()? {
        Ok(program) => program,
        Err(skip) => return Ok(Err(skip)),
    };
    let text = run(Command::new(program).arg("build").arg(manifests().join(folder)))?;
    Ok(Ok(documents(&text).with_context(|| folder.to_owned())?))
}

/// The objects of a YAML text.
///
/// # Errors
/// It is not YAML.
pub fn documents(text: &str) -> Result<Vec<Value>> {
    let mut documents = Vec::new();
    for document in serde_norway::Deserializer::from_str(text) {
        let value = Value::deserialize(document)?;
        // What stands between two separators, or is a comment, is no object.
        if !value.is_null() {
            documents.push(value);
        }
    }
    Ok(documents)
}
