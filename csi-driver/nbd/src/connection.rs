//! The transmission phase, the client's side.
//!
//! One task polls a reader and a writer. A request is in the pending table from submit until its reply, or until the
//! connection fails; whoever takes it out of the table completes it, so that it completes exactly once.

use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncWriteExt, BufReader, WriteHalf};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::sync::watch;

use crate::handshake::Stream;
use crate::outgoing::{BATCH_MESSAGES_MAX, Outgoing, next_batch, write_batch};
use crate::payload::READ_BUFFER_BYTES;
use crate::pending::{Content, Expected, Pending, Waiter};
use crate::proto::{Command, Framing, RequestHeader, errno};
use crate::replies::Replies;

/// How long an orderly goodbye may take.
const GOODBYE: Duration = Duration::from_millis(100);

/// The shared half of a client's connection.
#[derive(Debug)]
pub(crate) struct Connection {
    framing: Framing,
    pending: Mutex<Pending>,
    queue: UnboundedSender<Outgoing<()>>,
    /// Ends the task.
    closing: watch::Sender<bool>,
    /// Everything in flight has been completed.
    closed: watch::Sender<bool>,
}

impl Connection {
    /// Spawns the connection's task.
    pub(crate) fn start(stream: Box<dyn Stream>, framing: Framing) -> Arc<Self> {
        let (queue, queued) = unbounded_channel();
        let connection = Arc::new(Self {
            framing,
            pending: Mutex::new(Pending::default()),
            queue,
            closing: watch::Sender::new(false),
            closed: watch::Sender::new(false),
        });
        tokio::spawn(run(connection.clone(), stream, queued));
        connection
    }

    /// How requests and replies look.
    pub(crate) fn framing(&self) -> Framing {
        self.framing
    }

    /// Registers a request and queues it. The cookie in `request` is set here.
    pub(crate) fn send(&self, mut request: RequestHeader, data: Bytes, content: Content, waiter: Waiter) {
        let expected = Expected { offset: request.offset, content };
        let refused = match self.pending().insert(expected, waiter) {
            Ok(cookie) => {
                request.cookie = cookie;
                // Queued under the lock's shadow: if the connection fails in between, the request is completed by that
                // and the queue swallows it.
                let _ = self.queue.send(Outgoing::new(request.encode(self.framing), data, ()));
                return;
            }
            Err(refused) => refused,
        };
        let (waiter, errno) = *refused;
        waiter.fail(errno);
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.pending().is_closed()
    }

    pub(crate) async fn closed(&self) {
        let mut closed = self.closed.subscribe();
        let _ = closed.wait_for(|closed| *closed).await;
    }

    /// Completes everything in flight with ENOTCONN and ends the task.
    pub(crate) fn close(&self) {
        let in_flight = self.pending().close();
        for waiter in in_flight {
            waiter.fail(errno::ENOTCONN);
        }
        self.closing.send_replace(true);
        self.closed.send_replace(true);
    }

    pub(crate) fn pending(&self) -> MutexGuard<'_, Pending> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

async fn run(connection: Arc<Connection>, stream: Box<dyn Stream>, queued: UnboundedReceiver<Outgoing<()>>) {
    let (read_half, mut write_half) = tokio::io::split(stream);
    let stream = BufReader::with_capacity(READ_BUFFER_BYTES, read_half);
    let mut replies = Replies::new(connection.clone(), stream);
    let mut closing = connection.closing.subscribe();
    let mid_message = AtomicBool::new(false);
    let ended = tokio::select! {
        biased;
        _ = closing.wait_for(|closing| *closing) => Ok(()),
        ended = replies.run() => ended,
        ended = write_requests(&mut write_half, queued, &mid_message) => ended,
    };
    connection.close();
    if let Err(error) = ended {
        tracing::debug!(%error, "an NBD connection ended");
    } else if !mid_message.load(Ordering::Relaxed) {
        // Only between messages: after half a write, the goodbye would be taken for the rest of its data, and data that
        // nobody wrote would reach the disk.
        let goodbye = RequestHeader { flags: 0, command: Command::Disconnect, cookie: 0, offset: 0, len: 0 };
        let farewell = async {
            write_half.write_all(&goodbye.encode(connection.framing)).await?;
            write_half.shutdown().await
        };
        let _ = tokio::time::timeout(GOODBYE, farewell).await;
    }
}

/// Ends with an error only: the queue's sender lives in the connection.
async fn write_requests(
    stream: &mut WriteHalf<Box<dyn Stream>>,
    mut queue: UnboundedReceiver<Outgoing<()>>,
    mid_message: &AtomicBool,
) -> io::Result<()> {
    let mut batch = Vec::with_capacity(BATCH_MESSAGES_MAX);
    while next_batch(&mut queue, &mut batch).await {
        mid_message.store(true, Ordering::Relaxed);
        write_batch(stream, &batch).await?;
        mid_message.store(false, Ordering::Relaxed);
    }
    Ok(())
}
