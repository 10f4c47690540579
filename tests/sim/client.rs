//! The clients of targets: what they ask, and what of it they see.

use holdfast_storage_core::block_range::BlockRange;
use holdfast_storage_core::ids::BLOCK_BYTES;
use holdfast_storage_core::target::{ClientOp, RequestId, TargetEvent};
use rand::Rng;
use rand::rngs::StdRng;

use crate::coverage::Scenario;
use crate::disk::Blocks;
use crate::families::Drift;
use crate::history::{Moment, Register};
use crate::target_host::TargetHost;
use crate::world::{Event, TargetNumber, VOLUME_BYTES, World};

/// Blocks that clients use: few, so that requests meet; on both sides of region boundaries.
pub const HOT_BLOCKS: [u64; 10] = [0, 1, 2, 3, 254, 255, 256, 511, 512, 900];
pub const HALF: u64 = BLOCK_BYTES / 2;
const WRITES_MAX: usize = 4;
const READS_MAX: usize = 4;

#[derive(Debug)]
pub struct Request {
    pub op: ClientOp,
    pub start: Moment,
    pub generation: u64,
    pub written: Vec<(Register, u64)>,
    pub data: Blocks,
}

impl World {
    /// The client of a target: a few requests at a time.
    pub fn client(&mut self, number: TargetNumber) {
        let now = self.now;
        let load = self.client_load;
        let Some(host) = self.targets.get_mut(&number) else { return };
        if host.target.state().is_final() {
            return;
        }
        let mean = self.chaos.client_gap_us;
        let delay = self.rng.random_range(0..2 * mean);
        self.schedule(delay, Event::Client { target: number });
        let Some(host) = self.targets.get_mut(&number) else { return };
        if !load || host.paused_until > now || host.generation == 0 {
            return;
        }
        let reads = host.requests.values().filter(|r| matches!(r.op, ClientOp::Read { .. })).count();
        let (may_read, may_write) = (reads < READS_MAX, host.requests.len() - reads < WRITES_MAX);
        let wide = self.chaos.wide && self.rng.random_bool(0.7);
        let size = host.target.size_bytes().unwrap_or(VOLUME_BYTES);
        let (mut offset, mut len) = draw_range(&mut self.rng, wide, size);
        // Reads of what no write holds show whether a target that is stuck still serves.
        for _ in 0..4 {
            if may_write || !host.writes_overlap(offset, len) {
                break;
            }
            (offset, len) = draw_range(&mut self.rng, wide, size);
        }
        let fua = self.rng.random_bool(0.1);
        let op = match self.rng.random_range(0..100) {
            0..48 => ClientOp::Write { offset, len, fua },
            48..53 if !host.zeroes_overlap(offset, len) => {
                ClientOp::Zero { offset, len, fua, trim: self.rng.random_bool(0.5) }
            }
            53..62 => ClientOp::Flush,
            _ => ClientOp::Read { offset, len },
        };
        if if matches!(op, ClientOp::Read { .. }) { may_read } else { may_write } {
            self.request(number, op);
        }
    }

    /// Who was told that a write to another volume is done writes here: an effect of that one.
    pub fn follow(&mut self) {
        let (now, wide) = (self.now, self.chaos.wide);
        let Some(number) = self.current.filter(|_| self.client_load) else { return };
        let Some(host) = self.targets.get(&number) else { return };
        let writes = host.requests.values().filter(|r| !matches!(r.op, ClientOp::Read { .. })).count();
        let idle = host.paused_until > now || host.generation == 0 || host.target.state().is_final();
        if idle || writes >= WRITES_MAX {
            return;
        }
        let size = host.target.size_bytes().unwrap_or(VOLUME_BYTES);
        let (offset, len) = draw_range(&mut self.rng, wide, size);
        self.request(number, ClientOp::Write { offset, len, fua: false });
    }

