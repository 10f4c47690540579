//! Names are unique among volumes that are not gone (deleting or retired), without a transaction over two objects.
//!
//! One object of kind `VolumeName` for each name says which volume it is for; a record counts from the moment its `pending`
//! ends. To create volume R of name N:
//!
//! ```text
//!   (a) make R, pending              nobody sees it yet
//!   (b) write N := R                 after looking at the volume N named before, H:
//!                                      H is absent or gone     replace N, if it is still as it was read before H
//!                                      H is pending            wait; then delete H, if it is still as read, and look again
//!                                      H counts                the name is taken
//!   (c) end R's pending              if R is still the object of (a)
//! ```
//!
//! **Promise**: of all records with one name, at most one counts and is not gone. **Why**: R counts only by (c), after
//! its own write of N in (b). Whoever takes N away from R afterwards reads N, then R, and then replaces N as read: it
//! finds R pending, and then either its deletion comes first and (c) fails, or (c) comes first and the deletion
//! fails; or it finds that R counts, and gives up; or R is absent or gone, neither of which is ever taken back. Each
//! reservation writes N anew (`claim`), also where N names R already, so that a taker who looked before R existed
//! cannot replace it. No clock and no lease of a controller is needed; waiting only keeps creators that are alive from
//! deleting each other's records.
//!
//! A creator that dies leaves a pending record, N, or both: the next create of the name takes them over.

use std::time::Duration;

use holdfast_storage_core::ids::{RecordVersion, VolumeId};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::StoreError;

use super::client::{CallError, Deadline};
use super::convert::{id, to_spec};
use super::objects::{VolumeName, VolumeNameSpec, VolumeRecord as Object};
use super::store::{KubernetesStore, RACES_MAX, about, about_list};

/// Longest name; in base 32 it just fits an object's name. CSI allows 128 bytes.
const NAME_BYTES_MAX: usize = 128;
/// How long another creator of the name may take from its (b) to its (c) before its record is deleted.
const PATIENCE: Duration = Duration::from_secs(1);
/// Between two looks at it.
const LOOK_INTERVAL: Duration = Duration::from_millis(40);

impl KubernetesStore {
    pub(super) async fn create_now(&self, record: VolumeRecord) -> Result<RecordVersion, StoreError> {
        let (volume, deadline) = (record.volume_id, Deadline::new());
        if record.name.is_empty() || record.name.len() > NAME_BYTES_MAX {
            let sentence = format!("volume {volume}: its name must have 1 to {NAME_BYTES_MAX} bytes");
            return Err(StoreError::Refused(sentence));
        }
        let first = RecordVersion(1);
        if record.is_gone() {
            self.make(deadline, &record, first).await?;
            return Ok(first);
        }
        let pending = match self.make(deadline, &record, RecordVersion(0)).await {
            // Perhaps an earlier try of the same create.
            Err(StoreError::Exists(_)) => self.object(deadline, volume).await?,
            answer => answer?,
        };
        if !pending.spec.pending {
            return Err(StoreError::Exists(volume));
        }
        if let Err(error) = self.reserve(deadline, &record.name, volume).await {
            if matches!(error, StoreError::Exists(_)) {
                // Whether it goes does not matter: nobody sees it, and it can never count.
                drop(self.client.delete(deadline, &pending).await);
            }
            return Err(error);
        }
        self.confirm(deadline, pending, &record).await?;
        Ok(first)
    }

    async fn make(
        &self,
        deadline: Deadline,
        record: &VolumeRecord,
        version: RecordVersion,
    ) -> Result<Object, StoreError> {
        let (volume, spec) = (record.volume_id, to_spec(version, record, &[])?);
        let name = volume.to_string();
        let object = Object::new(&name, spec.clone());
        let stored =
            self.client.post(deadline, &name, &object).await.map_err(|error| about(volume, error))?;
        self.as_sent(volume, &spec, stored)
    }

    /// (c): lets the record count, if it is still the object that the name was reserved for.
    async fn confirm(
        &self,
        deadline: Deadline,
        mut pending: Object,
        record: &VolumeRecord,
    ) -> Result<(), StoreError> {
        let volume = record.volume_id;
        let (uid, spec) =
            (pending.metadata.uid.clone(), to_spec(RecordVersion(1), record, &pending.spec.swap_ids)?);
        for _ in 0..RACES_MAX {
            match self.replace(deadline, volume, pending.metadata, &spec).await {
                Err(StoreError::Conflict(_) | StoreError::NotFound(_)) => {}
                answer => return answer.map(|_| ()),
            }
            pending = match self.object(deadline, volume).await {
                Err(StoreError::NotFound(_)) => break,
                found => found?,
            };
            if pending.spec.holds(&spec) {
                return Ok(());
            }
            if !pending.spec.pending {
                return Err(StoreError::Exists(volume));
            }
            if pending.metadata.uid != uid {
                break;
            }
        }
        Err(StoreError::Unknown(format!(
            "volume {volume} was not created: another create of the name {} came between; repeat it",
            record.name
        )))
    }

