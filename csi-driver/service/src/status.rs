//! The one place where a refusal of the store or of the record's rules becomes a CSI status.

use holdfast_storage_core::record_store::StoreError;
use holdfast_storage_core::transitions::TransitionError;
use tonic::Status;

pub(crate) fn from_store(error: StoreError) -> Status {
    let sentence = error.to_string();
    match error {
        StoreError::NotFound(_) => Status::not_found(sentence),
        StoreError::Exists(_) | StoreError::Conflict(_) | StoreError::GroupConflict(_) => {
            Status::aborted(format!("{sentence}; repeat the call"))
        }
        StoreError::Unknown(_) => Status::unavailable(sentence),
        StoreError::Refused(_) => Status::internal(sentence),
    }
}

pub(crate) fn from_transition(error: TransitionError) -> Status {
    let sentence = error.to_string();
    match error {
        TransitionError::Deleting(_) | TransitionError::Retired(_) => Status::not_found(sentence),
        TransitionError::PublishedElsewhere { .. } => {
            Status::failed_precondition(format!("{sentence}; unpublish it there first"))
        }
        TransitionError::OtherMode(_) => Status::already_exists(sentence),
        TransitionError::NotPublishedHere { .. }
        | TransitionError::GenerationMoved { .. }
        | TransitionError::LastMember(_)
        | TransitionError::ReplicaState { .. }
        | TransitionError::EnoughReplicas { .. }
        | TransitionError::TooFewStay { .. }
        | TransitionError::NodeTaken { .. }
        | TransitionError::Format36 { .. }
        | TransitionError::SnapshotState { .. }
        | TransitionError::SnapshotInUse { .. }
        | TransitionError::HasSnapshots { .. }
        | TransitionError::SnapshotMissing { .. }
        | TransitionError::LineageUsed(_)
        | TransitionError::NotEncrypted(_)
        | TransitionError::OtherKey(_)
        | TransitionError::Published { .. } => Status::failed_precondition(sentence),
        TransitionError::SnapshotsFull(_) | TransitionError::RequestsFull(_) => {
            Status::resource_exhausted(sentence)
        }
        TransitionError::Size { .. } => Status::out_of_range(sentence),
        TransitionError::Format { .. } => Status::internal(sentence),
    }
}
