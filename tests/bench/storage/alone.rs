//! Figures of ours without the peer, most with a limit of our own.

use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::figures::{Figure, median};
use crate::fio::{self, Access, JOBS};
use crate::ours::{Checksums, Ours, Setup, Tls};
use crate::place::wait_until;

use super::Bench;

/// Longest stall of a writer when a replica's process is killed.
const STALL_LIMIT_S: f64 = 1.0;
/// From the target's death to the first write on another node.
const MOVE_LIMIT_S: f64 = 5.0;
/// How much longer a foreground write may take while a replica is copied.
const REBUILD_LIMIT: f64 = 2.0;
/// Seconds measured in each round, with and without; with: those that end before the copy does count.
const REBUILD_SLICES: usize = 5;
/// Volumes attached to the node whose idle cost is measured.
const IDLE_VOLUMES: usize = 20;
/// Size of each.
const IDLE_SIZE_MIB: u64 = 64;
/// How long the idle set is watched, after [`IDLE_SETTLE`].
const IDLE_WATCH: Duration = Duration::from_secs(30);
/// Until the intent logs are cleared and start-up work is over.
const IDLE_SETTLE: Duration = Duration::from_secs(6);
/// Share of a core that the process with all attached volumes may use.
const IDLE_LIMIT_PERCENT: f64 = 1.0;
/// Memory that it may hold, besides a share of the volumes' size.
const IDLE_LIMIT_MIB: f64 = 64.0;
const IDLE_LIMIT_MIB_PER_TIB: f64 = 32.0;
/// When the replica's process is killed, counted from the start of its writer.
const KILL_AFTER: Duration = Duration::from_millis(2_500);
/// How long the writer runs around a kill.
const KILL_SECONDS: u64 = 5;
/// Clock ticks per second in /proc/PID/stat.
const TICKS_PER_S: f64 = 100.0;

/// All that are wanted.
pub fn measure(bench: &mut Bench<'_>) -> Result<Vec<Figure>> {
    let mut figures = Vec::new();
    if bench.wants("engine.tls_on_off_iops") {
        figures.push(tls(bench)?);
    }
    if bench.wants("engine.checksum_on_off_iops") {
        figures.push(checksums(bench)?);
    }
    if bench.wants("failover.replica_stall_s") {
        figures.push(replica_stall(bench)?);
    }
    if bench.wants("rebuild.foreground_p99_ratio") {
        figures.push(rebuild(bench)?);
    }
    if bench.wants("failover.writer_move_s") {
        figures.push(writer_move(bench)?);
    }
    if bench.wants("idle.cpu_percent") || bench.wants("idle.rss_mib") {
        figures.extend(idle(bench)?);
    }
    Ok(figures)
}

/// What mutual TLS between the nodes costs: ours with it beside ours without.
fn tls(bench: &mut Bench<'_>) -> Result<Figure> {
    bench.plain()?;
    bench.tell("starting a second set of ours, TLS on");
    let secured = bench.start_filled("ours-tls", 9480, Tls::On, Checksums::On)?;
    let plain = bench.plain.as_ref().context("just started")?;
    let figure = on_off(bench, "engine.tls_on_off_iops", "TLS", &secured, plain)?;
    secured.detach()?;
    Ok(figure)
}

/// What checksums cost: ours as it is beside ours without.
fn checksums(bench: &mut Bench<'_>) -> Result<Figure> {
    bench.plain()?;
    bench.tell("starting a second set of ours, checksums off");
    let without = bench.start_filled("ours-sums", 9500, Tls::Off, Checksums::Off)?;
    let plain = bench.plain.as_ref().context("just started")?;
    let figure = on_off(bench, "engine.checksum_on_off_iops", "checksums", plain, &without)?;
    without.detach()?;
    Ok(figure)
}

