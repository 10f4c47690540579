//! The object source of single machines: a folder of Kubernetes YAML.
//!
//! A thread of its own watches the folder (inotify) and rescans it on every event, and from time to time without one, in
//! case an event was lost. Only changed files are read. A file that cannot be read as YAML keeps all its last good
//! objects, an invalid object its last good state; both are reported by file name.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use holdfast_net_core::objects::Objects;
use notify::{RecursiveMode, Watcher};
use tokio::sync::watch;
use tracing::{info, warn};

use crate::objects::{Document, Object, ObjectKey, insert, parse_file};

/// Without any event the folder is looked through this often.
const RESCAN_INTERVAL: Duration = Duration::from_secs(10);
/// After an event, wait for this much silence: writers often do several steps.
const QUIET: Duration = Duration::from_millis(5);
/// But never longer than this in all.
const QUIET_MAX: Duration = Duration::from_millis(50);
/// While the folder does not exist, look for it this often.
const MISSING_INTERVAL: Duration = Duration::from_millis(500);
/// More files than this are ignored, in name order, and reported.
const FILES_MAX: usize = 20_000;
/// A larger file is reported as invalid.
const FILE_BYTES_MAX: u64 = 4 << 20;

/// What the folder says now.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// The folder was read at least once; before that nothing may be concluded from the absence of objects.
    pub ready: bool,
    /// All objects.
    pub objects: Arc<Objects>,
    /// One sentence per file or object that is wrong.
    pub problems: Arc<Vec<String>>,
}

/// Watches `folder` until the receivers are gone. The first scan is done when this returns.
pub fn watch(folder: &Path) -> watch::Receiver<Snapshot> {
    let mut scanner = Scanner { folder: folder.to_owned(), ..Scanner::default() };
    let ready = scanner.scan(&BTreeSet::new());
    let (sender, receiver) = watch::channel(scanner.snapshot(ready));
    let spawned = std::thread::Builder::new().name("objects".to_owned()).spawn(move || run(scanner, &sender));
    if let Err(error) = spawned {
        warn!(%error, "cannot start the thread that watches objects; they stay as they are");
    }
    receiver
}

fn run(mut scanner: Scanner, sender: &watch::Sender<Snapshot>) {
    let (events, received) = channel();
    let mut watcher = None;
    while !sender.is_closed() {
        if watcher.is_none() {
            watcher = open_watcher(&scanner.folder, events.clone());
        }
        let interval = if watcher.is_some() { RESCAN_INTERVAL } else { MISSING_INTERVAL };
        let touched = wait(&received, interval);
        let ready = scanner.scan(&touched);
        if !ready {
            // The folder went away: a new one needs a new watch.
            watcher = None;
        }
        let snapshot = scanner.snapshot(ready || sender.borrow().ready);
        sender.send_if_modified(|current| {
            let changed = current.ready != snapshot.ready
                || current.objects != snapshot.objects
                || current.problems != snapshot.problems;
            if changed {
                *current = snapshot;
            }
            changed
        });
    }
}

fn open_watcher(folder: &Path, events: Sender<PathBuf>) -> Option<notify::RecommendedWatcher> {
    let handler = move |event: notify::Result<notify::Event>| {
        // An access is no change, and our own reads would wake us for ever.
        let Ok(event) = event else { return };
        if !event.kind.is_access() {
            for path in event.paths {
                // The receiver is gone only when the agent ends.
                let _ = events.send(path);
            }
        }
    };
    let mut watcher = notify::recommended_watcher(handler).ok()?;
    match watcher.watch(folder, RecursiveMode::NonRecursive) {
        Ok(()) => Some(watcher),
        Err(error) => {
            if folder.exists() {
                warn!(folder = %folder.display(), %error, "cannot watch the folder; it is looked through instead");
            }
            None
        }
    }
}

/// Waits for events and the silence after them.
fn wait(received: &Receiver<PathBuf>, interval: Duration) -> BTreeSet<PathBuf> {
    let mut touched = BTreeSet::new();
    match received.recv_timeout(interval) {
        Ok(path) => touched.insert(path),
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => return touched,
    };
    let until = Instant::now() + QUIET_MAX;
    while Instant::now() < until {
        match received.recv_timeout(QUIET) {
            Ok(path) => touched.insert(path),
            Err(_) => break,
        };
    }
    touched
}

