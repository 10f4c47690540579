//! An API server as the nodes of a cluster reach it: it runs on the host, where no node sees it, and listens at an address of
//! the underlay as well.

use std::collections::BTreeMap;
use std::fs::File;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow};
use nix::sched::{CloneFlags, setns};
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::runtime::Runtime;

use crate::namespaces::Namespaces;
use crate::process::run;

/// Where the nodes reach the server.
pub const API_URL: &str = "https://192.168.77.1:6443";
const API_ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 168, 77, 1);
const API_PORT: u16 = 6443;

/// Records at an API server in place of the controller's own store.
#[derive(Debug, Clone)]
pub struct KubernetesRecords {
    /// Where it listens on the host.
    pub server: SocketAddr,
    /// A kubeconfig that leads to [`API_URL`] for each process: `controller`, and `NODE-data` and `NODE-csi` of each node.
    pub kubeconfigs: BTreeMap<String, PathBuf>,
    /// Certificates come from the built-in issuer and live so long; none: from the harness.
    pub certificate_life_s: Option<u64>,
    /// Another signer in its place, and the Secret that names its authorities.
    pub signer: Option<(String, String)>,
}

impl KubernetesRecords {
    /// The kubeconfig of a process.
    ///
    /// # Errors
    /// There is none.
    pub fn kubeconfig(&self, process: &str) -> Result<&Path> {
        self.kubeconfigs
            .get(process)
            .map(PathBuf::as_path)
            .with_context(|| format!("no kubeconfig for {process}"))
    }

    /// A process's arguments with what differs from a cluster with a store of its own.
    pub(crate) fn arguments(&self, mut arguments: Vec<String>) -> Vec<String> {
        arguments.push("--record-store=kubernetes".to_owned());
        if let Some(life_s) = self.certificate_life_s {
            arguments.retain(|argument| !argument.starts_with("--tls-dir="));
            arguments.extend(["--tls-issuer=kubernetes".to_owned(), format!("--tls-life-s={life_s}")]);
        }
        if let Some((signer, secret)) = &self.signer {
            arguments.push(format!("--tls-signer={signer}"));
            if arguments.first().is_some_and(|role| role == "controller") {
                arguments.push(format!("--tls-authority-secret={secret}"));
            }
        }
        arguments
    }

    /// Passes connections on from the underlay to the server, as long as the runtime lives.
    pub(crate) fn forward(&self, underlay: &Namespaces, runtime: &Runtime) -> Result<()> {
        let address = format!("{API_ADDRESS}/24");
        run(underlay.network_command("ip").args(["address", "add", &address, "dev", "underlay"]))?;
        let listener = listen_inside(&format!("/proc/{}/ns/net", underlay.pid()))?;
        let server = self.server;
        let listener = {
            let _entered = runtime.enter();
            TcpListener::from_std(listener)?
        };
        runtime.spawn(async move {
            while let Ok((mut inside, _)) = listener.accept().await {
                tokio::spawn(async move {
                    // A server that is down closes the connection, as one behind a real network does.
                    let mut outside = TcpStream::connect(server).await?;
                    copy_bidirectional(&mut inside, &mut outside).await
                });
            }
        });
        Ok(())
    }
}

/// A socket stays in the network namespace in which it was made.
fn listen_inside(netns: &str) -> Result<std::net::TcpListener> {
    let file = File::open(netns).with_context(|| netns.to_owned())?;
    let made = std::thread::spawn(move || -> Result<std::net::TcpListener> {
        setns(file, CloneFlags::CLONE_NEWNET).context("cannot enter the underlay")?;
        let listener = std::net::TcpListener::bind((API_ADDRESS, API_PORT))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    });
    made.join().map_err(|_| anyhow!("the thread in the underlay ended"))?
}
