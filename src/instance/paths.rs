//! Where an instance keeps its run-time files.
//!
//! `/run/tng/NAME/` belongs to the data plane's user and holds the sockets it listens on; `/run/tng/.net/` belongs to
//! root and holds what only privileged commands write. Network namespaces often share `/run`, so in any other
//! namespace than init's there is one more level, `/run/tng/netns-INODE/`.

use std::io;
use std::os::unix::fs::{DirBuilderExt, MetadataExt};
use std::path::{Path, PathBuf};

use crate::config::InstanceName;

/// Overrides `/run/tng` (tests, containers).
pub const RUNTIME_DIR_ENV: &str = "TNG_RUNTIME_DIR";

/// The run-time directory of this network namespace.
#[derive(Debug, Clone)]
pub struct Paths {
    root: PathBuf,
}

impl Paths {
    /// The directory for the calling process's network namespace.
    pub fn current() -> Self {
        if let Some(root) = std::env::var_os(RUNTIME_DIR_ENV) {
            return Self { root: root.into() };
        }
        let base = PathBuf::from("/run/tng");
        // Only root may look at init's namespace. Who may not is the sandboxed data plane, whose unit runs in it.
        match (netns_inode("self"), netns_inode("1")) {
            (Ok(own), Ok(init)) if own != init => Self { root: base.join(format!("netns-{own}")) },
            _ => Self { root: base },
        }
    }

    /// The directory itself.
    pub fn root(&self) -> &Path {
        &self.root
    }
    /// Directory of one instance.
    pub fn instance_dir(&self, name: &InstanceName) -> PathBuf {
        self.root.join(name.as_str())
    }
    /// The control API's socket.
    pub fn control_socket(&self, name: &InstanceName) -> PathBuf {
        self.instance_dir(name).join("control.sock")
    }
    /// Where root hands new listeners and configurations to the data plane.
    pub fn handoff_socket(&self, name: &InstanceName) -> PathBuf {
        self.instance_dir(name).join("handoff.sock")
    }
    /// Root's own directory.
    pub fn private_dir(&self) -> PathBuf {
        self.root.join(".net")
    }
    /// Ids and ports of all instances.
    pub fn allocations(&self) -> PathBuf {
        self.private_dir().join("allocations.json")
    }
    /// Lock over everything in [`Paths::private_dir`].
    pub fn lock(&self) -> PathBuf {
        self.private_dir().join("lock")
    }
    /// The capture table of an instance as nft listed it right after it was applied.
    pub fn applied(&self, name: &InstanceName) -> PathBuf {
        self.private_dir().join(format!("{name}.applied.nft"))
    }
    /// The plan of the rules that were applied, for a repair and for a roll-back.
    pub fn plan(&self, name: &InstanceName) -> PathBuf {
        self.private_dir().join(format!("{name}.plan.json"))
    }
    /// The guard's own socket.
    pub fn guard_socket(&self, name: &InstanceName) -> PathBuf {
        self.private_dir().join(format!("{name}.guard.sock"))
    }
    /// The ruleset the guard feeds to its nft.
    pub fn guard_rules(&self, name: &InstanceName) -> PathBuf {
        self.private_dir().join(format!("{name}.guard.nft"))
    }

    /// What the kernel counted, as the guard wrote it down for the data plane's metrics.
    pub fn counted(&self, name: &InstanceName) -> PathBuf {
        self.private_dir().join(format!("{name}.counted.json"))
    }
    /// The text of the configuration whose listeners the socket unit has open.
    pub fn in_force(&self, name: &InstanceName) -> PathBuf {
        self.private_dir().join(format!("{name}.toml"))
    }
    /// Why the file as it is now was not taken by the start that asked for it.
    pub fn refused(&self, name: &InstanceName) -> PathBuf {
        self.private_dir().join(format!("{name}.refused"))
    }
    /// There while a package upgrade restarts units, which nobody asked to take edited files.
    pub fn upgrade(&self) -> PathBuf {
        self.private_dir().join("upgrade")
    }
    /// Held by `tngd run` for as long as it runs.
    pub fn run_lock(&self, name: &InstanceName) -> PathBuf {
        self.private_dir().join(format!("{name}.run"))
    }

    /// Makes root's directory: readable by all (the data plane reads its ports), written by root alone.
    pub fn make_private_dir(&self) -> io::Result<()> {
        for dir in [self.root.clone(), self.private_dir()] {
            make_dir(&dir, 0o755)?;
            belongs_to_us(&dir)?;
        }
        Ok(())
    }

