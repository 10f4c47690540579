//! Parameters that a volume keeps as it was made with: the StorageClass's keys that ControllerModifyVolume refuses.

use holdfast_storage_core::encryption::EncryptionKind;
use holdfast_storage_core::placement::{LocalReplica, PlacementRules, ZoneRule};
use holdfast_storage_core::record::FrontEndChoice;
use tonic::Status;

use crate::topology::is_topology_value;

/// File systems this driver makes.
const FS_TYPES: [&str; 2] = ["ext4", "xfs"];
/// What external-provisioner calls `fsType`.
pub(crate) const PROVISIONER_FS_TYPE_KEY: &str = "csi.storage.k8s.io/fstype";
/// The keys.
pub(crate) const KEYS: [&str; 7] =
    ["fsType", PROVISIONER_FS_TYPE_KEY, "zones", "localReplica", "poolClass", "frontEnd", "encryption"];
/// What is known, for a sentence.
pub(crate) const KNOWN: &str = "fsType, zones, localReplica, poolClass, frontEnd and encryption";

/// What is asked for.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Fixed {
    /// The file system of a mounted volume.
    pub fs_type: Option<String>,
    /// Where replicas may be.
    pub placement: PlacementRules,
    /// How targets become block devices.
    pub front_end: FrontEndChoice,
    /// Whether data is encrypted.
    pub encryption: EncryptionKind,
}

impl Fixed {
    /// Takes a key in if it is one of these; tells whether it is.
    ///
    /// # Errors
    /// INVALID_ARGUMENT naming the key, for a value that it cannot have.
    pub fn take(&mut self, field: &str, key: &str, value: &str) -> Result<bool, Status> {
        let here = || format!("{field}[{key}]");
        match key {
            "fsType" | PROVISIONER_FS_TYPE_KEY => {
                check_fs_type(&here(), value)?;
                if self.fs_type.as_ref().is_some_and(|other| other != value) {
                    return Err(Status::invalid_argument(format!(
                        "{field}: fsType is given twice with different values"
                    )));
                }
                self.fs_type = Some(value.to_owned());
            }
            "zones" => {
                let choices = [("preferred", ZoneRule::Preferred), ("required", ZoneRule::Required)];
                self.placement.zones = one_of(&here(), value, &choices)?;
            }
            "localReplica" => {
                let choices = [
                    ("preferred", LocalReplica::Preferred),
                    ("required", LocalReplica::Required),
                    ("none", LocalReplica::None),
                ];
                self.placement.local_replica = one_of(&here(), value, &choices)?;
            }
            "frontEnd" => {
                let choices = [("auto", FrontEndChoice::Auto), ("fuse-loop", FrontEndChoice::FuseLoop)];
                self.front_end = one_of(&here(), value, &choices)?;
            }
            "encryption" => {
                let choices = [("none", EncryptionKind::None), ("aes-xts", EncryptionKind::AesXts)];
                self.encryption = one_of(&here(), value, &choices)?;
            }
            "poolClass" if is_topology_value(value) => self.placement.pool_class = Some(value.to_owned()),
            "poolClass" => {
                return Err(Status::invalid_argument(format!(
                    "{} is \"{}\"; it must be a word: letters, digits, \"-\", \"_\" and \".\", at most 63 of them",
                    here(),
                    shown(value)
                )));
            }
            _ => return Ok(false),
        }
        Ok(true)
    }
}

/// Whether this driver makes such a file system.
///
/// # Errors
/// INVALID_ARGUMENT naming the field.
pub(crate) fn check_fs_type(field: &str, fs_type: &str) -> Result<(), Status> {
    if FS_TYPES.contains(&fs_type) {
        return Ok(());
    }
    Err(Status::invalid_argument(format!(
        "{field}: file system \"{}\" is not supported; ext4 and xfs are",
        shown(fs_type)
    )))
}

fn one_of<T: Copy>(field: &str, value: &str, choices: &[(&str, T)]) -> Result<T, Status> {
    let found = choices.iter().find(|(name, _)| *name == value).map(|(_, choice)| *choice);
    found.ok_or_else(|| {
        let names: Vec<&str> = choices.iter().map(|(name, _)| *name).collect();
        Status::invalid_argument(format!(
            "{field} is \"{}\"; it must be one of {}",
            shown(value),
            names.join(", ")
        ))
    })
}

/// A value in a sentence: what somebody sent may be long.
pub(crate) fn shown(value: &str) -> String {
    value.chars().take(32).collect()
}
