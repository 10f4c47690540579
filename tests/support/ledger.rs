//! The client that commits numbered transactions, and its own ledger of what was acknowledged.
//!
//! A line is appended to the ledger and flushed after the database acknowledged a commit and before the next one begins:
//! what the ledger names must be in the database for ever. The reverse is not promised: a commit whose answer was lost may
//! be present without a line.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use tokio_postgres::{Client, NoTls};

/// A connection that was not made by then is given up.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);
/// A commit that was not answered by then is given up with its connection. Longer than a stall of a volume that loses
/// a replica, which must not look like a failure.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(8);
/// How often the client looks whether the database has moved.
const ADDRESS_CHECK_INTERVAL: Duration = Duration::from_millis(100);
/// Pause between two attempts to connect.
const RETRY_PAUSE: Duration = Duration::from_millis(50);
/// Bytes that each transaction carries beside its number.
const PAYLOAD_BYTES: usize = 400;

/// The ledger as its reader sees it.
#[derive(Debug, Clone)]
pub struct Ledger {
    path: PathBuf,
}

/// One acknowledged transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// Its number.
    pub number: u64,
    /// When it was acknowledged, in microseconds since 1970 (one machine, one clock).
    pub acknowledged_us: u64,
}

/// The ledger against the database, number by number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Comparison {
    /// Numbers in the ledger.
    pub acknowledged: usize,
    /// Of those, how many the database has.
    pub present: usize,
    /// Acknowledged and absent: must be empty.
    pub lost: Vec<u64>,
}

impl Ledger {
    /// The ledger kept at `path`.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path }
    }

    /// Its file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Everything acknowledged so far, in order.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn entries(&self) -> Result<Vec<Entry>> {
        let text = match std::fs::read_to_string(&self.path) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            text => text.context("cannot read the ledger")?,
        };
        // A last line without its end was cut off by a kill: its commit was not yet entered.
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        whole.lines().map(parse_entry).collect()
    }

    /// Compares every number with what the database has.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn compare(&self, in_database: &BTreeSet<u64>) -> Result<Comparison> {
        let entries = self.entries()?;
        let lost: Vec<u64> =
            entries.iter().map(|entry| entry.number).filter(|number| !in_database.contains(number)).collect();
        Ok(Comparison { acknowledged: entries.len(), present: entries.len() - lost.len(), lost })
    }
}

/// Longest time between two acknowledgements, counted from `since_us`; entries before it only give the start.
#[must_use]
pub fn longest_gap(entries: &[Entry], since_us: u64) -> Duration {
    let mut longest = 0;
    for pair in entries.windows(2) {
        if pair[1].acknowledged_us >= since_us {
            longest = longest.max(pair[1].acknowledged_us - pair[0].acknowledged_us);
        }
    }
    Duration::from_micros(longest)
}

/// Now, as ledgers write it.
#[must_use]
pub fn now_us() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_micros()).unwrap_or(u64::MAX)
}

fn parse_entry(line: &str) -> Result<Entry> {
    let (number, time) = line.split_once(' ').with_context(|| format!("ledger line {line:?}"))?;
    Ok(Entry { number: number.parse()?, acknowledged_us: time.parse()? })
}

/// Helper's main: `LEDGER ADDRESS_FILE`. Commits without pause until it is killed; the address file says where.
pub(crate) fn client_main(arguments: &[String]) -> Result<ExitCode> {
    let [ledger, address_file] = arguments else { bail!("usage: LEDGER ADDRESS_FILE") };
    let mut ledger_file = OpenOptions::new().create(true).append(true).open(ledger)?;
    let mut number = Ledger::new(PathBuf::from(ledger)).entries()?.last().map_or(0, |entry| entry.number);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        loop {
            let outcome = commit_until_failure(Path::new(address_file), &mut ledger_file, &mut number).await;
            if let Err(error) = outcome {
                eprintln!("after {number}: {error:#}");
            }
            tokio::time::sleep(RETRY_PAUSE).await;
        }
    })
}

async fn commit_until_failure(address_file: &Path, ledger: &mut File, number: &mut u64) -> Result<()> {
    let address = std::fs::read_to_string(address_file)?;
    let client = connect(&address).await?;
    let preparing = client.prepare("INSERT INTO ledger (number, payload) VALUES ($1, $2)");
    let statement =
        tokio::time::timeout(CONNECT_TIMEOUT, preparing).await.context("no answer to a statement")??;
    let payload = "x".repeat(PAYLOAD_BYTES);
    loop {
        // A number is never used twice: one whose answer was lost may be in the database.
        *number += 1;
        let key = i64::try_from(*number)?;
        let parameters: [&(dyn tokio_postgres::types::ToSql + Sync); 2] = [&key, &payload];
        let commit = tokio::time::timeout(COMMIT_TIMEOUT, client.execute(&statement, &parameters));
        tokio::select! {
            biased;
            outcome = commit => outcome.context("no answer to a commit")??,
            // As a name's new address would tell it; the commit under way has an unknown outcome and is not entered.
            () = moved(address_file, &address) => return Ok(()),
        };
        ledger.write_all(format!("{} {}\n", *number, now_us()).as_bytes())?;
        ledger.sync_data()?;
    }
}

/// Returns once the file names another address.
async fn moved(address_file: &Path, address: &str) {
    while std::fs::read_to_string(address_file).is_ok_and(|now| now == address) {
        tokio::time::sleep(ADDRESS_CHECK_INTERVAL).await;
    }
}

async fn connect(address: &str) -> Result<Client> {
    let config = format!("host={} port=5432 user=postgres dbname=postgres", address.trim());
    let connecting = tokio_postgres::connect(&config, NoTls);
    let (client, connection) =
        tokio::time::timeout(CONNECT_TIMEOUT, connecting).await.context("no answer to a connection")??;
    tokio::spawn(async move {
        if let Err(error) = connection.await {
            eprintln!("connection: {error}");
        }
    });
    Ok(client)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_acknowledged_number_that_the_database_lacks_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let ledger = Ledger::new(dir.path().join("ledger"));
        std::fs::write(ledger.path(), "1 10\n2 20\n4 40\n5 5").unwrap();

        let comparison = ledger.compare(&BTreeSet::from([1, 3, 4])).unwrap();

        assert_eq!(comparison, Comparison { acknowledged: 3, present: 2, lost: vec![2] });
    }

    #[test]
    fn the_longest_gap_counts_a_gap_that_began_before() {
        let entries: Vec<Entry> = [(1, 0), (2, 500), (3, 600), (4, 900)]
            .map(|(number, acknowledged_us)| Entry { number, acknowledged_us })
            .to_vec();

        assert_eq!(longest_gap(&entries, 100), Duration::from_micros(500));
        assert_eq!(longest_gap(&entries, 550), Duration::from_micros(300));
    }
}