    /// (b): makes the name this volume's, or says whose it is.
    async fn reserve(&self, deadline: Deadline, name: &str, volume: VolumeId) -> Result<(), StoreError> {
        let object_name = object_name(name);
        let spec = VolumeNameSpec {
            name: name.to_owned(),
            volume_id: volume.to_string(),
            claim: format!("{:032x}", rand::random::<u128>()),
        };
        let patient_until = tokio::time::Instant::now() + PATIENCE;
        let looks = u32::try_from(PATIENCE.as_millis() / LOOK_INTERVAL.as_millis()).unwrap_or(u32::MAX);
        for _ in 0..looks + RACES_MAX {
            match self.client.post(deadline, &object_name, &VolumeName::new(&object_name, spec.clone())).await
            {
                Err(CallError::Taken) => {}
                answer => return answer.map(|_| ()).map_err(about_list),
            }
            let held: VolumeName = match self.client.get(deadline, &object_name).await {
                Err(CallError::Missing) => continue,
                answer => answer.map_err(about_list)?,
            };
            if held.spec.claim == spec.claim {
                return Ok(());
            }
            let holder: VolumeId = id("volumeId", &held.spec.volume_id)?;
            if holder != volume {
                match self.object(deadline, holder).await {
                    Err(StoreError::NotFound(_)) => {}
                    Err(error) => return Err(error),
                    Ok(found) if found.spec.pending => {
                        if tokio::time::Instant::now() < patient_until {
                            tokio::time::sleep(LOOK_INTERVAL).await;
                        } else if let Err(CallError::Refused(reason)) =
                            self.client.delete(deadline, &found).await
                        {
                            return Err(StoreError::Refused(reason));
                        }
                        continue;
                    }
                    Ok(found) if found.spec.is_gone() => {}
                    Ok(_) => return Err(StoreError::Exists(holder)),
                }
            }
            let taken = VolumeName { metadata: held.metadata, spec: spec.clone() };
            match self.client.put(deadline, &object_name, &taken).await {
                Err(CallError::Moved | CallError::Missing) => {}
                answer => return answer.map(|_| ()).map_err(about_list),
            }
        }
        Err(StoreError::Unknown(format!("many creates of the name {name} are under way; repeat this one")))
    }

    /// Removes the name's object if it is still the removed volume's. Where that fails the next create takes it over.
    pub(super) async fn release_name(&self, deadline: Deadline, name: &str, volume: VolumeId) {
        let object_name = object_name(name);
        let Ok(held) = self.client.get::<VolumeName>(deadline, &object_name).await else {
            return;
        };
        if held.spec.volume_id == volume.to_string()
            && let Err(error) = self.client.delete(deadline, &held).await
        {
            tracing::debug!(%volume, name, ?error, "the volume's name is left to the next create of it");
        }
    }
}

/// The name's bytes in base 32 (RFC 4648, the "extended hex" alphabet in lower case): what an object's name may be made of,
/// and different for different names.
fn object_name(name: &str) -> String {
    const ALPHABET: &[u8; 32] = b"0123456789abcdefghijklmnopqrstuv";
    let (mut text, mut bits, mut count) = (String::new(), 0_u32, 0_u32);
    let push = |text: &mut String, digit: u32| text.push(char::from(ALPHABET[(digit & 31) as usize]));
    for byte in name.bytes() {
        bits = (bits << 8) | u32::from(byte);
        count += 8;
        while count >= 5 {
            count -= 5;
            push(&mut text, bits >> count);
        }
        bits &= (1 << count) - 1;
    }
    if count > 0 {
        push(&mut text, bits << (5 - count));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_objects_name_is_made_of_what_it_may_be_made_of_and_tells_names_apart() {
        // RFC 4648, section 10.
        for (name, text) in [
            ("f", "co"),
            ("fo", "cpng"),
            ("foo", "cpnmu"),
            ("foob", "cpnmuog"),
            ("fooba", "cpnmuoj1"),
            ("foobar", "cpnmuoj1e8"),
        ] {
            assert_eq!(object_name(name), text);
        }
        assert_ne!(object_name("A"), object_name("a"));
        assert!(object_name(&"\u{fffd}".repeat(NAME_BYTES_MAX / 3)).len() <= 253);
        assert!(object_name(&"x".repeat(NAME_BYTES_MAX)).len() <= 253);
    }
}
