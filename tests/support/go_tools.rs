//! Programs of other people that the tests run: built once from their Go modules at pinned versions, and kept.
//!
//! Each tool has a Go module of its own in `tests/conformance/NAME`, which pins it and all that it is made of, and may hold
//! small programs of ours that need Go's libraries. The finished
//! program lies outside of the checkout, in `$HOLDFAST_TEST_CACHE`, else `$XDG_CACHE_HOME/holdfast-tests`, else
//! `~/.cache/holdfast-tests`, under a name that changes with the module, so that only the first run pays for the build.
//!
//! Without Go, or where the modules cannot be fetched, the answer is a [`Skip`]: print it and end the test. A module that is
//! fetched and does not build is an error.

use std::ffi::OsStr;
use std::fmt;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::process::run_within;

/// Versions of one tool that are kept; what was used longest ago goes first.
const KEPT_VERSIONS_MAX: usize = 3;
/// Longest time to fetch a tool's modules. Beyond it the tool counts as not to be had.
const FETCH_TIMEOUT: Duration = Duration::from_secs(300);
/// Longest build; the API server takes about five minutes on two processors that do nothing else.
const BUILD_TIMEOUT: Duration = Duration::from_secs(1500);

/// Start of the names of our own modules.
const OWN_PREFIX: &str = "holdfast.dev/";

/// What Go says of a module that is not as it was pinned: a mistake of ours or of somebody on the way, never a missing network.
const NOT_AS_PINNED: [&str; 4] =
    ["SECURITY ERROR", "missing go.sum entry", "updates to go.mod needed", "is not in std"];

/// Why a test cannot run here. Its text is the line by which the runner counts it as skipped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skip(pub String);

impl fmt::Display for Skip {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SKIP: {}", self.0)
    }
}

/// One tool: what is built of which module.
struct Tool {
    /// The program, and its folder in `tests/conformance`.
    name: &'static str,
    /// Path of the Go package with its `main`. Of several, the programs lie in a folder of the tool's name.
    packages: &'static [&'static str],
    /// Module whose version names the program.
    module: &'static str,
    /// Go variable that holds the version the program tells, where it cannot find it out itself.
    version_variable: Option<&'static str>,
}

const CSI_SANITY: Tool = Tool {
    name: "csi-sanity",
    packages: &["github.com/kubernetes-csi/csi-test/v5/cmd/csi-sanity"],
    module: "github.com/kubernetes-csi/csi-test/v5",
    version_variable: None,
};

const CSI_SANITY_1_12: Tool = Tool { name: "csi-sanity-1.12", ..CSI_SANITY };

const CSI_SANITY_1_5: Tool = Tool {
    name: "csi-sanity-1.5",
    packages: &["github.com/kubernetes-csi/csi-test/v4/cmd/csi-sanity"],
    module: "github.com/kubernetes-csi/csi-test/v4",
    version_variable: None,
};

const KUBE_APISERVER: Tool = Tool {
    name: "kube-apiserver",
    packages: &["k8s.io/kubernetes/cmd/kube-apiserver"],
    module: "k8s.io/kubernetes",
    version_variable: Some("k8s.io/component-base/version.gitVersion"),
};

const ETCD: Tool = Tool {
    name: "etcd",
    packages: &["go.etcd.io/etcd/server/v3"],
    module: "go.etcd.io/etcd/server/v3",
    version_variable: None,
};

const CNITOOL: Tool = Tool {
    name: "cnitool",
    packages: &["github.com/containernetworking/cni/cnitool"],
    module: "github.com/containernetworking/cni",
    version_variable: None,
};

const CNI_PLUGINS: Tool = Tool {
    name: "cni-plugins",
    packages: &[
        "github.com/containernetworking/plugins/plugins/meta/tuning",
        "github.com/containernetworking/plugins/plugins/meta/bandwidth",
        "github.com/containernetworking/plugins/plugins/meta/portmap",
    ],
    module: "github.com/containernetworking/plugins",
    version_variable: None,
};

/// What a cluster is made of beside its API server: a module of its own, so that a test of the API server alone waits for no kubelet.
const KUBERNETES: Tool = Tool {
    name: "kubernetes",
    packages: &[
        "k8s.io/kubernetes/cmd/kube-controller-manager",
        "k8s.io/kubernetes/cmd/kube-scheduler",
        "k8s.io/kubernetes/cmd/kubelet",
        "k8s.io/kubernetes/cmd/kube-proxy",
        "k8s.io/kubernetes/cmd/kubectl",
    ],
    module: "k8s.io/kubernetes",
    version_variable: Some("k8s.io/component-base/version.gitVersion"),
};

