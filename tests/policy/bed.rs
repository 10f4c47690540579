//! The pods of all tables, attached once by the real plugin to two nodes with real agents, and the steps on them.
//!
//! ```text
//!   node-a: x/a x/c y/b z/a z/c  settle/a         node-b: x/b y/a y/c z/b  settle/b
//!      \________________ VXLAN over one underlay ________________/
//! ```
//!
//! When is a step in the kernel? All its objects are one file, replaced by rename, so an agent reads all of a step or
//! nothing. The file also opens a new marker port at the two pods of namespace `settle`; a change is one transaction, so once
//! both markers let a packet through, the whole step is in force on both nodes. Nothing is asked of the agent.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::netbed::{Attachment, NetBed};

use crate::oracle::{End, Question, allows};
use crate::prober::{MARKER_PORT_FIRST, Mismatch, Probe, Prober};
use crate::world::{Node, Pod, PodName, World, labels, usual_ports};

/// Namespace of the pods that tell when a step is in force.
pub const SETTLE_NAMESPACE: &str = "settle";
/// How long a step may take until it is in force.
const SETTLE_TIMEOUT: Duration = Duration::from_secs(5);
/// How long one marker packet may be under way.
const MARKER_WAIT: Duration = Duration::from_millis(2);
/// File of everything but nodes.
const FILE: &str = "world";
/// Conntrack forgets half-open connections of the tables early, so that thousands per second do not fill it.
const SHORT_TIMEOUTS: &str = "cd /proc/sys/net/netfilter && for name in tcp_timeout_syn_sent tcp_timeout_syn_recv \
    tcp_timeout_close tcp_timeout_time_wait udp_timeout sctp_timeout_cookie_wait icmp_timeout icmpv6_timeout; do \
    [ ! -w nf_conntrack_$name ] || echo 3 > nf_conntrack_$name; done";
/// A node's own packets to pods of another node come back another way than they went.
const NO_REVERSE_PATH_FILTER: &str =
    "for name in all eth0; do echo 0 > /proc/sys/net/ipv4/conf/$name/rp_filter; done";

/// Everything.
pub struct Bed {
    net: NetBed,
    attachments: BTreeMap<PodName, Attachment>,
    /// The objects with which every case begins: pods, no policy.
    base: World,
    /// Namespace `settle`.
    fixtures: World,
    /// Sends and receives.
    pub prober: Prober,
    marker: u16,
}

impl Bed {
    /// Starts nodes whose pods are attached as the agent's option `attachment` says, attaches the pods and opens their sockets.
    ///
    /// # Errors
    /// Something does not start.
    pub fn start(attachment: &str) -> Result<Self> {
        let settings = ["--address-quarantine-s=0", &format!("--attachment={attachment}")];
        let net = NetBed::start_with("policy", 2, &settings)?;
        let mut bed = Self {
            net,
            attachments: BTreeMap::new(),
            base: World::default(),
            fixtures: World::default(),
            prober: Prober::new(),
            marker: MARKER_PORT_FIRST,
        };
        for (number, node) in bed.net.nodes.iter().enumerate() {
            node.spaces.run("sh", &["-c", SHORT_TIMEOUTS])?;
            node.spaces.run("sh", &["-c", NO_REVERSE_PATH_FILTER])?;
            let labels = labels(&format!("kubernetes.io/os=linux,kubernetes.io/hostname={}", node.name));
            bed.base.nodes.insert(node.name.clone(), Node { labels, addresses: node.addresses });
            let netns = format!("/proc/{}/ns/net", node.spaces.pid());
            bed.prober.add_node(End::Node(node.name.clone()), number, node.addresses, netns.as_ref())?;
        }
        bed.fixtures.namespaces.insert(SETTLE_NAMESPACE.to_owned(), labels(""));
        for namespace in ["x", "y", "z"] {
            bed.base.namespaces.insert(namespace.to_owned(), labels(&format!("ns={namespace}")));
        }
        let mut node = 0;
        for namespace in ["x", "y", "z"] {
            for name in ["a", "b", "c"] {
                bed.attach_base(&PodName::new(&format!("{namespace}/{name}")), node)?;
                node = 1 - node;
            }
        }
        for (number, name) in ["a", "b"].into_iter().enumerate() {
            bed.attach_base(&PodName::new(&format!("{SETTLE_NAMESPACE}/{name}")), number)?;
        }
        Ok(bed)
    }

