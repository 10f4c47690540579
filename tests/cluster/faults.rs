//! `kill -9` of each process in turn: nothing acknowledged is lost, and a restart cleans up what the dead one left.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::story::Story;
use libtest_mimic::Trial;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::trial;

type Kill = fn(&mut Story) -> Result<()>;

/// How often replicas are killed at random.
const RANDOM_ROUNDS: u32 = 4;

/// Trials of this file, each on a cluster of its own.
pub fn trials() -> Vec<Trial> {
    vec![
        trial("kill_9_of_each_process_in_turn_loses_nothing", || with_story(kill_all)),
        trial("a_power_cut_of_the_databases_node_loses_nothing", || with_story(power_cut)),
        trial("replicas_killed_at_random_moments_lose_nothing", || with_story(kill_at_random)),
    ]
}

fn with_story(body: fn(&mut Story) -> Result<()>) -> Result<()> {
    let mut story = Story::begin("faults")?;
    let outcome = body(&mut story);
    match outcome {
        Ok(()) => story.end(),
        Err(error) => {
            story.cluster.end(Logs::Keep)?;
            Err(error)
        }
    }
}

fn kill_all(story: &mut Story) -> Result<()> {
    story.provision()?;
    story.run_pods()?;
    story.start_client()?;
    let kills: [(&str, Kill); 5] = [
        ("controller", kill_controller),
        ("CSI node process", kill_csi_node),
        ("network agent", kill_netd),
        ("data process of a replica", kill_replica),
        ("data process of the target", kill_target),
    ];
    for (name, kill) in kills {
        story.report.step(&format!("kill -9 of the {name}"));
        kill(story).with_context(|| format!("kill -9 of the {name}"))?;
        story.commit_for_a_moment()?;
        story.compare(&format!("after the {name} was killed"))?;
    }
    Ok(())
}

fn power_cut(story: &mut Story) -> Result<()> {
    story.provision()?;
    story.run_pods()?;
    story.start_client()?;
    story.commit_for_a_moment()?;
    story.survive_a_power_cut()?;
    story.commit_for_a_moment()?;
    story.compare("at the end").map(drop)
}

/// Replicas away from the target die one at a time, at moments drawn from the seed, also in the middle of their resync.
fn kill_at_random(story: &mut Story) -> Result<()> {
    let seed = holdfast_tests::effort::seed()?;
    let mut random = StdRng::seed_from_u64(seed);
    story.provision()?;
    story.run_pods()?;
    story.start_client()?;
    for round in 1..=RANDOM_ROUNDS {
        let name = if random.random_bool(0.5) { "node-b" } else { "node-c" };
        // Only one replica is away at a time; the same one may die again before it is back in sync.
        for _ in 0..random.random_range(1..=3) {
            std::thread::sleep(Duration::from_millis(random.random_range(0..700)));
            let node = story.cluster.node_mut(name);
            node.data.kill()?;
            std::thread::sleep(Duration::from_millis(random.random_range(0..400)));
            node.data.start_again()?;
            node.wait_for_data()?;
        }
        story.wait_for_all_in_sync().with_context(|| format!("round {round} with {name}, seed {seed}"))?;
        story.compare(&format!("round {round}")).with_context(|| format!("seed {seed}"))?;
    }
    // The last word is the disk's: the replicas that were killed must carry the volume without the one that was not.
    story.survive_a_power_cut().with_context(|| format!("seed {seed}"))?;
    story.compare("at the end").with_context(|| format!("seed {seed}")).map(drop)
}

fn kill_controller(story: &mut Story) -> Result<()> {
    story.cluster.controller.program.kill()?;
    story.commit_for_a_moment().context("commits without a controller")?;
    story.cluster.controller.program.start_again()?;
    story.cluster.controller.wait()?;
    ensure!(story.volumes()? == 1, "the restarted controller does not know the volume");
    Ok(())
}

fn kill_csi_node(story: &mut Story) -> Result<()> {
    let node = story.cluster.node_mut("node-a");
    node.csi.kill()?;
    story.commit_for_a_moment().context("commits without a CSI node process")?;
    let node = story.cluster.node_mut("node-a");
    node.csi.start_again()?;
    node.wait_for_csi()?;
    // Staging and publishing again is what kubelet does after a restart: they find everything in place.
    story.attach_again()
}

fn kill_netd(story: &mut Story) -> Result<()> {
    story.cluster.node_mut("node-a").netd.kill()?;
    story.check_reachability().context("rules stay in force without an agent")?;
    let refused = story.add_pod("late", "node-a");
    let sentence = format!("{:#}", refused.err().context("ADD succeeded without an agent")?);
    ensure!(
        sentence.contains("\"code\":11") || sentence.contains("\"code\": 11"),
        "not \"try again\": {sentence}"
    );
    let node = story.cluster.node_mut("node-a");
    node.netd.start_again()?;
    node.wait_for_netd()?;
    story.remove_sandbox("late", "node-a")?;
    let pod = story.add_pod("late", "node-a")?;
    pod.delete(&story.cluster)?;
    story.check_reachability().context("the restarted agent")
}

fn kill_replica(story: &mut Story) -> Result<()> {
    story.cluster.node_mut("node-b").data.kill()?;
    story.commit_for_a_moment().context("commits without a replica")?;
    let node = story.cluster.node_mut("node-b");
    node.data.start_again()?;
    node.wait_for_data()?;
    story.wait_for_all_in_sync()
}

fn kill_target(story: &mut Story) -> Result<()> {
    story.recover_database_after(|cluster| {
        let node = cluster.node_mut("node-a");
        node.data.kill()?;
        node.data.start_again()?;
        node.wait_for_data()
    })
}
