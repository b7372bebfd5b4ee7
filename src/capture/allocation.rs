//! Ids and listener ports of captured endpoints, unique in a network namespace and stable over reloads.
//!
//! Kept by root in `allocations.json` under a lock. An endpoint that a reload removes keeps its id until the instance
//! goes down, because its open connections still carry the id as their mark.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::net::TcpListener;
use std::time::Duration;

use nix::fcntl::{Flock, FlockArg};
use serde::{Deserialize, Serialize};

use super::marks::EndpointId;
use super::plan::{CapturePlan, RulesPlan, listener_addrs};
use crate::config::{Config, Endpoint, InstanceName, Mode, Netfilter, OnStop, PortRange, Side};
use crate::instance::Paths;
use crate::os::files::write_atomically;

/// First port that is tried for a listener without `listen_port`.
const FIRST_PORT: u16 = 40000;
/// In a [`Slot`] whose port was given up: none is assigned.
const NO_PORT: u16 = 0;

/// Why no id or port could be had.
#[derive(Debug, thiserror::Error)]
pub enum AllocationError {
    /// The state directory cannot be used.
    #[error("{path}: {source}")]
    State {
        /// The file.
        path: String,
        /// What went wrong.
        source: io::Error,
    },
    /// All 255 ids are taken.
    #[error("no endpoint id is left: 255 captured endpoints are the most a host can have")]
    NoId,
    /// No port is free.
    #[error("endpoint {0}: no listener port from {FIRST_PORT} up is free")]
    NoPort(String),
    /// The configured port belongs to another endpoint.
    #[error("endpoint {endpoint}: listen_port {port} is already used by endpoint {other}; choose another")]
    PortTaken {
        /// Who asks.
        endpoint: String,
        /// Which port.
        port: u16,
        /// Who has it.
        other: String,
    },
}

impl AllocationError {
    /// Stable slug for logs and docs.
    pub fn reason(&self) -> &'static str {
        match self {
            AllocationError::State { .. } => "state-unusable",
            AllocationError::NoId => "no-endpoint-id",
            AllocationError::NoPort(_) | AllocationError::PortTaken { .. } => "listen-port-taken",
        }
    }
}

/// Id and port of one captured endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Slot {
    /// Id.
    pub id: EndpointId,
    /// Port of the transparent listeners.
    pub port: u16,
}

/// What one instance has.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct InstanceSlots {
    /// User of the data plane.
    pub owner_uid: u32,
    /// The configuration file: what another instance is compared with.
    #[serde(default)]
    pub source: std::path::PathBuf,
    /// By endpoint name.
    pub endpoints: BTreeMap<String, Slot>,
    /// Of ingress endpoints that a reload removed.
    #[serde(default)]
    pub retired: Vec<Slot>,
    /// What a clean stop leaves, by the configuration in force.
    #[serde(default)]
    pub on_stop: OnStop,
    /// How long connections may go on after a stop, by the configuration in force.
    #[serde(default)]
    pub drain_timeout: Duration,
}

/// All instances of this network namespace.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocations {
    instances: BTreeMap<String, InstanceSlots>,
}

/// The right to read and change [`Allocations`] and the kernel's rules: one privileged command at a time.
pub struct Locked {
    paths: Paths,
    _lock: Flock<File>,
}

impl Locked {
    /// Waits for the lock.
    pub fn acquire(paths: &Paths) -> Result<Self, AllocationError> {
        let state = |source| AllocationError::State { path: paths.lock().display().to_string(), source };
        paths.make_private_dir().map_err(state)?;
        let file = File::options().create(true).truncate(false).write(true).open(paths.lock()).map_err(state)?;
        let lock = Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, e)| state(e.into()))?;
        Ok(Self { paths: paths.clone(), _lock: lock })
    }

    /// The lock, unless another command has it now.
    pub fn try_acquire(paths: &Paths) -> Result<Option<Self>, AllocationError> {
        let state = |source| AllocationError::State { path: paths.lock().display().to_string(), source };
        let file = File::options().create(true).truncate(false).write(true).open(paths.lock()).map_err(state)?;
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(lock) => Ok(Some(Self { paths: paths.clone(), _lock: lock })),
            Err((_, nix::errno::Errno::EWOULDBLOCK)) => Ok(None),
            Err((_, e)) => Err(state(e.into())),
        }
    }

    /// What is recorded.
    pub fn load(&self) -> Result<Allocations, AllocationError> {
        Allocations::load(&self.paths)
    }

    /// Records, all or nothing.
    pub fn store(&self, allocations: &Allocations) -> Result<(), AllocationError> {
        let path = self.paths.allocations();
        let stored = if allocations.instances.is_empty() {
            match std::fs::remove_file(&path) {
                Err(e) if e.kind() != io::ErrorKind::NotFound => Err(e),
                _ => Ok(()), // no file and an empty one mean the same
            }
        } else {
            write_atomically(&path, &serde_json::to_vec_pretty(allocations).expect("plain maps serialise"))
        };
        stored.map_err(|source| AllocationError::State { path: path.display().to_string(), source })
    }
}

