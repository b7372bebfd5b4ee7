//! Who can read a configuration file: the data plane is not root, and the guard is root without root's right to read
//! what belongs to others.

use std::os::unix::fs::MetadataExt;
use std::path::Path;

use super::diagnostics::{Diagnostic, Severity};

/// Slug of the findings, also for the caller's own failure to read.
const UNREADABLE: &str = "file-unreadable";
/// Numbers of the guard's user and group, which has no capability for files.
const GUARD: (u32, u32) = (0, 0);

/// Whether a process of this user and group, without any capability, can read `file`. Access control lists are not
/// looked at.
pub fn readable(file: &Path, uid: u32, gid: u32) -> bool {
    let allowed = |path: &Path, bit: u32| {
        std::fs::metadata(path).is_ok_and(|m| {
            let shift = if m.uid() == uid {
                6
            } else if m.gid() == gid {
                3
            } else {
                0
            };
            m.mode() >> shift & bit != 0
        })
    };
    let parent = file.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new("."));
    allowed(file, 4) && allowed(parent, 1)
}

/// Whether the guard of systemd's unit can.
pub fn guard_can_read(file: &Path) -> bool {
    readable(file, GUARD.0, GUARD.1)
}

/// What an instance's own processes cannot read, though the caller could. `data_plane`: its user and group.
pub(super) fn warnings(file: &Path, data_plane: (u32, u32)) -> Vec<Diagnostic> {
    let Ok(meta) = std::fs::metadata(file) else { return Vec::new() };
    let shape = format!("mode {:04o} of {}:{}", meta.mode() & 0o7777, meta.uid(), meta.gid());
    let warning = |message: String| Diagnostic {
        severity: Severity::Warning,
        reason: UNREADABLE,
        file: file.to_owned(),
        line: None,
        column: None,
        path: String::new(),
        message,
        hint: Some(format!("chown root:tng {file} && chmod 0640 {file}", file = file.display())),
    };
    let mut found = Vec::new();
    if !readable(file, data_plane.0, data_plane.1) {
        found.push(warning(format!("the data plane's user tng cannot read it ({shape}): it will not start or reload")));
    }
    if !guard_can_read(file) {
        let message = "the guard cannot read it";
        found.push(warning(format!("{message} ({shape}): it is root without the right to read others' files")));
    }
    found
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, chown};

    use super::*;

    const TNG: (u32, u32) = (61_000, 61_000);

    /// What is said of a file with this mode and these owners, in a directory that everybody may enter.
    fn said(mode: u32, uid: u32, gid: u32) -> Vec<String> {
        let dir = tempfile::tempdir().unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
        let file = dir.path().join("web.toml");
        std::fs::write(&file, "").unwrap();
        chown(&file, Some(uid), Some(gid)).expect("needs root");
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(mode)).unwrap();
        warnings(&file, TNG).into_iter().map(|d| d.message).collect()
    }

    #[test]
    fn both_that_must_read_a_file_are_looked_at() {
        assert!(said(0o640, 0, TNG.1).is_empty(), "as the package makes them");
        assert!(said(0o644, 1000, 1000).is_empty());
        let of_root = said(0o600, 0, 0);
        assert!(of_root.len() == 1 && of_root[0].contains("user tng cannot read it (mode 0600 of 0:0)"), "{of_root:?}");
        let of_somebody = said(0o640, 1000, TNG.1);
        assert!(of_somebody.len() == 1 && of_somebody[0].contains("the guard cannot read it"), "{of_somebody:?}");
        assert_eq!(said(0o600, 1000, 1000).len(), 2);
        // The class of the owner counts alone, though others may.
        assert_eq!(said(0o044, 0, 0).len(), 1);
    }

    #[test]
    fn a_directory_that_nobody_may_enter_hides_what_is_in_it() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("web.toml");
        std::fs::write(&file, "").unwrap();
        std::fs::set_permissions(&file, std::fs::Permissions::from_mode(0o644)).unwrap();
        std::fs::set_permissions(dir.path(), std::fs::Permissions::from_mode(0o700)).unwrap();
        assert!(!readable(&file, TNG.0, TNG.1));
        assert!(guard_can_read(&file));
    }
}
