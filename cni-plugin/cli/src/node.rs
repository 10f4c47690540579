//! `holdfast node`: the cluster's storage nodes, and what an operator decides about them.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::{Args, Subcommand};
use holdfast_proto::storage::{ListStorageNodesRequest, NodeState, SetNodeStateRequest, StorageNode};
use serde_json::json;

use crate::{CALL_TIMEOUT, operator, refusal};

/// How often a drain that is waited for is looked at.
const LOOK_INTERVAL: Duration = Duration::from_secs(2);

#[derive(Subcommand)]
pub enum Verb {
    /// Every node with its state, its space, and what is on it.
    List {
        /// One JSON object per line.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        to: To,
    },
    /// Moves all replicas away from a node, and gives it no new ones.
    ///
    /// A volume has one replica more on the way and never one less, also while it is used. Volumes that are attached to the node
    /// stay attached: `kubectl drain` moves their pods.
    Drain {
        /// The node.
        node: String,
        /// Return once nothing is left on it.
        #[arg(long)]
        wait: bool,
        #[command(flatten)]
        to: To,
    },
    /// Lets a node have replicas again, whatever was decided about it before.
    Activate {
        /// The node.
        node: String,
        #[command(flatten)]
        to: To,
    },
    /// Waits no longer for a node that is lost for ever: its replicas are replaced, deletions go on without it.
    ///
    /// A volume whose only replica in sync was there stays as it is, until one is promoted. Should the node come back, it is
    /// not let in before it is activated.
    Remove {
        /// The node.
        node: String,
        /// Your word for it.
        #[arg(long, required = true)]
        yes_it_never_comes_back: bool,
        #[command(flatten)]
        to: To,
    },
}

#[derive(Args)]
pub struct To {
    /// Socket of the controller.
    #[arg(long, default_value = "/run/holdfast/csi-controller.sock")]
    socket: String,
}

pub async fn run(verb: Verb) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::List { json, to } => {
            let nodes = nodes(&to).await?;
            if json {
                nodes.iter().for_each(|node| println!("{}", as_json(node)));
            } else {
                print_table(&nodes);
            }
        }
        Verb::Drain { node, wait, to } => {
            decide(&node, NodeState::Draining, &to).await?;
            if wait {
                wait_until_empty(&node, &to).await?;
            }
        }
        Verb::Activate { node, to } => decide(&node, NodeState::Active, &to).await?,
        Verb::Remove { node, to, .. } => decide(&node, NodeState::Removed, &to).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn decide(node: &str, state: NodeState, to: &To) -> anyhow::Result<()> {
    let mut client = operator(&to.socket, CALL_TIMEOUT).await?;
    let request = SetNodeStateRequest { node: node.to_owned(), state: state.into() };
    client.set_node_state(request).await.map_err(refusal)?;
    Ok(())
}

async fn nodes(to: &To) -> anyhow::Result<Vec<StorageNode>> {
    let mut client = operator(&to.socket, CALL_TIMEOUT).await?;
    let reply = client.list_storage_nodes(ListStorageNodesRequest {}).await.map_err(refusal)?;
    Ok(reply.into_inner().nodes)
}

/// Tells each change, and each reason why a volume stays, once.
async fn wait_until_empty(name: &str, to: &To) -> anyhow::Result<()> {
    let mut told = String::new();
    loop {
        let nodes = nodes(to).await?;
        let Some(node) = nodes.iter().find(|node| node.name == name) else { return Ok(()) };
        if node.state() != NodeState::Draining {
            bail!("node {name} is {} now: somebody else decided about it", word(node.state()));
        }
        if node.replicas == 0 {
            println!("nothing is left on node {name}");
            return Ok(());
        }
        let mut news = format!("{} replicas are left on node {name}", node.replicas);
        for stuck in &node.stuck {
            news.push_str(&format!("\n  volume {} stays: {}", stuck.volume_id, stuck.reason));
        }
        if news != told {
            println!("{news}");
            told = news;
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

fn word(state: NodeState) -> &'static str {
    match state {
        NodeState::Unspecified => "unknown",
        NodeState::Active => "active",
        NodeState::Draining => "draining",
        NodeState::Removed => "removed",
    }
}

fn as_json(node: &StorageNode) -> serde_json::Value {
    let stuck = node.stuck.iter().map(|stuck| json!({"volume": stuck.volume_id, "reason": stuck.reason}));
    json!({
        "node": node.name, "state": word(node.state()), "alive": node.alive, "zone": node.zone,
        "capacityBytes": node.capacity_bytes, "availableBytes": node.available_bytes,
        "replicas": node.replicas, "inSync": node.in_sync, "attached": node.attached,
        "stuck": stuck.collect::<Vec<_>>(),
    })
}

fn print_table(nodes: &[StorageNode]) {
    println!(
        "{:<24}  {:<8}  {:<6}  {:<12}  {:>9}  {:>9}  {:>8}  {:>7}  {:>8}",
        "node", "state", "alive", "zone", "capacity", "free", "replicas", "in sync", "attached"
    );
    for node in nodes {
        let gib = |bytes: u64| format!("{} GiB", bytes >> 30);
        println!(
            "{:<24}  {:<8}  {:<6}  {:<12}  {:>9}  {:>9}  {:>8}  {:>7}  {:>8}",
            node.name,
            word(node.state()),
            if node.alive { "yes" } else { "no" },
            if node.zone.is_empty() { "-" } else { &node.zone },
            gib(node.capacity_bytes),
            gib(node.available_bytes),
            node.replicas,
            node.in_sync,
            node.attached
        );
        for stuck in &node.stuck {
            println!("  volume {} stays: {}", stuck.volume_id, stuck.reason);
        }
    }
}
