//! The networking half's pure core: what the CNI plugin and the node agent decide, without sockets, files, clocks or
//! threads.
//!
//! ```text
//! objects (Node, Namespace, Pod, NetworkPolicy) --overlay--> plan    \
//!                                                --policy---> ruleset >  dataplane
//! leases                                         --ipam-----> endpoint/
//! CNI text <--cni--> values
//! ```
//!
//! It refuses to touch anything: `holdfast-dataplane` applies plans, `holdfast-agent` keeps leases and watches objects.

pub mod bandwidth;
pub mod cni;
pub mod garbage;
pub mod ipam;
pub mod nat;
pub mod objects;
pub mod overlay;
pub mod plan;
pub mod pod_ranges;
pub mod policy;
pub mod ports;
pub mod ruleset;
