//! The built-in issuer on a real server, by tokens as kubelet asks for them: who gets a certificate, who does not, and what
//! goes on while certificates and authorities change.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use holdfast_service::kubernetes::certificates::{
    AUTHORITY_NAME, BUNDLE_KEY, Holder, HolderSettings, IssuerSettings, OWN_SIGNER, issue,
};
use holdfast_service::serve::{serve_tcp, server};
use holdfast_service::tls::CONTROLLER_NAME;
use holdfast_service::{IdentityService, KubernetesClient, TlsIdentity};
use holdfast_tests::cleanup::Logs;
use holdfast_tests::story::Story;
use k8s_openapi::api::certificates::v1::{CertificateSigningRequest, CertificateSigningRequestCondition};
use k8s_openapi::api::core::v1::{ConfigMap, Secret};
use kube::api::{Api, DeleteParams, ListParams, PostParams};
use libtest_mimic::Trial;
use tokio::net::TcpListener;
use tokio::task::AbortHandle;
use tonic::transport::Endpoint;

use crate::bed::{Bed, NAMESPACE};
use crate::{trial, whole};

const ANSWERED_WITHIN: Duration = Duration::from_secs(30);
/// Of each data process in the story, so that all change their certificate several times.
const STORY_LIFE_S: u64 = 20;
/// From one certificate to the next, and what a busy machine takes.
const RENEWED_WITHIN: Duration = Duration::from_secs(60);

pub fn trials() -> Vec<Trial> {
    vec![
        trial("certificates::name_the_node_of_the_token_and_no_other", they_name_the_node_of_the_token),
        trial("certificates::what_a_person_approves_wrongly_is_not_signed", wrong_approvals_are_not_signed),
        trial("certificates::twins_make_one_authority", twins_make_one_authority),
        trial("certificates::connections_outlast_changes_of_the_authority", authorities_change_unnoticed),
        trial("certificates::are_renewed_while_a_database_writes", renewed_under_traffic),
    ]
}

/// Tasks end with the test.
pub struct Running(pub Vec<AbortHandle>);

impl Running {
    pub fn issuer(client: &KubernetesClient, settings: &IssuerSettings) -> Self {
        Self(vec![tokio::spawn(issue(client.clone(), settings.clone())).abort_handle()])
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.iter().for_each(AbortHandle::abort);
    }
}

fn mk_issuer() -> IssuerSettings {
    let day = Duration::from_secs(86_400);
    IssuerSettings {
        signer: OWN_SIGNER.to_owned(),
        authority_secret: None,
        life: day,
        authority_life: day * 30,
        overlap: day,
    }
}

fn mk_holder(name: &str, dir: &Path, life: Duration) -> HolderSettings {
    HolderSettings { name: name.to_owned(), dir: dir.join(name), signer: OWN_SIGNER.to_owned(), life }
}

pub struct Objects {
    pub requests: Api<CertificateSigningRequest>,
    pub secrets: Api<Secret>,
    pub maps: Api<ConfigMap>,
}

/// As before the first start.
pub fn mk_empty(bed: &Bed) -> Result<Objects> {
    let kube = bed.kube()?;
    let objects = Objects {
        requests: Api::all(kube.clone()),
        secrets: Api::namespaced(kube.clone(), NAMESPACE),
        maps: Api::namespaced(kube, NAMESPACE),
    };
    bed.run(async {
        let (delete, list) = (DeleteParams::default(), ListParams::default());
        objects.requests.delete_collection(&delete, &list).await?;
        // None is there at first.
        drop(objects.secrets.delete(AUTHORITY_NAME, &delete).await);
        drop(objects.maps.delete(AUTHORITY_NAME, &delete).await);
        Ok(objects)
    })
}

pub async fn obtain(client: &KubernetesClient, settings: HolderSettings) -> Result<Holder> {
    let obtained = tokio::time::timeout(ANSWERED_WITHIN, Holder::obtain(client.clone(), settings)).await;
    Ok(obtained.context("no certificate in time")??)
}