impl Allocations {
    /// What is recorded; nothing when there is no file. Anyone may read.
    pub fn load(paths: &Paths) -> Result<Self, AllocationError> {
        let path = paths.allocations();
        let state = |source| AllocationError::State { path: path.display().to_string(), source };
        match std::fs::read(&path) {
            Ok(bytes) => serde_json::from_slice(&bytes).map_err(|e| state(io::Error::other(e))),
            Err(e) if e.kind() == io::ErrorKind::NotFound => Ok(Self::default()),
            Err(e) => Err(state(e)),
        }
    }

    /// The instances that have slots.
    pub fn instances(&self) -> impl Iterator<Item = &str> {
        self.instances.keys().map(String::as_str)
    }

    /// The configuration files of all instances but `instance`.
    pub fn sources_beside(&self, instance: &InstanceName) -> impl Iterator<Item = &std::path::Path> {
        let own = instance.as_str().to_owned();
        self.instances.iter().filter(move |(name, _)| **name != own).map(|(_, slots)| slots.source.as_path())
    }

    /// What `instance` has.
    pub fn get(&self, instance: &InstanceName) -> Option<&InstanceSlots> {
        self.instances.get(instance.as_str())
    }

    /// Records what `instance` has.
    pub fn put(&mut self, instance: &InstanceName, slots: InstanceSlots) {
        self.instances.insert(instance.as_str().to_owned(), slots);
    }

    /// Forgets the ports that `instance` kept from an earlier life and that somebody has taken since: a server, or a
    /// client of this host whose own port it is. The endpoints keep their ids, and the next assignment gives them other
    /// ports. Only for an instance that has no listener open.
    pub fn give_up_taken_ports(&mut self, instance: &InstanceName, free: impl Fn(u16) -> bool) {
        let Some(slots) = self.instances.get_mut(instance.as_str()) else { return };
        for (name, slot) in &mut slots.endpoints {
            if slot.port != NO_PORT && !free(slot.port) {
                tracing::info!(%instance, endpoint = name, port = slot.port, "the listener port is taken, another one is used");
                slot.port = NO_PORT;
            }
        }
    }

    /// Forgets `instance`.
    pub fn release(&mut self, instance: &InstanceName) {
        self.instances.remove(instance.as_str());
    }

    /// Gives every captured endpoint of `config` its slot. Slots that exist stay, unless the same configuration now
    /// names their port for a listener of its own; `free` says whether nobody listens on a port.
    pub fn assign(
        &mut self,
        config: &Config,
        owner_uid: u32,
        free: impl Fn(u16) -> bool,
    ) -> Result<InstanceSlots, AllocationError> {
        let mut slots = self.instances.get(config.instance.as_str()).cloned().unwrap_or_default();
        slots.owner_uid = owner_uid;
        slots.on_stop = config.on_stop;
        slots.drain_timeout = config.drain_timeout;
        // Absolute: another command compares with it from another directory.
        slots.source = std::path::absolute(&config.source).unwrap_or_else(|_| config.source.clone());
        let captured: Vec<(&Endpoint, &Netfilter)> = captured(config).collect();
        let reserved = own_listeners(config);
        let is_reserved = |port: u16| reserved.iter().any(|r| r.contains(port));
        let names: BTreeSet<&str> = captured.iter().map(|(e, _)| e.name.as_str()).collect();
        let gone: Vec<String> = slots.endpoints.keys().filter(|n| !names.contains(n.as_str())).cloned().collect();
        for name in gone {
            slots.retired.extend(slots.endpoints.remove(&name));
        }
        for (endpoint, netfilter) in captured {
            let name = endpoint.name.as_str();
            let taken = |port: u16| self.owner_of(port, config, &slots, name);
            let kept = slots.endpoints.get(name).copied();
            let port = match (netfilter.listen_port, kept) {
                (Some(port), _) => match taken(port) {
                    Some(other) => {
                        return Err(AllocationError::PortTaken { endpoint: name.to_owned(), port, other });
                    }
                    None => port,
                },
                (None, Some(slot)) if slot.port != NO_PORT && !is_reserved(slot.port) => slot.port,
                (None, _) => (FIRST_PORT..=u16::MAX)
                    .find(|p| !is_reserved(*p) && taken(*p).is_none() && free(*p))
                    .ok_or_else(|| AllocationError::NoPort(name.to_owned()))?,
            };
            let id = match kept {
                Some(slot) => slot.id,
                None => self.free_id(config, &slots)?,
            };
            slots.endpoints.insert(name.to_owned(), Slot { id, port });
        }
        if slots.endpoints.is_empty() && slots.retired.is_empty() {
            // Without captures there are no rules, and no `net down` that would take the record away.
            self.release(&config.instance);
        } else {
            self.instances.insert(config.instance.as_str().to_owned(), slots.clone());
        }
        Ok(slots)
    }

