//! Crate documentation follows with the implementation.
