//! Kubernetes YAML in, objects out.

use holdfast_net_core::objects::{
    ClusterNetworkPolicy, Namespace, NetworkPolicy, Node, ObjectName, Objects, Pod,
};
use holdfast_net_core::policy;
use serde::Deserialize;
use serde_norway::Value;

/// An object of a kind that networking reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Object {
    Node(Box<Node>),
    Namespace(Box<Namespace>),
    Pod(Box<Pod>),
    NetworkPolicy(Box<NetworkPolicy>),
    ClusterNetworkPolicy(Box<ClusterNetworkPolicy>),
}

/// Names an object over all kinds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct ObjectKey {
    pub kind: &'static str,
    pub name: ObjectName,
}

impl std::fmt::Display for ObjectKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.name.namespace.is_empty() {
            return write!(f, "{} {}", self.kind, self.name.name);
        }
        write!(f, "{} {}", self.kind, self.name)
    }
}

const CLUSTER_POLICY: &str = "ClusterNetworkPolicy";

/// One document of a file.
pub(crate) enum Document {
    /// A valid object.
    Object(ObjectKey, Object),
    /// A kind that is not read here, or an empty document.
    Other,
    /// An object that is wrong; its key where that could be read.
    Invalid(Option<ObjectKey>, String),
}

/// Reads all documents of a file; `v1` Lists are unpacked.
///
/// # Errors
/// The text is not YAML; nothing of it can be trusted then.
pub(crate) fn parse_file(text: &str) -> Result<Vec<Document>, String> {
    let mut documents = Vec::new();
    for document in serde_norway::Deserializer::from_str(text) {
        let value = Value::deserialize(document).map_err(|error| format!("not valid YAML: {error}"))?;
        if value.get("kind").and_then(Value::as_str) == Some("List") {
            let items = value.get("items").and_then(Value::as_sequence).cloned().unwrap_or_default();
            documents.extend(items.into_iter().map(parse_document));
        } else {
            documents.push(parse_document(value));
        }
    }
    Ok(documents)
}

fn parse_document(value: Value) -> Document {
    if value.is_null() {
        return Document::Other;
    }
    let text = |key: &str| value.get(key).and_then(Value::as_str).unwrap_or_default();
    let kind = match (text("apiVersion"), text("kind")) {
        ("v1", "Node") => "Node",
        ("v1", "Namespace") => "Namespace",
        ("v1", "Pod") => "Pod",
        ("networking.k8s.io/v1", "NetworkPolicy") => "NetworkPolicy",
        ("policy.networking.k8s.io/v1alpha2", CLUSTER_POLICY) => CLUSTER_POLICY,
        ("", _) | (_, "") => {
            return Document::Invalid(None, "a document lacks apiVersion or kind".to_owned());
        }
        _ => return Document::Other,
    };
    let meta = |key: &str| value.get("metadata").and_then(|meta| meta.get(key)).and_then(Value::as_str);
    let Some(name) = meta("name").filter(|name| !name.is_empty()).map(str::to_owned) else {
        return Document::Invalid(None, format!("a {kind} lacks metadata.name"));
    };
    let namespace = match kind {
        "Node" | "Namespace" | CLUSTER_POLICY => String::new(),
        _ => ObjectName::new(meta("namespace").unwrap_or_default(), &name).namespace,
    };
    let key = ObjectKey { kind, name: ObjectName { namespace, name } };
    match parse_object(kind, value) {
        Ok(object) => Document::Object(key, object),
        Err(problem) => Document::Invalid(Some(key), problem),
    }
}

fn parse_object(kind: &str, value: Value) -> Result<Object, String> {
    let text = |error: serde_norway::Error| error.to_string();
    match kind {
        "Node" => serde_norway::from_value(value).map(|node| Object::Node(Box::new(node))).map_err(text),
        "Namespace" => {
            serde_norway::from_value(value).map(|ns| Object::Namespace(Box::new(ns))).map_err(text)
        }
        "Pod" => serde_norway::from_value(value).map(|pod| Object::Pod(Box::new(pod))).map_err(text),
        CLUSTER_POLICY => {
            let policy: ClusterNetworkPolicy = serde_norway::from_value(value).map_err(text)?;
            policy::validate_cluster(&policy).map_err(|error| error.to_string())?;
            Ok(Object::ClusterNetworkPolicy(Box::new(policy)))
        }
        _ => {
            let policy: NetworkPolicy = serde_norway::from_value(value).map_err(text)?;
            policy::validate(&policy).map_err(|error| error.to_string())?;
            Ok(Object::NetworkPolicy(Box::new(policy)))
        }
    }
}

/// Puts an object into its place.
pub(crate) fn insert(objects: &mut Objects, key: &ObjectKey, object: Object) {
    match object {
        Object::Node(node) => {
            objects.nodes.insert(key.name.name.clone(), *node);
        }
        Object::Namespace(namespace) => objects.insert_namespace(*namespace),
        Object::Pod(pod) => {
            objects.pods.insert(key.name.clone(), *pod);
        }
        Object::NetworkPolicy(policy) => {
            objects.policies.insert(key.name.clone(), *policy);
        }
        Object::ClusterNetworkPolicy(policy) => {
            objects.cluster_policies.insert(key.name.name.clone(), *policy);
        }
    }
}
