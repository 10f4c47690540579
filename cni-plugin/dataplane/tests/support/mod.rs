//! Network namespaces, threads inside them and small servers.

// Each test file uses its own part.
#![allow(dead_code)]

use std::io::Write;
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use holdfast_dataplane::{Config, Dataplane};
use holdfast_net_core::plan::{Attachment, BridgePlan, EndpointPlan, NodePlan};
use holdfast_net_core::ports::{PortRule, Proto};
use holdfast_net_core::ruleset::{ClassId, IdentityId, ProfileId, Ruleset, pins_of};

/// Whether pods are attached without a bridge: the suite runs once more as a module of `routed`.
pub fn is_routed() -> bool {
    module_path!().starts_with("routed::")
}

/// A named network namespace; deleted with the value.
pub struct Netns {
    name: String,
    path: PathBuf,
}

impl Netns {
    /// Makes it; one of that name, left by a run that was killed, is replaced. The process id keeps runs apart.
    pub fn new(name: &str) -> Self {
        let name = format!("{name}-{}", std::process::id());
        let _ = Command::new("ip").args(["netns", "del", &name]).stderr(std::process::Stdio::null()).status();
        let made = Command::new("ip").args(["netns", "add", &name]).status().expect("iproute2 is installed");
        assert!(made.success(), "these tests run as root");
        let path = Path::new("/run/netns").join(&name);
        Self { name, path }
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs a shell command inside; it must succeed.
    pub fn run(&self, script: &str) -> String {
        let out = Command::new("ip")
            .args(["netns", "exec", &self.name, "sh", "-ec", script])
            .output()
            .expect("iproute2 is installed");
        let text = String::from_utf8_lossy(&out.stdout).into_owned();
        assert!(
            out.status.success(),
            "{script:?} in {}: {text}{}",
            self.name,
            String::from_utf8_lossy(&out.stderr)
        );
        text
    }

    /// Runs `work` on a thread inside.
    pub fn inside<T: Send + 'static>(&self, work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
        let file = std::fs::File::open(&self.path).unwrap();
        std::thread::spawn(move || {
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            work()
        })
    }

    /// The generation of the namespace's nf_tables: every commit by anybody raises it.
    pub fn nft_generation(&self) -> Vec<u8> {
        // nlmsghdr (length 20, NFNL_SUBSYS_NFTABLES << 8 | NFT_MSG_GETGEN, NLM_F_REQUEST), nfgenmsg.
        let mut request = vec![20, 0, 0, 0, 16, 10, 1, 0];
        request.extend_from_slice(&[0; 12]);
        let ask = move || {
            let socket = netlink_sys::Socket::new(12).unwrap();
            socket.send(&request, 0).unwrap();
            // The attribute NFTA_GEN_ID follows both headers; the ones after it tell who asked.
            socket.recv_from_full().unwrap().0[20..28].to_vec()
        };
        self.inside(ask).join().unwrap()
    }
}

impl Drop for Netns {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// A thread inside a node's namespace with a runtime and a data path.
pub struct NodeRuntime {
    work: std::sync::mpsc::Sender<Work>,
}

type Job<'a> = Box<dyn FnOnce(&tokio::runtime::Runtime, &Dataplane) + Send + 'a>;
type Work = Job<'static>;

impl NodeRuntime {
    pub fn start(netns: &Netns) -> Self {
        let (work, jobs) = std::sync::mpsc::channel::<Work>();
        netns.inside(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            let dataplane = runtime.block_on(async { Dataplane::new(Config::default()).await }).unwrap();
            for job in jobs {
                job(&runtime, &dataplane);
            }
        });
        Self { work }
    }

    /// Runs an async test step on the node's thread and waits for it; its panic is the test's.
    pub fn block_on<T: Send>(&self, step: impl AsyncFnOnce(&Dataplane) -> T + Send) -> T {
        let (done, result) = std::sync::mpsc::channel();
        let job: Job<'_> = Box::new(move |runtime, dataplane| {
            let outcome =
                std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| runtime.block_on(step(dataplane))));
            let _ = done.send(outcome);
        });
        // SAFETY: this function waits for the job's result, so what it borrows outlives it.
        let job: Work = unsafe { std::mem::transmute::<Job<'_>, Work>(job) };
        self.work.send(job).expect("the node's thread runs");
        match result.recv().expect("the node's thread answers") {
            Ok(value) => value,
            Err(panic) => std::panic::resume_unwind(panic),
        }
    }
}

