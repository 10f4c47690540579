//! Disks of the tests' own that forget what was not flushed: pools lie on them where a power cut is to be real.
//!
//! Killing processes drops nothing: the kernel keeps what they wrote. These disks keep written sectors in a cache, make
//! them stay at a flush, and at a cut drop or tear what is left, all disks between the same two requests.
//!
//! ```text
//!   node-a: ext4 or xfs at POOL ── /dev/loopN ── file a ┐
//!   node-b:        the same                    file b ├ one FUSE mount, one process, in namespaces of its own
//!   node-c:        the same                    file c ┘
//! ```
//!
//! Nothing in the serving process holds a loop device or a file of its own mount, so that killing it ends every request.
//! What is not simulated: a disk that loses flushed data (but see [`Disks::lie`]), and sectors torn inside.

mod medium;
mod server;

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rand::Rng;

pub(crate) use server::disks_main;

use crate::helper;
use crate::namespaces::Namespaces;
use crate::process::{Program, ProgramSpec, maker, run, wait_until};
use crate::work::Work;

/// Where the disks' files are, inside their namespaces.
const MOUNT_POINT: &str = "/run/disks";
const CONTROL_SOCKET: &str = "/run/disks.sock";
/// How long the server may take to start.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// How long a loop device may take to vanish after its file system is gone.
const DETACH_TIMEOUT: Duration = Duration::from_secs(20);

/// What becomes of unflushed sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Tear {
    /// All are dropped.
    DropAll,
    /// Each page is kept, dropped or torn between its sectors, by chance.
    Random,
}

/// What a cut did to all disks together.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    /// Unflushed sectors that are there all the same.
    pub kept_sectors: u64,
    /// Unflushed sectors that are gone.
    pub dropped_sectors: u64,
    /// Pages of which a part is gone.
    pub torn_pages: u64,
}

/// How the nodes' disks are made.
#[derive(Debug, Clone)]
pub struct DisksOptions {
    /// Bytes of each disk.
    pub bytes: u64,
    /// `ext4` or `xfs`.
    pub fs_type: String,
    /// Draws what a cut keeps.
    pub seed: u64,
}

/// The disks of one cluster, one per node.
pub struct Disks {
    spaces: Namespaces,
    options: DisksOptions,
    /// Part of every disk's file name, by which its loop device is found.
    mark: String,
    formatted: std::cell::RefCell<Vec<String>>,
    _server: Program,
}

impl Disks {
    /// Starts the server with one disk per node.
    ///
    /// # Errors
    /// It does not start.
    pub fn start(work: &Work, nodes: &[String], options: DisksOptions) -> Result<Self> {
        let mark = format!("forgetful-{:016x}", rand::rng().random::<u64>());
        work.change_state(|state| state.disk_marks.push(mark.clone()))?;
        let spaces = Namespaces::create("disks", work)?;
        let folder = work.folder("disks")?;
        let mut arguments = vec![
            helper::argument("forgetful-disks"),
            folder.display().to_string(),
            options.seed.to_string(),
            options.bytes.to_string(),
        ];
        arguments.extend(nodes.iter().map(|node| format!("{mark}-{node}")));
        let log = work.folder("logs")?.join("forgetful-disks.log");
        let command = maker(&spaces.command(helper::program()?), arguments);
        let mut server = Program::start(ProgramSpec { name: "forgetful-disks".to_owned(), log, command })?;
        let disks_ready = wait_until(START_TIMEOUT, || {
            ensure!(server.is_alive(), "it ended");
            Ok(UnixStream::connect(spaces.host_path(CONTROL_SOCKET)).is_ok())
        });
        disks_ready.with_context(|| format!("the disks do not start:\n{}", server.log_tail()))?;
        Ok(Self { spaces, options, mark, formatted: std::cell::RefCell::default(), _server: server })
    }

