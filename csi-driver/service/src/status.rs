//! The one place where a store's refusal becomes a CSI status.

use holdfast_storage_core::record_store::StoreError;
use tonic::Status;

pub(crate) fn from_store(error: StoreError) -> Status {
    let sentence = error.to_string();
    match error {
        StoreError::NotFound(_) => Status::not_found(sentence),
        StoreError::Exists(_) | StoreError::Conflict(_) => {
            Status::aborted(format!("{sentence}; repeat the call"))
        }
        StoreError::Unknown(_) => Status::unavailable(sentence),
        StoreError::Refused(_) => Status::internal(sentence),
    }
}
