//! Nodes of the policy bench: namespaces with our agent, a client and a server, all attached by our plugin. On the peers'
//! nodes the agent is then ended and its policy table replaced by the peer's; links and source pins stay the same.

use std::fs;
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use holdfast_tests::process::{run_within, wait_until};
use holdfast_tests::work::binaries_dir;
use holdfast_tests::{Namespaces, Program, Work, cni};
use nix::sys::signal::{Signal, kill, killpg};
use nix::unistd::{Pid, getpgid};
use serde_json::Value;

use super::changes::{self, Done, Script};
use super::shapes::{self, Shape};
use super::traffic::{Connections, Pods};
use super::world::{CLIENT, NAMESPACE, SERVER_SLOT, World, slot_pod};
use crate::node::{AGENT_SOCKET, attach, make_sandbox, shell, start_agent, wait_serving};

const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 79, 11);
/// Longest start of an agent and longest load of a peer's rules; beyond, a peer counts as not able to load them.
const LOAD_TIMEOUT: Duration = Duration::from_secs(60);
/// Without a pass for so long the agent is idle.
const IDLE: Duration = Duration::from_millis(300);
/// Our policy table.
const TABLE: &str = "holdfast";
/// Text by which the rule that logs new connections is found.
const ALLOW_LOG: &str = "log prefix \"holdfast allow \"";

/// A node with a client and a server.
pub struct PolicyNode {
    spaces: Namespaces,
    agent: Program,
    objects: PathBuf,
    pods: Pods,
    client: Ipv4Addr,
    server: Ipv4Addr,
    /// Table whose chain `deny` drops.
    table: &'static str,
}

impl PolicyNode {
    /// Starts a node whose policies are those of `world`. All its pods are attached before there is a policy.
    pub fn start(work: &Work, name: &str, world: &World) -> Result<Self> {
        let spaces = Namespaces::create(name, work)?;
        shell(
            &spaces,
            &format!(
                "ip link set lo up; ip link add up0 type veth peer name up1; ip addr add {ADDRESS}/24 dev up0
                 ip link set up0 up; ip link set up1 up
                 echo 1 >/proc/sys/net/netfilter/nf_conntrack_tcp_timeout_close"
            ),
        )?;
        let objects = work.folder(&format!("{name}-objects"))?;
        World { policies: 0, peers: 0, ..*world }.write(&objects, name, ADDRESS)?;
        let state = work.folder(name)?;
        let mut agent = start_agent(work, &spaces, &state, &objects, &[])?;
        wait_serving(&spaces, &mut agent)?;
        let config = cni::network_config(AGENT_SOCKET, &state.join("pending").display().to_string());
        let add = |pod: &str| -> Result<(PathBuf, Ipv4Addr)> {
            let netns = make_sandbox(&spaces, pod)?;
            let args =
                format!("IgnoreUnknown=1;K8S_POD_NAMESPACE={NAMESPACE};K8S_POD_NAME={pod};K8S_POD_UID={pod}");
            let address = attach(&spaces, &config, pod, &netns, &args)?;
            Ok((netns, address))
        };
        let (client_netns, client) = add(CLIENT)?;
        let (server_netns, server) = add(&slot_pod(SERVER_SLOT))?;
        for slot in 1..world.slots {
            add(&slot_pod(slot))?;
        }
        let pods = Pods::start(work, &spaces, &client_netns, (&server_netns, server))?;
        let node = Self { spaces, agent, objects, pods, client, server, table: TABLE };
        world.write(&node.objects, name, ADDRESS)?;
        node.wait_applied(world)?;
        Ok(node)
    }

    /// Ends the agent and puts the peer's rules in the place of ours. Gives the seconds that loading them took; `None` if
    /// they were refused or took too long.
    pub fn replace(&mut self, work: &Work, shape: Shape, world: &World) -> Result<Option<f64>> {
        self.agent.kill()?;
        let rules = work.folder("rules")?.join(format!("{}-{}", self.spaces.name(), world.policies));
        fs::write(&rules, shape.rules(world, self.client, self.server))?;
        // The table may be there from a larger attempt; either may be gone already.
        shell(
            &self.spaces,
            &format!(
                "nft delete table inet {TABLE} 2>/dev/null || true; nft delete table inet {} 2>/dev/null || true",
                shapes::TABLE
            ),
        )?;
        self.table = shapes::TABLE;
        let start = Instant::now();
        let loaded = run_within(LOAD_TIMEOUT, self.spaces.command("nft").arg("-f").arg(&rules));
        match loaded {
            Ok(_) => Ok(Some(start.elapsed().as_secs_f64())),
            Err(error) => {
                let text = format!("{error:#}");
                eprintln!(
                    "         {} policies are refused: {}",
                    world.policies,
                    text.lines().next().unwrap_or("")
                );
                Ok(None)
            }
        }
    }

