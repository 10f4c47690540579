//! A tokio runtime of one thread, so that what belongs together stays on one thread.

use std::io;
use std::thread::JoinHandle;

use tokio::runtime::{Builder, Handle};
use tokio::sync::oneshot;

/// A runtime on a thread of its own. Dropping it drops its tasks, and with them their sockets.
pub struct ThreadRuntime {
    handle: Handle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl ThreadRuntime {
    /// Starts the thread; `name` has at most 15 bytes.
    ///
    /// # Errors
    /// The kernel gives no thread or no poll descriptor.
    pub fn start(name: &str) -> io::Result<Self> {
        let runtime = Builder::new_current_thread().enable_all().build()?;
        let handle = runtime.handle().clone();
        let (stop, stopped) = oneshot::channel::<()>();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Ends when told to, and when the handle is dropped.
            let _ = runtime.block_on(stopped);
            // Blocking tasks that still run must not hold the end up.
            runtime.shutdown_background();
        })?;
        Ok(Self { handle, stop: Some(stop), thread: Some(thread) })
    }

    /// Spawns onto it.
    #[must_use]
    pub fn handle(&self) -> &Handle {
        &self.handle
    }

    /// Drops all tasks and waits until the thread ended. Blocks for a moment; not to be called on the thread itself.
    pub fn stop(&mut self) {
        drop(self.stop.take());
        if let Some(thread) = self.thread.take()
            && thread.thread().id() != std::thread::current().id()
        {
            let _ = thread.join();
        }
    }
}

impl Drop for ThreadRuntime {
    fn drop(&mut self) {
        // Without waiting: the last reference may go on any thread, this one included.
        drop(self.stop.take());
    }
}
