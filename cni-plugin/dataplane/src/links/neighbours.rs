//! Neighbours, and the forwarding entries of bridges and VXLAN devices, which the kernel keeps in the same messages.

use std::collections::BTreeSet;
use std::net::IpAddr;

use holdfast_net_core::plan::MacAddr;
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{Fdb, Links, absent_or, family_of, refused};
use crate::error::{Error, Result};

impl Links {
    /// The permanent neighbours of a link, as far as they are seen: one that is not listed may exist.
    ///
    /// The kernel has one neighbour table per family for all network namespaces, and moves the entries to a larger one
    /// as they grow in number, whosever they are (`neigh_hash_grow`). Until that ends readers, which take no lock, miss
    /// what was moved; neither a dump nor a look-up of one address says so, and a second look falls into the same move. A
    /// write takes the table's lock. So what is not listed is a reason to set it, never to call it missing: use
    /// [`Links::hold_neighbour`].
    pub async fn permanent_neighbours(&self, index: u32) -> Result<Vec<(IpAddr, MacAddr)>> {
        let all = self.all_permanent_neighbours().await?.into_iter();
        Ok(all.filter(|(of, ..)| *of == index).map(|(_, address, mac)| (address, mac)).collect())
    }

    /// The same of all links, with the link.
    pub async fn all_permanent_neighbours(&self) -> Result<Vec<(u32, IpAddr, MacAddr)>> {
        let mut found = Vec::new();
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let messages = self.neighbour_messages(family, "list neighbours").await?;
            found.extend(
                messages
                    .iter()
                    .filter(|m| m.header.state == NeighbourState::Permanent)
                    .filter_map(|m| Some((m.header.ifindex, neighbour_address(m)?, neighbour_mac(m)?))),
            );
        }
        Ok(found)
    }

    /// Holds a permanent neighbour to what is planned: another MAC in `seen` is a difference, none at all is set.
    pub async fn hold_neighbour(
        &self,
        index: u32,
        address: IpAddr,
        mac: MacAddr,
        seen: &[(IpAddr, MacAddr)],
    ) -> Result<()> {
        match seen.iter().find(|(of, _)| *of == address) {
            Some((_, found)) if *found == mac => Ok(()),
            Some((_, found)) => {
                Err(Error::Differs(format!("the neighbour {address} has MAC {found} instead of {mac}")))
            }
            None => {
                tracing::info!(%address, "a neighbour entry was not seen; it is set again");
                self.set_neighbour(index, address, mac).await
            }
        }
    }

    /// Adds or replaces a permanent neighbour.
    pub async fn set_neighbour(&self, index: u32, address: IpAddr, mac: MacAddr) -> Result<()> {
        let request = self.handle.neighbours().add(index, address).link_layer_address(&mac.0).replace();
        let what = || format!("set the neighbour {address}");
        self.wrote(request.execute().await.map_err(|e| refused(what(), e)), what)
    }

    /// Removes a neighbour; true if it was there.
    pub async fn delete_neighbour(&self, index: u32, address: IpAddr) -> Result<bool> {
        let mut message = NeighbourMessage::default();
        message.header.family = family_of(address);
        message.header.ifindex = index;
        message.attributes.push(NeighbourAttribute::Destination(match address {
            IpAddr::V4(a) => NeighbourAddress::Inet(a),
            IpAddr::V6(a) => NeighbourAddress::Inet6(a),
        }));
        let result = self.handle.neighbours().del(message).execute().await;
        let what = || format!("remove the neighbour {address}");
        let removed = absent_or(result, libc::ENOENT, what)?;
        if removed { self.wrote(Ok(true), what) } else { Ok(false) }
    }

    /// Tells the bridge that `mac` is behind the port `index`, for good.
    pub async fn set_bridge_entry(&self, index: u32, mac: MacAddr) -> Result<()> {
        let request = self
            .handle
            .neighbours()
            .add_bridge(index, &mac.0)
            .state(NeighbourState::Noarp)
            .flags(NeighbourFlags::Controller)
            .replace();
        let what = || format!("set the bridge's forwarding entry for {mac}");
        self.wrote(request.execute().await.map_err(|e| refused(what(), e)), what)
    }

    /// The static MACs behind the bridge port `index`, its own excluded.
    pub async fn bridge_entries(&self, index: u32) -> Result<Vec<MacAddr>> {
        Ok(self
            .fdb_messages()
            .await?
            .iter()
            .filter(|m| m.header.ifindex == index && m.header.state == NeighbourState::Noarp)
            .filter_map(neighbour_mac)
            .collect())
    }

    /// The static MACs behind all bridge ports, by port.
    pub async fn all_bridge_entries(&self) -> Result<BTreeSet<(u32, MacAddr)>> {
        let found = self.fdb_messages().await?;
        let is_static = |m: &&NeighbourMessage| m.header.state == NeighbourState::Noarp;
        Ok(found
            .iter()
            .filter(is_static)
            .filter_map(|m| Some((m.header.ifindex, neighbour_mac(m)?)))
            .collect())
    }

    /// The VXLAN device's forwarding entries.
    pub async fn vxlan_entries(&self, index: u32) -> Result<Vec<Fdb>> {
        Ok(self
            .fdb_messages()
            .await?
            .iter()
            .filter(|m| m.header.ifindex == index)
            .filter_map(|m| Some(Fdb { mac: neighbour_mac(m)?, to: neighbour_address(m)? }))
            .collect())
    }

    async fn fdb_messages(&self) -> Result<Vec<NeighbourMessage>> {
        self.neighbour_messages(AddressFamily::Bridge, "list forwarding entries").await
    }

    async fn neighbour_messages(&self, family: AddressFamily, what: &str) -> Result<Vec<NeighbourMessage>> {
        let mut query = NeighbourMessage::default();
        query.header.family = family;
        let found = self.dumps.run(RouteNetlinkMessage::GetNeighbour(query), what).await?;
        Ok(found
            .into_iter()
            .filter_map(|m| if let RouteNetlinkMessage::NewNeighbour(entry) = m { Some(entry) } else { None })
            .collect())
    }

    /// Adds or replaces a forwarding entry of the VXLAN device.
    pub async fn set_vxlan_entry(&self, index: u32, entry: Fdb) -> Result<()> {
        let request = self
            .handle
            .neighbours()
            .add_bridge(index, &entry.mac.0)
            .destination(entry.to)
            .state(NeighbourState::Permanent)
            .flags(NeighbourFlags::Own)
            .replace();
        let what = || format!("set the forwarding entry for {}", entry.mac);
        self.wrote(request.execute().await.map_err(|e| refused(what(), e)), what)
    }

    /// Removes a forwarding entry of the VXLAN device.
    pub async fn delete_vxlan_entry(&self, index: u32, entry: Fdb) -> Result<bool> {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = index;
        message.header.flags = NeighbourFlags::Own;
        message.attributes.push(NeighbourAttribute::LinkLayerAddress(entry.mac.0.to_vec()));
        message.attributes.push(NeighbourAttribute::Destination(match entry.to {
            IpAddr::V4(a) => NeighbourAddress::Inet(a),
            IpAddr::V6(a) => NeighbourAddress::Inet6(a),
        }));
        let result = self.handle.neighbours().del(message).execute().await;
        let what = || format!("remove the forwarding entry for {}", entry.mac);
        let removed = absent_or(result, libc::ENOENT, what)?;
        if removed { self.wrote(Ok(true), what) } else { Ok(false) }
    }
}

fn neighbour_address(message: &NeighbourMessage) -> Option<IpAddr> {
    message.attributes.iter().find_map(|a| match a {
        NeighbourAttribute::Destination(NeighbourAddress::Inet(a)) => Some(IpAddr::V4(*a)),
        NeighbourAttribute::Destination(NeighbourAddress::Inet6(a)) => Some(IpAddr::V6(*a)),
        // In the bridge family the address is left undecoded.
        NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => match bytes.len() {
            4 => <[u8; 4]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
            16 => <[u8; 16]>::try_from(bytes.as_slice()).ok().map(IpAddr::from),
            _ => None,
        },
        _ => None,
    })
}

fn neighbour_mac(message: &NeighbourMessage) -> Option<MacAddr> {
    message.attributes.iter().find_map(|a| match a {
        NeighbourAttribute::LinkLayerAddress(bytes) => bytes.as_slice().try_into().ok().map(MacAddr),
        _ => None,
    })
}
