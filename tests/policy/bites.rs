//! The bed must bite: each trial here breaks something on purpose and wants the prober to say so, exactly.

use anyhow::{Context, Result, ensure};

use crate::bed::Bed;
use crate::prober::Mismatch;
use crate::world::{PodName, World};

const NO_INGRESS: &str = "{podSelector: {}, policyTypes: [Ingress]}";
/// Probes from one pod to another: protocols, ports and families.
const PROBES_OF_A_PAIR: usize = 12;
/// Packets that the lossy rule drops.
const LOST_PACKETS: u32 = 20;

fn with_policy(bed: &Bed) -> Result<World> {
    let mut world = bed.base();
    world.put_policy(&PodName::new("x/none"), NO_INGRESS)?;
    Ok(world)
}

/// Without policies every pod reaches every pod and node.
pub fn everything_is_open(bed: &mut Bed) -> Result<()> {
    let world = bed.base();
    bed.show(&world)?;
    let before = bed.prober.packets;
    let mismatches = bed.compare("no policies", &world)?;
    ensure!(mismatches.is_empty(), "{}", first(&mismatches));
    let pairs = 9 * (8 + 2);
    ensure!(bed.prober.packets - before >= pairs * PROBES_OF_A_PAIR as u64, "not all pairs were tried");
    Ok(())
}

/// What passes and should not, and what is dropped and should not be, is named packet by packet.
pub fn a_policy_left_out(bed: &mut Bed) -> Result<()> {
    let (without, with) = (bed.base(), with_policy(bed)?);
    // Three pods of x, each from eight others.
    let denied = 3 * 8 * PROBES_OF_A_PAIR;

    bed.show(&without)?;
    let passed = bed.compare("policy left out", &with)?;
    ensure!(passed.len() == denied, "{} mismatches instead of {denied}", passed.len());
    ensure!(passed.iter().all(|mismatch| !mismatch.expected && mismatch.what.contains("> x/")));

    bed.show(&with)?;
    let dropped = bed.compare("policy too many", &without)?;
    ensure!(dropped.len() == denied, "{} mismatches instead of {denied}", dropped.len());
    ensure!(dropped.iter().all(|mismatch| mismatch.expected && mismatch.what.contains("> x/")));
    Ok(())
}

/// A node without our table lets everything through, and only that node's pods are named. Its agent is not there to mend
/// it; started again, it does.
pub fn rules_are_gone(bed: &mut Bed) -> Result<()> {
    let world = with_policy(bed)?;
    bed.show(&world)?;
    let whole = bed.compare("rules are there", &world)?;
    ensure!(whole.is_empty(), "{}", first(&whole));

    let node = &mut bed.net().nodes[1];
    node.netd.kill()?;
    node.spaces.run("nft", &["delete", "table", "inet", "holdfast"])?;
    let gone = bed.compare("rules are gone", &world);
    let node = &mut bed.net().nodes[1];
    node.netd.start_again()?;
    node.wait()?;

    let gone = gone?;
    // Of x, only pod b is on that node.
    ensure!(gone.len() == 8 * PROBES_OF_A_PAIR, "{} mismatches", gone.len());
    ensure!(gone.iter().all(|mismatch| !mismatch.expected && mismatch.what.contains("> x/b:")));
    bed.show(&world)?;
    let mended = bed.compare("rules are back", &world)?;
    ensure!(mended.is_empty(), "{}", first(&mended));
    Ok(())
}

/// Packets that get lost on the way make the prober try again, and are taken for a deny only if that never helps.
pub fn lost_packets(bed: &mut Bed) -> Result<()> {
    let world = with_policy(bed)?;
    bed.show(&world)?;
    let repeated = bed.prober.repeated;
    let rules = format!(
        "table inet lossy {{ chain forward {{ type filter hook forward priority -10; \
         limit rate 1/hour burst {LOST_PACKETS} packets counter drop; }}; }}"
    );
    bed.net().nodes[0].spaces.run("nft", &[&rules])?;
    let lossy = bed.compare("some packets are lost", &world);
    let listed = bed.net().nodes[0].spaces.run("nft", &["list", "table", "inet", "lossy"])?;
    bed.net().nodes[0].spaces.run("nft", &["delete", "table", "inet", "lossy"])?;

    let lossy = lossy?;
    ensure!(lossy.is_empty(), "{}", first(&lossy));
    ensure!(listed.contains(&format!("packets {LOST_PACKETS} ")), "not all were lost: {listed}");
    ensure!(bed.prober.repeated > repeated, "nothing was sent again");

    bed.net().nodes[0].spaces.run(
        "nft",
        &["table inet lossy { chain forward { type filter hook forward priority -10; drop; }; }"],
    )?;
    let cut = bed.compare("all packets are lost", &world);
    bed.net().nodes[0].spaces.run("nft", &["delete", "table", "inet", "lossy"])?;
    let cut = cut?;
    ensure!(cut.iter().any(|mismatch| mismatch.expected), "a node that forwards nothing looks as it should");
    Ok(())
}

fn first(mismatches: &[Mismatch]) -> String {
    let first = mismatches.first().context("there is none").map(ToString::to_string);
    format!("{} mismatches: {}", mismatches.len(), first.unwrap_or_default())
}
