//! Tier `kubernetes`: against a real API server. Where it cannot be built, every test is a counted skip.

mod admission;
mod agents;
mod bed;
mod certificates;
mod cluster;
mod definitions;
mod lease;
mod manifests;
mod nodes;
mod objects;
mod outages;
mod pod_ranges;
mod records;
mod rescues;
mod soak;
mod taints;
mod volumes;
mod whole;

// Volumes as Kubernetes would use them stand with the tests on the embedded store.
#[allow(dead_code)] // Not everything that those do is done here.
#[path = "../cluster/csi_volume.rs"]
mod csi_volume;

// The suite of all record stores stands with the other stores' tests.
#[path = "../../csi-driver/service/tests/support"]
#[allow(clippy::unwrap_used)] // Tests and what they share may panic.
mod suite {
    pub mod records;
    pub mod store_suite;
}

use std::process::ExitCode;

use holdfast_tests::{cleanup, helper};
use libtest_mimic::{Arguments, Trial};

use crate::bed::Bed;

fn main() -> ExitCode {
    if let Some(code) = helper::run_if_asked() {
        return code;
    }
    if let Err(error) = cleanup::end_when_interrupted() {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    let mut arguments = Arguments::from_args();
    // One server for all, which some of the tests stop; and it ends with the thread that starts it.
    arguments.test_threads = Some(1);
    let mut trials: Vec<Trial> = Vec::new();
    trials.extend(definitions::trials());
    trials.extend(records::trials());
    trials.extend(nodes::trials());
    trials.extend(volumes::trials());
    trials.extend(lease::trials());
    trials.extend(admission::trials());
    trials.extend(taints::trials());
    trials.extend(certificates::trials());
    trials.extend(manifests::trials());
    trials.extend(whole::trials());
    trials.extend(outages::trials());
    trials.extend(rescues::trials());
    trials.extend(objects::trials());
    trials.extend(pod_ranges::trials());
    trials.extend(agents::trials());
    trials.extend(soak::trials());
    trials.extend(cluster::trials());
    let conclusion = libtest_mimic::run(&arguments, trials);
    if let Err(error) = cluster::end() {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

/// A trial on the shared server. Without one it is skipped, and says why.
fn trial(name: &str, body: impl FnOnce(&Bed) -> anyhow::Result<()> + Send + 'static) -> Trial {
    let skip = bed::skip_reason();
    let ignored = skip.is_some();
    if let Some(skip) = skip {
        println!("{skip}");
    }
    Trial::test(name, move || {
        let outcome = bed::shared().and_then(|bed| body(&bed));
        outcome.map_err(|error| format!("{error:#}").into())
    })
    .with_ignored_flag(ignored)
}
