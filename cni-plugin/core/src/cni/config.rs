//! The network configuration on standard input, spec section "Network configuration format".

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::capabilities::{Capabilities, merge_dns};
use super::env::is_identifier;
use super::{CniError, CniResult, CniVersion, Command, code};

/// Where the agent listens unless `agentSocket` says otherwise.
pub const DEFAULT_AGENT_SOCKET: &str = "/run/holdfast/netd.sock";

/// Folder for delete records unless `pendingDir` says otherwise.
const DEFAULT_PENDING_DIR: &str = "/var/lib/holdfast/netd/pending";

/// A validated configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct NetworkConfig {
    /// Version that the answer must have.
    pub version: CniVersion,
    /// Name of the network.
    pub name: String,
    /// Unix socket of the agent.
    pub agent_socket: String,
    /// Folder that takes delete records while the agent is down.
    pub pending_dir: String,
    /// `dns` with what the runtime gave in its place, handed through to the result.
    pub dns: Option<Value>,
    /// ADD: what the runtime asks for.
    pub capabilities: Capabilities,
    /// Result of the plugins before this one, or of the ADD that is checked.
    pub prev_result: Option<CniResult>,
    /// GC: what the runtime still uses. `None` where the key is missing.
    pub valid_attachments: Option<Vec<ValidAttachment>>,
}

/// An entry of `cni.dev/valid-attachments`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
pub struct ValidAttachment {
    /// Container's id.
    #[serde(rename = "containerID")]
    pub container_id: String,
    /// Interface in the container.
    pub ifname: String,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawConfig {
    name: Option<String>,
    #[serde(rename = "type")]
    plugin: Option<String>,
    agent_socket: Option<String>,
    pending_dir: Option<String>,
    ip_masq: Option<bool>,
    ipam: Option<Map<String, Value>>,
    dns: Option<Value>,
    prev_result: Option<Value>,
    runtime_config: Option<BTreeMap<String, Value>>,
    #[serde(rename = "cni.dev/valid-attachments", default, deserialize_with = "present")]
    valid_attachments: Option<Vec<ValidAttachment>>,
    // Key of library versions before the final 1.1.0.
    #[serde(rename = "cni.dev/attachments", default, deserialize_with = "present")]
    attachments: Option<Vec<ValidAttachment>>,
}

impl NetworkConfig {
    /// Reads the version alone, so that errors about the rest can carry it.
    ///
    /// # Errors
    /// Code 6 when the input is not a JSON object.
    pub fn peek_version(input: &[u8]) -> Result<Option<String>, CniError> {
        let object = decode_object(input)?;
        match object.get("cniVersion") {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => Ok(Some(text.clone())),
            Some(_) => Err(CniError::new(code::DECODING_FAILURE, "cniVersion is not a string")),
        }
    }

