//! The key of an encrypted volume, made of the secret that came with the stage (ADR 0007).
//!
//! ```text
//!   record without a key check ── swap: the check of this key ──> bound ── same check: go on; another: refused
//! ```
//!
//! It is settled before the data process hears of the volume: a wrong secret starts no target and makes no device.

use std::collections::HashMap;

use holdfast_storage_core::encryption::{EncryptionKind, VolumeKey};
use holdfast_storage_core::ids::{Attachment, Salt, VolumeId};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::StoreError;
use holdfast_storage_core::transitions::bind_key;
use tonic::Status;
use zeroize::{Zeroize, Zeroizing};

use super::format::SWAP_ATTEMPTS_MAX;
use super::{Inner, blocking};
use crate::status::{from_store, from_transition};

/// The key of the secret that an encrypted volume's node-stage secret must have.
const SECRET_KEY: &str = "encryption-passphrase";

/// A call's secrets; overwritten when they are dropped.
pub(super) struct Secrets(HashMap<String, String>);

impl Secrets {
    pub(super) fn new(secrets: HashMap<String, String>) -> Self {
        Self(secrets)
    }
}

impl Drop for Secrets {
    fn drop(&mut self) {
        self.0.values_mut().for_each(Zeroize::zeroize);
    }
}

impl Inner {
    /// The key of an encrypted volume, which is bound to it from now on; none for another volume, whatever secrets came.
    pub(super) async fn volume_key(
        &self,
        record: &VolumeRecord,
        attachment: Attachment,
        secrets: &Secrets,
    ) -> Result<Option<VolumeKey>, Status> {
        let volume = record.volume_id;
        let salt = match (record.params.encryption, record.encryption) {
            (EncryptionKind::None, _) => return Ok(None),
            (EncryptionKind::AesXts, Some(encryption)) => encryption.salt,
            (EncryptionKind::AesXts, None) => {
                return Err(Status::internal(format!("the record of encrypted volume {volume} has no salt")));
            }
        };
        let secret = secrets.0.get(SECRET_KEY).ok_or_else(|| {
            Status::invalid_argument(format!(
                "secrets[{SECRET_KEY}] is missing: volume {volume} is encrypted; its StorageClass names the secret by \
                 csi.storage.k8s.io/node-stage-secret-name and -namespace"
            ))
        })?;
        let key = self.derive(secret, salt).await?;
        self.bind(volume, attachment, &key).await?;
        Ok(Some(key))
    }

    /// One at a time: each takes memory that this process has little of.
    async fn derive(&self, secret: &str, salt: Salt) -> Result<VolumeKey, Status> {
        let secret = Zeroizing::new(secret.to_owned());
        let _one = self.deriving.lock().await;
        blocking(move || {
            VolumeKey::derive(secret.as_bytes(), salt)
                .map_err(|error| Status::invalid_argument(format!("secrets[{SECRET_KEY}]: {error}")))
        })
        .await
    }

    /// Swaps the key's check in, or finds it there.
    async fn bind(&self, volume: VolumeId, attachment: Attachment, key: &VolumeKey) -> Result<(), Status> {
        for _ in 0..SWAP_ATTEMPTS_MAX {
            let found = self.read_mine(volume, attachment).await?;
            let record = bind_key(&found.record, key.check()).map_err(from_transition)?;
            if record == found.record {
                return Ok(());
            }
            match self.store.swap(found.version, record).await {
                Ok(_) => {
                    tracing::info!(%volume, "an encrypted volume is bound to the key of its first stage");
                    return Ok(());
                }
                Err(StoreError::Conflict(_)) => {}
                Err(error) => return Err(from_store(error)),
            }
        }
        Err(Status::aborted(format!("the record of volume {volume} keeps changing; repeat the call")))
    }
}
