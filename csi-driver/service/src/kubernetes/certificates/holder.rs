//! A holder of a certificate: makes the key, asks, and asks anew before the end.
//!
//! In the folder (mode 0700, on tmpfs in the manifests, so that no disk ever has a key) are:
//!
//! ```text
//!  identity.pem   the key and its certificate, in one file: written aside and renamed, so that they always fit
//!  ca.pem         the authorities that are trusted
//! ```
//!
//! A process that starts again with a certificate that holds needs neither issuer nor API server.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestSpec};
use k8s_openapi::api::core::v1::ConfigMap;
use kube::core::ObjectMeta;
use rcgen::{CertificateParams, DistinguishedName, DnType, KeyPair};
use rustls::pki_types::UnixTime;
use zeroize::Zeroizing;

use super::{AUTHORITY_NAME, BUNDLE_KEY, USAGES, now_s, seconds};
use crate::kubernetes::client::{CallError, Deadline, KubernetesClient};
use crate::tls::TlsIdentity;

const IDENTITY_FILE: &str = "identity.pem";
const BUNDLE_FILE: &str = "ca.pem";
/// How often a request is looked at, and for how long; then another one is made.
const ANSWER_INTERVAL: Duration = Duration::from_millis(500);
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// From one look at the authorities to the next, at most; it is far below the overlap of authorities.
const LOOK_INTERVAL: Duration = Duration::from_secs(30);
/// After a failed request.
const RETRY_INTERVAL: Duration = Duration::from_secs(3);
/// Kubernetes' own least life (the field's documentation); a shorter one is left to the issuer.
const EXPIRATION_S_MIN: i64 = 600;

/// Settings of a holder.
#[derive(Debug, Clone)]
pub struct HolderSettings {
    /// The name that the certificate is to carry: the node's, or the controller's.
    pub name: String,
    /// Folder of the key and the certificates.
    pub dir: PathBuf,
    /// Who signs.
    pub signer: String,
    /// The life to ask for.
    pub life: Duration,
}

/// A holder with a certificate.
pub struct Holder {
    client: KubernetesClient,
    settings: HolderSettings,
    identity: TlsIdentity,
}

