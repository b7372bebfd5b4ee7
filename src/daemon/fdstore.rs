//! Copies of listeners with the service manager (FDSTORE of sd_notify(3)), so that a restart does not lose those that
//! a reload brought: the socket unit cannot open an address after its start, and the data plane may not open all.

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::net::SocketAddr;
use std::os::fd::AsFd;

use sd_notify::NotifyState;

use super::inherited::Inherited;
use super::listeners::BoundListener;

/// Descriptors stored at most: a configuration can name more, and the manager's own limit (FileDescriptorStoreMax=)
/// drops what exceeds it without an answer.
pub(super) const MAX_STORED: usize = 512;

const PREFIX: &str = "listen-";

/// The name of an address in the store: unique, and without the colon that separates names in LISTEN_FDNAMES.
pub(crate) fn name_of(addr: SocketAddr) -> String {
    match addr {
        SocketAddr::V4(v4) => format!("{PREFIX}{},{}", v4.ip(), v4.port()),
        SocketAddr::V6(v6) if v6.scope_id() != 0 => {
            format!("{PREFIX}{},{},{}", v6.ip().to_string().replace(':', "_"), v6.port(), v6.scope_id())
        }
        SocketAddr::V6(v6) => format!("{PREFIX}{},{}", v6.ip().to_string().replace(':', "_"), v6.port()),
    }
}

/// Whether a descriptor of this name came from our store.
pub(super) fn is_name(name: &str) -> bool {
    name.starts_with(PREFIX)
}

/// What the service manager holds for us, and what it holds for itself.
pub(super) struct FdStore {
    enabled: bool,
    stored: BTreeMap<String, SocketAddr>,
    units: HashSet<SocketAddr>,
}

impl FdStore {
    /// The state at start. Disabled, nothing is ever sent.
    pub(super) fn new(inherited: &Inherited, enabled: bool) -> Self {
        let mut store = Self { enabled, stored: BTreeMap::new(), units: HashSet::new() };
        let mut stale: BTreeSet<&str> = inherited.stale.iter().map(String::as_str).collect();
        for passed in &inherited.tcp {
            match &passed.stored {
                None => drop(store.units.insert(passed.addr)),
                // The manager removes by name, all of that name at once.
                Some(name) if *name == name_of(passed.addr) && !stale.contains(name.as_str()) => {
                    store.stored.insert(name.clone(), passed.addr);
                }
                Some(name) => drop(stale.insert(name)),
            }
        }
        stale.into_iter().for_each(|name| store.remove(name));
        store
    }

    /// Addresses whose sockets the socket unit owns.
    pub(super) fn units(&self) -> &HashSet<SocketAddr> {
        &self.units
    }

    /// Makes the store hold exactly the `served` listeners that the socket unit does not hold anyway.
    pub(super) fn hold(&mut self, served: &[BoundListener]) {
        if !self.enabled {
            return;
        }
        let wanted: BTreeMap<String, &BoundListener> =
            served.iter().filter(|l| !self.units.contains(&l.local)).map(|l| (name_of(l.local), l)).collect();
        let gone: Vec<String> = self.stored.keys().filter(|name| !wanted.contains_key(*name)).cloned().collect();
        for name in gone {
            self.remove(&name);
            self.stored.remove(&name);
        }
        let mut left_out = 0;
        for (name, listener) in wanted {
            if self.stored.contains_key(&name) {
                continue;
            }
            if self.stored.len() >= MAX_STORED {
                left_out += 1;
                continue;
            }
            let notes = [NotifyState::FdStore, NotifyState::FdName(&name)];
            match crate::notify::notify_with_fds(&notes, &[listener.listener.as_fd()]) {
                Ok(()) => drop(self.stored.insert(name, listener.local)),
                Err(error) => {
                    tracing::warn!(reason = "fdstore-failed", addr = %listener.local, %error, "lost at a restart");
                }
            }
        }
        if left_out > 0 {
            tracing::warn!(
                reason = "fdstore-full",
                left_out,
                "{MAX_STORED} listeners are stored already; the others end with this process"
            );
        }
    }

    fn remove(&self, name: &str) {
        if self.enabled
            && let Err(error) = crate::notify::notify(&[NotifyState::FdStoreRemove, NotifyState::FdName(name)])
        {
            tracing::debug!(%error, "sd_notify");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_fit_the_protocol() {
        let names = ["127.0.0.1:10001", "127.0.0.11:1", "[2001:db8::1]:443", "[2001:db8:1::]:443", "[::]:443"]
            .map(|a| name_of(a.parse().unwrap()));
        assert_eq!(names[0], "listen-127.0.0.1,10001");
        assert_eq!(names[2], "listen-2001_db8__1,443");
        let unique: HashSet<_> = names.iter().collect();
        assert_eq!(unique.len(), names.len());
        for name in &names {
            assert!(is_name(name) && name.len() <= 255, "{name}");
            assert!(name.bytes().all(|b| b.is_ascii_graphic() && b != b':'), "{name}");
        }
        assert!(!is_name("tng"));
    }

    #[test]
    fn the_store_is_bounded_and_makes_room_before_it_takes_more() {
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let bound = |port: u16| BoundListener {
            endpoint: crate::config::EndpointName::new("a").unwrap(),
            local: SocketAddr::from(([192, 0, 2, 1], port)),
            listener: socket.try_clone().unwrap(),
        };
        let mut store = FdStore::new(&Inherited::default(), true);
        store.units.insert(bound(1).local);
        store.hold(&(1..=MAX_STORED as u16 + 11).map(bound).collect::<Vec<_>>());
        assert_eq!(store.stored.len(), MAX_STORED);
        assert!(!store.stored.contains_key(&name_of(bound(1).local)), "the unit holds it anyway");
        store.hold(&[bound(1), bound(2), bound(9000)]);
        assert_eq!(store.stored.values().map(SocketAddr::port).collect::<Vec<_>>(), [2, 9000]);
    }
}
