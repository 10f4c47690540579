//! The built-in issuer: certificates of the cluster's processes through Kubernetes' CertificateSigningRequests.
//!
//! ```text
//!  data process ── key (made here, stays here) ──> CertificateSigningRequest ──> API server (adds who asks)
//!  issuer, beside the controller ── judge ──> approval ──> certificate, signed with the authority's key (a Secret)
//!  issuer ──> ConfigMap of the authorities' certificates ──> every process, which trusts them
//! ```
//!
//! Promised: a certificate names the node that its holder runs on, or the controller where its holder is that. Who could break it:
//! a node that asks in another's name, an account of somebody else, a request for more than is allowed, one that was made
//! with bytes that somebody else signed, a person's approval of any of these. So a request is judged by what the API server says of its
//! maker (`judge.rs`): the account, and the node that the token is bound to; and once more before it is signed.
//!
//! Several issuers at the same time are harmless: what they write is a compare-and-swap, and either's answer is right.
//!
//! With another signer (cert-manager) requests are judged and approved by the same rules, and its authorities are published the same
//! way, from a Secret that it keeps (`adopted.rs`).
//!
//! Authorities change with an overlap (`authority.rs`): everybody trusts the next one before it signs anything.

mod adopted;
mod authority;
mod holder;
mod issuer;
mod judge;

use std::time::Duration;

pub use holder::{Holder, HolderSettings};
pub use issuer::{IssuerSettings, issue};

/// The signer that the built-in issuer is.
pub const OWN_SIGNER: &str = "storage.holdfast.dev/node";
/// Name of the Secret with the authorities' keys, and of the ConfigMap with their certificates.
pub const AUTHORITY_NAME: &str = "holdfast-ca";
/// Key of the certificates in the ConfigMap.
pub const BUNDLE_KEY: &str = "ca.pem";
/// Account of the data processes, in our namespace.
pub const DATA_ACCOUNT: &str = "holdfast-data";
/// Account of the controller, in our namespace.
pub const CONTROLLER_ACCOUNT: &str = "holdfast-controller";
/// A certificate lives so long: with a renewal after two thirds, new connections outlast ten days without an issuer.
pub const LIFE: Duration = Duration::from_secs(30 * 86_400);
/// An authority lives so long.
pub const AUTHORITY_LIFE: Duration = Duration::from_secs(365 * 86_400);
/// The next authority is trusted for so long before it signs.
pub const AUTHORITY_OVERLAP: Duration = Duration::from_secs(86_400);

/// What a holder asks for, and what is allowed (k8s.io names of key usages).
const USAGES: [&str; 3] = ["digital signature", "server auth", "client auth"];

/// Seconds since 1970, now.
fn now_s() -> i64 {
    k8s_openapi::jiff::Timestamp::now().as_second()
}

/// Seconds, where more than 68 years count as that.
fn seconds(duration: Duration) -> i64 {
    i64::from(i32::try_from(duration.as_secs()).unwrap_or(i32::MAX))
}
