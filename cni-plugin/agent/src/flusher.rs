//! Flushes of a store.

use std::sync::atomic::{AtomicU64, Ordering};

use tokio::sync::Mutex;

/// One flush at a time, shared by all who wait for one.
///
/// Not sled's own `flush_async`: each call takes one of the few threads that also write what is to be flushed, so a burst of eight
/// waits for ever (sled 0.34; `calls_for_different_containers_must_be_served_at_the_same_time`).
pub(crate) struct Flusher {
    db: sled::Db,
    /// Rises with every call: what its caller wrote was written before.
    asked: AtomicU64,
    /// Calls up to this one are served.
    served: Mutex<u64>,
}

impl Flusher {
    /// Of this store.
    pub(crate) fn new(db: sled::Db) -> Self {
        Self { db, asked: AtomicU64::new(0), served: Mutex::new(0) }
    }

    /// Returns when everything that the caller wrote before is on stable storage.
    pub(crate) async fn flush(&self) -> Result<(), sled::Error> {
        let own = self.asked.fetch_add(1, Ordering::SeqCst) + 1;
        let mut served = self.served.lock().await;
        if *served >= own {
            // A flush that began after the caller's writes has ended meanwhile.
            return Ok(());
        }
        let up_to = self.asked.load(Ordering::SeqCst);
        let db = self.db.clone();
        let flushed = tokio::task::spawn_blocking(move || db.flush()).await;
        flushed.unwrap_or_else(|error| Err(sled::Error::Io(std::io::Error::other(error))))?;
        *served = up_to;
        Ok(())
    }
}
