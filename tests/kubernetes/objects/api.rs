//! What only an API server does: it forgets versions, cuts watches, starts again, and knows kinds only once they are defined.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use libtest_mimic::Trial;
use rand::Rng;
use serde_json::{Value, json};

use super::prefix_of;
use super::side::{KubernetesSide, Side, cluster_policies, install_definition, remove};
use super::suite::{cluster_policy, namespace, pod};
use super::view::View;
use crate::bed::Bed;
use crate::trial;

pub fn trials() -> Vec<Trial> {
    vec![
        trial("objects::api::an_outage_beyond_the_servers_history_is_made_up_for", beyond_history),
        trial("objects::api::a_server_that_starts_again_takes_nothing_away", server_starts_again),
        trial("objects::api::watches_cut_anywhere_leave_nothing_out", cut_anywhere),
        trial("objects::api::a_cut_watch_goes_on_without_a_new_list", cut_without_list),
        trial("objects::api::a_server_that_hangs_is_noticed", a_server_that_hangs),
        trial("objects::api::a_kind_that_is_not_defined_yet_is_found_later", defined_later),
    ]
}

fn beyond_history(bed: &Bed) -> Result<()> {
    let mut side = KubernetesSide::new(bed, &prefix_of("beyond"))?;
    let p = side.prefix().to_owned();
    side.put(bed, &namespace(&p))?;
    for name in ["a", "b", "c"] {
        side.put(bed, &pod(&p, name))?;
    }
    let mut view = View::open(bed, &side.source(), &p)?;
    view.until(bed, "complete", |view| view.complete && view.readable)?;
    side.begin_outage()?;
    view.until(bed, "the outage is noticed", |view| !view.readable)?;
    side.remove(bed, &pod(&p, "a"))?;
    side.put(bed, &pod(&p, "d"))?;
    // Neither etcd nor the server's cache knows what was before.
    compact(bed)?;
    {
        let mut server = bed.server();
        server.kill()?;
        server.start_again()?;
    }
    side.end_outage()?;
    view.until(bed, "what happened meanwhile", |view| {
        view.readable
            && view.get("Pod", &format!("{p}/a")).is_none()
            && view.get("Pod", &format!("{p}/d")).is_some()
    })?;
    let forgotten = |problem: &String| problem.contains("has forgotten");
    ensure!(view.all_problems.iter().any(forgotten), "no version was too old: {:?}", view.all_problems);
    ensure!(view.gone == [format!("Pod {p}/a")], "{}", view.state());
    end(bed, &side, &["b", "c", "d"])
}

/// It knows no defined kind in its first moments, and says the same of them as if there were none.
fn server_starts_again(bed: &Bed) -> Result<()> {
    const STARTS: u32 = 3;
    let side = KubernetesSide::new(bed, &prefix_of("again"))?;
    let p = side.prefix().to_owned();
    side.put(bed, &namespace(&p))?;
    side.put(bed, &pod(&p, "a"))?;
    side.put(bed, &cluster_policy(&p))?;
    let mut view = View::open(bed, &side.source(), &p)?;
    view.until(bed, "complete", |view| view.complete && view.readable)?;
    for _ in 0..STARTS {
        {
            let mut server = bed.server();
            server.kill()?;
            server.start_again()?;
        }
        view.until(bed, "it reads again", |view| view.readable)?;
    }
    side.put(bed, &pod(&p, "b"))?;
    view.until(bed, "a change", |view| view.get("Pod", &format!("{p}/b")).is_some())?;
    ensure!(view.gone.is_empty(), "{}", view.state());
    side.remove(bed, &cluster_policy(&p))?;
    view.until(bed, "a removal", |view| view.get("ClusterNetworkPolicy", &format!("{p}-policy")).is_none())?;
    end(bed, &side, &["a", "b"])
}

fn cut_anywhere(bed: &Bed) -> Result<()> {
    const CHANGES: u32 = 150;
    let seed = holdfast_tests::effort::seed()?;
    let mut random = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(seed);
    let side = KubernetesSide::new(bed, &prefix_of("cut"))?;
    let p = side.prefix().to_owned();
    side.put(bed, &namespace(&p))?;
    // Not below what a handshake takes, else nothing ever comes through.
    side.relay.cut_after(40_000);
    let mut view = View::open(bed, &side.source(), &p)?;
    view.until(bed, "complete", |view| view.complete)?;
    let mut expected = std::collections::BTreeMap::new();
    for number in 0..CHANGES {
        side.relay.cut_after(random.random_range(6_000..40_000));
        if random.random_bool(0.2) {
            side.relay.cut();
        }
        let name = format!("pod-{}", random.random_range(0..20));
        if expected.contains_key(&name) && random.random_bool(0.3) {
            side.remove(bed, &pod(&p, &name))?;
            expected.remove(&name);
        } else {
            let mut object = pod(&p, &name);
            object["metadata"]["labels"]["number"] = json!(number.to_string());
            side.put(bed, &object)?;
            expected.insert(name, number.to_string());
        }
    }
    let cuts = side.relay.connections();
    side.relay.cut_after(u64::MAX);
    side.relay.cut();
    view.until(bed, "all changes", |view| {
        let pods = view.objects.iter().filter_map(|(key, object)| {
            let name = key.strip_prefix("Pod ")?.split_once('/')?.1;
            Some((name.to_owned(), object["metadata"]["labels"]["number"].as_str()?.to_owned()))
        });
        pods.collect::<std::collections::BTreeMap<_, _>>() == expected
    })
    .with_context(|| format!("expected {expected:?}"))?;
    println!("{CHANGES} changes over {cuts} connections");
    ensure!(cuts > 20, "only {cuts} connections: hardly anything was cut");
    end(bed, &side, &expected.keys().map(String::as_str).collect::<Vec<_>>())
}

