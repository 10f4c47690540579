//! The manifests parse as Kubernetes' own types and say what docs/architecture.md says of the four workloads.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use k8s_openapi::api::admissionregistration::v1::{
    ValidatingAdmissionPolicy, ValidatingAdmissionPolicyBinding,
};
use k8s_openapi::api::apps::v1::{DaemonSet, Deployment};
use k8s_openapi::api::core::v1::{
    ConfigMap, Container, Namespace, PodSpec, Service, ServiceAccount, VolumeMount,
};
use k8s_openapi::api::policy::v1::PodDisruptionBudget;
use k8s_openapi::api::rbac::v1::{ClusterRole, ClusterRoleBinding, Role, RoleBinding};
use k8s_openapi::api::storage::v1::{CSIDriver, StorageClass};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use k8s_openapi::apimachinery::pkg::util::intstr::IntOrString;
use libtest_mimic::Trial;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// Trials of this file.
pub fn trials() -> Vec<Trial> {
    let one = |name: &str, check: fn()| {
        Trial::test(name, move || {
            check();
            Ok(())
        })
    };
    vec![
        one("every_document_parses_as_the_kind_it_names", every_document_parses_as_the_kind_it_names),
        one(
            "every_file_is_listed_by_the_kustomization_beside_it",
            every_file_is_listed_by_the_kustomization_beside_it,
        ),
        one("the_driver_is_named_as_the_plugin_names_itself", the_driver_is_named_as_the_plugin_names_itself),
        one(
            "workloads_use_the_host_network_and_are_critical",
            workloads_use_the_host_network_and_are_critical,
        ),
        one(
            "data_restarts_only_when_somebody_decides_it_and_its_memory_is_guaranteed",
            data_restarts_only_when_somebody_decides_it_and_its_memory_is_guaranteed,
        ),
        one(
            "node_mounts_reach_kubelet_and_the_data_process_is_not_in_its_pod",
            node_mounts_reach_kubelet_and_the_data_process_is_not_in_its_pod,
        ),
        one(
            "the_controllers_have_their_sidecars_and_are_never_two_on_a_node",
            the_controllers_have_their_sidecars_and_are_never_two_on_a_node,
        ),
        one(
            "containers_are_privileged_for_a_reason_only_and_say_what_they_need",
            containers_are_privileged_for_a_reason_only_and_say_what_they_need,
        ),
        one("images_are_pinned", images_are_pinned),
        one("the_agent_knows_every_flag_that_it_is_given", the_agent_knows_every_flag_that_it_is_given),
        one("what_listens_is_bound_and_wants_certificates", what_listens_is_bound_and_wants_certificates),
        one("storage_classes_are_ours_and_grow", storage_classes_are_ours_and_grow),
        one("nobody_may_read_secrets_or_everything", nobody_may_read_secrets_or_everything),
        one(
            "persistent_state_is_on_the_host_so_that_a_recreated_pod_finds_it",
            persistent_state_is_on_the_host_so_that_a_recreated_pod_finds_it,
        ),
        one("the_conflist_is_valid_and_names_our_plugin", the_conflist_is_valid_and_names_our_plugin),
    ]
}

fn every_document_parses_as_the_kind_it_names() {
    for document in documents() {
        let kind = document["kind"].as_str().expect("a kind");
        match kind {
            "ValidatingAdmissionPolicy" => drop(typed::<ValidatingAdmissionPolicy>(&document)),
            "ValidatingAdmissionPolicyBinding" => drop(typed::<ValidatingAdmissionPolicyBinding>(&document)),
            "CustomResourceDefinition" => drop(typed::<CustomResourceDefinition>(&document)),
            "Namespace" => drop(typed::<Namespace>(&document)),
            "ServiceAccount" => drop(typed::<ServiceAccount>(&document)),
            "ClusterRole" => drop(typed::<ClusterRole>(&document)),
            "ClusterRoleBinding" => drop(typed::<ClusterRoleBinding>(&document)),
            "Role" => drop(typed::<Role>(&document)),
            "RoleBinding" => drop(typed::<RoleBinding>(&document)),
            "CSIDriver" => drop(typed::<CSIDriver>(&document)),
            "StorageClass" => drop(typed::<StorageClass>(&document)),
            "Service" => drop(typed::<Service>(&document)),
            "ConfigMap" => drop(typed::<ConfigMap>(&document)),
            "PodDisruptionBudget" => drop(typed::<PodDisruptionBudget>(&document)),
            "Deployment" => drop(typed::<Deployment>(&document)),
            "DaemonSet" => drop(typed::<DaemonSet>(&document)),
            other => panic!("no type known for kind {other}: add it to this test"),
        }
    }
}

