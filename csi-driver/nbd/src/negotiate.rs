//! Negotiation, the server's side.

use std::sync::Arc;

use rustls::ServerConfig;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::payload::{PAYLOAD_BYTES_MAX, read_array};
use crate::proto::{
    self, BlockSizes, ClientOption, ExportSummary, OPTION_BYTES_MAX, OptionHeader, handshake_flag, option,
    reply, transmission_flag as flag,
};
use crate::provider::{Export, ExportProvider, OpenError, PeerIdentity};
use crate::server::{ServeError, ServerTls};

/// The one metadata context that we know, and its number on the wire.
pub(crate) const BASE_ALLOCATION: &str = "base:allocation";
pub(crate) const BASE_ALLOCATION_ID: u32 = 1;

/// Options on one connection; a client that sends more without opening an export is cut off.
const OPTIONS_MAX: u32 = 256;

/// What client and server agreed on.
#[derive(Debug)]
pub(crate) struct Agreed {
    pub(crate) export: Export,
    pub(crate) structured: bool,
    pub(crate) block_status: bool,
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

/// The server's side of a negotiation.
pub(crate) struct Negotiation<'a> {
    provider: &'a dyn ExportProvider,
    peer: PeerIdentity,
    tls: Option<&'a ServerTls>,
    no_zeroes: bool,
    structured: bool,
    /// The export for which `base:allocation` was chosen.
    allocation_of: Option<String>,
}

impl<'a> Negotiation<'a> {
    pub(crate) fn new(
        provider: &'a dyn ExportProvider,
        peer: PeerIdentity,
        tls: Option<&'a ServerTls>,
    ) -> Self {
        Self { provider, peer, tls, no_zeroes: false, structured: false, allocation_of: None }
    }

    /// The greeting is not repeated inside TLS; its one flag is taken over.
    pub(crate) fn after_tls(mut self, no_zeroes: bool) -> Self {
        self.no_zeroes = no_zeroes;
        self
    }

