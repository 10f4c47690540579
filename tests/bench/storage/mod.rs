//! `storage`: a volume with three replicas beside qemu's quorum of three, and figures of ours alone.

mod alone;
mod beside;

use std::time::Instant;

use anyhow::Result;
use clap::Args;
use holdfast_tests::cleanup::Logs;

use crate::figures::{self, Figure};
use crate::ours::{Checksums, Ours, Setup, Tls};
use crate::place::Place;

/// How much is measured.
#[derive(Debug, Args)]
pub struct Options {
    /// One JSON object per line instead of the table.
    #[arg(long)]
    json: bool,
    /// Only figures whose name begins so, such as `nbd.randwrite` or `idle`; may be repeated.
    #[arg(long, value_name = "PREFIX")]
    only: Vec<String>,
    /// Size of the volume.
    #[arg(long, default_value_t = 512)]
    size_mib: u64,
    /// How long each job runs, after one second to warm up.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
    /// How often each job runs on each side; the median counts.
    #[arg(long, default_value_t = 3)]
    rounds: usize,
}

/// Runs it all and prints the figures.
pub fn run(options: &Options) -> Result<()> {
    let place = Place::new()?;
    let measured = measure_all(&place, options);
    let logs = if measured.is_ok() { Logs::Remove } else { Logs::Keep };
    let ended = place.end(logs);
    figures::print(&measured?, options.json);
    ended
}

/// One run: where, what, and the sets of processes that are up.
struct Bench<'a> {
    place: &'a Place,
    options: &'a Options,
    runtime: tokio::runtime::Runtime,
    start: Instant,
    plain: Option<Ours>,
}

fn measure_all(place: &Place, options: &Options) -> Result<Vec<Figure>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
    let mut bench = Bench { place, options, runtime, start: Instant::now(), plain: None };
    let mut figures = beside::measure(&mut bench)?;
    figures.extend(alone::measure(&mut bench)?);
    if let Some(plain) = &bench.plain {
        plain.detach()?;
    }
    anyhow::ensure!(!figures.is_empty(), "no figure's name begins with {:?}", options.only);
    Ok(figures)
}

impl Bench<'_> {
    fn wants(&self, name: &str) -> bool {
        self.options.only.is_empty() || self.options.only.iter().any(|prefix| name.starts_with(prefix))
    }

    fn tell(&self, text: &str) {
        eprintln!("{:>6.1} s  {text}", self.start.elapsed().as_secs_f64());
    }

    /// The set with TLS off, started when it is first needed and filled then.
    fn plain(&mut self) -> Result<&mut Ours> {
        if self.plain.is_none() {
            self.tell("starting a controller and three data processes, TLS off, checksums and intent log on");
            self.plain = Some(self.start_filled("ours", 9470, Tls::Off, Checksums::On)?);
        }
        Ok(self.plain.as_mut().expect("just started"))
    }

    fn start_filled(
        &self,
        name: &'static str,
        first_port: u16,
        tls: Tls,
        checksums: Checksums,
    ) -> Result<Ours> {
        let size_mib = self.options.size_mib;
        let setup = Setup { name, first_port, tls, checksums, volumes: 1, size_mib };
        let ours = Ours::start(self.place, &self.runtime, setup)?;
        crate::fio::fill(self.place, &ours.nbd(), size_mib)?;
        Ok(ours)
    }
}