/// What is known of each file.
#[derive(Default)]
struct Scanner {
    folder: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// Problems of the folder itself.
    problems: Vec<String>,
}

#[derive(Default)]
struct File {
    stamp: Stamp,
    objects: BTreeMap<ObjectKey, Object>,
    problems: Vec<String>,
}

/// Tells a changed file from an unchanged one. Two writes within one tick of the clock look alike; the second one's
/// event names the file, which is then read in any case.
#[derive(Default, PartialEq, Eq, Clone, Copy)]
struct Stamp {
    inode: u64,
    bytes: u64,
    modified: (i64, i64),
}

impl Scanner {
    /// Reads what changed. Returns whether the folder could be read.
    fn scan(&mut self, touched: &BTreeSet<PathBuf>) -> bool {
        self.problems.clear();
        let paths = match list(&self.folder) {
            Ok(paths) => paths,
            Err(error) => {
                self.problems.push(format!("cannot read the folder {}: {error}", self.folder.display()));
                return false;
            }
        };
        if paths.len() > FILES_MAX {
            self.problems
                .push(format!("more than {FILES_MAX} files; {} are ignored", paths.len() - FILES_MAX));
        }
        let paths: BTreeSet<PathBuf> = paths.into_iter().take(FILES_MAX).collect();
        self.files.retain(|path, _| paths.contains(path));
        for path in paths {
            self.scan_file(&path, touched.contains(&path));
        }
        true
    }

    fn scan_file(&mut self, path: &Path, touched: bool) {
        // A file that vanished since the listing is gone at the next scan, which its event starts.
        let Ok(metadata) = std::fs::metadata(path) else { return };
        let stamp = Stamp {
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        };
        let known = self.files.contains_key(path);
        let file = self.files.entry(path.to_owned()).or_default();
        if known && file.stamp == stamp && !touched {
            return;
        }
        file.stamp = stamp;
        file.read(path, stamp.bytes);
        for problem in &file.problems {
            warn!(file = %path.display(), "{problem}");
        }
    }

    fn snapshot(&self, ready: bool) -> Snapshot {
        let mut objects = Objects::default();
        let mut problems = self.problems.clone();
        let mut owners: BTreeMap<&ObjectKey, &Path> = BTreeMap::new();
        for (path, file) in &self.files {
            problems.extend(file.problems.iter().map(|problem| format!("{}: {problem}", path.display())));
            for (key, object) in &file.objects {
                if let Some(other) = owners.insert(key, path) {
                    problems.push(format!("{}: {key} is also in {}", path.display(), other.display()));
                }
                insert(&mut objects, key, object.clone());
            }
        }
        Snapshot { ready, objects: Arc::new(objects), problems: Arc::new(problems) }
    }
}

impl File {
    fn read(&mut self, path: &Path, bytes: u64) {
        self.problems.clear();
        if bytes > FILE_BYTES_MAX {
            self.problems.push(format!("larger than {FILE_BYTES_MAX} bytes; its last good state stays"));
            return;
        }
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => {
                self.problems.push(format!("cannot be read ({error}); its last good state stays"));
                return;
            }
        };
        // Most writers truncate first: an empty file is one that is being written.
        if text.is_empty() {
            self.problems.push("empty; its last good state stays".to_owned());
            return;
        }
        let documents = match parse_file(&text) {
            Ok(documents) => documents,
            Err(problem) => {
                self.problems.push(format!("{problem}; its last good state stays"));
                return;
            }
        };
        let mut before = std::mem::take(&mut self.objects);
        for document in documents {
            match document {
                Document::Object(key, object) => {
                    self.objects.insert(key, object);
                }
                Document::Other => {}
                Document::Invalid(None, problem) => self.problems.push(problem),
                Document::Invalid(Some(key), problem) => {
                    let kept = before.remove(&key);
                    let what = if kept.is_some() { "its last good state stays" } else { "it is ignored" };
                    self.problems.push(format!("{key} is invalid ({problem}); {what}"));
                    self.objects.extend(kept.map(|object| (key, object)));
                }
            }
        }
        info!(file = %path.display(), objects = self.objects.len(), "read");
    }
}

