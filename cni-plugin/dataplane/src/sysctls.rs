//! The node's sysctls that the data path needs, and puts back. The kernel tells changes of a few of them only
//! (RTM_NEWNETCONF), so [`Poll`] is meant to be asked often: it reads some ten small files.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use holdfast_net_core::plan::NodePlan;
use ipnetwork::IpNetwork;

use crate::error::{Error, Result};
use crate::links::set_sysctl;

/// A file that does not exist is looked for at each so-manieth look.
const MISSING_LOOKS: u32 = 10;
/// To read this one the kernel wants the lock of all interfaces of the machine, and spins in the read while somebody has it
/// (`addrconf_sysctl_addr_gen_mode`, restart_syscall). It matters only when an interface comes up, which is told.
const NOT_POLLED: &str = "/addr_gen_mode";
/// Ours are single digits.
const VALUE_BYTES_MAX: usize = 16;

/// What the kernel module `br_netfilter` adds, if it is there: bridged packets pass the IP hooks on their way through the
/// bridge. A packet to a Service whose server is a pod of this node would then be translated inside the bridge, and bridged
/// on to that pod's port, which no port of ours may send to: it would be lost. All our traffic is routed, so nothing is
/// gained by it; but it can only be turned off for all bridges of the node at once.
const BRIDGE_FILTERS: [&str; 2] = ["bridge-nf-call-iptables", "bridge-nf-call-ip6tables"];

/// A path below `/proc/sys/net` and its value.
pub type Sysctl = (String, &'static str);

/// Of the node.
pub fn of_node(plan: &NodePlan) -> Vec<Sysctl> {
    let mut all = vec![("ipv4/ip_forward".to_owned(), "1")];
    if plan.pod_ranges.iter().any(IpNetwork::is_ipv6) {
        all.push(("ipv6/conf/all/forwarding".to_owned(), "1"));
    }
    // Either of the two turns it on; other interfaces keep their own.
    all.push(("ipv4/conf/all/send_redirects".to_owned(), "0"));
    if plan.bridge.is_some() {
        all.extend(BRIDGE_FILTERS.map(|name| (format!("bridge/{name}"), "0")));
    }
    all
}

/// Of the bridge.
pub fn of_bridge(name: &str) -> Vec<Sysctl> {
    vec![
        // fe80::1 is the only link-local address: none is generated from the MAC.
        (format!("ipv6/conf/{name}/addr_gen_mode"), "1"),
        // All pod traffic leaves where it came in; hosts need not be told so.
        (format!("ipv4/conf/{name}/send_redirects"), "0"),
        // The node's loopback reaches host ports: it is a source here before it is masqueraded. The pin keeps pods from sending to it.
        (format!("ipv4/conf/{name}/route_localnet"), "1"),
    ]
}

/// Of the VXLAN device.
pub fn of_vxlan(name: &str) -> Vec<Sysctl> {
    vec![
        (format!("ipv6/conf/{name}/addr_gen_mode"), "1"),
        // Loose: a peer may send from its underlay address.
        (format!("ipv4/conf/{name}/rp_filter"), "2"),
    ]
}

/// Writes those that differ; returns how many.
pub fn set(wanted: Vec<Sysctl>) -> Result<usize> {
    let mut writes = 0;
    for (path, value) in wanted {
        writes += usize::from(set_sysctl(&path, value)?);
    }
    Ok(writes)
}

/// Reads them again and again. The files stay open: to open one costs ten times as much as to read it.
#[derive(Debug, Default)]
pub struct Poll {
    files: Vec<Polled>,
    looks: u32,
}

#[derive(Debug)]
struct Polled {
    path: String,
    value: &'static str,
    /// `None`: it does not exist, as far as was looked.
    file: Option<File>,
}

impl Poll {
    /// Paths of those that differ, in the network namespace of the thread that asked first. One that does not exist does not
    /// differ; whether it exists now is looked at from time to time.
    ///
    /// # Errors
    /// One of them cannot be read.
    pub fn differing(&mut self, plan: &NodePlan) -> Result<Vec<String>> {
        let mut wanted = of_node(plan);
        wanted.extend(plan.bridge.iter().flat_map(|bridge| of_bridge(&bridge.name)));
        wanted.extend(plan.vxlan.iter().flat_map(|vxlan| of_vxlan(&vxlan.name)));
        wanted.retain(|(path, _)| !path.ends_with(NOT_POLLED));
        let is_same =
            |(polled, (path, value)): (&Polled, &Sysctl)| polled.path == *path && polled.value == *value;
        if self.files.len() != wanted.len() || !self.files.iter().zip(&wanted).all(is_same) {
            let polled = |(path, value)| Polled { path, value, file: None };
            self.files = wanted.into_iter().map(polled).collect();
            self.looks = 0;
        }
        let looks_for_missing = self.looks.is_multiple_of(MISSING_LOOKS);
        self.looks = self.looks.wrapping_add(1);
        let mut found = Vec::new();
        for polled in &mut self.files {
            if polled.differs(looks_for_missing)? {
                found.push(polled.path.clone());
            }
        }
        Ok(found)
    }
}

impl Polled {
    fn differs(&mut self, looks_for_missing: bool) -> Result<bool> {
        let had_file = self.file.is_some();
        if let Some(found) = self.read()? {
            return Ok(found);
        }
        // With its interface the file went; a new interface of that name has a new one.
        if had_file || looks_for_missing {
            self.file = match File::open(format!("/proc/sys/net/{}", self.path)) {
                Ok(file) => Some(file),
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(source) => return Err(Error::Sysctl { path: self.path.clone(), source }),
            };
        }
        Ok(self.read()?.unwrap_or(false))
    }

    /// Whether the value is another one; `None` if there is no such file (any more).
    fn read(&mut self) -> Result<Option<bool>> {
        let Some(file) = &self.file else { return Ok(None) };
        let mut text = [0; VALUE_BYTES_MAX];
        match file.read_at(&mut text, 0) {
            Ok(len) => Ok(Some(text[..len].trim_ascii() != self.value.as_bytes())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                self.file = None;
                Ok(None)
            }
            Err(source) => Err(Error::Sysctl { path: self.path.clone(), source }),
        }
    }
}