fn cut_without_list(bed: &Bed) -> Result<()> {
    const CUTS: usize = 5;
    let side = KubernetesSide::new(bed, &prefix_of("resumes"))?;
    let p = side.prefix().to_owned();
    side.put(bed, &namespace(&p))?;
    let mut view = View::open(bed, &side.source(), &p)?;
    view.until(bed, "complete", |view| view.complete)?;
    let before = lists_of_pods(bed)?;
    for number in 0..CUTS {
        let name = format!("pod-{number}");
        side.relay.cut();
        side.put(bed, &pod(&p, &name))?;
        view.until(bed, "a pod", |view| view.get("Pod", &format!("{p}/{name}")).is_some())?;
    }
    ensure!(lists_of_pods(bed)? == before, "pods were listed again");
    let names: Vec<String> = (0..CUTS).map(|number| format!("pod-{number}")).collect();
    end(bed, &side, &names.iter().map(String::as_str).collect::<Vec<_>>())
}

/// Connections stay open and nothing comes: as if nothing happened.
fn a_server_that_hangs(bed: &Bed) -> Result<()> {
    let side = KubernetesSide::new(bed, &prefix_of("hangs"))?;
    let p = side.prefix().to_owned();
    let mut view = View::open(bed, &side.source(), &p)?;
    view.until(bed, "complete", |view| view.complete && view.readable)?;
    bed.server().pause()?;
    let begun = Instant::now();
    let noticed = view.until(bed, "it is noticed", |view| !view.readable);
    bed.server().resume()?;
    noticed?;
    // Freed addresses are held back for 30 s, which count only while objects can be read.
    ensure!(begun.elapsed() < Duration::from_secs(20), "after {:?}", begun.elapsed());
    view.until(bed, "it answers again", |view| view.readable)?;
    ensure!(view.gone.is_empty(), "{}", view.state());
    Ok(())
}

fn defined_later(bed: &Bed) -> Result<()> {
    let definition = cluster_policies();
    let kube = bed.kube()?;
    // Other trials may have installed it.
    install_definition(bed, &definition)?;
    bed.run(async { remove(&kube, &definition).await })?;
    let side = KubernetesSide::without_definitions(bed, &prefix_of("later"))?;
    let p = side.prefix().to_owned();
    let mut view = View::open(bed, &side.source(), &p)?;
    view.until(bed, "complete without the kind", |view| view.complete && view.readable)?;
    install_definition(bed, &definition)?;
    side.put(bed, &cluster_policy(&p))?;
    let name = format!("{p}-policy");
    view.until(bed, "it is found", |view| view.get("ClusterNetworkPolicy", &name).is_some())?;
    bed.run(async { remove(&kube, &definition).await })?;
    view.until(bed, "its end", |view| view.objects.is_empty() && view.readable)
}

fn end(bed: &Bed, side: &KubernetesSide, pods: &[&str]) -> Result<()> {
    for name in pods {
        side.remove(bed, &pod(side.prefix(), name))?;
    }
    side.remove(bed, &namespace(side.prefix()))
}

/// How many lists of all pods the server was asked for.
fn lists_of_pods(bed: &Bed) -> Result<u64> {
    let kube = bed.kube()?;
    let text =
        bed.run(async { Ok(kube.request_text(http::Request::get("/metrics").body(Vec::new())?).await?) })?;
    let is_it = |line: &&str| {
        line.starts_with("apiserver_request_total{")
            && ["resource=\"pods\"", "verb=\"LIST\"", "scope=\"cluster\""]
                .iter()
                .all(|part| line.contains(part))
    };
    let counts = text.lines().filter(is_it).filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
    Ok(counts.sum::<f64>() as u64)
}

/// Has etcd forget all but what is now (its JSON gateway).
fn compact(bed: &Bed) -> Result<()> {
    let etcd = SocketAddr::new(bed.server().socket().ip(), 2379);
    let status = post(etcd, "/v3/maintenance/status", &json!({}))?;
    let revision = status["header"]["revision"].as_str().context("a revision")?.to_owned();
    post(etcd, "/v3/kv/compaction", &json!({"revision": revision, "physical": true})).map(drop)
}

fn post(server: SocketAddr, path: &str, body: &Value) -> Result<Value> {
    let mut stream = TcpStream::connect(server)?;
    let body = body.to_string();
    write!(
        stream,
        "POST {path} HTTP/1.0\r\nHost: etcd\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    )?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    let (head, body) = text.split_once("\r\n\r\n").context("no answer")?;
    ensure!(head.contains(" 200 "), "{text}");
    Ok(serde_json::from_str(body)?)
}
