//! Negotiation, the server's side.

use std::sync::Arc;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::payload::{PAYLOAD_BYTES_MAX, read_array, skip};
use crate::proto::{
    self, BlockSizes, CONTEXTS_MAX, ClientOption, ExportSummary, Framing, OPTION_BYTES_MAX, OptionHeader,
    handshake_flag, info, option, reply, transmission_flag as flag,
};
use crate::provider::{Context, Export, ExportProvider, OpenError, PeerIdentity};
use crate::server::{ServeError, ServerTls};

/// Options on one connection; a client that sends more without opening an export is cut off.
const OPTIONS_MAX: u32 = 256;

/// What client and server agreed on.
#[derive(Debug)]
pub(crate) struct Agreed {
    pub(crate) export: Export,
    pub(crate) framing: Framing,
    /// The contexts chosen; their numbers on the wire count from 1.
    pub(crate) contexts: Vec<Context>,
}

/// How a negotiation ended.
#[derive(Debug)]
pub(crate) enum Negotiated {
    /// The client left.
    Left,
    /// Requests come next.
    Transmission(Box<Agreed>),
    /// A TLS handshake comes next.
    StartTls(Arc<ServerConfig>),
}

/// Where STARTTLS stands.
#[derive(Debug, Clone, Copy)]
pub(crate) enum TlsState<'a> {
    /// There is none here (NOTLS).
    Absent,
    /// It may come, or must (SELECTIVETLS, FORCEDTLS).
    Offered(&'a ServerTls),
    /// The negotiation runs inside it.
    Active,
}

/// The contexts of the last NBD_OPT_SET_META_CONTEXT, good for one export name.
#[derive(Debug)]
struct Chosen {
    export: String,
    names: Vec<String>,
}

/// The server's side of a negotiation.
pub(crate) struct Negotiation<'a> {
    provider: &'a dyn ExportProvider,
    peer: PeerIdentity,
    tls: TlsState<'a>,
    client_flags: u32,
    framing: Framing,
    chosen: Option<Chosen>,
}

/// What an option's answer is followed by; the outer error ends the connection.
type Answered = Result<Option<Negotiated>, ServeError>;

impl<'a> Negotiation<'a> {
    pub(crate) fn new(provider: &'a dyn ExportProvider, peer: PeerIdentity, tls: TlsState<'a>) -> Self {
        Self { provider, peer, tls, client_flags: 0, framing: Framing::Simple, chosen: None }
    }

    /// The greeting is not repeated inside TLS; its flags are taken over. Nothing else is, as the specification demands.
    pub(crate) fn inside_tls(
        provider: &'a dyn ExportProvider,
        peer: PeerIdentity,
        client_flags: u32,
    ) -> Self {
        Self { client_flags, ..Self::new(provider, peer, TlsState::Active) }
    }

    pub(crate) fn client_flags(&self) -> u32 {
        self.client_flags
    }

