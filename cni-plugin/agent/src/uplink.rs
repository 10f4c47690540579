//! The interface that carries the overlay.

use std::net::IpAddr;

use anyhow::{Context, anyhow};
use futures::TryStreamExt;
use holdfast_net_core::overlay::Uplink;
use ipnetwork::IpNetwork;
use netlink_packet_route::address::{AddressAttribute, AddressMessage};
use netlink_packet_route::link::LinkAttribute;

/// The named interface, or the one that has `internal_ip`.
pub(crate) async fn find(name: Option<&str>, internal_ip: IpAddr) -> anyhow::Result<Uplink> {
    let (connection, handle, _) = rtnetlink::new_connection().context("cannot open rtnetlink")?;
    let connection = tokio::spawn(connection);
    let found = read(&handle, name, internal_ip).await;
    connection.abort();
    found
}

async fn read(handle: &rtnetlink::Handle, name: Option<&str>, internal_ip: IpAddr) -> anyhow::Result<Uplink> {
    let addresses: Vec<(u32, IpNetwork)> = handle
        .address()
        .get()
        .execute()
        .try_filter_map(|message| futures::future::ready(Ok(network_of(&message))))
        .try_collect()
        .await
        .context("cannot list addresses")?;
    let request = if let Some(name) = name {
        handle.link().get().match_name(name.to_owned())
    } else {
        let owner = addresses.iter().find(|(_, network)| network.ip() == internal_ip);
        let (index, _) = owner.ok_or_else(|| {
            anyhow!("no interface has the InternalIP {internal_ip}; set --uplink or correct the Node object")
        })?;
        handle.link().get().match_index(*index)
    };
    let link = request.execute().try_next().await.context("cannot read the uplink")?;
    let link = link.ok_or_else(|| anyhow!("the uplink does not exist"))?;
    let (mut mtu, mut name) = (None, None);
    for attribute in link.attributes {
        match attribute {
            LinkAttribute::Mtu(bytes) => mtu = Some(bytes),
            LinkAttribute::IfName(text) => name = Some(text),
            _ => {}
        }
    }
    let of_link = addresses.into_iter().filter(|(index, _)| *index == link.header.index);
    Ok(Uplink {
        index: link.header.index,
        name: name.ok_or_else(|| anyhow!("the kernel did not tell the uplink's name"))?,
        mtu: mtu.ok_or_else(|| anyhow!("the kernel did not tell the uplink's MTU"))?,
        networks: of_link.map(|(_, network)| network).collect(),
    })
}

/// Interface, address and prefix length; the local end's, where another one is told, too.
fn network_of(message: &AddressMessage) -> Option<(u32, IpNetwork)> {
    let (mut local, mut address) = (None, None);
    for attribute in &message.attributes {
        match attribute {
            AddressAttribute::Local(own) => local = Some(*own),
            AddressAttribute::Address(other) => address = Some(*other),
            _ => {}
        }
    }
    let network = IpNetwork::new(local.or(address)?, message.header.prefix_len).ok()?;
    Some((message.header.index, network))
}
