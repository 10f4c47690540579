//! Encryption of a volume's data: what its record keeps, how a secret becomes the key, and the cipher. Bytes in, bytes out; ADR
//! 0007 says what is promised and what is not.
//!
//! ```text
//!   secret ── Argon2id, the record's salt ──> 32 bytes ── HKDF ──> VolumeKey ── HKDF ──> key check (in the record)
//!                                                                      └──> BlockCipher: AES-256-XTS, tweak = block number
//! ```

use std::fmt;

use aes::Aes256;
use aes::cipher::KeyInit;
use argon2::{Algorithm, Argon2, Params, Version};
use hkdf::Hkdf;
use serde::{Deserialize, Serialize};
use sha2::Sha256;
use xts_mode::{Xts128, get_tweak_default};
use zeroize::Zeroizing;

use crate::ids::{BLOCK_BYTES, Block, KeyCheck, Salt};

/// Length of a block in memory.
const BLOCK: usize = BLOCK_BYTES as usize;
/// Bytes of a volume's key: two of AES-256, one for the data and one for the tweaks.
pub const KEY_BYTES: usize = 64;
/// A shorter secret is no secret.
pub const SECRET_BYTES_MIN: usize = 8;
/// Longer ones are refused: nobody types them, and a key file needs no more.
pub const SECRET_BYTES_MAX: usize = 4096;
/// Memory, passes and lanes of Argon2id: the least that OWASP's password storage guide names. They are part of what makes a
/// volume's key and never change.
const ARGON2_KIB: u32 = 19 * 1024;
const ARGON2_PASSES: u32 = 2;
const ARGON2_LANES: u32 = 1;
const KEY_INFO: &[u8] = b"holdfast volume key, aes-256-xts, 1";
const CHECK_INFO: &[u8] = b"holdfast key check, 1";

/// How a volume's data is kept from others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum EncryptionKind {
    /// Not at all.
    #[default]
    None,
    /// AES-256-XTS by the target.
    AesXts,
}

impl EncryptionKind {
    /// Whether nothing is encrypted.
    #[must_use]
    pub fn is_none(&self) -> bool {
        *self == Self::None
    }
}

/// What the record of an encrypted volume keeps: nothing that is secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Encryption {
    /// Drawn when the volume is made; a clone has its source's.
    pub salt: Salt,
    /// Made of the key by the first stage; whose key makes another is refused.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub key_check: Option<KeyCheck>,
}

/// Why a secret gives no key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum KeyError {
    /// It is too short or too long.
    #[error("it has {0} bytes; it must have {SECRET_BYTES_MIN} to {SECRET_BYTES_MAX}")]
    Length(usize),
    /// The derivation failed, for lack of memory perhaps.
    #[error("no key can be derived from it")]
    Derivation,
}

/// A volume's key. Overwritten when it is dropped; never shown.
#[derive(Clone)]
pub struct VolumeKey(Zeroizing<[u8; KEY_BYTES]>);

impl fmt::Debug for VolumeKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("VolumeKey(..)")
    }
}

impl VolumeKey {
    /// The key that a secret and a salt make; the same for ever. Takes 19 MiB and some ten milliseconds of a processor.
    ///
    /// # Errors
    /// See [`KeyError`].
    pub fn derive(secret: &[u8], salt: Salt) -> Result<Self, KeyError> {
        if !(SECRET_BYTES_MIN..=SECRET_BYTES_MAX).contains(&secret.len()) {
            return Err(KeyError::Length(secret.len()));
        }
        let params = Params::new(ARGON2_KIB, ARGON2_PASSES, ARGON2_LANES, Some(32));
        let argon2 =
            Argon2::new(Algorithm::Argon2id, Version::V0x13, params.map_err(|_| KeyError::Derivation)?);
        let mut stretched = Zeroizing::new([0; 32]);
        argon2
            .hash_password_into(secret, &salt.0.to_be_bytes(), stretched.as_mut_slice())
            .map_err(|_| KeyError::Derivation)?;
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        expand(stretched.as_slice(), KEY_INFO, key.as_mut_slice());
        Ok(Self(key))
    }

    /// A key as [`VolumeKey::as_bytes`] gave it; `None` for another length.
    #[must_use]
    pub fn from_bytes(bytes: &[u8]) -> Option<Self> {
        let mut key = Zeroizing::new([0; KEY_BYTES]);
        (bytes.len() == KEY_BYTES).then(|| {
            key.copy_from_slice(bytes);
            Self(key)
        })
    }

