//! Jobs: work on the volume beside its I/O, one at a time.
//!
//! A job looks at the record in force and at what the replicas answered, and does the next thing that is missing; so it
//! does not matter which of its steps an unanswered swap, a lost session or an earlier try did already.

use std::collections::VecDeque;

use crate::ids::{ReplicaId, SnapshotId};
use crate::record::VolumeRecord;
use crate::replica::DiskError;
use crate::timers;
use crate::transitions::TransitionError;

use super::cut::Cut;
use super::delete::Delete;
use super::grow::Grow;
use super::remove::Remove;
use super::{Job, JobError, JobId, Target, TargetAction, TargetState};

#[derive(Debug, Default)]
pub(super) struct Jobs {
    /// At most [`timers::JOBS_MAX`].
    queue: VecDeque<(JobId, Job)>,
    pub current: Option<Current>,
}

#[derive(Debug)]
pub(super) enum Current {
    Cut(Cut),
    Delete(Delete),
    Grow(Grow),
    Remove(Remove),
    Reload(Reload),
}

/// The record is read anew: what others changed in it, limits and wanted replicas among them, is in force after it.
#[derive(Debug)]
pub(super) struct Reload {
    job: JobId,
    /// The next answered read was sent after the job came.
    asked: bool,
}

impl Jobs {
    pub(super) fn is_empty(&self) -> bool {
        self.current.is_none() && self.queue.is_empty()
    }
}

impl Target {
    pub(super) fn on_job(&mut self, job: JobId, what: Job) {
        if self.stopping.is_some() {
            return self.end_job(job, Err(JobError::Ended));
        }
        match what {
            Job::Cut { snapshot } => self.cut_held(job, snapshot),
            Job::Release { snapshot } => {
                self.drop_queued_hold(snapshot);
                self.release_hold(job, snapshot);
            }
            _ if self.jobs.queue.len() >= timers::JOBS_MAX => self.end_job(job, Err(JobError::Busy)),
            Job::CreateSnapshot { .. }
            | Job::DeleteSnapshot { .. }
            | Job::Grow { .. }
            | Job::Hold { .. }
            | Job::RemoveReplica { .. }
            | Job::Reload => {
                self.jobs.queue.push_back((job, what));
                self.dirty = true;
            }
        }
    }

    /// A hold that is given up before its turn would keep writes waiting for nobody.
    fn drop_queued_hold(&mut self, released: SnapshotId) {
        let is_it = |what: &Job| matches!(what, Job::Hold { snapshot, .. } if *snapshot == released);
        let (given_up, left) =
            std::mem::take(&mut self.jobs.queue).into_iter().partition(|(_, what)| is_it(what));
        self.jobs.queue = left;
        let given_up: VecDeque<(JobId, Job)> = given_up;
        for (job, _) in given_up {
            self.end_job(job, Err(JobError::HoldOver));
        }
    }

    pub(super) fn pump_jobs(&mut self) {
        if self.state != TargetState::Serving || self.stopping.is_some() {
            return;
        }
        if self.jobs.current.is_none()
            && let Some((job, what)) = self.jobs.queue.pop_front()
        {
            self.start_job(job, what);
        }
        match &self.jobs.current {
            None => {}
            Some(Current::Cut(_)) => self.pump_cut(),
            Some(Current::Delete(_)) => self.pump_delete(),
            Some(Current::Grow(_)) => self.pump_grow(),
            Some(Current::Remove(_)) => self.pump_remove(),
            Some(Current::Reload(_)) => self.pump_reload(),
        }
    }

    fn start_job(&mut self, job: JobId, what: Job) {
        let current = match what {
            Job::CreateSnapshot { snapshot } => Current::Cut(Cut::alone(job, snapshot)),
            Job::Hold { snapshot, hold_ms } => Current::Cut(Cut::of_group(job, snapshot, hold_ms)),
            Job::DeleteSnapshot { snapshot } => Current::Delete(Delete::new(job, snapshot)),
            Job::Grow { size_bytes } => Current::Grow(Grow::new(job, size_bytes)),
            Job::RemoveReplica { replica } => Current::Remove(Remove::new(job, replica)),
            Job::Reload => Current::Reload(Reload { job, asked: false }),
            // Never queued.
            Job::Cut { .. } | Job::Release { .. } => return,
        };
        self.jobs.current = Some(current);
        self.dirty = true;
    }

