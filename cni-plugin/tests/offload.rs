//! Checksum offload of the VXLAN device, as an operator sets it. On the real binaries and a real kernel. Needs root.

// Helpers of a test may panic like the test itself.
#![allow(clippy::unwrap_used)]

mod support;

use holdfast_dataplane::{checksum_offload, hold_checksum_offload};
use support::{Cluster, Netns, address_of, eventually};

/// Whether the VXLAN device leaves checksums to the hardware; with `set`, makes it so first.
fn offload(netns: &Netns, set: Option<bool>) -> bool {
    std::thread::scope(|scope| {
        let entered = scope.spawn(|| {
            let file = std::fs::File::open(netns.path()).unwrap();
            nix::sched::setns(file, nix::sched::CloneFlags::CLONE_NEWNET).unwrap();
            if let Some(wanted) = set {
                hold_checksum_offload("hf.vx", wanted).unwrap();
            }
            checksum_offload("hf.vx").unwrap()
        });
        entered.join().unwrap()
    })
}

#[test]
fn checksum_offload_is_turned_off_and_kept_off_and_traffic_passes() {
    let cluster = Cluster::new();
    cluster.put_node("a", 1, "10.42.1.0/24");
    cluster.put_node("b", 2, "10.42.2.0/24");
    for pod in ["one", "far"] {
        cluster.put_pod(pod, "");
    }
    let off: &[&str] = &["--address-quarantine-s=0", "--collect-after-s=0", "--vxlan-checksum-offload=off"];
    let a = cluster.start_node_with("a", 1, off);
    let b = cluster.start_node("b", 2);
    let pods = [Netns::new(), Netns::new()];
    a.add("one", &pods[0]).unwrap();
    let far = address_of(&b.add("far", &pods[1]).unwrap());
    assert_eq!(
        (offload(&a.netns, None), offload(&b.netns, None)),
        (false, true),
        "`auto` leaves this kernel's alone"
    );
    assert!(pods[0].pings(&far));
    offload(&a.netns, Some(true));
    eventually("it is off again", || !offload(&a.netns, None));
    a.netns.ip("link del hf.vx");
    eventually("a new device has it off", || {
        a.netns.exec("ip").args(["link", "show", "hf.vx"]).output().unwrap().status.success()
            && !offload(&a.netns, None)
    });
    // An administrator's own setting is left alone by `auto`.
    offload(&b.netns, Some(false));
    std::thread::sleep(std::time::Duration::from_secs(1));
    assert!(!offload(&b.netns, None));
    assert!(pods[0].pings(&far));
}
