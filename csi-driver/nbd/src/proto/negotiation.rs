//! Handshake and options.

use super::{DecodeError, Fields, NAME_BYTES_MAX, handshake_flag, text};

/// "NBDMAGIC": the first bytes of a server.
pub const MAGIC_GREETING: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": the second eight bytes of a server, and the start of each option.
pub const MAGIC_OPTION: u64 = 0x4948_4156_454f_5054;
const MAGIC_OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;

/// Longest data of an option or of an option's reply that we read; an option beyond it is refused with
/// NBD_REP_ERR_TOO_BIG and skipped, a reply beyond it ends the connection. Three names and change fit.
pub const OPTION_BYTES_MAX: u32 = 16 << 10;
/// Zero bytes after the answer to NBD_OPT_EXPORT_NAME, where the two sides did not agree to leave them out.
pub const EXPORT_NAME_ZEROES: usize = 124;
/// Queries or requests in one option; more are refused as invalid.
const OPTION_ITEMS_MAX: usize = 64;

/// Numbers of options.
pub mod option {
    /// Opens an export without a way to refuse but closing.
    pub const EXPORT_NAME: u32 = 1;
    /// Ends the negotiation.
    pub const ABORT: u32 = 2;
    /// Asks for the names of exports.
    pub const LIST: u32 = 3;
    /// Turns the stream into TLS.
    pub const STARTTLS: u32 = 5;
    /// Asks about an export.
    pub const INFO: u32 = 6;
    /// Opens an export.
    pub const GO: u32 = 7;
    /// Agrees on structured replies.
    pub const STRUCTURED_REPLY: u32 = 8;
    /// Asks for an export's metadata contexts.
    pub const LIST_META_CONTEXT: u32 = 9;
    /// Chooses an export's metadata contexts.
    pub const SET_META_CONTEXT: u32 = 10;
    /// Agrees on extended headers.
    pub const EXTENDED_HEADERS: u32 = 11;
}

/// Kinds of replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// One export's name.
    pub const SERVER: u32 = 2;
    /// One piece of information about an export.
    pub const INFO: u32 = 3;
    /// One metadata context.
    pub const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub const ERROR: u32 = 1 << 31;
    /// The option is unknown.
    pub const ERR_UNSUP: u32 = ERROR | 1;
    /// Not allowed.
    pub const ERR_POLICY: u32 = ERROR | 2;
    /// The option's data makes no sense.
    pub const ERR_INVALID: u32 = ERROR | 3;
    /// TLS is needed first.
    pub const ERR_TLS_REQD: u32 = ERROR | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = ERROR | 6;
    /// The server cannot serve it now.
    pub const ERR_SHUTDOWN: u32 = ERROR | 7;
    /// The option's data is too long, or asks for too much.
    pub const ERR_TOO_BIG: u32 = ERROR | 9;
    /// Extended headers are agreed on, or needed.
    pub const ERR_EXT_HEADER_REQD: u32 = ERROR | 10;
}

/// Kinds of information about an export.
pub mod info {
    /// Size and flags.
    pub const EXPORT: u16 = 0;
    /// The export's own name.
    pub const NAME: u16 = 1;
    /// A text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest, preferred and largest request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// The fixed part of an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionHeader {
    /// Which option.
    pub option: u32,
    /// Bytes that follow.
    pub len: u32,
}

impl OptionHeader {
    /// Bytes on the wire.
    pub const BYTES: usize = 16;

    /// Reads the fixed part.
    ///
    /// # Errors
    /// A wrong magic number.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new(bytes);
        let found = fields.u64("an option")?;
        if found != MAGIC_OPTION {
            return Err(DecodeError::Magic { expected: "an option", found });
        }
        Ok(Self { option: fields.u32("an option")?, len: fields.u32("an option")? })
    }
}