    /// Slots of other instances, and those of this one as they are being assigned.
    fn all<'a>(&'a self, config: &'a Config, slots: &'a InstanceSlots) -> impl Iterator<Item = (String, Slot)> + 'a {
        let own = config.instance.as_str();
        let of = |instance: &str, s: &InstanceSlots| {
            let retired = s.retired.iter().map(|slot| (format!("{instance}/(removed)"), *slot));
            s.endpoints.iter().map(|(n, slot)| (format!("{instance}/{n}"), *slot)).chain(retired).collect::<Vec<_>>()
        };
        let others = self.instances.iter().filter(move |(n, _)| n.as_str() != own);
        others.flat_map(move |(n, s)| of(n, s)).chain(of(own, slots))
    }

    fn owner_of(&self, port: u16, config: &Config, slots: &InstanceSlots, asking: &str) -> Option<String> {
        let me = format!("{}/{asking}", config.instance);
        self.all(config, slots).find(|(n, s)| s.port == port && *n != me).map(|(n, _)| n)
    }

    fn free_id(&self, config: &Config, slots: &InstanceSlots) -> Result<EndpointId, AllocationError> {
        let taken: BTreeSet<EndpointId> = self.all(config, slots).map(|(_, s)| s.id).collect();
        (1..=u8::MAX).map(EndpointId).find(|id| !taken.contains(id)).ok_or(AllocationError::NoId)
    }
}

/// Ports that `config` itself names for listeners: nobody listens there yet, and still they are not free.
pub(super) fn own_listeners(config: &Config) -> Vec<PortRange> {
    let named = config.endpoints.iter().filter_map(|e| match &e.mode {
        Mode::Mapping(m) => Some(m.listen_ports),
        Mode::Netfilter(n) => n.listen_port.map(PortRange::single),
    });
    named.chain(config.control_listen.map(|addr| PortRange::single(addr.port()))).collect()
}

/// Whether a transparent listener could be bound to `port` now.
pub fn port_is_free(port: u16) -> bool {
    listener_addrs(port).iter().all(|addr| match TcpListener::bind(addr) {
        Ok(_) => true,
        // A host without IPv6 has nothing that could be in the way.
        Err(e) => addr.is_ipv6() && e.raw_os_error() == Some(libc::EADDRNOTAVAIL),
    })
}

fn captured(config: &Config) -> impl Iterator<Item = (&Endpoint, &Netfilter)> {
    config.endpoints.iter().filter_map(|e| match &e.mode {
        Mode::Netfilter(n) => Some((e, n)),
        Mode::Mapping(_) => None,
    })
}

