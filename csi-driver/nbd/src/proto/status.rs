//! Extents, and which contexts they are asked for.

use super::{CONTEXTS_MAX, DecodeError, Fields, Framing};
use crate::provider::Extent;

/// Extents in one status reply; what lies beyond is left to the next request. The specification allows 2^20.
pub const STATUS_EXTENTS_MAX: usize = 4096;
/// Longest payload of a request that names contexts.
pub const STATUS_FILTER_BYTES_MAX: usize = 8 + 4 * CONTEXTS_MAX;
/// Longest extent in 32 bits that ends at a region's border; a longer one is cut there.
const COMPACT_EXTENT_BYTES_MAX: u64 = 0xfff0_0000;

/// Longest payload of a status chunk that we read.
#[must_use]
pub fn status_chunk_bytes_max(framing: Framing) -> u64 {
    let (head, each) = if framing.is_extended() { (8, 16) } else { (4, 8) };
    head + each * STATUS_EXTENTS_MAX as u64
}

/// The payload of a status chunk. In 32 bits the list ends with the first extent that had to be cut.
#[must_use]
pub fn encode_status_chunk(framing: Framing, context_id: u32, extents: &[Extent]) -> Vec<u8> {
    let mut data = Vec::with_capacity(8 + 16 * extents.len());
    data.extend_from_slice(&context_id.to_be_bytes());
    if framing.is_extended() {
        let count = u32::try_from(extents.len()).expect("at most 4,096 extents");
        data.extend_from_slice(&count.to_be_bytes());
        for extent in extents {
            data.extend_from_slice(&extent.len.to_be_bytes());
            data.extend_from_slice(&u64::from(extent.state).to_be_bytes());
        }
        return data;
    }
    for extent in extents {
        let len = extent.len.min(COMPACT_EXTENT_BYTES_MAX);
        data.extend_from_slice(&u32::try_from(len).expect("cut to 32 bits").to_be_bytes());
        data.extend_from_slice(&extent.state.to_be_bytes());
        if len < extent.len {
            break;
        }
    }
    data
}

/// Reads a status chunk's payload: context and extents.
///
/// # Errors
/// No extent, an empty one, half a one, another number of them than told, or a state of more than 32 bits, which no
/// context of ours has.
pub fn decode_status_chunk(framing: Framing, data: &[u8]) -> Result<(u32, Vec<Extent>), DecodeError> {
    const WHAT: &str = "a block status reply";
    let mut fields = Fields::new(data);
    let context_id = fields.u32(WHAT)?;
    let extended = framing.is_extended();
    let told = if extended { Some(fields.u32(WHAT)? as usize) } else { None };
    let mut extents = Vec::with_capacity(fields.rest().len() / if extended { 16 } else { 8 });
    while !fields.is_empty() {
        let (len, state) = if extended {
            let (len, state) = (fields.u64(WHAT)?, fields.u64(WHAT)?);
            (len, u32::try_from(state).map_err(|_| DecodeError::Value(WHAT))?)
        } else {
            (u64::from(fields.u32(WHAT)?), fields.u32(WHAT)?)
        };
        if len == 0 {
            return Err(DecodeError::Length(WHAT));
        }
        extents.push(Extent { len, state });
    }
    if extents.is_empty() || told.is_some_and(|told| told != extents.len()) {
        return Err(DecodeError::Length(WHAT));
    }
    Ok((context_id, extents))
}

/// The payload of a status request that names the contexts wanted: how much of the export is meant, and their numbers.
#[must_use]
pub fn encode_status_filter(len: u64, context_ids: &[u32]) -> Vec<u8> {
    let mut data = len.to_be_bytes().to_vec();
    context_ids.iter().for_each(|id| data.extend_from_slice(&id.to_be_bytes()));
    data
}

/// Reads [`encode_status_filter`].
///
/// # Errors
/// No context, half a number, one that stands there twice, or too many.
pub fn decode_status_filter(data: &[u8]) -> Result<(u64, Vec<u32>), DecodeError> {
    const WHAT: &str = "a list of contexts";
    let mut fields = Fields::new(data);
    let len = fields.u64(WHAT)?;
    let mut ids = Vec::new();
    while !fields.is_empty() {
        let id = fields.u32(WHAT)?;
        if ids.contains(&id) || ids.len() == CONTEXTS_MAX {
            return Err(DecodeError::Value(WHAT));
        }
        ids.push(id);
    }
    if ids.is_empty() { Err(DecodeError::Length(WHAT)) } else { Ok((len, ids)) }
}
