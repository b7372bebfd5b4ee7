//! What a data plane begins with: the sockets that its configuration asks for, or, when it cannot serve that, the passed
//! sockets to refuse on.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::path::Path;
use std::time::Duration;

use super::fdstore::FdStore;
use super::lifecycle::ServeError;
use super::listeners::{self, Assembled};
use super::refusing::Why;
use crate::capture::allocation::Allocations;
use crate::config::{self, Config};
use crate::instance::{Paths, in_force};

/// The file, and the sockets it asks for.
pub(super) fn prepare(path: &Path, paths: &Paths, passed: Sockets) -> Result<(Config, Assembled), ServeError> {
    let config = in_force::to_serve(paths, path)?;
    let slots = Allocations::load(paths)?.get(&config.instance).cloned();
    let specs = listeners::specs(&config, slots.as_ref())?;
    Ok((config, listeners::assemble(&specs, passed)?))
}

pub(super) type Sockets = Vec<(SocketAddr, TcpListener)>;

/// Why nothing is served.
pub(super) struct Problem {
    pub(super) text: String,
    /// It may pass without a change of the file: a port that is taken, rules that are not up.
    pub(super) may_pass: bool,
}

/// Sockets on which everything is refused, and why.
pub(super) struct Refused {
    pub(super) sockets: Sockets,
    pub(super) why: Why,
}

impl Refused {
    /// Of the sockets that no endpoint asks for, those of the socket unit: they are not ours to end. The others end.
    pub(super) fn unused(unused: Sockets, fdstore: &FdStore) -> Self {
        let (lent, ended): (Vec<_>, Vec<_>) = unused.into_iter().partition(|(addr, _)| fdstore.units().contains(addr));
        for (addr, listener) in &ended {
            tracing::info!(%addr, "a stored listener that no endpoint asks for has ended");
            listeners::shut(listener);
        }
        for (addr, _) in &lent {
            let reason = Why::Unused.reason();
            tracing::warn!(reason, %addr, "a socket was passed that no endpoint asks for; it refuses connections");
        }
        Self { sockets: lent, why: Why::Unused }
    }

    /// With sockets from the service manager we must stay: leaving would close them or loop, and refusing is safe.
    /// Without, this is the end.
    pub(super) fn everything(
        spare: Option<&[(SocketAddr, TcpListener)]>,
        error: ServeError,
    ) -> Result<(Self, Problem), ServeError> {
        let Some(spare) = spare else { return Err(error) };
        tracing::error!(reason = error.reason(), %error, "refusing all connections");
        let why = Why::NotServing(error.reason());
        let may_pass = !matches!(error, ServeError::Config(_) | ServeError::Refused(_));
        let sockets = listeners::copies(spare).map_err(inherited)?;
        Ok((Self { sockets, why }, Problem { text: error.to_string(), may_pass }))
    }
}

/// The configuration of an instance whose file has errors: nothing is served.
pub(super) fn refuse_all(path: &Path) -> Result<Config, config::Report> {
    Ok(Config {
        instance: config::instance_of(path)?,
        source: path.to_owned(),
        on_stop: config::OnStop::Closed,
        drain_timeout: Duration::ZERO,
        control_listen: None,
        endpoints: Vec::new(),
    })
}

/// The passed sockets cannot even be copied.
pub(super) fn inherited(source: io::Error) -> ServeError {
    ServeError::Io { what: "inherited sockets".to_owned(), source }
}
