//! The copies of records that replicas keep (ADR 0011): from a record, to the wire, and back.

use holdfast_proto::storage as pb;
use holdfast_storage_core::ids::{Generation, RecordVersion};
use holdfast_storage_core::record::{RECORD_FORMAT, VolumeRecord};
use holdfast_storage_core::record_copy::{CopyStamp, RecordCopy};
use holdfast_storage_core::record_store::Versioned;
use holdfast_storage_core::rescue::FoundCopy;
use serde::Deserialize;
use tonic::Status;

use crate::registry_wire::record_to_json;

/// A record in the form in which a replica keeps it; none: it has no such form, and nothing is kept of it.
#[must_use]
pub fn copy_of(record: &Versioned) -> Option<RecordCopy> {
    match record_to_json(&record.record) {
        Ok(json) => Some(RecordCopy { stamp: CopyStamp::of(record), json: json.into() }),
        Err(error) => {
            tracing::error!(volume = %record.record.volume_id, %error, "no copy of the record is kept");
            None
        }
    }
}

/// A copy as it travels.
#[must_use]
pub fn to_wire(copy: &RecordCopy) -> pb::RecordCopy {
    pb::RecordCopy {
        lineage: copy.stamp.lineage.to_string(),
        generation: copy.stamp.generation.0,
        version: copy.stamp.version.0,
        json: copy.json.to_vec(),
    }
}

/// A copy that came over the wire. Its JSON is not looked into: it may be of a later release.
///
/// # Errors
/// INVALID_ARGUMENT: the lineage is no id.
pub fn from_wire(copy: pb::RecordCopy) -> Result<RecordCopy, Status> {
    let lineage =
        copy.lineage.parse().map_err(|error| Status::invalid_argument(format!("record.lineage: {error}")))?;
    let (generation, version) = (Generation(copy.generation), RecordVersion(copy.version));
    Ok(RecordCopy { stamp: CopyStamp { lineage, generation, version }, json: copy.json.into() })
}

/// The record in a copy.
#[must_use]
pub fn read(copy: &RecordCopy) -> FoundCopy {
    #[derive(Deserialize)]
    struct Shape {
        format: u32,
    }
    // The format first: of a later one nothing else need be as it is here.
    let record = match serde_json::from_slice::<Shape>(&copy.json) {
        Ok(shape) if shape.format > RECORD_FORMAT => return FoundCopy::Later(shape.format),
        Ok(_) => serde_json::from_slice::<VolumeRecord>(&copy.json),
        Err(error) => Err(error),
    };
    let read = match record {
        Ok(record) => Versioned { version: copy.stamp.version, record },
        Err(error) => return FoundCopy::Unreadable(format!("it holds no record: {error}")),
    };
    if CopyStamp::of(&read) != copy.stamp {
        return FoundCopy::Unreadable("it says of itself what its record does not say".to_owned());
    }
    FoundCopy::Record(Box::new(read))
}

#[cfg(test)]
mod tests {
    use holdfast_storage_core::ids::{Lineage, NodeName, ReplicaId, VolumeId};
    use holdfast_storage_core::record::VolumeParams;
    use holdfast_storage_core::transitions::{self, NewVolume};

    use super::*;

    fn mk_read() -> Versioned {
        let record = transitions::create(NewVolume {
            volume_id: VolumeId(7),
            name: "data".to_owned(),
            lineage: Lineage(9),
            size_bytes: 1 << 20,
            epoch_nonce: 5,
            replicas: vec![(ReplicaId(1), NodeName("a".to_owned()))],
            params: VolumeParams::new(1, "ext4"),
            encryption: None,
            source: None,
        });
        Versioned { version: RecordVersion(4), record }
    }

    #[test]
    fn a_record_survives_its_copy() {
        let read_first = mk_read();
        let copy = copy_of(&read_first).unwrap();
        let travelled = from_wire(to_wire(&copy)).unwrap();
        assert_eq!(travelled, copy);
        let FoundCopy::Record(found) = read(&travelled) else { panic!("unreadable") };
        assert_eq!(*found, read_first);
    }

    #[test]
    fn a_later_format_is_told_from_garbage_whatever_its_shape_and_a_false_stamp_from_both() {
        let mut copy = copy_of(&mk_read()).unwrap();
        copy.json = b"{\"format\":99,\"lineage\":[\"something\",\"new\"]}".as_slice().into();
        assert!(matches!(read(&copy), FoundCopy::Later(99)));
        copy.json = b"{\"format\":1}".as_slice().into();
        assert!(matches!(read(&copy), FoundCopy::Unreadable(_)));
        let mut copy = copy_of(&mk_read()).unwrap();
        copy.stamp.generation = Generation(8);
        assert!(matches!(read(&copy), FoundCopy::Unreadable(_)));
    }
}
