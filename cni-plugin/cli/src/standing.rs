//! `holdfast policy status`: how policies stand on this node.

use std::process::ExitCode;
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::bail;
use clap::Args;
use holdfast_proto::agent as pb;
use holdfast_proto::agent::agent_client::AgentClient;
use serde_json::{Value, json};

use crate::{REPLY_BYTES_MAX, connect, in_brackets, refusal};

/// What is asked.
#[derive(Debug, Args)]
pub struct Options {
    /// NAMESPACE/NAME of a NetworkPolicy, or `cluster NAME` of a ClusterNetworkPolicy; all without it.
    #[arg(num_args = 0..=2)]
    policy: Vec<String>,
    /// Socket of the node agent.
    #[arg(long, default_value = "/run/holdfast/netd.sock")]
    socket: String,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Asks and prints.
pub async fn run(options: Options) -> anyhow::Result<ExitCode> {
    let policy = policy_of(&options.policy)?;
    let channel = connect(&options.socket, "node agent").await?;
    let mut client = AgentClient::new(channel).max_decoding_message_size(REPLY_BYTES_MAX);
    let request = pb::PoliciesRequest { policy: policy.clone() };
    let reply = client.policies(request).await.map_err(refusal)?.into_inner();
    if let Some(failure) = reply.failure {
        bail!("{}{}", failure.msg, in_brackets(&failure.details));
    }
    if options.json {
        println!("{}", as_json(&reply));
    } else {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        print!("{}", as_text(&reply, u64::try_from(now.as_millis()).unwrap_or(u64::MAX)));
    }
    let stands = policy.is_empty() || reply.policies.iter().all(|policy| policy.in_force);
    Ok(if stands { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// The name as the agent reads it.
fn policy_of(words: &[String]) -> anyhow::Result<String> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    Ok(match words.as_slice() {
        [] => String::new(),
        ["cluster", name] if !name.contains('/') => (*name).to_owned(),
        [name] if name.contains('/') => (*name).to_owned(),
        _ => bail!("write NAMESPACE/NAME or cluster NAME"),
    })
}

fn as_text(reply: &pb::PoliciesReply, now_ms: u64) -> String {
    let names: Vec<String> = reply.policies.iter().map(name_of).collect();
    let width = names.iter().map(String::len).max().unwrap_or_default().max("policy".len());
    let mut text = format!(
        "on node {}\n{:<width$}  {:<13}  {:<12}  {:>12}  {:>11}  since\n",
        reply.node, "policy", "tier", "state", "ingress pods", "egress pods"
    );
    for (policy, name) in reply.policies.iter().zip(&names) {
        let state = if policy.in_force { "in force" } else { "not in force" };
        let tier = if policy.tier.is_empty() { "-" } else { &policy.tier };
        let since = match policy.since_ms {
            0 => "-".to_owned(),
            since_ms => format!("{} ago", age_text(now_ms.saturating_sub(since_ms))),
        };
        let (ingress, egress) = (policy.ingress_pods, policy.egress_pods);
        text.push_str(&format!(
            "{name:<width$}  {tier:<13}  {state:<12}  {ingress:>12}  {egress:>11}  {since}\n"
        ));
        if !policy.reason.is_empty() {
            text.push_str(&format!("    {}\n", policy.reason));
        }
    }
    text
}

fn name_of(policy: &pb::PolicyState) -> String {
    if policy.namespace.is_empty() {
        return format!("cluster {}", policy.name);
    }
    format!("{}/{}", policy.namespace, policy.name)
}

/// The two largest units.
fn age_text(age_ms: u64) -> String {
    let seconds = age_ms / 1000;
    let (days, hours, minutes) = (seconds / 86_400, seconds / 3600 % 24, seconds / 60 % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{seconds}s"),
        (0, 0, _) => format!("{minutes}m{}s", seconds % 60),
        (0, _, _) => format!("{hours}h{minutes}m"),
        (_, _, _) => format!("{days}d{hours}h"),
    }
}

fn as_json(reply: &pb::PoliciesReply) -> Value {
    let policies = reply.policies.iter().map(|policy| {
        let text = |text: &str| (!text.is_empty()).then(|| text.to_owned());
        let number = |number| (number != 0).then_some(number);
        json!({
            "node": reply.node, "kind": policy.kind, "namespace": text(&policy.namespace), "name": policy.name,
            "uid": text(&policy.uid), "metadataGeneration": number(policy.metadata_generation), "tier": text(&policy.tier),
            "priority": policy.priority, "inForce": policy.in_force, "reason": text(&policy.reason),
            "sinceMs": (policy.since_ms != 0).then_some(policy.since_ms), "ingressPods": policy.ingress_pods,
            "egressPods": policy.egress_pods,
        })
    });
    json!({ "node": reply.node, "policies": policies.collect::<Vec<_>>() })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_reply() -> pb::PoliciesReply {
        let in_force = pb::PolicyState {
            kind: "NetworkPolicy".into(),
            namespace: "shop".into(),
            name: "to-db".into(),
            uid: "u-1".into(),
            metadata_generation: 3,
            tier: "NetworkPolicy".into(),
            in_force: true,
            since_ms: 1_000_000,
            ingress_pods: 2,
            ..pb::PolicyState::default()
        };
        let refused = pb::PolicyState {
            kind: "ClusterNetworkPolicy".into(),
            name: "base".into(),
            reason: "invalid (spec.priority); it is ignored".into(),
            ..pb::PolicyState::default()
        };
        pb::PoliciesReply { failure: None, node: "node-a".into(), policies: vec![in_force, refused] }
    }

    #[test]
    fn a_policy_is_told_with_its_age_and_one_that_is_not_in_force_with_the_reason() {
        let told = "\
on node node-a
policy        tier           state         ingress pods  egress pods  since
shop/to-db    NetworkPolicy  in force                 2            0  3m12s ago
cluster base  -              not in force             0            0  -
    invalid (spec.priority); it is ignored
";
        assert_eq!(as_text(&mk_reply(), 1_192_999), told);
    }

    #[test]
    fn ages_have_two_units() {
        let age = |seconds: u64| age_text(seconds * 1000);
        assert_eq!([age(0), age(61), age(3660), age(90_000)], ["0s", "1m1s", "1h1m", "1d1h"]);
    }

    #[test]
    fn the_json_has_what_joins_the_answers_of_several_nodes() {
        let value = as_json(&mk_reply());
        let policy = &value["policies"][0];
        assert_eq!((&policy["node"], &policy["uid"]), (&json!("node-a"), &json!("u-1")));
        assert_eq!((&policy["metadataGeneration"], &policy["sinceMs"]), (&json!(3), &json!(1_000_000)));
        assert_eq!(value["policies"][1]["sinceMs"], Value::Null);
        assert_eq!(value["policies"][1]["namespace"], Value::Null);
    }

    #[test]
    fn a_policy_is_named_by_namespace_and_name_or_as_the_clusters() {
        let name = |words: &[&str]| policy_of(&words.iter().map(ToString::to_string).collect::<Vec<_>>());
        assert_eq!(name(&[]).unwrap(), "");
        assert_eq!(name(&["shop/to-db"]).unwrap(), "shop/to-db");
        assert_eq!(name(&["cluster", "base"]).unwrap(), "base");
        for wrong in [&["base"][..], &["cluster", "a/b"], &["shop", "to-db"]] {
            assert!(name(wrong).is_err(), "{wrong:?}");
        }
    }
}
