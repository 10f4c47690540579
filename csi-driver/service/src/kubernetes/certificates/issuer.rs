//! The issuer's loop: keeps the authorities, answers requests.

use std::collections::BTreeMap;
use std::time::Duration;

use k8s_openapi::ByteString;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::core::ObjectMeta;

use super::adopted::{self, Adopted};
use super::authority::{Authorities, Lives};
use super::judge::{Granted, Rules, judge};
use super::{AUTHORITY_NAME, OWN_SIGNER, now_s, seconds};
use crate::kubernetes::client::{CallError, Deadline, KubernetesClient};

/// From one look at the requests to the next.
const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// After a failure.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);
/// Requests answered in one look; the rest is left to the next one.
const ANSWERED_MAX: usize = 100;

/// Settings of the issuer.
#[derive(Debug, Clone)]
pub struct IssuerSettings {
    /// The signer that requests name. For another one than [`OWN_SIGNER`] requests are approved only: somebody else signs.
    pub signer: String,
    /// With another signer: the Secret whose `ca.crt` holds its authorities' certificates, which are published in the ConfigMap
    /// [`AUTHORITY_NAME`]. `None`: somebody else publishes them there.
    pub authority_secret: Option<String>,
    /// Longest life of a certificate.
    pub life: Duration,
    /// Life of an authority.
    pub authority_life: Duration,
    /// From an authority's making to its first signature.
    pub overlap: Duration,
}

/// Judges, approves and signs requests of our signer, and keeps the authorities; it does not end. Several may run at the same
/// time. Cancellation safe.
pub async fn issue(client: KubernetesClient, settings: IssuerSettings) {
    let mut told = String::new();
    loop {
        match look(&client, &settings).await {
            Ok(()) => told.clear(),
            Err(error) => {
                if error != told {
                    tracing::warn!(error, "no certificates are given for now");
                    told = error;
                }
                tokio::time::sleep(RETRY_INTERVAL).await;
            }
        }
        tokio::time::sleep(LOOK_INTERVAL).await;
    }
}

async fn look(client: &KubernetesClient, settings: &IssuerSettings) -> Result<(), String> {
    let (authorities, adopted) = match (settings.signer.as_str(), &settings.authority_secret) {
        (OWN_SIGNER, _) => {
            let authorities = keep_authorities(client, settings).await?;
            publish(client, &authorities.bundle()).await?;
            (Some(authorities), Ok(()))
        }
        // What is published already holds: requests are answered whatever the Secret is like.
        (_, Some(secret)) => (None, adopt(client, secret, settings).await),
        (_, None) => (None, Ok(())),
    };
    let selector = format!("&fieldSelector=spec.signerName%3D{}", settings.signer.replace('/', "%2F"));
    let requests: Vec<CertificateSigningRequest> =
        client.list_where(Deadline::new(), &selector).await.map_err(|e| format!("requests: {e}"))?;
    let open = requests.into_iter().filter(|request| is_open(request, authorities.is_some()));
    let rules =
        Rules { signer: &settings.signer, namespace: client.namespace(), life_s_max: seconds(settings.life) };
    for request in open.take(ANSWERED_MAX) {
        let name = request.metadata.name.clone().unwrap_or_default();
        match answer(client, request, &rules, authorities.as_ref()).await {
            // Somebody else was first, or it is gone: the next look tells.
            Ok(()) | Err(CallError::Moved | CallError::Missing) => {}
            Err(error) => return Err(format!("request {name}: {error}")),
        }
    }
    adopted
}

/// Whether there is something left to do.
fn is_open(request: &CertificateSigningRequest, signs: bool) -> bool {
    let is = |kind: &str| conditions(request).iter().any(|condition| condition.type_ == kind);
    let has_certificate = request.status.as_ref().is_some_and(|status| status.certificate.is_some());
    !is("Denied") && !is("Failed") && !has_certificate && (signs || !is("Approved"))
}

fn conditions(request: &CertificateSigningRequest) -> &[CertificateSigningRequestCondition] {
    request.status.as_ref().and_then(|status| status.conditions.as_deref()).unwrap_or_default()
}

/// Approves or denies, and signs what is approved. The judgement is made anew before the signature: a person may have approved.
async fn answer(
    client: &KubernetesClient,
    request: CertificateSigningRequest,
    rules: &Rules<'_>,
    authorities: Option<&Authorities>,
) -> Result<(), CallError> {
    let name = request.metadata.name.clone().unwrap_or_default();
    let is_approved = conditions(&request).iter().any(|condition| condition.type_ == "Approved");
    let granted = judge(&request, rules, now_s());
    let approved = match (&granted, is_approved) {
        (Ok(granted), false) => {
            let message = format!("its maker runs on the node or is the controller: {}", granted.name);
            conclude(client, request, "/approval", "Approved", &message).await?
        }
        (Ok(_), true) => request,
        (Err(reason), _) => {
            tracing::warn!(request = name, reason, "a certificate is refused");
            let (part, kind) = if is_approved { ("/status", "Failed") } else { ("/approval", "Denied") };
            return conclude(client, request, part, kind, reason).await.map(drop);
        }
    };
    let (Some(authorities), Ok(granted)) = (authorities, granted) else { return Ok(()) };
    sign(client, approved, authorities, &granted).await
}

/// Adds a condition.
async fn conclude(
    client: &KubernetesClient,
    mut request: CertificateSigningRequest,
    part: &str,
    kind: &str,
    message: &str,
) -> Result<CertificateSigningRequest, CallError> {
    let name = request.metadata.name.clone().unwrap_or_default();
    let condition = CertificateSigningRequestCondition {
        type_: kind.to_owned(),
        status: "True".to_owned(),
        reason: Some("HoldfastIssuer".to_owned()),
        message: Some(message.to_owned()),
        ..CertificateSigningRequestCondition::default()
    };
    request.status.get_or_insert_default().conditions.get_or_insert_default().push(condition);
    client.put_part(Deadline::new(), &name, part, &request).await
}

