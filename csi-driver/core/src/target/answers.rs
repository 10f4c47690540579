//! What the replicas answered to a write: when it is acknowledged, what becomes of one that failed somewhere, and what is
//! sent again (R8, R13, R14, R16).

use crate::ids::ReplicaId;

use super::copies::CopyFor;
use super::peers::IoOwner;
use super::tasks::{Answer, Stage, Work};
use super::{IoError, RequestError, RequestId, Target, TargetAction};

impl Target {
    /// Acknowledges and unlocks a write as far as its answers allow (R8, R13, R14).
    pub(super) fn check_write(&mut self, id: u64) {
        let Some(task) = self.tasks.get(&id) else { return };
        if task.stage != Stage::Write {
            return;
        }
        let rebuilding = match task.work {
            Work::Copy { why: CopyFor::Layer { replica, .. }, .. } => Some(replica),
            _ => None,
        };
        let counts = |r: &ReplicaId| {
            self.ack_set.contains(r) || self.receiving().any(|x| x == *r) || rebuilding == Some(*r)
        };
        let pending = task.answers.iter().any(|(r, a)| *a == Answer::Pending && counts(r));
        let failed = task.answers.iter().any(|(r, a)| matches!(a, Answer::Failed(_)) && counts(r));
        if failed && !pending {
            return self.handle_failed_write(id);
        }
        let holds = |r: &ReplicaId, a: &Answer| *a == Answer::Done || !counts(r);
        let everywhere = task.answers.iter().all(|(r, a)| holds(r, a));
        if let Work::Copy { .. } = task.work {
            if everywhere {
                self.copy_was_written(id);
            }
            return;
        }
        let acked = if self.guards.epochack {
            task.answers.iter().all(|(r, a)| *a == Answer::Done || !self.ack_set.contains(r))
        } else {
            task.answers.iter().any(|(_, a)| *a == Answer::Done)
        };
        if acked && !task.answered && self.gates.acknowledge {
            let (request, error) = (task.request(), task.error);
            if let Some(task) = self.tasks.get_mut(&id) {
                task.answered = true;
            }
            if let Some(request) = request {
                self.tell_client(request, error.map_or(Ok(()), Err));
            }
        }
        let answered = self.tasks.get(&id).is_some_and(|task| task.answered);
        if everywhere && answered {
            self.drop_task(id);
        }
    }

    /// R16: those that failed leave the set if another has the write; if all failed, one stays as it is, the others
    /// leave, and the client is told.
    fn handle_failed_write(&mut self, id: u64) {
        let errwrite = self.guards.errwrite;
        let deciding = self.deciding();
        let Some(task) = self.tasks.get_mut(&id) else { return };
        if let Work::Copy { copy, why: CopyFor::Repair, .. } = task.work {
            // What was corrupt stays so.
            let range = task.range;
            self.drop_task(id);
            self.emit(TargetAction::CopyDone { copy });
            return self.repaired(id, range, &[]);
        }
        if !errwrite {
            task.error = Some(RequestError::Failed);
            for (_, answer) in task.answers.iter_mut().filter(|(_, a)| matches!(a, Answer::Failed(_))) {
                *answer = Answer::Done;
            }
            self.dirty = true;
            return;
        }
        // Who is joining or leaving has no say: only a replica that is a member whatever becomes of the pending swap
        // can make the write count, or the failure.
        let say: Vec<(ReplicaId, Answer)> =
            task.answers.iter().filter(|(r, _)| deciding.contains(r)).copied().collect();
        // What is copied is on its source.
        let copied = matches!(task.work, Work::Copy { .. });
        let done = copied || say.iter().any(|(_, a)| *a == Answer::Done);
        let missing = say.iter().any(|(_, a)| *a == Answer::Missing);
        // While a member is missing nothing may be decided; to look again at once would find the same.
        let decided = !done && !missing && !say.is_empty();
        if decided {
            let full = say.iter().all(|(_, a)| *a == Answer::Failed(IoError::NoSpace));
            task.error = Some(if full { RequestError::NoSpace } else { RequestError::Failed });
            set_answer(&mut task.answers, say[0].0, Answer::Done);
        }
        let keeper = (!done && !missing).then(|| say.first().map(|(r, _)| *r)).flatten();
        let leaving: Vec<ReplicaId> = task
            .answers
            .iter()
            .filter(|(r, a)| match a {
                Answer::Failed(_) if done || keeper.is_some() => true,
                // Some member is missing: it is resent to or leaves first. Who has no say leaves now.
                Answer::Failed(_) => !deciding.contains(r),
                // All failed: who did it although differs from the one that stays as it is.
                Answer::Done | Answer::Pending | Answer::Missing => keeper.is_some() && Some(*r) != keeper,
            })
            .map(|(r, _)| *r)
            .collect();
        for replica in leaving {
            if let Some(task) = self.tasks.get_mut(&id) {
                set_answer(&mut task.answers, replica, Answer::Missing);
            }
            self.expel(replica);
        }
        self.dirty |= decided;
    }

    /// Sends again what a resumed member had not answered (R14).
    pub(super) fn resend(&mut self, replica: ReplicaId) {
        let missing: Vec<u64> = self
            .tasks
            .iter()
            .filter(|(_, t)| t.stage == Stage::Write && t.answers.contains(&(replica, Answer::Missing)))
            .map(|(id, _)| *id)
            .collect();
        for id in missing {
            let Some(task) = self.tasks.get(&id) else { continue };
            let (op, payload) = task.write_op();
            self.send_io(replica, IoOwner::Task(id), op, payload);
            if let Some(task) = self.tasks.get_mut(&id) {
                set_answer(&mut task.answers, replica, Answer::Pending);
            }
        }
        self.resend_flushes(replica);
    }

    /// A replica starts anew as one that catches up: what it had not answered in an earlier session concerns nobody.
    pub(super) fn forget_answers(&mut self, replica: ReplicaId) {
        for task in self.tasks.values_mut().filter(|t| t.stage == Stage::Write) {
            task.answers.retain(|(r, _)| *r != replica);
        }
        self.forget_flush_answers(replica);
    }

    /// A client's write is done: it is told once there are enough members, which all have the write then: one that joins
    /// has whatever a member has (R24).
    fn tell_client(&mut self, request: RequestId, result: Result<(), RequestError>) {
        if self.gates.enough {
            self.next_part(request, result);
        } else {
            self.untold.push((request, result));
        }
    }

    /// After each change of the configuration.
    pub(super) fn recheck_acknowledgements(&mut self) {
        if self.gates.acknowledge && self.gates.enough {
            for (request, result) in std::mem::take(&mut self.untold) {
                self.next_part(request, result);
            }
        }
        let writing: Vec<u64> =
            self.tasks.iter().filter(|(_, t)| t.stage == Stage::Write).map(|(id, _)| *id).collect();
        for id in writing {
            self.check_write(id);
        }
        self.recheck_flushes();
        self.release_reads();
    }
}

pub(super) fn set_answer(answers: &mut [(ReplicaId, Answer)], replica: ReplicaId, answer: Answer) {
    if let Some(entry) = answers.iter_mut().find(|(r, _)| *r == replica) {
        entry.1 = answer;
    }
}
