//! The power of every replica's machine goes at once, with everything that was not flushed: what was flushed is there
//! (P1), a block that was being written is old or new, and nothing else is anywhere.

use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use holdfast_tests::blocks::{BlockLedger, BlockWork, Crash};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::forgetful::{DisksOptions, Tear};
use holdfast_tests::raw_volume::RawVolume;
use holdfast_tests::{Cluster, ClusterOptions};
use libtest_mimic::Trial;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::trial;
use holdfast_tests::effort::{rounds, seed};

const MIB: u64 = 1 << 20;
/// Bytes of the volume; small, so that blocks are written again and again between two flushes.
const VOLUME_BYTES: u64 = 48 * MIB;
const VOLUME_BLOCKS: usize = 12_288;
/// Cuts on each kind of pool.
const CUTS_SHORT: u32 = 2;
const CUTS_LONG: u32 = 25;
/// How long replicas may take to come back in sync.
const RESYNC_TIMEOUT: Duration = Duration::from_secs(60);

/// Trials of this file, each on a cluster of its own.
pub fn trials() -> Vec<Trial> {
    vec![
        trial("a_power_cut_of_all_replicas_keeps_what_was_flushed_on_ext4", || cuts("ext4")),
        trial("a_power_cut_of_all_replicas_keeps_what_was_flushed_on_xfs", || cuts("xfs")),
        trial("disks_that_lie_about_flushes_are_noticed_after_a_power_cut", lying_disks),
    ]
}

/// Options of a cluster whose pools lie on disks that forget.
pub fn forgetful_options(kind: &str, fs_type: &str, seed: u64) -> ClusterOptions {
    let disks = DisksOptions { bytes: 1024 * MIB, fs_type: fs_type.to_owned(), seed };
    ClusterOptions {
        kind: kind.to_owned(),
        pool_bytes: 768 * MIB,
        disks: Some(disks),
        ..ClusterOptions::default()
    }
}

/// One cluster, one volume, one client.
struct Rig {
    cluster: Cluster,
    volume: RawVolume,
    ledger: BlockLedger,
    random: StdRng,
}

impl Rig {
    fn start(fs_type: &str, seed: u64) -> Result<Self> {
        let cluster = Cluster::start(&forgetful_options("power-cut", fs_type, seed))?;
        let volume = RawVolume::create(&cluster, "blocks", VOLUME_BYTES)?;
        let ledger = BlockLedger::new(VOLUME_BLOCKS);
        Ok(Self { cluster, volume, ledger, random: StdRng::seed_from_u64(seed) })
    }

    fn end(self, outcome: Result<()>) -> Result<()> {
        let ended = self.cluster.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep });
        outcome.and(ended)
    }

    fn any_node(&mut self) -> String {
        ["node-a", "node-b", "node-c"][self.random.random_range(0..3)].to_owned()
    }

    /// Lets the client work for some time.
    fn work(&mut self, work: BlockWork, time_ms: u64) -> Result<()> {
        std::thread::sleep(Duration::from_millis(time_ms));
        let error = self.take_back(work)?;
        ensure!(error.is_none(), "the client failed although nothing was cut: {error:?}");
        Ok(())
    }

    fn take_back(&mut self, work: BlockWork) -> Result<Option<std::io::Error>> {
        let (ledger, error) = work.finish()?;
        self.ledger = ledger;
        Ok(error)
    }

    fn start_work(&mut self, device: &std::path::Path) -> Result<BlockWork> {
        let ledger = std::mem::replace(&mut self.ledger, BlockLedger::new(0));
        BlockWork::start(device, ledger, self.random.random())
    }

    /// Attaches, checks, works, and cuts in the middle of it.
    fn round(&mut self) -> Result<u64> {
        let home = self.any_node();
        let device = self.volume.attach(&self.cluster, &home)?;
        let checked = self.ledger.check(&device, Crash::Power)?;
        let work = self.start_work(&device)?;
        std::thread::sleep(Duration::from_millis(self.random.random_range(200..1500)));
        if self.random.random_bool(0.4) {
            self.disturb_a_replica(&home)?;
        }
        let cut = self.cluster.cut_power_of_all(Tear::Random)?;
        let error = self.take_back(work)?;
        println!(
            "on {home}: {checked:?}; {} requests, {} flushes so far; {cut:?}; the client's end: {}",
            self.ledger.requests,
            self.ledger.flushes,
            error.map_or_else(|| "none".to_owned(), |error| error.to_string())
        );
        self.cluster.power_on_all()?;
        Ok(cut.dropped_sectors)
    }

    /// A replica's process dies and comes back, so that the cut may find it away, catching up or just joined.
    fn disturb_a_replica(&mut self, home: &str) -> Result<()> {
        let name = if home == "node-b" { "node-c" } else { "node-b" };
        let pause = Duration::from_millis(self.random.random_range(0..1500));
        let back = self.random.random_bool(0.7);
        let node = self.cluster.node_mut(name);
        node.data.kill()?;
        std::thread::sleep(pause);
        if back {
            node.data.start_again()?;
            node.wait_for_data()?;
        }
        std::thread::sleep(pause);
        Ok(())
    }
}

