//! Each text field of each call of the node service with what it must never be. The data process is never asked: there is none.

use std::collections::HashMap;
use std::future::Future;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;

use holdfast_proto::csi::node_client::NodeClient;
use holdfast_proto::csi::node_server::NodeServer;
use holdfast_proto::csi::*;
use holdfast_service::serve::{bind_unix, serve_unix, server};
use holdfast_service::{NodeConfig, NodeService, SledStore};
use holdfast_storage_core::ids::{Attachment, NodeName};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::RecordStore;
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Status};

use crate::support::mk_record;
use crate::support::requests::mk_mount;

type Client = NodeClient<Channel>;
type Answer = Pin<Box<dyn Future<Output = Result<(), Status>> + Send>>;
type Call = fn(Client, Known, String) -> Answer;

/// What exists, for the fields beside the one that is tried.
#[derive(Clone)]
struct Known {
    volume: String,
    staging: String,
    target: String,
}

#[derive(Clone, Copy, PartialEq)]
enum Field {
    /// The volume must exist.
    Volume,
    /// What cannot exist is not here.
    Gone,
    /// A place that the call makes, or takes away.
    Place,
    /// A place where a volume must be.
    Holder,
}

/// A unary call.
macro_rules! call {
    ($client:expr, $method:ident, $request:expr) => {
        Box::pin(async move {
            let mut client = $client;
            client.$method($request).await.map(drop)
        })
    };
}

fn stage(known: Known) -> NodeStageVolumeRequest {
    NodeStageVolumeRequest {
        volume_id: known.volume,
        staging_target_path: known.staging,
        publish_context: HashMap::from([("attachment".to_owned(), "7".to_owned())]),
        volume_capability: Some(mk_mount("")),
        ..Default::default()
    }
}

fn publish(known: Known) -> NodePublishVolumeRequest {
    NodePublishVolumeRequest {
        volume_id: known.volume,
        staging_target_path: known.staging,
        target_path: known.target,
        volume_capability: Some(mk_mount("")),
        ..Default::default()
    }
}

fn expand(known: Known) -> NodeExpandVolumeRequest {
    let capacity_range = Some(CapacityRange { required_bytes: 1 << 30, limit_bytes: 0 });
    NodeExpandVolumeRequest {
        volume_id: known.volume,
        volume_path: known.target,
        capacity_range,
        ..Default::default()
    }
}

fn stats(known: Known) -> NodeGetVolumeStatsRequest {
    NodeGetVolumeStatsRequest { volume_id: known.volume, volume_path: known.target, ..Default::default() }
}

fn fields() -> Vec<(&'static str, &'static str, Field, Call)> {
    use Field::{Gone, Holder, Place, Volume};
    vec![
        ("NodeStageVolume", "volume_id", Volume, |c, known, text| {
            call!(c, node_stage_volume, stage(Known { volume: text, ..known }))
        }),
        ("NodeStageVolume", "staging_target_path", Place, |c, known, text| {
            call!(c, node_stage_volume, stage(Known { staging: text, ..known }))
        }),
        ("NodeUnstageVolume", "volume_id", Gone, |c, known, volume_id| {
            let staging_target_path = known.staging;
            call!(c, node_unstage_volume, NodeUnstageVolumeRequest { volume_id, staging_target_path })
        }),
        ("NodeUnstageVolume", "staging_target_path", Place, |c, known, staging_target_path| {
            let volume_id = known.volume;
            call!(c, node_unstage_volume, NodeUnstageVolumeRequest { volume_id, staging_target_path })
        }),
        ("NodePublishVolume", "volume_id", Volume, |c, known, text| {
            call!(c, node_publish_volume, publish(Known { volume: text, ..known }))
        }),
        ("NodePublishVolume", "target_path", Place, |c, known, text| {
            call!(c, node_publish_volume, publish(Known { target: text, ..known }))
        }),
        ("NodePublishVolume", "staging_target_path", Place, |c, known, text| {
            call!(c, node_publish_volume, publish(Known { staging: text, ..known }))
        }),
        ("NodeUnpublishVolume", "volume_id", Gone, |c, known, volume_id| {
            let target_path = known.target;
            call!(c, node_unpublish_volume, NodeUnpublishVolumeRequest { volume_id, target_path })
        }),
        ("NodeUnpublishVolume", "target_path", Place, |c, known, target_path| {
            let volume_id = known.volume;
            call!(c, node_unpublish_volume, NodeUnpublishVolumeRequest { volume_id, target_path })
        }),
        ("NodeGetVolumeStats", "volume_id", Volume, |c, known, text| {
            call!(c, node_get_volume_stats, stats(Known { volume: text, ..known }))
        }),
        ("NodeGetVolumeStats", "volume_path", Holder, |c, known, text| {
            call!(c, node_get_volume_stats, stats(Known { target: text, ..known }))
        }),
        ("NodeExpandVolume", "volume_id", Volume, |c, known, text| {
            call!(c, node_expand_volume, expand(Known { volume: text, ..known }))
        }),
        ("NodeExpandVolume", "volume_path", Holder, |c, known, text| {
            call!(c, node_expand_volume, expand(Known { target: text, ..known }))
        }),
        ("NodeGetVolumeHealth", "volume_id", Volume, |c, _, volume_id| {
            let request = NodeGetVolumeHealthRequest { volume_id, ..Default::default() };
            call!(c, node_get_volume_health, request)
        }),
    ]
}

