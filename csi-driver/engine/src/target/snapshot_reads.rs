//! Reading a snapshot of a replica on another node, to rebuild it on one that returns (R28).
//!
//! It goes over an NBD connection of its own, as an export is one snapshot or the volume as it is. The connection belongs to
//! the session and is fenced with it, but losing it loses no write: the replica does not count it among those whose loss ends
//! the session. At most one is open per session, to the snapshot that was asked for last.

use std::sync::Arc;

use bytes::Bytes;
use holdfast_io::{BlockDevice, BlockError, BlockOp};
use holdfast_nbd::{Client, ClientOptions};
use holdfast_storage_core::ids::SnapshotId;
use tokio::sync::{Mutex, oneshot};

use crate::errno;

use super::calls::connect_nbd;

/// The way to a session's snapshots.
pub struct SnapshotReads {
    /// The replica's NBD server.
    address: String,
    /// How the session itself is reached; its export's name is followed by `@` and the snapshot.
    options: ClientOptions,
    current: Mutex<Option<(SnapshotId, Arc<Client>)>>,
}

impl SnapshotReads {
    /// To snapshots of the replica whose session is reached like this.
    pub fn new(address: String, options: ClientOptions) -> Self {
        Self { address, options, current: Mutex::default() }
    }

    /// Reads whole blocks of a snapshot. ENOTCONN: the way to the replica is gone; another error is the replica's.
    pub async fn read(&self, snapshot: SnapshotId, offset: u64, len: u32) -> Result<Bytes, BlockError> {
        let client = self.client(snapshot).await?;
        let (sender, receiver) = oneshot::channel();
        client.submit(BlockOp::Read { offset, len }, Box::new(move |result| drop(sender.send(result))));
        receiver.await.unwrap_or(Err(BlockError(errno::ENOTCONN)))
    }

    async fn client(&self, snapshot: SnapshotId) -> Result<Arc<Client>, BlockError> {
        let mut current = self.current.lock().await;
        if let Some((at, client)) = &*current
            && *at == snapshot
        {
            return Ok(Arc::clone(client));
        }
        let mut options = self.options.clone();
        options.export = format!("{}@{snapshot}", options.export);
        let connected = connect_nbd(self.address.clone(), options).await;
        let client = connected.map_err(|error| {
            tracing::info!(address = self.address, %snapshot, %error, "a snapshot of a replica cannot be read");
            BlockError(errno::ENOTCONN)
        })?;
        *current = Some((snapshot, Arc::clone(&client)));
        Ok(client)
    }
}
