//! Parameters that a volume may be given at its creation and anew later: ControllerModifyVolume's keys.
//!
//! Amounts are written as Kubernetes writes quantities: `500`, `2k`, `100Mi`, `1.5Gi`.

use std::collections::HashMap;

use holdfast_storage_core::record::VolumeParams;
use tonic::Status;

use crate::fixed_params::{self, shown};
use crate::volume_request::REPLICAS_MAX;

/// Fewer operations per second would look like a device that hangs.
pub const IOPS_MIN: u64 = 10;
/// Fewer bytes per second would keep one large request for longer than anybody waits.
pub const BYTES_PER_S_MIN: u64 = 1 << 20;
/// A pass of the scrub takes longer than a minute on all but the smallest volumes.
pub const SCRUB_INTERVAL_S_MIN: u64 = 60;
/// What rots for longer than a year is as good as never scrubbed.
pub const SCRUB_INTERVAL_S_MAX: u64 = 366 * 24 * 3_600;
/// More than any device gives.
const LIMIT_MAX: u64 = 1 << 50;
/// What may be changed, for a sentence.
pub(crate) const KNOWN: &str = "replicas, minInSync, iopsLimit, bandwidthLimit, scrubInterval, resyncRate";

/// What is asked for; what is not named stays as it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Changes {
    /// Wanted number of replicas.
    pub replicas: Option<u32>,
    /// Below this many members I/O waits.
    pub min_in_sync: Option<u32>,
    /// Operations per second; 0: no limit.
    pub iops: Option<u64>,
    /// Bytes per second; 0: no limit.
    pub bytes_per_s: Option<u64>,
    /// Seconds between the beginnings of two passes of the scrub; 0: never.
    pub scrub_interval_s: Option<u64>,
    /// Bytes per second that are copied to returning replicas; 0: as fast as clients are not disturbed.
    pub resync_bytes_per_s: Option<u64>,
}

impl Changes {
    /// Reads mutable_parameters; no key is ignored.
    ///
    /// # Errors
    /// INVALID_ARGUMENT naming the key.
    pub fn parse(parameters: &HashMap<String, String>) -> Result<Self, Status> {
        let field = "mutable_parameters";
        let mut changes = Self::default();
        // In order, so that of several mistakes always the same one is reported.
        let mut sorted: Vec<_> = parameters.iter().collect();
        sorted.sort();
        for (key, value) in sorted {
            if !changes.take(field, key, value)? {
                let shown: String = key.chars().take(64).collect();
                let what = if fixed_params::KEYS.contains(&key.as_str()) {
                    "cannot be changed"
                } else {
                    "is unknown"
                };
                return Err(Status::invalid_argument(format!(
                    "{field}: key \"{shown}\" {what}; what can be changed is {KNOWN}"
                )));
            }
        }
        Ok(changes)
    }

    /// Takes a key in if it is one of these; tells whether it is.
    ///
    /// # Errors
    /// INVALID_ARGUMENT naming the key, for a value that it cannot have.
    pub fn take(&mut self, field: &str, key: &str, value: &str) -> Result<bool, Status> {
        match key {
            "replicas" => self.replicas = Some(parse_count(field, key, value)?),
            "minInSync" => self.min_in_sync = Some(parse_count(field, key, value)?),
            "iopsLimit" => self.iops = Some(parse_limit(field, key, value, IOPS_MIN)?),
            "bandwidthLimit" => self.bytes_per_s = Some(parse_limit(field, key, value, BYTES_PER_S_MIN)?),
            "scrubInterval" => self.scrub_interval_s = Some(parse_interval(field, key, value)?),
            "resyncRate" => self.resync_bytes_per_s = Some(parse_limit(field, key, value, BYTES_PER_S_MIN)?),
            _ => return Ok(false),
        }
        Ok(true)
    }

    /// The parameters with the changes in them.
    ///
    /// # Errors
    /// INVALID_ARGUMENT where they contradict each other.
    pub fn apply(&self, field: &str, params: &VolumeParams) -> Result<VolumeParams, Status> {
        let mut changed = params.clone();
        changed.replicas = self.replicas.unwrap_or(params.replicas);
        changed.min_in_sync = self.min_in_sync.unwrap_or(params.min_in_sync);
        changed.limits.iops = self.iops.unwrap_or(params.limits.iops);
        changed.limits.bytes_per_s = self.bytes_per_s.unwrap_or(params.limits.bytes_per_s);
        changed.background.scrub_interval_s = self.scrub_interval_s.or(params.background.scrub_interval_s);
        changed.background.resync_bytes_per_s =
            self.resync_bytes_per_s.unwrap_or(params.background.resync_bytes_per_s);
        if changed.min_in_sync > changed.replicas {
            return Err(Status::invalid_argument(format!(
                "{field}[minInSync] is {}, more than the {} replicas: such a volume could never be written",
                changed.min_in_sync, changed.replicas
            )));
        }
        Ok(changed)
    }
}

