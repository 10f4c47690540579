//! What the runtime passes in `runtimeConfig`, conventions section "Dynamic plugin specific fields".
//!
//! What is asked for and not given is an error. The exceptions are by name: `aliases` (names are the cluster's DNS service's
//! business) and `cgroupPath` (nothing here is counted by cgroup) change nothing about the network.

use std::collections::BTreeMap;
use std::net::IpAddr;

use ipnetwork::IpNetwork;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::{CniError, code};
use crate::bandwidth::{Bandwidth, Rate};
use crate::ipam::AddressRequest;
use crate::nat::PortMapping;
use crate::plan::MacAddr;
use crate::ports::Proto;

/// What one attachment asks for.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Capabilities {
    /// `ips` and `ipRanges`.
    pub addresses: AddressRequest,
    /// `mac`.
    pub mac: Option<MacAddr>,
    /// `dns` in the shape of a result.
    pub dns: Option<Value>,
    /// `portMappings`.
    pub host_ports: Vec<PortMapping>,
    /// `bandwidth`.
    pub bandwidth: Bandwidth,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct RawRange {
    subnet: IpNetwork,
    range_start: Option<IpAddr>,
    range_end: Option<IpAddr>,
}

#[derive(Deserialize)]
struct RawDns {
    #[serde(default, alias = "Servers")]
    servers: Vec<String>,
    #[serde(default, alias = "Searches")]
    searches: Vec<String>,
    #[serde(default, alias = "Options")]
    options: Vec<String>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
#[derive(Default)]
/// containerd writes keys as its Go structures have them, here and in the two others: Go reads keys in either case.
struct RawBandwidth {
    #[serde(alias = "IngressRate")]
    ingress_rate: u64,
    #[serde(alias = "IngressBurst")]
    ingress_burst: u64,
    #[serde(alias = "EgressRate")]
    egress_rate: u64,
    #[serde(alias = "EgressBurst")]
    egress_burst: u64,
}

/// Keys that are not known are passed over, as runtimes have put some of their own there.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct RawMapping {
    #[serde(default, alias = "HostPort")]
    host_port: i64,
    #[serde(default, alias = "ContainerPort")]
    container_port: i64,
    #[serde(alias = "Protocol")]
    protocol: Option<String>,
    #[serde(default, rename = "hostIP", alias = "HostIP")]
    host_ip: String,
}

impl Capabilities {
    /// Reads `runtimeConfig`. A capability that is `null` or an empty list was not asked for.
    ///
    /// # Errors
    /// Code 2 for a capability that this plugin does not have, 7 for a value that makes no sense.
    pub(super) fn parse(runtime_config: BTreeMap<String, Value>) -> Result<Self, CniError> {
        let mut capabilities = Self::default();
        for (key, value) in runtime_config {
            if value.is_null() || value.as_array().is_some_and(Vec::is_empty) {
                continue;
            }
            match key.as_str() {
                "ips" => capabilities.addresses.ips = parse_ips(&value)?,
                "ipRanges" => capabilities.addresses.range_sets = parse_range_sets(&value)?,
                "mac" => capabilities.mac = parse_mac(&value)?,
                "dns" => capabilities.dns = parse_dns(&value)?,
                "bandwidth" => capabilities.bandwidth = parse_bandwidth(&value)?,
                "portMappings" => capabilities.host_ports = parse_port_mappings(&value)?,
                "aliases" | "cgroupPath" => {}
                _ => {
                    let msg = format!(
                        "runtimeConfig.{key} = {value} is not supported: the plugin does not have this capability"
                    );
                    return Err(CniError::new(code::UNSUPPORTED_FIELD, msg));
                }
            }
        }
        Ok(capabilities)
    }
}

/// A value that is not what the conventions say.
fn wrong(key: &str, value: &Value, why: &str) -> CniError {
    CniError::new(code::INVALID_CONFIG, format!("runtimeConfig.{key} = {value}: {why}"))
}

/// Addresses with or without a prefix length. The length is not used: a pod has its address for itself.
fn parse_ips(value: &Value) -> Result<Vec<IpAddr>, CniError> {
    let texts: Vec<String> =
        serde_json::from_value(value.clone()).map_err(|_| wrong("ips", value, "not a list of addresses"))?;
    let parse = |text: &String| match text.parse::<IpNetwork>() {
        Ok(network) => Ok(network.ip()),
        Err(_) => Err(wrong("ips", value, &format!("\"{text}\" is not an address"))),
    };
    texts.iter().map(parse).collect()
}

fn parse_mac(value: &Value) -> Result<Option<MacAddr>, CniError> {
    let text = value.as_str().ok_or_else(|| wrong("mac", value, "not a string"))?;
    if text.is_empty() {
        return Ok(None);
    }
    let mac: MacAddr = text.parse().map_err(|error| wrong("mac", value, &format!("{error}")))?;
    if mac.0[0] & 1 == 1 || mac.0 == [0; 6] {
        return Err(wrong("mac", value, "an interface needs a unicast address"));
    }
    Ok(Some(mac))
}

