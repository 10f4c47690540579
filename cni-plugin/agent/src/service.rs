//! The gRPC service for the plugin and the command line.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;

use futures::Stream;
use holdfast_net_core::bandwidth::{Bandwidth, Rate};
use holdfast_net_core::cni::{CniError, check_attachment, code, is_identifier};
use holdfast_net_core::ipam::AddressRequest;
use holdfast_net_core::nat::PortMapping;
use holdfast_net_core::objects::{ObjectName, Protocol};
use holdfast_net_core::plan::{GATEWAY_V4, GATEWAY_V6};
use holdfast_net_core::policy::Trace;
use holdfast_net_core::ports::Proto;
use holdfast_proto::agent as pb;
use holdfast_proto::agent::agent_server::Agent;
use tonic::{Request, Response, Status};

use crate::attach::{AddInput, Attacher, Previous};
use crate::engine::{LiveAnswer, Question};
use crate::flows::{Feed, FeedError, Filter, Reader};
use crate::leases::{AttachmentKey, Lease, Wanted};
use crate::matrix::{MatrixQuestion, matrix};

/// Longest name of a network, a pod or its namespace: Kubernetes' own limit for names of objects.
const NAME_BYTES_MAX: usize = 253;
/// Longest path of a sandbox: the kernel's PATH_MAX without the end.
const PATH_BYTES_MAX: usize = 4095;

/// Serves [`Agent`].
#[derive(Clone)]
pub(crate) struct Service {
    pub(crate) attacher: Arc<Attacher>,
    pub(crate) flows: Arc<Feed>,
    /// This node's name.
    pub(crate) node: Arc<str>,
}

/// Runs a verb to its end also when the caller hangs up: half an ADD would stay otherwise.
async fn finish<T: Send + 'static>(
    verb: impl Future<Output = Result<T, CniError>> + Send + 'static,
) -> Result<T, CniError> {
    let ended = tokio::spawn(verb).await;
    ended.unwrap_or_else(|error| {
        Err(CniError::new(code::INTERNAL, "the agent failed").details(error.to_string()))
    })
}

fn key_of(attachment: Option<pb::Attachment>) -> Result<AttachmentKey, CniError> {
    let attachment = attachment.unwrap_or_default();
    let key = AttachmentKey { container_id: attachment.container_id, ifname: attachment.ifname };
    check_attachment(&key.container_id, &key.ifname)?;
    Ok(key)
}

/// What the plugin checks too; the socket may be asked by others.
fn check_add(request: &pb::AddRequest) -> Result<(), CniError> {
    let wrong = |what: String| Err(CniError::new(code::INVALID_CONFIG, what));
    if !is_identifier(&request.network) || request.network.len() > NAME_BYTES_MAX {
        return wrong("the network's name must be letters, digits, \"_\", \".\" and \"-\"".to_owned());
    }
    if !request.netns.starts_with('/') || request.netns.len() > PATH_BYTES_MAX || request.netns.contains('\0')
    {
        return Err(CniError::new(code::INVALID_ENVIRONMENT, "CNI_NETNS is not an absolute path"));
    }
    let pod = request.pod.clone().unwrap_or_default();
    if [&pod.namespace, &pod.name, &pod.uid].iter().any(|text| text.len() > NAME_BYTES_MAX) {
        return wrong(format!("the pod's name or uid is longer than {NAME_BYTES_MAX} bytes"));
    }
    Ok(())
}

/// What an ADD asks for.
fn wanted_of(request: &pb::AddRequest) -> Result<Wanted, CniError> {
    let pb::AddRequest { ips, mac, address_sets: sets, .. } = request;
    let wrong = |what: &str| CniError::new(code::INVALID_CONFIG, format!("\"{what}\" is not an address"));
    let ip = |text: &String| text.parse::<IpAddr>().map_err(|_| wrong(text));
    let piece = |piece: &pb::AddressPiece| Ok((ip(&piece.first)?, ip(&piece.last)?));
    let set = |set: &pb::AddressSet| set.pieces.iter().map(piece).collect::<Result<Vec<_>, CniError>>();
    Ok(Wanted {
        addresses: AddressRequest {
            ips: ips.iter().map(ip).collect::<Result<_, _>>()?,
            range_sets: sets.iter().map(set).collect::<Result<_, _>>()?,
        },
        mac: (!mac.is_empty()).then(|| mac.parse()).transpose().map_err(|_| wrong(mac))?,
        host_ports: request.port_mappings.iter().map(port_mapping).collect::<Result<_, _>>()?,
        bandwidth: bandwidth(request.bandwidth.unwrap_or_default())?,
    })
}