    /// The key itself, for the way to the data process.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        self.0.as_slice()
    }

    /// What a record keeps to know the key again.
    #[must_use]
    pub fn check(&self) -> KeyCheck {
        let mut check = [0; 16];
        expand(self.as_bytes(), CHECK_INFO, &mut check);
        KeyCheck(u128::from_be_bytes(check))
    }

    /// The cipher with this key.
    #[must_use]
    pub fn cipher(&self) -> BlockCipher {
        let (data, tweak) = self.as_bytes().split_at(KEY_BYTES / 2);
        let aes = |key: &[u8]| Aes256::new_from_slice(key).expect("half of the key is as long as AES-256's");
        BlockCipher(Xts128::new(aes(data), aes(tweak)))
    }
}

fn expand(from: &[u8], info: &[u8], into: &mut [u8]) {
    Hkdf::<Sha256>::new(None, from).expand(info, into).expect("HKDF gives up to 8160 bytes");
}

/// A write that cannot be kept: its ciphertext would be all zeroes, which means something else.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the ciphertext of a block would be zeroes")]
pub struct ZeroCiphertext;

/// Encrypts and decrypts whole blocks in place. A block of zeroes is no ciphertext: it is what was never written, or was zeroed.
pub struct BlockCipher(Xts128<Aes256>);

impl fmt::Debug for BlockCipher {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("BlockCipher(..)")
    }
}

impl BlockCipher {
    /// Encrypts blocks from `first` on. Panics where `blocks` are not whole ones.
    ///
    /// # Errors
    /// The one plaintext of a block that has no ciphertext; the buffer is of no use then.
    pub fn encrypt(&self, first: Block, blocks: &mut [u8]) -> Result<(), ZeroCiphertext> {
        assert_eq!(blocks.len() % BLOCK, 0, "whole blocks are encrypted");
        self.0.encrypt_area(blocks, BLOCK, u128::from(first.0), get_tweak_default);
        if blocks.chunks_exact(BLOCK).any(is_zero) { Err(ZeroCiphertext) } else { Ok(()) }
    }

    /// The one text of a block that [`BlockCipher::encrypt`] refuses.
    #[must_use]
    pub fn unwritable(&self, block: Block) -> Vec<u8> {
        let mut text = vec![0; BLOCK];
        self.0.decrypt_sector(&mut text, get_tweak_default(u128::from(block.0)));
        text
    }

    /// Decrypts blocks from `first` on; those of zeroes stay zeroes. Panics where `blocks` are not whole ones.
    pub fn decrypt(&self, first: Block, blocks: &mut [u8]) {
        assert_eq!(blocks.len() % BLOCK, 0, "whole blocks are decrypted");
        for (number, block) in (u128::from(first.0)..).zip(blocks.chunks_exact_mut(BLOCK)) {
            if !is_zero(block) {
                self.0.decrypt_sector(block, get_tweak_default(number));
            }
        }
    }
}

