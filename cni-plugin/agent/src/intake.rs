//! Objects that are wrong or too large: what of them is in force. The same for all sources.

use std::collections::{BTreeMap, BTreeSet};

use crate::objects::{Document, Object, ObjectKey, Oversized};

/// The objects of one origin that are wrong.
#[derive(Debug, Default)]
pub(crate) struct Wrong {
    /// Packed keys of those that are too large and never were good: something narrower is enforced.
    closed: BTreeSet<String>,
    /// What is wrong with each, as a sentence whose subject is the object.
    refused: BTreeMap<ObjectKey, String>,
}

/// What is to be done with a document.
pub(crate) enum Judged {
    /// The object is passed on.
    Good(ObjectKey, Object),
    /// It stays what it was.
    Kept(ObjectKey),
    /// There is no object.
    Nothing,
}

impl Wrong {
    /// Judges a document, and tells what is wrong with it. `is_there`: an object of this packed key is in force, from an earlier reading.
    pub(crate) fn judge(
        &mut self,
        document: Document,
        is_there: impl Fn(&str) -> bool,
    ) -> (Judged, Option<String>) {
        match document {
            Document::Object(key, object) => {
                self.forget(&key);
                (Judged::Good(key, object), None)
            }
            Document::Oversized(key, Oversized { closed, problem, effect }) => {
                let packed = key.packed();
                let was_good = !self.closed.contains(&packed) && is_there(&packed);
                let what = if was_good { "its last good state stays" } else { effect };
                let told = self.refuse(&key, format!("too large ({problem}); {what}"));
                if was_good {
                    return (Judged::Kept(key), Some(told));
                }
                // Anew each time: what it selects may have changed.
                self.closed.insert(packed);
                (Judged::Good(key, closed), Some(told))
            }
            Document::Other => (Judged::Nothing, None),
            Document::Invalid(None, problem) => (Judged::Nothing, Some(problem)),
            Document::Invalid(Some(key), problem) => {
                let packed = key.packed();
                let is_kept = is_there(&packed);
                let what = if !is_kept {
                    "it is ignored"
                } else if self.closed.contains(&packed) {
                    "what was too large of it stays closed"
                } else {
                    "its last good state stays"
                };
                let told = self.refuse(&key, format!("invalid ({problem}); {what}"));
                (if is_kept { Judged::Kept(key) } else { Judged::Nothing }, Some(told))
            }
        }
    }

    fn refuse(&mut self, key: &ObjectKey, what: String) -> String {
        let told = format!("{key} is {what}");
        self.refused.insert(key.clone(), what);
        told
    }

    /// The object is good, or gone.
    pub(crate) fn forget(&mut self, key: &ObjectKey) {
        if !self.closed.is_empty() {
            self.closed.remove(&key.packed());
        }
        self.refused.remove(key);
    }

    /// What is wrong with which object.
    pub(crate) fn refused(&self) -> &BTreeMap<ObjectKey, String> {
        &self.refused
    }

    /// Before all objects are judged anew.
    pub(crate) fn forget_refused(&mut self) {
        self.refused.clear();
    }

    /// After all objects were judged anew.
    pub(crate) fn retain_closed(&mut self, keep: impl Fn(&str) -> bool) {
        self.closed.retain(|key| keep(key));
    }
}
