//! Address leases, in sled.
//!
//! A lease is on stable storage before anything in the kernel refers to it, and leaves the store only after its
//! interface is gone: a kill at any point leaves at most a lease too many, which the next start or GC finds, never an
//! address that two pods have.
//!
//! A lease that a runtime was told of leaves behind that its addresses are held back, so an agent that is killed the next moment does
//! not hand them out early either. Rows are written in an order in which every prefix is right, because the store keeps the order: of
//! a release first what is held back, then that the lease is gone; of a lease first itself, then that nothing is held back any
//! more. An address with both rows is leased.
//!
//! ```text
//! "CONTAINER/IFNAME"  -> the lease, JSON
//! "/freed/ADDRESS"    -> nothing: the address is held back (no container's id begins with a slash)
//! ```

mod row;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::path::Path;
use std::time::{Duration, Instant};

use holdfast_net_core::bandwidth::Bandwidth;
use holdfast_net_core::ipam::{AddressRequest, AllocateError, Allocator, Quarantine, UsedUp};
use holdfast_net_core::nat::PortMapping;
use holdfast_net_core::objects::ObjectName;
use holdfast_net_core::plan::{EndpointPlan, MacAddr};
use ipnetwork::IpNetwork;
use tokio::sync::Mutex;

use crate::flusher::Flusher;
use row::{freed_address, freed_key, row_key, row_of};

pub use row::{AttachmentKey, Lease};

