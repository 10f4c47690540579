//! What can go wrong between a plan and the kernel.

use std::io;

/// Result of the data path.
pub type Result<T> = std::result::Result<T, Error>;

/// A failure of the data path.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The sandbox already has an interface of that name.
    #[error("interface {ifname} already exists in {place}; remove it or choose another name")]
    Exists {
        /// The interface.
        ifname: String,
        /// Where.
        place: String,
    },
    /// The sandbox's network namespace cannot be opened or entered.
    #[error("cannot enter the network namespace {path}")]
    Sandbox {
        /// Path of the namespace.
        path: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A request to rtnetlink was refused.
    #[error("the kernel refused to {what}: {reason}")]
    Link {
        /// What was tried, as the end of a sentence.
        what: String,
        /// The kernel's answer.
        reason: String,
        /// Its positive errno, 0 if unknown.
        errno: i32,
    },
    /// A sysctl could not be written.
    #[error("cannot set {path}")]
    Sysctl {
        /// The file.
        path: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A netlink socket failed.
    #[error("netlink socket: {what}")]
    Socket {
        /// What was tried.
        what: String,
        /// The kernel's answer.
        #[source]
        source: io::Error,
    },
    /// A message of an nf_tables transaction was refused; nothing of the transaction took effect.
    #[error("nf_tables refused to {what} (errno {errno}); nothing was changed")]
    Nft {
        /// The failing message.
        what: String,
        /// The kernel's positive errno.
        errno: i32,
    },
    /// A ruleset that the kernel cannot take.
    #[error("invalid ruleset")]
    Ruleset(#[from] holdfast_net_core::ruleset::RulesetError),
    /// A configuration that makes no sense.
    #[error("invalid data path setting: {0}")]
    Config(String),
    /// The kernel differs from the plan, found by a check.
    #[error("attachment differs from its plan: {0}")]
    Differs(String),
    /// An answer of the kernel that this program does not understand.
    #[error("unexpected answer from the kernel: {0}")]
    Protocol(String),
}

impl Error {
    /// An interface that exists already, on the node rather than in the sandbox.
    pub(crate) fn is_on_node(&self) -> bool {
        matches!(self, Error::Exists { place, .. } if place == "this node")
    }
}
