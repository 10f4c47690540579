//! One kind's objects: listed page by page, then watched from there on.
//!
//! ```text
//!           +-- 410 Gone: what the watch would go on from is forgotten there ---+
//!           v                                                                   |
//!        listing --all pages--> watching --ended, failed--> watching again, from the last version
//!           |  ^                   |
//!        404|  | every 10 s        | 404
//!           v  |                   v
//!          absent <----------------+      only if the definition is not installed; else it counts as a failure
//! ```

use std::borrow::Cow;
use std::time::{Duration, Instant};

use http::Request;
use rand::Rng;
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::mpsc;

use super::api::{Api, ApiError};
use super::kinds::Kind;
use super::lines::Lines;
use crate::engine::sentence;
use crate::objects::{Document, ObjectKey, key_of_kind, parse_of_kind};

/// Objects of one page of a list; fewer where they are large.
const PAGE_OBJECTS: u32 = 200;
/// The largest page that is read. A single object is below 2 MiB (etcd's limit).
const PAGE_BYTES_MAX: usize = 8 << 20;
/// Pages of one list. A longer one fails.
const PAGES_MAX: u32 = 1 << 16;
/// The largest event.
const EVENT_BYTES_MAX: usize = 8 << 20;
/// The server ends a watch after a time between these, which spreads the load of watches that begin at once.
const WATCH_SECONDS: std::ops::Range<u32> = 300..600;
/// The server sends a bookmark each minute; a watch without anything for so long is given up.
const SILENCE_MAX: Duration = Duration::from_secs(180);
/// The first pause after a failure, twice as long each time, up to the last one. Each is shortened by up to half at random.
const PAUSE_FIRST: Duration = Duration::from_millis(100);
const PAUSE_MAX: Duration = Duration::from_secs(15);
/// A watch that lasted so long was fine: the next failure is a first one.
const STEADY_AFTER: Duration = Duration::from_secs(5);
/// All nodes list anew when the server forgot their versions: each waits up to this long before.
const RELIST_SPREAD: Duration = Duration::from_secs(1);
/// A kind whose definition is not installed is looked for this often.
const ABSENT_INTERVAL: Duration = Duration::from_secs(10);
/// Of a definition only the metadata is asked for.
const METADATA_BYTES_MAX: usize = 1 << 20;
pub(super) const METADATA_ONLY: &str = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1";

/// What a watcher tells of its kind.
#[derive(Debug)]
pub(super) enum Event {
    /// A list begins.
    Began,
    /// An object as it is now.
    Is(Document),
    /// An object is gone.
    Gone(ObjectKey),
    /// The list is whole: what was not in it is gone.
    Ended,
    /// The kind is not defined: it has no objects.
    Absent,
    /// The objects cannot be read, for this reason.
    Away(String),
    /// They can.
    Follows,
}

/// Watches one kind.
pub(super) struct Watcher {
    pub index: usize,
    pub kind: &'static Kind,
    pub api: Api,
    pub events: mpsc::Sender<(usize, Event)>,
    page_objects: u32,
}

/// Why listing or watching does not go on.
enum End {
    /// The version is too old.
    Expired,
    /// A page is too large.
    TooLarge,
    /// The kind is not defined.
    Absent,
    /// Something failed.
    Failed(String),
    /// Nobody listens any more.
    Unheard,
}

#[derive(Deserialize)]
struct Page<'a> {
    metadata: PageMeta,
    #[serde(borrow)]
    items: Option<Vec<&'a RawValue>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct PageMeta {
    resource_version: String,
    #[serde(rename = "continue")]
    next: Option<String>,
}

#[derive(Deserialize)]
struct Line<'a> {
    #[serde(rename = "type", borrow)]
    kind: Cow<'a, str>,
    #[serde(borrow)]
    object: &'a RawValue,
}

