//! Self-healing: what somebody else changes is put back within 200 ms, and a fight about it costs little and is told once.
//!
//! ```text
//! notifications, sysctls that differ --> due --pass--> all is as planned; what was mended is counted by what it is
//! ```
//!
//! Promised: a change that a notification tells is mended within 200 ms, as long as passes have not used up their share of the
//! processor ([`Budget`]). Who may break it: another program that undoes each mending at once. Then each pass is still
//! made, but only as often as the share allows.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use holdfast_dataplane::Error;
use holdfast_net_core::plan::{EndpointPlan, NodePlan};
use serde_json::{Value, json};
use tracing::{info, warn};

use super::{Engine, now_ms, sentence};

/// Sysctls of which no notification tells are read this often: some ten small files.
pub(super) const POLL_INTERVAL: Duration = Duration::from_millis(100);
/// One deletion is often a series of notifications; they are taken together.
const SETTLE: Duration = Duration::from_millis(10);
/// While pods come and go, whose links are told like any others: so many of them share a pass.
const SETTLE_AMONG_PODS: Duration = Duration::from_millis(80);
/// They come and go if one did within this.
const AMONG_PODS: Duration = Duration::from_millis(200);
/// Passes may take this share of the time, 1 in so many.
const SHARE: u32 = 10;
/// What passes may take at once after a time of rest.
const SAVED_MAX: Duration = Duration::from_millis(500);
/// Mended so often within [`FIGHT_TIME`], a thing is fought about.
const FIGHT_COUNT: u32 = 10;
const FIGHT_TIME: Duration = Duration::from_secs(10);
/// A thing that nobody touched for so long is not fought about any more.
const PEACE_AFTER: Duration = Duration::from_secs(60);
/// Things that are counted; beyond, the one that was quiet longest is forgotten.
const THINGS_MAX: usize = 256;
/// Things of one pass that the log names.
const NAMED_MAX: usize = 5;

/// What is out of order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum What {
    /// Links, addresses, routes, neighbours, forwarding entries, sysctls.
    Links,
    /// Our nf_tables tables.
    Tables,
}

/// When to look, and what was mended.
#[derive(Debug, Default)]
pub(super) struct Heal {
    links_due: Option<Instant>,
    tables_due: Option<Instant>,
    budget: Budget,
    /// When a pod came or went.
    pod_at: Option<Instant>,
    /// The notifications of links, or of tables, cannot be heard any more.
    deaf_to_links: bool,
    deaf_to_tables: bool,
    things: BTreeMap<String, Thing>,
    mended: u64,
}

/// How often one thing was mended.
#[derive(Debug)]
struct Thing {
    /// Within the time that began at `since`.
    count: u32,
    since: Instant,
    last: Instant,
    last_ms: u64,
    total: u64,
    is_fought: bool,
}

/// The processor time of passes: a bucket that fills at one [`SHARE`]th of the time.
#[derive(Debug)]
struct Budget {
    saved: Duration,
    owed: Duration,
    at: Instant,
}

impl Default for Budget {
    fn default() -> Self {
        Self { saved: SAVED_MAX, owed: Duration::ZERO, at: Instant::now() }
    }
}

impl Budget {
    /// A pass ended at `now` and took so long.
    fn spend(&mut self, took: Duration, now: Instant) {
        self.refill(now);
        self.owed += took.saturating_sub(self.saved);
        self.saved = self.saved.saturating_sub(took);
    }

    fn refill(&mut self, now: Instant) {
        let gained = now.saturating_duration_since(self.at) / SHARE;
        self.saved = (self.saved + gained.saturating_sub(self.owed)).min(SAVED_MAX);
        self.owed = self.owed.saturating_sub(gained);
        self.at = now;
    }

    /// How long the next pass has to wait.
    fn wait(&mut self, now: Instant) -> Duration {
        self.refill(now);
        self.owed * SHARE
    }
}

