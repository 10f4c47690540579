//! What the pods of a node may change, by tokens as kubelet asks for them: the rights and the admission policies of
//! `manifests/base/storage`.

use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use holdfast_service::{KubernetesDirectory, KubernetesStore};
use holdfast_storage_core::encryption::Encryption;
use holdfast_storage_core::ids::{Attachment, KeyCheck, Lineage, NodeName, Salt};
use holdfast_storage_core::node_directory::{NodeDirectory, NodeInfo, NodeState, NodeStates};
use holdfast_storage_core::record::{Formatted, VolumeRecord};
use holdfast_storage_core::record_store::{RecordStore, StoreError};
use holdfast_tests::api_server::ADMIN;
use libtest_mimic::Trial;

use crate::bed::Bed;
use crate::nodes::mk_node;
use crate::suite::records::mk_record;
use crate::suite::store_suite;
use crate::trial;

/// From a policy's installation until the server heeds it.
const HEEDED_WITHIN: Duration = Duration::from_secs(60);

/// Of a volume that is bound to a key.
const BOUND: Option<Encryption> = Some(Encryption { salt: Salt(1), key_check: Some(KeyCheck(2)) });

pub fn trials() -> Vec<Trial> {
    vec![
        trial("admission::a_node_changes_only_what_is_its_to_change", a_node_changes_only_its_own),
        trial("admission::the_controllers_rights_suffice", the_controllers_rights_suffice),
    ]
}

fn a_node_changes_only_its_own(bed: &Bed) -> Result<()> {
    let admin = bed.store()?;
    let data = bed.pod_client("holdfast-data", "node-a")?;
    let stranger = KubernetesStore::new(bed.pod_client("holdfast-data", "node-x")?);
    let node_service = KubernetesStore::new(bed.pod_client("holdfast-node", "node-a")?);
    let operator = KubernetesDirectory::new(bed.client(ADMIN)?);
    bed.run(async {
        let directory = KubernetesDirectory::new(data.clone());
        directory.announce(mk_node("node-a")).await?;
        heeded(&directory).await?;
        let node = NodeName("node-a".to_owned());
        let decided = directory.set_node_state(node.clone(), NodeState::Draining).await;
        let reason = refused("what an operator decides about the node", decided)?;
        ensure!(reason.contains("not the node's to change"), "{reason}");
        operator.set_node_state(node.clone(), NodeState::Draining).await?;
        // What is announced is the same but for the free space, and leaves the decision as it is.
        directory.announce(NodeInfo { available_bytes: 1, zone: None, ..mk_node("node-a") }).await?;
        refused("taking it back", directory.set_node_state(node.clone(), NodeState::Active).await)?;
        ensure!(operator.node_states().await? == [(node.clone(), NodeState::Draining)].into());
        operator.set_node_state(node, NodeState::Active).await?;
        let own = KubernetesStore::new(data);
        let mut record = mk_record(1, "guarded", &["node-a", "node-b"]);
        record.encryption = Some(Encryption { salt: Salt(1), key_check: None });
        let mut version = admin.create(record.clone()).await?;
        for (what, changed) in forbidden(&record) {
            let reason = refused(what, own.swap(version, changed).await)?;
            ensure!(
                reason.contains("ValidatingAdmissionPolicy"),
                "{what} was refused, but by no policy: {reason}"
            );
        }
        refused("a record made by a node", own.create(mk_record(2, "made", &["node-a"])).await)?;
        let next = VolumeRecord { generation: record.generation.next(), ..record };
        refused("a swap by a node without a part in it", stranger.swap(version, next.clone()).await)?;
        version = own.swap(version, next.clone()).await?;
        let formatting = VolumeRecord { formatted: Formatted::Formatting, ..next.clone() };
        version = node_service.swap(version, formatting.clone()).await?;
        let published = VolumeRecord { attached_to: Some(NodeName("node-a".to_owned())), ..formatting };
        version = admin.swap(version, published.clone()).await?;
        let bound = VolumeRecord { encryption: BOUND, ..published };
        version = node_service.swap(version, bound.clone()).await?;
        let larger = VolumeRecord { size_bytes: next.size_bytes * 2, ..bound };
        version = own.swap(version, larger.clone()).await?;
        let buried = VolumeRecord { deleting: true, ..larger.clone() };
        refused("a tombstone by a node", own.swap(version, buried.clone()).await)?;
        version = admin.swap(version, buried).await?;
        refused("a removal by a node", own.remove(version, larger.volume_id).await)?;
        admin.remove(version, larger.volume_id).await?;
        Ok(())
    })
}

/// Waits until the server knows the policies: another node's name is refused.
async fn heeded(directory: &KubernetesDirectory) -> Result<()> {
    let begun = Instant::now();
    loop {
        match directory.announce(mk_node(&format!("node-{}", rand::random::<u16>()))).await {
            Err(StoreError::Refused(reason)) => {
                ensure!(reason.contains("announces itself only"), "{reason}");
                return Ok(());
            }
            answer => answer?,
        }
        ensure!(begun.elapsed() < HEEDED_WITHIN, "a node may announce any other one");
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
}

/// What is the controller's to decide.
fn forbidden(record: &VolumeRecord) -> Vec<(&'static str, VolumeRecord)> {
    let mut params = record.params.clone();
    params.replicas += 1;
    let with = |change: fn(&mut VolumeRecord)| {
        let mut changed = record.clone();
        change(&mut changed);
        changed
    };
    vec![
        ("an attachment", with(|r| r.attachment = Attachment(r.attachment.0 + 1))),
        (
            "another node that it is attached to",
            with(|r| r.attached_to = Some(NodeName("node-a".to_owned()))),
        ),
        ("read-only", with(|r| r.read_only = !r.read_only)),
        ("a tombstone", with(|r| r.deleting = true)),
        ("another lineage", with(|r| r.lineage = Lineage(r.lineage.0 + 1))),
        ("retirement", with(|r| r.retired = true)),
        ("a key, by a node that the volume is not published to", with(|r| r.encryption = BOUND)),
        ("other parameters", VolumeRecord { params, ..record.clone() }),
        ("a smaller volume", with(|r| r.size_bytes /= 2)),
    ]
}

fn refused<T: std::fmt::Debug>(what: &str, answer: Result<T, StoreError>) -> Result<String> {
    match answer {
        Err(StoreError::Refused(reason)) => Ok(reason),
        answer => bail!("{what}: {answer:?}"),
    }
}

/// The same suite, with the token of the controller's pod.
fn the_controllers_rights_suffice(bed: &Bed) -> Result<()> {
    bed.store()?;
    let client = bed.pod_client("holdfast-controller", "node-a")?;
    let (store, nodes) = (KubernetesStore::new(client.clone()), KubernetesDirectory::new(client));
    let announcing = KubernetesDirectory::new(bed.client(ADMIN)?);
    bed.run(async {
        store_suite::conformance(Arc::new(store)).await;
        announcing.announce(mk_node("node-a")).await?;
        let node = NodeName("node-a".to_owned());
        nodes.set_node_state(node.clone(), NodeState::Removed).await?;
        ensure!(nodes.node_states().await?.len() == 1);
        // Other tests have a node of that name.
        nodes.set_node_state(node, NodeState::Active).await?;
        Ok(())
    })
}
