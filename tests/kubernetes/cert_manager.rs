//! cert-manager as the signer, by its own controllers and the component of the manifests: the same rules as with the built-in
//! issuer, its authority published, and what goes on while certificates and the authority change.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context, Result, ensure};
use holdfast_service::kubernetes::certificates::{
    AUTHORITY_NAME, BUNDLE_KEY, HolderSettings, IssuerSettings,
};
use holdfast_service::tls::CONTROLLER_NAME;
use holdfast_service::{KubernetesClient, TlsIdentity};
use holdfast_tests::api_server::ADMIN;
use holdfast_tests::cleanup::Logs;
use holdfast_tests::go_tools::{self, Skip};
use holdfast_tests::kustomize::documents;
use holdfast_tests::story::Story;
use k8s_openapi::api::certificates::v1::CertificateSigningRequest;
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Api, DeleteParams, ListParams, Patch, PatchParams, PostParams};
use libtest_mimic::Trial;
use rcgen::{BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair};
use serde_json::{Value, json};

use crate::bed::{Bed, NAMESPACE};
use crate::certificates::{Objects, Running, is_refused, mk_empty, obtain, speaks};
use crate::manifests::{apply, objects_of, text};
use crate::{trial, whole};

/// For cert-manager to make what the manifests ask for, on a busy machine.
const MADE_WITHIN: Duration = Duration::from_secs(120);
/// For a process to learn of an authority: it looks every 30 s.
const LEARNED_WITHIN: Duration = Duration::from_secs(90);
const HOUR: Duration = Duration::from_secs(3600);
/// Secret of the authority's key, and of the certificate that tells of the authority.
const ROOT: &str = "holdfast-root";
const NAMED: &str = "holdfast-authority";

pub fn trials() -> Vec<Trial> {
    vec![
        trial("cert_manager::signs_what_our_rules_approve_and_nothing_else", signs_what_is_approved),
        trial("cert_manager::connections_outlast_changes_of_its_authority", its_authority_changes_unnoticed),
        trial("cert_manager::a_cluster_stores_by_its_certificates", a_cluster_stores),
    ]
}

/// A cluster with cert-manager, as a user makes it.
struct World {
    controller: KubernetesClient,
    node_a: KubernetesClient,
    node_b: KubernetesClient,
    objects: Objects,
    issuer: IssuerSettings,
    // Ends with the test.
    manager: CertManager,
    dir: tempfile::TempDir,
}

impl World {
    /// None where there is no cert-manager to be had, which is said.
    fn begin(bed: &Bed) -> Result<Option<Self>> {
        let skip = |Skip(reason)| {
            println!("SKIP: {reason}");
            Ok(None)
        };
        let program = match go_tools::cert_manager()? {
            Ok(program) => program,
            Err(reason) => return skip(reason),
        };
        let module = match go_tools::cert_manager_module()? {
            Ok(module) => module,
            Err(reason) => return skip(reason),
        };
        let Some(manifests) = objects_of("examples/cert-manager")? else { return Ok(None) };
        let controller = bed.pod_client("holdfast-controller", "node-a")?;
        let node_a = bed.pod_client("holdfast-data", "node-a")?;
        let node_b = bed.pod_client("holdfast-data", "node-b")?;
        let objects = mk_empty(bed)?;
        let client = bed.kube()?;
        bed.run(async {
            for secret in [ROOT, NAMED] {
                // None is there at first.
                drop(objects.secrets.delete(secret, &DeleteParams::default()).await);
            }
            for file in fs::read_dir(module.join("deploy/crds"))? {
                let path = file?.path();
                if path.extension().is_some_and(|extension| extension == "yaml") {
                    for definition in documents(&fs::read_to_string(path)?)? {
                        apply(&client, &definition, false).await?;
                    }
                }
            }
            for object in manifests.iter().filter(|object| is_of_certificates(object)) {
                apply(&client, object, false).await?;
            }
            Ok(())
        })?;
        let dir = tempfile::tempdir()?;
        let mut manager = CertManager::start(&program, &bed.server().kubeconfig(ADMIN, None)?, dir.path())?;
        bed.run(async {
            until(MADE_WITHIN, || async { Ok(named(&objects).await.is_ok()) })
                .await
                .with_context(|| format!("no authority is named:\n{}", manager.log()))
        })?;
        let issuer = IssuerSettings {
            signer: argument(&manifests, "holdfast-controller", "--tls-signer=")?,
            authority_secret: Some(argument(&manifests, "holdfast-controller", "--tls-authority-secret=")?),
            life: HOUR,
            authority_life: HOUR,
            overlap: HOUR,
        };
        ensure!(argument(&manifests, "holdfast-data", "--tls-signer=")? == issuer.signer);
        Ok(Some(Self { controller, node_a, node_b, objects, issuer, manager, dir }))
    }

