//! What every record store promises, whatever it is made of. The store must be empty.

use std::sync::Arc;

use holdfast_storage_core::encryption::Encryption;
use holdfast_storage_core::ids::{
    Attachment, Epoch, Generation, KeyCheck, RecordVersion, Salt, TargetId, VolumeId,
};
use holdfast_storage_core::record::{Formatted, VolumeRecord};
use holdfast_storage_core::record_store::{RecordStore, StoreError, Versioned};

use super::records::mk_record;

/// What every record store promises.
pub async fn conformance(store: Arc<dyn RecordStore>) {
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
    assert_eq!(store.list().await.unwrap(), [Arc::new(Versioned { version, record })]);
}

async fn swaps_need_the_version(store: &dyn RecordStore) {
    let mut record = mk_record(0x20, "twenty", &["node-a"]);
    // Every bit of a nonce is kept.
    record.epoch = Epoch { number: 1, nonce: u64::MAX };
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
    record.encryption = Some(Encryption { salt: Salt(1), key_check: None });
    let version = store.create(record.clone()).await.unwrap();
    let with = |salt, key_check| Some(Encryption { salt: Salt(salt), key_check });
    let bound = VolumeRecord { encryption: with(1, Some(KeyCheck(2))), ..record.clone() };
    let resalted = VolumeRecord { encryption: with(3, Some(KeyCheck(2))), ..record.clone() };
    assert!(matches!(store.swap(version, resalted.clone()).await, Err(StoreError::Refused(_))));
    let version = store.swap(version, bound.clone()).await.expect("bound to a key once");
    let record = bound;
    for forbidden in [
        VolumeRecord { name: "other".to_owned(), ..record.clone() },
        VolumeRecord { in_sync: std::collections::BTreeSet::new(), ..record.clone() },
        VolumeRecord { generation: Generation(4), ..record.clone() },
        VolumeRecord { attachment: Attachment(4), ..record.clone() },
        VolumeRecord { encryption: None, ..record.clone() },
        VolumeRecord { encryption: with(1, None), ..record.clone() },
        VolumeRecord { encryption: with(1, Some(KeyCheck(4))), ..record.clone() },
        resalted,
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
