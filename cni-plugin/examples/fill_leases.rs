//! Fills a lease store as that many pods would: `fill_leases FOLDER COUNT RANGE`. For the test and the bench of many leases.
//!
//! A bridge takes 1,024 ports, so they cannot all be attached: what is tried is the store, the free space, the model and the rules,
//! not the bridge.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use holdfast_agent::{AttachmentKey, Lease, Leases, Wanted};
use holdfast_net_core::plan::{Attachment, BridgePlan};
use ipnetwork::IpNetwork;

// The test that includes this file has a main function of its own.
#[allow(dead_code)]
fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [folder, count, range] = &arguments[..] else {
        anyhow::bail!("usage: fill_leases FOLDER COUNT RANGE");
    };
    fill(Path::new(folder), count.parse()?, range.parse()?)
}

/// Leases `count` addresses of `range` to containers called `old-N`.
///
/// # Errors
/// The store cannot be written, or the range is used up.
pub fn fill(folder: &Path, count: usize, range: IpNetwork) -> anyhow::Result<()> {
    std::fs::create_dir_all(folder)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let leases = Arc::new(Leases::open(folder, Duration::ZERO)?);
        leases.set_ranges(&[range]).await;
        let mut all = tokio::task::JoinSet::new();
        for number in 0..count {
            let leases = Arc::clone(&leases);
            all.spawn(async move { lease(&leases, number).await });
        }
        while let Some(leased) = all.join_next().await {
            leased.context("a task ended early")??;
        }
        leases.flush().await?;
        Ok(())
    })
}

async fn lease(leases: &Leases, number: usize) -> anyhow::Result<()> {
    let key = AttachmentKey { container_id: format!("old-{number}"), ifname: "eth0".to_owned() };
    let attachment = Attachment::Bridge(BridgePlan::for_node("b", 1450));
    let wanted = Wanted::default();
    let reserved = leases.reserve(&key, &wanted, |sequence, addresses| Lease {
        key: key.clone(),
        sequence,
        network: "pods".to_owned(),
        netns: "/nonexistent/netns".to_owned(),
        pod: None,
        pod_uid: String::new(),
        attached: false,
        boot_id: String::new(),
        sandbox: None,
        told_mtu: 1450,
        plan: attachment.endpoint(&key.container_id, &key.ifname, addresses),
    });
    let reserved = reserved.await?;
    leases.mark_attached(&key, &reserved.plan).await?;
    Ok(())
}
