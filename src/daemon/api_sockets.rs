//! The sockets by which an instance is asked and steered: the control API's and the one for [`handoff`](super::handoff).
//! Those that a socket unit passed are used as they are, and their files are the unit's to remove.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use super::inherited::Inherited;
use crate::config::Config;
use crate::instance::Paths;

/// Why such a socket is not there: which one, and what the kernel said.
pub(super) type SocketError = (String, io::Error);

/// The unix sockets, and the control API's TCP socket if configured.
pub(super) struct ApiSockets {
    pub control: UnixListener,
    pub control_tcp: Option<TcpListener>,
    pub handoff: UnixListener,
}

/// What [`bind`] goes on with.
pub(super) struct Prepared {
    control: Option<UnixListener>,
    handoff: Option<UnixListener>,
    control_tcp: Option<TcpListener>,
    /// Why the TCP socket is not there although the configuration asks for it, in words.
    pub problem: Option<String>,
}

/// What must be done while the process still has its privileges: the directory, unless both its sockets were passed,
/// and a TCP port that may be below 1024. Without that port the endpoints are served all the same: an end of the
/// process, which a service manager would start again and again, would refuse them for a port that only shows metrics.
pub(super) fn prepare(
    paths: &Paths,
    config: &Config,
    uid: u32,
    inherited: &mut Inherited,
) -> Result<Prepared, SocketError> {
    let (control, handoff) = (inherited.control.take(), inherited.handoff.take());
    if control.is_none() || handoff.is_none() {
        let dir = paths.instance_dir(&config.instance);
        paths.own_instance_dir(&config.instance, uid).map_err(|e| (dir.display().to_string(), e))?;
    }
    let tcp = |addr| TcpListener::bind(addr).map_err(|error| not_served(addr, &error));
    let (control_tcp, problem) = match config.control_listen.map(tcp).transpose() {
        Ok(listener) => (listener, None),
        Err(problem) => (None, Some(problem)),
    };
    Ok(Prepared { control, handoff, control_tcp, problem })
}

/// In words, with what to do.
fn not_served(addr: SocketAddr, error: &io::Error) -> String {
    let port = addr.port();
    let next = match error.kind() {
        io::ErrorKind::AddrInUse => format!("see who has it: ss -tanp 'sport = {port}'"),
        io::ErrorKind::PermissionDenied => format!("take a port from 1024 up instead of {port}"),
        io::ErrorKind::AddrNotAvailable => "no interface has this address".to_owned(),
        _ => "choose another address".to_owned(),
    };
    let problem = format!("the control API is not served on {addr}: {error}; {next}, then restart");
    tracing::error!(reason = "control-listen-failed", %addr, %error, "the control API is served on its socket only");
    problem
}

/// The rest, as the data plane's own user: in a directory that this user owns, root could be led to another file
/// between bind and chmod.
pub(super) fn bind(paths: &Paths, config: &Config, prepared: Prepared) -> Result<ApiSockets, SocketError> {
    let Prepared { control, handoff, control_tcp, problem: _ } = prepared;
    let or_bind = |passed: Option<UnixListener>, path: &Path, mode| passed.map_or_else(|| bind_unix(path, mode), Ok);
    Ok(ApiSockets {
        control: or_bind(control, &paths.control_socket(&config.instance), 0o660)?,
        control_tcp,
        handoff: or_bind(handoff, &paths.handoff_socket(&config.instance), 0o600)?,
    })
}

/// A socket file that another process listens on is not taken away from it.
fn bind_unix(path: &Path, mode: u32) -> Result<UnixListener, SocketError> {
    let bind = || {
        if UnixStream::connect(path).is_ok() {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "this instance is running already"));
        }
        let _ = std::fs::remove_file(path);
        let listener = UnixListener::bind(path)?;
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode))?;
        listener.set_nonblocking(true)?;
        Ok(listener)
    };
    bind().map_err(|e| (path.display().to_string(), e))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_reason_why_the_api_is_not_served_has_its_next_step() {
        let addr: SocketAddr = "127.0.0.1:70".parse().unwrap();
        for (kind, next) in [
            (io::ErrorKind::PermissionDenied, "take a port from 1024 up instead of 70"),
            (io::ErrorKind::AddrInUse, "ss -tanp 'sport = 70'"),
            (io::ErrorKind::AddrNotAvailable, "no interface has this address"),
        ] {
            let said = not_served(addr, &io::Error::from(kind));
            assert!(
                said.starts_with("the control API is not served on 127.0.0.1:70: ") && said.contains(next),
                "{said}"
            );
        }
    }
}