impl Heal {
    /// When the next pass is due.
    pub(super) fn due(&self) -> Option<Instant> {
        self.links_due.into_iter().chain(self.tables_due).min()
    }

    pub(super) fn listens_to_links(&self) -> bool {
        self.links_due.is_none() && !self.deaf_to_links
    }

    pub(super) fn listens_to_tables(&self) -> bool {
        self.tables_due.is_none() && !self.deaf_to_tables
    }

    /// A pod comes or goes.
    pub(super) fn note_pod(&mut self) {
        self.pod_at = Some(Instant::now());
    }

    /// Links are to be looked at soon.
    pub(super) fn want_links(&mut self) {
        self.want(What::Links);
    }

    fn want(&mut self, what: What) {
        let now = Instant::now();
        let among_pods = self.pod_at.is_some_and(|at| now.saturating_duration_since(at) < AMONG_PODS);
        let settle = if among_pods { SETTLE_AMONG_PODS } else { SETTLE };
        let due = now + settle.max(self.budget.wait(now));
        let slot = match what {
            What::Links => &mut self.links_due,
            What::Tables => &mut self.tables_due,
        };
        slot.get_or_insert(due);
    }

    /// State for people.
    pub(super) fn tell(&self) -> Value {
        let things = self.things.iter().map(|(what, thing)| {
            json!({ "what": what, "times": thing.total, "lastMs": thing.last_ms, "again": thing.is_fought })
        });
        json!({ "mended": self.mended, "things": things.collect::<Vec<_>>() })
    }

    /// Counts a thing; true if it is fought about and that was not told yet.
    fn note(&mut self, what: &str, now: Instant) -> (bool, bool) {
        self.mended += 1;
        if self.things.len() >= THINGS_MAX && !self.things.contains_key(what) {
            let oldest = self.things.iter().min_by_key(|(_, thing)| thing.last).map(|(what, _)| what.clone());
            oldest.and_then(|what| self.things.remove(&what));
        }
        let new = Thing { count: 0, since: now, last: now, last_ms: 0, total: 0, is_fought: false };
        let thing = self.things.entry(what.to_owned()).or_insert(new);
        if now.saturating_duration_since(thing.since) > FIGHT_TIME {
            (thing.count, thing.since) = (0, now);
        }
        thing.count += 1;
        thing.total += 1;
        (thing.last, thing.last_ms) = (now, now_ms());
        let was_fought = thing.is_fought;
        thing.is_fought |= thing.count >= FIGHT_COUNT;
        (thing.is_fought, thing.is_fought && !was_fought)
    }

    /// Things that nobody fights about any more.
    fn make_peace(&mut self, now: Instant) -> Vec<String> {
        let mut calm = Vec::new();
        for (what, thing) in &mut self.things {
            if thing.is_fought && now.saturating_duration_since(thing.last) > PEACE_AFTER {
                thing.is_fought = false;
                calm.push(what.clone());
            }
        }
        calm
    }
}

impl Engine {
    /// A notification came, or none can come any more.
    pub(super) fn hear(&mut self, what: What, heard: Result<(), Error>) {
        if let Err(error) = heard {
            warn!(
                error = sentence(&error),
                ?what,
                "changes by others are not told any more; they are looked for from time to time"
            );
            match what {
                What::Links => self.heal.deaf_to_links = true,
                What::Tables => self.heal.deaf_to_tables = true,
            }
        }
        self.heal.want(what);
    }

    /// What no notification tells.
    pub(super) fn poll(&mut self) {
        if self.heal.deaf_to_tables {
            self.heal.want(What::Tables);
        }
        let Some(plan) = self.node_plan.as_ref().filter(|_| self.node_error.is_none()) else { return };
        // Where they cannot be read, the next pass says so.
        if self.heal.links_due.is_none()
            && !self.dataplane.differing_sysctls(plan).is_ok_and(|found| found.is_empty())
        {
            self.heal.want(What::Links);
        }
    }

