//! The story's client, which commits without pause, and what its ledger says.

use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Client, STALL_MAX, Story};
use crate::helper;
use crate::ledger::{Comparison, Ledger};
use crate::process::wait_until;

impl Story {
    /// Starts the client in the pod `api`.
    ///
    /// # Errors
    /// It cannot be started.
    pub fn start_client(&mut self) -> Result<()> {
        let pods = self.pods()?;
        let dir = self.cluster.work().folder("client")?;
        let (ledger, address_file) = (dir.join("ledger"), dir.join("address"));
        std::fs::write(&address_file, pods.database.address.to_string())?;
        let arguments =
            [helper::argument("ledger"), ledger.display().to_string(), address_file.display().to_string()];
        let program = pods.api.start(&self.cluster, "client", &helper::program()?, arguments.to_vec())?;
        self.client = Some(Client { program, ledger: Ledger::new(ledger), address_file });
        Ok(())
    }

    /// Lets the client commit for a while; it must make at least so many commits.
    pub(super) fn wait_for_commits(&mut self, time: Duration, at_least: usize) -> Result<()> {
        let client = self.client.as_mut().context("the client does not run")?;
        let before = client.ledger.entries()?.len();
        std::thread::sleep(time);
        let patience = STALL_MAX + Duration::from_secs(5);
        wait_until(patience, || Ok(client.ledger.entries()?.len() >= before + at_least)).with_context(
            || format!("fewer than {at_least} commits; the client says:\n{}", client.program.log_tail()),
        )?;
        let made = client.ledger.entries()?.len() - before;
        self.report.note(&format!("{made} commits acknowledged"));
        Ok(())
    }

    /// Compares the ledger with the database and prints the figure.
    ///
    /// # Errors
    /// An acknowledged number is absent.
    pub fn compare(&mut self, when: &str) -> Result<Comparison> {
        let (client, pods) = (self.client()?, self.pods()?);
        // The ledger is read first: what it names by now must be in what the database answers after.
        let ledger = client.ledger.entries()?;
        let numbers = pods.postgres.numbers(&self.cluster, &pods.database)?;
        let lost: Vec<u64> =
            ledger.iter().map(|entry| entry.number).filter(|n| !numbers.contains(n)).collect();
        let (acknowledged, present) = (ledger.len(), ledger.len() - lost.len());
        let figure = format!("{acknowledged} acknowledged, {present} present");
        self.report.note(&format!("{when}: {figure}"));
        ensure!(lost.is_empty(), "acknowledged transactions are lost: {lost:?}");
        self.report.figure(&format!("transactions {when}"), figure);
        Ok(Comparison { acknowledged, present, lost })
    }

    pub(super) fn client(&self) -> Result<&Client> {
        self.client.as_ref().context("the client does not run yet")
    }
}
