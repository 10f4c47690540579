//! Kubernetes' own end-to-end suites (`e2e.test`), run against a cluster of ours: which specs, on what images, and what became of each.
//!
//! The suites are unmodified. Their images are made on the spot: agnhost is built of its sources, what is busybox there is Debian's
//! busybox here, pause is ours. Where a storage spec wants another image for the sake of a shell or of GNU's dd, it gets these. A spec
//! that wants any other image fails.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Deserialize;

use super::KubeCluster;
use crate::images;
use crate::process::{Program, run};

/// The longest that a suite may take.
const SUITE_TIMEOUT: Duration = Duration::from_secs(3 * 60 * 60);
/// How often the end of a suite is asked for.
const PACE: Duration = Duration::from_secs(2);
/// Characters of a failure's message that are told; the report has all.
const MESSAGE_MAX: usize = 600;

/// What is run of the specs.
pub struct Suite<'a> {
    /// Names the report.
    pub name: &'a str,
    /// What the names of the specs begin with, but for their group.
    pub focus: &'a str,
    /// Further parts of their names, of which one suffices; none: all.
    pub only: &'a [&'a str],
    /// Parts of the names of specs that are left out, each with the reason.
    pub without: Vec<(&'a str, &'a str)>,
    /// Specs at a time.
    pub processes: u8,
    /// For `e2e.test` itself.
    pub arguments: Vec<String>,
}

/// What became of the specs.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Outcome {
    /// Names of those that passed.
    pub passed: Vec<String>,
    /// Names of those that failed, with the message.
    pub failed: Vec<(String, String)>,
    /// Those that were left out or skipped themselves, by the reason.
    pub skipped: BTreeMap<String, Vec<String>>,
}

/// Makes the images that the specs use, of `tools`, under the references that they ask for.
///
/// # Errors
/// `e2e.test` names no agnhost or busybox, or an image cannot be made.
pub fn images(folder: &Path, tools: &Path, pause: &Path) -> Result<Vec<PathBuf>> {
    let listed = run(Command::new(tools.join("e2e.test")).arg("--list-images"))?;
    let mut made = Vec::new();
    for (index, reference) in listed.lines().map(str::trim).enumerate() {
        let name = reference.rsplit('/').next().and_then(|last| last.split(':').next()).unwrap_or_default();
        let folder = folder.join(format!("{name}-{index}"));
        match name {
            "agnhost" => {
                made.push(images::of_program_and_busybox(&folder, reference, &tools.join("agnhost"))?);
            }
            "glibc-dns-testing" => {
                // Busybox's own shell takes its own dd, wherever another one lies.
                let programs = ["/bin/sh", "/bin/dd"].map(Path::new);
                made.push(images::of_busybox_and(&folder, reference, &programs)?);
            }
            "busybox" | "nginx" => made.push(images::of_busybox(&folder, reference, &[])?),
            "pause" => made.push(images::of_program(&folder, reference, pause)?),
            _ => {}
        }
    }
    ensure!(made.len() >= 3, "e2e.test lists other images than expected:\n{listed}");
    Ok(made)
}

/// Runs the specs; the reports and the output are in `folder` afterwards.
///
/// # Errors
/// The suite cannot be run to its end. Specs that fail are no error.
pub fn run_suite(cluster: &KubeCluster, suite: &Suite<'_>, tools: &Path, folder: &Path) -> Result<Outcome> {
    if folder.exists() {
        fs::remove_dir_all(folder)?;
    }
    fs::create_dir_all(folder)?;
    let name = format!("e2e-{}", suite.name);
    let mut program =
        cluster.start_outside(&name, Path::new("/usr/bin/env"), arguments(cluster, suite, tools, folder)?)?;
    let start = Instant::now();
    while program.is_alive() {
        if start.elapsed() > SUITE_TIMEOUT {
            program.interrupt()?;
        }
        std::thread::sleep(PACE);
    }
    fs::write(folder.join("output.log"), program.log()?)?;
    let report = folder.join("report.json");
    let text = fs::read(&report).with_context(|| ended_early(&program))?;
    let reports: Vec<Report> = serde_json::from_slice(&text)?;
    Ok(outcome(&reports, suite))
}

