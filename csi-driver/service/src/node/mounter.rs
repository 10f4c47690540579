//! mount(2) and umount(2) with sentences.

use std::fs::File;
use std::path::Path;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::mount::{MntFlags, MsFlags, mount, umount2};
use tonic::Status;

use super::mount_table;

/// Mounts stacked on one path that are taken away in one call.
const STACKED_MAX: usize = 32;
/// How long a mount may stay busy; then the caller is told to repeat.
const BUSY_WAIT_MAX: Duration = Duration::from_secs(2);
const BUSY_POLL: Duration = Duration::from_millis(20);

/// Mounts `device` at `target` with the caller's flags.
pub(super) fn mount_device(
    device: &Path,
    target: &Path,
    fs_type: &str,
    flags: &[String],
    read_only: bool,
) -> Result<(), Status> {
    let (mut bits, data) = split_flags(flags);
    if read_only {
        bits |= MsFlags::MS_RDONLY;
    }
    let data = (!data.is_empty()).then_some(data.as_str());
    mount(Some(device), target, Some(fs_type), bits, data).map_err(|errno| {
        Status::internal(format!(
            "{} cannot be mounted at {} as {fs_type} with flags {flags:?}: {errno}; its data is left as it is",
            device.display(),
            target.display()
        ))
    })
}

/// Shows `source` at `target` too.
pub(super) fn bind(source: &Path, target: &Path) -> Result<(), Status> {
    mount(Some(source), target, None::<&str>, MsFlags::MS_BIND, None::<&str>).map_err(|errno| {
        Status::internal(format!("{} cannot be shown at {}: {errno}", source.display(), target.display()))
    })
}

/// Makes a bind mount read-only.
pub(super) fn make_read_only(target: &Path) -> Result<(), Status> {
    let bits = MsFlags::MS_BIND | MsFlags::MS_REMOUNT | MsFlags::MS_RDONLY;
    mount(None::<&str>, target, None::<&str>, bits, None::<&str>)
        .map_err(|errno| Status::internal(format!("{} cannot be made read-only: {errno}", target.display())))
}

/// Takes away everything that is mounted at `target`, writing out what is dirty first.
///
/// A file system whose device fails cannot be written out; it is taken out of the tree lazily.
pub(super) fn unmount_all(target: &Path) -> Result<(), Status> {
    let begun = Instant::now();
    let mut taken = 0;
    while taken < STACKED_MAX {
        let mounted = mount_table::find(target)
            .map_err(|e| Status::internal(format!("the mount table cannot be read: {e}")))?;
        if mounted.is_none() {
            return Ok(());
        }
        // Another namespace may keep the file system busy after it left our tree: its dirty pages must go now.
        if let Ok(root) = File::open(target)
            && let Err(errno) = nix::unistd::syncfs(&root)
        {
            tracing::warn!(target_path = %target.display(), %errno, "the file system could not be written out");
        }
        match umount2(target, MntFlags::UMOUNT_NOFOLLOW) {
            Ok(()) | Err(Errno::EINVAL | Errno::ENOENT) => taken += 1,
            // A child of ours between fork and exec holds what we just closed; a pod's last process may be ending.
            Err(Errno::EBUSY) if begun.elapsed() < BUSY_WAIT_MAX => std::thread::sleep(BUSY_POLL),
            Err(Errno::EBUSY) => {
                let sentence =
                    format!("{} is in use and cannot be unmounted yet; repeat the call", target.display());
                return Err(Status::internal(sentence));
            }
            Err(errno) => {
                tracing::warn!(target_path = %target.display(), %errno, "unmounting lazily");
                detach_lazily(target)?;
                taken += 1;
            }
        }
    }
    Err(Status::internal(format!("more than {STACKED_MAX} mounts are stacked at {}", target.display())))
}

/// Takes a dead mount out of the tree without touching its device.
pub(super) fn detach_lazily(target: &Path) -> Result<(), Status> {
    umount2(target, MntFlags::UMOUNT_NOFOLLOW | MntFlags::MNT_DETACH)
        .map_err(|errno| Status::internal(format!("{} cannot be unmounted: {errno}", target.display())))
}

/// Options that are bits of mount(2), and the others, which the file system reads itself.
fn split_flags(flags: &[String]) -> (MsFlags, String) {
    let mut bits = MsFlags::empty();
    let mut data = Vec::new();
    for flag in flags.iter().flat_map(|flag| flag.split(',')).filter(|flag| !flag.is_empty()) {
        match flag {
            "defaults" | "rw" => {}
            "ro" => bits |= MsFlags::MS_RDONLY,
            "nosuid" => bits |= MsFlags::MS_NOSUID,
            "nodev" => bits |= MsFlags::MS_NODEV,
            "noexec" => bits |= MsFlags::MS_NOEXEC,
            "sync" => bits |= MsFlags::MS_SYNCHRONOUS,
            "dirsync" => bits |= MsFlags::MS_DIRSYNC,
            "noatime" => bits |= MsFlags::MS_NOATIME,
            "nodiratime" => bits |= MsFlags::MS_NODIRATIME,
            "relatime" => bits |= MsFlags::MS_RELATIME,
            "strictatime" => bits |= MsFlags::MS_STRICTATIME,
            "lazytime" => bits |= MsFlags::MS_LAZYTIME,
            other => data.push(other),
        }
    }
    (bits, data.join(","))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flags_of_the_kernel_and_of_the_file_system_are_told_apart() {
        let flags = ["noatime,discard".to_owned(), "defaults".to_owned(), "errors=remount-ro".to_owned()];
        assert_eq!(split_flags(&flags), (MsFlags::MS_NOATIME, "discard,errors=remount-ro".to_owned()));
    }
}
