//! The data of client requests and copies while the core decides where it goes.
//!
//! Data is moved by reference: what the client handed in is what every replica is sent. Only the edges of an unaligned
//! request are copied.

use bytes::Bytes;
use holdfast_io::{AlignedBuf, BlockOp, Completion};
use holdfast_storage_core::ids::{BLOCK_BYTES, Block};
use holdfast_storage_core::target::ClientOp;

/// A client's request and its data.
pub struct ClientRequest {
    data: Data,
    done: Completion,
}

enum Data {
    /// The blocks that were read, and which of their bytes the client wants.
    Read {
        offset: u64,
        len: u64,
        blocks: Bytes,
    },
    /// Whole blocks as the client gave them.
    Write(Bytes),
    /// Whole blocks with the client's bytes in place; the edges are read in.
    Unaligned {
        offset: u64,
        len: u64,
        blocks: AlignedBuf,
    },
    /// Edge blocks with the client's range zeroed.
    Zero {
        offset: u64,
        len: u64,
        edges: Vec<(Block, Bytes)>,
    },
    Flush,
}

/// Length of a block in memory.
const BLOCK: usize = BLOCK_BYTES as usize;

impl ClientRequest {
    /// Takes a request in; gives what the core is told of it.
    pub fn new(op: BlockOp, done: Completion) -> (Self, ClientOp) {
        let (data, op) = match op {
            BlockOp::Read { offset, len } => {
                let len = u64::from(len);
                (Data::Read { offset, len, blocks: Bytes::new() }, ClientOp::Read { offset, len })
            }
            BlockOp::Write { offset, data, fua } => {
                let len = data.len() as u64;
                (write_data(offset, data), ClientOp::Write { offset, len, fua })
            }
            BlockOp::Zero { offset, len, fua, trim } => {
                (Data::Zero { offset, len, edges: Vec::new() }, ClientOp::Zero { offset, len, fua, trim })
            }
            BlockOp::Flush => (Data::Flush, ClientOp::Flush),
        };
        (Self { data, done }, op)
    }

    /// The whole blocks to write.
    pub fn blocks(&mut self) -> Bytes {
        if let Data::Unaligned { blocks, .. } = &mut self.data {
            // Every edge was read before the first write: from here on the buffer does not change.
            let whole = std::mem::replace(blocks, AlignedBuf::new(1)).into_bytes();
            self.data = Data::Write(whole);
        }
        match &self.data {
            Data::Write(blocks) => blocks.clone(),
            Data::Read { .. } | Data::Unaligned { .. } | Data::Zero { .. } | Data::Flush => Bytes::new(),
        }
    }

    /// Takes what a replica read for the request.
    pub fn put_read(&mut self, read: Bytes) {
        if let Data::Read { blocks, .. } = &mut self.data {
            *blocks = read;
        }
    }

    /// Takes an edge block that was read.
    pub fn put_edge(&mut self, block: Block, read: &Bytes) {
        match &mut self.data {
            Data::Unaligned { offset, len, blocks } => {
                let at = (block.0 - *offset / BLOCK_BYTES) as usize * BLOCK;
                let (from, to) = inside(block, *offset, *len);
                let own = &mut blocks[at..at + BLOCK];
                own[..from].copy_from_slice(&read[..from]);
                own[to..].copy_from_slice(&read[to..]);
            }
            Data::Zero { offset, len, edges } => {
                let (from, to) = inside(block, *offset, *len);
                let mut own = AlignedBuf::copy_of(read);
                own[from..to].fill(0);
                edges.push((block, own.into_bytes()));
            }
            Data::Read { .. } | Data::Write(_) | Data::Flush => {}
        }
    }

    /// An edge block to write.
    pub fn edge(&self, block: Block) -> Bytes {
        match &self.data {
            Data::Zero { edges, .. } => edges
                .iter()
                .rev()
                .find(|(at, _)| *at == block)
                .map(|(_, data)| data.clone())
                .unwrap_or_default(),
            Data::Read { .. } | Data::Write(_) | Data::Unaligned { .. } | Data::Flush => Bytes::new(),
        }
    }

    /// The client's answer to a success, and where it goes.
    pub fn finish(self) -> (Completion, Bytes) {
        let data = match self.data {
            Data::Read { offset, len, blocks } => {
                let skip = usize::try_from(offset % BLOCK_BYTES).expect("below a block");
                let len = usize::try_from(len).expect("a read's length has 32 bits");
                blocks.slice(skip..skip + len)
            }
            Data::Write(_) | Data::Unaligned { .. } | Data::Zero { .. } | Data::Flush => Bytes::new(),
        };
        (self.done, data)
    }

