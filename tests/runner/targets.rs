//! Which test programs the workspace has, as cargo builds them.

use std::ffi::OsString;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

/// One test program.
#[derive(Debug, Clone)]
pub struct Target {
    /// Package it belongs to.
    pub package: String,
    /// Target's name.
    pub name: String,
    /// Cargo's kind: `lib`, `bin`, `test`.
    pub kind: String,
    /// The program.
    pub executable: PathBuf,
    /// Its package's Cargo.toml.
    pub manifest: PathBuf,
}

/// Package whose test targets are tiers.
const TIER_PACKAGE: &str = "tests";

#[derive(Deserialize)]
struct Message {
    reason: String,
    manifest_path: Option<PathBuf>,
    target: Option<MessageTarget>,
    profile: Option<MessageProfile>,
    executable: Option<PathBuf>,
}

#[derive(Deserialize)]
struct MessageTarget {
    kind: Vec<String>,
    name: String,
}

#[derive(Deserialize)]
struct MessageProfile {
    test: bool,
}

impl Target {
    /// The tier it belongs to.
    #[must_use]
    pub fn tier(&self) -> &str {
        let own = self.package == TIER_PACKAGE && self.kind == "test";
        match self.name.as_str() {
            "sim" | "cluster" | "policy" | "vm" | "conformance" | "kubernetes" if own => &self.name,
            _ => "unit",
        }
    }

    /// Names it for people.
    #[must_use]
    pub fn title(&self) -> String {
        format!("{} ({} {})", self.package, self.kind, self.name)
    }
}

/// The cargo to call.
#[must_use]
pub fn cargo() -> OsString {
    std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())
}

/// Builds all test programs of the workspace in release mode and lists them by package and name.
///
/// # Errors
/// The build fails.
pub fn build_tests() -> Result<Vec<Target>> {
    let mut child = Command::new(cargo())
        .args(["test", "--release", "--workspace", "--no-run", "--message-format=json-render-diagnostics"])
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .context("cannot run cargo")?;
    let mut targets = Vec::new();
    for line in BufReader::new(child.stdout.take().context("cargo has no output")?).lines() {
        targets.extend(parse_message(&line?));
    }
    ensure!(child.wait()?.success(), "the tests do not build");
    targets.sort_by(|a, b| (&a.package, &a.kind, &a.name).cmp(&(&b.package, &b.kind, &b.name)));
    Ok(targets)
}

fn parse_message(line: &str) -> Option<Target> {
    let message: Message = serde_json::from_str(line).ok()?;
    let (target, manifest) = (message.target?, message.manifest_path?);
    if message.reason != "compiler-artifact" || !message.profile?.test {
        return None;
    }
    let folder = manifest.parent()?.components().rev().take(2).collect::<Vec<_>>();
    let package = match folder.as_slice() {
        // A crate is known by its folder, with the half it belongs to where it has one.
        [own, parent, ..] if parent.as_os_str() == "csi-driver" || parent.as_os_str() == "cni-plugin" => {
            format!("{}/{}", parent.as_os_str().display(), own.as_os_str().display())
        }
        [own, ..] => own.as_os_str().display().to_string(),
        [] => return None,
    };
    let kind = target.kind.into_iter().next()?;
    Some(Target { package, name: target.name, kind, executable: message.executable?, manifest })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_message(manifest: &str, kind: &str, name: &str) -> String {
        format!(
            r#"{{"reason":"compiler-artifact","manifest_path":"{manifest}","target":{{"kind":["{kind}"],"name":"{name}"}},
            "profile":{{"test":true}},"executable":"/t/{name}-1"}}"#
        )
        .replace('\n', "")
    }

    #[test]
    fn test_targets_of_the_tests_crate_are_tiers() {
        let target = parse_message(&mk_message("/h/tests/Cargo.toml", "test", "cluster")).unwrap();

        assert_eq!(target.tier(), "cluster");
    }

    #[test]
    fn everything_else_is_unit() {
        for (manifest, kind, name) in [
            ("/h/csi-driver/core/Cargo.toml", "lib", "holdfast_storage_core"),
            ("/h/csi-driver/engine/Cargo.toml", "test", "cluster"),
            ("/h/tests/Cargo.toml", "bin", "holdfast-demo"),
        ] {
            assert_eq!(parse_message(&mk_message(manifest, kind, name)).unwrap().tier(), "unit");
        }
    }

    #[test]
    fn messages_of_other_kinds_are_passed_over() {
        assert!(parse_message(r#"{"reason":"build-finished","success":true}"#).is_none());
        assert!(parse_message("no json").is_none());
    }
}
