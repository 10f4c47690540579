//! The record store, simulated: one record under compare-and-swap, that forgets to answer, answers late, or gives an older
//! version.

use holdfast_storage_core::ids::RecordVersion;
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::{StoreError, Versioned};
use holdfast_storage_core::target::{CallId, TargetEvent};
use rand::Rng;

use crate::coverage::Scenario;
use crate::target_host::ToTarget;
use crate::world::{Event, STORE, TargetNumber, World};

#[derive(Debug)]
pub struct Store {
    pub version: RecordVersion,
    pub record: VolumeRecord,
    pub down_until: u64,
    pub down_since: u64,
    /// Chance that an answer is lost, with the change made, not made, or made late.
    pub flaky: f64,
    /// Chance that a read gives an older version.
    pub stale: f64,
    /// The version before the last change.
    pub before: Option<Versioned>,
    /// The version that an unrelated writer made last.
    pub unrelated: RecordVersion,
}

impl World {
    pub fn store_up(&mut self) {
        let was = self.store.down_until.saturating_sub(self.store.down_since);
        if self.store.down_until == self.now && was >= 10 * crate::chaos::MINUTE_US {
            self.saw(Scenario::StoreDownTenMinutes);
        }
    }

    pub fn send_to_store(
        &mut self,
        target: TargetNumber,
        node: usize,
        call: CallId,
        swap: Option<(RecordVersion, Box<VolumeRecord>)>,
    ) {
        match self.message_delay(node, STORE) {
            Some(delay) => self.schedule(delay, Event::AtStore { target, call, swap, answer: true }),
            None => self.store_is_silent(target, call, swap.is_some()),
        }
    }

    /// The caller gives up waiting.
    fn store_is_silent(&mut self, target: TargetNumber, call: CallId, swap: bool) {
        let result = StoreError::Unknown("timed out".to_owned());
        let event = if swap {
            TargetEvent::SwapAnswered { call, result: Err(result) }
        } else {
            TargetEvent::RecordRead { call, result: Err(result) }
        };
        let delay = self.rng.random_range(50_000..800_000);
        self.schedule(delay, Event::AtTarget { target, message: ToTarget::event(event) });
    }

    pub fn at_store(
        &mut self,
        target: TargetNumber,
        call: CallId,
        swap: Option<(RecordVersion, Box<VolumeRecord>)>,
        answer: bool,
    ) {
        if swap.is_some() && !answer && swap.as_ref().is_some_and(|(v, _)| *v == self.store.version) {
            self.saw(Scenario::StoreAppliedLate);
        }
        let down = self.store.down_until > self.now;
        let lost = answer && self.rng.random_bool(self.store.flaky);
        let is_swap = swap.is_some();
        if down || (lost && self.rng.random_bool(0.6)) {
            // Not applied, or applied late.
            if is_swap && self.rng.random_bool(0.3) {
                let delay = self.rng.random_range(1_000..3_000_000);
                self.schedule(delay, Event::AtStore { target, call, swap, answer: false });
            }
            if answer {
                if is_swap {
                    self.saw(Scenario::StoreAnswerLostNotApplied);
                }
                self.store_is_silent(target, call, is_swap);
            }
            return;
        }
        let event = match swap {
            None => TargetEvent::RecordRead { call, result: Ok(self.read_record()) },
            Some((expected, record)) => {
                let unrelated = self.store.unrelated.0 == expected.0 + 1;
                let result = self.swap_record(expected, *record);
                if unrelated && result.is_err() {
                    self.saw(Scenario::StoreUnrelatedWriter);
                }
                TargetEvent::SwapAnswered { call, result }
            }
        };
        if lost {
            if is_swap {
                self.saw(Scenario::StoreAnswerLostApplied);
            }
            self.store_is_silent(target, call, is_swap);
        } else if answer {
            let Some(node) = self.targets.get(&target).map(|host| host.node) else { return };
            match self.message_delay(STORE, node) {
                Some(delay) => {
                    self.schedule(delay, Event::AtTarget { target, message: ToTarget::event(event) });
                }
                None => self.store_is_silent(target, call, is_swap),
            }
        }
    }

    /// The newest record, or by chance the one before.
    fn read_record(&mut self) -> Versioned {
        if let Some(before) = self.store.before.clone()
            && self.rng.random_bool(self.store.stale)
        {
            self.saw(Scenario::StoreStaleRead);
            return before;
        }
        Versioned { version: self.store.version, record: self.store.record.clone() }
    }

    pub fn swap_record(
        &mut self,
        expected: RecordVersion,
        record: VolumeRecord,
    ) -> Result<RecordVersion, StoreError> {
        if expected != self.store.version {
            return Err(StoreError::Conflict(record.volume_id));
        }
        // As every store does: a version that was counted twice is no way in.
        if record.generation < self.store.record.generation {
            return Err(StoreError::Refused("generations never go back".to_owned()));
        }
        if record.in_sync.is_empty() {
            self.history.violations.push("P6: the in-sync set was emptied".to_owned());
        }
        self.log(|| {
            format!(
                "record: gen {} epoch {} set {:?} snapshots {:?}",
                record.generation,
                record.epoch.number,
                record.in_sync,
                record.snapshots.iter().map(|s| (s.id.0, s.state, s.holders.len())).collect::<Vec<_>>()
            )
        });
        let before_version = self.store.version;
        self.store.version = self.store.version.next();
        let before = std::mem::replace(&mut self.store.record, record);
        self.check_record(&before);
        self.check_removals(&before);
        let before = Versioned { version: before_version, record: before };
        self.keep_record(&before);
        self.store.before = Some(before);
        self.note_set();
        Ok(self.store.version)
    }
}