    /// Exchanges the greetings.
    pub(crate) async fn greet<S>(&mut self, stream: &mut S) -> Result<(), ServeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        stream.write_all(&proto::encode_greeting()).await?;
        stream.flush().await?;
        let flags = u32::from_be_bytes(read_array(stream).await?);
        let known = handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES;
        if flags & !u32::from(known) != 0 {
            return Err(ServeError::Protocol(format!("unknown client flags {flags:#x}")));
        }
        self.client_flags = flags;
        Ok(())
    }

    /// Answers options until one of them ends the negotiation.
    pub(crate) async fn run<S>(&mut self, stream: &mut S) -> Result<Negotiated, ServeError>
    where
        S: AsyncRead + AsyncWrite + Unpin,
    {
        // Reads are exact and unbuffered: nothing of what follows STARTTLS or GO may be swallowed here.
        for _ in 0..OPTIONS_MAX {
            let header = OptionHeader::decode(&read_array(stream).await?)?;
            let mut answer = Vec::new();
            let ended = if header.len > OPTION_BYTES_MAX {
                self.refuse_long(header, &mut answer)?;
                skip(stream, u64::from(header.len)).await?;
                None
            } else {
                let mut data = vec![0; header.len as usize];
                stream.read_exact(&mut data).await?;
                self.answer(header.option, &data, &mut answer)?
            };
            let answered = async {
                stream.write_all(&answer).await?;
                stream.flush().await
            };
            match (answered.await, ended) {
                // A client may say NBD_OPT_ABORT and be gone.
                (_, Some(Negotiated::Left)) => return Ok(Negotiated::Left),
                (answered, ended) => {
                    answered?;
                    if let Some(ended) = ended {
                        return Ok(ended);
                    }
                }
            }
        }
        Err(ServeError::Protocol(format!("{OPTIONS_MAX} options and no export opened")))
    }

    fn refuse_long(&self, header: OptionHeader, out: &mut Vec<u8>) -> Result<(), ServeError> {
        if header.option == option::EXPORT_NAME || !self.is_fixed() {
            return Err(ServeError::Protocol(format!("an option of {} bytes", header.len)));
        }
        proto::encode_option_reply(out, header.option, reply::ERR_TOO_BIG, b"the option is too long");
        Ok(())
    }

    fn is_fixed(&self) -> bool {
        self.client_flags & u32::from(handshake_flag::FIXED_NEWSTYLE) != 0
    }

    fn answer(&mut self, number: u32, data: &[u8], out: &mut Vec<u8>) -> Answered {
        if number == option::EXPORT_NAME {
            // It has no way to be refused but the end of the connection.
            return self.answer_export_name(ClientOption::decode(number, data)?, out);
        }
        if !self.is_fixed() {
            let text = "an option other than NBD_OPT_EXPORT_NAME without fixed newstyle";
            return Err(ServeError::Protocol(text.to_owned()));
        }
        let refused = |out: &mut Vec<u8>, kind, text: &str| {
            proto::encode_option_reply(out, number, kind, text.as_bytes());
            Ok(None)
        };
        let before_tls = number == option::STARTTLS || number == option::ABORT;
        if matches!(self.tls, TlsState::Offered(tls) if tls.required) && !before_tls {
            return refused(out, reply::ERR_TLS_REQD, "TLS is required: use STARTTLS");
        }
        match ClientOption::decode(number, data) {
            Ok(option) => self.answer_option(number, option, out),
            Err(error) => refused(out, reply::ERR_INVALID, &error.to_string()),
        }
    }

    fn answer_option(&mut self, number: u32, option: ClientOption, out: &mut Vec<u8>) -> Answered {
        let mut acknowledge =
            |kind, text: &str| proto::encode_option_reply(out, number, kind, text.as_bytes());
        match option {
            ClientOption::Abort => {
                acknowledge(reply::ACK, "");
                return Ok(Some(Negotiated::Left));
            }
            ClientOption::List => {
                for name in self.provider.list(&self.peer) {
                    proto::encode_server_reply(out, &name);
                }
                proto::encode_option_reply(out, number, reply::ACK, &[]);
            }
            ClientOption::StartTls => match self.tls {
                TlsState::Absent => acknowledge(reply::ERR_POLICY, "TLS is not configured here"),
                TlsState::Active => acknowledge(reply::ERR_INVALID, "TLS is active already"),
                TlsState::Offered(tls) => {
                    acknowledge(reply::ACK, "");
                    return Ok(Some(Negotiated::StartTls(tls.config.clone())));
                }
            },
            ClientOption::StructuredReply if self.framing.is_extended() => {
                acknowledge(reply::ERR_EXT_HEADER_REQD, "extended headers are agreed on");
            }
            ClientOption::StructuredReply => {
                self.framing = Framing::Structured;
                acknowledge(reply::ACK, "");
            }
            ClientOption::ExtendedHeaders if self.framing.is_extended() => {
                acknowledge(reply::ERR_INVALID, "extended headers are agreed on already");
            }
            ClientOption::ExtendedHeaders => {
                self.framing = Framing::Extended;
                acknowledge(reply::ACK, "");
            }
            ClientOption::Open { go, name, wants } => {
                return Ok(self.answer_open(number, go, &name, &wants, out));
            }
            ClientOption::MetaContext { set, name, queries } => {
                self.answer_meta_context(number, set, name, &queries, out);
            }
            ClientOption::ExportName(_) | ClientOption::Unknown(_) => acknowledge(reply::ERR_UNSUP, ""),
        }
        Ok(None)
    }

    fn answer_export_name(&self, option: ClientOption, out: &mut Vec<u8>) -> Answered {
        let refused = |reason: &str| ServeError::Protocol(format!("NBD_OPT_EXPORT_NAME: {reason}"));
        let ClientOption::ExportName(name) = option else { return Err(refused("no name")) };
        if matches!(self.tls, TlsState::Offered(tls) if tls.required) {
            return Err(refused("without TLS, which is required"));
        }
        if self.framing.is_extended() {
            return Err(refused("extended headers are agreed on, which need NBD_OPT_GO"));
        }
        let agreed = self.open(&name).map_err(|error| refused(&error.to_string()))?;
        let no_zeroes = self.client_flags & u32::from(handshake_flag::NO_ZEROES) != 0;
        proto::encode_export_name_answer(out, agreed.summary(), no_zeroes);
        Ok(Some(Negotiated::Transmission(Box::new(agreed))))
    }

    fn answer_open(
        &mut self,
        number: u32,
        go: bool,
        name: &str,
        wants: &[u16],
        out: &mut Vec<u8>,
    ) -> Option<Negotiated> {
        let agreed = match self.open(name) {
            Ok(agreed) => agreed,
            Err(error) => {
                refuse(out, number, &error);
                return None;
            }
        };
        proto::encode_info_export(out, number, agreed.summary());
        let min = agreed.export.block_bytes;
        let sizes = BlockSizes { min, preferred: min.max(4096), max: PAYLOAD_BYTES_MAX };
        proto::encode_info_block_size(out, number, sizes);
        if wants.contains(&info::NAME) {
            proto::encode_info_text(out, number, info::NAME, name);
        }
        let description = &agreed.export.description;
        if wants.contains(&info::DESCRIPTION) && !description.is_empty() {
            let cut = description.floor_char_boundary(proto::NAME_BYTES_MAX);
            proto::encode_info_text(out, number, info::DESCRIPTION, &description[..cut]);
        }
        proto::encode_option_reply(out, number, reply::ACK, &[]);
        go.then(|| Negotiated::Transmission(Box::new(agreed)))
    }

    fn answer_meta_context(
        &mut self,
        number: u32,
        set: bool,
        export: String,
        queries: &[String],
        out: &mut Vec<u8>,
    ) {
        let mut refused = |kind, text: &str| proto::encode_option_reply(out, number, kind, text.as_bytes());
        if set {
            self.chosen = None;
        }
        if !self.framing.has_chunks() {
            return refused(reply::ERR_INVALID, "agree on structured replies or extended headers first");
        }
        if queries.iter().any(|query| !query.contains(':')) {
            return refused(reply::ERR_INVALID, "a context's name starts with a namespace and a colon");
        }
        let offered = match self.provider.open(&export, &self.peer) {
            Ok(offered) => offered.contexts,
            Err(error) => return refuse(out, number, &error),
        };
        let names = offered.into_iter().map(|context| context.name);
        let matching: Vec<String> = names.filter(|name| is_asked_for(name, queries, set)).collect();
        if set && matching.len() > CONTEXTS_MAX {
            return refused(reply::ERR_TOO_BIG, "too many contexts");
        }
        for (name, id) in matching.iter().zip(1..) {
            proto::encode_meta_context_reply(out, number, if set { id } else { 0 }, name);
        }
        proto::encode_option_reply(out, number, reply::ACK, &[]);
        if set {
            self.chosen = Some(Chosen { export, names: matching });
        }
    }

    fn open(&self, name: &str) -> Result<Agreed, OpenError> {
        let export = self.provider.open(name, &self.peer)?;
        let chosen = self.chosen.as_ref().filter(|chosen| chosen.export == name);
        let mut contexts = Vec::new();
        for wanted in chosen.into_iter().flat_map(|chosen| &chosen.names) {
            let offered = export.contexts.iter().find(|context| context.name == *wanted);
            // Gone between the two options, as a dirty map whose replica came back: the numbers told would be wrong.
            let gone = || OpenError::Unavailable(format!("the context {wanted} is gone, choose again"));
            contexts.push(offered.cloned().ok_or_else(gone)?);
        }
        Ok(Agreed { export, framing: self.framing, contexts })
    }
}

