//! Which file an object is from, in little room: there may be a hundred thousand objects, and a few files.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};

use hashbrown::HashTable;

/// A list of keys: what one reading of one file found.
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
}

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
        self.by_key.find(hash(key), |place| self.get(*place) == key).map(|place| place.list)
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
        match place {
            Some(place) => *place = now,
            None => {
                let lists = &self.lists;
                self.by_key.insert_unique(hash(key), now, |place| hash(lists[&place.list].get(place.index)));
            }
        }
    }

    /// The keys that are in force in a list.
    pub(crate) fn of_list(&self, list: ListId) -> Vec<String> {
        let Some(own) = self.lists.get(&list) else { return Vec::new() };
        let all = (0..).take(own.ends.len()).map(|index| own.get(index));
        all.filter(|key| self.list_of(key) == Some(list)).map(str::to_owned).collect()
    }

    /// Forgets a list with the keys that are in force there.
    pub(crate) fn close(&mut self, list: ListId) {
        for key in self.of_list(list) {
            let lists = &self.lists;
            let is_it = |place: &Place| lists[&place.list].get(place.index) == key;
            if let Ok(entry) = self.by_key.find_entry(hash(&key), is_it) {
                entry.remove();
            }
        }
        self.lists.remove(&list);
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
}
