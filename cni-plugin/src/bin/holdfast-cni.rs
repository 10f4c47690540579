//! holdfast-cni: what a container runtime executes. Reads the configuration from standard input and the parameters from
//! the environment, asks the node agent, prints the result or the error object. It keeps no state but one thing: DEL
//! while the agent is down leaves a delete record.

use std::io::{Read, Write};
use std::net::IpAddr;
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use holdfast_agent::{AttachmentKey, pending};
use holdfast_net_core::bandwidth::{Bandwidth, Rate};
use holdfast_net_core::cni::{
    CURRENT_VERSION, CniEnv, CniError, CniInterface, CniIp, CniResult, CniRoute, Command, NetworkConfig,
    code, version_reply,
};
use holdfast_net_core::nat::PortMapping;
use holdfast_proto::agent as pb;
use holdfast_proto::agent::agent_client::AgentClient;
use serde_json::Value;
use tonic::transport::{Channel, Endpoint};

/// More input than this is refused.
const INPUT_BYTES_MAX: u64 = 4 << 20;
/// An agent that serves accepts at once.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Longer than the agent waits for a pod's object, shorter than runtimes wait for a plugin.
const CALL_TIMEOUT: Duration = Duration::from_secs(60);

type Client = AgentClient<Channel>;

fn main() -> ExitCode {
    let mut version = CURRENT_VERSION.as_str().to_owned();
    let (text, exit) = match run(&mut version) {
        Ok(Some(value)) => (value.to_string(), ExitCode::SUCCESS),
        Ok(None) => return ExitCode::SUCCESS,
        Err(error) => (error.to_json(&version).to_string(), ExitCode::FAILURE),
    };
    // The runtime closed our output: nobody is left to tell.
    let _ = writeln!(std::io::stdout().lock(), "{text}");
    exit
}

/// Serves one call. `version` becomes that of the input, for the error object.
fn run(version: &mut String) -> Result<Option<Value>, CniError> {
    let variables: std::collections::BTreeMap<String, String> = std::env::vars_os()
        .filter_map(|(k, v)| Some((k.into_string().ok()?, v.into_string().ok()?)))
        .collect();
    let get = |name: &str| variables.get(name).map(String::as_str);
    let command = Command::parse(get("CNI_COMMAND"))?;
    let input = read_input()?;
    if command == Command::Version && input.is_empty() {
        return Ok(Some(version_reply(None)));
    }
    let requested = NetworkConfig::peek_version(&input)?;
    if let Some(requested) = &requested {
        requested.clone_into(version);
    }
    if command == Command::Version {
        return Ok(Some(version_reply(requested.as_deref())));
    }
    let config = NetworkConfig::parse(command, &input)?;
    let env = CniEnv::parse(command, get)?;
    let needs_sandbox = matches!(command, Command::Add | Command::Check);
    if needs_sandbox && !Path::new(&env.netns).exists() {
        let msg = format!("CNI_NETNS \"{}\" does not exist", env.netns);
        return Err(CniError::new(code::INVALID_ENVIRONMENT, msg));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| io_failure("cannot start", &error))?;
    runtime.block_on(async {
        match command {
            Command::Add => add(config, env).await.map(Some),
            Command::Del => del(&config, &env).await.map(|()| None),
            Command::Check => check(config, env).await.map(|()| None),
            Command::Gc => gc(config).await.map(|()| None),
            Command::Status => status(&config).await.map(|()| None),
            Command::Version => Ok(None),
        }
    })
}

