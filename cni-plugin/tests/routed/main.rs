//! The suites of the CNI verbs, leases and kills once more, in mode `routed`; and what is about both modes. On the real
//! binaries, a real agent and a real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]
// Each suite has the support module as its own, as when it is a program.
#![allow(clippy::duplicate_mod)]

#[path = "../cni.rs"]
mod cni;
#[path = "../crash/main.rs"]
mod crash;
// Names of different lengths: the suites tell their namespaces apart by them.
#[path = "../follow.rs"]
mod following;
#[path = "../heal.rs"]
mod healing;
#[path = "../leases.rs"]
mod leases;
#[path = "../bandwidth.rs"]
mod limited_rates;
mod mending;
mod mode_change;
#[path = "../host_ports.rs"]
mod ports_of_hosts;
#[path = "../restart.rs"]
mod restarting;
#[path = "../spec/main.rs"]
mod spec;