async fn sign(
    client: &KubernetesClient,
    mut request: CertificateSigningRequest,
    authorities: &Authorities,
    granted: &Granted,
) -> Result<(), CallError> {
    let name = request.metadata.name.clone().unwrap_or_default();
    match authorities.sign(granted, now_s()) {
        Ok(pem) => {
            request.status.get_or_insert_default().certificate = Some(ByteString(pem.into_bytes()));
            client.put_part(Deadline::new(), &name, "/status", &request).await?;
            tracing::info!(
                request = name,
                name = granted.name,
                life_s = granted.life_s,
                "a certificate is given"
            );
            Ok(())
        }
        Err(reason) => conclude(client, request, "/status", "Failed", &reason).await.map(drop),
    }
}

/// Reads the authorities, makes the first, and does the steps that are due. What it gives is in the Secret.
async fn keep_authorities(
    client: &KubernetesClient,
    settings: &IssuerSettings,
) -> Result<Authorities, String> {
    let lives =
        Lives { certificate: settings.life, authority: settings.authority_life, overlap: settings.overlap };
    let said = |error: CallError| format!("the Secret {AUTHORITY_NAME}: {error}");
    let mut secret = match client.get::<Secret>(Deadline::new(), AUTHORITY_NAME).await {
        Ok(secret) => secret,
        Err(CallError::Missing) => {
            let first = Authorities::new(&lives, now_s())?;
            let secret = Secret { data: Some(first.to_data()), metadata: meta(), ..Secret::default() };
            match client.post(Deadline::new(), AUTHORITY_NAME, &secret).await {
                Ok(made) => {
                    tracing::info!("the first authority is made");
                    made
                }
                // A twin was faster: its authority is the one.
                Err(CallError::Taken) => client.get(Deadline::new(), AUTHORITY_NAME).await.map_err(said)?,
                Err(error) => return Err(said(error)),
            }
        }
        Err(error) => return Err(said(error)),
    };
    loop {
        let unusable = |reason: String| {
            format!(
                "the Secret {AUTHORITY_NAME} cannot be used: {reason}; restore it, or remove it to begin anew"
            )
        };
        let mut authorities =
            Authorities::from_data(secret.data.as_ref().unwrap_or(&BTreeMap::new())).map_err(unusable)?;
        let Some(step) = authorities.step(&lives, now_s())? else { return Ok(authorities) };
        secret.data = Some(authorities.to_data());
        secret = match client.put(Deadline::new(), AUTHORITY_NAME, &secret).await {
            Ok(written) => {
                tracing::info!("{step}");
                written
            }
            Err(CallError::Moved) => client.get(Deadline::new(), AUTHORITY_NAME).await.map_err(said)?,
            Err(error) => return Err(said(error)),
        };
    }
}

/// Publishes what everybody is to trust. Before anything is signed: a new authority is in it an overlap earlier.
async fn publish(client: &KubernetesClient, bundle: &str) -> Result<(), String> {
    publish_with(client, |_| Ok(Adopted { bundle: bundle.to_owned(), since_s: None })).await
}

/// Publishes the authorities of another signer.
async fn adopt(client: &KubernetesClient, secret: &str, settings: &IssuerSettings) -> Result<(), String> {
    let said = |reason: String| format!("the Secret {secret} with the signer's authorities: {reason}");
    let read: Secret = client.get(Deadline::new(), secret).await.map_err(|error| said(error.to_string()))?;
    let text = read.data.and_then(|mut data| data.remove(adopted::SECRET_KEY)).unwrap_or_default();
    let text = String::from_utf8(text.0).map_err(|_| said(format!("{} is no text", adopted::SECRET_KEY)))?;
    let kept_s = seconds(settings.life).saturating_add(seconds(settings.overlap));
    publish_with(client, |before| adopted::adopt(&text, before, kept_s, now_s()).map_err(said)).await
}

/// Writes the ConfigMap if `choose` makes something else of what is in it.
async fn publish_with(
    client: &KubernetesClient,
    choose: impl Fn(&Adopted) -> Result<Adopted, String>,
) -> Result<(), String> {
    let said = |error: CallError| format!("the ConfigMap {AUTHORITY_NAME}: {error}");
    let written = match client.get::<ConfigMap>(Deadline::new(), AUTHORITY_NAME).await {
        Ok(mut found) => {
            let before = Adopted::of(&found);
            let chosen = choose(&before)?;
            if chosen == before {
                return Ok(());
            }
            chosen.write_to(&mut found);
            tracing::info!(
                authorities = chosen.bundle.matches("BEGIN").count(),
                "the authorities are published"
            );
            client.put(Deadline::new(), AUTHORITY_NAME, &found).await
        }
        Err(CallError::Missing) => {
            let mut map = ConfigMap { metadata: meta(), ..ConfigMap::default() };
            choose(&Adopted::default())?.write_to(&mut map);
            client.post(Deadline::new(), AUTHORITY_NAME, &map).await
        }
        Err(error) => return Err(said(error)),
    };
    match written {
        // A twin was faster; the next look compares again, and nothing is signed until then.
        Err(CallError::Taken | CallError::Moved) => {
            Err("the ConfigMap was changed by another process".to_owned())
        }
        other => other.map(drop).map_err(said),
    }
}

fn meta() -> ObjectMeta {
    let labels = BTreeMap::from([("app.kubernetes.io/part-of".to_owned(), "holdfast".to_owned())]);
    ObjectMeta { name: Some(AUTHORITY_NAME.to_owned()), labels: Some(labels), ..ObjectMeta::default() }
}
