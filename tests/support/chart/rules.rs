//! Which parts of which objects are values of the chart. A part gets a mark, a word that stands nowhere else; once the object is
//! text, marks become expressions.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use super::{NAMESPACE, text};

/// All values, in the order of values.yaml, each with what it is.
pub const VALUES: [(&str, &str); 29] = [
    ("image", "Image of all programs of ours: made by scripts/image, or a copy of that in a registry."),
    ("imagePullPolicy", "Never, where the image was imported on each node."),
    ("storage.enabled", "The CSI driver."),
    ("storage.replicas", "Replicas of a volume; 1 for a cluster of one node."),
    ("storage.defaultClass", "Whether claims that name no class get the class holdfast."),
    ("storage.poolCapacity", "What the pool of each node, /var/lib/holdfast/pool, may fill."),
    ("storage.poolClass", "Class of the nodes' pools, such as nvme, which a class's poolClass asks for."),
    ("storage.overprovisionPercent", "How much of a pool is promised to volumes; 100 where nothing is said."),
    (
        "storage.replaceAfterSeconds",
        "After how long a silent replica is replaced; 1800 where nothing is said, 0 for never.",
    ),
    (
        "storage.rebalanceAbovePercent",
        "From which difference on replicas move to emptier nodes; never where nothing is said.",
    ),
    ("storage.controllerReplicas", "Controllers, on a node each: one serves, the others wait."),
    ("storage.kubeletDir", "Folder of kubelet on the nodes."),
    ("storage.nodeSelector", "Nodes with pools, and nodes whose pods use volumes."),
    ("storage.tolerations", "Of the data process and the node service."),
    ("storage.dataResources", "Of the data process. Memory is locked: request and limit are the same."),
    ("storage.provisionerImage", "CSI sidecar."),
    ("storage.attacherImage", "CSI sidecar."),
    ("storage.resizerImage", "CSI sidecar."),
    ("storage.snapshotterImage", "CSI sidecar."),
    ("storage.registrarImage", "CSI sidecar."),
    ("storage.livenessImage", "CSI sidecar."),
    ("network.enabled", "The CNI plugin and its agent."),
    ("network.attachment", "How pods are attached: bridge or routed."),
    ("network.overlay", "How packets go to other nodes: vxlan, direct or auto; vxlan where nothing is said."),
    ("network.vxlanPort", "UDP port of the overlay; 4789 where nothing is said."),
    ("network.clusterCidr", "Ranges of the cluster, for nodes whose Node object has no podCIDR."),
    (
        "network.uplink",
        "Interface of the underlay, whose MTU is the pods' less the overlay's; found by the node's address where nothing is said.",
    ),
    (
        "network.masquerade",
        "Whose packets leave with the node's address: outside, nodes or off; outside where nothing is said.",
    ),
    (
        "network.metrics",
        "Address and port on which each agent serves metrics to whoever asks; nowhere where nothing is said.",
    ),
];

