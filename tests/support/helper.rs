//! Small programs that the harness needs inside namespaces: hidden subcommands of whichever binary uses the harness.

use std::process::{Command, ExitCode};

use anyhow::{Context, Result};

const PREFIX: &str = "__holdfast-";

/// Runs the hidden subcommand that this process was started for, if it was. Call it first in every `main`.
#[must_use]
pub fn run_if_asked() -> Option<ExitCode> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let name = arguments.first()?.strip_prefix(PREFIX)?.to_owned();
    let rest = &arguments[1..];
    let outcome = match name.as_str() {
        "holder" => crate::namespaces::holder_main(rest),
        "holder-init" => crate::namespaces::holder_init_main(rest),
        "guard" => crate::cleanup::guard_main(rest),
        "pod" => crate::probe::pod_main(rest),
        "probe" => crate::probe::probe_main(rest),
        "ledger" => crate::ledger::client_main(rest),
        "direct-io" => crate::direct_io::direct_io_main(rest),
        "forgetful-disks" => crate::forgetful::disks_main(rest),
        "garbage" => crate::garbage::garbage_main(rest),
        other => Err(anyhow::anyhow!("there is no helper {other}")),
    };
    Some(outcome.unwrap_or_else(|error| {
        eprintln!("{name}: {error:#}");
        ExitCode::FAILURE
    }))
}

/// A command that runs a helper.
///
/// # Errors
/// The running program's path is unknown.
pub(crate) fn command(name: &str) -> Result<Command> {
    let mut command = Command::new(program()?);
    command.arg(argument(name));
    Ok(command)
}

/// The program whose hidden subcommands the helpers are.
pub(crate) fn program() -> Result<std::path::PathBuf> {
    std::env::current_exe().context("cannot find the running program's path")
}

/// First argument that asks for a helper.
pub(crate) fn argument(name: &str) -> String {
    format!("{PREFIX}{name}")
}
