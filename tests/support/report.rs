//! What the demo tells a person, step by step, with durations.

use std::time::{Duration, Instant};

/// Prints steps and notes; tests print the same to their captured output.
pub struct Report {
    start: Instant,
    step: Instant,
    summary: Vec<(String, String)>,
}

impl Default for Report {
    fn default() -> Self {
        Self::new()
    }
}

impl Report {
    /// Starts the clock.
    #[must_use]
    pub fn new() -> Self {
        Self { start: Instant::now(), step: Instant::now(), summary: Vec::new() }
    }

    /// Begins a step.
    pub fn step(&mut self, title: &str) {
        self.step = Instant::now();
        println!("\n== {title}");
    }

    /// Something that was done just now, with the time since the step began.
    pub fn note(&self, text: &str) {
        println!("   {:>7}  {text}", format!("{:.2} s", self.step.elapsed().as_secs_f64()));
    }

    /// Several lines as they are.
    pub fn block(&self, text: &str) {
        for line in text.lines() {
            println!("            {line}");
        }
    }

    /// A figure for the summary.
    pub fn figure(&mut self, name: &str, value: String) {
        self.summary.push((name.to_owned(), value));
    }

    /// Prints the summary.
    pub fn finish(&self) {
        println!("\n== Summary after {}", seconds(self.start.elapsed()));
        let width = self.summary.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
        for (name, value) in &self.summary {
            println!("   {name:<width$}  {value}");
        }
    }
}

/// Seconds with two digits.
#[must_use]
pub fn seconds(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}

/// Bytes in MiB with one digit.
#[must_use]
pub fn mebibytes(bytes: u64) -> String {
    let tenths = bytes.saturating_mul(10) / (1 << 20);
    format!("{}.{} MiB", tenths / 10, tenths % 10)
}
