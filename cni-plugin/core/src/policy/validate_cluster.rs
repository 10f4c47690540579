//! Checks of a ClusterNetworkPolicy that the API server would have done.

use super::validate::{InvalidPolicy, invalid, selector};
use crate::objects::{ClusterNetworkPolicy, ClusterPeer, ClusterPort, ClusterProtocol, NamespacedPods};

/// Rules of a direction, peers and protocols of a rule, networks of a peer.
const LIST_MAX: usize = 25;
const PRIORITY_MAX: i32 = 1000;
const RULE_NAME_MAX: usize = 100;

/// Checks a policy as its API does.
///
/// A peer or protocol without any known field is not refused: the rule fails closed, because a newer API may have put a
/// field there that this version does not know.
///
/// # Errors
/// The first field that is wrong.
pub fn validate_cluster(policy: &ClusterNetworkPolicy) -> Result<(), InvalidPolicy> {
    let spec = &policy.spec;
    if !(0..=PRIORITY_MAX).contains(&spec.priority) {
        return invalid("spec.priority", &format!("must be 0 to {PRIORITY_MAX}"));
    }
    match (&spec.subject.namespaces, &spec.subject.pods) {
        (Some(namespaces), None) => selector("spec.subject.namespaces", namespaces)?,
        (None, Some(pods)) => both("spec.subject.pods", pods)?,
        (Some(_), Some(_)) | (None, None) => {
            return invalid("spec.subject", "needs exactly one of namespaces and pods");
        }
    }
    let ingress = spec.ingress.iter().map(|rule| (&rule.name, &rule.from, &rule.protocols));
    rules("spec.ingress", "from", ingress.collect())?;
    let egress = spec.egress.iter().map(|rule| (&rule.name, &rule.to, &rule.protocols));
    rules("spec.egress", "to", egress.collect())
}

type RuleParts<'a> = (&'a String, &'a Vec<ClusterPeer>, &'a Option<Vec<ClusterProtocol>>);

fn rules(field: &str, peers_field: &str, rules: Vec<RuleParts<'_>>) -> Result<(), InvalidPolicy> {
    if rules.len() > LIST_MAX {
        return invalid(field, &format!("at most {LIST_MAX} rules are allowed"));
    }
    for (index, (name, peers, protocols)) in rules.into_iter().enumerate() {
        let field = format!("{field}[{index}]");
        if name.chars().count() > RULE_NAME_MAX {
            return invalid(
                &format!("{field}.name"),
                &format!("at most {RULE_NAME_MAX} characters are allowed"),
            );
        }
        length(&format!("{field}.{peers_field}"), peers.len())?;
        for (index, peer) in peers.iter().enumerate() {
            check_peer(&format!("{field}.{peers_field}[{index}]"), peer)?;
        }
        let Some(protocols) = protocols else { continue };
        length(&format!("{field}.protocols"), protocols.len())?;
        let unnamed = peers
            .iter()
            .any(|peer| peer.nodes.is_some() || peer.networks.is_some() || peer.domain_names.is_some());
        for (index, protocol) in protocols.iter().enumerate() {
            let field = format!("{field}.protocols[{index}]");
            check_protocol(&field, protocol)?;
            if unnamed && protocol.destination_named_port.is_some() {
                return invalid(
                    &field,
                    "nodes, networks and domainNames have no named ports; write a number",
                );
            }
        }
    }
    Ok(())
}

fn length(field: &str, len: usize) -> Result<(), InvalidPolicy> {
    if (1..=LIST_MAX).contains(&len) {
        Ok(())
    } else {
        invalid(field, &format!("needs 1 to {LIST_MAX} entries"))
    }
}

fn check_peer(field: &str, peer: &ClusterPeer) -> Result<(), InvalidPolicy> {
    let given = [
        peer.namespaces.is_some(),
        peer.pods.is_some(),
        peer.nodes.is_some(),
        peer.networks.is_some(),
        peer.domain_names.is_some(),
    ];
    if given.into_iter().filter(|given| *given).count() > 1 {
        return invalid(field, "exactly one kind of peer is allowed");
    }
    if let Some(namespaces) = &peer.namespaces {
        selector(&format!("{field}.namespaces"), namespaces)?;
    }
    if let Some(pods) = &peer.pods {
        both(&format!("{field}.pods"), pods)?;
    }
    if let Some(nodes) = &peer.nodes {
        selector(&format!("{field}.nodes"), nodes)?;
    }
    if let Some(networks) = &peer.networks {
        length(&format!("{field}.networks"), networks.len())?;
    }
    Ok(())
}

