//! Random clusters that change.

use std::collections::BTreeMap;
use std::net::IpAddr;

use holdfast_net_core::objects::{
    ClusterAction, ClusterEgressRule, ClusterIngressRule, ClusterNetworkPolicy, ClusterNetworkPolicySpec,
    ClusterPeer, ClusterPort, ClusterPortRange, ClusterPorts, ClusterProtocol, ClusterSubject, ClusterTier,
    Container, ContainerPort, EgressRule, IngressRule, IpBlock, LabelSelector, Labels, Meta, NamespacedPods,
    NetworkPolicy, NetworkPolicySpec, Node, NodeAddress, ObjectChange, ObjectName, Operator, Peer, Pod,
    PodIp, PodSpec, PodStatus, PolicyPort, PolicyType, PortNumberOrName, Protocol, Requirement,
};
use holdfast_net_core::policy::{Subject, validate, validate_cluster};
use rand::Rng;
use rand::rngs::StdRng;

/// All objects of a cluster.
#[derive(Debug, Clone, Default)]
pub struct Objects {
    pub nodes: BTreeMap<String, Node>,
    pub namespaces: BTreeMap<String, Labels>,
    pub pods: BTreeMap<ObjectName, Pod>,
    pub policies: BTreeMap<ObjectName, NetworkPolicy>,
    pub cluster_policies: BTreeMap<String, ClusterNetworkPolicy>,
}

impl Objects {
    /// What turns `before` into this.
    pub fn changes_since(&self, before: &Self) -> Vec<ObjectChange> {
        let mut changes = Vec::new();
        differing(&before.nodes, &self.nodes, |name, node| {
            changes.push(ObjectChange::Node(name.clone(), node.cloned().map(Box::new)));
        });
        differing(&before.namespaces, &self.namespaces, |name, labels| {
            changes.push(ObjectChange::Namespace(name.clone(), labels.cloned()));
        });
        differing(&before.pods, &self.pods, |name, pod| {
            changes.push(ObjectChange::Pod(name.clone(), pod.cloned().map(Box::new)));
        });
        differing(&before.policies, &self.policies, |name, policy| {
            changes.push(ObjectChange::Policy(name.clone(), policy.cloned().map(Box::new)));
        });
        differing(&before.cluster_policies, &self.cluster_policies, |name, policy| {
            changes.push(ObjectChange::ClusterPolicy(name.clone(), policy.cloned().map(Box::new)));
        });
        changes
    }
}

fn differing<K: Ord + Clone, V: PartialEq>(
    before: &BTreeMap<K, V>,
    now: &BTreeMap<K, V>,
    mut found: impl FnMut(&K, Option<&V>),
) {
    let keys: std::collections::BTreeSet<&K> = before.keys().chain(now.keys()).collect();
    for key in keys {
        if before.get(key) != now.get(key) {
            found(key, now.get(key));
        }
    }
}

/// Objects and the endpoints of one node.
#[derive(Clone)]
pub struct World {
    /// All objects.
    pub objects: Objects,
    /// The local endpoints.
    pub subjects: Vec<Subject>,
    /// Endpoints that may come back.
    parked: Vec<Subject>,
}

impl World {
    /// Nothing.
    pub fn empty() -> Self {
        Self { objects: Objects::default(), subjects: Vec::new(), parked: Vec::new() }
    }

