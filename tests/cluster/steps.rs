//! The demo's steps, one test each, on one cluster.

use std::sync::{Mutex, PoisonError};

use anyhow::{Context, Result, bail};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::story::Story;
use libtest_mimic::Trial;

use crate::trial;

/// The cluster and how far it has come.
#[derive(Default)]
struct Progress {
    story: Option<Story>,
    done: usize,
    failed_at: Option<usize>,
}

type Step = fn(&mut Story) -> Result<()>;

/// Steps after the first, which makes the story.
const STEPS: [Step; 4] = [Story::provision, Story::run_pods, Story::lose_a_replica, Story::lose_a_node];

static PROGRESS: Mutex<Progress> = Mutex::new(Progress { story: None, done: 0, failed_at: None });

/// Trials of this file.
pub fn trials() -> Vec<Trial> {
    vec![
        trial("step_1_three_nodes_start_and_announce_their_pools", || run_up_to(1)),
        trial("step_2_a_volume_with_three_replicas_is_mounted_on_its_node", || run_up_to(2)),
        trial("step_3_pods_reach_one_another_as_the_policy_says", || run_up_to(3)),
        trial("step_4_commits_go_on_without_a_replica_whose_resync_is_small", || run_up_to(4)),
        trial("step_5_a_cut_off_node_loses_the_volume_and_no_transaction_is_lost", || run_up_to(5)),
        trial("step_6_the_end_leaves_nothing_behind", end),
    ]
}

/// Runs every step up to `step` that has not been run; a step whose forerunner failed fails.
fn run_up_to(step: usize) -> Result<()> {
    let mut progress = PROGRESS.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(failed) = progress.failed_at {
        bail!("step {failed} failed before");
    }
    while progress.done < step {
        let next = progress.done + 1;
        let outcome = match &mut progress.story {
            None => Story::begin("steps").map(|story| progress.story = Some(story)),
            Some(story) => STEPS[next - 2](story),
        };
        if let Err(error) = outcome {
            progress.failed_at = Some(next);
            if let Some(story) = progress.story.take() {
                story.cluster.end(Logs::Keep)?;
            }
            return Err(error).with_context(|| format!("step {next}"));
        }
        progress.done = next;
    }
    Ok(())
}

fn end() -> Result<()> {
    run_up_to(5)?;
    let mut progress = PROGRESS.lock().unwrap_or_else(PoisonError::into_inner);
    progress.story.take().context("the story has ended before")?.end()
}
