//! What Prometheus reads: counters that the engine and the flow log keep, and gauges that are asked for at each scrape, as
//! OpenMetrics text over plain HTTP. Off unless an address is given. Nobody is asked who they are: bind it to an address that
//! only those reach who may know the names of policies.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use holdfast_dataplane::{Applied, Dataplane};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode, header};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{Metric, Registry};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tracing::warn;

use crate::engine::EngineHandle;
use crate::objects::ObjectKey;

/// Scrapes at a time; one more is closed at once.
const CONNECTIONS_MAX: usize = 8;
/// Longest time for a scrape.
const SCRAPE_MAX: Duration = Duration::from_secs(10);
/// After a failed accept (no descriptor is free) the next one waits.
const ACCEPT_PAUSE: Duration = Duration::from_secs(1);
/// Refused objects that are told by name; more are only counted.
const REFUSED_MAX: usize = 100;
/// Changes from 0.25 ms on, doubling, to four seconds.
const CHANGE_BUCKETS: (f64, f64, u16) = (0.000_25, 2.0, 15);
const CONTENT_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// An object by name.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct ObjectLabels {
    kind: &'static str,
    namespace: String,
    name: String,
}

/// One word that tells apart.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct StateLabels {
    state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct DeniedLabels {
    by: &'static str,
}

/// What the engine knows at a scrape.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Gauges {
    /// Policies that the kernel enforces for pods here.
    pub in_force: usize,
    /// Policies that select no pod here.
    pub idle: usize,
    /// Policies whose content the kernel does not have.
    pub unapplied: usize,
    /// Addresses that several live pods claim.
    pub contested: usize,
}

/// The metrics of one agent.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    object_problems: Gauge,
    refused: Family<ObjectLabels, Gauge>,
    commits: Counter,
    elements: Counter,
    revocations: Counter,
    mended: Counter,
    failures: Counter,
    changes: Histogram,
    policies: Family<StateLabels, Gauge>,
    contested: Gauge,
    flow_events: Counter,
    flow_lost: Counter,
    denied: Family<DeniedLabels, Counter>,
}

impl Metrics {
    pub(crate) fn new() -> Arc<Self> {
        let (first, factor, count) = CHANGE_BUCKETS;
        let changes = Histogram::new(exponential_buckets(first, factor, count));
        let mut registry = Registry::with_prefix("holdfast_policy");
        let all = &mut registry;
        let problems = "Problems of objects and of the files they are in";
        let refused =
            "Objects that are wrong, by name, 100 at most; their last good state counts, if there is one";
        let elements = "Elements that were added to or removed from the kernel";
        let revocations = "Advances of the policy revision: live connections are judged again";
        let mended = "Times that somebody else's changes to our tables were undone";
        let failures = "Times that the rules could not be applied; those of before stay in force";
        let change = "Time from the notice of a change until it is in the kernel";
        let lost = "Events that the kernel logged and nobody read in time";
        let denied = "Packets that were dropped; the flow log tells 100 of them per second";
        Arc::new(Self {
            object_problems: register(all, "object_problems", problems, Gauge::default()),
            refused: register(all, "object_refused", refused, Family::default()),
            commits: register(all, "commits", "Transactions that changed the rules", Counter::default()),
            elements: register(all, "elements_written", elements, Counter::default()),
            revocations: register(all, "revocations", revocations, Counter::default()),
            mended: register(all, "mended", mended, Counter::default()),
            failures: register(all, "failed_transactions", failures, Counter::default()),
            changes: register(all, "change_seconds", change, changes),
            policies: register(all, "policies", "Policies, by how they stand here", Family::default()),
            contested: register(
                all,
                "contested_addresses",
                "Addresses that several live pods claim",
                Gauge::default(),
            ),
            flow_events: register(
                all,
                "flow_events",
                "Events of the flow log that were read",
                Counter::default(),
            ),
            flow_lost: register(all, "flow_events_lost", lost, Counter::default()),
            denied: register(all, "denied_packets", denied, Family::default()),
            registry,
        })
    }