async fn add(config: NetworkConfig, env: CniEnv) -> Result<Value, CniError> {
    let wanted = config.capabilities;
    let piece = |(first, last): (IpAddr, IpAddr)| pb::AddressPiece {
        first: first.to_string(),
        last: last.to_string(),
    };
    let set = |set: Vec<(IpAddr, IpAddr)>| pb::AddressSet { pieces: set.into_iter().map(piece).collect() };
    let request = pb::AddRequest {
        attachment: Some(attachment(&env)),
        netns: env.netns,
        network: config.name,
        pod: Some(pb::PodRef {
            namespace: env.args.pod_namespace,
            name: env.args.pod_name,
            uid: env.args.pod_uid,
        }),
        ips: wanted.addresses.ips.iter().map(IpAddr::to_string).collect(),
        mac: wanted.mac.map(String::from).unwrap_or_default(),
        address_sets: wanted.addresses.range_sets.into_iter().map(set).collect(),
        port_mappings: wanted.host_ports.iter().map(port_mapping).collect(),
        bandwidth: Some(bandwidth(wanted.bandwidth)),
    };
    let mut client = connect(&config.agent_socket).await.map_err(try_again)?;
    let reply = client.add(request).await.map_err(|status| try_again(status.to_string()))?.into_inner();
    refused(reply.failure)?;
    let result =
        reply.result.ok_or_else(|| CniError::new(code::INTERNAL, "the agent answered without a result"))?;
    let mut result = result_of(result)?;
    result.dns = config.dns;
    Ok(result.chained_after(config.prev_result).to_version(config.version))
}

fn bandwidth(limits: Bandwidth) -> pb::Bandwidth {
    let parts = |rate: Option<Rate>| rate.map_or((0, 0), |rate| (rate.bits_per_s, rate.burst_bits));
    let ((ingress_rate, ingress_burst), (egress_rate, egress_burst)) =
        (parts(limits.ingress), parts(limits.egress));
    pb::Bandwidth { ingress_rate, ingress_burst, egress_rate, egress_burst }
}

fn port_mapping(mapping: &PortMapping) -> pb::PortMapping {
    pb::PortMapping {
        protocol: mapping.proto.to_string(),
        host_ip: mapping.host_ip.map(|address| address.to_string()).unwrap_or_default(),
        host_port: mapping.host_port.into(),
        container_port: mapping.container_port.into(),
    }
}

/// Succeeds when the agent has detached, or when a durable record says that it will.
async fn del(config: &NetworkConfig, env: &CniEnv) -> Result<(), CniError> {
    let request = pb::DelRequest {
        attachment: Some(attachment(env)),
        netns: env.netns.clone(),
        network: config.name.clone(),
    };
    let answered = match connect(&config.agent_socket).await {
        Ok(mut client) => client.del(request).await.map_err(|status| status.to_string()),
        Err(error) => Err(error),
    };
    match answered {
        Ok(reply) => refused(reply.into_inner().failure),
        Err(down) => {
            let key = AttachmentKey { container_id: env.container_id.clone(), ifname: env.ifname.clone() };
            pending::write(Path::new(&config.pending_dir), &key, &config.name).map_err(|error| {
                let what = format!(
                    "the node agent is down and no delete record can be written to {}",
                    config.pending_dir
                );
                io_failure(&what, &error).details(format!("{error}; agent: {down}"))
            })
        }
    }
}

async fn check(config: NetworkConfig, env: CniEnv) -> Result<(), CniError> {
    let previous = config.prev_result.unwrap_or_default();
    let interface = |found: CniInterface| pb::Interface {
        name: found.name,
        mac: found.mac,
        mtu: found.mtu.unwrap_or_default(),
        sandbox: found.sandbox,
    };
    let request = pb::CheckRequest {
        attachment: Some(attachment(&env)),
        netns: env.netns,
        addresses: previous.ips.iter().map(|ip| ip.address.to_string()).collect(),
        interfaces: previous.interfaces.into_iter().map(interface).collect(),
        network: config.name,
        routes: previous.routes.iter().map(|route| route.dst.to_string()).collect(),
    };
    let mut client = connect(&config.agent_socket).await.map_err(try_again)?;
    let reply = client.check(request).await.map_err(|status| try_again(status.to_string()))?;
    refused(reply.into_inner().failure)
}

async fn gc(config: NetworkConfig) -> Result<(), CniError> {
    let valid = config.valid_attachments.unwrap_or_default().into_iter();
    let valid = valid.map(|entry| pb::Attachment { container_id: entry.container_id, ifname: entry.ifname });
    let request = pb::GcRequest { valid: valid.collect(), network: config.name };
    let mut client = connect(&config.agent_socket).await.map_err(try_again)?;
    let reply = client.gc(request).await.map_err(|status| try_again(status.to_string()))?;
    refused(reply.into_inner().failure)
}

