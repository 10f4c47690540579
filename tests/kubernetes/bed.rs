//! The API server that the tests share, and clients of it.

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use holdfast_service::kubernetes::crds;
use holdfast_service::{KubernetesClient, KubernetesStore};
use holdfast_tests::api_server::{ADMIN, ApiServer, User};
use holdfast_tests::go_tools::{self, Skip};
use k8s_openapi::api::authentication::v1::{BoundObjectReference, TokenRequest, TokenRequestSpec};
use k8s_openapi::api::core::v1::{Node, Pod, ServiceAccount};
use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::api::{Api, DeleteParams, DynamicObject, ListParams, Patch, PatchParams};
use kube::core::{ApiResource, GroupVersionKind};
use serde::Deserialize;
use serde_json::json;
use tokio::runtime::Runtime;

/// A user without any right of ours.
pub const STRANGER: &str = "stranger";
/// Where the manifests put our workloads.
pub const NAMESPACE: &str = "holdfast-system";
/// From a definition's installation to its first use.
const ESTABLISH_TIMEOUT: Duration = Duration::from_secs(30);

/// The server and a runtime for its clients.
pub struct Bed {
    server: Mutex<ApiServer>,
    runtime: Runtime,
}

/// Why the tests cannot run here.
pub fn skip_reason() -> Option<Skip> {
    static REASON: OnceLock<Option<Skip>> = OnceLock::new();
    let reason = REASON.get_or_init(|| {
        // One that does not build fails the tests instead.
        let missing = |tool: Result<Result<_, Skip>>| tool.ok().and_then(Result::err);
        missing(go_tools::etcd()).or_else(|| missing(go_tools::kube_apiserver()))
    });
    reason.clone()
}

/// The server, started by the first test that needs it.
///
/// # Errors
/// It does not start.
pub fn shared() -> Result<std::sync::Arc<Bed>> {
    static BED: Mutex<std::sync::Weak<Bed>> = Mutex::new(std::sync::Weak::new());
    thread_local! {
        // Ends with the main thread, on which the tests run.
        static KEPT: std::cell::RefCell<Option<std::sync::Arc<Bed>>> = const { std::cell::RefCell::new(None) };
    }
    let mut bed = BED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(bed) = bed.upgrade() {
        return Ok(bed);
    }
    let stranger = User { name: STRANGER.to_owned(), groups: Vec::new() };
    let server = ApiServer::start(&[stranger])?.map_err(|skip| anyhow::anyhow!(skip.0))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let made = std::sync::Arc::new(Bed { server: Mutex::new(server), runtime });
    *bed = std::sync::Arc::downgrade(&made);
    KEPT.with_borrow_mut(|kept| *kept = Some(std::sync::Arc::clone(&made)));
    Ok(made)
}

impl Bed {
    /// Runs a test's future.
    pub fn run<T>(&self, future: impl Future<Output = Result<T>>) -> Result<T> {
        self.runtime.block_on(future)
    }

    /// For tasks that go on beside the tests.
    pub fn handle(&self) -> tokio::runtime::Handle {
        self.runtime.handle().clone()
    }

    /// The server itself, to stop it.
    pub fn server(&self) -> MutexGuard<'_, ApiServer> {
        self.server.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A client of ours, for a user.
    pub fn client(&self, user: &str) -> Result<KubernetesClient> {
        let kubeconfig = self.server().kubeconfig(user, None)?;
        self.run(async move { Ok(KubernetesClient::from_kubeconfig(&kubeconfig).await?) })
    }

    /// A client of ours as it is in a pod: see [`Self::pod_kubeconfig`].
    pub fn pod_client(&self, account: &str, node: &str) -> Result<KubernetesClient> {
        let kubeconfig = self.pod_kubeconfig(account, node, None)?;
        self.run(async move { Ok(KubernetesClient::from_kubeconfig(&kubeconfig).await?) })
    }

    /// A kubeconfig with the token that a pod of `account` has on `node`, as kubelet asks for it. Installs the definitions, the
    /// workloads' accounts and rights, and what a node may change.
    pub fn pod_kubeconfig(&self, account: &str, node: &str, url: Option<&str>) -> Result<PathBuf> {
        self.install()?;
        let kube = self.kube()?;
        let token = self.run(async move {
            for file in [
                "common/namespace.yaml",
                "storage/rbac.yaml",
                "storage/certificates-rbac.yaml",
                "storage/admission.yaml",
                "network/network-controller-rbac.yaml",
            ] {
                apply_manifest(&kube, file).await.with_context(|| file.to_owned())?;
            }
            pod_token(&kube, account, node).await
        })?;
        self.server().kubeconfig_of(&token, url, NAMESPACE)
    }

    /// A client as anybody else uses it.
    pub fn kube(&self) -> Result<kube::Client> {
        let kubeconfig = self.server().kubeconfig(ADMIN, None)?;
        self.kube_of(kubeconfig)
    }

