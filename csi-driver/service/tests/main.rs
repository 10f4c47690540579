//! The service's tests. One program: each further one would take a minute of a cold build.

// Tests and what they share may panic.
#![allow(clippy::unwrap_used)]

mod controller;
mod encryption;
mod fields;
mod groups;
mod healing;
mod leaving;
mod modify;
mod node;
mod node_fields;
mod node_keys;
mod parallel;
mod placement;
mod record_stores;
mod rescue;
mod snapshots;
mod support;