/// As `ranges` of the plugin host-local: one set for each address to be given, each set a pool of pieces.
fn parse_range_sets(value: &Value) -> Result<Vec<Vec<(IpAddr, IpAddr)>>, CniError> {
    let sets: Vec<Vec<RawRange>> = serde_json::from_value(value.clone()).map_err(|error| {
        wrong("ipRanges", value, &format!("{error}; give subnet, rangeStart and rangeEnd"))
    })?;
    sets.iter().map(|set| parse_range_set(set, value)).collect()
}

fn parse_range_set(set: &[RawRange], value: &Value) -> Result<Vec<(IpAddr, IpAddr)>, CniError> {
    if set.is_empty() {
        return Err(wrong("ipRanges", value, "a set has no range"));
    }
    let mut pieces = Vec::new();
    for range in set {
        let (first, last) = (
            range.range_start.unwrap_or_else(|| range.subnet.network()),
            range.range_end.unwrap_or_else(|| range.subnet.broadcast()),
        );
        if !range.subnet.contains(first) || !range.subnet.contains(last) || first > last {
            return Err(wrong(
                "ipRanges",
                value,
                &format!("{first} to {last} is no part of {}", range.subnet),
            ));
        }
        pieces.push((first, last));
    }
    if pieces.iter().any(|(first, _)| first.is_ipv4() != pieces[0].0.is_ipv4()) {
        return Err(wrong("ipRanges", value, "a set mixes IPv4 and IPv6"));
    }
    Ok(pieces)
}

fn parse_port_mappings(value: &Value) -> Result<Vec<PortMapping>, CniError> {
    let raws: Vec<RawMapping> = serde_json::from_value(value.clone())
        .map_err(|error| wrong("portMappings", value, &error.to_string()))?;
    let mut mappings: Vec<PortMapping> = Vec::new();
    for (index, raw) in raws.iter().enumerate() {
        let mapping = parse_port_mapping(index, raw)?;
        if mappings.contains(&mapping) {
            continue;
        }
        let differs = |other: &&PortMapping| other.container_port != mapping.container_port;
        if let Some(other) = mappings.iter().filter(|other| other.overlaps(&mapping)).find(differs) {
            let why = format!(
                "{other} leads to two ports, {} and {}",
                other.container_port, mapping.container_port
            );
            return Err(wrong("portMappings", value, &why));
        }
        mappings.push(mapping);
    }
    Ok(mappings)
}

fn parse_port_mapping(index: usize, raw: &RawMapping) -> Result<PortMapping, CniError> {
    let field = |name: &str| format!("portMappings[{index}].{name}");
    let port = |name: &str, number: i64| match u16::try_from(number) {
        Ok(port) if port > 0 => Ok(port),
        _ => Err(wrong(&field(name), &Value::from(number), "not a port from 1 to 65535")),
    };
    let named = raw.protocol.as_deref().filter(|text| !text.is_empty()).unwrap_or("tcp");
    let proto = Proto::ALL.into_iter().find(|proto| proto.to_string() == named.to_ascii_lowercase());
    let proto =
        proto.ok_or_else(|| wrong(&field("protocol"), &Value::from(named), "none of tcp, udp and sctp"))?;
    let text = Value::from(raw.host_ip.as_str());
    let host_ip = (!raw.host_ip.is_empty()).then(|| raw.host_ip.parse::<IpAddr>()).transpose();
    let host_ip = host_ip.map_err(|_| wrong(&field("hostIP"), &text, "not an address"))?;
    if let Some(address) = host_ip {
        if address.is_multicast() {
            return Err(wrong(&field("hostIP"), &text, "a multicast address is no node's"));
        }
        if address.is_ipv6() && address.is_loopback() {
            let key = field("hostIP");
            let msg = format!(
                "runtimeConfig.{key} = {text} is not supported: the kernel sends nothing from ::1 to a pod"
            );
            return Err(CniError::new(code::UNSUPPORTED_FIELD, msg));
        }
    }
    Ok(PortMapping {
        proto,
        host_ip,
        host_port: port("hostPort", raw.host_port)?,
        container_port: port("containerPort", raw.container_port)?,
    })
}

