//! One controller at a time, by an object of kind `Lease`.
//!
//! Two controllers at once lose no data: whatever either changes is a compare-and-swap. But both would sweep, and promise the
//! same space twice. So one holds the lease and renews it; another takes it over once it has seen no renewal for as long as
//! the lease says, by its own steady clock, and not by the times that are written in it. A holder that could not renew for
//! a shorter time counts its lease as lost, also by its own steady clock, before anybody can take it; its process ends then.

use std::time::Duration;

use k8s_openapi::api::coordination::v1::{Lease, LeaseSpec};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::MicroTime;
use k8s_openapi::jiff::Timestamp;
use kube::core::ObjectMeta;
use tokio::time::Instant;

use super::client::{CallError, Deadline, KubernetesClient};

/// Name of the object, in the namespace of the controller's service account.
pub const LEASE_NAME: &str = "holdfast-controller";
/// A holder that is not seen to renew for this long has lost the lease to the first who wants it.
const LEASE_DURATION: Duration = Duration::from_secs(15);
/// A holder that could not renew for this long says itself that it has lost it.
const RENEW_DEADLINE: Duration = Duration::from_secs(10);
/// From one try to the next.
const RETRY_INTERVAL: Duration = Duration::from_secs(2);

/// The lease, held.
pub struct ControllerLease {
    client: KubernetesClient,
    identity: String,
    /// When the request was begun that renewed it last.
    renewed: Instant,
}

/// What was seen of another one's lease, and since when.
type Seen = Option<(LeaseSpec, Instant)>;

impl ControllerLease {
    /// Waits until this process holds the lease, for as long as it takes. Cancellation safe: a lease that was just taken is
    /// given up by not being renewed.
    pub async fn acquire(client: KubernetesClient, identity: String) -> Self {
        let (mut seen, mut told) = (None, String::new());
        loop {
            let begun = Instant::now();
            let waits_for = match claim(&client, &identity, &mut seen).await {
                Ok(None) => {
                    tracing::info!(identity, "this controller holds the lease");
                    return Self { client, identity, renewed: begun };
                }
                Ok(Some(holder)) => format!("{holder} holds it"),
                Err(error) => error.to_string(),
            };
            if told != waits_for {
                tracing::info!(reason = waits_for, "waiting for the controller's lease {LEASE_NAME}");
                told = waits_for;
            }
            tokio::time::sleep(RETRY_INTERVAL).await;
        }
    }

    /// Renews it until it is lost, and says why then. Dropping the future leaves the lease to run out.
    pub async fn hold(&mut self) -> String {
        let mut last = "another process took it".to_owned();
        loop {
            tokio::time::sleep(RETRY_INTERVAL).await;
            let begun = Instant::now();
            let mut seen = None;
            match tokio::time::timeout_at(
                self.renewed + RENEW_DEADLINE,
                claim(&self.client, &self.identity, &mut seen),
            )
            .await
            {
                Ok(Ok(None)) => self.renewed = begun,
                Ok(Ok(Some(holder))) => return format!("the controller's lease was lost: {holder} took it"),
                Ok(Err(error)) => last = error.to_string(),
                Err(_) => {}
            }
            if self.renewed.elapsed() >= RENEW_DEADLINE {
                return format!("the controller's lease could not be renewed for {RENEW_DEADLINE:?}: {last}");
            }
        }
    }

    /// Gives it up, so that the next one need not wait for its end. For a process that has stopped all work.
    pub async fn release(self) {
        let deadline = Deadline::new();
        let Ok(mut lease) = self.client.get::<Lease>(deadline, LEASE_NAME).await else { return };
        let Some(spec) =
            lease.spec.as_mut().filter(|spec| spec.holder_identity.as_ref() == Some(&self.identity))
        else {
            return;
        };
        spec.holder_identity = None;
        if let Err(error) = self.client.put(deadline, LEASE_NAME, &lease).await {
            tracing::debug!(%error, "the lease runs out by itself");
        }
    }
}

/// Takes or renews the lease; gives the holder if it is another one's.
async fn claim(
    client: &KubernetesClient,
    identity: &str,
    seen: &mut Seen,
) -> Result<Option<String>, CallError> {
    let deadline = Deadline::new();
    let mut lease = match client.get::<Lease>(deadline, LEASE_NAME).await {
        Ok(lease) => lease,
        Err(CallError::Missing) => {
            let metadata = ObjectMeta { name: Some(LEASE_NAME.to_owned()), ..ObjectMeta::default() };
            let lease = Lease { metadata, spec: Some(next(identity, &LeaseSpec::default())) };
            return match client.post(deadline, LEASE_NAME, &lease).await {
                Ok(_) => Ok(None),
                Err(CallError::Taken) => Ok(Some("another process".to_owned())),
                Err(error) => Err(error),
            };
        }
        Err(error) => return Err(error),
    };
    let found = lease.spec.take().unwrap_or_default();
    let holder = found.holder_identity.clone().filter(|holder| !holder.is_empty() && holder != identity);
    if let Some(holder) = holder {
        let since = match seen {
            Some((last, since)) if *last == found => *since,
            _ => seen.insert((found.clone(), Instant::now())).1,
        };
        let seconds = u64::try_from(found.lease_duration_seconds.unwrap_or(0)).unwrap_or(0);
        if since.elapsed() < Duration::from_secs(seconds).max(LEASE_DURATION) {
            return Ok(Some(holder));
        }
    }
    lease.spec = Some(next(identity, &found));
    match client.put(deadline, LEASE_NAME, &lease).await {
        Ok(_) => Ok(None),
        // Somebody else was first, or removed it; or this very request was sent twice on its way.
        Err(CallError::Moved | CallError::Missing) => {
            Err(CallError::Unknown("the lease was changed by another process meanwhile".to_owned()))
        }
        Err(error) => Err(error),
    }
}

/// The lease in this process's hand.
fn next(identity: &str, found: &LeaseSpec) -> LeaseSpec {
    let now = MicroTime(Timestamp::now());
    let same = found.holder_identity.as_deref() == Some(identity);
    LeaseSpec {
        holder_identity: Some(identity.to_owned()),
        lease_duration_seconds: i32::try_from(LEASE_DURATION.as_secs()).ok(),
        acquire_time: if same { found.acquire_time.clone() } else { Some(now.clone()) },
        renew_time: Some(now),
        lease_transitions: Some(found.lease_transitions.unwrap_or(0) + i32::from(!same)),
        ..LeaseSpec::default()
    }
}
