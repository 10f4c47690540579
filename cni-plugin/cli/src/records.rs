//! `holdfast records`: the volume records of a store that is lost, from the copies that the replicas keep.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Args, Subcommand};
use holdfast_proto::storage::{RescueRecordsReply, RescueRecordsRequest, RescueVerdict, RescuedVolume};
use serde_json::{Value, json};

use crate::{in_brackets, operator, refusal};

/// Every node reads what all its replicas keep.
const RESCUE_TIMEOUT: Duration = Duration::from_secs(600);

#[derive(Subcommand)]
pub enum Verb {
    /// Shows which volumes have replicas and no record, and restores them if asked to.
    ///
    /// Each node that is alive tells what its replicas know and which record they keep a copy of. The newest copy counts. A
    /// volume is sound if all its replicas in sync were found and none knows better; else it is in doubt, and restored only if it
    /// is named. A record that is there is never changed. A restored volume is served once all its replicas agree with it.
    /// Exits with 0 when nothing is left to do, 1 when a volume is not restored, 2 on an error.
    Rescue(Options),
}

#[derive(Args)]
pub struct Options {
    /// Restore every volume about which there is no doubt. Only if the record store was lost whole.
    #[arg(long)]
    apply: bool,
    /// Restore this volume, doubt or not; may be given several times.
    #[arg(long = "volume", value_name = "ID")]
    volumes: Vec<String>,
    /// One JSON object.
    #[arg(long)]
    json: bool,
    /// Socket of the controller.
    #[arg(long, default_value = "/run/holdfast/csi-controller.sock")]
    socket: String,
}

pub async fn run(verb: Verb) -> anyhow::Result<ExitCode> {
    let Verb::Rescue(options) = verb;
    let client = operator(&options.socket, RESCUE_TIMEOUT).await?;
    let mut client = client.max_decoding_message_size(crate::REPLY_BYTES_MAX);
    let request = RescueRecordsRequest { all_sound: options.apply, volume_ids: options.volumes };
    let reply = client.rescue_records(request).await.map_err(refusal)?.into_inner();
    if options.json {
        println!("{}", as_json(&reply));
    } else {
        print(&reply, options.apply);
    }
    let left = |volume: &RescuedVolume| volume.verdict() != RescueVerdict::Present && !volume.restored;
    let whole = !reply.volumes.iter().any(left) && reply.nodes.iter().all(|node| node.error.is_empty());
    Ok(if whole { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

fn print(reply: &RescueRecordsReply, applied: bool) {
    for node in &reply.nodes {
        let state =
            if node.error.is_empty() { format!("{} replicas", node.replicas) } else { node.error.clone() };
        println!("node {:<24}  {state}", node.name);
        for replica in &node.unreadable {
            println!("  replica {replica} cannot be read: nobody knows of which volume it is");
        }
    }
    let (present, missing): (Vec<_>, Vec<_>) =
        reply.volumes.iter().partition(|volume| volume.verdict() == RescueVerdict::Present);
    println!("{} volumes have their record, {} do not", present.len(), missing.len());
    for volume in &missing {
        print_volume(volume);
    }
    let sound =
        missing.iter().filter(|volume| volume.verdict() == RescueVerdict::Sound && !volume.restored).count();
    if sound > 0 && !applied {
        println!("--apply restores the {sound} that are sound; --volume ID restores one that is in doubt");
    }
}

fn print_volume(volume: &RescuedVolume) {
    let state = match volume.verdict() {
        _ if volume.restored => "restored",
        RescueVerdict::Sound => "sound",
        RescueVerdict::Doubtful => "in doubt",
        RescueVerdict::Impossible => "not restored",
        RescueVerdict::Present | RescueVerdict::Unspecified => "",
    };
    println!("\nvolume {}  {state}", volume.volume_id);
    if !volume.name.is_empty() {
        let kind = if volume.fs_type.is_empty() { "raw block" } else { &volume.fs_type };
        let encrypted = if volume.encrypted { ", encrypted" } else { "" };
        println!(
            "  name      {}\n  content   {} MiB, {kind}{encrypted}, {} snapshots",
            volume.name,
            volume.size_bytes >> 20,
            volume.snapshots
        );
        println!(
            "  newest    generation {}, version {}, epoch {}",
            volume.generation,
            volume.version,
            volume.epoch.map(|epoch| epoch.number).unwrap_or_default()
        );
    }
    for replica in &volume.replicas {
        let missing = if replica.whereabouts == "here" { "" } else { &replica.whereabouts };
        println!(
            "  replica   {}  {:<16}  {}{}",
            replica.replica_id,
            replica.node,
            replica.state,
            in_brackets(missing)
        );
    }
    for note in &volume.notes {
        println!("  {note}");
    }
    if !volume.error.is_empty() {
        println!("  error: {}", volume.error);
    }
}

fn as_json(reply: &RescueRecordsReply) -> Value {
    let node = |node: &holdfast_proto::storage::RescueNode| {
        json!({
            "node": node.name, "error": node.error, "replicas": node.replicas, "unreadable": node.unreadable,
        })
    };
    json!({
        "nodes": reply.nodes.iter().map(node).collect::<Vec<_>>(),
        "volumes": reply.volumes.iter().map(volume_json).collect::<Vec<_>>(),
    })
}

fn volume_json(volume: &RescuedVolume) -> Value {
    let verdict = match volume.verdict() {
        RescueVerdict::Unspecified => "unspecified",
        RescueVerdict::Present => "present",
        RescueVerdict::Sound => "sound",
        RescueVerdict::Doubtful => "doubtful",
        RescueVerdict::Impossible => "impossible",
    };
    let replicas = volume.replicas.iter().map(|replica| {
        json!({
            "replica": replica.replica_id, "node": replica.node, "state": replica.state,
            "whereabouts": replica.whereabouts,
        })
    });
    json!({
        "volume": volume.volume_id, "verdict": verdict, "restored": volume.restored, "error": volume.error,
        "notes": volume.notes, "name": volume.name, "sizeBytes": volume.size_bytes, "fsType": volume.fs_type,
        "encrypted": volume.encrypted, "snapshots": volume.snapshots, "generation": volume.generation,
        "version": volume.version, "epoch": volume.epoch.map(|epoch| epoch.number).unwrap_or_default(),
        "replicas": replicas.collect::<Vec<_>>(),
    })
}