    /// The objects with which a case begins.
    #[must_use]
    pub fn base(&self) -> World {
        self.base.clone()
    }

    /// The nodes and their agents.
    pub fn net(&mut self) -> &mut NetBed {
        &mut self.net
    }

    /// The pods' network namespaces, as the host sees them.
    pub fn sandboxes(&self) -> impl Iterator<Item = (&PodName, &std::path::Path)> {
        let in_tables = self.attachments.iter().filter(|(name, _)| name.namespace != SETTLE_NAMESPACE);
        in_tables.map(|(name, attachment)| (name, attachment.netns.as_path()))
    }

    /// Brings the objects into force on both nodes.
    ///
    /// # Errors
    /// It takes too long.
    pub fn show(&mut self, world: &World) -> Result<()> {
        self.marker += 1;
        let spec = format!(
            "{{podSelector: {{}}, policyTypes: [Ingress], ingress: [{{ports: [{{protocol: UDP, port: {}}}]}}]}}",
            self.marker
        );
        self.fixtures.put_policy(&PodName::new(&format!("{SETTLE_NAMESPACE}/marker")), &spec)?;
        self.write(world)?;
        let start = Instant::now();
        // From the other node, as everything from a pod's own node passes.
        for (node, pod) in [("node-a", "b"), ("node-b", "a")] {
            let (node, pod) =
                (End::Node(node.to_owned()), End::Pod(PodName::new(&format!("{SETTLE_NAMESPACE}/{pod}"))));
            while !self.prober.marker_arrives(&node, &pod, self.marker, MARKER_WAIT)? {
                if start.elapsed() > SETTLE_TIMEOUT {
                    let logs: Vec<String> = self.net.nodes.iter().map(|node| node.netd.log_tail()).collect();
                    bail!("the objects are not in force after {SETTLE_TIMEOUT:?}:\n{}", logs.join("\n"));
                }
            }
        }
        Ok(())
    }

