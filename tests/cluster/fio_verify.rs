//! fio writes blocks that carry their own checksums, place and seed while replicas die, links go down and packets are
//! dropped; it reads them back in between, and again afterwards from each replica in turn.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::process::run_within;
use holdfast_tests::raw_volume::RawVolume;
use holdfast_tests::{Cluster, ClusterOptions, Namespaces};
use libtest_mimic::Trial;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::stale::StaleReplica;
use crate::trial;
use holdfast_tests::effort::{rounds, seed};

const MIB: u64 = 1 << 20;
const VOLUME_BYTES: u64 = 96 * MIB;
const SMALL_VOLUME_BYTES: u64 = 16 * MIB;
/// Room for one of fio's headers, and how many places for one a block has.
const HEADER_BYTES: u32 = 64;
const HEADER_PLACES: u32 = 4096 / HEADER_BYTES - 1;
/// Bytes per second that fio may write, so that a pass lasts long enough for some faults.
const RATE: &str = "8m";
/// Passes over the whole volume.
const PASSES_SHORT: u32 = 2;
const PASSES_LONG: u32 = 18;
/// One pass and its faults take less than this.
const FIO_TIMEOUT: Duration = Duration::from_secs(180);
/// How long replicas may take to come back in sync.
const RESYNC_TIMEOUT: Duration = Duration::from_secs(60);
const NODES: [&str; 3] = ["node-a", "node-b", "node-c"];

/// Trials of this file.
pub fn trials() -> Vec<Trial> {
    vec![
        trial("fio_verifies_through_kills_partitions_and_resyncs", || {
            on_a_cluster(VOLUME_BYTES, verify_through_faults)
        }),
        trial("fio_notices_a_replica_that_lost_acknowledged_writes", || {
            on_a_cluster(SMALL_VOLUME_BYTES, verify_a_stale_replica)
        }),
    ]
}

/// What happens to a replica away from the target.
#[derive(Debug, Clone, Copy)]
enum Fault {
    /// `kill -9` of its data process.
    Kill,
    /// Its cable is out.
    LinkDown,
    /// It hears nothing, though it can be heard.
    DropsInput,
    /// It cannot be heard, though it hears.
    DropsOutput,
    /// Killed again while it catches up.
    KillTwice,
}

const FAULTS: [Fault; 5] =
    [Fault::Kill, Fault::LinkDown, Fault::DropsInput, Fault::DropsOutput, Fault::KillTwice];

fn on_a_cluster(bytes: u64, body: fn(&mut Cluster, &mut RawVolume, u64) -> Result<()>) -> Result<()> {
    let seed = seed()?;
    let options = ClusterOptions { kind: "fio".to_owned(), ..ClusterOptions::default() };
    let mut cluster = Cluster::start(&options)?;
    let outcome = RawVolume::create(&cluster, "fio", bytes)
        .and_then(|mut volume| body(&mut cluster, &mut volume, seed))
        .with_context(|| format!("seed {seed}"));
    let ended = cluster.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep });
    outcome.and(ended)
}

fn verify_through_faults(cluster: &mut Cluster, volume: &mut RawVolume, seed: u64) -> Result<()> {
    let mut random = StdRng::seed_from_u64(seed);
    let passes = rounds(PASSES_SHORT, PASSES_LONG);
    let (mut faults, mut verified) = (0, 0);
    // Each kind of fault comes before any comes again.
    let mut next = FAULTS.into_iter().cycle().skip(random.random_range(0..FAULTS.len()));
    for pass in 1..=passes {
        let home = random.random_range(0..NODES.len());
        let device = volume.attach(cluster, NODES[home])?;
        let job = Pass { device: &device, number: pass, seed };
        let mut writer = job.start_writing(&cluster.node(NODES[home]).spaces)?;
        while writer.try_wait()?.is_none() {
            let victim = NODES[(home + random.random_range(1..NODES.len())) % NODES.len()];
            let fault = next.next().context("faults come for ever")?;
            strike(cluster, volume, victim, fault, &mut random)
                .with_context(|| format!("pass {pass}: {fault:?} on {victim}"))?;
            faults += 1;
        }
        let output = writer.wait_with_output()?;
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        ensure!(output.status.success(), "pass {pass} on {}: fio: {} {said}", NODES[home], output.status);
        volume.wait_in_sync(cluster, NODES.len(), RESYNC_TIMEOUT)?;
        verified += 2 * VOLUME_BYTES;
        // A target reads from its own node's replica: this one from another than the writer's.
        let other = NODES[(home + 1 + pass as usize % 2) % NODES.len()];
        volume.detach(cluster)?;
        let device = volume.attach(cluster, other)?;
        Pass { device: &device, number: pass, seed }
            .verify(&cluster.node(other).spaces)
            .with_context(|| format!("pass {pass}, written on {}, read on {other}", NODES[home]))?;
        volume.detach(cluster)?;
    }
    println!("{passes} passes, {faults} faults, {} MiB verified", verified / MIB);
    ensure!(faults >= passes, "only {faults} faults in {passes} passes");
    Ok(())
}

