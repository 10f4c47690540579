//! Address leases, in sled.
//!
//! A lease is on stable storage before anything in the kernel refers to it, and leaves the store only after its
//! interface is gone: a kill at any point leaves at most a lease too many, which the next start or GC finds, never an
//! address that two pods have.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::Path;

use holdfast_net_core::ipam::{Allocator, RangeUsedUp};
use holdfast_net_core::plan::EndpointPlan;
use holdfast_net_core::policy::Subject;
use ipnetwork::IpNetwork;
use serde::{Deserialize, Serialize};
use tokio::sync::Mutex;

/// Names an attachment.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AttachmentKey {
    /// CNI_CONTAINERID.
    pub container_id: String,
    /// CNI_IFNAME.
    pub ifname: String,
}

impl std::fmt::Display for AttachmentKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.container_id, self.ifname)
    }
}

/// One lease: everything that is needed to rebuild, check or remove the attachment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lease {
    /// The attachment.
    pub key: AttachmentKey,
    /// Rises with every lease; the search for free addresses goes on after the newest.
    pub sequence: u64,
    /// Name of the network configuration.
    pub network: String,
    /// Path of the sandbox when it was attached.
    pub netns: String,
    /// Pod that was named, with its uid.
    pub pod: Option<holdfast_net_core::objects::ObjectName>,
    /// K8S_POD_UID; may be empty.
    pub pod_uid: String,
    /// The attachment is complete. Durable before ADD answers: a start undoes every lease without it.
    pub attached: bool,
    /// Interfaces and addresses.
    pub plan: EndpointPlan,
}

impl Lease {
    /// The endpoint as the policy compiler sees it.
    #[must_use]
    pub fn subject(&self) -> Subject {
        Subject { pod: self.pod.clone(), uid: self.pod_uid.clone(), addresses: self.plan.addresses.clone() }
    }
}

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
    /// No address left.
    #[error(transparent)]
    UsedUp(#[from] RangeUsedUp),
    /// The attachment has a lease.
    #[error("container {0} is attached already; DEL it first")]
    Exists(AttachmentKey),
}

/// The store.
pub struct Leases {
    db: sled::Db,
    rows: sled::Tree,
    state: Mutex<State>,
}

struct State {
    leases: BTreeMap<AttachmentKey, Lease>,
    allocator: Allocator,
    sequence: u64,
}

impl Leases {
    /// Opens the store and reads all leases.
    ///
    /// # Errors
    /// Another process holds it, or it is damaged.
    pub fn open(folder: &Path) -> Result<Self, LeaseError> {
        let path = folder.join("leases");
        let open_error = |source| LeaseError::Open { path: path.display().to_string(), source };
        // Nothing is written without a flush that is waited for.
        let db = sled::Config::new().path(&path).cache_capacity(8 << 20).open().map_err(open_error)?;
        let rows = db.open_tree("attachments")?;
        let mut leases = BTreeMap::new();
        for row in &rows {
            let (key, value) = row?;
            let lease: Lease = serde_json::from_slice(&value).map_err(|source| LeaseError::Row {
                key: String::from_utf8_lossy(&key).into_owned(),
                source,
            })?;
            leases.insert(lease.key.clone(), lease);
        }
        let sequence = leases.values().map(|lease| lease.sequence).max().unwrap_or_default();
        let state = State { leases, allocator: Allocator::new(&[], &[]), sequence };
        Ok(Self { db, rows, state: Mutex::new(state) })
    }

    /// Sets the ranges to lease from; unchanged ranges cost nothing.
    pub async fn set_ranges(&self, ranges: &[IpNetwork]) {
        let mut state = self.state.lock().await;
        if state.allocator.ranges() != ranges {
            let mut by_age: Vec<(u64, IpAddr)> = Vec::new();
            for lease in state.leases.values() {
                by_age.extend(lease.plan.addresses.iter().map(|address| (lease.sequence, *address)));
            }
            by_age.sort_unstable();
            let leased: Vec<IpAddr> = by_age.into_iter().map(|(_, address)| address).collect();
            state.allocator = Allocator::new(ranges, &leased);
        }
    }

    /// Leases addresses and makes that durable. `mk_lease` completes the row for the addresses.
    ///
    /// # Errors
    /// No address is free, the attachment exists, or the store failed; then nothing is leased.
    pub async fn reserve(
        &self,
        key: &AttachmentKey,
        mk_lease: impl FnOnce(u64, Vec<IpAddr>) -> Lease,
    ) -> Result<Lease, LeaseError> {
        let mut state = self.state.lock().await;
        if state.leases.contains_key(key) {
            return Err(LeaseError::Exists(key.clone()));
        }
        let addresses = state.allocator.allocate()?;
        state.sequence += 1;
        let lease = mk_lease(state.sequence, addresses);
        state.leases.insert(key.clone(), lease.clone());
        drop(state);
        let stored = async {
            self.put(&lease)?;
            // Concurrent reservations share a flush.
            self.db.flush_async().await.map(drop)
        };
        if let Err(error) = stored.await {
            // The row may or may not be on disk: the address stays out of use until a start reads the truth.
            self.state.lock().await.leases.remove(key);
            return Err(error.into());
        }
        Ok(lease)
    }