    /// The rules were applied. `noticed_ago`: the time since the change was noticed.
    pub(crate) fn note_applied(&self, applied: &Applied, noticed_ago: Duration) {
        if applied.elements > 0 || applied.mended {
            self.commits.inc();
            self.elements.inc_by(u64::try_from(applied.elements).unwrap_or(u64::MAX));
            self.mended.inc_by(u64::from(applied.mended));
            self.changes.observe(noticed_ago.as_secs_f64());
        }
        if applied.revoked {
            self.note_revocation();
        }
    }

    /// The policy revision was advanced.
    pub(crate) fn note_revocation(&self) {
        self.revocations.inc();
    }

    /// The rules could not be applied.
    pub(crate) fn note_failure(&self) {
        self.failures.inc();
    }

    /// What is wrong with objects, from now on.
    pub(crate) fn note_objects(&self, problems: usize, refused: &BTreeMap<ObjectKey, String>) {
        self.object_problems.set(as_gauge(problems));
        self.refused.clear();
        for key in refused.keys().take(REFUSED_MAX) {
            let labels = ObjectLabels {
                kind: key.kind,
                namespace: key.name.namespace.clone(),
                name: key.name.name.clone(),
            };
            self.refused.get_or_create(&labels).set(1);
        }
    }

    /// Events of the flow log, and how many were lost before them.
    pub(crate) fn note_flows(&self, events: usize, lost: u64) {
        self.flow_events.inc_by(u64::try_from(events).unwrap_or(u64::MAX));
        self.flow_lost.inc_by(lost);
    }

    /// Events that a slow reader lost.
    pub(crate) fn note_flows_lost(&self, lost: u64) {
        self.flow_lost.inc_by(lost);
    }

    fn note_gauges(&self, gauges: Gauges) {
        let states = [("in_force", gauges.in_force), ("idle", gauges.idle), ("unapplied", gauges.unapplied)];
        for (state, count) in states {
            self.policies.get_or_create(&StateLabels { state }).set(as_gauge(count));
        }
        self.contested.set(as_gauge(gauges.contested));
    }

    /// Packets dropped by policy and by the source pin; the kernel counts them.
    fn note_denied(&self, by_policy: u64, by_pin: u64) {
        for (by, count) in [("policy", by_policy), ("pin", by_pin)] {
            let counter = self.denied.get_or_create(&DeniedLabels { by });
            counter.inner().store(count, std::sync::atomic::Ordering::Relaxed);
        }
    }

    fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

/// Adds a metric and gives it back.
fn register<M: Metric + Clone>(registry: &mut Registry, name: &str, help: &str, metric: M) -> M {
    registry.register(name, help, metric.clone());
    metric
}

fn as_gauge(count: usize) -> i64 {
    i64::try_from(count).unwrap_or(i64::MAX)
}

/// Answers scrapes.
#[derive(Clone)]
pub(crate) struct Exporter {
    pub(crate) metrics: Arc<Metrics>,
    pub(crate) engine: EngineHandle,
    pub(crate) dataplane: Arc<Dataplane>,
}

impl Exporter {
    /// Serves `GET /metrics` until it is dropped.
    pub(crate) async fn serve(self, listener: TcpListener) {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let connection = match listener.accept().await {
                Ok((connection, _)) => connection,
                Err(error) => {
                    warn!(%error, "cannot accept a connection for metrics");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(place) = Arc::clone(&places).try_acquire_owned() else { continue };
            let exporter = self.clone();
            tokio::spawn(async move {
                let _place = place;
                // Whoever asked may be gone, or too slow: he asks again.
                let _ = tokio::time::timeout(SCRAPE_MAX, exporter.serve_one(connection)).await;
            });
        }
    }

    async fn serve_one(&self, connection: TcpStream) -> hyper::Result<()> {
        let answer = service_fn(async |request| Ok::<_, Infallible>(self.answer(&request).await));
        let mut server = http1::Builder::new();
        server.timer(TokioTimer::new()).keep_alive(false);
        server.serve_connection(TokioIo::new(connection), answer).await
    }

    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if request.uri().path() != "/metrics" {
            return plain(StatusCode::NOT_FOUND, "there is only /metrics\n");
        }
        if request.method() != Method::GET {
            return plain(StatusCode::METHOD_NOT_ALLOWED, "only GET\n");
        }
        // What cannot be told now keeps its last value.
        if let Ok(gauges) = self.engine.gauges().await {
            self.metrics.note_gauges(gauges);
        }
        if let Ok((by_policy, by_pin)) = self.dataplane.denied().await {
            self.metrics.note_denied(by_policy, by_pin);
        }
        match self.metrics.text() {
            Ok(text) => {
                let mut response = plain(StatusCode::OK, "");
                *response.body_mut() = Full::from(text);
                let kind = header::HeaderValue::from_static(CONTENT_TYPE);
                response.headers_mut().insert(header::CONTENT_TYPE, kind);
                response
            }
            Err(_) => plain(StatusCode::INTERNAL_SERVER_ERROR, "the metrics cannot be written\n"),
        }
    }
}

fn plain(status: StatusCode, text: &'static str) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(text));
    *response.status_mut() = status;
    response
}

#[cfg(test)]
mod tests {
    use holdfast_net_core::objects::ObjectName;