/// The fault, some time with it, its end, and all replicas in sync again.
fn strike(
    cluster: &mut Cluster,
    volume: &RawVolume,
    victim: &str,
    fault: Fault,
    random: &mut StdRng,
) -> Result<()> {
    let pause = Duration::from_millis(random.random_range(200..2500));
    match fault {
        Fault::Kill | Fault::KillTwice => {
            let again = u32::from(matches!(fault, Fault::KillTwice));
            for _ in 0..=again {
                cluster.node_mut(victim).data.kill()?;
                std::thread::sleep(pause);
                let node = cluster.node_mut(victim);
                node.data.start_again()?;
                node.wait_for_data()?;
            }
        }
        Fault::LinkDown => {
            cluster.set_link(victim, false)?;
            std::thread::sleep(pause);
            cluster.set_link(victim, true)?;
        }
        Fault::DropsInput => drop_packets(cluster, victim, "input", pause)?,
        Fault::DropsOutput => drop_packets(cluster, victim, "output", pause)?,
    }
    volume.wait_in_sync(cluster, NODES.len(), RESYNC_TIMEOUT)
}

/// One direction of a node's network is dead for a while, by a table of the node's own.
fn drop_packets(cluster: &Cluster, victim: &str, hook: &str, pause: Duration) -> Result<()> {
    let spaces = &cluster.node(victim).spaces;
    let chain = format!("{{ type filter hook {hook} priority -300; policy drop; }}");
    spaces.run("nft", &[&format!("add table inet cut; add chain inet cut cut {chain}")])?;
    std::thread::sleep(pause);
    spaces.run("nft", &["delete table inet cut"]).map(drop)
}

/// One pass of fio over the whole volume. fio's checksum says nothing of a block's age, so each pass keeps its headers at
/// another place in the block: a block of an earlier pass has none there.
struct Pass<'a> {
    device: &'a Path,
    number: u32,
    seed: u64,
}

impl Pass<'_> {
    fn arguments(&self) -> Vec<String> {
        // Small blocks and large ones by turns.
        let block = if self.number.is_multiple_of(2) { "64k" } else { "4k" };
        let mut arguments: Vec<String> =
            ["--ioengine=libaio", "--direct=1", "--iodepth=16", "--rw=randwrite", "--verify=crc32c"]
                .map(str::to_owned)
                .to_vec();
        arguments.extend(
            ["--verify_fatal=1", "--verify_state_save=0", "--verify_interval=4096"].map(str::to_owned),
        );
        let random = (self.seed % 1_000_000_007).wrapping_mul(1000) + u64::from(self.number);
        arguments.extend([
            format!("--name=pass-{}", self.number),
            format!("--filename={}", self.device.display()),
            "--size=100%".to_owned(),
            format!("--bs={block}"),
            format!("--randseed={random}"),
            format!("--verify_offset={}", self.number % HEADER_PLACES * HEADER_BYTES),
        ]);
        arguments
    }

    /// Writes with verification in between; ends at the first block that is not as it was written.
    fn start_writing(&self, spaces: &Namespaces) -> Result<Child> {
        let mut fio = spaces.command("fio");
        fio.args(self.arguments()).args([
            "--verify_backlog=256",
            "--end_fsync=1",
            &format!("--rate=,{RATE}"),
        ]);
        fio.stdout(Stdio::null()).stderr(Stdio::piped()).spawn().context("cannot start fio")
    }

    /// Reads everything that the pass wrote.
    fn verify(&self, spaces: &Namespaces) -> Result<()> {
        let mut fio: Command = spaces.command("fio");
        run_within(FIO_TIMEOUT, fio.args(self.arguments()).arg("--verify_only=1")).map(drop)
    }
}

/// The same check against a replica that was set back to before the last pass: it must be noticed.
fn verify_a_stale_replica(cluster: &mut Cluster, volume: &mut RawVolume, seed: u64) -> Result<()> {
    let write = |cluster: &Cluster, volume: &mut RawVolume, number| -> Result<()> {
        let device = volume.attach(cluster, "node-a")?;
        let job = Pass { device: &device, number, seed };
        let mut fio = cluster.node("node-a").spaces.command("fio");
        run_within(FIO_TIMEOUT, fio.args(job.arguments()).args(["--do_verify=0", "--end_fsync=1"]))?;
        ensure!(volume.in_sync(cluster)? == NODES.len(), "a replica was lost while all was well");
        volume.detach(cluster)
    };
    let read = |cluster: &Cluster, volume: &mut RawVolume, number| -> Result<()> {
        let device = volume.attach(cluster, "node-c")?;
        let read = Pass { device: &device, number, seed }.verify(&cluster.node("node-c").spaces);
        volume.detach(cluster)?;
        read
    };
    write(cluster, volume, 1)?;
    let stale = StaleReplica::copy(cluster, "node-c")?;
    write(cluster, volume, 3)?;
    read(cluster, volume, 3).context("before the sabotage")?;
    stale.put_back(cluster)?;
    let Err(error) = read(cluster, volume, 3) else {
        bail!("fio did not notice that a replica lost acknowledged writes")
    };
    let sentence = format!("{error:#}");
    println!("noticed: {:.300}", sentence.replace('\n', " "));
    ensure!(sentence.contains("bad magic header"), "noticed for another reason: {sentence}");
    Ok(())
}
