//! cnitool, the runtime of the CNI project's own library, with lists of three versions.

use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use holdfast_tests::process::run as run_command;
use holdfast_tests::traces;
use serde_json::{Value, json};

use super::bed::Machine;

/// Versions of the list; the last one has GC and STATUS.
const VERSIONS: [&str; 3] = ["0.4.0", "1.0.0", "1.1.0"];
const NEWEST: &str = "1.1.0";

/// One network as cnitool sees it.
pub struct Cnitool<'a> {
    pub program: &'a Path,
    pub machine: &'a Machine,
    /// Folder of the list.
    pub conflists: &'a Path,
    /// Folders of plugins beside ours.
    pub more_plugins: String,
    /// What containers ask of capabilities, as JSON; may be empty.
    pub capabilities: String,
}

impl Cnitool<'_> {
    /// Calls a verb for a sandbox.
    pub fn call(&self, verb: &str, sandbox: &str) -> Result<String> {
        run_command(&mut self.command(verb, sandbox)?)
    }

    fn command(&self, verb: &str, sandbox: &str) -> Result<Command> {
        let mut command = self.machine.node().spaces.command("env");
        command.arg(format!("NETCONFPATH={}", self.conflists.display()));
        command.arg(format!("CNI_PATH={}{}", self.machine.plugin_folder()?, self.more_plugins));
        command.arg("CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=shop;K8S_POD_NAME=web");
        if !self.capabilities.is_empty() {
            command.arg(format!("CAP_ARGS={}", self.capabilities));
        }
        command.arg(self.program).args([verb, "holdfast"]).arg(format!("/run/netns/{sandbox}"));
        Ok(command)
    }
}

/// Adds, checks and deletes in every version; then what only the newest has.
pub fn run(machine: &mut Machine, tool: &Path) -> Result<()> {
    machine.put_pod("shop/web", "web", 0, &[])?;
    let clean = traces::of(machine.node())?;
    for version in VERSIONS {
        one_version(machine, tool, version).with_context(|| format!("in version {version}"))?;
        traces::expect_nothing_more(machine.node(), &clean)
            .with_context(|| format!("in version {version}"))?;
    }
    collect(machine, tool)?;
    traces::expect_nothing_more(machine.node(), &clean)?;
    status(machine, tool)
}

fn one_version(machine: &Machine, tool: &Path, version: &str) -> Result<()> {
    let conflists = machine.write_conflist("conflists", version, &[])?;
    let cnitool = mk_cnitool(machine, tool, &conflists);
    let spaces = &machine.node().spaces;
    spaces.run("ip", &["netns", "add", "box"])?;
    let result: Value = serde_json::from_str(&cnitool.call("add", "box")?)?;
    ensure!(result["cniVersion"] == version, "the result is of another version: {result}");
    ensure!(result["ips"].as_array().is_some_and(|ips| ips.len() == 2), "not two addresses: {result}");
    machine.lease("shop/web")?;
    cnitool.call("check", "box")?;
    spaces.run("ip", &["-n", "box", "route", "delete", "default"])?;
    let found = cnitool.call("check", "box").err().context("CHECK does not miss the default route")?;
    ensure!(
        format!("{found:#}").contains("lacks the route to 0.0.0.0/0"),
        "CHECK says something else: {found:#}"
    );
    cnitool.call("del", "box")?;
    // libcni forgets its cached result with the first one.
    cnitool.call("del", "box")?;
    spaces.run("ip", &["netns", "delete", "box"]).map(drop)
}

/// cnitool gives GC no list of valid attachments. libcni deletes what it has a cached result of; we refuse to take the missing list for
/// an empty one. With an empty list in the configuration we free what libcni knows nothing of.
fn collect(machine: &Machine, tool: &Path) -> Result<()> {
    let spaces = &machine.node().spaces;
    let conflists = machine.write_conflist("conflists", NEWEST, &[])?;
    let cnitool = mk_cnitool(machine, tool, &conflists);
    let nothing_is_leased = || -> Result<()> {
        let left = traces::leases(machine.node())?;
        ensure!(left.is_empty(), "GC left {left:?}");
        spaces.run("ip", &["netns", "delete", "box"]).map(drop)
    };
    spaces.run("ip", &["netns", "add", "box"])?;
    cnitool.call("add", "box")?;
    let found = cnitool.call("gc", "box").err().context("GC without a list")?;
    ensure!(format!("{found:#}").contains("cni.dev/valid-attachments is missing"), "GC says: {found:#}");
    nothing_is_leased()?;

    spaces.run("ip", &["netns", "add", "box"])?;
    cnitool.call("add", "box")?;
    spaces.run("sh", &["-c", "rm -r /var/lib/cni/*"])?;
    let list = conflists.join("10-holdfast.conflist");
    let mut config: Value = serde_json::from_str(&fs::read_to_string(&list)?)?;
    config["plugins"][0]["cni.dev/valid-attachments"] = json!([]);
    fs::write(list, config.to_string())?;
    cnitool.call("gc", "box")?;
    nothing_is_leased()
}

fn status(machine: &mut Machine, tool: &Path) -> Result<()> {
    let conflists = machine.write_conflist("conflists", NEWEST, &[])?;
    mk_cnitool(machine, tool, &conflists).call("status", "box")?;
    machine.net.nodes[0].netd.kill()?;
    let found = mk_cnitool(machine, tool, &conflists)
        .call("status", "box")
        .err()
        .context("STATUS without an agent")?;
    ensure!(format!("{found:#}").contains("the node agent is down"), "STATUS says something else: {found:#}");
    machine.net.nodes[0].netd.start_again()?;
    machine.net.nodes[0].wait()
}

fn mk_cnitool<'a>(machine: &'a Machine, program: &'a Path, conflists: &'a Path) -> Cnitool<'a> {
    Cnitool { program, machine, conflists, more_plugins: String::new(), capabilities: String::new() }
}