/// Newer than Debian's, which kubelets no longer speak to.
const CONTAINERD: Tool = Tool {
    name: "containerd",
    packages: &[
        "github.com/containerd/containerd/v2/cmd/containerd",
        "github.com/containerd/containerd/v2/cmd/containerd-shim-runc-v2",
        "github.com/containerd/containerd/v2/cmd/ctr",
    ],
    module: "github.com/containerd/containerd/v2",
    version_variable: Some("github.com/containerd/containerd/v2/version.Version"),
};

/// What runs in pods: the CSI project's sidecars in one module, so that they are compiled in a third of the time, and our own.
const POD_PROGRAMS: Tool = Tool {
    name: "pod-programs",
    packages: &[
        "github.com/kubernetes-csi/external-provisioner/v6/cmd/csi-provisioner",
        "github.com/kubernetes-csi/external-attacher/v4/cmd/csi-attacher",
        "github.com/kubernetes-csi/external-resizer/v2/cmd/csi-resizer",
        "github.com/kubernetes-csi/external-snapshotter/v8/cmd/csi-snapshotter",
        "github.com/kubernetes-csi/external-snapshotter/v8/cmd/snapshot-controller",
        "holdfast.dev/tests/pod-programs/csi-node-driver-registrar",
        "holdfast.dev/tests/pod-programs/livenessprobe",
        "holdfast.dev/tests/pod-programs/ledger",
        "holdfast.dev/tests/pod-programs/pause",
    ],
    module: "github.com/kubernetes-csi/external-provisioner/v6",
    version_variable: None,
};

/// Kubernetes' own suites, what runs them side by side, and what their pods run.
const E2E: Tool = Tool {
    name: "e2e",
    packages: &["github.com/onsi/ginkgo/v2/ginkgo", E2E_SUITES, "k8s.io/kubernetes/test/images/agnhost"],
    module: "k8s.io/kubernetes",
    version_variable: Some("k8s.io/component-base/version.gitVersion"),
};
/// A package of tests, not a program: it becomes the program `e2e.test`.
const E2E_SUITES: &str = "k8s.io/kubernetes/test/e2e";

const KUSTOMIZE: Tool = Tool {
    name: "kustomize",
    packages: &["sigs.k8s.io/kustomize/kustomize/v5"],
    module: "sigs.k8s.io/kustomize/kustomize/v5",
    version_variable: None,
};

const HELM: Tool = Tool {
    name: "helm",
    packages: &["helm.sh/helm/v4/cmd/helm"],
    module: "helm.sh/helm/v4",
    version_variable: None,
};

/// Those of cert-manager's controllers that certificates need; its own program is a module that cannot be fetched by itself.
const CERT_MANAGER: Tool = Tool {
    name: "cert-manager",
    packages: &["holdfast.dev/tests/cert-manager/cert-manager"],
    module: "github.com/cert-manager/cert-manager",
    version_variable: None,
};

/// What puts manifests together, as kubectl does it.
///
/// # Errors
/// As for [`csi_sanity`].
pub fn kustomize() -> Result<Result<PathBuf, Skip>> {
    KUSTOMIZE.program()
}

/// What renders charts.
///
/// # Errors
/// As for [`csi_sanity`].
pub fn helm() -> Result<Result<PathBuf, Skip>> {
    HELM.program()
}

/// The conformance suite of the CSI project.
///
/// # Errors
/// It does not build although everything for it is there.
pub fn csi_sanity() -> Result<Result<PathBuf, Skip>> {
    CSI_SANITY.program()
}

/// The conformance suite as it was for version 1.12 of the specification: a client of that version.
///
/// # Errors
/// As for [`csi_sanity`].
pub fn csi_sanity_1_12() -> Result<Result<PathBuf, Skip>> {
    CSI_SANITY_1_12.program()
}

/// The conformance suite as it was for version 1.5 of the specification: a client of that version.
///
/// # Errors
/// As for [`csi_sanity`].
pub fn csi_sanity_1_5() -> Result<Result<PathBuf, Skip>> {
    CSI_SANITY_1_5.program()
}

/// Kubernetes' API server; `$KUBEBUILDER_ASSETS/kube-apiserver` where that variable is set.
///
/// # Errors
/// As for [`csi_sanity`]; and the variable names a folder without the program.
pub fn kube_apiserver() -> Result<Result<PathBuf, Skip>> {
    KUBE_APISERVER.given_or_built()
}

