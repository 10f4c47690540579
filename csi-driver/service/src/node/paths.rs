//! Paths that callers name: checked before anything is made, mounted or removed.

use std::io;
use std::path::{Component, Path, PathBuf};

use tonic::Status;

/// Checks `text` and resolves links in all but its last component, which must not be a link. The parent is made
/// where `make` says so; `None` where it does not exist and is not to be made.
pub(super) fn resolve(field: &str, text: &str, below: &Path, make: bool) -> Result<Option<PathBuf>, Status> {
    let bad = |sentence: &str| Err(Status::invalid_argument(format!("{field} \"{text}\" {sentence}")));
    if text.is_empty() {
        return Err(Status::invalid_argument(format!("{field} is missing")));
    }
    let path = Path::new(text);
    let plain = path.components().all(|part| matches!(part, Component::RootDir | Component::Normal(_)));
    if !path.is_absolute() || !plain {
        return bad("must be absolute and without \"..\"");
    }
    let (Some(parent), Some(name)) = (path.parent(), path.file_name()) else {
        return bad("names no file");
    };
    let failed = |e: io::Error| Err(Status::internal(format!("{field} \"{text}\" cannot be used: {e}")));
    // Nothing is made before the deepest part that exists is known to lie where it may.
    let existing = deepest_existing(parent);
    if !existing.starts_with(below) {
        return bad(&format!("is not below the kubelet folder {}", below.display()));
    }
    if make && let Err(e) = std::fs::create_dir_all(parent) {
        return failed(e);
    }
    let parent = match parent.canonicalize() {
        Ok(parent) => parent,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(e) => return failed(e),
    };
    if !parent.starts_with(below) {
        return bad(&format!("is not below the kubelet folder {}", below.display()));
    }
    let resolved = parent.join(name);
    // A dead mount answers an error here, which is no link.
    if std::fs::symlink_metadata(&resolved).is_ok_and(|found| found.is_symlink()) {
        return bad("is a symbolic link");
    }
    Ok(Some(resolved))
}

fn deepest_existing(path: &Path) -> PathBuf {
    path.ancestors().find_map(|ancestor| ancestor.canonicalize().ok()).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn paths_that_leave_the_folder_are_refused_and_nothing_is_made() {
        let dir = tempfile::tempdir().unwrap();
        let below = dir.path().join("kubelet").join("");
        std::fs::create_dir(&below).unwrap();
        let below = below.canonicalize().unwrap();
        std::os::unix::fs::symlink(dir.path(), below.join("out")).unwrap();
        std::os::unix::fs::symlink(dir.path(), below.join("link")).unwrap();
        let inside = |tail: &str| format!("{}/{tail}", below.display());
        for text in [
            "relative/path".to_owned(),
            inside("../other/x"),
            inside("out/new/x"),
            inside("link"),
            format!("{}/other/x", dir.path().display()),
            "/".to_owned(),
            String::new(),
        ] {
            let status = resolve("target_path", &text, &below, true).unwrap_err();
            assert_eq!(status.code(), Code::InvalidArgument, "{text}");
            assert!(status.message().contains("target_path"), "{status}");
        }
        assert!(!dir.path().join("new").exists() && !dir.path().join("other").exists());
        assert_eq!(resolve("p", &inside("a/b"), &below, false).unwrap(), None);
        assert_eq!(resolve("p", &inside("a/b"), &below, true).unwrap(), Some(below.join("a/b")));
        assert!(below.join("a").is_dir() && !below.join("a/b").exists());
    }
}
