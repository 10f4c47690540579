//! Links that can be cut: a proxy that holds bytes back, in both directions, and lets them go when it heals.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use holdfast_engine::DataProcess;
use holdfast_storage_core::ids::{NodeName, RecordVersion, VolumeId};
use holdfast_storage_core::node_directory::{NodeDirectory, NodeInfo};
use holdfast_storage_core::record::VolumeRecord;
use holdfast_storage_core::record_store::{RecordStore, StoreError, StoreFuture, Versioned};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

use super::store::MemStore;

#[derive(Clone, Default)]
struct Cut {
    all: bool,
    addresses: Vec<String>,
}

impl Cut {
    fn holds(&self, address: &str) -> bool {
        self.all || self.addresses.iter().any(|cut| cut == address)
    }
}

struct Proxy {
    address: String,
    /// Bytes that the node sent through it.
    sent: Arc<AtomicU64>,
}

/// One node's view of the others and of the store, which can be cut off.
pub struct View {
    node: NodeName,
    /// The test's: proxies must outlive the data process that asked for them first.
    runtime: tokio::runtime::Handle,
    store: Arc<MemStore>,
    /// What no byte passes to: nothing, some addresses, or all.
    cut: watch::Sender<Cut>,
    /// Proxies by what is behind them.
    proxies: Mutex<HashMap<String, Proxy>>,
    silent: AtomicBool,
}

impl View {
    pub fn new(node: NodeName, store: Arc<MemStore>) -> Arc<Self> {
        Arc::new(Self {
            node,
            runtime: tokio::runtime::Handle::current(),
            store,
            cut: watch::Sender::new(Cut::default()),
            proxies: Mutex::default(),
            silent: AtomicBool::new(false),
        })
    }

    /// Cuts or heals the node's links to the other nodes, in both directions of what it connects, and to the store.
    pub fn set_cut(&self, cut: bool) {
        self.cut.send_modify(|state| state.all = cut);
        self.silent.store(cut, Ordering::SeqCst);
    }

    /// Cuts the node's links to one other node.
    pub fn deny(&self, other: &DataProcess) {
        let addresses = vec![other.control_address().to_string(), other.nbd_address().to_string()];
        self.cut.send_modify(|state| state.addresses = addresses);
    }

    /// Heals the node's links to single other nodes.
    pub fn allow(&self) {
        self.cut.send_modify(|state| state.addresses.clear());
    }

    /// Bytes that the node has sent to an address, whichever processes ran on both ends.
    pub fn sent_to(&self, address: std::net::SocketAddr) -> u64 {
        let proxies = self.proxies.lock().unwrap();
        proxies.get(&address.to_string()).map_or(0, |proxy| proxy.sent.load(Ordering::SeqCst))
    }

    fn through(&self, address: String) -> String {
        if let Some(proxy) = self.proxies.lock().unwrap().get(&address) {
            return proxy.address.clone();
        }
        let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        listener.set_nonblocking(true).unwrap();
        let proxy = listener.local_addr().unwrap().to_string();
        let sent = Arc::new(AtomicU64::new(0));
        let entry = Proxy { address: proxy.clone(), sent: sent.clone() };
        self.proxies.lock().unwrap().insert(address.clone(), entry);
        let cut = self.cut.subscribe();
        self.runtime.spawn(async move {
            let listener = TcpListener::from_std(listener).unwrap();
            while let Ok((near, _)) = listener.accept().await {
                let (address, cut, sent) = (address.clone(), cut.clone(), sent.clone());
                tokio::spawn(async move {
                    if let Ok(far) = TcpStream::connect(&address).await {
                        let (near_read, near_write) = near.into_split();
                        let (far_read, far_write) = far.into_split();
                        let there = pass(near_read, far_write, &address, cut.clone(), &sent);
                        let back = AtomicU64::new(0);
                        tokio::join!(there, pass(far_read, near_write, &address, cut, &back));
                    }
                });
            }
        });
        proxy
    }

    fn check(&self) -> Result<(), StoreError> {
        if self.silent.load(Ordering::SeqCst) {
            return Err(StoreError::Unknown("cut off".into()));
        }
        Ok(())
    }
}

async fn pass(
    mut from: tokio::net::tcp::OwnedReadHalf,
    mut to: tokio::net::tcp::OwnedWriteHalf,
    address: &str,
    mut cut: watch::Receiver<Cut>,
    passed: &AtomicU64,
) {
    let mut buffer = vec![0; 65536];
    loop {
        let Ok(count) = from.read(&mut buffer).await else { return };
        // A cut hides the end of a connection too.
        let _ = cut.wait_for(|cut| !cut.holds(address)).await;
        if count == 0 || to.write_all(&buffer[..count]).await.is_err() {
            return;
        }
        passed.fetch_add(count as u64, Ordering::SeqCst);
    }
}

impl NodeDirectory for View {
    fn announce(&self, node: NodeInfo) -> StoreFuture<'_, ()> {
        Box::pin(async move {
            self.check()?;
            self.store.announce(node).await
        })
    }

    fn list_nodes(&self) -> StoreFuture<'_, Vec<NodeInfo>> {
        Box::pin(async move {
            self.check()?;
            let mut nodes = self.store.list_nodes().await?;
            for info in nodes.iter_mut().filter(|info| info.name != self.node) {
                info.control_address = self.through(info.control_address.clone());
                info.nbd_address = self.through(info.nbd_address.clone());
            }
            Ok(nodes)
        })
    }
}

impl RecordStore for View {
    fn read(&self, volume: VolumeId) -> StoreFuture<'_, Versioned> {
        Box::pin(async move {
            self.check()?;
            self.store.read(volume).await
        })
    }

    fn list(&self) -> StoreFuture<'_, Vec<Arc<Versioned>>> {
        self.store.list()
    }

    fn create(&self, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        self.store.create(record)
    }

    fn swap(&self, expected: RecordVersion, record: VolumeRecord) -> StoreFuture<'_, RecordVersion> {
        Box::pin(async move {
            self.check()?;
            self.store.swap(expected, record).await
        })
    }

    fn remove(&self, expected: RecordVersion, volume: VolumeId) -> StoreFuture<'_, ()> {
        self.store.remove(expected, volume)
    }
}
