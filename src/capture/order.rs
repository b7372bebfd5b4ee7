//! Ids and ports that do not depend on who asks first. At boot the generator writes the listeners of all instances
//! before any of them has an id, and then their units start in any order: both must come to the same ports.

use std::collections::BTreeSet;
use std::path::PathBuf;

use super::allocation::{AllocationError, Allocations, InstanceSlots, own_listeners};
use crate::config::{self, Config};

impl Allocations {
    /// [`Allocations::assign`], as if the instances that come before `config` in the configuration directory had been
    /// given theirs. A file of another directory stands alone.
    pub fn assign_in_order(
        &mut self,
        config: &Config,
        owner_uid: u32,
        free: impl Fn(u16) -> bool,
    ) -> Result<InstanceSlots, AllocationError> {
        let named = named_ports(&config::list_instances().unwrap_or_default());
        self.assign_after(&before(config), config, owner_uid, |port| !named.contains(&port) && free(port))
    }

    fn assign_after(
        &mut self,
        before: &[Config],
        config: &Config,
        owner_uid: u32,
        free: impl Fn(u16) -> bool,
    ) -> Result<InstanceSlots, AllocationError> {
        if self.get(&config.instance).is_some() {
            return self.assign(config, owner_uid, free);
        }
        let mut all = self.clone();
        let waiting: Vec<&Config> = before.iter().filter(|c| self.get(&c.instance).is_none()).collect();
        for other in &waiting {
            // What is wrong with another instance is told when it starts.
            let _ = all.assign(other, owner_uid, &free);
        }
        let slots = all.assign(config, owner_uid, &free)?;
        for other in &waiting {
            all.release(&other.instance);
        }
        *self = all;
        Ok(slots)
    }
}

/// Ports that files of the configuration directory name for listeners of their own. No other instance is given one of
/// them, also while the one that names it is down.
pub fn named_ports(files: &[PathBuf]) -> BTreeSet<u16> {
    let configs = files.iter().filter_map(|file| Some(config::load(file).ok()?.config));
    configs.flat_map(|config| own_listeners(&config)).flat_map(|ports| ports.first..=ports.last).collect()
}

/// The instances that the generator meets before `config`.
fn before(config: &Config) -> Vec<Config> {
    let in_dir = std::path::absolute(&config.source).is_ok_and(|p| p.parent() == Some(&config::config_dir()));
    let files = if in_dir { config::list_instances().unwrap_or_default() } else { Vec::new() };
    // The order of the list, not of the names: "a-b.toml" stands before "a.toml".
    let ours = |path: &PathBuf| config::instance_of(path).is_ok_and(|name| name == config.instance);
    files.into_iter().take_while(|path| !ours(path)).filter_map(|path| Some(config::load(&path).ok()?.config)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{InstanceName, parse};

    fn captures(instance: &str, ports: &[u16]) -> Config {
        let endpoint = |port: &u16| {
            format!(
                "[[ingress]]\nname = \"p{port}\"\n[ingress.netfilter]\ncapture = [{{ port = {port} }}]\n\
                 [ingress.verify]\nprovider = \"sample\"\nallow_sample = true\n"
            )
        };
        let text: String = ports.iter().map(endpoint).collect();
        parse(InstanceName::new(instance).unwrap(), std::path::Path::new("/x.toml"), &text).unwrap().config
    }

    #[test]
    fn whoever_starts_first_gets_the_ports_that_the_generator_wrote() {
        let (a, b) = (captures("a", &[1, 2]), captures("b", &[3]));
        let mut generator = Allocations::default();
        let wrote_a = generator.assign(&a, 0, |_| true).unwrap();
        let wrote_b = generator.assign(&b, 0, |_| true).unwrap();

        let mut started = Allocations::default();
        let got_b = started.assign_after(std::slice::from_ref(&a), &b, 0, |_| true).unwrap();
        assert_eq!(started.instances().collect::<Vec<_>>(), ["b"], "nothing is recorded for who did not start");
        let got_a = started.assign_after(&[], &a, 0, |_| true).unwrap();
        assert_eq!((got_a, got_b), (wrote_a, wrote_b));
    }
}