    fn holder(&self, name: &str) -> HolderSettings {
        let (dir, signer) = (self.dir.path().join(name), self.issuer.signer.clone());
        HolderSettings { name: name.to_owned(), dir, signer, life: HOUR }
    }
}

fn signs_what_is_approved(bed: &Bed) -> Result<()> {
    let Some(mut world) = World::begin(bed)? else { return Ok(()) };
    let kube_b = bed.pod_kube("holdfast-data", "node-b")?;
    approve_for_cert_manager(bed)?;
    let outcome = bed.run(async {
        let _issuer = Running::issuer(&world.controller, &world.issuer);
        let own = obtain(&world.controller, world.holder(CONTROLLER_NAME)).await?.identity();
        let a = obtain(&world.node_a, world.holder("node-a")).await?.identity();
        speaks(&a, "node-a", &own).await.context("the controller does not reach node-a")?;
        speaks(&own, CONTROLLER_NAME, &a).await.context("node-a does not reach the controller")?;
        ensure!(
            published(&world.objects).await? == named(&world.objects).await?,
            "something else is published"
        );

        // In another's name; for longer than is allowed; for so short that cert-manager would choose.
        for (name, life) in
            [("node-a", HOUR), (CONTROLLER_NAME, HOUR), ("node-b", HOUR * 2), ("node-b", HOUR / 60)]
        {
            let dir = world.dir.path().join("refused");
            let settings = HolderSettings { life, dir, ..world.holder(name) };
            is_refused(&world.objects, &world.node_b, settings)
                .await
                .with_context(|| format!("{name} for {life:?}"))?;
        }
        nobody_becomes_an_authority(&world, &kube_b).await?;
        strangers_are_not_trusted(&world, &a, &own).await
    });
    outcome.with_context(|| world.manager.log())?;
    nobody_else_chooses_the_authorities(bed)
}

/// The account's own name, which it may have, and the annotation by which cert-manager makes an authority of it.
async fn nobody_becomes_an_authority(world: &World, kube: &kube::Client) -> Result<()> {
    let mut params = CertificateParams::new(vec!["node-b".to_owned()])?;
    params.distinguished_name = rcgen::DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, "node-b");
    let pem = params.serialize_request(&KeyPair::generate()?)?.pem()?;
    let request: CertificateSigningRequest = serde_json::from_value(json!({
        "apiVersion": "certificates.k8s.io/v1", "kind": "CertificateSigningRequest",
        "metadata": {
            "name": "would-be-authority",
            "annotations": {"experimental.cert-manager.io/request-is-ca": "true"},
        },
        "spec": {
            "request": k8s_openapi::ByteString(pem.into_bytes()),
            "signerName": world.issuer.signer, "expirationSeconds": 3600,
            "usages": ["digital signature", "server auth", "client auth"],
        },
    }))?;
    let requests: Api<CertificateSigningRequest> = Api::all(kube.clone());
    requests.create(&PostParams::default(), &request).await?;
    until(MADE_WITHIN, || async {
        let status = world.objects.requests.get("would-be-authority").await?.status.unwrap_or_default();
        ensure!(status.certificate.is_none(), "it was signed");
        Ok(status.conditions.iter().flatten().any(|condition| condition.type_ == "Denied"))
    })
    .await
    .context("node-b asked to be an authority")
}

