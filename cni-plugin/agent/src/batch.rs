//! What a source of objects tells the engine: a folder ([`crate::folder`]) or the API server ([`crate::kubernetes`]).

use std::collections::BTreeMap;
use std::time::Instant;

use holdfast_net_core::objects::ObjectChange;

use crate::objects::ObjectKey;

/// Changes passed on together.
pub(crate) const CHANGES_MAX: usize = 1024;
/// Batches that wait for the engine; then reading waits.
pub(crate) const BATCHES_MAX: usize = 8;

/// Some changes, in order.
#[derive(Debug)]
pub struct Batch {
    /// The changes.
    pub changes: Vec<ObjectChange>,
    /// With these, everything that the source said at some moment is passed on. Before the first such batch nothing may be
    /// concluded from the absence of objects.
    pub complete: bool,
    /// The source could be read: what is told is how it is. While it cannot, objects stay as they were.
    pub readable: bool,
    /// One sentence for each thing that is wrong. In parts of a reading before its end there are none.
    pub problems: Vec<String>,
    /// Those of them that are about one object, by its key. Only in a complete one.
    pub refused: BTreeMap<ObjectKey, String>,
    /// When the first of the changes was noticed.
    pub noticed: Instant,
}
