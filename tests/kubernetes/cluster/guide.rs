//! docs/getting-started.md, command by command.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use holdfast_tests::go_tools::Skip;
use holdfast_tests::k8s::{KubeCluster, Tools};
use holdfast_tests::process::run_within;
use libtest_mimic::Trial;

use super::ready::repository;
use super::trial;

const GUIDE: &str = "docs/getting-started.md";
/// All commands of one block; each that waits has a limit of its own.
const BLOCK_TIMEOUT: Duration = Duration::from_secs(600);
/// What is done before there is a cluster: the harness packs the image with the same program, and imports it the same way.
const BEFORE: [&str; 2] = ["scripts/image", "ctr --namespace k8s.io images import holdfast.tar"];
/// Stands for any number of lines.
const ANY_LINES: &str = "...";

pub fn trials(tools: &Result<Tools, Skip>) -> Vec<Trial> {
    vec![trial(tools, "the_guide_for_new_users_does_what_it_says", guide)]
}

fn guide(cluster: &mut KubeCluster) -> Result<()> {
    let start = Instant::now();
    let text = std::fs::read_to_string(repository().join(GUIDE))?;
    let blocks = blocks_of(&text)?;
    let before = blocks.iter().filter(|block| block.language.is_empty());
    let before: Vec<&str> = before.map(|block| block.text.as_str()).collect();
    ensure!(before == BEFORE, "commands that are not tried here: {before:?}");
    let mut said: Option<String> = None;
    let mut ran = 0;
    for block in blocks.iter().filter(|block| !block.language.is_empty()) {
        match block.language.as_str() {
            "sh" => {
                let output = run_within(BLOCK_TIMEOUT, &mut cluster.shell(&block.text, &repository())?);
                said = Some(output.with_context(|| format!("line {} of {GUIDE}", block.line))?);
                ran += 1;
            }
            "text" => {
                let said = said.take().context("an answer without a command")?;
                let wanted: Vec<&str> = block.text.lines().collect();
                let lines: Vec<&str> = said.lines().filter(|line| !line.is_empty()).collect();
                ensure!(fits(&lines, &wanted), "line {} of {GUIDE}: it says\n{said}", block.line);
            }
            other => bail!("line {} of {GUIDE}: nobody runs a block of {other}", block.line),
        }
    }
    ensure!(ran > 5, "only {ran} blocks of commands were found");
    println!("The guide took {:.0} s", start.elapsed().as_secs_f64());
    Ok(())
}

struct Block {
    language: String,
    text: String,
    /// Number of its first line in the file.
    line: usize,
}

fn blocks_of(text: &str) -> Result<Vec<Block>> {
    let mut blocks = Vec::new();
    let mut open: Option<Block> = None;
    for (number, line) in text.lines().enumerate() {
        match (line.strip_prefix("```"), &mut open) {
            (Some(language), None) => {
                open = Some(Block { language: language.to_owned(), text: String::new(), line: number + 2 });
            }
            (Some(_), Some(_)) => blocks.extend(open.take()),
            (None, Some(block)) => {
                let separator = if block.text.is_empty() { "" } else { "\n" };
                block.text.extend([separator, line]);
            }
            (None, None) => {}
        }
    }
    ensure!(open.is_none(), "a block does not end");
    Ok(blocks)
}

/// Whether the lines are those that are wanted.
fn fits(lines: &[&str], wanted: &[&str]) -> bool {
    match (lines, wanted) {
        ([], []) => true,
        (_, [ANY_LINES, rest @ ..]) => (0..=lines.len()).any(|skipped| fits(&lines[skipped..], rest)),
        ([line, lines @ ..], [first, rest @ ..]) => line == first && fits(lines, rest),
        _ => false,
    }
}
