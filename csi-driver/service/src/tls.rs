//! TLS for control and registry connections: mutual, version 1.3 only; a certificate names its node.

use std::path::{Path, PathBuf};
use std::sync::{Arc, PoisonError, RwLock};

use rustls::client::danger::HandshakeSignatureValid;
use rustls::client::{ResolvesClientCert, Resumption};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme,
};
use tonic::transport::{Certificate, ClientTlsConfig, Identity};
use x509_parser::extensions::GeneralName;
use zeroize::Zeroizing;

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

/// Certificate, key and authorities of this process, which may be replaced while it runs.
///
/// Clones share them. Connections that are up keep what they were made with and are not dropped; each new one, also of a
/// server that was started before, takes what is newest. No session is ever resumed, so no connection rests on
/// a certificate that was replaced.
#[derive(Clone)]
pub struct TlsIdentity {
    current: Arc<Current>,
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
        let (ca_pem, cert_pem, key_pem) = read_folder(dir)?;
        Self::from_pem(&ca_pem, &cert_pem, &key_pem)
            .map_err(|reason| TlsError::Refused { dir: dir.into(), reason })
    }

    /// From PEM texts; `ca_pem` may hold several authorities.
    ///
    /// # Errors
    /// A sentence: one of them is no PEM of its kind, or key and certificate do not fit.
    pub fn from_pem(ca_pem: &[u8], cert_pem: &[u8], key_pem: &[u8]) -> Result<Self, String> {
        let loaded = Loaded::new(1, ca_pem, cert_pem, key_pem)?;
        let current = Arc::new(Current(RwLock::new(Arc::new(loaded))));
        let verifier = Arc::clone(&current) as Arc<dyn ClientCertVerifier>;
        let mut server = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .map_err(|e| e.to_string())?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::clone(&current) as _);
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.alpn_protocols = vec![b"h2".to_vec()];
        Ok(Self { current, server: Arc::new(server) })
    }

    /// Replaces all three, for this value and all its clones; false if they are what is in use already.
    ///
    /// # Errors
    /// As for [`TlsIdentity::from_pem`]; what was in use stays so.
    pub fn replace(&self, ca_pem: &[u8], cert_pem: &[u8], key_pem: &[u8]) -> Result<bool, String> {
        let mut current = self.current.0.write().unwrap_or_else(PoisonError::into_inner);
        if (&*current.ca_pem, &*current.cert_pem, current.key_pem.as_slice()) == (ca_pem, cert_pem, key_pem) {
            return Ok(false);
        }
        *current = Arc::new(Loaded::new(current.version + 1, ca_pem, cert_pem, key_pem)?);
        Ok(true)
    }

    /// [`TlsIdentity::replace`] by what the files of `dir` say now.
    ///
    /// # Errors
    /// As for [`TlsIdentity::load`]; what was in use stays so.
    pub fn reload(&self, dir: &Path) -> Result<bool, TlsError> {
        let (ca_pem, cert_pem, key_pem) = read_folder(dir)?;
        self.replace(&ca_pem, &cert_pem, &key_pem)
            .map_err(|reason| TlsError::Refused { dir: dir.into(), reason })
    }

    /// Rises with each replacement: whoever keeps something made by [`TlsIdentity::client`] makes it anew then.
    #[must_use]
    pub fn version(&self) -> u64 {
        self.current.get().version
    }

    /// When the certificate ends, and when it began, in seconds since 1970.
    ///
    /// # Errors
    /// A sentence: it cannot be read, its authority is none of ours, it has ended, or it does not carry the DNS name `name`.
    pub fn life_of(&self, name: &str, now: UnixTime) -> Result<(i64, i64), String> {
        let loaded = self.current.get();
        let [own, intermediates @ ..] = loaded.certified.cert.as_slice() else {
            return Err("there is no certificate".to_owned());
        };
        loaded.verifier.verify_client_cert(own, intermediates, now).map_err(|e| e.to_string())?;
        if dns_names(own) != [name] {
            return Err(format!("the certificate names {}, not {name}", dns_names(own).join(", ")));
        }
        let (_, parsed) = x509_parser::parse_x509_certificate(own).map_err(|e| e.to_string())?;
        let validity = parsed.validity();
        Ok((validity.not_after.timestamp(), validity.not_before.timestamp()))
    }

    /// For a gRPC server.
    #[must_use]
    pub fn server(&self) -> Arc<ServerConfig> {
        Arc::clone(&self.server)
    }

    /// For a gRPC client that talks to the process named `name`, with what is newest now.
    #[must_use]
    pub fn client(&self, name: &str) -> ClientTlsConfig {
        let loaded = self.current.get();
        ClientTlsConfig::new()
            .identity(Identity::from_pem(&loaded.cert_pem, &loaded.key_pem))
            .ca_certificate(Certificate::from_pem(&loaded.ca_pem))
            .domain_name(name)
    }

    /// For any other client, with what is newest now.
    ///
    /// # Errors
    /// Certificate and key do not make a configuration.
    pub fn rustls_client(&self) -> Result<Arc<ClientConfig>, rustls::Error> {
        let loaded = self.current.get();
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&rustls::version::TLS13])?
            .with_root_certificates(Arc::clone(&loaded.roots))
            .with_client_cert_resolver(Arc::clone(&self.current) as _);
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config))
    }
}