/// An authority of the same name with another key; and the certificate that tells of the authority, which is no TLS peer's.
async fn strangers_are_not_trusted(world: &World, a: &TlsIdentity, own: &TlsIdentity) -> Result<()> {
    let bundle = published(&world.objects).await?;
    let mut authority = CertificateParams::new(Vec::new())?;
    authority.distinguished_name = rcgen::DistinguishedName::new();
    authority.distinguished_name.push(DnType::CommonName, "Holdfast authority");
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = Issuer::new(authority, KeyPair::generate()?);
    for name in [CONTROLLER_NAME, "node-b"] {
        let (certificate, key) = mk_leaf(&authority, name, Duration::ZERO, HOUR)?;
        let stranger = TlsIdentity::from_pem(bundle.as_bytes(), certificate.as_bytes(), key.as_bytes())
            .map_err(anyhow::Error::msg)?;
        ensure!(speaks(a, "node-a", &stranger).await.is_err(), "a stranger's {name} is served");
        ensure!(speaks(&stranger, name, own).await.is_err(), "a stranger's {name} is called");
    }
    let (certificate, key) = (
        of_secret(&world.objects, NAMED, "tls.crt").await?,
        of_secret(&world.objects, NAMED, "tls.key").await?,
    );
    let teller = TlsIdentity::from_pem(bundle.as_bytes(), certificate.as_bytes(), key.as_bytes())
        .map_err(anyhow::Error::msg)?;
    ensure!(speaks(a, "node-a", &teller).await.is_err(), "the telling certificate is served");
    ensure!(speaks(&teller, "authority.invalid", own).await.is_err(), "the telling certificate is called");
    // As it was.
    speaks(a, "node-a", own).await
}

fn nobody_else_chooses_the_authorities(bed: &Bed) -> Result<()> {
    let clients = ["holdfast-data", "holdfast-node", "holdfast-controller"]
        .map(|account| bed.pod_kube(account, "node-a").map(|kube| (account, kube)));
    approve_for_cert_manager(bed)?;
    for client in clients.into_iter().rev() {
        let (account, kube) = client?;
        let secrets: Api<Secret> = Api::namespaced(kube.clone(), NAMESPACE);
        let maps: Api<ConfigMap> = Api::namespaced(kube, NAMESPACE);
        bed.run(async {
            let dry = PostParams { dry_run: true, ..PostParams::default() };
            let own: Secret = serde_json::from_value(json!({"metadata": {"name": "own"}}))?;
            // Rights that were just changed take a moment.
            until(MADE_WITHIN, || async { Ok(is_forbidden(&secrets.create(&dry, &own).await)) })
                .await
                .with_context(|| format!("{account} makes Secrets"))?;
            let (params, mine) = (PatchParams::default(), Patch::Merge(json!({"data": {"ca.crt": ""}})));
            ensure!(is_forbidden(&secrets.get(ROOT).await), "{account} reads the authority's key");
            ensure!(
                is_forbidden(&secrets.patch(NAMED, &params, &mine).await),
                "{account} names an authority"
            );
            if account == "holdfast-controller" {
                return Ok(());
            }
            let mine = Patch::Merge(json!({"data": {BUNDLE_KEY: "mine"}}));
            ensure!(is_forbidden(&secrets.get(NAMED).await), "{account} reads the telling certificate's key");
            ensure!(is_forbidden(&maps.patch(AUTHORITY_NAME, &params, &mine).await), "{account} publishes");
            Ok(())
        })?;
    }
    Ok(())
}

fn is_forbidden<T>(answer: &kube::Result<T>) -> bool {
    matches!(answer, Err(kube::Error::Api(status)) if status.code == 403)
}

/// A certificate that is about to end, and then an authority with another key: everybody speaks with everybody all the time.
fn its_authority_changes_unnoticed(bed: &Bed) -> Result<()> {
    let Some(mut world) = World::begin(bed)? else { return Ok(()) };
    let outcome = bed.run(async {
        let mut running = Running::issuer(&world.controller, &world.issuer);
        let holder = obtain(&world.controller, world.holder(CONTROLLER_NAME)).await?;
        let own = holder.identity();
        running.0.push(tokio::spawn(holder.keep()).abort_handle());

        let first = of_secret(&world.objects, ROOT, "tls.crt").await?;
        leave_old_certificate(&world).await?;
        let holder = obtain(&world.node_a, world.holder("node-a")).await?;
        let (a, before) = (holder.identity(), holder.identity().version());
        running.0.push(tokio::spawn(holder.keep()).abort_handle());
        until(LEARNED_WITHIN, || async {
            speaks(&a, "node-a", &own).await?;
            Ok(a.version() > before)
        })
        .await
        .context("the certificate is not renewed")?;

        let second = replace_authority(&world, &first, &a, &own).await?;
        let both = [second.as_str(), first.as_str()].concat();
        until(LEARNED_WITHIN, || async {
            speaks(&a, "node-a", &own).await?;
            Ok(published(&world.objects).await? == both)
        })
        .await
        .context("the new authority is not published beside the one before")?;
        // Signed by the new one, among those who are by the one before.
        let b = obtain(&world.node_b, world.holder("node-b")).await?.identity();
        until(LEARNED_WITHIN, || async {
            speaks(&a, "node-a", &own).await?;
            Ok(speaks(&a, "node-a", &b).await.is_ok())
        })
        .await
        .context("node-a does not learn of the new authority")?;
        until(LEARNED_WITHIN, || async { Ok(speaks(&b, "node-b", &own).await.is_ok()) })
            .await
            .context("the controller does not learn of the new authority")
    });
    outcome.with_context(|| world.manager.log())
}

