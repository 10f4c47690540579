//! Identifiers and counters. Each is a type of its own, so that none can be passed for another.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Bytes of a block: the unit of I/O, of checksums and of dirty maps.
pub const BLOCK_BYTES: u64 = 4096;
/// Bytes of a region: the unit of the intent log.
pub const REGION_BYTES: u64 = 1 << 20;
/// Blocks in one region.
pub const BLOCKS_PER_REGION: u64 = REGION_BYTES / BLOCK_BYTES;

/// A text that is not 32 lower-case hexadecimal digits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("\"{0}\" is not an id: an id is 32 lower-case hexadecimal digits")]
pub struct InvalidId(pub String);

macro_rules! random_id {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub u128);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{:032x}", self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({:032x})"), self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;

            fn from_str(text: &str) -> Result<Self, InvalidId> {
                let digits = text.bytes().all(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(&b));
                if text.len() != 32 || !digits {
                    return Err(InvalidId(text.to_owned()));
                }
                u128::from_str_radix(text, 16).map(Self).map_err(|_| InvalidId(text.to_owned()))
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                serializer.collect_str(self)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                let text = String::deserialize(deserializer)?;
                text.parse().map_err(serde::de::Error::custom)
            }
        }
    };
}

random_id!(
    /// A volume. Random, never reused (R34).
    VolumeId
);
random_id!(
    /// One full copy of a volume on one node. Random, never reused (R34).
    ReplicaId
);
random_id!(
    /// One start of a target process (R1).
    TargetId
);
random_id!(
    /// A volume's history; a forced promotion starts a new one (R26).
    Lineage
);
random_id!(
    /// One snapshot of one volume. Random, never reused (R34).
    SnapshotId
);
random_id!(
    /// A group of snapshots of several volumes, all of one instant. Random, never reused.
    GroupId
);
random_id!(
    /// Makes one volume's key from its secret; drawn when the volume is made.
    Salt
);
random_id!(
    /// Tells whether a key is an encrypted volume's; made of the key.
    KeyCheck
);
random_id!(
    /// All connections of one target start to one replica; the NBD export name carries it.
    SessionToken
);

macro_rules! counter {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Default, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(pub u64);

        impl $name {
            /// The next one. Panics at the end of the range, which no volume reaches.
            #[must_use]
            pub fn next(self) -> Self {
                Self(self.0.checked_add(1).expect(concat!(stringify!($name), " overflow")))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.fmt(f)
            }
        }
    };
}

counter!(
    /// Number of the target's start, +1 at every start of a target process; 0 is "never started" (R1).
    Generation
);
counter!(
    /// Number of the client, +1 at each publish to a new one (R1).
    Attachment
);
counter!(
    /// A record's version in its store, for compare-and-swap; it grows with each change.
    RecordVersion
);

/// A version of the in-sync set. The nonce tells two histories with one number apart (R35).
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Epoch {
    /// +1 at each change of the in-sync set.
    pub number: u64,
    /// Drawn at random with each change.
    pub nonce: u64,
}

/// A node's name, as Kubernetes spells it (a DNS subdomain, at most 253 bytes).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct NodeName(pub String);

impl fmt::Display for NodeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Index of a region within a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Region(pub u32);

/// Index of a block within a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Block(pub u64);

impl Block {
    /// The region that holds the block.
    #[must_use]
    pub fn region(self) -> Region {
        Region(u32::try_from(self.0 / BLOCKS_PER_REGION).expect("volumes end below 2^32 regions"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn id_survives_its_text_form_and_refuses_anything_else() {
        let id = VolumeId(0xab);
        assert_eq!(id.to_string().parse::<VolumeId>(), Ok(id));
        for text in
            ["", "AB", "../../etc", "000000000000000000000000000000AB", "+0000000000000000000000000000ab1"]
        {
            assert!(text.parse::<VolumeId>().is_err(), "{text}");
        }
    }
}