    /// Makes durable that the attachment is complete, before ADD answers: a start after a kill then keeps what a
    /// runtime was told.
    ///
    /// # Errors
    /// The store failed; whether the mark is durable is unknown.
    pub async fn mark_attached(&self, key: &AttachmentKey) -> Result<(), LeaseError> {
        let mut state = self.state.lock().await;
        if let Some(lease) = state.leases.get_mut(key) {
            lease.attached = true;
            self.put(lease)?;
        }
        drop(state);
        self.db.flush_async().await?;
        Ok(())
    }

    /// Gives a lease back, after its interface is gone. An unknown key is a success.
    ///
    /// # Errors
    /// The store failed; the lease stays.
    pub async fn release(&self, key: &AttachmentKey) -> Result<(), LeaseError> {
        let known = self.state.lock().await.leases.contains_key(key);
        if !known {
            return Ok(());
        }
        self.rows.remove(row_key(key))?;
        self.db.flush_async().await?;
        let mut state = self.state.lock().await;
        if let Some(lease) = state.leases.remove(key) {
            for address in lease.plan.addresses {
                state.allocator.release(address);
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

    /// The range without a free address, if there is one.
    pub async fn used_up(&self) -> Option<RangeUsedUp> {
        self.state.lock().await.allocator.used_up()
    }

    /// Waits until everything is on stable storage; for an orderly end.
    ///
    /// # Errors
    /// The store failed.
    pub async fn flush(&self) -> Result<(), LeaseError> {
        self.db.flush_async().await?;
        Ok(())
    }

    fn put(&self, lease: &Lease) -> Result<(), sled::Error> {
        // Plain strings, numbers and lists are always representable.
        let text = serde_json::to_vec(lease).expect("a lease is representable as JSON");
        self.rows.insert(row_key(&lease.key), text).map(drop)
    }
}

fn row_key(key: &AttachmentKey) -> String {
    // Neither part can contain a slash (CNI env checks).
    format!("{}/{}", key.container_id, key.ifname)
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
            plan: EndpointPlan::new(id, "eth0", addresses, &BridgePlan::for_node("n", 1450)),
        };
        leases.reserve(&key, mk_lease).await
    }

    #[tokio::test]
    async fn leases_survive_a_restart_and_a_used_up_range_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let range: Vec<IpNetwork> = vec!["10.0.0.0/30".parse().unwrap()];
        let first = {
            let leases = Leases::open(folder.path()).unwrap();
            leases.set_ranges(&range).await;
            reserve(&leases, "a").await.unwrap()
        };
        let leases = Leases::open(folder.path()).unwrap();
        leases.set_ranges(&range).await;
        assert_eq!(leases.get(&mk_key("a")).await, Some(first.clone()));
        assert!(matches!(reserve(&leases, "a").await, Err(LeaseError::Exists(_))));
        let second = reserve(&leases, "b").await.unwrap();
        assert_ne!(first.plan.addresses, second.plan.addresses);
        assert!(matches!(reserve(&leases, "c").await, Err(LeaseError::UsedUp(_))));
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
    async fn reserve_mark_and_release_are_durable_when_they_return() {
        let folder = tempfile::tempdir().unwrap();
        let leases = Leases::open(folder.path()).unwrap();
        leases.set_ranges(&["10.0.0.0/24".parse().unwrap()]).await;
        let found = |left: &tempfile::TempDir, id: &str| {
            let state = Leases::open(left.path()).unwrap().state.into_inner();
            state.leases.get(&mk_key(id)).map(|lease| lease.attached)
        };
        // Often enough that the store's own flush every half second does not pass for ours.
        for round in 0..10 {
            let id = format!("c{round}");
            reserve(&leases, &id).await.unwrap();
            assert_eq!(found(&killed_now(folder.path()), &id), Some(false), "round {round}");
            leases.mark_attached(&mk_key(&id)).await.unwrap();
            assert_eq!(found(&killed_now(folder.path()), &id), Some(true), "round {round}");
            leases.release(&mk_key(&id)).await.unwrap();
            assert_eq!(found(&killed_now(folder.path()), &id), None, "round {round}");
        }
    }

    #[tokio::test]
    async fn a_store_that_is_held_by_another_says_so() {
        let folder = tempfile::tempdir().unwrap();
        let _held = Leases::open(folder.path()).unwrap();
        let Err(error) = Leases::open(folder.path()) else { panic!("opened twice") };
        assert!(error.to_string().contains("another holdfast-netd"), "{error}");
    }
}
