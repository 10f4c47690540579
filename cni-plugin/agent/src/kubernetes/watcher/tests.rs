//! The watcher against a server that says what the test tells it to.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use http::{Request, Response};
use kube::client::Body;
use serde_json::{Value, json};

use super::super::kinds::KINDS;
use super::*;
use crate::objects::{CLUSTER_POLICY, NODE};

/// What one request gets.
struct Turn {
    /// A part of the path and query that it must have.
    asked: &'static str,
    code: u16,
    body: Vec<u8>,
}

fn turn(asked: &'static str, body: impl ToString) -> Turn {
    Turn { asked, code: 200, body: body.to_string().into_bytes() }
}

fn refusal(asked: &'static str, code: u16, reason: &str, kind: &str, name: &str) -> Turn {
    let status = json!({
        "kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason,
        "message": reason, "details": {"kind": kind, "name": name},
    });
    Turn { asked, code, body: status.to_string().into_bytes() }
}

fn page(version: &str, next: &str, names: &[&str]) -> Value {
    let items: Vec<Value> =
        names.iter().map(|name| json!({"metadata": {"name": name, "resourceVersion": "1"}})).collect();
    json!({"metadata": {"resourceVersion": version, "continue": next}, "items": items})
}

fn line(kind: &str, name: &str, version: &str) -> String {
    let object = json!({"metadata": {"name": name, "resourceVersion": version}});
    format!("{}\n", json!({"type": kind, "object": object}))
}

/// What the watcher of a kind tells while these turns last; then the server says nothing any more.
async fn told(kind: &str, turns: Vec<Turn>) -> Vec<String> {
    let turns = Arc::new(Mutex::new(VecDeque::from(turns)));
    let left = Arc::clone(&turns);
    let service = tower::service_fn(move |request: Request<Body>| {
        let turn = turns.lock().unwrap().pop_front();
        async move {
            let Some(turn) = turn else { return std::future::pending().await };
            let asked = request.uri().to_string();
            assert!(asked.contains(turn.asked), "asked for {asked}, not for {}", turn.asked);
            Ok::<_, std::convert::Infallible>(
                Response::builder().status(turn.code).body(Body::from(turn.body)).unwrap(),
            )
        }
    });
    let (events, mut received) = mpsc::channel(1000);
    let index = KINDS.iter().position(|known| known.name == kind).unwrap();
    let api = Api::over(kube::Client::new(service, "default"));
    let watcher = tokio::spawn(Watcher::new(index, &KINDS[index], api, events).run());
    let mut told = Vec::new();
    // The last turn was taken, and what came of it was told.
    let quiet = Duration::from_millis(300);
    loop {
        match tokio::time::timeout(quiet, received.recv()).await {
            Ok(Some((_, event))) => told.push(text(&event)),
            Ok(None) => panic!("the watcher ended: {:?}", watcher.await),
            Err(_) if left.lock().unwrap().is_empty() => break,
            Err(_) => {}
        }
    }
    watcher.abort();
    told
}

fn text(event: &Event) -> String {
    match event {
        Event::Is(Document::Object(key, _)) => format!("+{}", key.name.name),
        Event::Gone(key) => format!("-{}", key.name.name),
        Event::Is(other) => format!("{other:?}"),
        Event::Away(_) => "away".to_owned(),
        other => format!("{other:?}").to_lowercase(),
    }
}

#[tokio::test]
async fn pages_are_one_list_and_a_watch_goes_on_from_its_last_bookmark() {
    let told = told(
        NODE,
        vec![
            turn("/api/v1/nodes?limit=200", page("7", "a/b=", &["a", "b"])),
            turn("limit=200&continue=a%2Fb%3D", page("7", "", &["c"])),
            turn(
                "resourceVersion=7&",
                line("MODIFIED", "a", "12") + &line("BOOKMARK", "", "50") + &line("DELETED", "b", "51"),
            ),
            turn("resourceVersion=51&", line("BOOKMARK", "", "60")),
            turn("resourceVersion=60&", line("ADDED", "d", "61")),
            turn("resourceVersion=61&", ""),
        ],
    );
    let expected =
        ["began", "+a", "+b", "+c", "ended", "follows", "+a", "-b", "follows", "follows", "+d", "follows"];
    assert_eq!(told.await, expected);
}

#[tokio::test]
async fn versions_that_the_server_forgot_make_all_be_listed_anew() {
    let error = json!({"type": "ERROR", "object": {"kind": "Status", "code": 410, "message": "too old"}});
    let told = told(
        NODE,
        vec![
            turn("limit", page("7", "", &["a"])),
            turn("resourceVersion=7&", format!("{error}\n")),
            turn("limit", page("90", "token", &["b"])),
            // The rest of the list is forgotten too.
            refusal("continue=token", 410, "Expired", "", ""),
            turn("limit", page("95", "", &["c"])),
            refusal("resourceVersion=95&", 410, "Expired", "", ""),
            turn("limit", page("99", "", &[])),
            turn("resourceVersion=99&", ""),
        ],
    );
    let expected = [
        "began", "+a", "ended", "follows", "away", "began", "+b", "away", "began", "+c", "ended", "away",
        "began", "ended", "follows",
    ];
    assert_eq!(told.await, expected);
}

#[tokio::test]
async fn a_watch_that_is_cut_in_an_event_leaves_nothing_out() {
    let whole = line("ADDED", "b", "9");
    let told = told(
        NODE,
        vec![
            turn("limit", page("7", "", &["a"])),
            turn("resourceVersion=7&", line("ADDED", "x", "8") + &whole[..whole.len() / 2]),
            refusal("resourceVersion=8&", 503, "ServiceUnavailable", "", ""),
            turn("resourceVersion=8&", whole),
            turn("resourceVersion=9&", ""),
        ],
    );
    let expected = ["began", "+a", "ended", "follows", "+x", "away", "away", "follows", "+b", "follows"];
    assert_eq!(told.await, expected);
}

#[tokio::test]
async fn a_kind_is_absent_only_if_its_definition_is() {
    const DEFINITION: &str = "clusternetworkpolicies.policy.networking.k8s.io";
    let lost = || refusal("/clusternetworkpolicies?limit", 404, "NotFound", "", "");
    let told = told(
        CLUSTER_POLICY,
        vec![
            // A server that has only just started: the definition is there, or cannot be read, or the path is nobody's.
            lost(),
            turn(DEFINITION, json!({"kind": "PartialObjectMetadata"})),
            lost(),
            refusal(DEFINITION, 403, "Forbidden", "customresourcedefinitions", DEFINITION),
            lost(),
            Turn { asked: DEFINITION, code: 404, body: b"404 page not found".to_vec() },
            lost(),
            refusal(DEFINITION, 404, "NotFound", "customresourcedefinitions", DEFINITION),
        ],
    );
    assert_eq!(told.await, ["away", "away", "away", "absent"]);
}

#[tokio::test]
async fn a_page_that_is_too_large_is_asked_for_in_smaller_ones() {
    let told = told(
        NODE,
        vec![
            Turn { asked: "limit=200", code: 200, body: vec![b' '; PAGE_BYTES_MAX + 1] },
            turn("limit=50", page("7", "", &["a"])),
            turn("resourceVersion=7&", ""),
        ],
    );
    assert_eq!(told.await, ["began", "+a", "ended", "follows"]);
}