impl Holder {
    /// Takes the certificate of the folder if it holds for a while, else waits for one, for as long as that takes. Cancellation
    /// safe: a request that was made is left to end by itself.
    ///
    /// # Errors
    /// The folder cannot be used.
    pub async fn obtain(client: KubernetesClient, settings: HolderSettings) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(&settings.dir)?;
        if let Err(error) = fs::set_permissions(&settings.dir, fs::Permissions::from_mode(0o700)) {
            // A volume that Kubernetes made for this pod alone may be another user's; the key itself is 0600.
            tracing::debug!(%error, "the folder of the certificate keeps its mode");
        }
        match kept(&settings) {
            Ok(identity) => {
                tracing::info!(name = settings.name, "the certificate of before is used");
                return Ok(Self { client, settings, identity });
            }
            Err(reason) => tracing::info!(name = settings.name, reason, "a certificate is asked for"),
        }
        let mut told = String::new();
        loop {
            match request(&client, &settings).await {
                Ok((ca, certificate, key)) => {
                    let identity =
                        TlsIdentity::from_pem(ca.as_bytes(), certificate.as_bytes(), key.as_bytes())
                            .map_err(io::Error::other)?;
                    store(&settings.dir, &ca, &certificate, &key)?;
                    return Ok(Self { client, settings, identity });
                }
                Err(reason) if reason != told => {
                    tracing::warn!(reason, "there is no certificate yet");
                    told = reason;
                }
                Err(_) => {}
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    /// What it holds; renewals reach all clones.
    #[must_use]
    pub fn identity(&self) -> TlsIdentity {
        self.identity.clone()
    }

    /// Follows the authorities and renews the certificate after two thirds of its life; it does not end. Cancellation safe.
    pub async fn keep(self) {
        let mut told = String::new();
        loop {
            tokio::time::sleep(self.pause()).await;
            let kept = match self.follow_authorities().await {
                Ok(()) if self.is_due() => self.renew().await,
                other => other,
            };
            match kept {
                Ok(()) => told.clear(),
                Err(reason) => {
                    if reason != told {
                        tracing::warn!(
                            reason,
                            "the certificate could not be looked after; what there is stays in use"
                        );
                        told = reason;
                    }
                    tokio::time::sleep(RETRY_INTERVAL).await;
                }
            }
        }
    }

    /// A tenth of the certificate's life, at most [`LOOK_INTERVAL`].
    fn pause(&self) -> Duration {
        let (ends, begins) = self.life().unwrap_or((0, 0));
        let tenth = u64::try_from((ends - begins) / 10).unwrap_or(0);
        Duration::from_secs(tenth.max(1)).min(LOOK_INTERVAL)
    }

    fn life(&self) -> Option<(i64, i64)> {
        self.identity.life_of(&self.settings.name, UnixTime::now()).ok()
    }

    /// A certificate that is not trusted (any more) is due, too.
    fn is_due(&self) -> bool {
        self.life().is_none_or(|(ends, begins)| is_due(ends, begins, now_s()))
    }

    async fn follow_authorities(&self) -> Result<(), String> {
        let bundle = bundle(&self.client).await?;
        let (_, certificate, key) = read(&self.settings.dir)?;
        if self.identity.replace(bundle.as_bytes(), certificate.as_bytes(), key.as_bytes())? {
            write(&self.settings.dir, BUNDLE_FILE, bundle.as_bytes()).map_err(|e| e.to_string())?;
            tracing::info!(
                authorities = bundle.matches("BEGIN").count(),
                "the authorities that are trusted changed"
            );
        }
        Ok(())
    }

    async fn renew(&self) -> Result<(), String> {
        let (ca, certificate, key) = request(&self.client, &self.settings).await?;
        store(&self.settings.dir, &ca, &certificate, &key).map_err(|e| e.to_string())?;
        self.identity.replace(ca.as_bytes(), certificate.as_bytes(), key.as_bytes())?;
        tracing::info!(name = self.settings.name, "the certificate is renewed; new connections use it");
        Ok(())
    }
}

/// Two thirds of its life are over.
fn is_due(ends_s: i64, begins_s: i64, now_s: i64) -> bool {
    now_s >= ends_s - (ends_s - begins_s) / 3
}

/// The folder's certificate, if it is trusted, ours, and not due.
fn kept(settings: &HolderSettings) -> Result<TlsIdentity, String> {
    let (ca, certificate, key) = read(&settings.dir)?;
    let identity = TlsIdentity::from_pem(ca.as_bytes(), certificate.as_bytes(), key.as_bytes())?;
    // One that is due is taken: it is renewed beside the work.
    identity.life_of(&settings.name, UnixTime::now())?;
    Ok(identity)
}

/// Authorities, certificate and key.
type Texts = (String, String, Zeroizing<String>);

/// Asks for a certificate for a new key, and waits for it.
async fn request(client: &KubernetesClient, settings: &HolderSettings) -> Result<Texts, String> {
    let (key, pem) = {
        let key = KeyPair::generate().map_err(|e| e.to_string())?;
        let mut params = CertificateParams::new(vec![settings.name.clone()]).map_err(|e| e.to_string())?;
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, settings.name.clone());
        let request = params.serialize_request(&key).map_err(|e| e.to_string())?;
        (Zeroizing::new(key.serialize_pem()), request.pem().map_err(|e| e.to_string())?)
    };
    // Never used twice, so an answer is always one to this request.
    let name = format!("holdfast-{}-{:016x}", settings.name, rand::random::<u64>());
    let life_s = seconds(settings.life);
    let object = CertificateSigningRequest {
        metadata: ObjectMeta { name: Some(name.clone()), ..ObjectMeta::default() },
        spec: CertificateSigningRequestSpec {
            request: ByteString(pem.into_bytes()),
            signer_name: settings.signer.clone(),
            usages: Some(USAGES.map(str::to_owned).to_vec()),
            expiration_seconds: i32::try_from(life_s).ok().filter(|_| life_s >= EXPIRATION_S_MIN),
            ..CertificateSigningRequestSpec::default()
        },
        status: None,
    };
    client.post(Deadline::new(), &name, &object).await.map_err(|e| format!("asking: {e}"))?;
    let certificate = tokio::time::timeout(ANSWER_TIMEOUT, answer(client, &name))
        .await
        .unwrap_or_else(|_| Err(format!("request {name} was not answered within {ANSWER_TIMEOUT:?}")))?;
    let ca = bundle(client).await?;
    let identity = TlsIdentity::from_pem(ca.as_bytes(), certificate.as_bytes(), key.as_bytes())?;
    identity.life_of(&settings.name, UnixTime::now()).map_err(|e| format!("request {name}: {e}"))?;
    Ok((ca, certificate, key))
}

async fn answer(client: &KubernetesClient, name: &str) -> Result<String, String> {
    loop {
        let request: CertificateSigningRequest = match client.get(Deadline::new(), name).await {
            Ok(request) => request,
            Err(CallError::Unknown(_)) => {
                tokio::time::sleep(ANSWER_INTERVAL).await;
                continue;
            }
            Err(error) => return Err(format!("request {name}: {error}")),
        };
        let status = request.status.unwrap_or_default();
        let mut conditions = status.conditions.iter().flatten();
        if let Some(no) = conditions.find(|condition| matches!(condition.type_.as_str(), "Denied" | "Failed"))
        {
            return Err(format!("it is refused: {}", no.message.as_deref().unwrap_or_default()));
        }
        if let Some(ByteString(pem)) = status.certificate {
            return String::from_utf8(pem).map_err(|_| format!("request {name} was answered with no text"));
        }
        tokio::time::sleep(ANSWER_INTERVAL).await;
    }
}

async fn bundle(client: &KubernetesClient) -> Result<String, String> {
    let map: ConfigMap = client
        .get(Deadline::new(), AUTHORITY_NAME)
        .await
        .map_err(|e| format!("the authorities (ConfigMap {AUTHORITY_NAME}): {e}"))?;
    let found = map.data.and_then(|mut data| data.remove(BUNDLE_KEY)).unwrap_or_default();
    if found.is_empty() {
        Err(format!("the ConfigMap {AUTHORITY_NAME} has no {BUNDLE_KEY}"))
    } else {
        Ok(found)
    }
}

fn read(dir: &Path) -> Result<Texts, String> {
    let text = |name: &str| {
        let path = dir.join(name);
        fs::read_to_string(&path).map_err(|e| format!("{}: {e}", path.display()))
    };
    let both = Zeroizing::new(text(IDENTITY_FILE)?);
    let begins = both.find("-----BEGIN CERTIFICATE").ok_or("there is no certificate beside the key")?;
    let (key, certificate) = both.split_at(begins);
    Ok((text(BUNDLE_FILE)?, certificate.to_owned(), Zeroizing::new(key.to_owned())))
}

/// The authorities first: whoever reads between the two trusts more than before, never less.
fn store(dir: &Path, ca: &str, certificate: &str, key: &str) -> io::Result<()> {
    write(dir, BUNDLE_FILE, ca.as_bytes())?;
    let both = Zeroizing::new(format!("{key}{certificate}"));
    write(dir, IDENTITY_FILE, both.as_bytes())
}

/// Whole or not at all: aside, with mode 0600 from the first moment, and then renamed.
fn write(dir: &Path, name: &str, content: &[u8]) -> io::Result<()> {
    let fresh = dir.join(format!("{name}.new"));
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&fresh)?;
    file.write_all(content)?;
    file.sync_all()?;
    fs::rename(&fresh, dir.join(name))?;
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use rcgen::{BasicConstraints, IsCa, Issuer};