    /// Reads and checks a configuration for one verb.
    ///
    /// # Errors
    /// Code 6 for malformed JSON, 1 for a version that is not spoken or lacks the verb, 2 for fields that ask for
    /// what is not supported, 7 for wrong values. DEL and GC give back what there is, whatever else the configuration asks for;
    /// DEL does not look at prevResult, so that one that was spoilt on the runtime's disk keeps no pod from ending.
    pub fn parse(command: Command, input: &[u8]) -> Result<Self, CniError> {
        let version_text = Self::peek_version(input)?;
        let version = CniVersion::parse(version_text.as_deref().unwrap_or("0.1.0"))?;
        check_verb(command, version)?;
        let raw: RawConfig = serde_json::from_slice(input).map_err(|error| decode_error(&error))?;
        if !matches!(command, Command::Del | Command::Gc) {
            check_supported(&raw)?;
        }
        let name = raw.name.unwrap_or_default();
        if !is_identifier(&name) {
            let msg =
                format!("the network's name \"{name}\" must be letters, digits, \"_\", \".\" and \"-\"");
            return Err(CniError::new(code::INVALID_CONFIG, msg));
        }
        let prev_result = match command {
            Command::Add | Command::Check => raw.prev_result.filter(|value| !value.is_null()),
            Command::Del | Command::Gc | Command::Status | Command::Version => None,
        };
        let prev_result = prev_result.map(CniResult::parse).transpose()?;
        let mut capabilities = Capabilities::default();
        if command == Command::Add {
            capabilities = Capabilities::parse(raw.runtime_config.unwrap_or_default())?;
        }
        if command == Command::Check && prev_result.is_none() {
            return Err(CniError::new(code::INVALID_CONFIG, "prevResult is missing, CHECK needs it"));
        }
        let valid_attachments = raw.valid_attachments.or(raw.attachments);
        if command == Command::Gc && valid_attachments.is_none() {
            let msg =
                "cni.dev/valid-attachments is missing: without the list nothing can be told to be garbage";
            return Err(CniError::new(code::INVALID_CONFIG, msg));
        }
        Ok(Self {
            version,
            name,
            agent_socket: absolute("agentSocket", raw.agent_socket, DEFAULT_AGENT_SOCKET)?,
            pending_dir: absolute("pendingDir", raw.pending_dir, DEFAULT_PENDING_DIR)?,
            dns: merge_dns(raw.dns, capabilities.dns.take()),
            capabilities,
            prev_result,
            valid_attachments,
        })
    }
}

fn decode_object(input: &[u8]) -> Result<Map<String, Value>, CniError> {
    serde_json::from_slice(input).map_err(|error| decode_error(&error))
}

fn decode_error(error: &serde_json::Error) -> CniError {
    CniError::new(code::DECODING_FAILURE, "the network configuration is not valid").details(error.to_string())
}

/// CHECK came with 0.4.0, GC and STATUS with 1.1.0.
fn check_verb(command: Command, version: CniVersion) -> Result<(), CniError> {
    let (verb, since) = match command {
        Command::Add | Command::Del | Command::Version => return Ok(()),
        Command::Check => ("CHECK", CniVersion::V0_4_0),
        Command::Gc => ("GC", CniVersion::V1_1_0),
        Command::Status => ("STATUS", CniVersion::V1_1_0),
    };
    if version >= since {
        return Ok(());
    }
    let msg = format!("cniVersion {} has no {verb}; it came with {}", version.as_str(), since.as_str());
    Err(CniError::new(code::INCOMPATIBLE_VERSION, msg))
}

/// What is asked for and not given is an error, never silence. The message has key and value, as the spec wants it.
fn check_supported(raw: &RawConfig) -> Result<(), CniError> {
    let unsupported = |field: &str, value: &Value, why: &str| {
        let msg = format!("{field} = {value} is not supported: {why}");
        Err(CniError::new(code::UNSUPPORTED_FIELD, msg))
    };
    if raw.plugin.as_deref().unwrap_or_default().is_empty() {
        return Err(CniError::new(code::INVALID_CONFIG, "type is missing"));
    }
    if raw.ip_masq == Some(true) {
        let why = "the node agent decides about masquerading, not the configuration";
        return unsupported("ipMasq", &Value::Bool(true), why);
    }
    if let Some(ipam) = raw.ipam.as_ref().and_then(|ipam| ipam.get("type")) {
        return unsupported("ipam.type", ipam, "the node agent leases addresses");
    }
    Ok(())
}

fn absolute(field: &str, value: Option<String>, default: &str) -> Result<String, CniError> {
    let value = value.unwrap_or_else(|| default.to_owned());
    if value.starts_with('/') {
        return Ok(value);
    }
    Err(CniError::new(code::INVALID_CONFIG, format!("{field} \"{value}\" is not an absolute path")))
}

/// `null` is an empty list that is present: Go writes an empty slice so.
fn present<'de, D: serde::Deserializer<'de>>(
    deserializer: D,
) -> Result<Option<Vec<ValidAttachment>>, D::Error> {
    Option::<Vec<ValidAttachment>>::deserialize(deserializer).map(|list| Some(list.unwrap_or_default()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn parse(command: Command, value: &Value) -> Result<NetworkConfig, CniError> {
        NetworkConfig::parse(command, value.to_string().as_bytes())
    }

    fn mk_config(change: impl FnOnce(&mut Value)) -> Value {
        let mut value = json!({ "cniVersion": "1.1.0", "name": "pods", "type": "holdfast-cni" });
        change(&mut value);
        value
    }

    #[test]
    fn a_minimal_configuration_has_the_default_socket() {
        let config = parse(Command::Add, &mk_config(|_| {})).unwrap();
        assert_eq!(config.agent_socket, DEFAULT_AGENT_SOCKET);
        assert_eq!(config.version, CniVersion::V1_1_0);
    }

    #[test]
    fn wrong_input_gives_the_codes_of_the_spec() {
        type Change = fn(&mut Value);
        let cases: [(Command, u32, Change); 12] = [
            (Command::Add, 1, |v| v["cniVersion"] = json!("9.9.9")),
            (Command::Add, 1, |v| v["cniVersion"] = json!("0.2.0")),
            (Command::Check, 1, |v| v["cniVersion"] = json!("0.3.1")),
            (Command::Gc, 1, |v| v["cniVersion"] = json!("1.0.0")),
            (Command::Status, 1, |v| v["cniVersion"] = json!("1.0.0")),
            (Command::Add, 6, |v| v["cniVersion"] = json!(1)),
            (Command::Add, 7, |v| v["name"] = json!("a b")),
            (Command::Add, 7, |v| v["agentSocket"] = json!("x.sock")),
            (Command::Add, 2, |v| v["ipam"] = json!({ "type": "host-local" })),
            (Command::Add, 2, |v| v["runtimeConfig"] = json!({ "deviceID": "0000:04:00.5" })),
            (Command::Check, 7, |_| {}),
            (Command::Gc, 7, |_| {}),
        ];
        for (index, (command, expected, change)) in cases.into_iter().enumerate() {
            let error = parse(command, &mk_config(change)).unwrap_err();
            assert_eq!(error.code, expected, "case {index}: {error}");
        }
        for text in ["", "{", "[]", "null", "{\"cniVersion\":\"1.0.0\",\"name\":7}"] {
            let error = NetworkConfig::parse(Command::Add, text.as_bytes()).unwrap_err();
            assert_eq!(error.code, code::DECODING_FAILURE, "{text}");
        }
    }

    /// Bytes changed, left out and doubled at random, and keys of one value put into another's place.
    #[test]
    fn whatever_comes_in_is_a_configuration_or_an_error_of_the_spec() {
        use rand::{Rng, SeedableRng};
        let whole = mk_config(|v| {
            v["runtimeConfig"] = json!({
                "ips": ["10.1.0.2/24"], "mac": "c2:11:22:33:44:55", "dns": { "servers": ["10.0.0.53"] },
                "ipRanges": [[{ "subnet": "10.1.0.0/24", "rangeStart": "10.1.0.8", "rangeEnd": "10.1.0.9" }]],
            });
            v["prevResult"] = json!({
                "cniVersion": "1.1.0", "interfaces": [{ "name": "x", "mtu": 1500 }],
                "ips": [{ "address": "10.1.0.2/32", "interface": 0 }], "routes": [{ "dst": "::/0" }],
            });
            v["cni.dev/valid-attachments"] = json!([{ "containerID": "a", "ifname": "eth0" }]);
        });
        let values = [
            json!(null),
            json!(-1),
            json!(1e300),
            json!([]),
            json!({}),
            json!("x"),
            json!([[{}]]),
            json!(true),
        ];
        let commands = [Command::Add, Command::Del, Command::Check, Command::Gc, Command::Status];
        let mut accepted = 0;
        for seed in 0..20_000_u64 {
            let mut rng = rand::rngs::StdRng::seed_from_u64(seed);
            let mut value = whole.clone();
            if rng.random_bool(0.5) {
                let keys: Vec<String> = value.as_object().unwrap().keys().cloned().collect();
                let (key, other) =
                    (&keys[rng.random_range(0..keys.len())], &keys[rng.random_range(0..keys.len())]);
                let odd = values[rng.random_range(0..values.len())].clone();
                value[key] = if rng.random_bool(0.5) { value[other].clone() } else { odd };
            }
            let mut text = value.to_string().into_bytes();
            for _ in 0..rng.random_range(0..4) {
                let at = rng.random_range(0..text.len());
                match rng.random_range(0..3) {
                    0 => text[at] = rng.random(),
                    1 => drop(text.remove(at)),
                    _ => text.insert(at, b"{}[],:\"0"[rng.random_range(0..8)]),
                }
            }
            match NetworkConfig::parse(commands[rng.random_range(0..commands.len())], &text) {
                Ok(config) => {
                    accepted += 1;
                    assert!(is_identifier(&config.name), "seed {seed}");
                }
                Err(error) => {
                    assert!(
                        [1, 2, 6, 7].contains(&error.code) && !error.msg.is_empty(),
                        "seed {seed}: {error}"
                    );
                }
            }
        }
        assert!(accepted > 1000, "only {accepted} of 20000 were accepted: the changes are too wild");
    }

    #[test]
    fn del_looks_at_nothing_that_it_does_not_need() {
        let config = mk_config(|v| {
            v["prevResult"] = json!([1, 2]);
            v["ipMasq"] = json!(true);
            v["runtimeConfig"] = json!({ "deviceID": "0000:04:00.5" });
        });
        assert_eq!(parse(Command::Del, &config).unwrap().prev_result, None);
        assert!(parse(Command::Add, &config).is_err());
    }

    #[test]
    fn a_null_list_of_valid_attachments_is_an_empty_list() {
        let config =
            parse(Command::Gc, &mk_config(|v| v["cni.dev/valid-attachments"] = Value::Null)).unwrap();
        assert_eq!(config.valid_attachments, Some(Vec::new()));
    }
}
