//! What is asked of the API server.

use crate::objects::{CLUSTER_POLICY, NAMESPACE, NETWORK_POLICY, NODE, POD, POD_RANGE};

/// A kind that is watched.
#[derive(Debug)]
pub(super) struct Kind {
    pub name: &'static str,
    /// Of all its objects.
    pub path: &'static str,
    /// The name of its definition. Such a kind may be absent; the others are Kubernetes' own.
    pub definition: Option<&'static str>,
}

/// All kinds.
pub(super) const KINDS: [Kind; 6] = [
    Kind { name: NODE, path: "/api/v1/nodes", definition: None },
    Kind { name: NAMESPACE, path: "/api/v1/namespaces", definition: None },
    Kind { name: POD, path: "/api/v1/pods", definition: None },
    Kind { name: NETWORK_POLICY, path: "/apis/networking.k8s.io/v1/networkpolicies", definition: None },
    Kind {
        name: CLUSTER_POLICY,
        path: "/apis/policy.networking.k8s.io/v1alpha2/clusternetworkpolicies",
        definition: Some("clusternetworkpolicies.policy.networking.k8s.io"),
    },
    Kind {
        name: POD_RANGE,
        path: "/apis/network.holdfast.dev/v1alpha1/podranges",
        definition: Some("podranges.network.holdfast.dev"),
    },
];