async fn start(dir: &Path) -> (Client, Known, Arc<dyn RecordStore>) {
    let kubelet_dir = dir.join("kubelet");
    std::fs::create_dir(&kubelet_dir).unwrap();
    let record = VolumeRecord {
        attached_to: Some(NodeName("node-a".to_owned())),
        attachment: Attachment(7),
        ..mk_record(0xab, "data", &["node-a"])
    };
    let store: Arc<dyn RecordStore> = Arc::new(SledStore::open(&dir.join("store")).unwrap());
    store.create(record.clone()).await.unwrap();
    let known = Known {
        volume: record.volume_id.to_string(),
        staging: kubelet_dir.join("staging").display().to_string(),
        target: kubelet_dir.join("target").display().to_string(),
    };
    let config = NodeConfig {
        node: NodeName("node-a".to_owned()),
        data_socket: dir.join("nobody.sock"),
        kubelet_dir,
        zone: None,
        volumes_max: None,
    };
    let socket = dir.join("csi.sock");
    let listener = bind_unix(&socket).await.unwrap();
    let service = NodeService::new(config, Arc::clone(&store)).unwrap();
    let router = server().add_service(NodeServer::new(service));
    tokio::spawn(serve_unix(router, listener, std::future::pending()));
    let endpoint = Endpoint::from_shared(format!("unix://{}", socket.display())).unwrap();
    (NodeClient::new(endpoint.connect().await.unwrap()), known, store)
}

fn files_below(dir: &Path) -> Vec<PathBuf> {
    std::fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn no_text_field_takes_what_it_must_not_be_and_nothing_is_made() {
    let dir = tempfile::Builder::new().prefix("holdfast-fields-").tempdir_in("/var/tmp").unwrap();
    let (client, known, store) = start(dir.path()).await;
    let before = store.list().await.unwrap();
    let ids = ["x".repeat(4096), "../../etc".to_owned(), "a\nb".to_owned(), known.volume.to_uppercase()];
    let inside = |tail: &str| dir.path().join("kubelet").join(tail).display().to_string();
    let paths = [
        "relative/path".to_owned(),
        "/".to_owned(),
        "/etc/holdfast-test".to_owned(),
        dir.path().join("beside").display().to_string(),
        inside("../beside/x"),
        inside("a/../../x"),
    ];
    let mut wrong = Vec::new();
    for (rpc, field, kind, call) in fields() {
        let missing = call(client.clone(), known.clone(), String::new()).await.unwrap_err();
        // The specification has its own code for a caller that skipped staging.
        let unstaged = (rpc, field) == ("NodePublishVolume", "staging_target_path");
        let code = if unstaged { Code::FailedPrecondition } else { Code::InvalidArgument };
        assert_eq!(missing.code(), code, "{rpc} without {field}: {missing}");
        assert!(missing.message().contains(field), "{rpc}: {missing}");
        let texts: &[String] = if matches!(kind, Field::Volume | Field::Gone) { &ids } else { &paths };
        for text in texts {
            let answer = call(client.clone(), known.clone(), text.clone()).await;
            let shown: String = text.chars().take(60).collect();
            let what = format!("{rpc} {field} \"{shown}\": {answer:?}");
            let code = answer.as_ref().err().map(Status::code);
            let expected = match kind {
                Field::Volume | Field::Holder => Some(Code::NotFound),
                Field::Gone => None,
                Field::Place => Some(Code::InvalidArgument),
            };
            let named = answer.err().is_none_or(|s| s.message().contains(field) && s.message().len() < 1000);
            if code != expected || !named {
                wrong.push(what);
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    assert_eq!(files_below(&dir.path().join("kubelet")), Vec::<PathBuf>::new(), "something was made");
    assert!(!dir.path().join("beside").exists() && !Path::new("/etc/holdfast-test").exists());
    assert_eq!(store.list().await.unwrap(), before, "a record was changed");
}
