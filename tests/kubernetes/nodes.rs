//! The node directory on a real server.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use holdfast_service::{KubernetesDirectory, NodeBook};
use holdfast_storage_core::ids::NodeName;
use holdfast_storage_core::node_directory::{NodeDirectory, NodeInfo, NodeState, NodeStates};
use holdfast_tests::api_server::ADMIN;
use libtest_mimic::Trial;

use crate::bed::Bed;
use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("nodes::are_listed_as_they_announced_themselves_last", nodes_are_listed_as_announced_last),
        trial("nodes::count_as_alive_while_they_announce_themselves", nodes_are_alive_while_they_announce),
    ]
}

pub fn mk_node(name: &str) -> NodeInfo {
    NodeInfo {
        name: NodeName(name.to_owned()),
        control_address: "192.0.2.1:9471".to_owned(),
        nbd_address: "192.0.2.1:9472".to_owned(),
        capacity_bytes: 10 << 30,
        available_bytes: 5 << 30,
        zone: Some("zone-1".to_owned()),
        pool_class: Some("fast".to_owned()),
        volumes_max: Some(9),
    }
}

fn nodes_are_listed_as_announced_last(bed: &Bed) -> Result<()> {
    bed.install()?;
    let directory = KubernetesDirectory::new(bed.client(ADMIN)?);
    bed.run(async {
        directory.announce(mk_node("node-a")).await?;
        directory.announce(mk_node("node-b.example")).await?;
        let moved = NodeInfo { control_address: "192.0.2.9:1".to_owned(), ..mk_node("node-a") };
        directory.announce(moved.clone()).await?;
        let listed = directory.list_nodes().await?;
        ensure!(listed == [moved, mk_node("node-b.example")], "{listed:?}");
        Ok(())
    })
}

/// The book of a controller that starts now: a node that says nothing any more is known to nobody as alive.
fn nodes_are_alive_while_they_announce(bed: &Bed) -> Result<()> {
    bed.install()?;
    let directory = Arc::new(KubernetesDirectory::new(bed.client(ADMIN)?));
    bed.run(async {
        directory.announce(mk_node("silent")).await?;
        directory.announce(mk_node("talks")).await?;
        let book = Arc::new(NodeBook::new());
        let feeding = tokio::spawn({
            let (directory, book) = (Arc::clone(&directory), Arc::clone(&book));
            async move { directory.feed(book).await }
        });
        let start = Instant::now();
        while book.alive().is_empty() {
            ensure!(start.elapsed() < Duration::from_secs(15), "no node came alive");
            directory.announce(mk_node("talks")).await?;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        let alive = book.alive();
        ensure!(alive == [mk_node("talks")], "{alive:?}");
        // What is decided about a node, by whomever, is in the book before long, and one that was removed is not let in.
        let node = NodeName("talks".to_owned());
        directory.set_node_state(node.clone(), NodeState::Removed).await?;
        let start = Instant::now();
        while book.state(&node) != NodeState::Removed || !book.alive().is_empty() {
            ensure!(start.elapsed() < Duration::from_secs(20), "{:?}, {:?}", book.state(&node), book.alive());
            directory.announce(mk_node("talks")).await?;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        directory.set_node_state(node.clone(), NodeState::Active).await?;
        while book.state(&node) != NodeState::Active || book.alive().is_empty() {
            ensure!(start.elapsed() < Duration::from_secs(40), "it is not let in again");
            directory.announce(mk_node("talks")).await?;
            tokio::time::sleep(Duration::from_millis(500)).await;
        }
        feeding.abort();
        Ok(())
    })
}
