//! Three data processes in one, for measuring and profiling: makes a volume, attaches it, prints the NBD socket of its
//! target and waits for the end of its input.
//!
//! `local_cluster DIR [SIZE_MIB]`, then for example `fio --ioengine=nbd --uri=nbd+unix:///?socket=PRINTED ...`.
#![allow(clippy::unwrap_used, missing_docs)]

#[path = "../tests/common/mod.rs"]
mod common;

use std::io::Read;

#[tokio::main(flavor = "current_thread")]
async fn main() {
    let mut args = std::env::args().skip(1);
    let dir = args.next().expect("a folder");
    let size_mib: u64 = args.next().map_or(1024, |text| text.parse().expect("MiB"));
    let nodes: usize = args.next().map_or(3, |text| text.parse().expect("nodes"));
    let tls = args.next().is_some_and(|text| text == "tls");
    let sockets = std::path::PathBuf::from(&dir).join("sockets");
    std::fs::create_dir_all(&sockets).unwrap();
    let cluster =
        common::Cluster::start_in(tempfile::tempdir_in(&dir).unwrap(), nodes, tls, Some(sockets)).await;
    let volume = cluster.create_volume(size_mib << 20).await;
    cluster.attach(volume, 0).await;
    println!("{dir}/sockets/node-a/{volume}.sock");
    let mut rest = Vec::new();
    std::io::stdin().read_to_end(&mut rest).unwrap();
    if let Some(status) = cluster.process(0).status(volume) {
        eprintln!("{status:#?}");
    }
    cluster.assert_members_equal(volume).await;
}
