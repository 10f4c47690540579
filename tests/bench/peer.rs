//! The peer: qemu-storage-daemon, three file-backed NBD servers under a quorum node.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_tests::Program;

use crate::fio::Access;
use crate::place::{Place, wait_until};

const PROGRAM: &str = "/usr/bin/qemu-storage-daemon";
const MOUNT_TIMEOUT: Duration = Duration::from_secs(10);
/// How the peer is called in the figures.
pub const NAME: &str = "qemu-storage-daemon quorum";

/// Three servers and the quorum over them. One quorum at a time: qemu's FUSE export wants its node for itself.
pub struct Peer {
    dir: PathBuf,
    command_lines: Vec<String>,
    front: Option<Program>,
    loop_device: Option<String>,
    replicas: Vec<Program>,
}

impl Peer {
    /// Starts the three servers with preallocated files in the work folder.
    pub fn start(place: &Place, size_mib: u64) -> Result<Self> {
        let dir = place.work.folder("peer")?;
        let mut peer = Self { dir, command_lines: vec![], front: None, loop_device: None, replicas: vec![] };
        for number in 1..=3 {
            let image = peer.dir.join(format!("replica{number}.raw"));
            allocate(&image, size_mib)?;
            let socket = peer.dir.join(format!("replica{number}.sock"));
            let replica =
                peer.run(place, &format!("peer-replica{number}"), server(&image, &socket), &socket)?;
            peer.replicas.push(replica);
        }
        Ok(peer)
    }

    /// How it was started, for the reader to judge.
    pub fn command_lines(&self) -> &[String] {
        &self.command_lines
    }

    /// The quorum behind an NBD server.
    pub fn serve_nbd(&mut self, place: &Place) -> Result<Access> {
        self.stop(place)?;
        let socket = self.dir.join("quorum.sock");
        let mut arguments = quorum(&self.dir);
        arguments.extend([
            "--nbd-server".into(),
            format!("addr.type=unix,addr.path={}", socket.display()),
            "--export".into(),
            "type=nbd,id=export,node-name=quorum,name=vol,writable=on".into(),
        ]);
        self.front = Some(self.run(place, "peer-quorum", arguments, &socket)?);
        Ok(Access::Nbd(format!("nbd+unix:///vol?socket={}", socket.display())))
    }

    /// The quorum behind a FUSE file under a loop device, as ours.
    pub fn serve_block(&mut self, place: &Place) -> Result<Access> {
        self.stop(place)?;
        // The name by which the harness finds the loop device, whoever has to clean up.
        let name = format!("holdfast-bench-peer-{}", std::process::id());
        place.work.change_state(|state| state.volume_ids.push(name.clone()))?;
        let file = self.dir.join(name);
        std::fs::File::create(&file)?;
        let mut arguments = quorum(&self.dir);
        arguments.extend([
            "--export".into(),
            format!("type=fuse,id=export,node-name=quorum,mountpoint={},writable=on", file.display()),
        ]);
        self.front = Some(self.run(place, "peer-quorum-fuse", arguments, &file)?);
        let shown = file.display().to_string();
        let size = || place.run("stat", &["--format=%s".into(), shown.clone()]);
        wait_until(MOUNT_TIMEOUT, || Ok(size()?.trim() != "0"))
            .context("the peer does not mount its FUSE file")?;
        let arguments =
            ["--find", "--show", "--direct-io=on", "--sector-size=4096", &shown].map(str::to_owned);
        let device = place.run("losetup", &arguments)?.trim().to_owned();
        self.command_lines.push(format!("losetup {}", arguments.join(" ")));
        self.loop_device = Some(device.clone());
        Ok(Access::Block(device))
    }

    /// Ends the quorum, and its loop device first.
    pub fn stop(&mut self, place: &Place) -> Result<()> {
        if let Some(device) = self.loop_device.take() {
            place.run("losetup", &["--detach".to_owned(), device])?;
        }
        match self.front.take() {
            Some(mut front) => front.terminate(),
            None => Ok(()),
        }
    }

    fn run(&mut self, place: &Place, name: &str, arguments: Vec<String>, opens: &Path) -> Result<Program> {
        self.command_lines.push(format!("qemu-storage-daemon {}", arguments.join(" ")));
        let mut program = place.start(name, Path::new(PROGRAM), arguments)?;
        place.wait_for(&mut program, opens)?;
        Ok(program)
    }
}

fn allocate(image: &Path, size_mib: u64) -> Result<()> {
    let mut command = Command::new("fallocate");
    let done = command.arg("--length").arg(format!("{size_mib}MiB")).arg(image).status()?;
    anyhow::ensure!(done.success(), "cannot preallocate {}", image.display());
    Ok(())
}

fn server(image: &Path, socket: &Path) -> Vec<String> {
    vec![
        "--blockdev".into(),
        format!("driver=file,node-name=disk,filename={},cache.direct=on,aio=native", image.display()),
        "--nbd-server".into(),
        format!("addr.type=unix,addr.path={}", socket.display()),
        "--export".into(),
        "type=nbd,id=export,node-name=disk,name=replica,writable=on".into(),
    ]
}

fn quorum(dir: &Path) -> Vec<String> {
    let mut arguments = Vec::new();
    for number in 1..=3 {
        let socket = dir.join(format!("replica{number}.sock"));
        let server = format!("server.type=unix,server.path={},export=replica", socket.display());
        arguments.push("--blockdev".into());
        arguments.push(format!("driver=nbd,node-name=replica{number},{server},cache.direct=on"));
    }
    // fifo: a read asks one replica, as ours does; the default would read all three.
    let rule = "driver=quorum,node-name=quorum,vote-threshold=2,read-pattern=fifo";
    arguments.push("--blockdev".into());
    arguments.push(format!("{rule},children.0=replica1,children.1=replica2,children.2=replica3"));
    arguments
}
