//! How long a random test runs, and its seed.

use anyhow::{Context, Result};

/// What CI runs, and what `--long` runs by hand.
pub fn rounds(short: u32, long: u32) -> u32 {
    if std::env::var_os("HOLDFAST_LONG").is_some() { long } else { short }
}

/// `HOLDFAST_SEED`, or a new one; printed with how to run it again.
pub fn seed() -> Result<u64> {
    let seed = match std::env::var("HOLDFAST_SEED") {
        Ok(text) => text.parse().context("HOLDFAST_SEED is no number")?,
        Err(_) => rand::random::<u64>(),
    };
    println!("seed {seed}; to replay: HOLDFAST_SEED={seed}");
    Ok(seed)
}
