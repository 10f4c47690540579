//! What the runs went through: one counter per scenario of the replication reference, section (c).
//!
//! A counter is raised where the thing *happens* (a message swallowed, a swap applied late, a target killed within a
//! step), not where trouble is ordered. docs/simulator.md says which trouble makes which. The run's summary prints all
//! counters, and a test asserts that none is 0 over CI's share.

macro_rules! scenarios {
    ($($name:ident: $text:literal,)*) => {
        /// A scenario of section (c).
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
        pub enum Scenario {
            $($name,)*
        }

        impl Scenario {
            pub const ALL: &[Self] = &[$(Self::$name,)*];

            pub fn text(self) -> &'static str {
                match self {
                    $(Self::$name => $text,)*
                }
            }
        }
    };
}

scenarios! {
    // Clocks.
    DriftAtBound: "reads under clocks 1 % slow against 1 % fast",
    DriftPastBound: "reads under clocks that differ by more than the bound",
    TargetIdled: "a target that served had nothing to do for long and asked its replicas seldom",
    TargetPausedForMinutes: "a target slept for a minute or more",
    TargetPausedAtLeaseCheck: "a target slept with a read's data in hand",
    TargetPausedAtSwap: "a target slept with a swap on its way",
    TargetPausedAtEpoch: "a target slept with an Epoch on its way",
    ReplicaPausedForMinutes: "a replica slept for a minute or more",
    VmPausedForMinutes: "a node slept with its clock stopped for a minute or more",
    ClockJumpVoidedLeases: "a target was told of a clock that jumped while it served",
    // Network.
    OneWayCut: "a message met a cut that was open in the other direction",
    AnswerLostAfterApply: "a write was done and its answer lost",
    LateBytesOfOldSession: "a request of a session that was over arrived",
    ControlOutlivedSession: "a control request of a session that was over arrived in a later one",
    ControlOvertookData: "a control request arrived before data that was sent earlier",
    // Store.
    StoreAnswerLostApplied: "a swap was applied and its answer lost",
    StoreAnswerLostNotApplied: "a swap was lost",
    StoreAppliedLate: "a swap was applied after its caller had given up",
    StoreStaleRead: "a read of the record gave an old version",
    StoreUnrelatedWriter: "a swap was refused because an unrelated writer had moved the version",
    StoreDownTenMinutes: "the store was down for ten minutes",
    // Targets.
    TwoTargetsServe: "two targets believed to serve",
    SecondStart: "a target was started beside one of the same attachment",
    TargetDiedOpening: "a target died opening",
    TargetDiedSettling: "a target died settling",
    TargetDiedReconciling: "a target died reconciling",
    TargetDiedReadingMaps: "a target died while maps were read",
    TargetDiedCopying: "a target died while it copied to a returning replica",
    TargetDiedMerging: "a target died while maps were merged",
    TargetDiedJoinFlush: "a target died in the flush before a join",
    TargetDiedJoinSwap: "a target died in the swap of a join",
    TargetDiedJoinEpoch: "a target died in the Epoch after a join",
    ThreeTargetsDiedInARow: "three targets in a row died within a step",
    // Replicas.
    KilledWithIoLanding: "a replica was killed with writes on the way to its disk",
    PowerLossTornWrite: "a power loss left a part of a write",
    FailedFsync: "an fsync failed and lost what it should have kept",
    FullDisk: "a full disk refused a write",
    SlowDisk: "a slow disk kept an operation for more than a second",
    HungDisk: "a disk hung for longer than the I/O deadline",
    PowerLossOfAll: "every node lost power at once",
    PowerLossOfAllButOne: "every node but a partitioned one lost power or its processes",
    RebootWithinDeadline: "a replica lost power and was back before it was swapped out",
    // Chains.
    Hole11: "the holder of a map left and returned, the others died, the absent one joined from it",
    LeftAndReturnedTwice: "a replica left and returned twice",
    MapHolderDied: "the holder of a map died while it was read",
    SourceDiedMidCopy: "the source of a copy died during it",
    BackAfterThreeEpochs: "a replica with a log of its own came back three epochs later",
    FirstEpochLost: "an Epoch was lost on its way",
    // Groups.
    GroupHoldOver: "a member's hold was over when its group asked for the cut",
    CoordinatorDied: "a coordinator died with its group half cut",
    // Data.
    ReadWriteOverlap: "a read was asked for over a write in flight",
    HalfFailedRequest: "a write failed on one member and not on another",
    TrimCrashRead: "a block was trimmed, its replica lost power, the block was read",
    UnalignedWriteUnreconciled: "an unaligned write came while regions were unreconciled",
    FullIntentLog: "the intent log was full",
    // Rot.
    RotMet: "a read met a damaged block",
    RotInLoggedRegion: "a read met a damaged block in a logged region",
    TornBlockMet: "a read met a block that a crash had torn",
    FailingRead: "a read failed on a device",
    Misdirected: "a write landed on another block",
    Repaired: "a block was mended from another member",
    RepairMetWrite: "a write to a block waited while it was mended",
    Adopted: "a block that verified nowhere was taken as it was",
    MarkedBad: "a block that nobody could read was marked bad on a returning replica",
    ErrorNotStale: "a read of a block that verified nowhere was an error",
    // Fewer replicas.
    MemberTakenOut: "a member was taken out for good",
    ReplicaMoved: "a replica was rebuilt elsewhere, and another one taken out for it",
    // An operator.
    StoreRestored: "the store was restored from a backup",
    RestoreNoticed: "a record was found to be of another history",
    PromotedAfterRestore: "a replica of a restored volume was promoted",
    PromotedOffline: "a replica was promoted after the last member was lost",
    // A lost store.
    StoreLost: "the store was lost whole",
    RescueInDoubt: "a rescue was in doubt and waited",
    StoreRescued: "the store was rescued from the copies of the records",
    RescuedInDoubt: "the store was rescued although a member was missing",
}

/// How often each scenario happened.
#[derive(Debug, Clone, Default)]
pub struct Coverage {
    counts: Vec<u64>,
    /// Trouble is over: what the end of a run does to compare members is no scenario.
    closed: bool,
}

impl Coverage {
    pub fn saw(&mut self, scenario: Scenario) {
        if self.closed {
            return;
        }
        self.counts.resize(Scenario::ALL.len(), 0);
        self.counts[scenario as usize] += 1;
    }

    pub fn close(&mut self) {
        self.closed = true;
    }

    pub fn count(&self, scenario: Scenario) -> u64 {
        self.counts.get(scenario as usize).copied().unwrap_or(0)
    }

    pub fn add(&mut self, other: &Self) {
        self.counts.resize(Scenario::ALL.len(), 0);
        for (count, more) in self.counts.iter_mut().zip(&other.counts) {
            *count += more;
        }
    }

    /// Scenarios that never happened.
    pub fn missing(&self) -> Vec<Scenario> {
        Scenario::ALL.iter().copied().filter(|scenario| self.count(*scenario) == 0).collect()
    }

    pub fn print(&self) {
        for scenario in Scenario::ALL {
            eprintln!("{:>10}  {:?}: {}", self.count(*scenario), scenario, scenario.text());
        }
    }
}
