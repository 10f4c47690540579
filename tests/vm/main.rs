//! Tier `vm`: Debian's kernel from backports in QEMU, for what the host's kernel lacks. No KVM, no network, no disk: the
//! machine is its initramfs, made here from the host's own tools and our binaries.
//!
//! The kernel is unpacked beside the build by `scripts/test` and never installed. Where it could not be had, each test is
//! skipped with the reason.

mod guest;
mod image;
mod machine;

use std::process::ExitCode;

use holdfast_tests::helper;
use libtest_mimic::{Arguments, Trial};

use crate::machine::boot;

fn main() -> ExitCode {
    if let Some(code) = guest::run_if_asked().or_else(helper::run_if_asked) {
        return code;
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    let trials = vec![
        trial("debians_kernel_has_log_writes_nbd_and_ublk", "modules"),
        trial("a_replica_keeps_at_every_flush_what_was_flushed", "log-writes"),
        trial("a_replica_on_a_device_that_drops_flushed_writes_is_noticed", "dropped-writes"),
        trial("the_kernels_nbd_client_uses_our_server", "nbd"),
    ];
    libtest_mimic::run(&arguments, trials).exit_code()
}

/// A trial that boots the machine and runs one of the guest's tests in it.
fn trial(name: &'static str, test: &'static str) -> Trial {
    Trial::test(name, move || match machine::missing() {
        Some(reason) => {
            // The runner counts it as skipped under this name.
            println!("\n---- {name} ----\nSKIP: {reason}");
            Ok(())
        }
        None => boot(test).map_err(|error| format!("{error:#}").into()),
    })
}
