//! Negotiation, the client's side.

use std::io;

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio_rustls::TlsConnector;

use crate::client::{ClientOptions, ConnectError, ExportInfo};
use crate::payload::{PAYLOAD_BYTES_MAX, read_array, skip};
use crate::proto::{
    self, ClientOption, DecodeError, ExportSummary, Framing, InfoReply, MAGIC_GREETING, MAGIC_OPTION,
    OPTION_BYTES_MAX, OptionReplyHeader, handshake_flag, info, reply,
};
use crate::tls::ClientTls;

/// Replies that a server may send to one option; more end the negotiation.
const OPTION_REPLIES_MAX: u32 = 4096;

/// What a negotiation runs over.
pub(crate) trait Stream: AsyncRead + AsyncWrite + Unpin + Send {}

impl<S: AsyncRead + AsyncWrite + Unpin + Send> Stream for S {}

/// A stream whose handshake has begun.
pub(crate) struct Handshake {
    stream: Box<dyn Stream>,
    /// As answered to the server.
    flags: u16,
}

/// A server's refusal of an option.
#[derive(Debug)]
pub(crate) struct Refusal {
    kind: u32,
    /// The server's own words, or the number.
    pub(crate) text: String,
}

/// An open export.
pub(crate) struct Opened {
    pub(crate) stream: Box<dyn Stream>,
    pub(crate) info: ExportInfo,
    pub(crate) framing: Framing,
    /// Numbers and names of the contexts agreed on.
    pub(crate) contexts: Vec<(u32, String)>,
}

impl Handshake {
    /// Exchanges greetings and does STARTTLS if it is wanted.
    pub(crate) async fn begin(
        mut stream: Box<dyn Stream>,
        tls: Option<&ClientTls>,
    ) -> Result<Self, ConnectError> {
        let flags = exchange_greetings(&mut stream).await?;
        let mut handshake = Self { stream, flags };
        let Some(tls) = tls else { return Ok(handshake) };
        if let Some(refusal) = handshake.ask(&ClientOption::StartTls, |_, _| Ok(())).await? {
            return Err(ConnectError::TlsRefused(refusal.text));
        }
        let connector = TlsConnector::from(tls.config.clone());
        let connected = connector.connect(tls.server_name.clone(), handshake.stream).await;
        Ok(Self { stream: Box::new(connected.map_err(ConnectError::Tls)?), flags })
    }

    /// Agrees on all that the options want and enters the transmission phase.
    pub(crate) async fn open(mut self, options: &ClientOptions) -> Result<Opened, ConnectError> {
        let framing = self.agree_on_framing(options.compact_headers).await?;
        let mut contexts = Vec::new();
        if framing.has_chunks() && !options.contexts.is_empty() {
            contexts = self.choose_contexts(&options.export, &options.contexts).await?;
        }
        let wants = vec![info::BLOCK_SIZE];
        let (told, refusal) = self.ask_about(true, &options.export, wants).await?;
        let info = match refusal {
            None => told.finish(framing)?,
            Some(refusal) if refusal.kind == reply::ERR_UNSUP && !framing.is_extended() => {
                let summary = self.open_by_name(&options.export).await?;
                Told { summary: Some(summary), sizes: None }.finish(framing)?
            }
            Some(refusal) => return Err(refused(&options.export, refusal)),
        };
        Ok(Opened { stream: self.stream, info, framing, contexts })
    }

    /// The best framing that the server knows.
    pub(crate) async fn agree_on_framing(&mut self, compact: bool) -> Result<Framing, ConnectError> {
        if !compact && self.ask(&ClientOption::ExtendedHeaders, |_, _| Ok(())).await?.is_none() {
            return Ok(Framing::Extended);
        }
        let refusal = self.ask(&ClientOption::StructuredReply, |_, _| Ok(())).await?;
        Ok(if refusal.is_none() { Framing::Structured } else { Framing::Simple })
    }

    /// Those of the contexts that the server has. A refusal leaves the export without any; opening it will say what is
    /// wrong, if anything.
    async fn choose_contexts(
        &mut self,
        export: &str,
        wanted: &[String],
    ) -> Result<Vec<(u32, String)>, ConnectError> {
        let mut chosen: Vec<(u32, String)> = Vec::new();
        let mut twice = false;
        let option =
            ClientOption::MetaContext { set: true, name: export.to_owned(), queries: wanted.to_vec() };
        let refusal = self
            .ask(&option, |kind, data| {
                if kind == reply::META_CONTEXT {
                    let (id, name) = proto::decode_meta_context_reply(data)?;
                    twice |= chosen.iter().any(|(other, known)| *other == id || *known == name);
                    if wanted.contains(&name) {
                        chosen.push((id, name));
                    }
                }
                Ok(())
            })
            .await?;
        if twice {
            return Err(ConnectError::Protocol("it named a metadata context twice".into()));
        }
        Ok(if refusal.is_none() { chosen } else { Vec::new() })
    }