fn they_name_the_node_of_the_token(bed: &Bed) -> Result<()> {
    let controller = bed.pod_client("holdfast-controller", "node-a")?;
    let node_a = bed.pod_client("holdfast-data", "node-a")?;
    let node_b = bed.pod_client("holdfast-data", "node-b")?;
    let node_service = bed.pod_client("holdfast-node", "node-a")?;
    let objects = mk_empty(bed)?;
    let dir = tempfile::tempdir()?;
    let day = Duration::from_secs(86_400);
    bed.run(async {
        let _issuer = Running::issuer(&controller, &mk_issuer());
        let own = obtain(&controller, mk_holder(CONTROLLER_NAME, dir.path(), day)).await?.identity();
        let a = obtain(&node_a, mk_holder("node-a", dir.path(), day)).await?.identity();
        speaks(&a, "node-a", &own).await.context("the controller does not reach node-a")?;
        // In another's name, for longer than is allowed, by an account that needs none.
        for (who, name, life) in
            [(&node_b, "node-a", day), (&node_b, CONTROLLER_NAME, day), (&node_b, "node-b", day * 2)]
        {
            let settings = mk_holder(name, &dir.path().join("refused"), life);
            is_refused(&objects, who, settings).await.with_context(|| format!("{name} for {life:?}"))?;
        }
        // It may not even ask.
        let settings = mk_holder("node-a", &dir.path().join("service"), day);
        let asked =
            tokio::time::timeout(Duration::from_secs(3), Holder::obtain(node_service.clone(), settings));
        ensure!(asked.await.is_err(), "the node service got a certificate");
        // A start with a certificate that holds needs nobody.
        drop(_issuer);
        objects.requests.delete_collection(&DeleteParams::default(), &ListParams::default()).await?;
        obtain(&node_a, mk_holder("node-a", dir.path(), day)).await?;
        ensure!(objects.requests.list(&ListParams::default()).await?.items.is_empty(), "it asked again");
        Ok(())
    })?;
    nobody_else_reads_the_key(bed)
}

fn nobody_else_reads_the_key(bed: &Bed) -> Result<()> {
    for account in ["holdfast-data", "holdfast-node"] {
        let secrets: Api<Secret> = Api::namespaced(bed.pod_kube(account, "node-a")?, NAMESPACE);
        let read = bed.run(async move { Ok(secrets.get(AUTHORITY_NAME).await) })?;
        ensure!(
            matches!(&read, Err(kube::Error::Api(status)) if status.code == 403),
            "{account} reads the authority's key: {}",
            read.is_ok()
        );
    }
    Ok(())
}

/// A holder gives up only when it is told to: what counts is what the server has of its request.
pub async fn is_refused(
    objects: &Objects,
    client: &KubernetesClient,
    settings: HolderSettings,
) -> Result<()> {
    let known: Vec<_> = names(objects).await?;
    let mut asked = Box::pin(Holder::obtain(client.clone(), settings));
    let begun = Instant::now();
    while begun.elapsed() < ANSWERED_WITHIN {
        if tokio::time::timeout(Duration::from_millis(300), &mut asked).await.is_ok() {
            bail!("a certificate was given");
        }
        for request in objects.requests.list(&ListParams::default()).await? {
            let status = request.status.unwrap_or_default();
            ensure!(
                known.contains(&request.metadata.name) || status.certificate.is_none(),
                "a certificate was signed"
            );
            let denied = status.conditions.iter().flatten().any(|condition| condition.type_ == "Denied");
            if denied && !known.contains(&request.metadata.name) {
                return Ok(());
            }
        }
    }
    bail!("nobody denied it")
}

async fn names(objects: &Objects) -> Result<Vec<Option<String>>> {
    let all = objects.requests.list(&ListParams::default()).await?;
    Ok(all.items.into_iter().map(|request| request.metadata.name).collect())
}

