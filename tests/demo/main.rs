//! The demo: the main job from end to end, told to a person. `scripts/demo` builds and runs it.

use std::process::ExitCode;

use anyhow::Result;
use clap::Parser;
use holdfast_tests::cleanup::{self, Logs};
use holdfast_tests::story::Story;
use holdfast_tests::{helper, postgres};

/// Three nodes on this machine, a replicated volume under PostgreSQL, a pod network with a policy.
#[derive(Parser)]
struct Arguments {
    /// Leave the cluster running at the end.
    #[arg(long)]
    keep: bool,
    /// End the clusters that --keep left running, and do nothing else.
    #[arg(long, conflicts_with = "keep")]
    end: bool,
}

fn main() -> ExitCode {
    if let Some(code) = helper::run_if_asked() {
        return code;
    }
    let arguments = Arguments::parse();
    match run(&arguments) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("\nThe demo failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    anyhow::ensure!(nix_is_root(), "it needs root: it makes namespaces, links and mounts");
    if arguments.end {
        println!("{} kept clusters ended", cleanup::sweep_kept_runs()?);
        return Ok(());
    }
    anyhow::ensure!(
        postgres::installed().is_some(),
        "PostgreSQL is not installed (Debian package postgresql)"
    );
    cleanup::end_when_interrupted()?;
    let mut story = Story::begin("demo")?;
    if let Err(error) = tell(&mut story) {
        if let Err(left) = story.cluster.end(Logs::Keep) {
            eprintln!("{left:#}");
        }
        return Err(error);
    }
    if arguments.keep {
        println!("\nThe cluster runs on. To look at it:\n{}", story.keep()?);
        println!("To end it: scripts/demo --end");
        return Ok(());
    }
    story.end()
}

fn tell(story: &mut Story) -> Result<()> {
    story.provision()?;
    story.run_pods()?;
    story.lose_a_replica()?;
    story.lose_a_node()
}

fn nix_is_root() -> bool {
    nix::unistd::geteuid().is_root()
}