/// What a client asks for during negotiation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ClientOption {
    /// NBD_OPT_EXPORT_NAME.
    ExportName(String),
    /// NBD_OPT_ABORT.
    Abort,
    /// NBD_OPT_LIST.
    List,
    /// NBD_OPT_STARTTLS.
    StartTls,
    /// NBD_OPT_INFO or NBD_OPT_GO.
    Open {
        /// GO: enter the transmission phase after the answer.
        go: bool,
        /// The export's name.
        name: String,
        /// The kinds of information wanted, see [`info`].
        wants: Vec<u16>,
    },
    /// NBD_OPT_STRUCTURED_REPLY.
    StructuredReply,
    /// NBD_OPT_EXTENDED_HEADERS.
    ExtendedHeaders,
    /// NBD_OPT_LIST_META_CONTEXT or NBD_OPT_SET_META_CONTEXT.
    MetaContext {
        /// SET: the contexts answered are chosen.
        set: bool,
        /// The export's name.
        name: String,
        /// Which contexts, as `namespace:leaf`.
        queries: Vec<String>,
    },
    /// One that we do not know.
    Unknown(u32),
}

impl ClientOption {
    /// Reads an option's data.
    ///
    /// # Errors
    /// Data that does not fit the option; the header was fine, so the negotiation can go on.
    pub fn decode(option: u32, data: &[u8]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new(data);
        let decoded = match option {
            option::EXPORT_NAME => {
                if data.len() > NAME_BYTES_MAX {
                    return Err(DecodeError::Length("an export name"));
                }
                return Ok(Self::ExportName(text(data, "an export name")?));
            }
            option::ABORT => return Ok(Self::Abort),
            option::LIST => Self::List,
            option::STARTTLS => Self::StartTls,
            option::STRUCTURED_REPLY => Self::StructuredReply,
            option::EXTENDED_HEADERS => Self::ExtendedHeaders,
            option::INFO | option::GO => {
                let name = fields.name("an export name")?;
                let count = usize::from(fields.u16("a list of information requests")?);
                let wants = (0..count).map(|_| fields.u16("a list of information requests"));
                Self::Open { go: option == option::GO, name, wants: wants.collect::<Result<_, _>>()? }
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => {
                let name = fields.name("an export name")?;
                let count = fields.u32("a list of contexts")? as usize;
                if count > OPTION_ITEMS_MAX {
                    return Err(DecodeError::Length("a list of contexts"));
                }
                let queries = (0..count).map(|_| fields.name("a context"));
                Self::MetaContext {
                    set: option == option::SET_META_CONTEXT,
                    name,
                    queries: queries.collect::<Result<_, _>>()?,
                }
            }
            unknown => return Ok(Self::Unknown(unknown)),
        };
        fields.end("an option")?;
        Ok(decoded)
    }

    /// Its number.
    #[must_use]
    pub fn number(&self) -> u32 {
        match self {
            Self::ExportName(_) => option::EXPORT_NAME,
            Self::Abort => option::ABORT,
            Self::List => option::LIST,
            Self::StartTls => option::STARTTLS,
            Self::Open { go: true, .. } => option::GO,
            Self::Open { go: false, .. } => option::INFO,
            Self::StructuredReply => option::STRUCTURED_REPLY,
            Self::ExtendedHeaders => option::EXTENDED_HEADERS,
            Self::MetaContext { set: true, .. } => option::SET_META_CONTEXT,
            Self::MetaContext { set: false, .. } => option::LIST_META_CONTEXT,
            Self::Unknown(number) => *number,
        }
    }

    /// Appends header and data.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let mut data = Vec::new();
        match self {
            Self::ExportName(name) => data.extend_from_slice(name.as_bytes()),
            Self::Abort
            | Self::List
            | Self::StartTls
            | Self::StructuredReply
            | Self::ExtendedHeaders
            | Self::Unknown(_) => {}
            Self::Open { name, wants, .. } => {
                put_name(&mut data, name);
                data.extend_from_slice(&u16::try_from(wants.len()).unwrap_or(u16::MAX).to_be_bytes());
                for want in wants.iter().take(usize::from(u16::MAX)) {
                    data.extend_from_slice(&want.to_be_bytes());
                }
            }
            Self::MetaContext { name, queries, .. } => {
                put_name(&mut data, name);
                data.extend_from_slice(&len32(queries.len()).to_be_bytes());
                for query in queries {
                    put_name(&mut data, query);
                }
            }
        }
        out.extend_from_slice(&MAGIC_OPTION.to_be_bytes());
        out.extend_from_slice(&self.number().to_be_bytes());
        out.extend_from_slice(&len32(data.len()).to_be_bytes());
        out.extend_from_slice(&data);
    }
}

