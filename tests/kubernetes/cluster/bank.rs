//! A small database in a StatefulSet, each pod with a volume of three replicas, and its client, which keeps a ledger.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use holdfast_tests::Program;
use holdfast_tests::k8s::{KubeCluster, NODES, SHELL_IMAGE};
use holdfast_tests::process::{run, wait_until};

/// Where the database listens.
const PORT: u16 = 7000;
/// From its creation until both pods serve: volumes are made, formatted, attached and mounted.
const START_TIMEOUT: Duration = Duration::from_secs(120);
/// Until so many entries were made.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(60);

/// The database, in a namespace of its own.
pub struct Bank {
    namespace: String,
}

/// A client outside of the cluster's nodes.
pub struct Client {
    program: Program,
    ledger: PathBuf,
}

impl Bank {
    /// Creates it with so many pods and waits until all serve.
    pub fn start(cluster: &KubeCluster, namespace: &str, pods: usize) -> Result<Self> {
        cluster.apply(&mk_bank(namespace, pods))?;
        let bank = Self { namespace: namespace.to_owned() };
        cluster.wait("the database serves", START_TIMEOUT, || {
            let set = cluster.get(&["statefulset", "-n", namespace, "bank"])?;
            Ok(set["status"]["readyReplicas"].as_u64() == Some(pods as u64))
        })?;
        Ok(bank)
    }

    /// Where it is.
    pub fn namespace(&self) -> &str {
        &self.namespace
    }

    /// The node of the first pod, and the pod's UID.
    pub fn place(&self, cluster: &KubeCluster) -> Result<(String, String)> {
        let pod = cluster.get(&["pod", "-n", &self.namespace, "bank-0"])?;
        let text = |value: &serde_json::Value| value.as_str().map(str::to_owned).context("not there yet");
        Ok((text(&pod["spec"]["nodeName"])?, text(&pod["metadata"]["uid"])?))
    }

    /// Starts a client of the first pod, through a node that is not `avoided`.
    pub fn client(&self, cluster: &KubeCluster, name: &str, avoided: &str, first: u64) -> Result<Client> {
        let ledger = cluster.work().folder("ledgers")?.join(name);
        let address = self.address(cluster, avoided)?;
        let arguments = vec!["write".to_owned(), address, ledger.display().to_string(), first.to_string()];
        let program = cluster.start_outside(name, &cluster.pod_program("ledger"), arguments)?;
        let client = Client { program, ledger };
        client.wait_for(100)?;
        Ok(client)
    }

    /// What the database has.
    pub fn numbers(&self, cluster: &KubeCluster, avoided: &str) -> Result<BTreeSet<u64>> {
        let address = self.address(cluster, avoided)?;
        let program = cluster.pod_program("ledger").display().to_string();
        let answer = run(cluster.outside(&program).args(["read", &address]))?;
        answer.lines().map(|line| line.parse().context("a number")).collect()
    }

    /// Waits until the first pod serves on another node than `old`.
    pub fn wait_for_move(&self, cluster: &KubeCluster, old: &str, timeout: Duration) -> Result<()> {
        cluster.wait("the pod serves elsewhere", timeout, || {
            let pod = cluster.get(&["pod", "-n", &self.namespace, "bank-0"])?;
            Ok(pod["spec"]["nodeName"] != old && holdfast_tests::k8s::has_condition(&pod, "Ready"))
        })
    }

    /// Deletes it with its volumes.
    pub fn remove(self, cluster: &KubeCluster) -> Result<()> {
        cluster.kubectl(&["delete", "namespace", &self.namespace, "--wait=true", "--timeout=120s"])?;
        cluster.wait("its volumes are gone", START_TIMEOUT, || {
            let volumes = cluster.get(&["persistentvolumes"])?;
            let ours = |volume: &serde_json::Value| {
                volume["spec"]["claimRef"]["namespace"] == self.namespace.as_str()
            };
            Ok(!volumes["items"].as_array().context("a list")?.iter().any(ours))
        })
    }

    fn address(&self, cluster: &KubeCluster, avoided: &str) -> Result<String> {
        let service = cluster.get(&["service", "-n", &self.namespace, "first"])?;
        let port = service["spec"]["ports"][0]["nodePort"].as_u64().context("a port")?;
        let name = NODES.iter().find(|name| **name != avoided).context("a node")?;
        Ok(format!("{}:{port}", cluster.node(name)?.address))
    }
}

impl Client {
    /// Numbers that were acknowledged, each with when, in microseconds since 1970.
    pub fn entries(&self) -> Result<Vec<(u64, u64)>> {
        entries(&std::fs::read_to_string(&self.ledger).unwrap_or_default())
    }

