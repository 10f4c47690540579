//! Hygiene of conntrack after a revocation: entries of connections that are forbidden now are deleted, so that they fill no
//! table. Enforcement does not need it: the policy revision stops the packets.
//!
//! Promised is that a deletion changes no verdict. Two things could break that, and both are ruled out before each deletion:
//! - *The rules changed again, and allow it.* A connection whose destination was translated would be cut for ever, because
//!   its next packet finds no translation. So each entry is judged once more against the rules in the kernel, under the
//!   lock that every transaction takes, and deleted before that lock is given back.
//! - *Without its entry the connection comes back.* The entry is what tells who opened it; without it the next packet of the
//!   server looks like a connection that the server opens. For TCP the chain `pickup` denies what either reading denies.
//!   Other protocols have no such mark, so their entries stay until they time out, unless the rules forbid the other
//!   reading, too. Traffic with the node itself passes no chain on its way out: its entries are never touched.
//!
//! What may change rules or entries meanwhile: any commit (excluded by the lock), the kernel (an entry that is gone, or
//! another one with the same addresses, has another number), somebody else's change to our tables (mended by the next
//! commit, as everywhere).

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Mutex, MutexGuard};

use holdfast_net_core::policy::{Direction, allows};
use holdfast_net_core::ports::Proto;
use holdfast_net_core::ruleset::Ruleset;

use crate::nft::conntrack::{self, Connection, Entry};
use crate::nft::socket::NetfilterSocket;
use crate::{Error, Policy, Result};

/// Entries deleted in one pass; the rest is left to the next one.
const DELETED_MAX: usize = 8192;
/// Entries judged and deleted without giving transactions a chance: some hundred microseconds.
const CHUNK: usize = 32;

/// What a pass of [`crate::Dataplane::delete_forbidden`] did.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Hygiene {
    /// Entries deleted.
    pub deleted: usize,
    /// There are more: call again.
    pub more: bool,
}

/// Looks through all entries once and deletes those that may go. `own`: the node's addresses.
pub(crate) fn pass(
    policy: &Mutex<Policy>,
    socket: &mut NetfilterSocket,
    own: &BTreeSet<IpAddr>,
) -> Result<Hygiene> {
    let found = find(policy, socket, own)?;
    let more = found.len() == DELETED_MAX;
    Ok(Hygiene { deleted: delete(policy, socket, &found)?, more })
}

/// The entries that may go by the rules of this moment. Reading takes 2 µs for each entry of the table; only those of
/// isolated local pods that were not judged under this revision are looked at closer.
fn find(policy: &Mutex<Policy>, socket: &mut NetfilterSocket, own: &BTreeSet<IpAddr>) -> Result<Vec<Entry>> {
    let (isolated, (mask, current)) = {
        let policy = locked(policy)?;
        let ruleset = policy.nft.applied();
        let isolated: BTreeSet<IpAddr> =
            ruleset.cls_in.keys().chain(ruleset.cls_eg.keys()).copied().collect();
        (isolated, policy.nft.mark())
    };
    if isolated.is_empty() {
        return Ok(Vec::new());
    }
    conntrack::read(socket, DELETED_MAX, |connection| {
        let Connection { client, server, mark, .. } = connection;
        let concerned = isolated.contains(client) || isolated.contains(server);
        let foreign = own.contains(client) || own.contains(server);
        concerned
            && !foreign
            && mark & mask != current
            && locked(policy).is_ok_and(|policy| may_go(policy.nft.applied(), connection))
    })
}

/// Deletes those of the entries that may still go.
fn delete(policy: &Mutex<Policy>, socket: &mut NetfilterSocket, found: &[Entry]) -> Result<usize> {
    let mut deleted = 0;
    for chunk in found.chunks(CHUNK) {
        let policy = locked(policy)?;
        let entries = chunk.iter().filter(|entry| may_go(policy.nft.applied(), &entry.connection));
        deleted += conntrack::delete(socket, entries)?;
    }
    Ok(deleted)
}

fn locked(policy: &Mutex<Policy>) -> Result<MutexGuard<'_, Policy>> {
    policy.lock().map_err(|_| Error::Protocol("the policy state was lost in a panic; restart".into()))
}

/// The rules forbid the connection, and no packet of either side would bring it back.
fn may_go(ruleset: &Ruleset, connection: &Connection) -> bool {
    let Connection { client, client_port, server, server_port, proto, .. } = *connection;
    let forbidden = |client, server, port| {
        !allows(ruleset, Direction::Egress, client, server, proto, port)
            || !allows(ruleset, Direction::Ingress, server, client, proto, port)
    };
    forbidden(client, server, server_port) && (proto == Proto::Tcp || forbidden(server, client, client_port))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::{TcpListener, TcpStream};
    use std::process::Command;
    use std::sync::Arc;

    use holdfast_net_core::ruleset::{Changes, ClassId, Element};
    use tokio::sync::Notify;

    use super::*;
    use crate::Config;
    use crate::nft::Nft;

    const CLASS: ClassId = ClassId(2);

    /// Connections over the loopback interface stand for a pod's: its address is given a class of its own.
    fn mk_policy() -> Mutex<Policy> {
        Mutex::new(Policy {
            nft: Nft::open(Config::default()).unwrap(),
            quarantined: BTreeMap::new(),
            advanced: None,
            owes_revision: false,
            revoked: Arc::new(Notify::new()),
        })
    }

    fn forbid(policy: &Mutex<Policy>) {
        let address = [127, 0, 0, 1].into();
        let add = vec![Element::ClsIn(address, CLASS)];
        let changes = Changes { add, revokes: true, ..Changes::default() };
        policy.lock().unwrap().nft.change(&changes).unwrap();
    }

    fn allow(policy: &Mutex<Policy>) {
        let remove = vec![Element::ClsIn([127, 0, 0, 1].into(), CLASS)];
        policy.lock().unwrap().nft.change(&Changes { remove, ..Changes::default() }).unwrap();
    }

    #[test]
    fn an_entry_that_is_allowed_again_before_its_deletion_stays() {
        let thread = std::thread::spawn(|| {
            nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWNET).expect("these tests run as root");
            let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().unwrap();
            assert!(up.success());
            let policy = mk_policy();
            let mut socket = NetfilterSocket::open().unwrap();
            let listener = TcpListener::bind("127.0.0.1:0").unwrap();
            let _client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
            let (others, own) = (BTreeSet::new(), BTreeSet::from([[127, 0, 0, 1].into()]));
            assert!(find(&policy, &mut socket, &others).unwrap().is_empty(), "nothing is forbidden");

            forbid(&policy);
            assert!(find(&policy, &mut socket, &own).unwrap().is_empty(), "the node's own are not looked at");
            let found = find(&policy, &mut socket, &others).unwrap();
            assert_eq!(found.len(), 1);
            allow(&policy);
            assert_eq!(delete(&policy, &mut socket, &found).unwrap(), 0, "it is allowed again");

            forbid(&policy);
            assert_eq!(find(&policy, &mut socket, &others).unwrap().len(), 1, "it is still there");
            assert_eq!(delete(&policy, &mut socket, &found).unwrap(), 1);
            assert_eq!(delete(&policy, &mut socket, &found).unwrap(), 0, "it is gone");
        });
        thread.join().unwrap();
    }
}
