//! Conntrack entries that would keep a host port's packets from where it leads now.
//!
//! The kernel asks the maps about the first packet of a connection and follows its entry from then on. A UDP client that goes on sending
//! from one port keeps its entry alive for ever: one from before the host port was there never reaches the pod, and one of a pod
//! that is gone is sent to an address that nobody, or another pod, has. So those entries are deleted *after* the map has changed:
//! whatever packet comes next makes a new entry by the map. Entries of other sockets are not touched.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use holdfast_net_core::nat::{HostSocket, PodSocket};
use holdfast_net_core::ports::Proto;

use crate::Result;
use crate::nft::conntrack::{self, Connection};
use crate::nft::socket::NetfilterSocket;

/// What happened to host ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Change {
    /// They lead to a pod now. TCP and SCTP clients whose connection was refused come with a new one.
    Appeared,
    /// The pod is gone.
    Gone,
}

/// Deletes what `change` made stale; tells how many entries. `own`: the node's addresses. One look at all entries, 2 µs each.
pub(crate) fn flush(
    socket: &mut NetfilterSocket,
    host_ports: &BTreeMap<HostSocket, PodSocket>,
    change: Change,
    own: &BTreeSet<IpAddr>,
) -> Result<usize> {
    let concerned = match change {
        Change::Appeared => host_ports.keys().any(|socket| socket.proto == Proto::Udp),
        Change::Gone => !host_ports.is_empty(),
    };
    if !concerned {
        return Ok(0);
    }
    let stale = conntrack::read(socket, usize::MAX, |connection| {
        let own = own.contains(&connection.dialled.0) || is_loopback(connection.dialled.0);
        own && host_ports.iter().any(|(socket, pod)| is_stale(connection, socket, pod, change))
    })?;
    conntrack::delete(socket, stale.iter())
}

fn is_loopback(address: IpAddr) -> bool {
    address.is_ipv4() && address.is_loopback()
}

fn is_stale(connection: &Connection, socket: &HostSocket, pod: &PodSocket, change: Change) -> bool {
    let (address, port) = connection.dialled;
    let dialled = port == socket.port
        && connection.proto == socket.proto
        && address.is_ipv4() == socket.address.is_ipv4()
        && (socket.address.is_unspecified() || socket.address == address);
    let leads_there = (connection.server, connection.server_port) == (pod.address, pod.port);
    dialled
        && match change {
            Change::Appeared => socket.proto == Proto::Udp && !leads_there,
            Change::Gone => leads_there,
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_of_the_host_port_that_lead_elsewhere_are_stale_and_no_others() {
        let ip = |text: &str| -> IpAddr { text.parse().unwrap() };
        let connection = |proto, dialled: (&str, u16), server: (&str, u16)| Connection {
            client: ip("198.51.100.1"),
            client_port: 4000,
            server: ip(server.0),
            server_port: server.1,
            dialled: (ip(dialled.0), dialled.1),
            proto,
            mark: 0,
        };
        let any = HostSocket { proto: Proto::Udp, address: ip("0.0.0.0"), port: 53 };
        let pod = PodSocket { address: ip("10.0.0.2"), port: 5353 };
        let (node, there) = (("192.0.2.1", 53), ("10.0.0.2", 5353));
        let direct = connection(Proto::Udp, node, node);
        let translated = connection(Proto::Udp, node, there);
        assert!(is_stale(&direct, &any, &pod, Change::Appeared));
        assert!(!is_stale(&translated, &any, &pod, Change::Appeared));
        assert!(is_stale(&translated, &any, &pod, Change::Gone));
        assert!(!is_stale(&direct, &any, &pod, Change::Gone));
        let other_address = HostSocket { address: ip("192.0.2.9"), ..any };
        let tcp = HostSocket { proto: Proto::Tcp, ..any };
        for other in
            [other_address, tcp, HostSocket { port: 54, ..any }, HostSocket { address: ip("::"), ..any }]
        {
            assert!(!is_stale(&direct, &other, &pod, Change::Appeared), "{other}");
            assert!(!is_stale(&translated, &other, &pod, Change::Gone), "{other}");
        }
        let tcp_there = connection(Proto::Tcp, node, there);
        assert!(is_stale(&tcp_there, &tcp, &pod, Change::Gone), "a client learns it at once");
        assert!(!is_stale(&connection(Proto::Tcp, node, node), &tcp, &pod, Change::Appeared));
    }
}
