//! holdfast: the operators' command. It asks the processes of the node it runs on.

mod explain;
mod flows;
mod matrix;
mod standing;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};
use holdfast_proto::agent as agent_pb;
use holdfast_proto::agent::agent_client::AgentClient;
use holdfast_proto::storage as storage_pb;
use holdfast_proto::storage::data_client::DataClient;
use serde_json::json;
use tonic::transport::{Channel, Endpoint};

/// A process that serves answers well within this.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// Looks into volumes and network policy of this node.
#[derive(Parser)]
#[command(name = "holdfast", version)]
struct Args {
    #[command(subcommand)]
    part: Part,
}

#[derive(Subcommand)]
enum Part {
    /// Volumes attached to this node.
    #[command(subcommand)]
    Volume(VolumeVerb),
    /// Network policy.
    #[command(subcommand)]
    Policy(PolicyVerb),
}

#[derive(Subcommand)]
enum VolumeVerb {
    /// State of an attached volume and its replicas.
    Status {
        /// The volume's id.
        volume: String,
        /// Socket of the data process.
        #[arg(long, default_value = "/run/holdfast/data.sock")]
        socket: String,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
}

#[derive(Subcommand)]
enum PolicyVerb {
    /// Who decides about a connection: `holdfast policy explain FROM '->' TO:PORT/PROTO`.
    ///
    /// FROM and TO are namespace/pod or an address (in brackets for IPv6 before a port); PROTO is tcp unless given. `to`
    /// may stand for the arrow, which a shell wants quoted. Told are the policies' verdict and, for the ends that are pods of
    /// this node, whether the kernel holds elements that give the same. Exits with 0 when the policies allow it, 1 when
    /// they deny it, 2 on an error.
    Explain(explain::Options),
    /// How policies stand on this node: `holdfast policy status [NAMESPACE/NAME | cluster NAME]`.
    ///
    /// In force since when, or why not, and how many pods of this node each selects. Exits with 0 when a policy that was
    /// named is in force, 1 when it is not, 2 on an error.
    Status(standing::Options),
    /// Connections that policy lets through or drops on this node, as they happen, with the pods and who decides.
    ///
    /// A sample: the kernel passes on at most 100 of each verdict per second. Who decides is told by the policies as they
    /// are now. Ends when interrupted.
    Flows(flows::Options),
    /// Who reaches whom on one port. Pods of the whole cluster, at most 200 at once.
    Matrix(matrix::Options),
    /// The node agent's state as JSON.
    Dump {
        /// Socket of the node agent.
        #[arg(long, default_value = "/run/holdfast/netd.sock")]
        socket: String,
    },
}

#[tokio::main(flavor = "current_thread")]
async fn main() -> ExitCode {
    // An arrow would be read as an option.
    let words = std::env::args_os().map(|word| if word == "->" { "to".into() } else { word });
    match run(Args::parse_from(words).part).await {
        Ok(exit) => exit,
        Err(error) => {
            eprintln!("holdfast: {error:#}");
            ExitCode::from(2)
        }
    }
}

async fn run(part: Part) -> anyhow::Result<ExitCode> {
    match part {
        Part::Volume(VolumeVerb::Status { volume, socket, json }) => status(volume, &socket, json).await,
        Part::Policy(PolicyVerb::Explain(options)) => explain::run(options).await,
        Part::Policy(PolicyVerb::Status(options)) => standing::run(options).await,
        Part::Policy(PolicyVerb::Flows(options)) => flows::run(options).await,
        Part::Policy(PolicyVerb::Matrix(options)) => matrix::run(options).await,
        Part::Policy(PolicyVerb::Dump { socket }) => dump(&socket).await,
    }
}

async fn status(volume: String, socket: &str, as_json: bool) -> anyhow::Result<ExitCode> {
    let mut client = DataClient::new(connect(socket, "data process").await?);
    let request = storage_pb::GetStatusRequest { volume_id: volume.clone() };
    let reply = client.get_status(request).await.map_err(refusal)?.into_inner();
    let epoch = reply.epoch.map(|epoch| epoch.number).unwrap_or_default();
    if as_json {
        let replicas = reply.replicas.iter().map(|replica| {
            json!({
                "replica": replica.replica_id, "node": replica.node, "state": replica.state,
                "resyncBytesDone": replica.resync_bytes_done, "resyncBytesTotal": replica.resync_bytes_total,
            })
        });
        let object = json!({
            "volume": volume, "state": reply.state, "reason": reply.reason, "generation": reply.generation,
            "epoch": epoch, "device": reply.device, "writesAcknowledged": reply.writes_acknowledged,
            "longestStallMs": reply.longest_stall_ms, "replicas": replicas.collect::<Vec<_>>(),
        });
        println!("{object}");
        return Ok(ExitCode::SUCCESS);
    }
    println!("volume      {volume}");
    println!("state       {}{}", reply.state, in_brackets(&reply.reason));
    println!("generation  {}, epoch {epoch}", reply.generation);
    println!("device      {}", if reply.device.is_empty() { "-" } else { &reply.device });
    println!(
        "writes      {} acknowledged, longest stall {} ms",
        reply.writes_acknowledged, reply.longest_stall_ms
    );
    println!("{:<32}  {:<16}  {:<12}  resync", "replica", "node", "state");
    for replica in reply.replicas {
        let resync = match replica.resync_bytes_total {
            0 => "-".to_owned(),
            total => format!("{} of {total} bytes", replica.resync_bytes_done),
        };
        println!("{:<32}  {:<16}  {:<12}  {resync}", replica.replica_id, replica.node, replica.state);
    }
    Ok(ExitCode::SUCCESS)
}

async fn dump(socket: &str) -> anyhow::Result<ExitCode> {
    let mut client = AgentClient::new(connect(socket, "node agent").await?);
    println!("{}", client.dump(agent_pb::DumpRequest {}).await.map_err(refusal)?.into_inner().json);
    Ok(ExitCode::SUCCESS)
}

async fn connect(socket: &str, what: &str) -> anyhow::Result<Channel> {
    connect_for(socket, what, CALL_TIMEOUT).await
}

/// A connection whose calls must be answered within `timeout`; a stream must begin by then.
async fn connect_for(socket: &str, what: &str, timeout: Duration) -> anyhow::Result<Channel> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let path = path.clone();
        async move {
            let stream = tokio::net::UnixStream::connect(path).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    // The address is not used: the connector knows the socket.
    let endpoint = Endpoint::from_static("http://local").timeout(timeout).connect_timeout(CALL_TIMEOUT);
    let connected = endpoint.connect_with_connector(connector).await;
    connected.with_context(|| format!("the {what} does not answer on {socket}"))
}

fn refusal(status: tonic::Status) -> anyhow::Error {
    anyhow::anyhow!("{} ({:?})", status.message(), status.code())
}

fn in_brackets(text: &str) -> String {
    if text.is_empty() { String::new() } else { format!(" ({text})") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verbs_take_their_words_and_options_in_either_order() {
        let parses = |words: &str| Args::try_parse_from(words.split(' ')).is_ok();
        for right in [
            "holdfast policy explain shop/web to shop/db:80 --json",
            "holdfast policy explain --json shop/web to shop/db:80",
            "holdfast policy status",
            "holdfast policy status shop/to-db --json",
            "holdfast policy status --json cluster base",
        ] {
            assert!(parses(right), "{right}");
        }
        for wrong in ["holdfast policy explain", "holdfast policy status a b c", "holdfast policy"] {
            assert!(!parses(wrong), "{wrong}");
        }
    }
}
