//! The sending half of a connection: messages are queued by many, written by one, coalesced into vectored writes.

use std::io::{self, IoSlice};

use bytes::Bytes;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::proto::HeaderBytes;

/// Messages that one vectored write carries at most; further ones go with the next.
pub(crate) const BATCH_MESSAGES_MAX: usize = 64;

/// One message: a short header and its data. `T` lives until the message is written.
#[derive(Debug)]
pub(crate) struct Outgoing<T> {
    header: HeaderBytes,
    payload: Bytes,
    _held: T,
}

impl<T> Outgoing<T> {
    pub(crate) fn new(header: HeaderBytes, payload: Bytes, held: T) -> Self {
        Self { header, payload, _held: held }
    }

    /// The same message with something else that lives until it is written.
    pub(crate) fn holding(self, held: T) -> Self {
        Self { _held: held, ..self }
    }
}

/// Takes what is queued, waiting for at least one message; false when every sender is gone.
pub(crate) async fn next_batch<T>(
    queue: &mut UnboundedReceiver<Outgoing<T>>,
    batch: &mut Vec<Outgoing<T>>,
) -> bool {
    batch.clear();
    queue.recv_many(batch, BATCH_MESSAGES_MAX).await > 0
}

/// Writes a whole batch.
pub(crate) async fn write_batch<W, T>(stream: &mut W, batch: &[Outgoing<T>]) -> io::Result<()>
where
    W: AsyncWrite + Unpin,
{
    let mut slices = [IoSlice::new(&[]); 2 * BATCH_MESSAGES_MAX];
    let mut used = 0;
    for message in batch {
        slices[used] = IoSlice::new(&message.header);
        used += 1;
        if !message.payload.is_empty() {
            slices[used] = IoSlice::new(&message.payload);
            used += 1;
        }
    }
    let mut rest = &mut slices[..used];
    while !rest.is_empty() {
        let written = stream.write_vectored(rest).await?;
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        IoSlice::advance_slices(&mut rest, written);
    }
    stream.flush().await
}