fn ended_early(program: &Program) -> String {
    format!("the suite ended without a report:\n{}", program.log_tail())
}

/// For `env`: the variables of the shell that the suite is run from, then ginkgo's own.
fn arguments(cluster: &KubeCluster, suite: &Suite<'_>, tools: &Path, folder: &Path) -> Result<Vec<String>> {
    let kubeconfig = cluster.control.admin_kubeconfig()?;
    let mut arguments = vec![
        format!("HOME={}", cluster.work.dir().display()),
        tools.join("ginkgo").display().to_string(),
        format!("--procs={}", suite.processes),
        format!("--timeout={}s", SUITE_TIMEOUT.as_secs()),
        "--no-color".to_owned(),
        "-v".to_owned(),
        format!("--output-dir={}", folder.display()),
        "--json-report=report.json".to_owned(),
        "--junit-report=junit.xml".to_owned(),
    ];
    let any: &[&str] = &[""];
    let only = if suite.only.is_empty() { any } else { suite.only };
    let focus = quoted(suite.focus);
    arguments.extend(only.iter().map(|part| format!("--focus={focus}.*{}", quoted(part))));
    arguments.extend(suite.without.iter().map(|(part, _)| format!("--skip={}", quoted(part))));
    arguments.extend([
        tools.join("e2e.test").display().to_string(),
        "--".to_owned(),
        "--provider=skeleton".to_owned(),
        format!("--kubeconfig={}", kubeconfig.display()),
        format!("--kubectl-path={}", cluster.tools.kubernetes.join("kubectl").display()),
        format!("--num-nodes={}", super::NODES.len()),
        format!("--e2e-output-dir={}", folder.display()),
    ]);
    arguments.extend(suite.arguments.iter().cloned());
    Ok(arguments)
}

/// A regular expression for a text.
fn quoted(text: &str) -> String {
    let mut quoted = String::new();
    for character in text.chars() {
        if !character.is_alphanumeric() && character != ' ' {
            quoted.push('\\');
        }
        quoted.push(character);
    }
    quoted
}

fn outcome(reports: &[Report], suite: &Suite<'_>) -> Outcome {
    let mut outcome = Outcome::default();
    for spec in reports.iter().flat_map(|report| report.specs.iter().flatten()) {
        let name = spec.name();
        let message = spec.failure.as_ref().map(|failure| failure.message.clone());
        match spec.state.as_str() {
            // What runs before and after all specs has no name.
            "passed" if spec.kind == "It" => outcome.passed.push(name),
            "passed" => {}
            "skipped" | "pending" if suite.has(&name) => {
                let left_out = suite.without.iter().find(|(part, _)| name.contains(part));
                let reason = left_out.map(|(_, reason)| (*reason).to_owned()).or(message);
                outcome.skipped.entry(reason.unwrap_or_else(|| spec.state.clone())).or_default().push(name);
            }
            "skipped" | "pending" => {}
            _ => outcome.failed.push((name, message.unwrap_or_default())),
        }
    }
    outcome
}

impl Suite<'_> {
    fn has(&self, name: &str) -> bool {
        let found = name.split_once(self.focus).map(|(_, rest)| rest);
        found.is_some_and(|rest| self.only.is_empty() || self.only.iter().any(|part| rest.contains(part)))
    }
}

impl Outcome {
    /// The counts, in a line.
    #[must_use]
    pub fn counts(&self) -> String {
        let skipped: usize = self.skipped.values().map(Vec::len).sum();
        format!("{} passed, {} failed, {skipped} skipped", self.passed.len(), self.failed.len())
    }

