//! Which key an encrypted volume is bound to (ADR 0007): the one of its first stage, for ever.

use crate::encryption::Encryption;
use crate::ids::KeyCheck;
use crate::record::{RECORD_FORMAT, VolumeRecord};

use super::{TransitionError, check_live};

/// Binds an encrypted volume to a key, before anything is written with it. The key that it is bound to already: unchanged.
pub fn bind_key(record: &VolumeRecord, check: KeyCheck) -> Result<VolumeRecord, TransitionError> {
    check_live(record)?;
    let Some(Encryption { salt, key_check }) = record.encryption else {
        return Err(TransitionError::NotEncrypted(record.volume_id));
    };
    match key_check {
        Some(bound) if bound == check => Ok(record.clone()),
        Some(_) => Err(TransitionError::OtherKey(record.volume_id)),
        None => {
            let mut next = record.clone();
            next.format = RECORD_FORMAT;
            next.encryption = Some(Encryption { salt, key_check: Some(check) });
            Ok(next)
        }
    }
}

/// Whether a change leaves the encryption as it is, or binds it to a key for the first time.
#[must_use]
pub fn keeps_key(old: &VolumeRecord, new: &VolumeRecord) -> bool {
    let bound = |encryption: Encryption| encryption.key_check.is_some();
    match (old.encryption, new.encryption) {
        (Some(old), Some(new)) if !bound(old) => old.salt == new.salt,
        (old, new) => old == new,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{Salt, VolumeId};
    use crate::transitions::tests::mk_record;

    #[test]
    fn a_volume_is_bound_to_the_first_key_and_to_no_other_for_ever() {
        let bare = mk_record(3);
        assert_eq!(bind_key(&bare, KeyCheck(1)), Err(TransitionError::NotEncrypted(VolumeId(1))));
        let salt = Salt(5);
        let unbound = VolumeRecord { encryption: Some(Encryption { salt, key_check: None }), ..bare.clone() };
        let bound = bind_key(&unbound, KeyCheck(1)).unwrap();
        assert_eq!(bound.encryption, Some(Encryption { salt, key_check: Some(KeyCheck(1)) }));
        assert_eq!(bind_key(&bound, KeyCheck(1)).as_ref(), Ok(&bound));
        assert_eq!(bind_key(&bound, KeyCheck(2)), Err(TransitionError::OtherKey(VolumeId(1))));
        let resalted =
            VolumeRecord { encryption: Some(Encryption { salt: Salt(6), key_check: None }), ..bare.clone() };
        for (old, new, kept) in [
            (&bare, &bare, true),
            (&unbound, &unbound, true),
            (&unbound, &bound, true),
            (&bound, &bound, true),
            (&bound, &unbound, false),
            (&unbound, &resalted, false),
            (&bound, &bare, false),
            (&bare, &bound, false),
        ] {
            assert_eq!(keeps_key(old, new), kept, "{:?} to {:?}", old.encryption, new.encryption);
        }
    }
}
