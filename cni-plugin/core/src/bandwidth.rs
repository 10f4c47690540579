//! Limits of an attachment's rate, as the capability `bandwidth` asks for them.

use serde::{Deserialize, Serialize};

use crate::plan::HOST_IFNAME_PREFIX;

/// Every interface that delays what a pod sends starts with this, so that garbage collection finds them.
pub const IFB_PREFIX: &str = "hfb";
/// How long a packet may wait for its turn beyond what the burst holds, in milliseconds; then it is dropped, which is what tells TCP to
/// slow down.
const WAIT_MAX_MS: u64 = 25;
/// Bytes of an Ethernet header, which counts.
const ETHERNET_BYTES: u32 = 14;

/// The limits of an attachment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Bandwidth {
    /// To the pod.
    pub ingress: Option<Rate>,
    /// From the pod.
    pub egress: Option<Rate>,
}

impl Bandwidth {
    /// Says which limit can never let a packet of `mtu` bytes through.
    #[must_use]
    pub fn too_small_for(&self, mtu: u32) -> Option<String> {
        let least = u64::from(mtu + ETHERNET_BYTES) * 8;
        let of = |name: &str, rate: Option<Rate>| {
            let burst = rate?.burst_bits;
            (burst < least).then(|| {
                format!("bandwidth.{name} = {burst} is less than one packet: give at least {least} bits")
            })
        };
        of("ingressBurst", self.ingress).or(of("egressBurst", self.egress))
    }
}

/// A rate with its burst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// Bits per second, at least 8.
    pub bits_per_s: u64,
    /// Bits that may be sent at once after a pause; below 2^35.
    pub burst_bits: u64,
}

impl Rate {
    /// The limits of what the kernel can count.
    #[must_use]
    pub fn new(bits_per_s: u64, burst_bits: u64) -> Option<Self> {
        let fits = bits_per_s >= 8 && burst_bits >= 8 && u32::try_from(burst_bits / 8).is_ok();
        fits.then_some(Self { bits_per_s, burst_bits })
    }

    /// Bytes per second.
    #[must_use]
    pub fn bytes_per_s(&self) -> u64 {
        self.bits_per_s / 8
    }

    /// Bytes.
    #[must_use]
    pub fn burst_bytes(&self) -> u32 {
        u32::try_from(self.burst_bits / 8).unwrap_or(u32::MAX)
    }

    /// Bytes that wait at most.
    #[must_use]
    pub fn queue_bytes(&self) -> u32 {
        let waiting = self.bytes_per_s().saturating_mul(WAIT_MAX_MS) / 1000;
        u32::try_from(waiting).unwrap_or(u32::MAX).saturating_add(self.burst_bytes())
    }
}

/// The interface through which the traffic of the pod behind `host_ifname` goes for its limit; `None` for a name that is none of ours.
pub fn ifb_name(host_ifname: &str) -> Option<String> {
    host_ifname.strip_prefix(HOST_IFNAME_PREFIX).map(|rest| format!("{IFB_PREFIX}{rest}"))
}

/// The inverse of [`ifb_name`].
pub fn host_of_ifb(ifb: &str) -> Option<String> {
    ifb.strip_prefix(IFB_PREFIX).map(|rest| format!("{HOST_IFNAME_PREFIX}{rest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_is_counted_in_bytes_and_bounded_by_what_the_kernel_counts() {
        let rate = Rate::new(8_000_000, 800_000).unwrap();
        assert_eq!(
            (rate.bytes_per_s(), rate.burst_bytes(), rate.queue_bytes()),
            (1_000_000, 100_000, 125_000)
        );
        assert_eq!(Rate::new(7, 800), None);
        assert_eq!(Rate::new(8, 1 << 35), None);
        let most = Rate::new(u64::MAX, (1 << 35) - 1).unwrap();
        assert_eq!((most.burst_bytes(), most.queue_bytes()), (u32::MAX, u32::MAX));
    }

    #[test]
    fn a_burst_must_hold_a_packet() {
        let limits = |ingress, egress| Bandwidth {
            ingress: Rate::new(1_000_000, ingress),
            egress: Rate::new(1_000_000, egress),
        };
        assert_eq!(limits(1464 * 8, 1464 * 8).too_small_for(1450), None);
        let why = limits(1464 * 8, 1463 * 8).too_small_for(1450).unwrap();
        assert!(why.contains("egressBurst = 11704") && why.contains("11712"), "{why}");
    }

    #[test]
    fn names_lead_to_each_other() {
        let host = crate::plan::host_ifname("c", "eth0");
        let ifb = ifb_name(&host).unwrap();
        assert!(ifb.len() <= crate::plan::IFNAME_LEN_MAX);
        assert_eq!(host_of_ifb(&ifb), Some(host));
        assert_eq!(ifb_name("eth0"), None);
    }
}
