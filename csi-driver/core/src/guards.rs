//! Switches that take single rules out, so that the simulation can prove it would notice. Never set in production.

/// Each field is one guard of the replication reference; `true` is the protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "independent switches, for tests only")]
pub struct Guards {
    /// R13: overlapping writes have one order.
    pub range: bool,
    /// R13: reads take the range lock.
    pub readlock: bool,
    /// R14: an acknowledgement needs the whole ack set.
    pub epochack: bool,
    /// R10: every member persists the epoch before an acknowledgement.
    pub tell: bool,
    /// R21: a dirty map starts as a copy of the intent log.
    pub mapinflight: bool,
    /// R22: after a crash a map takes the log in.
    pub mapdurable: bool,
    /// R23: a returning replica's own log is copied.
    pub ownlog: bool,
    /// R20: a region is reconciled before it is read.
    pub readrec: bool,
    /// R20: logged regions are reconciled at all.
    pub intent: bool,
    /// R20: a reconciled region is flushed on every member before it is read.
    pub recflush: bool,
    /// R1: every start of a target takes a generation of its own. Off, a start under the same attachment shares it.
    pub onegen: bool,
    /// R2: the generation is durable before Open answers.
    pub genpersist: bool,
    /// R2: Open waits for the old session's I/O.
    pub drain: bool,
    /// R4: reads need leases; the replica waits for their end.
    pub lease: bool,
    /// R4: the target ends its leases early by drift and margin.
    pub drift: bool,
    /// R4: a wall clock that jumps against the protocol's clock ends the leases.
    pub walljump: bool,
    /// R11: nothing is served before every member is open, or swapped out.
    pub serveall: bool,
    /// R3: a starting replica waits one lease term.
    pub leasewait: bool,
    /// R18: the log is cleared only after a flush of the ack set.
    pub clearrule: bool,
    /// R18: no write slips between the flush and the clearing.
    pub clearseq: bool,
    /// R19, R14: a replica that lost its cache says so.
    pub instance: bool,
    /// R19: a lost cache is remembered until it is reconciled. Off, it is told once.
    pub loststicky: bool,
    /// R12: a replica that lost its cache is no source while another kept its own.
    pub lostsrc: bool,
    /// R9: a replica is swapped out only in favour of one that kept its cache.
    pub keepgood: bool,
    /// R9: a member is taken out for good only while all members are open and kept their caches.
    pub removegood: bool,
    /// R8: the joining replica is in the ack set before the swap.
    pub joint: bool,
    /// R24: the joining replica flushes before the swap.
    pub joinflush: bool,
    /// R23: a bit of a returning replica's map goes only after the replica flushed the block.
    pub mapflush: bool,
    /// R32: what a crash left unverified is taken from a member where it verifies before it is adopted as it is.
    pub adoptlast: bool,
    /// R20: what reconciling could read on no member is made an error on all but its source.
    pub unreadrec: bool,
    /// R33: repairs take the range lock.
    pub repairlock: bool,
    /// R35: a replica that knows a later epoch, another nonce or another lineage refuses Open.
    pub otherhistory: bool,
    /// R35: once one refused, all replicas must answer. Off, those that are there do.
    pub allanswer: bool,
    /// ADR 0011: a replica's copy of the record is durable before the generation or epoch that it names.
    pub copyfirst: bool,
    /// ADR 0011: a snapshot or growth ends only when every member's copy of the record says so.
    pub copyall: bool,
    /// R26: a member that was away for long is served from only after the record was read again.
    pub awayread: bool,
    /// R24: the joining replica takes over the maps of those still absent.
    pub mapcopy: bool,
    /// R24: only an epoch that names a replica a member ends its maps. Off, reading a map does.
    pub mapend: bool,
    /// R21: a map that was not kept from the start is void, not empty. `mapcopy` hides its lack: both are taken out.
    pub mapvoid: bool,
    /// R8: a swap without an answer is not taken for refused.
    pub unknown: bool,
    /// R12: under a live client nothing is served from lost caches.
    pub sameatt: bool,
    /// R16: replicas that failed a write leave the set.
    pub errwrite: bool,
    /// R27: a snapshot is cut with no write in flight.
    pub cutdrain: bool,
    /// R27: what a frozen layer holds is flushed.
    pub cutflush: bool,
    /// R27: a layer of a try that did not count is merged back, and never taken for a later try's.
    pub void: bool,
    /// R5: control requests are fenced like data.
    pub ctlfence: bool,
    /// R27: every member froze before the snapshot counts.
    pub cutall: bool,
    /// R28: a returning replica rebuilds the snapshots it missed.
    pub layered: bool,
    /// R29: no member of a group is cut before all are held.
    pub holdfirst: bool,
    /// R29: the group's record says that all members hold before any is asked to cut.
    pub cutclaim: bool,
    /// R29: a try is abandoned in the group's record before its snapshots are deleted.
    pub abandonfirst: bool,
    /// R29: a cut of a group counts only inside its unexpired hold.
    pub unbroken: bool,
    /// R6: a target that slept drains its input first. Off, it drops healthy replicas: a stall, no violation.
    pub tickgap: bool,
    /// Not a guard: [`crate::timers::LOG_COLD_MS`], shorter in simulations, where otherwise every region stays logged.
    pub log_cold_ms: u64,
    /// Not a guard: [`crate::timers::LOG_CLEAR_EVERY_MS`].
    pub log_clear_every_ms: u64,
    /// Not a guard: [`crate::timers::INTENT_LOG_REGIONS_MAX`].
    pub log_regions_max: usize,
    /// R13: copies take the range lock.
    pub reglock: bool,
}

impl Default for Guards {
    fn default() -> Self {
        Self {
            range: true,
            readlock: true,
            epochack: true,
            tell: true,
            mapinflight: true,
            mapdurable: true,
            ownlog: true,
            readrec: true,
            intent: true,
            recflush: true,
            onegen: true,
            genpersist: true,
            drain: true,
            lease: true,
            drift: true,
            walljump: true,
            serveall: true,
            leasewait: true,
            clearrule: true,
            clearseq: true,
            instance: true,
            loststicky: true,
            lostsrc: true,
            keepgood: true,
            removegood: true,
            joint: true,
            joinflush: true,
            mapflush: true,
            adoptlast: true,
            unreadrec: true,
            repairlock: true,
            otherhistory: true,
            allanswer: true,
            copyfirst: true,
            copyall: true,
            awayread: true,
            mapcopy: true,
            mapend: true,
            mapvoid: true,
            unknown: true,
            sameatt: true,
            errwrite: true,
            cutdrain: true,
            cutflush: true,
            void: true,
            ctlfence: true,
            cutall: true,
            layered: true,
            holdfirst: true,
            cutclaim: true,
            abandonfirst: true,
            unbroken: true,
            tickgap: true,
            log_cold_ms: crate::timers::LOG_COLD_MS,
            log_clear_every_ms: crate::timers::LOG_CLEAR_EVERY_MS,
            log_regions_max: crate::timers::INTENT_LOG_REGIONS_MAX,
            reglock: true,
        }
    }
}