    /// The same with the rights of a pod: see [`Self::pod_kubeconfig`].
    pub fn pod_kube(&self, account: &str, node: &str) -> Result<kube::Client> {
        self.kube_of(self.pod_kubeconfig(account, node, None)?)
    }

    fn kube_of(&self, kubeconfig: PathBuf) -> Result<kube::Client> {
        self.run(async move {
            let kubeconfig = kube::config::Kubeconfig::read_from(kubeconfig)?;
            let config = kube::Config::from_custom_kubeconfig(kubeconfig, &Default::default()).await?;
            Ok(kube::Client::try_from(config)?)
        })
    }

    /// An empty store; the definitions are installed.
    pub fn store(&self) -> Result<KubernetesStore> {
        self.install()?;
        let records = self.objects("VolumeRecord")?;
        let names = self.objects("VolumeName")?;
        let volumes = self.objects("Volume")?;
        self.run(async move {
            for api in [records, names, volumes] {
                api.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
            }
            Ok(())
        })?;
        Ok(KubernetesStore::new(self.client(ADMIN)?))
    }

    /// Objects of one of our kinds, without its type.
    pub fn objects(&self, kind: &str) -> Result<Api<DynamicObject>> {
        let kind = GroupVersionKind::gvk("storage.holdfast.dev", "v1alpha1", kind);
        Ok(Api::all_with(self.kube()?, &ApiResource::from_gvk(&kind)))
    }

    /// Installs our definitions, as an administrator does, and waits until they are served.
    pub fn install(&self) -> Result<()> {
        let definitions: Api<CustomResourceDefinition> = Api::all(self.kube()?);
        self.run(async move {
            for crd in crds() {
                let name = crd.metadata.name.clone().context("a name")?;
                let params = PatchParams::apply("test").force();
                definitions.patch(&name, &params, &Patch::Apply(&crd)).await.with_context(|| name.clone())?;
                tokio::time::timeout(ESTABLISH_TIMEOUT, established(&definitions, &name))
                    .await
                    .with_context(|| format!("{name} is not established"))??;
            }
            Ok(())
        })
    }
}

/// Applies each document of a file of `manifests/base`, as an administrator does.
pub async fn apply_manifest(kube: &kube::Client, file: &str) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests/base").join(file);
    for document in serde_norway::Deserializer::from_str(&std::fs::read_to_string(path)?) {
        let object = DynamicObject::deserialize(document)?;
        let types = object.types.clone().context("its kind")?;
        let kind = GroupVersionKind::try_from(types)?;
        let resource = ApiResource::from_gvk_with_plural(&kind, &plural(&kind.kind));
        let api: Api<DynamicObject> = match &object.metadata.namespace {
            Some(namespace) => Api::namespaced_with(kube.clone(), namespace, &resource),
            None => Api::all_with(kube.clone(), &resource),
        };
        let name = object.metadata.name.clone().context("its name")?;
        api.patch(&name, &PatchParams::apply("test").force(), &Patch::Apply(&object)).await?;
    }
    Ok(())
}

/// The path's word for a kind.
pub fn plural(kind: &str) -> String {
    let lower = kind.to_lowercase();
    lower.strip_suffix('y').map_or_else(|| format!("{lower}s"), |stem| format!("{stem}ies"))
}

/// A token that is bound to a pod, which names the node that it runs on.
async fn pod_token(kube: &kube::Client, account: &str, node: &str) -> Result<String> {
    let nodes: Api<Node> = Api::all(kube.clone());
    let params = PatchParams::apply("test").force();
    let apply = |object: serde_json::Value| Patch::Apply(object);
    let meta = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}});
    nodes.patch(node, &params, &apply(meta)).await?;
    let name = format!("{account}-{node}");
    let pods: Api<Pod> = Api::namespaced(kube.clone(), NAMESPACE);
    let pod = json!({
        "apiVersion": "v1", "kind": "Pod", "metadata": {"name": name},
        "spec": {"serviceAccountName": account, "nodeName": node, "containers": [{"name": "c", "image": "none"}]},
    });
    pods.patch(&name, &params, &apply(pod)).await?;
    let request = TokenRequest {
        spec: TokenRequestSpec {
            bound_object_ref: Some(BoundObjectReference {
                kind: Some("Pod".to_owned()),
                api_version: Some("v1".to_owned()),
                name: Some(name),
                uid: None,
            }),
            expiration_seconds: Some(3600),
            ..TokenRequestSpec::default()
        },
        ..TokenRequest::default()
    };
    let accounts: Api<ServiceAccount> = Api::namespaced(kube.clone(), NAMESPACE);
    let answer = accounts.create_token_request(account, &Default::default(), &request).await?;
    Ok(answer.status.context("a token")?.token)
}

async fn established(definitions: &Api<CustomResourceDefinition>, name: &str) -> Result<()> {
    loop {
        let status = definitions.get(name).await?.status.unwrap_or_default();
        let conditions = status.conditions.unwrap_or_default();
        if conditions.iter().any(|c| c.type_ == "Established" && c.status == "True") {
            return Ok(());
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
