//! PostgreSQL (Debian's package) in a pod, on a published volume.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::cluster::Cluster;
use crate::pod::Pod;
use crate::process::{Program, run, run_within, wait_until};

/// Folder of the database below the mount point; the root holds `lost+found`, which initdb refuses.
const DATA_FOLDER: &str = "pgdata";
/// How long a database may take to accept connections; after a failover it replays its log.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// How long making a new database may take.
const INIT_TIMEOUT: Duration = Duration::from_secs(120);
/// How long one statement of the harness may take.
const STATEMENT_TIMEOUT: Duration = Duration::from_secs(30);

/// A running server.
pub struct Postgres {
    /// The server's first process.
    pub program: Program,
    bin: PathBuf,
}

/// Folder of the installed server's programs; none if Debian's package is missing.
#[must_use]
pub fn installed() -> Option<PathBuf> {
    let versions = std::fs::read_dir("/usr/lib/postgresql").ok()?;
    let mut folders: Vec<PathBuf> = versions.flatten().map(|entry| entry.path().join("bin")).collect();
    folders.retain(|bin| bin.join("initdb").exists() && bin.join("postgres").exists());
    folders.sort();
    folders.pop()
}

/// Makes a new database on the volume mounted at `mount` inside the pod's node.
///
/// # Errors
/// initdb's output.
pub fn initialise(cluster: &Cluster, pod: &Pod, mount: &Path) -> Result<()> {
    let bin = installed().context("PostgreSQL is not installed (Debian package postgresql)")?;
    let data = mount.join(DATA_FOLDER).display().to_string();
    run(pod.command(cluster, Path::new("install")).args(["-d", "-o", "postgres", "-m", "0700", &data]))?;
    let mut initdb = as_postgres(pod.command(cluster, Path::new("setpriv")), &bin.join("initdb"));
    initdb.args([
        "--pgdata",
        &data,
        "--auth=trust",
        "--username=postgres",
        "--locale=C",
        "--encoding=UTF8",
        "--data-checksums",
    ]);
    run_within(INIT_TIMEOUT, &mut initdb)?;
    // The client comes over the pod network; who may reach the port is the policy's matter. Flushed: the volume may move
    // away from a node that is cut off, and only what was flushed is promised to move with it.
    let line = "host all all 10.244.0.0/16 trust";
    let script = format!("echo '{line}' >> '{data}/pg_hba.conf' && sync '{data}/pg_hba.conf'");
    run(pod.command(cluster, Path::new("sh")).args(["-c", &script])).map(drop)
}

impl Postgres {
    /// Starts the server in the pod and waits until it takes statements.
    ///
    /// # Errors
    /// It ends or does not answer; the error carries the end of its log.
    pub fn start(cluster: &Cluster, pod: &Pod, mount: &Path) -> Result<Self> {
        let bin = installed().context("PostgreSQL is not installed (Debian package postgresql)")?;
        let data = mount.join(DATA_FOLDER).display().to_string();
        let mut arguments: Vec<String> = POSTGRES_USER.iter().map(ToString::to_string).collect();
        arguments.extend([bin.join("postgres").display().to_string(), "-D".to_owned(), data]);
        arguments.extend(["-h".to_owned(), pod.address.to_string(), "-p".to_owned(), "5432".to_owned()]);
        for setting in
            ["unix_socket_directories=", "fsync=on", "synchronous_commit=on", "full_page_writes=on"]
        {
            arguments.extend(["-c".to_owned(), setting.to_owned()]);
        }
        let name = format!("postgres-{}-{}", pod.name, pod.node);
        let program = pod.start(cluster, &name, Path::new("setpriv"), arguments)?;
        let mut server = Self { program, bin };
        let mut dead = false;
        let waited = wait_until(START_TIMEOUT, || {
            dead = !server.program.is_alive();
            Ok(dead || server.query(cluster, pod, "SELECT 1").is_ok())
        });
        anyhow::ensure!(!dead, "PostgreSQL ended:\n{}", server.program.log_tail());
        waited.with_context(|| format!("PostgreSQL does not answer:\n{}", server.program.log_tail()))?;
        Ok(server)
    }

    /// Runs a statement from inside the server's pod; one row per line.
    ///
    /// # Errors
    /// psql's message.
    pub fn query(&self, cluster: &Cluster, pod: &Pod, statement: &str) -> Result<String> {
        let mut psql = pod.command(cluster, &self.bin.join("psql"));
        psql.env("PGCONNECT_TIMEOUT", "2").args(["-X", "-A", "-t", "-q", "-U", "postgres", "-d", "postgres"]);
        psql.args(["-h", &pod.address.to_string(), "-c", statement]);
        run_within(STATEMENT_TIMEOUT, &mut psql)
    }

    /// Stops the server in order and verifies the checksum of every page it has.
    ///
    /// # Errors
    /// It does not stop, or a page is damaged.
    pub fn stop_and_verify(mut self, cluster: &Cluster, pod: &Pod, mount: &Path) -> Result<()> {
        self.program.terminate()?;
        let data = mount.join(DATA_FOLDER).display().to_string();
        let mut verify =
            as_postgres(pod.command(cluster, Path::new("setpriv")), &self.bin.join("pg_checksums"));
        run_within(INIT_TIMEOUT, verify.args(["--check", "--pgdata", &data])).map(drop)
    }

    /// Makes the client's table.
    ///
    /// # Errors
    /// psql's message.
    pub fn create_ledger_table(&self, cluster: &Cluster, pod: &Pod) -> Result<()> {
        let table = "CREATE TABLE ledger (number bigint PRIMARY KEY, payload text NOT NULL)";
        self.query(cluster, pod, table).map(drop)
    }

    /// Every number the database has.
    ///
    /// # Errors
    /// psql's message.
    pub fn numbers(&self, cluster: &Cluster, pod: &Pod) -> Result<BTreeSet<u64>> {
        let rows = self.query(cluster, pod, "SELECT number FROM ledger")?;
        rows.lines().map(|line| line.trim().parse().with_context(|| format!("row {line:?}"))).collect()
    }
}

/// Arguments of setpriv that make a program run as the database's user.
const POSTGRES_USER: [&str; 5] =
    ["--reuid=postgres", "--regid=postgres", "--clear-groups", "--inh-caps=-all", "--"];

fn as_postgres(mut setpriv: Command, program: &Path) -> Command {
    setpriv.args(POSTGRES_USER).arg(program);
    setpriv
}
