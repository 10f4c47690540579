//! As much of a CRI client as the tests need (`runtime.v1`, from Kubernetes' cri-api): messages with the fields that are used.

use std::collections::HashMap;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use http::uri::PathAndQuery;
use hyper_util::rt::TokioIo;
use prost::Message;
use tokio::net::UnixStream;
use tokio::runtime::Runtime;
use tonic::transport::{Channel, Endpoint, Uri};
use tonic::{Request, Status};
use tonic_prost::ProstCodec;

/// Longer than any plugin takes.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Clone, PartialEq, Message)]
pub struct Metadata {
    #[prost(string, tag = "1")]
    pub name: String,
    #[prost(string, tag = "2")]
    pub uid: String,
    #[prost(string, tag = "3")]
    pub namespace: String,
    #[prost(uint32, tag = "4")]
    pub attempt: u32,
}

#[derive(Clone, PartialEq, Message)]
pub struct LinuxConfig {
    #[prost(string, tag = "1")]
    pub cgroup_parent: String,
}

/// Of TCP.
#[derive(Clone, PartialEq, Message)]
pub struct PortMapping {
    #[prost(int32, tag = "2")]
    pub container_port: i32,
    #[prost(int32, tag = "3")]
    pub host_port: i32,
}

#[derive(Clone, PartialEq, Message)]
pub struct SandboxConfig {
    #[prost(message, optional, tag = "1")]
    pub metadata: Option<Metadata>,
    #[prost(string, tag = "2")]
    pub hostname: String,
    #[prost(message, repeated, tag = "5")]
    pub port_mappings: Vec<PortMapping>,
    #[prost(map = "string, string", tag = "7")]
    pub annotations: HashMap<String, String>,
    #[prost(message, optional, tag = "8")]
    pub linux: Option<LinuxConfig>,
}

#[derive(Clone, PartialEq, Message)]
struct RunRequest {
    #[prost(message, optional, tag = "1")]
    config: Option<SandboxConfig>,
}

/// A request or an answer that is a sandbox's id and nothing else.
#[derive(Clone, PartialEq, Message)]
struct SandboxId {
    #[prost(string, tag = "1")]
    id: String,
}

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

#[derive(Clone, PartialEq, Message)]
pub struct PodIp {
    #[prost(string, tag = "1")]
    pub ip: String,
}

#[derive(Clone, PartialEq, Message)]
pub struct NetworkStatus {
    #[prost(string, tag = "1")]
    pub ip: String,
    #[prost(message, repeated, tag = "2")]
    pub additional: Vec<PodIp>,
}

/// `PodSandboxStatus`.
#[derive(Clone, PartialEq, Message)]
pub struct SandboxStatus {
    #[prost(string, tag = "1")]
    pub id: String,
    /// 0: ready.
    #[prost(int32, tag = "3")]
    pub state: i32,
    #[prost(message, optional, tag = "5")]
    pub network: Option<NetworkStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct StatusReply {
    #[prost(message, optional, tag = "1")]
    status: Option<SandboxStatus>,
}

#[derive(Clone, PartialEq, Message)]
struct ListReply {
    #[prost(message, repeated, tag = "1")]
    items: Vec<SandboxId>,
}

#[derive(Clone, PartialEq, Message)]
struct Condition {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(bool, tag = "2")]
    holds: bool,
    #[prost(string, tag = "4")]
    message: String,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeStatus {
    #[prost(message, repeated, tag = "1")]
    conditions: Vec<Condition>,
}

#[derive(Clone, PartialEq, Message)]
struct RuntimeStatusReply {
    #[prost(message, optional, tag = "1")]
    status: Option<RuntimeStatus>,
}

/// A client of the runtime's socket.
pub struct Cri {
    runtime: Runtime,
    channel: Channel,
}

impl Cri {
    /// Connects to a socket as the host sees it.
    pub fn connect(socket: &Path) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let path = socket.to_owned();
        let connector = tower::service_fn(move |_: Uri| {
            let path = path.clone();
            async move { UnixStream::connect(path).await.map(TokioIo::new) }
        });
        let endpoint = Endpoint::from_static("http://cri").timeout(CALL_TIMEOUT);
        let channel =
            runtime.block_on(endpoint.connect_with_connector(connector)).context("no CRI server")?;
        Ok(Self { runtime, channel })
    }

    /// `RunPodSandbox`; the answer is the sandbox's id.
    pub fn run(&self, config: SandboxConfig) -> Result<String, Status> {
        let answer: SandboxId =
            self.call("/runtime.v1.RuntimeService/RunPodSandbox", RunRequest { config: Some(config) })?;
        Ok(answer.id)
    }

    /// `PodSandboxStatus`.
    pub fn status(&self, id: &str) -> Result<SandboxStatus, Status> {
        let id = SandboxId { id: id.to_owned() };
        let answer: StatusReply = self.call("/runtime.v1.RuntimeService/PodSandboxStatus", id)?;
        answer.status.ok_or_else(|| Status::internal("no status"))
    }

    /// Ids by `ListPodSandbox`.
    pub fn list(&self) -> Result<Vec<String>, Status> {
        let answer: ListReply = self.call("/runtime.v1.RuntimeService/ListPodSandbox", Nothing {})?;
        Ok(answer.items.into_iter().map(|item| item.id).collect())
    }

    /// `StopPodSandbox` and `RemovePodSandbox`.
    pub fn stop_and_remove(&self, id: &str) -> Result<(), Status> {
        let id = SandboxId { id: id.to_owned() };
        let _: Nothing = self.call("/runtime.v1.RuntimeService/StopPodSandbox", id.clone())?;
        let _: Nothing = self.call("/runtime.v1.RuntimeService/RemovePodSandbox", id)?;
        Ok(())
    }

    /// What is not ready by `Status`; none if all is.
    pub fn not_ready(&self) -> Result<Option<String>, Status> {
        let answer: RuntimeStatusReply = self.call("/runtime.v1.RuntimeService/Status", Nothing {})?;
        let conditions = answer.status.unwrap_or_default().conditions;
        if conditions.is_empty() {
            return Ok(Some("no conditions".to_owned()));
        }
        Ok(conditions
            .into_iter()
            .find(|condition| !condition.holds)
            .map(|it| format!("{}: {}", it.name, it.message)))
    }

    fn call<Q, A>(&self, method: &'static str, request: Q) -> Result<A, Status>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let mut client = tonic::client::Grpc::new(self.channel.clone());
        self.runtime.block_on(async {
            let ready = client.ready().await;
            ready.map_err(|error| Status::unavailable(error.to_string()))?;
            let codec: ProstCodec<Q, A> = ProstCodec::default();
            let answer = client.unary(Request::new(request), PathAndQuery::from_static(method), codec).await;
            answer.map(tonic::Response::into_inner)
        })
    }
}
