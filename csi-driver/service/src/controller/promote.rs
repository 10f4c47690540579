//! PromoteReplica: an operator's word that one replica is the volume from now on (R26, R35).
//!
//! The call reads the record, waits, and swaps the promoted record in under the version it read: for all that time the
//! volume was unpublished, and nobody changed anything of it. A crash before the swap: nothing happened.

use std::time::Duration;

use holdfast_proto::storage::{PromoteReplicaReply, PromoteReplicaRequest};
use holdfast_storage_core::ids::{Lineage, ReplicaId};
use holdfast_storage_core::record::{ReplicaState, VolumeRecord};
use holdfast_storage_core::record_store::StoreError;
use holdfast_storage_core::timers::{DRIFT_PER_MILLE, GIVEN_UP_AFTER_MS};
use holdfast_storage_core::transitions;
use tonic::Status;

use super::Inner;
use crate::registry_wire::parse_volume;
use crate::status::{from_store, from_transition};

/// Longer than [`GIVEN_UP_AFTER_MS`] by any clock.
const WAIT: Duration =
    Duration::from_millis(GIVEN_UP_AFTER_MS + GIVEN_UP_AFTER_MS * 4 * DRIFT_PER_MILLE / 1_000);

impl Inner {
    pub(super) async fn promote_replica(
        &self,
        request: PromoteReplicaRequest,
    ) -> Result<PromoteReplicaReply, Status> {
        self.promote_after(WAIT, request).await
    }

    async fn promote_after(
        &self,
        wait: Duration,
        request: PromoteReplicaRequest,
    ) -> Result<PromoteReplicaReply, Status> {
        let volume = parse_volume(&request.volume_id)?;
        let replica = request.replica_id.parse::<ReplicaId>();
        let replica = replica.map_err(|error| Status::invalid_argument(error.to_string()))?;
        let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
        let found = self.store.read(volume).await.map_err(from_store)?;
        if was_promoted(&found.record, replica) {
            return Ok(reply(&found.record));
        }
        let (lineage, nonce) = (Lineage(rand::random()), rand::random());
        let promoted =
            transitions::promote(&found.record, replica, lineage, nonce).map_err(from_transition)?;
        tokio::time::sleep(wait).await;
        match self.store.swap(found.version, promoted.clone()).await {
            Ok(_) => {}
            Err(StoreError::Conflict(_)) => {
                return Err(Status::aborted(format!(
                    "volume {volume} was changed while it was to be left alone: look at it, and repeat the call"
                )));
            }
            Err(error) => return Err(from_store(error)),
        }
        tracing::warn!(%volume, %replica, "an operator made this replica the volume's only one");
        Ok(reply(&promoted))
    }
}

/// An earlier call did it, and nobody joined since.
fn was_promoted(record: &VolumeRecord, replica: ReplicaId) -> bool {
    record.promoted.is_some_and(|promotion| promotion.replica == replica)
        && record.in_sync.iter().eq([&replica])
}

fn reply(record: &VolumeRecord) -> PromoteReplicaReply {
    let given_up = record.replicas.iter().filter(|(_, entry)| entry.state == ReplicaState::Faulted);
    PromoteReplicaReply { given_up: given_up.map(|(id, _)| id.to_string()).collect() }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;
    use std::time::Instant;

    use holdfast_storage_core::ids::{NodeName, TargetId, VolumeId};
    use holdfast_storage_core::record::VolumeParams;
    use holdfast_storage_core::record_store::RecordStore;
    use holdfast_storage_core::transitions::NewVolume;

    use super::*;
    use crate::controller::{ControllerService, ControllerSettings};
    use crate::node_book::NodeBook;
    use crate::sled_store::SledStore;

    const VOLUME: VolumeId = VolumeId(7);
    const SHORT: Duration = Duration::from_millis(300);

    /// A volume whose replica 2 is out of sync, published to node a.
    fn mk_record() -> VolumeRecord {
        let node = NodeName("a".to_owned());
        let created = transitions::create(NewVolume {
            volume_id: VOLUME,
            name: "data".to_owned(),
            lineage: Lineage(9),
            size_bytes: 1 << 20,
            epoch_nonce: 5,
            replicas: vec![(ReplicaId(1), node.clone()), (ReplicaId(2), NodeName("b".to_owned()))],
            params: VolumeParams::new(2, ""),
            encryption: None,
            source: None,
        });
        let published = transitions::publish(&created, &node, false).unwrap();
        let attachment = published.attachment;
        let owned = transitions::take_generation(&published, &node, attachment, TargetId(7)).unwrap();
        transitions::swap_out(&owned, TargetId(7), &[ReplicaId(2)], 6).unwrap()
    }

    fn ask(replica: u128) -> PromoteReplicaRequest {
        PromoteReplicaRequest { volume_id: VOLUME.to_string(), replica_id: ReplicaId(replica).to_string() }
    }

    async fn mk_service(
        record: VolumeRecord,
    ) -> (ControllerService, Arc<dyn RecordStore>, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let sled = SledStore::open(dir.path()).unwrap();
        let (groups, node_states) = (Arc::new(sled.clone()), Arc::new(sled.clone()));
        let store: Arc<dyn RecordStore> = Arc::new(sled);
        store.create(record).await.unwrap();
        let service = ControllerService::new(
            Arc::clone(&store),
            groups,
            node_states,
            Arc::new(NodeBook::new()),
            ControllerSettings::default(),
        );
        (service, store, dir)
    }

    #[test]
    fn r26_an_operator_waits_longer_than_any_target_s_clock_needs() {
        assert!(WAIT.as_millis() * 98 > u128::from(GIVEN_UP_AFTER_MS) * 100);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn r26_a_volume_that_was_left_alone_for_long_enough_goes_on_from_the_promoted_replica() {
        let bare = transitions::unpublish(&mk_record(), None).unwrap();
        let (service, store, _dir) = mk_service(bare.clone()).await;
        let began = Instant::now();
        let reply = service.inner.promote_after(SHORT, ask(2)).await.unwrap();
        assert!(began.elapsed() >= SHORT);
        assert_eq!(reply.given_up, [ReplicaId(1).to_string()]);
        let record = store.read(VOLUME).await.unwrap().record;
        assert_eq!(record.in_sync, BTreeSet::from([ReplicaId(2)]));
        assert_ne!(record.lineage, bare.lineage);
        let again = service.inner.promote_after(SHORT, ask(2)).await.unwrap();
        assert_eq!(again, reply, "a repeated call finds it done");
        assert_eq!(store.read(VOLUME).await.unwrap().record, record);
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn r26_a_published_volume_or_one_that_changes_meanwhile_is_left_as_it_is() {
        let (service, store, _dir) = mk_service(mk_record()).await;
        let refused = service.inner.promote_after(SHORT, ask(2)).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::FailedPrecondition, "{refused}");

        let found = store.read(VOLUME).await.unwrap();
        let bare = transitions::unpublish(&found.record, None).unwrap();
        let version = store.swap(found.version, bare.clone()).await.unwrap();
        let published = transitions::publish(&bare, &NodeName("b".to_owned()), false).unwrap();
        let meanwhile = async {
            tokio::time::sleep(SHORT / 3).await;
            store.swap(version, published.clone()).await.unwrap();
        };
        let (refused, ()) = tokio::join!(service.inner.promote_after(SHORT, ask(2)), meanwhile);
        assert_eq!(refused.unwrap_err().code(), tonic::Code::Aborted);
        assert_eq!(store.read(VOLUME).await.unwrap().record, published);
    }
}
