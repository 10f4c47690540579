//! Dumps over rtnetlink: whole, or an error.
//!
//! What is decided by what a dump does not hold (a check, a removal) needs to know that nothing was left out. The kernel
//! says so in three ways, which the streams of rtnetlink do not pass on:
//!
//! - A socket runs one dump at a time: a second one is refused with EBUSY (netlink(7); `netlink_dump_start`). So dumps
//!   of one connection wait for each other.
//! - `NLM_F_DUMP_INTR`, on any message or only on the closing one: the state changed between two parts of the dump, which
//!   may lack entries. It is repeated.
//! - The closing message carries an error, or never comes: the rest is missing.
//!
//! Not covered: the neighbour table, see [`crate::links::Links::permanent_neighbours`].

use std::sync::Arc;

use futures::StreamExt;
use netlink_packet_route::RouteNetlinkMessage;
use rtnetlink::Handle;
use rtnetlink::packet_core::{NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload};
use tokio::sync::{Mutex, OwnedMutexGuard};

use crate::error::{Error, Result};

/// An interrupted dump is repeated this often, then taken as failed. A repeat follows at once: it does not wait for
/// anybody, and a change that falls into every one of them means that there is no state to compare with.
const DUMP_TRIES: usize = 8;

/// Runs the dumps of one connection, one after the other. The connection must forward closing messages
/// (`Connection::set_forward_done`).
#[derive(Clone)]
pub struct Dumps {
    handle: Handle,
    running: Arc<Mutex<()>>,
}

impl Dumps {
    /// For the connection behind `handle`.
    pub fn new(handle: Handle) -> Self {
        Self { handle, running: Arc::default() }
    }

    /// All messages that answer `request`; `what` names it in errors ("list routes"). Cancellation safe: a dump whose
    /// caller is gone is read to its end before the next one starts.
    pub async fn run(&self, request: RouteNetlinkMessage, what: &str) -> Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMP_TRIES {
            let alone = Arc::clone(&self.running).lock_owned().await;
            let once = tokio::spawn(dump(self.handle.clone(), request.clone(), what.to_string(), alone));
            let found = once.await.unwrap_or_else(|_| Err(cut_off(what)))?;
            if let Some(found) = found {
                return Ok(found);
            }
        }
        Err(Error::Protocol(format!("{what}: the state changed during {DUMP_TRIES} dumps in a row")))
    }
}

/// One dump; `None` if it was interrupted.
async fn dump(
    mut handle: Handle,
    request: RouteNetlinkMessage,
    what: String,
    _alone: OwnedMutexGuard<()>,
) -> Result<Option<Vec<RouteNetlinkMessage>>> {
    let mut request = NetlinkMessage::from(request);
    request.header.flags = NLM_F_REQUEST | NLM_F_DUMP;
    let refused = |errno: i32| Error::Link {
        what: what.clone(),
        reason: std::io::Error::from_raw_os_error(errno).to_string(),
        errno,
    };
    let mut answers = handle.request(request).map_err(|_| cut_off(&what))?;
    let mut found = Vec::new();
    let mut interrupted = false;
    while let Some(answer) = answers.next().await {
        interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
        match answer.payload {
            NetlinkPayload::InnerMessage(message) => found.push(message),
            NetlinkPayload::Done(done) if done.code < 0 => return Err(refused(-done.code)),
            NetlinkPayload::Done(_) => return Ok((!interrupted).then_some(found)),
            NetlinkPayload::Error(error) => return Err(refused(error.raw_code().abs())),
            other => return Err(Error::Protocol(format!("{what}: {other:?}"))),
        }
    }
    Err(cut_off(&what))
}

fn cut_off(what: &str) -> Error {
    Error::Protocol(format!("{what}: the connection to rtnetlink ended before the dump did"))
}
