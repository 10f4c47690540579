//! A thousand other nodes that appear at once.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::nodes::Ours;
use crate::figures::Figure;
use crate::node::shell;

const NODES: usize = 1000;
/// From one machine's goal.
const LIMIT_S: f64 = 1.0;
const WAIT_MAX: Duration = Duration::from_secs(30);

/// From the objects' file, which is renamed into place, until an agent has a route to the last of them.
pub fn measure(ours: &Ours, tell: &dyn Fn(&str)) -> Result<Figure> {
    tell(&format!("telling both agents of {NODES} more nodes"));
    let list =
        json!({ "apiVersion": "v1", "kind": "List", "items": (0..NODES).map(object).collect::<Vec<_>>() });
    let count = || -> Result<usize> {
        let text = shell(&ours.nodes[0], "ip -4 route show dev hf.vx proto 72 | wc -l")?;
        Ok(text.trim().parse()?)
    };
    let before = count()?;
    ours.objects.put("many-nodes", &list)?;
    let since = Instant::now();
    while count()? < before + NODES {
        ensure!(since.elapsed() < WAIT_MAX, "after {WAIT_MAX:?} there are {} routes", count()?);
        std::thread::sleep(Duration::from_millis(5));
    }
    let took = since.elapsed().as_secs_f64();
    Ok(Figure::within("overlay.program_1000_nodes_s", "s", took, LIMIT_S))
}

fn object(number: usize) -> Value {
    let (high, low) = (number / 250, number % 250 + 1);
    let range = format!("100.{}.{low}.0/24", 64 + high);
    json!({
        "apiVersion": "v1", "kind": "Node", "metadata": { "name": format!("far-{number}") },
        "spec": { "podCIDR": range, "podCIDRs": [range] },
        "status": { "addresses": [{ "type": "InternalIP", "address": format!("10.250.{high}.{low}") }] },
    })
}