    use super::*;

    /// Authority, and a certificate for `name` with its key; the latter lives from `begins` to `ends` seconds from now.
    fn mk_texts(name: &str, begins: i64, ends: i64) -> Texts {
        let time = |offset: i64| time::OffsetDateTime::from_unix_timestamp(now_s() + offset).unwrap();
        let ca_key = KeyPair::generate().unwrap();
        let mut ca = CertificateParams::new(Vec::new()).unwrap();
        ca.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let ca_pem = ca.self_signed(&ca_key).unwrap().pem();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        (params.not_before, params.not_after) = (time(begins), time(ends));
        let leaf = params.signed_by(&key, &Issuer::new(ca, ca_key)).unwrap();
        (ca_pem, leaf.pem(), Zeroizing::new(key.serialize_pem()))
    }

    #[test]
    fn what_was_stored_is_used_again_by_its_owner_while_it_holds() {
        let dir = tempfile::tempdir().unwrap();
        let settings = |name: &str| HolderSettings {
            name: name.to_owned(),
            dir: dir.path().to_owned(),
            signer: super::super::OWN_SIGNER.to_owned(),
            life: Duration::from_secs(60),
        };
        assert!(kept(&settings("node-a")).is_err(), "there is nothing yet");
        let (ca, certificate, key) = mk_texts("node-a", -60, 60);
        store(dir.path(), &ca, &certificate, &key).unwrap();
        assert!(kept(&settings("node-a")).is_ok());
        assert!(kept(&settings("node-b")).unwrap_err().contains("names node-a"));
        let mode = |name: &str| fs::metadata(dir.path().join(name)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(IDENTITY_FILE), 0o600);
        // A crash while it was written leaves the old one.
        fs::write(dir.path().join("identity.pem.new"), "-----BEGIN").unwrap();
        assert!(kept(&settings("node-a")).is_ok());
        store(dir.path(), &ca, &certificate, &key).unwrap();

        let (_, other, _) = mk_texts("node-a", -60, 60);
        store(dir.path(), &ca, &other, &key).unwrap();
        assert!(kept(&settings("node-a")).is_err(), "a key of another certificate");
        let (ca, certificate, key) = mk_texts("node-a", -60, -1);
        store(dir.path(), &ca, &certificate, &key).unwrap();
        assert!(kept(&settings("node-a")).is_err(), "it has ended");
    }

    #[test]
    fn a_certificate_is_due_after_two_thirds_of_its_life() {
        assert!(!is_due(300, 0, 199));
        assert!(is_due(300, 0, 200));
        assert!(is_due(300, 0, 301));
    }
}
