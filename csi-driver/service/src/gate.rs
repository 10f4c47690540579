//! Whether calls are taken: not by a controller that waits for its lease.
//!
//! One that waits serves CSI Identity all the same, and says that it is not ready: sidecars wait for that for as long as it
//! takes. For a socket they wait half a minute, then they end, again and again.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tonic::service::Interceptor;
use tonic::{Request, Status};

/// Refuses every call until it is opened, with UNAVAILABLE. Copies are the same gate; it is never closed again, since who loses
/// the lease ends.
#[derive(Debug, Clone, Default)]
pub struct Gate(Arc<AtomicBool>);

impl Gate {
    /// From now on calls are taken.
    pub fn open(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether they are.
    #[must_use]
    pub fn is_open(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

impl Interceptor for Gate {
    fn call(&mut self, request: Request<()>) -> Result<Request<()>, Status> {
        if self.is_open() {
            return Ok(request);
        }
        Err(Status::unavailable("another controller serves; this one waits for the lease"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_call_passes_only_once_the_gate_is_open() {
        let gate = Gate::default();
        let mut copy = gate.clone();
        assert_eq!(copy.call(Request::new(())).unwrap_err().code(), tonic::Code::Unavailable);

        gate.open();

        assert!(copy.call(Request::new(())).is_ok());
    }
}
