//! Tier `cluster`: nodes as network namespaces on this machine, the real binaries, the real interfaces.
//!
//! One after another in the order below; the steps of the demo share one cluster, the faults another. A test that needs
//! an earlier step runs it.

mod bad_input;
mod csi_volume;
mod database;
mod demo;
mod encryption;
mod faults;
mod file_systems;
mod fio_verify;
mod leaving;
mod machine;
mod modify;
mod power_cut;
mod rescue;
mod snapshots;
mod stale;
mod steps;
mod wrong_input;

use std::process::ExitCode;

use holdfast_tests::{cleanup, helper};
use libtest_mimic::{Arguments, Trial};

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
    let mut trials: Vec<Trial> = Vec::new();
    trials.extend(machine::trials());
    trials.extend(steps::trials());
    trials.extend(bad_input::trials());
    trials.extend(wrong_input::trials());
    trials.extend(faults::trials());
    trials.extend(database::trials());
    trials.extend(fio_verify::trials());
    trials.extend(power_cut::trials());
    trials.extend(file_systems::trials());
    trials.extend(snapshots::trials());
    trials.extend(encryption::trials());
    trials.extend(modify::trials());
    trials.extend(leaving::trials());
    trials.extend(rescue::trials());
    trials.extend(demo::trials());
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A trial that fails with the whole chain of causes.
fn trial(name: &str, body: impl FnOnce() -> anyhow::Result<()> + Send + 'static) -> Trial {
    Trial::test(name, move || body().map_err(|error| format!("{error:#}").into()))
}
