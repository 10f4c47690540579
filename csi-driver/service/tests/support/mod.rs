//! What the tests of this crate share: a registry, certificates, records, fake pools.

#![allow(dead_code, unreachable_pub)]

pub mod fake_jobs;
pub mod fakes;
pub mod killed;
pub mod records;
pub mod requests;
pub mod store_suite;
pub mod world;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use holdfast_service::registry_server::RegistryServer;
use holdfast_service::serve::{serve_tcp, server};
use holdfast_service::tls::CONTROLLER_NAME;
use holdfast_service::{NodeBook, RegistryClient, SledStore, TlsIdentity};
use holdfast_storage_core::record_store::RecordStore;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

#[allow(unused_imports)]
pub use records::mk_record;

/// A registry over a sled store, in this process.
pub struct Registry {
    pub store: Arc<dyn RecordStore>,
    pub book: Arc<NodeBook>,
    address: SocketAddr,
    tls: Option<TlsIdentity>,
    running: Option<(oneshot::Sender<()>, JoinHandle<()>)>,
    _dir: TempDir,
}

impl Registry {
    pub async fn start(tls: Option<TlsIdentity>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let store = Arc::new(SledStore::open(dir.path()).unwrap());
        // Not 127.0.0.1, where a connection that goes out could take the port between a stop and a restart.
        let address = SocketAddr::from(([127, 1, rand::random(), rand::random_range(1..=254)], 0));
        let book = Arc::new(NodeBook::new());
        let mut registry = Self { store, book, address, tls, running: None, _dir: dir };
        registry.restart().await;
        registry
    }

    /// Listens again, on the same port as before.
    pub async fn restart(&mut self) {
        let listener = TcpListener::bind(self.address).await.unwrap();
        self.address = listener.local_addr().unwrap();
        let service =
            RegistryServer::new(Arc::clone(&self.store), Arc::clone(&self.book) as _, self.tls.is_some());
        let router = server().add_service(service.into_service());
        let (stop, stopped) = oneshot::channel();
        let tls = self.tls.as_ref().map(TlsIdentity::server);
        let task = tokio::spawn(async move {
            let stopped = async move { drop(stopped.await) };
            serve_tcp(router, listener, tls, stopped).await.unwrap();
        });
        self.running = Some((stop, task));
    }

    pub async fn stop(&mut self) {
        let (stop, task) = self.running.take().unwrap();
        drop(stop);
        task.await.unwrap();
    }

    pub fn client(&self, tls: Option<&TlsIdentity>) -> RegistryClient {
        RegistryClient::new(&self.address.to_string(), tls.map(|identity| (identity, CONTROLLER_NAME)))
            .unwrap()
    }
}

/// An authority and certificates it signed, in folders as `--tls-dir` wants them.
pub struct Pki {
    dir: TempDir,
}

pub fn pki(names: &[&str]) -> Pki {
    let dir = tempfile::tempdir().unwrap();
    let mut params = CertificateParams::new(Vec::new()).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "test authority");
    let ca_key = KeyPair::generate().unwrap();
    let ca_pem = params.self_signed(&ca_key).unwrap().pem();
    let issuer = Issuer::new(params, ca_key);
    for name in names {
        let key = KeyPair::generate().unwrap();
        let cert =
            CertificateParams::new(vec![(*name).to_owned()]).unwrap().signed_by(&key, &issuer).unwrap();
        let folder = dir.path().join(name);
        std::fs::create_dir(&folder).unwrap();
        std::fs::write(folder.join("ca.pem"), &ca_pem).unwrap();
        std::fs::write(folder.join("node.pem"), cert.pem()).unwrap();
        std::fs::write(folder.join("node.key"), key.serialize_pem()).unwrap();
    }
    Pki { dir }
}

impl Pki {
    pub fn dir(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn identity(&self, name: &str) -> TlsIdentity {
        TlsIdentity::load(&self.dir(name)).unwrap()
    }
}
