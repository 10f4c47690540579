//! One operation per volume at a time, each carried to its end even if its caller goes away.

use std::collections::HashSet;
use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use tonic::Status;

/// Operations under way at once; a further one is told to try again.
const OPERATIONS_MAX: usize = 1024;

/// The set of names and ids that an operation works on.
#[derive(Clone, Default)]
pub(crate) struct InFlight {
    keys: Arc<Mutex<HashSet<String>>>,
}

/// Ends the operation when dropped.
pub(crate) struct Operation {
    keys: Arc<Mutex<HashSet<String>>>,
    key: String,
}

impl InFlight {
    /// ABORTED while another operation works on `key`: the specification's answer to a duplicate.
    pub(crate) fn begin(&self, key: String) -> Result<Operation, Status> {
        let mut keys = self.keys.lock().unwrap_or_else(PoisonError::into_inner);
        if keys.contains(&key) {
            return Err(Status::aborted(format!("another call for {key} is still under way; repeat later")));
        }
        if keys.len() >= OPERATIONS_MAX {
            return Err(Status::unavailable(format!("{OPERATIONS_MAX} calls are under way; repeat later")));
        }
        keys.insert(key.clone());
        Ok(Operation { keys: Arc::clone(&self.keys), key })
    }
}

impl Drop for Operation {
    fn drop(&mut self) {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.key);
    }
}

/// Runs `work` to its end, also when the caller's deadline passes: a call that is cut off half way would leave the
/// next one to run beside what the first had begun.
pub(crate) async fn detached<T: Send + 'static>(
    work: impl Future<Output = Result<T, Status>> + Send + 'static,
) -> Result<T, Status> {
    match tokio::spawn(work).await {
        Ok(answer) => answer,
        Err(failure) => Err(Status::internal(format!("the call failed inside this process: {failure}"))),
    }
}
