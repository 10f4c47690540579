//! The data path of a node: applies plans and rulesets to the Linux kernel.
//!
//! Links, routes and neighbours go through rtnetlink; policy goes through nf_tables netlink, spoken here, without the
//! `nft` program. Everything compares with the kernel first and writes only the difference, so every call may be
//! repeated after a kill at any point.
//!
//! ```text
//! NodePlan, EndpointPlan --> links (rtnetlink), sandbox (own thread in the pod's namespace)
//! Ruleset --diff--> one transaction --> nft (table inet holdfast, table bridge holdfast)
//! ```
//!
//! A [`Dataplane`] acts in the network namespace of the thread that opened it. Netlink sockets stay there; sysctls are
//! written through `/proc/sys/net`, which follows the calling thread, so call it from threads of that namespace only.
#![allow(unsafe_code)] // setns in the sandbox thread; each use is argued at its place.

mod error;
mod nft;

use std::path::Path;

use holdfast_net_core::plan::{EndpointPlan, NodePlan};
use holdfast_net_core::ruleset::Ruleset;

pub use error::{Error, Result};

/// Settings of the data path.
#[derive(Debug, Clone)]
pub struct Config {
    /// Name of our nf_tables tables (families inet and bridge).
    pub table: String,
    /// Bits of the ct mark that hold the policy revision; one contiguous run of at least 4 bits.
    pub ct_mark_mask: u32,
    /// NFLOG group of the rate-limited log of denied packets.
    pub log_group: u16,
}

impl Default for Config {
    fn default() -> Self {
        Self { table: "holdfast".to_string(), ct_mark_mask: 0x00ff_0000, log_group: 4807 }
    }
}

/// An interface of ours on the node, as found in the kernel.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FoundEndpoint {
    /// The host end's name.
    pub host_ifname: String,
    /// The attachment it was made for, from the interface's alias; `None` if the alias is missing or not ours.
    pub attachment: Option<(String, String)>,
}

/// What [`Dataplane::apply_ruleset`] did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Applied {
    /// Elements added and removed; 0 means no kernel write.
    pub elements: usize,
    /// The policy revision was advanced: every live connection is judged again at its next packet.
    pub revoked: bool,
    /// Somebody else had changed our tables and they were mended.
    pub mended: bool,
}

/// The kernel's data path in the namespace where this was opened.
pub struct Dataplane {
    config: Config,
}

impl Dataplane {
    /// Opens the netlink sockets, adopts our tables as they are in the kernel, and makes them (empty, so without
    /// effect) when they are absent. Never opens a gap: rules in force stay in force.
    pub async fn new(config: Config) -> Result<Self> {
        Ok(Self { config })
    }

    /// The ruleset in the kernel, ours of an earlier run included.
    pub async fn load_ruleset(&self) -> Result<Ruleset> {
        let _ = &self.config;
        Err(Error::NotBuilt)
    }

    /// Makes bridge, overlay, routes, neighbours and forwarding entries as planned. Returns the number of writes.
    pub async fn apply_node(&self, _plan: &NodePlan) -> Result<usize> {
        Err(Error::NotBuilt)
    }

    /// Attaches a pod: pins and deny-all (unless the applied ruleset already knows the port) before the link comes up.
    /// Undoes itself on failure. Fails with [`Error::Exists`] if the sandbox has an interface of that name.
    pub async fn attach(&self, _plan: &EndpointPlan, _netns: &Path) -> Result<()> {
        Err(Error::NotBuilt)
    }

    /// Compares an attachment with the kernel, both ends.
    pub async fn check(&self, _plan: &EndpointPlan, _netns: &Path) -> Result<()> {
        Err(Error::NotBuilt)
    }

    /// Removes the host end (and with it the pod's end), its pins, classes, route and neighbours. Idempotent; needs no
    /// sandbox.
    pub async fn detach(&self, _host_ifname: &str) -> Result<()> {
        Err(Error::NotBuilt)
    }

    /// All host ends of ours on the node, for garbage collection.
    pub async fn list_endpoints(&self) -> Result<Vec<FoundEndpoint>> {
        Err(Error::NotBuilt)
    }

    /// Makes the kernel's ruleset equal to `ruleset`, in one transaction; writes nothing when it already is.
    ///
    /// Ports attached since, which `ruleset` does not pin yet, stay pinned and in deny-all.
    pub async fn apply_ruleset(&self, _ruleset: &Ruleset) -> Result<Applied> {
        Err(Error::NotBuilt)
    }
}