    /// Makes an instance's directory and gives it to `uid`. One that is there already keeps its owner: it may be the
    /// socket unit's, whose sockets the data plane must not replace.
    pub fn make_instance_dir(&self, name: &InstanceName, uid: u32) -> io::Result<()> {
        make_dir(&self.root, 0o755)?;
        let dir = self.instance_dir(name);
        match std::fs::DirBuilder::new().mode(0o755).create(&dir) {
            Ok(()) => give(&dir, uid),
            Err(_) if dir.symlink_metadata().is_ok_and(|m| m.is_dir()) => Ok(()),
            Err(e) => Err(e),
        }
    }

    /// Makes an instance's directory the data plane's, which is about to bind its sockets there.
    pub fn own_instance_dir(&self, name: &InstanceName, uid: u32) -> io::Result<()> {
        self.make_instance_dir(name, uid)?;
        give(&self.instance_dir(name), uid)
    }

    /// Removes the record of the rules that were applied: they are not to be put back.
    pub fn forget_rules(&self, name: &InstanceName) {
        for file in [self.applied(name), self.plan(name)] {
            let _ = std::fs::remove_file(file);
        }
    }

    /// Removes the record of what the socket unit has open.
    pub fn forget_in_force(&self, name: &InstanceName) {
        for record in [self.in_force(name), self.refused(name)] {
            let _ = std::fs::remove_file(record);
        }
    }

    /// Removes root's files of an instance, and directories that are empty then.
    pub fn remove_instance(&self, name: &InstanceName) {
        // Neither the guard's files, which are the guard's to remove, nor the lock of `tngd run`, which may be held.
        self.forget_rules(name);
        self.forget_in_force(name);
        for socket in [self.control_socket(name), self.handoff_socket(name)] {
            let _ = std::fs::remove_file(socket);
        }
        let _ = std::fs::remove_dir(self.instance_dir(name));
    }
}

/// Inode of a process's network namespace: what tells namespaces apart.
pub fn netns_inode(pid: &str) -> io::Result<u64> {
    std::fs::metadata(format!("/proc/{pid}/ns/net")).map(|m| m.ino())
}

/// Whoever owns a directory, or may write in it, can put a link where root is about to write.
fn belongs_to_us(dir: &Path) -> io::Result<()> {
    let found = dir.symlink_metadata()?;
    let owner = found.uid();
    let ours = owner == 0 || owner == nix::unistd::geteuid().as_raw();
    if found.is_dir() && ours && found.mode() & 0o022 == 0 {
        return Ok(());
    }
    let what = format!("{} must be a directory of root that nobody else may write to; remove it", dir.display());
    Err(io::Error::new(io::ErrorKind::PermissionDenied, what))
}

fn give(dir: &Path, uid: u32) -> io::Result<()> {
    if dir.symlink_metadata()?.uid() == uid {
        return Ok(());
    }
    std::os::unix::fs::lchown(dir, Some(uid), None)
}

fn make_dir(path: &Path, mode: u32) -> io::Result<()> {
    std::fs::DirBuilder::new().recursive(true).mode(mode).create(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{PermissionsExt, chown, symlink};

    #[test]
    fn a_private_directory_that_others_could_change_is_not_used() {
        let dir = tempfile::tempdir().unwrap();
        let paths = |name: &str| Paths { root: dir.path().join(name) };
        assert!(paths("new").make_private_dir().is_ok());
        assert!(paths("new").make_private_dir().is_ok(), "a second time as well");

        std::fs::create_dir(dir.path().join("writable")).unwrap();
        std::fs::set_permissions(dir.path().join("writable"), std::fs::Permissions::from_mode(0o777)).unwrap();
        assert!(paths("writable").make_private_dir().is_err());

        std::fs::create_dir(dir.path().join("foreign")).unwrap();
        chown(dir.path().join("foreign"), Some(65534), None).expect("needs root");
        assert!(paths("foreign").make_private_dir().is_err());

        std::fs::create_dir(dir.path().join("linked")).unwrap();
        symlink(dir.path().join("new"), dir.path().join("linked/.net")).unwrap();
        assert!(paths("linked").make_private_dir().is_err());
    }

    #[test]
    fn only_a_directory_that_was_made_for_it_is_given_away() {
        let dir = tempfile::tempdir().unwrap();
        let paths = Paths { root: dir.path().join("tng") };
        let (made, units) = (InstanceName::new("made").unwrap(), InstanceName::new("units").unwrap());
        let owner = |name: &InstanceName| paths.instance_dir(name).metadata().unwrap().uid();
        paths.make_instance_dir(&made, 65534).expect("needs root");
        assert_eq!(owner(&made), 65534);
        std::fs::create_dir(paths.instance_dir(&units)).unwrap();
        let before = owner(&units);
        paths.make_instance_dir(&units, 65534).unwrap();
        assert_eq!(owner(&units), before, "a socket unit's directory");
        paths.own_instance_dir(&units, 65534).unwrap();
        assert_eq!(owner(&units), 65534, "by a data plane that binds its sockets itself");
    }
}
