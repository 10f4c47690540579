//! Damage at rest, and what may be asked of the protocol then (R25, R32, R33).
//!
//! *Checked:* no read gives what is damaged, stale or another block's (by the history, as ever); what verifies on a member
//! is mended wherever it does not, once a scrub went over it; what verifies nowhere is an error until it is written again,
//! or, where a crash explains it, taken as it is and reported. Only the last two are losses, and each is told here when it
//! happens and no member has the block; a block that does not verify at the end and was not lost so is a violation.

use std::collections::BTreeSet;

use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::Block;
use holdfast_storage_core::replica::DiskError;
use holdfast_storage_core::target::{ClientOp, Finding, TargetEvent};
use rand::Rng;

use crate::chaos::Trouble;
use crate::client::{HOT_BLOCKS, Request};
use crate::coverage::Scenario;
use crate::damage::{self, Damage};
use crate::disk::BlockData;
use crate::world::{REPLICAS, TargetNumber, World, node_of};

/// A pass over the whole volume takes a fraction of it.
const SCRUBBED_WITHIN_US: u64 = 60_000_000;

/// What is known to be damaged beyond repair.
#[derive(Debug, Default)]
pub struct Losses {
    /// Blocks that verified on no member when one of them was given up.
    blocks: BTreeSet<u64>,
    /// Trouble is over and everything is scrubbed: what verifies everywhere is to be read.
    pub mended: bool,
}

impl World {
    pub fn strike_disk(&mut self, trouble: Trouble, node: usize, lasts: u64) {
        let hot = self.rng.random_bool(0.8);
        let at = self.rng.random_range(0..HOT_BLOCKS.len());
        let any = self.rng.random_range(0..self.nodes[0].disk.blocks());
        let block = if hot { HOT_BLOCKS[at] } else { any };
        let members: Vec<usize> = self.store.record.in_sync.iter().map(|replica| node_of(*replica)).collect();
        let member = members[node % members.len()];
        match trouble {
            Trouble::Rot if self.verifies_beside(member, block) => self.rot(member, block),
            Trouble::Misdirect if self.verifies_beside(member, block) => {
                self.nodes[member].disk.misdirects_to = Some(block);
            }
            Trouble::RotEverywhere => {
                for node in 0..REPLICAS {
                    self.rot(node, block);
                }
                self.losses.blocks.insert(block);
            }
            Trouble::FailReads if self.rng.random_bool(0.4) => {
                for node in members {
                    self.nodes[node].reads_fail_until = self.now + lasts;
                }
            }
            Trouble::FailReads => self.nodes[member].reads_fail_until = self.now + lasts,
            _ => {}
        }
    }

    fn rot(&mut self, node: usize, block: u64) {
        let held = if self.rng.random_bool(0.3) {
            damage::damaged(self.nodes[node].disk.block(block), Damage::Unreadable)
        } else {
            damage::rotten(&mut self.rng)
        };
        self.log(|| format!("-- n{node}: block {block} rots"));
        self.nodes[node].disk.damage(block, held);
    }

    /// Whether another member that runs has the block.
    fn verifies_beside(&self, node: usize, block: u64) -> bool {
        let runs = |other: &usize| *other != node && self.nodes[*other].process.is_some();
        self.members_with(block).any(|other| runs(&other))
    }

    /// Members where the block verifies. One whose device fails is as good as one where it does not: nobody can tell.
    fn members_with(&self, block: u64) -> impl Iterator<Item = usize> + '_ {
        let members = self.store.record.in_sync.iter().map(|replica| node_of(*replica));
        members.filter(move |node| {
            let host = &self.nodes[*node];
            host.reads_fail_until <= self.now && damage::verifies(host.disk.block(block))
        })
    }

    /// What a read met.
    pub fn note_read_of_disk(
        &mut self,
        node: usize,
        range: BlockRange,
        read: Result<(), DiskError>,
        fails: bool,
    ) {
        if fails {
            return self.saw(Scenario::FailingRead);
        }
        if read.is_ok() {
            return;
        }
        for block in range.start.0..range.end() {
            let disk = &self.nodes[node].disk;
            let (held, logged) = (disk.block(block), disk.log.contains(&Block(block).region()));
            if damage::verifies(held) {
                continue;
            }
            self.saw(match (damage::is_foreign(held), logged) {
                (true, true) => Scenario::RotInLoggedRegion,
                (true, false) => Scenario::RotMet,
                (false, _) => Scenario::TornBlockMet,
            });
        }
    }

    /// A write landed on this block. What else had it may be gone since that was decided.
    pub fn note_misdirected(&mut self, block: u64) {
        self.saw(Scenario::Misdirected);
        if self.members_with(block).next().is_none() {
            self.losses.blocks.insert(block);
        }
    }

    /// R25: a returning replica was told that nobody can read these blocks.
    pub fn note_marked(&mut self, range: BlockRange) {
        self.saw(Scenario::MarkedBad);
        for block in range.start.0..range.end() {
            if self.members_with(block).next().is_none() {
                self.losses.blocks.insert(block);
            }
        }
    }

    /// R32: the last resort. What is damaged may become data only where no member has better.
    pub fn note_adopted(&mut self, node: usize, adopted: &[(u64, BlockData)]) {
        for (block, held) in adopted {
            self.saw(Scenario::Adopted);
            let better = self.members_with(*block).any(|other| other != node);
            if damage::is_foreign(*held) && !better {
                self.log(|| format!("n{node}: block {block} is lost and adopted"));
                self.history.give_up(*block);
            }
        }
    }

    pub fn note_finding(&mut self, target: TargetNumber, finding: Finding) {
        let Finding::Repaired { range, .. } = finding else { return };
        self.saw(Scenario::Repaired);
        let waits = self.targets.get(&target).is_some_and(|host| host.writes_overlap_blocks(range));
        if waits {
            self.saw(Scenario::RepairMetWrite);
        }
    }

    /// A client was told that its read failed.
    pub fn note_failed_read(&mut self, request: &Request) {
        let ClientOp::Read { offset, len } = request.op else { return };
        let range = BlockRange::covering(offset, len);
        let nowhere = (range.start.0..range.end()).any(|block| self.members_with(block).next().is_none());
        if nowhere {
            self.saw(Scenario::ErrorNotStale);
        } else if self.losses.mended {
            self.history.violations.push(format!("P1: {range:?} verifies, and reading it fails"));
        }
    }

    /// R33: after a pass of the scrub, what verified anywhere verifies everywhere.
    pub fn scrub_everything(&mut self) {
        if !self.chaos.tears_blocks {
            return;
        }
        let Some(target) = self.current else { return };
        let passes = |world: &Self| world.targets.get(&target).map(|host| host.target.status().scrub.passes);
        let before = passes(self);
        self.target_event(target, TargetEvent::Scrub);
        let deadline = self.now + SCRUBBED_WITHIN_US;
        while passes(self) == before {
            if self.now > deadline {
                return self.history.violations.push("stuck: the scrub does not end".to_owned());
            }
            let step = self.now + 100_000;
            self.run_until(step);
        }
        self.losses.mended = true;
        for node in 0..REPLICAS {
            for block in self.nodes[node].disk.bad_blocks().difference(&self.losses.blocks) {
                self.history.violations.push(format!("P1: block {block} of n{node} was not mended"));
            }
        }
    }
}
