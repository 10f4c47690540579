//! Labels as a sorted list: a B-tree node has room for eleven, and most objects and selectors have one or two.

use std::fmt;

use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::{Serialize, Serializer};

/// Labels of an object, sorted by key; each key is there once.
#[derive(Debug, Clone, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Labels(Vec<(String, String)>);

impl Labels {
    /// No labels.
    #[must_use]
    pub const fn new() -> Self {
        Self(Vec::new())
    }

    /// How many there are.
    #[must_use]
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether there is none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<&str> {
        let index = self.find(key).ok()?;
        Some(&self.0[index].1)
    }

    /// Sets a label. Returns the value that it had.
    pub fn insert(&mut self, key: String, value: String) -> Option<String> {
        match self.find(&key) {
            Ok(index) => Some(std::mem::replace(&mut self.0[index].1, value)),
            Err(index) => {
                self.0.insert(index, (key, value));
                None
            }
        }
    }

    /// All labels, sorted by key.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &str)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value.as_str()))
    }

    fn find(&self, key: &str) -> Result<usize, usize> {
        self.0.binary_search_by(|(own, _)| own.as_str().cmp(key))
    }
}

/// Of a key that is there twice, the last one counts, as in a JSON object.
impl FromIterator<(String, String)> for Labels {
    fn from_iter<I: IntoIterator<Item = (String, String)>>(labels: I) -> Self {
        let mut list: Vec<(String, String)> = labels.into_iter().collect();
        list.sort_by(|(a, _), (b, _)| a.cmp(b));
        list.dedup_by(|later, earlier| {
            let same = later.0 == earlier.0;
            if same {
                std::mem::swap(later, earlier);
            }
            same
        });
        list.shrink_to_fit();
        Self(list)
    }
}

impl<const N: usize> From<[(String, String); N]> for Labels {
    fn from(labels: [(String, String); N]) -> Self {
        labels.into_iter().collect()
    }
}

impl Serialize for Labels {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_map(self.iter())
    }
}

impl<'de> Deserialize<'de> for Labels {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Read;
        impl<'de> Visitor<'de> for Read {
            type Value = Labels;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a map of labels")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Labels, A::Error> {
                let mut list = Vec::new();
                while let Some(label) = map.next_entry()? {
                    list.push(label);
                }
                Ok(list.into_iter().collect())
            }
        }
        deserializer.deserialize_map(Read)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_are_sorted_and_of_a_key_that_is_there_twice_the_last_counts() {
        let labels: Labels =
            serde_json::from_str(r#"{"b": "1", "a": "2", "b": "3", "c": "4", "b": "5"}"#).unwrap();
        assert_eq!(labels.iter().collect::<Vec<_>>(), [("a", "2"), ("b", "5"), ("c", "4")]);
        assert_eq!((labels.get("b"), labels.get("d"), labels.len()), (Some("5"), None, 3));
        assert_eq!(serde_json::to_string(&labels).unwrap(), r#"{"a":"2","b":"5","c":"4"}"#);
        assert!(serde_json::from_str::<Labels>(r#"["a"]"#).is_err());
    }

    #[test]
    fn setting_a_label_keeps_the_order() {
        let mut labels = Labels::new();
        assert!(labels.is_empty());
        for (key, value) in [("b", "1"), ("a", "2"), ("c", "3")] {
            assert_eq!(labels.insert(key.to_owned(), value.to_owned()), None);
        }
        assert_eq!(labels.insert("b".to_owned(), "4".to_owned()), Some("1".to_owned()));
        assert_eq!(labels.iter().collect::<Vec<_>>(), [("a", "2"), ("b", "4"), ("c", "3")]);
    }
}
