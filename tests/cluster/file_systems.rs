//! ext4 and xfs on volumes, through crashes of each kind: after every one the journal is replayed as after any crash,
//! what was synced is there, and the file system's own checker finds nothing.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use holdfast_tests::Cluster;
use holdfast_tests::cleanup::Logs;
use holdfast_tests::files::{FileLedger, FileWork};
use holdfast_tests::forgetful::Tear;
use holdfast_tests::process::run_within;
use holdfast_tests::raw_volume::RawVolume;
use libtest_mimic::Trial;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::power_cut::forgetful_options;
use crate::trial;
use holdfast_tests::effort::{rounds, seed};

const MIB: u64 = 1 << 20;
/// Bytes of each volume: xfs wants 300 MiB.
const VOLUME_BYTES: u64 = 320 * MIB;
const CRASHES_SHORT: u32 = 3;
const CRASHES_LONG: u32 = 40;
/// What the sabotage sets back: it holds the first group's tables of ext4, and free space and inode trees of xfs.
const SET_BACK_BYTES: usize = 8 << 20;
/// How long a checker may take.
const CHECK_TIMEOUT: Duration = Duration::from_secs(120);

/// Trials of this file.
pub fn trials() -> Vec<Trial> {
    vec![
        trial("ext4_and_xfs_are_whole_after_every_crash", || on_a_cluster(crash_again_and_again)),
        trial("file_systems_that_lost_a_write_are_noticed_by_their_checkers", || on_a_cluster(lose_writes)),
    ]
}

/// A volume with a file system, its client and what that knows.
struct Site {
    fs_type: &'static str,
    home: &'static str,
    volume: RawVolume,
    ledger: FileLedger,
}

#[derive(Debug, Clone, Copy)]
enum Crash {
    /// `kill -9` of the data processes under both file systems.
    Targets,
    /// `kill -9` of every data process.
    AllProcesses,
    /// Everything loses its power, disks included.
    Power,
}

impl Site {
    fn make(cluster: &Cluster, fs_type: &'static str, home: &'static str, seed: u64) -> Result<Self> {
        let mut volume = RawVolume::create(cluster, fs_type, VOLUME_BYTES)?;
        let device = volume.attach(cluster, home)?.display().to_string();
        let (tool, force) = if fs_type == "xfs" { ("mkfs.xfs", "-f") } else { ("mkfs.ext4", "-F") };
        cluster.node(home).spaces.run(tool, &["-q", force, &device])?;
        volume.detach(cluster)?;
        Ok(Self { fs_type, home, volume, ledger: FileLedger::new(seed) })
    }

    fn mount_point(&self) -> String {
        format!("/run/check-{}", self.fs_type)
    }

    /// Mounts the attached volume on its node; answers where the harness sees it.
    fn mount(&self, cluster: &Cluster, device: &Path) -> Result<PathBuf> {
        let spaces = &cluster.node(self.home).spaces;
        let (at, device) = (self.mount_point(), device.display().to_string());
        spaces.run("mkdir", &["-p", &at])?;
        spaces.run("mount", &["-t", self.fs_type, &device, &at])?;
        Ok(spaces.host_path(&at))
    }

    fn unmount(&self, cluster: &Cluster) -> Result<()> {
        cluster.node(self.home).spaces.run("umount", &[&self.mount_point()]).map(drop)
    }

    /// The checker alone, changing nothing.
    fn fsck(&self, cluster: &Cluster, device: &Path) -> Result<()> {
        let (tool, arguments) = if self.fs_type == "xfs" { ("xfs_repair", "-n") } else { ("e2fsck", "-fn") };
        let mut command = cluster.node(self.home).spaces.command(tool);
        run_within(CHECK_TIMEOUT, command.arg(arguments).arg(device)).map(drop)
    }

    /// Attaches after a crash, replays the journal, compares the files, and lets the checker look.
    fn recover(&mut self, cluster: &Cluster) -> Result<PathBuf> {
        let device = self.volume.attach(cluster, self.home)?;
        let root = self.mount(cluster, &device)?;
        self.ledger.check(&root)?;
        self.unmount(cluster)?;
        self.fsck(cluster, &device)?;
        Ok(device)
    }

    fn start_work(&mut self, cluster: &Cluster, device: &Path) -> Result<FileWork> {
        let root = self.mount(cluster, device)?;
        Ok(FileWork::start(&root, std::mem::take(&mut self.ledger)))
    }
}

