//! Loop devices: binding, identity, and the keeper that makes them vanish with us.

use std::ffi::CStr;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::thread;

use nix::sys::stat::{Mode, SFlag, makedev, mknod};

/// Another process may take the free loop device we were told of; we ask again this often.
pub(crate) const BIND_TRIES: u32 = 64;

const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
const LO_FLAGS_DIRECT_IO: u32 = 16;
const BLOCK_BYTES: u32 = 4096;
const NAME_BYTES: usize = 64;
/// What the names of read-only twins start with.
pub(crate) const TWIN_PREFIX: &str = "holdfast-ro-";

/// `struct loop_info64` of linux/loop.h.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    sizelimit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; NAME_BYTES],
    crypt_name: [u8; NAME_BYTES],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// `struct loop_config` of linux/loop.h.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

mod ioctls {
    use super::{LoopConfig, LoopInfo};

    nix::ioctl_none_bad!(loop_clr_fd, 0x4C01);
    nix::ioctl_read_bad!(loop_get_status64, 0x4C05, LoopInfo);
    nix::ioctl_write_ptr_bad!(loop_configure, 0x4C0A, LoopConfig);
    nix::ioctl_none_bad!(loop_set_capacity, 0x4C07);
    nix::ioctl_none_bad!(loop_ctl_get_free, 0x4C82);
    nix::ioctl_write_ptr_bad!(block_set_read_only, 0x125D, libc::c_int);
}

