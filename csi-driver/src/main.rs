//! holdfast-csi: one binary, three roles, their removal, and a look at what pools hold.

mod inspect;
mod kubelet_leftovers;
mod options;
mod privileges;
mod roles;
mod uninstall;

use std::process::ExitCode;

use clap::Parser;

use options::{LogFormat, Options};

fn main() -> ExitCode {
    let options = Options::parse();
    start_logging(options.log_format);
    let role = options.role.name();
    match run(options) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(role, "{error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(options: Options) -> anyhow::Result<()> {
    // Capabilities belong to threads: they go before the runtime starts any.
    privileges::keep_only(options.role.capabilities())?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let result = runtime.block_on(roles::run(options.role));
    // A call that hangs in the kernel (an unmount of a dead device) must not keep the process.
    runtime.shutdown_background();
    result
}

fn start_logging(format: LogFormat) {
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| tracing_subscriber::EnvFilter::new("info,fuser=error"));
    let subscriber = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    match format {
        LogFormat::Text => subscriber.with_ansi(false).init(),
        LogFormat::Json => subscriber.json().init(),
    }
}
