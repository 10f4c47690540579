//! Every record store obeys the same rules: one suite, run on sled itself and on sled behind the registry, plain and
//! with TLS; and what is special to each.

// Tests and what they share may panic.
#![allow(clippy::unwrap_used)]

mod support;

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use holdfast_service::{RegistryClient, SledStore};
use holdfast_storage_core::ids::{Attachment, Generation, NodeName, RecordVersion, TargetId, VolumeId};
use holdfast_storage_core::node_directory::{NodeDirectory, NodeInfo};
use holdfast_storage_core::record::{Formatted, VolumeRecord};
use holdfast_storage_core::record_store::{RecordStore, StoreError, Versioned};
use support::{Registry, mk_record, pki};

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
    let version = registry.store.create(record.clone()).await.unwrap();

    a.announce(mk_node("node-a")).await.unwrap();
    assert!(matches!(b.announce(mk_node("node-a")).await, Err(StoreError::Refused(_))));
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
    for change in [smaller, retired] {
        assert!(matches!(a.swap(version, change).await, Err(StoreError::Refused(_))));
    }
    assert_eq!(registry.store.read(record.volume_id).await.unwrap().version, version);

    let stranger = support::pki(&["node-a"]).identity("node-a");
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
            .args(["--exact", "a_killed_writer_loses_no_swap_it_answered", "--nocapture"])
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

/// What every record store promises.
async fn conformance(store: Arc<dyn RecordStore>) {
    creates_are_unique_by_id_and_name(store.as_ref()).await;
    swaps_need_the_version(store.as_ref()).await;
    some_swaps_are_never_allowed(store.as_ref()).await;
    removal_needs_a_tombstone(store.as_ref()).await;
    of_racing_swaps_exactly_one_wins(&store).await;
    of_racing_creates_by_one_name_exactly_one_wins(&store).await;
}

async fn creates_are_unique_by_id_and_name(store: &dyn RecordStore) {
    let id = VolumeId(0x10);
    assert_eq!(store.read(id).await, Err(StoreError::NotFound(id)));
    let record = mk_record(0x10, "ten", &["node-a", "node-b"]);
    let version = store.create(record.clone()).await.unwrap();
    assert_eq!(store.read(id).await.unwrap(), Versioned { version, record: record.clone() });
    assert_eq!(store.create(record.clone()).await, Err(StoreError::Exists(id)));
    let same_name = mk_record(0x11, "ten", &["node-a"]);
    assert_eq!(store.create(same_name).await, Err(StoreError::Exists(id)));
    assert_eq!(store.list().await.unwrap(), [Versioned { version, record }]);
}

async fn swaps_need_the_version(store: &dyn RecordStore) {
    let record = mk_record(0x20, "twenty", &["node-a"]);
    let id = record.volume_id;
    let first = store.create(record.clone()).await.unwrap();
    let next = VolumeRecord { generation: Generation(1), target_id: Some(TargetId(7)), ..record.clone() };
    let second = store.swap(first, next.clone()).await.unwrap();
    assert!(second > first);
    assert_eq!(store.swap(first, record.clone()).await, Err(StoreError::Conflict(id)), "the old version");
    assert_eq!(store.swap(second.next(), record).await, Err(StoreError::Conflict(id)), "a version to come");
    assert_eq!(store.read(id).await.unwrap(), Versioned { version: second, record: next });
    let unknown = mk_record(0x21, "none", &["node-a"]);
    assert_eq!(store.swap(RecordVersion(1), unknown).await, Err(StoreError::NotFound(VolumeId(0x21))));
}

async fn some_swaps_are_never_allowed(store: &dyn RecordStore) {
    let mut record = mk_record(0x30, "thirty", &["node-a"]);
    record.generation = Generation(5);
    record.attachment = Attachment(5);
    let version = store.create(record.clone()).await.unwrap();
    for forbidden in [
        VolumeRecord { name: "other".to_owned(), ..record.clone() },
        VolumeRecord { in_sync: std::collections::BTreeSet::new(), ..record.clone() },
        VolumeRecord { generation: Generation(4), ..record.clone() },
        VolumeRecord { attachment: Attachment(4), ..record.clone() },
    ] {
        assert!(matches!(store.swap(version, forbidden).await, Err(StoreError::Refused(_))));
    }
    assert_eq!(store.read(record.volume_id).await.unwrap(), Versioned { version, record });
}

