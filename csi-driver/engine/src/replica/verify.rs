//! Verifying, adopting and marking blocks: data requests that NBD has no command for (R25, R32, R33).

use bytes::Bytes;
use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::{BLOCK_BYTES, Block};
use holdfast_storage_core::replica::DiskError;
use holdfast_store::{Replica, StoreError};

use super::disk::disk_error;

/// Bytes of a verdict between disk and machine: 1 if the block verifies, then its digest, little-endian.
const VERDICT_BYTES: usize = 9;
const BLOCK: usize = BLOCK_BYTES as usize;

/// Reads the range and says of each block whether it verifies, and its digest; answers them in a form that [`decode`] reads.
pub fn verify(
    disk: &Replica,
    range: BlockRange,
    done: impl FnOnce(Result<Bytes, DiskError>) + Send + 'static,
) {
    let Ok(len) = u32::try_from(range.len_bytes()) else { return done(Err(DiskError::Corrupt)) };
    let verdicts = move |read: holdfast_store::UncheckedRead| {
        let blocks = (range.start.0..).zip(read.data.chunks(BLOCK));
        blocks
            .map(|(at, data)| (!read.bad_blocks.contains(&Block(at))).then(|| digest(data)))
            .collect::<Vec<_>>()
    };
    let answer = move |result: Result<holdfast_store::UncheckedRead, StoreError>| {
        done(match result {
            Ok(read) => Ok(encode(&verdicts(read))),
            // A device that cannot read the range verifies nothing of it.
            Err(StoreError::Io { .. }) => Ok(encode(&vec![None; len as usize / BLOCK])),
            Err(error) => Err(disk_error(error)),
        });
    };
    disk.read_unchecked(range.offset_bytes(), len, Box::new(answer));
}

/// Gives each block of the range that a crash may have left without one a checksum that fits what the disk holds.
pub fn adopt(
    disk: &Replica,
    range: BlockRange,
    done: impl FnOnce(Result<Bytes, DiskError>) + Send + 'static,
) {
    let Ok(len) = u32::try_from(range.len_bytes()) else { return done(Err(DiskError::Corrupt)) };
    let own = disk.clone();
    let read = move |result: Result<holdfast_store::UncheckedRead, StoreError>| match result {
        Ok(read) => {
            let torn: Vec<u64> = read.in_doubt.iter().map(|block| block.0).collect();
            adopt_next(own, range, read.data, torn, Box::new(done));
        }
        // What the device cannot read it cannot adopt: it stays an error to its readers, and is none of the replica's.
        Err(StoreError::Io { .. }) => done(Ok(Bytes::new())),
        Err(error) => done(Err(disk_error(error))),
    };
    disk.read_unchecked(range.offset_bytes(), len, Box::new(read));
}

type DoneBytes = Box<dyn FnOnce(Result<Bytes, DiskError>) + Send>;

/// One after the other: there are few.
fn adopt_next(disk: Replica, range: BlockRange, data: Bytes, mut torn: Vec<u64>, done: DoneBytes) {
    let Some(block) = torn.pop() else { return done(Ok(Bytes::new())) };
    let at = usize::try_from(block - range.start.0).expect("within the range") * BLOCK;
    let own = data.slice(at..at + BLOCK);
    let next = disk.clone();
    let written = move |result: Result<(), StoreError>| match result {
        Ok(()) => adopt_next(next, range, data, torn, done),
        Err(error) => done(Err(disk_error(error))),
    };
    disk.write(block * BLOCK_BYTES, own, false, Box::new(written));
}

/// Tells contents apart that both verify; equal on every replica for equal content. Not meant against an adversary: it
/// decides nothing but a report.
fn digest(block: &[u8]) -> u64 {
    let (words, _) = block.as_chunks::<8>();
    words.iter().fold(0, |hash: u64, word| {
        (hash.rotate_left(5) ^ u64::from_le_bytes(*word)).wrapping_mul(0x9e37_79b9_7f4a_7c15)
    })
}

fn encode(verdicts: &[Option<u64>]) -> Bytes {
    let mut bytes = Vec::with_capacity(verdicts.len() * VERDICT_BYTES);
    for verdict in verdicts {
        bytes.push(u8::from(verdict.is_some()));
        bytes.extend_from_slice(&verdict.unwrap_or(0).to_le_bytes());
    }
    bytes.into()
}

/// Reads [`verify`]'s answer; a piece of a verdict at the end is left out.
pub fn decode(bytes: &[u8]) -> Vec<Option<u64>> {
    let (verdicts, _) = bytes.as_chunks::<VERDICT_BYTES>();
    let verdict = |verdict: &[u8; VERDICT_BYTES]| {
        let mut digest = [0; 8];
        digest.copy_from_slice(&verdict[1..]);
        (verdict[0] == 1).then(|| u64::from_le_bytes(digest))
    };
    verdicts.iter().map(verdict).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn verdicts_survive_their_form_and_differ_with_the_content() {
        let mut block = vec![0; BLOCK];
        let zero = digest(&block);
        block[4095] = 1;
        let verdicts = [Some(zero), None, Some(digest(&block))];
        assert_ne!(verdicts[0], verdicts[2]);
        assert_eq!(decode(&encode(&verdicts)), verdicts);
        assert_eq!(decode(&[1, 2, 3]), []);
    }
}
