//! A running data plane takes over another configuration: on request of root ([`handoff`]), or by SIGHUP as far as
//! that needs no privilege.

use std::net::{SocketAddr, TcpListener};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::{Semaphore, mpsc};
use tokio::time::timeout;

use super::handoff::{self, Answer, Request};
use super::lifecycle::Life;
use super::listeners::SocketOptions;
use super::refusing::Why;
use super::{State, listeners};
use crate::capture::allocation::{Allocations, InstanceSlots};
use crate::config::{self, Config};
use crate::instance::{Paths, in_force};
use crate::os::failpoint;
use crate::os::lock::Lock;

/// Requests that may be coming in at once; there is one operator.
const MAX_REQUESTS: usize = 4;
/// The longest a whole request may take to come.
const REQUEST_DEADLINE: Duration = Duration::from_secs(10);

/// A request that has come in whole.
pub(super) struct Asked {
    request: Request,
    passed: Vec<(SocketAddr, TcpListener)>,
    stream: UnixStream,
}

/// Receives requests beside the life cycle's own loop: one that is slow to come must not keep it from its heartbeat.
pub(super) async fn receive_requests(listener: tokio::net::UnixListener, to: mpsc::Sender<Asked>) {
    let places = Arc::new(Semaphore::new(MAX_REQUESTS));
    loop {
        let Ok(place) = places.clone().acquire_owned().await else { return };
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(Duration::from_millis(100)).await;
            continue;
        };
        let to = to.clone();
        tokio::spawn(async move {
            if let Ok(Some(asked)) = timeout(REQUEST_DEADLINE, receive(stream)).await {
                let _ = to.send(asked).await;
            }
            drop(place);
        });
    }
}

async fn receive(stream: tokio::net::UnixStream) -> Option<Asked> {
    let mut stream = stream.into_std().ok()?;
    if !handoff::is_trusted(&stream) {
        tracing::warn!(reason = "handoff-refused", "a reload was asked for by neither root nor our own user");
        return None;
    }
    let blocking = move || handoff::receive(&mut stream).map(|(request, passed)| Asked { request, passed, stream });
    tokio::task::spawn_blocking(blocking).await.ok()?.ok()
}

impl Life {
    /// SIGHUP to a bare `serve`: it may not change rules or open privileged ports, so it takes only what needs neither.
    pub(super) fn reload_by_signal(&self) {
        self.enter(State::Reloading);
        let explained = |mut report: config::Report| {
            self.confinement.explain(&mut report, &self.instance);
            report.to_string()
        };
        let result = config::load(&self.path).map_err(explained).and_then(|loaded| {
            let old = self.plane.config();
            if let Some(change) = needs_root(&old.0, &loaded.config) {
                return Err(format!("{change}; as root: tngctl reload {}", self.instance));
            }
            self.apply(&loaded.config, Vec::new(), None)
        });
        self.finish_reload(result);
    }

    /// What kept a start from serving may be over. Only then, and not after a refused reload: what is in force then is
    /// what the operator left in force.
    pub(super) fn serve_if_possible_now(&self) {
        if !self.may_pass.load(Ordering::Relaxed) {
            return;
        }
        let Ok(config) = in_force::to_serve(&Paths::current(), &self.path) else { return };
        match self.apply(&config, Vec::new(), None) {
            Ok(()) => self.finish_reload(Ok(())),
            Err(error) => self.control.set_problems(vec![error]),
        }
    }

    /// One request, answered.
    pub(super) fn take_over(&self, asked: Asked) {
        let answer = self.answer(&asked.request, asked.passed);
        let _ = handoff::answer(asked.stream, &answer);
    }

    fn answer(&self, request: &Request, passed: Vec<(SocketAddr, TcpListener)>) -> Answer {
        let parsed = config::parse(self.instance.clone(), &request.source, &request.text);
        let config = match parsed {
            Ok(loaded) => loaded.config,
            Err(mut report) => {
                self.confinement.explain(&mut report, &self.instance);
                let error = report.to_string();
                self.control.set_reload_error(Some(error.clone()));
                return Answer { error: Some(error), missing: Vec::new() };
            }
        };
        if !request.apply {
            return match self.missing(&config, request.slots.as_ref()) {
                Ok(missing) => Answer { error: None, missing },
                Err(e) => Answer { error: Some(e), missing: Vec::new() },
            };
        }
        self.enter(State::Reloading);
        let result = self.apply(&config, passed, request.slots.as_ref());
        self.finish_reload(result.clone());
        Answer { error: result.err(), missing: Vec::new() }
    }

    /// Listeners that a configuration needs and nobody here has.
    fn missing(&self, config: &Config, slots: Option<&InstanceSlots>) -> Result<Vec<SocketAddr>, String> {
        self.keeps_control(config)?;
        let have = self.listeners()?;
        let specs = listeners::specs(config, slots).map_err(|e| e.to_string())?;
        Ok(specs.into_iter().map(|s| s.addr).filter(|a| !have.iter().any(|(local, _)| local == a)).collect())
    }

