//! Netlink messages and attributes as bytes.
//!
//! Headers are in host byte order, nf_tables numbers in network byte order, as the kernel's `linux/netlink.h` and
//! `linux/netfilter/nf_tables.h` lay them out. Attributes are padded to four bytes.

/// `NLM_F_REQUEST`
pub const F_REQUEST: u16 = 0x1;
/// `NLM_F_ACK`
pub const F_ACK: u16 = 0x4;
/// `NLM_F_ROOT | NLM_F_MATCH`
pub const F_DUMP: u16 = 0x300;
/// `NLM_F_REPLACE`
pub const F_REPLACE: u16 = 0x100;
/// `NLM_F_CREATE`
pub const F_CREATE: u16 = 0x400;
/// `NLM_F_APPEND`
pub const F_APPEND: u16 = 0x800;
/// `NLM_F_DUMP_INTR`: the state changed during a dump, which may have missed something.
pub const F_DUMP_INTR: u16 = 0x10;
/// `NLMSG_ERROR`
pub const MSG_ERROR: u16 = 2;
/// `NLMSG_DONE`
pub const MSG_DONE: u16 = 3;
/// `NLA_F_NESTED`
const NESTED: u16 = 0x8000;
/// Flags of an attribute's type: nested, network byte order.
const TYPE_MASK: u16 = 0x3fff;
/// Length of `struct nlmsghdr`.
pub const HEADER_LEN: usize = 16;
/// Length of `struct nfgenmsg`.
pub const NFGEN_LEN: usize = 4;
/// An attribute's length is a u16; a list is closed well before, because the kernel silently truncates beyond.
pub const ATTR_BYTES_MAX: usize = 60_000;

/// Host byte order: netlink headers, marks in registers and sets.
#[expect(clippy::host_endian_bytes, reason = "the kernel reads these fields in host byte order")]
pub fn host32(value: u32) -> [u8; 4] {
    value.to_ne_bytes()
}

/// The inverse of [`host32`].
#[expect(clippy::host_endian_bytes, reason = "the kernel writes these fields in host byte order")]
pub fn from_host32(bytes: [u8; 4]) -> u32 {
    u32::from_ne_bytes(bytes)
}

/// Host byte order, 64 bits.
#[expect(clippy::host_endian_bytes, reason = "the kernel reads these fields in host byte order")]
pub fn host64(value: u64) -> [u8; 8] {
    value.to_ne_bytes()
}

/// The inverse of [`host64`].
#[expect(clippy::host_endian_bytes, reason = "the kernel writes these fields in host byte order")]
pub fn from_host64(bytes: [u8; 8]) -> u64 {
    u64::from_ne_bytes(bytes)
}

/// Host byte order, 16 bits.
#[expect(clippy::host_endian_bytes, reason = "the kernel reads these fields in host byte order")]
fn host16(value: u16) -> [u8; 2] {
    value.to_ne_bytes()
}

#[expect(clippy::host_endian_bytes, reason = "the kernel writes these fields in host byte order")]
fn from_host16(bytes: [u8; 2]) -> u16 {
    u16::from_ne_bytes(bytes)
}

/// Messages under construction, one after the other.
#[derive(Debug, Default)]
pub struct Buffer {
    bytes: Vec<u8>,
}

impl Buffer {
    /// The bytes so far.
    pub fn as_slice(&self) -> &[u8] {
        &self.bytes
    }

    /// Bytes so far.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Starts a message of `kind` with its `nfgenmsg`; end it with [`Buffer::end_message`].
    pub fn begin_message(&mut self, kind: u16, flags: u16, seq: u32, family: u8, res_id: u16) -> usize {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&host32(0));
        self.bytes.extend_from_slice(&host16(kind));
        self.bytes.extend_from_slice(&host16(flags));
        self.bytes.extend_from_slice(&host32(seq));
        self.bytes.extend_from_slice(&host32(0));
        self.bytes.extend_from_slice(&[family, 0]);
        self.bytes.extend_from_slice(&res_id.to_be_bytes());
        start
    }

    /// Writes the length of the message that began at `start`.
    pub fn end_message(&mut self, start: usize) {
        let len = u32::try_from(self.bytes.len() - start).unwrap_or(u32::MAX);
        self.bytes[start..start + 4].copy_from_slice(&host32(len));
    }

    /// Adds flags to the message that began at `start`.
    pub fn add_flags(&mut self, start: usize, flags: u16) {
        let old = from_host16([self.bytes[start + 6], self.bytes[start + 7]]);
        self.bytes[start + 6..start + 8].copy_from_slice(&host16(old | flags));
    }

    /// An attribute of raw bytes.
    pub fn attr(&mut self, kind: u16, payload: &[u8]) {
        let len = u16::try_from(payload.len() + 4).unwrap_or(u16::MAX);
        self.bytes.extend_from_slice(&host16(len));
        self.bytes.extend_from_slice(&host16(kind));
        self.bytes.extend_from_slice(payload);
        self.pad();
    }

    /// A big-endian u32, the usual nf_tables number.
    pub fn be32(&mut self, kind: u16, value: u32) {
        self.attr(kind, &value.to_be_bytes());
    }

    /// A big-endian u64.
    pub fn be64(&mut self, kind: u16, value: u64) {
        self.attr(kind, &value.to_be_bytes());
    }

    /// A string with its terminating zero.
    pub fn string(&mut self, kind: u16, text: &str) {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.attr(kind, &bytes);
    }

    /// An attribute that holds the attributes `fill` writes.
    pub fn nest(&mut self, kind: u16, fill: impl FnOnce(&mut Self)) {
        let start = self.begin_nest(kind);
        fill(self);
        self.end_nest(start);
    }

    /// Opens a nested attribute.
    pub fn begin_nest(&mut self, kind: u16) -> usize {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&host16(0));
        self.bytes.extend_from_slice(&host16(kind | NESTED));
        start
    }

    /// Closes the nested attribute that began at `start`.
    pub fn end_nest(&mut self, start: usize) {
        let len = u16::try_from(self.bytes.len() - start).unwrap_or(u16::MAX);
        self.bytes[start..start + 2].copy_from_slice(&host16(len));
    }

    fn pad(&mut self) {
        while !self.bytes.len().is_multiple_of(4) {
            self.bytes.push(0);
        }
    }
}