    /// Makes the passes that are due.
    pub(super) async fn heal(&mut self) {
        let started = Instant::now();
        let is_due = |at: &mut Option<Instant>| at.take_if(|at| *at <= started).is_some();
        if is_due(&mut self.heal.tables_due) {
            self.mend_rules().await;
        }
        if is_due(&mut self.heal.links_due) && self.seen.borrow().ready {
            self.finish_reading().await;
            self.apply_node().await;
        }
        let now = Instant::now();
        self.heal.budget.spend(now - started, now);
        for what in self.heal.make_peace(now) {
            info!(what, "nobody undoes it any more");
        }
    }

    /// Makes the kernel as planned, and tells what somebody else had changed.
    ///
    /// # Errors
    /// What the kernel refused, as a sentence.
    pub(super) async fn hold(&mut self, plan: &NodePlan) -> Result<(), String> {
        let endpoints: Vec<&EndpointPlan> = self.endpoints.values().map(|lease| &lease.plan).collect();
        let healed = self.dataplane.heal(plan, &endpoints, self.checksum_offload).await;
        let is_news = self.node_plan.as_ref() != Some(plan);
        if is_news && !healed.mended.is_empty() {
            let writes = healed.mended.len();
            info!(writes, peers = plan.peers.len(), "links, routes and neighbours are as planned");
        } else {
            self.note_mended(healed.mended);
        }
        healed.error.map_or(Ok(()), |error| Err(sentence(&error)))
    }

    /// Tells what somebody else had changed: each time, but of what is fought about only once.
    pub(super) fn note_mended(&mut self, mended: Vec<String>) {
        let now = Instant::now();
        let mut told = Vec::new();
        for what in mended {
            match self.heal.note(&what, now) {
                (true, true) => warn!(
                    what,
                    "another program undoes it again and again; it is mended as often as a tenth of a processor allows"
                ),
                (true, false) => {}
                (false, _) => told.push(what),
            }
        }
        if !told.is_empty() {
            let more = told.len().saturating_sub(NAMED_MAX);
            told.truncate(NAMED_MAX);
            info!(mended = told.join(", "), more, "somebody else changed the node's network; it is mended");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passes_that_never_end_take_a_tenth_of_the_time() {
        let start = Instant::now();
        let (mut budget, mut now, mut spent) =
            (Budget { at: start, ..Budget::default() }, start, Duration::ZERO);
        while now < start + Duration::from_secs(200) {
            now += budget.wait(now).max(SETTLE);
            let took = Duration::from_millis(7);
            now += took;
            spent += took;
            budget.spend(took, now);
        }
        let share = spent.as_secs_f64() / 200.0;
        assert!((0.095..0.11).contains(&share), "{share}");
    }

    #[test]
    fn after_a_rest_passes_follow_each_other_at_once() {
        let start = Instant::now();
        let mut budget = Budget { at: start, ..Budget::default() };
        for n in 1..=50 {
            let now = start + Duration::from_millis(n * 15);
            assert_eq!(budget.wait(now), Duration::ZERO);
            budget.spend(Duration::from_millis(5), now);
        }
    }

    #[test]
    fn what_is_undone_again_and_again_is_told_once() {
        let mut heal = Heal::default();
        let start = Instant::now();
        let told: u32 =
            (0..100).map(|n| u32::from(heal.note("x", start + Duration::from_millis(n * 300)).1)).sum();
        assert_eq!(told, 1);
        assert!(heal.make_peace(start + Duration::from_secs(31)).is_empty());
        assert_eq!(heal.make_peace(start + Duration::from_secs(95)), ["x"]);
        for n in 0..300_u64 {
            assert_eq!(heal.note(&n.to_string(), start + Duration::from_secs(2 * n)), (false, false));
        }
        assert_eq!(heal.things.len(), THINGS_MAX);
    }
}
