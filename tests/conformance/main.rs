//! Tier `conformance`: checks against other people's definitions: Kubernetes' object types, the CSI and CNI specifications.

mod chart;
mod csi_sanity;
mod image;
mod manifests;
mod runtimes;

use std::process::ExitCode;

use holdfast_tests::{cleanup, helper};
use libtest_mimic::Arguments;

fn main() -> ExitCode {
    if let Some(code) = helper::run_if_asked() {
        return code;
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    if let Err(error) = cleanup::end_when_interrupted() {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    let mut trials = manifests::trials();
    trials.extend(chart::trials());
    trials.extend(image::trials());
    trials.extend(csi_sanity::trials());
    trials.extend(runtimes::trials());
    libtest_mimic::run(&arguments, trials).exit_code()
}