    pub(crate) fn no_zeroes(&self) -> bool {
        self.no_zeroes
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
        self.no_zeroes = flags & u32::from(handshake_flag::NO_ZEROES) != 0;
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
                skip(stream, header.len).await?;
                proto::encode_option_reply(&mut answer, header.option, reply::ERR_TOO_BIG, &[]);
                None
            } else {
                let mut data = vec![0; header.len as usize];
                stream.read_exact(&mut data).await?;
                self.answer(header.option, &data, &mut answer)?
            };
            stream.write_all(&answer).await?;
            stream.flush().await?;
            if let Some(ended) = ended {
                return Ok(ended);
            }
        }
        Err(ServeError::Protocol(format!("{OPTIONS_MAX} options and no export opened")))
    }

    fn answer(
        &mut self,
        number: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Negotiated>, ServeError> {
        let option = match ClientOption::decode(number, data) {
            Ok(option) => option,
            // This option has no way to be refused.
            Err(error) if number == option::EXPORT_NAME => return Err(error.into()),
            Err(error) => {
                proto::encode_option_reply(out, number, reply::ERR_INVALID, error.to_string().as_bytes());
                return Ok(None);
            }
        };
        if self.tls.is_some_and(|tls| tls.required) {
            match &option {
                ClientOption::StartTls | ClientOption::Abort => {}
                ClientOption::ExportName(_) => {
                    return Err(ServeError::Protocol(
                        "NBD_OPT_EXPORT_NAME without TLS, which is required".into(),
                    ));
                }
                _ => {
                    proto::encode_option_reply(
                        out,
                        number,
                        reply::ERR_TLS_REQD,
                        b"TLS is required: use STARTTLS",
                    );
                    return Ok(None);
                }
            }
        }
        match option {
            ClientOption::ExportName(name) => {
                let refused =
                    |error: OpenError| ServeError::Protocol(format!("NBD_OPT_EXPORT_NAME: {error}"));
                let agreed = self.open(&name).map_err(refused)?;
                proto::encode_export_name_answer(out, agreed.summary(), self.no_zeroes);
                return Ok(Some(Negotiated::Transmission(Box::new(agreed))));
            }
            ClientOption::Abort => {
                proto::encode_option_reply(out, number, reply::ACK, &[]);
                return Ok(Some(Negotiated::Left));
            }
            ClientOption::List => {
                for name in self.provider.list(&self.peer) {
                    proto::encode_server_reply(out, &name);
                }
                proto::encode_option_reply(out, number, reply::ACK, &[]);
            }
            ClientOption::StartTls => return Ok(self.start_tls(out)),
            ClientOption::StructuredReply => {
                self.structured = true;
                proto::encode_option_reply(out, number, reply::ACK, &[]);
            }
            ClientOption::Open { go, name, .. } => return Ok(self.answer_open(number, go, &name, out)),
            ClientOption::MetaContext { set, name, queries } => {
                self.answer_meta_context(number, set, name, &queries, out);
            }
            ClientOption::Unknown(_) => proto::encode_option_reply(out, number, reply::ERR_UNSUP, &[]),
        }
        Ok(None)
    }

    fn start_tls(&mut self, out: &mut Vec<u8>) -> Option<Negotiated> {
        let Some(tls) = self.tls else {
            proto::encode_option_reply(
                out,
                option::STARTTLS,
                reply::ERR_POLICY,
                b"TLS is not configured here",
            );
            return None;
        };
        proto::encode_option_reply(out, option::STARTTLS, reply::ACK, &[]);
        Some(Negotiated::StartTls(tls.config.clone()))
    }

    fn answer_open(&mut self, number: u32, go: bool, name: &str, out: &mut Vec<u8>) -> Option<Negotiated> {
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
        proto::encode_option_reply(out, number, reply::ACK, &[]);
        go.then(|| Negotiated::Transmission(Box::new(agreed)))
    }

    fn answer_meta_context(
        &mut self,
        number: u32,
        set: bool,
        name: String,
        queries: &[String],
        out: &mut Vec<u8>,
    ) {
        if set {
            self.allocation_of = None;
        }
        if !self.structured {
            proto::encode_option_reply(out, number, reply::ERR_INVALID, b"agree on structured replies first");
            return;
        }
        if let Err(error) = self.provider.open(&name, &self.peer) {
            refuse(out, number, &error);
            return;
        }
        let lists_all = !set && queries.is_empty();
        let asked = queries.iter().any(|query| query == BASE_ALLOCATION || (!set && query == "base:"));
        if lists_all || asked {
            let id = if set { BASE_ALLOCATION_ID } else { 0 };
            proto::encode_meta_context_reply(out, number, id, BASE_ALLOCATION);
            if set {
                self.allocation_of = Some(name);
            }
        }
        proto::encode_option_reply(out, number, reply::ACK, &[]);
    }

    fn open(&self, name: &str) -> Result<Agreed, OpenError> {
        let export = self.provider.open(name, &self.peer)?;
        let block_status = self.structured && self.allocation_of.as_deref() == Some(name);
        Ok(Agreed { export, structured: self.structured, block_status })
    }
}

impl Agreed {
    fn summary(&self) -> ExportSummary {
        let mut flags = flag::HAS_FLAGS | flag::SEND_FLUSH | flag::SEND_FUA | flag::SEND_CACHE;
        flags |=
            if self.export.read_only { flag::READ_ONLY } else { flag::SEND_TRIM | flag::SEND_WRITE_ZEROES };
        if self.structured {
            flags |= flag::SEND_DF;
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

async fn skip<S>(stream: &mut S, len: u32) -> Result<(), ServeError>
where
    S: AsyncRead + Unpin,
{
    let skipped = tokio::io::copy(&mut stream.take(u64::from(len)), &mut tokio::io::sink()).await?;
    if skipped < u64::from(len) {
        return Err(ServeError::Io(std::io::ErrorKind::UnexpectedEof.into()));
    }
    Ok(())
}
