//! The interface that carries the overlay.

use std::net::IpAddr;

use anyhow::{Context, anyhow};
use futures::TryStreamExt;
use netlink_packet_route::address::AddressAttribute;
use netlink_packet_route::link::LinkAttribute;

/// What counts of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Uplink {
    pub index: u32,
    pub name: String,
    /// Bytes, IP packet size.
    pub mtu: u32,
}

/// The named interface, or the one that has `internal_ip`.
pub(crate) async fn uplink(name: Option<&str>, internal_ip: IpAddr) -> anyhow::Result<Uplink> {
    let (connection, handle, _) = rtnetlink::new_connection().context("cannot open rtnetlink")?;
    let connection = tokio::spawn(connection);
    let found = find(&handle, name, internal_ip).await;
    connection.abort();
    found
}

async fn find(handle: &rtnetlink::Handle, name: Option<&str>, internal_ip: IpAddr) -> anyhow::Result<Uplink> {
    let request = if let Some(name) = name {
        handle.link().get().match_name(name.to_owned())
    } else {
        handle.link().get().match_index(index_of(handle, internal_ip).await?)
    };
    let link = request.execute().try_next().await.context("cannot read the uplink")?;
    let link = link.ok_or_else(|| anyhow!("the uplink does not exist"))?;
    let mtu = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::Mtu(mtu) => Some(*mtu),
        _ => None,
    });
    let mtu = mtu.ok_or_else(|| anyhow!("the kernel did not tell the uplink's MTU"))?;
    let name = link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.clone()),
        _ => None,
    });
    Ok(Uplink { index: link.header.index, name: name.unwrap_or_default(), mtu })
}

async fn index_of(handle: &rtnetlink::Handle, address: IpAddr) -> anyhow::Result<u32> {
    let mut addresses = handle.address().get().execute();
    while let Some(entry) = addresses.try_next().await.context("cannot list addresses")? {
        let ours = entry.attributes.iter().any(|attribute| match attribute {
            AddressAttribute::Address(found) | AddressAttribute::Local(found) => *found == address,
            _ => false,
        });
        if ours {
            return Ok(entry.header.index);
        }
    }
    Err(anyhow!("no interface has the InternalIP {address}; set --uplink or correct the Node object"))
}
