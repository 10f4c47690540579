//! Who reaches whom: helpers that listen and connect inside pods, and the matrix of the answers.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use crate::helper;
use crate::namespaces::Namespaces;
use crate::process::run;

/// A connection that was not made by then counts as dropped. TCP repeats its first packet after 1 s.
const CONNECT_TIMEOUT: Duration = Duration::from_millis(1300);
/// Port that every pod's own small server listens on.
pub const POD_PORT: u16 = 8080;

/// How an attempt to connect ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reach {
    /// Connected.
    Open,
    /// No answer: dropped on the way.
    Dropped,
    /// Somebody said no.
    Refused,
}

impl Reach {
    fn word(self) -> &'static str {
        match self {
            Self::Open => "open",
            Self::Dropped => "dropped",
            Self::Refused => "refused",
        }
    }
}

/// Answers by source and destination, both as people name them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Matrix {
    cells: BTreeMap<(String, String), Reach>,
    sources: Vec<String>,
    destinations: Vec<String>,
}

impl Matrix {
    /// An empty one.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Sets one answer.
    pub fn set(&mut self, source: &str, destination: &str, reach: Reach) {
        for (names, name) in [(&mut self.sources, source), (&mut self.destinations, destination)] {
            if !names.iter().any(|known| known == name) {
                names.push(name.to_owned());
            }
        }
        self.cells.insert((source.to_owned(), destination.to_owned()), reach);
    }

    /// One answer.
    #[must_use]
    pub fn get(&self, source: &str, destination: &str) -> Option<Reach> {
        self.cells.get(&(source.to_owned(), destination.to_owned())).copied()
    }

    /// As a table.
    #[must_use]
    pub fn table(&self) -> String {
        let mut text = format!("{:<12}", "from \\ to");
        for destination in &self.destinations {
            let _ = write!(text, "{destination:<12}");
        }
        for source in &self.sources {
            let _ = write!(text, "\n{source:<12}");
            for destination in &self.destinations {
                let word = self.get(source, destination).map_or("-", Reach::word);
                let _ = write!(text, "{word:<12}");
            }
        }
        text
    }
}

/// Connects from the sandbox `netns` of a node to every address at once.
///
/// # Errors
/// The helper fails.
pub fn probe(node: &Namespaces, netns: &Path, targets: &[SocketAddr]) -> Result<Vec<Reach>> {
    let mut command = node.command_in(netns, helper::program()?);
    command.arg(helper::argument("probe")).args(targets.iter().map(ToString::to_string));
    serde_json::from_str(&run(&mut command)?).context("the probe's answer is not understood")
}

/// Helper's main: connects to every argument and prints the answers as JSON.
pub(crate) fn probe_main(arguments: &[String]) -> Result<ExitCode> {
    let targets: Vec<SocketAddr> = arguments.iter().map(|text| text.parse()).collect::<Result<_, _>>()?;
    let attempts: Vec<_> =
        targets.into_iter().map(|target| std::thread::spawn(move || connect(target))).collect();
    let answers: Vec<Reach> =
        attempts.into_iter().map(|thread| thread.join().unwrap_or(Reach::Dropped)).collect();
    println!("{}", serde_json::to_string(&answers)?);
    Ok(ExitCode::SUCCESS)
}

/// Helper's main: a pod's process, which accepts connections and closes them.
pub(crate) fn pod_main(arguments: &[String]) -> Result<ExitCode> {
    let address: SocketAddr = arguments.first().context("the pod needs an address")?.parse()?;
    let listener = TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))?;
    for connection in listener.incoming() {
        drop(connection);
    }
    Ok(ExitCode::SUCCESS)
}

fn connect(target: SocketAddr) -> Reach {
    match TcpStream::connect_timeout(&target, CONNECT_TIMEOUT) {
        Ok(_) => Reach::Open,
        Err(error) if error.kind() == ErrorKind::TimedOut => Reach::Dropped,
        Err(_) => Reach::Refused,
    }
}