    /// NBD_OPT_INFO or NBD_OPT_GO.
    pub(crate) async fn ask_about(
        &mut self,
        go: bool,
        export: &str,
        wants: Vec<u16>,
    ) -> Result<(Told, Option<Refusal>), ConnectError> {
        let mut told = Told::default();
        let option = ClientOption::Open { go, name: export.to_owned(), wants };
        let refusal = self
            .ask(&option, |kind, data| {
                if kind == reply::INFO {
                    match proto::decode_info_reply(data)? {
                        InfoReply::Export(summary) => told.summary = Some(summary),
                        InfoReply::BlockSizes(sizes) => told.sizes = Some(sizes),
                        InfoReply::Name(_) | InfoReply::Description(_) | InfoReply::Other(_) => {}
                    }
                }
                Ok(())
            })
            .await?;
        Ok((told, refusal))
    }

    /// NBD_OPT_EXPORT_NAME, for servers that know no better.
    async fn open_by_name(&mut self, export: &str) -> Result<ExportSummary, ConnectError> {
        self.send(&ClientOption::ExportName(export.to_owned())).await?;
        let answer = read_array(&mut self.stream).await.map_err(|error| match error.kind() {
            // That is how this option is refused.
            io::ErrorKind::UnexpectedEof => ConnectError::Refused {
                export: export.to_owned(),
                reason: "it closed the connection".to_owned(),
            },
            _ => ConnectError::Io(error),
        })?;
        if self.flags & handshake_flag::NO_ZEROES == 0 {
            skip(&mut self.stream, proto::EXPORT_NAME_ZEROES as u64).await?;
        }
        Ok(proto::decode_export_name_answer(answer))
    }

    /// Leaves in order; the server's answer is not waited for, and it may be gone by then.
    pub(crate) async fn abort(mut self) -> Result<(), ConnectError> {
        self.send(&ClientOption::Abort).await?;
        let _ = self.stream.shutdown().await;
        Ok(())
    }

    async fn send(&mut self, option: &ClientOption) -> Result<(), ConnectError> {
        let mut wire = Vec::new();
        option.encode(&mut wire);
        self.stream.write_all(&wire).await?;
        Ok(self.stream.flush().await?)
    }

    /// Sends one option and hands every reply but the last to `each`. `Some` is the server's refusal.
    pub(crate) async fn ask(
        &mut self,
        option: &ClientOption,
        mut each: impl FnMut(u32, &[u8]) -> Result<(), DecodeError>,
    ) -> Result<Option<Refusal>, ConnectError> {
        self.send(option).await?;
        for _ in 0..OPTION_REPLIES_MAX {
            let header = OptionReplyHeader::decode(&read_array(&mut self.stream).await?)?;
            if header.option != option.number() {
                return Err(ConnectError::Protocol(format!("it answered option {}", header.option)));
            }
            if header.len > OPTION_BYTES_MAX {
                return Err(ConnectError::Protocol(format!("an option's reply has {} bytes", header.len)));
            }
            let mut data = vec![0; header.len as usize];
            self.stream.read_exact(&mut data).await?;
            if header.is_error() {
                let text = match data.is_empty() {
                    true => format!("error {:#x}", header.kind),
                    false => String::from_utf8_lossy(&data).into_owned(),
                };
                return Ok(Some(Refusal { kind: header.kind, text }));
            }
            if header.kind == reply::ACK {
                return Ok(None);
            }
            each(header.kind, &data)?;
        }
        Err(ConnectError::Protocol(format!("more than {OPTION_REPLIES_MAX} replies to one option")))
    }
}

/// What a server told of an export.
#[derive(Debug, Default)]
pub(crate) struct Told {
    summary: Option<ExportSummary>,
    sizes: Option<proto::BlockSizes>,
}

impl Told {
    pub(crate) fn finish(self, framing: Framing) -> Result<ExportInfo, ConnectError> {
        let missing = || ConnectError::Protocol("NBD_INFO_EXPORT is missing".into());
        let summary = self.summary.ok_or_else(missing)?;
        Ok(ExportInfo {
            size_bytes: summary.size_bytes,
            flags: summary.flags,
            block_bytes_min: self.sizes.map_or(1, |sizes| sizes.min),
            payload_bytes_max: self.sizes.map_or(PAYLOAD_BYTES_MAX, |sizes| sizes.max.min(PAYLOAD_BYTES_MAX)),
            extended_headers: framing.is_extended(),
        })
    }
}

pub(crate) fn refused(export: &str, refusal: Refusal) -> ConnectError {
    if refusal.kind == reply::ERR_TLS_REQD {
        return ConnectError::TlsRequired(refusal.text);
    }
    ConnectError::Refused { export: export.to_owned(), reason: refusal.text }
}

/// Gives the flags that were answered.
async fn exchange_greetings(stream: &mut Box<dyn Stream>) -> Result<u16, ConnectError> {
    let expect = |found: u64, magic: u64| {
        let expected = "the greeting of an NBD server (fixed newstyle)";
        if found == magic { Ok(()) } else { Err(DecodeError::Magic { expected, found }) }
    };
    expect(u64::from_be_bytes(read_array(stream).await?), MAGIC_GREETING)?;
    expect(u64::from_be_bytes(read_array(stream).await?), MAGIC_OPTION)?;
    let flags = u16::from_be_bytes(read_array(stream).await?);
    if flags & handshake_flag::FIXED_NEWSTYLE == 0 {
        return Err(ConnectError::Protocol("it is not fixed newstyle".into()));
    }
    let answer = flags & (handshake_flag::FIXED_NEWSTYLE | handshake_flag::NO_ZEROES);
    stream.write_all(&u32::from(answer).to_be_bytes()).await?;
    stream.flush().await?;
    Ok(answer)
}
