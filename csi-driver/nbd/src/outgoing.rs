//! The sending half of a connection: messages are queued by many, written by one, coalesced into vectored writes.

use std::io::{self, IoSlice};

use bytes::Bytes;
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::mpsc::UnboundedReceiver;

/// Messages that one vectored write carries at most; further ones go with the next.
pub(crate) const BATCH_MESSAGES_MAX: usize = 64;

/// Longest header: a structured reply chunk's with its offset.
const HEADER_BYTES_MAX: usize = 28;

/// One message: a short header and its data. `T` lives until the message is written.
#[derive(Debug)]
pub(crate) struct Outgoing<T> {
    header: [u8; HEADER_BYTES_MAX],
    header_len: u8,
    payload: Bytes,
    _held: T,
}

impl<T> Outgoing<T> {
    /// `head` and `more` together are at most 28 bytes.
    pub(crate) fn new(head: &[u8], more: &[u8], payload: Bytes, held: T) -> Self {
        let mut header = [0; HEADER_BYTES_MAX];
        let len = head.len() + more.len();
        header[..head.len()].copy_from_slice(head);
        header[head.len()..len].copy_from_slice(more);
        Self {
            header,
            header_len: u8::try_from(len).expect("a header is at most 28 bytes"),
            payload,
            _held: held,
        }
    }

    fn header(&self) -> &[u8] {
        &self.header[..usize::from(self.header_len)]
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
        slices[used] = IoSlice::new(message.header());
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
