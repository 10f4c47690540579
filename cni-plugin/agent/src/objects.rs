//! Kubernetes YAML and JSON in, objects out.

use std::borrow::Cow;

use holdfast_net_core::objects::{
    ClusterNetworkPolicy, Namespace, NetworkPolicy, Node, ObjectChange, ObjectName, Pod,
};
use holdfast_net_core::pod_ranges::PodRange;
use holdfast_net_core::policy;
use serde::Deserialize;
use serde_json::value::RawValue;
use serde_norway::Value;

/// An object of a kind that networking reads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Object {
    Node(Box<Node>),
    Namespace(Box<Namespace>),
    Pod(Box<Pod>),
    NetworkPolicy(Box<NetworkPolicy>),
    ClusterNetworkPolicy(Box<ClusterNetworkPolicy>),
    PodRange(Box<PodRange>),
}

/// Names an object over all kinds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct ObjectKey {
    /// Its kind, as Kubernetes writes it.
    pub kind: &'static str,
    /// Its namespace, empty for kinds without, and its name.
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

/// Kinds of the cluster's parts.
pub(crate) const NODE: &str = "Node";
pub(crate) const NAMESPACE: &str = "Namespace";
pub(crate) const POD: &str = "Pod";
/// Kinds of policies.
pub(crate) const NETWORK_POLICY: &str = "NetworkPolicy";
pub(crate) const CLUSTER_POLICY: &str = "ClusterNetworkPolicy";
pub(crate) const CLUSTER_POLICY_VERSION: &str = "policy.networking.k8s.io/v1alpha2";
/// Kind of the claims of blocks, and its group.
pub(crate) const POD_RANGE: &str = "PodRange";
pub(crate) const POD_RANGE_VERSION: &str = "network.holdfast.dev/v1alpha1";

/// One document of a file.
#[derive(Debug)]
pub(crate) enum Document {
    /// A valid object.
    Object(ObjectKey, Object),
    /// A valid object that is too large.
    Oversized(ObjectKey, Oversized),
    /// A kind that is not read here, or an empty document.
    Other,
    /// An object that is wrong; its key where that could be read.
    Invalid(Option<ObjectKey>, String),
}

/// What there is of an object that is too large.
#[derive(Debug)]
pub(crate) struct Oversized {
    /// What can be enforced of it: it admits less than the object, and denies no less.
    pub closed: Object,
    /// What is too large.
    pub problem: String,
    /// What `closed` does, as a sentence whose subject is the object.
    pub effect: &'static str,
}

/// Reads all documents of a YAML file; `v1` Lists are unpacked.
///
/// # Errors
/// The text is not YAML; nothing of it can be trusted then.
pub(crate) fn parse_yaml(text: &str, mut found: impl FnMut(Document)) -> Result<(), String> {
    let mut documents = Vec::new();
    for document in serde_norway::Deserializer::from_str(text) {
        let value = Value::deserialize(document).map_err(|error| format!("not valid YAML: {error}"))?;
        if value.get("kind").and_then(Value::as_str) == Some("List") {
            let items = value.get("items").and_then(Value::as_sequence).cloned().unwrap_or_default();
            documents.extend(items);
        } else {
            documents.push(value);
        }
    }
    documents.into_iter().map(parse_document).for_each(&mut found);
    Ok(())
}

/// The same for JSON: one document, read much faster, and item by item.
///
/// # Errors
/// The text is not JSON.
pub(crate) fn parse_json(text: &str, mut found: impl FnMut(Document)) -> Result<(), String> {
    let not_json = |error: serde_json::Error| format!("not valid JSON: {error}");
    let top: Top<'_> = serde_json::from_str(text).map_err(not_json)?;
    if top.kind != "List" {
        found(parse_item(text));
        return Ok(());
    }
    top.items.into_iter().flatten().map(|item| parse_item(item.get())).for_each(found);
    Ok(())
}

