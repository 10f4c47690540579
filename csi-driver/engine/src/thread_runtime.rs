//! A tokio runtime of one thread, so that what belongs together stays on one thread.

use std::io;
use std::sync::mpsc::{Receiver, channel};
use std::sync::{Mutex, PoisonError};
use std::thread::{Thread, current};
use std::time::Duration;

use holdfast_io::thread_ring::{self, Ended, LoneIo};
use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// How long a stop waits for its thread to drop its tasks.
const STOP_WAIT: Duration = Duration::from_secs(2);

/// A runtime on a thread of its own. Dropping it drops its tasks, and with them their sockets.
pub struct ThreadRuntime {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Thread,
    /// Closed when the tasks are gone.
    tasks_gone: Mutex<Receiver<()>>,
}

impl ThreadRuntime {
    /// Starts the thread; `name` has at most 15 bytes.
    ///
    /// # Errors
    /// The kernel gives no thread or no poll descriptor.
    pub fn start(name: &str) -> io::Result<Self> {
        Self::start_thread(name, Builder::new_current_thread(), || None)
    }

    /// Starts a thread that does its disk I/O itself, see [`thread_ring`]; where the kernel refuses, the pool's ring does
    /// it. The thread outlives its tasks until its last I/O ended.
    ///
    /// # Errors
    /// The kernel gives no thread or no poll descriptor.
    pub fn start_with_ring(name: &str, lone_io: LoneIo) -> io::Result<Self> {
        let mut builder = Builder::new_current_thread();
        builder.on_thread_park(thread_ring::pump);
        Self::start_thread(name, builder, move || match thread_ring::install(lone_io) {
            Ok(ended) => Some(ended),
            Err(error) => {
                tracing::warn!(%error, "a thread has no I/O ring of its own: its disk I/O takes longer");
                None
            }
        })
    }

    fn start_thread(
        name: &str,
        mut builder: Builder,
        ring: impl FnOnce() -> Option<Ended> + Send + 'static,
    ) -> io::Result<Self> {
        let (stop, stopped) = oneshot::channel::<()>();
        let (report, started) = channel();
        let (tasks, tasks_gone) = channel();
        // Built on its thread: a runtime may not be dropped within another, should the kernel refuse the thread.
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            let runtime = match builder.enable_all().build() {
                Ok(runtime) => runtime,
                Err(error) => {
                    let _ = report.send(Err(error));
                    return;
                }
            };
            let _ = report.send(Ok(runtime.handle().clone()));
            runtime.block_on(async {
                if let Some(ended) = ring() {
                    tokio::spawn(answer_disk_io(ended));
                }
                // Ends when told to, and when the handle is dropped.
                let _ = stopped.await;
            });
            // Blocking tasks that still run must not hold the end up.
            runtime.shutdown_background();
            drop(tasks);
            thread_ring::drain();
        })?;
        let handle =
            started.recv().map_err(|_| io::Error::other("the thread ended before it had started"))??;
        let thread = thread.thread().clone();
        Ok(Self { handle, stop: Some(stop), thread, tasks_gone: Mutex::new(tasks_gone) })
    }

    /// Spawns onto it.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Drops all tasks and waits until they are gone, at most [`STOP_WAIT`]: a thread may wait for a disk that hangs. Disk
    /// I/O under way may still land. On the thread itself it does not wait.
    pub fn stop(&mut self) {
        drop(self.stop.take());
        if self.thread.id() != current().id() {
            let tasks_gone = self.tasks_gone.get_mut().unwrap_or_else(PoisonError::into_inner);
            // Nothing is ever sent: the answer is the sender's end.
            let _ = tasks_gone.recv_timeout(STOP_WAIT);
        }
    }
}

impl Drop for ThreadRuntime {
    fn drop(&mut self) {
        // Without waiting: the last reference may go on any thread, this one included.
        drop(self.stop.take());
    }
}

/// Answers disk I/O as it ends. Without this every request would hang.
async fn answer_disk_io(ended: Ended) {
    let Err(error) = ended.pump_forever().await;
    tracing::error!(%error, "the end of disk I/O cannot be waited for: aborting");
    std::process::abort();
}