fn bandwidth(limits: pb::Bandwidth) -> Result<Bandwidth, CniError> {
    let rate = |rate: u64, burst: u64| match (rate, Rate::new(rate, burst)) {
        (0, _) => Ok(None),
        (_, Some(rate)) => Ok(Some(rate)),
        (_, None) => Err(CniError::new(code::INVALID_CONFIG, format!("{limits:?} are no limits"))),
    };
    Ok(Bandwidth {
        ingress: rate(limits.ingress_rate, limits.ingress_burst)?,
        egress: rate(limits.egress_rate, limits.egress_burst)?,
    })
}

fn port_mapping(mapping: &pb::PortMapping) -> Result<PortMapping, CniError> {
    let wrong = || CniError::new(code::INVALID_CONFIG, format!("{mapping:?} is no port mapping"));
    let port = |number| u16::try_from(number).ok().filter(|port| *port > 0).ok_or_else(wrong);
    let proto = Proto::ALL.into_iter().find(|proto| proto.to_string() == mapping.protocol);
    let address = &mapping.host_ip;
    let address = (!address.is_empty()).then(|| address.parse::<IpAddr>()).transpose();
    Ok(PortMapping {
        proto: proto.ok_or_else(wrong)?,
        host_ip: address.map_err(|_| wrong())?,
        host_port: port(mapping.host_port)?,
        container_port: port(mapping.container_port)?,
    })
}

fn failure(error: CniError) -> pb::Failure {
    pb::Failure { code: error.code, msg: error.msg, details: error.details }
}

fn internal(text: String) -> CniError {
    CniError::new(code::INTERNAL, text)
}

impl Service {
    async fn do_add(self, request: pb::AddRequest) -> Result<Lease, CniError> {
        check_add(&request)?;
        let wanted = wanted_of(&request)?;
        let key = key_of(request.attachment)?;
        let pod = request.pod.unwrap_or_default();
        let named = !pod.name.is_empty();
        let input = AddInput {
            key,
            netns: request.netns,
            network: request.network,
            pod: named.then(|| ObjectName::new(&pod.namespace, &pod.name)),
            pod_uid: pod.uid,
            wanted,
        };
        self.attacher.add(input).await
    }

    async fn do_check(self, request: pb::CheckRequest) -> Result<(), CniError> {
        let key = key_of(request.attachment)?;
        let ours = |interface: &&pb::Interface| interface.name == key.ifname && !interface.sandbox.is_empty();
        let ours = request.interfaces.iter().find(ours);
        let previous = Previous {
            mac: ours.map(|interface| interface.mac.clone()).filter(|mac| !mac.is_empty()),
            mtu: ours.map(|interface| interface.mtu).filter(|mtu| *mtu > 0),
            addresses: request.addresses,
            routes: request.routes,
        };
        self.attacher.check(&key, &request.network, &request.netns, &previous).await
    }

    async fn do_gc(self, request: pb::GcRequest) -> Result<u32, CniError> {
        // Only compared with what is held: a name that no attachment of ours can have is no reason to keep garbage.
        let key = |it: pb::Attachment| AttachmentKey { container_id: it.container_id, ifname: it.ifname };
        let valid: BTreeSet<AttachmentKey> = request.valid.into_iter().map(key).collect();
        self.attacher.collect(&request.network, &valid).await
    }

    async fn do_status(self) -> Result<(), CniError> {
        let health = self.attacher.engine.health().await.map_err(internal)?;
        if let Some(why) = health.not_ready {
            return Err(CniError::new(code::NOT_AVAILABLE, "the node's network is not ready").details(why));
        }
        if let Some(why) = health.broken {
            let msg = "the node's network is not as planned; existing pods may be cut";
            return Err(CniError::new(code::NOT_AVAILABLE_LIMITED, msg).details(why));
        }
        match self.attacher.leases.used_up().await {
            Some(error) => Err(CniError::new(code::NOT_AVAILABLE, error.to_string())),
            None => Ok(()),
        }
    }

    async fn do_explain(self, request: pb::ExplainRequest) -> Result<pb::ExplainReply, CniError> {
        let usage = |text: String| CniError::new(code::INVALID_CONFIG, text);
        let (proto, port) = protocol_and_port(&request.protocol, request.port).map_err(usage)?;
        let question = Question { from: request.from, to: request.to, proto, port };
        let why = self.attacher.engine.why(question).await.map_err(usage)?;
        Ok(pb::ExplainReply {
            failure: None,
            allowed: why.explanation.is_allowed(),
            egress: answer_text(&why.explanation.egress),
            ingress: answer_text(&why.explanation.ingress),
            egress_live: Some(live_answer(why.egress)),
            ingress_live: Some(live_answer(why.ingress)),
            notes: why.notes,
            node: why.node,
        })
    }

