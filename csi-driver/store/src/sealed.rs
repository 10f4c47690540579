//! Sealed pages: the common frame of every header and slot, so that damage and later versions are told apart.
//!
//! ```text
//!  0        8         12        16        20             20+len
//!  ├ magic ─┼ version ┼ crc32c ─┼ len ────┼ payload … ───┤ zeroes to the page's end
//! ```
//!
//! The frame itself is the same in every version, so that a flipped bit in `version` is damage and not the future.

/// Bytes before the payload.
pub const FRAME_BYTES: usize = 20;

/// What is wrong with a page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BadPage {
    /// Not ours, or its checksum does not match.
    Damaged(&'static str),
    /// Intact, of a later version.
    Future {
        /// Its version.
        found: u32,
    },
}

/// Writes `payload` into a page of `page_bytes`, which must have room for it.
pub fn seal(magic: &[u8; 8], version: u32, payload: &[u8], page: &mut [u8]) {
    let end = FRAME_BYTES + payload.len();
    assert!(end <= page.len(), "the payload has {} bytes, the page {}", payload.len(), page.len());
    let len = u32::try_from(payload.len()).expect("a page is far smaller than 4 GiB");
    page.fill(0);
    page[..8].copy_from_slice(magic);
    page[8..12].copy_from_slice(&version.to_le_bytes());
    page[16..20].copy_from_slice(&len.to_le_bytes());
    page[FRAME_BYTES..end].copy_from_slice(payload);
    let crc = crc32c::crc32c(page);
    page[12..16].copy_from_slice(&crc.to_le_bytes());
}

/// The payload of a page that is intact and of version `known` or earlier.
pub fn unseal<'page>(magic: &[u8; 8], known: u32, page: &'page [u8]) -> Result<&'page [u8], BadPage> {
    if page.len() < FRAME_BYTES || page[..8] != magic[..] {
        return Err(BadPage::Damaged("it does not begin with its format's name"));
    }
    let stored = u32_at(page, 12);
    let unsealed =
        crc32c::crc32c_append(crc32c::crc32c_append(crc32c::crc32c(&page[..12]), &[0; 4]), &page[16..]);
    if stored != unsealed {
        return Err(BadPage::Damaged("its header does not match its checksum"));
    }
    let found = u32_at(page, 8);
    if found > known {
        return Err(BadPage::Future { found });
    }
    page.get(FRAME_BYTES..FRAME_BYTES + u32_at(page, 16) as usize)
        .ok_or(BadPage::Damaged("its payload is longer than its page"))
}

/// Little-endian number at `at`.
pub fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

/// Little-endian number at `at`.
pub fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

/// Little-endian number at `at`.
pub fn u128_at(bytes: &[u8], at: usize) -> u128 {
    u128::from_le_bytes(bytes[at..at + 16].try_into().expect("sixteen bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAGIC: &[u8; 8] = b"HFTESTPG";

    #[test]
    fn payload_survives_and_every_flipped_bit_is_damage_never_the_future() {
        let mut page = vec![0; 512];
        seal(MAGIC, 3, b"payload", &mut page);
        assert_eq!(unseal(MAGIC, 3, &page), Ok(&b"payload"[..]));
        for bit in 0..page.len() * 8 {
            page[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(unseal(MAGIC, 3, &page), Err(BadPage::Damaged(_))), "bit {bit}");
            page[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_later_version_is_named() {
        let mut page = vec![0; 512];
        seal(MAGIC, 9, b"", &mut page);
        assert_eq!(unseal(MAGIC, 3, &page), Err(BadPage::Future { found: 9 }));
    }
}
