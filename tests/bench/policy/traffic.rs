//! Traffic from a pod: processes that the bench starts inside sandboxes, and what they count.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use holdfast_tests::process::{maker, run};
use holdfast_tests::{Namespaces, Program, ProgramSpec, Work};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, SockaddrIn, accept4, bind, listen, setsockopt, socket,
    sockopt,
};
use serde::{Deserialize, Serialize};

use super::world::{CLOSED_PORT, OPEN_PORT};

/// Connections that wait for the server: it is never what the client waits for.
const BACKLOG: i32 = 4096;
/// Datagrams between two looks at the clock.
const DATAGRAMS_PER_LOOK: u32 = 64;

/// What the process inside a pod is told.
#[derive(Debug, Args)]
pub struct TrafficOptions {
    #[command(subcommand)]
    kind: Kind,
}

#[derive(Debug, Subcommand)]
enum Kind {
    /// Accepts connections and closes them.
    Serve {
        #[arg(long)]
        address: SocketAddrV4,
    },
    /// Opens connections, one after the other.
    Connect {
        #[arg(long)]
        to: SocketAddrV4,
        #[arg(long)]
        millis: u64,
    },
    /// Sends datagrams that nobody answers.
    Send {
        #[arg(long)]
        to: SocketAddrV4,
        #[arg(long)]
        millis: u64,
    },
}

/// What was done within the time.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Count {
    count: u64,
    seconds: f64,
    /// CPU time of the process, with the packets it carried through the kernel.
    cpu_ns: u64,
}

/// One measurement of connections.
#[derive(Debug, Clone, Copy)]
pub struct Connections {
    pub per_second: f64,
    /// Of client and server.
    pub cpu_us_each: f64,
}

/// The process inside a pod; prints its count as JSON.
///
/// # Errors
/// A connection that should be made is not.
pub fn run_traffic(options: &TrafficOptions) -> Result<()> {
    let count = match options.kind {
        Kind::Serve { address } => return serve(address),
        Kind::Connect { to, millis } => measure(millis, |deadline| connect_until(to, deadline)),
        Kind::Send { to, millis } => measure(millis, |deadline| send_until(to, deadline)),
    }?;
    println!("{}", serde_json::to_string(&count)?);
    Ok(())
}

fn measure(millis: u64, work: impl FnOnce(Instant) -> Result<u64>) -> Result<Count> {
    let cpu = cpu_ns("self")?;
    let start = Instant::now();
    let count = work(start + Duration::from_millis(millis))?;
    Ok(Count { count, seconds: start.elapsed().as_secs_f64(), cpu_ns: cpu_ns("self")? - cpu })
}

fn connect_until(to: SocketAddrV4, deadline: Instant) -> Result<u64> {
    let mut count = 0;
    while Instant::now() < deadline {
        let stream = TcpStream::connect(to).with_context(|| format!("connection {count} to {to}"))?;
        // A reset: the port is free at once, or they would be used up within seconds.
        setsockopt(&stream, sockopt::Linger, &libc::linger { l_onoff: 1, l_linger: 0 })?;
        count += 1;
    }
    Ok(count)
}

fn send_until(to: SocketAddrV4, deadline: Instant) -> Result<u64> {
    let sender = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    sender.connect(to)?;
    let mut count = 0;
    while Instant::now() < deadline {
        for _ in 0..DATAGRAMS_PER_LOOK {
            sender.send(b"denied")?;
            count += 1;
        }
    }
    Ok(count)
}

fn serve(address: SocketAddrV4) -> Result<()> {
    let listener = socket(AddressFamily::Inet, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&listener, sockopt::ReuseAddr, &true)?;
    bind(listener.as_raw_fd(), &SockaddrIn::from(address))
        .with_context(|| format!("cannot listen on {address}"))?;
    listen(&listener, Backlog::new(BACKLOG)?)?;
    loop {
        match accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC) {
            Ok(connection) => nix::unistd::close(connection)?,
            // The client was faster.
            Err(nix::Error::ECONNABORTED | nix::Error::EINTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Nanoseconds that a process of one thread has run; with the softirqs on top of it, as long as the kernel does not count
/// those apart.
fn cpu_ns(pid: &str) -> Result<u64> {
    let path = format!("/proc/{pid}/schedstat");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    text.split_whitespace().next().and_then(|number| number.parse().ok()).context("no CPU time")
}

/// Two pods of a node: one that connects to the other.
pub struct Pods {
    client: PathBuf,
    server: Ipv4Addr,
    accepting: Program,
}

impl Pods {
    /// Starts the server's process. Sandboxes are paths inside the node.
    pub fn start(work: &Work, node: &Namespaces, client: &Path, server: (&Path, Ipv4Addr)) -> Result<Self> {
        let address = SocketAddrV4::new(server.1, OPEN_PORT);
        let arguments = ["policy-traffic", "serve", "--address", &address.to_string()].map(str::to_owned);
        let template = node.command_in(server.0, std::env::current_exe()?);
        let name = format!("{}-server", node.name());
        let log = work.folder("logs")?.join(format!("{name}.log"));
        let command = maker(&template, arguments.into());
        let accepting = Program::start(ProgramSpec { name, log, command })?;
        Ok(Self { client: client.to_owned(), server: server.1, accepting })
    }

    /// Connections per second for so long.
    pub fn connect(&mut self, node: &Namespaces, millis: u64) -> Result<Connections> {
        let server = self.accepting.pid().to_string();
        let before = cpu_ns(&server)?;
        let count = self.inside(node, "connect", OPEN_PORT, millis)?;
        let cpu = cpu_ns(&server)? - before + count.cpu_ns;
        Ok(Connections {
            per_second: number(count.count) / count.seconds,
            cpu_us_each: number(cpu) / 1000.0 / number(count.count),
        })
    }

    /// Datagrams to a closed port per second for so long; and how many.
    pub fn send_denied(&self, node: &Namespaces, millis: u64) -> Result<(f64, u64)> {
        let count = self.inside(node, "send", CLOSED_PORT, millis)?;
        Ok((number(count.count) / count.seconds, count.count))
    }

    fn inside(&self, node: &Namespaces, kind: &str, port: u16, millis: u64) -> Result<Count> {
        let mut command = node.command_in(&self.client, std::env::current_exe()?);
        let to = SocketAddrV4::new(self.server, port).to_string();
        command.args(["policy-traffic", kind, "--to", &to, "--millis", &millis.to_string()]);
        let text = run(&mut command).with_context(|| format!("{kind} on {}", node.name()))?;
        serde_json::from_str(text.trim()).with_context(|| format!("no count: {text:?}"))
    }
}

/// Counts here are far below what an f64 holds exactly.
#[expect(clippy::cast_precision_loss, reason = "counts of seconds, not of years")]
fn number(count: u64) -> f64 {
    count as f64
}