    pub fn generate(rng: &mut StdRng) -> Self {
        let mut world = Self { objects: Objects::default(), subjects: Vec::new(), parked: Vec::new() };
        for name in ["x", "y", "z"] {
            let metadata = Meta { name: name.into(), labels: mk_labels(rng), ..Meta::default() };
            world.objects.namespaces.insert(metadata.name, metadata.labels);
        }
        for index in 0..9 {
            let pod = mk_pod(rng, index);
            let name = pod.object_name();
            if index < 4 {
                let uid = if rng.random_bool(0.1) { "another" } else { "" };
                let moved = rng.random_bool(0.2);
                let addresses =
                    if moved { vec![v4(20 + index), v6(20 + u16::from(index))] } else { pod.addresses() };
                world.subjects.push(Subject { pod: Some(name.clone()), uid: uid.into(), addresses });
            }
            world.objects.pods.insert(name, pod);
        }
        world.subjects.push(Subject { pod: None, uid: String::new(), addresses: vec![v4(30), v6(30)] });
        let unknown = Some(ObjectName::new("x", "unknown"));
        world.subjects.push(Subject { pod: unknown, uid: String::new(), addresses: vec![v4(31)] });
        for index in 0..rng.random_range(0..6) {
            world.put_policy(rng, index);
        }
        for index in 0..rng.random_range(0..4) {
            world.put_cluster_policy(rng, index);
        }
        for index in 0..2 {
            world.put_node(rng, index);
        }
        world
    }

    pub fn mutate(&mut self, rng: &mut StdRng) {
        for _ in 0..rng.random_range(1..4) {
            match rng.random_range(0..12) {
                9 if self.subjects.is_empty() => {}
                9 => {
                    let nth = rng.random_range(0..self.subjects.len());
                    let mut subject = self.subjects.remove(nth);
                    if rng.random_bool(0.5) {
                        subject.uid = if rng.random_bool(0.3) { "another".into() } else { String::new() };
                        self.subjects.push(subject);
                    } else {
                        self.parked.push(subject);
                    }
                }
                10 => self.subjects.extend(self.parked.pop()),
                11 => {
                    let index = rng.random_range(0..9);
                    let known =
                        self.objects.pods.keys().find(|name| name.name == format!("pod{index}")).cloned();
                    match known {
                        Some(name) => drop(self.objects.pods.remove(&name)),
                        None => {
                            let pod = mk_pod(rng, index);
                            self.objects.pods.insert(pod.object_name(), pod);
                        }
                    }
                }
                6 => {
                    let index = rng.random_range(0..4);
                    self.put_cluster_policy(rng, index);
                }
                7 => {
                    let index = rng.random_range(0..4);
                    self.objects.cluster_policies.remove(&format!("c{index}"));
                }
                8 => {
                    let index = rng.random_range(0..2);
                    self.put_node(rng, index);
                }
                0 | 1 => {
                    let index = rng.random_range(0..6);
                    self.put_policy(rng, index);
                }
                2 => {
                    let index = rng.random_range(0..6);
                    self.objects.policies.retain(|name, _| name.name != format!("p{index}"));
                }
                3 | 4 => {
                    if self.objects.pods.is_empty() {
                        continue;
                    }
                    let nth = rng.random_range(0..self.objects.pods.len());
                    let pod = self.objects.pods.values_mut().nth(nth).unwrap();
                    match rng.random_range(0..3) {
                        0 => pod.metadata.labels = mk_labels(rng),
                        1 => pod.status.phase = mk_phase(rng),
                        _ => pod.spec.containers = mk_containers(rng),
                    }
                }
                _ => {
                    let name = ["x", "y", "z"][rng.random_range(0..3)];
                    let metadata = Meta { name: name.into(), labels: mk_labels(rng), ..Meta::default() };
                    self.objects.namespaces.insert(metadata.name, metadata.labels);
                }
            }
        }
    }

    fn put_policy(&mut self, rng: &mut StdRng, index: usize) {
        let namespace = ["x", "y", "z"][rng.random_range(0..3)];
        let types = [
            vec![],
            vec![PolicyType::Ingress],
            vec![PolicyType::Egress],
            vec![PolicyType::Ingress, PolicyType::Egress],
        ];
        let spec = NetworkPolicySpec {
            pod_selector: mk_selector(rng),
            policy_types: types[rng.random_range(0..4)].clone(),
            ingress: many(rng, 3, |rng| IngressRule {
                from: many(rng, 3, mk_peer),
                ports: many(rng, 3, mk_port),
            }),
            egress: many(rng, 3, |rng| EgressRule {
                to: many(rng, 3, mk_peer),
                ports: many(rng, 3, mk_port),
            }),
        };
        let metadata = Meta { name: format!("p{index}"), namespace: namespace.into(), ..Meta::default() };
        let policy = NetworkPolicy { metadata, spec };
        assert_eq!(validate(&policy), Ok(()));
        self.objects.policies.insert(policy.object_name(), policy);
    }

