//! Damaged files, later formats, foreign certificates and peers that speak garbage, on a running volume: each is named
//! in one clear sentence, the volume goes on with the replicas that are well, and nothing is lost.

use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use holdfast_tests::blocks::{BlockLedger, BlockWork, Crash};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::process::{run_within, wait_until};
use holdfast_tests::raw_volume::RawVolume;
use holdfast_tests::{Cluster, ClusterOptions, garbage};
use libtest_mimic::Trial;

use crate::trial;

const VOLUME_BYTES: u64 = 16 << 20;
const VOLUME_BLOCKS: usize = 4096;
/// The node whose replica is made to suffer; the target is on another.
const VICTIM: &str = "node-c";
const HOME: &str = "node-a";
/// How long a process may take to say what is wrong.
const SAY_TIMEOUT: Duration = Duration::from_secs(20);
const RESYNC_TIMEOUT: Duration = Duration::from_secs(60);
/// Where a sealed page keeps its version and its checksum: docs/on-disk-format.md.
const VERSION_AT: usize = 8;
const CHECKSUM_AT: usize = 12;
/// A version that no release of ours will reach soon.
const FUTURE_VERSION: u32 = 999;

/// Trials of this file; all on one cluster.
pub fn trials() -> Vec<Trial> {
    vec![trial("wrong_input_to_data_processes_is_named_and_loses_nothing", wrong_input)]
}

struct Rig {
    cluster: Cluster,
    volume: RawVolume,
    ledger: Option<BlockLedger>,
    device: PathBuf,
}

type Check = fn(&mut Rig) -> Result<()>;

fn wrong_input() -> Result<()> {
    let options = ClusterOptions { kind: "wrong-input".to_owned(), ..ClusterOptions::default() };
    let cluster = Cluster::start(&options)?;
    let volume = RawVolume::create(&cluster, "wrong-input", VOLUME_BYTES)?;
    let mut rig =
        Rig { cluster, volume, ledger: Some(BlockLedger::new(VOLUME_BLOCKS)), device: PathBuf::new() };
    let outcome = check_all(&mut rig);
    let ended = rig.cluster.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep });
    outcome.and(ended)
}

fn check_all(rig: &mut Rig) -> Result<()> {
    let checks: [(&str, Check); 8] = [
        ("a layer cut short", layer_cut_short),
        ("a manifest with a flipped bit", flipped_manifest),
        ("a manifest of a later format", future_manifest),
        ("a pool superblock with a flipped bit", flipped_superblock),
        ("a pool superblock of a later format", future_superblock),
        ("the certificate of another node", certificate_of_another_node),
        ("clients that speak garbage", garbage_from_clients),
        ("a peer that speaks garbage", garbage_from_a_peer),
    ];
    rig.device = rig.volume.attach(&rig.cluster, HOME)?;
    for (name, check) in checks {
        rig.work().with_context(|| format!("before: {name}"))?;
        check(rig).context(name)?;
        rig.read_back().with_context(|| format!("after: {name}"))?;
        println!("{name}: named, and nothing lost");
    }
    Ok(())
}

impl Rig {
    /// The client works for a moment and no request of it fails.
    fn work(&mut self) -> Result<()> {
        let ledger = self.ledger.take().context("the ledger was lost with an earlier check")?;
        let requests = ledger.requests;
        let work = BlockWork::start(&self.device, ledger, requests)?;
        std::thread::sleep(Duration::from_millis(300));
        let (ledger, error) = work.finish()?;
        ensure!(error.is_none(), "the client's request failed: {error:?}");
        ensure!(ledger.requests > requests, "no request was answered");
        self.ledger = Some(ledger);
        Ok(())
    }

    /// All replicas are in sync again, and the victim's own replica gives everything that was written.
    fn read_back(&mut self) -> Result<()> {
        self.volume.wait_in_sync(&self.cluster, 3, RESYNC_TIMEOUT)?;
        for node in [VICTIM, HOME] {
            self.volume.detach(&self.cluster)?;
            self.device = self.volume.attach(&self.cluster, node)?;
            let ledger = self.ledger.as_mut().context("no ledger")?;
            ledger.check(&self.device, Crash::Processes).with_context(|| format!("read on {node}"))?;
        }
        Ok(())
    }

