//! The cookie's copy in tmpfs: gone after a power loss, and removed before a failed write is reported (R19).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use holdfast_storage_core::ids::ReplicaId;

/// One replica's file in the cookie folder. Without a folder there never is a copy.
#[derive(Debug, Clone)]
pub struct BootCookie {
    file: Option<PathBuf>,
}

impl BootCookie {
    /// In this folder.
    pub fn new(dir: Option<&Path>, replica: ReplicaId) -> Self {
        Self { file: dir.map(|dir| dir.join(replica.to_string())) }
    }

    /// The copy, if there is one that can be read.
    pub fn read(&self) -> Option<u64> {
        let text = fs::read_to_string(self.file.as_ref()?).ok()?;
        u64::from_str_radix(text.trim_end(), 16).ok()
    }

    /// Writes the copy: whole or not at all.
    pub fn set(&self, cookie: u64) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let new = file.with_extension("new");
        fs::write(&new, format!("{cookie:016x}\n"))?;
        fs::rename(&new, file)
    }

    /// Removes the copy; an absent one is fine.
    pub fn remove(&self) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        match fs::remove_file(file) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}
