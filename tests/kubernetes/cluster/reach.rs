//! Who reaches whom: probes from pods, all targets of a pod at once.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail, ensure};
use holdfast_tests::k8s::{KubeCluster, SHELL_IMAGE};
use serde_json::Value;

/// Where the tests' servers listen.
pub const PORT: u16 = 8080;
/// A connection that is not made by then counts as dropped.
const PATIENCE_S: u32 = 2;

/// A pod that runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// `NAMESPACE/NAME`.
    pub pod: String,
    /// Its label `app`.
    pub app: String,
    /// Its node.
    pub node: String,
    /// Its address.
    pub address: String,
}

/// YAML of a server on every node, with a Service of its name.
pub fn mk_servers(namespace: &str, app: &str) -> String {
    format!(
        "apiVersion: apps/v1
kind: DaemonSet
metadata: {{name: {app}, namespace: {namespace}}}
spec:
  selector: {{matchLabels: {{app: {app}}}}}
  template:
    metadata: {{labels: {{app: {app}}}}}
    spec:
      terminationGracePeriodSeconds: 0
      containers:
        - name: server
          image: {SHELL_IMAGE}
          imagePullPolicy: Never
          command: [httpd, -f, -p, '{PORT}', -h, /www]
          readinessProbe: {{httpGet: {{path: /, port: {PORT}}}, periodSeconds: 1}}
---
apiVersion: v1
kind: Service
metadata: {{name: {app}, namespace: {namespace}}}
spec:
  type: NodePort
  selector: {{app: {app}}}
  ports: [{{port: 80, targetPort: {PORT}}}]
---
"
    )
}

/// The pods of a namespace, each with an address.
pub fn places(cluster: &KubeCluster, namespace: &str) -> Result<Vec<Place>> {
    let pods = cluster.get(&["pods", "-n", namespace])?;
    let place = |pod: &Value| -> Result<Place> {
        let text = |value: &Value| value.as_str().map(str::to_owned).context("a pod without it");
        Ok(Place {
            pod: format!("{namespace}/{}", text(&pod["metadata"]["name"])?),
            app: text(&pod["metadata"]["labels"]["app"])?,
            node: text(&pod["spec"]["nodeName"]).context("node")?,
            address: text(&pod["status"]["podIP"]).context("address")?,
        })
    };
    pods["items"].as_array().context("a list")?.iter().map(place).collect()
}

/// A Service's address and its port on every node.
pub fn service(cluster: &KubeCluster, namespace: &str, name: &str) -> Result<(String, u64)> {
    let service = cluster.get(&["service", "-n", namespace, name])?;
    let address = service["spec"]["clusterIP"].as_str().context("an address")?.to_owned();
    Ok((address, service["spec"]["ports"][0]["nodePort"].as_u64().context("a port")?))
}

/// Asks from a pod for a page of each of `targets` (`HOST:PORT`), and compares with whether it should be had.
pub fn expect(cluster: &KubeCluster, from: &Place, targets: &BTreeMap<String, bool>) -> Result<()> {
    let list: Vec<&str> = targets.keys().map(String::as_str).collect();
    let script = format!(
        "for t in {}; do (timeout {PATIENCE_S} wget -q -O /dev/null http://$t/ 2>/dev/null && echo open $t || echo closed $t) & done; wait",
        list.join(" ")
    );
    let answer = cluster.exec(&from.pod, &["sh", "-c", &script])?;
    let mut wrong = Vec::new();
    for (target, wanted) in targets {
        let open = answer.lines().any(|line| line == format!("open {target}"));
        ensure!(open || answer.contains(&format!("closed {target}")), "no answer of {target}:\n{answer}");
        if open != *wanted {
            wrong.push(format!("{target} is {}", if open { "open" } else { "closed" }));
        }
    }
    if !wrong.is_empty() {
        bail!("from {} on {}: {}", from.pod, from.node, wrong.join(", "));
    }
    Ok(())
}