    /// Duplicates of all listeners that are here: served ones, and those on which everything is refused.
    fn listeners(&self) -> Result<Vec<(SocketAddr, TcpListener)>, String> {
        let served = self.plane.listeners().map_err(|e| e.to_string())?.into_iter().map(|l| (l.local, l.listener));
        let refusing = self.refusing.locked();
        Ok(served.chain(refusing.duplicates().map_err(|e| e.to_string())?).collect())
    }

    /// Takes over `config`, or leaves everything as it was. Listeners that no endpoint asks for any more end, also their
    /// copies with the service manager; a socket unit's stay, and refuse.
    fn apply(
        &self,
        config: &Config,
        passed: Vec<(SocketAddr, TcpListener)>,
        slots: Option<&InstanceSlots>,
    ) -> Result<(), String> {
        let own = Allocations::load(&Paths::current()).ok().and_then(|a| a.get(&config.instance).cloned());
        let specs = listeners::specs(config, slots.or(own.as_ref())).map_err(|e| e.to_string())?;
        self.keeps_control(config)?;
        let (mut have, mut rest): (Vec<_>, Vec<_>) =
            self.listeners()?.into_iter().partition(|(addr, _)| specs.iter().any(|s| s.addr == *addr));
        let before = options_of(&have);
        have.extend(passed);
        if matches!(failpoint::at("reload.daemon"), Some(failpoint::Action::Error)) {
            return Err("failpoint reload.daemon".to_owned());
        }
        let mut store = self.fdstore.locked();
        let taken = listeners::assemble(&specs, have).map_err(|e| e.to_string()).and_then(|assembled| {
            rest.extend(assembled.unused);
            self.plane.reload_beside(config, assembled.bound, store.units()).map_err(|e| e.to_string())
        });
        if let Err(error) = taken {
            // The sockets are shared with the configuration that goes on.
            for (addr, socket, options) in before {
                let _ = options.set(addr, &socket);
            }
            return Err(error);
        }
        let (lent, ended): (Vec<_>, Vec<_>) = rest.into_iter().partition(|(addr, _)| store.units().contains(addr));
        ended.iter().for_each(|(_, listener)| listeners::shut(listener));
        self.refusing.locked().replace(lent, Why::Unused);
        match self.plane.listeners() {
            Ok(served) => store.hold(&served),
            Err(error) => tracing::warn!(reason = "fdstore-failed", %error, "what a restart keeps is out of date"),
        }
        Ok(())
    }

    /// The control API's TCP socket is bound once. An instance that refuses everything never had one to lose.
    fn keeps_control(&self, config: &Config) -> Result<(), String> {
        let old = self.plane.config();
        if old.0.endpoints.is_empty() || config.control_listen == old.0.control_listen {
            return Ok(());
        }
        Err("control.listen changed, which only a restart takes over".to_owned())
    }

    fn finish_reload(&self, result: Result<(), String>) {
        match &result {
            Ok(()) => tracing::info!("configuration taken over"),
            Err(error) => tracing::error!(reason = "reload-failed", %error, "the old configuration goes on"),
        }
        if result.is_ok() {
            self.may_pass.store(false, Ordering::Relaxed);
            self.control.set_problems(Vec::new());
        }
        self.control.set_reload_error(result.err());
        self.enter(State::Ready);
    }
}

type Before = (SocketAddr, TcpListener, SocketOptions);

/// What the sockets have now, with copies of them to give it back to.
fn options_of(listeners: &[(SocketAddr, TcpListener)]) -> Vec<Before> {
    let before = |(addr, listener): &(SocketAddr, TcpListener)| {
        Some((*addr, listener.try_clone().ok()?, SocketOptions::of(*addr, listener).ok()?))
    };
    listeners.iter().filter_map(before).collect()
}

/// What of a change only root can do, in words.
fn needs_root(old: &Config, new: &Config) -> Option<String> {
    use crate::config::Mode;
    let listeners = |c: &Config| -> Vec<(IpAndPorts, String)> {
        let mapping = |e: &config::Endpoint| match &e.mode {
            Mode::Mapping(m) => Some(((m.listen_addr, m.listen_ports), e.name.to_string())),
            Mode::Netfilter(_) => None,
        };
        c.endpoints.iter().filter_map(mapping).collect()
    };
    let captures = |c: &Config| -> Vec<_> {
        let netfilter = |e: &config::Endpoint| match &e.mode {
            Mode::Netfilter(n) => Some((e.name.clone(), e.side, n.clone())),
            Mode::Mapping(_) => None,
        };
        c.endpoints.iter().filter_map(netfilter).collect()
    };
    if captures(old) != captures(new) {
        return Some("captures changed, which only root can apply".to_owned());
    }
    if listeners(old) != listeners(new) {
        return Some("listeners changed, which only root can hand over".to_owned());
    }
    None
}

type IpAndPorts = (std::net::IpAddr, config::PortRange);