    fn pump_reload(&mut self) {
        // A read that is under way may have been answered before the change that this is about.
        let idle = self.store_is_idle();
        let Some(Current::Reload(reload)) = &mut self.jobs.current else { return };
        if idle && !reload.asked {
            reload.asked = true;
            self.read_again_first();
        }
    }

    /// A read of the record was answered, and this target is still the volume's.
    pub(super) fn job_record_read(&mut self) {
        if matches!(&self.jobs.current, Some(Current::Reload(reload)) if reload.asked) {
            self.finish_job(Ok(()));
        }
    }

    /// The change of the record that the current job wants next, beside that of the set.
    pub(super) fn job_swap(&self) -> Option<Result<VolumeRecord, TransitionError>> {
        let record = self.volume()?;
        let owner = self.config.target_id;
        match self.jobs.current.as_ref()? {
            Current::Cut(cut) => cut.swap(record, owner),
            Current::Delete(delete) => delete.swap(record, owner),
            Current::Grow(grow) => grow.swap(record, owner, &self.members()),
            Current::Remove(_) | Current::Reload(_) => None,
        }
    }

    /// The record does not allow the current job.
    pub(super) fn job_refused(&mut self, error: TransitionError) {
        match &self.jobs.current {
            Some(Current::Cut(_)) => self.cut_refused(error),
            Some(Current::Delete(_) | Current::Grow(_) | Current::Remove(_)) => {
                self.finish_job(Err(error.into()));
            }
            Some(Current::Reload(_)) | None => {}
        }
    }

    /// A member could not do what the current job asked.
    pub(super) fn job_call_refused(&mut self, replica: ReplicaId, error: DiskError) {
        match &self.jobs.current {
            Some(Current::Cut(_)) => self.freeze_refused(replica, error),
            Some(Current::Grow(_)) => self.finish_job(Err(JobError::Replica { replica, error })),
            Some(Current::Delete(_) | Current::Remove(_) | Current::Reload(_)) | None => {}
        }
        self.dirty = true;
    }

    /// A session is over: what its replica did for the current job does not count any more.
    pub(super) fn job_session_lost(&mut self, replica: ReplicaId) {
        match &mut self.jobs.current {
            Some(Current::Cut(cut)) => cut.session_lost(replica),
            Some(Current::Grow(grow)) => grow.session_lost(replica),
            Some(Current::Delete(delete)) => delete.session_lost(replica),
            Some(Current::Remove(_) | Current::Reload(_)) | None => {}
        }
    }

    /// Ends the current job.
    pub(super) fn finish_job(&mut self, result: Result<(), JobError>) {
        let job = match self.jobs.current.take() {
            Some(Current::Cut(cut)) => cut.job,
            Some(Current::Delete(delete)) => Some(delete.job),
            Some(Current::Grow(grow)) => Some(grow.job),
            Some(Current::Remove(remove)) => Some(remove.job),
            Some(Current::Reload(reload)) => Some(reload.job),
            None => None,
        };
        self.dirty = true;
        if let Some(job) = job {
            self.end_job(job, result);
        }
    }

    pub(super) fn end_job(&mut self, job: JobId, result: Result<(), JobError>) {
        self.emit(TargetAction::JobDone { job, result });
    }

    /// This target ends. Layers of an uncommitted cut are merged back by the next Open.
    pub(super) fn end_jobs(&mut self) {
        self.finish_job(Err(JobError::Ended));
        for (job, _) in std::mem::take(&mut self.jobs.queue) {
            self.end_job(job, Err(JobError::Ended));
        }
    }
}