fn every_file_is_listed_by_the_kustomization_beside_it() {
    let folders: BTreeSet<PathBuf> =
        files().iter().map(|file| file.parent().expect("a folder").to_owned()).collect();
    assert!(folders.len() >= 4, "{folders:?}");
    for folder in folders {
        let text = std::fs::read_to_string(folder.join("kustomization.yaml")).expect("kustomization.yaml");
        let listed: Value = serde_norway::from_str(&text).expect("kustomization is YAML");
        let listed = listed["resources"].as_array().expect("resources").iter().filter_map(Value::as_str);
        let listed: BTreeSet<PathBuf> = listed.map(|name| folder.join(name)).collect();
        let (lists, present): (BTreeSet<_>, BTreeSet<_>) = (
            listed.into_iter().filter(|path| path.extension().is_some()).collect(),
            files().into_iter().filter(|file| file.parent() == Some(&folder)).collect(),
        );
        assert_eq!(lists, present);
    }
}

fn the_driver_is_named_as_the_plugin_names_itself() {
    let driver: CSIDriver = only("CSIDriver", "csi.holdfast.dev");
    assert_eq!(driver.spec.attach_required, Some(true));
}

fn workloads_use_the_host_network_and_are_critical() {
    let mut names = BTreeSet::new();
    for (name, pod) in pods() {
        assert_eq!(
            pod.host_network,
            Some(true),
            "{name}: storage and networking never depend on the pod network"
        );
        assert!(pod.priority_class_name.is_some_and(|class| class.starts_with("system-")), "{name}");
        names.insert(name);
    }
    let wanted = [
        "holdfast-controller",
        "holdfast-data",
        "holdfast-netd",
        "holdfast-network-controller",
        "holdfast-node",
    ];
    assert_eq!(names, wanted.iter().map(|name| (*name).to_owned()).collect());
}

fn data_restarts_only_when_somebody_decides_it_and_its_memory_is_guaranteed() {
    let data: DaemonSet = only("DaemonSet", "holdfast-data");
    let spec = data.spec.expect("spec");
    assert_eq!(spec.update_strategy.and_then(|strategy| strategy.type_).as_deref(), Some("OnDelete"));
    let pod = spec.template.spec.expect("pod spec");
    assert_eq!(pod.priority_class_name.as_deref(), Some("system-node-critical"));
    let container = container(&pod, "holdfast-data");
    assert!(container.liveness_probe.is_none(), "a liveness kill turns a hiccup into an outage");
    let resources = container.resources.as_ref().expect("resources");
    let memory =
        |map: &Option<std::collections::BTreeMap<_, _>>| map.as_ref().and_then(|m| m.get("memory").cloned());
    assert_eq!(memory(&resources.requests), memory(&resources.limits));
    assert!(memory(&resources.limits).is_some());
}

fn node_mounts_reach_kubelet_and_the_data_process_is_not_in_its_pod() {
    let node: DaemonSet = only("DaemonSet", "holdfast-node");
    let pod = node.spec.expect("spec").template.spec.expect("pod spec");
    assert!(pod.containers.iter().all(|container| container.name != "holdfast-data"));
    let container = container(&pod, "holdfast-node");
    assert_eq!(container.security_context.as_ref().and_then(|context| context.privileged), Some(true));
    let kubelet = mount(container, "/var/lib/kubelet");
    assert_eq!(kubelet.mount_propagation.as_deref(), Some("Bidirectional"));
    mount(container, "/dev");
}

fn the_controllers_have_their_sidecars_and_are_never_two_on_a_node() {
    let controller: Deployment = only("Deployment", "holdfast-controller");
    let spec = controller.spec.expect("spec");
    assert_eq!(spec.replicas, Some(2));
    let update = spec.strategy.and_then(|strategy| strategy.rolling_update).expect("a rolling update");
    assert_eq!(update.max_surge, Some(IntOrString::Int(0)));
    let budget: PodDisruptionBudget = only("PodDisruptionBudget", "holdfast-controller");
    let budget = budget.spec.expect("spec");
    assert_eq!(budget.min_available, Some(IntOrString::Int(1)));
    let labels = spec.template.metadata.and_then(|meta| meta.labels).expect("labels");
    let chosen = budget.selector.and_then(|selector| selector.match_labels).expect("a selector");
    assert!(chosen.iter().all(|(key, value)| labels.get(key) == Some(value)), "{chosen:?}");
    let pod = spec.template.spec.expect("pod spec");
    let apart = pod.affinity.as_ref().and_then(|affinity| affinity.pod_anti_affinity.as_ref());
    let apart = apart.and_then(|rule| rule.required_during_scheduling_ignored_during_execution.as_ref());
    assert_eq!(apart.map(|terms| terms[0].topology_key.as_str()), Some("kubernetes.io/hostname"));
    let names: BTreeSet<&str> = pod.containers.iter().map(|container| container.name.as_str()).collect();
    let wanted = ["csi-attacher", "csi-provisioner", "csi-resizer", "csi-snapshotter", "holdfast-controller"];
    assert_eq!(names, wanted.into_iter().collect());
    assert_eq!(pod.security_context.as_ref().and_then(|context| context.run_as_non_root), Some(true));
}

