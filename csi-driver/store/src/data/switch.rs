//! Changes of the stack in memory, and the gate that holds writes back meanwhile.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};

use holdfast_storage_core::ids::{BLOCK_BYTES, SnapshotId};

use super::space::Backed;
use super::{DataPath, Layer};
use crate::error::StoreError;

/// The closed gate; dropping it opens it.
pub struct Gate {
    path: Arc<DataPath>,
}

impl DataPath {
    /// Holds new changes back and waits, blocking, until those begun have ended. Requests that read or flush go on. One
    /// gate at a time: the caller holds the lock of the stack's files.
    pub fn close_gate(self: &Arc<Self>) -> Gate {
        let mut state = self.lock();
        assert!(!state.gate_closed, "replica {}: two changes of its stack at once", self.replica);
        state.gate_closed = true;
        while state.changes_in_flight > 0 {
            state = self.idle.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        drop(state);
        Gate { path: Arc::clone(self) }
    }

    /// Calls `retry` once the gate is open, which may be now.
    pub(super) fn when_open(&self, retry: Box<dyn FnOnce() + Send>) {
        {
            let mut state = self.lock();
            if state.gate_closed {
                state.held.push(retry);
                return;
            }
        }
        retry();
    }

    /// [`DataPath::flush`] for a thread that may block.
    pub fn flush_and_wait(self: &Arc<Self>) -> Result<(), StoreError> {
        let (sender, receiver) = std::sync::mpsc::sync_channel(1);
        self.flush(Box::new(move |result| {
            let _ = sender.send(result);
        }));
        receiver.recv().unwrap_or(Err(StoreError::Closed(self.replica)))
    }

    /// The volume has another size from now on; the top's file has it already.
    pub fn set_size(&self, size_bytes: u64) {
        let mut state = self.lock();
        state.stack.top_mut().blocks = size_bytes / BLOCK_BYTES;
        // The last group's tables may be longer now than what was reserved for them.
        state.backed = Backed::new(state.stack.is_layered());
        drop(state);
        self.size_bytes.store(size_bytes, Ordering::Release);
    }

    /// The snapshots, oldest first.
    pub fn snapshots(&self) -> Vec<SnapshotId> {
        self.lock().stack.layers().iter().filter_map(|layer| layer.snapshot).collect()
    }

    /// A snapshot is gone: its layer stays until it is merged.
    pub fn forget_snapshot(&self, number: u32) {
        if let Some(layer) = self.lock().stack.by_number(number) {
            layer.snapshot = None;
        }
    }
}

impl Gate {
    pub(super) fn path(&self) -> &DataPath {
        &self.path
    }

    /// The top is frozen and everything in it durable: `top` takes the writes from now on.
    pub fn push(&self, frozen_as: Option<SnapshotId>, top: Layer) {
        let mut state = self.path.lock();
        state.shadow.set_layer(top.number);
        state.stack.push(frozen_as, top);
        state.backed = Backed::new(true);
    }
}

impl Drop for Gate {
    fn drop(&mut self) {
        let held = {
            let mut state = self.path.lock();
            state.gate_closed = false;
            std::mem::take(&mut state.held)
        };
        for retry in held {
            retry();
        }
    }
}
