//! Asking a running agent from another process of the same binary.

use std::path::Path;
use std::time::Duration;

use holdfast_proto::agent as pb;
use holdfast_proto::agent::agent_client::AgentClient;
use tonic::transport::Channel;

use crate::engine::sentence;

/// A dump of many leases is larger than a call's usual answer.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// How long `ready` waits for the agent; kubelet's own patience with a probe is set in the manifest.
const READY_TIMEOUT: Duration = Duration::from_secs(5);

/// A client of the agent that serves on `socket`. `timeout` holds for each call.
///
/// # Errors
/// A sentence: nobody serves there.
pub(crate) async fn connect(socket: &Path, timeout: Duration) -> Result<AgentClient<Channel>, String> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let path = path.clone();
        async move { tokio::net::UnixStream::connect(path).await.map(hyper_util::rt::TokioIo::new) }
    });
    // The address is not used: the connector knows the socket.
    let endpoint = tonic::transport::Endpoint::from_static("http://agent").timeout(timeout);
    let channel = endpoint.connect_with_connector(connector).await.map_err(|error| sentence(&error))?;
    Ok(AgentClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX))
}

/// Whether the agent on `socket` could serve an ADD now.
///
/// # Errors
/// A sentence why not.
pub async fn ready(socket: &Path) -> Result<(), String> {
    let asked = async {
        let mut client = connect(socket, READY_TIMEOUT)
            .await
            .map_err(|error| format!("the node agent is down: {}: {error}", socket.display()))?;
        let reply =
            client.status(pb::StatusRequest {}).await.map_err(|status| status.message().to_owned())?;
        match reply.into_inner().failure {
            None => Ok(()),
            Some(failure) if failure.details.is_empty() => Err(failure.msg),
            Some(failure) => Err(format!("{}: {}", failure.msg, failure.details)),
        }
    };
    let answered = tokio::time::timeout(READY_TIMEOUT, asked).await;
    answered.unwrap_or_else(|_| Err(format!("no answer within {} s", READY_TIMEOUT.as_secs())))
}