    /// Where a failure is told.
    pub fn into_completion(self) -> Completion {
        self.done
    }
}

fn write_data(offset: u64, data: Bytes) -> Data {
    let len = data.len() as u64;
    if offset.is_multiple_of(BLOCK_BYTES) && len.is_multiple_of(BLOCK_BYTES) {
        return Data::Write(data);
    }
    let skip = usize::try_from(offset % BLOCK_BYTES).expect("below a block");
    let mut blocks = AlignedBuf::new((skip + data.len()).next_multiple_of(BLOCK));
    blocks[skip..skip + data.len()].copy_from_slice(&data);
    Data::Unaligned { offset, len, blocks }
}

/// The bytes of a block which lie in the client's range, as offsets within the block.
fn inside(block: Block, offset: u64, len: u64) -> (usize, usize) {
    let start = block.0 * BLOCK_BYTES;
    let from = offset.clamp(start, start + BLOCK_BYTES) - start;
    let to = (offset + len).clamp(start, start + BLOCK_BYTES) - start;
    (usize::try_from(from).expect("within a block"), usize::try_from(to).expect("within a block"))
}

/// Whether a copied buffer may be written as zeroes, so that it takes no space.
pub fn is_zero(data: &[u8]) -> bool {
    let (words, tail) = data.as_chunks::<16>();
    tail.iter().all(|byte| *byte == 0) && words.iter().all(|word| *word == [0; 16])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_write(offset: u64, data: &[u8]) -> ClientRequest {
        let op = BlockOp::Write { offset, data: Bytes::copy_from_slice(data), fua: false };
        ClientRequest::new(op, Box::new(|_| ())).0
    }

    #[test]
    fn unaligned_write_keeps_what_the_client_did_not_write() {
        let mut request = mk_write(4090, &[7; 10]);
        request.put_edge(Block(0), &Bytes::from(vec![1; BLOCK]));
        request.put_edge(Block(1), &Bytes::from(vec![2; BLOCK]));
        let blocks = request.blocks();
        let mut expected = vec![1; BLOCK];
        expected.extend(vec![2; BLOCK]);
        expected[4090..4100].fill(7);
        assert_eq!(blocks, expected);
        assert_eq!(request.blocks(), expected, "a second replica is sent the same");
    }

    #[test]
    fn unaligned_write_within_one_block_keeps_both_sides() {
        let mut request = mk_write(512, &[7; 512]);
        request.put_edge(Block(0), &Bytes::from(vec![1; BLOCK]));
        let blocks = request.blocks();
        assert!(blocks[..512].iter().chain(&blocks[1024..]).all(|byte| *byte == 1));
        assert!(blocks[512..1024].iter().all(|byte| *byte == 7));
    }

    #[test]
    fn zeroing_part_of_a_block_keeps_the_rest() {
        let op = BlockOp::Zero { offset: 100, len: BLOCK_BYTES, fua: false, trim: true };
        let mut request = ClientRequest::new(op, Box::new(|_| ())).0;
        request.put_edge(Block(0), &Bytes::from(vec![1; BLOCK]));
        request.put_edge(Block(1), &Bytes::from(vec![2; BLOCK]));
        assert!(request.edge(Block(0))[..100].iter().all(|byte| *byte == 1));
        assert!(request.edge(Block(0))[100..].iter().all(|byte| *byte == 0));
        assert!(request.edge(Block(1))[..100].iter().all(|byte| *byte == 0));
        assert!(request.edge(Block(1))[100..].iter().all(|byte| *byte == 2));
    }

    #[test]
    fn a_read_gives_exactly_the_bytes_asked_for() {
        let (sender, receiver) = std::sync::mpsc::channel();
        let op = BlockOp::Read { offset: 4000, len: 200 };
        let mut request = ClientRequest::new(op, Box::new(move |r| sender.send(r).unwrap())).0;
        let blocks: Vec<u8> = (0..2 * BLOCK).map(|at| u8::try_from(at % 251).unwrap()).collect();
        request.put_read(Bytes::from(blocks.clone()));
        let (done, data) = request.finish();
        done(Ok(data));
        assert_eq!(receiver.recv().unwrap().unwrap(), blocks[4000..4200]);
    }

    #[test]
    fn zero_check_sees_every_byte() {
        let mut data = vec![0; 4097];
        assert!(is_zero(&data));
        for at in [0, 15, 16, 4095, 4096] {
            data[at] = 1;
            assert!(!is_zero(&data), "{at}");
            data[at] = 0;
        }
    }
}