/// Whoever needs no privilege says that it gives up all, and each says what it needs of the node.
fn containers_are_privileged_for_a_reason_only_and_say_what_they_need() {
    let privileged = ["holdfast-data", "holdfast-netd", "holdfast-node"];
    for (workload, pod) in pods() {
        for container in pod.containers.iter().chain(pod.init_containers.iter().flatten()) {
            let name = &container.name;
            let context = container.security_context.as_ref().unwrap_or_else(|| panic!("{workload}: {name}"));
            if privileged.contains(&name.as_str()) {
                assert_eq!(context.privileged, Some(true), "{name}");
            } else {
                assert_eq!(context.allow_privilege_escalation, Some(false), "{name}");
                assert_eq!(context.read_only_root_filesystem, Some(true), "{name}");
                let dropped = context.capabilities.as_ref().and_then(|set| set.drop.clone());
                assert_eq!(dropped, Some(vec!["ALL".to_owned()]), "{name}");
            }
            let resources = container.resources.as_ref().unwrap_or_else(|| panic!("{workload}: {name}"));
            assert!(resources.requests.as_ref().is_some_and(|map| map.contains_key("memory")), "{name}");
            assert!(resources.limits.as_ref().is_some_and(|map| map.contains_key("memory")), "{name}");
        }
    }
}

/// With `--help` nothing starts, and what stands before it is read first. The CSI driver's flags: `csi-driver/src/options.rs`.
fn the_agent_knows_every_flag_that_it_is_given() {
    let program = holdfast_tests::work::binaries_dir().expect("a folder").join("holdfast-netd");
    let mut lines: Vec<Vec<String>> = Vec::new();
    for (_, pod) in pods() {
        for container in pod.containers.iter().chain(pod.init_containers.iter().flatten()) {
            let command = container.command.clone().unwrap_or_default();
            if command.first().is_some_and(|first| first == "holdfast-netd") {
                lines.push([&command[1..], container.args.as_deref().unwrap_or_default()].concat());
            }
            let probe = container.readiness_probe.as_ref().and_then(|probe| probe.exec.as_ref());
            if let Some(command) = probe.and_then(|exec| exec.command.as_ref()) {
                assert_eq!(command[0], "holdfast-netd");
                lines.push(command[1..].to_vec());
            }
        }
    }
    assert!(lines.len() >= 3, "{lines:?}");
    for line in lines {
        let filled = line.iter().map(|word| word.replace("$(NODE_NAME)", "node-a"));
        let output = std::process::Command::new(&program).args(filled).arg("--help").output();
        let output = output.expect("holdfast-netd runs");
        assert!(output.status.success(), "{line:?}: {}", String::from_utf8_lossy(&output.stderr));
    }
}

/// A tag that moves, or none, would be another program after a restart.
fn images_are_pinned() {
    for (workload, pod) in pods() {
        for container in pod.containers.iter().chain(pod.init_containers.iter().flatten()) {
            let image = container.image.as_deref().unwrap_or_default();
            let (name, tag) = image.rsplit_once(':').unwrap_or_else(|| panic!("{workload}: {image}"));
            assert!(tag.contains('.') && (name == "holdfast" || tag.starts_with('v')), "{workload}: {image}");
            assert_eq!(container.image_pull_policy.as_deref(), Some("IfNotPresent"), "{workload}: {image}");
        }
    }
}

/// No process listens on all addresses of its node, and those that others reach want certificates.
fn what_listens_is_bound_and_wants_certificates() {
    for (workload, pod) in pods() {
        for container in &pod.containers {
            let arguments: Vec<&str> = container.args.iter().flatten().map(String::as_str).collect();
            for argument in &arguments {
                assert!(
                    !argument.contains("0.0.0.0") && !argument.contains("[::]"),
                    "{workload}: {argument}"
                );
                assert!(*argument != "--insecure", "{workload}: {argument}");
            }
            if container.command.iter().flatten().any(|word| word == "holdfast-csi") {
                let protected = |argument: &&str| argument.starts_with("--tls-");
                assert!(arguments.iter().any(protected), "{workload}: {arguments:?}");
            }
        }
    }
}

