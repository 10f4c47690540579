//! Data of writes and reads, read from a stream without an intermediate copy where it is large.

use std::io;

use bytes::Bytes;
use holdfast_io::AlignedBuf;
use tokio::io::{AsyncRead, AsyncReadExt, BufReader};

/// Buffer in front of the stream: many small requests arrive with one read, while of a large payload everything that is
/// not yet in the buffer is read straight into its place (that is how `BufReader` treats reads of its capacity or more).
pub(crate) const READ_BUFFER_BYTES: usize = 64 << 10;

/// Largest payload of one request or reply in bytes, the specification's default. Larger requests are refused.
pub(crate) const PAYLOAD_BYTES_MAX: u32 = 32 << 20;

/// Reads exactly `len` bytes, into memory that direct I/O accepts. The caller has checked `len` against
/// [`PAYLOAD_BYTES_MAX`].
pub(crate) async fn read_payload<R>(reader: &mut BufReader<R>, len: usize) -> io::Result<Bytes>
where
    R: AsyncRead + Unpin,
{
    if len == 0 {
        return Ok(Bytes::new());
    }
    let mut payload = AlignedBuf::new(len);
    reader.read_exact(&mut payload).await?;
    Ok(payload.into_bytes())
}

/// Reads and forgets `len` bytes, with bounded memory.
///
/// # Errors
/// The stream fails or ends first.
pub(crate) async fn skip<R>(reader: &mut R, len: u64) -> io::Result<()>
where
    R: AsyncRead + Unpin,
{
    let skipped = tokio::io::copy(&mut reader.take(len), &mut tokio::io::sink()).await?;
    if skipped < len { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(()) }
}

/// Reads a fixed-size header.
pub(crate) async fn read_array<const N: usize, R>(reader: &mut R) -> io::Result<[u8; N]>
where
    R: AsyncRead + Unpin,
{
    let mut bytes = [0; N];
    reader.read_exact(&mut bytes).await?;
    Ok(bytes)
}

/// The same, but `None` where the stream ended in order just before it.
pub(crate) async fn read_array_or_end<const N: usize, R>(reader: &mut R) -> io::Result<Option<[u8; N]>>
where
    R: AsyncRead + Unpin,
{
    let mut bytes = [0; N];
    let first = reader.read(&mut bytes).await?;
    if first == 0 {
        return Ok(None);
    }
    reader.read_exact(&mut bytes[first..]).await?;
    Ok(Some(bytes))
}
