//! What pool folders hold, told without a cluster: for whoever has disks left, and wants to know of which volumes.
//!
//! *Promised:* nothing is changed, and a pool that a data process uses is refused. The judgement is that of a rescue (ADR 0011)
//! over the pools that are given: a node whose pool is not among them counts as one that does not answer.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use clap::Args;
use holdfast_service::record_copies;
use holdfast_storage_core::ids::{NodeName, ReplicaId};
use holdfast_storage_core::rescue::{self, Found, FoundCopy, Rescue, Survey, Verdict, Whereabouts};
use holdfast_store::KeptRecord;
use serde_json::{Value, json};

/// Where to look.
#[derive(Debug, Args)]
pub struct InspectOptions {
    /// Folder of a node's replicas, on a disk that is mounted for writing; may be given several times.
    #[arg(long, required = true)]
    pool_dir: Vec<PathBuf>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
}

/// Prints the volumes that the pools have replicas of. Blocks.
///
/// # Errors
/// A pool is in use, or cannot be read.
pub fn inspect(options: &InspectOptions) -> anyhow::Result<()> {
    let (mut survey, mut held) = (Survey::default(), Held::default());
    for dir in &options.pool_dir {
        let kept = holdfast_store::survey_records(dir).with_context(|| dir.display().to_string())?;
        held.add(&mut survey, dir, kept);
    }
    let plan = rescue::plan(&survey);
    if options.json {
        let volumes: Vec<Value> = plan.iter().map(|rescue| as_json(rescue, &held)).collect();
        println!("{}", json!({"volumes": volumes, "unreadable": held.unreadable}));
    } else {
        plan.iter().for_each(|rescue| print(rescue, &held));
        held.unreadable
            .iter()
            .for_each(|what| println!("{what} cannot be read: nobody knows of which volume it is"));
        println!("{} volumes in {} pools; nothing was changed", plan.len(), options.pool_dir.len());
    }
    Ok(())
}

/// Which pool each replica is in.
#[derive(Default)]
struct Held {
    pools: BTreeMap<ReplicaId, PathBuf>,
    unreadable: Vec<String>,
}

impl Held {
    fn add(&mut self, survey: &mut Survey, dir: &Path, kept: Vec<KeptRecord>) {
        let kept: Vec<(KeptRecord, FoundCopy)> = kept.into_iter().map(with_copy).collect();
        // A pool does not know its node; the records do.
        let node = |(kept, copy): &(KeptRecord, FoundCopy)| match copy {
            FoundCopy::Record(read) => {
                read.record.replicas.get(&kept.replica_id).map(|entry| entry.node.clone())
            }
            FoundCopy::Absent | FoundCopy::Unreadable(_) | FoundCopy::Later(_) => None,
        };
        let nodes = || kept.iter().filter_map(node);
        let pools_node = nodes().next().unwrap_or_else(|| NodeName(format!("of {}", dir.display())));
        survey.answered.extend(nodes());
        for one in kept {
            let node = node(&one).unwrap_or_else(|| pools_node.clone());
            let (KeptRecord { replica_id, volume_id, meta, .. }, copy) = one;
            let volume = volume_id.ok().or_else(|| match &copy {
                FoundCopy::Record(read) => Some(read.record.volume_id),
                FoundCopy::Absent | FoundCopy::Unreadable(_) | FoundCopy::Later(_) => None,
            });
            self.pools.insert(replica_id, dir.to_owned());
            match volume {
                Some(volume) => survey.found.push(Found {
                    node,
                    replica: replica_id,
                    volume,
                    meta: meta.ok(),
                    holds_data: None,
                    copy,
                }),
                None => self.unreadable.push(format!("replica {replica_id} in {}", dir.display())),
            }
        }
    }

    fn place(&self, replica: ReplicaId) -> String {
        self.pools.get(&replica).map(|dir| dir.display().to_string()).unwrap_or_default()
    }
}

fn with_copy(kept: KeptRecord) -> (KeptRecord, FoundCopy) {
    let copy = match &kept.copy {
        Ok(Some(copy)) => record_copies::read(copy),
        Ok(None) => FoundCopy::Absent,
        Err(error) => FoundCopy::Unreadable(error.to_string()),
    };
    (kept, copy)
}

fn verdict(rescue: &Rescue) -> &'static str {
    match rescue.verdict {
        Verdict::Present => "present",
        Verdict::Sound => "sound",
        Verdict::Doubtful => "doubtful",
        Verdict::Impossible => "impossible",
    }
}

fn whereabouts(found: Whereabouts) -> &'static str {
    match found {
        Whereabouts::Here => "here",
        Whereabouts::Silent => "not in these pools",
        Whereabouts::Gone => "not in its node's pool",
        Whereabouts::Unlisted => "here, not listed",
    }
}

fn as_json(rescue: &Rescue, held: &Held) -> Value {
    let replicas = rescue.replicas.iter().map(|(id, (node, found))| {
        json!({"replica": id, "node": node, "whereabouts": whereabouts(*found), "pool": held.place(*id)})
    });
    json!({
        "volume": rescue.volume, "verdict": verdict(rescue), "notes": rescue.notes,
        "newest": rescue.newest.map(|stamp| {
            json!({"lineage": stamp.lineage, "generation": stamp.generation, "version": stamp.version})
        }),
        "name": rescue.record.as_ref().map(|record| &record.name),
        "sizeBytes": rescue.record.as_ref().map(|record| record.size_bytes),
        "inSync": rescue.record.as_ref().map(|record| &record.in_sync),
        "replicas": replicas.collect::<Vec<_>>(),
    })
}

fn print(rescue: &Rescue, held: &Held) {
    println!("volume {}  {}", rescue.volume, verdict(rescue));
    if let (Some(record), Some(stamp)) = (&rescue.record, &rescue.newest) {
        let kind = if record.params.fs_type.is_empty() { "raw block" } else { &record.params.fs_type };
        println!(
            "  name      {}\n  content   {} MiB, {kind}, {} snapshots\n  newest    generation {}, version {}, epoch {}, lineage {}",
            record.name,
            record.size_bytes >> 20,
            record.committed().count(),
            stamp.generation,
            stamp.version,
            record.epoch.number,
            stamp.lineage
        );
    }
    for (id, (node, found)) in &rescue.replicas {
        let member = rescue.record.as_ref().is_some_and(|record| record.in_sync.contains(id));
        let set = if member { "in sync" } else { "not in sync" };
        println!("  replica   {id}  {:<16}  {set:<11}  {}  {}", node.0, whereabouts(*found), held.place(*id));
    }
    rescue.notes.iter().for_each(|note| println!("  {note}"));
    println!();
}
