//! The FUSE and loop front end on the running kernel. Needs root, `/dev/fuse` and loop devices; skips visibly without.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

mod read_only;

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicI32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use holdfast_frontend::{DetachError, FuseLoop, FuseLoopOptions};
use holdfast_io::{AlignedBuf, BlockDevice, BlockError, BlockOp, Completion};

const BLOCK: usize = 4096;
const SMALL_BYTES: u64 = 512 << 20;
const LARGE_BYTES: u64 = 768 << 20;
const VOLUME: &str = "0123456789abcdef0123456789abcdef";

/// Sparse memory that answers on another thread, as a target does.
struct MemoryDevice {
    size_bytes: u64,
    blocks: Mutex<BTreeMap<u64, Bytes>>,
    fail_with: AtomicI32,
    flushes: AtomicU64,
    trimmed_bytes: AtomicU64,
    zeroed_bytes: AtomicU64,
    queue: Mutex<std::sync::mpsc::Sender<(BlockOp, Completion)>>,
}

impl MemoryDevice {
    fn new(size_bytes: u64) -> Arc<Self> {
        let (queue, requests) = std::sync::mpsc::channel::<(BlockOp, Completion)>();
        let device = Arc::new(Self {
            size_bytes,
            blocks: Mutex::default(),
            fail_with: AtomicI32::new(0),
            flushes: AtomicU64::new(0),
            trimmed_bytes: AtomicU64::new(0),
            zeroed_bytes: AtomicU64::new(0),
            queue: Mutex::new(queue),
        });
        let weak = Arc::downgrade(&device);
        std::thread::spawn(move || {
            while let Ok((op, done)) = requests.recv() {
                match weak.upgrade() {
                    Some(device) => done(device.apply(op)),
                    None => done(Err(BlockError(libc::EIO))),
                }
            }
        });
        device
    }

    fn apply(&self, op: BlockOp) -> Result<Bytes, BlockError> {
        let fail_with = self.fail_with.load(Ordering::SeqCst);
        if fail_with != 0 {
            return Err(BlockError(fail_with));
        }
        let mut blocks = self.blocks.lock().unwrap();
        match op {
            BlockOp::Read { offset, len } => {
                assert!((offset | u64::from(len)).is_multiple_of(BLOCK as u64));
                let mut data = BytesMut::with_capacity(len as usize);
                for block in 0..u64::from(len) / BLOCK as u64 {
                    match blocks.get(&(offset / BLOCK as u64 + block)) {
                        Some(bytes) => data.extend_from_slice(bytes),
                        None => data.extend_from_slice(&[0; BLOCK]),
                    }
                }
                return Ok(data.freeze());
            }
            BlockOp::Write { offset, data, .. } => {
                assert!(holdfast_io::is_aligned(&data) && offset.is_multiple_of(BLOCK as u64));
                for (index, block) in data.chunks(BLOCK).enumerate() {
                    blocks.insert(offset / BLOCK as u64 + index as u64, Bytes::copy_from_slice(block));
                }
            }
            BlockOp::Zero { offset, len, trim, .. } => {
                let first = offset / BLOCK as u64;
                let last = first + len / BLOCK as u64;
                blocks.retain(|block, _| *block < first || *block >= last);
                let counter = if trim { &self.trimmed_bytes } else { &self.zeroed_bytes };
                counter.fetch_add(len, Ordering::SeqCst);
            }
            BlockOp::Flush => {
                self.flushes.fetch_add(1, Ordering::SeqCst);
            }
        }
        Ok(Bytes::new())
    }
}

impl BlockDevice for MemoryDevice {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    fn submit(&self, op: BlockOp, done: Completion) {
        self.queue.lock().unwrap().send((op, done)).expect("the thread lives as long as the device");
    }
}