fn storage_classes_are_ours_and_grow() {
    let classes: Vec<Value> = documents().into_iter().filter(|d| d["kind"] == "StorageClass").collect();
    assert!(classes.len() >= 4);
    for class in classes {
        assert_eq!(class["provisioner"], "csi.holdfast.dev", "{}", class["metadata"]["name"]);
        assert_eq!(class["allowVolumeExpansion"], true, "{}", class["metadata"]["name"]);
    }
}

fn nobody_may_read_secrets_or_everything() {
    for document in documents() {
        for rule in document["rules"].as_array().into_iter().flatten() {
            let text = rule.to_string();
            // The issuer makes one Secret, with the authority's key, and reads no other.
            let is_issuers =
                rule["resourceNames"] == json!(["holdfast-ca"]) || rule["verbs"] == json!(["create"]);
            let is_secret = text.contains("secrets") && !is_issuers;
            assert!(!text.contains("\"*\"") && !is_secret, "too much: {text}");
        }
    }
}

fn persistent_state_is_on_the_host_so_that_a_recreated_pod_finds_it() {
    for (workload, path) in [
        ("holdfast-data", "/var/lib/holdfast/pool"),
        ("holdfast-data", "/run/holdfast"),
        ("holdfast-netd", "/var/lib/holdfast"),
        ("holdfast-netd", "/run/holdfast"),
    ] {
        let (_, pod) = pods().into_iter().find(|(name, _)| name == workload).expect("workload");
        let mount = mount(container(&pod, workload), path);
        let volume = pod
            .volumes
            .iter()
            .flatten()
            .find(|volume| volume.name == mount.name)
            .expect("the mount's volume");
        assert!(volume.host_path.is_some(), "{workload}: {path}");
    }
}

fn the_conflist_is_valid_and_names_our_plugin() {
    let config: ConfigMap = only("ConfigMap", "holdfast-cni");
    let text = &config.data.expect("data")["10-holdfast.conflist"];
    let list: Value = serde_json::from_str(text).expect("the conflist is JSON");
    assert_eq!(list["cniVersion"], "1.1.0");
    assert_eq!(list["plugins"][0]["type"], "holdfast-cni");
}

fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests")
}

/// All files of objects that kustomizations put together: those of `base` and `crds`.
fn files() -> Vec<PathBuf> {
    let mut files = Vec::new();
    let mut folders = vec![manifests().join("base"), manifests().join("crds")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).expect("a folder of manifests") {
            let path = entry.expect("an entry").path();
            if path.is_dir() {
                folders.push(path);
            } else if path.file_name().is_some_and(|name| name != "kustomization.yaml") {
                files.push(path);
            }
        }
    }
    files.sort();
    assert!(!files.is_empty());
    files
}

/// All objects, in the files' order.
fn documents() -> Vec<Value> {
    let mut documents = Vec::new();
    for file in files() {
        let text = std::fs::read_to_string(&file).expect("a readable manifest");
        for document in serde_norway::Deserializer::from_str(&text) {
            let value = Value::deserialize(document).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
            documents.push(value);
        }
    }
    documents
}

fn typed<T: DeserializeOwned>(document: &Value) -> T {
    T::deserialize(document).unwrap_or_else(|e| panic!("{}: {e}", document["metadata"]["name"]))
}

fn only<T: DeserializeOwned>(kind: &str, name: &str) -> T {
    let all = documents();
    let mut found = all.iter().filter(|d| d["kind"] == kind && d["metadata"]["name"] == name);
    let document = found.next().unwrap_or_else(|| panic!("no {kind} {name}"));
    assert!(found.next().is_none(), "{kind} {name} stands twice");
    typed(document)
}

fn pods() -> Vec<(String, PodSpec)> {
    let mut pods = Vec::new();
    for document in documents() {
        if matches!(document["kind"].as_str(), Some("Deployment" | "DaemonSet")) {
            let name = document["metadata"]["name"].as_str().expect("a name").to_owned();
            pods.push((name, typed(&document["spec"]["template"]["spec"])));
        }
    }
    pods
}

fn container<'a>(pod: &'a PodSpec, name: &str) -> &'a Container {
    pod.containers
        .iter()
        .find(|container| container.name == name)
        .unwrap_or_else(|| panic!("no container {name}"))
}

fn mount<'a>(container: &'a Container, path: &str) -> &'a VolumeMount {
    let mut mounts = container.volume_mounts.iter().flatten();
    mounts.find(|mount| mount.mount_path == path).unwrap_or_else(|| panic!("{}: no {path}", container.name))
}
