//! Checks against other people's definitions: Kubernetes' object types, the CSI and CNI specifications.

mod manifests;
