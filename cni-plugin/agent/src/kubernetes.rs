//! The object source of clusters: the API server, watched.
//!
//! ```text
//! watcher of each kind --events--> collector --batches--> engine
//! trial, from time to time ------>
//! ```
//!
//! What is kept here are names: objects are passed on at once, in their slim form. Nothing is concluded from the absence of an
//! object before every kind was read whole once. While the API server is away the last state stays in force; what was deleted
//! meanwhile is found when it is back, by the watch's history or by a comparison of names.

mod api;
mod collector;
mod kinds;
mod lines;
mod watcher;

use std::sync::Arc;
use std::time::Duration;

use http::Request;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

pub(crate) use api::{Api, ApiError};

use crate::batch::Batch;
use collector::{Collector, Gone};
use kinds::KINDS;
use watcher::{Event, METADATA_ONLY, Watcher, shortened};

/// Events that wait for the collector; then reading waits, and the server for us.
const EVENTS_MAX: usize = 512;
/// Batches that wait for the engine. One: while it works, what comes is put together.
const BATCHES_MAX: usize = 1;
/// After an event, wait for this much silence: one act of a person or a controller is several events.
const QUIET: Duration = Duration::from_millis(2);
/// But never longer than this in all.
const QUIET_MAX: Duration = Duration::from_millis(20);
/// The API server is tried out this often: a watch on which nothing comes looks the same whether nothing happens or the server
/// hangs. Well below the time for which freed addresses are held back.
const TRIAL_INTERVAL: Duration = Duration::from_secs(10);
/// The same while it does not answer.
const TRIAL_INTERVAL_AWAY: Duration = Duration::from_secs(2);
/// An answer that takes longer is none.
const TRIAL_TIMEOUT: Duration = Duration::from_secs(5);
/// The largest answer to a trial: metadata of one object.
const TRIAL_BYTES_MAX: usize = 1 << 20;

/// What the collector is told.
enum Told {
    /// By the watcher of a kind.
    Kind(usize, Event),
    /// Why the API server does not answer, if it does not.
    Trial(Option<String>),
}

/// Watches until the receiver is gone. `node`: the name of this node.
pub(crate) fn watch(api: Api, node: Arc<str>) -> mpsc::Receiver<Batch> {
    let (sender, receiver) = mpsc::channel(BATCHES_MAX);
    tokio::spawn(run(api, node, Collector::new(sender)));
    receiver
}

async fn run(api: Api, node: Arc<str>, mut collector: Collector) {
    let (events, mut received) = mpsc::channel(EVENTS_MAX);
    let (trials, mut tried) = mpsc::channel(1);
    // Ended with this set.
    let mut tasks = JoinSet::new();
    for (index, kind) in KINDS.iter().enumerate() {
        tasks.spawn(Watcher::new(index, kind, api.clone(), events.clone()).run());
    }
    drop(events);
    tasks.spawn(try_out(api, node, trials));
    let mut next = async || {
        tokio::select! {
            Some((index, event)) = received.recv() => Some(Told::Kind(index, event)),
            Some(failed) = tried.recv() => Some(Told::Trial(failed)),
            else => None,
        }
    };
    while let Some(told) = next().await {
        collector.begin();
        let mut told = Some(told);
        let until = Instant::now() + QUIET_MAX;
        while let Some(now) = told.take() {
            if let Err(Gone) = take(&mut collector, now).await {
                return;
            }
            let now = Instant::now();
            if now < until {
                told = tokio::time::timeout_at(until.min(now + QUIET), next()).await.ok().flatten();
            }
        }
        if let Err(Gone) = collector.pass_on_all().await {
            return;
        }
    }
}

async fn take(collector: &mut Collector, told: Told) -> Result<(), Gone> {
    match told {
        Told::Kind(index, event) => collector.take(index, event).await,
        Told::Trial(failed) => {
            collector.take_trial(failed);
            Ok(())
        }
    }
}

/// Asks for this node's object from time to time, past the server's caches.
async fn try_out(api: Api, node: Arc<str>, told: mpsc::Sender<Option<String>>) {
    loop {
        let request = Request::get(format!("/api/v1/nodes/{node}"))
            .header(http::header::ACCEPT, METADATA_ONLY)
            .body(Vec::new());
        let answer = tokio::time::timeout(TRIAL_TIMEOUT, api.ask(request, TRIAL_BYTES_MAX)).await;
        let failed = match answer {
            Ok(Ok(_)) => None,
            Ok(Err(error)) if error.is_missing("nodes", &node) => None,
            Ok(Err(error)) => Some(error.to_string()),
            Err(_) => Some(format!("the API server does not answer: nothing within {TRIAL_TIMEOUT:?}")),
        };
        let pause = if failed.is_some() { TRIAL_INTERVAL_AWAY } else { TRIAL_INTERVAL };
        if told.send(failed).await.is_err() {
            return;
        }
        tokio::time::sleep(shortened(pause)).await;
    }
}
