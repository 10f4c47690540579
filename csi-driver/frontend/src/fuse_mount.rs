//! A FUSE file system without a mount point: created with the mount API of Linux 5.2, reached through its descriptor only,
//! so that no mount table ever shows it and nothing is left to unmount.

use std::ffi::{CStr, CString, c_int, c_long};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use nix::fcntl::AtFlags;
use nix::sys::stat::fstatat;

use crate::fuse_fs::REQUEST_BYTES_MAX;

// From linux/mount.h; the libc crate does not have them.
const FSOPEN_CLOEXEC: c_long = 1;
const FSMOUNT_CLOEXEC: c_long = 1;
const FSCONFIG_SET_STRING: c_long = 1;
const FSCONFIG_CMD_CREATE: c_long = 6;
const MOUNT_ATTR_NOSUID: c_long = 2;
const MOUNT_ATTR_NODEV: c_long = 4;
const MOUNT_ATTR_NOEXEC: c_long = 8;

/// A FUSE file system: our end, and the kernel's.
pub(crate) struct FuseMount {
    /// `/dev/fuse`, which requests are read from.
    pub(crate) device: OwnedFd,
    /// The mounted root. The file system lives as long as this or a file in it is open.
    root: OwnedFd,
}

impl FuseMount {
    /// Creates it. The kernel's first request waits at `device` then.
    pub(crate) fn create() -> io::Result<Self> {
        let device: OwnedFd = OpenOptions::new().read(true).write(true).open("/dev/fuse")?.into();
        // SAFETY: the name is a C string; the call touches no other memory.
        let context = unsafe { owned_fd(libc::syscall(libc::SYS_fsopen, c"fuse".as_ptr(), FSOPEN_CLOEXEC)) }?;
        let fd = device.as_raw_fd().to_string();
        let max_read = REQUEST_BYTES_MAX.to_string();
        let options = [
            ("source", "holdfast"),
            ("fd", &fd),
            ("rootmode", "40000"),
            ("user_id", "0"),
            ("group_id", "0"),
            ("max_read", &max_read),
        ];
        for (key, value) in options {
            configure(&context, FSCONFIG_SET_STRING, Some((key, value)))?;
        }
        configure(&context, FSCONFIG_CMD_CREATE, None)?;
        let attributes = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC;
        // SAFETY: the arguments are numbers; `context` is open.
        let root = unsafe {
            owned_fd(libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), FSMOUNT_CLOEXEC, attributes))
        }?;
        Ok(Self { device, root })
    }

    /// The kernel's end alone; our end goes to the session.
    pub(crate) fn split(self) -> (OwnedFd, FuseRoot) {
        (self.device, FuseRoot(self.root))
    }
}

/// The mounted root of a FUSE file system.
#[derive(Debug)]
pub(crate) struct FuseRoot(OwnedFd);

impl FuseRoot {
    /// Opens a file directly below the root; it keeps the file system alive.
    pub(crate) fn open(&self, name: &str, read_only: bool) -> io::Result<File> {
        let name = CString::new(name)?;
        let access = if read_only { libc::O_RDONLY } else { libc::O_RDWR };
        // SAFETY: `name` is a C string that outlives the call; the descriptor is open.
        let fd = unsafe {
            libc::openat(self.0.as_raw_fd(), name.as_ptr(), access | libc::O_CLOEXEC | libc::O_NOFOLLOW)
        };
        // SAFETY: openat gives a descriptor that nobody else owns, or -1.
        unsafe { owned_fd(c_long::from(fd)) }.map(File::from)
    }

    /// Has the kernel ask for a file's attributes, if it does not know them; gives the size.
    pub(crate) fn size_of(&self, name: &str) -> io::Result<u64> {
        let stat = fstatat(&self.0, name, AtFlags::AT_SYMLINK_NOFOLLOW)?;
        u64::try_from(stat.st_size).map_err(io::Error::other)
    }
}

fn configure(context: &OwnedFd, command: c_long, pair: Option<(&str, &str)>) -> io::Result<()> {
    let pair = pair
        .map(|(key, value)| Ok::<_, io::Error>((CString::new(key)?, CString::new(value)?)))
        .transpose()?;
    let pointer = |text: Option<&CStr>| text.map_or(std::ptr::null(), CStr::as_ptr);
    let key = pointer(pair.as_ref().map(|(key, _)| key.as_c_str()));
    let value = pointer(pair.as_ref().map(|(_, value)| value.as_c_str()));
    let unused: c_int = 0;
    // SAFETY: key and value are null or C strings that live until after the call.
    let done = unsafe { libc::syscall(libc::SYS_fsconfig, context.as_raw_fd(), command, key, value, unused) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Takes ownership of a system call's answer.
///
/// # Safety
/// A non-negative `answer` is a descriptor that nobody else owns.
unsafe fn owned_fd(answer: c_long) -> io::Result<OwnedFd> {
    if answer < 0 {
        return Err(io::Error::last_os_error());
    }
    let fd = c_int::try_from(answer).map_err(|_| io::Error::from_raw_os_error(libc::EBADF))?;
    // SAFETY: by this function's contract.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}