/// Bits per second and bits. A rate of 0 with a burst of 0 is no limit, as runtimes write it.
fn parse_bandwidth(value: &Value) -> Result<Bandwidth, CniError> {
    let raw: RawBandwidth = serde_json::from_value(value.clone()).map_err(|error| {
        wrong("bandwidth", value, &format!("{error}; give rates in bits per second, bursts in bits"))
    })?;
    let rate = |name: &str, rate: u64, burst: u64| match (rate, burst) {
        (0, 0) => Ok(None),
        (0, _) | (_, 0) => {
            let why = format!("{name}Rate and {name}Burst go together");
            Err(wrong("bandwidth", value, &why))
        }
        _ => match Rate::new(rate, burst) {
            Some(rate) => Ok(Some(rate)),
            None => {
                let why = format!("{name}Rate must be at least 8, {name}Burst from 8 to 34359738367");
                Err(wrong("bandwidth", value, &why))
            }
        },
    };
    Ok(Bandwidth {
        ingress: rate("ingress", raw.ingress_rate, raw.ingress_burst)?,
        egress: rate("egress", raw.egress_rate, raw.egress_burst)?,
    })
}

fn parse_dns(value: &Value) -> Result<Option<Value>, CniError> {
    let raw: RawDns = serde_json::from_value(value.clone())
        .map_err(|_| wrong("dns", value, "give lists of strings: servers, searches, options"))?;
    let mut dns = Map::new();
    for (key, list) in [("nameservers", raw.servers), ("search", raw.searches), ("options", raw.options)] {
        if !list.is_empty() {
            dns.insert(key.to_owned(), Value::from(list));
        }
    }
    Ok((!dns.is_empty()).then_some(Value::Object(dns)))
}

