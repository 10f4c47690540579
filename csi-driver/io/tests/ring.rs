//! A ring on a real file system.
#![expect(clippy::unwrap_used, reason = "a test ends at the first failure")]

use std::fs::File;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use holdfast_io::{
    AlignedBuf, Durability, Errno, LockOutcome, OpenMode, QUEUE_MAX, Ring, RingDone, RingOptions,
    lock_exclusive, open_direct,
};

const PAGE: usize = 4096;

#[test]
fn what_is_written_is_read_back() {
    let (ring, file, _dir) = mk_file(1 << 20);
    for (durability, fill) in [(Durability::Cached, 1), (Durability::Durable, 2)] {
        let data = AlignedBuf::copy_of(&[fill; 3 * PAGE]).into_bytes();
        ask(|done| ring.write(&file, PAGE as u64, data, durability, done)).unwrap();
        ask(|done| ring.sync_data(&file, done)).unwrap();
        let read = ask(|done| ring.read(&file, 0, AlignedBuf::new(5 * PAGE), done)).unwrap();
        assert!(read[..PAGE].iter().chain(&read[4 * PAGE..]).all(|byte| *byte == 0));
        assert!(read[PAGE..4 * PAGE].iter().all(|byte| *byte == fill));
    }
}

#[test]
fn a_punched_range_reads_as_zeroes_and_gives_its_space_back() {
    use std::os::unix::fs::MetadataExt;
    let (ring, file, _dir) = mk_file(1 << 20);
    ask(|done| ring.allocate(&file, 0, 1 << 20, done)).unwrap();
    let reserved = file.metadata().unwrap().blocks();
    let data = AlignedBuf::copy_of(&[9; 1 << 20]).into_bytes();
    ask(|done| ring.write(&file, 0, data, Durability::Cached, done)).unwrap();
    ask(|done| ring.punch(&file, 0, 1 << 19, done)).unwrap();
    assert_eq!(file.metadata().unwrap().len(), 1 << 20);
    assert!(file.metadata().unwrap().blocks() <= reserved / 2 + 8);
    let read = ask(|done| ring.read(&file, 0, AlignedBuf::new(1 << 20), done)).unwrap();
    assert!(read[..1 << 19].iter().all(|byte| *byte == 0) && read[1 << 19..].iter().all(|byte| *byte == 9));
}

#[test]
fn a_read_beyond_the_end_is_an_error_and_never_zeroes() {
    let (ring, file, _dir) = mk_file(2 * PAGE as u64);
    for offset in [PAGE as u64, 2 * PAGE as u64, 1 << 30] {
        let failed = ask(|done| ring.read(&file, offset, AlignedBuf::new(2 * PAGE), done));
        assert_eq!(failed.map(drop), Err(Errno(nix::libc::EIO)), "{offset}");
    }
}

#[test]
fn the_kernels_errno_is_handed_on() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("file");
    drop(open_direct(&path, OpenMode::New).unwrap());
    let read_only = Arc::new(File::open(&path).unwrap());
    let ring = Ring::start(RingOptions::default()).unwrap();
    let data = AlignedBuf::zeroed(PAGE).into_bytes();
    let failed = ask(|done| ring.write(&read_only, 0, data, Durability::Cached, done));
    assert_eq!(failed, Err(Errno(nix::libc::EBADF)));
}

#[test]
fn requests_of_many_threads_beyond_the_kernels_queue_are_all_answered() {
    let (ring, file, _dir) = mk_file(4 << 20);
    let small = Ring::start(RingOptions { entries: 8 }).unwrap();
    for ring in [ring, small] {
        let answered = Arc::new(AtomicUsize::new(0));
        let (sender, receiver) = channel();
        std::thread::scope(|scope| {
            for thread in 0..4_u64 {
                let (ring, file, answered, sender) = (&ring, &file, &answered, sender.clone());
                scope.spawn(move || {
                    for n in 0..256 {
                        let data = AlignedBuf::copy_of(&[thread as u8; PAGE]).into_bytes();
                        let (answered, sender) = (Arc::clone(answered), sender.clone());
                        let done = Box::new(move |result: Result<(), Errno>| {
                            result.unwrap();
                            answered.fetch_add(1, Ordering::SeqCst);
                            sender.send(()).unwrap();
                        });
                        ring.write(file, (thread * 256 + n) * PAGE as u64, data, Durability::Cached, done);
                    }
                });
            }
        });
        for _ in 0..1024 {
            receiver.recv_timeout(Duration::from_secs(30)).unwrap();
        }
        assert_eq!(answered.load(Ordering::SeqCst), 1024);
    }
}

