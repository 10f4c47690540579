//! What every source of objects does.

use std::time::Duration;

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::Situation;
use super::side::Side;
use super::view::View;
use crate::bed::Bed;

pub const SITUATIONS: [(&str, Situation); 6] = [
    ("objects_of_all_kinds_appear_and_are_whole_before_anything_is_concluded", all_kinds_appear),
    ("changes_and_ends_are_told", changes_and_ends),
    ("a_pod_that_is_made_again_has_its_new_uid", a_pod_made_again),
    ("an_oversized_policy_is_closed_or_keeps_its_last_good_state", oversized),
    ("a_wrong_object_keeps_its_last_good_state_and_is_named", wrong),
    ("an_outage_changes_nothing_and_its_end_brings_all_that_happened", outage),
];

fn all_kinds_appear(bed: &Bed, side: &mut dyn Side) -> Result<()> {
    let objects = one_of_each_kind(side.prefix());
    for object in &objects {
        side.put(bed, object)?;
    }
    let mut view = View::open(bed, &side.source(), side.prefix())?;
    view.until(bed, "the first complete batch", |view| view.complete)?;
    for object in &objects {
        let key = key_of(object);
        ensure!(view.objects.contains_key(&key), "{key} is missing: {}", view.state());
    }
    ensure!(view.readable && view.objects.len() == objects.len(), "{}", view.state());
    let p = side.prefix().to_owned();
    let pod = view.get("Pod", &format!("{p}/web")).cloned().unwrap_or_default();
    ensure!(pod["status"]["podIP"] == "10.9.8.7" && pod["metadata"]["labels"]["app"] == "web", "{pod}");
    ensure!(pod["spec"]["nodeName"] == format!("{p}-node"), "{pod}");
    let node = view.get("Node", &format!("{p}-node")).cloned().unwrap_or_default();
    ensure!(node["spec"]["podCIDRs"][0] == "10.9.8.0/24", "{node}");
    ensure!(node["status"]["addresses"][0]["address"] == "192.0.2.7", "{node}");
    remove_all(bed, side, &objects)
}

fn changes_and_ends(bed: &Bed, side: &mut dyn Side) -> Result<()> {
    let mut view = View::open(bed, &side.source(), side.prefix())?;
    view.until(bed, "the first complete batch", |view| view.complete)?;
    let objects = one_of_each_kind(side.prefix());
    for object in &objects {
        side.put(bed, object)?;
    }
    view.until(bed, "all of them", |view| view.objects.len() == objects.len())?;
    let p = side.prefix().to_owned();
    let mut pod = pod(&p, "web");
    pod["metadata"]["labels"]["app"] = json!("db");
    side.put(bed, &pod)?;
    let mut policy = policy(&p, "rule");
    policy["spec"]["ingress"] = json!([{"ports": [{"port": 81}]}]);
    side.put(bed, &policy)?;
    let (pod_name, policy_name) = (format!("{p}/web"), format!("{p}/rule"));
    view.until(bed, "the changes", |view| {
        let label = view.get("Pod", &pod_name).map(|pod| pod["metadata"]["labels"]["app"] == "db");
        let port = view
            .get("NetworkPolicy", &policy_name)
            .map(|it| it["spec"]["ingress"][0]["ports"][0]["port"] == 81);
        label == Some(true) && port == Some(true)
    })?;
    ensure!(view.gone.is_empty(), "{}", view.state());
    // The namespace last: an API server wants it for what is in it.
    remove_all(bed, side, &objects)?;
    view.until(bed, "the end of all", |view| view.objects.is_empty())?;
    ensure!(view.gone.len() == objects.len(), "told twice: {}", view.state());
    Ok(())
}