/// Why the store did not do what was asked.
#[derive(Debug, thiserror::Error)]
pub enum LeaseError {
    /// The store cannot be opened.
    #[error("cannot open the lease store in {path}; is another holdfast-netd using it?")]
    Open {
        /// Its folder.
        path: String,
        /// The store's answer.
        #[source]
        source: sled::Error,
    },
    /// The store failed.
    #[error("the lease store failed")]
    Store(#[from] sled::Error),
    /// A row is not what this program writes.
    #[error("the lease store holds an entry \"{key}\" that cannot be read")]
    Row {
        /// Its key.
        key: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// No address, or not the one that was asked for.
    #[error(transparent)]
    Allocate(#[from] AllocateError),
    /// The MAC that was asked for is in use on this node.
    #[error("the MAC {0} is another container's or the bridge's; choose another one")]
    MacTaken(MacAddr),
    /// A host port that was asked for is another attachment's.
    #[error("the host port {port} is container {holder}'s{}", .pod.as_ref().map(|pod| format!(" (pod {pod})")).unwrap_or_default())]
    HostPortTaken {
        /// The one that has it.
        port: PortMapping,
        /// Whose it is.
        holder: AttachmentKey,
        /// The holder's pod.
        pod: Option<ObjectName>,
    },
    /// The pod has no address of the family of the node's address.
    #[error("the host port {0} cannot lead to the pod: it has no address of that family")]
    HostPortFamily(PortMapping),
    /// The attachment has a lease.
    #[error("container {0} is attached already; DEL it first")]
    Exists(AttachmentKey),
}

/// The store.
pub struct Leases {
    flusher: Flusher,
    rows: sled::Tree,
    state: Mutex<State>,
}

struct State {
    leases: BTreeMap<AttachmentKey, Lease>,
    allocator: Allocator,
    sequence: u64,
    /// Addresses with a row that says they are held back. Those of ranges that the node does not have now are among them.
    freed_rows: BTreeSet<IpAddr>,
    /// Where its clock begins.
    started: Instant,
}

/// What an attachment's lease is to be like.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// Its addresses.
    pub addresses: AddressRequest,
    /// The MAC of the pod's end, if that was asked for.
    pub mac: Option<MacAddr>,
    /// Ports of the node that lead to it; on the node only once.
    pub host_ports: Vec<PortMapping>,
    /// Limits of its rate.
    pub bandwidth: Bandwidth,
}

impl Leases {
    /// Opens the store and reads all leases. Freed addresses are held back for `quarantine`, anew from now on.
    ///
    /// # Errors
    /// Another process holds it, or it is damaged.
    pub fn open(folder: &Path, quarantine: Duration) -> Result<Self, LeaseError> {
        let path = folder.join("leases");
        let open_error = |source| LeaseError::Open { path: path.display().to_string(), source };
        // Nothing is written without a flush that is waited for.
        let db = sled::Config::new().path(&path).cache_capacity(8 << 20).open().map_err(open_error)?;
        let rows = db.open_tree("attachments")?;
        let mut leases = BTreeMap::new();
        let mut freed_rows = BTreeSet::new();
        for row in &rows {
            let (key, value) = row?;
            if let Some(address) = freed_address(&key) {
                freed_rows.insert(address);
                continue;
            }
            let lease: Lease = serde_json::from_slice(&value).map_err(|source| LeaseError::Row {
                key: String::from_utf8_lossy(&key).into_owned(),
                source,
            })?;
            leases.insert(lease.key.clone(), lease);
        }
        let sequence = leases.values().map(|lease| lease.sequence).max().unwrap_or_default();
        let time_ms = u64::try_from(quarantine.as_millis()).unwrap_or(u64::MAX);
        let quarantine = Quarantine { time_ms, objects_since_ms: None };
        let allocator = Allocator::new(&[], &[], [], quarantine);
        let state = State { leases, allocator, sequence, freed_rows, started: Instant::now() };
        Ok(Self { flusher: Flusher::new(db), rows, state: Mutex::new(state) })
    }

    /// Sets the ranges to lease from; unchanged ranges cost nothing.
    pub async fn set_ranges(&self, ranges: &[IpNetwork]) {
        let mut state = self.state.lock().await;
        if state.allocator.ranges() == ranges {
            return;
        }
        let mut by_age: Vec<(u64, IpAddr)> = Vec::new();
        for lease in state.leases.values() {
            by_age.extend(lease.plan.addresses.iter().map(|address| (lease.sequence, *address)));
        }
        by_age.sort_unstable();
        let leased: Vec<IpAddr> = by_age.into_iter().map(|(_, address)| address).collect();
        // The rows do not say since when; from now on is never too short.
        let now_ms = state.now_ms();
        let freed: Vec<(u64, IpAddr)> = state.freed_rows.iter().map(|address| (now_ms, *address)).collect();
        state.allocator = Allocator::new(ranges, &leased, freed, state.allocator.quarantine());
    }

    /// Forgets that addresses were held back whose time is over, so that a start does not hold them back anew. Without a flush: a
    /// row that comes back costs its address the time once more.
    ///
    /// # Errors
    /// The store failed; what is left is forgotten another time.
    pub async fn forget_freed(&self) -> Result<(), LeaseError> {
        let mut state = self.state.lock().await;
        let now_ms = state.now_ms();
        state.allocator.free_what_is_over(now_ms);
        // Those of ranges that the node does not have now wait for a time that counts for them.
        let allocator = &state.allocator;
        let is_over = |address: &&IpAddr| allocator.has(**address) && !allocator.is_held_back(**address);
        let over: Vec<IpAddr> = state.freed_rows.iter().filter(is_over).copied().collect();
        // Under the lock: a lease of the address that begins and ends meanwhile leaves a row of its own.
        for address in over {
            self.rows.remove(freed_key(address))?;
            state.freed_rows.remove(&address);
        }
        Ok(())
    }

    /// Says whether the objects can be read: the time of what is held back counts only while they can.
    pub async fn set_objects(&self, are_there: bool) {
        let mut state = self.state.lock().await;
        let now_ms = state.now_ms();
        state.allocator.set_objects(are_there, now_ms);
    }

    /// Leases addresses in this process; [`Leases::mark_attached`] makes that durable. `mk_lease` completes the lease for the
    /// addresses. A kill in between leaves an interface without a lease, of which nobody was told: the next start removes it
    /// before it leases anything.
    ///
    /// # Errors
    /// No address is free, or the attachment exists; then nothing is leased.
    pub async fn reserve(
        &self,
        key: &AttachmentKey,
        wanted: &Wanted,
        mk_lease: impl FnOnce(u64, Vec<IpAddr>) -> Lease,
    ) -> Result<Lease, LeaseError> {
        let mut state = self.state.lock().await;
        if state.leases.contains_key(key) {
            return Err(LeaseError::Exists(key.clone()));
        }
        if let Some(mac) = wanted.mac {
            let has_it = |lease: &Lease| [lease.plan.mac, lease.plan.gateway_mac].contains(&mac);
            if state.leases.values().any(has_it) {
                return Err(LeaseError::MacTaken(mac));
            }
        }
        state.are_free(&wanted.host_ports)?;
        let now_ms = state.now_ms();
        let addresses = state.allocator.allocate(&wanted.addresses, now_ms)?;
        let has_family =
            |host_ip: IpAddr| addresses.iter().any(|address| address.is_ipv4() == host_ip.is_ipv4());
        if let Some(port) = wanted.host_ports.iter().find(|port| !port.host_ip.is_none_or(has_family)) {
            addresses.into_iter().for_each(|address| state.allocator.give_back(address));
            return Err(LeaseError::HostPortFamily(*port));
        }
        state.sequence += 1;
        let lease = mk_lease(state.sequence, addresses);
        state.leases.insert(key.clone(), lease.clone());
        Ok(lease)
    }

    /// Makes the lease durable, complete and as it was made, before ADD answers: a start after a kill then keeps what a runtime was
    /// told, and gives its addresses to nobody else.
    ///
    /// # Errors
    /// The store failed; whether the lease is durable is unknown.
    pub async fn mark_attached(&self, key: &AttachmentKey, made: &EndpointPlan) -> Result<(), LeaseError> {
        let mut state = self.state.lock().await;
        let State { leases, freed_rows, .. } = &mut *state;
        if let Some(lease) = leases.get_mut(key) {
            lease.attached = true;
            // It may have changed since the attachment began.
            let mtu = lease.plan.mtu;
            lease.plan = EndpointPlan { mtu, ..made.clone() };
            self.put(lease)?;
            // That they were held back once is over.
            for address in lease.plan.addresses.iter().filter(|address| freed_rows.remove(address)) {
                self.rows.remove(freed_key(*address))?;
            }
        }
        drop(state);
        self.flusher.flush().await?;
        Ok(())
    }

    /// Makes durable that attachments have another MTU now, and their pods' ends these limits. Those that are gone are passed over.
    ///
    /// # Errors
    /// The store failed; which of them are durable is unknown.
    pub async fn set_mtu(&self, attachments: &[(AttachmentKey, u32)], mtu: u32) -> Result<(), LeaseError> {
        let mut state = self.state.lock().await;
        for (key, limit) in attachments {
            let Some(lease) = state.leases.get_mut(key) else { continue };
            lease.follow_mtu(mtu, *limit);
            // One that is not complete has no row yet.
            if lease.attached {
                self.put(lease)?;
            }
        }
        drop(state);
        self.flusher.flush().await?;
        Ok(())
    }

    /// Gives a lease back, after its interface is gone. An unknown key is a success.
    ///
    /// The addresses of an attachment that a runtime was told of are held back; those of an ADD that failed are free at once:
    /// no other node ever knew them as that pod's.
    ///
    /// # Errors
    /// The store failed; the lease stays.
    pub async fn release(&self, key: &AttachmentKey) -> Result<(), LeaseError> {
        let Some(lease) = self.get(key).await else { return Ok(()) };
        let holds_back = lease.attached && self.state.lock().await.allocator.quarantine().time_ms > 0;
        for address in lease.plan.addresses.iter().filter(|_| holds_back) {
            self.rows.insert(freed_key(*address), &[])?;
        }
        // One that was complete is flushed also if its row is gone already: an earlier try may have failed between the two.
        if self.rows.remove(row_key(key))?.is_some() || lease.attached {
            self.flusher.flush().await?;
        }
        let mut state = self.state.lock().await;
        let now_ms = state.now_ms();
        if let Some(lease) = state.leases.remove(key) {
            for address in lease.plan.addresses {
                if holds_back {
                    state.freed_rows.insert(address);
                    state.allocator.release(address, now_ms);
                } else {
                    state.allocator.give_back(address);
                }
            }
        }
        Ok(())
    }

    /// One lease.
    pub async fn get(&self, key: &AttachmentKey) -> Option<Lease> {
        self.state.lock().await.leases.get(key).cloned()
    }

    /// All leases.
    pub async fn all(&self) -> Vec<Lease> {
        self.state.lock().await.leases.values().cloned().collect()
    }

    /// The family without a free address, if there is one.
    pub async fn used_up(&self) -> Option<UsedUp> {
        let mut state = self.state.lock().await;
        let now_ms = state.now_ms();
        state.allocator.used_up(now_ms)
    }

    /// How many freed addresses of the node's ranges are held back.
    pub async fn held_back(&self) -> usize {
        self.state.lock().await.allocator.held_back().count()
    }

    /// Waits until everything is on stable storage; for an orderly end.
    ///
    /// # Errors
    /// The store failed.
    pub async fn flush(&self) -> Result<(), LeaseError> {
        self.flusher.flush().await?;
        Ok(())
    }

    fn put(&self, lease: &Lease) -> Result<(), sled::Error> {
        self.rows.insert(row_key(&lease.key), row_of(lease)).map(drop)
    }
}

impl State {
    /// Whether no lease has any of these host ports.
    fn are_free(&self, host_ports: &[PortMapping]) -> Result<(), LeaseError> {
        for port in host_ports {
            let holder = self.leases.values().find_map(|lease| {
                Some((lease, lease.plan.host_ports.iter().find(|held| held.overlaps(port))?))
            });
            if let Some((lease, held)) = holder {
                let (holder, pod) = (lease.key.clone(), lease.pod.clone());
                return Err(LeaseError::HostPortTaken { port: *held, holder, pod });
            }
        }
        Ok(())
    }

    /// Milliseconds on the clock of the quarantine, which no one can set.
    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_net_core::plan::BridgePlan;

    fn mk_key(id: &str) -> AttachmentKey {
        AttachmentKey { container_id: id.to_owned(), ifname: "eth0".to_owned() }
    }

    async fn reserve(leases: &Leases, id: &str) -> Result<Lease, LeaseError> {
        let key = mk_key(id);
        let mk_lease = |sequence, addresses| Lease {
            key: key.clone(),
            sequence,
            network: "pods".into(),
            netns: "/run/netns/x".into(),
            pod: None,
            pod_uid: String::new(),
            attached: false,
            boot_id: String::new(),
            sandbox: None,
            told_mtu: 0,
            lowered_mtu: 0,
            plan: EndpointPlan::new(id, "eth0", addresses, &BridgePlan::for_node("n", 1450)),
        };
        leases.reserve(&key, &Wanted::default(), mk_lease).await
    }

    async fn attach(leases: &Leases, id: &str) -> Lease {
        let lease = reserve(leases, id).await.unwrap();
        leases.mark_attached(&lease.key, &lease.plan).await.unwrap();
        leases.get(&lease.key).await.unwrap()
    }

    #[tokio::test]
    async fn leases_survive_a_restart_and_a_used_up_range_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let range: Vec<IpNetwork> = vec!["10.0.0.0/30".parse().unwrap()];
        let first = {
            let leases = Leases::open(folder.path(), Duration::ZERO).unwrap();
            leases.set_ranges(&range).await;
            attach(&leases, "a").await
        };
        let leases = Leases::open(folder.path(), Duration::ZERO).unwrap();
        leases.set_ranges(&range).await;
        assert_eq!(leases.get(&mk_key("a")).await, Some(first.clone()));
        assert!(matches!(reserve(&leases, "a").await, Err(LeaseError::Exists(_))));
        let second = reserve(&leases, "b").await.unwrap();
        assert_ne!(first.plan.addresses, second.plan.addresses);
        assert!(matches!(reserve(&leases, "c").await, Err(LeaseError::Allocate(_))));
        leases.release(&mk_key("a")).await.unwrap();
        leases.release(&mk_key("a")).await.unwrap();
        assert_eq!(reserve(&leases, "c").await.unwrap().plan.addresses, first.plan.addresses);
    }

    /// What a process that is killed now leaves: its files as they stand. Nothing of the store's own ending runs.
    fn killed_now(folder: &Path) -> tempfile::TempDir {
        let left = tempfile::tempdir().unwrap();
        let copied =
            std::process::Command::new("cp").arg("-r").arg(folder.join("leases")).arg(left.path()).status();
        assert!(copied.unwrap().success());
        left
    }

    #[tokio::test]
    async fn mark_and_release_are_durable_when_they_return_and_a_reservation_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let leases = Leases::open(folder.path(), Duration::ZERO).unwrap();
        leases.set_ranges(&["10.0.0.0/24".parse().unwrap()]).await;
        let found = |left: &tempfile::TempDir, id: &str| {
            let state = Leases::open(left.path(), Duration::ZERO).unwrap().state.into_inner();
            state.leases.get(&mk_key(id)).map(|lease| lease.attached)
        };
        // Often enough that the store's own flush every half second does not pass for ours.
        for round in 0..10 {
            let id = format!("c{round}");
            let plan = reserve(&leases, &id).await.unwrap().plan;
            leases.set_mtu(&[(mk_key(&id), u32::MAX)], 1400).await.unwrap();
            assert_eq!(found(&killed_now(folder.path()), &id), None, "round {round}");
            leases.mark_attached(&mk_key(&id), &plan).await.unwrap();
            assert_eq!(found(&killed_now(folder.path()), &id), Some(true), "round {round}");
            leases.release(&mk_key(&id)).await.unwrap();
            assert_eq!(found(&killed_now(folder.path()), &id), None, "round {round}");
        }
    }