/// One part of some objects, and the value that sets it.
pub enum Rule {
    /// What stands at a place of an object becomes the value, in quotes or not.
    Field { object: (&'static str, &'static str), place: &'static str, value: &'static str, quoted: bool },
    /// The same, for lists and maps.
    Block { object: (&'static str, &'static str), place: &'static str, value: &'static str },
    /// A map that is not there by default.
    Optional {
        object: (&'static str, &'static str),
        place: &'static str,
        key: &'static str,
        value: &'static str,
    },
    /// What follows `--flag=` among a workload's arguments.
    Flag { workload: &'static str, flag: &'static str, value: &'static str },
    /// A flag that is not there by default, of the container that has the workload's name.
    OptionalFlag { workload: &'static str, flag: &'static str, value: &'static str },
    /// The image of a container, whatever the workload; `""` for all that have ours.
    Image { container: &'static str, value: &'static str },
    /// Where containers say it.
    PullPolicy { value: &'static str },
    /// A word in an object's text.
    Word { object: (&'static str, &'static str), word: &'static str, value: &'static str },
    /// An entry, or with an empty place a whole object, that is there only under a condition.
    When { object: (&'static str, &'static str), place: &'static str, condition: &'static str },
}

const CLASSES: (&str, &str) = ("StorageClass", "");
const CONTROLLER: (&str, &str) = ("Deployment", "holdfast-controller");
const DATA: (&str, &str) = ("DaemonSet", "holdfast-data");
const NODE: (&str, &str) = ("DaemonSet", "holdfast-node");
const POD: &str = "/spec/template/spec";
const TOLERATIONS: &str = "/spec/template/spec/tolerations";

pub const RULES: [Rule; 31] = [
    Rule::Image { container: "", value: "image" },
    Rule::Image { container: "csi-provisioner", value: "storage.provisionerImage" },
    Rule::Image { container: "csi-attacher", value: "storage.attacherImage" },
    Rule::Image { container: "csi-resizer", value: "storage.resizerImage" },
    Rule::Image { container: "csi-snapshotter", value: "storage.snapshotterImage" },
    Rule::Image { container: "node-driver-registrar", value: "storage.registrarImage" },
    Rule::Image { container: "liveness-probe", value: "storage.livenessImage" },
    Rule::PullPolicy { value: "imagePullPolicy" },
    Rule::Field { object: CLASSES, place: "/parameters/replicas", value: "storage.replicas", quoted: true },
    Rule::When {
        object: CLASSES,
        place: "/parameters/minInSync",
        condition: "gt (int .Values.storage.replicas) 1",
    },
    Rule::Field {
        object: ("StorageClass", "holdfast"),
        place: "/metadata/annotations/storageclass.kubernetes.io~1is-default-class",
        value: "storage.defaultClass",
        quoted: true,
    },
    Rule::Flag { workload: "holdfast-data", flag: "--pool-capacity", value: "storage.poolCapacity" },
    Rule::OptionalFlag { workload: "holdfast-data", flag: "--pool-class", value: "storage.poolClass" },
    Rule::OptionalFlag {
        workload: "holdfast-controller",
        flag: "--overprovision-percent",
        value: "storage.overprovisionPercent",
    },
    Rule::OptionalFlag {
        workload: "holdfast-controller",
        flag: "--replace-after-s",
        value: "storage.replaceAfterSeconds",
    },
    Rule::OptionalFlag {
        workload: "holdfast-controller",
        flag: "--rebalance-above-percent",
        value: "storage.rebalanceAbovePercent",
    },
    Rule::Field {
        object: CONTROLLER,
        place: "/spec/replicas",
        value: "storage.controllerReplicas",
        quoted: false,
    },
    // With one it would keep its node from ever being drained.
    Rule::When {
        object: ("PodDisruptionBudget", "holdfast-controller"),
        place: "",
        condition: "gt (int .Values.storage.controllerReplicas) 1",
    },
    Rule::Word { object: NODE, word: "/var/lib/kubelet", value: "storage.kubeletDir" },
    Rule::Optional { object: DATA, place: POD, key: "nodeSelector", value: "storage.nodeSelector" },
    Rule::Optional { object: NODE, place: POD, key: "nodeSelector", value: "storage.nodeSelector" },
    Rule::Block { object: DATA, place: TOLERATIONS, value: "storage.tolerations" },
    Rule::Block { object: NODE, place: TOLERATIONS, value: "storage.tolerations" },
    Rule::Block {
        object: DATA,
        place: "/spec/template/spec/containers/0/resources",
        value: "storage.dataResources",
    },
    Rule::Flag { workload: "holdfast-netd", flag: "--attachment", value: "network.attachment" },
    Rule::OptionalFlag { workload: "holdfast-netd", flag: "--overlay", value: "network.overlay" },
    Rule::OptionalFlag { workload: "holdfast-netd", flag: "--vxlan-port", value: "network.vxlanPort" },
    Rule::OptionalFlag { workload: "holdfast-netd", flag: "--cluster-cidr", value: "network.clusterCidr" },
    Rule::OptionalFlag { workload: "holdfast-netd", flag: "--uplink", value: "network.uplink" },
    Rule::OptionalFlag { workload: "holdfast-netd", flag: "--masquerade", value: "network.masquerade" },
    Rule::OptionalFlag { workload: "holdfast-netd", flag: "--metrics", value: "network.metrics" },
];

/// Marks that were set, and what stood in their places.
#[derive(Default)]
pub struct Marks {
    marks: Vec<Mark>,
    defaults: BTreeMap<String, Value>,
}

/// What becomes of the line with a mark, or of the mark alone.
enum Mark {
    /// The mark becomes an expression.
    Expression(String),
    /// `KEY: MARK` becomes a block.
    Block(String),
    /// `KEY: MARK` becomes a block, or nothing.
    Optional(String),
    /// The line stays with something else in place of the mark, under a condition.
    When { condition: String, then: String },
    /// Each occurrence of a word becomes an expression.
    Word { word: String, expression: String },
    /// The whole object is there under a condition.
    Whole(String),
}

impl Rule {
    /// Sets marks in an object; answers whether there was something to mark.
    pub fn mark(&self, object: &mut Value, marks: &mut Marks) -> Result<bool> {
        match self {
            Self::Field { object: of, place, value, quoted } => {
                if !is(object, of) {
                    return Ok(false);
                }
                let Some(found) = object.pointer_mut(place) else { return Ok(false) };
                // Of classes only those with the usual number of replicas.
                if marks.known(value).is_some_and(|default| plain(default) != plain(found)) {
                    return Ok(false);
                }
                let quote = if *quoted { " | quote" } else { "" };
                let mark = Mark::Expression(format!("{{{{ .Values.{value}{quote} }}}}"));
                marks.replace(found, value, mark);
                Ok(true)
            }
            Self::Block { object: of, place, value } => {
                let Some(found) = is(object, of).then(|| object.pointer_mut(place)).flatten() else {
                    return Ok(false);
                };
                marks.replace(found, value, Mark::Block((*value).to_owned()));
                Ok(true)
            }
            Self::Optional { object: of, place, key, value } => {
                let Some(map) = is(object, of).then(|| map_at(object, place)).flatten() else {
                    return Ok(false);
                };
                ensure!(!map.contains_key(*key), "{key} is there already");
                let mut new = json!({});
                marks.replace(&mut new, value, Mark::Optional((*value).to_owned()));
                map.insert((*key).to_owned(), new);
                Ok(true)
            }
            Self::Flag { workload, flag, value } => mark_flag(object, marks, workload, flag, value),
            Self::OptionalFlag { workload, flag, value } => {
                Ok(mark_optional_flag(object, marks, workload, flag, value))
            }
            Self::Image { container, value } => Ok(mark_images(object, marks, container, value)),
            Self::PullPolicy { value } => Ok(mark_pull_policies(object, marks, value)),
            Self::Word { object: of, word, value } => {
                if is(object, of) {
                    marks.defaults.insert((*value).to_owned(), json!(word));
                    let expression = format!("{{{{ .Values.{value} }}}}");
                    marks.marks.push(Mark::Word { word: (*word).to_owned(), expression });
                }
                Ok(is(object, of))
            }
            Self::When { object: of, place, condition } => {
                Ok(mark_condition(object, marks, of, place, condition))
            }
        }
    }
}

impl Marks {
    /// The text of a value's default; `enabled` is of the chart alone.
    pub fn default_of(&self, value: &str) -> Option<String> {
        if value.ends_with(".enabled") {
            return Some("true".to_owned());
        }
        let default = self.defaults.get(value)?;
        let bare = |text: &str| text.parse::<bool>().is_ok() || text.parse::<u64>().is_ok();
        Some(default.as_str().filter(|text| bare(text)).map_or_else(|| default.to_string(), str::to_owned))
    }

    /// The template of an object that was marked. Marks are of one object: they are forgotten, defaults are not.
    pub fn render(&mut self, object: &Value) -> Result<String> {
        let mut lines: Vec<String> = Vec::new();
        let yaml = serde_norway::to_string(object)?;
        ensure!(!yaml.contains("{{"), "{} has braces of its own", text(object, "/metadata/name"));
        for line in yaml.lines() {
            let marked = self.marks.iter().enumerate().find(|(number, _)| line.contains(&word(*number)));
            lines.push(match marked {
                Some((number, mark)) => mark.of_line(line, &word(number))?,
                None => line.to_owned(),
            });
        }
        let mut template = lines.join("\n").replace(NAMESPACE, "{{ .Release.Namespace }}");
        for mark in &self.marks {
            match mark {
                Mark::Word { word, expression } => template = template.replace(word, expression),
                Mark::Whole(condition) => {
                    template = format!("{{{{- if {condition} }}}}\n{template}\n{{{{- end }}}}")
                }
                _ => {}
            }
        }
        self.marks.clear();
        Ok(template)
    }

    fn known(&self, value: &str) -> Option<&Value> {
        self.defaults.get(value)
    }

    /// Puts a mark in the place of what is the value's default.
    fn replace(&mut self, found: &mut Value, value: &str, mark: Mark) {
        let default = std::mem::replace(found, Value::String(word(self.marks.len())));
        self.defaults.entry(value.to_owned()).or_insert(default);
        self.marks.push(mark);
    }
}

impl Mark {
    fn of_line(&self, line: &str, word: &str) -> Result<String> {
        let indent = line.len() - line.trim_start().len();
        let space = " ".repeat(indent);
        let before = || line.split_once(word).map(|(before, _)| before.trim_end()).context("no mark");
        Ok(match self {
            Self::Expression(expression) => line.replace(word, expression),
            Self::Block(value) => {
                format!("{} {{{{- toYaml .Values.{value} | nindent {} }}}}", before()?, indent + 2)
            }
            Self::Optional(value) => format!(
                "{space}{{{{- with .Values.{value} }}}}\n{} {{{{- toYaml . | nindent {} }}}}\n{space}{{{{- end }}}}",
                before()?,
                indent + 2
            ),
            Self::When { condition, then } => format!(
                "{space}{{{{- if {condition} }}}}\n{}\n{space}{{{{- end }}}}",
                line.replace(word, then)
            ),
            Self::Word { .. } | Self::Whole(_) => line.to_owned(),
        })
    }
}

/// A word that YAML writes without quotes and that is in no manifest.
fn word(number: usize) -> String {
    format!("HOLDFASTMARK{number}X")
}

fn is(object: &Value, (kind, name): &(&str, &str)) -> bool {
    text(object, "/kind") == *kind && (name.is_empty() || text(object, "/metadata/name") == *name)
}

fn plain(value: &Value) -> String {
    value.as_str().map_or_else(|| value.to_string(), str::to_owned)
}

fn map_at<'a>(object: &'a mut Value, place: &str) -> Option<&'a mut Map<String, Value>> {
    object.pointer_mut(place).and_then(Value::as_object_mut)
}

/// All containers of a workload, those that run before the others included.
fn containers(object: &mut Value) -> Vec<&mut Value> {
    let Some(pod) = map_at(object, POD) else { return Vec::new() };
    let lists = pod.iter_mut().filter(|(key, _)| ["containers", "initContainers"].contains(&key.as_str()));
    lists.filter_map(|(_, list)| list.as_array_mut()).flatten().collect()
}

/// The arguments of the container that has the workload's name.
fn arguments<'a>(object: &'a mut Value, workload: &str) -> Option<&'a mut Vec<Value>> {
    if text(object, "/metadata/name") != workload {
        return None;
    }
    let found = containers(object).into_iter().find(|container| text(container, "/name") == workload);
    found.and_then(|container| container.pointer_mut("/args")).and_then(Value::as_array_mut)
}