    use super::*;

    fn line<'a>(text: &'a str, start: &str) -> &'a str {
        text.lines().find(|line| line.starts_with(start)).unwrap_or_else(|| panic!("no {start} in {text}"))
    }

    #[test]
    fn what_happened_is_counted_and_a_pass_that_changed_nothing_is_none() {
        let metrics = Metrics::new();
        metrics.note_applied(&Applied::default(), Duration::from_secs(1));
        let applied = Applied { elements: 7, revoked: true, mended: true };
        metrics.note_applied(&applied, Duration::from_millis(2));
        metrics.note_revocation();
        metrics.note_failure();
        metrics.note_flows(5, 2);
        metrics.note_flows_lost(3);
        metrics.note_denied(11, 1);
        metrics.note_gauges(Gauges { in_force: 4, idle: 3, unapplied: 2, contested: 1 });
        let text = metrics.text().unwrap();
        for wanted in [
            "holdfast_policy_commits_total 1",
            "holdfast_policy_elements_written_total 7",
            "holdfast_policy_revocations_total 2",
            "holdfast_policy_mended_total 1",
            "holdfast_policy_failed_transactions_total 1",
            "holdfast_policy_change_seconds_count 1",
            "holdfast_policy_change_seconds_bucket{le=\"0.001\"} 0",
            "holdfast_policy_change_seconds_bucket{le=\"0.002\"} 1",
            "holdfast_policy_flow_events_total 5",
            "holdfast_policy_flow_events_lost_total 5",
            "holdfast_policy_denied_packets_total{by=\"policy\"} 11",
            "holdfast_policy_policies{state=\"in_force\"} 4",
            "holdfast_policy_policies{state=\"idle\"} 3",
            "holdfast_policy_policies{state=\"unapplied\"} 2",
            "holdfast_policy_contested_addresses 1",
        ] {
            assert_eq!(line(&text, wanted), wanted);
        }
        assert!(text.ends_with("# EOF\n"));
    }

    #[test]
    fn refused_objects_are_told_by_name_as_long_as_they_are_and_no_more_than_fit() {
        let metrics = Metrics::new();
        let refused = |count: usize| -> BTreeMap<ObjectKey, String> {
            let key = |n: usize| ObjectKey {
                kind: "NetworkPolicy",
                name: ObjectName::new("shop", &format!("p{n:04}")),
            };
            (0..count).map(|n| (key(n), String::new())).collect()
        };
        metrics.note_objects(3, &refused(1));
        let text = metrics.text().unwrap();
        let named =
            "holdfast_policy_object_refused{kind=\"NetworkPolicy\",namespace=\"shop\",name=\"p0000\"} 1";
        assert_eq!(line(&text, named), named);
        assert_eq!(line(&text, "holdfast_policy_object_problems "), "holdfast_policy_object_problems 3");
        metrics.note_objects(REFUSED_MAX + 5, &refused(REFUSED_MAX + 5));
        let told = |text: &str| text.matches("holdfast_policy_object_refused{").count();
        assert_eq!(told(&metrics.text().unwrap()), REFUSED_MAX);
        metrics.note_objects(0, &BTreeMap::new());
        assert_eq!(told(&metrics.text().unwrap()), 0);
    }
}
