//! Who reaches whom: the engine's answer for every pair of pods.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use holdfast_net_core::objects::ObjectName;
use holdfast_net_core::ports::Proto;
use holdfast_proto::agent as pb;

use crate::engine::{EngineHandle, Question};

/// Pods that are asked about at once; n pods are n * n questions.
const PODS_MAX: usize = 200;
/// Longest time the questions may take in all. They are asked one by one, so that others are served in between.
const TIME_MAX: Duration = Duration::from_secs(30);

/// What is asked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MatrixQuestion {
    /// Only pods of this namespace.
    pub namespace: Option<String>,
    pub proto: Proto,
    pub port: u16,
}

/// Answers for all pods that can be subjects: those with an address, attached here or elsewhere.
///
/// # Errors
/// There are too many, or the engine takes too long; the sentence says what to do. Cancellation safe: no question is
/// asked after the caller is gone.
pub(crate) async fn matrix(
    engine: &EngineHandle,
    question: &MatrixQuestion,
) -> Result<pb::MatrixReply, String> {
    let pods = pods(engine, question.namespace.as_deref()).await?;
    if pods.len() > PODS_MAX {
        return Err(format!(
            "these are {} pods; ask about one namespace with at most {PODS_MAX}",
            pods.len()
        ));
    }
    let pods: Vec<String> = pods.iter().map(ToString::to_string).collect();
    let started = Instant::now();
    let mut rows = Vec::with_capacity(pods.len());
    for from in &pods {
        let mut row = pb::MatrixRow { allowed: Vec::with_capacity(pods.len()) };
        for to in &pods {
            if started.elapsed() > TIME_MAX {
                let done = rows.len();
                return Err(format!(
                    "only {done} of {} pods were done within {} s; ask about one namespace",
                    pods.len(),
                    TIME_MAX.as_secs()
                ));
            }
            let (proto, port) = (question.proto, question.port);
            let asked = Question { from: from.clone(), to: to.clone(), proto, port };
            row.allowed.push(engine.explain(asked).await?.is_allowed());
        }
        rows.push(row);
    }
    Ok(pb::MatrixReply { failure: None, pods, rows })
}

async fn pods(engine: &EngineHandle, namespace: Option<&str>) -> Result<BTreeSet<ObjectName>, String> {
    let mut names: BTreeSet<ObjectName> = engine.pods().await?.into_iter().collect();
    names.retain(|name| namespace.is_none_or(|namespace| name.namespace == namespace));
    Ok(names)
}
