//! Allocation of the target's volume, as local clients ask for it.
//!
//! To the core a query is a read of its range: it waits for the range lock and for reconciliation, goes to a member that
//! may answer reads, falls over to another, and is answered under the leases of the ack set. Only what is sent differs.

use holdfast_nbd::{Extent, ExtentsCompletion};
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::BLOCK_BYTES;
use holdfast_storage_core::target::ClientOp;

/// What is asked.
#[derive(Debug, Clone, Copy)]
pub struct AllocationQuery {
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub len: u64,
    /// Most extents wanted.
    pub extents_max: usize,
}

/// A query that is not answered yet.
pub struct PendingQuery {
    query: AllocationQuery,
    found: Vec<Extent>,
    /// Where the answer goes.
    pub done: ExtentsCompletion,
}

impl PendingQuery {
    /// Takes a query in; gives what the core is told of it.
    pub fn new(query: AllocationQuery, done: ExtentsCompletion) -> (Self, ClientOp) {
        let AllocationQuery { offset, len, .. } = query;
        (Self { query, found: Vec::new(), done }, ClientOp::Read { offset, len })
    }

    /// The whole blocks to ask a replica for, and how many extents.
    pub fn wanted(&self) -> (BlockRange, usize) {
        (BlockRange::covering(self.query.offset, self.query.len), self.query.extents_max)
    }

    /// Takes a replica's answer.
    pub fn put(&mut self, found: Vec<Extent>) {
        self.found = found;
    }

    /// The answer to the client: the replica's whole blocks, cut to the bytes that were asked for.
    pub fn finish(self) -> (ExtentsCompletion, Vec<Extent>) {
        let mut skip = self.query.offset % BLOCK_BYTES;
        let mut left = self.query.len;
        let mut extents = self.found;
        extents.retain_mut(|extent| {
            let skipped = skip.min(extent.len);
            skip -= skipped;
            extent.len = (extent.len - skipped).min(left);
            left -= extent.len;
            extent.len > 0
        });
        (self.done, extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(offset: u64, len: u64, found: &[u64]) -> Vec<u64> {
        let query = AllocationQuery { offset, len, extents_max: 8 };
        let (mut pending, _) = PendingQuery::new(query, Box::new(|_| ()));
        pending.put(found.iter().map(|len| Extent { len: *len, state: 0 }).collect());
        pending.finish().1.iter().map(|extent| extent.len).collect()
    }

    #[test]
    fn an_answer_covers_the_bytes_asked_for_and_no_more() {
        assert_eq!(told(0, 8192, &[4096, 4096]), [4096, 4096]);
        assert_eq!(told(512, 4096, &[4096, 4096]), [3584, 512]);
        assert_eq!(told(512, 512, &[8192]), [512]);
        assert_eq!(told(0, 4096, &[8192]), [4096]);
        assert_eq!(told(4096, 8192, &[4096]), [4096], "a prefix stays a prefix");
    }
}
