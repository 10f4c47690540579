//! Mutual TLS 1.3 for NBD's STARTTLS, on the ring provider.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::WebPkiClientVerifier;
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use x509_parser::prelude::{FromDer, GeneralName, X509Certificate};

/// TLS material that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM file is missing or holds something else.
    #[error("{path} is not a readable PEM file of the expected kind: {source}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// The certificates and the key do not make a TLS configuration.
    #[error("the TLS material cannot be used: {0}")]
    Material(String),
    /// The peer's name is no DNS name.
    #[error("\"{0}\" is not a DNS name, so no certificate can carry it")]
    ServerName(String),
}

/// A node's certificate and the authority it trusts: `ca.pem`, `node.pem` and `node.key` in one folder.
#[derive(Debug)]
pub struct TlsIdentity {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

impl TlsIdentity {
    /// Reads the three files.
    ///
    /// # Errors
    /// A file that is missing, unreadable or not PEM of its kind.
    pub fn load(dir: &Path) -> Result<Self, TlsError> {
        let pem_error = |path: &Path| {
            let path = path.to_owned();
            move |source| TlsError::Pem { path, source }
        };
        let certificates = |name: &str| {
            let path = dir.join(name);
            CertificateDer::pem_file_iter(&path)
                .and_then(Iterator::collect::<Result<Vec<_>, _>>)
                .map_err(pem_error(&path))
        };
        let key_path = dir.join("node.key");
        let key = PrivateKeyDer::from_pem_file(&key_path).map_err(pem_error(&key_path))?;
        Self::new(certificates("ca.pem")?, certificates("node.pem")?, key)
    }

    /// From parts that are already in memory.
    ///
    /// # Errors
    /// An authority's certificate that is none.
    pub fn new(
        authorities: Vec<CertificateDer<'static>>,
        chain: Vec<CertificateDer<'static>>,
        key: PrivateKeyDer<'static>,
    ) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        for authority in authorities {
            roots.add(authority).map_err(|error| TlsError::Material(error.to_string()))?;
        }
        Ok(Self { roots: Arc::new(roots), chain, key })
    }

    /// TLS 1.3, client certificate required.
    ///
    /// # Errors
    /// Certificate and key that do not belong together.
    pub fn server_config(&self) -> Result<Arc<ServerConfig>, TlsError> {
        let material = |error: &dyn std::fmt::Display| TlsError::Material(error.to_string());
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(self.roots.clone(), provider.clone())
            .build()
            .map_err(|error| material(&error))?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| material(&error))?
            .with_client_cert_verifier(verifier)
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| material(&error))?;
        Ok(Arc::new(config))
    }

    /// TLS 1.3 with our certificate, towards the holder of `peer_name`'s certificate and nobody else.
    ///
    /// # Errors
    /// A name that is no DNS name; certificate and key that do not belong together.
    pub fn client(&self, peer_name: &str) -> Result<ClientTls, TlsError> {
        let material = |error: &dyn std::fmt::Display| TlsError::Material(error.to_string());
        let server_name = ServerName::try_from(peer_name.to_owned())
            .map_err(|_| TlsError::ServerName(peer_name.to_owned()))?;
        let config = ClientConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|error| material(&error))?
            .with_root_certificates(self.roots.clone())
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(|error| material(&error))?;
        Ok(ClientTls { config: Arc::new(config), server_name })
    }
}

/// How a client does STARTTLS.
#[derive(Debug, Clone)]
pub struct ClientTls {
    /// Our certificate and whom we trust.
    pub config: Arc<ClientConfig>,
    /// The name the server's certificate must carry.
    pub server_name: ServerName<'static>,
}

/// The DNS names in a certificate that TLS has verified; empty if it has none or is no certificate.
#[must_use]
pub fn peer_names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(certificate) else {
        return Vec::new();
    };
    let Ok(Some(extension)) = certificate.subject_alternative_name() else {
        return Vec::new();
    };
    let dns_name = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some((*name).to_owned()),
        _ => None,
    };
    extension.value.general_names.iter().filter_map(dns_name).collect()
}