fn is_zero(block: &[u8]) -> bool {
    block.iter().all(|byte| *byte == 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_key(first: u8) -> VolumeKey {
        let bytes: Vec<u8> = (0..64).map(|at| at ^ first).collect();
        VolumeKey::from_bytes(&bytes).unwrap()
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    fn mk_ieee_key() -> VolumeKey {
        VolumeKey::from_bytes(&hex(concat!(
            "2718281828459045235360287471352662497757247093699959574966967627",
            "3141592653589793238462643383279502884197169399375105820974944592"
        )))
        .unwrap()
    }

    /// IEEE 1619-2007, annex B, vectors 10, 11 and 12: AES-256, data units of 512 bytes.
    #[test]
    fn the_cipher_is_that_of_ieee_1619_with_the_data_key_first_and_the_unit_s_number_as_tweak() {
        let cipher = mk_ieee_key().cipher();
        let mut unit: Vec<u8> = (0..512_u32).map(|at| at as u8).collect();
        cipher.0.encrypt_area(&mut unit, 512, 0xff, get_tweak_default);
        let begins = hex("1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b");
        let ends = hex("d2092fa755c824bb5e54c4f36ffda9fcea70b9c6e693e148c151");
        assert_eq!(unit[..32], begins);
        assert_eq!(unit[512 - 26..], ends[..]);
    }

    /// Made with OpenSSL's aes-256-xts: block 2^40 + 1, of which byte i is i modulo 251.
    #[test]
    fn a_block_is_one_unit_and_its_number_the_tweak() {
        let cipher = mk_ieee_key().cipher();
        let plain: Vec<u8> = (0..BLOCK).map(|at| (at % 251) as u8).collect();
        let mut block = plain.clone();
        cipher.encrypt(Block((1 << 40) + 1), &mut block).unwrap();
        assert_eq!(block[..16], hex("b77876bd9058a0b4575be1be303cc837")[..]);
        assert_eq!(block[BLOCK - 16..], hex("95942e91100696a48574ad81fc0f7ab6")[..]);
        cipher.decrypt(Block((1 << 40) + 1), &mut block);
        assert_eq!(block, plain);
    }

    #[test]
    fn blocks_encrypted_together_are_those_encrypted_alone_and_each_number_is_another_text() {
        let cipher = mk_key(0).cipher();
        let mut both = vec![7; 2 * BLOCK];
        cipher.encrypt(Block(5), &mut both).unwrap();
        assert_ne!(both[..BLOCK], both[BLOCK..]);
        for (at, number) in [(0, 5), (BLOCK, 6)] {
            let mut alone = vec![7; BLOCK];
            cipher.encrypt(Block(number), &mut alone).unwrap();
            assert_eq!(alone, both[at..at + BLOCK]);
        }
        let mut other = both.clone();
        mk_key(1).cipher().decrypt(Block(5), &mut other);
        assert!(other.iter().any(|byte| *byte != 7), "another key reads nothing");
        cipher.decrypt(Block(5), &mut both);
        assert_eq!(both, vec![7; 2 * BLOCK]);
    }

    #[test]
    fn zeroes_are_read_as_zeroes_and_written_as_ciphertext() {
        let cipher = mk_key(0).cipher();
        let mut blocks = vec![9; 3 * BLOCK];
        cipher.encrypt(Block(0), &mut blocks).unwrap();
        blocks[BLOCK..2 * BLOCK].fill(0);
        cipher.decrypt(Block(0), &mut blocks);
        assert!(blocks[..BLOCK].iter().chain(&blocks[2 * BLOCK..]).all(|byte| *byte == 9));
        assert!(is_zero(&blocks[BLOCK..2 * BLOCK]));
        let mut zeroes = vec![0; BLOCK];
        cipher.encrypt(Block(8), &mut zeroes).unwrap();
        assert!(!is_zero(&zeroes));
        cipher.decrypt(Block(8), &mut zeroes);
        assert!(is_zero(&zeroes));
    }

    #[test]
    fn the_one_text_whose_ciphertext_is_zeroes_is_refused() {
        let cipher = mk_key(0).cipher();
        let unwritable = cipher.unwritable(Block(3));
        assert!(!is_zero(&unwritable));
        assert_eq!(cipher.encrypt(Block(3), &mut unwritable.clone()), Err(ZeroCiphertext));
        assert_eq!(
            cipher.encrypt(Block(4), &mut unwritable.clone()),
            Ok(()),
            "of another block it is a text"
        );
        let mut among = [vec![1; BLOCK], unwritable].concat();
        assert_eq!(cipher.encrypt(Block(2), &mut among), Err(ZeroCiphertext));
    }

    #[test]
    fn a_key_is_made_of_secret_and_salt_and_known_again_by_its_check() {
        let key = VolumeKey::derive(b"correct horse", Salt(1)).unwrap();
        let again = VolumeKey::derive(b"correct horse", Salt(1)).unwrap();
        assert_eq!((key.as_bytes(), key.check()), (again.as_bytes(), again.check()));
        for (secret, salt) in [(b"correct horsf", Salt(1)), (b"correct horse", Salt(2))] {
            assert_ne!(VolumeKey::derive(secret, salt).unwrap().check(), key.check());
        }
        let check = key.check().0.to_be_bytes();
        assert!(!key.as_bytes().windows(4).any(|part| check.windows(4).any(|other| other == part)));
        assert_eq!(VolumeKey::derive(b"short", Salt(1)).unwrap_err(), KeyError::Length(5));
        assert!(VolumeKey::derive(&[7; SECRET_BYTES_MAX + 1], Salt(1)).is_err());
        assert!(VolumeKey::from_bytes(&[1; 63]).is_none());
        assert!(!format!("{key:?} {:?}", key.cipher()).contains(char::is_numeric), "keys are never shown");
    }

    /// What was written with a key must be readable for ever. The check was made by another implementation (OpenSSL's).
    #[test]
    fn the_derivation_never_changes() {
        let key =
            VolumeKey::derive(b"correct horse", Salt(0x0011_2233_4455_6677_8899_aabb_ccdd_eeff)).unwrap();
        assert_eq!(key.check().to_string(), "24a4e98f4a0c559c8f7cb6c7a0a6a86f");
    }
}