    #[tokio::test]
    async fn a_freed_address_is_held_back_also_after_a_kill_and_one_of_a_failed_add_is_not() {
        let folder = tempfile::tempdir().unwrap();
        let range: Vec<IpNetwork> = vec!["10.0.0.0/30".parse().unwrap()];
        let quarantine = Duration::from_millis(300);
        let leases = Leases::open(folder.path(), quarantine).unwrap();
        leases.set_ranges(&range).await;
        leases.set_objects(true).await;
        reserve(&leases, "a").await.unwrap();
        let told = reserve(&leases, "b").await.unwrap();
        // Nobody was told of a: it is free at once.
        leases.release(&mk_key("a")).await.unwrap();
        let again = attach(&leases, "c").await;
        leases.mark_attached(&mk_key("b"), &told.plan).await.unwrap();
        leases.release(&mk_key("b")).await.unwrap();
        assert!(matches!(reserve(&leases, "d").await, Err(LeaseError::Allocate(_))));
        let left = killed_now(folder.path());

        let after = Leases::open(left.path(), quarantine).unwrap();
        after.set_ranges(&range).await;
        assert_eq!(after.held_back().await, 1);
        tokio::time::sleep(quarantine).await;
        assert!(reserve(&after, "d").await.is_err(), "objects were not read yet");
        after.set_objects(true).await;
        assert!(reserve(&after, "d").await.is_err(), "the time begins with the objects");
        tokio::time::sleep(quarantine).await;
        // What is reserved and not complete is held back anew by a start, like before.
        let lease = reserve(&after, "d").await.unwrap();
        assert_ne!(lease.plan.addresses, again.plan.addresses);
        let early = Leases::open(killed_now(left.path()).path(), quarantine).unwrap();
        assert_eq!(early.state.into_inner().freed_rows.len(), 1);
        after.mark_attached(&lease.key, &lease.plan).await.unwrap();
        assert_eq!(after.held_back().await, 0);
        // Its row went with the lease: the next start holds nothing back.
        let left = killed_now(left.path());
        let last = Leases::open(left.path(), quarantine).unwrap();
        assert!(last.state.into_inner().freed_rows.is_empty());
    }