    /// Waits until so many more are acknowledged.
    pub fn wait_for(&self, more: usize) -> Result<()> {
        let before = self.entries()?.len();
        wait_until(COMMIT_TIMEOUT, || Ok(self.entries()?.len() >= before + more))
            .with_context(|| format!("fewer than {more} more entries:\n{}", self.program.log_tail()))
    }

    /// Waits for the first entry that is acknowledged from now on.
    pub fn wait_for_next(&self, timeout: Duration) -> Result<Duration> {
        let (start, before) = (Instant::now(), self.entries()?.len());
        wait_until(timeout, || Ok(self.entries()?.len() > before)).context("no entry more")?;
        Ok(start.elapsed())
    }

    /// Lines that it wrote of errors.
    pub fn complaints(&self) -> Result<String> {
        self.program.log()
    }

    /// The longest time between two entries.
    pub fn longest_pause(&self) -> Result<Duration> {
        let entries = self.entries()?;
        let pauses = entries.windows(2).map(|pair| pair[1].1.saturating_sub(pair[0].1));
        Ok(Duration::from_micros(pauses.max().unwrap_or_default()))
    }

    /// Ends it; everything that was acknowledged must be among `present`.
    pub fn end(mut self, read: impl FnOnce() -> Result<BTreeSet<u64>>) -> Result<usize> {
        self.program.kill()?;
        let acknowledged = self.entries()?;
        expect_all(&acknowledged, &read()?)?;
        Ok(acknowledged.len())
    }
}

/// Every number of a ledger must be in the database.
pub fn expect_all(acknowledged: &[(u64, u64)], present: &BTreeSet<u64>) -> Result<()> {
    ensure!(!acknowledged.is_empty(), "nothing was acknowledged");
    let lost: Vec<u64> =
        acknowledged.iter().map(|(number, _)| *number).filter(|n| !present.contains(n)).collect();
    if !lost.is_empty() {
        bail!("{} of {} acknowledged entries are lost: {lost:?}", lost.len(), acknowledged.len());
    }
    Ok(())
}

/// Lines `NUMBER MICROSECONDS`; the last one may be cut off.
pub fn entries(text: &str) -> Result<Vec<(u64, u64)>> {
    let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
    let entry = |line: &str| -> Result<(u64, u64)> {
        let (number, stamp) = line.split_once(' ').context("two numbers")?;
        Ok((number.parse()?, stamp.parse()?))
    };
    whole.lines().map(entry).collect()
}

fn mk_bank(namespace: &str, pods: usize) -> String {
    format!(
        "apiVersion: v1
kind: Namespace
metadata: {{name: {namespace}}}
---
apiVersion: v1
kind: Service
metadata: {{name: first, namespace: {namespace}}}
spec:
  type: NodePort
  selector: {{statefulset.kubernetes.io/pod-name: bank-0}}
  ports: [{{port: {PORT}}}]
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {{name: bank, namespace: {namespace}}}
spec:
  replicas: {pods}
  serviceName: first
  podManagementPolicy: Parallel
  selector: {{matchLabels: {{app: bank}}}}
  template:
    metadata: {{labels: {{app: bank}}}}
    spec:
      terminationGracePeriodSeconds: 1
      tolerations:
        # Only the trigger of the test moves a pod.
        - {{key: node.kubernetes.io/not-ready, operator: Exists, effect: NoExecute}}
        - {{key: node.kubernetes.io/unreachable, operator: Exists, effect: NoExecute}}
      topologySpreadConstraints:
        - {{maxSkew: 1, topologyKey: kubernetes.io/hostname, whenUnsatisfiable: ScheduleAnyway, labelSelector: {{matchLabels: {{app: bank}}}}}}
      containers:
        - name: ledger
          image: {SHELL_IMAGE}
          imagePullPolicy: Never
          command: [ledger, serve, /data/ledger, '0.0.0.0:{PORT}']
          readinessProbe: {{tcpSocket: {{port: {PORT}}}, periodSeconds: 1}}
          volumeMounts:
            - {{name: data, mountPath: /data}}
            - {{name: scratch, mountPath: /scratch}}
      volumes:
        - {{name: scratch, emptyDir: {{}}}}
  volumeClaimTemplates:
    - metadata: {{name: data}}
      spec:
        accessModes: [ReadWriteOncePod]
        storageClassName: holdfast
        resources: {{requests: {{storage: 64Mi}}}}
"
    )
}