    /// Mounts a node's disk at `at` inside the node, formatted if it is new. It goes with the node.
    ///
    /// # Errors
    /// A tool's message.
    pub(crate) fn mount(&self, node: &Namespaces, at: &Path) -> Result<()> {
        let file = format!("{MOUNT_POINT}/{}-{}", self.mark, node.name());
        let device = self.spaces.run("losetup", &["--find", "--show", "--direct-io=on", &file])?;
        let device = device.trim();
        let mounted = self.format_once(node.name(), device).and_then(|()| {
            let at = at.display().to_string();
            node.run("mkdir", &["-p", &at])?;
            node.run("mount", &["-t", &self.options.fs_type, device, &at])
        });
        // Mounted, it vanishes with its last user; else at once.
        let detached = self.spaces.run("losetup", &["-d", device]);
        mounted.with_context(|| format!("mounting the disk of {}", node.name()))?;
        detached.map(drop)
    }

    fn format_once(&self, node: &str, device: &str) -> Result<()> {
        if self.formatted.borrow().iter().any(|done| done == node) {
            return Ok(());
        }
        match self.options.fs_type.as_str() {
            "xfs" => self.spaces.run("mkfs.xfs", &["-q", "-K", device]),
            _ => self.spaces.run("mkfs.ext4", &["-q", "-E", "nodiscard", device]),
        }?;
        self.formatted.borrow_mut().push(node.to_owned());
        Ok(())
    }

    /// Cuts the power of all disks at once: from now on they answer nothing, and what was not flushed is dropped or torn.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn cut(&self, tear: Tear) -> Result<Cut> {
        let answer = self.tell(match tear {
            Tear::DropAll => "cut drop-all",
            Tear::Random => "cut random",
        })?;
        let numbers: Vec<u64> = answer.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        let mut cut = Cut::default();
        for disk in numbers.chunks_exact(3) {
            cut.kept_sectors += disk[0];
            cut.dropped_sectors += disk[1];
            cut.torn_pages += disk[2];
        }
        Ok(cut)
    }

    /// Lets what waits for the cut disks go with an error. Whoever asked must be dead.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn fail(&self) -> Result<()> {
        self.tell("fail").map(drop)
    }

    /// Gives the power back, once no loop device is left that could still write for a dead node.
    ///
    /// # Errors
    /// A loop device stays, or the server does not answer.
    pub fn on(&self) -> Result<()> {
        wait_until(DETACH_TIMEOUT, || Ok(self.loops()?.is_empty()))
            .with_context(|| format!("loop devices over the disks stay: {:?}", self.loops()))?;
        self.tell("on").map(drop)
    }

    /// From now on a flush is answered and does nothing: the environment's sabotage of a power-cut test.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn lie(&self) -> Result<()> {
        self.tell("lie").map(drop)
    }

    /// Flushes that reached the disks.
    ///
    /// # Errors
    /// The server does not answer.
    pub fn flushes(&self) -> Result<u64> {
        Ok(self.tell("flushes")?.trim().parse()?)
    }

    fn loops(&self) -> Result<Vec<PathBuf>> {
        let listed = run(std::process::Command::new("losetup").args(["-l", "-n", "-O", "NAME,BACK-FILE"]))?;
        let ours = listed.lines().filter(|line| line.contains(&self.mark));
        Ok(ours.filter_map(|line| line.split_whitespace().next()).map(PathBuf::from).collect())
    }

    fn tell(&self, command: &str) -> Result<String> {
        let mut connection = UnixStream::connect(self.spaces.host_path(CONTROL_SOCKET))
            .context("the disks' server is gone")?;
        connection.write_all(format!("{command}\n").as_bytes())?;
        let mut answer = String::new();
        BufReader::new(connection).read_line(&mut answer)?;
        let answer = answer.trim();
        let rest =
            answer.strip_prefix("ok").with_context(|| format!("the disks, to {command:?}: {answer}"))?;
        Ok(rest.to_owned())
    }
}
