//! The copies of the record that the replicas keep (ADR 0011): each open replica gets the record in force, by Open, by SetEpoch,
//! or by a request of its own where what changed is not the set.
//!
//! *Promised:* a snapshot, its deletion and a growth end only when every member's copy says so, as those who asked for it will
//! count on it even if the record store is lost.

use crate::ids::{RecordVersion, ReplicaId};

use super::calls::CallKind;
use super::peers::Peer;
use super::{Control, Target};

impl Target {
    /// Sends the record to every open replica that was not sent it in its session.
    pub(super) fn pump_record_copies(&mut self) {
        if self.generation.is_none() || self.stopping.is_some() || self.state.is_final() {
            return;
        }
        let Some(read) = &self.record else { return };
        let version = read.version;
        let lacks = |peer: &Peer| peer.session().is_some() && peer.copy_sent < version;
        let due: Vec<ReplicaId> =
            self.peers.iter().filter(|(_, peer)| lacks(peer)).map(|(replica, _)| *replica).collect();
        if due.is_empty() {
            return;
        }
        let record = Box::new(read.clone());
        for replica in due {
            self.record_sent(replica, version);
            self.send_control(replica, CallKind::Keep(version), Control::KeepRecord(record.clone()));
        }
    }

    pub(super) fn record_sent(&mut self, replica: ReplicaId, version: RecordVersion) {
        if let Some(peer) = self.peers.get_mut(&replica) {
            peer.copy_sent = peer.copy_sent.max(version);
        }
    }

    pub(super) fn record_kept(&mut self, replica: ReplicaId, version: RecordVersion) {
        if let Some(peer) = self.peers.get_mut(&replica) {
            peer.copy_kept = peer.copy_kept.max(version);
        }
    }

    /// Whether every member has a copy of the record in force.
    pub(super) fn copies_kept(&self) -> bool {
        let Some(read) = &self.record else { return false };
        let has = |replica: &ReplicaId| {
            self.peers
                .get(replica)
                .is_some_and(|peer| peer.session().is_some() && peer.copy_kept >= read.version)
        };
        !self.guards.copyall || read.record.in_sync.iter().all(has)
    }
}
