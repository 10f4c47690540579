//! The flow log for people: reads the kernel's log group while somebody wants it, names pods and deciding policies, and
//! hands every event to every reader.
//!
//! ```text
//! kernel --FlowLog--> Feed::run --names, explain--> bounded broadcast --> one filter per reader
//! ```
//!
//! Nothing waits for a reader: one that is slow loses events and is told how many. Nothing waits for the log either:
//! without readers the group is not even bound, and questions to the engine take at most a share of the time.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::Arc;
use std::time::{Duration, Instant, UNIX_EPOCH};

use holdfast_dataplane::{FlowBatch, FlowEvent, FlowLog, FlowVerdict};
use holdfast_net_core::objects::ObjectName;
use holdfast_net_core::policy::{Decision, DirectionAnswer};
use holdfast_net_core::ports::Proto;
use holdfast_proto::agent as pb;
use tokio::sync::{broadcast, watch};
use tracing::warn;

use crate::engine::{EngineHandle, Question, sentence};
use crate::metrics::Metrics;

/// Readers at a time; one more is refused.
const READERS_MAX: usize = 16;
/// Events a reader may be behind, some five seconds; beyond, its oldest are lost and counted.
const QUEUE_MAX: usize = 1024;
/// Answers of the engine that are kept; at the limit all are dropped.
const ANSWERS_MAX: usize = 1024;
/// An answer is used again this long: policies change.
const ANSWER_AGE: Duration = Duration::from_secs(1);
/// After a question that took the engine a time t no other is asked for this many times t: policy changes come first.
const PAUSE_PER_QUESTION: u32 = 9;

/// What readers get.
#[derive(Debug, Clone)]
enum Item {
    /// An event, and how many the kernel lost before it.
    Flow(Arc<pb::Flow>, u64),
    /// There will be no more; why.
    End(Arc<str>),
}

/// How the log stands.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Log {
    /// Not read: nobody wants it.
    Closed,
    Open,
    /// It cannot be read; all readers are told, and the next one after them tries again.
    Failed(Arc<str>),
    /// The agent ends.
    Ended,
}

#[derive(Debug)]
struct State {
    readers: usize,
    log: Log,
}

/// The log and its readers.
pub(crate) struct Feed {
    state: watch::Sender<State>,
    items: broadcast::Sender<Item>,
    metrics: Arc<Metrics>,
}

const ENDING: &str = "the agent is ending";

/// Why nobody can read now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum FeedError {
    /// Too many readers.
    Full,
    /// The log cannot be read, or not any more.
    Unavailable(String),
}

impl Feed {
    pub(crate) fn new(metrics: Arc<Metrics>) -> Arc<Self> {
        let state = watch::Sender::new(State { readers: 0, log: Log::Closed });
        Arc::new(Self { state, items: broadcast::Sender::new(QUEUE_MAX), metrics })
    }

    /// Begins to read; answers when the kernel's log is open, so that nothing that happens later is missed. Cancellation
    /// safe.
    pub(crate) async fn subscribe(self: &Arc<Self>, filter: Filter) -> Result<Reader, FeedError> {
        let mut seated = false;
        self.state.send_if_modified(|state| {
            seated = state.readers < READERS_MAX;
            state.readers += usize::from(seated);
            seated
        });
        if !seated {
            return Err(FeedError::Full);
        }
        let mut state = self.state.subscribe();
        let items = self.items.subscribe();
        let reader = Reader { feed: Arc::clone(self), items, filter, lost: 0 };
        let settled = state.wait_for(|state| state.log != Log::Closed).await;
        match settled.map(|state| state.log.clone()) {
            Ok(Log::Open) => Ok(reader),
            Ok(Log::Failed(why)) => Err(FeedError::Unavailable(why.to_string())),
            Ok(Log::Closed | Log::Ended) | Err(_) => Err(FeedError::Unavailable(ENDING.to_owned())),
        }
    }

    /// Ends all readers and lets nobody begin: streams must not keep the agent from its end.
    pub(crate) fn end(&self) {
        self.state.send_modify(|state| state.log = Log::Ended);
        // Nobody may be listening.
        let _ = self.items.send(Item::End(ENDING.into()));
    }

