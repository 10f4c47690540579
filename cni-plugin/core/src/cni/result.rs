//! Results and their shapes in each spec version, spec section "Result types".

use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{CniError, CniVersion, code};

/// A result in the shape of 1.1.0. Fields that are not known here are kept.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase", default)]
pub struct CniResult {
    /// Version of the text; set when it is written.
    pub cni_version: String,
    /// Interfaces.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<CniInterface>,
    /// Addresses.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<CniIp>,
    /// Routes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<CniRoute>,
    /// Resolver settings.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub dns: Option<Value>,
    /// Everything else.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// An interface of a result.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct CniInterface {
    /// Name.
    pub name: String,
    /// Hardware address.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// Since 1.1.0.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
    /// Path of the network namespace; empty for the node's own.
    #[serde(skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    /// Everything else.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// An address of a result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CniIp {
    /// Before 1.0.0: "4" or "6".
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub version: Option<String>,
    /// With prefix length.
    pub address: IpNetwork,
    /// Next hop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gateway: Option<String>,
    /// Index into the interfaces.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<usize>,
    /// Everything else.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

/// A route of a result.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CniRoute {
    /// Destination with prefix length.
    pub dst: IpNetwork,
    /// Next hop.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub gw: Option<String>,
    /// Everything else.
    #[serde(flatten)]
    pub other: Map<String, Value>,
}

impl CniResult {
    /// Reads a `prevResult` of any spoken version.
    ///
    /// # Errors
    /// Code 6 when it has not the shape of a result.
    pub fn parse(value: Value) -> Result<Self, CniError> {
        let result: Self = serde_json::from_value(value).map_err(|error| {
            CniError::new(code::DECODING_FAILURE, "prevResult is not a result").details(error.to_string())
        })?;
        for ip in &result.ips {
            if ip.interface.is_some_and(|index| index >= result.interfaces.len()) {
                let msg = format!("prevResult names an interface for {} that it does not list", ip.address);
                return Err(CniError::new(code::INVALID_CONFIG, msg));
            }
        }
        Ok(result)
    }

    /// Adds `ours` after what earlier plugins of the chain gave, as the spec asks of a plugin that got a prevResult.
    #[must_use]
    pub fn chained_after(self, previous: Option<Self>) -> Self {
        let Some(mut merged) = previous else { return self };
        let offset = merged.interfaces.len();
        merged.interfaces.extend(self.interfaces);
        merged.ips.extend(self.ips.into_iter().map(|mut ip| {
            ip.interface = ip.interface.map(|index| index + offset);
            ip
        }));
        merged.routes.extend(self.routes);
        merged.dns = merged.dns.or(self.dns);
        merged
    }

    /// The result in the shape of `version`.
    #[must_use]
    pub fn to_version(mut self, version: CniVersion) -> Value {
        version.as_str().clone_into(&mut self.cni_version);
        for ip in &mut self.ips {
            let family = if ip.address.is_ipv4() { "4" } else { "6" };
            ip.version = (version < CniVersion::V1_0_0).then(|| family.to_owned());
        }
        if version < CniVersion::V1_1_0 {
            for interface in &mut self.interfaces {
                interface.mtu = None;
                interface.other.retain(|key, _| key != "socketPath" && key != "pciID");
            }
            for route in &mut self.routes {
                let new = ["mtu", "advmss", "priority", "table", "scope"];
                route.other.retain(|key, _| !new.contains(&key.as_str()));
            }
        }
        // Serialising plain maps, strings and numbers cannot fail.
        serde_json::to_value(self).expect("a result is always representable as JSON")
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn mk_result() -> CniResult {
        CniResult::parse(json!({
            "interfaces": [{ "name": "eth0", "mac": "02:00:00:00:00:01", "mtu": 1450, "sandbox": "/run/netns/a" }],
            "ips": [{ "address": "10.1.0.2/32", "gateway": "169.254.1.1", "interface": 0 }],
            "routes": [{ "dst": "0.0.0.0/0", "gw": "169.254.1.1", "mtu": 1400 }],
        }))
        .unwrap()
    }

    #[test]
    fn each_version_has_its_shape() {
        let golden = |version, family: Option<&str>, mtu: bool| {
            let mut value = json!({
                "cniVersion": version,
                "interfaces": [{ "name": "eth0", "mac": "02:00:00:00:00:01", "sandbox": "/run/netns/a" }],
                "ips": [{ "address": "10.1.0.2/32", "gateway": "169.254.1.1", "interface": 0 }],
                "routes": [{ "dst": "0.0.0.0/0", "gw": "169.254.1.1" }],
            });
            if let Some(family) = family {
                value["ips"][0]["version"] = json!(family);
            }
            if mtu {
                value["interfaces"][0]["mtu"] = json!(1450);
                value["routes"][0]["mtu"] = json!(1400);
            }
            value
        };
        assert_eq!(mk_result().to_version(CniVersion::V0_3_1), golden("0.3.1", Some("4"), false));
        assert_eq!(mk_result().to_version(CniVersion::V0_4_0), golden("0.4.0", Some("4"), false));
        assert_eq!(mk_result().to_version(CniVersion::V1_0_0), golden("1.0.0", None, false));
        assert_eq!(mk_result().to_version(CniVersion::V1_1_0), golden("1.1.0", None, true));
    }

    #[test]
    fn a_chained_result_keeps_what_was_there_and_shifts_indices() {
        let previous = CniResult::parse(json!({
            "interfaces": [{ "name": "dummy0", "x": 1 }],
            "ips": [{ "version": "4", "address": "192.0.2.1/24", "interface": 0 }],
            "custom": true,
        }))
        .unwrap();
        let merged = mk_result().chained_after(Some(previous)).to_version(CniVersion::V1_0_0);
        assert_eq!(merged["custom"], json!(true));
        assert_eq!(merged["interfaces"][0]["x"], json!(1));
        assert_eq!(merged["ips"][0].get("version"), None);
        assert_eq!(merged["ips"][1]["interface"], json!(1));
    }

    #[test]
    fn a_result_with_a_dangling_interface_index_is_refused() {
        let error =
            CniResult::parse(json!({ "ips": [{ "address": "10.0.0.1/32", "interface": 3 }] })).unwrap_err();
        assert_eq!(error.code, code::INVALID_CONFIG);
    }
}
