//! The flow log and the matrix, of a real agent on a real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use std::time::{Duration, Instant};

use holdfast_proto::agent as pb;
use support::{Cluster, Netns, Node, address_of};

/// What the kernel collects before it tells, and what the agent needs to name it.
const TOLD_WITHIN: Duration = Duration::from_secs(5);

/// A node with pods `db`, `web` and `other`; only `web` may reach `db`.
struct Shop {
    node: Node,
    web: Netns,
    other: Netns,
    _db: Netns,
    db_address: String,
    _cluster: Cluster,
}

impl Shop {
    fn new() -> Self {
        let cluster = Cluster::new();
        cluster.put_node("node-a", 1, "10.10.1.0/24");
        cluster.put_policy("db", "web");
        let node = cluster.start_node("node-a", 1);
        let mut attached = ["db", "web", "other"].map(|name| {
            cluster.put_pod(name, "");
            let sandbox = Netns::new();
            let address = address_of(&node.add(name, &sandbox).unwrap());
            (Some(sandbox), address)
        });
        let db_address = attached[0].1.clone();
        let mut take = |n: usize| attached[n].0.take().unwrap();
        Self { node, _db: take(0), web: take(1), other: take(2), db_address, _cluster: cluster }
    }

    /// One datagram to `db`.
    fn send(&self, from: &Netns, port: u16) {
        let line = format!("echo x >/dev/udp/{}/{port}", self.db_address);
        assert!(from.exec("bash").args(["-c", &line]).status().unwrap().success());
    }
}

async fn next(flows: &mut tonic::Streaming<pb::Flow>) -> pb::Flow {
    tokio::time::timeout(TOLD_WITHIN, flows.message()).await.expect("an event in time").unwrap().unwrap()
}

fn pods_of(flow: &pb::Flow) -> (String, String) {
    let name = |end: &Option<pb::FlowEnd>| {
        let end = end.clone().unwrap();
        format!("{}/{}", end.namespace, end.pod)
    };
    (name(&flow.client), name(&flow.server))
}

#[test]
fn flows_name_pods_and_the_policy_that_decides_and_filters_hold() {
    let shop = Shop::new();
    shop.node.ask(async |mut client| {
        let denied = pb::FlowsRequest { verdict: "denied".into(), ..pb::FlowsRequest::default() };
        let mut all =
            client.flows(pb::FlowsRequest { port: 4000, ..Default::default() }).await.unwrap().into_inner();
        let mut denied = client.flows(denied).await.unwrap().into_inner();
        shop.send(&shop.web, 4000);
        let allowed = next(&mut all).await;
        assert!(allowed.allowed && !allowed.stateless);
        assert_eq!(pods_of(&allowed), ("shop/web".into(), "shop/db".into()));
        assert_eq!((allowed.protocol.as_str(), allowed.port, allowed.lost), ("udp", 4000, 0));
        let rule = allowed.ingress.unwrap().decided_by.unwrap();
        let decided = (rule.tier.as_str(), rule.policy.as_str(), rule.rule);
        assert_eq!(decided, ("NetworkPolicy", "shop/to-db", 1));

        shop.send(&shop.other, 4001);
        let dropped = next(&mut denied).await;
        assert!(!dropped.allowed, "the filter lets only denied ones through: {dropped:?}");
        assert_eq!(pods_of(&dropped), ("shop/other".into(), "shop/db".into()));
        let (egress, ingress) = (dropped.egress.unwrap(), dropped.ingress.unwrap());
        assert!(egress.allowed && !ingress.allowed);
        assert!(ingress.reason.contains("shop/to-db"), "{}", ingress.reason);

        // The first reader asked for another port and has seen nothing of this.
        shop.send(&shop.other, 4000);
        let second = next(&mut all).await;
        assert_eq!((second.allowed, second.port), (false, 4000));

        let wrong = pb::FlowsRequest { verdict: "maybe".into(), ..pb::FlowsRequest::default() };
        let refused = client.flows(wrong).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    });
}

#[test]
fn a_reader_does_not_keep_the_agent_from_its_end_and_is_told() {
    let mut shop = Shop::new();
    let pid = nix::unistd::Pid::from_raw(i32::try_from(shop.node.pid()).unwrap());
    let started = shop.node.ask(async |mut client| {
        let mut flows = client.flows(pb::FlowsRequest::default()).await.unwrap().into_inner();
        nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGTERM).unwrap();
        let started = Instant::now();
        let ended =
            tokio::time::timeout(TOLD_WITHIN, flows.message()).await.expect("told in time").unwrap_err();
        assert_eq!(ended.code(), tonic::Code::Unavailable);
        assert!(ended.message().contains("the agent is ending"), "{ended}");
        started
    });
    assert!(shop.node.wait().success());
    assert!(started.elapsed() < TOLD_WITHIN, "{:?}", started.elapsed());
}

#[test]
fn the_matrix_has_the_explained_verdict_of_every_pair() {
    let shop = Shop::new();
    shop.node.ask(async |mut client| {
        let request = |namespace: &str, port| pb::MatrixRequest {
            namespace: namespace.into(),
            port,
            protocol: "tcp".into(),
        };
        let reply = client.matrix(request("shop", 80)).await.unwrap().into_inner();
        assert_eq!(reply.failure, None);
        assert_eq!(reply.pods, ["shop/db", "shop/other", "shop/web"]);
        let rows: Vec<Vec<bool>> = reply.rows.into_iter().map(|row| row.allowed).collect();
        assert_eq!(rows, [[true, true, true], [false, true, true], [true, true, true]]);

        let none = client.matrix(request("elsewhere", 80)).await.unwrap().into_inner();
        assert!(none.pods.is_empty() && none.failure.is_none());
        let wrong = client.matrix(request("shop", 0)).await.unwrap().into_inner().failure.unwrap();
        assert!(wrong.msg.contains("not a port"), "{}", wrong.msg);
    });
}