/// Whether a context is among those asked for. LIST takes prefixes that end in a colon (`base:`, `x-holdfast:dirty:`), and no
/// query at all for everything; SET takes whole names only.
fn is_asked_for(name: &str, queries: &[String], set: bool) -> bool {
    let wildcard = |query: &String| !set && query.ends_with(':') && name.starts_with(query.as_str());
    (!set && queries.is_empty()) || queries.iter().any(|query| query == name || wildcard(query))
}

impl Agreed {
    fn summary(&self) -> ExportSummary {
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE;
        flags |= if self.export.read_only {
            flag::READ_ONLY
        } else {
            flag::SEND_TRIM | flag::SEND_WRITE_ZEROES | flag::SEND_FAST_ZERO
        };
        if self.framing.has_chunks() {
            flags |= flag::SEND_DF;
        }
        if self.framing.is_extended() && !self.contexts.is_empty() {
            flags |= flag::BLOCK_STATUS_PAYLOAD;
        }
        if self.export.multi_conn {
            flags |= flag::CAN_MULTI_CONN;
        }
        ExportSummary { size_bytes: self.export.device.size_bytes(), flags }
    }
}

fn refuse(out: &mut Vec<u8>, number: u32, error: &OpenError) {
    let kind = match error {
        OpenError::Unknown(_) => reply::ERR_UNKNOWN,
        OpenError::NotAllowed(_) => reply::ERR_POLICY,
        OpenError::Unavailable(_) => reply::ERR_SHUTDOWN,
    };
    proto::encode_option_reply(out, number, kind, error.to_string().as_bytes());
}
