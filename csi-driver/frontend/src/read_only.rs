//! A second block device over a volume's own, through which nothing can be written: what a place gets that shows a raw block
//! volume read-only. (A read-only mount of a device's node does not stop writes to the device.)
//!
//! ```text
//!   reader -> /dev/loopM, LO_FLAGS_READ_ONLY, opened its file without write access -> /dev/loopN
//! ```
//!
//! **Promised.** No write, discard, zeroing or writable mapping of loopM reaches the volume: the disk itself is read-only, which
//! BLKROSET does not undo, and the loop driver refuses to write once more. A direct read sees every write that was acknowledged
//! before it, also one that is in loopN's cache only.
//!
//! **Not promised.** A buffered read may see what was read before through the same twin, for as long as anybody has that open, as on
//! any block device with a writer elsewhere: readers use O_DIRECT, or POSIX_FADV_DONTNEED before they read. Nor is a twin held open
//! for its readers: whoever has it open may clear it (LOOP_CLR_FD asks for no privilege), and it goes with the last close.
//!
//! **Found again** by its name, `holdfast-ro-` with the volume's id and a hash of the place, and by the device that it stands over:
//! after a kill at any point, and by a process that made none. It lives until it is cleared, by [`ReadOnlyTwin::remove`], or with
//! its device: by detaching, or by [`crate::FuseLoop::clean_stale`] where the device's process was killed. While it lives, so does its
//! device, whose number therefore names nothing else.

use std::fs::OpenOptions;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use sha2::{Digest, Sha256};

use crate::fuse_loop::{AttachError, check_volume_id};
use crate::loop_device::{Bound, Cleared, Lifetime, TWIN_PREFIX, bind_free};

/// How long removing waits for the last close (udev looks at new devices on its own).
const REMOVE_WAIT: Duration = Duration::from_secs(2);
const REMOVE_POLL: Duration = Duration::from_millis(5);
/// Of a place's hash, in a name that has 63 bytes in all.
const PLACE_BYTES: usize = 8;

/// A read-only twin of a block device.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReadOnlyTwin {
    /// Its device, `/dev/loopM`.
    pub path: PathBuf,
}

impl ReadOnlyTwin {
    /// The twin of `device` for `place`, a path that the caller made canonical; made where there is none, and as large as `device` is
    /// now. Blocks for some milliseconds. Safe to repeat.
    ///
    /// # Errors
    /// [`AttachError`]; no twin is left behind, unless one was there.
    pub fn ensure(volume_id: &str, place: &Path, device: &Path) -> Result<Self, AttachError> {
        let name = name_for(volume_id, place)?;
        let kernel = |step| move |source| AttachError::Kernel { step, source };
        let found = || named(&name, device).map_err(kernel("listing the read-only twins"));
        let mut twin = found()?.pop();
        if twin.is_none() {
            let file = OpenOptions::new().read(true).open(device).map_err(kernel("opening the device"))?;
            drop(bind_free(&file, &name, true, Lifetime::UntilCleared)?);
            twin = found()?.pop();
        }
        let cleared = || kernel("LOOP_CONFIGURE")(io::Error::other("the twin was cleared at once"));
        let twin = twin.ok_or_else(cleared)?;
        // Also of a new one: it may have been made too late for a growth that was under way.
        twin.follow_size().map_err(kernel("LOOP_SET_CAPACITY"))?;
        Ok(Self { path: twin.path })
    }

    /// Clears the place's twin of `device`. Blocks until it is gone, at most for two seconds and the reads under way; a twin that
    /// somebody has open then is given: it goes with its last close. Safe to repeat.
    ///
    /// # Errors
    /// `device` is none, or the loop devices cannot be listed or cleared.
    pub fn remove(volume_id: &str, place: &Path, device: &Path) -> io::Result<Option<Self>> {
        let name = name_for(volume_id, place).map_err(io::Error::other)?;
        let deadline = Instant::now() + REMOVE_WAIT;
        loop {
            let mut busy = None;
            for twin in named(&name, device)? {
                if let Cleared::Later = twin.clear()? {
                    busy = Some(Self { path: twin.path });
                }
            }
            if busy.is_none() || Instant::now() >= deadline {
                return Ok(busy);
            }
            std::thread::sleep(REMOVE_POLL);
        }
    }

    /// All twins of a device, whatever their place.
    ///
    /// # Errors
    /// It is no block device, or the loop devices cannot be listed.
    pub fn all_of(device: &Path) -> io::Result<Vec<Self>> {
        Ok(Bound::twins_of(device)?.into_iter().map(|twin| Self { path: twin.path }).collect())
    }

    /// Has all twins of a device take the size that it has now.
    ///
    /// # Errors
    /// As [`Self::all_of`], or the kernel refuses.
    pub fn follow_all(device: &Path) -> io::Result<()> {
        Bound::twins_of(device)?.iter().try_for_each(Bound::follow_size)
    }
}

fn name_for(volume_id: &str, place: &Path) -> Result<String, AttachError> {
    check_volume_id(volume_id)?;
    let hash = Sha256::digest(place.as_os_str().as_bytes());
    let place: String = hash.iter().take(PLACE_BYTES).map(|byte| format!("{byte:02x}")).collect();
    Ok(format!("{TWIN_PREFIX}{volume_id}-{place}"))
}

fn named(name: &str, device: &Path) -> io::Result<Vec<Bound>> {
    Ok(Bound::twins_of(device)?.into_iter().filter(|twin| twin.name == name).collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_fits_and_tells_volumes_and_places_apart() {
        let (one, other) = ("0".repeat(32), "1".repeat(32));
        let name = |volume: &str, place: &str| name_for(volume, Path::new(place)).unwrap();
        assert_eq!(name(&one, "/a").len(), 61, "the kernel keeps 63 bytes");
        assert_eq!(name(&one, "/a"), name(&one, "/a"));
        assert_ne!(name(&one, "/a"), name(&one, "/b"));
        assert_ne!(name(&one, "/a"), name(&other, "/a"));
        assert!(name_for("../x", Path::new("/a")).is_err());
    }
}
