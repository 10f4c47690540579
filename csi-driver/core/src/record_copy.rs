//! The copy of a volume's record that each replica keeps beside it (ADR 0011): what is left when the record store is lost.
//!
//! A replica does not look into it, so that a later release's record passes through an earlier release's node whole.

use std::sync::Arc;

use crate::ids::{Generation, Lineage, RecordVersion};
use crate::record_store::Versioned;

/// Which record a copy is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CopyStamp {
    /// The record's lineage.
    pub lineage: Lineage,
    /// Its generation.
    pub generation: Generation,
    /// Its version in the store it came from.
    pub version: RecordVersion,
}

impl CopyStamp {
    /// Of a record.
    #[must_use]
    pub fn of(read: &Versioned) -> Self {
        Self { lineage: read.record.lineage, generation: read.record.generation, version: read.version }
    }

    /// Whether a copy of this stamp takes the place of `kept`. A lineage begins anew (R26); within one, a store that was
    /// rescued counts its versions anew, under a higher generation.
    #[must_use]
    pub fn replaces(&self, kept: Option<&Self>) -> bool {
        kept.is_none_or(|kept| self.lineage != kept.lineage || self.order() > kept.order())
    }

    /// What orders the copies of one lineage.
    #[must_use]
    pub fn order(&self) -> (Generation, RecordVersion) {
        (self.generation, self.version)
    }
}

/// A record as a replica keeps it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecordCopy {
    /// Which record it is.
    pub stamp: CopyStamp,
    /// The record in its JSON form.
    pub json: Arc<[u8]>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_copy_gives_way_to_a_later_one_of_its_lineage_and_to_any_of_another() {
        let stamp = |lineage, generation, version| CopyStamp {
            lineage: Lineage(lineage),
            generation: Generation(generation),
            version: RecordVersion(version),
        };
        let kept = stamp(1, 5, 9);
        assert!(kept.replaces(None));
        for (new, replaces) in [
            (stamp(1, 5, 10), true),
            (stamp(1, 5, 9), false),
            (stamp(1, 5, 8), false),
            (stamp(1, 6, 1), true),
            (stamp(1, 4, 90), false),
            (stamp(2, 4, 1), true),
        ] {
            assert_eq!(new.replaces(Some(&kept)), replaces, "{new:?}");
        }
    }
}
