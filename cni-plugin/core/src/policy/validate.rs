//! Checks that a real API server would have done before a policy reaches an agent.

use crate::objects::{IpBlock, LabelSelector, NetworkPolicy, Operator, Peer, PolicyPort, PortNumberOrName};

/// A policy that the Kubernetes API would refuse.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field}: {problem}")]
pub struct InvalidPolicy {
    /// Path of the field.
    pub field: String,
    /// What is wrong and what would be right.
    pub problem: String,
}

/// Checks a policy as the Kubernetes API does.
///
/// # Errors
/// The first field that is wrong.
pub fn validate(policy: &NetworkPolicy) -> Result<(), InvalidPolicy> {
    let spec = &policy.spec;
    selector("spec.podSelector", &spec.pod_selector)?;
    for (index, rule) in spec.ingress.iter().enumerate() {
        peers(&format!("spec.ingress[{index}].from"), &rule.from)?;
        ports(&format!("spec.ingress[{index}].ports"), &rule.ports)?;
    }
    for (index, rule) in spec.egress.iter().enumerate() {
        peers(&format!("spec.egress[{index}].to"), &rule.to)?;
        ports(&format!("spec.egress[{index}].ports"), &rule.ports)?;
    }
    Ok(())
}

fn peers(field: &str, peers: &[Peer]) -> Result<(), InvalidPolicy> {
    for (index, peer) in peers.iter().enumerate() {
        let field = format!("{field}[{index}]");
        let selectors = peer.pod_selector.is_some() || peer.namespace_selector.is_some();
        match &peer.ip_block {
            Some(_) if selectors => {
                return invalid(&field, "ipBlock excludes podSelector and namespaceSelector");
            }
            Some(block) => ip_block(&format!("{field}.ipBlock"), block)?,
            None if !selectors => return invalid(&field, "a peer needs a selector or an ipBlock"),
            None => {}
        }
        if let Some(pods) = &peer.pod_selector {
            selector(&format!("{field}.podSelector"), pods)?;
        }
        if let Some(namespaces) = &peer.namespace_selector {
            selector(&format!("{field}.namespaceSelector"), namespaces)?;
        }
    }
    Ok(())
}

fn ip_block(field: &str, block: &IpBlock) -> Result<(), InvalidPolicy> {
    for except in &block.except {
        let inside = block.cidr.contains(except.network()) && except.prefix() > block.cidr.prefix();
        if !inside {
            let problem = format!("except {except} must lie inside {} and be smaller", block.cidr);
            return invalid(field, &problem);
        }
    }
    Ok(())
}

fn ports(field: &str, ports: &[PolicyPort]) -> Result<(), InvalidPolicy> {
    for (index, port) in ports.iter().enumerate() {
        let field = format!("{field}[{index}]");
        match (&port.port, port.end_port) {
            (Some(PortNumberOrName::Number(0)), _) => return invalid(&field, "port must be 1 to 65535"),
            (Some(PortNumberOrName::Number(first)), Some(last)) if last < *first => {
                return invalid(&field, "endPort must not be below port");
            }
            (Some(PortNumberOrName::Name(_)) | None, Some(_)) => {
                return invalid(&field, "endPort needs a port that is a number");
            }
            (Some(PortNumberOrName::Name(name)), None) if name.is_empty() => {
                return invalid(&field, "a port's name must not be empty");
            }
            _ => {}
        }
    }
    Ok(())
}

pub(super) fn selector(field: &str, selector: &LabelSelector) -> Result<(), InvalidPolicy> {
    for (index, requirement) in selector.match_expressions.iter().enumerate() {
        let needs_values = match requirement.operator {
            Operator::In | Operator::NotIn => true,
            Operator::Exists | Operator::DoesNotExist => false,
        };
        if needs_values == requirement.values.is_empty() {
            let problem =
                if needs_values { "In and NotIn need values" } else { "Exists and DoesNotExist take none" };
            return invalid(&format!("{field}.matchExpressions[{index}].values"), problem);
        }
    }
    Ok(())
}

pub(super) fn invalid(field: &str, problem: &str) -> Result<(), InvalidPolicy> {
    Err(InvalidPolicy { field: field.to_owned(), problem: problem.to_owned() })
}