    /// Reads the group whenever somebody wants it, until [`Feed::end`].
    pub(crate) async fn run(self: Arc<Self>, group: u16, engine: EngineHandle) {
        let mut describer = Describer::new(engine);
        let mut state = self.state.subscribe();
        loop {
            let wanted = state.wait_for(|state| state.readers > 0 || state.log == Log::Ended).await;
            if wanted.is_ok_and(|state| state.log == Log::Ended) {
                return;
            }
            match FlowLog::open(group) {
                Ok(log) if self.set_open() => self.pump(log, &mut describer).await,
                Ok(_) => return,
                Err(error) => self.fail(&sentence(&error)),
            }
            self.unread().await;
        }
    }

    /// False when the agent ends.
    fn set_open(&self) -> bool {
        self.state.send_if_modified(|state| {
            let opened = state.log != Log::Ended;
            if opened {
                state.log = Log::Open;
            }
            opened
        })
    }

    /// Hands events out until nobody reads any more or the log fails.
    async fn pump(&self, mut log: FlowLog, describer: &mut Describer) {
        loop {
            let batch = tokio::select! {
                batch = log.next() => batch,
                () = self.unread() => return,
            };
            match batch {
                Ok(FlowBatch { events, mut lost }) => {
                    self.metrics.note_flows(events.len(), lost);
                    for event in events {
                        let flow = Arc::new(describer.describe(&event).await);
                        let _ = self.items.send(Item::Flow(flow, std::mem::take(&mut lost)));
                    }
                }
                Err(error) => return self.fail(&sentence(&error)),
            }
        }
    }

    fn fail(&self, why: &str) {
        warn!(error = why, "the flow log cannot be read");
        self.state.send_modify(|state| {
            if state.log != Log::Ended {
                state.log = Log::Failed(why.into());
            }
        });
        let _ = self.items.send(Item::End(why.into()));
    }

    /// Waits until the log has no reader, and closes it in the same step: who comes later opens it anew. Returns at once
    /// when it is closed, or when the agent ends.
    async fn unread(&self) {
        let mut state = self.state.subscribe();
        loop {
            let idle = |state: &State| state.readers == 0 || matches!(state.log, Log::Closed | Log::Ended);
            if state.wait_for(idle).await.is_err() {
                return;
            }
            let mut closed = false;
            self.state.send_if_modified(|state| {
                closed = idle(state);
                let close = closed && state.log != Log::Ended;
                if close {
                    state.log = Log::Closed;
                }
                close
            });
            if closed {
                return;
            }
        }
    }
}

/// One reader. Dropping it ends its part.
pub(crate) struct Reader {
    feed: Arc<Feed>,
    items: broadcast::Receiver<Item>,
    filter: Filter,
    lost: u64,
}

impl Reader {
    /// The next event that the filter lets through. Cancellation safe.
    pub(crate) async fn next(&mut self) -> Result<pb::Flow, FeedError> {
        loop {
            match self.items.recv().await {
                Ok(Item::Flow(flow, lost)) => {
                    self.lost += lost;
                    if self.filter.passes(&flow) {
                        return Ok(pb::Flow { lost: std::mem::take(&mut self.lost), ..(*flow).clone() });
                    }
                }
                Ok(Item::End(why)) => return Err(FeedError::Unavailable(why.to_string())),
                Err(broadcast::error::RecvError::Lagged(count)) => {
                    self.feed.metrics.note_flows_lost(count);
                    self.lost += count;
                }
                Err(broadcast::error::RecvError::Closed) => {
                    return Err(FeedError::Unavailable(ENDING.to_owned()));
                }
            }
        }
    }
}

impl Drop for Reader {
    fn drop(&mut self) {
        self.feed.state.send_modify(|state| state.readers -= 1);
    }
}

/// What a reader wants to see.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Filter {
    from: Option<End>,
    to: Option<End>,
    namespace: Option<String>,
    allowed: Option<bool>,
    port: Option<u32>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum End {
    Address(IpAddr),
    Pod(ObjectName),
}