    fn put_cluster_policy(&mut self, rng: &mut StdRng, index: usize) {
        let subject = if rng.random_bool(0.5) {
            ClusterSubject { namespaces: Some(mk_selector(rng)), pods: None }
        } else {
            ClusterSubject { namespaces: None, pods: Some(mk_both(rng)) }
        };
        let spec = ClusterNetworkPolicySpec {
            tier: if rng.random_bool(0.5) { ClusterTier::Admin } else { ClusterTier::Baseline },
            priority: rng.random_range(0..3),
            subject,
            ingress: many(rng, 4, |rng| ClusterIngressRule {
                name: String::new(),
                action: mk_action(rng),
                from: mk_cluster_peers(rng, false),
                protocols: mk_protocols(rng, true),
            }),
            egress: many(rng, 4, |rng| {
                let to = mk_cluster_peers(rng, true);
                let pods = to.iter().all(|peer| peer.namespaces.is_some() || peer.pods.is_some());
                let protocols = mk_protocols(rng, pods);
                ClusterEgressRule { name: String::new(), action: mk_action(rng), to, protocols }
            }),
        };
        let metadata = Meta { name: format!("c{index}"), ..Meta::default() };
        let policy = ClusterNetworkPolicy { metadata, spec };
        assert_eq!(validate_cluster(&policy), Ok(()));
        self.objects.cluster_policies.insert(policy.metadata.name.clone(), policy);
    }

    fn put_node(&mut self, rng: &mut StdRng, index: u8) {
        let metadata = Meta { name: format!("n{index}"), labels: mk_labels(rng), ..Meta::default() };
        let mut node = Node { metadata, ..Node::default() };
        let address = |kind: &str, address: String| NodeAddress { kind: kind.to_owned(), address };
        node.status.addresses = vec![
            address("InternalIP", node_address(index).to_string()),
            address("Hostname", format!("n{index}")),
        ];
        self.objects.nodes.insert(node.metadata.name.clone(), node);
    }

    pub fn live_pod(&self, name: &ObjectName, uid: &str) -> Option<&Pod> {
        let pod = self.objects.pods.get(name)?;
        let completed = pod.status.phase == "Succeeded" || pod.status.phase == "Failed";
        let same = uid.is_empty() || pod.metadata.uid.is_empty() || pod.metadata.uid == uid;
        (!completed && !pod.spec.host_network && same).then_some(pod)
    }

    pub fn owner(&self, address: IpAddr) -> Option<&Pod> {
        if let Some(subject) = self.subjects.iter().find(|subject| subject.addresses.contains(&address)) {
            return self.live_pod(subject.pod.as_ref()?, &subject.uid);
        }
        let claims = self.objects.pods.iter().filter(|(name, pod)| {
            let ours = pod.status.pod_ips.iter().any(|entry| entry.ip == address);
            ours && self.live_pod(name, "").is_some()
        });
        let claims: Vec<&Pod> = claims.map(|(_, pod)| pod).collect();
        if claims.len() == 1 { Some(claims[0]) } else { None }
    }

    pub fn interesting_addresses(&self) -> Vec<IpAddr> {
        let mut addresses: Vec<IpAddr> = (0..=11).map(v4).collect();
        addresses.extend((0..=6).map(v6));
        addresses.extend((20..24).map(v4));
        addresses.extend([node_address(0), node_address(1)]);
        addresses.extend([v4(30), v4(31), v4(127), v4(128), v4(255), v6(30)]);
        addresses.extend(
            ["10.1.0.1", "8.8.8.8", "255.255.255.255", "2001:db8::1"].map(|t| t.parse::<IpAddr>().unwrap()),
        );
        addresses
    }
}

fn node_address(index: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, 40 + index])
}