impl LoopInfo {
    const fn empty() -> Self {
        Self {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            sizelimit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags: 0,
            file_name: [0; NAME_BYTES],
            crypt_name: [0; NAME_BYTES],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

/// Why no loop device could be bound.
pub(crate) enum BindError {
    Contention,
    Kernel(&'static str, io::Error),
}

/// A bound loop device and the keeper of its last descriptor. Dropping it lets the device go as soon as nobody else has it
/// open.
#[derive(Debug)]
pub(crate) struct LoopDevice {
    pub(crate) path: PathBuf,
    number: u32,
    keeper: Sender<()>,
}

impl LoopDevice {
    /// Binds a free loop device to `file` under `name` (at most 63 bytes), with direct I/O and 4096-byte blocks.
    pub(crate) fn bind(file: &File, name: &str, read_only: bool) -> Result<Self, BindError> {
        let (number, _open) = bind_free(file, name, read_only, Lifetime::WhileOpen)?;
        let keeper =
            keep(number).map_err(|error| BindError::Kernel("starting the loop device's keeper", error))?;
        Ok(Self { path: device_path(number), number, keeper })
    }

    /// Takes the size that its file has now; gives it. Its read-only twins follow in the background.
    pub(crate) fn follow_size(&self) -> io::Result<u64> {
        let bytes = follow_size(self.number)?;
        // It fails only where the keeper's thread is dead.
        let _ = self.keeper.send(());
        Ok(bytes)
    }
}

/// When a loop device goes.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Lifetime {
    /// At its last close.
    WhileOpen,
    /// When it is cleared.
    UntilCleared,
}

/// Binds a free loop device, see [`LoopDevice::bind`]; gives its number, and a descriptor that holds it open.
pub(crate) fn bind_free(
    file: &File,
    name: &str,
    read_only: bool,
    lifetime: Lifetime,
) -> Result<(u32, File), BindError> {
    for _ in 0..BIND_TRIES {
        let number = free_number().map_err(|error| BindError::Kernel("LOOP_CTL_GET_FREE", error))?;
        // A descriptor that may not write would make the device read-only.
        let device =
            open_device(number, true).map_err(|error| BindError::Kernel("opening the loop device", error))?;
        match configure(&device, file, name, read_only, lifetime) {
            Ok(()) => {}
            Err(error) if error.raw_os_error() == Some(libc::EBUSY) => continue,
            Err(error) => return Err(BindError::Kernel("LOOP_CONFIGURE", error)),
        }
        let writable = if read_only { Ok(()) } else { make_writable(&device) };
        let refused = match writable.and_then(|()| uses_direct_io(number)) {
            Ok(true) => return Ok((number, device)),
            Ok(false) => BindError::Kernel(
                "LOOP_CONFIGURE",
                io::Error::other("the kernel refused direct I/O, so data would be cached twice"),
            ),
            Err(error) => BindError::Kernel("preparing the loop device", error),
        };
        // SAFETY: the call takes no argument. It fails where the device is not bound any more, which is as well.
        let _ = unsafe { ioctls::loop_clr_fd(device.as_raw_fd()) };
        return Err(refused);
    }
    Err(BindError::Contention)
}

/// Whoever had the device before may have set it read-only (BLKROSET), which outlives the binding.
fn make_writable(device: &File) -> io::Result<()> {
    let no: libc::c_int = 0;
    // SAFETY: the call reads one number.
    unsafe { ioctls::block_set_read_only(device.as_raw_fd(), &raw const no) }?;
    Ok(())
}

/// Has a loop device take the size that its file has now; gives it.
fn follow_size(number: u32) -> io::Result<u64> {
    let device = open_device(number, false)?;
    // SAFETY: the call takes no argument.
    unsafe { ioctls::loop_set_capacity(device.as_raw_fd()) }?;
    let sectors = fs::read_to_string(format!("/sys/block/loop{number}/size"))?;
    Ok(sectors.trim().parse::<u64>().map_err(io::Error::other)? * 512)
}

/// Holds the loop device open on a thread with a descriptor table of its own, until the answer is dropped; then clears its read-only
/// twins first, which would hold it for ever though nobody has either open. What is sent has the twins take its size. The thread
/// alone sees to them, because opening a twin may have to wait for reads under way, as long as the volume answers none.
///
/// The device clears itself at its last close. If the process is killed while this is the last descriptor, that close first
/// writes back what is cached for the device, into a file system that we serve: in one table, the loop device might be
/// closed before `/dev/fuse`, and the dying process would wait for itself for ever. With two tables, two threads close, and
/// the closing of `/dev/fuse` fails that write.
fn keep(number: u32) -> io::Result<Sender<()>> {
    let (sender, receiver) = channel::<()>();
    let (opened_sender, opened) = channel();
    thread::Builder::new().name(format!("loop{number}-keeper")).spawn(move || {
        // SAFETY: this thread owns no descriptor yet; those of the other threads stay open in their table.
        let unshared =
            unsafe { libc::syscall(libc::SYS_close_range, 3, libc::c_uint::MAX, libc::CLOSE_RANGE_UNSHARE) };
        let result = if unshared < 0 { Err(io::Error::last_os_error()) } else { open_device(number, false) };
        let device = match result {
            Ok(device) => device,
            Err(error) => {
                let _ = opened_sender.send(Err(error));
                return;
            }
        };
        let _ = opened_sender.send(Ok(()));
        let path = device_path(number);
        while let Ok(()) = receiver.recv() {
            for_twins(&path, "take its size", Bound::follow_size);
        }
        for_twins(&path, "go", |twin| twin.clear().map(drop));
        drop(device);
    })?;
    opened.recv().map_err(|_| io::Error::other("the keeper's thread died"))??;
    Ok(sender)
}

fn for_twins(device: &Path, what: &str, work: fn(&Bound) -> io::Result<()>) {
    let done = Bound::twins_of(device).and_then(|twins| twins.iter().try_for_each(work));
    if let Err(error) = done {
        tracing::warn!(device = %device.display(), %error, "its read-only twins do not {what}");
    }
}

/// A loop device that is bound, by the name it was bound under.
pub(crate) struct Bound {
    number: u32,
    pub(crate) path: PathBuf,
    pub(crate) name: String,
    /// Number of the block device that it stands over, as stat(2) has it; 0 over a file.
    over: u64,
}

impl Bound {
    /// Every bound loop device.
    pub(crate) fn list() -> io::Result<Vec<Self>> {
        Self::list_where(|_| true)
    }

    /// The read-only twins of a block device, see [`crate::ReadOnlyTwin`]. No other loop device is opened: opening one may have to
    /// wait for another volume's I/O, and keeps it from being cleared at once.
    pub(crate) fn twins_of(device: &Path) -> io::Result<Vec<Self>> {
        let found = fs::metadata(device)?;
        if !found.file_type().is_block_device() {
            return Err(io::Error::other(format!("{} is no block device", device.display())));
        }
        // The file's folder is another one in another mount namespace.
        let may_be = |loop_dir: &Path| {
            let told = |file: &str| fs::read_to_string(loop_dir.join(file)).unwrap_or_default();
            told("ro").trim() == "1"
                && Path::new(told("loop/backing_file").trim_end()).file_name() == device.file_name()
        };
        let is_twin = |bound: &Self| bound.over == found.rdev() && bound.name.starts_with(TWIN_PREFIX);
        Ok(Self::list_where(may_be)?.into_iter().filter(is_twin).collect())
    }

    /// `is_wanted` gets the device's folder in /sys.
    fn list_where(is_wanted: impl Fn(&Path) -> bool) -> io::Result<Vec<Self>> {
        let mut bound = Vec::new();
        for entry in fs::read_dir("/sys/block")? {
            let entry = entry?;
            let number = entry.file_name().to_str().and_then(|name| name.strip_prefix("loop")?.parse().ok());
            let Some(number) = number else { continue };
            if entry.path().join("loop/backing_file").exists()
                && is_wanted(&entry.path())
                && let Some(info) = bound_as(number)
            {
                let path = device_path(number);
                bound.push(Self { number, path, name: name_of(&info), over: info.rdevice });
            }
        }
        Ok(bound)
    }

    /// Takes the size that is under it now.
    pub(crate) fn follow_size(&self) -> io::Result<()> {
        match follow_size(self.number) {
            // Cleared meanwhile.
            Err(error) if error.raw_os_error() == Some(libc::ENXIO) => Ok(()),
            other => other.map(drop),
        }
    }

    /// Unbinds it, or has it unbound at its last close; tells which.
    pub(crate) fn clear(&self) -> io::Result<Cleared> {
        let device = open_device(self.number, false)?;
        // While we have it open nobody else can bind it anew.
        if status(&device).map(|info| name_of(&info)).ok().as_deref() != Some(&*self.name) {
            return Ok(Cleared::Now);
        }
        // SAFETY: the call takes no argument.
        match unsafe { ioctls::loop_clr_fd(device.as_raw_fd()) } {
            Ok(_) | Err(nix::errno::Errno::ENXIO) => {}
            Err(error) => return Err(error.into()),
        }
        drop(device);
        if bound_as(self.number).is_some_and(|info| name_of(&info) == self.name) {
            Ok(Cleared::Later)
        } else {
            Ok(Cleared::Now)
        }
    }
}

/// Whether a loop device is unbound.
pub(crate) enum Cleared {
    Now,
    Later,
}

/// `None` if it is not bound (any more).
fn bound_as(number: u32) -> Option<LoopInfo> {
    let device = open_device(number, false).ok()?;
    status(&device).ok()
}

fn status(device: &File) -> io::Result<LoopInfo> {
    let mut info = LoopInfo::empty();
    // SAFETY: `info` is the structure that the call fills.
    unsafe { ioctls::loop_get_status64(device.as_raw_fd(), &raw mut info) }?;
    Ok(info)
}

fn name_of(info: &LoopInfo) -> String {
    let name = CStr::from_bytes_until_nul(&info.file_name).unwrap_or_default();
    name.to_string_lossy().into_owned()
}

fn free_number() -> io::Result<u32> {
    let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
    // SAFETY: the call takes no argument.
    let number = unsafe { ioctls::loop_ctl_get_free(control.as_raw_fd()) }?;
    u32::try_from(number).map_err(io::Error::other)
}

fn configure(device: &File, file: &File, name: &str, read_only: bool, lifetime: Lifetime) -> io::Result<()> {
    let mut info = LoopInfo::empty();
    info.flags = LO_FLAGS_DIRECT_IO
        | if read_only { LO_FLAGS_READ_ONLY } else { 0 }
        | if lifetime == Lifetime::WhileOpen { LO_FLAGS_AUTOCLEAR } else { 0 };
    let len = name.len().min(NAME_BYTES - 1);
    info.file_name[..len].copy_from_slice(&name.as_bytes()[..len]);
    let fd = file.as_fd().as_raw_fd().unsigned_abs();
    let config = LoopConfig { fd, block_size: BLOCK_BYTES, info, reserved: [0; 8] };
    // SAFETY: `config` is the structure that the call reads.
    unsafe { ioctls::loop_configure(device.as_raw_fd(), &raw const config) }?;
    Ok(())
}

fn uses_direct_io(number: u32) -> io::Result<bool> {
    Ok(fs::read_to_string(format!("/sys/block/loop{number}/loop/dio"))?.trim() == "1")
}

fn device_path(number: u32) -> PathBuf {
    PathBuf::from(format!("/dev/loop{number}"))
}

/// Opens a loop device, whose node is made if this /dev lacks it (a container's /dev is filled once). Without `write`,
/// closing it does not make udev look at the device again.
fn open_device(number: u32, write: bool) -> io::Result<File> {
    let path = device_path(number);
    match fs::symlink_metadata(&path) {
        Ok(found) if found.file_type().is_block_device() => {}
        Ok(_) => return Err(io::Error::other(format!("{} is no block device", path.display()))),
        Err(error) if error.kind() == io::ErrorKind::NotFound => make_node(number, &path)?,
        Err(error) => return Err(error),
    }
    OpenOptions::new().read(true).write(write).open(&path)
}

fn make_node(number: u32, path: &Path) -> io::Result<()> {
    let told = fs::read_to_string(format!("/sys/block/loop{number}/dev"))?;
    let parsed = told
        .trim()
        .split_once(':')
        .and_then(|(major, minor)| Some((major.parse().ok()?, minor.parse().ok()?)));
    let (major, minor) = parsed.ok_or_else(|| io::Error::other(format!("\"{told}\" is no device number")))?;
    match mknod(path, SFlag::S_IFBLK, Mode::from_bits_truncate(0o600), makedev(major, minor)) {
        // The kernel or another process was faster.
        Ok(()) | Err(nix::errno::Errno::EEXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