/// `dns` of the configuration with what the runtime says in its place, key by key.
pub(super) fn merge_dns(configured: Option<Value>, given: Option<Value>) -> Option<Value> {
    match (configured, given) {
        (Some(Value::Object(mut configured)), Some(Value::Object(given))) => {
            configured.extend(given);
            Some(Value::Object(configured))
        }
        (configured, given) => given.or(configured),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn parse(value: Value) -> Result<Capabilities, CniError> {
        Capabilities::parse(serde_json::from_value(value).unwrap())
    }

    #[test]
    fn each_capability_is_read() {
        let found = parse(json!({
            "ips": ["10.1.0.2/24", "fd00::7"],
            "mac": "C2:11:22:33:44:55",
            "ipRanges": [[{ "subnet": "10.1.0.0/24", "rangeStart": "10.1.0.8" }, { "subnet": "10.2.0.0/30" }]],
            "dns": { "servers": ["10.0.0.53"], "searches": ["a.example"] },
            "aliases": ["db"], "cgroupPath": "/x", "portMappings": [], "bandwidth": null,
        }))
        .unwrap();
        let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
        assert_eq!(found.addresses.ips, [ip("10.1.0.2"), ip("fd00::7")]);
        assert_eq!(found.mac.unwrap().to_string(), "c2:11:22:33:44:55");
        let pieces = vec![(ip("10.1.0.8"), ip("10.1.0.255")), (ip("10.2.0.0"), ip("10.2.0.3"))];
        assert_eq!(found.addresses.range_sets, [pieces]);
        let configured = json!({ "nameservers": ["192.0.2.1"], "domain": "example" });
        let merged = merge_dns(Some(configured), found.dns).unwrap();
        assert_eq!(
            merged,
            json!({ "nameservers": ["10.0.0.53"], "domain": "example", "search": ["a.example"] })
        );
    }

    #[test]
    fn keys_as_containerd_writes_them_are_understood() {
        let theirs = json!({
            "portMappings": [{ "HostPort": 8088, "ContainerPort": 8080, "Protocol": "tcp", "HostIP": "" }],
            "bandwidth": { "IngressRate": 80_000_000, "IngressBurst": u32::MAX, "EgressRate": 0, "EgressBurst": 0 },
            "dns": { "Servers": ["192.0.2.53"], "Searches": [], "Options": [] },
        });
        let ours = json!({
            "portMappings": [{ "hostPort": 8088, "containerPort": 8080 }],
            "bandwidth": { "ingressRate": 80_000_000, "ingressBurst": u32::MAX },
            "dns": { "servers": ["192.0.2.53"], "searches": [], "options": [] },
        });
        let (theirs, ours) = (parse(theirs).unwrap(), parse(ours).unwrap());
        assert_eq!((&theirs.host_ports, &theirs.bandwidth), (&ours.host_ports, &ours.bandwidth));
        assert!(theirs.bandwidth.ingress.is_some() && theirs.host_ports.len() == 1);
    }

    #[test]
    fn port_mappings_are_read_once_each_with_tcp_and_all_addresses_where_nothing_is_said() {
        let found = parse(json!({ "portMappings": [
            { "hostPort": 8080, "containerPort": 80 },
            { "hostPort": 8080, "containerPort": 80, "protocol": "TCP", "hostIP": "", "name": "web" },
            { "hostPort": 53, "containerPort": 5353, "protocol": "udp", "hostIP": "192.0.2.1" },
        ] }))
        .unwrap();
        let mapping = |proto, host_ip: Option<&str>, host_port, container_port| PortMapping {
            proto,
            host_ip: host_ip.map(|text| text.parse().unwrap()),
            host_port,
            container_port,
        };
        let expected =
            [mapping(Proto::Tcp, None, 8080, 80), mapping(Proto::Udp, Some("192.0.2.1"), 53, 5353)];
        assert_eq!(found.host_ports, expected);
    }

    #[test]
    fn limits_are_read_for_each_direction() {
        let found = parse(json!({ "bandwidth": {
            "ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 0, "egressBurst": 0,
        } }))
        .unwrap();
        let expected = Bandwidth { ingress: Rate::new(8_000_000, 800_000), egress: None };
        assert_eq!(found.bandwidth, expected);
    }

    #[test]
    fn wrong_values_are_named_with_key_and_value() {
        for (value, code, part) in [
            (json!({ "ips": ["10.1.0"] }), 7, "\"10.1.0\" is not an address"),
            (json!({ "ips": "10.1.0.1" }), 7, "not a list"),
            (json!({ "mac": "01:00:5e:00:00:01" }), 7, "unicast"),
            (json!({ "mac": "00:00:00:00:00:00" }), 7, "unicast"),
            (json!({ "mac": 7 }), 7, "not a string"),
            (json!({ "mac": "x" }), 7, "not an Ethernet address"),
            (json!({ "ipRanges": [[]] }), 7, "no range"),
            (json!({ "ipRanges": [[{ "subnet": "10.1.0.0/24", "rangeEnd": "10.2.0.1" }]] }), 7, "no part of"),
            (json!({ "ipRanges": [[{ "subnet": "10.1.0.0/24" }, { "subnet": "fd00::/64" }]] }), 7, "mixes"),
            (json!({ "ipRanges": [[{ "subnet": "10.1.0.0/24", "gateway": "10.1.0.1" }]] }), 7, "gateway"),
            (json!({ "dns": { "servers": "x" } }), 7, "lists of strings"),
            (json!({ "bandwidth": { "ingressRate": 800 } }), 7, "ingressRate and ingressBurst go together"),
            (json!({ "bandwidth": { "egressBurst": 800 } }), 7, "egressRate and egressBurst go together"),
            (
                json!({ "bandwidth": { "egressRate": -1, "egressBurst": 8 } }),
                7,
                "runtimeConfig.bandwidth = {",
            ),
            (json!({ "bandwidth": { "egressRate": 7, "egressBurst": 8 } }), 7, "at least 8"),
            (json!({ "bandwidth": { "egressRate": 8, "egressBurst": 1u64 << 35 } }), 7, "34359738367"),
            (json!({ "bandwidth": { "unshapedSubnets": ["::/0"] } }), 7, "unshapedSubnets"),
            (json!({ "portMappings": 7 }), 7, "runtimeConfig.portMappings = 7"),
            (
                json!({ "portMappings": [{ "hostPort": 0, "containerPort": 80 }] }),
                7,
                "runtimeConfig.portMappings[0].hostPort = 0",
            ),
            (json!({ "portMappings": [{ "hostPort": 65536, "containerPort": 80 }] }), 7, "hostPort = 65536"),
            (json!({ "portMappings": [{ "hostPort": 80, "containerPort": -1 }] }), 7, "containerPort = -1"),
            (json!({ "portMappings": [{ "hostPort": 80 }] }), 7, "containerPort = 0"),
            (
                json!({ "portMappings": [{ "hostPort": 80, "containerPort": 80, "protocol": "dccp" }] }),
                7,
                "portMappings[0].protocol = \"dccp\"",
            ),
            (
                json!({ "portMappings": [{ "hostPort": 80, "containerPort": 80, "hostIP": "x" }] }),
                7,
                "portMappings[0].hostIP = \"x\"",
            ),
            (
                json!({ "portMappings": [{ "hostPort": 80, "containerPort": 80, "hostIP": "::1" }] }),
                2,
                "portMappings[0].hostIP = \"::1\"",
            ),
            (
                json!({ "portMappings": [
                    { "hostPort": 80, "containerPort": 80 }, { "hostPort": 80, "containerPort": 81, "hostIP": "192.0.2.1" },
                ] }),
                7,
                "leads to two ports, 80 and 81",
            ),
            (json!({ "infinibandGUID": "c2:11:22:33:44:55:66:77" }), 2, "c2:11:22:33:44:55:66:77"),
            (json!({ "deviceID": "0000:04:00.5" }), 2, "runtimeConfig.deviceID"),
        ] {
            let error = parse(value.clone()).unwrap_err();
            assert_eq!(error.code, code, "{value}: {error}");
            assert!(error.msg.contains(part), "{value}: {error}");
        }
    }
}