    fn replica_dir(&self) -> Result<PathBuf> {
        let replicas = self.cluster.node(VICTIM).pool_dir().join("replicas");
        let mut entries = std::fs::read_dir(&replicas)?.flatten();
        Ok(entries.next().with_context(|| format!("{} is empty", replicas.display()))?.path())
    }

    /// Damages a file while its process is away; the process must say so, and the volume go on without the replica, or
    /// all of the process's replicas where it refuses to start.
    fn with_damage(
        &mut self,
        file: &Path,
        damage: impl FnOnce(&Path) -> Result<()>,
        words: &[&str],
        process_starts: bool,
    ) -> Result<()> {
        let before = std::fs::read(file)?;
        self.cluster.node_mut(VICTIM).data.kill()?;
        let said = self.cluster.node(VICTIM).data.log()?.len();
        damage(file)?;
        let damaged = std::fs::read(file)?;
        let started = self.cluster.node_mut(VICTIM).data.start_again();
        ensure!(started.is_ok() || !process_starts, "the process does not start: {started:?}");
        self.wait_for_words(said, words)?;
        if process_starts {
            self.cluster.node_mut(VICTIM).wait_for_data()?;
        } else {
            let data = &mut self.cluster.node_mut(VICTIM).data;
            wait_until(SAY_TIMEOUT, || Ok(!data.is_alive()))
                .context("it runs on a pool that it cannot trust")?;
        }
        self.work().context("without the damaged replica")?;
        let in_sync = self.volume.in_sync(&self.cluster)?;
        ensure!(in_sync == 2, "{in_sync} replicas are in sync with one damaged");
        ensure!(std::fs::read(file)? == damaged, "the damaged file was changed");
        self.cluster.node_mut(VICTIM).data.kill()?;
        std::fs::write(file, before)?;
        let node = self.cluster.node_mut(VICTIM);
        node.data.start_again()?;
        node.wait_for_data()
    }

    /// Waits until one line that the victim wrote after `said` bytes of its log holds all words.
    fn wait_for_words(&self, said: usize, words: &[&str]) -> Result<()> {
        let data = &self.cluster.node(VICTIM).data;
        let holds_all = |line: &str| words.iter().all(|word| line.contains(word));
        wait_until(SAY_TIMEOUT, || Ok(data.log()?[said..].lines().any(holds_all)))
            .with_context(|| format!("no line with {words:?}; it says:\n{}", data.log_tail()))
    }
}

fn layer_cut_short(rig: &mut Rig) -> Result<()> {
    let file = rig.replica_dir()?.join("layer-000000");
    let cut = |file: &Path| {
        let file = std::fs::File::options().write(true).open(file)?;
        Ok(file.set_len(file.metadata()?.len() / 2)?)
    };
    rig.with_damage(&file, cut, &["layer-000000", "was cut short"], true)
}

fn flipped_manifest(rig: &mut Rig) -> Result<()> {
    let file = rig.replica_dir()?.join("manifest");
    rig.with_damage(&file, flip_a_bit, &["manifest", "is damaged"], true)
}

fn future_manifest(rig: &mut Rig) -> Result<()> {
    let file = rig.replica_dir()?.join("manifest");
    rig.with_damage(&file, raise_version, &["manifest", "format version 999", "run the release"], true)
}

fn flipped_superblock(rig: &mut Rig) -> Result<()> {
    let file = rig.cluster.node(VICTIM).pool_dir().join("pool");
    rig.with_damage(&file, flip_a_bit, &["pool", "is damaged"], false)
}

fn future_superblock(rig: &mut Rig) -> Result<()> {
    let file = rig.cluster.node(VICTIM).pool_dir().join("pool");
    rig.with_damage(&file, raise_version, &["pool", "format version 999", "run the release"], false)
}

fn flip_a_bit(file: &Path) -> Result<()> {
    let file = std::fs::File::options().read(true).write(true).open(file)?;
    let mut byte = [0];
    file.read_exact_at(&mut byte, VERSION_AT as u64)?;
    Ok(file.write_all_at(&[byte[0] ^ 4], VERSION_AT as u64)?)
}