#[test]
fn a_full_queue_refuses_and_what_was_queued_is_done() {
    let (ring, file, _dir) = mk_file(1 << 20);
    let (release, held) = channel::<()>();
    let (sender, receiver) = channel();
    // The callback keeps the ring's thread busy, so that nothing leaves the queue.
    ring.sync_data(&file, Box::new(move |_| held.recv().unwrap()));
    std::thread::sleep(Duration::from_millis(200));
    for _ in 0..QUEUE_MAX + 3 {
        let sender = sender.clone();
        ring.sync_data(&file, Box::new(move |result| sender.send(result).unwrap()));
    }
    let refused: Vec<_> = receiver.try_iter().collect();
    assert_eq!(refused, [Err(Errno(nix::libc::EAGAIN)); 3]);
    release.send(()).unwrap();
    for _ in 0..QUEUE_MAX {
        assert_eq!(receiver.recv_timeout(Duration::from_secs(60)).unwrap(), Ok(()));
    }
}

#[test]
fn dropping_the_last_handle_finishes_what_was_submitted() {
    let (ring, file, _dir) = mk_file(1 << 20);
    let (sender, receiver) = channel();
    for n in 0..64 {
        let sender = sender.clone();
        let data = AlignedBuf::copy_of(&[3; PAGE]).into_bytes();
        let done = Box::new(move |result| sender.send(result).unwrap());
        ring.write(&file, n * PAGE as u64, data, Durability::Cached, done);
    }
    drop(ring);
    assert_eq!(receiver.try_iter().filter(Result::is_ok).count(), 64);
}

#[test]
fn a_callback_may_submit_again_and_hold_the_last_handle() {
    let (ring, file, _dir) = mk_file(1 << 20);
    let (sender, receiver) = channel();
    let (again, same) = (ring.clone(), Arc::clone(&file));
    ring.sync_data(
        &file,
        Box::new(move |_| {
            again.clone().sync_data(
                &same,
                Box::new(move |result| {
                    drop(again);
                    sender.send(result).unwrap();
                }),
            )
        }),
    );
    drop(ring);
    assert_eq!(receiver.recv_timeout(Duration::from_secs(10)).unwrap(), Ok(()));
}

#[tokio::test]
async fn the_async_wrappers_answer_too() {
    let (ring, file, _dir) = mk_file(1 << 20);
    let data = AlignedBuf::copy_of(&[8; PAGE]).into_bytes();
    ring.write_at(&file, 0, data, Durability::Cached).await.unwrap();
    ring.fdatasync(&file).await.unwrap();
    assert_eq!(ring.read_at(&file, 0, AlignedBuf::new(PAGE)).await.unwrap()[..], [8; PAGE]);
}

#[test]
fn a_lock_waits_for_its_holder_and_gives_up_in_time() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("lock");
    let first = open_direct(&path, OpenMode::New).unwrap();
    let second = open_direct(&path, OpenMode::Existing).unwrap();
    assert_eq!(lock_exclusive(&first, Duration::ZERO).unwrap(), LockOutcome::Locked);
    assert_eq!(lock_exclusive(&second, Duration::from_millis(50)).unwrap(), LockOutcome::HeldByAnother);
    std::thread::scope(|scope| {
        let waiter = scope.spawn(|| lock_exclusive(&second, Duration::from_secs(20)).unwrap());
        std::thread::sleep(Duration::from_millis(50));
        drop(first);
        assert_eq!(waiter.join().unwrap(), LockOutcome::Locked);
    });
}

fn mk_file(len: u64) -> (Ring, Arc<File>, tempfile::TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let file = open_direct(&dir.path().join("file"), OpenMode::New).unwrap();
    file.set_len(len).unwrap();
    (Ring::start(RingOptions::default()).unwrap(), Arc::new(file), dir)
}

fn ask<T: Send + 'static>(call: impl FnOnce(RingDone<T>)) -> Result<T, Errno> {
    let (sender, receiver) = channel();
    call(Box::new(move |result| sender.send(result).unwrap()));
    receiver.recv_timeout(Duration::from_secs(30)).expect("an answer within 30 s")
}