fn mark_flag(object: &mut Value, marks: &mut Marks, workload: &str, flag: &str, value: &str) -> Result<bool> {
    let Some(arguments) = arguments(object, workload) else { return Ok(false) };
    let start = format!("{flag}=");
    let found =
        arguments.iter_mut().find(|argument| argument.as_str().is_some_and(|a| a.starts_with(&start)));
    let found = found.with_context(|| format!("{workload} has no {flag}"))?;
    let default = found.as_str().and_then(|argument| argument.strip_prefix(&start)).unwrap_or_default();
    let mut default = json!(default);
    let expression = format!("{{{{ printf \"{flag}=%v\" .Values.{value} | quote }}}}");
    marks.replace(&mut default, value, Mark::Expression(expression));
    *found = default;
    Ok(true)
}

fn mark_optional_flag(
    object: &mut Value,
    marks: &mut Marks,
    workload: &str,
    flag: &str,
    value: &str,
) -> bool {
    let Some(arguments) = arguments(object, workload) else { return false };
    let mut argument = Value::Null;
    let condition = format!("not (kindIs \"invalid\" .Values.{value})");
    let then = format!("{{{{ printf \"{flag}=%v\" .Values.{value} | quote }}}}");
    marks.replace(&mut argument, value, Mark::When { condition, then });
    arguments.push(argument);
    true
}