/// Random writes to a set with `what` on and to one with it off, in turns.
fn on_off(bench: &Bench<'_>, name: &'static str, what: &str, with: &Ours, without: &Ours) -> Result<Figure> {
    let (mut on, mut off) = (Side::default(), Side::default());
    for _ in 0..bench.options.rounds {
        on.measure(bench, with)?;
        off.measure(bench, without)?;
    }
    bench.tell(&format!(
        "{name}: CPU per I/O of the three data processes: {:.0} us with {what}, {:.0} us without",
        median(&on.cpu_us),
        median(&off.cpu_us)
    ));
    Ok(Figure::of_rounds(name, "iops", &format!("ours, {what} off"), &on.iops, &off.iops))
}

/// Rounds of one of two sets that are compared.
#[derive(Default)]
struct Side {
    iops: Vec<f64>,
    /// Processor time of all data processes per I/O.
    cpu_us: Vec<f64>,
}

impl Side {
    fn measure(&mut self, bench: &Bench<'_>, ours: &Ours) -> Result<()> {
        let options = bench.options;
        let before = cpu_s(&ours.data_pids())?;
        let iops = fio::measure(bench.place, &ours.nbd(), &JOBS[1], options.size_mib, options.seconds)?;
        let spent_s = cpu_s(&ours.data_pids())? - before;
        // The second to warm up counts too: its rate is taken for the same.
        #[expect(clippy::cast_precision_loss, reason = "seconds are few")]
        let ran_s = (options.seconds + 1) as f64;
        self.iops.push(iops);
        self.cpu_us.push(spent_s * 1e6 / (iops * ran_s));
        Ok(())
    }
}

/// The longest write while a replica's process is killed, of all rounds.
fn replica_stall(bench: &mut Bench<'_>) -> Result<Figure> {
    let (size_mib, rounds) = (bench.options.size_mib, bench.options.rounds);
    let place = bench.place;
    let ours = bench.plain()?;
    let mut longest_s: f64 = 0.0;
    for _ in 0..rounds {
        let access = ours.nbd();
        let victim = other_than(ours.writer());
        let latencies = std::thread::scope(|scope| {
            let writer = scope.spawn(|| fio::foreground(place, &access, size_mib, KILL_SECONDS));
            std::thread::sleep(KILL_AFTER);
            let killed = ours.data_program(victim).kill();
            let latencies = writer.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the writer panicked")))?;
            killed.map(|()| latencies)
        })?;
        longest_s = longest_s.max(latencies.longest_s);
        ours.data_program(victim).start_again()?;
        ours.wait_in_sync()?;
    }
    Ok(Figure::within("failover.replica_stall_s", "s", longest_s, STALL_LIMIT_S))
}

/// The foreground's p99 while a replica that missed the whole volume is copied, over its p99 without.
fn rebuild(bench: &mut Bench<'_>) -> Result<Figure> {
    let (size_mib, rounds) = (bench.options.size_mib, bench.options.rounds);
    let place = bench.place;
    let ours = bench.plain()?;
    let access = ours.nbd();
    let victim = other_than(ours.writer());
    let (mut with, mut without) = (Vec::new(), Vec::new());
    for _ in 0..rounds {
        for _ in 0..REBUILD_SLICES {
            without.push(fio::foreground(place, &access, size_mib, 1)?.p99_us);
        }
        ours.data_program(victim).kill()?;
        fio::fill(place, &access, size_mib)?;
        ours.data_program(victim).start_again()?;
        wait_until(Duration::from_secs(30), || is_copying(ours)).context("no copying began")?;
        for _ in 0..REBUILD_SLICES {
            let p99_us = fio::foreground(place, &access, size_mib, 1)?.p99_us;
            if !is_copying(ours)? {
                break;
            }
            with.push(p99_us);
        }
        ours.wait_in_sync()?;
    }
    anyhow::ensure!(
        !with.is_empty(),
        "the copy of {size_mib} MiB ended within a second: measure with a larger --size-mib"
    );
    let (p99_with, p99_without) = (median(&with), median(&without));
    bench.tell(&format!(
        "rebuild.foreground_p99_ratio: p99 {p99_with:.0} us in {} seconds while a replica was copied, {p99_without:.0} us \
         without",
        with.len()
    ));
    Ok(Figure::within("rebuild.foreground_p99_ratio", "", p99_with / p99_without, REBUILD_LIMIT))
}