#[derive(Deserialize)]
struct Versioned {
    metadata: VersionMeta,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct VersionMeta {
    resource_version: String,
}

/// Of a `Status`.
#[derive(Deserialize)]
#[serde(default)]
#[derive(Default)]
struct Failure {
    code: u16,
    message: String,
}

impl Watcher {
    pub fn new(index: usize, kind: &'static Kind, api: Api, events: mpsc::Sender<(usize, Event)>) -> Self {
        Self { index, kind, api, events, page_objects: PAGE_OBJECTS }
    }

    /// Works until nobody listens.
    pub async fn run(mut self) {
        let mut pauses = Pauses::default();
        let mut version: Option<String> = None;
        loop {
            let begun = Instant::now();
            let is_watch = version.is_some();
            let ended = match &mut version {
                None => self.list().await.map(|listed| version = Some(listed)),
                Some(version) => self.watch(version).await,
            };
            if is_watch && begun.elapsed() > STEADY_AFTER {
                pauses = Pauses::default();
            }
            let pause = match ended {
                // The server ends a watch from time to time; one that it ends at once is not repeated at once.
                Ok(()) if is_watch && begun.elapsed() < STEADY_AFTER => pauses.next(),
                Ok(()) => Duration::ZERO,
                Err(End::Expired) => {
                    version = None;
                    let reason = "the API server has forgotten what changed meanwhile; all is read anew";
                    if self.tell(Event::Away(reason.to_owned())).await.is_err() {
                        return;
                    }
                    pauses.next() + rand::rng().random_range(Duration::ZERO..RELIST_SPREAD)
                }
                Err(End::TooLarge) => {
                    self.page_objects = (self.page_objects / 4).max(1);
                    pauses.next()
                }
                Err(End::Absent) => {
                    version = None;
                    if self.tell(Event::Absent).await.is_err() {
                        return;
                    }
                    shortened(ABSENT_INTERVAL)
                }
                Err(End::Failed(reason)) => {
                    if self.tell(Event::Away(reason)).await.is_err() {
                        return;
                    }
                    pauses.next()
                }
                Err(End::Unheard) => return,
            };
            tokio::time::sleep(pause).await;
        }
    }

    /// All objects, as they were at one moment. Returns its version. Asked without a version, so that the server answers with
    /// what its database has now: an older state than the one that is in force would bring back what is gone.
    async fn list(&mut self) -> Result<String, End> {
        let mut next = String::new();
        for page in 0..PAGES_MAX {
            let path = format!("{}?limit={}{next}", self.kind.path, self.page_objects);
            let text = self.api.ask(Request::get(path).body(Vec::new()), PAGE_BYTES_MAX).await;
            let text = match text {
                Ok(text) => text,
                Err(error) => return Err(self.end_of(error).await),
            };
            let parsed: Page<'_> = serde_json::from_slice(&text).map_err(|error| not_understood(&error))?;
            if page == 0 {
                self.tell(Event::Began).await?;
            }
            for item in parsed.items.into_iter().flatten() {
                self.tell(Event::Is(parse_of_kind(self.kind.name, item.get()))).await?;
            }
            match parsed.metadata.next.filter(|token| !token.is_empty()) {
                Some(token) => next = format!("&continue={}", escaped(&token)),
                None => {
                    self.tell(Event::Ended).await?;
                    return Ok(parsed.metadata.resource_version);
                }
            }
        }
        Err(End::Failed(format!("there are more than {PAGES_MAX} pages of objects")))
    }