fn parse_count(field: &str, key: &str, value: &str) -> Result<u32, Status> {
    match value.parse() {
        Ok(count) if (1..=REPLICAS_MAX).contains(&count) => Ok(count),
        _ => Err(Status::invalid_argument(format!(
            "{field}[{key}] is \"{}\"; it must be a number from 1 to {REPLICAS_MAX}",
            shown(value)
        ))),
    }
}

fn parse_limit(field: &str, key: &str, value: &str, least: u64) -> Result<u64, Status> {
    match parse_quantity(value) {
        Some(limit) if limit == 0 || (least..=LIMIT_MAX).contains(&limit) => Ok(limit),
        _ => Err(Status::invalid_argument(format!(
            "{field}[{key}] is \"{}\"; it must be 0, for no limit, or a quantity per second from {least} to {LIMIT_MAX}",
            shown(value)
        ))),
    }
}

fn parse_interval(field: &str, key: &str, value: &str) -> Result<u64, Status> {
    match parse_seconds(value) {
        Some(0) => Ok(0),
        Some(seconds) if (SCRUB_INTERVAL_S_MIN..=SCRUB_INTERVAL_S_MAX).contains(&seconds) => Ok(seconds),
        _ => Err(Status::invalid_argument(format!(
            "{field}[{key}] is \"{}\"; it must be 0 or \"off\", for never, or a duration from 1m to 366d such as 12h or 7d",
            shown(value)
        ))),
    }
}

/// Whole numbers with units, from days to seconds: `7d`, `1d12h`, `90m`. `0` and `off` are none.
fn parse_seconds(text: &str) -> Option<u64> {
    if matches!(text, "0" | "off") {
        return Some(0);
    }
    let (mut rest, mut seconds, mut unit_before) = (text, 0_u64, u64::MAX);
    while !rest.is_empty() {
        let end = rest.find(|c: char| !c.is_ascii_digit())?;
        let number: u64 = rest[..end].parse().ok()?;
        let unit = match rest.as_bytes()[end] {
            b'd' => 24 * 3_600,
            b'h' => 3_600,
            b'm' => 60,
            b's' => 1,
            _ => return None,
        };
        if unit >= unit_before {
            return None;
        }
        seconds = number.checked_mul(unit)?.checked_add(seconds)?;
        (rest, unit_before) = (&rest[end + 1..], unit);
    }
    (unit_before < u64::MAX).then_some(seconds)
}

/// A quantity as Kubernetes writes it (its API conventions, "Quantities"), rounded up to a whole number: digits, perhaps a
/// point and more digits, and a suffix. Signs, exponents and parts of one (`m`, `u`, `n`) have no meaning here.
fn parse_quantity(text: &str) -> Option<u64> {
    let (number, unit) =
        text.split_at(text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len()));
    let unit: u128 = match unit {
        "" => 1,
        "k" => 1_000,
        "M" => 1_000_000,
        "G" => 1_000_000_000,
        "T" => 1_000_000_000_000,
        "Ki" => 1 << 10,
        "Mi" => 1 << 20,
        "Gi" => 1 << 30,
        "Ti" => 1 << 40,
        _ => return None,
    };
    let (whole, part) = number.split_once('.').unwrap_or((number, ""));
    // Longer ones have no meaning, and do not fit.
    if (whole.is_empty() && part.is_empty()) || whole.len() > 18 || part.len() > 9 {
        return None;
    }
    let digits = |digits: &str| if digits.is_empty() { Some(0) } else { digits.parse::<u128>().ok() };
    let scale = 10_u128.pow(u32::try_from(part.len()).ok()?);
    let parts = digits(whole)? * scale + digits(part)?;
    u64::try_from((parts * unit).div_ceil(scale)).ok()
}

#[cfg(test)]
mod tests {
    use holdfast_storage_core::io_limits::IoLimits;
    use tonic::Code;

    use super::*;

    fn mk_params() -> VolumeParams {
        let limits = IoLimits { iops: 0, bytes_per_s: 1 << 30 };
        VolumeParams { min_in_sync: 2, limits, ..VolumeParams::new(3, "ext4") }
    }

