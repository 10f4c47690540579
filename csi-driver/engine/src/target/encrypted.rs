//! The block device of an encrypted volume (ADR 0007): plaintext above, ciphertext below, which is all that the target and its
//! replicas ever see.
//!
//! Whole blocks only: there is no ciphertext of a part of one. Front ends have logical blocks of that size, and local NBD clients
//! are told so; what asks for less gets EINVAL.

use std::sync::Arc;

use bytes::Bytes;
use holdfast_io::{AlignedBuf, BlockDevice, BlockError, BlockOp, Completion};
use holdfast_storage_core::encryption::{BlockCipher, ZeroCiphertext};
use holdfast_storage_core::ids::{BLOCK_BYTES, Block};

use crate::errno;

/// Encrypts what goes to a device and decrypts what comes from it.
pub struct EncryptedDevice {
    inner: Arc<dyn BlockDevice>,
    cipher: Arc<BlockCipher>,
}

impl EncryptedDevice {
    /// A device over one that holds ciphertext.
    #[must_use]
    pub fn new(inner: Arc<dyn BlockDevice>, cipher: Arc<BlockCipher>) -> Self {
        Self { inner, cipher }
    }

    fn read(&self, offset: u64, len: u32, done: Completion) {
        let cipher = Arc::clone(&self.cipher);
        let decrypt = move |result: Result<Bytes, BlockError>| {
            done(result.map(|ciphertext| {
                let mut blocks = AlignedBuf::copy_of(&ciphertext);
                cipher.decrypt(Block(offset / BLOCK_BYTES), &mut blocks);
                blocks.into_bytes()
            }));
        };
        self.inner.submit(BlockOp::Read { offset, len }, Box::new(decrypt));
    }

    fn write(&self, offset: u64, data: &Bytes, fua: bool, done: Completion) {
        let mut blocks = AlignedBuf::copy_of(data);
        match self.cipher.encrypt(Block(offset / BLOCK_BYTES), &mut blocks) {
            Ok(()) => self.inner.submit(BlockOp::Write { offset, data: blocks.into_bytes(), fua }, done),
            Err(error @ ZeroCiphertext) => {
                tracing::error!(offset, %error, "a write is refused: it would read as zeroes");
                done(Err(BlockError(errno::EIO)));
            }
        }
    }
}

impl BlockDevice for EncryptedDevice {
    fn size_bytes(&self) -> u64 {
        self.inner.size_bytes()
    }

    fn submit(&self, op: BlockOp, done: Completion) {
        let (offset, len) = match &op {
            BlockOp::Read { offset, len } => (*offset, u64::from(*len)),
            BlockOp::Write { offset, data, .. } => (*offset, data.len() as u64),
            BlockOp::Zero { offset, len, .. } => (*offset, *len),
            BlockOp::Flush => return self.inner.submit(op, done),
        };
        if len == 0 || offset % BLOCK_BYTES != 0 || len % BLOCK_BYTES != 0 {
            return done(Err(BlockError(errno::EINVAL)));
        }
        match op {
            BlockOp::Read { offset, len } => self.read(offset, len, done),
            BlockOp::Write { offset, data, fua } => self.write(offset, &data, fua, done),
            op @ (BlockOp::Zero { .. } | BlockOp::Flush) => self.inner.submit(op, done),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use holdfast_storage_core::encryption::VolumeKey;

    use super::*;

    const BLOCK: usize = BLOCK_BYTES as usize;

    /// A disk in memory that answers at once.
    struct Memory(Mutex<Vec<u8>>);

    impl BlockDevice for Memory {
        fn size_bytes(&self) -> u64 {
            self.0.lock().unwrap().len() as u64
        }

        fn submit(&self, op: BlockOp, done: Completion) {
            let mut bytes = self.0.lock().unwrap();
            let at = |offset: u64| usize::try_from(offset).unwrap();
            let answer = match op {
                BlockOp::Read { offset, len } => Bytes::copy_from_slice(&bytes[at(offset)..][..len as usize]),
                BlockOp::Write { offset, data, .. } => {
                    bytes[at(offset)..][..data.len()].copy_from_slice(&data);
                    Bytes::new()
                }
                BlockOp::Zero { offset, len, .. } => {
                    bytes[at(offset)..][..at(len)].fill(0);
                    Bytes::new()
                }
                BlockOp::Flush => Bytes::new(),
            };
            drop(bytes);
            done(Ok(answer));
        }
    }

    fn mk_device() -> (Arc<Memory>, EncryptedDevice) {
        let memory = Arc::new(Memory(Mutex::new(vec![0; 8 * BLOCK])));
        let cipher = VolumeKey::from_bytes(&[3; 64]).unwrap().cipher();
        (Arc::clone(&memory), EncryptedDevice::new(memory as Arc<dyn BlockDevice>, Arc::new(cipher)))
    }

    fn run(device: &EncryptedDevice, op: BlockOp) -> Result<Bytes, BlockError> {
        let (sender, receiver) = std::sync::mpsc::channel();
        device.submit(op, Box::new(move |result| sender.send(result).unwrap()));
        receiver.try_recv().unwrap()
    }

    fn write(offset: u64, data: Vec<u8>) -> BlockOp {
        BlockOp::Write { offset, data: data.into(), fua: false }
    }

    #[test]
    fn what_is_written_is_read_and_below_it_is_nothing_of_it_but_zeroes() {
        let (memory, device) = mk_device();
        run(&device, write(BLOCK_BYTES, vec![7; 3 * BLOCK])).unwrap();
        run(&device, BlockOp::Zero { offset: 2 * BLOCK_BYTES, len: BLOCK_BYTES, fua: false, trim: true })
            .unwrap();
        let read = run(&device, BlockOp::Read { offset: 0, len: 5 * 4096 }).unwrap();
        for (block, content) in [0, 7, 0, 7, 0].into_iter().enumerate() {
            assert!(read[block * BLOCK..][..BLOCK].iter().all(|byte| *byte == content), "block {block}");
        }
        let below = memory.0.lock().unwrap();
        assert!(!below.windows(8).any(|part| part == [7; 8]));
        assert!(below[2 * BLOCK..3 * BLOCK].iter().all(|byte| *byte == 0));
    }

    #[test]
    fn parts_of_blocks_and_what_would_read_as_zeroes_are_refused_and_change_nothing() {
        let (memory, device) = mk_device();
        for op in [
            write(512, vec![1; BLOCK]),
            write(0, vec![1; 512]),
            write(0, Vec::new()),
            BlockOp::Read { offset: 0, len: 512 },
            BlockOp::Zero { offset: 0, len: 512, fua: false, trim: false },
        ] {
            assert_eq!(run(&device, op).unwrap_err(), BlockError(errno::EINVAL));
        }
        // What the cipher makes of zeroes is the text that has none; the device itself never asks for it.
        let xts = VolumeKey::from_bytes(&[3; 64]).unwrap().cipher();
        let unwritable = xts.unwritable(Block(1));
        assert_eq!(run(&device, write(BLOCK_BYTES, unwritable)).unwrap_err(), BlockError(errno::EIO));
        assert!(memory.0.lock().unwrap().iter().all(|byte| *byte == 0));
        assert!(run(&device, BlockOp::Flush).is_ok());
    }
}
