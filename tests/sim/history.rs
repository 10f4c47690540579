//! What the clients saw, and whether one disk could have shown it to them (P1 to P4).
//!
//! Every half block is a register of its own. Values are unique, so linearizability of a register has a simple exact
//! test (Gibbons and Korach, 1997): all operations on one value span a zone; two zones that each must hold the register
//! for a while may not overlap, and a zone may not lie within another such one.

use std::collections::{BTreeMap, BTreeSet};

/// A position in the run's single order of starts and ends.
pub type Moment = u64;
/// Half of a block: `block * 2 + half`.
pub type Register = u64;

const NEVER: Moment = u64::MAX;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Write,
    Read,
}

#[derive(Debug, Clone, Copy)]
struct Op {
    kind: Kind,
    value: u64,
    start: Moment,
    end: Moment,
    generation: u64,
    /// A write that its client was told is done.
    acknowledged: bool,
    /// Acknowledged by FUA, or followed by an acknowledged flush.
    flushed_at: Moment,
}

#[derive(Debug, Default)]
pub struct History {
    moment: Moment,
    next_value: u64,
    registers: BTreeMap<Register, Vec<Op>>,
    /// Acknowledged flushes: start and generation.
    flushes: Vec<(Moment, u64)>,
    /// First acknowledged write of each generation.
    first_ack: BTreeMap<u64, Moment>,
    /// Generations that began after all members had lost their caches (P2).
    losses: BTreeSet<u64>,
    /// Those of them that began from what a single replica happened to hold (R26).
    forks: BTreeSet<u64>,
    /// Blocks whose content was lost and reported: anything may be read there.
    given_up: BTreeSet<u64>,
    pub violations: Vec<String>,
    /// Prints the operations of the first register that fails.
    pub trace: bool,
    pub writes_acknowledged: u64,
    pub reads_answered: u64,
}

/// Moments between a first and a last one, each with what sets it.
#[derive(Debug, Clone)]
pub struct Window {
    pub from: (Moment, String),
    pub until: (Moment, String),
}

impl Window {
    /// Whether there is any moment in it.
    pub fn check(&self) -> Result<(), String> {
        let ((from, why), (until, why_not)) = (&self.from, &self.until);
        if from > until { Err(format!("{why} at {from}, but {why_not} at {until}")) } else { Ok(()) }
    }
}

impl History {
    pub fn moment(&self) -> Moment {
        self.moment
    }

    /// What happens next is later than this moment of another history.
    pub fn go_on_after(&mut self, moment: Moment) {
        self.moment = self.moment.max(moment);
    }

    pub fn begin(&mut self) -> Moment {
        self.moment += 1;
        self.moment
    }

    pub fn fresh_value(&mut self) -> u64 {
        self.next_value += 1;
        self.next_value
    }

    /// A write that is about to be sent; its outcome is unknown until acknowledged.
    pub fn write_begun(&mut self, register: Register, value: u64, start: Moment, generation: u64) {
        let op = Op {
            kind: Kind::Write,
            value,
            start,
            end: NEVER,
            generation,
            acknowledged: false,
            flushed_at: NEVER,
        };
        self.registers.entry(register).or_default().push(op);
    }

    pub fn write_acknowledged(
        &mut self,
        registers: &[(Register, u64)],
        start: Moment,
        generation: u64,
        fua: bool,
    ) {
        let end = self.begin();
        self.check_generation(start, generation, "acknowledged a write");
        self.first_ack.entry(generation).or_insert(end);
        self.writes_acknowledged += 1;
        for (register, value) in registers {
            let ops = self.registers.entry(*register).or_default();
            if let Some(op) = ops.iter_mut().find(|op| op.kind == Kind::Write && op.value == *value) {
                op.end = end;
                op.acknowledged = true;
                op.flushed_at = if fua { end } else { NEVER };
            }
        }
    }

    pub fn read_answered(&mut self, values: &[(Register, u64)], start: Moment, generation: u64) {
        let end = self.begin();
        self.check_generation(start, generation, "served a read");
        self.reads_answered += 1;
        for (register, value) in values {
            let op = Op {
                kind: Kind::Read,
                value: *value,
                start,
                end,
                generation,
                acknowledged: false,
                flushed_at: NEVER,
            };
            self.registers.entry(*register).or_default().push(op);
        }
    }

    pub fn flush_acknowledged(&mut self, start: Moment, generation: u64) {
        self.check_generation(start, generation, "acknowledged a flush");
        self.flushes.push((start, generation));
    }

    /// A new attachment went on from lost caches.
    pub fn loss(&mut self, generation: u64) {
        self.losses.insert(generation);
    }

    /// An operator promoted a replica: what others held is gone, flushed or not.
    pub fn fork(&mut self, generation: u64) {
        self.losses.insert(generation);
        self.forks.insert(generation);
    }

