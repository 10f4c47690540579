//! The record store is lost whole, and rescued from the copies that the replicas keep (ADR 0011), by the very plan that the
//! controller makes. Once at most per run.
//!
//! *Checked:* by the history, as ever: nobody sees an older value than before, and no acknowledged write is missing. A
//! snapshot that was answered is there, and the volume is as large as was answered. Once every replica answers there is no doubt.

use holdfast_storage_core::ids::RecordVersion;
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_copy::{CopyStamp, RecordCopy};
use holdfast_storage_core::record_store::Versioned;
use holdfast_storage_core::rescue::{self, Found, FoundCopy, Survey, Verdict};
use rand::Rng;

use crate::coverage::Scenario;
use crate::operator::Task;
use crate::world::{Event, NODES, REPLICAS, STORE, World, node_name};

/// A loss has its rescue, and what follows from it, well before all troubles end.
const RESCUED_WITHIN_US: u64 = 30_000_000;
/// Every replica is back long before so many tries.
const TRIES_MAX: u32 = 12;
/// Between two tries.
const PAUSE_US: u64 = 1_000_000;

/// A copy as the data process makes it.
pub fn copy_of(record: &Versioned) -> RecordCopy {
    let json = serde_json::to_vec(&record.record).expect("a record has a JSON form");
    RecordCopy { stamp: CopyStamp::of(record), json: json.into() }
}

fn read(copy: &RecordCopy) -> FoundCopy {
    let record: VolumeRecord = serde_json::from_slice(&copy.json).expect("it was made of a record");
    FoundCopy::Record(Box::new(Versioned { version: copy.stamp.version, record }))
}

impl World {
    /// Nothing is answered from here on; what was swapped in last is known to nobody but the replicas.
    pub fn lose_store(&mut self) {
        if self.operator.began || self.now + RESCUED_WITHIN_US > self.chaos.until_us {
            return;
        }
        self.operator.began = true;
        self.operator.calm = true;
        self.operator.holds = true;
        self.log(|| "-- the store is lost".to_owned());
        self.saw(Scenario::StoreLost);
        self.store.down_since = self.now;
        self.store.down_until = u64::MAX;
        let delay = self.rng.random_range(1_000..4_000_000);
        self.schedule(delay, Event::Operate(Task::Rescue { tries: 0 }));
    }

    /// One look at the nodes that answer; whoever is missing is brought back for the next one.
    pub fn rescue(&mut self, tries: u32) {
        let survey = self.survey();
        let all = survey.answered.len() == REPLICAS;
        let found = rescue::plan(&survey).into_iter().next();
        let notes = found.as_ref().map(|rescue| rescue.notes.join("; ")).unwrap_or_default();
        let verdict = found.as_ref().map(|rescue| rescue.verdict);
        self.log(|| format!("-- a rescue finds {verdict:?}: {notes}"));
        match (verdict, found.and_then(|rescue| rescue.record)) {
            (Some(Verdict::Sound), Some(record)) => return self.restored(record),
            (Some(Verdict::Doubtful), Some(record)) if !all && self.may_name() => {
                self.saw(Scenario::RescuedInDoubt);
                self.name(record);
                return;
            }
            _ => {}
        }
        self.saw(Scenario::RescueInDoubt);
        if tries >= TRIES_MAX {
            self.history.violations.push(format!("P1: the store cannot be rescued ({verdict:?}): {notes}"));
            let record = self.store.record.clone();
            return self.restored(record);
        }
        self.bring_back();
        self.schedule(PAUSE_US, Event::Operate(Task::Rescue { tries: tries + 1 }));
    }

    fn survey(&self) -> Survey {
        let mut survey = Survey::default();
        for node in 0..REPLICAS {
            let host = &self.nodes[node];
            let cut = self.cut_until(node, STORE).is_some() || self.cut_until(STORE, node).is_some();
            if !host.powered || host.process.is_none() || host.paused_until > self.now || cut {
                continue;
            }
            survey.answered.insert(node_name(node));
            survey.found.push(Found {
                node: node_name(node),
                replica: host.disk.meta.replica_id,
                volume: host.disk.meta.volume_id,
                meta: Some(host.disk.meta.clone()),
                holds_data: Some(true),
                copy: host.disk.record.as_ref().map_or(FoundCopy::Absent, read),
            });
        }
        survey
    }

    fn restored(&mut self, record: VolumeRecord) {
        let had = self.store.record.size_bytes;
        self.log(|| {
            format!("-- the store is rescued: gen {} epoch {}", record.generation, record.epoch.number)
        });
        self.saw(Scenario::StoreRescued);
        if record.size_bytes < self.snapshots.grown_bytes {
            let (is, was) = (record.size_bytes, self.snapshots.grown_bytes);
            self.history
                .violations
                .push(format!("P1: the volume has {is} bytes, {was} were answered ({had} swapped)"));
        }
        self.store.record = record;
        // It counts its versions from 1 on: what is still under way may meet one that it expects.
        self.store.version = RecordVersion(1);
        self.store.before = None;
        self.store.unrelated = RecordVersion(0);
        self.store.down_until = 0;
        self.operator.calm = false;
        self.operator.holds = false;
        let node = self.rng.random_range(0..NODES);
        self.publish(node);
        for node in 0..REPLICAS {
            let delay = self.rng.random_range(0..5_000_000);
            self.schedule(delay, Event::StartProcess { node });
        }
    }

    /// An operator who does not wait. Of snapshots nothing is promised then.
    fn may_name(&mut self) -> bool {
        !self.snapshots.are_made() && self.rng.random_bool(0.3)
    }

    /// R35: whoever is missing may know better, and then an operator decides once more.
    fn name(&mut self, record: VolumeRecord) {
        self.operator.set_truth(self.store.record.clone());
        self.restored(record);
        self.operator.calm = true;
        for node in 0..NODES {
            if !self.nodes[node].powered {
                self.power_on(node);
            }
        }
    }

    fn bring_back(&mut self) {
        self.cuts.clear();
        for node in 0..NODES {
            if !self.nodes[node].powered {
                self.power_on(node);
            }
            if node < REPLICAS {
                self.schedule(PAUSE_US / 4, Event::StartProcess { node });
            }
        }
    }
}
