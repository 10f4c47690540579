//! Brings each volume's replicas to where they belong, step by step ([`super::steps`]); part of the sweep.
//!
//! A controller that has just started counts each node's silence from its own start. Whatever fails is told in the volume's
//! conditions, and tried again by the next sweep.

use std::collections::BTreeMap;
use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use futures::future::join_all;
use holdfast_proto::storage::BringInSyncRequest;
use holdfast_proto::storage::volume_jobs_client::VolumeJobsClient;
use holdfast_storage_core::ids::{NodeName, ReplicaId, VolumeId};
use holdfast_storage_core::node_directory::{NodeInfo, NodeState};
use holdfast_storage_core::rebalance::{Move, NodeFill, Placed, rebalance};
use holdfast_storage_core::record::{ReplicaRecord, VolumeRecord};
use holdfast_storage_core::target::Job;
use holdfast_storage_core::transitions;
use tonic::{Code, Status};

use super::Inner;
use super::create::promisable;
use super::pools::within;
use super::replace::{Because, never_in_sync};
use super::steps::{Nodes, Step, steps, stuck};
use crate::status::from_store;

/// New replicas of all volumes that are being rebuilt at most before a further one is listed: a rack that is gone must not
/// turn into as many rebuilds at once as it had replicas.
const REBUILDS_MAX: usize = 8;
/// Volumes that nobody attaches for which a target is run at most at a time.
pub(super) const TENDED_MAX: usize = 8;
/// How long one such run is waited for; it goes on where it was in the next sweep.
const TEND_TIMEOUT: std::time::Duration = std::time::Duration::from_secs(3600);

/// Volumes that want a target to be run, with their replicas as they were when that was found.
pub(super) type ToTend = BTreeMap<VolumeId, BTreeMap<ReplicaId, ReplicaRecord>>;

impl Inner {
    /// Does what can be done now.
    pub(super) async fn heal(&self, records: &[VolumeRecord]) -> Result<(), Status> {
        let Some(alive) = self.alive_nodes() else { return Ok(()) };
        let lost = |node: &NodeName| self.is_lost(node);
        let (leaving, removed) =
            (|node: &NodeName| self.is_leaving(node), |node: &NodeName| self.is_removed(node));
        let fills = self.fills(records);
        let filled = |name: &NodeName| fills.get(name).map_or(0, NodeFill::filled);
        let nodes =
            Nodes { alive: &alive, lost: &lost, leaving: &leaving, removed: &removed, filled: &filled };
        let mut rebuilds =
            records.iter().flat_map(|r| r.replicas.values()).filter(|r| never_in_sync(r)).count();
        let (mut outcome, mut failures, mut to_tend) = (Ok(()), BTreeMap::new(), ToTend::new());
        let mut moving = false;
        for record in records {
            let volume = record.volume_id;
            failures.extend(stuck(record, &nodes).map(|why| (volume, why.to_owned())));
            for step in steps(record, &nodes) {
                let makes_one = matches!(step, Step::Renew(_));
                if makes_one && rebuilds >= REBUILDS_MAX {
                    failures.insert(volume, format!("{rebuilds} replicas are being rebuilt first"));
                    continue;
                }
                if step == Step::BringInSync {
                    to_tend.insert(volume, record.replicas.clone());
                    continue;
                }
                match self.take(volume, step).await {
                    Ok(()) => {
                        rebuilds += usize::from(makes_one);
                        moving = true;
                    }
                    // A call is at it, or the record moved: the next sweep looks again.
                    Err(status) if status.code() == Code::Aborted => {}
                    Err(status) => {
                        failures.insert(volume, status.message().to_owned());
                        outcome = Err(status);
                    }
                }
            }
            // Its target is at it, and tells nobody when it is done.
            moving |= record.replicas.values().any(|r| leaving(&r.node)) && !failures.contains_key(&volume);
        }
        if !moving && rebuilds == 0 && outcome.is_ok() {
            match self.rebalance(records, &fills).await {
                Ok(begun) => moving = begun,
                Err(status) => outcome = Err(status),
            }
        }
        self.moving.store(moving, Ordering::Relaxed);
        *self.unhealed.lock().unwrap_or_else(PoisonError::into_inner) = failures;
        *self.to_tend.lock().unwrap_or_else(PoisonError::into_inner) = to_tend;
        outcome
    }

    async fn take(&self, volume: VolumeId, step: Step) -> Result<(), Status> {
        match step {
            Step::Forget(replica) => {
                let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
                self.remove_old(volume, replica).await
            }
            Step::Make(replica) => {
                let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
                let record = self.store.read(volume).await.map_err(from_store)?.record;
                if record.deleting || !record.replicas.get(&replica).is_some_and(never_in_sync) {
                    return Ok(());
                }
                self.make_empty(&record, replica).await
            }
            Step::Renew(because) => self.renew(volume, because).await.map(drop),
            Step::TakeOut(replica) => {
                self.job(volume, Job::RemoveReplica { replica }).await?;
                tracing::info!(%volume, %replica, "a replica is taken out, as others take its place");
                Ok(())
            }
            Step::GiveUp(replica) => {
                self.change(volume, |record| transitions::fault_replica(record, replica)).await.map(drop)
            }
            // Takes longer than a sweep.
            Step::BringInSync => Ok(()),
        }
    }