/// What tells the kind of an object and names it.
#[derive(Default, Deserialize)]
#[serde(default, rename_all = "camelCase")]
struct Head {
    api_version: String,
    kind: String,
    metadata: HeadMeta,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct HeadMeta {
    name: String,
    namespace: String,
}

/// A whole file.
#[derive(Deserialize)]
struct Top<'a> {
    #[serde(borrow, default)]
    kind: Cow<'a, str>,
    /// Of a List.
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

fn parse_item(text: &str) -> Document {
    let head: Head = match serde_json::from_str(text) {
        Ok(head) => head,
        Err(error) => return Document::Invalid(None, error.to_string()),
    };
    document(&head, |kind| parse_json_object(kind, text))
}

fn parse_document(value: Value) -> Document {
    if value.is_null() {
        return Document::Other;
    }
    let head = match Head::deserialize(&value) {
        Ok(head) => head,
        Err(error) => return Document::Invalid(None, error.to_string()),
    };
    document(&head, |kind| parse_object(kind, value).map_err(|error| error.to_string()))
}

/// The key of an object of a known kind.
fn key_of(kind: &'static str, metadata: &HeadMeta) -> ObjectKey {
    let name = metadata.name.clone();
    let namespace = match kind {
        NODE | NAMESPACE | CLUSTER_POLICY | POD_RANGE => String::new(),
        _ => ObjectName::new(&metadata.namespace, &name).namespace,
    };
    ObjectKey { kind, name: ObjectName { namespace, name } }
}

/// What the API server says of an object of a kind that it was asked for, which items of a list do not repeat.
pub(crate) fn parse_of_kind(kind: &'static str, text: &str) -> Document {
    let head: Head = match serde_json::from_str(text) {
        Ok(head) => head,
        Err(error) => return Document::Invalid(None, format!("a {kind} cannot be read: {error}")),
    };
    document_of_kind(kind, &head.metadata, |kind| parse_json_object(kind, text))
}

/// The key of such an object, where it has one.
pub(crate) fn key_of_kind(kind: &'static str, text: &str) -> Option<ObjectKey> {
    let head: Head = serde_json::from_str(text).ok()?;
    (!head.metadata.name.is_empty()).then(|| key_of(kind, &head.metadata))
}

fn parse_json_object(kind: &str, text: &str) -> Result<Object, String> {
    let mut deserializer = serde_json::Deserializer::from_str(text);
    parse_object(kind, &mut deserializer).map_err(|error| error.to_string())
}

fn document(head: &Head, parse: impl FnOnce(&'static str) -> Result<Object, String>) -> Document {
    let kind = match (head.api_version.as_str(), head.kind.as_str()) {
        ("v1", NODE) => NODE,
        ("v1", NAMESPACE) => NAMESPACE,
        ("v1", POD) => POD,
        ("networking.k8s.io/v1", NETWORK_POLICY) => NETWORK_POLICY,
        (CLUSTER_POLICY_VERSION, CLUSTER_POLICY) => CLUSTER_POLICY,
        (POD_RANGE_VERSION, POD_RANGE) => POD_RANGE,
        ("", _) | (_, "") => {
            return Document::Invalid(None, "a document lacks apiVersion or kind".to_owned());
        }
        _ => return Document::Other,
    };
    document_of_kind(kind, &head.metadata, parse)
}

fn document_of_kind(
    kind: &'static str,
    metadata: &HeadMeta,
    parse: impl FnOnce(&'static str) -> Result<Object, String>,
) -> Document {
    if metadata.name.is_empty() {
        return Document::Invalid(None, format!("a {kind} lacks metadata.name"));
    }
    let key = key_of(kind, metadata);
    match parse(kind) {
        Ok(object) => match oversized(&object) {
            Some(oversized) => Document::Oversized(key, oversized),
            None => Document::Object(key, object),
        },
        Err(problem) => Document::Invalid(Some(key), problem),
    }
}

fn oversized(object: &Object) -> Option<Oversized> {
    let (problem, closed, effect) = match object {
        Object::NetworkPolicy(policy) => {
            let problem = policy::check_size(policy).err()?;
            let closed = Object::NetworkPolicy(Box::new(policy::closed(policy)));
            (problem, closed, "it isolates what it selects and admits nothing")
        }
        Object::ClusterNetworkPolicy(policy) => {
            let problem = policy::check_cluster_size(policy).err()?;
            let closed = Object::ClusterNetworkPolicy(Box::new(policy::closed_cluster(policy)));
            let effect = "its rules with such a peer fail closed: Accept matches nothing, Deny and Pass deny everything";
            (problem, closed, effect)
        }
        Object::Node(_) | Object::Namespace(_) | Object::Pod(_) | Object::PodRange(_) => return None,
    };
    Some(Oversized { closed, problem: problem.to_string(), effect })
}

fn parse_object<'de, D: serde::Deserializer<'de>>(kind: &str, from: D) -> Result<Object, D::Error> {
    use serde::de::Error;
    match kind {
        NODE => Node::deserialize(from).map(|node| Object::Node(Box::new(node))),
        NAMESPACE => Namespace::deserialize(from).map(|namespace| Object::Namespace(Box::new(namespace))),
        POD => Pod::deserialize(from).map(|pod| Object::Pod(Box::new(pod))),
        CLUSTER_POLICY => {
            let policy = ClusterNetworkPolicy::deserialize(from)?;
            policy::validate_cluster(&policy).map_err(D::Error::custom)?;
            Ok(Object::ClusterNetworkPolicy(Box::new(policy)))
        }
        POD_RANGE => {
            let range = PodRange::deserialize(from)?;
            range.validate().map_err(D::Error::custom)?;
            Ok(Object::PodRange(Box::new(range)))
        }
        _ => {
            let policy = NetworkPolicy::deserialize(from)?;
            policy::validate(&policy).map_err(D::Error::custom)?;
            Ok(Object::NetworkPolicy(Box::new(policy)))
        }
    }
}

impl Object {
    /// The change that this object is.
    pub(crate) fn into_change(self, key: &ObjectKey) -> ObjectChange {
        let name = key.name.name.clone();
        match self {
            Self::Node(node) => ObjectChange::Node(name, Some(node)),
            Self::Namespace(namespace) => ObjectChange::Namespace(name, Some(namespace.metadata.labels)),
            Self::Pod(pod) => ObjectChange::Pod(key.name.clone(), Some(pod)),
            Self::NetworkPolicy(policy) => ObjectChange::Policy(key.name.clone(), Some(policy)),
            Self::ClusterNetworkPolicy(policy) => ObjectChange::ClusterPolicy(name, Some(policy)),
            Self::PodRange(range) => ObjectChange::PodRange(name, Some(range)),
        }
    }
}

impl ObjectKey {
    /// The key as one text: kind, length of the namespace, namespace, name.
    pub(crate) fn packed(&self) -> String {
        let ObjectName { namespace, name } = &self.name;
        format!("{} {} {namespace}{name}", self.kind, namespace.len())
    }

    /// The change that takes away the object of a packed key.
    pub(crate) fn removal(packed: &str) -> ObjectChange {
        let mut parts = packed.splitn(3, ' ');
        let kind = parts.next().unwrap_or_default();
        let length = parts.next().and_then(|length| length.parse().ok()).unwrap_or(0);
        let (namespace, name) =
            parts.next().and_then(|rest| rest.split_at_checked(length)).unwrap_or_default();
        let (namespace, name) = (namespace.to_owned(), name.to_owned());
        match kind {
            NODE => ObjectChange::Node(name, None),
            NAMESPACE => ObjectChange::Namespace(name, None),
            POD => ObjectChange::Pod(ObjectName { namespace, name }, None),
            CLUSTER_POLICY => ObjectChange::ClusterPolicy(name, None),
            POD_RANGE => ObjectChange::PodRange(name, None),
            _ => ObjectChange::Policy(ObjectName { namespace, name }, None),
        }
    }
}
