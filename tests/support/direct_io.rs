//! Helper `direct-io`: one block read or written past every cache, to see what a target answers.

use std::fs::OpenOptions;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::helper;
use crate::namespaces::Namespaces;
use crate::process::run_within;

/// Bytes of one direct request: the volume's logical block.
pub const BLOCK_BYTES: usize = 4096;
/// A request that was not answered by then counts as not answered.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(20);

/// How one request ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum DirectOutcome {
    /// The block's bytes; for a write, what was written.
    Served(Vec<u8>),
    /// The kernel's error number.
    Refused(i32),
}

impl DirectOutcome {
    /// The error's text, or that it was served.
    #[must_use]
    pub fn describe(&self) -> String {
        match self {
            Self::Served(_) => "served".to_owned(),
            Self::Refused(number) => format!("refused: {}", std::io::Error::from_raw_os_error(*number)),
        }
    }
}

/// Memory aligned to blocks, as direct I/O wants it: a part of a larger buffer.
pub(crate) struct Aligned {
    memory: Vec<u8>,
    start: usize,
    len: usize,
}

impl Aligned {
    pub(crate) fn new(len: usize) -> Self {
        let memory = vec![0; len + BLOCK_BYTES];
        let start = memory.as_ptr().align_offset(BLOCK_BYTES);
        Self { memory, start, len }
    }

    pub(crate) fn bytes(&mut self) -> &mut [u8] {
        &mut self.memory[self.start..self.start + self.len]
    }
}

/// Reads the block at `offset` of `device` on a node.
///
/// # Errors
/// No answer at all.
pub fn read_block(node: &Namespaces, device: &str, offset: u64) -> Result<DirectOutcome> {
    ask(node, &["read", device, &offset.to_string()])
}

/// Fills the block at `offset` of `device` with one byte value, on a node.
///
/// # Errors
/// No answer at all.
pub fn write_block(node: &Namespaces, device: &str, offset: u64, byte: u8) -> Result<DirectOutcome> {
    ask(node, &["write", device, &offset.to_string(), &byte.to_string()])
}

fn ask(node: &Namespaces, arguments: &[&str]) -> Result<DirectOutcome> {
    let mut command = node.command(helper::program()?);
    command.arg(helper::argument("direct-io")).args(arguments);
    let answer = run_within(REQUEST_TIMEOUT, &mut command)?;
    serde_json::from_str(&answer).context("the helper's answer is not understood")
}

/// Helper's main: `read DEVICE OFFSET` or `write DEVICE OFFSET BYTE`.
pub(crate) fn direct_io_main(arguments: &[String]) -> Result<ExitCode> {
    let (device, offset) = match arguments {
        [_, device, offset, ..] => (Path::new(device), offset.parse::<u64>()?),
        _ => bail!("usage: read|write DEVICE OFFSET [BYTE]"),
    };
    let mut memory = Aligned::new(BLOCK_BYTES);
    let block = memory.bytes();
    let outcome = match arguments[0].as_str() {
        "read" => open(device, false).and_then(|file| file.read_exact_at(block, offset)),
        "write" => {
            block.fill(arguments.get(3).context("write needs a byte")?.parse()?);
            open(device, true).and_then(|file| file.write_all_at(block, offset))
        }
        other => bail!("unknown request {other}"),
    };
    let answer = match outcome {
        Ok(()) => DirectOutcome::Served(block.to_vec()),
        Err(error) => DirectOutcome::Refused(error.raw_os_error().unwrap_or(0)),
    };
    println!("{}", serde_json::to_string(&answer)?);
    Ok(ExitCode::SUCCESS)
}

fn open(device: &Path, write: bool) -> std::io::Result<std::fs::File> {
    OpenOptions::new().read(true).write(write).custom_flags(libc::O_DIRECT).open(device)
}
