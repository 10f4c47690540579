//! PostgreSQL through kill after kill, with pgbench as load and a ledger of what was acknowledged.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::story::Story;
use libtest_mimic::Trial;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::stale::StaleReplica;
use crate::trial;
use holdfast_tests::effort::{rounds, seed};

const KILLS_SHORT: u32 = 5;
const KILLS_LONG: u32 = 50;
/// Whose data process dies, in turn: two replicas', then the target's.
const VICTIMS: [&str; 3] = ["node-b", "node-c", "node-a"];

/// Trials of this file, each on a cluster of its own.
pub fn trials() -> Vec<Trial> {
    vec![
        trial("pgbench_and_ledger_lose_nothing_through_kill_after_kill", || {
            with_database(kill_again_and_again)
        }),
        trial("a_database_that_lost_acknowledged_transactions_is_noticed", || {
            with_database(lose_transactions)
        }),
    ]
}

fn with_database(body: fn(&mut Story) -> Result<()>) -> Result<()> {
    let mut story = Story::begin("database")?;
    let mut inner = || -> Result<()> {
        story.provision()?;
        story.run_pods()?;
        story.start_pgbench()?;
        story.start_client()?;
        body(&mut story)
    };
    let outcome = inner();
    let ended = story.cluster.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep });
    outcome.and(ended)
}

fn kill_again_and_again(story: &mut Story) -> Result<()> {
    let seed = seed()?;
    let mut random = StdRng::seed_from_u64(seed);
    let kills = rounds(KILLS_SHORT, KILLS_LONG);
    for (kill, victim) in (1..=kills).zip(VICTIMS.into_iter().cycle()) {
        let mut once = || -> Result<()> {
            std::thread::sleep(Duration::from_millis(random.random_range(300..1500)));
            if victim == "node-a" {
                story.recover_database_after(|cluster| {
                    let node = cluster.node_mut(victim);
                    node.data.kill()?;
                    node.data.start_again()?;
                    node.wait_for_data()
                })?;
            } else {
                let node = story.cluster.node_mut(victim);
                node.data.kill()?;
                std::thread::sleep(Duration::from_millis(random.random_range(0..1500)));
                node.data.start_again()?;
                node.wait_for_data()?;
                story.wait_for_all_in_sync()?;
            }
            story.commit_for_a_moment()?;
            story.compare(&format!("after kill {kill}"))?;
            story.check_pgbench().map(drop)
        };
        once().with_context(|| format!("kill {kill}, {victim}, seed {seed}"))?;
    }
    let last = story.compare("at the end")?;
    let transactions = story.check_pgbench()?;
    println!(
        "{kills} kills: {} acknowledged, {} present; pgbench {transactions}",
        last.acknowledged, last.present
    );
    ensure!(last.acknowledged > 0 && transactions > 0, "nothing was committed: no test");
    Ok(())
}

/// The same comparison with the database's replica set back to before the last commits: it must be noticed.
fn lose_transactions(story: &mut Story) -> Result<()> {
    story.commit_for_a_moment()?;
    story.check_pgbench()?;
    let mut stale = None;
    story.with_database_down(|cluster| {
        stale = Some(StaleReplica::copy(cluster, "node-a")?);
        Ok(())
    })?;
    let stale = stale.context("no copy was made")?;
    story.commit_for_a_moment()?;
    story.check_pgbench()?;
    story.compare("before the sabotage")?;
    story.with_database_down(|cluster| stale.put_back(cluster))?;
    let Err(error) = story.compare("after the sabotage") else {
        bail!("the ledger did not notice that acknowledged transactions are gone")
    };
    let sentence = format!("{error:#}");
    println!("noticed: {sentence:.200}");
    ensure!(sentence.contains("acknowledged transactions are lost"), "for another reason: {sentence}");
    Ok(())
}
