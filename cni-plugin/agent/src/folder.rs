//! The object source of single machines: a folder of Kubernetes YAML or JSON.
//!
//! A thread of its own watches the folder (inotify) and rescans it on every event, and from time to time without one, in
//! case an event was lost. Only changed files are read, and their objects passed on at once: what is kept here are names. A
//! file that cannot be read keeps all its last good objects, an invalid object its last good state; both are reported by file
//! name. Of an object that several files have, the one that was read first counts.

use std::collections::{BTreeMap, BTreeSet};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::{Duration, Instant};

use holdfast_net_core::objects::ObjectChange;
use notify::{RecursiveMode, Watcher};
use tokio::sync::mpsc;
use tracing::{info, warn};

use crate::batch::{BATCHES_MAX, Batch, CHANGES_MAX};
use crate::intake::{Judged, Wrong};
use crate::keys::{Keys, ListId};
use crate::objects::{Document, Object, ObjectKey, parse_json, parse_yaml};

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

/// Watches `folder` until the receiver is gone.
pub fn watch(folder: &Path) -> mpsc::Receiver<Batch> {
    let (sender, receiver) = mpsc::channel(BATCHES_MAX);
    let scanner = Scanner::new(folder, sender);
    let spawned = std::thread::Builder::new().name("objects".to_owned()).spawn(move || run(scanner));
    if let Err(error) = spawned {
        warn!(%error, "cannot start the thread that watches objects; there are none");
    }
    receiver
}

