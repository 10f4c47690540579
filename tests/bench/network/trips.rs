//! Request and answer over one TCP connection, one byte each: the rate follows the latency of both directions.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;

use super::streams::{End, EndWithDrop};

/// Round trips before the time counts.
const WARM_UP: Duration = Duration::from_millis(200);

/// One end of it, a process of its own.
#[derive(Debug, Args)]
pub struct TripsOptions {
    /// Where the answering end is. It picks a free port itself.
    #[arg(long)]
    address: SocketAddr,
    /// Asks for this long and prints how often per second; without it, this end answers.
    #[arg(long)]
    seconds: Option<u32>,
}

/// One end: serves one connection to its end, or asks.
///
/// # Errors
/// The connection failed.
pub fn run_trips(options: &TripsOptions) -> Result<()> {
    let mut byte = [0];
    let Some(seconds) = options.seconds else {
        let listener = TcpListener::bind(options.address)?;
        println!("{}", listener.local_addr()?);
        let (mut stream, _) = listener.accept()?;
        stream.set_nodelay(true)?;
        while stream.read(&mut byte)? == 1 {
            stream.write_all(&byte)?;
        }
        return Ok(());
    };
    let mut stream = TcpStream::connect(options.address)?;
    stream.set_nodelay(true)?;
    let mut ask_for = |time: Duration| -> Result<f64> {
        let (begin, mut trips) = (Instant::now(), 0_u32);
        while begin.elapsed() < time {
            stream.write_all(&byte)?;
            stream.read_exact(&mut byte)?;
            trips += 1;
        }
        Ok(f64::from(trips) / begin.elapsed().as_secs_f64())
    };
    ask_for(WARM_UP)?;
    println!("{}", ask_for(Duration::from_secs(u64::from(seconds)))?);
    Ok(())
}

/// Round trips per second between two ends.
pub fn rate(client: &End<'_>, server: &End<'_>, seconds: u32) -> Result<f64> {
    let program = std::env::current_exe()?;
    let command = |end: &End<'_>| -> Command {
        let mut command = end.command(&program);
        command.args(["network-trips", "--address"]).stdin(Stdio::null()).stdout(Stdio::piped());
        command
    };
    let listener = command(server).arg(SocketAddr::from((server.address, 0)).to_string()).spawn()?;
    let mut listener = EndWithDrop(listener);
    let mut line = String::new();
    BufReader::new(listener.0.stdout.take().context("no output")?).read_line(&mut line)?;
    let asked = command(client).args([line.trim(), "--seconds", &seconds.to_string()]).output()?;
    anyhow::ensure!(asked.status.success(), "no round trip from {} to {}", client.address, line.trim());
    Ok(String::from_utf8_lossy(&asked.stdout).trim().parse()?)
}