fn a_pod_made_again(bed: &Bed, side: &mut dyn Side) -> Result<()> {
    let p = side.prefix().to_owned();
    let mut view = View::open(bed, &side.source(), &p)?;
    side.put(bed, &namespace(&p))?;
    let mut uids = Vec::new();
    for round in 0..3 {
        let mut pod = pod(&p, "web");
        pod["metadata"]["uid"] = json!(format!("uid-{round}"));
        side.put(bed, &pod)?;
        let (name, known) = (format!("{p}/web"), uids.clone());
        let uid_of = |view: &View| view.get("Pod", &name).map(|pod| pod["metadata"]["uid"].clone());
        view.until(bed, "another uid", |view| uid_of(view).is_some_and(|uid| !known.contains(&uid)))?;
        uids.extend(uid_of(&view));
        side.remove(bed, &pod)?;
    }
    view.until(bed, "its end", |view| view.get("Pod", &format!("{p}/web")).is_none())?;
    side.remove(bed, &namespace(&p))
}

fn oversized(bed: &Bed, side: &mut dyn Side) -> Result<()> {
    let p = side.prefix().to_owned();
    let name = format!("{p}/rule");
    side.put(bed, &namespace(&p))?;
    let mut view = View::open(bed, &side.source(), &p)?;
    let mut large = policy(&p, "rule");
    let port = |number: u32| json!({"port": number % 65_000 + 1});
    large["spec"]["ingress"] = json!([{"ports": (0..30_000).map(port).collect::<Vec<Value>>()}]);
    side.put(bed, &large)?;
    let is_closed =
        |view: &View| view.get("NetworkPolicy", &name).is_some_and(|it| it["spec"]["ingress"] == json!([]));
    let says = |view: &View, what: &str| {
        view.problems.iter().any(|it| it.contains(&format!("NetworkPolicy {name} is")) && it.contains(what))
    };
    view.until(bed, "closed", |view| is_closed(view) && says(view, "admits nothing"))?;
    side.put(bed, &policy(&p, "rule"))?;
    view.until(bed, "the good state", |view| !is_closed(view) && view.problems.is_empty())?;
    side.put(bed, &large)?;
    view.until(bed, "refused", |view| says(view, "its last good state stays"))?;
    ensure!(!is_closed(&view), "{}", view.state());
    side.remove(bed, &large)?;
    view.until(bed, "gone", |view| view.objects.len() == 1 && view.problems.is_empty())?;
    side.remove(bed, &namespace(&p))
}

fn wrong(bed: &Bed, side: &mut dyn Side) -> Result<()> {
    let p = side.prefix().to_owned();
    let mut view = View::open(bed, &side.source(), &p)?;
    let good = cluster_policy(&p);
    let mut wrong = good.clone();
    wrong["spec"]["subject"] = json!({});
    let mut never = wrong.clone();
    never["metadata"]["name"] = json!(format!("{p}-never"));
    side.put(bed, &good)?;
    view.until(bed, "the good one", |view| view.complete && view.objects.len() == 1)?;
    side.put(bed, &wrong)?;
    side.put(bed, &never)?;
    let says = |view: &View, name: &str, what: &str| {
        let begins = format!("ClusterNetworkPolicy {name} is invalid");
        view.problems.iter().any(|it| it.contains(&begins) && it.contains(what))
    };
    let name = format!("{p}-policy");
    view.until(bed, "both are named", |view| {
        says(view, &name, "last good state stays") && says(view, &format!("{p}-never"), "ignored")
    })?;
    ensure!(view.get("ClusterNetworkPolicy", &name).is_some_and(|it| it["spec"]["subject"] != json!({})));
    ensure!(view.objects.len() == 1 && view.gone.is_empty(), "{}", view.state());
    // Nor does it count for who reads it for the first time.
    let mut second = View::open(bed, &side.source(), &p)?;
    second.until(bed, "complete", |view| view.complete)?;
    ensure!(second.objects.is_empty() && second.problems.len() == 2, "{}", second.state());
    side.remove(bed, &wrong)?;
    side.remove(bed, &never)?;
    view.until(bed, "their end", |view| view.objects.is_empty() && view.problems.is_empty())
}

