//! What kubelet keeps of our volumes on a node that died with them: when it comes back, nobody is there whom kubelet could ask to
//! unstage them, and the folders would stay for ever.
//!
//! ```text
//! pods/UID/volumes/kubernetes.io~csi/PV/{vol_data.json, mount/}
//! plugins/kubernetes.io/csi/DRIVER/HASH/{vol_data.json, globalmount/}
//! plugins/kubernetes.io/csi/volumeDevices/PV/{data/vol_data.json, staging/, publish/, dev/}
//! ```
//!
//! Only folders that are empty, kubelet's note, links and empty files go: whatever else lies there is somebody's data. Nothing that is
//! mounted is entered.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use holdfast_service::DRIVER_NAME as DRIVER;
use serde_json::Value;

use crate::uninstall::{Sweep, names};

/// Kubelet's note of which driver a volume is of.
const NOTE: &str = "vol_data.json";

/// Removes them below kubelet's folder.
pub fn sweep_kubelet(dir: &Path, sweep: &mut Sweep) {
    let csi = dir.join("plugins/kubernetes.io/csi");
    clear(&csi.join(DRIVER), sweep);
    let mut devices = Vec::new();
    for name in names(&csi.join("volumeDevices")) {
        let volume = csi.join("volumeDevices").join(&name);
        if is_ours(&volume.join("data")) {
            clear(&volume, sweep);
            devices.push(name);
        }
    }
    for pod in names(&dir.join("pods")).iter().map(|pod| dir.join("pods").join(pod)) {
        let volumes = pod.join("volumes/kubernetes.io~csi");
        for volume in names(&volumes).iter().map(|name| volumes.join(name)).filter(|volume| is_ours(volume)) {
            clear(&volume, sweep);
        }
        let links = pod.join("volumeDevices/kubernetes.io~csi");
        for link in devices.iter().map(|name| links.join(name)).filter(|link| link.is_symlink()) {
            sweep.note(&link, fs::remove_file(&link));
        }
    }
}

/// Whether kubelet's note in `dir` names our driver.
fn is_ours(dir: &Path) -> bool {
    let note = fs::read(dir.join(NOTE)).ok().and_then(|text| serde_json::from_slice::<Value>(&text).ok());
    note.is_some_and(|note| note["driverName"] == DRIVER)
}

/// Removes a tree of kubelet's, as far as it holds nothing; the note goes last, so that a cut-off removal is found again.
fn clear(dir: &Path, sweep: &mut Sweep) {
    let Ok(own) = fs::symlink_metadata(dir) else { return };
    let (notes, others): (Vec<String>, Vec<String>) =
        names(dir).into_iter().partition(|name| name == NOTE || name == "data");
    for path in others.iter().map(|name| dir.join(name)) {
        clear_entry(&path, own.dev(), sweep);
    }
    if names(dir).len() == notes.len() {
        notes.iter().for_each(|name| clear_entry(&dir.join(name), own.dev(), sweep));
    }
    sweep.folder(Some(dir));
}

fn clear_entry(path: &PathBuf, device: u64, sweep: &mut Sweep) {
    let Ok(found) = fs::symlink_metadata(path) else { return };
    if found.is_dir() && found.dev() == device {
        clear(path, sweep);
    } else if found.is_symlink() || (found.is_file() && (found.len() == 0 || path.ends_with(NOTE))) {
        sweep.note(path, fs::remove_file(path));
    } else {
        sweep.kept.push(format!("{}: mounted, or somebody's data", path.display()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn mk_volume(dir: &Path, driver: &str) {
        fs::create_dir_all(dir.join("mount")).unwrap();
        fs::write(dir.join(NOTE), format!(r#"{{"driverName":"{driver}"}}"#)).unwrap();
    }

    #[test]
    fn only_what_is_ours_and_empty_goes() {
        let dir = tempfile::tempdir().unwrap();
        let of_pod = dir.path().join("pods/1/volumes/kubernetes.io~csi");
        mk_volume(&of_pod.join("pvc-ours"), DRIVER);
        mk_volume(&of_pod.join("pvc-full"), DRIVER);
        fs::write(of_pod.join("pvc-full/mount/file"), "data").unwrap();
        mk_volume(&of_pod.join("pvc-of-others"), "csi.example.com");
        let csi = dir.path().join("plugins/kubernetes.io/csi");
        mk_volume(&csi.join(DRIVER).join("hash"), DRIVER);
        let device = csi.join("volumeDevices/pvc-block");
        mk_volume(&device.join("data"), DRIVER);
        fs::create_dir_all(device.join("publish")).unwrap();
        fs::write(device.join("publish/1"), "").unwrap();
        let link = dir.path().join("pods/1/volumeDevices/kubernetes.io~csi/pvc-block");
        fs::create_dir_all(link.parent().unwrap()).unwrap();
        std::os::unix::fs::symlink("/dev/loop-of-nobody", &link).unwrap();

        let mut sweep = Sweep::default();
        sweep_kubelet(dir.path(), &mut sweep);
        assert_eq!(sweep.failed, Vec::<String>::new());
        assert!(!of_pod.join("pvc-ours").exists() && !csi.join(DRIVER).exists() && !device.exists());
        assert!(!link.is_symlink());
        assert!(of_pod.join("pvc-of-others/mount").exists());
        assert_eq!(fs::read(of_pod.join("pvc-full/mount/file")).unwrap(), b"data");
        assert!(sweep.kept.iter().any(|kept| kept.contains("pvc-full/mount/file")), "{:?}", sweep.kept);
        // The note stays where something stays, so the next one finds it.
        fs::remove_file(of_pod.join("pvc-full/mount/file")).unwrap();
        sweep_kubelet(dir.path(), &mut Sweep::default());
        assert!(!of_pod.join("pvc-full").exists());
    }
}
