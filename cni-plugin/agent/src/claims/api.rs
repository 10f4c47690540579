//! Claims at the API server: `create`, and `update` with the `resourceVersion` that was read.

use std::time::Duration;

use holdfast_net_core::pod_ranges::{Proposal, object_name};
use http::{Method, Request};
use serde::Deserialize;
use serde_json::json;

use super::Swapped;
use crate::kubernetes::{Api, ApiError};
use crate::objects::{POD_RANGE, POD_RANGE_VERSION};

/// All requests of a swap together. The engine waits for them.
const SWAP_TIMEOUT: Duration = Duration::from_secs(2);
/// The largest answer that is read: a claim is some hundred bytes.
const CLAIM_BYTES_MAX: usize = 64 << 10;
/// Reading and changing, as often as others are faster.
const ROUNDS_MAX: usize = 3;
/// Of all claims.
const PATH: &str = "/apis/network.holdfast.dev/v1alpha1/podranges";

/// Of a PodRange.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Claim {
    metadata: Version,
    spec: Owner,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Version {
    resource_version: String,
}

#[derive(Deserialize)]
struct Owner {
    range: String,
    node: String,
}

pub(super) async fn swap(api: &Api, proposal: &Proposal, node: &str) -> Result<Swapped, String> {
    let swapped = tokio::time::timeout(SWAP_TIMEOUT, swap_in_time(api, proposal, node)).await;
    swapped.unwrap_or_else(|_| Err(format!("the API server gave no answer within {SWAP_TIMEOUT:?}")))
}

async fn swap_in_time(api: &Api, proposal: &Proposal, node: &str) -> Result<Swapped, String> {
    let name = object_name(&proposal.range);
    for _ in 0..ROUNDS_MAX {
        let before = read(api, &name).await?;
        let owner = before.as_ref().map(|claim| claim.spec.node.clone());
        if let Some(claim) = before.as_ref().filter(|claim| claim.spec.range != proposal.range.to_string()) {
            return Err(format!("the PodRange {name} is about {}; remove it", claim.spec.range));
        }
        if owner.as_deref() == Some(node) {
            return Ok(Swapped::Done);
        }
        if owner != proposal.from {
            return Ok(Swapped::Is(owner));
        }
        match change(api, &name, proposal, node, before.as_ref()).await {
            Ok(_) => return Ok(Swapped::Done),
            // Somebody was faster. Who, the next reading tells.
            Err(error) if ["AlreadyExists", "Conflict", "NotFound"].contains(&error.reason()) => {}
            Err(error) => return Err(error.to_string()),
        }
    }
    Err("other nodes claim the same block at the same time; it is tried again".to_owned())
}

/// As the database has it now: without a resourceVersion the server does not answer from its cache.
async fn read(api: &Api, name: &str) -> Result<Option<Claim>, String> {
    let request = Request::get(format!("{PATH}/{name}")).body(Vec::new());
    match api.ask(request, CLAIM_BYTES_MAX).await {
        Ok(text) => serde_json::from_slice(&text)
            .map(Some)
            .map_err(|error| format!("the PodRange {name} cannot be read: {error}")),
        Err(error) if error.is_missing("podranges", name) => Ok(None),
        Err(error) => Err(error.to_string()),
    }
}

async fn change(
    api: &Api,
    name: &str,
    proposal: &Proposal,
    node: &str,
    before: Option<&Claim>,
) -> Result<Vec<u8>, ApiError> {
    let mut object = json!({
        "apiVersion": POD_RANGE_VERSION, "kind": POD_RANGE, "metadata": {"name": name},
        "spec": {"range": proposal.range, "node": node},
    });
    let (method, path) = match before {
        Some(claim) => {
            object["metadata"]["resourceVersion"] = json!(claim.metadata.resource_version);
            (Method::PUT, format!("{PATH}/{name}"))
        }
        None => (Method::POST, PATH.to_owned()),
    };
    let request = Request::builder()
        .method(method)
        .uri(format!("{path}?fieldManager=holdfast-netd&fieldValidation=Strict"))
        .header(http::header::CONTENT_TYPE, "application/json")
        .body(object.to_string().into_bytes());
    api.ask(request, CLAIM_BYTES_MAX).await
}

#[cfg(test)]
mod tests {
    use std::sync::{Arc, Mutex};

    use http::Response;
    use kube::client::Body;
    use serde_json::Value;

    use super::*;

    /// An API server with one object, which may change behind the swap's back.
    #[derive(Default)]
    struct Server {
        object: Option<Value>,
        /// Others that are faster: each becomes the owner between the next reading and its change.
        faster: Vec<&'static str>,
        changes: u32,
        /// Changes happen, and the answer gets lost.
        loses_answers: bool,
    }

    fn claim(node: &str, version: u32) -> Value {
        json!({
            "metadata": {"name": "0a2a0300-24", "resourceVersion": version.to_string()},
            "spec": {"range": "10.42.3.0/24", "node": node},
        })
    }