fn wrong_approvals_are_not_signed(bed: &Bed) -> Result<()> {
    let controller = bed.pod_client("holdfast-controller", "node-a")?;
    let node_b = bed.pod_client("holdfast-data", "node-b")?;
    let objects = mk_empty(bed)?;
    let dir = tempfile::tempdir()?;
    bed.run(async {
        // Asked and approved before an issuer looks.
        let settings = mk_holder("node-a", dir.path(), Duration::from_secs(86_400));
        let mut asked = Box::pin(Holder::obtain(node_b.clone(), settings));
        drop(tokio::time::timeout(Duration::from_secs(2), &mut asked).await);
        let mut request =
            objects.requests.list(&ListParams::default()).await?.items.pop().context("no request")?;
        let name = request.metadata.name.clone().context("a name")?;
        let condition = CertificateSigningRequestCondition {
            type_: "Approved".to_owned(),
            status: "True".to_owned(),
            reason: Some("Hasty".to_owned()),
            ..CertificateSigningRequestCondition::default()
        };
        request.status.get_or_insert_default().conditions = Some(vec![condition]);
        objects.requests.replace_subresource("approval", &name, &PostParams::default(), &request).await?;
        let _issuer = Running::issuer(&controller, &mk_issuer());
        let begun = Instant::now();
        loop {
            let status = objects.requests.get(&name).await?.status.unwrap_or_default();
            ensure!(status.certificate.is_none(), "it was signed");
            if status.conditions.iter().flatten().any(|condition| condition.type_ == "Failed") {
                return Ok(());
            }
            ensure!(begun.elapsed() < ANSWERED_WITHIN, "nobody said that it failed: {status:?}");
            drop(tokio::time::timeout(Duration::from_millis(300), &mut asked).await);
        }
    })
}

fn twins_make_one_authority(bed: &Bed) -> Result<()> {
    let controller = bed.pod_client("holdfast-controller", "node-a")?;
    let node_a = bed.pod_client("holdfast-data", "node-a")?;
    let dir = tempfile::tempdir()?;
    for round in 0..3 {
        let objects = mk_empty(bed)?;
        bed.run(async {
            let _twins: Vec<Running> = (0..3).map(|_| Running::issuer(&controller, &mk_issuer())).collect();
            let folder = dir.path().join(round.to_string());
            obtain(&node_a, mk_holder("node-a", &folder, Duration::from_secs(86_400))).await?;
            // All of them look several times more; nothing moves.
            let versions = || async {
                let (secret, map) =
                    (objects.secrets.get(AUTHORITY_NAME).await?, objects.maps.get(AUTHORITY_NAME).await?);
                anyhow::Ok((secret.metadata.resource_version, map.metadata.resource_version))
            };
            let before = versions().await?;
            tokio::time::sleep(Duration::from_secs(4)).await;
            ensure!(versions().await? == before, "twins quarrel");
            let bundle = objects.maps.get(AUTHORITY_NAME).await?.data.unwrap_or_default();
            ensure!(bundle[BUNDLE_KEY].matches("BEGIN").count() == 1, "more than one authority");
            Ok(())
        })?;
    }
    Ok(())
}

