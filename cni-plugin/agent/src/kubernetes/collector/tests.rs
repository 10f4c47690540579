use serde_json::json;

use super::*;
use crate::objects::{NETWORK_POLICY, NODE, POD, key_of_kind, parse_of_kind};

struct Bench {
    collector: Collector,
    receiver: mpsc::Receiver<Batch>,
}

impl Bench {
    fn new() -> Self {
        let (sender, receiver) = mpsc::channel(1000);
        Self { collector: Collector::new(sender), receiver }
    }

    /// With every kind listed, and pods of these names.
    async fn listed(pods: &[&str]) -> Self {
        let mut bench = Self::new();
        for kind in &KINDS {
            bench.list(kind.name, if kind.name == POD { pods } else { &[] }).await;
        }
        bench.pass().await;
        bench
    }

    async fn tell(&mut self, kind: &str, event: Event) {
        let index = KINDS.iter().position(|known| known.name == kind).unwrap();
        assert!(self.collector.take(index, event).await.is_ok());
    }

    async fn list(&mut self, kind: &str, names: &[&str]) {
        self.tell(kind, Event::Began).await;
        for name in names {
            self.tell(kind, Event::Is(named(kind, name))).await;
        }
        self.tell(kind, Event::Ended).await;
    }

    /// What was passed on: the names, with a minus where the object is gone; and the last batch's state.
    async fn pass(&mut self) -> (Vec<String>, Option<Batch>) {
        assert!(self.collector.pass_on_all().await.is_ok());
        let (mut names, mut last) = (Vec::new(), None);
        while let Ok(batch) = self.receiver.try_recv() {
            names.extend(batch.changes.iter().map(|change| match change {
                ObjectChange::Pod(name, pod) => signed(&name.name, pod.is_some()),
                ObjectChange::Policy(name, policy) => signed(&name.name, policy.is_some()),
                ObjectChange::Node(name, node) => signed(name, node.is_some()),
                other => panic!("{other:?}"),
            }));
            last = Some(batch);
        }
        names.sort();
        (names, last)
    }
}

fn signed(name: &str, is_there: bool) -> String {
    format!("{}{name}", if is_there { "" } else { "-" })
}

fn kind_of(kind: &str) -> &'static str {
    KINDS.iter().find(|known| known.name == kind).unwrap().name
}

fn named(kind: &str, name: &str) -> Document {
    let text = json!({"metadata": {"name": name, "namespace": "x"}}).to_string();
    parse_of_kind(kind_of(kind), &text)
}

fn key(kind: &str, name: &str) -> ObjectKey {
    key_of_kind(kind_of(kind), &json!({"metadata": {"name": name, "namespace": "x"}}).to_string()).unwrap()
}

/// Endports need a number.
fn invalid(name: &str) -> Document {
    let text = json!({
        "metadata": {"name": name, "namespace": "x"},
        "spec": {"podSelector": {}, "ingress": [{"ports": [{"port": "http", "endPort": 90}]}]},
    });
    parse_of_kind(NETWORK_POLICY, &text.to_string())
}

#[tokio::test]
async fn nothing_is_whole_before_every_kind_is() {
    let mut bench = Bench::new();
    for kind in KINDS.iter().skip(1) {
        bench.list(kind.name, &[]).await;
    }
    assert!(bench.pass().await.1.is_none());
    bench.tell(NODE, Event::Began).await;
    bench.tell(NODE, Event::Is(named(NODE, "a"))).await;
    let (names, batch) = bench.pass().await;
    let batch = batch.unwrap();
    assert_eq!((names, batch.complete, batch.readable), (vec!["a".to_owned()], false, false));
    bench.tell(NODE, Event::Away("refused".to_owned())).await;
    let batch = bench.pass().await.1.unwrap();
    assert!(!batch.complete && batch.problems[0].contains("cannot read Node: refused"), "{batch:?}");
    bench.list(NODE, &["a"]).await;
    let batch = bench.pass().await.1.unwrap();
    assert!(batch.complete && batch.readable && batch.problems.is_empty(), "{batch:?}");
}