/// The API server's database; `$KUBEBUILDER_ASSETS/etcd` where that variable is set.
///
/// # Errors
/// As for [`kube_apiserver`].
pub fn etcd() -> Result<Result<PathBuf, Skip>> {
    ETCD.given_or_built()
}

/// The CNI project's own runtime.
///
/// # Errors
/// As for [`csi_sanity`].
pub fn cnitool() -> Result<Result<PathBuf, Skip>> {
    CNITOOL.program()
}

/// A folder with the reference plugins `tuning`, `bandwidth` and `portmap`, of a version that speaks CNI 1.1.0.
///
/// # Errors
/// As for [`csi_sanity`].
pub fn cni_plugins() -> Result<Result<PathBuf, Skip>> {
    CNI_PLUGINS.program()
}

/// A folder with `kube-controller-manager`, `kube-scheduler`, `kubelet`, `kube-proxy` and `kubectl`.
///
/// # Errors
/// As for [`csi_sanity`].
pub fn kubernetes() -> Result<Result<PathBuf, Skip>> {
    KUBERNETES.program()
}

/// A folder with `e2e.test`, `ginkgo` and `agnhost`.
///
/// # Errors
/// As for [`csi_sanity`].
pub fn e2e() -> Result<Result<PathBuf, Skip>> {
    E2E.program()
}

/// A folder with `containerd`, `containerd-shim-runc-v2` and `ctr`.
///
/// # Errors
/// As for [`csi_sanity`].
pub fn containerd() -> Result<Result<PathBuf, Skip>> {
    CONTAINERD.program()
}

/// A folder with static programs for images: the CSI sidecars, `pause` and `ledger`.
///
/// # Errors
/// As for [`csi_sanity`].
pub fn pod_programs() -> Result<Result<PathBuf, Skip>> {
    POD_PROGRAMS.program()
}

/// cert-manager's controllers: `cert-manager KUBECONFIG`.
///
/// # Errors
/// As for [`csi_sanity`].
pub fn cert_manager() -> Result<Result<PathBuf, Skip>> {
    CERT_MANAGER.program()
}

/// Where cert-manager's module lies, which has its definitions in `deploy/crds`.
///
/// # Errors
/// As for [`pod_module`].
pub fn cert_manager_module() -> Result<Result<PathBuf, Skip>> {
    module_of(&CERT_MANAGER, CERT_MANAGER.module)
}

/// Where a module lies that the programs of pods are made of, with all its files.
///
/// # Errors
/// It is no such module.
pub fn pod_module(module: &str) -> Result<Result<PathBuf, Skip>> {
    module_of(&POD_PROGRAMS, module)
}

fn module_of(tool: &Tool, module: &str) -> Result<Result<PathBuf, Skip>> {
    if !command_exists("go") {
        return Ok(Err(Skip(format!("there is no Go to find {module} with"))));
    }
    // It is fetched where it is not there yet, such as when the finished programs were.
    let mut command = Command::new("go");
    command.args(["mod", "download", "-json", module]).current_dir(tool.module_folder()).env_remove("GOWORK");
    let answer: serde_json::Value = serde_json::from_str(&run_within(FETCH_TIMEOUT, &mut command)?)?;
    Ok(Ok(PathBuf::from(answer["Dir"].as_str().context("it has no folder")?)))
}

impl Tool {
    fn given_or_built(&self) -> Result<Result<PathBuf, Skip>> {
        let Some(folder) = std::env::var_os("KUBEBUILDER_ASSETS").filter(|value| !value.is_empty()) else {
            return self.program();
        };
        let program = Path::new(&folder).join(self.name);
        if !program.is_file() {
            bail!("KUBEBUILDER_ASSETS is {}, where there is no {}", folder.display(), self.name);
        }
        Ok(Ok(program))
    }