/// In node-a's folder, as an earlier run left it: signed by the authority, due, and soon to end.
async fn leave_old_certificate(world: &World) -> Result<()> {
    let root = of_secret(&world.objects, ROOT, "tls.crt").await?;
    let key = KeyPair::from_pem(&of_secret(&world.objects, ROOT, "tls.key").await?)?;
    let authority = Issuer::from_ca_cert_pem(&root, key)?;
    let (certificate, key) =
        mk_leaf(&authority, "node-a", Duration::from_secs(400), Duration::from_secs(190))?;
    let dir = world.dir.path().join("node-a");
    fs::create_dir_all(&dir)?;
    fs::write(dir.join("ca.pem"), root)?;
    Ok(fs::write(dir.join("identity.pem"), format!("{key}{certificate}"))?)
}

/// Takes the authority's key away, so that cert-manager makes another one, and answers with its certificate once it is named.
async fn replace_authority(world: &World, first: &str, a: &TlsIdentity, own: &TlsIdentity) -> Result<String> {
    let secrets = &world.objects.secrets;
    secrets.delete(ROOT, &DeleteParams::default()).await?;
    until(MADE_WITHIN, || async {
        speaks(a, "node-a", own).await?;
        Ok(of_secret(&world.objects, ROOT, "tls.crt").await.is_ok_and(|root| root != first))
    })
    .await
    .context("no new authority")?;
    let second = of_secret(&world.objects, ROOT, "tls.crt").await?;
    let mut deleted: Option<Instant> = None;
    let begun = Instant::now();
    while named(&world.objects).await.ok().as_deref() != Some(&second) {
        ensure!(begun.elapsed() < MADE_WITHIN, "the new authority is not named");
        // Again where cert-manager still signed with the key of before.
        if deleted.is_none_or(|at| at.elapsed() > Duration::from_secs(10)) {
            drop(secrets.delete(NAMED, &DeleteParams::default()).await);
            deleted = Some(Instant::now());
        }
        speaks(a, "node-a", own).await?;
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    Ok(second)
}

/// The processes themselves, with the flags of the manifests: a database on a replicated volume.
fn a_cluster_stores(bed: &Bed) -> Result<()> {
    let Some(mut world) = World::begin(bed)? else { return Ok(()) };
    let mut options = whole::mk_options(bed, Some(HOUR.as_secs()))?;
    let secret = world.issuer.authority_secret.clone().context("a Secret")?;
    let kubernetes = options.kubernetes.as_mut().context("an API server")?;
    kubernetes.signer = Some((world.issuer.signer.clone(), secret));
    approve_for_cert_manager(bed)?;
    let mut story = Story::begin_on(&options).with_context(|| world.manager.log())?;
    let outcome = tell(&mut story);
    match outcome {
        Ok(()) => story.end()?,
        Err(error) => {
            story.cluster.end(Logs::Keep)?;
            return Err(error.context(world.manager.log()));
        }
    }
    let requests = bed.run(async { Ok(world.objects.requests.list(&ListParams::default()).await?.items) })?;
    let signed = requests
        .iter()
        .filter(|request| request.status.as_ref().is_some_and(|status| status.certificate.is_some()));
    ensure!(signed.count() > options.nodes.len(), "not one for each: {requests:?}");
    ensure!(requests.iter().all(|request| request.spec.signer_name == world.issuer.signer), "another signed");
    Ok(())
}

fn tell(story: &mut Story) -> Result<()> {
    story.provision()?;
    story.run_pods()?;
    story.lose_a_replica()?;
    story.commit_for_a_moment()?;
    story.compare("by certificates of cert-manager").map(drop)
}

/// A certificate for TLS peers, and its key.
fn mk_leaf(
    authority: &Issuer<'_, KeyPair>,
    name: &str,
    old: Duration,
    left: Duration,
) -> Result<(String, String)> {
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![name.to_owned()])?;
    params.extended_key_usages =
        vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    let now = SystemTime::now();
    params.not_before = now.checked_sub(old).context("a time")?.into();
    params.not_after = (now + left).into();
    Ok((params.signed_by(&key, authority)?.pem(), key.serialize_pem()))
}

