//! Conntrack entries that a change forbids are deleted soon after, also those whose destination was translated; the others
//! stay, and their connections work on.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};

use crate::bed::Bed;
use crate::connects::enter;
use crate::revocation::ONLY_X_B;
use crate::services::{near, with_services};
use crate::world::PodName;

/// Port of the server.
const PORT: u16 = 80;
/// The agents look at once, but at most every two seconds; the rest is for a busy machine.
const LIMIT: Duration = Duration::from_secs(5);
/// How long a connection may take to be made or to echo.
const IO_TIMEOUT: Duration = Duration::from_secs(4);

/// Connects two clients, forbids one of them, and looks at the entries of the server's node.
///
/// # Errors
/// Entries stay that should go, or the other way round.
pub fn run(bed: &mut Bed) -> Result<()> {
    with_services(bed, |bed, services| {
        let mut world = bed.base();
        bed.show(&world)?;
        let addresses = world.pods[&PodName::new("y/b")].addresses.clone();
        let direct = addresses.into_iter().map(|address| SocketAddr::new(address, PORT));
        let targets: Vec<SocketAddr> = direct.chain(near(services)?.front).collect();
        let sandboxes = ["y/b", "x/a", "x/b"].map(|pod| sandbox(bed, pod));
        let [server, client, other] = sandboxes;

        let echoing = echo(server?, targets.len() * 2)?;
        let cut = connect(&client?, &targets)?;
        let mut kept = connect(&other?, &targets)?;
        let (forbidden, allowed) = (own_ends(&cut)?, own_ends(&kept)?);
        let before = entries(bed, &forbidden)?;
        ensure!(before == targets.len(), "{before} entries of {} connections", targets.len());

        world.put_policy(&PodName::new("y/hygiene"), ONLY_X_B)?;
        let changed = Instant::now();
        bed.write(&world)?;
        while entries(bed, &forbidden)? > 0 {
            ensure!(changed.elapsed() < LIMIT, "{} forbidden entries are left", entries(bed, &forbidden)?);
            std::thread::sleep(Duration::from_millis(5));
        }
        println!("hygiene: {before} forbidden entries were gone after {:?}", changed.elapsed());
        let left = entries(bed, &allowed)?;
        ensure!(left == targets.len(), "{left} entries of {} allowed connections are left", targets.len());
        for (stream, target) in kept.iter_mut().zip(&targets) {
            answers(stream).with_context(|| format!("the allowed connection by {target}"))?;
        }
        drop((cut, kept));
        echoing.join().map_err(|_| anyhow!("the server panicked"))?
    })
}

fn sandbox(bed: &Bed, pod: &str) -> Result<PathBuf> {
    let found = bed.sandboxes().find(|(name, _)| **name == PodName::new(pod));
    Ok(found.with_context(|| format!("{pod} has no sandbox"))?.1.to_path_buf())
}

/// The clients' ends. Others of the same pods may be left of earlier trials.
fn own_ends(streams: &[TcpStream]) -> Result<Vec<SocketAddr>> {
    streams.iter().map(|stream| Ok(stream.local_addr()?)).collect()
}

/// Entries on node-a whose connection one of these ends opened, over TCP.
fn entries(bed: &mut Bed, clients: &[SocketAddr]) -> Result<usize> {
    let all = bed.net().nodes[0].spaces.run("cat", &["/proc/net/nf_conntrack"])?;
    let first = |line: &str, name: &str| -> Option<String> {
        line.split(' ').find_map(|word| word.strip_prefix(name)).map(str::to_owned)
    };
    let client = |line: &str| -> Option<SocketAddr> {
        let address: IpAddr = first(line, "src=")?.parse().ok()?;
        Some(SocketAddr::new(address, first(line, "sport=")?.parse().ok()?))
    };
    let ours = |line: &&str| line.contains(" tcp ") && client(line).is_some_and(|end| clients.contains(&end));
    Ok(all.lines().filter(ours).count())
}

/// Answers what it hears, on so many connections, until they end or are silent for long.
fn echo(netns: PathBuf, connections: usize) -> Result<JoinHandle<Result<()>>> {
    let (ready, is_ready) = std::sync::mpsc::channel();
    let thread = std::thread::spawn(move || -> Result<()> {
        enter(&netns)?;
        let listener = TcpListener::bind((Ipv6Addr::UNSPECIFIED, PORT))?;
        ready.send(()).map_err(|_| anyhow!("nobody waits"))?;
        let mut threads = Vec::new();
        for _ in 0..connections {
            let (mut stream, _) = listener.accept()?;
            stream.set_read_timeout(Some(LIMIT + IO_TIMEOUT))?;
            threads.push(std::thread::spawn(move || {
                let mut byte = [0];
                // A connection that was cut ends by its timeout.
                while stream.read_exact(&mut byte).is_ok() && stream.write_all(&byte).is_ok() {}
            }));
        }
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("an echo panicked")))
    });
    if is_ready.recv().is_err() {
        thread.join().map_err(|_| anyhow!("the server panicked"))??;
        bail!("the server ended");
    }
    Ok(thread)
}

/// Connects to each target, from inside a network namespace, and hears an answer of each.
fn connect(netns: &Path, targets: &[SocketAddr]) -> Result<Vec<TcpStream>> {
    let (netns, targets) = (netns.to_path_buf(), targets.to_vec());
    let thread = std::thread::spawn(move || -> Result<Vec<TcpStream>> {
        enter(&netns)?;
        let mut streams = Vec::new();
        for target in targets {
            let mut stream =
                TcpStream::connect_timeout(&target, IO_TIMEOUT).with_context(|| target.to_string())?;
            stream.set_read_timeout(Some(IO_TIMEOUT))?;
            answers(&mut stream).with_context(|| target.to_string())?;
            streams.push(stream);
        }
        Ok(streams)
    });
    thread.join().map_err(|_| anyhow!("a client panicked"))?
}

fn answers(stream: &mut TcpStream) -> Result<()> {
    stream.write_all(b"?")?;
    stream.read_exact(&mut [0])?;
    Ok(())
}
