//! Questions to a server that open no export.

use crate::client::{ClientOptions, ConnectError, ExportInfo, in_time};
use crate::handshake::{Handshake, Stream, refused};
use crate::proto::{self, ClientOption, info, reply};
use crate::tls::ClientTls;

/// Asks a server about its exports. Each question may be asked again; every one has the handshake's 10 s.
pub struct Inquiry {
    handshake: Handshake,
    extended_or_structured: bool,
}

impl Inquiry {
    /// Begins over a connected stream, with STARTTLS if `tls` says so.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn begin<S>(stream: S, tls: Option<ClientTls>) -> Result<Self, ConnectError>
    where
        S: tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin + Send + 'static,
    {
        in_time(async {
            let stream: Box<dyn Stream> = Box::new(stream);
            let mut handshake = Handshake::begin(stream, tls.as_ref()).await?;
            let framing = handshake.agree_on_framing(false).await?;
            Ok(Self { handshake, extended_or_structured: framing.has_chunks() })
        })
        .await
    }

    /// Names of the exports that the server tells.
    ///
    /// # Errors
    /// [`ConnectError`]; a server may refuse to tell.
    pub async fn exports(&mut self) -> Result<Vec<String>, ConnectError> {
        let mut names = Vec::new();
        let asked = self.handshake.ask(&ClientOption::List, |kind, data| {
            if kind == reply::SERVER {
                names.push(proto::decode_server_reply(data)?);
            }
            Ok(())
        });
        match in_time(asked).await? {
            None => Ok(names),
            Some(refusal) => Err(refused("", refusal)),
        }
    }

    /// Metadata contexts of an export that match one of the queries; all of them without a query.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn contexts(&mut self, export: &str, queries: &[&str]) -> Result<Vec<String>, ConnectError> {
        if !self.extended_or_structured {
            return Ok(Vec::new());
        }
        let mut names = Vec::new();
        let queries = queries.iter().map(|&query| query.to_owned()).collect();
        let option = ClientOption::MetaContext { set: false, name: export.to_owned(), queries };
        let asked = self.handshake.ask(&option, |kind, data| {
            if kind == reply::META_CONTEXT {
                names.push(proto::decode_meta_context_reply(data)?.1);
            }
            Ok(())
        });
        match in_time(asked).await? {
            None => Ok(names),
            Some(refusal) => Err(refused(export, refusal)),
        }
    }

    /// What the server says of an export.
    ///
    /// # Errors
    /// [`ConnectError`].
    pub async fn info(&mut self, export: &str) -> Result<ExportInfo, ConnectError> {
        in_time(async {
            let (told, refusal) = self.handshake.ask_about(false, export, vec![info::BLOCK_SIZE]).await?;
            match refusal {
                None => told.finish(proto::Framing::Simple),
                Some(refusal) => Err(refused(export, refusal)),
            }
        })
        .await
    }

    /// Leaves in order.
    ///
    /// # Errors
    /// The stream failed.
    pub async fn leave(self) -> Result<(), ConnectError> {
        in_time(self.handshake.abort()).await
    }
}

impl ClientOptions {
    /// Options for an export, with no contexts and no TLS.
    #[must_use]
    pub fn new(export: impl Into<String>) -> Self {
        Self { export: export.into(), ..Self::default() }
    }
}
