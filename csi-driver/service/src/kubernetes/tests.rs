//! The store against a server that misbehaves on purpose: what a real API server and a network do only now and then.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::{Arc, Mutex};

use holdfast_storage_core::ids::{
    Attachment, Epoch, Generation, Lineage, NodeName, RecordVersion, ReplicaId, VolumeId,
};
use holdfast_storage_core::record::{
    Formatted, RECORD_FORMAT, ReplicaRecord, ReplicaState, VolumeParams, VolumeRecord,
};
use holdfast_storage_core::record_store::{RecordStore, StoreError};
use http::{Method, Request, Response};
use kube::client::Body;
use serde_json::{Value, json};

use super::convert::to_spec;
use super::{KubernetesClient, KubernetesStore};

const ID: VolumeId = VolumeId(7);

/// What becomes of one change.
#[derive(Clone)]
enum Fate {
    /// It is carried out and answered.
    Normal,
    /// It is not carried out, and this is answered.
    Answered(u16, String),
    /// It is carried out, then this is answered.
    DoneAndAnswered(u16, String),
    /// It is carried out, then so many others change the spec, then this is answered.
    DoneAndOverwritten(u32, String),
    /// Somebody sets a label first; so the change comes too late.
    LabelledFirst,
    /// It is carried out without this field, as by a definition that does not know it.
    Pruned(&'static str),
}

/// An API server with one object.
#[derive(Clone)]
struct Server {
    state: Arc<Mutex<State>>,
}

struct State {
    object: Value,
    fates: VecDeque<Fate>,
    changes: u32,
}

impl Server {
    fn with(fates: impl IntoIterator<Item = Fate>) -> (Self, KubernetesStore) {
        let spec = to_spec(RecordVersion(1), &mk_record(0), &[]).unwrap();
        let object = json!({
            "apiVersion": "storage.holdfast.dev/v1alpha1", "kind": "VolumeRecord", "spec": spec,
            "metadata": {"name": ID.to_string(), "uid": "u", "resourceVersion": "100"},
        });
        let state = State { object, fates: fates.into_iter().collect(), changes: 0 };
        let server = Self { state: Arc::new(Mutex::new(state)) };
        let service = tower::service_fn({
            let server = server.clone();
            move |request| server.clone().answer(request)
        });
        (server, KubernetesStore::new(KubernetesClient::over(kube::Client::new(service, "default"))))
    }

    async fn answer(self, request: Request<Body>) -> Result<Response<Body>, std::convert::Infallible> {
        let is_read = request.method() == Method::GET;
        let body = request.into_body().collect_bytes().await.unwrap();
        let mut state = self.state.lock().unwrap();
        let (code, text) = if is_read { (200, state.object.to_string()) } else { state.change(&body) };
        Ok(Response::builder().status(code).body(Body::from(text.into_bytes())).unwrap())
    }

    fn changes(&self) -> u32 {
        self.state.lock().unwrap().changes
    }

    fn stored_generation(&self) -> u64 {
        self.state.lock().unwrap().object["spec"]["generation"].as_u64().unwrap()
    }
}

impl State {
    fn change(&mut self, body: &[u8]) -> (u16, String) {
        self.changes += 1;
        let sent: Value = serde_json::from_slice(body).unwrap();
        match self.fates.pop_front().unwrap_or(Fate::Normal) {
            Fate::Normal => self.store(sent),
            Fate::Answered(code, text) => (code, text),
            Fate::DoneAndAnswered(code, text) => {
                self.store(sent);
                (code, text)
            }
            Fate::DoneAndOverwritten(others, text) => {
                self.store(sent);
                for number in 0..others {
                    let mut object = self.object.clone();
                    let version = object["spec"]["version"].as_i64().unwrap() + 1;
                    object["spec"]["version"] = version.into();
                    let ids = object["spec"]["swapIds"].as_array_mut().unwrap();
                    ids.push(format!("{number:032x}").into());
                    if ids.len() > super::objects::SWAP_IDS {
                        ids.remove(0);
                    }
                    self.store(object);
                }
                (409, text)
            }
            Fate::LabelledFirst => {
                let mut object = self.object.clone();
                object["metadata"]["labels"] = json!({"a": "b"});
                self.store(object);
                self.store(sent)
            }
            Fate::Pruned(field) => {
                let mut sent = sent;
                sent["spec"].as_object_mut().unwrap().remove(field);
                self.store(sent)
            }
        }
    }

