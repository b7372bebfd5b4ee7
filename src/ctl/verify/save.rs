//! What was seen as files, for other tools and for evidence of the evidence.

use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64::prelude::{BASE64_STANDARD, Engine};

/// Exit status when a file cannot be written (EX_CANTCREAT of sysexits.h).
pub(super) const EX_CANTCREAT: u8 = 73;
/// Characters of a line of PEM (RFC 7468, section 2).
const PEM_LINE: usize = 64;

/// Why nothing was saved.
#[derive(Debug, thiserror::Error)]
pub(super) enum SaveError {
    /// A file is there already.
    #[error("--save: {0} is there already; --force overwrites it")]
    Exists(PathBuf),
    /// The system refuses.
    #[error("--save: {path}: {error}", path = .path.display())]
    Io {
        /// What could not be written.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
}

/// Files to be, by name.
#[derive(Debug, Default)]
pub(super) struct Files(Vec<(&'static str, Vec<u8>)>);

impl Files {
    pub(super) fn add(&mut self, name: &'static str, contents: Option<Vec<u8>>) {
        self.0.extend(contents.map(|bytes| (name, bytes)));
    }

    /// Their paths in `dir`.
    pub(super) fn paths(&self, dir: &Path) -> Vec<String> {
        self.0.iter().map(|(name, _)| dir.join(name).to_string_lossy().into_owned()).collect()
    }

    /// Writes all of them into `dir`, which is made when it is not there, readable by the caller alone: a token
    /// speaks for its bearer to who asks for no key. Without `force` nothing that is there is touched.
    pub(super) fn write(&self, dir: &Path, force: bool) -> Result<(), SaveError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |error| SaveError::Io { path, error }
        };
        DirBuilder::new().mode(0o700).recursive(true).create(dir).map_err(failed(dir))?;
        for (name, _) in self.0.iter().filter(|_| !force) {
            let path = dir.join(name);
            if path.symlink_metadata().is_ok() {
                return Err(SaveError::Exists(path));
            }
        }
        for (name, contents) in &self.0 {
            let (path, draft) = (dir.join(name), dir.join(format!(".{name}.{}", std::process::id())));
            let written = create(&draft).and_then(|mut file| file.write_all(contents));
            // A link takes no other's place, a rename does: each where it is wanted.
            let placed = written.and_then(|()| if force { fs::rename(&draft, &path) } else { link(&draft, &path) });
            if let Err(error) = placed {
                let _ = fs::remove_file(&draft);
                return Err(match error.kind() {
                    io::ErrorKind::AlreadyExists if !force => SaveError::Exists(path),
                    _ => SaveError::Io { path, error },
                });
            }
        }
        Ok(())
    }
}

fn create(path: &Path) -> io::Result<File> {
    OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)
}

fn link(draft: &Path, path: &Path) -> io::Result<()> {
    fs::hard_link(draft, path)?;
    fs::remove_file(draft)
}

/// Certificates as PEM.
pub(super) fn pem(chain: &[Vec<u8>]) -> Vec<u8> {
    let mut out = String::new();
    for der in chain {
        out.push_str("-----BEGIN CERTIFICATE-----\n");
        let text = BASE64_STANDARD.encode(der);
        for (at, c) in text.chars().enumerate() {
            if at > 0 && at % PEM_LINE == 0 {
                out.push('\n');
            }
            out.push(c);
        }
        out.push_str("\n-----END CERTIFICATE-----\n");
    }
    out.into_bytes()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn files_are_the_callers_alone_and_never_overwritten_unasked() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("a/b");
        let files = |text: &str| Files(vec![("one", text.into()), ("two", text.into())]);
        files("first").write(&dir, false).unwrap();
        for path in [dir.join("one"), dir.join("two")] {
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        }
        assert_eq!(fs::metadata(&dir).unwrap().permissions().mode() & 0o777, 0o700);
        fs::remove_file(dir.join("one")).unwrap();
        let refused = files("second").write(&dir, false).unwrap_err();
        assert!(matches!(&refused, SaveError::Exists(path) if path.ends_with("two")), "{refused}");
        assert!(!dir.join("one").exists(), "nothing is written when one is there");
        files("third").write(&dir, true).unwrap();
        assert_eq!(fs::read_to_string(dir.join("two")).unwrap(), "third");
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 2, "drafts are gone");
    }

    #[test]
    fn a_symlink_is_not_followed() {
        let root = tempfile::tempdir().unwrap();
        let (outside, dir) = (root.path().join("outside"), root.path().join("dir"));
        fs::write(&outside, "mine").unwrap();
        fs::create_dir(&dir).unwrap();
        std::os::unix::fs::symlink(&outside, dir.join("one")).unwrap();
        assert!(Files(vec![("one", b"x".to_vec())]).write(&dir, false).is_err());
        Files(vec![("one", b"x".to_vec())]).write(&dir, true).unwrap();
        assert_eq!(fs::read_to_string(&outside).unwrap(), "mine");
    }
}
