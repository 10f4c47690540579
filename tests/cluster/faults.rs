//! `kill -9` of each process in turn: nothing acknowledged is lost, and a restart cleans up what the dead one left.

use anyhow::{Context, Result, ensure};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::story::Story;
use libtest_mimic::Trial;

use crate::trial;

type Kill = fn(&mut Story) -> Result<()>;

/// Trials of this file: one cluster, so one trial that kills each process in turn.
pub fn trials() -> Vec<Trial> {
    vec![trial("kill_9_of_each_process_in_turn_loses_nothing", kill_each_in_turn)]
}

fn kill_each_in_turn() -> Result<()> {
    let mut story = Story::begin("faults")?;
    let outcome = kill_all(&mut story);
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