    #[tokio::test]
    async fn a_start_does_not_hold_back_anew_what_was_held_back_long_enough() {
        let folder = tempfile::tempdir().unwrap();
        let time = Duration::from_millis(50);
        for forgets in [false, true] {
            let leases = Leases::open(folder.path(), time).unwrap();
            leases.set_ranges(&["10.42.1.0/24".parse().unwrap()]).await;
            leases.set_objects(true).await;
            let lease = attach(&leases, "c").await;
            leases.release(&lease.key).await.unwrap();
            leases.forget_freed().await.unwrap();
            assert!(leases.held_back().await > 0, "not before its time");
            tokio::time::sleep(2 * time).await;
            if forgets {
                leases.forget_freed().await.unwrap();
            }
            leases.flush().await.unwrap();
            drop(leases);
            let leases = Leases::open(folder.path(), time).unwrap();
            leases.set_ranges(&["10.42.1.0/24".parse().unwrap()]).await;
            assert_eq!(leases.held_back().await > 0, !forgets);
        }
    }

    #[tokio::test]
    async fn a_burst_of_attachments_shares_flushes_and_all_of_them_end() {
        let folder = tempfile::tempdir().unwrap();
        let leases = std::sync::Arc::new(Leases::open(folder.path(), Duration::ZERO).unwrap());
        leases.set_ranges(&["10.0.0.0/24".parse().unwrap()]).await;
        let mut all = tokio::task::JoinSet::new();
        for number in 0..200 {
            let leases = std::sync::Arc::clone(&leases);
            all.spawn(async move { attach(&leases, &format!("c{number}")).await });
        }
        let ended = tokio::time::timeout(Duration::from_secs(30), all.join_all()).await;
        assert_eq!(ended.expect("the store is stuck").len(), 200);
        let left = Leases::open(killed_now(folder.path()).path(), Duration::ZERO).unwrap();
        assert_eq!(left.all().await.len(), 200, "what was answered is durable");
    }

    #[tokio::test]
    async fn a_store_that_is_held_by_another_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let _held = Leases::open(folder.path(), Duration::ZERO).unwrap();
        let Err(error) = Leases::open(folder.path(), Duration::ZERO) else { panic!("opened twice") };
        assert!(error.to_string().contains("another holdfast-netd"), "{error}");
    }
}
