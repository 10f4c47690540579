//! Takes everything of ours off a node, for good.
//!
//! Nothing is opened that would make what is to go ([`crate::Dataplane`] makes its tables). Interfaces go before the tables: no
//! packet of a pod ever passes without policy. Every step may be repeated, and a failure of one does not keep the others.

use std::collections::BTreeSet;

use netlink_packet_route::link::InfoKind;

use crate::error::{Error, Result};
use crate::links::Links;
use crate::nft::socket::NetfilterSocket;
use crate::node::kind_of;
use crate::{Config, FoundEndpoint, endpoint, limits, nft};

/// What a removal did.
#[derive(Debug, Default)]
pub struct Teardown {
    /// What is gone now, each as "the bridge hf0".
    pub removed: Vec<String>,
    /// What is still there, and why.
    pub failed: Vec<Error>,
}

impl Teardown {
    fn note<T>(&mut self, result: Result<T>, what: impl FnOnce(T) -> Option<String>) {
        match result {
            Ok(done) => self.removed.extend(what(done)),
            Err(error) => self.failed.push(error),
        }
    }
}

/// Host ends of pods on this node. Changes nothing, and makes nothing. Needs a tokio runtime.
///
/// # Errors
/// The kernel refuses to list.
pub async fn attached_endpoints() -> Result<Vec<FoundEndpoint>> {
    endpoint::list(&Links::open()?).await
}

/// Removes host ends (and with them the pods' ends), interfaces of limits, routes, the VXLAN device, the bridge and the
/// nf_tables tables, in this order; of the sysctls nothing, because nobody knows what they were before. A device of one of
/// our names and another kind is left alone. Needs a tokio runtime; cancellation leaves the rest to the next call.
///
/// # Errors
/// The netlink sockets cannot be opened. What the kernel refuses is in the answer.
pub async fn remove_everything(config: &Config) -> Result<Teardown> {
    let links = Links::open()?;
    let mut done = Teardown::default();
    match endpoint::list(&links).await {
        Ok(found) => {
            for FoundEndpoint { host_ifname, .. } in found {
                let removed = endpoint::remove(&links, &config.bridge, &host_ifname, &BTreeSet::new()).await;
                done.note(removed, |()| Some(format!("the pod interface {host_ifname}")));
            }
        }
        Err(error) => done.failed.push(error),
    }
    let swept = limits::sweep(&links, &BTreeSet::new()).await;
    done.note(swept, |count| (count > 0).then(|| format!("{count} interfaces of rate limits")));
    remove_routes(&links, &mut done).await;
    for (name, kind) in [(&config.vxlan_device, InfoKind::Vxlan), (&config.bridge, InfoKind::Bridge)] {
        let removed = remove_device(&links, name, &kind).await;
        done.note(removed, |was_there| was_there.then(|| format!("the device {name}")));
    }
    let table = config.table.clone();
    let tables =
        tokio::task::spawn_blocking(move || nft::remove_tables(&mut NetfilterSocket::open()?, &table));
    let tables =
        tables.await.unwrap_or_else(|_| Err(Error::Protocol("removing the tables was cut off".into())));
    done.note(tables, |removed| {
        (!removed.is_empty()).then(|| format!("the nf_tables tables {}", removed.join(" and ")))
    });
    Ok(done)
}

async fn remove_routes(links: &Links, done: &mut Teardown) {
    let routes = match links.our_routes().await {
        Ok(routes) => routes,
        Err(error) => return done.failed.push(error),
    };
    let mut count = 0;
    for route in &routes {
        match links.delete_route(route).await {
            Ok(removed) => count += usize::from(removed),
            Err(error) => done.failed.push(error),
        }
    }
    if count > 0 {
        done.removed.push(format!("{count} routes"));
    }
}

async fn remove_device(links: &Links, name: &str, kind: &InfoKind) -> Result<bool> {
    let Some(link) = links.link(name).await?.filter(|link| kind_of(link) == Some(kind)) else {
        return Ok(false);
    };
    links.delete_link(link.header.index, name).await?;
    Ok(true)
}
