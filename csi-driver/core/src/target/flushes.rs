//! Flushes of the ack set: for clients (R15), before the log is cleared (R18), after reconciling (R20), before a join
//! (R24).

use crate::ids::ReplicaId;
use crate::replica::DataOp;

use super::answers::set_answer;
use super::peers::IoOwner;
use super::tasks::Answer;
use super::{IoError, Payload, RequestId, Target};

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum FlushFor {
    Client(RequestId),
    Clear,
    /// Of this round.
    Reconcile(u64),
    /// Of this catch-up.
    Join(u64),
    /// Ahead of this cut.
    Cut(u64),
    /// Of the replica that rebuilds a layer in this catch-up, alone.
    Layer(u64),
}

#[derive(Debug)]
pub(super) struct Flush {
    why: FlushFor,
    /// Empty until sent.
    answers: Vec<(ReplicaId, Answer)>,
    sent: bool,
}

impl Target {
    pub(super) fn start_flush(&mut self, why: FlushFor) {
        let id = self.new_id();
        self.flushes.insert(id, Flush { why, answers: Vec::new(), sent: false });
        self.send_flush(id);
    }

    fn send_flush(&mut self, id: u64) {
        if !self.gates.read {
            return;
        }
        let Some(why) = self.flushes.get(&id).map(|flush| flush.why) else { return };
        let round = self.clear_round.as_ref().filter(|_| why == FlushFor::Clear);
        let replicas: Vec<ReplicaId> = match (round, why) {
            (Some(round), _) => round.replicas().to_vec(),
            (None, FlushFor::Layer(_)) => self.catching_up().into_iter().collect(),
            (None, _) => self.ack_set.iter().copied().collect(),
        };
        let mut answers = Vec::with_capacity(replicas.len());
        for replica in replicas {
            let sent = self.send_io(replica, IoOwner::Flush(id), DataOp::Flush, Payload::None);
            answers.push((replica, if sent.is_some() { Answer::Pending } else { Answer::Missing }));
        }
        if let Some(flush) = self.flushes.get_mut(&id) {
            flush.answers = answers;
            flush.sent = true;
        }
    }

    pub(super) fn flush_io_done(&mut self, id: u64, replica: ReplicaId, result: Result<(), IoError>) {
        let Some(flush) = self.flushes.get_mut(&id) else { return };
        match result {
            Ok(()) => {
                set_answer(&mut flush.answers, replica, Answer::Done);
                self.check_flush(id);
            }
            Err(_) => {
                // Its cache is lost or about to be told lost (R19); reopening will say.
                set_answer(&mut flush.answers, replica, Answer::Missing);
                self.expel(replica);
            }
        }
    }

    /// R15: only an unbroken session's answer counts, or a resumed one's new answer.
    pub(super) fn flush_io_lost(&mut self, id: u64, replica: ReplicaId) {
        if let Some(flush) = self.flushes.get_mut(&id) {
            set_answer(&mut flush.answers, replica, Answer::Missing);
        }
    }

    pub(super) fn resend_flushes(&mut self, replica: ReplicaId) {
        let missing: Vec<u64> = self
            .flushes
            .iter()
            .filter(|(_, flush)| flush.answers.contains(&(replica, Answer::Missing)))
            .map(|(id, _)| *id)
            .collect();
        for id in missing {
            self.send_io(replica, IoOwner::Flush(id), DataOp::Flush, Payload::None);
            if let Some(flush) = self.flushes.get_mut(&id) {
                set_answer(&mut flush.answers, replica, Answer::Pending);
            }
        }
    }

    pub(super) fn forget_flush_answers(&mut self, replica: ReplicaId) {
        for flush in self.flushes.values_mut() {
            flush.answers.retain(|(r, _)| *r != replica);
        }
    }

    pub(super) fn recheck_flushes(&mut self) {
        let all: Vec<u64> = self.flushes.keys().copied().collect();
        for id in all {
            if self.flushes.get(&id).is_some_and(|flush| !flush.sent) {
                self.send_flush(id);
            }
            self.check_flush(id);
        }
    }

    fn check_flush(&mut self, id: u64) {
        let Some(flush) = self.flushes.get(&id) else { return };
        let rebuilding = matches!(flush.why, FlushFor::Layer(_)).then(|| self.catching_up()).flatten();
        let counts = |r: &ReplicaId| {
            self.ack_set.contains(r) || self.receiving().any(|x| x == *r) || rebuilding == Some(*r)
        };
        let done = flush.sent && flush.answers.iter().all(|(r, a)| *a == Answer::Done || !counts(r));
        let told = self.gates.enough || !matches!(flush.why, FlushFor::Client(_));
        if !done || !self.gates.acknowledge || !told {
            return;
        }
        let why = flush.why;
        self.flushes.remove(&id);
        match why {
            FlushFor::Client(request) => self.complete(request, Ok(())),
            FlushFor::Clear => self.clear_flushed(),
            FlushFor::Reconcile(round) => self.reconcile_flushed(round),
            FlushFor::Join(number) => self.join_flushed(number),
            FlushFor::Cut(number) => self.cut_flushed(number),
            FlushFor::Layer(number) => self.layer_flushed(number),
        }
        self.dirty |= self.stopping.is_some();
    }
}
