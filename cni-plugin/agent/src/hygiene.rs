//! Deletes forbidden conntrack entries after a revocation, beside everything else: see
//! [`Dataplane::delete_forbidden`] for what that may and may not do.

use std::sync::Arc;
use std::time::{Duration, Instant};

use holdfast_dataplane::Dataplane;
use tracing::{info, warn};

use crate::engine::sentence;

/// Pause between two passes; revocations that come meanwhile share the next one. A pass keeps a processor for some ten
/// milliseconds, in which the kernel does not give way, even where the table is empty: a change whose thread is there waits, so
/// passes must be rarer than one change in a hundred.
const PAUSE: Duration = Duration::from_secs(2);
/// The pause is at least so many times as long as the pass took: each reads the whole table, which takes the kernel some
/// 2 µs for each entry.
const PAUSE_FACTOR: u32 = 9;

/// Works until it is aborted; an abort leaves nothing half done.
pub(crate) async fn run(dataplane: Arc<Dataplane>) {
    let mut more = false;
    loop {
        if !more {
            dataplane.revoked().await;
        }
        let started = Instant::now();
        match dataplane.delete_forbidden().await {
            Ok(pass) => {
                if pass.deleted > 0 {
                    info!(deleted = pass.deleted, "conntrack entries that policy forbids are deleted");
                }
                more = pass.more;
            }
            Err(error) => {
                // They stop nothing and time out by themselves.
                warn!(error = sentence(&error), "conntrack entries that policy forbids could not be deleted");
                more = false;
            }
        }
        tokio::time::sleep(PAUSE.max(started.elapsed() * PAUSE_FACTOR)).await;
    }
}