    async fn do_policies(self, request: pb::PoliciesRequest) -> Result<pb::PoliciesReply, CniError> {
        let usage = |text: String| CniError::new(code::INVALID_CONFIG, text);
        let wanted = Some(request.policy.as_str()).filter(|name| !name.is_empty());
        let name = wanted.map(|text| match text.split_once('/') {
            Some((namespace, name)) => ObjectName::new(namespace, name),
            None => ObjectName { namespace: String::new(), name: text.to_owned() },
        });
        let policies = self.attacher.engine.policies(name).await.map_err(usage)?;
        if policies.is_empty() && wanted.is_some() {
            return Err(usage(format!("there is no policy \"{}\"", request.policy)));
        }
        Ok(pb::PoliciesReply { failure: None, node: self.node.to_string(), policies })
    }

    async fn do_matrix(self, request: pb::MatrixRequest) -> Result<pb::MatrixReply, CniError> {
        let usage = |text: String| CniError::new(code::INVALID_CONFIG, text);
        let (proto, port) = protocol_and_port(&request.protocol, request.port).map_err(usage)?;
        let namespace = Some(request.namespace).filter(|namespace| !namespace.is_empty());
        let question = MatrixQuestion { namespace, proto, port };
        matrix(&self.attacher.engine, &question).await.map_err(usage)
    }
}

/// The events of a reader until it leaves or the log ends.
fn flow_stream(reader: Reader) -> FlowStream {
    Box::pin(futures::stream::unfold(Some(reader), async |reader| {
        let mut reader = reader?;
        Some(match reader.next().await {
            Ok(flow) => (Ok(flow), Some(reader)),
            Err(error) => (Err(feed_failure(error)), None),
        })
    }))
}

fn feed_failure(error: FeedError) -> Status {
    match error {
        FeedError::Full => Status::resource_exhausted("too many readers of the flow log; end one of them"),
        FeedError::Unavailable(why) => Status::unavailable(format!("the flow log cannot be read: {why}")),
    }
}

type FlowStream = Pin<Box<dyn Stream<Item = Result<pb::Flow, Status>> + Send>>;

fn protocol_and_port(protocol: &str, port: u32) -> Result<(Proto, u16), String> {
    let protocol: Protocol = protocol.parse()?;
    let number = u16::try_from(port).ok().filter(|port| *port > 0);
    Ok((protocol.into(), number.ok_or_else(|| format!("{port} is not a port"))?))
}

fn answer_text(answer: &holdfast_net_core::policy::DirectionAnswer) -> String {
    format!("{}: {}", if answer.allowed { "allowed" } else { "denied" }, answer.reason)
}

fn live_answer(answer: LiveAnswer) -> pb::LiveAnswer {
    use pb::live_answer::State;
    let mut live = pb::LiveAnswer::default();
    let (state, trace) = match answer {
        LiveAnswer::Agrees(trace) => (State::Agrees, Some(trace)),
        LiveAnswer::Differs(trace, differences) => {
            live.differences = differences;
            (State::Differs, trace)
        }
        LiveAnswer::Elsewhere(note) => {
            live.note = note;
            (State::Elsewhere, None)
        }
        LiveAnswer::Unread(note) => {
            live.note = note;
            (State::Unread, None)
        }
    };
    live.set_state(state);
    live.allowed = trace.as_ref().map(Trace::is_allowed);
    live.found = trace.map(|trace| trace.to_string()).unwrap_or_default();
    live
}