/// What is newest; rustls asks it at each handshake.
struct Current(RwLock<Arc<Loaded>>);

struct Loaded {
    version: u64,
    ca_pem: Vec<u8>,
    cert_pem: Vec<u8>,
    key_pem: Zeroizing<Vec<u8>>,
    roots: Arc<RootCertStore>,
    certified: Arc<CertifiedKey>,
    verifier: Arc<dyn ClientCertVerifier>,
}

impl Loaded {
    fn new(version: u64, ca_pem: &[u8], cert_pem: &[u8], key_pem: &[u8]) -> Result<Self, String> {
        let mut roots = RootCertStore::empty();
        for cert in certs("ca.pem", ca_pem)? {
            roots.add(cert).map_err(|e| format!("ca.pem: {e}"))?;
        }
        let roots = Arc::new(roots);
        let chain = certs("node.pem", cert_pem)?;
        let key = PrivateKeyDer::from_pem_slice(key_pem).map_err(|e| format!("node.key: {e}"))?;
        let certified = CertifiedKey::from_der(chain, key, &provider()).map_err(|e| e.to_string())?;
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::clone(&roots), provider())
            .build()
            .map_err(|e| e.to_string())?;
        Ok(Self {
            version,
            ca_pem: ca_pem.to_vec(),
            cert_pem: cert_pem.to_vec(),
            key_pem: Zeroizing::new(key_pem.to_vec()),
            roots,
            certified: Arc::new(certified),
            verifier,
        })
    }
}

impl Current {
    fn get(&self) -> Arc<Loaded> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }
}

impl std::fmt::Debug for Current {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Current").finish_non_exhaustive()
    }
}

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.get().certified))
    }
}

impl ResolvesClientCert for Current {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.get().certified))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ClientCertVerifier for Current {
    /// None: they cannot be lent from what may be replaced, and a client of ours has one certificate to choose from.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.get().verifier.verify_client_cert(end_entity, intermediates, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.get().verifier.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.get().verifier.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.get().verifier.supported_verify_schemes()
    }
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

type Texts = (Vec<u8>, Vec<u8>, Zeroizing<Vec<u8>>);

fn read_folder(dir: &Path) -> Result<Texts, TlsError> {
    let read = |name: &str| {
        let path = dir.join(name);
        std::fs::read(&path).map_err(|source| TlsError::Read { path, source })
    };
    Ok((read("ca.pem")?, read("node.pem")?, Zeroizing::new(read("node.key")?)))
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
