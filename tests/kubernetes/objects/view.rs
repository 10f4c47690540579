//! What an agent would know: the batches of a source, put together.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use holdfast_agent::{Batch, ObjectSource, open_objects};
use holdfast_net_core::objects::ObjectChange;
use serde_json::{Value, json, to_value};
use tokio::sync::mpsc::Receiver;

use crate::bed::Bed;

/// A source may take this long for anything: a folder that went away is noticed within 10 s, an API server that came back within 15 s.
const TIMEOUT: Duration = Duration::from_secs(60);

/// Objects of one trial, as a source tells of them.
pub struct View {
    received: Receiver<Batch>,
    prefix: String,
    /// By kind and name.
    pub objects: BTreeMap<String, Value>,
    /// Names of those that went.
    pub gone: Vec<String>,
    /// There was a complete batch.
    pub complete: bool,
    /// Of the last batch.
    pub readable: bool,
    /// The same.
    pub problems: Vec<String>,
    /// Every problem that there ever was.
    pub all_problems: BTreeSet<String>,
}

impl View {
    /// Opens a source for the objects whose names, or whose namespaces' names, begin with `prefix`.
    pub fn open(bed: &Bed, source: &ObjectSource, prefix: &str) -> Result<Self> {
        let opened = bed.run(async { open_objects(source, &format!("{prefix}-node")).await })?;
        Ok(Self {
            received: opened.0,
            prefix: prefix.to_owned(),
            objects: BTreeMap::new(),
            gone: Vec::new(),
            complete: false,
            readable: false,
            problems: Vec::new(),
            all_problems: BTreeSet::new(),
        })
    }

    /// Takes in what comes until it is so.
    pub fn until(&mut self, bed: &Bed, what: &str, mut is_so: impl FnMut(&Self) -> bool) -> Result<()> {
        let begun = Instant::now();
        while !is_so(self) {
            let left = TIMEOUT.saturating_sub(begun.elapsed());
            ensure!(!left.is_zero(), "not within {TIMEOUT:?}: {what}; {}", self.state());
            self.take_one(bed, left)?;
        }
        Ok(())
    }

    /// Takes in what comes within a time.
    pub fn take_for(&mut self, bed: &Bed, time: Duration) -> Result<()> {
        let begun = Instant::now();
        while let Some(left) = time.checked_sub(begun.elapsed()) {
            self.take_one(bed, left)?;
        }
        Ok(())
    }

    /// An object by kind and name, which may begin with its namespace's.
    pub fn get(&self, kind: &str, name: &str) -> Option<&Value> {
        self.objects.get(&format!("{kind} {name}"))
    }

    /// Everything that is known, for messages.
    pub fn state(&self) -> String {
        format!(
            "complete {}, readable {}, problems {:?}, objects {:?}, gone {:?}",
            self.complete,
            self.readable,
            self.problems,
            self.objects.keys(),
            self.gone
        )
    }

    fn take_one(&mut self, bed: &Bed, wait: Duration) -> Result<()> {
        let received = &mut self.received;
        let batch = bed.run(async { Ok(tokio::time::timeout(wait, received.recv()).await.ok()) })?;
        match batch {
            Some(Some(batch)) => self.take(batch),
            Some(None) => bail!("the source ended"),
            None => {}
        }
        Ok(())
    }

    fn take(&mut self, batch: Batch) {
        for change in batch.changes {
            let (key, object) = described(change);
            if !key.split_once(' ').is_some_and(|(_, name)| name.starts_with(&self.prefix)) {
                continue;
            }
            match object {
                Some(object) => _ = self.objects.insert(key, object),
                None => {
                    self.objects.remove(&key);
                    self.gone.push(key);
                }
            }
        }
        self.complete |= batch.complete;
        self.readable = batch.readable;
        self.all_problems.extend(batch.problems.iter().cloned());
        self.problems = batch.problems;
    }
}

fn described(change: ObjectChange) -> (String, Option<Value>) {
    let json = |object: serde_json::Result<Value>| object.unwrap_or_default();
    match change {
        ObjectChange::Node(name, it) => (format!("Node {name}"), it.map(|it| json(to_value(it)))),
        ObjectChange::Namespace(name, it) => {
            (format!("Namespace {name}"), it.map(|labels| json!({"metadata": {"labels": labels}})))
        }
        ObjectChange::Pod(name, it) => (format!("Pod {name}"), it.map(|it| json(to_value(it)))),
        ObjectChange::Policy(name, it) => (format!("NetworkPolicy {name}"), it.map(|it| json(to_value(it)))),
        ObjectChange::ClusterPolicy(name, it) => {
            (format!("ClusterNetworkPolicy {name}"), it.map(|it| json(to_value(it))))
        }
        ObjectChange::PodRange(name, it) => (format!("PodRange {name}"), it.map(|it| json(to_value(it)))),
    }
}
