//! `holdfast policy explain`: who decides about a connection, and what the kernel does.

use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::Args;
use holdfast_proto::agent as pb;
use holdfast_proto::agent::agent_client::AgentClient;
use holdfast_proto::agent::live_answer::State;
use serde_json::{Value, json};

use crate::{connect, in_brackets, refusal};

/// What is asked.
#[derive(Debug, Args)]
pub struct Options {
    /// FROM -> TO:PORT/PROTO
    #[arg(required = true)]
    question: Vec<String>,
    /// Socket of the node agent.
    #[arg(long, default_value = "/run/holdfast/netd.sock")]
    socket: String,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Asks and prints.
pub async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let request = parse_question(&options.question.join(" "))?;
    let mut client = AgentClient::new(connect(&options.socket, "node agent").await?);
    let reply = client.explain(request.clone()).await.map_err(refusal)?.into_inner();
    if let Some(failure) = reply.failure {
        bail!("{}{}", failure.msg, in_brackets(&failure.details));
    }
    if options.json {
        println!("{}", as_json(&request, &reply));
    } else {
        print!("{}", as_text(&request, &reply));
    }
    Ok(if reply.allowed { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn as_text(request: &pb::ExplainRequest, reply: &pb::ExplainReply) -> String {
    let verdict = if reply.allowed { "allowed" } else { "denied" };
    let mut text =
        format!("{} -> {}:{}/{}: {verdict}\n", request.from, request.to, request.port, request.protocol);
    let directions =
        [("egress", &reply.egress, &reply.egress_live), ("ingress", &reply.ingress, &reply.ingress_live)];
    for (direction, answer, live) in directions {
        text.push_str(&format!("  {direction:<7}  {answer}\n"));
        if let Some(live) = live {
            text.push_str(&format!("           {}\n", live_text(&reply.node, live)));
        }
    }
    for note in &reply.notes {
        text.push_str(&format!("  note     {note}\n"));
    }
    text
}

fn live_text(node: &str, live: &pb::LiveAnswer) -> String {
    let (found, note) = (&live.found, &live.note);
    match live.state() {
        State::Agrees => format!("kernel of {node} agrees: {found}"),
        State::Differs => {
            let verdict = match live.allowed {
                Some(true) => format!(", it allows: {found}"),
                Some(false) => format!(", it denies: {found}"),
                None => String::new(),
            };
            let differences = live.differences.iter().map(|sentence| format!("\n             {sentence}"));
            format!("kernel of {node} differs{verdict}{}", differences.collect::<String>())
        }
        State::Elsewhere => format!("kernel of {node} is not asked: {note}"),
        State::Unread => format!("kernel of {node} could not be read: {note}"),
    }
}

fn as_json(request: &pb::ExplainRequest, reply: &pb::ExplainReply) -> Value {
    let live = |live: &Option<pb::LiveAnswer>| {
        live.as_ref().map(|live| {
            let state = match live.state() {
                State::Agrees => "agrees",
                State::Differs => "differs",
                State::Elsewhere => "elsewhere",
                State::Unread => "unread",
            };
            json!({
                "state": state, "note": live.note, "allowed": live.allowed, "found": live.found,
                "differences": live.differences,
            })
        })
    };
    json!({
        "from": request.from, "to": request.to, "port": request.port, "protocol": request.protocol,
        "allowed": reply.allowed, "egress": reply.egress, "ingress": reply.ingress, "node": reply.node,
        "kernel": { "egress": live(&reply.egress_live), "ingress": live(&reply.ingress_live) },
        "notes": reply.notes,
    })
}

/// Reads `FROM -> TO:PORT/PROTO`.
fn parse_question(text: &str) -> anyhow::Result<pb::ExplainRequest> {
    let usage = "write FROM '->' TO:PORT/PROTO, for example shop/web '->' shop/db:5432/tcp";
    let (from, target) = text.split_once("->").or_else(|| text.split_once(" to ")).context(usage)?;
    let target = target.trim();
    let (target, protocol) = match target.rsplit_once('/') {
        Some((rest, word)) if ["tcp", "udp", "sctp"].contains(&word.to_ascii_lowercase().as_str()) => {
            (rest, word.to_ascii_lowercase())
        }
        Some(_) | None => (target, "tcp".to_owned()),
    };
    let (to, port) = target.rsplit_once(':').context(usage)?;
    let port = port.parse::<u16>().with_context(|| format!("\"{port}\" is not a port; {usage}"))?;
    let to = to.strip_prefix('[').and_then(|to| to.strip_suffix(']')).unwrap_or(to);
    let (from, to) = (from.trim().to_owned(), to.to_owned());
    Ok(pb::ExplainRequest { from, to, port: port.into(), protocol })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> (String, String, u32, String) {
        let request = parse_question(text).unwrap();
        (request.from, request.to, request.port, request.protocol)
    }

    #[test]
    fn questions_are_read() {
        let db = |protocol: &str| ("shop/web".into(), "shop/db".into(), 5432, protocol.into());
        assert_eq!(parsed("shop/web -> shop/db:5432/udp"), db("udp"));
        assert_eq!(parsed("shop/web->shop/db:5432"), db("tcp"));
        assert_eq!(parsed("shop/web to shop/db:5432/TCP"), db("tcp"));
        assert_eq!(
            parsed("10.0.0.1 -> [fd00::1]:80/tcp"),
            ("10.0.0.1".into(), "fd00::1".into(), 80, "tcp".into())
        );
        for wrong in ["shop/web shop/db:80", "a -> b", "a -> b:http", "a -> b:70000"] {
            assert!(parse_question(wrong).is_err(), "{wrong}");
        }
    }

    fn mk_reply() -> pb::ExplainReply {
        let egress_live = pb::LiveAnswer {
            state: State::Agrees.into(),
            allowed: Some(true),
            found: "no class: nothing isolates it".into(),
            ..pb::LiveAnswer::default()
        };
        let ingress_live = pb::LiveAnswer {
            state: State::Differs.into(),
            allowed: Some(true),
            found: "class 7, identity 3, pair with identity 3 profile 5 allows it".into(),
            differences: vec!["the kernel has class 7 for 10.0.0.9 (ingress), compiled is class 9".into()],
            ..pb::LiveAnswer::default()
        };
        pb::ExplainReply {
            egress: "allowed: no policy selects shop/web for egress".into(),
            ingress: "denied: no rule admits it".into(),
            egress_live: Some(egress_live),
            ingress_live: Some(ingress_live),
            notes: vec!["NetworkPolicy shop/bad is invalid".into()],
            node: "node-a".into(),
            ..pb::ExplainReply::default()
        }
    }

    #[test]
    fn an_answer_tells_what_the_policies_say_and_what_the_kernel_of_the_node_does() {
        let request = parse_question("shop/web -> shop/db:5432").unwrap();
        let told = "\
shop/web -> shop/db:5432/tcp: denied
  egress   allowed: no policy selects shop/web for egress
           kernel of node-a agrees: no class: nothing isolates it
  ingress  denied: no rule admits it
           kernel of node-a differs, it allows: class 7, identity 3, pair with identity 3 profile 5 allows it
             the kernel has class 7 for 10.0.0.9 (ingress), compiled is class 9
  note     NetworkPolicy shop/bad is invalid
";
        assert_eq!(as_text(&request, &mk_reply()), told);
    }

    #[test]
    fn a_direction_that_is_not_judged_here_says_where_and_an_unread_kernel_why() {
        let note = |state: State, note: &str| pb::LiveAnswer {
            state: state.into(),
            note: note.into(),
            ..pb::LiveAnswer::default()
        };
        let elsewhere = note(State::Elsewhere, "judged on node node-b");
        assert_eq!(live_text("node-a", &elsewhere), "kernel of node-a is not asked: judged on node node-b");
        let unread = note(State::Unread, "no privilege");
        assert_eq!(live_text("node-a", &unread), "kernel of node-a could not be read: no privilege");
        let damaged = pb::LiveAnswer { differences: vec!["gone".into()], ..note(State::Differs, "") };
        assert_eq!(live_text("node-a", &damaged), "kernel of node-a differs\n             gone");
    }

    #[test]
    fn the_json_has_both_sides() {
        let request = parse_question("shop/web -> shop/db:5432").unwrap();
        let value = as_json(&request, &mk_reply());
        assert_eq!(value["allowed"], false);
        assert_eq!(value["kernel"]["egress"]["state"], "agrees");
        let ingress = &value["kernel"]["ingress"];
        assert_eq!((&ingress["state"], &ingress["allowed"]), (&json!("differs"), &json!(true)));
        assert_eq!(ingress["differences"].as_array().unwrap().len(), 1);
        assert_eq!(value["node"], "node-a");
        assert_eq!(value["notes"][0], "NetworkPolicy shop/bad is invalid");
    }
}
