//! TLS material of a node: one folder gives mutual TLS 1.3 for control, registry and NBD.
//!
//! A certificate names its node (DNS name); whoever connects to a node demands that name, whoever serves demands a
//! certificate of the same authority.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
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
    /// A file holds no usable PEM.
    #[error("TLS file {path} is not usable: {reason}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why.
        reason: String,
    },
    /// rustls refused the material.
    #[error("the TLS material in {dir} is refused: {reason}")]
    Refused {
        /// The folder.
        dir: PathBuf,
        /// Why.
        reason: String,
    },
    /// The node's name is no DNS name.
    #[error("node name {0} cannot be checked in a certificate: it is not a DNS name")]
    Name(String),
}

/// A node's certificate, its key and the authority, loaded and checked once.
#[derive(Clone)]
pub struct TlsMaterial {
    ca_pem: Arc<Vec<u8>>,
    cert_pem: Arc<Vec<u8>>,
    key_pem: Arc<Vec<u8>>,
    server: Arc<ServerConfig>,
    client: Arc<ClientConfig>,
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
            std::fs::read(&path).map(|bytes| (path.clone(), bytes)).map_err(|source| TlsError::Read { path, source })
        };
        let (ca_path, ca_pem) = read("ca.pem")?;
        let (cert_path, cert_pem) = read("node.pem")?;
        let (key_path, key_pem) = read("node.key")?;

        let refused = |reason: String| TlsError::Refused { dir: dir.to_owned(), reason };
        let mut roots = RootCertStore::empty();
        for cert in parse_certs(&ca_path, &ca_pem)? {
            roots.add(cert).map_err(|e| refused(e.to_string()))?;
        }
        let roots = Arc::new(roots);
        let chain = parse_certs(&cert_path, &cert_pem)?;
        let key = PrivateKeyDer::from_pem_slice(&key_pem)
            .map_err(|e| TlsError::Pem { path: key_path, reason: e.to_string() })?;

        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), Arc::clone(&provider))
            .build()
            .map_err(|e| refused(e.to_string()))?;
        let server = ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| refused(e.to_string()))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key.clone_key())
            .map_err(|e| refused(e.to_string()))?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| refused(e.to_string()))?
            .with_root_certificates(roots)
            .with_client_auth_cert(chain, key)
            .map_err(|e| refused(e.to_string()))?;
        Ok(Self {
            ca_pem: Arc::new(ca_pem),
            cert_pem: Arc::new(cert_pem),
            key_pem: Arc::new(key_pem),
            server: Arc::new(server),
            client: Arc::new(client),
        })
    }

    /// For an NBD server.
    #[must_use]
    pub fn rustls_server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// For an NBD client; the server's name is checked against [`server_name`].
    #[must_use]
    pub fn rustls_client(&self) -> Arc<ClientConfig> {
        Arc::clone(&self.client)
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

/// A node's name as rustls checks it.
///
/// # Errors
/// The name is no DNS name.
pub fn server_name(node: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(node.to_owned()).map_err(|_| TlsError::Name(node.to_owned()))
}

fn parse_certs(path: &Path, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let bad = |reason: String| TlsError::Pem { path: path.to_owned(), reason };
    let certs: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|e| bad(e.to_string()))?;
    if certs.is_empty() {
        return Err(bad("it holds no certificate".to_owned()));
    }
    Ok(certs)
}
