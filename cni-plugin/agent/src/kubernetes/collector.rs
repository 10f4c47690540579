//! What the watchers tell, put together for the engine.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Instant;

use holdfast_net_core::objects::ObjectChange;
use tokio::sync::mpsc;
use tracing::{info, warn};

use super::kinds::KINDS;
use super::watcher::Event;
use crate::batch::{Batch, CHANGES_MAX};
use crate::intake::{Judged, Wrong};
use crate::keys::{Keys, ListId};
use crate::objects::{Document, ObjectKey};

/// Sentences about single objects beyond this are only counted.
const PROBLEMS_MAX: usize = 1000;

/// The engine is gone.
pub(super) struct Gone;

/// What is known of the objects: their names.
pub(super) struct Collector {
    keys: Keys,
    kinds: Vec<Known>,
    wrong: Wrong,
    /// Why the API server does not answer to a trial.
    silent: Option<String>,
    changes: Vec<ObjectChange>,
    /// Every kind was read whole.
    complete: bool,
    /// What the last batch said of it.
    readable: bool,
    told: Vec<String>,
    noticed: Instant,
    sender: mpsc::Sender<Batch>,
}

/// What is known of a kind.
struct Known {
    name: &'static str,
    /// Objects in force, but for those that a list which is being read has named again.
    list: ListId,
    /// The objects of such a list; they are in force.
    reading: Option<ListId>,
    /// Wrong objects that this list has not named yet.
    unseen: BTreeSet<ObjectKey>,
    /// It was read whole.
    is_listed: bool,
    is_absent: bool,
    /// Why it cannot be read now.
    away: Option<String>,
}

impl Collector {
    pub fn new(sender: mpsc::Sender<Batch>) -> Self {
        let mut keys = Keys::default();
        let kinds = KINDS.iter().map(|kind| Known {
            name: kind.name,
            list: keys.open(),
            reading: None,
            unseen: BTreeSet::new(),
            is_listed: false,
            is_absent: false,
            away: None,
        });
        let kinds = kinds.collect();
        Self {
            keys,
            kinds,
            wrong: Wrong::default(),
            silent: None,
            changes: Vec::new(),
            complete: false,
            readable: false,
            told: Vec::new(),
            noticed: Instant::now(),
            sender,
        }
    }

    /// Something was noticed.
    pub fn begin(&mut self) {
        self.noticed = Instant::now();
    }

    pub fn take_trial(&mut self, failed: Option<String>) {
        self.silent = failed;
    }

    /// Takes in what the watcher of a kind tells. Cancelled, it may have been taken in or not.
    pub async fn take(&mut self, index: usize, event: Event) -> Result<(), Gone> {
        match event {
            Event::Began => self.open_list(index),
            Event::Is(document) => {
                self.take_document(index, document);
                return self.pass_on_some().await;
            }
            Event::Gone(key) => {
                self.wrong.forget(&key);
                let packed = key.packed();
                if self.keys.remove(&packed) {
                    self.changes.push(ObjectKey::removal(&packed));
                    let known = &mut self.kinds[index];
                    known.list = self.keys.compact(known.list);
                }
                return self.pass_on_some().await;
            }
            Event::Ended => {
                self.kinds[index].is_absent = false;
                return self.close_list(index).await;
            }
            Event::Absent => {
                let known = &mut self.kinds[index];
                if !std::mem::replace(&mut known.is_absent, true) {
                    info!(
                        kind = known.name,
                        "is not defined in this cluster; it is looked for from time to time"
                    );
                }
                self.open_list(index);
                return self.close_list(index).await;
            }
            Event::Away(reason) => {
                let known = &mut self.kinds[index];
                if known.away.as_ref() != Some(&reason) {
                    warn!(kind = known.name, %reason, "cannot be read now");
                }
                known.away = Some(reason);
            }
            Event::Follows => self.note_follows(index),
        }
        Ok(())
    }

    fn note_follows(&mut self, index: usize) {
        let known = &mut self.kinds[index];
        if known.away.take().is_some() {
            info!(kind = known.name, "can be read again");
        }
    }