/// As a later release would have written it: intact, with its own version.
fn raise_version(file: &Path) -> Result<()> {
    // Manifest and superblock are one sealed page each.
    let mut page = std::fs::read(file)?;
    ensure!(page.len() > CHECKSUM_AT + 4, "the file has no whole page");
    page[VERSION_AT..VERSION_AT + 4].copy_from_slice(&FUTURE_VERSION.to_le_bytes());
    page[CHECKSUM_AT..CHECKSUM_AT + 4].fill(0);
    let checksum = crc32c::crc32c(&page);
    page[CHECKSUM_AT..CHECKSUM_AT + 4].copy_from_slice(&checksum.to_le_bytes());
    Ok(std::fs::write(file, page)?)
}

/// The victim's process is given another node's certificate: nobody may take it for either of the two.
fn certificate_of_another_node(rig: &mut Rig) -> Result<()> {
    let tls = rig.cluster.work().dir().join("tls");
    let (own, kept, other) = (tls.join(VICTIM), tls.join("kept"), tls.join("node-b"));
    rig.cluster.node_mut(VICTIM).data.kill()?;
    let said = rig.cluster.node(VICTIM).data.log()?.len();
    std::fs::rename(&own, &kept)?;
    std::fs::create_dir(&own)?;
    for file in ["ca.pem", "node.pem", "node.key"] {
        std::fs::copy(other.join(file), own.join(file))?;
    }
    let node = rig.cluster.node_mut(VICTIM);
    node.data.start_again()?;
    node.wait_for_data()?;
    rig.wait_for_words(said, &["node-b", VICTIM])?;
    rig.work().context("with a node under a foreign certificate")?;
    // Time enough for a resync, were it let in.
    std::thread::sleep(Duration::from_secs(3));
    let in_sync = rig.volume.in_sync(&rig.cluster)?;
    ensure!(in_sync == 2, "{in_sync} replicas are in sync with a node under a foreign certificate");
    let node = rig.cluster.node_mut(VICTIM);
    node.data.kill()?;
    std::fs::remove_dir_all(&own)?;
    std::fs::rename(&kept, &own)?;
    node.data.start_again()?;
    node.wait_for_data()
}

/// Random bytes, half handshakes and silence on every port of the victim's process and of the registry.
fn garbage_from_clients(rig: &mut Rig) -> Result<()> {
    let address = rig.cluster.node(VICTIM).address.to_string();
    let pid = rig.cluster.node(VICTIM).data.pid();
    let registry = rig.cluster.registry_address();
    let from = &rig.cluster.node("node-b").spaces;
    let ports = [format!("{address}:9471"), format!("{address}:9472"), registry];
    run_within(SAY_TIMEOUT, &mut garbage::talk_command(from, &ports)?)?;
    rig.work().context("after garbage")?;
    let data = &mut rig.cluster.node_mut(VICTIM).data;
    ensure!(data.is_alive() && data.pid() == pid, "garbage ended the data process:\n{}", data.log_tail());
    ensure!(rig.cluster.controller.program.is_alive(), "garbage ended the controller");
    let in_sync = rig.volume.in_sync(&rig.cluster)?;
    ensure!(in_sync == 3, "garbage on its ports cost a replica: {in_sync} are in sync");
    Ok(())
}

/// Something else listens where the victim's process did, and answers everything with random bytes.
fn garbage_from_a_peer(rig: &mut Rig) -> Result<()> {
    let address = rig.cluster.node(VICTIM).address.to_string();
    rig.cluster.node_mut(VICTIM).data.kill()?;
    let ports = [format!("{address}:9471"), format!("{address}:9472")];
    let log = rig.cluster.work().folder("logs")?.join("garbage.log");
    let mut peer = garbage::listen(&rig.cluster.node(VICTIM).spaces, log, &ports)?;
    rig.work().context("with a peer that speaks garbage")?;
    std::thread::sleep(Duration::from_secs(2));
    rig.work().context("with a peer that speaks garbage, a little later")?;
    let in_sync = rig.volume.in_sync(&rig.cluster)?;
    if in_sync != 2 {
        bail!("{in_sync} replicas are in sync with a peer that speaks garbage");
    }
    let status = rig.volume.status(&rig.cluster)?;
    ensure!(status.state == "serving", "the target is {}: {}", status.state, status.reason);
    peer.kill()?;
    let node = rig.cluster.node_mut(VICTIM);
    node.data.start_again()?;
    node.wait_for_data()
}