    /// The program from the cache; it is built if it is not there yet.
    fn program(&self) -> Result<Result<PathBuf, Skip>> {
        let module = self.module_folder();
        let mut pins = [fs::read(module.join("go.mod"))?, fs::read(module.join("go.sum"))?].concat();
        let version = version_of(self.module, &String::from_utf8_lossy(&pins))
            .with_context(|| format!("{}/go.mod does not name {}", module.display(), self.module))?;
        pins.extend(own_sources(&module, self.packages)?);
        let cache = cache_folder();
        fs::create_dir_all(&cache).with_context(|| format!("cannot make {}", cache.display()))?;
        let program = cache.join(format!("{}-{version}-{:08x}", self.name, crc32c::crc32c(&pins)));
        // Held over look and build, so that of several checkouts only one builds.
        let _lock = lock(&cache.join(format!("{}.lock", self.name)))?;
        if program.exists() {
            // What is used is not what goes first.
            File::open(&program)?.set_modified(SystemTime::now())?;
            return Ok(Ok(program));
        }
        if !command_exists("go") {
            return Ok(Err(Skip(format!("there is no Go to build {} with", self.name))));
        }
        if let Err(error) =
            run_within(FETCH_TIMEOUT, self.go("list", self.list_arguments()).args(self.packages))
        {
            let text = format!("{error:#}");
            if NOT_AS_PINNED.iter().any(|sign| text.contains(sign)) {
                return Err(error.context(format!("{} is not what is pinned", self.name)));
            }
            return Ok(Err(Skip(format!(
                "the modules of {} cannot be had: {}",
                self.name,
                last_line(&text)
            ))));
        }
        self.build(&program, &version)?;
        remove_old_versions(&cache, self.name)?;
        Ok(Ok(program))
    }

    fn build(&self, program: &Path, version: &str) -> Result<()> {
        let start = Instant::now();
        eprintln!("Building {} {version} once, into {}", self.name, program.display());
        let unfinished = PathBuf::from(format!("{}.{}.tmp", program.display(), std::process::id()));
        let mut flags = "-s -w".to_owned();
        if let Some(variable) = self.version_variable {
            flags.push_str(&format!(" -X {variable}={version}"));
        }
        let output = unfinished.as_os_str();
        if self.packages.len() > 1 {
            fs::create_dir_all(&unfinished)?;
        }
        let arguments = [OsStr::new("-ldflags"), OsStr::new(&flags), OsStr::new("-o"), output];
        let (suites, programs): (Vec<&str>, Vec<&str>) =
            self.packages.iter().partition(|package| **package == E2E_SUITES);
        run_within(BUILD_TIMEOUT, self.go("build", arguments).args(programs).env("GOPROXY", "off"))?;
        if !suites.is_empty() {
            let mut arguments = arguments.to_vec();
            let suite = unfinished.join("e2e.test");
            arguments[3] = suite.as_os_str();
            arguments.extend(["-c", "-vet=off"].map(OsStr::new));
            run_within(BUILD_TIMEOUT, self.go("test", arguments).args(suites).env("GOPROXY", "off"))?;
        }
        fs::rename(&unfinished, program)?;
        eprintln!("Built {} in {:.0} s", self.name, start.elapsed().as_secs_f64());
        Ok(())
    }

    fn go<A: AsRef<OsStr>>(&self, verb: &str, arguments: impl IntoIterator<Item = A>) -> Command {
        let mut command = Command::new("go");
        command.arg(verb).args(arguments).current_dir(self.module_folder());
        command.env("CGO_ENABLED", "0").env("GOFLAGS", "-mod=readonly -buildvcs=false").env_remove("GOWORK");
        if std::env::var_os("HOME").is_none() && std::env::var_os("GOCACHE").is_none() {
            let cache = cache_folder();
            command.env("GOCACHE", cache.join("go-build")).env("GOPATH", cache.join("go"));
        }
        command
    }

    /// All modules that the packages are made of are fetched for the answer, which is empty.
    fn list_arguments(&self) -> &'static [&'static str] {
        if self.packages.contains(&E2E_SUITES) { &["-deps", "-test", "-f", ""] } else { &["-deps", "-f", ""] }
    }

    fn module_folder(&self) -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("conformance").join(self.name)
    }
}

/// Where finished programs are kept.
fn cache_folder() -> PathBuf {
    let set = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty()).map(PathBuf::from);
    set("HOLDFAST_TEST_CACHE")
        .or_else(|| set("XDG_CACHE_HOME").map(|folder| folder.join("holdfast-tests")))
        .or_else(|| set("HOME").map(|folder| folder.join(".cache/holdfast-tests")))
        .unwrap_or_else(|| std::env::temp_dir().join("holdfast-tests"))
}

fn lock(path: &Path) -> Result<Flock<File>> {
    let file = File::create(path).with_context(|| format!("cannot make {}", path.display()))?;
    Flock::lock(file, FlockArg::LockExclusive)
        .map_err(|(_, errno)| errno)
        .with_context(|| format!("cannot lock {}", path.display()))
}