/// The fixed part of a reply to an option.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OptionReplyHeader {
    /// The option it answers.
    pub option: u32,
    /// See [`reply`].
    pub kind: u32,
    /// Bytes that follow.
    pub len: u32,
}

impl OptionReplyHeader {
    /// Bytes on the wire.
    pub const BYTES: usize = 20;

    /// Reads the fixed part.
    ///
    /// # Errors
    /// A wrong magic number.
    pub fn decode(bytes: &[u8; Self::BYTES]) -> Result<Self, DecodeError> {
        let mut fields = Fields::new(bytes);
        let found = fields.u64("an option's reply")?;
        if found != MAGIC_OPTION_REPLY {
            return Err(DecodeError::Magic { expected: "an option's reply", found });
        }
        let mut next = || fields.u32("an option's reply");
        Ok(Self { option: next()?, kind: next()?, len: next()? })
    }

    /// Whether it refuses the option.
    #[must_use]
    pub fn is_error(&self) -> bool {
        self.kind & reply::ERROR != 0
    }
}

/// The server's first 18 bytes.
#[must_use]
pub fn encode_greeting() -> [u8; 18] {
    let mut greeting = [0; 18];
    greeting[..8].copy_from_slice(&MAGIC_GREETING.to_be_bytes());
    greeting[8..16].copy_from_slice(&MAGIC_OPTION.to_be_bytes());
    greeting[16..]
        .copy_from_slice(&(handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES).to_be_bytes());
    greeting
}

/// Size and flags of an export.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExportSummary {
    /// Size in bytes.
    pub size_bytes: u64,
    /// See [`super::transmission_flag`].
    pub flags: u16,
}

/// The constraints on requests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    /// Smallest unit.
    pub min: u32,
    /// Unit for best speed.
    pub preferred: u32,
    /// Largest payload.
    pub max: u32,
}

impl BlockSizes {
    /// Whether they are what the specification allows: powers of two that fit each other, the smallest at most 64 KiB.
    #[must_use]
    pub fn make_sense(&self) -> bool {
        self.min.is_power_of_two()
            && self.min <= 1 << 16
            && self.preferred.is_power_of_two()
            && self.preferred >= self.min.max(512)
            && self.max >= self.preferred
    }
}

/// One piece of information about an export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum InfoReply {
    /// NBD_INFO_EXPORT.
    Export(ExportSummary),
    /// NBD_INFO_NAME.
    Name(String),
    /// NBD_INFO_DESCRIPTION.
    Description(String),
    /// NBD_INFO_BLOCK_SIZE.
    BlockSizes(BlockSizes),
    /// One that we do not use.
    Other(u16),
}

/// Reads the data of an NBD_REP_INFO.
///
/// # Errors
/// A length that does not fit the kind, or block sizes that the specification forbids.
pub fn decode_info_reply(data: &[u8]) -> Result<InfoReply, DecodeError> {
    const WHAT: &str = "information about an export";
    let mut fields = Fields::new(data);
    let kind = fields.u16(WHAT)?;
    let decoded = match kind {
        info::EXPORT => {
            InfoReply::Export(ExportSummary { size_bytes: fields.u64(WHAT)?, flags: fields.u16(WHAT)? })
        }
        info::BLOCK_SIZE => {
            let sizes =
                BlockSizes { min: fields.u32(WHAT)?, preferred: fields.u32(WHAT)?, max: fields.u32(WHAT)? };
            if !sizes.make_sense() {
                return Err(DecodeError::Value(WHAT));
            }
            InfoReply::BlockSizes(sizes)
        }
        info::NAME => return Ok(InfoReply::Name(bounded_text(fields.rest(), WHAT)?)),
        info::DESCRIPTION => return Ok(InfoReply::Description(bounded_text(fields.rest(), WHAT)?)),
        other => return Ok(InfoReply::Other(other)),
    };
    fields.end(WHAT)?;
    Ok(decoded)
}

/// Reads the data of an NBD_REP_META_CONTEXT: the context's number and name.
///
/// # Errors
/// Less than a number, or a name that is not UTF-8.
pub fn decode_meta_context_reply(data: &[u8]) -> Result<(u32, String), DecodeError> {
    let mut fields = Fields::new(data);
    let id = fields.u32("a metadata context")?;
    Ok((id, bounded_text(fields.rest(), "a metadata context")?))
}

