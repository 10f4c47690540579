//! The API server is killed, stopped, and comes back: no answered swap is lost, none is believed that was not answered.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use holdfast_service::KubernetesStore;
use holdfast_service::kubernetes::CALL_TIMEOUT;
use holdfast_storage_core::ids::VolumeId;
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::{RecordStore, StoreError, Versioned};
use libtest_mimic::Trial;

use crate::bed::Bed;
use crate::suite::records::mk_record;
use crate::trial;

/// What a call may take beyond its own deadline on a busy machine.
const SLACK: Duration = Duration::from_secs(1);
/// From a server's return to an answer.
const RETURN_TIMEOUT: Duration = Duration::from_secs(60);

pub fn trials() -> Vec<Trial> {
    vec![
        trial("outages::a_server_killed_in_mid_swap_loses_no_answered_swap", killed_in_mid_swap),
        trial(
            "outages::a_server_that_hangs_leaves_the_outcome_unknown_in_time",
            a_hung_server_is_given_up_in_time,
        ),
    ]
}

fn killed_in_mid_swap(bed: &Bed) -> Result<()> {
    const KILLS: u32 = 3;
    let store = bed.store()?;
    let stop = Arc::new(AtomicBool::new(false));
    let writer = bed.run(async {
        store.create(mk_record(1, "killed", &["node-a"])).await?;
        Ok(tokio::spawn(swap_until(store.clone(), Arc::clone(&stop))))
    })?;
    for _ in 0..KILLS {
        std::thread::sleep(Duration::from_millis(rand::random_range(200..600)));
        let mut server = bed.server();
        server.kill()?;
        server.start_again()?;
    }
    std::thread::sleep(Duration::from_millis(500));
    stop.store(true, Ordering::SeqCst);
    let (known, unknown) = bed.run(async { writer.await? })?;
    println!("{} swaps answered, {unknown} unknown", known.record.generation);
    ensure!(unknown > 0, "no kill met a swap");
    let found = bed.run(async { read_until_answered(&store).await })?;
    ensure!(found == known, "{found:?} is not {known:?}");
    Ok(())
}

/// One writer, so that after each unknown swap the record is what it was or what was swapped, and stays so.
async fn swap_until(store: KubernetesStore, stop: Arc<AtomicBool>) -> Result<(Versioned, u32)> {
    let (mut known, mut unknown) = (store.read(VolumeId(1)).await?, 0);
    while !stop.load(Ordering::SeqCst) {
        let record = VolumeRecord { generation: known.record.generation.next(), ..known.record.clone() };
        let begun = Instant::now();
        match store.swap(known.version, record.clone()).await {
            Ok(version) => known = Versioned { version, record },
            Err(StoreError::Unknown(_)) => {
                unknown += 1;
                ensure!(begun.elapsed() < CALL_TIMEOUT + SLACK, "{:?}", begun.elapsed());
                let found = read_until_answered(&store).await?;
                let swapped = Versioned { version: known.version.next(), record };
                ensure!(found == known || found == swapped, "{found:?} is neither {known:?} nor {swapped:?}");
                known = found;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok((known, unknown))
}

async fn read_until_answered(store: &KubernetesStore) -> Result<Versioned> {
    let begun = Instant::now();
    loop {
        match store.read(VolumeId(1)).await {
            Err(StoreError::Unknown(why)) => ensure!(begun.elapsed() < RETURN_TIMEOUT, "{why}"),
            answer => return Ok(answer?),
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

fn a_hung_server_is_given_up_in_time(bed: &Bed) -> Result<()> {
    let store = bed.store()?;
    let record = mk_record(1, "hung", &["node-a"]);
    let version = bed.run(async { Ok(store.create(record.clone()).await?) })?;
    let swapped = VolumeRecord { generation: record.generation.next(), ..record.clone() };
    bed.server().pause()?;
    let answers = bed.run(async {
        let begun = Instant::now();
        let swap = store.swap(version, swapped.clone()).await;
        let read = store.read(record.volume_id).await;
        Ok((swap, read, begun.elapsed()))
    });
    bed.server().resume()?;
    let (swap, read, took) = answers?;
    ensure!(matches!(swap, Err(StoreError::Unknown(_))), "{swap:?}");
    ensure!(matches!(read, Err(StoreError::Unknown(_))), "{read:?}");
    ensure!(took < 2 * (CALL_TIMEOUT + SLACK), "{took:?}");
    let found = bed.run(async { read_until_answered(&store).await })?;
    let after = Versioned { version: version.next(), record: swapped.clone() };
    ensure!(found == Versioned { version, record } || found == after, "{found:?}");
    let next = VolumeRecord { generation: found.record.generation.next(), ..found.record };
    bed.run(async { Ok(store.swap(found.version, next).await?) })?;
    Ok(())
}