    pub fn request(&mut self, number: TargetNumber, op: ClientOp) {
        let start = self.history.begin();
        let Some(host) = self.targets.get_mut(&number) else { return };
        let generation = host.generation;
        host.next_request += 1;
        let id = RequestId(host.next_request);
        let mut request = Request { op, start, generation, written: Vec::new(), data: Blocks::new() };
        let (overlaps, unreconciled) = match op {
            ClientOp::Read { offset, len } => (host.writes_overlap(offset, len), false),
            ClientOp::Write { offset, len, .. } if !(offset | len).is_multiple_of(BLOCK_BYTES) => {
                (false, host.target.status().unreconciled_regions > 0)
            }
            ClientOp::Write { .. } | ClientOp::Zero { .. } | ClientOp::Flush => (false, false),
        };
        if overlaps {
            self.coverage.saw(Scenario::ReadWriteOverlap);
        }
        if unreconciled {
            self.coverage.saw(Scenario::UnalignedWriteUnreconciled);
        }
        // The checker needs unique values, so a zeroing stores some too; the core cannot tell.
        if let ClientOp::Write { offset, len, .. } | ClientOp::Zero { offset, len, .. } = op {
            for register in offset / HALF..(offset + len) / HALF {
                let value = self.history.fresh_value();
                request.written.push((register, value));
                request.data.entry(register / 2).or_default()[half(register)] = value;
                self.history.write_begun(register, value, start, generation);
            }
        }
        if let Some(host) = self.targets.get_mut(&number) {
            host.requests.insert(id, request);
        }
        self.target_event(number, TargetEvent::Request { request: id, op });
    }

    fn note_read(&mut self, offset: u64, len: u64) {
        let range = BlockRange::covering(offset, len);
        match self.chaos.drift {
            Drift::Mild => {}
            Drift::AtBound => self.saw(Scenario::DriftAtBound),
            Drift::PastBound => self.saw(Scenario::DriftPastBound),
        }
        if self.trimmed_crashed.range(range.start.0..range.end()).next().is_some() {
            self.saw(Scenario::TrimCrashRead);
        }
    }

    fn note_change(&mut self, offset: u64, len: u64, trim: bool) {
        let range = BlockRange::covering(offset, len);
        for block in range.start.0..range.end() {
            self.trimmed_crashed.remove(&block);
            if trim {
                self.trimmed.insert(block);
            } else {
                self.trimmed.remove(&block);
            }
        }
    }

    pub fn completed(&mut self, request: Request) {
        match request.op {
            ClientOp::Read { offset, len } => {
                let values: Vec<(Register, u64)> = (offset / HALF..(offset + len) / HALF)
                    .map(|r| (r, request.data.get(&(r / 2)).copied().unwrap_or_default()[half(r)]))
                    .collect();
                self.note_read(offset, len);
                self.history.read_answered(&values, request.start, request.generation);
            }
            ClientOp::Write { offset, len, fua } | ClientOp::Zero { offset, len, fua, .. } => {
                let trim = matches!(request.op, ClientOp::Zero { trim: true, .. });
                self.note_change(offset, len, trim);
                self.outbox.acknowledged += 1;
                self.history.write_acknowledged(&request.written, request.start, request.generation, fua);
            }
            ClientOp::Flush => self.history.flush_acknowledged(request.start, request.generation),
        }
    }
}

impl TargetHost {
    pub fn writes_overlap_blocks(&self, range: BlockRange) -> bool {
        self.writes_overlap(range.offset_bytes(), range.len_bytes())
    }

    fn writes_overlap(&self, offset: u64, len: u64) -> bool {
        self.requests.values().any(|request| match request.op {
            ClientOp::Write { offset: o, len: l, .. } | ClientOp::Zero { offset: o, len: l, .. } => {
                overlaps((offset, len), (o, l))
            }
            ClientOp::Read { .. } | ClientOp::Flush => false,
        })
    }

    fn zeroes_overlap(&self, offset: u64, len: u64) -> bool {
        self.requests.values().any(|request| match request.op {
            ClientOp::Zero { offset: o, len: l, .. } => overlaps((offset, len), (o, l)),
            ClientOp::Read { .. } | ClientOp::Write { .. } | ClientOp::Flush => false,
        })
    }
}

fn draw_range(rng: &mut StdRng, wide: bool, volume_bytes: u64) -> (u64, u64) {
    let mut block = HOT_BLOCKS[rng.random_range(0..HOT_BLOCKS.len())];
    if wide {
        block = rng.random_range(0..volume_bytes / BLOCK_BYTES);
    } else if volume_bytes > VOLUME_BYTES && block < 2 {
        // What it grew by.
        block = volume_bytes / BLOCK_BYTES - 1 - block;
    }
    let mut offset = block * BLOCK_BYTES;
    let mut len = rng.random_range(1..=3) * BLOCK_BYTES;
    if rng.random_bool(0.2) {
        offset += HALF * rng.random_range(0..2);
        len = rng.random_range(1..=4) * HALF;
    }
    (offset, len.min(volume_bytes - offset))
}

fn overlaps(a: (u64, u64), b: (u64, u64)) -> bool {
    let blocks = |(offset, len): (u64, u64)| BlockRange::covering(offset, len);
    blocks(a).overlaps(blocks(b))
}

fn half(register: Register) -> usize {
    usize::try_from(register % 2).expect("0 or 1")
}
