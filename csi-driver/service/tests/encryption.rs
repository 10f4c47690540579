//! What the controller makes of `encryption`: a salt for each volume, and for a clone all that its source has.

use holdfast_storage_core::encryption::Encryption;
use holdfast_storage_core::ids::KeyCheck;
use holdfast_storage_core::transitions::bind_key;
use tonic::Code;

use crate::support::requests::{mk_create, mk_from_snapshot, mk_from_volume, mk_with};
use crate::support::world::World;

#[tokio::test(flavor = "multi_thread")]
async fn each_encrypted_volume_has_a_salt_of_its_own_and_is_bound_to_no_key_yet() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let encrypted = |name: &str| mk_with(mk_create(name), "encryption", "aes-xts");
    let one = controller.create(&encrypted("one")).await.unwrap().volume_id;
    let two = controller.create(&encrypted("two")).await.unwrap().volume_id;
    let none = controller.create(&mk_with(mk_create("none"), "encryption", "none")).await.unwrap().volume_id;
    let (first, second) = (world.record(&one).await.encryption, world.record(&two).await.encryption);
    assert!(first.unwrap().salt != second.unwrap().salt);
    assert_eq!(first.unwrap().key_check, None);
    assert_eq!(world.record(&none).await.encryption, None);
    assert_eq!(controller.create(&encrypted("one")).await.unwrap().volume_id, one, "asked for again");
    assert_eq!(world.record(&one).await.encryption, first);
    let other = controller.create(&mk_create("one")).await.unwrap_err();
    assert_eq!(other.code(), Code::AlreadyExists);
    let fixed = controller.modify(&one, &[("encryption", "none")]).await.unwrap_err();
    assert!(fixed.message().contains("\"encryption\" cannot be changed"), "{fixed}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_clone_has_its_source_s_salt_and_key_check_and_no_other_encryption() {
    let world = World::start(&["a", "b", "c"]).await;
    let controller = world.controller().await;
    let source =
        controller.create(&mk_with(mk_create("source"), "encryption", "aes-xts")).await.unwrap().volume_id;
    let early = controller.snapshot(&source, "early").await.unwrap().snapshot_id;
    world.change(&source, |record| bind_key(record, KeyCheck(5)).unwrap()).await;
    let bound = world.record(&source).await.encryption;
    assert!(matches!(bound, Some(Encryption { key_check: Some(KeyCheck(5)), .. })));
    for (name, request) in [
        ("of-volume", mk_from_volume("of-volume", &source)),
        ("of-snapshot", mk_from_snapshot("of-snapshot", &early)),
    ] {
        let refused = controller.create(&request).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument);
        assert!(refused.message().contains("encryption \"none\" contradicts the source"), "{refused}");
        let clone = controller.create(&mk_with(request, "encryption", "aes-xts")).await.unwrap().volume_id;
        assert_eq!(world.record(&clone).await.encryption, bound, "{name}");
    }
}
