//! Giving up privileges, once, before the runtime and its threads exist: capabilities belong to a thread, and one that
//! was started before the drop would keep them.

use std::io;

use caps::{CapSet, Capability, CapsHashSet};
use nix::unistd::{Gid, Uid, User, setgroups, setresgid, setresuid};

use super::sys;

/// The one capability of the data plane: SO_MARK and IP(V6)_TRANSPARENT (kernel 5.17 and later).
pub const KEPT: Capability = Capability::CAP_NET_RAW;

/// securebits of linux/securebits.h: uid 0 gives nothing, a change of user takes nothing, nothing can be raised as
/// ambient, and none of it can be changed back.
const SECUREBITS: i32 = 0b1110_1111;

/// Why privileges could not be given up. The process must not go on.
#[derive(Debug, thiserror::Error)]
pub enum PrivilegeError {
    /// There is no such user.
    #[error("user \"{0}\" does not exist; create it: adduser --system --group {0}")]
    NoUser(String),
    /// A system call failed.
    #[error("cannot give up privileges ({what}): {error}")]
    Drop {
        /// The step.
        what: &'static str,
        /// What the kernel said.
        error: String,
    },
}

impl PrivilegeError {
    /// Stable slug for logs and docs.
    pub fn reason(&self) -> &'static str {
        match self {
            PrivilegeError::NoUser(_) => "no-such-user",
            PrivilegeError::Drop { .. } => "privileges-not-dropped",
        }
    }
}

/// A user by name or number.
pub fn find_user(name: &str) -> Result<(Uid, Gid), PrivilegeError> {
    let found = match name.parse::<u32>() {
        Ok(uid) => User::from_uid(Uid::from_raw(uid)),
        Err(_) => User::from_name(name),
    };
    match found {
        Ok(Some(user)) => Ok((user.uid, user.gid)),
        _ => Err(PrivilegeError::NoUser(name.to_owned())),
    }
}

/// Keeps [`KEPT`] at most, changes to `user` if given, and locks the door: securebits, no_new_privs, not dumpable.
pub fn give_up(user: Option<(Uid, Gid)>) -> Result<(), PrivilegeError> {
    let permitted = caps::read(None, CapSet::Permitted).map_err(failed("read capabilities"))?;
    let keep: CapsHashSet = permitted.iter().copied().filter(|c| *c == KEPT).collect();
    if permitted.contains(&Capability::CAP_SETPCAP) {
        for cap in caps::all().into_iter().filter(|c| *c != KEPT) {
            // A kernel older than the crate does not know the newest ones.
            let _ = caps::drop(None, CapSet::Bounding, cap);
        }
    }
    if let Some((uid, gid)) = user {
        caps::securebits::set_keepcaps(true).map_err(failed("keep capabilities"))?;
        setgroups(&[]).map_err(failed("leave groups"))?;
        setresgid(gid, gid, gid).map_err(failed("change group"))?;
        setresuid(uid, uid, uid).map_err(failed("change user"))?;
    }
    if permitted.contains(&Capability::CAP_SETPCAP) {
        // The change of user emptied the effective set; this call still needs one of it.
        caps::raise(None, CapSet::Effective, Capability::CAP_SETPCAP).map_err(failed("raise SETPCAP"))?;
        sys::set_securebits(SECUREBITS).map_err(failed("lock securebits"))?;
    }
    caps::clear(None, CapSet::Ambient).map_err(failed("clear ambient"))?;
    limit(CapSet::Effective, &keep).map_err(failed("set effective"))?;
    limit(CapSet::Permitted, &keep).map_err(failed("set permitted"))?;
    limit(CapSet::Inheritable, &keep).map_err(failed("limit inheritable"))?;
    sys::set_no_new_privs().map_err(failed("no_new_privs"))?;
    sys::set_undumpable().map_err(failed("not dumpable"))
}

/// Takes what is not in `keep` out of a set. A unit has done that already, and its seccomp filter has no capset(2).
fn limit(set: CapSet, keep: &CapsHashSet) -> Result<(), caps::errors::CapsError> {
    let has = caps::read(None, set)?;
    if has.is_subset(keep) {
        return Ok(());
    }
    // Nothing is to be inherited: systemd's ambient capability is the one exception above.
    let left = if matches!(set, CapSet::Inheritable) { CapsHashSet::new() } else { keep.clone() };
    caps::set(None, set, &left)
}

/// Whether the process may change rules.
pub fn may_administer_network() -> bool {
    caps::has_cap(None, CapSet::Effective, Capability::CAP_NET_ADMIN).unwrap_or(false)
}

fn failed<E: std::fmt::Display>(what: &'static str) -> impl Fn(E) -> PrivilegeError {
    move |error| PrivilegeError::Drop { what, error: error.to_string() }
}

/// Raises the soft limit of descriptors to the hard one: each connection takes two.
pub fn raise_descriptor_limit() -> io::Result<u64> {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
    Ok(hard)
}
