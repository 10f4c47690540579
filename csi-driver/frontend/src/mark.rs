//! The mark by which a data process tells its loop devices from others': 16 random digits in a file of its folder, which
//! are part of each loop device's name. The file's lock tells whether a process lives that has devices attached.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

const FILE: &str = "owner";
const DIGITS: usize = 16;

/// Held by every attached device, shared.
#[derive(Debug)]
pub(crate) struct Mark {
    text: String,
    _locked: File,
}

impl Mark {
    /// Reads the mark, or makes one.
    pub(crate) fn hold(dir: &Path) -> io::Result<Self> {
        DirBuilder::new().recursive(true).mode(0o700).create(dir)?;
        if read(dir)?.is_none() {
            write(dir)?;
        }
        let text = read(dir)?.ok_or_else(|| unusable(dir))?;
        let locked = File::open(dir.join(FILE))?;
        locked.lock_shared()?;
        Ok(Self { text, _locked: locked })
    }

    /// The mark, if there is one and no living process holds it: then it is held alone until the answer is dropped.
    pub(crate) fn seize(dir: &Path) -> io::Result<Option<Self>> {
        let Some(text) = read(dir)? else { return Ok(None) };
        let locked = File::open(dir.join(FILE))?;
        match locked.try_lock() {
            Ok(()) => Ok(Some(Self { text, _locked: locked })),
            Err(TryLockError::WouldBlock) => Err(io::Error::new(
                io::ErrorKind::ResourceBusy,
                format!("{} belongs to a living process with devices attached", dir.display()),
            )),
            Err(TryLockError::Error(error)) => Err(error),
        }
    }

    /// What the names of this folder's loop devices start with.
    pub(crate) fn prefix(&self) -> String {
        format!("holdfast:{}:", self.text)
    }
}

fn read(dir: &Path) -> io::Result<Option<String>> {
    let text = match fs::read_to_string(dir.join(FILE)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let usable = text.len() == DIGITS && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if usable { Ok(Some(text)) } else { Err(unusable(dir)) }
}

/// 1. Write a file of our own name. 2. Link it, which fails if another process was faster. A crash between leaves a file
///    that is never read.
fn write(dir: &Path) -> io::Result<()> {
    let mut random = [0; DIGITS / 2];
    File::open("/dev/urandom")?.read_exact(&mut random)?;
    let text: String = random.iter().map(|byte| format!("{byte:02x}")).collect();
    let own = dir.join(format!("{FILE}.{text}"));
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&own)?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    let linked = fs::hard_link(&own, dir.join(FILE));
    fs::remove_file(&own)?;
    match linked {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
        _ => Ok(()),
    }
}

fn unusable(dir: &Path) -> io::Error {
    io::Error::other(format!(
        "{} is not a mark of ours; remove it if nothing of ours is attached",
        dir.join(FILE).display()
    ))
}
