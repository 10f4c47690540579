//! One request to the API server, and what its answer, or its silence, says of what happened (R8).
//!
//! Nothing here repeats a change whose outcome is unknown: kube's own repeats are off, and hyper sends a request again
//! only if it was never begun on the wire. A request that the server throttled was not carried out, so it is repeated.

use std::path::Path;
use std::time::Duration;

use http::Request;
use http::header::CONTENT_TYPE;
use hyper_util::client::legacy::Client as HttpClient;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use kube::client::ConfigExt;
use kube::config::{KubeConfigOptions, Kubeconfig};
use kube::core::{ClusterResourceScope, NamespaceResourceScope};
use kube::{Client, Config, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::time::Instant;
use tower::{BoxError, ServiceBuilder};

/// How long one call of a store may take with all its requests; below the 3 s that a target waits for its store.
pub const CALL_TIMEOUT: Duration = Duration::from_millis(2500);
/// How long connecting may take.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// Data that nobody acknowledged for so long ends its connection: the next call connects anew.
const UNACKNOWLEDGED_TIMEOUT: Duration = Duration::from_secs(2);
/// Connections that are kept for the next calls; a further one is closed after its call.
const IDLE_CONNECTIONS_MAX: usize = 8;
/// An unused connection is closed after this, so that none outlives a silent power cut of the server for long.
const IDLE_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a throttled request is repeated, after twice the pause each time; then its call fails as unknown.
const THROTTLED_REPEATS_MAX: u32 = 4;
/// The first pause.
const THROTTLED_PAUSE: Duration = Duration::from_millis(100);
/// Objects of one page of a list.
const PAGE_OBJECTS: u32 = 500;
/// Pages of one list: two million objects. A longer list fails.
const PAGES_MAX: u32 = 4096;
/// How we sign our changes (Kubernetes' managed fields).
const FIELD_MANAGER: &str = "holdfast";

/// Why there is no client.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// Neither a kubeconfig nor a service account.
    #[error(
        "no way to the API server was found: {0}; set KUBECONFIG, or run in a pod with a service account"
    )]
    Nowhere(String),
    /// The kubeconfig.
    #[error("the kubeconfig {path} cannot be used: {reason}")]
    Kubeconfig {
        /// The file.
        path: String,
        /// Why.
        reason: String,
    },
    /// The credentials or certificates.
    #[error("the API server's settings cannot be used: {0}")]
    Settings(#[from] kube::Error),
}

/// A client of the API server. Nothing is sent before the first call; lost connections are made again.
#[derive(Clone)]
pub struct KubernetesClient {
    client: Client,
    /// Of objects that are in one.
    namespace: String,
}

/// What an answer says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum CallError {
    /// There is no such object.
    #[error("there is no such object")]
    Missing,
    /// An object of that name exists.
    #[error("an object of that name exists")]
    Taken,
    /// The object is not at the demanded version; nothing was changed.
    #[error("the object was changed meanwhile")]
    Moved,
    /// The server decided against it; nothing was changed.
    #[error("{0}")]
    Refused(String),
    /// Nothing is known of what happened.
    #[error("{0}")]
    Unknown(String),
}

impl KubernetesClient {
    /// From `KUBECONFIG`, `~/.kube/config`, or the pod's service account, in this order.
    ///
    /// # Errors
    /// None of them is there or usable. The server need not answer yet.
    pub async fn infer() -> Result<Self, ConnectError> {
        let config = Config::infer().await.map_err(|e| ConnectError::Nowhere(e.to_string()))?;
        Self::new(&config)
    }

    /// From a kubeconfig file and its current context.
    ///
    /// # Errors
    /// The file cannot be read or used.
    pub async fn from_kubeconfig(path: &Path) -> Result<Self, ConnectError> {
        let unusable = |reason: String| ConnectError::Kubeconfig { path: path.display().to_string(), reason };
        let kubeconfig = Kubeconfig::read_from(path).map_err(|e| unusable(e.to_string()))?;
        let config = Config::from_custom_kubeconfig(kubeconfig, &KubeConfigOptions::default())
            .await
            .map_err(|e| unusable(e.to_string()))?;
        Self::new(&config)
    }

