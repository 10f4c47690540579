//! When the VXLAN device must not leave checksums to the hardware.
//!
//! No probe is made: what goes wrong happens in the network card or at the receiver, so it would take a partner on another node,
//! and would tell of that path only. What is known to be wrong is listed here instead, and the setting `off` is for the rest.

/// Before this version the kernel sent wrong checksums where addresses were translated with random ports before the
/// encapsulation (calico#3145, felix#2811; mended in 5.7).
const KERNEL_MENDED: (u32, u32) = (5, 7);
/// Drivers whose hardware takes VXLAN for its own only on some UDP ports, and breaks inner checksums on others: on vSphere
/// (calico#4727, calico#9433).
const DRIVERS: [&str; 1] = ["vmxnet3"];

/// What an operator decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ChecksumOffload {
    /// Off where it is known to be broken, else as the kernel has it.
    #[default]
    Auto,
    /// On.
    On,
    /// Off.
    Off,
}

impl ChecksumOffload {
    /// Whether it is to be on; `None`: as the kernel has it. `uplink` is the interface below the overlay.
    pub(crate) fn decide(self, uplink: &str) -> Option<bool> {
        match self {
            Self::On => Some(true),
            Self::Off => Some(false),
            Self::Auto => {
                let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
                let driver = std::fs::read_link(format!("/sys/class/net/{uplink}/device/driver")).ok();
                let driver = driver.as_deref().and_then(|path| path.file_name()?.to_str());
                is_broken(&release, driver).then_some(false)
            }
        }
    }
}

fn is_broken(release: &str, driver: Option<&str>) -> bool {
    let mut numbers = release.split(['.', '-']).map(|part| part.trim().parse::<u32>().ok());
    let version = numbers.next().flatten().zip(numbers.next().flatten());
    version.is_some_and(|version| version < KERNEL_MENDED)
        || driver.is_some_and(|driver| DRIVERS.contains(&driver))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn offload_is_off_on_kernels_and_drivers_that_are_known_to_be_broken() {
        for (release, driver, broken) in [
            ("5.6.19-generic\n", None, true),
            ("4.19.0-27-amd64", Some("virtio_net"), true),
            ("5.7.0", None, false),
            ("6.12.8+deb13", Some("virtio_net"), false),
            ("6.12.8", Some("vmxnet3"), true),
            ("strange", None, false),
        ] {
            assert_eq!(is_broken(release, driver), broken, "{release} {driver:?}");
        }
    }
}
