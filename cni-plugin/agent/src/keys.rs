//! Which list (a file, or all objects of a kind) an object is from, in little room: there may be a hundred thousand objects, and a few
//! lists.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use hashbrown::HashTable;

/// A list of keys: what one reading of one file, or of one kind, found.
pub(crate) type ListId = u32;

/// Keys by list. A key is in force in at most one list.
#[derive(Default)]
pub(crate) struct Keys {
    lists: BTreeMap<ListId, List>,
    last: ListId,
    by_key: HashTable<Place>,
}

/// Keys one after the other, in one allocation.
#[derive(Default)]
struct List {
    text: String,
    /// Where each ends.
    ends: Vec<u32>,
    /// How many of them are in force here.
    in_force: usize,
}

/// A list whose keys were put and removed one by one is written anew when it has this many that are not in force, and as many as
/// are.
const SPARE_KEYS_MAX: usize = 1024;

#[derive(Clone, Copy, PartialEq, Eq)]
struct Place {
    list: ListId,
    index: u32,
}

impl List {
    fn push(&mut self, key: &str) -> u32 {
        let index = self.ends.len();
        self.text.push_str(key);
        self.ends.push(u32::try_from(self.text.len()).expect("a file is limited to some MiB"));
        u32::try_from(index).expect("a key has at least one byte")
    }

    fn get(&self, index: u32) -> &str {
        let index = index as usize;
        let start = index.checked_sub(1).map_or(0, |before| self.ends[before]);
        &self.text[start as usize..self.ends[index] as usize]
    }
}

fn hash(key: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    key.hash(&mut hasher);
    hasher.finish()
}

impl Keys {
    /// A new list, empty.
    pub(crate) fn open(&mut self) -> ListId {
        self.last = self.last.checked_add(1).expect("four billion readings of files");
        self.lists.insert(self.last, List::default());
        self.last
    }

    /// The list in which a key is in force.
    pub(crate) fn list_of(&self, key: &str) -> Option<ListId> {
        self.place_of(key).map(|place| place.list)
    }

    fn place_of(&self, key: &str) -> Option<Place> {
        self.by_key.find(hash(key), |place| self.get(*place) == key).copied()
    }

    /// Puts a key in force in a list, instead of where it was.
    pub(crate) fn put(&mut self, list: ListId, key: &str) {
        let lists = &mut self.lists;
        let place = self.by_key.find_mut(hash(key), |place| lists[&place.list].get(place.index) == key);
        if place.as_ref().is_some_and(|place| place.list == list) {
            return;
        }
        let Some(own) = lists.get_mut(&list) else { return };
        let now = Place { list, index: own.push(key) };
        own.in_force += 1;
        match place {
            Some(place) => {
                let before = std::mem::replace(place, now);
                if let Some(before) = lists.get_mut(&before.list) {
                    before.in_force -= 1;
                }
            }
            None => {
                let lists = &self.lists;
                self.by_key.insert_unique(hash(key), now, |place| hash(lists[&place.list].get(place.index)));
            }
        }
    }

    /// The keys that are in force in a list.
    pub(crate) fn of_list(&self, list: ListId) -> Vec<String> {
        let Some(own) = self.lists.get(&list) else { return Vec::new() };
        let all = (0..).take(own.ends.len()).map(|index| (index, own.get(index)));
        // A key that left the list and came back stands there twice.
        let is_in_force =
            |(index, key): &(u32, &str)| self.place_of(key) == Some(Place { list, index: *index });
        all.filter(is_in_force).map(|(_, key)| key.to_owned()).collect()
    }

    /// Forgets a list with the keys that are in force there.
    pub(crate) fn close(&mut self, list: ListId) {
        for key in self.of_list(list) {
            self.remove(&key);
        }
        self.lists.remove(&list);
    }

    /// Forgets a key. Returns whether it was in force.
    pub(crate) fn remove(&mut self, key: &str) -> bool {
        let lists = &self.lists;
        let is_it = |place: &Place| lists[&place.list].get(place.index) == key;
        let Ok(entry) = self.by_key.find_entry(hash(key), is_it) else { return false };
        let (place, _) = entry.remove();
        if let Some(list) = self.lists.get_mut(&place.list) {
            list.in_force -= 1;
        }
        true
    }

    /// The list, or one that replaces it if much of it is not in force any more.
    pub(crate) fn compact(&mut self, list: ListId) -> ListId {
        let is_sparse = |list: &List| list.ends.len() - list.in_force > list.in_force.max(SPARE_KEYS_MAX);
        if !self.lists.get(&list).is_some_and(is_sparse) {
            return list;
        }
        let new = self.open();
        self.take_over(list, new);
        new
    }

    /// Moves all keys of a list into another one.
    pub(crate) fn take_over(&mut self, from: ListId, into: ListId) {
        for key in self.of_list(from) {
            self.put(into, &key);
        }
        self.close(from);
    }

    /// Gives back the room that a list that is complete does not need. Returns its length.
    pub(crate) fn fit(&mut self, list: ListId) -> usize {
        self.lists.get_mut(&list).map_or(0, |list| {
            list.text.shrink_to_fit();
            list.ends.shrink_to_fit();
            list.ends.len()
        })
    }

    fn get(&self, place: Place) -> &str {
        self.lists[&place.list].get(place.index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_in_one_list_and_moves_to_the_one_that_it_was_put_into_last() {
        let mut keys = Keys::default();
        let (old, other) = (keys.open(), keys.open());
        for number in 0..1000 {
            keys.put(old, &format!("a{number}"));
            keys.put(other, &format!("b{number}"));
        }
        keys.put(old, "a7");
        assert_eq!((keys.fit(old), keys.list_of("a7"), keys.list_of("b7")), (1000, Some(old), Some(other)));
        assert_eq!(keys.list_of("a1000"), None);

        let new = keys.open();
        for number in 1..1000 {
            keys.put(new, &format!("a{number}"));
        }
        assert_eq!(keys.of_list(old), ["a0"]);
        assert_eq!(keys.of_list(new).len(), 999);
        keys.close(old);
        assert_eq!((keys.list_of("a0"), keys.list_of("a1")), (None, Some(new)));
        assert_eq!(keys.of_list(other).len(), 1000);
    }

    #[test]
    fn a_list_of_keys_that_come_and_go_stays_small() {
        let mut keys = Keys::default();
        let mut list = keys.open();
        for number in 0..100_000 {
            keys.put(list, &format!("a{number}"));
            if number >= 100 {
                assert!(keys.remove(&format!("a{}", number - 100)));
            }
            list = keys.compact(list);
        }
        assert_eq!(keys.of_list(list).len(), 100);
        assert!(keys.fit(list) <= 2 * SPARE_KEYS_MAX, "{}", keys.fit(list));
        assert!(!keys.remove("a5"), "it is gone");
        assert_eq!(keys.list_of("a99999"), Some(list));
    }
}
