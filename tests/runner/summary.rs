//! Counts what test programs say about themselves.

/// Lines of a failed test's own words that are shown again at the end.
const WORDS_MAX: usize = 20;

/// Results of all test programs so far.
#[derive(Debug, Default)]
pub struct Summary {
    passed: u64,
    failed: u64,
    skipped: u64,
    failures: Vec<Failure>,
    skips: Vec<String>,
    /// Test whose output is being read.
    speaker: String,
    /// Test that said last that it is skipped.
    skipping: String,
    moved_to_skipped: u64,
    /// The lines being read are those about failed tests.
    in_failures: bool,
}

/// A test that failed.
#[derive(Debug, PartialEq, Eq)]
struct Failure {
    name: String,
    /// The first lines of what it said.
    words: Vec<String>,
}

impl Summary {
    /// Takes one line of a test program's output; true if it was a result line.
    ///
    /// Understood are libtest's and libtest-mimic's `test NAME ... FAILED`, `test NAME ... ignored, WHY` and
    /// `test result: ...`; and `SKIP: WHY` in the output of a test that passed.
    pub fn count_line(&mut self, program: &str, line: &str) -> bool {
        if let Some(counts) = line.strip_prefix("test result: ") {
            let moved = std::mem::take(&mut self.moved_to_skipped);
            self.passed += number_before(counts, " passed").saturating_sub(moved);
            self.failed += number_before(counts, " failed");
            self.skipped += number_before(counts, " ignored") + moved;
            self.skipping.clear();
            self.in_failures = false;
            return true;
        }
        self.in_failures = (self.in_failures || line == "failures:") && line != "successes:";
        if let Some(name) = line.strip_prefix("---- ").and_then(|rest| rest.strip_suffix(" ----")) {
            name.strip_suffix(" stdout").unwrap_or(name).clone_into(&mut self.speaker);
            if self.in_failures {
                self.add_failure(format!("{program}: {}", self.speaker));
            }
        } else if self.in_failures && line != "failures:" && !line.is_empty() {
            self.add_words(program, line);
        }
        if let Some(reason) = line.strip_prefix("SKIP").and_then(|rest| rest.split_once(": ")) {
            // A test that could not run says so itself; libtest counts it as passed.
            let skip = format!("{program}: {} ({})", self.speaker, reason.1);
            self.moved_to_skipped += u64::from(self.skipping != self.speaker);
            self.skipping.clone_from(&self.speaker);
            self.skips.push(skip);
        }
        if let Some((name, outcome)) = line.strip_prefix("test ").and_then(|rest| rest.rsplit_once(" ... ")) {
            if outcome.starts_with("FAILED") {
                self.add_failure(format!("{program}: {}", name.trim_end()));
            } else if outcome.starts_with("ignored") {
                self.skips.push(format!("{program}: {name} ({outcome})"));
            }
        }
        false
    }

    /// Counts a failure that no test reported.
    pub fn fail(&mut self, what: &str) {
        self.failed += 1;
        self.add_failure(what.to_owned());
    }

    /// How many failed so far.
    #[must_use]
    pub fn failed(&self) -> u64 {
        self.failed
    }

    /// Whether nothing failed.
    #[must_use]
    pub fn is_success(&self) -> bool {
        self.failed == 0
    }

    /// A failed test may be named twice: on its own line and above its output.
    fn add_failure(&mut self, name: String) {
        if self.failures.iter().all(|failure| failure.name != name) {
            self.failures.push(Failure { name, words: Vec::new() });
        }
    }

    /// Where output is cut at its end alone the reason would be lost.
    fn add_words(&mut self, program: &str, line: &str) {
        let name = format!("{program}: {}", self.speaker);
        let failure = self.failures.iter_mut().find(|failure| failure.name == name);
        // The list of names that follows is not the last one's words.
        if let Some(failure) = failure.filter(|f| f.words.len() < WORDS_MAX && line.trim() != self.speaker) {
            failure.words.push(line.to_owned());
        }
    }

    /// Prints failures and skips, then the line that ends every run.
    pub fn print(&self) {
        println!();
        for skip in &self.skips {
            println!("skipped  {skip}");
        }
        for failure in &self.failures {
            println!("FAILED   {}", failure.name);
            failure.words.iter().for_each(|line| println!("             {line}"));
        }
        println!("{} passed, {} failed, {} skipped", self.passed, self.failed, self.skipped);
    }
}

fn number_before(text: &str, word: &str) -> u64 {
    let before = text.split(word).next().unwrap_or("");
    before.rsplit(' ').next().and_then(|number| number.parse().ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_of_all_programs_are_added_up() {
        let mut summary = Summary::default();

        assert!(
            summary.count_line(
                "a",
                "test result: ok. 7 passed; 0 failed; 2 ignored; 0 measured; 1 filtered out"
            )
        );
        assert!(summary.count_line("b", "test result: FAILED. 3 passed; 1 failed; 0 ignored; 0 measured"));

        assert_eq!((summary.passed, summary.failed, summary.skipped), (10, 1, 2));
        assert!(!summary.is_success());
    }

    #[test]
    fn a_failure_whose_own_line_was_cut_by_output_is_named_once() {
        let mut summary = Summary::default();

        for line in
            ["test one ... hello", "FAILED", "failures:", "---- one ----", "broken", "failures:", "    one"]
        {
            summary.count_line("cluster", line);
        }
        summary.count_line("cluster", "test result: FAILED. 0 passed; 1 failed; 0 ignored; 0 measured");

        let words = vec!["broken".to_owned()];
        assert_eq!(summary.failures, [Failure { name: "cluster: one".to_owned(), words }]);
        assert_eq!(summary.failed(), 1);
    }

    #[test]
    fn a_test_that_says_it_is_skipped_is_not_passed() {
        let mut summary = Summary::default();

        for line in [
            "---- nbd::one stdout ----",
            "SKIP: qemu-io is not installed",
            "---- nbd::two stdout ----",
            "hello",
        ] {
            summary.count_line("nbd", line);
        }
        summary.count_line("nbd", "test result: ok. 2 passed; 0 failed; 0 ignored; 0 measured");

        assert_eq!((summary.passed, summary.skipped), (1, 1));
        assert_eq!(summary.skips, ["nbd: nbd::one (qemu-io is not installed)"]);
    }

    #[test]
    fn failures_and_skips_are_named_with_their_reasons() {
        let mut summary = Summary::default();

        summary.count_line("io", "test ring::one    ... FAILED");
        summary.count_line("io", "test ring::two ... ignored, needs a newer kernel");
        summary.count_line("io", "test ring::three ... ok");

        assert_eq!(summary.failures, [Failure { name: "io: ring::one".to_owned(), words: Vec::new() }]);
        assert_eq!(summary.skips, ["io: ring::two (ignored, needs a newer kernel)"]);
    }
}