impl Filter {
    /// Reads a request.
    ///
    /// # Errors
    /// A word that means nothing; the sentence says which.
    pub(crate) fn new(request: pb::FlowsRequest) -> Result<Self, String> {
        let allowed = match request.verdict.as_str() {
            "" => None,
            "allowed" => Some(true),
            "denied" => Some(false),
            other => return Err(format!("\"{other}\" is no verdict; write allowed or denied")),
        };
        if request.port > u16::MAX.into() {
            return Err(format!("{} is not a port", request.port));
        }
        Ok(Self {
            from: end_of(&request.from)?,
            to: end_of(&request.to)?,
            namespace: Some(request.namespace).filter(|namespace| !namespace.is_empty()),
            allowed,
            port: Some(request.port).filter(|port| *port != 0),
        })
    }

    fn passes(&self, flow: &pb::Flow) -> bool {
        let (client, server) = (flow.client.as_ref(), flow.server.as_ref());
        let is = |wanted: &Option<End>, end: Option<&pb::FlowEnd>| {
            wanted.as_ref().is_none_or(|wanted| end.is_some_and(|end| wanted.is(end)))
        };
        let within = |namespace: &String| {
            [client, server].into_iter().flatten().any(|end| end.namespace == *namespace)
        };
        is(&self.from, client)
            && is(&self.to, server)
            && self.namespace.as_ref().is_none_or(within)
            && self.allowed.is_none_or(|allowed| allowed == flow.allowed)
            && self.port.is_none_or(|port| port == flow.port)
    }
}

impl End {
    fn is(&self, end: &pb::FlowEnd) -> bool {
        match self {
            // As numbers: an IPv6 address has several spellings.
            End::Address(address) => end.address.parse() == Ok(*address),
            End::Pod(name) => name.namespace == end.namespace && name.name == end.pod,
        }
    }
}

fn end_of(text: &str) -> Result<Option<End>, String> {
    if text.is_empty() {
        return Ok(None);
    }
    if let Ok(address) = text.parse() {
        return Ok(Some(End::Address(address)));
    }
    match text.split_once('/') {
        Some((namespace, name)) => Ok(Some(End::Pod(ObjectName::new(namespace, name)))),
        None => Err(format!("\"{text}\" is neither an address nor namespace/pod")),
    }
}

/// Names pods and policies.
struct Describer {
    engine: EngineHandle,
    answers: HashMap<Tuple, (Instant, Answer)>,
    ask_again_at: Instant,
}

/// Client, server, protocol, port.
type Tuple = (IpAddr, IpAddr, Proto, u16);

#[derive(Debug, Clone)]
struct Answer {
    egress: pb::FlowDecision,
    ingress: pb::FlowDecision,
}

impl Describer {
    fn new(engine: EngineHandle) -> Self {
        Self { engine, answers: HashMap::new(), ask_again_at: Instant::now() }
    }

    async fn describe(&mut self, event: &FlowEvent) -> pb::Flow {
        let [client, server] = self.ends([event.client, event.server]).await;
        let answer = match Proto::from_number(event.protocol) {
            Some(proto) => self.answer((event.client, event.server, proto, event.server_port)).await,
            None => None,
        };
        let (egress, ingress) = answer.map(|answer| (answer.egress, answer.ingress)).unzip();
        let since = event.time.duration_since(UNIX_EPOCH).unwrap_or_default();
        pb::Flow {
            time_us: u64::try_from(since.as_micros()).unwrap_or(u64::MAX),
            allowed: event.verdict == FlowVerdict::Allowed,
            client: Some(client),
            server: Some(server),
            protocol: protocol_name(event.protocol),
            port: event.server_port.into(),
            stateless: event.stateless,
            egress,
            ingress,
            lost: 0,
        }
    }

    /// Addresses with the pods that have them. Without an engine nobody has one.
    async fn ends(&self, addresses: [IpAddr; 2]) -> [pb::FlowEnd; 2] {
        let pods = self.engine.pods_at(addresses).await.unwrap_or_default();
        let named = |address: IpAddr, pod: &Option<ObjectName>| pb::FlowEnd {
            address: address.to_string(),
            namespace: pod.as_ref().map(|pod| pod.namespace.clone()).unwrap_or_default(),
            pod: pod.as_ref().map(|pod| pod.name.clone()).unwrap_or_default(),
        };
        [named(addresses[0], &pods[0]), named(addresses[1], &pods[1])]
    }

