//! The story's pods and who reaches whom.

use std::net::{IpAddr, SocketAddr};

use anyhow::{Result, ensure};

use super::{DB_PORT, Pods, Story};
use crate::pod::{Pod, PodSpec};
use crate::probe::{Matrix, POD_PORT, Reach, probe};

/// Lets only `api` reach `db`, on its port.
pub(super) const DB_POLICY: &str = "\
apiVersion: networking.k8s.io/v1
kind: NetworkPolicy
metadata:
  name: db-only-from-api
  namespace: default
spec:
  podSelector:
    matchLabels:
      app: db
  policyTypes: [Ingress]
  ingress:
    - from:
        - podSelector:
            matchLabels:
              app: api
      ports:
        - protocol: TCP
          port: 5432
";

impl Story {
    pub(super) fn create_pod(&self, name: &str, node: &str) -> Result<Pod> {
        let pod = Pod::create(&self.cluster, PodSpec { name, app: name, node })?;
        self.report.note(&format!("holdfast-cni ADD: {name} on {node} is {}", pod.address));
        Ok(pod)
    }

    pub(super) fn measure(&self, pods: &Pods) -> Result<Matrix> {
        let all = [("web", &pods.web), ("api", &pods.api), ("db", &pods.database)];
        let mut destinations: Vec<(String, SocketAddr)> = Vec::new();
        for (name, pod) in all {
            destinations
                .push((format!("{name}:{POD_PORT}"), SocketAddr::new(IpAddr::V4(pod.address), POD_PORT)));
        }
        let database = SocketAddr::new(IpAddr::V4(pods.database.address), DB_PORT);
        destinations.push((format!("db:{DB_PORT}"), database));
        let addresses: Vec<SocketAddr> = destinations.iter().map(|(_, address)| *address).collect();
        let mut matrix = Matrix::new();
        for (source, pod) in all {
            let answers = probe(&self.cluster.node(&pod.node).spaces, &pod.netns, &addresses)?;
            for ((destination, _), reach) in destinations.iter().zip(answers) {
                matrix.set(source, destination, reach);
            }
        }
        Ok(matrix)
    }
}

/// Only `api` reaches `db`, only on its port; everybody else is reached by everybody.
pub(super) fn check_matrix(matrix: &Matrix) -> Result<()> {
    for source in ["web", "api", "db"] {
        for name in ["web", "api", "db"] {
            for port in [POD_PORT, DB_PORT] {
                let destination = format!("{name}:{port}");
                let Some(reach) = matrix.get(source, &destination) else { continue };
                // A pod's own address never leaves the pod.
                let allowed = name != "db" || source == "db" || (source == "api" && port == DB_PORT);
                let wanted = if allowed { Reach::Open } else { Reach::Dropped };
                ensure!(
                    reach == wanted,
                    "{source} to {destination} is {reach:?}, the policy says {wanted:?}"
                );
            }
        }
    }
    Ok(())
}
