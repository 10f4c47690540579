//! `holdfast policy matrix`: who reaches whom, as a table.

use std::fmt::Write as _;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::bail;
use clap::Args;
use holdfast_proto::agent as pb;
use holdfast_proto::agent::agent_client::AgentClient;
use serde_json::{Value, json};

use crate::{connect_for, in_brackets, refusal};

/// The agent gives up before.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What is asked.
#[derive(Debug, Args)]
pub struct Options {
    /// Only pods of this namespace.
    #[arg(long)]
    namespace: Option<String>,
    /// The port that is asked about.
    #[arg(long, default_value_t = 80, value_parser = clap::value_parser!(u16).range(1..))]
    port: u16,
    /// tcp, udp or sctp.
    #[arg(long, default_value = "tcp")]
    proto: String,
    /// One JSON object.
    #[arg(long)]
    json: bool,
    /// Socket of the node agent.
    #[arg(long, default_value = "/run/holdfast/netd.sock")]
    socket: String,
}

/// Asks and prints.
pub async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let request = pb::MatrixRequest {
        namespace: options.namespace.unwrap_or_default(),
        port: options.port.into(),
        protocol: options.proto.to_ascii_lowercase(),
    };
    let mut client = AgentClient::new(connect_for(&options.socket, "node agent", TIMEOUT).await?);
    let reply = client.matrix(request.clone()).await.map_err(refusal)?.into_inner();
    if let Some(failure) = reply.failure {
        bail!("{}{}", failure.msg, in_brackets(&failure.details));
    }
    if options.json {
        println!("{}", as_json(&request, &reply));
    } else {
        print!("{}", as_text(&request, &reply));
    }
    Ok(ExitCode::SUCCESS)
}

/// A row per client; columns are the servers' numbers, so that long names do not widen them.
fn as_text(request: &pb::MatrixRequest, reply: &pb::MatrixReply) -> String {
    if reply.pods.is_empty() {
        return "no pods\n".to_owned();
    }
    let digits = reply.pods.len().to_string().len();
    let width = reply.pods.iter().map(String::len).max().unwrap_or_default() + digits + 1;
    let (port, protocol) = (request.port, &request.protocol);
    let mut text =
        format!("to port {port}/{protocol}; rows reach columns: x allowed, . denied\n{:width$}", "");
    for number in 1..=reply.pods.len() {
        let _ = write!(text, " {number:>digits$}");
    }
    text.push('\n');
    for ((number, pod), row) in (1..).zip(&reply.pods).zip(&reply.rows) {
        let _ = write!(text, "{:<width$}", format!("{number:>digits$} {pod}"));
        for allowed in &row.allowed {
            let _ = write!(text, " {:>digits$}", if *allowed { "x" } else { "." });
        }
        text.push('\n');
    }
    text
}

fn as_json(request: &pb::MatrixRequest, reply: &pb::MatrixReply) -> Value {
    let reaches = |row: &pb::MatrixRow| -> Vec<&String> {
        reply.pods.iter().zip(&row.allowed).filter(|(_, allowed)| **allowed).map(|(pod, _)| pod).collect()
    };
    let rows = reply.pods.iter().zip(&reply.rows).map(|(pod, row)| (pod.clone(), json!(reaches(row))));
    json!({
        "port": request.port, "protocol": request.protocol, "pods": reply.pods,
        "reaches": rows.collect::<serde_json::Map<String, Value>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_matrix() -> (pb::MatrixRequest, pb::MatrixReply) {
        let row = |allowed: [bool; 2]| pb::MatrixRow { allowed: allowed.to_vec() };
        let reply = pb::MatrixReply {
            failure: None,
            pods: vec!["shop/db".into(), "shop/web".into()],
            rows: vec![row([true, false]), row([true, true])],
        };
        (pb::MatrixRequest { port: 80, protocol: "tcp".into(), ..pb::MatrixRequest::default() }, reply)
    }

    #[test]
    fn rows_are_clients_and_columns_servers() {
        let (request, reply) = mk_matrix();
        let expected = "to port 80/tcp; rows reach columns: x allowed, . denied\n\
                        \x20          1 2\n1 shop/db  x .\n2 shop/web x x\n";
        assert_eq!(as_text(&request, &reply), expected);
        let json = as_json(&request, &reply);
        assert_eq!(json["reaches"], json!({ "shop/db": ["shop/db"], "shop/web": ["shop/db", "shop/web"] }));
    }

    #[test]
    fn no_pods_are_no_table() {
        let (request, _) = mk_matrix();
        assert_eq!(as_text(&request, &pb::MatrixReply::default()), "no pods\n");
    }
}