/// One received message.
#[derive(Debug, Clone, Copy)]
pub struct Message<'a> {
    /// Its type.
    pub kind: u16,
    /// Its flags.
    pub flags: u16,
    /// Sequence number of the request it answers.
    pub seq: u32,
    /// The socket it comes from or, in a notification, whose request caused it.
    pub port: u32,
    /// What follows the netlink header.
    pub body: &'a [u8],
}

impl<'a> Message<'a> {
    /// The attributes after the `nfgenmsg`.
    pub fn attrs(&self) -> Attrs<'a> {
        Attrs { rest: self.body.get(NFGEN_LEN..).unwrap_or(&[]) }
    }

    /// The errno of an error message (0: acknowledgement), positive.
    pub fn errno(&self) -> Option<i32> {
        let code: [u8; 4] = self.body.get(..4)?.try_into().ok()?;
        (self.kind == MSG_ERROR || self.kind == MSG_DONE).then(|| -(from_host32(code).cast_signed()))
    }
}

/// Splits a datagram into messages.
pub fn messages(mut bytes: &[u8]) -> impl Iterator<Item = Message<'_>> {
    std::iter::from_fn(move || {
        let header = bytes.get(..HEADER_LEN)?;
        let len = from_host32(header[0..4].try_into().ok()?) as usize;
        let message = Message {
            kind: from_host16([header[4], header[5]]),
            flags: from_host16([header[6], header[7]]),
            port: from_host32(header[12..16].try_into().ok()?),
            seq: from_host32(header[8..12].try_into().ok()?),
            body: bytes.get(HEADER_LEN..len)?,
        };
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some(message)
    })
}

/// Iterates over attributes: (type, payload).
#[derive(Debug, Clone, Copy)]
pub struct Attrs<'a> {
    rest: &'a [u8],
}

impl<'a> Attrs<'a> {
    /// The attributes in a nested payload.
    pub fn of(payload: &'a [u8]) -> Self {
        Self { rest: payload }
    }

    /// The payload of the first attribute of `kind`.
    pub fn find(mut self, kind: u16) -> Option<&'a [u8]> {
        self.by_ref().find(|(k, _)| *k == kind).map(|(_, payload)| payload)
    }

    /// A big-endian u32.
    pub fn u32(self, kind: u16) -> Option<u32> {
        Some(u32::from_be_bytes(self.find(kind)?.try_into().ok()?))
    }

    /// A big-endian u64.
    pub fn u64(self, kind: u16) -> Option<u64> {
        Some(u64::from_be_bytes(self.find(kind)?.try_into().ok()?))
    }

    /// A string without its terminating zero.
    pub fn string(self, kind: u16) -> Option<&'a str> {
        std::str::from_utf8(self.find(kind)?).ok().map(|s| s.trim_end_matches('\0'))
    }

    /// The nested attributes of `kind`.
    pub fn nested(self, kind: u16) -> Option<Attrs<'a>> {
        self.find(kind).map(Attrs::of)
    }
}

impl<'a> Iterator for Attrs<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let header = self.rest.get(..4)?;
        let len = usize::from(from_host16([header[0], header[1]]));
        let kind = from_host16([header[2], header[3]]) & TYPE_MASK;
        let payload = self.rest.get(4..len)?;
        self.rest = self.rest.get(len.next_multiple_of(4)..).unwrap_or(&[]);
        Some((kind, payload))
    }
}