fn mark_images(object: &mut Value, marks: &mut Marks, name: &str, value: &str) -> bool {
    let mut any = false;
    for container in containers(object) {
        let ours = text(container, "/image").starts_with("holdfast:");
        let wanted = if name.is_empty() { ours } else { text(container, "/name") == name };
        if let Some(image) = container.pointer_mut("/image").filter(|_| wanted) {
            marks.replace(image, value, Mark::Expression(format!("{{{{ .Values.{value} | quote }}}}")));
            any = true;
        }
    }
    any
}

fn mark_pull_policies(object: &mut Value, marks: &mut Marks, value: &str) -> bool {
    let mut any = false;
    for container in containers(object) {
        if let Some(policy) = container.pointer_mut("/imagePullPolicy") {
            marks.replace(policy, value, Mark::Expression(format!("{{{{ .Values.{value} }}}}")));
            any = true;
        }
    }
    any
}

fn mark_condition(
    object: &mut Value,
    marks: &mut Marks,
    of: &(&str, &str),
    place: &str,
    condition: &str,
) -> bool {
    if !is(object, of) {
        return false;
    }
    let condition = condition.to_owned();
    if place.is_empty() {
        marks.marks.push(Mark::Whole(condition));
        return true;
    }
    let Some(found) = object.pointer_mut(place) else { return false };
    // JSON is YAML, and says whether it is text.
    let then = found.to_string();
    *found = Value::String(word(marks.marks.len()));
    marks.marks.push(Mark::When { condition, then });
    true
}