    /// What was skipped and why, and what failed.
    #[must_use]
    pub fn story(&self) -> String {
        let mut text = String::new();
        for (reason, names) in &self.skipped {
            let _ = writeln!(text, "{} skipped: {reason}", names.len());
        }
        for (name, message) in &self.failed {
            let short: String = message.chars().take(MESSAGE_MAX).collect();
            let _ = writeln!(text, "failed: {name}\n    {}", short.replace('\n', "\n    "));
        }
        text
    }
}

/// Ginkgo's report (`types.Report`), as far as it is read.
#[derive(Deserialize)]
struct Report {
    #[serde(rename = "SpecReports")]
    specs: Option<Vec<Spec>>,
}

#[derive(Deserialize)]
struct Spec {
    #[serde(rename = "ContainerHierarchyTexts")]
    containers: Option<Vec<String>>,
    #[serde(rename = "LeafNodeText")]
    leaf: String,
    #[serde(rename = "LeafNodeType")]
    kind: String,
    #[serde(rename = "State")]
    state: String,
    #[serde(rename = "Failure")]
    failure: Option<Failure>,
}

#[derive(Deserialize)]
struct Failure {
    #[serde(rename = "Message", default)]
    message: String,
}

impl Spec {
    fn name(&self) -> String {
        let containers = self.containers.iter().flatten().map(String::as_str);
        let words: Vec<&str> =
            containers.chain([self.leaf.as_str()]).filter(|word| !word.is_empty()).collect();
        words.join(" ")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = r#"[{"SpecReports": [
        {"ContainerHierarchyTexts": null, "LeafNodeText": "", "LeafNodeType": "SynchronizedBeforeSuite", "State": "passed"},
        {"ContainerHierarchyTexts": ["Netpol", "rules"], "LeafNodeText": "hold", "LeafNodeType": "It", "State": "passed"},
        {"ContainerHierarchyTexts": ["Netpol"], "LeafNodeText": "leak", "LeafNodeType": "It", "State": "timedout",
         "Failure": {"Message": "it hangs"}},
        {"ContainerHierarchyTexts": ["Netpol [SCTP]"], "LeafNodeText": "hold", "LeafNodeType": "It", "State": "skipped"},
        {"ContainerHierarchyTexts": ["Netpol"], "LeafNodeText": "wait", "LeafNodeType": "It", "State": "skipped",
         "Failure": {"Message": "not on Tuesdays"}},
        {"ContainerHierarchyTexts": ["Others"], "LeafNodeText": "are not wanted", "LeafNodeType": "It", "State": "skipped"}
    ]}]"#;

    #[test]
    fn every_spec_in_the_focus_is_counted_once_and_no_other() {
        let suite = Suite {
            name: "n",
            focus: "Netpol",
            only: &[],
            without: vec![("[SCTP]", "no SCTP")],
            processes: 1,
            arguments: Vec::new(),
        };
        let reports: Vec<Report> = serde_json::from_str(REPORT).unwrap();

        let outcome = outcome(&reports, &suite);

        assert_eq!(outcome.passed, ["Netpol rules hold"]);
        assert_eq!(outcome.failed, [("Netpol leak".to_owned(), "it hangs".to_owned())]);
        let reasons: Vec<&str> = outcome.skipped.keys().map(String::as_str).collect();
        assert_eq!(reasons, ["no SCTP", "not on Tuesdays"]);
        assert_eq!(outcome.counts(), "1 passed, 1 failed, 2 skipped");
    }

    #[test]
    fn a_suite_may_have_some_of_the_specs_in_its_focus_only() {
        let (without, arguments) = (Vec::new(), Vec::new());
        let suite =
            Suite { name: "n", focus: "[Driver: ours]", only: &["] b "], without, processes: 1, arguments };

        assert!(suite.has("External [Driver: ours] [x] b c"));
        assert!(!suite.has("External [Driver: ours] [x] d"));
        assert!(!suite.has("External [Driver: theirs] [x] b c"));
    }

    #[test]
    fn a_part_of_a_name_is_no_expression() {
        assert_eq!(quoted("[Driver: csi.dev] a"), r"\[Driver\: csi\.dev\] a");
    }
}
