//! Read-only twins of an attached device.

use holdfast_frontend::ReadOnlyTwin;
use nix::fcntl::{FallocateFlags, PosixFadviseAdvice, fallocate, posix_fadvise};

use super::*;

fn twin_of(device: &Path, place: &str) -> PathBuf {
    ReadOnlyTwin::ensure(VOLUME, Path::new(place), device).unwrap().path
}

fn all_of(device: &Path) -> Vec<PathBuf> {
    let mut all: Vec<_> = ReadOnlyTwin::all_of(device).unwrap().into_iter().map(|twin| twin.path).collect();
    all.sort();
    all
}

fn remove(device: &Path, place: &str) -> Option<ReadOnlyTwin> {
    ReadOnlyTwin::remove(VOLUME, Path::new(place), device).unwrap()
}

fn reader(path: &Path, flags: i32) -> File {
    OpenOptions::new().read(true).custom_flags(flags).open(path).unwrap()
}

fn first_byte(file: &File) -> u8 {
    let mut block = AlignedBuf::new(BLOCK);
    file.read_exact_at(&mut block, 0).unwrap();
    assert_eq!(runs(&block).len(), 1);
    block[0]
}

#[test]
fn a_direct_read_of_a_twin_sees_what_was_written_before_it_and_a_buffered_one_when_it_asks() {
    if !possible(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = MemoryDevice::new(SMALL_BYTES);
    let attached = attach(&device, dir.path());
    let twin = twin_of(attached.device_path(), "/a");
    let (writer, buffered, unbuffered) =
        (direct(attached.device_path()), reader(&twin, 0), reader(&twin, libc::O_DIRECT));
    for byte in 1..4 {
        writer.write_all_at(&AlignedBuf::copy_of(&[byte; BLOCK]), 0).unwrap();
        assert_eq!(first_byte(&unbuffered), byte);
        posix_fadvise(&buffered, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
        assert_eq!(first_byte(&buffered), byte);
    }
    // In the cache of the device alone, which stays open.
    let cached = OpenOptions::new().write(true).open(attached.device_path()).unwrap();
    cached.write_all_at(&[9; BLOCK], 0).unwrap();
    assert_eq!(first_byte(&unbuffered), 9);
    drop((writer, cached, buffered, unbuffered));
    attached.detach().unwrap();
}

#[test]
fn nothing_is_written_through_a_twin_whatever_is_tried() {
    if !possible(&["blockdev", "blkdiscard"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = MemoryDevice::new(SMALL_BYTES);
    let attached = attach(&device, dir.path());
    direct(attached.device_path()).write_all_at(&AlignedBuf::copy_of(&[5; BLOCK]), 0).unwrap();
    let twin = twin_of(attached.device_path(), "/a");
    let try_all = |flags: i32| {
        let Ok(mut file) = OpenOptions::new().read(true).write(true).custom_flags(flags).open(&twin) else {
            return;
        };
        let written = file.write_all(&AlignedBuf::copy_of(&[6; BLOCK])).and_then(|()| file.sync_all());
        assert!(written.is_err(), "a write with flags {flags:o}");
        for mode in [FallocateFlags::FALLOC_FL_ZERO_RANGE, FallocateFlags::FALLOC_FL_PUNCH_HOLE] {
            let mode = mode | FallocateFlags::FALLOC_FL_KEEP_SIZE;
            assert!(fallocate(&file, mode, 0, BLOCK as i64).is_err(), "{mode:?} with flags {flags:o}");
        }
    };
    let path = twin.to_str().unwrap();
    for round in ["as it is made", "after BLKROSET 0"] {
        try_all(0);
        try_all(libc::O_DIRECT);
        for arguments in [vec![path], vec!["-z", path], vec!["-s", path]] {
            let done = Command::new("blkdiscard").args(&arguments).stderr(Stdio::null()).status().unwrap();
            assert!(!done.success(), "blkdiscard {arguments:?} {round}");
        }
        // It needs CAP_SYS_ADMIN, and does not help.
        let _ = Command::new("blockdev").args(["--setrw", path]).status().unwrap();
    }
    assert_eq!(
        device.blocks.lock().unwrap().iter().map(|(at, block)| (*at, block[0])).collect::<Vec<_>>(),
        [(0, 5)]
    );
    assert_eq!(device.trimmed_bytes.load(Ordering::SeqCst) + device.zeroed_bytes.load(Ordering::SeqCst), 0);
    attached.detach().unwrap();
    assert!(!bound(&twin), "detaching took it along");
}

#[test]
fn each_place_has_one_twin_until_it_is_removed() {
    if !possible(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let attached = attach(&MemoryDevice::new(SMALL_BYTES), dir.path());
    let device = attached.device_path();
    let (a, b) = (twin_of(device, "/a"), twin_of(device, "/b"));
    assert_eq!((twin_of(device, "/a"), twin_of(device, "/b")), (a.clone(), b.clone()), "made once");
    let mut both = [a.clone(), b.clone()];
    both.sort();
    assert_eq!(all_of(device), both);
    assert_eq!(remove(device, "/a"), None);
    assert_eq!(remove(device, "/a"), None, "safe to repeat");
    assert_eq!(all_of(device), std::slice::from_ref(&b));
    // Somebody has it open: it goes with that.
    let open = reader(&b, 0);
    assert_eq!(remove(device, "/b").map(|twin| twin.path), Some(b.clone()));
    drop(open);
    until("the twin went with its last close", || !bound(&b));
    attached.detach().unwrap();
}

#[test]
fn twins_grow_with_their_device() {
    if !possible(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let attached = attach(&MemoryDevice::new(SMALL_BYTES), dir.path());
    let twin = twin_of(attached.device_path(), "/a");
    let size = || File::open(&twin).unwrap().seek(SeekFrom::End(0)).unwrap();
    assert_eq!(size(), SMALL_BYTES);
    attached.grow(LARGE_BYTES).unwrap();
    until("the twin has grown", || size() == LARGE_BYTES);
    attached.detach().unwrap();
}

#[test]
fn detaching_beside_a_twin_in_use_says_so_and_both_go_with_the_user() {
    if !possible(&[]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let device = MemoryDevice::new(SMALL_BYTES);
    let attached = attach(&device, dir.path());
    let path = attached.device_path().to_owned();
    let twin = twin_of(&path, "/a");
    let open = reader(&twin, libc::O_DIRECT);
    assert!(matches!(attached.detach(), Err(DetachError::Busy(busy)) if busy == path));
    let failed = open.read_exact_at(&mut AlignedBuf::new(BLOCK), 0).unwrap_err();
    assert_eq!(failed.raw_os_error(), Some(libc::EIO));
    drop(open);
    until("both are gone", || !bound(&twin) && !bound(&path));
    until("the session is over", || Arc::strong_count(&device) == 1);
}

#[test]
fn a_killed_process_leaves_its_twins_to_the_next_one_and_those_of_others_stay() {
    if !possible(&["losetup"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let child = Child::start(dir.path());
    let twin = twin_of(&child.path, "/a");
    // A read-only loop device over ours that is none of ours.
    let made = Command::new("losetup").args(["-r", "--find", "--show"]).arg(&child.path).output().unwrap();
    let foreign = PathBuf::from(String::from_utf8(made.stdout).unwrap().trim());
    let elsewhere = tempfile::tempdir().unwrap();
    let living = attach(&MemoryDevice::new(SMALL_BYTES), elsewhere.path());
    let twin_of_living = twin_of(living.device_path(), "/a");

    let path = child.kill();
    assert!(bound(&path) && bound(&twin), "the twin keeps it");
    let cleaned = FuseLoop::clean_stale(&dir.path().join("fuse")).unwrap();
    assert_eq!((cleaned.cleared, cleaned.busy), (vec![twin.clone()], vec![path.clone()]));
    assert!(!bound(&twin) && bound(&foreign) && bound(&twin_of_living));
    run("losetup", &["-d", foreign.to_str().unwrap()]);
    until("the device went with its last user", || !bound(&path));
    living.detach().unwrap();
    assert!(!bound(&twin_of_living));
}

#[test]
fn a_device_that_somebody_left_read_only_is_written_again_by_the_next_volume() {
    if !possible(&["blockdev"]) {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let first = attach(&MemoryDevice::new(SMALL_BYTES), dir.path());
    let left = first.device_path().to_owned();
    run("blockdev", &["--setro", left.to_str().unwrap()]);
    first.detach().unwrap();
    // The kernel gives the lowest number that is free: those below it are taken one after the other.
    let mut others = Vec::new();
    let again = loop {
        let attached = attach(&MemoryDevice::new(SMALL_BYTES), dir.path());
        if attached.device_path() == left {
            break attached;
        }
        others.push(attached);
        assert!(others.len() < 64, "{} is never free again", left.display());
    };
    direct(again.device_path()).write_all_at(&AlignedBuf::copy_of(&[7; BLOCK]), 0).unwrap();
    others.push(again);
    others.into_iter().for_each(|attached| attached.detach().unwrap());
}
