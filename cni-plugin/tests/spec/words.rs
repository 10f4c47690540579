//! Sections 1, 2 and 5: configuration, parameters, versions, results and errors.

use serde_json::{Value, json};

use super::support::{Netns, plugin};
use super::{add, call, mk_node};

const CONTAINER: [(&str, &str); 3] =
    [("CNI_CONTAINERID", "c"), ("CNI_IFNAME", "eth0"), ("CNI_NETNS", "/proc/self/ns/net")];

fn config(change: Value) -> String {
    let mut config = json!({
        "cniVersion": "1.1.0", "name": "pods", "type": "holdfast-cni",
        "agentSocket": "/nonexistent/netd.sock", "pendingDir": "/nonexistent/pending",
    });
    config.as_object_mut().unwrap().extend(change.as_object().unwrap().clone());
    config.to_string()
}

/// An ADD without an agent, with one variable changed.
fn refused(command: &str, name: &str, value: &str, input: &str) -> Value {
    let mut variables = vec![("CNI_COMMAND", command)];
    variables.extend(CONTAINER.iter().map(|&(k, v)| (k, if k == name { value } else { v })));
    plugin(None, &variables, input).expect_err(command)
}

#[test]
fn a_networks_name_must_start_with_an_alphanumeric_character_and_go_on_with_those_and_three_others() {
    for name in ["", ".pods", "-pods", "a/b", "a b", "../x", "pöds"] {
        let error = refused("ADD", "", "", &config(json!({ "name": name })));
        assert_eq!(error["code"], 7, "{name:?}: {error}");
        assert!(error["msg"].as_str().unwrap().contains("name"), "{error}");
    }
    let good = refused("ADD", "", "", &config(json!({ "name": "p0_.-" })));
    assert_eq!(good["code"], 11, "only the agent is missing: {good}");
}

#[test]
fn a_container_id_must_not_be_empty_and_must_start_with_an_alphanumeric_character() {
    for id in ["", ".c", "-c", "a/b", "../../etc", "a b", "c;d", &"x".repeat(201)] {
        for command in ["ADD", "DEL", "CHECK"] {
            let previous = json!({ "prevResult": { "cniVersion": "1.1.0" } });
            let error = refused(command, "CNI_CONTAINERID", id, &config(previous));
            assert_eq!(error["code"], 4, "{command} {id:?}: {error}");
            assert!(error["msg"].as_str().unwrap().contains("CNI_CONTAINERID"), "{error}");
        }
    }
}

#[test]
fn an_interface_name_that_the_plugin_cannot_use_must_be_an_error() {
    for name in ["", ".", "..", "a/b", "a:b", "a b", "lo", "sixteen-letters-", "a\tb"] {
        let error = refused("ADD", "CNI_IFNAME", name, &config(json!({})));
        assert_eq!(error["code"], 4, "{name:?}: {error}");
        assert!(error["msg"].as_str().unwrap().contains("CNI_IFNAME"), "{error}");
    }
    // The kernel has names of its own that look well.
    let (_cluster, node) = mk_node();
    let sandbox = Netns::new();
    let variables = [("CNI_CONTAINERID", "c"), ("CNI_IFNAME", "all"), ("CNI_NETNS", &sandbox.path())];
    call(&node, "ADD", &variables, json!({})).unwrap_err();
    assert_eq!((node.ports(), node.dump()["leases"].clone()), (0, json!([])));
}

#[test]
fn an_invalid_variable_must_be_named_in_the_message() {
    for (name, value) in [
        ("CNI_NETNS", ""),
        ("CNI_NETNS", "relative/path"),
        ("CNI_NETNS", "/nonexistent/netns"),
        ("CNI_CONTAINERID", "/"),
        ("CNI_IFNAME", "/"),
    ] {
        let error = refused("ADD", name, value, &config(json!({})));
        assert_eq!(error["code"], 4, "{error}");
        assert!(error["msg"].as_str().unwrap().contains(name), "{error}");
    }
    for (command, variables) in [("FROB", &CONTAINER[..]), ("", &CONTAINER[..])] {
        let mut all = vec![("CNI_COMMAND", command)];
        all.extend(variables);
        let error = plugin(None, &all, &config(json!({}))).unwrap_err();
        assert_eq!(error["code"], 4, "{error}");
        assert!(error["msg"].as_str().unwrap().contains("CNI_COMMAND"), "{error}");
    }
    let mut all = vec![("CNI_COMMAND", "ADD"), ("CNI_ARGS", "K8S_POD_NAME")];
    all.extend(CONTAINER);
    let error = plugin(None, &all, &config(json!({}))).unwrap_err();
    assert!(error["code"] == 4 && error["msg"].as_str().unwrap().contains("CNI_ARGS"), "{error}");
}

#[test]
fn an_unsupported_field_must_be_named_with_its_key_and_value() {
    for (change, key, value) in [
        (json!({ "ipMasq": true }), "ipMasq", "true"),
        (json!({ "ipam": { "type": "host-local" } }), "ipam.type", "host-local"),
        (
            json!({ "runtimeConfig": { "deviceID": "0000:04:00.5" } }),
            "runtimeConfig.deviceID",
            "0000:04:00.5",
        ),
    ] {
        let error = refused("ADD", "", "", &config(change));
        assert_eq!(error["code"], 2, "{error}");
        let msg = error["msg"].as_str().unwrap();
        assert!(msg.contains(key) && msg.contains(value), "{error}");
    }
}

