//! `holdfast policy flows`: the node agent's flow log, one line per event.

use std::io::{ErrorKind, Write};
use std::process::ExitCode;

use clap::{Args, ValueEnum};
use holdfast_proto::agent as pb;
use holdfast_proto::agent::agent_client::AgentClient;
use serde_json::{Value, json};

use crate::{connect, refusal};

/// What is shown.
#[derive(Debug, Args)]
pub struct Options {
    /// Only this client: namespace/pod or an address.
    #[arg(long)]
    from: Option<String>,
    /// Only this server: namespace/pod or an address.
    #[arg(long)]
    to: Option<String>,
    /// Only this verdict.
    #[arg(long, value_enum)]
    verdict: Option<Verdict>,
    /// Only where the client's or the server's pod is of this namespace.
    #[arg(long)]
    namespace: Option<String>,
    /// Only this port of the server.
    #[arg(long, value_parser = clap::value_parser!(u16).range(1..))]
    port: Option<u16>,
    /// One JSON object per line.
    #[arg(long)]
    json: bool,
    /// Socket of the node agent.
    #[arg(long, default_value = "/run/holdfast/netd.sock")]
    socket: String,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Verdict {
    Allowed,
    Denied,
}

/// Prints events until the agent ends or nobody reads the output.
pub async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let verdict = match options.verdict {
        None => "",
        Some(Verdict::Allowed) => "allowed",
        Some(Verdict::Denied) => "denied",
    };
    let request = pb::FlowsRequest {
        from: options.from.unwrap_or_default(),
        to: options.to.unwrap_or_default(),
        namespace: options.namespace.unwrap_or_default(),
        verdict: verdict.to_owned(),
        port: options.port.unwrap_or_default().into(),
    };
    let mut client = AgentClient::new(connect(&options.socket, "node agent").await?);
    let mut flows = client.flows(request).await.map_err(refusal)?.into_inner();
    while let Some(flow) = flows.message().await.map_err(refusal)? {
        let text = if options.json { format!("{}\n", as_json(&flow)) } else { as_text(&flow) };
        match std::io::stdout().write_all(text.as_bytes()) {
            // `head` has seen enough.
            Err(error) if error.kind() == ErrorKind::BrokenPipe => break,
            written => written?,
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn as_text(flow: &pb::Flow) -> String {
    let lost = match flow.lost {
        0 => String::new(),
        lost => format!("({lost} events were lost: nobody read them in time)\n"),
    };
    let verdict = if flow.allowed { "allowed" } else { "denied" };
    let end = |end: Option<&pb::FlowEnd>| end.map_or_else(String::new, end_text);
    let (client, server) = (end(flow.client.as_ref()), end(flow.server.as_ref()));
    let target = match (flow.port, server.contains(':') && !server.ends_with(')')) {
        (0, _) => server,
        (port, true) => format!("[{server}]:{port}"),
        (port, false) => format!("{server}:{port}"),
    };
    let mut line = format!(
        "{lost}{}  {verdict:<7}  {client} -> {target}/{}{}",
        time_text(flow.time_us),
        flow.protocol,
        if flow.stateless { " (of no connection)" } else { "" }
    );
    for (direction, decision) in [("egress", &flow.egress), ("ingress", &flow.ingress)] {
        if let Some(decision) = decision {
            let word = if decision.allowed { "allowed" } else { "denied" };
            line.push_str(&format!("\n    {direction:<7} {word}: {}", decision.reason));
        }
    }
    line.push('\n');
    line
}

fn end_text(end: &pb::FlowEnd) -> String {
    match end.pod.as_str() {
        "" => end.address.clone(),
        pod => format!("{}/{pod} ({})", end.namespace, end.address),
    }
}

/// Time of day in UTC, with milliseconds.
fn time_text(time_us: u64) -> String {
    let ms = time_us / 1000;
    let (hours, minutes, seconds) = (ms / 3_600_000 % 24, ms / 60_000 % 60, ms / 1000 % 60);
    format!("{hours:02}:{minutes:02}:{seconds:02}.{:03}", ms % 1000)
}

fn as_json(flow: &pb::Flow) -> Value {
    let end = |end: Option<&pb::FlowEnd>| {
        let end = end.cloned().unwrap_or_default();
        let pod = (!end.pod.is_empty()).then(|| format!("{}/{}", end.namespace, end.pod));
        json!({ "address": end.address, "pod": pod })
    };
    let decision = |decision: Option<&pb::FlowDecision>| {
        decision.map(|decision| {
            let rule = decision.decided_by.as_ref();
            json!({
                "allowed": decision.allowed, "reason": decision.reason, "tier": rule.map(|rule| &rule.tier),
                "policy": rule.map(|rule| &rule.policy), "rule": rule.map(|rule| rule.rule),
                "ruleName": rule.map(|rule| &rule.rule_name),
            })
        })
    };
    json!({
        "timeUs": flow.time_us, "allowed": flow.allowed, "from": end(flow.client.as_ref()),
        "to": end(flow.server.as_ref()), "protocol": flow.protocol, "port": flow.port, "stateless": flow.stateless,
        "egress": decision(flow.egress.as_ref()), "ingress": decision(flow.ingress.as_ref()), "lost": flow.lost,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_flow() -> pb::Flow {
        let decision = |allowed, reason: &str| {
            Some(pb::FlowDecision { allowed, reason: reason.into(), decided_by: None })
        };
        pb::Flow {
            time_us: 1_700_003_661_042_999,
            client: Some(pb::FlowEnd {
                address: "10.0.0.1".into(),
                namespace: "shop".into(),
                pod: "web".into(),
            }),
            server: Some(pb::FlowEnd { address: "fd00::2".into(), ..pb::FlowEnd::default() }),
            protocol: "tcp".into(),
            port: 443,
            egress: decision(false, "no rule admits it"),
            ingress: decision(true, "no policy isolates it"),
            ..pb::Flow::default()
        }
    }

    #[test]
    fn an_event_is_told_with_both_directions() {
        let mut flow = mk_flow();
        let told = "23:14:21.042  denied   shop/web (10.0.0.1) -> [fd00::2]:443/tcp\n    \
                    egress  denied: no rule admits it\n    ingress allowed: no policy isolates it\n";
        assert_eq!(as_text(&flow), told);
        flow.lost = 12;
        assert!(as_text(&flow).starts_with("(12 events were lost"));
    }

    #[test]
    fn a_protocol_without_ports_shows_none_and_a_packet_of_no_connection_says_so() {
        let flow = pb::Flow {
            protocol: "icmp".into(),
            port: 0,
            stateless: true,
            allowed: true,
            client: Some(pb::FlowEnd { address: "10.0.0.1".into(), ..pb::FlowEnd::default() }),
            server: Some(pb::FlowEnd { address: "10.0.0.2".into(), ..pb::FlowEnd::default() }),
            ..pb::Flow::default()
        };
        assert_eq!(as_text(&flow), "00:00:00.000  allowed  10.0.0.1 -> 10.0.0.2/icmp (of no connection)\n");
    }

    #[test]
    fn the_json_names_the_rule_that_decides() {
        let mut flow = mk_flow();
        let rule =
            pb::PolicyRule { tier: "Admin".into(), policy: "base".into(), rule: 2, rule_name: "dns".into() };
        flow.egress.as_mut().unwrap().decided_by = Some(rule);
        let value = as_json(&flow);
        let egress = &value["egress"];
        assert_eq!((&egress["tier"], &egress["policy"]), (&json!("Admin"), &json!("base")));
        assert_eq!((&egress["rule"], &egress["ruleName"]), (&json!(2), &json!("dns")));
        assert_eq!(value["ingress"]["policy"], Value::Null, "no rule matches");
    }

    #[test]
    fn the_json_names_pods_where_there_are_some() {
        let value = as_json(&mk_flow());
        assert_eq!(value["from"], json!({ "address": "10.0.0.1", "pod": "shop/web" }));
        assert_eq!(value["to"], json!({ "address": "fd00::2", "pod": null }));
        assert_eq!(value["egress"]["allowed"], false);
        assert_eq!(value["timeUs"], 1_700_003_661_042_999_u64);
    }
}