/// True if this host can run the test.
fn possible(tools: &[&str]) -> bool {
    let missing = tools.iter().find(|tool| {
        !["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|dir| Path::new(dir).join(tool).exists())
    });
    let reason = if !nix::unistd::geteuid().is_root() {
        "not root".to_owned()
    } else if !Path::new("/dev/fuse").exists() || !Path::new("/dev/loop-control").exists() {
        "no /dev/fuse or no /dev/loop-control".to_owned()
    } else if let Some(tool) = missing {
        format!("{tool} is not installed")
    } else {
        return true;
    };
    println!("SKIP: {reason}");
    false
}

fn options(dir: &Path) -> FuseLoopOptions {
    FuseLoopOptions { volume_id: VOLUME.into(), mount_dir: dir.join("fuse"), read_only: false }
}

fn attach(device: &Arc<MemoryDevice>, dir: &Path) -> FuseLoop {
    FuseLoop::attach(device.clone(), options(dir)).expect("attached")
}

fn direct(path: &Path) -> File {
    OpenOptions::new().read(true).write(true).custom_flags(libc::O_DIRECT).open(path).unwrap()
}

fn run(program: &str, args: &[&str]) {
    let output = Command::new(program).args(args).output().unwrap();
    let text =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{program} {args:?}: {text}");
}

/// Whether the kernel still has a loop device for the mark in `dir`.
fn bound(path: &Path) -> bool {
    let name = path.file_name().unwrap().to_str().unwrap();
    Path::new("/sys/block").join(name).join("loop/backing_file").exists()
}

fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !condition() {
        assert!(Instant::now() < deadline, "never came true: {what}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Mounted while it lives.
struct Mounted(PathBuf);

impl Mounted {
    fn new(device: &Path, dir: &Path) -> Self {
        let at = dir.join("mnt");
        std::fs::create_dir_all(&at).unwrap();
        run("mount", &[device.to_str().unwrap(), at.to_str().unwrap()]);
        Self(at)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        // A process that another test is just starting has our files for a moment, until it executes its program.
        for _ in 0..50 {
            if Command::new("umount").arg(&self.0).status().is_ok_and(|status| status.success()) {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }
}

fn holds_a_file_system(mkfs: &str, fsck: &[&str]) {
    if !possible(&[mkfs, fsck[0]]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = MemoryDevice::new(512 << 20);
    let attached = attach(&device, dir.path());
    let path = attached.device_path().to_owned();
    run(mkfs, &["-q", path.to_str().unwrap()]);
    let content = vec![0x5a; 3 << 20];
    {
        let mounted = Mounted::new(&path, dir.path());
        let flushes = device.flushes.load(Ordering::SeqCst);
        let mut file = File::create(mounted.0.join("file")).unwrap();
        file.write_all(&content).unwrap();
        file.sync_all().unwrap();
        assert!(device.flushes.load(Ordering::SeqCst) > flushes, "fsync reaches the device as a flush");

        let trimmed = device.trimmed_bytes.load(Ordering::SeqCst);
        run("fstrim", &[mounted.0.to_str().unwrap()]);
        assert!(
            device.trimmed_bytes.load(Ordering::SeqCst) > trimmed,
            "discard reaches the device as a trim"
        );
    }
    let args: Vec<&str> = fsck[1..].iter().copied().chain([path.to_str().unwrap()]).collect();
    run(fsck[0], &args);
    attached.detach().unwrap();

    // The same content through another loop device: nothing was left in a cache.
    let attached = attach(&device, dir.path());
    let mounted = Mounted::new(attached.device_path(), dir.path());
    assert!(std::fs::read(mounted.0.join("file")).unwrap() == content);
    drop(mounted);
    attached.detach().unwrap();
}

#[test]
fn ext4_lives_on_it() {
    holds_a_file_system("mkfs.ext4", &["fsck.ext4", "-f", "-n"]);
}

#[test]
fn xfs_lives_on_it() {
    holds_a_file_system("mkfs.xfs", &["xfs_repair", "-n"]);
}

#[test]
fn a_mounted_device_grows_and_so_does_its_file_system() {
    // Not ext4: growing it while it is mounted needs CAP_SYS_RESOURCE.
    if !possible(&["mkfs.xfs", "xfs_growfs", "xfs_repair"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = MemoryDevice::new(SMALL_BYTES);
    let attached = attach(&device, dir.path());
    let path = attached.device_path().to_owned();
    run("mkfs.xfs", &["-q", path.to_str().unwrap()]);
    let content = vec![0x5a; 1 << 20];
    {
        let mounted = Mounted::new(&path, dir.path());
        attached.grow(LARGE_BYTES).unwrap();
        attached.grow(LARGE_BYTES).expect("safe to repeat");
        assert_eq!(File::open(&path).unwrap().seek(SeekFrom::End(0)).unwrap(), LARGE_BYTES);
        let refused = attached.grow(SMALL_BYTES).unwrap_err().to_string();
        assert!(refused.contains(&LARGE_BYTES.to_string()) && refused.contains("only grows"), "{refused}");
        let blocks = || nix::sys::statvfs::statvfs(&mounted.0).unwrap().blocks();
        let before = blocks();
        run("xfs_growfs", &[mounted.0.to_str().unwrap()]);
        assert!(blocks() > before, "the file system is larger");
        let mut file = File::create(mounted.0.join("file")).unwrap();
        file.write_all(&content).unwrap();
        file.sync_all().unwrap();
    }
    run("xfs_repair", &["-n", path.to_str().unwrap()]);
    let end = direct(&path);
    let last = AlignedBuf::copy_of(&[7; BLOCK]);
    end.write_all_at(&last, LARGE_BYTES - BLOCK as u64).unwrap();
    assert!(end.write_all_at(&last, LARGE_BYTES).is_err());
    drop(end);
    attached.detach().unwrap();
}

#[test]
fn the_block_device_is_what_the_design_says() {
    if !possible(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = MemoryDevice::new(64 << 20);
    let attached = attach(&device, dir.path());
    let name = attached.device_path().file_name().unwrap().to_str().unwrap().to_owned();
    let told =
        |file: &str| std::fs::read_to_string(format!("/sys/block/{name}/{file}")).unwrap().trim().to_owned();
    assert_eq!(told("queue/logical_block_size"), "4096");
    assert_eq!(told("loop/dio"), "1");
    assert_eq!(told("size"), ((64 << 20) / 512).to_string());
    assert!(
        told("loop/backing_file").ends_with(&format!("holdfast-{VOLUME}")),
        "{}",
        told("loop/backing_file")
    );
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("holdfast"), "no mount table shows the FUSE file system: {mounts}");
    attached.detach().unwrap();
}

/// Equal bytes in a row, and how many.
fn runs(data: &[u8]) -> Vec<(u8, usize)> {
    data.chunk_by(|a, b| a == b).map(|run| (run[0], run.len())).collect()
}

#[test]
fn direct_io_and_zeroing_reach_the_device() {
    if !possible(&["blkdiscard"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = MemoryDevice::new(64 << 20);
    let attached = attach(&device, dir.path());
    let file = direct(attached.device_path());
    let data = AlignedBuf::copy_of(&vec![0xab; 4 << 20]);
    file.write_all_at(&data, 8 << 20).unwrap();
    let mut back = AlignedBuf::new(4 << 20);
    file.read_exact_at(&mut back, 8 << 20).unwrap();
    assert_eq!(runs(&back), [(0xab, 4 << 20)]);
    drop(file);

    let path = attached.device_path().to_str().unwrap();
    run("blkdiscard", &["-o", "8388608", "-l", "1048576", path]);
    assert_eq!(device.trimmed_bytes.load(Ordering::SeqCst), 1 << 20);
    // Write-zeroes that keeps the space: fallocate's ZERO_RANGE on the block device.
    let file = direct(attached.device_path());
    use nix::fcntl::{FallocateFlags, fallocate};
    let keep_space = FallocateFlags::FALLOC_FL_ZERO_RANGE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(&file, keep_space, 9 << 20, 1 << 20).unwrap();
    assert_eq!(device.zeroed_bytes.load(Ordering::SeqCst), 1 << 20);
    file.read_exact_at(&mut back, 8 << 20).unwrap();
    assert_eq!(runs(&back), [(0, 2 << 20), (0xab, 2 << 20)]);
    drop(file);
    attached.detach().unwrap();
}

#[test]
fn a_failing_device_gives_eio_and_does_not_hang() {
    if !possible(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = MemoryDevice::new(64 << 20);
    let attached = attach(&device, dir.path());
    let file = direct(attached.device_path());
    let mut buffer = AlignedBuf::zeroed(BLOCK);
    for errno in [libc::EIO, libc::ESHUTDOWN, libc::ENOTCONN] {
        device.fail_with.store(errno, Ordering::SeqCst);
        assert_eq!(
            file.write_all_at(&buffer, 0).unwrap_err().raw_os_error(),
            Some(libc::EIO),
            "write, {errno}"
        );
        assert_eq!(
            file.read_exact_at(&mut buffer, 0).unwrap_err().raw_os_error(),
            Some(libc::EIO),
            "read, {errno}"
        );
        assert!(file.sync_all().is_err(), "flush, {errno}");
    }
    device.fail_with.store(0, Ordering::SeqCst);
    file.read_exact_at(&mut buffer, 0).unwrap();
    attached.cut();
    assert_eq!(
        file.read_exact_at(&mut buffer, 0).unwrap_err().raw_os_error(),
        Some(libc::EIO),
        "after the cut"
    );
    drop(file);
    attached.detach().unwrap();
}

#[test]
fn a_read_only_device_refuses_writes() {
    if !possible(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = MemoryDevice::new(64 << 20);
    let attached =
        FuseLoop::attach(device, FuseLoopOptions { read_only: true, ..options(dir.path()) }).unwrap();
    let refused = OpenOptions::new().write(true).open(attached.device_path()).and_then(|mut file| {
        file.write_all(&[1; BLOCK])?;
        file.sync_all()
    });
    assert!(refused.is_err());
    let mut file = File::open(attached.device_path()).unwrap();
    let mut first = [1; BLOCK];
    file.read_exact(&mut first).unwrap();
    assert_eq!(first, [0; BLOCK]);
    drop(file);
    attached.detach().unwrap();
}

#[test]
fn detaching_leaves_nothing_and_drops_the_device() {
    if !possible(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = MemoryDevice::new(64 << 20);
    for _ in 0..10 {
        let attached = attach(&device, dir.path());
        let mut file = OpenOptions::new().write(true).open(attached.device_path()).unwrap();
        file.seek(SeekFrom::Start(1 << 20)).unwrap();
        file.write_all(&[9; 64 << 10]).unwrap();
        drop(file);
        attached.detach().unwrap();
    }
    assert_eq!(
        device.blocks.lock().unwrap().len(),
        16,
        "what was cached for the device was written before it went"
    );
    until("the device's last owner is the test", || Arc::strong_count(&device) == 1);
    let dropped = attach(&device, dir.path());
    let path = dropped.device_path().to_owned();
    drop(dropped);
    until("the session is over", || Arc::strong_count(&device) == 1);
    assert!(
        FuseLoop::clean_stale(&dir.path().join("fuse")).unwrap().cleared.is_empty(),
        "{}",
        path.display()
    );
}

#[test]
fn detaching_what_is_in_use_says_so_and_cuts_it_off() {
    if !possible(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = MemoryDevice::new(64 << 20);
    let attached = attach(&device, dir.path());
    let path = attached.device_path().to_owned();
    let file = direct(&path);
    assert!(matches!(attached.detach(), Err(DetachError::Busy(busy)) if busy == path));
    let mut buffer = AlignedBuf::new(BLOCK);
    assert_eq!(file.read_exact_at(&mut buffer, 0).unwrap_err().raw_os_error(), Some(libc::EIO));
    drop(file);
    until("the session is over", || Arc::strong_count(&device) == 1);
}

#[test]
fn bad_options_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let device: Arc<dyn BlockDevice> = MemoryDevice::new(64 << 20);
    let bad_id = FuseLoopOptions { volume_id: "../../etc".into(), ..options(dir.path()) };
    assert!(FuseLoop::attach(device, bad_id).unwrap_err().to_string().contains("not a volume id"));
    let odd = FuseLoop::attach(MemoryDevice::new(4097), options(dir.path())).unwrap_err();
    assert!(odd.to_string().contains("multiple of 4096"), "{odd}");
}

/// Not a test of its own: the process that [`Child`] starts and kills.
#[test]
fn child_that_holds_a_device() {
    let Ok(dir) = std::env::var("HOLDFAST_FRONTEND_CHILD") else { return };
    let device = MemoryDevice::new(64 << 20);
    let attached = attach(&device, Path::new(&dir));
    println!("attached {}", attached.device_path().display());
    std::thread::sleep(Duration::from_secs(60));
}

struct Child {
    process: std::process::Child,
    path: PathBuf,
}

impl Child {
    fn start(dir: &Path) -> Self {
        let mut process = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_holds_a_device", "--nocapture"])
            .env("HOLDFAST_FRONTEND_CHILD", dir)
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let lines = BufReader::new(process.stdout.take().unwrap()).lines();
        let path = lines.map(Result::unwrap).find_map(|line| Some(line.split_once("attached ")?.1.into()));
        Self { process, path: path.expect("the child attaches") }
    }

    fn kill(mut self) -> PathBuf {
        self.process.kill().unwrap();
        // A process that waits for itself would never be reaped.
        until("the killed process is gone", || self.process.try_wait().unwrap().is_some());
        self.path
    }
}

#[test]
fn a_killed_process_leaves_nothing() {
    if !possible(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..5 {
        let path = Child::start(dir.path()).kill();
        until("the loop device has cleared itself", || !bound(&path));
    }
    assert_eq!(
        FuseLoop::clean_stale(&dir.path().join("fuse")).unwrap(),
        holdfast_frontend::Cleaned::default()
    );
}

#[test]
fn a_process_killed_with_cached_writes_dies_and_leaves_nothing() {
    if !possible(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    for _ in 0..5 {
        let child = Child::start(dir.path());
        // Buffered and not synced: the last close of the device writes it back, to the process that is dying.
        OpenOptions::new().write(true).open(&child.path).unwrap().write_all(&vec![1; 16 << 20]).unwrap();
        let path = child.kill();
        until("the loop device has cleared itself", || !bound(&path));
    }
}

#[test]
fn a_device_that_is_mounted_when_its_process_is_killed_fails_and_goes_with_its_mount() {
    if !possible(&["mkfs.ext4"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let child = Child::start(dir.path());
    run("mkfs.ext4", &["-q", child.path.to_str().unwrap()]);
    let mounted = Mounted::new(&child.path, dir.path());
    let in_use = FuseLoop::clean_stale(&dir.path().join("fuse")).unwrap_err();
    assert!(in_use.to_string().contains("living process"), "{in_use}");
    let path = child.kill();

    let failed = File::create(mounted.0.join("late")).and_then(|file| file.sync_all());
    assert!(failed.is_err(), "no one serves it any more");
    let cleaned = FuseLoop::clean_stale(&dir.path().join("fuse")).unwrap();
    assert!(cleaned.busy.iter().eq([&path]), "{cleaned:?}");
    drop(mounted);
    until("it went with its mount", || !bound(&path));
}