    /// Who decides, as the engine knows it now; `None` when it may not be asked at this moment.
    async fn answer(&mut self, tuple: Tuple) -> Option<Answer> {
        let now = Instant::now();
        if let Some((at, answer)) = self.answers.get(&tuple)
            && now.duration_since(*at) < ANSWER_AGE
        {
            return Some(answer.clone());
        }
        if now < self.ask_again_at {
            return None;
        }
        let (client, server, proto, port) = tuple;
        let question = Question { from: client.to_string(), to: server.to_string(), proto, port };
        let explanation = self.engine.explain(question).await;
        self.ask_again_at = Instant::now() + now.elapsed() * PAUSE_PER_QUESTION;
        let explanation = explanation.ok()?;
        let answer = Answer { egress: decision(explanation.egress), ingress: decision(explanation.ingress) };
        if self.answers.len() >= ANSWERS_MAX {
            self.answers.clear();
        }
        self.answers.insert(tuple, (now, answer.clone()));
        Some(answer)
    }
}

fn decision(answer: DirectionAnswer) -> pb::FlowDecision {
    let decided_by = answer.decided_by.map(policy_rule);
    pb::FlowDecision { allowed: answer.allowed, reason: answer.reason, decided_by }
}

fn policy_rule(decision: Decision) -> pb::PolicyRule {
    let name = decision.policy.name;
    let policy = if name.namespace.is_empty() { name.name } else { name.to_string() };
    pb::PolicyRule {
        tier: decision.policy.tier.to_string(),
        policy,
        rule: u32::try_from(decision.rule).unwrap_or(u32::MAX),
        rule_name: decision.rule_name,
    }
}