    fn status(code: u16, reason: &str) -> (u16, Value) {
        let details = json!({"kind": "podranges", "name": "0a2a0300-24"});
        (
            code,
            json!({"kind": "Status", "code": code, "reason": reason, "message": reason, "details": details}),
        )
    }

    impl Server {
        fn answer(&mut self, method: &Method, body: &[u8]) -> (u16, Value) {
            if method == Method::GET {
                return self.object.clone().map_or_else(|| status(404, "NotFound"), |object| (200, object));
            }
            self.changes += 1;
            if let Some(other) = self.faster.pop() {
                self.object = Some(claim(other, 1000 + self.changes));
            }
            let sent: Value = serde_json::from_slice(body).unwrap();
            match &self.object {
                Some(_) if method == Method::POST => return status(409, "AlreadyExists"),
                Some(now) if now["metadata"]["resourceVersion"] != sent["metadata"]["resourceVersion"] => {
                    return status(409, "Conflict");
                }
                _ => {}
            }
            self.object = Some(claim(sent["spec"]["node"].as_str().unwrap(), self.changes));
            if self.loses_answers { status(504, "Timeout") } else { (200, self.object.clone().unwrap()) }
        }
    }

    fn api(server: &Arc<Mutex<Server>>) -> Api {
        let server = Arc::clone(server);
        Api::over(kube::Client::new(
            tower::service_fn(move |request: Request<Body>| {
                let server = Arc::clone(&server);
                async move {
                    let method = request.method().clone();
                    let body = request.into_body().collect_bytes().await.unwrap();
                    let (code, answer) = server.lock().unwrap().answer(&method, &body);
                    let body = Body::from(answer.to_string().into_bytes());
                    Ok::<_, std::convert::Infallible>(Response::builder().status(code).body(body).unwrap())
                }
            }),
            "default",
        ))
    }

    fn proposal(from: Option<&str>) -> Proposal {
        Proposal { range: "10.42.3.0/24".parse().unwrap(), from: from.map(str::to_owned) }
    }

    #[tokio::test]
    async fn a_free_block_and_one_of_a_node_that_is_gone_are_claimed_once() {
        let server = Arc::new(Mutex::new(Server::default()));
        let api = api(&server);
        assert_eq!(swap(&api, &proposal(None), "a").await, Ok(Swapped::Done));
        assert_eq!(swap(&api, &proposal(None), "a").await, Ok(Swapped::Done), "repeated");
        assert_eq!(swap(&api, &proposal(None), "b").await, Ok(Swapped::Is(Some("a".to_owned()))));
        assert_eq!(swap(&api, &proposal(Some("c")), "b").await, Ok(Swapped::Is(Some("a".to_owned()))));
        assert_eq!(server.lock().unwrap().changes, 1);
        assert_eq!(swap(&api, &proposal(Some("a")), "b").await, Ok(Swapped::Done));
        server.lock().unwrap().object = None;
        assert_eq!(swap(&api, &proposal(Some("b")), "c").await, Ok(Swapped::Is(None)));
    }

    #[tokio::test]
    async fn whoever_is_faster_between_reading_and_changing_has_it() {
        let server = Arc::new(Mutex::new(Server { faster: vec!["x"], ..Server::default() }));
        assert_eq!(swap(&api(&server), &proposal(None), "a").await, Ok(Swapped::Is(Some("x".to_owned()))));
        let server = Server { object: Some(claim("gone", 1)), faster: vec!["x"], ..Server::default() };
        let server = Arc::new(Mutex::new(server));
        assert_eq!(
            swap(&api(&server), &proposal(Some("gone")), "a").await,
            Ok(Swapped::Is(Some("x".to_owned())))
        );
        // The same node from an earlier life, whose change was still on its way.
        let server = Arc::new(Mutex::new(Server { faster: vec!["a"], ..Server::default() }));
        assert_eq!(swap(&api(&server), &proposal(None), "a").await, Ok(Swapped::Done));
    }

    #[tokio::test]
    async fn an_answer_that_gets_lost_is_an_error_and_the_repetition_finds_the_claim() {
        let server = Arc::new(Mutex::new(Server { loses_answers: true, ..Server::default() }));
        let api = api(&server);
        assert!(swap(&api, &proposal(None), "a").await.is_err());
        assert_eq!(swap(&api, &proposal(None), "a").await, Ok(Swapped::Done));
        assert_eq!(server.lock().unwrap().changes, 1);
    }

    #[tokio::test]
    async fn a_claim_of_another_block_under_this_name_is_named_and_left_alone() {
        let mut object = claim("x", 1);
        object["spec"]["range"] = json!("10.42.4.0/24");
        let server = Arc::new(Mutex::new(Server { object: Some(object), ..Server::default() }));
        let error = swap(&api(&server), &proposal(Some("x")), "a").await.unwrap_err();
        assert!(error.contains("is about 10.42.4.0/24"), "{error}");
        assert_eq!(server.lock().unwrap().changes, 0);
    }
}
