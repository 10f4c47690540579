//! The story's second client: pgbench, whose bank must always add up.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{PUBLISHED, Story};
use crate::cluster::Cluster;
use crate::postgres::{self, Postgres};
use crate::process::{Program, run_within};

/// How long filling the bank may take.
const FILL_TIMEOUT: Duration = Duration::from_secs(120);
/// Branches, of 100,000 accounts each.
const SCALE: &str = "2";
/// Connections.
const CLIENTS: &str = "4";
/// One row: the sums of accounts, tellers, branches and history, and the history's length, all of one instant.
const SUMS: &str = "SELECT (SELECT sum(abalance) FROM pgbench_accounts), (SELECT sum(tbalance) FROM pgbench_tellers), \
    (SELECT sum(bbalance) FROM pgbench_branches), (SELECT coalesce(sum(delta), 0) FROM pgbench_history), \
    (SELECT count(*) FROM pgbench_history)";

/// pgbench in the pod `api`, started again whenever the database has gone.
pub struct Pgbench {
    _program: Program,
    /// Transactions that were seen committed.
    seen: u64,
}

impl Story {
    /// Fills pgbench's tables and lets it run until the cluster ends.
    ///
    /// # Errors
    /// It cannot.
    pub fn start_pgbench(&mut self) -> Result<()> {
        let bin = postgres::installed().context("PostgreSQL is not installed")?;
        let pods = self.pods()?;
        let program = bin.join("pgbench").display().to_string();
        let address = pods.database.address.to_string();
        let mut fill = pods.api.command(&self.cluster, Path::new(&program));
        fill.args(["-h", &address, "-U", "postgres", "-i", "-q", "-s", SCALE, "postgres"]);
        run_within(FILL_TIMEOUT, &mut fill)?;
        let run = format!("{program} -h {address} -U postgres -n -c {CLIENTS} -T 3600 postgres");
        let script = format!("while :; do {run}; sleep 0.2; done");
        let arguments = vec!["-c".to_owned(), script];
        let program = pods.api.start(&self.cluster, "pgbench", Path::new("sh"), arguments)?;
        self.pgbench = Some(Pgbench { _program: program, seen: 0 });
        Ok(())
    }

    /// The bank adds up, and every transaction that was seen is still there; answers how many there are.
    ///
    /// # Errors
    /// It does not, or one is not.
    pub fn check_pgbench(&mut self) -> Result<u64> {
        let pods = self.pods()?;
        let row = pods.postgres.query(&self.cluster, &pods.database, SUMS)?;
        let numbers: Vec<i64> = row.trim().split('|').map(str::parse).collect::<Result<_, _>>()?;
        let [accounts, tellers, branches, history, count] = numbers[..] else {
            anyhow::bail!("pgbench's sums: {row:?}")
        };
        ensure!(
            accounts == tellers && accounts == branches && accounts == history,
            "the bank does not add up: accounts {accounts}, tellers {tellers}, branches {branches}, history {history}"
        );
        let count = u64::try_from(count)?;
        let pgbench = self.pgbench.as_mut().context("pgbench does not run")?;
        ensure!(count >= pgbench.seen, "{} transactions were committed, {count} are left", pgbench.seen);
        pgbench.seen = count;
        self.report.note(&format!("pgbench: {count} transactions, the bank adds up"));
        Ok(count)
    }

    /// Stops the database and detaches its volume in order, does something, and brings both back on node a.
    ///
    /// # Errors
    /// A call fails, or the database does not start.
    pub fn with_database_down(&mut self, work: impl FnOnce(&mut Cluster) -> Result<()>) -> Result<()> {
        // PostgreSQL's fast shutdown: in order, without waiting for its clients.
        self.pods.as_mut().context("no pods run yet")?.postgres.program.interrupt()?;
        self.detach("node-a")?;
        work(&mut self.cluster)?;
        self.attach("node-a")?;
        let pods = self.pods()?;
        let postgres = Postgres::start(&self.cluster, &pods.database, Path::new(PUBLISHED))?;
        self.pods.as_mut().context("no pods run yet")?.postgres = postgres;
        self.wait_for_all_in_sync()
    }
}