async fn status(config: &NetworkConfig) -> Result<(), CniError> {
    let down =
        |details: String| CniError::new(code::NOT_AVAILABLE, "the node agent is down").details(details);
    let mut client = connect(&config.agent_socket).await.map_err(down)?;
    let reply = client.status(pb::StatusRequest {}).await.map_err(|status| down(status.to_string()))?;
    refused(reply.into_inner().failure)
}

async fn connect(socket: &str) -> Result<Client, String> {
    let path = socket.to_owned();
    let connector = tower::service_fn(move |_: tonic::transport::Uri| {
        let path = path.clone();
        async move {
            let stream = tokio::net::UnixStream::connect(path).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    // The address is not used: the connector knows the socket.
    let endpoint = Endpoint::from_static("http://agent").timeout(CALL_TIMEOUT);
    let connected = tokio::time::timeout(CONNECT_TIMEOUT, endpoint.connect_with_connector(connector)).await;
    let channel = match connected {
        Ok(Ok(channel)) => channel,
        Ok(Err(error)) => return Err(format!("cannot connect to {socket}: {}", cause(&error))),
        Err(_) => return Err(format!("{socket} did not answer within {} s", CONNECT_TIMEOUT.as_secs())),
    };
    Ok(AgentClient::new(channel))
}

/// The innermost cause: transport errors only say that there was one.
fn cause(error: &dyn std::error::Error) -> String {
    let mut innermost = error;
    while let Some(source) = innermost.source() {
        innermost = source;
    }
    innermost.to_string()
}

fn result_of(result: pb::AddResult) -> Result<CniResult, CniError> {
    let network = |text: &str| {
        text.parse().map_err(|_| CniError::new(code::INTERNAL, format!("the agent answered with \"{text}\"")))
    };
    let some = |text: String| (!text.is_empty()).then_some(text);
    let mut converted = CniResult::default();
    for found in result.interfaces {
        let mtu = (found.mtu > 0).then_some(found.mtu);
        let CniInterface { other, .. } = CniInterface::default();
        converted.interfaces.push(CniInterface {
            name: found.name,
            mac: found.mac,
            mtu,
            sandbox: found.sandbox,
            other,
        });
    }
    for ip in result.ips {
        converted.ips.push(CniIp {
            version: None,
            address: network(&ip.address)?,
            gateway: some(ip.gateway),
            interface: usize::try_from(ip.interface).ok(),
            other: serde_json::Map::new(),
        });
    }
    for route in result.routes {
        let other = serde_json::Map::new();
        converted.routes.push(CniRoute { dst: network(&route.dst)?, gw: some(route.gw), other });
    }
    Ok(converted)
}

fn attachment(env: &CniEnv) -> pb::Attachment {
    pb::Attachment { container_id: env.container_id.clone(), ifname: env.ifname.clone() }
}

fn refused(failure: Option<pb::Failure>) -> Result<(), CniError> {
    failure.map_or(Ok(()), |failure| Err(CniError::new(failure.code, failure.msg).details(failure.details)))
}

fn try_again(details: String) -> CniError {
    CniError::new(code::TRY_AGAIN_LATER, "the node agent is down").details(details)
}

fn io_failure(what: &str, error: &std::io::Error) -> CniError {
    CniError::new(code::IO_FAILURE, what.to_owned()).details(error.to_string())
}

fn read_input() -> Result<Vec<u8>, CniError> {
    let mut input = Vec::new();
    let read = std::io::stdin().lock().take(INPUT_BYTES_MAX + 1).read_to_end(&mut input);
    read.map_err(|error| io_failure("cannot read the configuration", &error))?;
    if input.len() as u64 > INPUT_BYTES_MAX {
        let msg = format!("the configuration is larger than {INPUT_BYTES_MAX} bytes");
        return Err(CniError::new(code::DECODING_FAILURE, msg));
    }
    Ok(input)
}
