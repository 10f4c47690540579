//! A real Kubernetes API server with its own etcd, on a loopback address of its own: nothing else of a cluster.
//!
//! ```text
//!   kube clients ── https, token ──> kube-apiserver ── http ──> etcd ── files in a temporary folder
//! ```
//!
//! Callers are known by tokens, authorised by Node and RBAC, as on a cluster. Both programs end with the [`ApiServer`], and
//! also if the test's process is killed.

use std::fmt::Write as _;
use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use crate::certs::Authority;
use crate::go_tools::{self, Skip};
use crate::namespaces::Namespaces;
use crate::process::{tail, wait_until};

/// From the start of the API server to its first answer; a few seconds on an idle machine.
const READY_TIMEOUT: Duration = Duration::from_secs(120);
/// How many addresses are tried before the machine counts as full.
const ADDRESS_TRIES: u32 = 100;

const ETCD_PORT: u16 = 2379;
const ETCD_PEER_PORT: u16 = 2380;
const API_PORT: u16 = 6443;

/// The user that may do everything.
pub const ADMIN: &str = "admin";

/// A user of the API server; the first of them is always [`ADMIN`].
#[derive(Debug, Clone)]
pub struct User {
    /// Its name, such as `system:node:node-a` or `system:serviceaccount:holdfast:data`.
    pub name: String,
    /// Its groups.
    pub groups: Vec<String>,
}

/// Where a server runs that is not for this machine's programs alone.
pub struct Place<'a> {
    /// Its network.
    pub spaces: &'a Namespaces,
    /// Its address there.
    pub address: Ipv4Addr,
    /// Folder for its files.
    pub dir: &'a Path,
    /// Signs its certificate, which names more addresses and names than its own.
    pub authority: &'a Authority,
    /// Those.
    pub more_names: &'a [&'a str],
    /// Flags of the API server; one that is given twice counts as it is here.
    pub arguments: Vec<String>,
}

/// A running API server.
///
/// It has no controllers: what others would do for an object (garbage collection, default service accounts) does not happen.
pub struct ApiServer {
    address: Ipv4Addr,
    // Ended before etcd, which it would miss loudly.
    server: Daemon,
    etcd: Daemon,
    dir: TempDir,
    users: Vec<User>,
    /// Network namespace, where it is not the machine's.
    network: Option<PathBuf>,
}

impl ApiServer {
    /// Starts etcd and the API server and waits until it is ready. Start it on a thread that lives as long as the test: the
    /// programs end with the thread.
    ///
    /// # Errors
    /// A program does not build, or does not start.
    pub fn start(users: &[User]) -> Result<Result<Self, Skip>> {
        let dir = tempfile::Builder::new().prefix("holdfast-api-server-").tempdir()?;
        let address = free_address()?;
        let authority = Authority::new("API server")?;
        // No endpoint of the service kubernetes: a loopback address may not be one.
        let arguments = vec!["--endpoint-reconciler-type=none".to_owned()];
        Self::start_with(users, dir, address, &authority, &[], (None, arguments))
    }

    /// The same in a network of its own.
    ///
    /// # Errors
    /// As for [`Self::start`].
    pub fn start_in(place: Place<'_>, users: &[User]) -> Result<Result<Self, Skip>> {
        let dir = tempfile::Builder::new().prefix("api-server-").tempdir_in(place.dir)?;
        let inside = (Some(place.spaces), place.arguments);
        Self::start_with(users, dir, place.address, place.authority, place.more_names, inside)
    }

    fn start_with(
        users: &[User],
        dir: TempDir,
        address: Ipv4Addr,
        authority: &Authority,
        more_names: &[&str],
        (spaces, arguments): (Option<&Namespaces>, Vec<String>),
    ) -> Result<Result<Self, Skip>> {
        let (etcd, server) = match (go_tools::etcd()?, go_tools::kube_apiserver()?) {
            (Ok(etcd), Ok(server)) => (etcd, server),
            (Err(skip), _) | (_, Err(skip)) => return Ok(Err(skip)),
        };
        let admin = User { name: ADMIN.to_owned(), groups: vec!["system:masters".to_owned()] };
        let users: Vec<User> = std::iter::once(admin).chain(users.iter().cloned()).collect();
        authority.issue_for(&address.to_string(), more_names, dir.path())?;
        write_credentials(dir.path(), &users)?;
        let network = spaces.map(Namespaces::network_path);
        let start = |name: &str, arguments| Daemon::start(name, network.as_deref(), arguments, dir.path());
        let etcd = start("etcd", etcd_command(&etcd, address, dir.path()))?;
        let server =
            start("kube-apiserver", [server_command(&server, address, dir.path()), arguments].concat())?;
        let mut started = Self { address, server, etcd, dir, users, network };
        started.wait_until_ready()?;
        Ok(Ok(started))
    }

    /// Where it answers.
    #[must_use]
    pub fn url(&self) -> String {
        format!("https://{}:{API_PORT}", self.address)
    }

    /// Where it listens.
    #[must_use]
    pub fn socket(&self) -> SocketAddr {
        SocketAddr::from((self.address, API_PORT))
    }

