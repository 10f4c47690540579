//! TLS material of a node: one folder gives mutual TLS 1.3 for control and NBD.
//!
//! A certificate names its node (DNS name); whoever connects to a node demands that name, whoever serves demands a
//! certificate of the same authority and learns the name from it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use holdfast_nbd::{ClientTls, ServerTls, TlsIdentity, peer_names};
use tonic::transport::{Certificate, ClientTlsConfig, Identity, ServerTlsConfig};

/// Why TLS material could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file could not be read.
    #[error("TLS file {path} cannot be read: {source}; --tls-dir needs ca.pem, node.pem and node.key")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The material is refused.
    #[error(transparent)]
    Material(#[from] holdfast_nbd::TlsError),
}

/// A node's certificate, its key and the authority, loaded and checked once.
#[derive(Clone)]
pub struct TlsMaterial {
    ca_pem: Arc<Vec<u8>>,
    cert_pem: Arc<Vec<u8>>,
    key_pem: Arc<Vec<u8>>,
    identity: Arc<TlsIdentity>,
    server: ServerTls,
}

impl std::fmt::Debug for TlsMaterial {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key never reaches a log.
        f.debug_struct("TlsMaterial").finish_non_exhaustive()
    }
}

impl TlsMaterial {
    /// Loads `ca.pem`, `node.pem` and `node.key` of `dir`.
    ///
    /// # Errors
    /// A file that is missing or no PEM, and a key that does not fit its certificate.
    pub fn load(dir: &Path) -> Result<Self, TlsError> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map(Arc::new).map_err(|source| TlsError::Read { path, source })
        };
        let identity = TlsIdentity::load(dir)?;
        let server = ServerTls { config: identity.server_config()?, required: true };
        Ok(Self {
            ca_pem: read("ca.pem")?,
            cert_pem: read("node.pem")?,
            key_pem: read("node.key")?,
            identity: Arc::new(identity),
            server,
        })
    }

    /// For the NBD server; clients must do STARTTLS.
    #[must_use]
    pub fn nbd_server(&self) -> ServerTls {
        self.server.clone()
    }

    /// For an NBD client of the node `name`.
    ///
    /// # Errors
    /// The name is no DNS name.
    pub fn nbd_client(&self, name: &str) -> Result<ClientTls, TlsError> {
        Ok(self.identity.client(name)?)
    }

    /// For a gRPC server: clients without a certificate of the authority are refused.
    #[must_use]
    pub fn tonic_server(&self) -> ServerTlsConfig {
        ServerTlsConfig::new()
            .identity(Identity::from_pem(self.cert_pem.as_slice(), self.key_pem.as_slice()))
            .client_ca_root(Certificate::from_pem(self.ca_pem.as_slice()))
    }

    /// For a gRPC client of the node `name`.
    #[must_use]
    pub fn tonic_client(&self, name: &str) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .identity(Identity::from_pem(self.cert_pem.as_slice(), self.key_pem.as_slice()))
            .ca_certificate(Certificate::from_pem(self.ca_pem.as_slice()))
            .domain_name(name)
    }
}

/// The names in the certificate of a gRPC caller; empty without TLS.
#[must_use]
pub fn caller_names<T>(request: &tonic::Request<T>) -> Vec<String> {
    let certificates = request.peer_certs();
    certificates.as_deref().and_then(|chain| chain.first()).map(peer_names).unwrap_or_default()
}