fn is_copying(ours: &Ours) -> Result<bool> {
    Ok(ours.status()?.replicas.iter().any(|replica| replica.state == "catching_up"))
}

/// From the kill of the process with the target to the first write on another node, the longest of all rounds.
fn writer_move(bench: &mut Bench<'_>) -> Result<Figure> {
    let rounds = bench.options.rounds;
    let place = bench.place;
    let ours = bench.plain()?;
    let mut longest_s: f64 = 0.0;
    for _ in 0..rounds {
        let (from, to) = (ours.writer(), other_than(ours.writer()));
        // Something is in flight and in the intent log, as with any writer that dies.
        if let Access::Block(device) = ours.block() {
            place.write_block(&device, 0)?;
        }
        let start = Instant::now();
        ours.data_program(from).kill()?;
        let device = ours.move_writer(to)?;
        place.write_block(&device, 0)?;
        longest_s = longest_s.max(start.elapsed().as_secs_f64());
        ours.data_program(from).start_again()?;
        ours.wait_in_sync()?;
    }
    Ok(Figure::within("failover.writer_move_s", "s", longest_s, MOVE_LIMIT_S))
}

/// Processor time and memory of a data process with many attached volumes and nothing to do.
fn idle(bench: &mut Bench<'_>) -> Result<Vec<Figure>> {
    bench.tell(&format!("starting a set of its own with {IDLE_VOLUMES} attached volumes"));
    let setup = Setup {
        name: "ours-idle",
        first_port: 9490,
        tls: Tls::Off,
        checksums: Checksums::On,
        volumes: IDLE_VOLUMES,
        size_mib: IDLE_SIZE_MIB,
    };
    let ours = Ours::start(bench.place, &bench.runtime, setup)?;
    std::thread::sleep(IDLE_SETTLE);
    let each = || ours.data_pids().iter().map(|pid| cpu_s(&[*pid])).collect::<Result<Vec<f64>>>();
    let before = each()?;
    std::thread::sleep(IDLE_WATCH);
    let after = each()?;
    let percent: Vec<f64> = after
        .iter()
        .zip(&before)
        .map(|(after, before)| (after - before) / IDLE_WATCH.as_secs_f64() * 100.0)
        .collect();
    let rss_mib = ours.data_pids().iter().map(|pid| rss_mib(*pid)).collect::<Result<Vec<f64>>>()?;
    bench.tell(&format!(
        "idle: the process with {IDLE_VOLUMES} attached volumes, then those with their other replicas: \
         {percent:.2?} % of a core, {rss_mib:.1?} MiB"
    ));
    ours.detach()?;
    #[expect(clippy::cast_precision_loss, reason = "a few GiB")]
    let attached_tib = (IDLE_VOLUMES as u64 * IDLE_SIZE_MIB) as f64 / f64::from(1 << 20);
    let limit_mib = IDLE_LIMIT_MIB + IDLE_LIMIT_MIB_PER_TIB * attached_tib;
    Ok(vec![
        Figure::within("idle.cpu_percent", "%", percent[0], IDLE_LIMIT_PERCENT),
        Figure::within("idle.rss_mib", "MiB", rss_mib[0], limit_mib),
    ])
}

/// The next node.
fn other_than(node: usize) -> usize {
    (node + 1) % 3
}

/// Processor time that processes have used, in seconds.
fn cpu_s(pids: &[i32]) -> Result<f64> {
    let mut ticks = 0.0;
    for pid in pids {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
        // The name before may hold anything; user and system time are fields 14 and 15 of the line.
        let after_name = stat.rsplit(')').next().unwrap_or_default();
        let fields = after_name.split_whitespace().skip(11).take(2);
        ticks += fields.filter_map(|field| field.parse::<f64>().ok()).sum::<f64>();
    }
    Ok(ticks / TICKS_PER_S)
}

/// Memory that a process holds.
fn rss_mib(pid: i32) -> Result<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
    let kib = line.and_then(|line| line.split_whitespace().next()).context("no VmRSS line")?;
    Ok(kib.parse::<f64>()? / 1024.0)
}