fn check_protocol(field: &str, protocol: &ClusterProtocol) -> Result<(), InvalidPolicy> {
    let ports = [&protocol.tcp, &protocol.udp, &protocol.sctp];
    let named = usize::from(protocol.destination_named_port.is_some());
    if ports.iter().filter(|ports| ports.is_some()).count() + named > 1 {
        return invalid(field, "exactly one protocol is allowed");
    }
    if protocol.destination_named_port.as_deref() == Some("") {
        return invalid(&format!("{field}.destinationNamedPort"), "must not be empty");
    }
    let mut given = ports.into_iter().flatten().filter_map(|ports| ports.destination_port.as_ref());
    given.try_for_each(|port| check_port(&format!("{field}.destinationPort"), port))
}

fn check_port(field: &str, port: &ClusterPort) -> Result<(), InvalidPolicy> {
    match (port.number, port.range) {
        (Some(0), None) => invalid(&format!("{field}.number"), "must be 1 to 65535"),
        (None, Some(range)) if range.start == 0 || range.start >= range.end => {
            invalid(&format!("{field}.range"), "start must be at least 1 and below end")
        }
        (Some(_), Some(_)) => invalid(field, "exactly one of number and range is allowed"),
        _ => Ok(()),
    }
}

fn both(field: &str, pods: &NamespacedPods) -> Result<(), InvalidPolicy> {
    selector(&format!("{field}.namespaceSelector"), &pods.namespace_selector)?;
    selector(&format!("{field}.podSelector"), &pods.pod_selector)
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"metadata": {"name": "p"}, "spec": {"tier": "Admin", "priority": 7,
        "subject": {"namespaces": {}},
        "egress": [{"action": "Deny", "to": [{"networks": ["10.0.0.0/8"]}],
                    "protocols": [{"tcp": {"destinationPort": {"range": {"start": 5, "end": 9}}}}]}]}}"#;

    fn problem(text: &str) -> String {
        match serde_json::from_str::<ClusterNetworkPolicy>(text) {
            Ok(policy) => {
                validate_cluster(&policy).map_or_else(|error| error.to_string(), |()| String::new())
            }
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn a_policy_is_refused_for_what_the_api_refuses() {
        assert_eq!(problem(GOOD), "");
        for (from, to, expected) in [
            ("\"priority\": 7", "\"priority\": 1001", "spec.priority"),
            ("\"priority\": 7", "\"priority\": -1", "spec.priority"),
            ("\"Admin\"", "\"Platform\"", "unknown variant"),
            ("\"Deny\"", "\"Reject\"", "unknown variant"),
            ("{\"namespaces\": {}}", "{}", "spec.subject"),
            ("{\"namespaces\": {}}", "{\"namespaces\": {}, \"pods\": {}}", "spec.subject"),
            ("[{\"networks\": [\"10.0.0.0/8\"]}]", "[]", "spec.egress[0].to"),
            ("[\"10.0.0.0/8\"]", "[]", "networks"),
            ("\"10.0.0.0/8\"", "\"10.0.0.0/33\"", "33"),
            ("\"end\": 9", "\"end\": 5", "range"),
            ("\"start\": 5", "\"start\": 0", "range"),
            ("\"end\": 9", "\"end\": 70000", "70000"),
            ("{\"tcp\": ", "{\"udp\": {}, \"tcp\": ", "exactly one protocol"),
            ("{\"tcp\": {", "{\"destinationNamedPort\": \"http\"}, {\"tcp\": {", "named ports"),
            ("{\"networks\"", "{\"namespaces\": {}, \"networks\"", "exactly one kind"),
        ] {
            assert!(GOOD.contains(from));
            let found = problem(&GOOD.replacen(from, to, 1));
            assert!(found.contains(expected), "{from} -> {to}: {found:?}");
        }
    }

    #[test]
    fn a_peer_or_protocol_of_a_newer_api_is_not_refused() {
        assert_eq!(problem(&GOOD.replace("{\"networks\": [\"10.0.0.0/8\"]}", "{\"services\": {}}")), "");
        assert_eq!(problem(&GOOD.replace("{\"tcp\": {\"destinationPort\"", "{\"icmp\": {\"type\"")), "");
    }
}
