//! What a data process asks of a volume before it starts a target: its front end, and of an encrypted one its key. Resync of
//! ciphertext, with nobody's key.
#![allow(clippy::unwrap_used, missing_docs)]

mod common;

use std::time::Duration;

use common::{Cluster, MIB, flush, pattern, read, write};
use holdfast_storage_core::encryption::{Encryption, EncryptionKind, VolumeKey};
use holdfast_storage_core::ids::{Salt, VolumeId};
use holdfast_storage_core::record::FrontEndChoice;

const SIZE: u64 = 64 * MIB;

/// A volume that is encrypted and bound to the key.
async fn mk_encrypted(cluster: &Cluster, key: &VolumeKey) -> VolumeId {
    let volume = cluster.create_volume(SIZE).await;
    cluster.store.update(volume, |record| {
        record.params.encryption = EncryptionKind::AesXts;
        record.encryption = Some(Encryption { salt: Salt(1), key_check: Some(key.check()) });
    });
    volume
}

fn mk_key(byte: u8) -> VolumeKey {
    VolumeKey::from_bytes(&[byte; 64]).unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_volume_that_asks_for_another_front_end_is_refused_by_a_sentence() {
    let cluster = Cluster::start(3).await;
    let volume = cluster.create_volume(SIZE).await;
    cluster.store.update(volume, |record| record.params.front_end = FrontEndChoice::FuseLoop);
    let attachment = cluster.publish(volume, 0);
    let refused = cluster.process(0).attach(volume, attachment).await.unwrap_err().to_string();
    assert!(refused.contains("frontEnd fuse-loop") && refused.contains("--front-end none"), "{refused}");
    assert!(cluster.process(0).status(volume).is_none());
    assert_eq!(cluster.store.get(volume).record.generation.0, 0, "no target was started");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_key_is_needed_for_an_encrypted_volume_and_only_its_own_will_do() {
    let cluster = Cluster::start(3).await;
    let key = mk_key(1);
    let encrypted = mk_encrypted(&cluster, &key).await;
    let attachment = cluster.publish(encrypted, 0);
    let process = cluster.process(0);
    for (given, why) in [(None, "no key came"), (Some(mk_key(2)), "not the one that its record is bound to")]
    {
        let refused = process.attach_with(encrypted, attachment, given).await.unwrap_err().to_string();
        assert!(refused.contains(why), "{refused}");
    }
    assert_eq!(cluster.store.get(encrypted).record.generation.0, 0, "no target was started");
    process.attach_with(encrypted, attachment, Some(key.clone())).await.unwrap();
    process.attach_with(encrypted, attachment, Some(key.clone())).await.expect("attached twice is attached");
    for given in [None, Some(mk_key(2))] {
        let refused = process.attach_with(encrypted, attachment, given).await.unwrap_err().to_string();
        assert!(refused.contains("not with this key"), "{refused}");
    }

    let plain = cluster.create_volume(SIZE).await;
    let attachment = cluster.publish(plain, 0);
    let refused = process.attach_with(plain, attachment, Some(key)).await.unwrap_err().to_string();
    assert!(refused.contains("it is not encrypted"), "{refused}");
    process.attach(plain, attachment).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_returning_replica_of_an_encrypted_volume_gets_ciphertext_and_reads_as_the_others() {
    let mut cluster = Cluster::start(3).await;
    let key = mk_key(1);
    let volume = mk_encrypted(&cluster, &key).await;
    let attachment = cluster.publish(volume, 0);
    cluster.process(0).attach_with(volume, attachment, Some(key.clone())).await.unwrap();
    let device = cluster.process(0).device(volume).unwrap();
    write(&device, 0, pattern(0, 1, MIB as usize)).await.unwrap();
    cluster.kill(2);
    write(&device, 4096, pattern(4096, 2, MIB as usize)).await.unwrap();
    flush(&device).await.unwrap();
    cluster.start_node(2).await;
    cluster.wait_members(volume, 3, Duration::from_secs(30)).await;
    cluster.process(0).detach(volume).await.unwrap();

    let attachment = cluster.publish(volume, 2);
    cluster.process(2).attach_with(volume, attachment, Some(key)).await.unwrap();
    let device = cluster.process(2).device(volume).unwrap();
    assert_eq!(read(&device, 0, 4096).await.unwrap(), pattern(0, 1, 4096));
    assert_eq!(read(&device, 4096, MIB as u32).await.unwrap(), pattern(4096, 2, MIB as usize));
    assert_eq!(read(&device, 32 * MIB, 4096).await.unwrap(), vec![0; 4096], "never written");
    cluster.assert_members_equal(volume).await;
}