    /// The block's content was lost, and an operator was told (R32).
    pub fn give_up(&mut self, block: u64) {
        self.given_up.insert(block);
    }

    pub fn flushes_acknowledged(&self) -> u64 {
        self.flushes.len() as u64
    }

    pub fn losses(&self) -> u64 {
        self.losses.len() as u64
    }

    /// P4.
    fn check_generation(&mut self, start: Moment, generation: u64, did: &str) {
        let newer = self.first_ack.range(generation + 1..).find(|(_, ack)| **ack < start);
        if let Some((newer, _)) = newer {
            self.violations.push(format!(
                "P4: generation {generation} {did} begun after generation {newer} acknowledged one"
            ));
        }
    }

    /// Checks every register.
    pub fn check(&mut self) {
        let mut found = Vec::new();
        let kept = |register: &Register| !self.given_up.contains(&(register / 2));
        for (register, ops) in self.registers.iter().filter(|(register, _)| kept(register)) {
            if let Err(what) = self.check_register(ops) {
                if found.is_empty() && self.trace {
                    for op in ops {
                        eprintln!("  {op:?}");
                    }
                    eprintln!("  flushes: {:?} losses {:?}", self.flushes, self.losses);
                }
                found.push(format!("P1/P3: block {} half {}: {what}", register / 2, register % 2));
            }
        }
        self.violations.append(&mut found);
    }

    /// P6: the instants of its cut at which everything a snapshot holds was in place together. Each value was in place
    /// from some moment after its write began until some moment before a later write of the register was seen done.
    pub fn window(
        &self,
        content: &crate::disk::Blocks,
        generation: u64,
        begun: Moment,
        end: Moment,
    ) -> Result<Window, String> {
        let loss = self.losses.range(..=generation).next_back().copied().unwrap_or(0);
        let (mut low, mut high) = ((begun, "the cut began".to_owned()), (end, "the cut ended".to_owned()));
        for (register, ops) in &self.registers {
            let half = usize::try_from(register % 2).expect("0 or 1");
            let value = content.get(&(register / 2)).map_or(0, |data| data[half]);
            let own = ops.iter().find(|op| op.kind == Kind::Write && op.value == value);
            if value != 0 && own.is_none() {
                return Err(format!("register {register} holds {value}, which nobody wrote"));
            }
            // What survived a loss of all caches is older than everything that was done since.
            let own = own.filter(|op| op.generation >= loss);
            if let Some(own) = own.filter(|own| own.start > low.0) {
                low = (own.start, format!("the write of {value} to register {register} began"));
            }
            let settled = |value: u64| {
                ops.iter().filter(|op| op.value == value).map(|op| op.end).min().unwrap_or(NEVER)
            };
            let own_settled = own.map_or(0, |own| settled(own.value));
            let later = ops
                .iter()
                .filter(|op| op.kind == Kind::Write && op.generation >= loss && op.start > own_settled)
                .map(|op| (settled(op.value), op.value))
                .min();
            if let Some((gone, by)) = later.filter(|(gone, _)| *gone < high.0) {
                high = (gone, format!("{value} in register {register} was replaced by {by}"));
            }
        }
        Ok(Window { from: low, until: high })
    }

    fn check_register(&self, ops: &[Op]) -> Result<(), String> {
        // The initial zero was written before everything.
        let mut initial = vec![Op {
            kind: Kind::Write,
            value: 0,
            start: 0,
            end: 0,
            generation: 0,
            acknowledged: true,
            flushed_at: 0,
        }];
        let mut from = 0;
        let bounds = self.losses.iter().copied().chain([u64::MAX]);
        for until in bounds {
            let mut segment = initial.clone();
            segment.extend(ops.iter().filter(|op| (from..until).contains(&op.generation)).copied());
            settle_unknown_writes(&mut segment);
            check_zones(&segment)?;
            initial = if self.forks.contains(&until) {
                any_of(&initial, ops, until)
            } else {
                self.survivors(&segment, until)
            };
            from = until;
        }
        Ok(())
    }

    /// What a register may hold after all caches were lost: nothing older than what a flush covered.
    fn survivors(&self, segment: &[Op], loss: u64) -> Vec<Op> {
        let flushed = |op: &Op| {
            // P3: a value of an earlier generation once read counts as flushed.
            let reread = |r: &Op| r.kind == Kind::Read && r.value == op.value && r.generation > op.generation;
            if op.kind == Kind::Write && op.generation > 0 && segment.iter().any(reread) {
                return true;
            }
            op.acknowledged
                && (op.flushed_at != NEVER
                    || self.flushes.iter().any(|(start, by)| *start > op.end && *by < loss))
        };
        let firm: Vec<&Op> = segment.iter().filter(|op| flushed(op)).collect();
        let mut out = Vec::new();
        for write in segment.iter().filter(|op| op.kind == Kind::Write) {
            let settled =
                segment.iter().filter(|op| op.value == write.value).map(|op| op.end).min().unwrap_or(NEVER);
            if !firm.iter().any(|w| w.value != write.value && settled < w.start) {
                out.push(Op { end: NEVER, generation: 0, acknowledged: false, flushed_at: NEVER, ..*write });
            }
        }
        out
    }
}