fn cuts(fs_type: &str) -> Result<()> {
    let seed = seed()?;
    let mut rig = Rig::start(fs_type, seed)?;
    let outcome = cut_again_and_again(&mut rig).with_context(|| format!("seed {seed}, pools on {fs_type}"));
    rig.end(outcome)
}

fn cut_again_and_again(rig: &mut Rig) -> Result<()> {
    let (rounds, mut dropped) = (rounds(CUTS_SHORT, CUTS_LONG), 0);
    for round in 1..=rounds {
        dropped += rig.round().with_context(|| format!("cut {round}"))?;
    }
    // The last word: after a cut the volume works as before, on any node, with all replicas.
    let device = rig.volume.attach(&rig.cluster, "node-c")?;
    rig.ledger.check(&device, Crash::Power).context("after the last cut")?;
    let work = rig.start_work(&device)?;
    rig.work(work, 300)?;
    rig.volume.wait_in_sync(&rig.cluster, 3, RESYNC_TIMEOUT)?;
    rig.volume.detach(&rig.cluster)?;
    for node in ["node-a", "node-b"] {
        let device = rig.volume.attach(&rig.cluster, node)?;
        rig.ledger.check(&device, Crash::Processes).with_context(|| format!("read on {node}"))?;
        rig.volume.detach(&rig.cluster)?;
    }
    let ledger = &rig.ledger;
    println!(
        "{rounds} cuts: {} requests answered, {} of them flushes, {} MiB verified, {dropped} sectors dropped",
        ledger.requests,
        ledger.flushes,
        ledger.bytes_verified / MIB
    );
    ensure!(ledger.flushes > 0 && dropped > 0, "nothing was flushed or nothing was dropped: no test");
    Ok(())
}

/// The same check, with disks that answer flushes and do nothing: it must find flushed blocks gone.
fn lying_disks() -> Result<()> {
    let mut rig = Rig::start("ext4", seed()?)?;
    let outcome = lose_flushed_blocks(&mut rig);
    rig.end(outcome)
}

fn lose_flushed_blocks(rig: &mut Rig) -> Result<()> {
    rig.round().context("an honest cut")?;
    let device = rig.volume.attach(&rig.cluster, "node-a")?;
    rig.ledger.check(&device, Crash::Power).context("after an honest cut")?;
    rig.cluster.disks()?.lie()?;
    let flushes = rig.ledger.flushes;
    let work = rig.start_work(&device)?;
    rig.work(work, 1000)?;
    ensure!(rig.ledger.flushes > flushes, "nothing was flushed: no test");
    rig.cluster.cut_power_of_all(Tear::DropAll)?;
    rig.cluster.power_on_all()?;
    let device = rig.volume.attach(&rig.cluster, "node-a")?;
    let Err(error) = rig.ledger.check(&device, Crash::Power) else {
        bail!("the check did not notice that flushed blocks are gone")
    };
    let sentence = format!("{error:#}");
    println!("noticed: {sentence}");
    ensure!(sentence.contains("blocks are wrong"), "noticed for another reason: {sentence}");
    Ok(())
}
