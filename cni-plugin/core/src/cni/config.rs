//! The network configuration on standard input, spec section "Network configuration format".

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

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
    /// `dns`, handed through to the result.
    pub dns: Option<Value>,
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
    /// what is not supported, 7 for wrong values.
    pub fn parse(command: Command, input: &[u8]) -> Result<Self, CniError> {
        let version_text = Self::peek_version(input)?;
        let version = CniVersion::parse(version_text.as_deref().unwrap_or("0.1.0"))?;
        check_verb(command, version)?;
        let raw: RawConfig = serde_json::from_slice(input).map_err(|error| decode_error(&error))?;
        check_supported(&raw)?;
        let name = raw.name.unwrap_or_default();
        if !is_identifier(&name) {
            let msg =
                format!("the network's name \"{name}\" must be letters, digits, \"_\", \".\" and \"-\"");
            return Err(CniError::new(code::INVALID_CONFIG, msg));
        }
        let prev_result =
            raw.prev_result.filter(|value| !value.is_null()).map(CniResult::parse).transpose()?;
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
            dns: raw.dns,
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

/// What is asked for and not given is an error, never silence.
fn check_supported(raw: &RawConfig) -> Result<(), CniError> {
    let unsupported = |field: &str, why: &str| {
        Err(CniError::new(code::UNSUPPORTED_FIELD, format!("{field} is not supported: {why}")))
    };
    if raw.plugin.as_deref().unwrap_or_default().is_empty() {
        return Err(CniError::new(code::INVALID_CONFIG, "type is missing"));
    }
    if raw.ip_masq == Some(true) {
        return unsupported("ipMasq", "the node agent decides about masquerading, not the configuration");
    }
    if let Some(ipam) = raw.ipam.as_ref().and_then(|ipam| ipam.get("type")) {
        return unsupported(
            "ipam.type",
            &format!("{ipam} was asked for, but the node agent leases addresses"),
        );
    }
    for (key, value) in raw.runtime_config.iter().flatten() {
        let empty = value.is_null() || value.as_array().is_some_and(Vec::is_empty);
        if !empty && key != "dns" && key != "cgroupPath" {
            return unsupported(&format!("runtimeConfig.{key}"), "the plugin does not have this capability");
        }
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
            (Command::Add, 2, |v| v["runtimeConfig"] = json!({ "portMappings": [{ "hostPort": 1 }] })),
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

    #[test]
    fn a_null_list_of_valid_attachments_is_an_empty_list() {
        let config =
            parse(Command::Gc, &mk_config(|v| v["cni.dev/valid-attachments"] = Value::Null)).unwrap();
        assert_eq!(config.valid_attachments, Some(Vec::new()));
    }
}
