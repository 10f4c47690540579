//! Real tools: whether they are here, and how they are run.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use tokio::net::UnixStream;
use tokio::process::{Child, Command};

/// Whether a tool is installed; says so if not.
pub fn possible(tool: &str) -> bool {
    let found =
        ["/usr/bin", "/usr/sbin", "/usr/local/bin"].iter().any(|dir| Path::new(dir).join(tool).exists());
    if !found {
        println!("SKIP: {tool} is not installed");
    }
    found
}

/// Runs a tool to its end; gives whether it succeeded and what it printed.
pub async fn outcome(program: &str, args: &[&str]) -> (bool, String) {
    let mut command = Command::new(program);
    let running = command.args(args).stdin(Stdio::null()).kill_on_drop(true).output();
    let output =
        tokio::time::timeout(Duration::from_secs(120), running).await.expect("the tool ends").unwrap();
    let text =
        String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text)
}

/// Runs a tool, gives what it printed, and fails unless it succeeds.
pub async fn run(program: &str, args: &[&str]) -> String {
    let (succeeded, text) = outcome(program, args).await;
    assert!(succeeded, "{program} {args:?}: {text}");
    text
}

/// Another's server on a Unix socket; ends with the test.
pub struct Foreign {
    socket: PathBuf,
    _process: Child,
    dir: tempfile::TempDir,
}

impl Foreign {
    /// Starts `program` with what `args` makes of the socket's path and a folder, and waits until it listens.
    pub async fn start(program: &str, args: impl FnOnce(&str, &str) -> Vec<String>) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let socket = dir.path().join("sock");
        let args = args(socket.to_str().unwrap(), dir.path().to_str().unwrap());
        let mut process = Command::new(program)
            .args(&args)
            .stdin(Stdio::null())
            .kill_on_drop(true)
            .spawn()
            .unwrap_or_else(|error| panic!("{program}: {error}"));
        for _ in 0..2_000 {
            if UnixStream::connect(&socket).await.is_ok() {
                return Self { socket, _process: process, dir };
            }
            assert!(process.try_wait().unwrap().is_none(), "{program} {args:?} ended at once");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        panic!("{program} {args:?} does not listen");
    }

    pub async fn connect(&self) -> UnixStream {
        UnixStream::connect(&self.socket).await.unwrap()
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }
}

/// An authority and folders of certificates, under the names that we and others look for.
pub struct Certificates {
    authority: CertifiedIssuer<'static, KeyPair>,
    dir: tempfile::TempDir,
}

impl Certificates {
    pub fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = CertifiedIssuer::self_signed(params, KeyPair::generate().unwrap()).unwrap();
        Self { authority, dir: tempfile::tempdir().unwrap() }
    }

    /// A folder with a certificate for `name`, and for this machine's loopback addresses.
    pub fn issue(&self, name: &str) -> PathBuf {
        let dir = self.dir.path().join(name);
        std::fs::create_dir(&dir).unwrap();
        let key = KeyPair::generate().unwrap();
        let names = [name, "localhost", "127.0.0.1"].map(str::to_owned).to_vec();
        let certificate = CertificateParams::new(names).unwrap().signed_by(&key, &self.authority).unwrap();
        for file in ["ca.pem", "ca-cert.pem"] {
            std::fs::write(dir.join(file), self.authority.pem()).unwrap();
        }
        for file in ["node.pem", "server-cert.pem", "client-cert.pem"] {
            std::fs::write(dir.join(file), certificate.pem()).unwrap();
        }
        for file in ["node.key", "server-key.pem", "client-key.pem"] {
            std::fs::write(dir.join(file), key.serialize_pem()).unwrap();
        }
        dir
    }
}
