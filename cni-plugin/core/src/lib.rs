//! Crate documentation follows with the implementation.
pub mod plan;
pub mod ruleset;
