//! One request to the API server, and what its answer says.

use std::path::Path;
use std::time::Duration;

use futures::{AsyncBufRead, AsyncReadExt};
use http::Request;
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::ConfigExt;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::{Client, Config};
use tower::{BoxError, ServiceBuilder};

use crate::engine::sentence;

/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// How long the head of an answer, or a page of a list, may take.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(30);
/// A connection on which nothing comes is tried out after this.
const KEEPALIVE: Duration = Duration::from_secs(10);
/// Data, or such a trial, that nobody acknowledged for so long ends its connection: a server that lost its power, a cut link.
const UNACKNOWLEDGED_TIMEOUT: Duration = Duration::from_secs(20);
/// An unused connection is closed after this.
const IDLE_TIMEOUT: Duration = Duration::from_secs(30);
/// Connections that are kept for the next requests.
const IDLE_CONNECTIONS_MAX: usize = 2;

/// A client of the API server. Nothing is sent before the first request; lost connections are made again; nothing is repeated.
#[derive(Clone)]
pub(crate) struct Api {
    client: Client,
}

/// Why there is no answer, or which one.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ApiError {
    /// The server decided so.
    #[error("the API server says: {message} ({code} {reason})")]
    Answer {
        /// HTTP's.
        code: u16,
        /// Kubernetes', such as `NotFound`; empty where somebody else answered.
        reason: String,
        /// For people.
        message: String,
        /// Resource and name of the object that it is about, where it names one.
        object: Option<(String, String)>,
    },
    /// The answer is larger than what is read.
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
    /// Nothing, or nothing that was understood.
    #[error("the API server does not answer: {0}")]
    Silent(String),
}

impl ApiError {
    /// Kubernetes' reason; empty where it gave none.
    pub(crate) fn reason(&self) -> &str {
        match self {
            Self::Answer { reason, .. } => reason,
            Self::TooLarge(_) | Self::Silent(_) => "",
        }
    }

    /// What was asked for is not there: the whole path, for whatever reason.
    pub(super) fn is_not_found(&self) -> bool {
        matches!(self, Self::Answer { code: 404, .. })
    }

    /// What was asked for is older than what the server remembers.
    pub(super) fn is_gone(&self) -> bool {
        matches!(self, Self::Answer { code: 410, .. })
    }

    /// There is no object of this name. A server that does not know the path (yet), or a proxy, names no object.
    pub(crate) fn is_missing(&self, resource: &str, name: &str) -> bool {
        let Self::Answer { reason, object: Some((kind, found)), .. } = self else { return false };
        reason == "NotFound" && kind == resource && found == name
    }
}

impl From<kube::Error> for ApiError {
    fn from(error: kube::Error) -> Self {
        let kube::Error::Api(status) = error else { return Self::Silent(sentence(&error)) };
        let details = status.details.filter(|details| !details.name.is_empty());
        Self::Answer {
            code: status.code,
            reason: status.reason,
            message: status.message,
            object: details.map(|details| (details.kind, details.name)),
        }
    }
}

impl Api {
    /// A client by a kubeconfig's current context, or as a pod is given one. The server need not answer yet.
    ///
    /// # Errors
    /// A sentence: neither is there, or it cannot be used.
    pub(crate) async fn new(kubeconfig: Option<&Path>) -> Result<Self, String> {
        let config = match kubeconfig {
            Some(path) => {
                let unusable = |error: &dyn std::error::Error| {
                    format!("the kubeconfig {} cannot be used: {}", path.display(), sentence(error))
                };
                let kubeconfig = Kubeconfig::read_from(path).map_err(|error| unusable(&error))?;
                let options = KubeConfigOptions::default();
                Config::from_custom_kubeconfig(kubeconfig, &options)
                    .await
                    .map_err(|error| unusable(&error))?
            }
            None => Config::incluster().map_err(|error| {
                format!("no way to the API server: {}; run in a pod, or name a kubeconfig", sentence(&error))
            })?,
        };
        let client = client(&config);
        let client = client.map_err(|error| {
            format!("the settings for the API server cannot be used: {}", sentence(&error))
        })?;
        Ok(Self { client })
    }

    /// Over a client that a test made.
    #[cfg(test)]
    pub(crate) fn over(client: Client) -> Self {
        Self { client }
    }

    /// An answer with its whole body of at most `bytes_max`.
    pub(crate) async fn ask(
        &self,
        request: http::Result<Request<Vec<u8>>>,
        bytes_max: usize,
    ) -> Result<Vec<u8>, ApiError> {
        let answer = async {
            let mut body = self.open(request).await?.take(bytes_max as u64 + 1);
            let mut text = Vec::new();
            let read = body.read_to_end(&mut text).await;
            read.map_err(|error| ApiError::Silent(sentence(&error)))?;
            if text.len() > bytes_max { Err(ApiError::TooLarge(bytes_max)) } else { Ok(text) }
        };
        let slow = |_| Err(ApiError::Silent(format!("nothing within {ANSWER_TIMEOUT:?}")));
        tokio::time::timeout(ANSWER_TIMEOUT, answer).await.unwrap_or_else(slow)
    }

    /// An answer whose body comes as it comes.
    pub(super) async fn stream(
        &self,
        path: &str,
    ) -> Result<impl AsyncBufRead + Unpin + Send + use<>, ApiError> {
        let opened =
            tokio::time::timeout(ANSWER_TIMEOUT, self.open(Request::get(path).body(Vec::new()))).await;
        opened.unwrap_or_else(|_| Err(ApiError::Silent(format!("nothing within {ANSWER_TIMEOUT:?}"))))
    }

    async fn open(
        &self,
        request: http::Result<Request<Vec<u8>>>,
    ) -> Result<impl AsyncBufRead + Unpin + Send + use<>, ApiError> {
        let request =
            request.map_err(|error| ApiError::Silent(format!("no request can be made: {error}")))?;
        Ok(Box::pin(self.client.request_stream(request).await?))
    }
}

fn client(config: &Config) -> kube::Result<Client> {
    let mut tcp = HttpConnector::new();
    tcp.enforce_http(false);
    tcp.set_nodelay(true);
    tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
    tcp.set_keepalive(Some(KEEPALIVE));
    tcp.set_keepalive_interval(Some(KEEPALIVE));
    tcp.set_tcp_user_timeout(Some(UNACKNOWLEDGED_TIMEOUT));
    let http = HttpClient::builder(TokioExecutor::new())
        .pool_timer(TokioTimer::new())
        .pool_idle_timeout(IDLE_TIMEOUT)
        .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
        .build(config.rustls_https_connector_with_connector(tcp)?);
    // kube's ready-made stack repeats after 503 and 504: then a claim might be made twice, and an outage is seen late.
    let service = ServiceBuilder::new()
        .layer(config.base_uri_layer())
        .option_layer(config.auth_layer()?)
        .map_err(BoxError::from)
        .service(http);
    Ok(Client::new(service, config.default_namespace.clone()))
}