fn protocol_name(number: u8) -> String {
    match number {
        1 => "icmp".to_owned(),
        6 => "tcp".to_owned(),
        17 => "udp".to_owned(),
        58 => "icmpv6".to_owned(),
        132 => "sctp".to_owned(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_flow(client: &str, server: &str, port: u32, allowed: bool) -> pb::Flow {
        let end = |text: &str| {
            let (namespace, pod) = text.split_once('/').unwrap_or_default();
            let address = if pod.is_empty() { text } else { "10.0.0.7" };
            Some(pb::FlowEnd { address: address.into(), namespace: namespace.into(), pod: pod.into() })
        };
        pb::Flow { client: end(client), server: end(server), port, allowed, ..pb::Flow::default() }
    }

    fn mk_filter(fill: impl FnOnce(&mut pb::FlowsRequest)) -> Filter {
        let mut request = pb::FlowsRequest::default();
        fill(&mut request);
        Filter::new(request).unwrap()
    }

    /// A feed whose log is open, without a kernel.
    fn mk_open() -> Arc<Feed> {
        let feed = Feed::new(Metrics::new());
        assert!(feed.set_open());
        feed
    }

    #[test]
    fn each_part_of_a_filter_holds() {
        let flow = mk_flow("shop/web", "store/db", 5432, false);
        let passes = |fill: fn(&mut pb::FlowsRequest)| mk_filter(fill).passes(&flow);
        assert!(passes(|_| {}));
        assert!(passes(|r| r.from = "shop/web".into()));
        assert!(!passes(|r| r.from = "store/db".into()));
        assert!(passes(|r| r.to = "store/db".into()));
        assert!(!passes(|r| r.to = "store/other".into()));
        assert!(passes(|r| r.to = "10.0.0.7".into()));
        assert!(passes(|r| r.namespace = "shop".into()) && passes(|r| r.namespace = "store".into()));
        assert!(!passes(|r| r.namespace = "web".into()));
        assert!(passes(|r| r.verdict = "denied".into()) && !passes(|r| r.verdict = "allowed".into()));
        assert!(passes(|r| r.port = 5432) && !passes(|r| r.port = 80));
        assert!(!passes(|r| (r.namespace, r.port) = ("shop".into(), 80)), "all parts must hold");
        let v6 = mk_flow("fd00::1", "shop/web", 80, true);
        assert!(mk_filter(|r| r.from = "fd00:0::0:1".into()).passes(&v6), "another spelling");
    }

    #[test]
    fn a_filter_that_means_nothing_is_refused_with_the_word() {
        let problem = |request: pb::FlowsRequest| Filter::new(request).unwrap_err();
        assert!(problem(pb::FlowsRequest { verdict: "drop".into(), ..Default::default() }).contains("drop"));
        assert!(problem(pb::FlowsRequest { from: "web".into(), ..Default::default() }).contains("web"));
        assert!(problem(pb::FlowsRequest { port: 70_000, ..Default::default() }).contains("70000"));
    }

    #[tokio::test]
    async fn a_slow_reader_loses_its_oldest_events_and_is_told_how_many_and_others_lose_none() {
        let feed = mk_open();
        let mut slow = feed.subscribe(Filter::default()).await.unwrap();
        let mut quick = feed.subscribe(Filter::default()).await.unwrap();
        let flow = Arc::new(mk_flow("shop/web", "store/db", 1, true));
        let total = QUEUE_MAX + 10;
        for _ in 0..total {
            feed.items.send(Item::Flow(Arc::clone(&flow), 0)).unwrap();
            assert_eq!(quick.next().await.unwrap().lost, 0);
        }
        assert_eq!(slow.next().await.unwrap().lost, 10);
        assert_eq!(slow.next().await.unwrap().lost, 0, "told once");
    }

    #[tokio::test]
    async fn what_was_lost_before_filtered_events_is_told_with_the_next_that_passes() {
        let feed = mk_open();
        let mut reader = feed.subscribe(mk_filter(|r| r.verdict = "denied".into())).await.unwrap();
        let send = |allowed: bool, lost: u64| {
            let flow = Arc::new(mk_flow("shop/web", "store/db", 1, allowed));
            feed.items.send(Item::Flow(flow, lost)).unwrap();
        };
        send(true, 3);
        send(true, 0);
        send(false, 4);
        assert_eq!(reader.next().await.unwrap().lost, 7);
    }

    #[tokio::test]
    async fn readers_are_limited_and_a_seat_is_free_again_when_one_leaves() {
        let feed = mk_open();
        let mut readers = Vec::new();
        for _ in 0..READERS_MAX {
            readers.push(feed.subscribe(Filter::default()).await.unwrap());
        }
        assert_eq!(feed.subscribe(Filter::default()).await.err(), Some(FeedError::Full));
        readers.pop();
        assert!(feed.subscribe(Filter::default()).await.is_ok());
    }

    #[tokio::test]
    async fn the_log_is_closed_by_the_last_reader_and_not_before() {
        let feed = mk_open();
        let first = feed.subscribe(Filter::default()).await.unwrap();
        let second = feed.subscribe(Filter::default()).await.unwrap();
        drop(first);
        assert!(futures::poll!(Box::pin(feed.unread())).is_pending());
        assert_eq!(feed.state.borrow().log, Log::Open);
        drop(second);
        feed.unread().await;
        assert_eq!(feed.state.borrow().log, Log::Closed);
    }

    #[tokio::test]
    async fn an_end_ends_readers_and_refuses_new_ones() {
        let feed = mk_open();
        let mut reader = feed.subscribe(Filter::default()).await.unwrap();
        feed.end();
        let ended = FeedError::Unavailable(ENDING.to_owned());
        assert_eq!(reader.next().await.unwrap_err(), ended);
        assert_eq!(feed.subscribe(Filter::default()).await.err(), Some(ended));
        feed.unread().await;
        assert_eq!(feed.state.borrow().log, Log::Ended, "an ended feed is not opened again");
    }

    #[tokio::test]
    async fn a_log_that_cannot_be_read_is_told_to_all_and_tried_again_after_them() {
        let feed = mk_open();
        let mut reader = feed.subscribe(Filter::default()).await.unwrap();
        feed.fail("somebody else reads it");
        let told = FeedError::Unavailable("somebody else reads it".to_owned());
        assert_eq!(reader.next().await.unwrap_err(), told);
        assert_eq!(feed.subscribe(Filter::default()).await.err(), Some(told));
        drop(reader);
        feed.unread().await;
        assert_eq!(feed.state.borrow().log, Log::Closed);
    }
}