async fn named(objects: &Objects) -> Result<String> {
    of_secret(objects, NAMED, "ca.crt").await
}

async fn published(objects: &Objects) -> Result<String> {
    let data = objects.maps.get(AUTHORITY_NAME).await?.data.unwrap_or_default();
    data.get(BUNDLE_KEY).cloned().context("nothing is published")
}

async fn of_secret(objects: &Objects, secret: &str, key: &str) -> Result<String> {
    let data = objects.secrets.get(secret).await?.data.unwrap_or_default();
    let value = data.get(key).filter(|value| !value.0.is_empty());
    Ok(String::from_utf8(value.with_context(|| format!("{secret} has no {key}"))?.0.clone())?)
}

/// What the component adds and changes, but for workloads.
fn is_of_certificates(object: &Value) -> bool {
    text(object, "/apiVersion").starts_with("cert-manager.io/")
        || text(object, "/metadata/name").starts_with("holdfast-certificate-")
}

/// Again, as each client of a pod brings the rights of the built-in issuer back.
fn approve_for_cert_manager(bed: &Bed) -> Result<()> {
    let objects = objects_of("examples/cert-manager")?.context("kustomize is there")?;
    let client = bed.kube()?;
    bed.run(async {
        for object in objects.iter().filter(|object| is_of_certificates(object)) {
            apply(&client, object, false).await?;
        }
        Ok(())
    })
}

fn argument(objects: &[Value], workload: &str, flag: &str) -> Result<String> {
    let mut found = objects.iter().filter(|object| {
        text(object, "/metadata/name") == workload && object.pointer("/spec/template").is_some()
    });
    let workload = found.next().with_context(|| workload.to_owned())?;
    let arguments = workload.pointer("/spec/template/spec/containers/0/args").and_then(Value::as_array);
    let mut arguments = arguments.into_iter().flatten().filter_map(Value::as_str);
    let value = arguments.find_map(|argument| argument.strip_prefix(flag));
    value.map(str::to_owned).with_context(|| format!("no {flag}"))
}

async fn until<F: Future<Output = Result<bool>>>(within: Duration, mut ask: impl FnMut() -> F) -> Result<()> {
    let begun = Instant::now();
    while !ask().await? {
        ensure!(begun.elapsed() < within, "not within {within:?}");
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
    Ok(())
}

/// Its controllers, which end with this.
struct CertManager {
    child: Child,
    log: std::path::PathBuf,
}

impl CertManager {
    fn start(program: &Path, kubeconfig: &Path, dir: &Path) -> Result<Self> {
        let log = dir.join("cert-manager.log");
        let file = fs::File::create(&log)?;
        // The kernel ends it with this thread, also when that is killed.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "--"]).arg(program).arg(kubeconfig).stdin(Stdio::null());
        let child = command.stdout(file.try_clone()?).stderr(file).spawn().context("cannot run it")?;
        Ok(Self { child, log })
    }

    fn log(&mut self) -> String {
        let ended = self.child.try_wait().ok().flatten();
        let state = ended.map_or("runs".to_owned(), |status| status.to_string());
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let last = log.lines().rev().take(30).collect::<Vec<_>>();
        format!("cert-manager ({state}), last line first:\n{}", last.join("\n"))
    }
}

impl Drop for CertManager {
    fn drop(&mut self) {
        // One that has ended already is as good.
        drop(self.child.kill());
        drop(self.child.wait());
    }
}