    fn store(&mut self, mut object: Value) -> (u16, String) {
        let version = &self.object["metadata"]["resourceVersion"];
        if object["metadata"]["resourceVersion"] != *version {
            return (409, status(409, "Conflict"));
        }
        let next = version.as_str().unwrap().parse::<u32>().unwrap() + 1;
        object["metadata"]["resourceVersion"] = next.to_string().into();
        self.object = object;
        (200, self.object.to_string())
    }
}

fn status(code: u16, reason: &str) -> String {
    json!({"kind": "Status", "apiVersion": "v1", "status": "Failure", "code": code, "reason": reason, "message": "no"})
        .to_string()
}

fn mk_record(generation: u64) -> VolumeRecord {
    let replica = ReplicaRecord { node: NodeName("node-a".to_owned()), state: ReplicaState::InSync };
    VolumeRecord {
        format: RECORD_FORMAT,
        volume_id: ID,
        name: "data".to_owned(),
        lineage: Lineage(1),
        size_bytes: 1 << 20,
        attachment: Attachment(0),
        attached_to: None,
        read_only: false,
        generation: Generation(generation),
        generation_attachment: Attachment(0),
        target_id: None,
        epoch: Epoch { number: 1, nonce: 2 },
        in_sync: BTreeSet::from([ReplicaId(1)]),
        replicas: BTreeMap::from([(ReplicaId(1), replica)]),
        snapshots: Vec::new(),
        requested: Vec::new(),
        retired: false,
        source: None,
        restored: false,
        promoted: None,
        formatted: Formatted::Never,
        encryption: None,
        deleting: false,
        params: VolumeParams::new(1, "ext4"),
    }
}

async fn swap(store: &KubernetesStore) -> Result<RecordVersion, StoreError> {
    store.swap(RecordVersion(1), mk_record(1)).await
}

#[tokio::test]
async fn a_swap_that_was_carried_out_and_then_refused_as_moved_is_known_as_done() {
    for others in 0..4 {
        let (server, store) = Server::with([Fate::DoneAndOverwritten(others, status(409, "Conflict"))]);
        assert_eq!(swap(&store).await, Ok(RecordVersion(2)), "{others} others changed it since");
        assert_eq!(server.changes(), 1);
    }
}

#[tokio::test]
async fn a_swap_that_too_many_others_followed_is_unknown_and_not_called_a_conflict() {
    let (_, store) = Server::with([Fate::DoneAndOverwritten(20, status(409, "Conflict"))]);
    assert!(matches!(swap(&store).await, Err(StoreError::Unknown(_))));
}

#[tokio::test]
async fn an_object_that_moved_without_its_record_is_no_conflict() {
    let (server, store) = Server::with([Fate::LabelledFirst]);
    assert_eq!(swap(&store).await, Ok(RecordVersion(2)));
    assert_eq!((server.changes(), server.stored_generation()), (2, 1));
}

#[tokio::test]
async fn another_writers_record_is_a_conflict() {
    let (server, store) = Server::with([]);
    store.swap(RecordVersion(1), mk_record(3)).await.unwrap();
    assert_eq!(swap(&store).await, Err(StoreError::Conflict(ID)));
    assert_eq!((server.changes(), server.stored_generation()), (1, 3));
}

/// Each of these may come after the change, and some of them from something between.
#[tokio::test]
async fn only_the_servers_own_decisions_say_that_nothing_was_changed() {
    let page = || "<html>sorry</html>".to_owned();
    for (code, text) in [
        (500, status(500, "InternalError")),
        (503, status(503, "ServiceUnavailable")),
        (504, status(504, "Timeout")),
        (503, page()),
        (502, page()),
        (403, page()),
        (404, page()),
        (409, page()),
        (200, page()),
        (200, String::new()),
        // A server that does not know the kind names no object.
        (404, status(404, "NotFound")),
    ] {
        for fate in [Fate::Answered(code, text.clone()), Fate::DoneAndAnswered(code, text.clone())] {
            let (server, store) = Server::with([fate]);
            let answer = swap(&store).await;
            assert!(matches!(answer, Err(StoreError::Unknown(_))), "{code} {text}: {answer:?}");
            assert_eq!(server.changes(), 1, "{code} {text}: a change is never sent again");
        }
    }
}

#[tokio::test]
async fn what_the_server_decides_against_is_refused() {
    for (code, reason) in [(400, "BadRequest"), (401, "Unauthorized"), (403, "Forbidden"), (422, "Invalid")] {
        let (_, store) = Server::with([Fate::Answered(code, status(code, reason))]);
        assert!(matches!(swap(&store).await, Err(StoreError::Refused(_))), "{reason}");
    }
}

#[tokio::test]
async fn a_throttled_change_is_sent_again() {
    let throttled = Fate::Answered(429, status(429, "TooManyRequests"));
    let (server, store) = Server::with([throttled.clone(), throttled.clone()]);
    assert_eq!(swap(&store).await, Ok(RecordVersion(2)));
    assert_eq!(server.changes(), 3);
    let (_, store) = Server::with(std::iter::repeat_n(throttled, 100));
    assert!(matches!(swap(&store).await, Err(StoreError::Unknown(_))));
}

#[tokio::test]
async fn a_server_that_stores_less_than_it_was_sent_is_not_built_on() {
    let (_, store) = Server::with([Fate::Pruned("restored"), Fate::Pruned("promoted")]);
    let record = VolumeRecord { restored: true, ..mk_record(1) };
    let answer = store.swap(RecordVersion(1), record).await;
    assert!(matches!(&answer, Err(StoreError::Unknown(why)) if why.contains("definitions")), "{answer:?}");
}

/// Run `cargo run -p holdfast-service --example crds -- manifests/crds/storage` where this fails.
#[test]
fn the_definitions_in_the_manifests_are_those_of_the_program() {
    let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../manifests/crds/storage");
    let mut names = BTreeSet::from(["kustomization.yaml".to_owned()]);
    for crd in super::crds() {
        let name = format!("{}.yaml", crd.spec.names.plural);
        let text = std::fs::read_to_string(folder.join(&name)).unwrap_or_default();
        assert!(text == serde_norway::to_string(&crd).unwrap(), "{name} is not current");
        names.insert(name);
    }
    let files = std::fs::read_dir(folder).unwrap();
    let files: BTreeSet<String> = files.map(|f| f.unwrap().file_name().into_string().unwrap()).collect();
    assert_eq!(files, names);
}