/// Reads the data of an NBD_REP_SERVER: an export's name. What may follow it is for people and not looked at.
///
/// # Errors
/// A length that lies, or a name that is not UTF-8.
pub fn decode_server_reply(data: &[u8]) -> Result<String, DecodeError> {
    Fields::new(data).name("an export's name")
}

/// Reads the answer to NBD_OPT_EXPORT_NAME, without the zeroes that may follow.
#[must_use]
pub fn decode_export_name_answer(bytes: [u8; 10]) -> ExportSummary {
    let [size @ .., flags_high, flags_low] = bytes;
    ExportSummary { size_bytes: u64::from_be_bytes(size), flags: u16::from_be_bytes([flags_high, flags_low]) }
}

/// Appends a reply to `option`.
pub fn encode_option_reply(out: &mut Vec<u8>, option: u32, kind: u32, data: &[u8]) {
    out.extend_from_slice(&MAGIC_OPTION_REPLY.to_be_bytes());
    out.extend_from_slice(&option.to_be_bytes());
    out.extend_from_slice(&kind.to_be_bytes());
    out.extend_from_slice(&len32(data.len()).to_be_bytes());
    out.extend_from_slice(data);
}

/// Appends an NBD_REP_SERVER with one export's name.
pub fn encode_server_reply(out: &mut Vec<u8>, name: &str) {
    let mut data = Vec::with_capacity(4 + name.len());
    put_name(&mut data, name);
    encode_option_reply(out, option::LIST, reply::SERVER, &data);
}

/// Appends an NBD_REP_INFO with NBD_INFO_EXPORT.
pub fn encode_info_export(out: &mut Vec<u8>, option: u32, summary: ExportSummary) {
    let mut data = Vec::with_capacity(12);
    data.extend_from_slice(&info::EXPORT.to_be_bytes());
    data.extend_from_slice(&summary.size_bytes.to_be_bytes());
    data.extend_from_slice(&summary.flags.to_be_bytes());
    encode_option_reply(out, option, reply::INFO, &data);
}

/// Appends an NBD_REP_INFO with NBD_INFO_BLOCK_SIZE.
pub fn encode_info_block_size(out: &mut Vec<u8>, option: u32, sizes: BlockSizes) {
    let mut data = Vec::with_capacity(14);
    data.extend_from_slice(&info::BLOCK_SIZE.to_be_bytes());
    for size in [sizes.min, sizes.preferred, sizes.max] {
        data.extend_from_slice(&size.to_be_bytes());
    }
    encode_option_reply(out, option, reply::INFO, &data);
}

/// Appends an NBD_REP_INFO with a text: [`info::NAME`] or [`info::DESCRIPTION`].
pub fn encode_info_text(out: &mut Vec<u8>, option: u32, kind: u16, text: &str) {
    let mut data = kind.to_be_bytes().to_vec();
    data.extend_from_slice(text.as_bytes());
    encode_option_reply(out, option, reply::INFO, &data);
}

/// Appends an NBD_REP_META_CONTEXT.
pub fn encode_meta_context_reply(out: &mut Vec<u8>, option: u32, id: u32, context: &str) {
    let mut data = id.to_be_bytes().to_vec();
    data.extend_from_slice(context.as_bytes());
    encode_option_reply(out, option, reply::META_CONTEXT, &data);
}

/// Appends the answer to NBD_OPT_EXPORT_NAME, which has a form of its own.
pub fn encode_export_name_answer(out: &mut Vec<u8>, summary: ExportSummary, no_zeroes: bool) {
    out.extend_from_slice(&summary.size_bytes.to_be_bytes());
    out.extend_from_slice(&summary.flags.to_be_bytes());
    if !no_zeroes {
        out.extend_from_slice(&[0; EXPORT_NAME_ZEROES]);
    }
}

fn bounded_text(bytes: &[u8], what: &'static str) -> Result<String, DecodeError> {
    if bytes.len() > NAME_BYTES_MAX {
        return Err(DecodeError::Length(what));
    }
    text(bytes, what)
}

fn put_name(out: &mut Vec<u8>, name: &str) {
    out.extend_from_slice(&len32(name.len()).to_be_bytes());
    out.extend_from_slice(name.as_bytes());
}

fn len32(len: usize) -> u32 {
    u32::try_from(len).expect("names and lists of ours are far below 4 GiB")
}
