//! The agent's object sources: one suite for both, and what only an API server can do.

mod api;
mod side;
mod suite;
mod view;

use anyhow::Result;
use libtest_mimic::Trial;

use crate::bed::Bed;
use crate::trial;
use side::{FolderSide, KubernetesSide, Side};

pub use side::{install_pod_ranges, put, remove};
pub use view::View;

/// A situation of the suite.
type Situation = fn(&Bed, &mut dyn Side) -> Result<()>;

pub fn trials() -> Vec<Trial> {
    let mut trials = Vec::new();
    for (name, situation) in suite::SITUATIONS {
        trials.push(on("folder", name, situation, |_, prefix| Ok(Box::new(FolderSide::new(prefix)?))));
        trials
            .push(on("api", name, situation, |bed, prefix| Ok(Box::new(KubernetesSide::new(bed, prefix)?))));
    }
    trials.extend(api::trials());
    trials
}

fn on(side: &str, name: &str, situation: Situation, make: fn(&Bed, &str) -> Result<Box<dyn Side>>) -> Trial {
    let prefix = prefix_of(name);
    trial(&format!("objects::{side}::{name}"), move |bed| {
        let mut side = make(bed, &prefix)?;
        situation(bed, side.as_mut())
    })
}

/// Names of objects that begin so are the trial's.
fn prefix_of(name: &str) -> String {
    let letters: String = name.chars().filter(char::is_ascii_lowercase).take(12).collect();
    format!("{letters}-{:04x}", rand::random::<u16>())
}
