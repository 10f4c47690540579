//! Lines of a stream, none of them longer than a limit.

use futures::{AsyncBufRead, AsyncBufReadExt};

/// Why there is no further line.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinesError {
    /// The stream failed.
    #[error("the connection failed: {0}")]
    Read(#[from] std::io::Error),
    /// A line is too long.
    #[error("an event is larger than {0} bytes")]
    TooLong(usize),
    /// The stream ended in a line.
    #[error("the connection ended in the middle of an event")]
    Cut,
}

/// Reads lines.
pub(super) struct Lines<R> {
    reader: R,
    line: Vec<u8>,
    bytes_max: usize,
    /// The line was given out.
    is_done: bool,
}

/// A buffer that one long line left behind is given back beyond this.
const KEPT_BYTES_MAX: usize = 64 << 10;

impl<R: AsyncBufRead + Unpin> Lines<R> {
    pub fn new(reader: R, bytes_max: usize) -> Self {
        Self { reader, line: Vec::new(), bytes_max, is_done: false }
    }

    /// The next line, without its end; `None` at the end of the stream. Cancelled, it goes on where it was.
    pub async fn next(&mut self) -> Result<Option<&[u8]>, LinesError> {
        if std::mem::take(&mut self.is_done) {
            self.line.clear();
            self.line.shrink_to(KEPT_BYTES_MAX);
        }
        loop {
            let found = self.reader.fill_buf().await?;
            if found.is_empty() {
                return if self.line.is_empty() { Ok(None) } else { Err(LinesError::Cut) };
            }
            let end = found.iter().position(|byte| *byte == b'\n');
            let taken = end.unwrap_or(found.len());
            if self.line.len() + taken > self.bytes_max {
                return Err(LinesError::TooLong(self.bytes_max));
            }
            self.line.extend_from_slice(&found[..taken]);
            self.reader.consume_unpin(taken + usize::from(end.is_some()));
            if end.is_some() {
                self.is_done = true;
                return Ok(Some(&self.line));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn lines_come_one_by_one_however_they_are_cut() {
        let text = b"one\n\nthree is longer\n".as_slice();
        for size in 1..text.len() {
            let reader = futures::io::BufReader::with_capacity(size, text);
            let mut lines = Lines::new(reader, 15);
            assert_eq!(lines.next().await.unwrap(), Some(b"one".as_slice()), "in pieces of {size}");
            assert_eq!(lines.next().await.unwrap(), Some(b"".as_slice()));
            assert_eq!(lines.next().await.unwrap(), Some(b"three is longer".as_slice()));
            assert_eq!(lines.next().await.unwrap(), None);
        }
    }

    #[tokio::test]
    async fn half_a_line_and_one_that_is_too_long_are_errors() {
        let mut lines = Lines::new(b"whole\nhalf".as_slice(), 10);
        assert!(lines.next().await.unwrap().is_some());
        assert!(matches!(lines.next().await, Err(LinesError::Cut)));
        let mut lines = Lines::new(b"0123456789x\n".as_slice(), 10);
        assert!(matches!(lines.next().await, Err(LinesError::TooLong(10))));
    }
}
