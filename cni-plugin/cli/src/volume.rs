//! `holdfast volume`: what is known of a volume, and what an operator decides about its replicas.

use std::process::ExitCode;
use std::time::Duration;

use clap::Subcommand;
use holdfast_proto::storage::data_client::DataClient;
use holdfast_proto::storage::{GetStatusRequest, PromoteReplicaRequest, ReplaceReplicaRequest};
use serde_json::json;

use crate::{connect, in_brackets, operator, refusal};

/// A replica is listed and made within this.
const REPLACE_TIMEOUT: Duration = Duration::from_secs(60);
/// A promotion waits for more than a minute before it decides.
const PROMOTE_TIMEOUT: Duration = Duration::from_secs(180);

#[derive(Subcommand)]
pub enum Verb {
    /// State of a volume that is attached to this node, and of its replicas.
    Status {
        /// The volume's id.
        volume: String,
        /// Socket of the data process.
        #[arg(long, default_value = "/run/holdfast/data.sock")]
        socket: String,
        /// One JSON object.
        #[arg(long)]
        json: bool,
    },
    /// Gives up a replica that is out of sync, and has a new one built on another node.
    ReplaceReplica {
        /// The volume's id.
        volume: String,
        /// The replica's; without it a replica is added, where the volume has fewer than wanted.
        replica: Option<String>,
        /// Socket of the controller.
        #[arg(long, default_value = "/run/holdfast/csi-controller.sock")]
        socket: String,
    },
    /// Makes one replica the volume's only one, as it is, after all that were in sync are lost for ever.
    ///
    /// What they alone had is gone. The volume must not be published; the call takes more than a minute.
    PromoteReplica {
        /// The volume's id.
        volume: String,
        /// The replica's.
        replica: String,
        /// Your word for it.
        #[arg(long, required = true)]
        yes_the_others_are_lost: bool,
        /// Socket of the controller.
        #[arg(long, default_value = "/run/holdfast/csi-controller.sock")]
        socket: String,
    },
}

pub async fn run(verb: Verb) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Status { volume, socket, json } => status(volume, &socket, json).await,
        Verb::ReplaceReplica { volume, replica, socket } => {
            replace(volume, replica.unwrap_or_default(), &socket).await
        }
        Verb::PromoteReplica { volume, replica, socket, .. } => promote(volume, replica, &socket).await,
    }
}

async fn replace(volume_id: String, replica_id: String, socket: &str) -> anyhow::Result<ExitCode> {
    let mut client = operator(socket, REPLACE_TIMEOUT).await?;
    let request = ReplaceReplicaRequest { volume_id, replica_id };
    let reply = client.replace_replica(request).await.map_err(refusal)?.into_inner();
    if reply.replica_id.is_empty() {
        println!("it was replaced before; nothing is left to be done");
    } else {
        println!("replica {} is to be built on node {}", reply.replica_id, reply.node);
    }
    Ok(ExitCode::SUCCESS)
}

async fn promote(volume_id: String, replica_id: String, socket: &str) -> anyhow::Result<ExitCode> {
    let mut client = operator(socket, PROMOTE_TIMEOUT).await?;
    let request = PromoteReplicaRequest { volume_id, replica_id: replica_id.clone() };
    let reply = client.promote_replica(request).await.map_err(refusal)?.into_inner();
    println!("replica {replica_id} is the volume's only one now");
    for replica in reply.given_up {
        println!("replica {replica} is given up; replace it once the data is as you want it");
    }
    Ok(ExitCode::SUCCESS)
}

async fn status(volume: String, socket: &str, as_json: bool) -> anyhow::Result<ExitCode> {
    let mut client = DataClient::new(connect(socket, "data process").await?);
    let request = GetStatusRequest { volume_id: volume.clone() };
    let reply = client.get_status(request).await.map_err(refusal)?.into_inner();
    let epoch = reply.epoch.map(|epoch| epoch.number).unwrap_or_default();
    if as_json {
        let replicas = reply.replicas.iter().map(|replica| {
            json!({
                "replica": replica.replica_id, "node": replica.node, "state": replica.state,
                "resyncBytesDone": replica.resync_bytes_done, "resyncBytesTotal": replica.resync_bytes_total,
            })
        });
        let object = json!({
            "volume": volume, "state": reply.state, "reason": reply.reason, "generation": reply.generation,
            "epoch": epoch, "device": reply.device, "writesAcknowledged": reply.writes_acknowledged,
            "longestStallMs": reply.longest_stall_ms, "replicas": replicas.collect::<Vec<_>>(),
        });
        println!("{object}");
        return Ok(ExitCode::SUCCESS);
    }
    println!("volume      {volume}");
    println!("state       {}{}", reply.state, in_brackets(&reply.reason));
    println!("generation  {}, epoch {epoch}", reply.generation);
    println!("device      {}", if reply.device.is_empty() { "-" } else { &reply.device });
    println!(
        "writes      {} acknowledged, longest stall {} ms",
        reply.writes_acknowledged, reply.longest_stall_ms
    );
    println!("{:<32}  {:<16}  {:<12}  resync", "replica", "node", "state");
    for replica in reply.replicas {
        let resync = match replica.resync_bytes_total {
            0 => "-".to_owned(),
            total => format!("{} of {total} bytes", replica.resync_bytes_done),
        };
        println!("{:<32}  {:<16}  {:<12}  {resync}", replica.replica_id, replica.node, replica.state);
    }
    Ok(ExitCode::SUCCESS)
}
