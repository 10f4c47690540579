//! How fast one replica takes random 4 KiB requests, checksums and intent log on: `randwrite DIR [SECONDS]`.
//!
//! Makes a pool below DIR, fills a volume of 512 MiB, then keeps 32 writes, 32 reads and 32 writes with a flush every
//! 64 of them in flight. Prints operations per second. DIR should lie on the disk that is to be measured.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::{Duration, Instant};

use holdfast_io::AlignedBuf;
use holdfast_storage_core::ids::{BLOCK_BYTES, Epoch, Lineage, Region, ReplicaId, VolumeId};
use holdfast_storage_core::replica::ReplicaMeta;
use holdfast_store::{Done, Pool, PoolOptions, Replica, StoreError};
use rand::rngs::SmallRng;
use rand::{Rng, SeedableRng};

const DEPTH: usize = 32;
const SIZE_BYTES: u64 = 512 << 20;

type Failure = Box<dyn Error>;

fn main() -> Result<(), Failure> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().ok_or("usage: randwrite DIR [SECONDS]")?;
    let seconds = Duration::from_secs(args.next().map_or(Ok(5), |text| text.parse())?);
    let dir = Path::new(&dir).join("randwrite-pool");
    let replica = mk_replica(&dir)?;
    fill(&replica)?;

    let data = AlignedBuf::copy_of(&[7; BLOCK_BYTES as usize]).into_bytes();
    report("randwrite 4k qd32", seconds, &replica, |replica, offset, _, done| {
        replica.write(offset, data.clone(), false, done);
    })?;
    report("randread 4k qd32", seconds, &replica, |replica, offset, _, done| {
        replica.read(offset, BLOCK_BYTES as u32, Box::new(|result| done(result.map(drop))));
    })?;
    report("randwrite 4k qd32, flush every 64", seconds, &replica, |replica, offset, number, done| {
        if number % 64 == 63 { replica.flush(done) } else { replica.write(offset, data.clone(), false, done) }
    })?;
    ask(|done| replica.close(done))?;
    std::fs::remove_dir_all(&dir)?;
    Ok(())
}

fn mk_replica(dir: &Path) -> Result<Replica, Failure> {
    let id = ReplicaId(1);
    let options = PoolOptions {
        capacity_bytes: 4 << 30,
        reserve_bytes: 0,
        cookie_dir: Some("/dev/shm/holdfast-randwrite".into()),
        lock_wait: Duration::ZERO,
    };
    let pool = Pool::open(dir, options)?;
    pool.create_replica(&ReplicaMeta::new(VolumeId(1), id, Lineage(1), SIZE_BYTES, Epoch::default()))?;
    let replica = pool.open_replica(id)?;
    let regions: Vec<Region> = (0..u32::try_from(SIZE_BYTES >> 20)?).map(Region).collect();
    ask(|done| replica.log_add(&regions, done))?;
    Ok(replica)
}

fn fill(replica: &Replica) -> Result<(), Failure> {
    let began = Instant::now();
    let mut rng = SmallRng::seed_from_u64(1);
    for offset in (0..SIZE_BYTES).step_by(1 << 20) {
        let mut data = AlignedBuf::new(1 << 20);
        rng.fill(&mut data[..]);
        ask(|done| replica.write(offset, data.into_bytes(), false, done))?;
    }
    ask(|done| replica.flush(done))?;
    println!("fill: {:.0} MiB/s", (SIZE_BYTES >> 20) as f64 / began.elapsed().as_secs_f64());
    Ok(())
}

/// Keeps requests in flight: each answer sends the next one from this thread.
fn report(
    name: &str,
    seconds: Duration,
    replica: &Replica,
    start: impl Fn(&Replica, u64, u64, Done),
) -> Result<(), Failure> {
    let (sender, receiver): (Sender<Result<(), StoreError>>, Receiver<_>) = channel();
    let answered = Arc::new(AtomicU64::new(0));
    let mut rng = SmallRng::seed_from_u64(2);
    let mut number = 0;
    let mut next = || {
        let (sender, answered) = (sender.clone(), Arc::clone(&answered));
        let offset = rng.random_range(0..SIZE_BYTES / BLOCK_BYTES) * BLOCK_BYTES;
        let done: Done = Box::new(move |result| {
            answered.fetch_add(1, Ordering::Relaxed);
            let _ = sender.send(result);
        });
        start(replica, offset, number, done);
        number += 1;
    };
    let began = Instant::now();
    (0..DEPTH).for_each(|_| next());
    while began.elapsed() < seconds {
        receiver.recv()??;
        next();
    }
    let rate = answered.load(Ordering::Relaxed) as f64 / began.elapsed().as_secs_f64();
    for _ in 0..DEPTH {
        receiver.recv()??;
    }
    println!("{name}: {rate:.0} per second");
    Ok(())
}

fn ask(call: impl FnOnce(Done)) -> Result<(), Failure> {
    let (sender, receiver) = channel();
    call(Box::new(move |result| {
        let _ = sender.send(result);
    }));
    Ok(receiver.recv()??)
}