    /// Changes from `version` on, which follows them.
    async fn watch(&self, version: &mut String) -> Result<(), End> {
        let seconds = rand::rng().random_range(WATCH_SECONDS);
        let path = format!(
            "{}?watch=true&allowWatchBookmarks=true&resourceVersion={version}&timeoutSeconds={seconds}",
            self.kind.path
        );
        let stream = match self.api.stream(&path).await {
            Ok(stream) => stream,
            Err(error) => return Err(self.end_of(error).await),
        };
        self.tell(Event::Follows).await?;
        let mut lines = Lines::new(stream, EVENT_BYTES_MAX);
        loop {
            let line = match tokio::time::timeout(SILENCE_MAX, lines.next()).await {
                Ok(Ok(Some(line))) => line,
                Ok(Ok(None)) => return Ok(()),
                Ok(Err(error)) => return Err(End::Failed(sentence(&error))),
                Err(_) => {
                    return Err(End::Failed(format!("the API server said nothing for {SILENCE_MAX:?}")));
                }
            };
            self.take(line, version).await?;
        }
    }

    /// `version` follows only after the event was passed on: whatever ends the watch, nothing is left out.
    async fn take(&self, line: &[u8], version: &mut String) -> Result<(), End> {
        let Line { kind, object } = serde_json::from_slice(line).map_err(|error| not_understood(&error))?;
        let text = object.get();
        match &*kind {
            "ADDED" | "MODIFIED" => self.tell(Event::Is(parse_of_kind(self.kind.name, text))).await?,
            "DELETED" => {
                if let Some(key) = key_of_kind(self.kind.name, text) {
                    self.tell(Event::Gone(key)).await?;
                }
            }
            "ERROR" => {
                let Failure { code, message } = serde_json::from_str(text).unwrap_or_default();
                return Err(if code == 410 { End::Expired } else { End::Failed(message) });
            }
            // Bookmarks, and what later servers may send.
            _ => {}
        }
        let found: Versioned = serde_json::from_str(text).map_err(|error| not_understood(&error))?;
        *version = found.metadata.resource_version;
        Ok(())
    }

    async fn end_of(&self, error: ApiError) -> End {
        if error.is_gone() {
            return End::Expired;
        }
        if matches!(error, ApiError::TooLarge(_)) && self.page_objects > 1 {
            return End::TooLarge;
        }
        match self.kind.definition {
            Some(definition) if error.is_not_found() => self.why_not_found(definition).await,
            _ => End::Failed(error.to_string()),
        }
    }

    /// A server that has only just started, or a proxy, says the same of a kind that has objects. Taken for their absence it would
    /// end policies that deny. So the definition itself is asked for.
    async fn why_not_found(&self, definition: &str) -> End {
        let path = format!("/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{definition}");
        let request = Request::get(path).header(http::header::ACCEPT, METADATA_ONLY).body(Vec::new());
        match self.api.ask(request, METADATA_BYTES_MAX).await {
            Ok(_) => End::Failed(format!("{definition} is defined, but {} is not served", self.kind.path)),
            Err(error) if error.is_missing("customresourcedefinitions", definition) => End::Absent,
            Err(error) => End::Failed(format!("whether {definition} is defined cannot be told: {error}")),
        }
    }

    async fn tell(&self, event: Event) -> Result<(), End> {
        self.events.send((self.index, event)).await.map_err(|_| End::Unheard)
    }
}

/// Rising pauses.
struct Pauses(Duration);

impl Default for Pauses {
    fn default() -> Self {
        Self(PAUSE_FIRST)
    }
}

impl Pauses {
    fn next(&mut self) -> Duration {
        let pause = self.0;
        self.0 = (2 * pause).min(PAUSE_MAX);
        shortened(pause)
    }
}

/// By up to half, at random.
pub(super) fn shortened(pause: Duration) -> Duration {
    rand::rng().random_range(pause / 2..=pause)
}

fn not_understood(error: &serde_json::Error) -> End {
    End::Failed(format!("the API server is not understood: {error}"))
}

/// A token as a part of a query.
fn escaped(token: &str) -> String {
    use std::fmt::Write as _;
    let mut text = String::with_capacity(token.len());
    for byte in token.bytes() {
        if byte.is_ascii_alphanumeric() || b"-_.~".contains(&byte) {
            text.push(char::from(byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

#[cfg(test)]
mod tests;
