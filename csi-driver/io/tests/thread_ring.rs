//! Rings that belong to the thread that submits.
#![expect(clippy::unwrap_used, reason = "a test ends at the first failure")]

use std::fs::File;
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};
use std::thread::ThreadId;
use std::time::Duration;

use holdfast_io::thread_ring::{Ended, LoneIo};
use holdfast_io::{
    AlignedBuf, Durability, Errno, OpenMode, Ring, RingDone, RingOptions, open_direct, thread_ring,
};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

const PAGE: usize = 4096;
/// More than a ring takes at a time.
const MANY: u64 = 300;

#[test]
fn what_a_thread_with_a_ring_submits_is_answered_on_that_thread() {
    on_a_thread(|ring, file, ended| {
        let (sender, receiver) = channel();
        write_many(ring, file, move |result| sender.send((result, std::thread::current().id())).unwrap());
        pump_until(ended, &receiver, |answers| {
            let expected: (Result<(), Errno>, ThreadId) = (Ok(()), std::thread::current().id());
            assert!(answers.iter().all(|answer| *answer == expected));
        });
        let (sender, receiver) = channel();
        let read = AlignedBuf::new(PAGE);
        ring.read(file, 77 * PAGE as u64, read, Box::new(move |result| sender.send(result).unwrap()));
        thread_ring::drain();
        assert_eq!(receiver.try_recv().unwrap().unwrap()[..], [77; PAGE]);
    });
}

#[test]
fn draining_waits_for_every_io_and_for_what_its_callbacks_submit() {
    on_a_thread(|ring, file, _ended| {
        let (sender, receiver) = channel();
        let (again, same) = (ring.clone(), Arc::clone(file));
        write_many(ring, file, move |result| {
            let sender = sender.clone();
            assert_eq!(result, Ok(()));
            let page = AlignedBuf::zeroed(PAGE).into_bytes();
            let done: RingDone<()> = Box::new(move |result| sender.send(result).unwrap());
            again.write(&same, 0, page, Durability::Cached, done);
        });
        thread_ring::drain();
        assert_eq!(receiver.try_iter().filter(Result::is_ok).count() as u64, MANY);
    });
}

#[test]
fn a_thread_without_a_ring_and_one_that_gave_it_up_use_the_shared_one() {
    on_a_thread(|ring, file, _ended| {
        assert!(thread_ring::install(LoneIo::Queued).is_err(), "one ring per thread");
        thread_ring::drain();
        let (sender, receiver) = channel();
        ring.sync_data(
            file,
            Box::new(move |result| sender.send((result, std::thread::current().id())).unwrap()),
        );
        let (result, answered_on) = receiver.recv().unwrap();
        assert_eq!(result, Ok(()));
        assert_ne!(answered_on, std::thread::current().id());
        // Nothing to do, nothing done.
        thread_ring::pump();
        thread_ring::drain();
    });
}

#[test]
fn a_lone_io_is_answered_before_the_thread_sleeps_also_when_it_fails() {
    on_a_thread_with(LoneIo::Blocks, |ring, file, _ended| {
        let (sender, receiver) = channel();
        let page = || AlignedBuf::copy_of(&[5; PAGE]).into_bytes();
        let told = sender.clone();
        ring.write(file, 0, page(), Durability::Durable, Box::new(move |result| told.send(result).unwrap()));
        thread_ring::pump();
        assert_eq!(receiver.try_recv().unwrap(), Ok(()));
        // Sleeping between the two is what tells a lone request from one that waited.
        std::thread::sleep(Duration::from_millis(1));
        let beyond = AlignedBuf::new(PAGE);
        let told = sender.clone();
        let done: RingDone<AlignedBuf> = Box::new(move |read| told.send(read.map(drop)).unwrap());
        ring.read(file, MANY * PAGE as u64, beyond, done);
        thread_ring::pump();
        assert_eq!(receiver.try_recv().unwrap(), Err(Errno(nix::libc::EIO)));
        write_many(ring, file, move |result| sender.send(result).unwrap());
        thread_ring::drain();
        assert_eq!(receiver.try_iter().filter(Result::is_ok).count() as u64, MANY);
    });
}

fn on_a_thread(test: impl FnOnce(&Ring, &Arc<File>, &Ended) + Send) {
    on_a_thread_with(LoneIo::Queued, test);
}

fn on_a_thread_with(lone_io: LoneIo, test: impl FnOnce(&Ring, &Arc<File>, &Ended) + Send) {
    let dir = tempfile::tempdir().unwrap();
    let file = open_direct(&dir.path().join("file"), OpenMode::New).unwrap();
    file.set_len(MANY * PAGE as u64).unwrap();
    let (ring, file) = (Ring::start(RingOptions::default()).unwrap(), Arc::new(file));
    std::thread::scope(|scope| {
        scope.spawn(|| test(&ring, &file, &thread_ring::install(lone_io).unwrap()));
    });
}

/// Page n gets n's low byte.
fn write_many(ring: &Ring, file: &Arc<File>, answer: impl Fn(Result<(), Errno>) + Clone + Send + 'static) {
    for n in 0..MANY {
        let data = AlignedBuf::copy_of(&[(n & 0xff) as u8; PAGE]).into_bytes();
        let answer = answer.clone();
        ring.write(file, n * PAGE as u64, data, Durability::Cached, Box::new(answer));
    }
}

/// Sleeps until the descriptor says so, as a thread's event loop does.
fn pump_until<T>(ended: &Ended, receiver: &Receiver<T>, check: impl FnOnce(&[T])) {
    let mut answers: Vec<T> = Vec::new();
    thread_ring::pump();
    while (answers.len() as u64) < MANY {
        let mut wait = [PollFd::new(ended.as_fd(), PollFlags::POLLIN)];
        assert_eq!(
            poll(&mut wait, PollTimeout::from(10_000_u16)).unwrap(),
            1,
            "the kernel tells that I/O ended"
        );
        thread_ring::pump();
        answers.extend(receiver.try_iter());
    }
    check(&answers);
}
