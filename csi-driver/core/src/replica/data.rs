//! Reads and writes of a session.

use std::collections::BTreeSet;

use crate::dirty_map::Dirty;
use crate::ids::{Region, SessionToken};
use crate::timers::REPLICA_LOG_REGIONS_MAX;

use super::{DataOp, DiskError, DiskOp, DiskWait, Replica, ReplicaCall, ReplicaReply, RequestRefusal};

/// A write whose regions are not all in the durable log yet.
#[derive(Debug)]
pub(super) struct WaitingWrite {
    pub call: ReplicaCall,
    pub token: SessionToken,
    pub op: DataOp,
}

impl Replica {
    pub(super) fn on_data(&mut self, call: ReplicaCall, token: SessionToken, op: DataOp) {
        if !self.accepts(token) {
            return self.refuse(call, RequestRefusal::NoSession);
        }
        if op.range().is_some_and(|range| range.end() > self.blocks()) {
            return self.refuse(call, RequestRefusal::Invalid);
        }
        if !op.is_write() {
            return self.dispatch(call, token, op);
        }
        self.set_map_bits(op);
        if self.is_logged(op) {
            return self.dispatch(call, token, op);
        }
        self.log_then_write(call, token, op);
    }

    /// R18: the log bit is durable before any change of the region.
    fn log_then_write(&mut self, call: ReplicaCall, token: SessionToken, op: DataOp) {
        let regions = op.range().into_iter().flat_map(|range| range.regions());
        let missing: BTreeSet<Region> = regions.filter(|region| !self.log.contains(region)).collect();
        let new = missing.difference(&self.adding).filter(|region| !self.to_add.contains(region)).count();
        if self.log.len() + self.adding.len() + self.to_add.len() + new > REPLICA_LOG_REGIONS_MAX {
            // The target keeps its own count below the limit; one that does not is not to be served.
            return self.refuse(call, RequestRefusal::Invalid);
        }
        self.to_add.extend(missing.difference(&self.adding));
        self.waiting.push_back(WaitingWrite { call, token, op });
        self.pump_log();
    }

    /// Starts the next LogAdd; those that come while one is under way share the one after.
    fn pump_log(&mut self) {
        if self.adding.is_empty() && !self.to_add.is_empty() {
            self.adding = std::mem::take(&mut self.to_add);
            let regions = self.adding.iter().copied().collect();
            self.emit_disk(DiskOp::LogAdd(regions), DiskWait::LogAdd);
        }
    }

    pub(super) fn on_log_added(&mut self) {
        self.log.append(&mut self.adding);
        for write in std::mem::take(&mut self.waiting) {
            if self.is_logged(write.op) {
                self.dispatch(write.call, write.token, write.op);
            } else {
                self.waiting.push_back(write);
            }
        }
        self.pump_log();
    }

    fn is_logged(&self, op: DataOp) -> bool {
        op.range().is_none_or(|range| range.regions().all(|region| self.log.contains(&region)))
    }

    /// R22: everything put on this replica is remembered for those that are absent.
    fn set_map_bits(&mut self, op: DataOp) {
        let Some(range) = op.range() else { return };
        for (absent, map) in &mut self.maps {
            if let Dirty::Blocks(blocks) = &mut map.dirty
                && blocks.insert(range)
            {
                self.map_unsaved.entry(*absent).or_default().extend(range.regions());
            }
        }
    }

    fn dispatch(&mut self, call: ReplicaCall, token: SessionToken, op: DataOp) {
        if let Some(session) = self.session.as_mut().filter(|s| s.token == token) {
            session.io += 1;
        }
        if op.is_write() {
            for region in op.range().into_iter().flat_map(|range| range.regions()) {
                *self.writing.entry(region).or_default() += 1;
            }
        }
        self.emit_disk(DiskOp::Data { call, op }, DiskWait::Data { call, token, op });
    }

    pub(super) fn on_data_done(
        &mut self,
        call: ReplicaCall,
        token: SessionToken,
        op: DataOp,
        result: Result<(), DiskError>,
    ) {
        if op.is_write() {
            for region in op.range().into_iter().flat_map(|range| range.regions()) {
                if let Some(count) = self.writing.get_mut(&region) {
                    *count -= 1;
                    if *count == 0 {
                        self.writing.remove(&region);
                    }
                }
            }
        }
        let live = self.session.as_mut().filter(|s| s.token == token).map(|session| {
            session.io -= 1;
            !session.closing
        });
        match result {
            Err(DiskError::Device) if op.is_write() || op == DataOp::Flush => {
                self.poison(Some(call), DiskError::Device);
            }
            result if live == Some(true) => {
                self.reply(call, ReplicaReply::Done(result.map_err(RequestRefusal::Disk)));
            }
            _ => {}
        }
        self.freeze_when_quiet();
    }

    /// A session that is over: what has not reached the disk never will.
    pub(super) fn drop_waiting(&mut self, token: SessionToken) {
        self.waiting.retain(|write| write.token != token);
    }
}
