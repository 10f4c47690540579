//! holdfast: the operators' command. It asks the processes of the node it runs on.

mod explain;
mod flows;
mod matrix;
mod node;
mod records;
mod standing;
mod volume;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Context;
use clap::{Parser, Subcommand};
use holdfast_proto::agent as agent_pb;
use holdfast_proto::agent::agent_client::AgentClient;
use holdfast_proto::storage::operator_client::OperatorClient;
use tonic::transport::{Channel, Endpoint};

/// A process that serves answers well within this.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// An answer about ten thousand policies, or about as many leases, takes some MiB.
const REPLY_BYTES_MAX: usize = 64 << 20;

/// Looks into volumes and network policy of this node, and decides about the cluster's nodes and replicas.
#[derive(Parser)]
#[command(name = "holdfast", version)]
struct Args {
    #[command(subcommand)]
    part: Part,
}

#[derive(Subcommand)]
enum Part {
    /// Volumes.
    #[command(subcommand)]
    Volume(volume::Verb),
    /// The cluster's storage nodes. Asks the controller, so it runs where the controller does.
    #[command(subcommand)]
    Node(node::Verb),
    /// Volume records after the record store was lost. Asks the controller.
    #[command(subcommand)]
    Records(records::Verb),
    /// Network policy.
    #[command(subcommand)]
    Policy(PolicyVerb),
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
        Part::Volume(verb) => volume::run(verb).await,
        Part::Node(verb) => node::run(verb).await,
        Part::Records(verb) => records::run(verb).await,
        Part::Policy(PolicyVerb::Explain(options)) => explain::run(options).await,
        Part::Policy(PolicyVerb::Status(options)) => standing::run(options).await,
        Part::Policy(PolicyVerb::Flows(options)) => flows::run(options).await,
        Part::Policy(PolicyVerb::Matrix(options)) => matrix::run(options).await,
        Part::Policy(PolicyVerb::Dump { socket }) => dump(&socket).await,
    }
}

async fn dump(socket: &str) -> anyhow::Result<ExitCode> {
    let client = AgentClient::new(connect(socket, "node agent").await?);
    let mut client = client.max_decoding_message_size(REPLY_BYTES_MAX);
    println!("{}", client.dump(agent_pb::DumpRequest {}).await.map_err(refusal)?.into_inner().json);
    Ok(ExitCode::SUCCESS)
}

async fn connect(socket: &str, what: &str) -> anyhow::Result<Channel> {
    connect_for(socket, what, CALL_TIMEOUT).await
}

/// The controller, for what an operator decides; it must answer within `timeout`.
async fn operator(socket: &str, timeout: Duration) -> anyhow::Result<OperatorClient<Channel>> {
    Ok(OperatorClient::new(connect_for(socket, "controller", timeout).await?))
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
            "holdfast volume status 12 --json",
            "holdfast volume replace-replica 12",
            "holdfast volume promote-replica 12 34 --yes-the-others-are-lost",
            "holdfast records rescue --json",
            "holdfast records rescue --apply --volume 12 --volume 34",
            "holdfast node list --json",
            "holdfast node drain --wait node-a",
            "holdfast node activate node-a",
            "holdfast node remove node-a --yes-it-never-comes-back",
        ] {
            assert!(parses(right), "{right}");
        }
        for wrong in [
            "holdfast policy explain",
            "holdfast policy status a b c",
            "holdfast policy",
            "holdfast node drain",
            "holdfast records",
            "holdfast records rescue 12",
            "holdfast node remove node-a",
            "holdfast volume promote-replica 12 34",
        ] {
            assert!(!parses(wrong), "{wrong}");
        }
    }
}