/// The text of the packages that lie in the module itself.
fn own_sources(module: &Path, packages: &[&str]) -> Result<Vec<u8>> {
    let mut text = Vec::new();
    for package in packages {
        let main = module.join(Path::new(package).file_name().unwrap_or_default()).join("main.go");
        if package.starts_with(OWN_PREFIX) {
            text.extend(fs::read(&main).with_context(|| format!("cannot read {}", main.display()))?);
        }
    }
    Ok(text)
}

/// The version that a go.mod demands of a module.
fn version_of(module: &str, pins: &str) -> Option<String> {
    let mut lines = pins.lines().map(|line| line.trim().trim_start_matches("require ").split_whitespace());
    lines
        .find_map(|mut words| (words.next() == Some(module)).then(|| words.next()).flatten())
        .map(str::to_owned)
}

fn command_exists(name: &str) -> bool {
    let outcome = Command::new(name).arg("version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    outcome.is_ok_and(|status| status.success())
}

fn last_line(text: &str) -> &str {
    text.lines().rfind(|line| !line.trim().is_empty()).unwrap_or(text)
}

/// Removes what was used longest ago, and what builds that were cut off left.
fn remove_old_versions(cache: &Path, name: &str) -> Result<()> {
    let mut kept = Vec::new();
    for entry in fs::read_dir(cache)? {
        let path = entry?.path();
        let file_name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        if !file_name.strip_prefix(name).is_some_and(|rest| rest.starts_with("-v")) {
            continue;
        }
        if path.extension().is_some_and(|end| end == "tmp") {
            remove_any(&path)?;
        } else {
            kept.push((fs::metadata(&path)?.modified()?, path));
        }
    }
    kept.sort();
    let surplus = kept.len().saturating_sub(KEPT_VERSIONS_MAX);
    for (_, path) in kept.drain(..surplus) {
        remove_any(&path)?;
    }
    Ok(())
}

fn remove_any(path: &Path) -> std::io::Result<()> {
    if path.is_dir() { fs::remove_dir_all(path) } else { fs::remove_file(path) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_version_is_the_one_that_go_mod_requires() {
        let pins = "module m\n\ntool a/b/cmd\n\nrequire (\n\ta/b v1.2.3\n\ta/b/c v9.0.0 // indirect\n)\na/b v1.0.0 h1:x\n";
        assert_eq!(version_of("a/b", pins).as_deref(), Some("v1.2.3"));
        assert_eq!(version_of("a/b", "require a/b v2.0.0\n").as_deref(), Some("v2.0.0"));
        assert_eq!(version_of("a", pins), None);
    }

    #[test]
    fn every_tool_is_pinned_by_a_module_of_its_own() {
        let of_cluster = [KUBERNETES, CONTAINERD, POD_PROGRAMS];
        let alone = [
            CSI_SANITY,
            CSI_SANITY_1_12,
            CSI_SANITY_1_5,
            KUBE_APISERVER,
            ETCD,
            CNITOOL,
            CNI_PLUGINS,
            KUSTOMIZE,
            HELM,
            E2E,
            CERT_MANAGER,
        ];
        for tool in alone.into_iter().chain(of_cluster) {
            let pins = fs::read_to_string(tool.module_folder().join("go.mod")).unwrap();
            assert!(version_of(tool.module, &pins).is_some_and(|v| v.starts_with('v')), "{}", tool.name);
            assert!(
                tool.packages.iter().all(|package| pins.contains(&format!("\t{package}\n"))
                    || pins.contains(&format!("tool {package}\n"))
                    || package.starts_with(OWN_PREFIX)),
                "{}",
                tool.name
            );
        }
    }

    #[test]
    fn old_versions_go_and_other_tools_stay() {
        let dir = tempfile::tempdir().unwrap();
        for (age, name) in ["tool-v1-a", "tool-v2-b", "tool-v3-c", "tool-v4-d"].iter().rev().enumerate() {
            let file = File::create(dir.path().join(name)).unwrap();
            let age = Duration::from_secs(1000 * age as u64);
            file.set_modified(SystemTime::now().checked_sub(age).unwrap()).unwrap();
        }
        for other in ["tool-v5-e.7.tmp", "tool.lock", "tool-box-v1-a", "other-v1-a"] {
            File::create(dir.path().join(other)).unwrap();
        }

        remove_old_versions(dir.path(), "tool").unwrap();

        let mut left: Vec<_> =
            fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["other-v1-a", "tool-box-v1-a", "tool-v2-b", "tool-v3-c", "tool-v4-d", "tool.lock"]);
    }
}