#[tokio::test]
async fn what_a_later_list_does_not_name_is_gone_once_it_is_whole() {
    let mut bench = Bench::listed(&["a", "b", "c"]).await;
    bench.tell(POD, Event::Away("expired".to_owned())).await;
    bench.tell(POD, Event::Began).await;
    bench.tell(POD, Event::Is(named(POD, "b"))).await;
    let (names, batch) = bench.pass().await;
    let batch = batch.unwrap();
    assert_eq!((names, batch.complete, batch.readable), (vec!["b".to_owned()], true, false));
    // Cut off, and begun anew after "d" was made and "c" is gone.
    bench.tell(POD, Event::Away("cut".to_owned())).await;
    bench.list(POD, &["a", "d"]).await;
    let (names, batch) = bench.pass().await;
    assert_eq!(names, ["-b", "-c", "a", "d"]);
    assert!(batch.unwrap().readable);
    bench.tell(POD, Event::Gone(key(POD, "a"))).await;
    bench.tell(POD, Event::Gone(key(POD, "b"))).await;
    assert_eq!(bench.pass().await.0, ["-a"], "b was gone already");
    bench.list(POD, &[]).await;
    assert_eq!(bench.pass().await.0, ["-d"]);
}

#[tokio::test]
async fn while_a_kind_is_away_or_a_trial_fails_nothing_counts_as_read() {
    let mut bench = Bench::listed(&["a"]).await;
    bench.tell(POD, Event::Away("refused".to_owned())).await;
    let (names, batch) = bench.pass().await;
    assert!(names.is_empty() && !batch.unwrap().readable);
    bench.tell(POD, Event::Follows).await;
    assert!(bench.pass().await.1.unwrap().readable);
    bench.collector.take_trial(Some("silent".to_owned()));
    let batch = bench.pass().await.1.unwrap();
    assert!(!batch.readable && batch.complete && batch.problems == ["silent"], "{batch:?}");
    bench.collector.take_trial(None);
    assert!(bench.pass().await.1.unwrap().readable);
    assert!(bench.pass().await.1.is_none(), "no news");
}

#[tokio::test]
async fn a_wrong_object_keeps_its_last_good_state_and_is_forgotten_with_its_end() {
    let mut bench = Bench::listed(&[]).await;
    bench.tell(NETWORK_POLICY, Event::Is(named(NETWORK_POLICY, "good"))).await;
    bench.tell(NETWORK_POLICY, Event::Is(invalid("good"))).await;
    bench.tell(NETWORK_POLICY, Event::Is(invalid("never"))).await;
    let (names, batch) = bench.pass().await;
    let batch = batch.unwrap();
    assert_eq!(names, ["good"]);
    assert!(batch.problems[0].contains("x/good is invalid") && batch.problems[0].contains("last good state"));
    assert!(batch.problems[1].contains("x/never is invalid") && batch.problems[1].contains("ignored"));
    assert_eq!(batch.refused.len(), 2);
    // Listed anew, one is still as wrong, the other one is gone.
    bench.tell(NETWORK_POLICY, Event::Began).await;
    bench.tell(NETWORK_POLICY, Event::Is(invalid("good"))).await;
    bench.tell(NETWORK_POLICY, Event::Ended).await;
    let (names, batch) = bench.pass().await;
    assert_eq!((names.len(), batch.unwrap().refused.len()), (0, 1));
    bench.tell(NETWORK_POLICY, Event::Gone(key(NETWORK_POLICY, "good"))).await;
    let (names, batch) = bench.pass().await;
    assert_eq!((names, batch.unwrap().problems.len()), (vec!["-good".to_owned()], 0));
}

#[tokio::test]
async fn the_end_of_a_definition_is_the_end_of_its_objects() {
    let mut bench = Bench::listed(&["a"]).await;
    bench.tell(POD, Event::Absent).await;
    assert_eq!(bench.pass().await.0, ["-a"]);
    bench.tell(POD, Event::Absent).await;
    assert!(bench.pass().await.1.is_none(), "still absent is no news");
}

#[tokio::test]
async fn many_changes_go_in_parts_each_as_good_as_a_whole() {
    let mut bench = Bench::listed(&[]).await;
    let names: Vec<String> = (0..=2 * CHANGES_MAX).map(|number| format!("p{number}")).collect();
    let names: Vec<&str> = names.iter().map(String::as_str).collect();
    bench.list(POD, &names).await;
    assert!(bench.collector.pass_on_all().await.is_ok());
    let parts: Vec<(usize, bool)> = std::iter::from_fn(|| bench.receiver.try_recv().ok())
        .map(|b| (b.changes.len(), b.complete))
        .collect();
    assert_eq!(parts, [(CHANGES_MAX, true), (CHANGES_MAX, true), (1, true)]);
}
