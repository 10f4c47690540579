//! Tier `policy`: the policy tables of others' lists, as our own cases, on real pods of real agents, and random policies
//! against an oracle; every verdict is a packet that arrives or does not.
//!
//! One test bed serves all trials, one after another; a second one, in mode `routed`, a share of them after that. The lists that the cases follow: Kubernetes' end-to-end list for
//! NetworkPolicy (48), policy-assistant's generator (230), the conformance list of the network-policy-api (92).

mod bed;
mod bites;
mod cases;
mod cluster_policies;
mod cluster_policy;
mod connects;
mod e2e;
mod generated;
mod hygiene;
mod no_gap;
mod oracle;
mod packets;
mod prober;
mod random;
mod revocation;
mod services;
mod torture;
mod world;

use std::process::ExitCode;
use std::sync::{Arc, Mutex, PoisonError};

use anyhow::Result;
use holdfast_tests::{cleanup, helper};
use libtest_mimic::{Arguments, Trial};

use crate::bed::Bed;

/// What a trial does on the bed.
type Body = fn(&mut Bed) -> Result<()>;
/// The bed, once a trial has started it, with how its pods are attached.
type Shared = Arc<Mutex<Option<(&'static str, Bed)>>>;
/// What both modes must do. Policy is compiled alike and its rules are the same, so the long lists run once.
const IN_BOTH_MODES: [(&str, Body); 7] = [
    ("a_table_without_policies_is_open", bites::everything_is_open),
    ("rules_that_are_gone_are_a_mismatch", bites::rules_are_gone),
    ("the_48_situations_of_kubernetes_e2e_list", e2e::run),
    ("a_connection_through_a_service_is_judged_by_its_real_ends", services::run),
    ("a_pod_that_starts_sends_and_gets_nothing_that_is_forbidden", no_gap::run),
    ("a_connection_that_a_change_forbids_stops_and_another_loses_nothing", revocation::run),
    ("conntrack_entries_that_a_change_forbids_are_deleted_and_no_others", hygiene::run),
];

fn main() -> ExitCode {
    if let Some(code) = helper::run_if_asked() {
        return code;
    }
    let mut arguments = Arguments::from_args();
    arguments.test_threads = Some(1);
    if let Err(error) = cleanup::end_when_interrupted() {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    let shared = Shared::default();
    let mut trials = vec![
        trial(&shared, "a_table_without_policies_is_open", bites::everything_is_open),
        trial(&shared, "a_policy_that_an_agent_does_not_know_is_a_mismatch", bites::a_policy_left_out),
        trial(&shared, "rules_that_are_gone_are_a_mismatch", bites::rules_are_gone),
        trial(&shared, "packets_that_are_lost_are_no_denies", bites::lost_packets),
        trial(&shared, "the_48_situations_of_kubernetes_e2e_list", e2e::run),
        trial(&shared, "the_230_situations_of_policy_assistant", generated::run),
        trial(&shared, "the_92_situations_of_the_network_policy_api", cluster_policies::run),
        trial(&shared, "unknown_peers_fail_closed", cluster_policies::run_beyond),
        trial(&shared, "a_connection_through_a_service_is_judged_by_its_real_ends", services::run),
        trial(&shared, "a_pod_that_starts_sends_and_gets_nothing_that_is_forbidden", no_gap::run),
        trial(&shared, "a_connection_that_a_change_forbids_stops_and_another_loses_nothing", revocation::run),
        trial(
            &shared,
            "a_connection_through_a_service_that_a_change_forbids_stops_and_another_loses_nothing",
            revocation::run_through_service,
        ),
        trial(&shared, "conntrack_entries_that_a_change_forbids_are_deleted_and_no_others", hygiene::run),
        trial(&shared, "random_policies_are_enforced_as_the_oracle_says", random::run),
    ];
    let routed = |(name, body): &(&str, Body)| trial_in(&shared, "routed", &format!("routed::{name}"), *body);
    trials.extend(IN_BOTH_MODES.iter().map(routed));
    // On nodes of its own, and before the shared bed: an interrupt ends the bed that started last.
    trials.insert(
        0,
        Trial::test("a_network_of_three_nodes_survives_kills_cuts_tampering_and_churn", || {
            torture::run().map_err(|error| format!("{error:#}").into())
        }),
    );
    let conclusion = libtest_mimic::run(&arguments, trials);
    let bed = shared.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(Err(error)) = bed.map(|(_, bed)| bed.end(conclusion.has_failed())) {
        eprintln!("the test bed: {error:#}");
        return ExitCode::FAILURE;
    }
    conclusion.exit_code()
}

/// A trial with pods on bridges.
fn trial(shared: &Shared, name: &str, body: Body) -> Trial {
    trial_in(shared, "bridge", name, body)
}

/// A trial on the bed, which the first one starts. It fails with the whole chain of causes.
fn trial_in(shared: &Shared, attachment: &'static str, name: &str, body: Body) -> Trial {
    let shared = shared.clone();
    Trial::test(name, move || {
        let mut bed = shared.lock().unwrap_or_else(PoisonError::into_inner);
        let outcome = with_bed(&mut bed, attachment, body);
        outcome.map_err(|error| format!("{error:#}").into())
    })
}

fn with_bed(bed: &mut Option<(&'static str, Bed)>, attachment: &'static str, body: Body) -> Result<()> {
    if let Some((_, other)) = bed.take_if(|(of, _)| *of != attachment) {
        other.end(false)?;
    }
    let (_, bed) = match bed {
        Some(bed) => bed,
        None => bed.insert((attachment, Bed::start(attachment)?)),
    };
    body(bed)?;
    // What came too late for its own table.
    let late: Vec<String> = bed.prober.take_late().iter().map(ToString::to_string).collect();
    anyhow::ensure!(late.is_empty(), "too late: {}", late.join("; "));
    Ok(())
}
