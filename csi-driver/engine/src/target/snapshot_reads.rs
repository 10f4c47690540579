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
        let read = || async {
            let client = self.client(snapshot).await?;
            let (sender, receiver) = oneshot::channel();
            client.submit(BlockOp::Read { offset, len }, Box::new(move |result| drop(sender.send(result))));
            receiver.await.unwrap_or(Err(BlockError(errno::ENOTCONN)))
        };
        match read().await {
            // This connection alone may be gone: the session, with the writes it carries, is not given up for it.
            Err(BlockError(errno::ENOTCONN)) => read().await,
            result => result,
        }
    }

    async fn client(&self, snapshot: SnapshotId) -> Result<Arc<Client>, BlockError> {
        let mut current = self.current.lock().await;
        if let Some((at, client)) = &*current
            && *at == snapshot
            && !client.is_closed()
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

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test ends at the first failure")]

    use std::sync::Mutex as StdMutex;

    use holdfast_io::Completion;
    use holdfast_nbd::{ConnectionSet, Export, ExportProvider, OpenError, PeerIdentity, Server};
    use tokio::net::TcpListener;

    use super::*;

    const SNAPSHOT: SnapshotId = SnapshotId(3);

    /// A snapshot of ones; its connections can be closed.
    #[derive(Default)]
    struct Ones(StdMutex<Vec<ConnectionSet>>);

    impl Ones {
        fn close_all(&self) -> usize {
            let opened = std::mem::take(&mut *self.0.lock().unwrap());
            opened.iter().for_each(ConnectionSet::close);
            opened.len()
        }
    }

    impl BlockDevice for Ones {
        fn size_bytes(&self) -> u64 {
            1 << 20
        }

        fn submit(&self, op: BlockOp, done: Completion) {
            let BlockOp::Read { len, .. } = op else { return done(Err(BlockError(errno::EIO))) };
            done(Ok(vec![1; len as usize].into()));
        }
    }

    struct Exports(Arc<Ones>);

    impl ExportProvider for Exports {
        fn open(&self, name: &str, _: &PeerIdentity) -> Result<Export, OpenError> {
            if name != format!("v/r/t@{SNAPSHOT}") {
                return Err(OpenError::Unknown(name.to_owned()));
            }
            let connections = ConnectionSet::new();
            self.0.0.lock().unwrap().push(connections.clone());
            Ok(Export {
                connections,
                read_only: true,
                ..Export::new(Arc::clone(&self.0) as Arc<dyn BlockDevice>)
            })
        }
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn a_connection_that_is_lost_is_made_anew_and_costs_no_session() {
        let ones = Arc::new(Ones::default());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let server = Server::new(Arc::new(Exports(Arc::clone(&ones))));
        let serving = tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let server = server.clone();
                tokio::spawn(async move { server.serve_connection(stream).await });
            }
        });
        let reads = SnapshotReads::new(address, ClientOptions::new("v/r/t"));
        let read = || reads.read(SNAPSHOT, 4096, 4096);
        assert_eq!(read().await.unwrap(), vec![1; 4096]);
        assert_eq!(read().await.unwrap(), vec![1; 4096]);
        assert_eq!(ones.close_all(), 1, "one connection for both");
        assert_eq!(read().await.unwrap(), vec![1; 4096]);
        let other = reads.read(SnapshotId(4), 4096, 4096).await;
        assert_eq!(other, Err(BlockError(errno::ENOTCONN)), "what is not there cannot be read");
        serving.abort();
        assert!(serving.await.unwrap_err().is_cancelled());
        ones.close_all();
        assert_eq!(read().await, Err(BlockError(errno::ENOTCONN)), "nobody is there");
    }
}