    /// Writes the objects without waiting for anything.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&self, world: &World) -> Result<()> {
        self.net.objects.put_text(FILE, &format!("{}{}", world.yaml()?, self.fixtures.yaml()?))
    }

    /// Tries every connection and compares it with the oracle's answer for `world`.
    ///
    /// # Errors
    /// The prober's.
    pub fn compare(&mut self, label: &str, world: &World) -> Result<Vec<Mismatch>> {
        let ends: Vec<_> = self.prober.ends().map(|(end, addresses)| (end.clone(), addresses)).collect();
        self.prober.compare(label, |probe| oracle_allows(world, &ends, probe))
    }

    /// Attaches a pod that a case adds, and puts its addresses into `world`.
    ///
    /// # Errors
    /// The plugin's.
    pub fn attach(&mut self, world: &mut World, name: &PodName, pod_labels: &str) -> Result<()> {
        let node = self.attachments.len() % self.net.nodes.len();
        let pod = Pod {
            labels: labels(pod_labels),
            ports: usual_ports(),
            node: self.net.nodes[node].name.clone(),
            addresses: Vec::new(),
            completed: false,
        };
        world.pods.insert(name.clone(), pod);
        // The object is there before ADD, the address after.
        self.write(world)?;
        let attachment = self.net.attach(node, &name.namespace, &name.name)?;
        world.pods.get_mut(name).context("it was inserted")?.addresses = attachment.addresses.to_vec();
        self.prober.add_pod(End::Pod(name.clone()), node, attachment.addresses, &attachment.netns)?;
        self.attachments.insert(name.clone(), attachment);
        Ok(())
    }

    /// Detaches a pod that a case added.
    ///
    /// # Errors
    /// The plugin's.
    pub fn detach(&mut self, name: &PodName) -> Result<()> {
        self.prober.remove(&End::Pod(name.clone()));
        let attachment = self.attachments.remove(name).with_context(|| format!("{name} is not attached"))?;
        self.net.detach(&attachment)
    }

    /// Detaches whatever a case left.
    ///
    /// # Errors
    /// The plugin's.
    pub fn detach_extra(&mut self) -> Result<()> {
        let known =
            |name: &PodName| self.base.pods.contains_key(name) || self.fixtures.pods.contains_key(name);
        let extra: Vec<PodName> = self.attachments.keys().filter(|name| !known(name)).cloned().collect();
        extra.iter().try_for_each(|name| self.detach(name))
    }

    /// Adds a namespace with pods to what every case begins with.
    ///
    /// # Errors
    /// The plugin's.
    pub fn add_namespace(&mut self, name: &str, pods: &[&str]) -> Result<()> {
        self.base.namespaces.insert(name.to_owned(), labels(&format!("ns={name}")));
        let pods = pods.iter().enumerate();
        pods.into_iter().try_for_each(|(number, pod)| self.attach_base(&PodName::new(pod), number % 2))
    }

    /// Takes it out again.
    ///
    /// # Errors
    /// The plugin's.
    pub fn remove_namespace(&mut self, name: &str) -> Result<()> {
        let pods: Vec<PodName> = self.base.pods.keys().filter(|pod| pod.namespace == name).cloned().collect();
        for pod in pods {
            self.detach(&pod)?;
            self.base.pods.remove(&pod);
        }
        self.base.namespaces.remove(name);
        self.write(&self.base)
    }

    /// Ends everything; with a failure the agents' logs are kept.
    ///
    /// # Errors
    /// Something is left behind.
    pub fn end(self, failed: bool) -> Result<()> {
        drop(self.prober);
        self.net.end(if failed { Logs::Keep } else { Logs::Remove })
    }

    /// A pod that is there from the start.
    fn attach_base(&mut self, name: &PodName, node: usize) -> Result<()> {
        let pod = Pod {
            labels: labels(&format!("pod={}", name.name)),
            ports: usual_ports(),
            node: self.net.nodes[node].name.clone(),
            addresses: Vec::new(),
            completed: false,
        };
        self.home(name).pods.insert(name.clone(), pod);
        self.write(&self.base)?;
        let attachment = self.net.attach(node, &name.namespace, &name.name)?;
        self.home(name).pods.get_mut(name).context("it was inserted")?.addresses =
            attachment.addresses.to_vec();
        self.prober.add_pod(End::Pod(name.clone()), node, attachment.addresses, &attachment.netns)?;
        self.attachments.insert(name.clone(), attachment);
        Ok(())
    }

    fn home(&mut self, name: &PodName) -> &mut World {
        if name.namespace == SETTLE_NAMESPACE { &mut self.fixtures } else { &mut self.base }
    }
}

/// The oracle's answer to a probe between the prober's `ends`.
///
/// # Panics
/// A node is a source: no table has that.
#[must_use]
pub fn oracle_allows(world: &World, ends: &[(End, [std::net::IpAddr; 2])], probe: &Probe) -> bool {
    let family = usize::from(probe.v6);
    let (source, source_addresses) = &ends[probe.source];
    let (target, target_addresses) = &ends[probe.target];
    let End::Pod(source) = source else { panic!("{source:?} is a source") };
    allows(
        world,
        &Question {
            source,
            target,
            target_address: target_addresses[family],
            source_address: source_addresses[family],
            protocol: probe.protocol,
            port: probe.port,
        },
    )
}