fn on_a_cluster(body: fn(&mut Cluster, &mut [Site; 2], &mut StdRng) -> Result<()>) -> Result<()> {
    let seed = seed()?;
    let mut random = StdRng::seed_from_u64(seed);
    let pools = if random.random_bool(0.5) { "ext4" } else { "xfs" };
    let mut options = forgetful_options("file-systems", pools, seed);
    options.pool_bytes = 900 * MIB;
    let mut cluster = Cluster::start(&options)?;
    let mut inner = || -> Result<()> {
        let mut sites =
            [Site::make(&cluster, "ext4", "node-a", seed)?, Site::make(&cluster, "xfs", "node-b", seed + 1)?];
        body(&mut cluster, &mut sites, &mut random)
    };
    let outcome = inner().with_context(|| format!("seed {seed}, pools on {pools}"));
    let ended = cluster.end(if outcome.is_ok() { Logs::Remove } else { Logs::Keep });
    outcome.and(ended)
}

fn crash_again_and_again(cluster: &mut Cluster, sites: &mut [Site; 2], random: &mut StdRng) -> Result<()> {
    let crashes = [Crash::Targets, Crash::Power, Crash::AllProcesses];
    let rounds = rounds(CRASHES_SHORT, CRASHES_LONG);
    for (round, crash) in (1..=rounds).zip(crashes.into_iter().cycle()) {
        crash_once(cluster, sites, random, crash).with_context(|| format!("crash {round}, {crash:?}"))?;
    }
    for site in sites.iter_mut() {
        site.recover(cluster).with_context(|| site.fs_type)?;
        let ledger = &site.ledger;
        println!(
            "{}: {rounds} crashes, {} files made safe, {} compared ({} MiB)",
            site.fs_type,
            ledger.syncs,
            ledger.files_verified,
            ledger.bytes_verified / MIB
        );
        ensure!(ledger.syncs > 0 && ledger.files_verified > 0, "{}: nothing was tested", site.fs_type);
    }
    Ok(())
}

fn crash_once(cluster: &mut Cluster, sites: &mut [Site; 2], random: &mut StdRng, crash: Crash) -> Result<()> {
    let mut work = Vec::new();
    for site in sites.iter_mut() {
        let device = site.recover(cluster).with_context(|| site.fs_type)?;
        work.push(site.start_work(cluster, &device)?);
    }
    std::thread::sleep(Duration::from_millis(random.random_range(300..2000)));
    match crash {
        Crash::Targets => kill(cluster, &["node-a", "node-b"])?,
        Crash::AllProcesses => kill(cluster, &["node-a", "node-b", "node-c"])?,
        Crash::Power => println!("{:?}", cluster.cut_power_of_all(Tear::Random)?),
    }
    for (site, work) in sites.iter_mut().zip(work) {
        let (ledger, error) = work.finish()?;
        println!("{crash:?}: {} {:?}", site.fs_type, error.map(|error| error.to_string()));
        site.ledger = ledger;
    }
    match crash {
        Crash::Power => cluster.power_on_all(),
        Crash::Targets | Crash::AllProcesses => {
            sites.iter().try_for_each(|site| site.unmount(cluster))?;
            for node in &mut cluster.nodes {
                if !node.data.is_alive() {
                    node.data.start_again()?;
                    node.wait_for_data()?;
                }
            }
            Ok(())
        }
    }
}

fn kill(cluster: &mut Cluster, nodes: &[&str]) -> Result<()> {
    nodes.iter().try_for_each(|name| cluster.node_mut(name).data.kill())
}

/// The same checkers on file systems of which one part was set back to an earlier moment, as lost writes do.
fn lose_writes(cluster: &mut Cluster, sites: &mut [Site; 2], _random: &mut StdRng) -> Result<()> {
    for site in sites.iter_mut() {
        let device = site.recover(cluster)?;
        let mut before = vec![0; SET_BACK_BYTES];
        File::open(&device)?.read_exact_at(&mut before, 0)?;
        let work = site.start_work(cluster, &device)?;
        std::thread::sleep(Duration::from_millis(1500));
        let (ledger, error) = work.finish()?;
        ensure!(error.is_none(), "{}: {error:?}", site.fs_type);
        site.ledger = ledger;
        site.unmount(cluster)?;
        site.fsck(cluster, &device).context("before the sabotage")?;
        let file = File::options().write(true).open(&device)?;
        file.write_all_at(&before, 0)?;
        file.sync_all()?;
        let Err(error) = site.fsck(cluster, &device) else {
            bail!("the checker of {} did not notice lost writes", site.fs_type)
        };
        println!("{} noticed: {:.200}", site.fs_type, format!("{error:#}").replace('\n', " "));
    }
    Ok(())
}