    fn new(config: &Config) -> Result<Self, ConnectError> {
        let mut tcp = HttpConnector::new();
        tcp.enforce_http(false);
        tcp.set_nodelay(true);
        tcp.set_connect_timeout(Some(CONNECT_TIMEOUT));
        tcp.set_keepalive(Some(UNACKNOWLEDGED_TIMEOUT));
        tcp.set_tcp_user_timeout(Some(UNACKNOWLEDGED_TIMEOUT));
        let http = HttpClient::builder(TokioExecutor::new())
            .pool_timer(TokioTimer::new())
            .pool_idle_timeout(IDLE_TIMEOUT)
            .pool_max_idle_per_host(IDLE_CONNECTIONS_MAX)
            .build(config.rustls_https_connector_with_connector(tcp)?);
        // kube's ready-made stack repeats after 503 and 504, which hides whether the first change happened.
        let service = ServiceBuilder::new()
            .layer(config.base_uri_layer())
            .option_layer(config.auth_layer()?)
            .map_err(BoxError::from)
            .service(http);
        let namespace = config.default_namespace.clone();
        Ok(Self { client: Client::new(service, namespace.clone()), namespace })
    }

    /// Over a client that somebody else made. It must never repeat requests.
    #[must_use]
    pub fn over(client: Client) -> Self {
        let namespace = client.default_namespace().to_owned();
        Self { client, namespace }
    }

    /// The namespace of objects that are in one.
    #[must_use]
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The newest object: without a resourceVersion the server asks its database, not its cache.
    pub(super) async fn get<K: Kind>(&self, deadline: Deadline, name: &str) -> Result<K, CallError> {
        self.call::<K, K>(deadline, name, &|| Request::get(self.url::<K>(name, "")).body(Vec::new())).await
    }

    /// Makes an object. Fields that the server's definition lacks are an error, never dropped.
    pub(super) async fn post<K: Kind>(
        &self,
        deadline: Deadline,
        name: &str,
        object: &K,
    ) -> Result<K, CallError> {
        let query = format!("?fieldManager={FIELD_MANAGER}&fieldValidation=Strict");
        let body = to_json(object)?;
        self.call::<K, K>(deadline, name, &|| json(Request::post(self.url::<K>("", &query)), &body)).await
    }

    /// Replaces an object that is still at its resourceVersion.
    pub(super) async fn put<K: Kind>(
        &self,
        deadline: Deadline,
        name: &str,
        object: &K,
    ) -> Result<K, CallError> {
        self.put_part(deadline, name, "", object).await
    }

    /// Replaces a part of an object (such as "/status") that is still at its resourceVersion.
    pub(super) async fn put_part<K: Kind>(
        &self,
        deadline: Deadline,
        name: &str,
        part: &str,
        object: &K,
    ) -> Result<K, CallError> {
        let query = format!("{part}?fieldManager={FIELD_MANAGER}&fieldValidation=Strict");
        let body = to_json(object)?;
        self.call::<K, K>(deadline, name, &|| json(Request::put(self.url::<K>(name, &query)), &body)).await
    }

    /// Makes an object what `object` says, whether it exists or not; its status stays as it is.
    pub(super) async fn apply<K: Kind>(
        &self,
        deadline: Deadline,
        name: &str,
        object: &K,
    ) -> Result<K, CallError> {
        self.apply_at(deadline, name, "", object).await
    }

    /// Makes an object's status what `object` says.
    pub(super) async fn apply_status<K: Kind>(
        &self,
        deadline: Deadline,
        name: &str,
        object: &K,
    ) -> Result<K, CallError> {
        self.apply_at(deadline, name, "/status", object).await
    }