/// What one replica may hold of a register: whatever was ever written to it.
fn any_of(initial: &[Op], ops: &[Op], fork: u64) -> Vec<Op> {
    let earlier = ops.iter().filter(|op| op.kind == Kind::Write && op.generation < fork);
    let zero = Op { value: 0, start: 0, ..initial[0] };
    let unknown = |op: &Op| Op { end: NEVER, generation: 0, acknowledged: false, flushed_at: NEVER, ..*op };
    earlier.chain([&zero]).map(unknown).collect()
}

/// A write without an answer took effect, if at all, before a later generation first answered anything about the
/// register: reconciling settles it (R20).
fn settle_unknown_writes(segment: &mut [Op]) {
    let ends: Vec<(u64, Moment)> =
        segment.iter().filter(|o| o.end != NEVER).map(|o| (o.generation, o.end)).collect();
    for op in segment.iter_mut().filter(|op| op.kind == Kind::Write && op.generation > 0) {
        let later =
            ends.iter().filter(|(generation, _)| *generation > op.generation).map(|(_, end)| *end).min();
        op.end = op.end.min(later.unwrap_or(NEVER)).max(op.start);
    }
}

#[derive(Debug, Clone, Copy)]
struct Zone {
    value: u64,
    first_end: Moment,
    last_start: Moment,
}

fn check_zones(segment: &[Op]) -> Result<(), String> {
    let mut zones: BTreeMap<u64, (Zone, Option<Moment>, bool)> = BTreeMap::new();
    let mut acknowledged = BTreeSet::new();
    for op in segment {
        let fresh = Zone { value: op.value, first_end: NEVER, last_start: 0 };
        let (zone, begun, read) = zones.entry(op.value).or_insert((fresh, None, false));
        zone.first_end = zone.first_end.min(op.end);
        zone.last_start = zone.last_start.max(op.start);
        match op.kind {
            Kind::Write => *begun = Some(op.start),
            Kind::Read => *read = true,
        }
        if op.acknowledged {
            acknowledged.insert(op.value);
        }
    }
    let mut all: Vec<Zone> = Vec::new();
    for (value, (zone, begun, read)) in zones {
        let Some(begun) = begun else { return Err(format!("a read found {value}, which nobody wrote")) };
        if zone.first_end < begun {
            return Err(format!("a read found {value} before it was written"));
        }
        // A write that nobody answered and nobody read may never have happened.
        if read || acknowledged.contains(&value) {
            all.push(zone);
        }
    }
    for a in all.iter().filter(|zone| zone.first_end < zone.last_start) {
        for b in all.iter().filter(|zone| zone.value != a.value) {
            let (low, high) = (b.first_end.min(b.last_start), b.first_end.max(b.last_start));
            let forward = b.first_end < b.last_start;
            let clash = if forward {
                a.first_end < high && low < a.last_start
            } else {
                a.first_end < low && high < a.last_start
            };
            if clash {
                return Err(format!(
                    "{} was in place from {} to {}, yet {} {} between {low} and {high}",
                    a.value,
                    a.first_end,
                    a.last_start,
                    b.value,
                    if forward { "was in place" } else { "came and went" },
                ));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_history() -> (History, u64, Moment) {
        let mut history = History::default();
        let value = history.fresh_value();
        let start = history.begin();
        history.write_begun(0, value, start, 1);
        history.write_acknowledged(&[(0, value)], start, 1, false);
        let now = history.begin();
        (history, value, now)
    }

    #[test]
    fn a_lost_acknowledged_write_is_found() {
        let (mut history, _, now) = mk_history();
        history.read_answered(&[(0, 0)], now, 1);
        history.check();
        assert_eq!(history.violations.len(), 1);
    }

    #[test]
    fn a_lost_unflushed_write_is_allowed_after_a_loss_and_a_flushed_one_is_not() {
        for flush in [false, true] {
            let (mut history, _, now) = mk_history();
            if flush {
                history.flush_acknowledged(now, 1);
            }
            history.loss(2);
            let now = history.begin();
            history.read_answered(&[(0, 0)], now, 2);
            history.check();
            assert_eq!(history.violations.len(), usize::from(flush));
        }
    }

    #[test]
    fn a_value_once_read_is_never_unread() {
        let mut history = History::default();
        let value = history.fresh_value();
        let start = history.begin();
        history.write_begun(0, value, start, 1);
        for seen in [value, 0] {
            let now = history.begin();
            history.read_answered(&[(0, seen)], now, 2);
        }
        history.check();
        assert_eq!(history.violations.len(), 1);
    }
}
