//! The mount table of this process's namespace, from /proc/self/mountinfo.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Major number of loop devices.
const LOOP_MAJOR: u32 = 7;

/// A device number.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Device {
    pub(super) major: u32,
    pub(super) minor: u32,
}

impl Device {
    /// The number of the block device that `path` names.
    pub(super) fn of_node(path: &Path) -> io::Result<Self> {
        let rdev = std::fs::metadata(path)?.rdev();
        let part = |value: u64| u32::try_from(value).map_err(io::Error::other);
        Ok(Self { major: part(nix::sys::stat::major(rdev))?, minor: part(nix::sys::stat::minor(rdev))? })
    }

    /// The file behind a loop device; `None` where there is none (any more), or for other devices.
    pub(super) fn loop_backing(self) -> Option<PathBuf> {
        if self.major != LOOP_MAJOR {
            return None;
        }
        let path = format!("/sys/dev/block/{}:{}/loop/backing_file", self.major, self.minor);
        std::fs::read_to_string(path).ok().map(|text| PathBuf::from(text.trim_end()))
    }

    pub(super) fn is_loop(self) -> bool {
        self.major == LOOP_MAJOR
    }
}

/// One line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Mount {
    /// Device of the mounted file system.
    pub(super) device: Device,
    /// Path within that file system which is mounted.
    pub(super) root: PathBuf,
    /// Where it is mounted.
    pub(super) target: PathBuf,
    /// Options of this mount.
    pub(super) options: String,
    /// Type of the file system.
    pub(super) fs_type: String,
    /// What was named as its source.
    pub(super) source: String,
}

impl Mount {
    pub(super) fn is_read_only(&self) -> bool {
        self.options.split(',').any(|option| option == "ro")
    }

    /// Whether a block device's node is shown here, as raw block volumes are: bound to a file, so that its root is the node's name in
    /// a devtmpfs.
    pub(super) fn shows_node(&self, node: &Path) -> bool {
        self.fs_type == "devtmpfs" && node.file_name().is_some() && self.root.file_name() == node.file_name()
    }
}

/// The whole table, later mounts after earlier ones.
pub(super) fn read() -> io::Result<Vec<Mount>> {
    let text = std::fs::read("/proc/self/mountinfo")?;
    Ok(text.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// The mount that is visible at `path`; several may be stacked there, the last one is on top.
pub(super) fn find(path: &Path) -> io::Result<Option<Mount>> {
    Ok(read()?.into_iter().rfind(|mount| mount.target == path))
}

/// Where the block device that `path` names is mounted, or a bind mount of it: as this process's namespace shows it.
pub(super) fn places_of(path: &Path) -> io::Result<Vec<PathBuf>> {
    let device = Device::of_node(path)?;
    let found = read()?.into_iter().filter(|mount| mount.device == device || mount.shows_node(path));
    Ok(found.map(|mount| mount.target).collect())
}

/// A line is `id parent major:minor root target options tag... - type source super-options`; lines of another shape
/// are of no interest here.
fn parse(line: &[u8]) -> Option<Mount> {
    let mut fields = line.split(|byte| *byte == b' ');
    let numbers = std::str::from_utf8(fields.nth(2)?).ok()?;
    let (major, minor) = numbers.split_once(':')?;
    let root = unescape(fields.next()?);
    let target = unescape(fields.next()?);
    let options = String::from_utf8_lossy(fields.next()?).into_owned();
    let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
    let fs_type = String::from_utf8_lossy(rest.next()?).into_owned();
    let source = unescape(rest.next()?).to_string_lossy().into_owned();
    let device = Device { major: major.parse().ok()?, minor: minor.parse().ok()? };
    Some(Mount { device, root, target, options, fs_type, source })
}

/// The kernel writes blank, tab, newline and backslash as a backslash and three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut bytes = Vec::with_capacity(field.len());
    let mut at = 0;
    while let Some(byte) = field.get(at) {
        let octal = field
            .get(at + 1..at + 4)
            .filter(|digits| *byte == b'\\' && digits.iter().all(|d| (b'0'..=b'7').contains(d)));
        match octal {
            Some(digits) => {
                let value = digits.iter().fold(0_u32, |sum, digit| sum * 8 + u32::from(digit - b'0'));
                bytes.push(u8::try_from(value & 0xff).unwrap_or(b'?'));
                at += 4;
            }
            None => {
                bytes.push(*byte);
                at += 1;
            }
        }
    }
    PathBuf::from(OsString::from_vec(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_with_and_without_tags_and_with_blanks_in_paths_are_read() {
        let line = br"36 35 7:3 / /mnt/with\040blank rw,noatime master:1 shared:2 - ext4 /dev/loop3 rw,errors=continue";
        let mount = parse(line).unwrap();
        assert_eq!(mount.target, Path::new("/mnt/with blank"));
        assert_eq!(mount.device, Device { major: 7, minor: 3 });
        assert_eq!((mount.fs_type.as_str(), mount.source.as_str()), ("ext4", "/dev/loop3"));
        assert!(!mount.is_read_only());
        let line = b"40 30 0:5 /loop3 /pods/x/dev ro,nosuid - devtmpfs udev rw,size=4k";
        let mount = parse(line).unwrap();
        assert_eq!(mount.root, Path::new("/loop3"));
        assert!(mount.is_read_only());
        assert_eq!(parse(b""), None);
    }

    #[test]
    fn the_root_of_this_namespace_is_in_its_table() {
        assert!(find(Path::new("/")).unwrap().is_some());
        assert_eq!(find(Path::new("/no/such/mount")).unwrap(), None);
    }
}