fn run(mut scanner: Scanner) {
    let (events, received) = channel();
    let mut watcher = open_watcher(&scanner.folder, events.clone());
    let mut touched = BTreeSet::new();
    loop {
        let readable = scanner.scan(&touched);
        if scanner.pass_on_all(readable).is_err() {
            return;
        }
        if !readable {
            // The folder went away: a new one needs a new watch.
            watcher = None;
        } else if watcher.is_none() {
            watcher = open_watcher(&scanner.folder, events.clone());
            // What happened before the watch is found by one more look.
            touched.clear();
            if watcher.is_some() {
                continue;
            }
        }
        let interval = if watcher.is_some() { RESCAN_INTERVAL } else { MISSING_INTERVAL };
        touched = wait(&received, interval);
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

/// The engine is gone.
struct Gone;

/// What is known of each file.
struct Scanner {
    folder: PathBuf,
    files: BTreeMap<PathBuf, File>,
    /// Which file an object is from, by the file's list.
    keys: Keys,
    /// Problems of the folder itself.
    problems: Vec<String>,
    changes: Vec<ObjectChange>,
    /// Changes were passed on that no complete batch has followed yet.
    owes_end: bool,
    noticed: Instant,
    /// The last complete batch said something else about problems.
    told: Vec<String>,
    complete: bool,
    sender: mpsc::Sender<Batch>,
    gone: bool,
}

#[derive(Default)]
struct File {
    stamp: Stamp,
    /// Its objects; none before it was read.
    list: ListId,
    /// Objects of it that count as another file's.
    doubled: BTreeSet<String>,
    problems: Vec<String>,
    /// Its objects that are wrong.
    wrong: Wrong,
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
    fn new(folder: &Path, sender: mpsc::Sender<Batch>) -> Self {
        Self {
            folder: folder.to_owned(),
            files: BTreeMap::new(),
            keys: Keys::default(),
            problems: Vec::new(),
            changes: Vec::new(),
            owes_end: false,
            noticed: Instant::now(),
            told: Vec::new(),
            complete: false,
            sender,
            gone: false,
        }
    }

    /// Reads what changed. Returns whether the folder could be read.
    fn scan(&mut self, touched: &BTreeSet<PathBuf>) -> bool {
        self.noticed = Instant::now();
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
        let gone: Vec<PathBuf> = self.files.keys().filter(|path| !paths.contains(*path)).cloned().collect();
        let mut again: BTreeSet<PathBuf> = BTreeSet::new();
        for path in gone {
            let list = self.files.remove(&path).map(|file| file.list).unwrap_or_default();
            again.extend(self.take_away(list));
        }
        for path in &paths {
            again.extend(self.scan_file(path, touched.contains(path)));
        }
        // Files that have an object which another one had until now.
        for path in again {
            self.scan_file(&path, true);
        }
        true
    }

    /// Reads a file if it changed. Returns other files to read, which have objects that this one had.
    fn scan_file(&mut self, path: &Path, touched: bool) -> Vec<PathBuf> {
        // A file that vanished since the listing is gone at the next scan, which its event starts.
        let Ok(metadata) = std::fs::metadata(path) else { return Vec::new() };
        let stamp = Stamp {
            inode: metadata.ino(),
            bytes: metadata.len(),
            modified: (metadata.mtime(), metadata.mtime_nsec()),
        };
        let mut file = match self.files.remove(path) {
            Some(file) if file.stamp == stamp && !touched => {
                self.files.insert(path.to_owned(), file);
                return Vec::new();
            }
            known => known.unwrap_or_default(),
        };
        file.stamp = stamp;
        file.problems.clear();
        file.wrong.forget_refused();
        let before = file.list;
        let is_read = self.read(path, stamp.bytes, &mut file);
        for problem in &file.problems {
            warn!(file = %path.display(), "{problem}");
        }
        self.files.insert(path.to_owned(), file);
        if is_read { self.take_away(before) } else { Vec::new() }
    }

    /// Reads a file and passes its objects on. If it could be read it has a new list, and what is left in the old one is gone.
    fn read(&mut self, path: &Path, bytes: u64, file: &mut File) -> bool {
        if bytes > FILE_BYTES_MAX {
            file.problems.push(format!("larger than {FILE_BYTES_MAX} bytes; its last good state stays"));
            return false;
        }
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(error) => {
                file.problems.push(format!("cannot be read ({error}); its last good state stays"));
                return false;
            }
        };
        // Most writers truncate first: an empty file is one that is being written.
        if text.is_empty() {
            file.problems.push("empty; its last good state stays".to_owned());
            return false;
        }
        let before = std::mem::replace(&mut file.list, self.keys.open());
        file.doubled.clear();
        let take = |document| self.take_document(file, before, document);
        let is_json = path.extension().is_some_and(|extension| extension == "json");
        let parsed = if is_json { parse_json(&text, take) } else { parse_yaml(&text, take) };
        if let Err(problem) = parsed {
            file.problems.push(format!("{problem}; its last good state stays"));
            for key in self.keys.of_list(before) {
                self.keys.put(file.list, &key);
            }
        }
        file.wrong.retain_closed(|key| self.keys.list_of(key) == Some(file.list));
        info!(file = %path.display(), objects = self.keys.fit(file.list), "read");
        true
    }

    /// `before`: the list of the file's last reading, in which is what was not found again yet.
    fn take_document(&mut self, file: &mut File, before: ListId, document: Document) {
        let is_kept = |key: &str| self.keys.list_of(key) == Some(before);
        let (judged, problem) = file.wrong.judge(document, is_kept);
        file.problems.extend(problem);
        match judged {
            Judged::Good(key, object) => self.take_object(file, before, key, object),
            Judged::Kept(key) => self.keys.put(file.list, &key.packed()),
            Judged::Nothing => {}
        }
    }

    fn take_object(&mut self, file: &mut File, before: ListId, key: ObjectKey, object: Object) {
        let packed = key.packed();
        let found = self.keys.list_of(&packed).filter(|list| *list != before && *list != file.list);
        if let Some(other) = found {
            let path = self.files.iter().find(|(_, file)| file.list == other).map(|(path, _)| path.display());
            let path = path.map_or_else(String::new, |path| path.to_string());
            file.problems.push(format!("{key} is also in {path}, which counts"));
            file.doubled.insert(packed);
            return;
        }
        self.keys.put(file.list, &packed);
        let change = object.into_change(&key);
        self.pass_on(change);
    }

    /// Passes on that the objects of a list are gone. Returns the files that have them too.
    fn take_away(&mut self, list: ListId) -> Vec<PathBuf> {
        let keys = self.keys.of_list(list);
        self.keys.close(list);
        for key in &keys {
            self.pass_on(ObjectKey::removal(key));
        }
        let has = |file: &File| keys.iter().any(|key| file.doubled.contains(key));
        self.files.iter().filter(|(_, file)| has(file)).map(|(path, _)| path.clone()).collect()
    }

    fn pass_on(&mut self, change: ObjectChange) {
        self.changes.push(change);
        if self.changes.len() >= CHANGES_MAX {
            let changes = std::mem::take(&mut self.changes);
            let (problems, refused) = (Vec::new(), BTreeMap::new());
            let noticed = self.noticed;
            self.send(Batch { changes, complete: false, readable: true, problems, refused, noticed });
            self.owes_end = true;
        }
    }

    /// Passes on what is left, and what is wrong.
    fn pass_on_all(&mut self, readable: bool) -> Result<(), Gone> {
        let mut problems = self.problems.clone();
        for (path, file) in &self.files {
            problems.extend(file.problems.iter().map(|problem| format!("{}: {problem}", path.display())));
        }
        let first = readable && !self.complete;
        let owes_end = std::mem::take(&mut self.owes_end) || !self.changes.is_empty();
        if first || owes_end || problems != self.told {
            self.complete |= readable;
            self.told.clone_from(&problems);
            let changes = std::mem::take(&mut self.changes);
            let refused = self.files.values().flat_map(|file| file.wrong.refused().clone()).collect();
            let (complete, noticed) = (self.complete, self.noticed);
            self.send(Batch { changes, complete, readable, problems, refused, noticed });
        }
        if self.gone || self.sender.is_closed() { Err(Gone) } else { Ok(()) }
    }

    fn send(&mut self, batch: Batch) {
        self.gone |= self.sender.blocking_send(batch).is_err();
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
    use holdfast_net_core::policy;

    use super::*;

    const POD: &str =
        "apiVersion: v1\nkind: Pod\nmetadata: {name: web, labels: {app: web}}\nstatus: {podIP: 10.0.0.2}\n";
    const POLICY: &str = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: p}\nspec:\n  \
                          podSelector: {}\n  ingress:\n  - ports: [{port: 80}]\n";

    struct Bench {
        folder: tempfile::TempDir,
        scanner: Scanner,
        receiver: mpsc::Receiver<Batch>,
    }

    impl Bench {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let (sender, receiver) = mpsc::channel(BATCHES_MAX);
            Self { scanner: Scanner::new(folder.path(), sender), folder, receiver }
        }

        fn write(&self, name: &str, text: &str) {
            std::fs::write(self.folder.path().join(name), text).unwrap();
        }

        /// Scans and tells what was passed on: kind and name, with a minus where the object is gone; and the problems.
        fn scan(&mut self) -> (Vec<String>, Vec<String>) {
            let readable = self.scanner.scan(&BTreeSet::new());
            assert!(self.scanner.pass_on_all(readable).is_ok());
            let (mut changes, mut problems) = (Vec::new(), Vec::new());
            while let Ok(batch) = self.receiver.try_recv() {
                changes.extend(batch.changes.iter().map(|change| match change {
                    ObjectChange::Node(name, object) => text("Node", name, object.is_some()),
                    ObjectChange::Namespace(name, object) => text("Namespace", name, object.is_some()),
                    ObjectChange::Pod(name, object) => text("Pod", name, object.is_some()),
                    ObjectChange::Policy(name, object) => text("Policy", name, object.is_some()),
                    ObjectChange::ClusterPolicy(name, object) => {
                        text("ClusterPolicy", name, object.is_some())
                    }
                    ObjectChange::PodRange(name, object) => text("PodRange", name, object.is_some()),
                }));
                problems = batch.problems;
            }
            changes.sort();
            (changes, problems)
        }
    }

    fn text(kind: &str, name: &dyn std::fmt::Display, there: bool) -> String {
        format!("{}{kind} {name}", if there { "" } else { "-" })
    }

    #[test]
    fn documents_of_one_file_and_lists_are_read() {
        let mut bench = Bench::new();
        bench.write("a.yaml", &format!("# comment\n---\n{POD}---\n{POLICY}---\n"));
        bench.write(
            "b.yml",
            "apiVersion: v1\nkind: List\nitems:\n- {apiVersion: v1, kind: Node, metadata: {name: n}}\n",
        );
        bench.write("c.txt", "not looked at");
        bench.write(".d.yaml", "not: looked at");
        bench.write(
            "e.json",
            r#"{"apiVersion": "v1", "kind": "List", "items": [
                {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": "x"}},
                {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "y"}}]}"#,
        );
        bench.write(
            "f.json",
            r#"{"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "z", "namespace": "x"}}"#,
        );
        let (changes, problems) = bench.scan();
        assert_eq!(changes, ["Namespace x", "Node n", "Pod default/web", "Pod x/z", "Policy default/p"]);
        assert_eq!(problems, [""; 0]);
        assert_eq!(bench.scan().0, [""; 0], "nothing changed");
    }

    #[test]
    fn an_invalid_file_or_object_keeps_its_last_good_state_and_is_named() {
        let mut bench = Bench::new();
        bench.write("pod.yaml", POD);
        bench.write("policy.yaml", POLICY);
        bench.scan();
        bench.write("pod.yaml", "apiVersion: v1\nkind: Pod\n  bad indent: [");
        bench.write("policy.yaml", &POLICY.replace("{port: 80}", "{port: http, endPort: 90}"));
        let (changes, problems) = bench.scan();
        assert_eq!(changes, [""; 0]);
        assert_eq!(problems.len(), 2, "{problems:?}");
        assert!(problems[0].contains("pod.yaml") && problems[1].contains("policy.yaml"));
        bench.write("pod.yaml", "");
        assert_eq!(bench.scan().0, [""; 0], "an empty file is being written");
        std::fs::remove_file(bench.folder.path().join("pod.yaml")).unwrap();
        assert_eq!(bench.scan().0, ["-Pod default/web"]);
    }

    #[test]
    fn a_policy_that_is_too_large_closes_what_it_selects_unless_it_has_a_last_good_state() {
        let ports: Vec<String> = (0..100_000).map(|_| "{port: 80}".to_owned()).collect();
        let large = POLICY.replace("{port: 80}", &ports.join(", "));
        let mut bench = Bench::new();
        bench.write("policy.yaml", &large);
        let readable = bench.scanner.scan(&BTreeSet::new());
        assert!(bench.scanner.pass_on_all(readable).is_ok());
        let batch = bench.receiver.try_recv().unwrap();
        let [ObjectChange::Policy(name, Some(closed))] = batch.changes.as_slice() else {
            panic!("{:?}", batch.changes)
        };
        assert_eq!((name.to_string().as_str(), closed.spec.ingress.len()), ("default/p", 0));
        assert!(batch.problems[0].contains("NetworkPolicy default/p is too large"), "{:?}", batch.problems);
        assert!(batch.problems[0].contains("admits nothing"));
        bench.write("policy.yaml", &format!("# again\n{large}"));
        let (changes, problems) = bench.scan();
        assert_eq!(changes, ["Policy default/p"], "what it selects may have changed");
        assert!(problems[0].contains("admits nothing"), "it never was good: {problems:?}");
        bench.write("policy.yaml", &POLICY.replace("{port: 80}", "{port: http, endPort: 90}"));
        assert!(bench.scan().1[0].contains("stays closed"));

        bench.write("policy.yaml", POLICY);
        assert_eq!(bench.scan(), (vec!["Policy default/p".to_owned()], vec![]));
        bench.write("policy.yaml", &large);
        let (changes, problems) = bench.scan();
        assert_eq!(changes, [""; 0]);
        assert!(problems[0].contains("its last good state stays"), "{problems:?}");
        std::fs::remove_file(bench.folder.path().join("policy.yaml")).unwrap();
        assert_eq!(bench.scan().0, ["-Policy default/p"]);
    }

    #[test]
    fn a_cluster_policy_with_a_peer_that_is_too_large_is_passed_on_closed() {
        let values: Vec<String> = (0..=policy::PARTS_MAX).map(|number| format!("v{number}")).collect();
        let text = format!(
            "apiVersion: policy.networking.k8s.io/v1alpha2\nkind: ClusterNetworkPolicy\nmetadata: {{name: p}}\nspec:\n  \
             tier: Admin\n  priority: 1\n  subject: {{namespaces: {{}}}}\n  ingress:\n  - action: Deny\n    from:\n    \
             - namespaces: {{matchExpressions: [{{key: a, operator: In, values: [{}]}}]}}\n",
            values.join(", ")
        );
        let mut bench = Bench::new();
        bench.write("policy.yaml", &text);
        let (changes, problems) = bench.scan();
        assert_eq!(changes, ["ClusterPolicy p"]);
        assert!(problems[0].contains("too large (spec.ingress[0].from[0]"), "{problems:?}");
        assert!(problems[0].contains("Deny and Pass deny everything"), "{problems:?}");
    }

    #[test]
    fn a_reading_of_as_many_changes_as_parts_hold_has_an_end() {
        let mut bench = Bench::new();
        bench.scan();
        let pods = (0..CHANGES_MAX).map(|number| POD.replace("name: web", &format!("name: web{number}")));
        bench.write("pods.yaml", &pods.collect::<Vec<_>>().join("---\n"));
        let readable = bench.scanner.scan(&BTreeSet::new());
        assert!(bench.scanner.pass_on_all(readable).is_ok());
        let parts: Vec<bool> =
            std::iter::from_fn(|| bench.receiver.try_recv().ok()).map(|batch| batch.complete).collect();
        assert_eq!(parts, [false, true]);
    }

    #[test]
    fn of_an_object_in_two_files_the_first_counts_until_it_is_gone() {
        let mut bench = Bench::new();
        bench.write("a.yaml", POD);
        bench.write("b.yaml", POD);
        let (changes, problems) = bench.scan();
        assert_eq!(changes, ["Pod default/web"]);
        assert!(problems[0].contains("b.yaml") && problems[0].contains("also in"), "{problems:?}");
        std::fs::remove_file(bench.folder.path().join("a.yaml")).unwrap();
        let (changes, problems) = bench.scan();
        assert_eq!(changes, ["-Pod default/web", "Pod default/web"]);
        assert_eq!(problems, [""; 0]);
    }

    #[test]
    fn a_missing_folder_is_not_complete_and_keeps_what_was_known() {
        let mut bench = Bench::new();
        bench.write("pod.yaml", POD);
        assert_eq!(bench.scan().0, ["Pod default/web"]);
        std::fs::remove_dir_all(bench.folder.path()).unwrap();
        let (changes, problems) = bench.scan();
        assert_eq!((changes.len(), problems.len()), (0, 1));
    }

    #[tokio::test]
    async fn a_change_arrives_without_waiting_for_a_rescan() {
        let folder = tempfile::tempdir().unwrap();
        let mut receiver = watch(folder.path());
        assert!(receiver.recv().await.unwrap().complete);
        let started = Instant::now();
        std::fs::write(folder.path().join("pod.yaml"), POD).unwrap();
        let batch = tokio::time::timeout(Duration::from_secs(5), receiver.recv()).await.unwrap().unwrap();
        assert_eq!(batch.changes.len(), 1);
        assert!(started.elapsed() < RESCAN_INTERVAL);
    }
}