/// Short lives: the authority changes three times, and each second everybody connects to everybody.
fn authorities_change_unnoticed(bed: &Bed) -> Result<()> {
    let controller = bed.pod_client("holdfast-controller", "node-a")?;
    let clients = [bed.pod_client("holdfast-data", "node-a")?, bed.pod_client("holdfast-data", "node-b")?];
    let objects = mk_empty(bed)?;
    let dir = tempfile::tempdir()?;
    let seconds = Duration::from_secs;
    let settings = IssuerSettings {
        life: seconds(15),
        authority_life: seconds(45),
        overlap: seconds(10),
        ..mk_issuer()
    };
    bed.run(async {
        let mut running = Running::issuer(&controller, &settings);
        let mut identities = Vec::new();
        for (client, name) in clients.iter().zip(["node-a", "node-b"]) {
            let holder = obtain(client, mk_holder(name, dir.path(), settings.life)).await?;
            identities.push((holder.identity(), name));
            running.0.push(tokio::spawn(holder.keep()).abort_handle());
        }
        let (mut seen, mut last) = (0, None);
        let begun = Instant::now();
        while seen < 4 {
            let secret = objects.secrets.get(AUTHORITY_NAME).await?.data.unwrap_or_default();
            let current = secret.get("current.pem").cloned();
            if last != current {
                (seen, last) = (seen + 1, current);
            }
            for ((server, name), (client, _)) in identities.iter().zip(identities.iter().rev()) {
                speaks(server, name, client).await.with_context(|| format!("after {:?}", begun.elapsed()))?;
            }
            ensure!(begun.elapsed() < seconds(300), "the authority changed {seen} times only");
            tokio::time::sleep(seconds(1)).await;
        }
        ensure!(identities.iter().all(|(identity, _)| identity.version() > 4), "nothing was renewed");
        Ok(())
    })
}

/// A call over a new connection, each side by its newest certificate.
pub async fn speaks(serving: &TlsIdentity, name: &str, calling: &TlsIdentity) -> Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0").await?;
    let address = listener.local_addr()?;
    let service = holdfast_proto::csi::identity_server::IdentityServer::new(IdentityService::node());
    let router = server().add_service(service);
    let serving = tokio::spawn(serve_tcp(
        router,
        listener,
        Some(Arc::clone(&serving.server())),
        std::future::pending(),
    ));
    let answer = async {
        let endpoint =
            Endpoint::from_shared(format!("https://{address}"))?.tls_config(calling.client(name))?;
        let mut client = holdfast_proto::csi::identity_client::IdentityClient::new(endpoint.connect().await?);
        client.get_plugin_info(holdfast_proto::csi::GetPluginInfoRequest {}).await?;
        anyhow::Ok(())
    };
    let answered = tokio::time::timeout(Duration::from_secs(10), answer).await;
    serving.abort();
    answered.context("no answer")?
}

/// A cluster whose certificates live for seconds, through several of them: a database that writes, a replica that dies and comes back.
fn renewed_under_traffic(bed: &Bed) -> Result<()> {
    mk_empty(bed)?;
    let mut story = Story::begin_on(&whole::mk_options(bed, Some(STORY_LIFE_S))?)?;
    let outcome = tell(&mut story);
    match outcome {
        Ok(()) => story.end(),
        Err(error) => {
            story.cluster.end(Logs::Keep)?;
            Err(error)
        }
    }
}

fn tell(story: &mut Story) -> Result<()> {
    story.provision()?;
    story.run_pods()?;
    // New connections, long after the first certificates have ended.
    wait_for_renewals(story, 3, |_| Ok(()))?;
    story.lose_a_replica()?;
    let before = story.generation_and_members("node-a")?;
    wait_for_renewals(story, 6, |story| {
        story.commit_for_a_moment().context("commits while certificates change")
    })?;
    ensure!(story.generation_and_members("node-a")? == before, "something of the volume moved");
    for node in &story.cluster.nodes {
        let log = node.data.log()?;
        ensure!(!log.contains("could not be looked after"), "{}: a renewal failed:\n{log}", node.name);
    }
    story.compare("after several certificates").map(drop)
}

fn wait_for_renewals(
    story: &mut Story,
    count: usize,
    mut meanwhile: impl FnMut(&mut Story) -> Result<()>,
) -> Result<()> {
    let within = RENEWED_WITHIN * u32::try_from(count)?;
    let begun = Instant::now();
    loop {
        let mut least = usize::MAX;
        for node in &story.cluster.nodes {
            least = least.min(node.data.log()?.matches("the certificate is renewed").count());
        }
        if least >= count {
            return Ok(());
        }
        ensure!(begun.elapsed() < within, "{least} renewals of {count}");
        meanwhile(story)?;
        std::thread::sleep(Duration::from_millis(500));
    }
}