impl RulesPlan {
    /// What the rules of `config` are compiled from.
    pub fn new(config: &Config, slots: &InstanceSlots) -> Self {
        let captures = captured(config)
            .filter_map(|(e, n)| {
                let slot = slots.endpoints.get(e.name.as_str())?;
                Some(CapturePlan {
                    ident: e.name.as_str().replace('-', "_"),
                    side: e.side,
                    id: slot.id,
                    port: slot.port,
                    netfilter: n.clone(),
                    refuse_new: false,
                })
            })
            .collect();
        let ingress_marks = config
            .endpoints
            .iter()
            .filter(|e| e.side == Side::Ingress)
            .map(|e| match &e.mode {
                Mode::Mapping(m) => m.so_mark,
                Mode::Netfilter(n) => n.so_mark,
            })
            .collect();
        Self {
            instance: config.instance.clone(),
            owner_uid: slots.owner_uid,
            captures,
            retired: slots.retired.iter().map(|s| (s.id, s.port)).collect(),
            ingress_marks,
        }
    }
    /// Whether there is anything for nftables to do.
    pub fn is_empty(&self) -> bool {
        self.captures.is_empty() && self.retired.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::*;

    fn config(instance: &str, endpoints: &[(&str, Option<u16>)]) -> Config {
        let endpoints = endpoints
            .iter()
            .map(|(name, listen_port)| Endpoint {
                name: EndpointName::new(name).unwrap(),
                side: Side::Ingress,
                mode: Mode::Netfilter(Netfilter {
                    capture: vec![Match::default()],
                    exclude: vec![],
                    capture_local_traffic: false,
                    preserve_source: false,
                    preserve_source_ports: PortRange { first: 1024, last: 32767 },
                    so_mark: DEFAULT_INGRESS_MARK,
                    listen_port: *listen_port,
                }),
                ra: Ra::default(),
                limits: Limits::default(),
            })
            .collect();
        Config {
            instance: InstanceName::new(instance).unwrap(),
            source: "/x.toml".into(),
            on_stop: OnStop::Open,
            drain_timeout: std::time::Duration::from_secs(1),
            control_listen: None,
            endpoints,
        }
    }

    fn mapping(name: &str, first: u16, last: u16) -> Endpoint {
        let text = format!(
            "[[ingress]]\nname = \"{name}\"\n[ingress.mapping]\nlisten = \"127.0.0.1:{first}-{last}\"\n\
             target = \"192.0.2.1:{first}-{last}\"\n[ingress.verify]\nprovider = \"sample\"\nallow_sample = true\n"
        );
        let loaded = parse(InstanceName::new("a").unwrap(), std::path::Path::new("/x.toml"), &text).unwrap();
        loaded.config.endpoints.into_iter().next().unwrap()
    }

    #[test]
    fn endpoints_of_all_instances_get_different_ids_and_ports() {
        let mut all = Allocations::default();
        let a = all.assign(&config("a", &[("x", None), ("y", None)]), 0, |_| true).unwrap();
        let b = all.assign(&config("b", &[("x", None)]), 0, |port| port != 40002).unwrap();
        assert_eq!(a.endpoints["x"], Slot { id: EndpointId(1), port: 40000 });
        assert_eq!(a.endpoints["y"], Slot { id: EndpointId(2), port: 40001 });
        assert_eq!(b.endpoints["x"], Slot { id: EndpointId(3), port: 40003 });
    }

    #[test]
    fn a_reload_keeps_slots_and_retires_those_of_removed_endpoints() {
        let mut all = Allocations::default();
        let before = all.assign(&config("a", &[("x", None), ("y", None)]), 0, |_| true).unwrap();
        let after = all.assign(&config("a", &[("y", None), ("z", None)]), 0, |_| true).unwrap();
        assert_eq!(after.endpoints["y"], before.endpoints["y"]);
        assert_eq!(after.retired, vec![before.endpoints["x"]]);
        assert_eq!(after.endpoints["z"].id, EndpointId(3), "a retired id is not given out again");
    }

    #[test]
    fn a_port_that_the_configuration_names_for_a_listener_is_not_handed_out() {
        let mut config = config("a", &[("x", None)]);
        config.control_listen = Some("127.0.0.1:40000".parse().unwrap());
        config.endpoints.push(mapping("m", 40001, 40003));
        let mut all = Allocations::default();
        assert_eq!(all.assign(&config, 0, |_| true).unwrap().endpoints["x"].port, 40004);
        // Nor kept, when a reload names it.
        config.endpoints.push(mapping("n", 40004, 40004));
        let again = all.assign(&config, 0, |_| true).unwrap().endpoints["x"];
        assert_eq!(again, Slot { id: EndpointId(1), port: 40005 });
    }

    #[test]
    fn an_instance_without_captures_has_no_record() {
        let mut all = Allocations::default();
        all.assign(&config("a", &[]), 0, |_| true).unwrap();
        assert_eq!(all, Allocations::default());
    }

    #[test]
    fn the_file_is_recorded_so_that_another_directory_finds_it() {
        let mut all = Allocations::default();
        let mut relative = config("a", &[("x", None)]);
        relative.source = "a.toml".into();
        let slots = all.assign(&relative, 0, |_| true).unwrap();
        assert_eq!(slots.source, std::env::current_dir().unwrap().join("a.toml"));
    }

    #[test]
    fn a_configured_port_that_another_endpoint_has_is_refused() {
        let mut all = Allocations::default();
        all.assign(&config("a", &[("x", Some(45000))]), 0, |_| true).unwrap();
        let e = all.assign(&config("b", &[("x", Some(45000))]), 0, |_| true).unwrap_err();
        assert_eq!(e.reason(), "listen-port-taken");
        assert!(e.to_string().contains("a/x"), "{e}");
    }
}