async fn removal_needs_a_tombstone(store: &dyn RecordStore) {
    let record = mk_record(0x40, "forty", &["node-a"]);
    let id = record.volume_id;
    let version = store.create(record.clone()).await.unwrap();
    assert!(matches!(store.remove(version, id).await, Err(StoreError::Refused(_))));
    let buried = VolumeRecord { deleting: true, ..record.clone() };
    let tombstone = store.swap(version, buried.clone()).await.unwrap();
    assert!(
        matches!(store.swap(tombstone, record).await, Err(StoreError::Refused(_))),
        "it is never taken back"
    );
    let reused = mk_record(0x41, "forty", &["node-a"]);
    store.create(reused).await.expect("the name of a deleting volume is free");
    assert_eq!(store.remove(version, id).await, Err(StoreError::Conflict(id)));
    store.remove(tombstone, id).await.unwrap();
    assert_eq!(store.read(id).await, Err(StoreError::NotFound(id)));
    assert_eq!(store.remove(tombstone, id).await, Err(StoreError::NotFound(id)));
    let third = mk_record(0x42, "forty", &["node-a"]);
    assert_eq!(
        store.create(third).await,
        Err(StoreError::Exists(VolumeId(0x41))),
        "removal frees no other's name"
    );
}

async fn of_racing_swaps_exactly_one_wins(store: &Arc<dyn RecordStore>) {
    const RACERS: u128 = 8;
    let record = mk_record(0x50, "fifty", &["node-a"]);
    let mut found = Versioned { version: store.create(record.clone()).await.unwrap(), record };
    for _ in 0..5 {
        let next_generation = found.record.generation.next();
        let racers = (1..=RACERS).map(|racer| {
            let (store, base) = (Arc::clone(store), found.clone());
            tokio::spawn(async move {
                let target_id = Some(TargetId(racer));
                let record = VolumeRecord { generation: next_generation, target_id, ..base.record };
                (racer, store.swap(base.version, record).await)
            })
        });
        let mut winners = Vec::new();
        for racer in racers.collect::<Vec<_>>() {
            match racer.await.unwrap() {
                (racer, Ok(version)) => winners.push((racer, version)),
                (_, Err(error)) => assert_eq!(error, StoreError::Conflict(VolumeId(0x50))),
            }
        }
        found = store.read(VolumeId(0x50)).await.unwrap();
        let stored = (found.record.target_id.unwrap().0, found.version);
        assert_eq!(winners, [stored], "exactly one wins, and its record is the stored one");
        assert_eq!(found.record.formatted, Formatted::Never);
    }
}

async fn of_racing_creates_by_one_name_exactly_one_wins(store: &Arc<dyn RecordStore>) {
    let racers = (0x60..0x68_u128).map(|id| {
        let store = Arc::clone(store);
        tokio::spawn(async move { store.create(mk_record(id, "sixty", &["node-a"])).await })
    });
    let mut made = 0;
    for racer in racers.collect::<Vec<_>>() {
        match racer.await.unwrap() {
            Ok(_) => made += 1,
            Err(error) => assert!(matches!(error, StoreError::Exists(_)), "{error}"),
        }
    }
    assert_eq!(made, 1);
    let named = store.list().await.unwrap().into_iter().filter(|v| v.record.name == "sixty").count();
    assert_eq!(named, 1);
}

fn mk_node(name: &str) -> NodeInfo {
    NodeInfo {
        name: NodeName(name.to_owned()),
        control_address: "127.0.0.1:1".to_owned(),
        nbd_address: "127.0.0.1:2".to_owned(),
        capacity_bytes: 10,
        available_bytes: 5,
    }
}
