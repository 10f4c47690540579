//! Delete records: DEL while the agent is down.
//!
//! The plugin writes a record and succeeds, so that no pod hangs in Terminating; the agent replays the records before it
//! serves, looks for later ones from time to time, and replays an attachment's own before it attaches it again.
//!
//! Writing, with what a crash leaves: (1) write a temporary file: an ignored file; (2) fsync it; (3) rename: the record
//! is there whole or not at all; (4) fsync the folder: the record survives a power cut. Only then DEL succeeds.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use crate::leases::AttachmentKey;

/// Records read in one scan; the rest waits for the next scan.
const RECORDS_MAX: usize = 10_000;
const SUFFIX: &str = ".del";

/// Writes a record, durably.
///
/// # Errors
/// The folder cannot be made or written; then nothing was promised.
pub fn write(folder: &Path, key: &AttachmentKey) -> io::Result<()> {
    fs::create_dir_all(folder)?;
    let path = path_of(folder, key);
    let temporary = folder.join(format!(".{}.{}", file_name(key), std::process::id()));
    let mut file = File::create(&temporary)?;
    file.write_all(&serde_json::to_vec(key)?)?;
    file.sync_all()?;
    fs::rename(&temporary, &path)?;
    File::open(folder)?.sync_all()
}

/// All records. One that cannot be read is skipped with a warning: it stays for a person to look at.
///
/// # Errors
/// The folder cannot be listed; one that does not exist is empty.
pub fn list(folder: &Path) -> io::Result<Vec<AttachmentKey>> {
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
        match fs::read(&path).map(|text| serde_json::from_slice::<AttachmentKey>(&text)) {
            // The name is made from the content, so a record cannot name another's file.
            Ok(Ok(key)) if path_of(folder, &key) == path => records.push(key),
            _ => tracing::warn!(record = %path.display(), "a delete record cannot be read; it is left alone"),
        }
    }
    Ok(records)
}

/// Whether there is a record for an attachment.
#[must_use]
pub fn exists(folder: &Path, key: &AttachmentKey) -> bool {
    path_of(folder, key).exists()
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
        write(&folder, &key).unwrap();
        write(&folder, &key).unwrap();
        fs::write(folder.join("x@eth0.del"), serde_json::to_vec(&key).unwrap()).unwrap();
        fs::write(folder.join("y@eth0.del"), "{").unwrap();
        assert_eq!(list(&folder).unwrap(), std::slice::from_ref(&key));
        assert!(exists(&folder, &key));
        remove(&folder, &key).unwrap();
        remove(&folder, &key).unwrap();
        assert!(list(&folder).unwrap().is_empty());
    }
}
