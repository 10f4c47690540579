//! Peers that do not speak the protocol: clients that send garbage, and a server that answers with it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rand::RngCore;

use crate::helper;
use crate::namespaces::Namespaces;
use crate::process::{Program, ProgramSpec, maker};

/// Connections per port and kind of garbage.
const CONNECTIONS: usize = 8;
/// Bytes of random garbage.
const GARBAGE_BYTES: usize = 64 << 10;
/// How long a silent connection stays open.
const SILENCE: Duration = Duration::from_secs(1);

/// A command that sends garbage of several kinds to every address, from inside a node.
///
/// # Errors
/// The running program's path is unknown.
pub fn talk_command(from: &Namespaces, addresses: &[String]) -> Result<Command> {
    let mut command = from.command(helper::program()?);
    command.arg(helper::argument("garbage")).arg("talk").args(addresses);
    Ok(command)
}

/// A program on a node that listens at the addresses and answers everything with garbage.
///
/// # Errors
/// It does not start.
pub fn listen(on: &Namespaces, log: PathBuf, addresses: &[String]) -> Result<Program> {
    let mut arguments = vec![helper::argument("garbage"), "listen".to_owned()];
    arguments.extend_from_slice(addresses);
    let command = maker(&on.command(helper::program()?), arguments);
    Program::start(ProgramSpec { name: "garbage".to_owned(), log, command })
}

/// Helper's main: `talk ADDRESS...` or `listen ADDRESS...`.
pub(crate) fn garbage_main(arguments: &[String]) -> Result<ExitCode> {
    let [what, addresses @ ..] = arguments else { bail!("usage: talk|listen ADDRESS...") };
    match what.as_str() {
        "talk" => addresses.iter().try_for_each(|address| talk(address))?,
        "listen" => {
            let listeners: Vec<TcpListener> = addresses
                .iter()
                .map(|address| {
                    TcpListener::bind(address).with_context(|| format!("cannot listen on {address}"))
                })
                .collect::<Result<_>>()?;
            let threads: Vec<_> =
                listeners.into_iter().map(|one| std::thread::spawn(move || answer_all(&one))).collect();
            threads.into_iter().for_each(|thread| drop(thread.join()));
        }
        other => bail!("unknown request {other}"),
    }
    Ok(ExitCode::SUCCESS)
}

fn talk(address: &str) -> Result<()> {
    let mut silent = Vec::new();
    for _ in 0..CONNECTIONS {
        for message in messages() {
            let mut stream =
                TcpStream::connect(address).with_context(|| format!("cannot connect to {address}"))?;
            stream.set_read_timeout(Some(Duration::from_millis(100)))?;
            // Either may be refused at any byte.
            let _ = stream.write_all(&message);
            let _ = stream.read(&mut [0; 512]);
        }
        silent.push(TcpStream::connect(address)?);
    }
    std::thread::sleep(SILENCE);
    Ok(())
}

/// Random bytes; the start of an NBD handshake with an option of 4 GiB; an HTTP/2 preface with a frame of nonsense; a TLS
/// record that promises more than comes.
fn messages() -> [Vec<u8>; 4] {
    let mut random = vec![0; GARBAGE_BYTES];
    rand::rng().fill_bytes(&mut random);
    let mut option = 3u32.to_be_bytes().to_vec();
    option.extend(b"IHAVEOPT");
    option.extend(7u32.to_be_bytes());
    option.extend(u32::MAX.to_be_bytes());
    let mut preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec();
    preface.extend([0xff; 64]);
    [random, option, preface, vec![0x16, 3, 1, 0xff, 0xff, 1, 2, 3]]
}

fn answer_all(listener: &TcpListener) {
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || answer(stream));
    }
}

fn answer(mut stream: TcpStream) {
    let mut garbage = vec![0; GARBAGE_BYTES];
    rand::rng().fill_bytes(&mut garbage);
    let _ = stream.write_all(&garbage);
    let _ = stream.read(&mut [0; 512]);
}
