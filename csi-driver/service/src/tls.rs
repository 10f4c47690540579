//! TLS for control and registry connections: mutual, version 1.3 only; a certificate names its node.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};
use x509_parser::extensions::GeneralName;

/// DNS name that the controller's certificate must carry.
pub const CONTROLLER_NAME: &str = "holdfast-controller";

/// Why TLS material cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("TLS file {path} cannot be read: {source}; --tls-dir needs ca.pem, node.pem and node.key")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The material is refused.
    #[error("the TLS material in {dir} is refused: {reason}")]
    Refused {
        /// The folder.
        dir: PathBuf,
        /// Why.
        reason: String,
    },
}

/// Certificate, key and authority of this process.
#[derive(Clone)]
pub struct TlsIdentity {
    ca_pem: Arc<[u8]>,
    cert_pem: Arc<[u8]>,
    key_pem: Arc<[u8]>,
    server: Arc<ServerConfig>,
}

impl std::fmt::Debug for TlsIdentity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The key never reaches a log.
        f.debug_struct("TlsIdentity").finish_non_exhaustive()
    }
}

impl TlsIdentity {
    /// Loads `ca.pem`, `node.pem` and `node.key` of `dir` and checks that they fit.
    ///
    /// # Errors
    /// A file is missing or holds no PEM, or key and certificate do not fit.
    pub fn load(dir: &Path) -> Result<Self, TlsError> {
        let read = |name: &str| {
            let path = dir.join(name);
            std::fs::read(&path).map_err(|source| TlsError::Read { path, source })
        };
        let (ca_pem, cert_pem, key_pem) = (read("ca.pem")?, read("node.pem")?, read("node.key")?);
        let server = server_config(&ca_pem, &cert_pem, &key_pem)
            .map_err(|reason| TlsError::Refused { dir: dir.into(), reason })?;
        Ok(Self {
            ca_pem: ca_pem.into(),
            cert_pem: cert_pem.into(),
            key_pem: key_pem.into(),
            server: Arc::new(server),
        })
    }

    /// For a gRPC server.
    #[must_use]
    pub fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// For a gRPC client that talks to the process named `name`.
    #[must_use]
    pub fn client(&self, name: &str) -> ClientTlsConfig {
        ClientTlsConfig::new()
            .identity(Identity::from_pem(&self.cert_pem, &self.key_pem))
            .ca_certificate(Certificate::from_pem(&self.ca_pem))
            .domain_name(name)
    }
}

fn server_config(ca_pem: &[u8], cert_pem: &[u8], key_pem: &[u8]) -> Result<ServerConfig, String> {
    let mut roots = RootCertStore::empty();
    for cert in certs("ca.pem", ca_pem)? {
        roots.add(cert).map_err(|e| format!("ca.pem: {e}"))?;
    }
    let chain = certs("node.pem", cert_pem)?;
    let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(|e| format!("node.key: {e}"))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider))
        .build()
        .map_err(|e| e.to_string())?;
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(|e| e.to_string())?
        .with_client_cert_verifier(verifier)
        .with_single_cert(chain, key)
        .map_err(|e| e.to_string())?;
    config.alpn_protocols = vec![b"h2".to_vec()];
    Ok(config)
}

fn certs(file: &str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, String> {
    let certs: Vec<_> =
        CertificateDer::pem_slice_iter(pem).collect::<Result<_, _>>().map_err(|e| format!("{file}: {e}"))?;
    if certs.is_empty() {
        return Err(format!("{file} holds no certificate"));
    }
    Ok(certs)
}

/// The DNS names of a verified peer certificate; none where it cannot be read.
pub(crate) fn dns_names(certificate: &CertificateDer<'_>) -> Vec<String> {
    let Ok((_, parsed)) = x509_parser::parse_x509_certificate(certificate) else {
        return Vec::new();
    };
    let Ok(Some(names)) = parsed.subject_alternative_name() else {
        return Vec::new();
    };
    let names = names.value.general_names.iter();
    names
        .filter_map(
            |name| if let GeneralName::DNSName(name) = name { Some((*name).to_owned()) } else { None },
        )
        .collect()
}