    /// Connections from client to server for so long.
    pub fn connect(&mut self, millis: u64) -> Result<Connections> {
        self.pods.connect(&self.spaces, millis)
    }

    /// Datagrams to a closed port of the server for so long; per second, and how many.
    pub fn send_denied(&mut self, millis: u64) -> Result<(f64, u64)> {
        self.pods.send_denied(&self.spaces, millis)
    }

    /// Packets that policy has dropped.
    pub fn denied(&self) -> Result<u64> {
        let text = self.spaces.run("nft", &["-t", "list", "chain", "inet", self.table, "deny"])?;
        let packets =
            text.split_once("counter packets ").and_then(|(_, rest)| rest.split_whitespace().next());
        packets.and_then(|number| number.parse().ok()).with_context(|| format!("no counter in {text}"))
    }

    /// Makes changes of single objects.
    pub fn change(&self, script: &Script) -> Result<Vec<Done>> {
        changes::make(&self.spaces, &self.objects, script)
    }

    /// The agent's state.
    pub fn dump(&self) -> Result<Value> {
        let holdfast = binaries_dir()?.join("holdfast").display().to_string();
        let text = self.spaces.run(&holdfast, &["policy", "dump", "--socket", AGENT_SOCKET])?;
        serde_json::from_str(&text).context("the dump is no JSON")
    }

    /// Kills the agent and starts it again, without its tables if `empty`. Gives the seconds until it serves.
    pub fn restart(&mut self, empty: bool) -> Result<f64> {
        self.agent.kill()?;
        if empty {
            shell(&self.spaces, &format!("nft delete table inet {TABLE}; nft delete table bridge {TABLE}"))?;
        }
        let start = Instant::now();
        self.agent.start_again()?;
        wait_serving(&self.spaces, &mut self.agent)?;
        Ok(start.elapsed().as_secs_f64())
    }

    /// MiB of the agent now, and at most so far.
    pub fn agent_mib(&self) -> Result<(f64, f64)> {
        self.agent.rss_mib()
    }

    /// Starts a reader of the flow log.
    pub fn read_flows(&self, work: &Work) -> Result<Program> {
        let name = format!("{}-flows", self.spaces.name());
        let log = work.folder("logs")?.join(format!("{name}.log"));
        let template = self.spaces.command(binaries_dir()?.join("holdfast"));
        let arguments = ["policy", "flows", "--json", "--socket", AGENT_SOCKET].map(str::to_owned).into();
        let command = holdfast_tests::process::maker(&template, arguments);
        Program::start(holdfast_tests::ProgramSpec { name, log, command })
    }

    /// Stops the agent where it is and removes the rule that logs new connections: what there would be without a log.
    pub fn stop_log(&self) -> Result<()> {
        kill(Pid::from_raw(self.agent.pid()), Signal::SIGSTOP)?;
        let text = self.spaces.run("nft", &["-a", "-t", "list", "chain", "inet", TABLE, "forward"])?;
        let rule =
            text.lines().find(|line| line.contains(ALLOW_LOG)).context("no rule logs new connections")?;
        let handle = rule.rsplit(' ').next().unwrap_or_default();
        self.spaces.run("nft", &["delete", "rule", "inet", TABLE, "forward", "handle", handle])?;
        Ok(())
    }

    /// Lets the agent go on; it puts the rule back.
    pub fn resume_log(&self) -> Result<()> {
        // The whole group: `nsenter`, its parent, stops when its child does, and must go on to see it end.
        let group = getpgid(Some(Pid::from_raw(self.agent.pid())))?;
        killpg(group, Signal::SIGCONT)?;
        wait_until(Duration::from_secs(10), || {
            let text = self.spaces.run("nft", &["-t", "list", "chain", "inet", TABLE, "forward"])?;
            Ok(text.contains(ALLOW_LOG))
        })
        .context("the agent does not put back the rule that logs new connections")
    }

    /// Waits until the agent has read every object, and has been idle since.
    fn wait_applied(&self, world: &World) -> Result<()> {
        let mut before = Value::Null;
        wait_until(LOAD_TIMEOUT, || {
            let dump = self.dump()?;
            let objects = &dump["objects"];
            let read =
                objects["policies"] == world.policies && objects["pods"] == world.peers + world.slots + 1;
            let passes = dump["passes"].clone();
            if !read || passes != before {
                before = passes;
                std::thread::sleep(IDLE);
                return Ok(false);
            }
            Ok(true)
        })
        .with_context(|| format!("{} does not apply {} policies", self.spaces.name(), world.policies))
    }
}
