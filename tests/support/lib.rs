//! The cluster harness: nodes as network, mount and process namespaces of one machine, shared by the demo and the tests.
//!
//! Nothing here pretends: the processes of a node are the real binaries, reached through their real interfaces (CSI over
//! Unix sockets, the CNI plugin executed as a runtime does it). Only the machine under a node is a set of namespaces.
//!
//! ```text
//!   host (driver: demo or test)
//!    |  pipe: its end is the cluster's end
//!    +-- underlay namespace: one bridge
//!    +-- controller namespace ---- holdfast-csi controller
//!    +-- node-a namespaces ------- holdfast-csi data, holdfast-csi node, holdfast-netd, pods
//!    +-- node-b, node-c            the same
//! ```
//!
//! A node lives as long as its [`Namespaces`] holder, the first process of its PID namespace: when that ends, the kernel
//! ends every process, mount and link of the node. The holder ends when the driver does, however that happens.
//!
//! What it does not do: limit a node's memory or processor, or give a node devices of its own (`/dev` is shared).

pub mod api_server;
pub mod blocks;
mod certs;
pub mod cgroups;
pub mod chart;
pub mod cleanup;
pub mod cluster;
pub mod cni;
pub mod csi;
pub mod direct_io;
pub mod effort;
pub mod files;
pub mod forgetful;
pub mod garbage;
pub mod go_tools;
pub mod helper;
pub mod image;
pub mod images;
pub mod k8s;
mod kubernetes_records;
pub mod kustomize;
mod ledger;
mod namespaces;
pub mod netbed;
mod node;
mod objects;
pub mod pod;
pub mod postgres;
mod probe;
pub mod process;
pub mod raw_volume;
pub mod relay;
pub mod report;
pub mod rescue;
pub mod story;
pub mod traces;
pub mod work;

pub use certs::Authority;
pub use cluster::{Cluster, ClusterOptions};
pub use kubernetes_records::{API_URL, KubernetesRecords};
pub use ledger::{Comparison, Ledger};
pub use namespaces::Namespaces;
pub use node::Node;
pub use objects::Objects;
pub use probe::{Matrix, Reach, probe};
pub use process::{Program, ProgramSpec};
pub use work::Work;
