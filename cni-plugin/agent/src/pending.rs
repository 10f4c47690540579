//! Delete records: DEL while the agent is down.
//!
//! The plugin writes a record and succeeds, so that no pod hangs in Terminating; the agent replays the records before it
//! serves, looks for later ones from time to time, and replays an attachment's own before it attaches it again.
//!
//! Writing, with what a crash leaves: (1) write a temporary file: an ignored file; (2) fsync it; (3) rename: the record
//! is there whole or not at all; (4) fsync the folder: the record survives a power cut. Only then DEL succeeds.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::leases::AttachmentKey;

/// Records read in one scan; the rest waits for the next scan.
const RECORDS_MAX: usize = 10_000;
const SUFFIX: &str = ".del";

/// What is to be detached.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The attachment.
    #[serde(flatten)]
    pub key: AttachmentKey,
    /// The networks that DELs named; an attachment of another one is not touched. Empty: whatever network.
    #[serde(default)]
    pub networks: BTreeSet<String>,
}

impl Record {
    fn new(key: &AttachmentKey) -> Self {
        Self { key: key.clone(), networks: BTreeSet::new() }
    }

    /// Whether an attachment of a network is to be detached.
    #[must_use]
    pub fn covers(&self, network: &str) -> bool {
        self.networks.is_empty() || self.networks.contains(network)
    }
}

/// Writes a record, durably, beside what an earlier one for the attachment asks.
///
/// # Errors
/// The folder cannot be made or written; then nothing was promised.
pub fn write(folder: &Path, key: &AttachmentKey, network: &str) -> io::Result<()> {
    // A record of before that cannot be read promises nothing more than ours.
    let mut record = find(folder, key).ok().flatten().unwrap_or_else(|| Record::new(key));
    record.networks.insert(network.to_owned());
    fs::create_dir_all(folder)?;
    let path = path_of(folder, key);
    let temporary = folder.join(format!(".{}.{}", file_name(key), std::process::id()));
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(&record)?)?;
    file.sync_all()?;
    fs::rename(&temporary, &path)?;
    File::open(folder)?.sync_all()
}

/// All records. One that cannot be read is skipped with a warning: it stays for a person to look at.
///
/// # Errors
/// The folder cannot be listed; one that does not exist is empty.
pub fn list(folder: &Path) -> io::Result<Vec<Record>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut records = Vec::new();
    for entry in entries.take(RECORDS_MAX) {
        let path = entry?.path();
        if path.extension().is_none_or(|extension| extension != "del") {
            continue;
        }
        match fs::read(&path).map(|text| serde_json::from_slice::<Record>(&text)) {
            // The name is made from the content, so a record cannot name another's file.
            Ok(Ok(record)) if path_of(folder, &record.key) == path => records.push(record),
            _ => tracing::warn!(record = %path.display(), "a delete record cannot be read; it is left alone"),
        }
    }
    Ok(records)
}

/// Every file that [`write()`] makes in the folder, those of a crash included. None where there is no folder.
///
/// # Errors
/// The folder cannot be listed.
pub(crate) fn all_files(folder: &Path) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error),
    };
    let mut found = Vec::new();
    for entry in entries {
        let path = entry?.path();
        // A temporary one has a dot before and the writer's process number after.
        let is_ours = |name: &str| name.split_once('@').is_some_and(|(_, rest)| rest.contains(SUFFIX));
        if path.file_name().and_then(std::ffi::OsStr::to_str).is_some_and(is_ours) {
            found.push(path);
        }
    }
    Ok(found)
}

/// The record for an attachment, if there is one.
///
/// # Errors
/// It is there and cannot be read.
pub fn find(folder: &Path, key: &AttachmentKey) -> io::Result<Option<Record>> {
    match fs::read(path_of(folder, key)) {
        Ok(text) => Ok(Some(serde_json::from_slice(&text)?)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// Removes a record after it was replayed. An absent one is a success.
///
/// # Errors
/// The file cannot be removed.
pub fn remove(folder: &Path, key: &AttachmentKey) -> io::Result<()> {
    match fs::remove_file(path_of(folder, key)) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

fn path_of(folder: &Path, key: &AttachmentKey) -> PathBuf {
    folder.join(file_name(key))
}

/// Both parts were checked for slashes (CNI env checks), and `@` cannot be in a container id.
fn file_name(key: &AttachmentKey) -> String {
    format!("{}@{}{SUFFIX}", key.container_id, key.ifname)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_is_written_listed_and_removed_and_rubbish_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("pending");
        assert!(list(&folder).unwrap().is_empty());
        let key = AttachmentKey { container_id: "c.1".into(), ifname: "eth0".into() };
        write(&folder, &key, "old").unwrap();
        write(&folder, &key, "pods").unwrap();
        fs::write(folder.join("x@eth0.del"), serde_json::to_vec(&key).unwrap()).unwrap();
        fs::write(folder.join("y@eth0.del"), "{").unwrap();
        let record = Record { key: key.clone(), networks: ["old", "pods"].map(String::from).into() };
        assert!(record.covers("pods") && !record.covers("other") && Record::new(&key).covers("other"));
        assert_eq!(list(&folder).unwrap(), std::slice::from_ref(&record));
        assert_eq!(find(&folder, &key).unwrap(), Some(record));
        let other = AttachmentKey { container_id: "y".into(), ifname: "eth0".into() };
        assert!(find(&folder, &other).is_err());
        remove(&folder, &key).unwrap();
        remove(&folder, &key).unwrap();
        assert_eq!(find(&folder, &key).unwrap(), None);
        assert!(list(&folder).unwrap().is_empty());
    }
}
