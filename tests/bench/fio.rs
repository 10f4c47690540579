//! The load: fio, the same jobs against everything that is measured.

use anyhow::{Context, Result};
use serde_json::Value;

use crate::place::Place;

/// What fio reaches.
#[derive(Debug, Clone)]
pub enum Access {
    /// An NBD server on a Unix socket, by its URI.
    Nbd(String),
    /// A block device.
    Block(String),
}

impl Access {
    fn arguments(&self) -> Vec<String> {
        match self {
            Self::Nbd(uri) => vec!["--ioengine=nbd".into(), format!("--uri={uri}")],
            Self::Block(path) => {
                vec!["--ioengine=libaio".into(), "--direct=1".into(), format!("--filename={path}")]
            }
        }
    }
}

/// One figure's load.
#[derive(Debug)]
pub struct Job {
    /// The figure's name without its prefix.
    pub name: &'static str,
    /// Unit of the figure.
    pub unit: &'static str,
    pattern: &'static str,
    block: &'static str,
    depth: u32,
    figure: Wanted,
}

#[derive(Debug, Clone, Copy)]
enum Wanted {
    MedianLatencyUs,
    Iops,
    MebibytesPerSecond,
}

/// The jobs in the order they run.
pub const JOBS: [Job; 5] = [
    Job {
        name: "randwrite_4k_qd1_p50",
        unit: "us",
        pattern: "randwrite",
        block: "4k",
        depth: 1,
        figure: Wanted::MedianLatencyUs,
    },
    Job {
        name: "randwrite_4k_qd32_iops",
        unit: "iops",
        pattern: "randwrite",
        block: "4k",
        depth: 32,
        figure: Wanted::Iops,
    },
    Job {
        name: "randread_4k_qd32_iops",
        unit: "iops",
        pattern: "randread",
        block: "4k",
        depth: 32,
        figure: Wanted::Iops,
    },
    Job {
        name: "write_1m_qd8_bw",
        unit: "MiB/s",
        pattern: "write",
        block: "1m",
        depth: 8,
        figure: Wanted::MebibytesPerSecond,
    },
    Job {
        name: "read_1m_qd8_bw",
        unit: "MiB/s",
        pattern: "read",
        block: "1m",
        depth: 8,
        figure: Wanted::MebibytesPerSecond,
    },
];

/// Runs one job and gives its figure.
pub fn measure(place: &Place, access: &Access, job: &Job, size_mib: u64, seconds: u64) -> Result<f64> {
    let side = run_timed(place, access, job, size_mib, seconds)?;
    match job.figure {
        Wanted::MedianLatencyUs => Ok(number(&side["clat_ns"]["percentile"]["50.000000"])? / 1e3),
        Wanted::Iops => number(&side["iops"]),
        Wanted::MebibytesPerSecond => Ok(number(&side["bw_bytes"])? / f64::from(1 << 20)),
    }
}

/// How long the writes of a foreground took: 4 KiB at random, some in flight.
#[derive(Debug, Clone, Copy)]
pub struct Latencies {
    /// 99 of 100 took at most so long, in microseconds.
    pub p99_us: f64,
    /// The longest, in seconds.
    pub longest_s: f64,
}

/// Runs the foreground for some seconds, after one to warm up.
pub fn foreground(place: &Place, access: &Access, size_mib: u64, seconds: u64) -> Result<Latencies> {
    let job = Job {
        name: "foreground",
        unit: "us",
        pattern: "randwrite",
        block: "4k",
        depth: 4,
        figure: Wanted::MedianLatencyUs,
    };
    let side = run_timed(place, access, &job, size_mib, seconds)?;
    Ok(Latencies {
        p99_us: number(&side["clat_ns"]["percentile"]["99.000000"])? / 1e3,
        longest_s: number(&side["clat_ns"]["max"])? / 1e9,
    })
}

/// Runs a job; gives what fio tells of its reads or writes.
fn run_timed(place: &Place, access: &Access, job: &Job, size_mib: u64, seconds: u64) -> Result<Value> {
    let mut arguments = access.arguments();
    arguments.extend([
        format!("--name={}", job.name),
        format!("--rw={}", job.pattern),
        format!("--bs={}", job.block),
        format!("--iodepth={}", job.depth),
        format!("--size={size_mib}m"),
        "--time_based".into(),
        "--ramp_time=1".into(),
        format!("--runtime={seconds}"),
        "--randrepeat=0".into(),
        "--output-format=json".into(),
    ]);
    let output = place.run("fio", &arguments)?;
    let json: Value = serde_json::from_str(output.get(output.find('{').unwrap_or(0)..).unwrap_or(""))
        .with_context(|| format!("fio's answer is no JSON: {output}"))?;
    Ok(json["jobs"][0][if job.pattern.contains("read") { "read" } else { "write" }].clone())
}

fn number(value: &Value) -> Result<f64> {
    value.as_f64().context("fio's answer lacks a figure")
}

/// Writes the whole range once, so that reads find data and no side measures first-time allocation.
pub fn fill(place: &Place, access: &Access, size_mib: u64) -> Result<()> {
    let mut arguments = access.arguments();
    arguments.extend(["--name=fill".into(), "--rw=write".into(), "--bs=1m".into(), "--iodepth=8".into()]);
    arguments.extend([format!("--size={size_mib}m"), "--refill_buffers".into(), "--end_fsync=1".into()]);
    place.run("fio", &arguments).map(drop)
}

/// Writes blocks that carry their own checksums, reads them back and compares; fails at the first difference.
pub fn verify(place: &Place, access: &Access, size_mib: u64) -> Result<()> {
    let mut arguments = access.arguments();
    arguments.extend([
        "--name=verify".into(),
        "--rw=randwrite".into(),
        "--bs=4k".into(),
        "--iodepth=32".into(),
    ]);
    arguments.extend([format!("--size={size_mib}m"), "--verify=crc32c".into(), "--do_verify=1".into()]);
    arguments.extend(["--verify_fatal=1".into(), "--verify_state_save=0".into()]);
    place.run("fio", &arguments).map(drop).context("the data does not verify")
}