fn v4(last: u8) -> IpAddr {
    IpAddr::from([10, 0, 0, last])
}

fn v6(last: u16) -> IpAddr {
    IpAddr::from([0xfd00, 0, 0, 0, 0, 0, 0, last])
}

fn mk_pod(rng: &mut StdRng, index: u8) -> Pod {
    // Now and then two pods claim one address.
    let last = if index > 4 && rng.random_bool(0.1) { index - 1 } else { index } + 1;
    let ips = [v4(last), v6(last.into())].map(|ip| PodIp { ip }).to_vec();
    let metadata = Meta {
        name: format!("pod{index}"),
        namespace: ["x", "y", "z"][rng.random_range(0..3)].into(),
        uid: format!("uid{index}"),
        labels: mk_labels(rng),
        ..Meta::default()
    };
    let spec =
        PodSpec { host_network: rng.random_bool(0.05), containers: mk_containers(rng), ..PodSpec::default() };
    Pod { metadata, spec, status: PodStatus { phase: mk_phase(rng), pod_ip: Some(ips[0].ip), pod_ips: ips } }
}

fn mk_phase(rng: &mut StdRng) -> String {
    ["Running", "Running", "Running", "Pending", "Running", "Succeeded", "Failed", "Running"]
        [rng.random_range(0..8)]
    .to_owned()
}

fn mk_containers(rng: &mut StdRng) -> Vec<Container> {
    many(rng, 3, |rng| {
        let ports = many(rng, 3, |rng| ContainerPort {
            name: Some(["http", "dns"][rng.random_range(0..2)].to_owned()),
            container_port: [80, 81, 8080, 53][rng.random_range(0..4)],
            protocol: mk_protocol(rng),
        });
        Container { ports, restart_policy: None }
    })
}

fn mk_labels(rng: &mut StdRng) -> Labels {
    let mut labels = Labels::new();
    for key in ["app", "tier"] {
        if rng.random_bool(0.7) {
            labels.insert(key.to_owned(), ["a", "b", "c"][rng.random_range(0..3)].to_owned());
        }
    }
    labels
}

fn mk_selector(rng: &mut StdRng) -> LabelSelector {
    let match_labels = if rng.random_bool(0.4) { mk_labels(rng) } else { Labels::new() };
    let match_expressions = many(rng, 2, |rng| {
        let operator =
            [Operator::In, Operator::NotIn, Operator::Exists, Operator::DoesNotExist][rng.random_range(0..4)];
        let values = match operator {
            Operator::In | Operator::NotIn => vec!["a".to_owned(), "b".to_owned()],
            Operator::Exists | Operator::DoesNotExist => Vec::new(),
        };
        Requirement { key: ["app", "tier"][rng.random_range(0..2)].to_owned(), operator, values }
    });
    LabelSelector { match_labels, match_expressions }
}

fn mk_peer(rng: &mut StdRng) -> Peer {
    if rng.random_bool(0.35) {
        return Peer { ip_block: Some(mk_block(rng)), ..Peer::default() };
    }
    let mut peer = Peer::default();
    if rng.random_bool(0.7) {
        peer.pod_selector = Some(mk_selector(rng));
    }
    if peer.pod_selector.is_none() || rng.random_bool(0.4) {
        peer.namespace_selector = Some(mk_selector(rng));
    }
    peer
}

fn mk_block(rng: &mut StdRng) -> IpBlock {
    let choices: [(&str, &[&str]); 8] = [
        ("0.0.0.0/0", &["10.0.0.0/8"]),
        ("0.0.0.0/0", &[]),
        ("10.0.0.0/24", &["10.0.0.4/30", "10.0.0.6/31", "10.0.0.128/25"]),
        ("10.0.0.0/25", &[]),
        ("10.0.0.5/32", &[]),
        ("10.0.0.0/8", &["10.0.0.0/29"]),
        ("::/0", &["fd00::4/126"]),
        ("fd00::/126", &[]),
    ];
    let (cidr, except) = choices[rng.random_range(0..choices.len())];
    let except = except.iter().filter(|_| rng.random_bool(0.7)).map(|text| text.parse().unwrap());
    IpBlock { cidr: cidr.parse().unwrap(), except: except.collect() }
}