/// The attachment as a CNI result: the bridge if there is one, the host end, the pod's end.
fn result_of(lease: &Lease) -> pb::AddResult {
    let plan = &lease.plan;
    let interface = |name: &str, mac: String, sandbox: &str| pb::Interface {
        name: name.to_owned(),
        mac,
        mtu: plan.mtu,
        sandbox: sandbox.to_owned(),
    };
    let bridge = plan.bridge.as_ref().map(|name| interface(name, plan.gateway_mac.to_string(), ""));
    let ends = [
        interface(&plan.host_ifname, plan.host_mac.to_string(), ""),
        interface(&plan.container_ifname, plan.mac.to_string(), &lease.netns),
    ];
    let interfaces: Vec<pb::Interface> = bridge.into_iter().chain(ends).collect();
    let of_pod = u32::try_from(interfaces.len() - 1).unwrap_or_default();
    let mut result = pb::AddResult { interfaces, ips: Vec::new(), routes: Vec::new() };
    for address in &plan.addresses {
        let (prefix, gateway, everything) = match address {
            IpAddr::V4(_) => (32, GATEWAY_V4.to_string(), "0.0.0.0/0"),
            IpAddr::V6(_) => (128, GATEWAY_V6.to_string(), "::/0"),
        };
        let address = format!("{address}/{prefix}");
        result.ips.push(pb::IpConfig { address, gateway: gateway.clone(), interface: of_pod });
        if plan.default_routes {
            result.routes.push(pb::Route { dst: everything.to_owned(), gw: gateway });
        }
    }
    result
}

#[tonic::async_trait]
impl Agent for Service {
    async fn add(&self, request: Request<pb::AddRequest>) -> Result<Response<pb::AddReply>, Status> {
        let reply = match finish(self.clone().do_add(request.into_inner())).await {
            Ok(lease) => pb::AddReply { failure: None, result: Some(result_of(&lease)) },
            Err(error) => pb::AddReply { failure: Some(failure(error)), result: None },
        };
        Ok(Response::new(reply))
    }

    async fn del(&self, request: Request<pb::DelRequest>) -> Result<Response<pb::DelReply>, Status> {
        let service = self.clone();
        let verb = async move {
            let request = request.into_inner();
            service.attacher.del(&key_of(request.attachment)?, &request.network).await
        };
        Ok(Response::new(pb::DelReply { failure: finish(verb).await.err().map(failure) }))
    }

    async fn check(&self, request: Request<pb::CheckRequest>) -> Result<Response<pb::CheckReply>, Status> {
        let failed = finish(self.clone().do_check(request.into_inner())).await.err();
        Ok(Response::new(pb::CheckReply { failure: failed.map(failure) }))
    }

    async fn gc(&self, request: Request<pb::GcRequest>) -> Result<Response<pb::GcReply>, Status> {
        let reply = match finish(self.clone().do_gc(request.into_inner())).await {
            Ok(freed) => pb::GcReply { failure: None, freed },
            Err(error) => pb::GcReply { failure: Some(failure(error)), freed: 0 },
        };
        Ok(Response::new(reply))
    }

    async fn status(&self, _: Request<pb::StatusRequest>) -> Result<Response<pb::StatusReply>, Status> {
        Ok(Response::new(pb::StatusReply { failure: self.clone().do_status().await.err().map(failure) }))
    }

    async fn explain(
        &self,
        request: Request<pb::ExplainRequest>,
    ) -> Result<Response<pb::ExplainReply>, Status> {
        let reply = self.clone().do_explain(request.into_inner()).await.unwrap_or_else(|error| {
            pb::ExplainReply { failure: Some(failure(error)), ..pb::ExplainReply::default() }
        });
        Ok(Response::new(reply))
    }

    async fn policies(
        &self,
        request: Request<pb::PoliciesRequest>,
    ) -> Result<Response<pb::PoliciesReply>, Status> {
        let reply = self.clone().do_policies(request.into_inner()).await.unwrap_or_else(|error| {
            pb::PoliciesReply { failure: Some(failure(error)), ..pb::PoliciesReply::default() }
        });
        Ok(Response::new(reply))
    }

    type FlowsStream = FlowStream;

    async fn flows(&self, request: Request<pb::FlowsRequest>) -> Result<Response<FlowStream>, Status> {
        let filter = Filter::new(request.into_inner()).map_err(Status::invalid_argument)?;
        let reader = self.flows.subscribe(filter).await.map_err(feed_failure)?;
        Ok(Response::new(flow_stream(reader)))
    }

    async fn matrix(&self, request: Request<pb::MatrixRequest>) -> Result<Response<pb::MatrixReply>, Status> {
        let reply = self.clone().do_matrix(request.into_inner()).await.unwrap_or_else(|error| {
            pb::MatrixReply { failure: Some(failure(error)), ..pb::MatrixReply::default() }
        });
        Ok(Response::new(reply))
    }

    async fn dump(&self, _: Request<pb::DumpRequest>) -> Result<Response<pb::DumpReply>, Status> {
        let state = self.attacher.engine.dump().await.map_err(Status::unavailable)?;
        Ok(Response::new(pb::DumpReply { json: format!("{state:#}") }))
    }
}