#[test]
fn an_error_should_be_an_object_with_version_code_and_message() {
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let error = refused("ADD", "CNI_IFNAME", "", &config(json!({ "cniVersion": version })));
        assert_eq!(error["cniVersion"], version);
        assert!(error["code"].is_u64() && !error["msg"].as_str().unwrap().is_empty(), "{error}");
    }
    let error = refused("ADD", "", "", "{");
    assert_eq!((error["code"].as_u64(), error["cniVersion"].as_str()), (Some(6), Some("1.1.0")));
}

#[test]
fn a_version_that_is_not_supported_must_be_error_1() {
    for version in ["0.1.0", "0.3.0", "1.2.0", "2.0.0", "", "x"] {
        let error = refused("ADD", "", "", &config(json!({ "cniVersion": version })));
        assert_eq!(error["code"], 1, "{version}: {error}");
    }
    for (command, version) in [("CHECK", "0.3.1"), ("GC", "1.0.0"), ("STATUS", "1.0.0")] {
        let error = refused(command, "", "", &config(json!({ "cniVersion": version })));
        assert_eq!(error["code"], 1, "{command} {version}: {error}");
    }
}

#[test]
fn version_must_answer_with_its_own_version_and_all_that_are_supported() {
    for version in ["0.3.1", "1.0.0", "1.1.0"] {
        let input = json!({ "cniVersion": version }).to_string();
        let reply = plugin(None, &[("CNI_COMMAND", "VERSION")], &input).unwrap();
        assert_eq!(reply["cniVersion"], version);
        assert_eq!(reply["supportedVersions"], json!(["0.3.1", "0.4.0", "1.0.0", "1.1.0"]));
    }
}

#[test]
fn arguments_and_keys_that_are_not_known_should_be_passed_over() {
    let (_cluster, node) = mk_node();
    let sandbox = Netns::new();
    let variables = [
        ("CNI_CONTAINERID", "c"),
        ("CNI_IFNAME", "eth0"),
        ("CNI_ARGS", "FOO=BAR;IP="),
        ("CNI_NETNS", &sandbox.path()),
    ];
    let extra = json!({
        "args": { "cni": { "labels": [1] } }, "cni.dev/new": 1, "surprise": {}, "capabilities": { "aliases": true },
        "runtimeConfig": { "aliases": ["db", "primary"], "cgroupPath": "/x" },
    });
    call(&node, "ADD", &variables, extra).unwrap();
}

#[test]
fn a_result_must_have_the_keys_of_its_version_and_the_sandbox_that_was_passed() {
    let (_cluster, node) = mk_node();
    for version in ["0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        let sandbox = Netns::new();
        let extra = json!({ "cniVersion": version, "dns": { "nameservers": ["10.0.0.53"] } });
        let result = node.cni("ADD", "c", Some(&sandbox.path()), extra).unwrap();
        assert_eq!(result["cniVersion"], version);
        assert_eq!(result["dns"]["nameservers"][0], "10.0.0.53");
        let of_pod = result["ips"][0]["interface"].as_u64().unwrap();
        let interface = &result["interfaces"][usize::try_from(of_pod).unwrap()];
        assert_eq!(
            (interface["name"].as_str(), interface["sandbox"].as_str()),
            (Some("eth0"), Some(&*sandbox.path()))
        );
        let mac = sandbox.ip("-o link show dev eth0");
        assert!(mac.contains(interface["mac"].as_str().unwrap()), "{mac} {interface}");
        assert_eq!(interface["mtu"].is_u64(), version == "1.1.0", "{result}");
        assert_eq!(result["ips"][0].get("version").is_some(), version < "1.0.0", "{result}");
        let text = sandbox.ip("route show");
        for route in result["routes"].as_array().unwrap() {
            assert_eq!(route["dst"], "0.0.0.0/0");
            assert!(text.contains(&format!("default via {}", route["gw"].as_str().unwrap())), "{text}");
        }
        node.del("c").unwrap();
    }
}

#[test]
fn a_plugin_must_exit_with_0_on_success_and_print_nothing_else() {
    // `plugin` asserts for every call of these tests: one JSON object or nothing on standard output, nothing on standard error.
    let (_cluster, node) = mk_node();
    let sandbox = Netns::new();
    let result = add(&node, "c", &sandbox).unwrap();
    let previous = json!({ "prevResult": result });
    assert_eq!(node.cni("CHECK", "c", Some(&sandbox.path()), previous).unwrap(), Value::Null);
    assert_eq!(node.cni("STATUS", "", None, json!({})).unwrap(), Value::Null);
    assert_eq!(node.cni("GC", "", None, json!({ "cni.dev/valid-attachments": [] })).unwrap(), Value::Null);
    assert_eq!(node.del("c").unwrap(), Value::Null);
}
