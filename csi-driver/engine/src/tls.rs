//! TLS material of a node: one folder gives mutual TLS 1.3 for control and NBD.
//!
//! A certificate names its node (DNS name); whoever connects to a node demands that name, whoever serves demands a
//! certificate of the same authority and learns the name from it.
//!
//! | request | who may |
//! |---|---|
//! | Pool, VolumeJobs | the controller |
//! | Replica, Open | the node that the request names as the target's |
//! | Replica, anything else; NBD | the node whose Open made the session |
//!
//! Not checked: whether the record names that node as the attached one, which a replica cannot know. A node with a
//! certificate can therefore fence another one's target by an Open with a higher generation; it cannot use its session.

use std::path::Path;
use std::sync::Arc;

use holdfast_nbd::{ClientTls, ServerTls, peer_names};
use holdfast_service::TlsIdentity;
use holdfast_service::tls::CONTROLLER_NAME;
use rustls::ServerConfig;
use rustls::pki_types::ServerName;
use tonic::Status;
use tonic::transport::ClientTlsConfig;

/// Why TLS material could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// The folder's.
    #[error(transparent)]
    Folder(#[from] holdfast_service::tls::TlsError),
    /// Certificate and key do not make a configuration.
    #[error("the TLS material cannot be used: {0}")]
    Material(#[from] rustls::Error),
    /// The peer's name is no DNS name.
    #[error("\"{0}\" is not a DNS name, so no certificate can carry it")]
    ServerName(String),
}

/// A node's certificate, its key and the authorities, for NBD and gRPC. They may be replaced while they are used: see
/// [`TlsIdentity`].
#[derive(Debug, Clone)]
pub struct TlsMaterial {
    identity: TlsIdentity,
    nbd: ServerTls,
}

impl From<TlsIdentity> for TlsMaterial {
    fn from(identity: TlsIdentity) -> Self {
        // NBD has no ALPN.
        let mut config = ServerConfig::clone(&identity.server());
        config.alpn_protocols.clear();
        Self { identity, nbd: ServerTls { config: Arc::new(config), required: true } }
    }
}

impl TlsMaterial {
    /// Loads `ca.pem`, `node.pem` and `node.key` of `dir`.
    ///
    /// # Errors
    /// A file that is missing or no PEM, and a key that does not fit its certificate.
    pub fn load(dir: &Path) -> Result<Self, TlsError> {
        Ok(TlsIdentity::load(dir)?.into())
    }

    /// For the NBD server; clients must do STARTTLS.
    #[must_use]
    pub fn nbd_server(&self) -> ServerTls {
        self.nbd.clone()
    }

    /// For an NBD client of the node `name`, with what is newest now.
    ///
    /// # Errors
    /// The name is no DNS name.
    pub fn nbd_client(&self, name: &str) -> Result<ClientTls, TlsError> {
        let server_name =
            ServerName::try_from(name.to_owned()).map_err(|_| TlsError::ServerName(name.to_owned()))?;
        Ok(ClientTls { config: self.identity.rustls_client()?, server_name })
    }

    /// For a gRPC server: TLS 1.3, clients without a certificate of the authority are refused.
    #[must_use]
    pub fn grpc_server(&self) -> Arc<ServerConfig> {
        self.identity.server()
    }

    /// For a gRPC client of the node `name`, with what is newest now.
    #[must_use]
    pub fn tonic_client(&self, name: &str) -> ClientTlsConfig {
        self.identity.client(name)
    }
}

/// Who calls over gRPC.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Caller {
    /// The service is plain text: whoever reaches its port.
    Anybody,
    /// The holder of a certificate with these names, at least one.
    Named(Vec<String>),
}

impl Caller {
    /// Who sent a request; with `tls` it must have come with a certificate.
    ///
    /// # Errors
    /// The certificate names nobody.
    pub fn of<T>(request: &tonic::Request<T>, tls: bool) -> Result<Self, Status> {
        if !tls {
            return Ok(Self::Anybody);
        }
        let certificates = request.peer_certs();
        let names =
            certificates.as_deref().and_then(|chain| chain.first()).map(peer_names).unwrap_or_default();
        if names.is_empty() {
            return Err(Status::unauthenticated(
                "the caller's certificate carries no DNS name: it must name its node",
            ));
        }
        Ok(Self::Named(names))
    }

    /// Refuses everybody but the controller.
    ///
    /// # Errors
    /// The certificate names somebody else.
    pub fn must_be_controller(&self) -> Result<(), Status> {
        match self {
            Self::Anybody => Ok(()),
            Self::Named(names) if names.iter().any(|name| name == CONTROLLER_NAME) => Ok(()),
            Self::Named(names) => Err(denied(format!(
                "only {CONTROLLER_NAME} makes and removes replicas and snapshots; the caller's certificate names {}",
                names.join(", ")
            ))),
        }
    }

    /// The owner of a session that a target on `node` asks for, in the terms of [`Caller::names`]: that node and nobody
    /// else.
    ///
    /// # Errors
    /// The certificate names another node, or the controller, which runs no targets.
    pub fn must_be_node(self, node: &str) -> Result<Vec<String>, Status> {
        match self {
            Self::Anybody => Ok(Vec::new()),
            Self::Named(names) if node != CONTROLLER_NAME && names.iter().any(|name| name == node) => {
                Ok(vec![node.to_owned()])
            }
            Self::Named(names) => Err(denied(format!(
                "a target on node \"{node}\" asks for a session, but the caller's certificate names {}",
                names.join(", ")
            ))),
        }
    }

    /// Its names; none for [`Caller::Anybody`].
    #[must_use]
    pub fn names(self) -> Vec<String> {
        match self {
            Self::Anybody => Vec::new(),
            Self::Named(names) => names,
        }
    }
}

fn denied(sentence: String) -> Status {
    tracing::warn!("{sentence}");
    Status::permission_denied(sentence)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(names: &[&str]) -> Caller {
        Caller::Named(names.iter().map(|&name| name.to_owned()).collect())
    }

    #[test]
    fn only_the_controller_may_touch_the_pool() {
        assert!(named(&[CONTROLLER_NAME]).must_be_controller().is_ok());
        assert!(Caller::Anybody.must_be_controller().is_ok());
        let refused = named(&["node-a"]).must_be_controller().unwrap_err();
        assert_eq!(refused.code(), tonic::Code::PermissionDenied);
        assert!(refused.message().contains("names node-a"), "{refused}");
    }

    #[test]
    fn a_session_is_for_the_node_that_the_certificate_names() {
        assert_eq!(named(&["node-a", "localhost"]).must_be_node("node-a").unwrap(), ["node-a"]);
        assert!(Caller::Anybody.must_be_node("node-a").unwrap().is_empty());
        for (names, node) in [("node-b", "node-a"), ("node-a", ""), (CONTROLLER_NAME, CONTROLLER_NAME)] {
            let refused = named(&[names]).must_be_node(node).unwrap_err();
            assert_eq!(refused.code(), tonic::Code::PermissionDenied, "{names} for {node}");
        }
    }

    #[test]
    fn a_request_without_a_certificate_is_nobody_s() {
        let refused = Caller::of(&tonic::Request::new(()), true).unwrap_err();
        assert_eq!(refused.code(), tonic::Code::Unauthenticated);
        assert_eq!(Caller::of(&tonic::Request::new(()), false).unwrap(), Caller::Anybody);
    }
}