fn outage(bed: &Bed, side: &mut dyn Side) -> Result<()> {
    let p = side.prefix().to_owned();
    let objects = one_of_each_kind(&p);
    for object in &objects {
        side.put(bed, object)?;
    }
    side.put(bed, &pod(&p, "going"))?;
    let mut view = View::open(bed, &side.source(), &p)?;
    view.until(bed, "all of them", |view| view.complete && view.readable)?;
    let before = view.objects.clone();
    side.begin_outage()?;
    view.until(bed, "the outage is noticed", |view| !view.readable)?;
    ensure!(!view.problems.is_empty(), "{}", view.state());
    side.remove(bed, &pod(&p, "going"))?;
    side.put(bed, &pod(&p, "new"))?;
    let mut changed = pod(&p, "web");
    changed["metadata"]["labels"]["app"] = json!("changed");
    side.put(bed, &changed)?;
    view.take_for(bed, Duration::from_secs(2))?;
    ensure!(view.objects == before && view.gone.is_empty() && !view.readable, "{}", view.state());
    // An agent that starts now knows nothing, and does not take that for all there is.
    let mut second = View::open(bed, &side.source(), &p)?;
    second.take_for(bed, Duration::from_secs(2))?;
    ensure!(!second.complete && second.objects.is_empty(), "{}", second.state());
    side.end_outage()?;
    for view in [&mut view, &mut second] {
        view.until(bed, "what happened meanwhile", |view| {
            let web = view.get("Pod", &format!("{p}/web"));
            view.readable
                && view.get("Pod", &format!("{p}/going")).is_none()
                && view.get("Pod", &format!("{p}/new")).is_some()
                && web.is_some_and(|pod| pod["metadata"]["labels"]["app"] == "changed")
        })?;
        ensure!(view.objects.len() == before.len() && view.problems.is_empty(), "{}", view.state());
    }
    ensure!(view.gone == [format!("Pod {p}/going")], "{}", view.state());
    side.remove(bed, &pod(&p, "new"))?;
    remove_all(bed, side, &objects)
}

fn remove_all(bed: &Bed, side: &dyn Side, objects: &[Value]) -> Result<()> {
    objects.iter().rev().try_for_each(|object| side.remove(bed, object))
}

fn key_of(object: &Value) -> String {
    let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
    let (kind, name) = (text(&object["kind"]), text(&object["metadata"]["name"]));
    match object["metadata"]["namespace"].as_str() {
        Some(namespace) => format!("{kind} {namespace}/{name}"),
        None => format!("{kind} {name}"),
    }
}

/// The namespace first.
fn one_of_each_kind(p: &str) -> Vec<Value> {
    let node = json!({
        "apiVersion": "v1", "kind": "Node", "metadata": {"name": format!("{p}-node")},
        "spec": {"podCIDR": "10.9.8.0/24", "podCIDRs": ["10.9.8.0/24"]},
        "status": {"addresses": [{"type": "InternalIP", "address": "192.0.2.7"}]},
    });
    vec![namespace(p), node, pod(p, "web"), policy(p, "rule"), cluster_policy(p)]
}

pub fn namespace(p: &str) -> Value {
    json!({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": p, "labels": {"team": "a"}}})
}

pub fn pod(p: &str, name: &str) -> Value {
    json!({
        "apiVersion": "v1", "kind": "Pod",
        "metadata": {"name": name, "namespace": p, "uid": format!("uid-{name}"), "labels": {"app": name}},
        "spec": {"nodeName": format!("{p}-node"), "containers": [{"name": "main", "image": "none"}]},
        "status": {"phase": "Running", "podIP": "10.9.8.7", "podIPs": [{"ip": "10.9.8.7"}]},
    })
}

fn policy(p: &str, name: &str) -> Value {
    json!({
        "apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name, "namespace": p},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{"ports": [{"port": 80}]}]},
    })
}

pub fn cluster_policy(p: &str) -> Value {
    json!({
        "apiVersion": "policy.networking.k8s.io/v1alpha2", "kind": "ClusterNetworkPolicy",
        "metadata": {"name": format!("{p}-policy")},
        "spec": {
            "tier": "Admin", "priority": 7,
            "subject": {"namespaces": {"matchLabels": {"kubernetes.io/metadata.name": p}}},
            "ingress": [{"action": "Deny", "from": [{"namespaces": {}}]}],
        },
    })
}
