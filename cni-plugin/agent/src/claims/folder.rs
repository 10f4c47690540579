//! Claims of blocks of the cluster range in the folder of objects: one file for each block, swapped by comparison.

use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use holdfast_net_core::pod_ranges::{PodRange, PodRangeSpec, Proposal, object_name};
use serde::{Deserialize, Serialize};

use super::Swapped;
use crate::objects::{POD_RANGE, POD_RANGE_VERSION};

/// Held by whoever swaps; never removed, so that all hold the same file.
const LOCK: &str = ".podranges.lock";
const LOCK_WAIT_MAX: Duration = Duration::from_secs(1);
const LOCK_POLL_INTERVAL: Duration = Duration::from_millis(5);

/// A PodRange as a file.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Document {
    api_version: String,
    kind: String,
    #[serde(flatten)]
    object: Claim,
}

/// Of the object, what a claim is made of.
#[derive(Serialize, Deserialize)]
struct Claim {
    metadata: Name,
    spec: PodRangeSpec,
}

#[derive(Serialize, Deserialize)]
struct Name {
    name: String,
}

/// Gives the block to `node` if it belongs to whom the proposal says. Waits up to a second for other swaps; to be called where that is fine.
///
/// A kill leaves the claim as it was or as it should be, never half of it, and the lock free.
///
/// # Errors
/// The folder cannot be read or written, or the block's file is none of a claim.
pub(super) fn swap(folder: &Path, proposal: &Proposal, node: &str) -> io::Result<Swapped> {
    let lock = OpenOptions::new().create(true).truncate(false).write(true).open(folder.join(LOCK))?;
    hold(&lock)?;
    let path = path_of(folder, proposal);
    let owner = owner_of(&path)?;
    if owner.as_deref() == Some(node) {
        return Ok(Swapped::Done);
    }
    if owner != proposal.from {
        return Ok(Swapped::Is(owner));
    }
    let PodRange { metadata, spec } = PodRange::new(proposal.range, node);
    let document = Document {
        api_version: POD_RANGE_VERSION.to_owned(),
        kind: POD_RANGE.to_owned(),
        object: Claim { metadata: Name { name: metadata.name }, spec },
    };
    // Hidden files are no objects, so no reader sees a part of it.
    let new = folder.join(format!(".podrange-{}.new", object_name(&proposal.range)));
    let mut file = File::create(&new)?;
    file.write_all(serde_json::to_string(&document)?.as_bytes())?;
    file.sync_all()?;
    std::fs::rename(&new, &path)?;
    File::open(folder)?.sync_all()?;
    Ok(Swapped::Done)
}

/// Takes the lock, which others keep for some milliseconds. One that stands still must not hold up this node, so the wait ends.
fn hold(lock: &File) -> io::Result<()> {
    let deadline = Instant::now() + LOCK_WAIT_MAX;
    loop {
        match lock.try_lock() {
            Ok(()) => return Ok(()),
            Err(TryLockError::Error(error)) => return Err(error),
            Err(TryLockError::WouldBlock) if Instant::now() > deadline => {
                return Err(io::Error::other(format!("another process holds {LOCK}; it is tried again")));
            }
            Err(TryLockError::WouldBlock) => std::thread::sleep(LOCK_POLL_INTERVAL),
        }
    }
}

fn path_of(folder: &Path, proposal: &Proposal) -> PathBuf {
    folder.join(format!("podrange-{}.json", object_name(&proposal.range)))
}

fn owner_of(path: &Path) -> io::Result<Option<String>> {
    let text = match std::fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    let document: Document = serde_json::from_slice(&text)
        .map_err(|error| io::Error::other(format!("{} is no PodRange: {error}", path.display())))?;
    Ok(Some(document.object.spec.node))
}

#[cfg(test)]
mod tests {
    use std::sync::Barrier;

    use super::*;

    fn proposal(from: Option<&str>) -> Proposal {
        Proposal { range: "10.42.3.0/24".parse().unwrap(), from: from.map(str::to_owned) }
    }

    #[test]
    fn of_many_that_claim_one_block_at_once_one_gets_it() {
        let folder = tempfile::tempdir().unwrap();
        for round in 0..20 {
            let from = (round > 0).then(|| format!("node-{}", round - 1));
            let barrier = Barrier::new(8);
            let swapped: Vec<(String, Swapped)> = std::thread::scope(|scope| {
                let threads: Vec<_> = (0..8)
                    .map(|number| {
                        let (barrier, from, folder) = (&barrier, &from, folder.path());
                        scope.spawn(move || {
                            // The first that takes it tells the next round's owner.
                            let node = format!("claimant-{round}-{number}");
                            barrier.wait();
                            let swapped = swap(folder, &proposal(from.as_deref()), &node).unwrap();
                            (node, swapped)
                        })
                    })
                    .collect();
                threads.into_iter().map(|thread| thread.join().unwrap()).collect()
            });
            let winners: Vec<&String> = swapped
                .iter()
                .filter(|(_, swapped)| *swapped == Swapped::Done)
                .map(|(node, _)| node)
                .collect();
            assert_eq!(winners.len(), 1, "round {round}: {swapped:?}");
            let others = swapped.iter().filter(|(_, swapped)| *swapped != Swapped::Done);
            for (node, swapped) in others {
                assert_eq!(*swapped, Swapped::Is(Some(winners[0].clone())), "{node}");
            }
            let winner = winners[0].clone();
            assert_eq!(swap(folder.path(), &proposal(None), &winner).unwrap(), Swapped::Done, "repeated");
            let next = proposal(Some(&winner));
            assert_eq!(swap(folder.path(), &next, &format!("node-{round}")).unwrap(), Swapped::Done);
        }
        let visible = std::fs::read_dir(folder.path()).unwrap().map(|entry| entry.unwrap().file_name());
        let visible: Vec<_> = visible.filter(|name| !name.to_string_lossy().starts_with('.')).collect();
        assert_eq!(visible, ["podrange-0a2a0300-24.json"]);
    }

    #[test]
    fn a_lock_that_nobody_gives_back_is_an_error_and_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let held = File::create(folder.path().join(LOCK)).unwrap();
        held.lock().unwrap();
        let error = swap(folder.path(), &proposal(None), "a").unwrap_err();
        assert!(error.to_string().contains("holds .podranges.lock"), "{error}");
        drop(held);
        assert_eq!(swap(folder.path(), &proposal(None), "a").unwrap(), Swapped::Done);
    }

    #[test]
    fn what_a_swap_writes_is_read_as_an_object() {
        let folder = tempfile::tempdir().unwrap();
        swap(folder.path(), &proposal(None), "a").unwrap();
        let text = std::fs::read_to_string(path_of(folder.path(), &proposal(None))).unwrap();
        let mut found = Vec::new();
        crate::objects::parse_json(&text, |document| found.push(document)).unwrap();
        let [crate::objects::Document::Object(key, crate::objects::Object::PodRange(range))] = &found[..]
        else {
            panic!("{text}");
        };
        assert_eq!((key.name.name.as_str(), range.spec.node.as_str()), ("0a2a0300-24", "a"));
    }

    #[test]
    fn a_file_that_is_no_claim_is_left_alone_and_named() {
        let folder = tempfile::tempdir().unwrap();
        let path = path_of(folder.path(), &proposal(None));
        std::fs::write(&path, "{").unwrap();
        let error = swap(folder.path(), &proposal(None), "a").unwrap_err();
        assert!(error.to_string().contains("podrange-0a2a0300-24.json is no PodRange"), "{error}");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "{");
    }
}