    async fn apply_at<K: Kind>(
        &self,
        deadline: Deadline,
        name: &str,
        part: &str,
        object: &K,
    ) -> Result<K, CallError> {
        let query = format!("{part}?fieldManager={FIELD_MANAGER}&fieldValidation=Strict&force=true");
        let body = to_json(object)?;
        let request = || {
            let builder = Request::patch(self.url::<K>(name, &query));
            builder.header(CONTENT_TYPE, "application/apply-patch+yaml").body(body.clone())
        };
        self.call::<K, K>(deadline, name, &request).await
    }

    /// Sets the fields of an object that `fields` names, and no others (JSON merge patch, RFC 7396). They are this caller's
    /// then: who applies the rest of the object leaves them as they are.
    pub(super) async fn merge<K: Kind>(
        &self,
        deadline: Deadline,
        name: &str,
        fields: &serde_json::Value,
    ) -> Result<K, CallError> {
        let query = format!("?fieldManager={FIELD_MANAGER}-controller&fieldValidation=Strict");
        let body = to_json(fields)?;
        let request = || {
            let builder = Request::patch(self.url::<K>(name, &query));
            builder.header(CONTENT_TYPE, "application/merge-patch+json").body(body.clone())
        };
        self.call::<K, K>(deadline, name, &request).await
    }

    /// Removes just this object at just its version; success means that it is gone.
    pub(super) async fn delete<K: Kind>(&self, deadline: Deadline, object: &K) -> Result<(), CallError> {
        let meta = object.meta();
        let name = meta.name.clone().unwrap_or_default();
        let options = serde_json::json!({
            "kind": "DeleteOptions", "apiVersion": "v1", "propagationPolicy": "Background",
            "preconditions": {"uid": meta.uid, "resourceVersion": meta.resource_version},
        });
        let body = to_json(&options)?;
        let answer: serde_json::Value = self
            .call::<K, _>(deadline, &name, &|| json(Request::delete(self.url::<K>(&name, "")), &body))
            .await?;
        let waits_for = &answer["metadata"]["finalizers"];
        if waits_for.as_array().is_some_and(|names| !names.is_empty()) {
            return Err(CallError::Unknown(format!(
                "{name} goes once its finalizers are removed: {waits_for}"
            )));
        }
        Ok(())
    }

    /// Every object, as they were at one moment.
    pub(super) async fn list<K: Kind>(&self, deadline: Deadline) -> Result<Vec<K>, CallError> {
        self.list_where(deadline, "").await
    }

    /// The same, of those that `selector` chooses: "&fieldSelector=...", encoded for a URL.
    pub(super) async fn list_where<K: Kind>(
        &self,
        deadline: Deadline,
        selector: &str,
    ) -> Result<Vec<K>, CallError> {
        let mut objects = Vec::new();
        let first = format!("?limit={PAGE_OBJECTS}{selector}");
        let mut query = first.clone();
        for _ in 0..PAGES_MAX {
            let page: Page<K> = self
                .call::<K, _>(deadline, "", &|| Request::get(self.url::<K>("", &query)).body(Vec::new()))
                .await?;
            objects.extend(page.items);
            match page.metadata.continue_.filter(|token| !token.is_empty()) {
                Some(token) => query = format!("{first}&continue={token}"),
                None => return Ok(objects),
            }
        }
        Err(CallError::Refused(format!("there are more than {PAGES_MAX} pages of objects")))
    }

    fn url<K: Kind>(&self, name: &str, query: &str) -> String {
        let slash = if name.is_empty() { "" } else { "/" };
        let namespace = K::Scope::NAMESPACED.then_some(self.namespace.as_str());
        format!("{}{slash}{name}{query}", K::url_path(&(), namespace))
    }