    /// The authority that signed its certificate, as PEM.
    #[must_use]
    pub fn ca_file(&self) -> PathBuf {
        self.dir.path().join("ca.pem")
    }

    /// Numbers of its processes, of etcd and of the server.
    #[must_use]
    pub fn processes(&self) -> [u32; 2] {
        [self.etcd.child.id(), self.server.child.id()]
    }

    /// The key that signs the tokens of service accounts.
    #[must_use]
    pub fn service_account_key(&self) -> PathBuf {
        self.dir.path().join("service-account.key")
    }

    /// A user's token; none for a user that the server was not started with.
    #[must_use]
    pub fn token(&self, user: &str) -> Option<String> {
        let number = self.users.iter().position(|known| known.name == user)?;
        Some(token(number))
    }

    /// A kubeconfig file for a user, at `url` in place of the server's own (such as a proxy's) where one is given.
    ///
    /// # Errors
    /// No such user, or the file cannot be written.
    pub fn kubeconfig(&self, user: &str, url: Option<&str>) -> Result<PathBuf> {
        let token = self.token(user).with_context(|| format!("there is no user {user}"))?;
        self.kubeconfig_of(&token, url, "default")
    }

    /// A kubeconfig file for whoever a token is of, with a namespace for what is in one.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn kubeconfig_of(&self, token: &str, url: Option<&str>, namespace: &str) -> Result<PathBuf> {
        let url = url.map_or_else(|| self.url(), str::to_owned);
        let path = self.dir.path().join(format!(
            "kubeconfig-{:08x}",
            crc32c::crc32c(format!("{token} {url} {namespace}").as_bytes())
        ));
        let text = format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: test\ncontexts:\n- name: test\n  context: {{cluster: test, user: test, namespace: {namespace}}}\n\
             clusters:\n- name: test\n  cluster:\n    server: {url}\n    certificate-authority: {}\n    tls-server-name: {}\n\
             users:\n- name: test\n  user: {{token: {token}}}\n",
            self.ca_file().display(),
            self.address
        );
        fs::write(&path, text)?;
        Ok(path)
    }

    /// `kill -9` of the API server; etcd stays.
    ///
    /// # Errors
    /// It does not go.
    pub fn kill(&mut self) -> Result<()> {
        self.server.end()
    }

    /// Starts it again at the same address and waits until it is ready.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_again(&mut self) -> Result<()> {
        self.server.start_again()?;
        self.wait_until_ready()
    }

    /// Everything it knew is lost: both programs end, etcd's files go, and both start anew. Users keep their tokens; those of
    /// service accounts end with their pods.
    ///
    /// # Errors
    /// Something does not end or start.
    pub fn lose_everything(&mut self) -> Result<()> {
        self.server.end()?;
        self.etcd.end()?;
        let files = self.dir.path().join("etcd");
        fs::remove_dir_all(&files).with_context(|| files.display().to_string())?;
        self.etcd.start_again()?;
        self.start_again()
    }

    /// Starts it again if a test that failed left it dead.
    ///
    /// # Errors
    /// It does not start.
    pub fn start_again_if_dead(&mut self) -> Result<()> {
        if self.server.is_alive() { Ok(()) } else { self.start_again() }
    }

    /// Stops it without ending it: connections stay open and nothing is answered.
    ///
    /// # Errors
    /// It does not run.
    pub fn pause(&self) -> Result<()> {
        self.server.signal(Signal::SIGSTOP)
    }

    /// Ends a pause.
    ///
    /// # Errors
    /// It does not run.
    pub fn resume(&self) -> Result<()> {
        self.server.signal(Signal::SIGCONT)
    }

    fn wait_until_ready(&mut self) -> Result<()> {
        let socket = self.socket();
        let kubeconfig = self.kubeconfig(ADMIN, None)?;
        let server = &mut self.server;
        let ready = wait_until(READY_TIMEOUT, || {
            ensure!(server.is_alive(), "it ended:\n{}", tail(&server.log));
            // Where nobody listens there is nobody to ask.
            in_network(self.network.as_deref(), || {
                Ok(TcpStream::connect_timeout(&socket, Duration::from_secs(1)).is_ok()
                    && says_ready(&kubeconfig)?)
            })
        });
        ready.with_context(|| format!("kube-apiserver is not ready:\n{}", tail(&server.log)))
    }
}

/// One program that runs until it is told to end, or until the thread that started it does.
struct Daemon {
    command: Command,
    log: PathBuf,
    child: Child,
}

impl Daemon {
    fn start(name: &str, network: Option<&Path>, arguments: Vec<String>, dir: &Path) -> Result<Self> {
        let log = dir.join(format!("{name}.log"));
        // The kernel ends it with its starter, also when that is killed.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).current_dir(dir).stdin(Stdio::null());
        if let Some(network) = network {
            command.arg("nsenter").arg(format!("--net={}", network.display())).arg("--");
        }
        command.args(arguments);
        let child = spawn(&mut command, &log)?;
        Ok(Self { command, log, child })
    }

