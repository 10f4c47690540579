//! Whether the record still is what the replicas know (R35), and whether a member that comes back still is one (R26).
//!
//! *Promised:* once a replica refused the record as one of another history, no target serves under it, however many of the
//! replicas that know better are gone by then: the record says so itself. It ends when every replica that was not given up
//! lets a target in, or when an operator promotes one.
//!
//! *Promised:* a member that an operator gave up is neither read nor written after another was promoted, even by a target
//! that never heard of it. Nobody is given up sooner than `GIVEN_UP_AFTER_MS` after it was gone and the volume unpublished; a
//! target that for so long neither heard of a member nor read that the volume is still its own reads the record, by a call
//! sent after the member is back, before it goes on.

use crate::ids::ReplicaId;
use crate::record::VolumeRecord;
use crate::replica::OpenRefusal;
use crate::timers;
use crate::transitions::{self, TransitionError};

use super::{CallId, Target, TargetState};

#[derive(Debug, Default)]
pub(super) struct History {
    /// Who refused the record. Nothing is served any more; the record is to say so before this target ends.
    other: Option<String>,
    /// Nothing is served before a call to the store with a higher number said that the volume is still ours.
    unsure_since: Option<u64>,
    /// When the call to the store was sent that told last that the volume is published to us.
    confirmed_ms: Option<u64>,
}

impl History {
    /// Whether it may be served under the record.
    pub(super) fn is_sound(&self) -> bool {
        self.other.is_none() && self.unsure_since.is_none()
    }

    /// A call was answered: the volume is still ours, and, where it was `published` to us, was so after that time. Tells
    /// whether another must be.
    pub(super) fn confirmed(&mut self, call: CallId, published_ms: Option<u64>) -> bool {
        self.confirmed_ms = published_ms.or(self.confirmed_ms);
        self.unsure_since = self.unsure_since.filter(|since| call.0 <= *since);
        self.unsure_since.is_some()
    }

    /// For how long nothing was heard is not known (R4).
    pub(super) fn forget(&mut self) {
        self.confirmed_ms = None;
    }
}

impl Target {
    /// R35: a replica knows another history than the record.
    pub(super) fn on_other_history(&mut self, replica: ReplicaId, refusal: OpenRefusal) {
        self.history.other.get_or_insert_with(|| format!("replica {replica}: {refusal}"));
        self.lose(replica);
    }

    /// R35: all replicas must answer before anything is decided.
    pub(super) fn awaits_all(&self) -> bool {
        self.guards.allanswer && self.volume().is_some_and(|record| record.restored)
    }

    /// What the record is to say of its own history.
    pub(super) fn history_swap(&mut self) -> Option<Result<VolumeRecord, TransitionError>> {
        let owner = self.config.target_id;
        let record = self.volume()?;
        if let Some(reason) = self.history.other.clone() {
            if record.restored {
                self.fail(reason);
                return None;
            }
            return Some(transitions::suspect(record, owner));
        }
        let all = self.peers.keys().all(|replica| self.is_open(*replica));
        (self.awaits_all() && self.state == TargetState::Opening && all)
            .then(|| transitions::trust(record, owner))
    }

    /// The record says of its history what it was to say.
    pub(super) fn history_told(&mut self) {
        if let Some(reason) = self.history.other.clone() {
            return self.fail(reason);
        }
        // All were asked; from here on only members are, and others in their turn.
        let others: Vec<ReplicaId> =
            self.peers.keys().filter(|replica| !self.is_member(**replica)).copied().collect();
        for replica in others {
            self.close_link(replica);
        }
    }

    /// R26: a member is back. Nothing was heard of it, nor of the record, for so long that it may have been given up: the
    /// record is read first.
    pub(super) fn check_given_up(&mut self, replica: ReplicaId) {
        let heard_ms = self.peers.get(&replica).and_then(|peer| peer.heard_ms);
        let since_ms = heard_ms.max(self.history.confirmed_ms);
        let recent = since_ms.is_some_and(|since| self.now_ms < since + timers::GIVEN_UP_AFTER_MS);
        if self.guards.awayread && self.is_member(replica) && !recent {
            self.history.unsure_since = Some(self.new_id());
            self.read_again_first();
        }
    }
}