    async fn call<K: Kind, T: DeserializeOwned>(
        &self,
        deadline: Deadline,
        name: &str,
        request: &(dyn Fn() -> http::Result<Request<Vec<u8>>> + Sync),
    ) -> Result<T, CallError> {
        let mut pause = THROTTLED_PAUSE;
        for _ in 0..=THROTTLED_REPEATS_MAX {
            let request =
                request().map_err(|e| CallError::Refused(format!("no request can be made: {e}")))?;
            let Ok(answer) = tokio::time::timeout_at(deadline.0, self.client.request::<T>(request)).await
            else {
                break;
            };
            match answer {
                Err(kube::Error::Api(status)) if status.code == 429 => {
                    if deadline.0 < Instant::now() + pause {
                        return Err(CallError::Unknown(format!(
                            "the API server throttles: {}",
                            status.message
                        )));
                    }
                    tokio::time::sleep(pause).await;
                    pause *= 2;
                }
                answer => return answer.map_err(|error| classify::<K>(error, name)),
            }
        }
        Err(CallError::Unknown(format!("the API server gave no answer within {CALL_TIMEOUT:?}")))
    }
}

/// When a call of a store must have ended.
#[derive(Debug, Clone, Copy)]
pub(super) struct Deadline(Instant);

impl Deadline {
    /// For a call that begins now.
    pub(super) fn new() -> Self {
        Self(Instant::now() + CALL_TIMEOUT)
    }
}

/// A kind that is known to the compiler.
pub(super) trait Kind:
    Resource<DynamicType = (), Scope: Scope> + Serialize + DeserializeOwned + Send + Sync
{
}

impl<K: Resource<DynamicType = (), Scope: Scope> + Serialize + DeserializeOwned + Send + Sync> Kind for K {}

/// Whether objects of a kind are in a namespace.
pub(super) trait Scope {
    const NAMESPACED: bool;
}

impl Scope for ClusterResourceScope {
    const NAMESPACED: bool = false;
}

impl Scope for NamespaceResourceScope {
    const NAMESPACED: bool = true;
}

#[derive(serde::Deserialize)]
struct Page<K> {
    #[serde(default)]
    metadata: PageMeta,
    items: Vec<K>,
}

#[derive(Default, serde::Deserialize)]
struct PageMeta {
    #[serde(rename = "continue")]
    continue_: Option<String>,
}

fn json(builder: http::request::Builder, body: &[u8]) -> http::Result<Request<Vec<u8>>> {
    builder.header(CONTENT_TYPE, "application/json").body(body.to_vec())
}

fn to_json(object: &impl Serialize) -> Result<Vec<u8>, CallError> {
    serde_json::to_vec(object).map_err(|e| CallError::Refused(format!("the object has no JSON form: {e}")))
}

/// What an error says. Only the API server's own decisions, which it names by reason, tell that nothing was changed: a
/// proxy's error page has none, and a 404 for an unknown kind (its definition is not installed, or the server has only just
/// started) names no object.
fn classify<K: Kind>(error: kube::Error, name: &str) -> CallError {
    let kube::Error::Api(status) = error else {
        return CallError::Unknown(format!("the API server was not understood: {}", with_causes(&error)));
    };
    let names_it = status.details.as_ref().is_some_and(|d| d.name == name && d.kind == K::plural(&()));
    let sentence = || format!("{} {name}: {}", K::kind(&()), status.message);
    match status.reason.as_str() {
        "NotFound" if names_it && !name.is_empty() => CallError::Missing,
        "AlreadyExists" => CallError::Taken,
        "Conflict" => CallError::Moved,
        "BadRequest"
        | "Invalid"
        | "Unauthorized"
        | "Forbidden"
        | "RequestEntityTooLarge"
        | "MethodNotAllowed"
        | "NotAcceptable"
        | "UnsupportedMediaType" => CallError::Refused(sentence()),
        _ => CallError::Unknown(format!("{} (status {}, {})", sentence(), status.code, status.reason)),
    }
}

fn with_causes(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.contains(&more) {
            text.push_str(": ");
            text.push_str(&more);
        }
        cause = error.source();
    }
    text
}