/// A node: its namespace, its thread with runtime and data path.
pub struct Node {
    pub netns: Netns,
    pub runtime: NodeRuntime,
    pub attachment: Attachment,
}

impl Node {
    pub fn new(name: &str) -> Self {
        let netns = Netns::new(name);
        let runtime = NodeRuntime::start(&netns);
        let attachment = if is_routed() {
            Attachment::Routed { mtu: 1450 }
        } else {
            Attachment::Bridge(BridgePlan::for_node(name, 1450))
        };
        Self { netns, runtime, attachment }
    }

    /// The bridge of its plan.
    pub fn bridge(&self) -> Option<BridgePlan> {
        match &self.attachment {
            Attachment::Bridge(bridge) => Some(bridge.clone()),
            Attachment::Routed { .. } => None,
        }
    }

    /// Where its route to a pod leads.
    pub fn pod_device(&self, plan: &EndpointPlan) -> String {
        self.bridge().map_or_else(|| plan.host_ifname.clone(), |bridge| bridge.name)
    }

    pub fn alone_plan(&self) -> NodePlan {
        NodePlan {
            bridge: self.bridge(),
            vxlan: None,
            uplink: "up0".into(),
            peers: vec![],
            pod_ranges: vec!["fd99::/64".parse().unwrap()],
        }
    }

    pub fn endpoint(&self, pod: &Netns, address: &str) -> EndpointPlan {
        let addresses = address.split(',').map(|a| a.parse().unwrap()).collect();
        self.attachment.endpoint(pod.name(), "eth0", addresses)
    }
}

/// Pods of one node may reach `server` as `allowed` says: client address -> port.
pub fn mk_policy(
    plans: &[&EndpointPlan],
    server: &EndpointPlan,
    allowed: &[(&EndpointPlan, u16)],
) -> Ruleset {
    let mut r = Ruleset::default();
    for plan in plans {
        r.pins.extend(pins_of(plan));
    }
    for address in &server.addresses {
        r.cls_in.insert(*address, ClassId(2));
    }
    for (n, (client, port)) in (1u32..).zip(allowed) {
        for address in &client.addresses {
            r.ident.insert(*address, IdentityId(n));
        }
        r.pair_in.insert((ClassId(2), IdentityId(n)), ProfileId(n));
        r.profiles.insert(ProfileId(n), vec![PortRule::port(Proto::Tcp, *port)]);
    }
    r
}

/// Joins two nodes by a veth pair; gives their addresses.
pub fn link_nodes(a: &Netns, a_net: &str, b: &Netns, b_net: &str) -> [IpAddr; 2] {
    a.run(&format!("ip link add up0 type veth peer name up0 netns {}", b.name()));
    for (node, net) in [(a, a_net), (b, b_net)] {
        node.run(&format!("ip addr add {net} dev up0; ip link set up0 up; ip link set lo up"));
    }
    [a_net, b_net].map(|net| net.split('/').next().unwrap().parse().unwrap())
}

/// A server that sends bytes without end to whoever connects; ends with the value.
pub struct Server {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

pub fn serve_bytes(netns: &Netns, at: &str) -> Server {
    let at: SocketAddr = at.parse().unwrap();
    let stop = Arc::new(AtomicBool::new(false));
    let (ready, is_ready) = std::sync::mpsc::channel();
    let stopped = Arc::clone(&stop);
    let thread = netns.inside(move || {
        let listener = TcpListener::bind(at).unwrap();
        listener.set_nonblocking(true).unwrap();
        ready.send(()).unwrap();
        while !stopped.load(Ordering::Relaxed) {
            let Ok((mut stream, _)) = listener.accept() else {
                std::thread::sleep(Duration::from_millis(5));
                continue;
            };
            stream.set_nonblocking(false).unwrap();
            stream.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
            let stopped = Arc::clone(&stopped);
            std::thread::spawn(move || {
                let buffer = vec![7u8; 16384];
                while !stopped.load(Ordering::Relaxed) {
                    if let Err(e) = stream.write(&buffer)
                        && !matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
                    {
                        return;
                    }
                    std::thread::sleep(Duration::from_millis(1));
                }
            });
        }
    });
    is_ready.recv().unwrap();
    Server { stop, thread: Some(thread) }
}

pub fn connect(netns: &Netns, to: &str) -> std::io::Result<TcpStream> {
    let to: SocketAddr = to.parse().unwrap();
    netns.inside(move || TcpStream::connect_timeout(&to, Duration::from_millis(700))).join().unwrap()
}

pub fn connects(netns: &Netns, to: &str) -> bool {
    connect(netns, to).is_ok()
}
