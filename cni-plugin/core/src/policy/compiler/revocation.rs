//! Whether a commit takes anything away from anybody: then every live connection is judged again.
//!
//! Promise: after a commit that forbids what was allowed, `revokes` is set. Not promised is the reverse, but a change that
//! only allows does not set it, since a new policy revision costs each connection one slow path.

use std::collections::BTreeSet;

use super::commit::{Move, Round, View};
use super::{Compiler, Membership};
use crate::ports::PortSet;

/// What a class allows a view; `None`: nothing.
type Allowed<'a> = Option<&'a PortSet>;

impl Compiler {
    pub(super) fn revokes(&self, round: &Round) -> bool {
        round.moves.iter().any(|moved| self.move_revokes(moved, round))
            || round.pairs_before.keys().any(|(of, class)| self.pair_revokes(*of, *class, round))
            || round.shifted.iter().any(|(from, to)| self.shift_revokes(*from, *to, round))
    }

    /// A pair of a class and an identity that were there before.
    fn pair_revokes(&self, of: Option<u32>, class: u32, round: &Round) -> bool {
        if round.new_classes.contains(&class) || of.is_some_and(|slot| round.new_identities.contains(&slot)) {
            return false;
        }
        let view = self.view_of(of);
        narrows(self.before(class, view, round), self.now(class, view))
    }

    /// Addresses that look otherwise than before, to the classes that tell it.
    fn shift_revokes(&self, from: View, to: View, round: &Round) -> bool {
        let mut classes: BTreeSet<u32> = BTreeSet::new();
        for slot in [from.exact, from.range, to.exact, to.range].into_iter().flatten() {
            classes.extend(self.identities.get(slot).into_iter().flat_map(|identity| &identity.classes));
            let changed = round.pairs_before.range((Some(slot), 0)..=(Some(slot), u32::MAX));
            classes.extend(changed.map(|((_, class), _)| *class));
        }
        classes.retain(|class| !round.new_classes.contains(class) && !round.ended_classes.contains(class));
        classes.into_iter().any(|class| narrows(self.before(class, from, round), self.now(class, to)))
    }

    fn move_revokes(&self, moved: &Move, round: &Round) -> bool {
        if moved.fresh {
            return false;
        }
        match (moved.before, moved.now) {
            (Membership::DenyAll, _) | (_, Membership::Open) => false,
            (_, Membership::DenyAll) => true,
            (Membership::Open, Membership::In(class)) => {
                // Anybody who is not named falls to what the class allows anybody.
                let all = PortSet::all();
                let pairs =
                    self.classes[class].pairs.values().map(|profile| &self.profiles[*profile].allowed);
                narrows(Some(&all), self.now(class, View::of_range(None)))
                    || pairs.into_iter().any(|p| *p != all)
            }
            (Membership::In(from), Membership::In(to)) => {
                let before = round.pairs_before.keys().filter(|(_, class)| *class == from).map(|(of, _)| *of);
                let pairs = self.classes[from].pairs.keys().chain(self.classes[to].pairs.keys()).copied();
                let of: BTreeSet<Option<u32>> = before.chain(pairs).chain([None]).collect();
                let stayed = of.into_iter().map(|of| (self.view_of(of), self.view_of(of)));
                // A peer may look otherwise since the same commit.
                let mut views = stayed.chain(round.shifted.iter().copied());
                views.any(|(was, is)| narrows(self.before(from, was, round), self.now(to, is)))
            }
        }
    }

    /// How addresses with an identity look.
    fn view_of(&self, of: Option<u32>) -> View {
        let Some(slot) = of else { return View::of_range(None) };
        let Some(identity) = self.identities.get(slot) else { return View::of_range(None) };
        if identity.key.is_of_range() {
            return View::of_range(of);
        }
        View { exact: of, range: self.find_identity(&identity.key.of_range()) }
    }

    fn before(&self, class: u32, view: View, round: &Round) -> Allowed<'_> {
        let pairs = self.classes.get(class).map(|class| &class.pairs);
        let of = |of: Option<u32>| match round.pairs_before.get(&(of, class)) {
            Some(before) => *before,
            None => pairs.and_then(|pairs| pairs.get(&of)).copied(),
        };
        self.first(view, of)
    }

    fn now(&self, class: u32, view: View) -> Allowed<'_> {
        let pairs = self.classes.get(class).map(|class| &class.pairs);
        self.first(view, |of| pairs.and_then(|pairs| pairs.get(&of)).copied())
    }

    /// The kernel's order: exact identity, range, anybody; the first pair that is found is final.
    fn first(&self, view: View, pair: impl Fn(Option<u32>) -> Option<u32>) -> Allowed<'_> {
        let named = [view.exact, view.range].into_iter().flatten().find_map(|slot| pair(Some(slot)));
        named.or_else(|| pair(None)).map(|profile| &self.profiles[profile].allowed)
    }
}

fn narrows(before: Allowed<'_>, now: Allowed<'_>) -> bool {
    match (before, now) {
        (None, _) => false,
        (Some(before), None) => !before.is_empty(),
        (Some(before), Some(now)) => !before.difference(now).is_empty(),
    }
}
