//! The work folder of one run and the state file from which anybody can clean up after it.

use std::fs::{self, File, OpenOptions};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use anyhow::{Context, Result};
use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

const STATE_FILE: &str = "state.json";
const LOCK_FILE: &str = "lock";

/// What a run has made outside of its own memory; enough to undo it.
#[derive(Debug, Default, Clone, Serialize, Deserialize)]
pub struct State {
    /// First processes of the PID namespaces, with their start times so that a reused number is not mistaken.
    pub holders: Vec<HolderState>,
    /// Volumes that were created; loop devices name them.
    pub volume_ids: Vec<String>,
    /// Parts of the file names of disks that were made; their loop devices show them.
    #[serde(default)]
    pub disk_marks: Vec<String>,
    /// Names of control groups that were made, in every hierarchy.
    #[serde(default)]
    pub cgroups: Vec<String>,
    /// The cluster outlives its driver (`--keep`).
    pub kept: bool,
}

/// One namespace holder.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct HolderState {
    /// Its name, such as `node-a`.
    pub name: String,
    /// Its process number on the host.
    pub pid: i32,
    /// Field 22 of its `/proc/PID/stat`.
    pub start_time: u64,
    /// Inode of its PID namespace.
    pub pid_namespace: u64,
    /// Inode of its network namespace.
    pub net_namespace: u64,
}

/// The folder of one run: pools, stores, logs, objects and the ledger live below it and nowhere else.
///
/// It lies in the build's target folder: on a disk file system (direct I/O) and ignored by git.
#[derive(Clone)]
pub struct Work {
    dir: PathBuf,
    state: Arc<Mutex<State>>,
    // Held for as long as the run lives; a folder whose lock is free is a dead run's.
    _lock: Arc<Flock<File>>,
}

impl Work {
    /// Makes `<root>/<kind>-<pid>-<random>`.
    ///
    /// # Errors
    /// The folder cannot be made or locked.
    pub fn create(kind: &str) -> Result<Self> {
        let root = work_root()?;
        fs::create_dir_all(&root).with_context(|| format!("cannot make {}", root.display()))?;
        let dir = tempfile::Builder::new()
            .prefix(&format!("{kind}-{}-", std::process::id()))
            .tempdir_in(&root)
            .with_context(|| format!("cannot make a work folder in {}", root.display()))?
            .keep();
        // PostgreSQL runs as another user and reads its settings through here.
        fs::set_permissions(&dir, std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let lock = lock_folder(&dir)?.context("the new work folder is locked by another process")?;
        let work = Self { dir, state: Arc::default(), _lock: Arc::new(lock) };
        work.change_state(|_| ())?;
        Ok(work)
    }

    /// The folder.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A folder below it, made if absent.
    ///
    /// # Errors
    /// It cannot be made.
    pub fn folder(&self, relative: &str) -> Result<PathBuf> {
        let path = self.dir.join(relative);
        fs::create_dir_all(&path).with_context(|| format!("cannot make {}", path.display()))?;
        Ok(path)
    }

    /// Changes the state file before the change it tells of may matter.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn change_state(&self, change: impl FnOnce(&mut State)) -> Result<()> {
        let mut state = self.lock_state();
        change(&mut state);
        write_state(&self.dir, &state)
    }

    fn lock_state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Where work folders live: `HOLDFAST_WORK_DIR`, else `work` beside the build's profile folder.
///
/// # Errors
/// The running program's path is unknown.
pub fn work_root() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("HOLDFAST_WORK_DIR") {
        return Ok(PathBuf::from(dir));
    }
    Ok(binaries_dir()?.join("work"))
}

/// Where the binaries under test lie: `HOLDFAST_BIN_DIR`, else the running program's folder (without `deps`).
///
/// # Errors
/// The running program's path is unknown.
pub fn binaries_dir() -> Result<PathBuf> {
    if let Some(dir) = std::env::var_os("HOLDFAST_BIN_DIR") {
        return Ok(PathBuf::from(dir));
    }
    let program = std::env::current_exe().context("cannot find the running program's path")?;
    let mut dir = program.parent().unwrap_or(Path::new("/")).to_path_buf();
    if dir.ends_with("deps") {
        dir.pop();
    }
    Ok(dir)
}

/// Reads the state of the run in `dir`; a run that died before writing it has made nothing.
#[must_use]
pub fn read_state(dir: &Path) -> State {
    fs::read(dir.join(STATE_FILE))
        .ok()
        .and_then(|json| serde_json::from_slice(&json).ok())
        .unwrap_or_default()
}

/// Writes the state of the run in `dir`, by rename.
pub(crate) fn write_state(dir: &Path, state: &State) -> Result<()> {
    let temporary = dir.join("state.json.new");
    fs::write(&temporary, serde_json::to_vec_pretty(state)?)
        .and_then(|()| fs::rename(&temporary, dir.join(STATE_FILE)))
        .with_context(|| format!("cannot write the state file in {}", dir.display()))
}

/// Locks the run's folder; none if a live run holds it.
pub(crate) fn lock_folder(dir: &Path) -> Result<Option<Flock<File>>> {
    let path = dir.join(LOCK_FILE);
    let file = OpenOptions::new()
        .create(true)
        .truncate(false)
        .write(true)
        .open(&path)
        .with_context(|| format!("cannot open {}", path.display()))?;
    match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
        Ok(lock) => Ok(Some(lock)),
        Err((_, nix::errno::Errno::EAGAIN)) => Ok(None),
        Err((_, errno)) => Err(errno).with_context(|| format!("cannot lock {}", path.display())),
    }
}
