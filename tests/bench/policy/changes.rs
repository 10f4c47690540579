//! Changes of single objects, timed from the rename of the file to the kernel's notification of the commit, by a process in
//! the node's network namespace.

use std::fs;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use clap::Args;
use holdfast_tests::Namespaces;
use holdfast_tests::process::run_within;
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recv, setsockopt, socket,
    sockopt,
};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::world::{self, OPEN_PORT, World};

/// A change that is not in the kernel by then has failed.
const COMMIT_TIMEOUT: Duration = Duration::from_secs(10);
/// Between two changes. Revisions advance at most every 50 ms, so a shorter pause would time several changes as one.
const PAUSE: Duration = Duration::from_millis(60);
/// Longest script.
const SCRIPT_TIMEOUT: Duration = Duration::from_secs(150);
/// Notifications of a change may be many.
const RECEIVE_BYTES: usize = 16 << 20;
/// `1 << (NFNLGRP_NFTABLES - 1)`
const GROUP_NFTABLES: u32 = 1 << 6;
/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_DELSETELEM`
const DELETED_ELEMENTS: u16 = (10 << 8) | 14;
/// `NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_NEWGEN`, the last notification of a commit.
const COMMITTED: u16 = (10 << 8) | 15;
/// Maps that hold ranges; an element of theirs takes long to delete.
const RANGE_MAPS: [&str; 3] = ["profile", "cidr4", "cidr6"];

/// What the process inside the node is told.
#[derive(Debug, Args)]
pub struct ChangesOptions {
    /// Folder of the objects.
    #[arg(long)]
    objects: PathBuf,
    /// File with the steps, JSON.
    #[arg(long)]
    script: PathBuf,
}

/// One change.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Step {
    /// Name of its file, without extension.
    file: String,
    /// What it holds from now on; `None` removes it.
    object: Option<Value>,
}

/// How one went.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct Done {
    /// From the rename to the notification.
    pub ms: f64,
    /// Elements of ranges were deleted.
    pub deleted_ranges: bool,
}

/// Makes the changes of a script, one by one, inside a node.
pub fn make(node: &Namespaces, objects: &Path, script: &Script) -> Result<Vec<Done>> {
    let path = objects.with_extension("script");
    fs::write(&path, serde_json::to_vec(&script.steps)?)?;
    let mut command = node.command(std::env::current_exe()?);
    command.arg("policy-changes").arg("--objects").arg(objects).arg("--script").arg(&path);
    let text = run_within(SCRIPT_TIMEOUT, &mut command)?;
    serde_json::from_str(text.trim()).with_context(|| format!("no times: {text:?}"))
}

/// The process inside; prints the times as JSON.
///
/// # Errors
/// A change is not in the kernel in time.
pub fn run_changes(options: &ChangesOptions) -> Result<()> {
    let steps: Vec<Step> = serde_json::from_slice(&fs::read(&options.script)?)?;
    let listener = Listener::open()?;
    let mut done = Vec::with_capacity(steps.len());
    for step in &steps {
        std::thread::sleep(PAUSE);
        listener.drain()?;
        done.push(
            make_step(&listener, &options.objects, step).with_context(|| {
                format!("change {} ({}, {})", done.len(), step.file, step.object.is_some())
            })?,
        );
    }
    println!("{}", serde_json::to_string(&done)?);
    Ok(())
}

fn make_step(listener: &Listener, objects: &Path, step: &Step) -> Result<Done> {
    let path = objects.join(format!("{}.json", step.file));
    let start = match &step.object {
        Some(object) => {
            let temporary = objects.join(format!(".{}.new", step.file));
            fs::write(&temporary, serde_json::to_vec(object)?)?;
            let start = Instant::now();
            fs::rename(&temporary, &path)?;
            start
        }
        None => {
            let start = Instant::now();
            fs::remove_file(&path)?;
            start
        }
    };
    let deleted_ranges = listener.wait_commit(start + COMMIT_TIMEOUT)?;
    Ok(Done { ms: start.elapsed().as_secs_f64() * 1000.0, deleted_ranges })
}

/// Hears what is committed in this network namespace.
struct Listener {
    socket: OwnedFd,
}

impl Listener {
    fn open() -> Result<Self> {
        let protocol = SockProtocol::NetlinkNetFilter;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        setsockopt(&socket, sockopt::RcvBufForce, &RECEIVE_BYTES)?;
        bind(socket.as_raw_fd(), &NetlinkAddr::new(0, GROUP_NFTABLES))?;
        Ok(Self { socket })
    }

    /// Forgets what came so far.
    fn drain(&self) -> Result<()> {
        let mut buffer = vec![0; 64 << 10];
        loop {
            match recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::MSG_DONTWAIT) {
                Ok(_) => {}
                Err(nix::Error::EAGAIN) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Waits for the end of a transaction; true if it deleted elements of ranges.
    fn wait_commit(&self, deadline: Instant) -> Result<bool> {
        let mut buffer = vec![0; 64 << 10];
        let mut deleted_ranges = false;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            let timeout = PollTimeout::try_from(left).unwrap_or(PollTimeout::MAX);
            if left.is_zero()
                || poll(&mut [PollFd::new(self.socket.as_fd(), PollFlags::POLLIN)], timeout)? == 0
            {
                bail!("nothing was committed within {} s", COMMIT_TIMEOUT.as_secs());
            }
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            for (kind, set) in messages(&buffer[..length]) {
                deleted_ranges |= kind == DELETED_ELEMENTS && RANGE_MAPS.contains(&set);
                if kind == COMMITTED {
                    return Ok(deleted_ranges);
                }
            }
        }
    }
}

/// Type and set's name (attribute 2, after the table's) of each message in a datagram.
fn messages(mut bytes: &[u8]) -> Vec<(u16, &str)> {
    let mut found = Vec::new();
    while let Some((length, kind)) = header(bytes) {
        let Some(message) = bytes.get(..length).filter(|_| length >= 20) else { break };
        found.push((kind, attribute(&message[20..], 2)));
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    found
}

#[expect(clippy::host_endian_bytes, reason = "netlink headers are in host byte order")]
fn header(bytes: &[u8]) -> Option<(usize, u16)> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
    let kind = u16::from_ne_bytes(bytes.get(4..6)?.try_into().ok()?);
    Some((usize::try_from(length).ok()?, kind))
}

/// The text of an attribute; empty if there is none.
#[expect(clippy::host_endian_bytes, reason = "netlink headers are in host byte order")]
fn attribute(mut bytes: &[u8], wanted: u16) -> &str {
    while let Some(&[a, b, c, d]) = bytes.first_chunk::<4>() {
        let length = usize::from(u16::from_ne_bytes([a, b]));
        let Some(payload) = bytes.get(4..length) else { break };
        if u16::from_ne_bytes([c, d]) & 0x3fff == wanted {
            return std::str::from_utf8(payload).unwrap_or_default().trim_end_matches('\0');
        }
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or(&[]);
    }
    ""
}

/// Changes to be made.
pub struct Script {
    steps: Vec<Step>,
}

impl Script {
    /// How many.
    pub fn len(&self) -> usize {
        self.steps.len()
    }

    /// Rounds of six: a pod comes, is labelled anew and goes; a policy comes, admits other peers and goes.
    pub fn of_objects(world: &World, rounds: usize) -> Self {
        let mut script = Self { steps: Vec::new() };
        for round in 0..rounds {
            let pod =
                |group: usize| world::peer_object("changing", group, std::net::Ipv4Addr::new(10, 200, 0, 1));
            script.put("changing-pod", pod(round % world.policies));
            script.put("changing-pod", pod((round + world.policies / 2) % world.policies));
            script.remove("changing-pod");
            let slot = 1 + round % (world.slots - 1).max(1);
            // Groups that only the server's policies admit, on the port of its client: the pod's class gets pairs of its
            // own, and no profile is new.
            let policy = |number: usize| {
                let from = world::from_groups(&[1 + number % world.on_server.saturating_sub(2).max(1)]);
                let ports = json!([{"protocol": "TCP", "port": OPEN_PORT}]);
                world::policy_object("changing", slot, &[json!({"from": [from], "ports": ports})])
            };
            script.put("changing-policy", policy(round));
            script.put("changing-policy", policy(round + world.on_server / 2));
            script.remove("changing-policy");
        }
        script
    }

    /// Rounds of four: a policy with a CIDR and one with a range of ports come and go.
    pub fn of_ranges(world: &World, rounds: usize) -> Self {
        let mut script = Self { steps: Vec::new() };
        for round in 0..rounds {
            let slot = 1 + round % (world.slots - 1).max(1);
            let third = round % 250;
            let block = json!({"from": [{"ipBlock": {"cidr": format!("10.210.{third}.0/24")}}]});
            script.put("changing-policy", world::policy_object("changing", slot, &[block]));
            script.remove("changing-policy");
            let first = 20_000 + round * 10;
            let ports = json!([{"protocol": "TCP", "port": first, "endPort": first + 5}]);
            let from = world::from_groups(&[round % world.policies]);
            let rule = json!({"from": [from], "ports": ports});
            script.put("changing-policy", world::policy_object("changing", slot, &[rule]));
            script.remove("changing-policy");
        }
        script
    }

    fn put(&mut self, file: &str, object: Value) {
        self.steps.push(Step { file: file.to_owned(), object: Some(object) });
    }

    fn remove(&mut self, file: &str) {
        self.steps.push(Step { file: file.to_owned(), object: None });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::host_endian_bytes, reason = "netlink headers are in host byte order")]
    fn mk_message(kind: u16, strings: &[(u16, &str)]) -> Vec<u8> {
        let mut attributes = Vec::new();
        for (number, text) in strings {
            let length = u16::try_from(text.len() + 5).unwrap();
            attributes.extend(length.to_ne_bytes());
            attributes.extend(number.to_ne_bytes());
            attributes.extend(text.as_bytes());
            attributes.push(0);
            attributes.resize(attributes.len().next_multiple_of(4), 0);
        }
        let mut message = u32::try_from(20 + attributes.len()).unwrap().to_ne_bytes().to_vec();
        message.extend(kind.to_ne_bytes());
        message.resize(20, 0);
        message.extend(attributes);
        message
    }

    #[test]
    fn notifications_tell_their_kind_and_set() {
        let mut datagram = mk_message(DELETED_ELEMENTS, &[(1, "holdfast"), (2, "cidr4")]);
        datagram.extend(mk_message(COMMITTED, &[]));
        assert_eq!(messages(&datagram), [(DELETED_ELEMENTS, "cidr4"), (COMMITTED, "")]);
        assert_eq!(messages(&datagram[..30]), []);
    }

    #[test]
    fn a_round_leaves_nothing_behind() {
        let world = World { policies: 10, peers: 100, slots: 3, on_server: 2 };
        for script in [Script::of_objects(&world, 3), Script::of_ranges(&world, 3)] {
            let mut files = std::collections::BTreeSet::new();
            for step in &script.steps {
                match &step.object {
                    Some(_) => {
                        files.insert(&step.file);
                    }
                    None => assert!(files.remove(&step.file)),
                }
            }
            assert!(files.is_empty());
        }
    }
}