    fn mk_map(pairs: &[(&str, &str)]) -> HashMap<String, String> {
        pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
    }

    #[test]
    fn quantities_are_those_of_kubernetes_and_whole() {
        for (text, value) in [
            ("0", Some(0)),
            ("500", Some(500)),
            ("2k", Some(2_000)),
            ("100Mi", Some(100 << 20)),
            ("1.5Gi", Some(3 << 29)),
            (".5k", Some(500)),
            ("1.0001k", Some(1_001)),
            ("1Ti", Some(1 << 40)),
            ("", None),
            (".", None),
            ("k", None),
            ("-1", None),
            ("1 k", None),
            ("1.2.3", None),
            ("1m", None),
            ("1Zi", None),
            ("99999999999999999999", None),
            ("999999999999999999Ti", None),
        ] {
            assert_eq!(parse_quantity(text), value, "{text}");
        }
    }

    #[test]
    fn durations_are_whole_numbers_with_units_from_the_longest_to_the_shortest() {
        for (text, value) in [
            ("0", Some(0)),
            ("off", Some(0)),
            ("90s", Some(90)),
            ("12h", Some(43_200)),
            ("7d", Some(604_800)),
            ("1d12h30m", Some(131_400)),
            ("", None),
            ("7", None),
            ("d", None),
            ("1h1h", None),
            ("1m1h", None),
            ("1.5h", None),
            ("-1h", None),
            ("1 h", None),
            ("1w", None),
            ("1ü", None),
            ("99999999999999999999s", None),
            ("999999999999999999d", None),
        ] {
            assert_eq!(parse_seconds(text), value, "{text}");
        }
    }

    #[test]
    fn the_pace_of_background_work_is_set_and_what_is_not_named_of_it_stays() {
        let asked = mk_map(&[("scrubInterval", "12h"), ("resyncRate", "20Mi")]);
        let params = Changes::parse(&asked).unwrap().apply("mutable_parameters", &mk_params()).unwrap();
        assert_eq!(params.background.scrub_every_ms(), Some(12 * 3_600_000));
        assert_eq!(params.background.resync_bytes_per_s, 20 << 20);
        let asked = mk_map(&[("scrubInterval", "off")]);
        let params = Changes::parse(&asked).unwrap().apply("mutable_parameters", &params).unwrap();
        assert_eq!(params.background.scrub_every_ms(), None);
        assert_eq!(params.background.resync_bytes_per_s, 20 << 20);
    }

    #[test]
    fn what_is_not_named_stays_and_zero_lifts_a_limit() {
        let asked = mk_map(&[("iopsLimit", "2k"), ("bandwidthLimit", "0"), ("replicas", "2")]);
        let changed = Changes::parse(&asked).unwrap().apply("mutable_parameters", &mk_params()).unwrap();
        let limits = IoLimits { iops: 2_000, bytes_per_s: 0 };
        assert_eq!(changed, VolumeParams { replicas: 2, limits, ..mk_params() });
        let nothing = Changes::parse(&HashMap::new()).unwrap();
        assert_eq!(nothing.apply("mutable_parameters", &mk_params()).unwrap(), mk_params());
    }

    #[test]
    fn what_cannot_be_changed_or_is_unknown_or_out_of_bounds_is_named() {
        for (key, value, named) in [
            ("fsType", "xfs", "\"fsType\" cannot be changed"),
            ("zones", "required", "\"zones\" cannot be changed"),
            ("zone", "a", "\"zone\" is unknown"),
            ("", "a", "\"\" is unknown"),
            ("iopsLimit", "9", "iopsLimit"),
            ("iopsLimit", "fast", "iopsLimit"),
            ("bandwidthLimit", "1k", "bandwidthLimit"),
            ("bandwidthLimit", "2000Ti", "bandwidthLimit"),
            ("replicas", "9", "replicas"),
            ("minInSync", "0", "minInSync"),
            ("scrubInterval", "59s", "scrubInterval"),
            ("scrubInterval", "367d", "scrubInterval"),
            ("scrubInterval", "weekly", "scrubInterval"),
            ("resyncRate", "1k", "resyncRate"),
            ("resyncRate", "fast", "resyncRate"),
        ] {
            let status = Changes::parse(&mk_map(&[(key, value)])).unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument);
            assert!(status.message().contains(named), "{status}");
        }
        let one = Changes::parse(&mk_map(&[("replicas", "1")])).unwrap();
        let status = one.apply("mutable_parameters", &mk_params()).unwrap_err();
        assert!(status.message().contains("mutable_parameters[minInSync]"), "{status}");
    }
}
