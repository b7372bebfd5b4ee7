//! Running instances are found by their control sockets.

use std::path::{Path, PathBuf};

/// Where an instance's control socket is.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instance {
    /// Its name, the directory's.
    pub name: String,
    /// The socket.
    pub socket: PathBuf,
}

/// The directory of all instances: `$TNG_RUNTIME_DIR`, or `/run/tng`.
pub fn runtime_dir() -> PathBuf {
    std::env::var_os("TNG_RUNTIME_DIR").filter(|d| !d.is_empty()).map_or_else(|| "/run/tng".into(), PathBuf::from)
}

/// All control sockets: `NAME/control.sock` and `netns-INODE/NAME/control.sock` below `root`, by
/// name. The latter are instances in other network namespaces, which share the file system.
pub fn find(root: &Path) -> Vec<Instance> {
    let mut found = Vec::new();
    for (name, path) in directories(root) {
        push(&mut found, name.clone(), &path);
        if name.starts_with("netns-") {
            for (name, path) in directories(&path) {
                push(&mut found, name, &path);
            }
        }
    }
    found.sort();
    found
}

fn push(found: &mut Vec<Instance>, name: String, dir: &Path) {
    let socket = dir.join("control.sock");
    if socket.exists() {
        found.push(Instance { name, socket });
    }
}

fn directories(path: &Path) -> Vec<(String, PathBuf)> {
    let Ok(entries) = std::fs::read_dir(path) else { return Vec::new() };
    entries
        .filter_map(Result::ok)
        .filter(|e| e.path().is_dir())
        .filter_map(|e| Some((e.file_name().into_string().ok()?, e.path())))
        .collect()
}
