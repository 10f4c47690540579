//! The data path's suite once more, with pods that are attached without a bridge.

#![allow(unsafe_code)] // one lifetime extension in the support module, argued there

#[path = "../dataplane.rs"]
mod dataplane;