fn list(folder: &Path) -> std::io::Result<Vec<PathBuf>> {
    let mut paths = Vec::new();
    for entry in std::fs::read_dir(folder)? {
        let path = entry?.path();
        let hidden = path.file_name().is_some_and(|name| name.as_encoded_bytes().starts_with(b"."));
        let known = path.extension().is_some_and(|ext| ext == "yaml" || ext == "yml" || ext == "json");
        if known && !hidden {
            paths.push(path);
        }
    }
    paths.sort();
    Ok(paths)
}

#[cfg(test)]
mod tests {
    use super::*;

    const POD: &str =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: web, labels: {app: web}}\nstatus: {podIP: 10.0.0.2}\n";
    const POLICY: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec:\n  \
                          podSelector: {}\n  ingress:\n  - ports: [{port: 80}]\n";

    fn mk_folder() -> (tempfile::TempDir, Scanner) {
        let folder = tempfile::tempdir().unwrap();
        let scanner = Scanner { folder: folder.path().to_owned(), ..Scanner::default() };
        (folder, scanner)
    }

    fn write(folder: &tempfile::TempDir, name: &str, text: &str) {
        std::fs::write(folder.path().join(name), text).unwrap();
    }

    #[test]
    fn documents_of_one_file_and_lists_are_read() {
        let (folder, mut scanner) = mk_folder();
        write(&folder, "a.yaml", &format!("# comment\n---\n{POD}---\n{POLICY}---\n"));
        write(
            &folder,
            "b.yml",
            "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Node, metadata: {name: n}}\n",
        );
        write(&folder, "c.txt", "not looked at");
        write(&folder, ".d.yaml", "not: looked at");
        assert!(scanner.scan(&BTreeSet::new()));
        let snapshot = scanner.snapshot(true);
        assert_eq!(snapshot.problems.as_slice(), &[] as &[String]);
        let objects = &snapshot.objects;
        assert_eq!((objects.pods.len(), objects.policies.len(), objects.nodes.len()), (1, 1, 1));
    }

    #[test]
    fn an_invalid_file_or_object_keeps_its_last_good_state_and_is_named() {
        let (folder, mut scanner) = mk_folder();
        write(&folder, "pod.yaml", POD);
        write(&folder, "policy.yaml", POLICY);
        scanner.scan(&BTreeSet::new());
        let good = scanner.snapshot(true);
        write(&folder, "pod.yaml", "apiVersion: v1\nkind: Pod\n  bad indent: [");
        write(&folder, "policy.yaml", &POLICY.replace("{port: 80}", "{port: http, endPort: 90}"));
        scanner.scan(&BTreeSet::new());
        let bad = scanner.snapshot(true);
        assert_eq!(bad.objects, good.objects);
        assert_eq!(bad.problems.len(), 2, "{:?}", bad.problems);
        assert!(bad.problems[0].contains("pod.yaml") && bad.problems[1].contains("policy.yaml"));
        write(&folder, "pod.yaml", "");
        scanner.scan(&BTreeSet::new());
        assert_eq!(scanner.snapshot(true).objects, good.objects, "an empty file is being written");
        std::fs::remove_file(folder.path().join("pod.yaml")).unwrap();
        scanner.scan(&BTreeSet::new());
        assert!(scanner.snapshot(true).objects.pods.is_empty());
    }

    #[test]
    fn a_missing_folder_is_not_ready_and_keeps_what_was_known() {
        let (folder, mut scanner) = mk_folder();
        write(&folder, "pod.yaml", POD);
        assert!(scanner.scan(&BTreeSet::new()));
        drop(folder);
        assert!(!scanner.scan(&BTreeSet::new()));
        assert_eq!(scanner.snapshot(false).objects.pods.len(), 1);
    }

    #[tokio::test]
    async fn a_change_arrives_without_waiting_for_a_rescan() {
        let folder = tempfile::tempdir().unwrap();
        let mut receiver = watch(folder.path());
        assert!(receiver.borrow().ready);
        // The watch starts after the first scan; a file from in between is found by the scan that follows its event.
        tokio::time::sleep(Duration::from_millis(100)).await;
        let started = Instant::now();
        write(&folder, "pod.yaml", POD);
        let pods = |snapshot: &Snapshot| !snapshot.objects.pods.is_empty();
        tokio::time::timeout(Duration::from_secs(5), receiver.wait_for(pods)).await.unwrap().unwrap();
        assert!(started.elapsed() < RESCAN_INTERVAL);
    }
}
