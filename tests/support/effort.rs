//! How long a random test runs, and its seed.

use anyhow::{Context, Result};

/// What CI runs, or what `--long` runs by hand.
#[must_use]
pub fn rounds<T>(short: T, long: T) -> T {
    if std::env::var_os("HOLDFAST_LONG").is_some() { long } else { short }
}

/// Whether Kubernetes' own suites are to run: `--suites`, by hand.
#[must_use]
pub fn wants_suites() -> bool {
    std::env::var_os("HOLDFAST_SUITES").is_some()
}

/// `HOLDFAST_SEED`, or a new one; printed with how to run it again.
///
/// # Errors
/// `HOLDFAST_SEED` is no number.
pub fn seed() -> Result<u64> {
    let seed = match std::env::var("HOLDFAST_SEED") {
        Ok(text) => text.parse().context("HOLDFAST_SEED is no number")?,
        Err(_) => rand::random::<u64>(),
    };
    println!("seed {seed}; to replay: HOLDFAST_SEED={seed}");
    Ok(seed)
}
