//! `holdfast-netd doctor`: names what interferes with the node's network, and what is missing, one line each with what to do.
//!
//! ```text
//! the agent (its dump), the kernel (netlink, /proc), other managers --look--> Facts --judge--> findings
//! ```
//!
//! It changes nothing and needs no agent: one that does not answer is a finding, and the rest is judged by the usual
//! names. It looks at the network namespace that it runs in, and at processes of that namespace only. Not looked at: rules of
//! legacy iptables (that there are some is told), eBPF programs, and whatever stands between the nodes.

mod chains;
mod judge;
mod look;

use std::path::PathBuf;
use std::process::ExitCode;

use serde_json::json;

/// What to look at.
#[derive(Debug, Clone)]
pub struct DoctorOptions {
    /// The agent's socket.
    pub socket: PathBuf,
    /// Findings as one JSON object instead of lines.
    pub json: bool,
    /// Where `/run` and `/etc` of the node are.
    pub root: PathBuf,
}

/// One thing that is wrong.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// A fixed word for programs, such as "forward-drop".
    pub name: &'static str,
    /// What is so.
    pub what: String,
    /// What to do about it.
    pub advice: String,
}

/// Looks, prints, and gives the exit code: 0 nothing is wrong, 1 something is, 2 something could not be looked at.
pub async fn doctor(options: &DoctorOptions) -> ExitCode {
    let facts = look::look(options).await;
    let findings = judge::judge(&facts);
    if options.json {
        let told = findings
            .iter()
            .map(|finding| json!({ "name": finding.name, "what": finding.what, "advice": finding.advice }));
        println!("{:#}", json!({ "findings": told.collect::<Vec<_>>(), "notLookedAt": facts.unseen }));
    } else {
        for finding in &findings {
            println!("{}: {}; {}", finding.name, finding.what, finding.advice);
        }
        for unseen in &facts.unseen {
            println!("could not look at {unseen}");
        }
        if findings.is_empty() && facts.unseen.is_empty() {
            println!("nothing is wrong");
        }
    }
    match (facts.unseen.is_empty(), findings.is_empty()) {
        (false, _) => ExitCode::from(2),
        (true, false) => ExitCode::from(1),
        (true, true) => ExitCode::SUCCESS,
    }
}
