//! What the files that a configuration names held when they were read: a reload takes over what has changed in them.

use std::path::PathBuf;

use super::certificate::fingerprint;

/// Files and the SHA-256 of what they held.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Snapshot(Vec<(PathBuf, Option<[u8; 32]>)>);

fn hash(file: &PathBuf) -> Option<[u8; 32]> {
    std::fs::read(file).ok().map(|bytes| fingerprint(&bytes))
}

impl Snapshot {
    /// The files as they are now.
    pub fn of(files: Vec<PathBuf>) -> Self {
        Self(files.into_iter().map(|file| (file.clone(), hash(&file))).collect())
    }

    /// What was certainly read by somebody who read the files since the snapshot was taken: a file that changed in the
    /// meantime is unknown, and counts as changed ever after.
    pub fn confirmed(self) -> Self {
        Self(self.0.into_iter().map(|(file, was)| (file.clone(), was.filter(|_| hash(&file) == was))).collect())
    }

    /// Whether the contents of all files are known.
    pub fn is_known(&self) -> bool {
        self.0.iter().all(|(_, hash)| hash.is_some())
    }

    /// Whether all files hold what they held.
    pub fn is_current(&self) -> bool {
        self.is_known() && self.0.iter().all(|(file, was)| hash(file) == *was)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_was_replaced_removed_or_touched_is_told_apart() {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = (dir.path().join("one"), dir.path().join("two"));
        std::fs::write(&one, "a").unwrap();
        std::fs::write(&two, "b").unwrap();
        let before = Snapshot::of(vec![one.clone(), two.clone()]).confirmed();
        assert!(before.is_known() && before.is_current());
        std::fs::write(&one, "a").unwrap();
        assert!(before.is_current(), "written again with the same contents");
        std::fs::write(dir.path().join("new"), "c").unwrap();
        std::fs::rename(dir.path().join("new"), &one).unwrap();
        assert!(!before.is_current() && before != Snapshot::of(vec![one.clone(), two.clone()]));
        std::fs::remove_file(&one).unwrap();
        assert!(!before.is_current());
    }

    #[test]
    fn what_changed_while_it_was_read_is_unknown_for_ever() {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("file");
        std::fs::write(&file, "a").unwrap();
        let begun = Snapshot::of(vec![file.clone()]);
        std::fs::write(&file, "b").unwrap();
        let read = begun.confirmed();
        std::fs::write(&file, "a").unwrap();
        assert!(!read.is_known() && !read.is_current());
    }
}
