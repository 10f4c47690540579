//! Every record store obeys the same rules: one suite, run here on sled itself and on sled behind the registry, plain and
//! with TLS, and in the tier `kubernetes` on an API server; and what is special to each.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use holdfast_service::{RegistryClient, SledStore};
use holdfast_storage_core::encryption::Encryption;
use holdfast_storage_core::ids::{Generation, KeyCheck, NodeName, Salt, VolumeId};
use holdfast_storage_core::node_directory::{NodeDirectory, NodeInfo};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::{RecordStore, StoreError, Versioned};

use crate::support::store_suite::conformance;
use crate::support::{Registry, mk_record, pki};

/// Set for the child of the kill test: folder of the store it writes to.
const CHILD_STORE: &str = "HOLDFAST_TEST_CHILD_STORE";

#[tokio::test(flavor = "multi_thread")]
async fn sled_obeys_the_rules() {
    let dir = tempfile::tempdir().unwrap();
    conformance(Arc::new(SledStore::open(dir.path()).unwrap())).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registry_obeys_the_rules() {
    let registry = Registry::start(None).await;
    conformance(Arc::new(registry.client(None))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_registry_with_tls_obeys_the_rules() {
    let pki = pki(&["holdfast-controller"]);
    let identity = pki.identity("holdfast-controller");
    let registry = Registry::start(Some(identity.clone())).await;
    conformance(Arc::new(registry.client(Some(&identity)))).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn with_tls_a_node_acts_only_for_itself_and_a_stranger_not_at_all() {
    let pki = pki(&["holdfast-controller", "node-a", "node-b"]);
    let registry = Registry::start(Some(pki.identity("holdfast-controller"))).await;
    let (a, b) =
        (registry.client(Some(&pki.identity("node-a"))), registry.client(Some(&pki.identity("node-b"))));
    let mut record = mk_record(1, "data", &["node-a"]);
    record.encryption = Some(Encryption { salt: Salt(1), key_check: None });
    let version = registry.store.create(record.clone()).await.unwrap();

    a.announce(mk_node("node-a")).await.unwrap();
    assert!(matches!(b.announce(mk_node("node-a")).await, Err(StoreError::Refused(_))));
    let nowhere = NodeInfo { zone: Some("../zone".to_owned()), ..mk_node("node-a") };
    assert!(matches!(a.announce(nowhere).await, Err(StoreError::Refused(_))), "a zone is a label's value");
    let classless = NodeInfo { pool_class: Some("fast pool".to_owned()), ..mk_node("node-a") };
    assert!(matches!(a.announce(classless).await, Err(StoreError::Refused(_))), "and so is a pool's class");
    assert!(matches!(a.create(mk_record(2, "other", &["node-a"])).await, Err(StoreError::Refused(_))));
    assert!(matches!(a.remove(version, record.volume_id).await, Err(StoreError::Refused(_))));

    record.generation = Generation(1);
    assert!(
        matches!(b.swap(version, record.clone()).await, Err(StoreError::Refused(_))),
        "b has no part in it"
    );
    let version = a.swap(version, record.clone()).await.unwrap();
    record.attached_to = Some(NodeName("node-a".to_owned()));
    assert!(
        matches!(a.swap(version, record.clone()).await, Err(StoreError::Refused(_))),
        "publishing is not a's"
    );
    record.attached_to = None;
    record.size_bytes += 1 << 20;
    let version = a.swap(version, record.clone()).await.expect("its target grows the volume (R31)");
    let smaller = VolumeRecord { size_bytes: 1 << 20, ..record.clone() };
    let retired = VolumeRecord { retired: true, ..record.clone() };
    let mut faster = record.clone();
    faster.params.limits.bytes_per_s *= 2;
    let mut more = record.clone();
    more.params.replicas += 1;
    let bound = Some(Encryption { salt: Salt(1), key_check: Some(KeyCheck(2)) });
    let bound = VolumeRecord { encryption: bound, ..record.clone() };
    for change in [smaller, retired, faster, more, bound.clone()] {
        assert!(matches!(a.swap(version, change).await, Err(StoreError::Refused(_))));
    }
    assert_eq!(registry.store.read(record.volume_id).await.unwrap().version, version);
    let here = Some(NodeName("node-a".to_owned()));
    let published = VolumeRecord { attached_to: here.clone(), ..record.clone() };
    let version = registry.store.swap(version, published).await.unwrap();
    let bound = VolumeRecord { attached_to: here, ..bound };
    a.swap(version, bound).await.expect("the node that has it binds it to a key");

    let stranger = crate::support::pki(&["node-a"]).identity("node-a");
    assert!(matches!(registry.client(Some(&stranger)).list().await, Err(StoreError::Unknown(_))));
    assert!(matches!(registry.client(None).list().await, Err(StoreError::Unknown(_))));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_does_not_answer_leaves_the_outcome_unknown_and_is_found_again() {
    let mut registry = Registry::start(None).await;
    let client = registry.client(None);
    let record = mk_record(1, "data", &["node-a"]);
    let version = client.create(record.clone()).await.unwrap();

    registry.stop().await;
    let begun = Instant::now();
    assert!(matches!(client.swap(version, record.clone()).await, Err(StoreError::Unknown(_))));
    assert!(matches!(client.read(record.volume_id).await, Err(StoreError::Unknown(_))));
    assert!(begun.elapsed() < Duration::from_secs(8), "{:?}", begun.elapsed());

    registry.restart().await;
    let found = client.read(record.volume_id).await.unwrap();
    assert_eq!(found, Versioned { version, record });
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_accepts_and_says_nothing_is_given_up_in_time() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let client = RegistryClient::new(&listener.local_addr().unwrap().to_string(), None).unwrap();
    let begun = Instant::now();
    assert!(matches!(client.read(VolumeId(1)).await, Err(StoreError::Unknown(_))));
    assert!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_are_listed_as_they_announced_themselves_last() {
    let registry = Registry::start(None).await;
    let client = registry.client(None);
    client.announce(mk_node("node-a")).await.unwrap();
    client.announce(mk_node("node-b")).await.unwrap();
    let moved = NodeInfo { control_address: "10.0.0.9:1".to_owned(), ..mk_node("node-a") };
    client.announce(moved.clone()).await.unwrap();
    assert_eq!(client.list_nodes().await.unwrap(), [moved, mk_node("node-b")]);
}

#[test]
fn addresses_without_a_port_are_refused_at_once() {
    for address in ["", "host", "host:", "host:port"] {
        assert!(RegistryClient::new(address, None).is_err(), "{address}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn records_are_there_after_the_store_is_opened_again() {
    let dir = tempfile::tempdir().unwrap();
    let record = mk_record(1, "data", &["node-a"]);
    let store = SledStore::open(dir.path()).unwrap();
    let version = store.create(record.clone()).await.unwrap();
    drop(store);
    let store = SledStore::open(dir.path()).unwrap();
    assert_eq!(store.read(record.volume_id).await.unwrap(), Versioned { version, record: record.clone() });
    let again = VolumeRecord { volume_id: VolumeId(2), ..record };
    assert!(matches!(store.create(again).await, Err(StoreError::Exists(VolumeId(1)))), "names survive too");
}

/// The parent kills the child in the middle of its swaps; whatever the child said was swapped must be there.
#[tokio::test(flavor = "multi_thread")]
async fn a_killed_writer_loses_no_swap_it_answered() {
    if let Ok(dir) = std::env::var(CHILD_STORE) {
        return write_until_killed(&dir).await;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut last = 0;
    for round in 0..5_u32 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "record_stores::a_killed_writer_loses_no_swap_it_answered", "--nocapture"])
            .env(CHILD_STORE, dir.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        let answered =
            lines.map_while(Result::ok).filter_map(|line| line.strip_prefix("swapped ")?.parse::<u64>().ok());
        for generation in answered.take(5 + 7 * round as usize) {
            last = generation;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        let store = SledStore::open(dir.path()).unwrap();
        let found = store.read(VolumeId(1)).await.unwrap();
        // The one under way at the kill may be there or not.
        assert!(found.record.generation.0 >= last, "round {round}: {last} lost: {found:?}");
        assert_eq!(found.version.0, found.record.generation.0 + 1, "one swap, one version");
    }
    assert!(last >= 5 + 7 * 4);
}

async fn write_until_killed(dir: &str) {
    let store = SledStore::open(dir.as_ref()).unwrap();
    // The first round creates it.
    let _ = store.create(mk_record(1, "data", &["node-a"])).await;
    let mut found = store.read(VolumeId(1)).await.unwrap();
    loop {
        found.record.generation = found.record.generation.next();
        found.version = store.swap(found.version, found.record.clone()).await.unwrap();
        println!("swapped {}", found.record.generation);
    }
}

fn mk_node(name: &str) -> NodeInfo {
    NodeInfo {
        name: NodeName(name.to_owned()),
        control_address: "127.0.0.1:1".to_owned(),
        nbd_address: "127.0.0.1:2".to_owned(),
        capacity_bytes: 10,
        available_bytes: 5,
        zone: Some("zone-1".to_owned()),
        pool_class: Some("fast".to_owned()),
        volumes_max: Some(9),
    }
}
