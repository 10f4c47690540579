//! The thread that merges layers, and how fast it goes.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use holdfast_storage_core::ids::ReplicaId;

use crate::data::DataPath;
use crate::merge::{Merger, Step, mergeable};
use crate::stack_files::StackFiles;

/// Rate of a merge unless it is set: enough for 5 TB a day, and a fraction of what a disk for replicas does.
const RATE_BYTES_PER_S: u64 = 64 << 20;

/// A replica's merges on a thread of their own, which runs while there is work.
pub struct MergeThread {
    pace: Arc<Pace>,
    thread: Option<JoinHandle<()>>,
}

/// How fast merges go, and the way to end them.
#[derive(Debug)]
pub struct Pace {
    bytes_per_s: AtomicU64,
    stop: Mutex<bool>,
    stopped: Condvar,
}

impl Default for Pace {
    fn default() -> Self {
        Self {
            bytes_per_s: AtomicU64::new(RATE_BYTES_PER_S),
            stop: Mutex::new(false),
            stopped: Condvar::new(),
        }
    }
}

impl Pace {
    /// Sets the rate; 0 lets merges rest.
    pub fn set_rate(&self, bytes_per_s: u64) {
        self.bytes_per_s.store(bytes_per_s, Ordering::Relaxed);
    }

    /// Waits as long as `bytes` take. False if it was stopped.
    fn wait_for(&self, bytes: u64) -> bool {
        const REST: Duration = Duration::from_secs(1);
        loop {
            let rate = self.bytes_per_s.load(Ordering::Relaxed);
            let pause = match bytes.saturating_mul(1000).checked_div(rate) {
                Some(pause_ms) => Duration::from_millis(pause_ms),
                None => REST,
            };
            let stop = self.stop.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = self.stopped.wait_timeout_while(stop, pause, |stop| !*stop);
            let (stop, _) = waited.unwrap_or_else(PoisonError::into_inner);
            if *stop {
                return false;
            }
            if rate > 0 {
                return true;
            }
        }
    }

    fn stop(&self) {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = true;
        self.stopped.notify_all();
    }
}

impl MergeThread {
    /// Nothing runs yet.
    pub fn new(pace: Arc<Pace>) -> Self {
        Self { pace, thread: None }
    }

    /// Runs what there is to merge, unless that is under way.
    pub fn wake(&mut self, stack: &Arc<Mutex<StackFiles>>, data: &Arc<DataPath>) {
        if self.thread.as_ref().is_some_and(|thread| !thread.is_finished()) || !has_work(stack) {
            return;
        }
        let replica = data.replica();
        let merger = Merger::new(Arc::clone(stack), Arc::clone(data));
        let pace = Arc::clone(&self.pace);
        let name = format!("hf-mrg-{:.6}", replica.to_string());
        match std::thread::Builder::new().name(name).spawn(move || run(replica, merger, &pace)) {
            Ok(thread) => self.thread = Some(thread),
            Err(error) => tracing::warn!(%replica, %error, "no thread for a merge; it is tried again later"),
        }
    }

    /// Ends it after the step it is in.
    pub fn stop(&mut self) {
        self.pace.stop();
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("a merge thread panicked");
        }
    }
}

fn has_work(stack: &Arc<Mutex<StackFiles>>) -> bool {
    let files: MutexGuard<'_, StackFiles> = stack.lock().unwrap_or_else(PoisonError::into_inner);
    // A file that cannot be examined now is looked at again the next time.
    matches!(mergeable(&files), Ok(Some(_)))
}

fn run(replica: ReplicaId, mut merger: Merger, pace: &Pace) {
    loop {
        match merger.step() {
            Ok(Step::Moved(bytes)) => {
                if !pace.wait_for(bytes) {
                    return;
                }
            }
            Ok(Step::Done) => {
                tracing::info!(%replica, "layers are merged");
                return;
            }
            Ok(Step::Later) => return,
            Err(error) => {
                tracing::warn!(%replica, %error, "a merge failed; it is tried again later");
                return;
            }
        }
    }
}