    fn start_again(&mut self) -> Result<()> {
        ensure!(!self.is_alive(), "it still runs");
        self.child = spawn(&mut self.command, &self.log)?;
        Ok(())
    }

    fn is_alive(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(self.child.id().cast_signed()), signal)?)
    }

    fn end(&mut self) -> Result<()> {
        // One that has ended already is as good.
        let _ = self.child.kill();
        self.child.wait().context("it does not end")?;
        Ok(())
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.end();
    }
}

fn spawn(command: &mut Command, log: &Path) -> Result<Child> {
    let log = fs::OpenOptions::new().create(true).append(true).open(log)?;
    command.stdout(Stdio::from(log.try_clone()?)).stderr(Stdio::from(log));
    command.spawn().with_context(|| format!("cannot run {command:?}"))
}

fn etcd_command(program: &Path, address: Ipv4Addr, dir: &Path) -> Vec<String> {
    let client = format!("http://{address}:{ETCD_PORT}");
    let peer = format!("http://{address}:{ETCD_PEER_PORT}");
    vec![
        program.display().to_string(),
        format!("--data-dir={}", dir.join("etcd").display()),
        format!("--listen-client-urls={client}"),
        format!("--advertise-client-urls={client}"),
        format!("--listen-peer-urls={peer}"),
        format!("--initial-advertise-peer-urls={peer}"),
        format!("--initial-cluster=default={peer}"),
        // It outlives every kill of the API server, and nothing outlives the machine here.
        "--unsafe-no-fsync".to_owned(),
    ]
}

fn server_command(program: &Path, address: Ipv4Addr, dir: &Path) -> Vec<String> {
    let file = |flag: &str, name: &str| format!("--{flag}={}", dir.join(name).display());
    vec![
        program.display().to_string(),
        format!("--etcd-servers=http://{address}:{ETCD_PORT}"),
        format!("--bind-address={address}"),
        format!("--secure-port={API_PORT}"),
        file("cert-dir", "certs"),
        file("tls-cert-file", "node.pem"),
        file("tls-private-key-file", "node.key"),
        file("token-auth-file", "tokens.csv"),
        "--authorization-mode=Node,RBAC".to_owned(),
        "--enable-admission-plugins=NodeRestriction".to_owned(),
        "--service-account-issuer=https://kubernetes.default.svc".to_owned(),
        file("service-account-key-file", "service-account.pub"),
        file("service-account-signing-key-file", "service-account.key"),
        "--service-cluster-ip-range=10.96.0.0/24".to_owned(),
        // Our own workloads are.
        "--allow-privileged=true".to_owned(),
    ]
}

/// Service account key and tokens.
fn write_credentials(dir: &Path, users: &[User]) -> Result<()> {
    let key = rcgen::KeyPair::generate()?;
    fs::write(dir.join("service-account.key"), key.serialize_pem())?;
    fs::write(dir.join("service-account.pub"), key.public_key_pem())?;
    let mut tokens = String::new();
    for (number, user) in users.iter().enumerate() {
        let groups = user.groups.join(",");
        writeln!(tokens, "{},{},{number},\"{groups}\"", token(number), user.name)?;
    }
    fs::write(dir.join("tokens.csv"), tokens)?;
    Ok(())
}

/// The tokens of a server that listens to this machine only, for the length of a test.
fn token(number: usize) -> String {
    format!("token-of-user-{number}")
}

/// An address of its own, so that the ports stay free for it while it is down.
fn free_address() -> Result<Ipv4Addr> {
    for _ in 0..ADDRESS_TRIES {
        let address =
            Ipv4Addr::new(127, rand::random_range(64..128), rand::random(), rand::random_range(1..255));
        let free = |port| TcpListener::bind((address, port)).is_ok();
        if [ETCD_PORT, ETCD_PEER_PORT, API_PORT].into_iter().all(free) {
            return Ok(address);
        }
    }
    bail!("no loopback address with free ports {ETCD_PORT}, {ETCD_PEER_PORT} and {API_PORT} was found")
}

/// Asks on a thread of its own in a network namespace, or here where there is none.
fn in_network<T: Send>(network: Option<&Path>, ask: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let Some(network) = network else { return ask() };
    let inside = fs::File::open(network).with_context(|| format!("cannot open {}", network.display()))?;
    std::thread::scope(|scope| {
        let asking = scope.spawn(|| {
            nix::sched::setns(inside, nix::sched::CloneFlags::CLONE_NEWNET)?;
            ask()
        });
        asking.join().map_err(|_| anyhow::anyhow!("the one who asks panicked"))?
    })
}

/// Whether it says that all its parts run.
fn says_ready(kubeconfig: &Path) -> Result<bool> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let options = kube::config::KubeConfigOptions::default();
        let kubeconfig = kube::config::Kubeconfig::read_from(kubeconfig)?;
        let mut config = kube::Config::from_custom_kubeconfig(kubeconfig, &options).await?;
        config.default_retry = false;
        config.read_timeout = Some(Duration::from_secs(5));
        let client = kube::Client::try_from(config)?;
        let request = http::Request::get("/readyz").body(Vec::new())?;
        Ok(client.request_text(request).await? == "ok")
    })
}