    /// How full each node is that answers and that replicas may go to.
    fn fills(&self, records: &[VolumeRecord]) -> BTreeMap<NodeName, NodeFill> {
        let active =
            self.book.alive().into_iter().filter(|info| self.book.state(&info.name) == NodeState::Active);
        let fill = |info: NodeInfo| {
            let promisable_bytes = promisable(info.capacity_bytes, self.overprovision_percent);
            (
                info.name.clone(),
                NodeFill {
                    name: info.name,
                    promisable_bytes,
                    promised_bytes: 0,
                    zone: info.zone,
                    pool_class: info.pool_class,
                },
            )
        };
        let mut fills: BTreeMap<NodeName, NodeFill> = active.map(fill).collect();
        for (record, replica) in
            records.iter().flat_map(|r| r.replicas.values().map(move |replica| (r, replica)))
        {
            if let Some(fill) = fills.get_mut(&replica.node) {
                fill.promised_bytes = fill.promised_bytes.saturating_add(record.size_bytes);
            }
        }
        fills
    }

    /// Begins to move one replica, if that makes the nodes more alike; the sweeps that follow end it. Not while anything else
    /// is on its way: what that changes is not known yet.
    async fn rebalance(
        &self,
        records: &[VolumeRecord],
        fills: &BTreeMap<NodeName, NodeFill>,
    ) -> Result<bool, Status> {
        let whole = |record: &&VolumeRecord| {
            let as_wanted = record.params.replicas as usize;
            !record.is_gone() && record.in_sync.len() == as_wanted && record.replicas.len() == as_wanted
        };
        let Some(above) = self.rebalance_above_percent else { return Ok(false) };
        if !records.iter().all(|record| record.is_gone() || whole(&record)) {
            return Ok(false);
        }
        let placed = |record: &VolumeRecord| Placed {
            volume: record.volume_id,
            size_bytes: record.size_bytes,
            nodes: record.replicas.values().map(|replica| replica.node.clone()).collect(),
            attached_to: record.attached_to.clone(),
            rules: record.params.placement.clone(),
        };
        let placed: Vec<Placed> = records.iter().filter(whole).map(placed).collect();
        let fills: Vec<NodeFill> = fills.values().cloned().collect();
        let Some(Move { volume, from, to }) = rebalance(&fills, &placed, u64::from(above) * 10) else {
            return Ok(false);
        };
        tracing::info!(%volume, %from, %to, "a replica moves, as its node is much fuller than others");
        self.renew(volume, Because::Rebalancing { from, to }).await.map(|_| true)
    }

    /// The volumes for which the last sweep wants a target to be run.
    pub(super) fn to_tend(&self) -> ToTend {
        self.to_tend.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Runs a target of a volume that nobody attaches, until its replicas are in sync or none gets nearer. Cancellation safe:
    /// the data process goes on.
    pub(super) async fn bring_in_sync(&self, volume: VolumeId) {
        if let Err(status) = self.try_to_bring_in_sync(volume).await {
            tracing::info!(%volume, %status, "not all replicas of a volume are in sync that nobody attaches; looked at again");
        }
    }

    async fn try_to_bring_in_sync(&self, volume: VolumeId) -> Result<(), Status> {
        let record = {
            // What a call is doing comes first; what comes later fences the target, or is done by it.
            let _by_id = self.in_flight.begin(format!("volume {volume}"))?;
            self.make_reachable(volume).await?
        };
        let node = self.workplace(&record)?;
        let mut client = VolumeJobsClient::new(self.pools.channel(&self.pools.known(&node)?)?);
        let request = BringInSyncRequest { volume_id: volume.to_string() };
        within(TEND_TIMEOUT, &node, client.bring_in_sync(request)).await.map(drop)
    }

    /// All that the last sweep wants, to the end.
    pub(super) async fn tend_all(&self) {
        join_all(self.to_tend().into_keys().take(TENDED_MAX).map(|volume| self.bring_in_sync(volume))).await;
    }

    /// Silent for as long as the operator set, or removed.
    pub(super) fn is_lost(&self, node: &NodeName) -> bool {
        let silent = || self.replace_after.is_some_and(|after| self.book.silent_for(node) >= after);
        self.is_removed(node) || silent()
    }

    pub(super) fn is_removed(&self, node: &NodeName) -> bool {
        self.book.state(node) == NodeState::Removed
    }

    pub(super) fn is_leaving(&self, node: &NodeName) -> bool {
        self.book.state(node) != NodeState::Active
    }
}