fn mk_both(rng: &mut StdRng) -> NamespacedPods {
    NamespacedPods { namespace_selector: mk_selector(rng), pod_selector: mk_selector(rng) }
}

fn mk_action(rng: &mut StdRng) -> ClusterAction {
    [ClusterAction::Accept, ClusterAction::Deny, ClusterAction::Pass][rng.random_range(0..3)]
}

fn mk_cluster_peers(rng: &mut StdRng, egress: bool) -> Vec<ClusterPeer> {
    (0..rng.random_range(1..3)).map(|_| mk_cluster_peer(rng, egress)).collect()
}

/// Now and then one of a field that is not known.
fn mk_cluster_peer(rng: &mut StdRng, egress: bool) -> ClusterPeer {
    let mut peer = ClusterPeer::default();
    match rng.random_range(0..if egress { 20 } else { 12 }) {
        0 => {}
        1..6 => peer.namespaces = Some(mk_selector(rng)),
        6..12 => peer.pods = Some(mk_both(rng)),
        12..15 => peer.nodes = Some(mk_selector(rng)),
        15 => peer.domain_names = Some(vec!["holdfast.example".to_owned()]),
        _ => peer.networks = Some((0..rng.random_range(1..3)).map(|_| mk_block(rng).cidr).collect()),
    }
    peer
}

fn mk_protocols(rng: &mut StdRng, named: bool) -> Option<Vec<ClusterProtocol>> {
    if rng.random_bool(0.4) {
        return None;
    }
    Some((0..rng.random_range(1..3)).map(|_| mk_cluster_protocol(rng, named)).collect())
}

fn mk_cluster_protocol(rng: &mut StdRng, named: bool) -> ClusterProtocol {
    let mut protocol = ClusterProtocol::default();
    if named && rng.random_bool(0.2) {
        protocol.destination_named_port = Some(["http", "dns"][rng.random_range(0..2)].to_owned());
        return protocol;
    }
    let destination_port = match rng.random_range(0..4) {
        0 => None,
        1 => Some(ClusterPort { number: None, range: Some(ClusterPortRange { start: 80, end: 8080 }) }),
        _ => Some(ClusterPort { number: Some([80, 81, 53, 8085][rng.random_range(0..4)]), range: None }),
    };
    let ports = Some(ClusterPorts { destination_port });
    match rng.random_range(0..20) {
        0 => {}
        1..10 => protocol.tcp = ports,
        10..16 => protocol.udp = ports,
        _ => protocol.sctp = ports,
    }
    protocol
}

fn mk_port(rng: &mut StdRng) -> PolicyPort {
    let protocol = mk_protocol(rng);
    match rng.random_range(0..5) {
        0 => PolicyPort { protocol, port: None, end_port: None },
        1 => {
            let name = ["http", "dns"][rng.random_range(0..2)].to_owned();
            PolicyPort { protocol, port: Some(PortNumberOrName::Name(name)), end_port: None }
        }
        2 => {
            let (first, last) = [(80, 81), (81, 8080), (8080, 65535), (1, 1)][rng.random_range(0..4)];
            PolicyPort { protocol, port: Some(PortNumberOrName::Number(first)), end_port: Some(last) }
        }
        _ => {
            let number = [80, 81, 53, 8085][rng.random_range(0..4)];
            PolicyPort { protocol, port: Some(PortNumberOrName::Number(number)), end_port: None }
        }
    }
}

fn mk_protocol(rng: &mut StdRng) -> Protocol {
    [Protocol::Tcp, Protocol::Tcp, Protocol::Udp, Protocol::Sctp][rng.random_range(0..4)]
}

fn many<T>(rng: &mut StdRng, below: usize, mut make: impl FnMut(&mut StdRng) -> T) -> Vec<T> {
    (0..rng.random_range(0..below)).map(|_| make(rng)).collect()
}