    fn open_list(&mut self, index: usize) {
        let known = &mut self.kinds[index];
        // Of a list that did not end, what it named is in force like the rest.
        if let Some(unfinished) = known.reading.take() {
            self.keys.take_over(unfinished, known.list);
        }
        known.reading = Some(self.keys.open());
        let of_kind = self.wrong.refused().keys().filter(|key| key.kind == known.name);
        known.unseen = of_kind.cloned().collect();
    }

    async fn close_list(&mut self, index: usize) -> Result<(), Gone> {
        let known = &mut self.kinds[index];
        let Some(whole) = known.reading.take() else { return Ok(()) };
        let before = std::mem::replace(&mut known.list, whole);
        known.is_listed = true;
        for key in std::mem::take(&mut known.unseen) {
            self.wrong.forget(&key);
        }
        let gone = self.keys.of_list(before);
        self.keys.close(before);
        self.keys.fit(whole);
        self.note_follows(index);
        for packed in gone {
            self.changes.push(ObjectKey::removal(&packed));
            self.pass_on_some().await?;
        }
        Ok(())
    }

    fn take_document(&mut self, index: usize, document: Document) {
        let known = &mut self.kinds[index];
        let list = known.reading.unwrap_or(known.list);
        let keys = &self.keys;
        let (judged, problem) = self.wrong.judge(document, |packed| keys.list_of(packed).is_some());
        if let Some(problem) = problem {
            warn!("{problem}");
        }
        let key = match judged {
            Judged::Good(key, object) => {
                self.changes.push(object.into_change(&key));
                key
            }
            Judged::Kept(key) => key,
            Judged::Nothing => return,
        };
        known.unseen.remove(&key);
        self.keys.put(list, &key.packed());
        if known.reading.is_none() {
            known.list = self.keys.compact(list);
        }
    }

    /// Many changes are not collected before they are passed on.
    async fn pass_on_some(&mut self) -> Result<(), Gone> {
        if self.changes.len() < CHANGES_MAX {
            return Ok(());
        }
        self.pass_on().await
    }

    /// Passes on what there is, if there is something.
    pub async fn pass_on_all(&mut self) -> Result<(), Gone> {
        let is_first = !self.complete && self.kinds.iter().all(|known| known.is_listed);
        self.complete |= is_first;
        let is_news = is_first
            || !self.changes.is_empty()
            || self.is_readable() != self.readable
            || self.problems() != self.told;
        if is_news { self.pass_on().await } else { Ok(()) }
    }

    /// Each part is as good as a whole: an object never moves to another name, so there is no moment between parts at which one
    /// is missing that is there before and after.
    async fn pass_on(&mut self) -> Result<(), Gone> {
        self.told = self.problems();
        self.readable = self.is_readable();
        let batch = Batch {
            changes: std::mem::take(&mut self.changes),
            complete: self.complete,
            readable: self.readable,
            problems: self.told.clone(),
            refused: if self.complete { self.wrong.refused().clone() } else { BTreeMap::new() },
            noticed: self.noticed,
        };
        self.sender.send(batch).await.map_err(|_| Gone)
    }

    fn is_readable(&self) -> bool {
        self.complete && self.silent.is_none() && self.kinds.iter().all(|known| known.away.is_none())
    }

    fn problems(&self) -> Vec<String> {
        let mut away: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
        for known in &self.kinds {
            if let Some(reason) = &known.away {
                away.entry(reason).or_default().push(known.name);
            }
        }
        let away = away.into_iter().map(|(reason, kinds)| {
            format!("cannot read {}: {reason}; what is known of it stays in force", kinds.join(", "))
        });
        let mut problems: Vec<String> = self.silent.iter().cloned().chain(away).collect();
        let refused = self.wrong.refused();
        problems.extend(refused.iter().take(PROBLEMS_MAX).map(|(key, what)| format!("{key} is {what}")));
        if refused.len() > PROBLEMS_MAX {
            problems.push(format!("{} objects are wrong in all", refused.len()));
        }
        problems
    }
}

#[cfg(test)]
mod tests;
