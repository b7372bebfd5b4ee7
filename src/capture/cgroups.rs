//! The cgroups that rules name. nft turns a path into the cgroup's id when it loads a rule, and a cgroup that is removed
//! and made again (a slice that is stopped and started) has another id: rules loaded before match it no more.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use nix::sys::inotify::{AddWatchFlags, InitFlags, Inotify};

use super::plan::RulesPlan;

/// Where nft looks for them.
const ROOT: &str = "/sys/fs/cgroup";
/// How nft lists a match by cgroup: level, then the path in quotes, or the bare id when it has no path any more.
const MATCH: &str = "socket cgroupv2 level ";

/// The id of a cgroup, which is its inode number; `None` when there is no such cgroup.
pub(super) fn id(path: &str) -> Option<u64> {
    let dir = Path::new(ROOT).join(path);
    dir.join("cgroup.procs").exists().then(|| std::fs::metadata(dir).ok().map(|m| m.ino())).flatten()
}

/// Paths that the captures and exclusions of `plan` name.
pub(super) fn named(plan: &RulesPlan) -> BTreeSet<&str> {
    let entries = plan.captures.iter().flat_map(|c| c.netfilter.capture.iter().chain(&c.netfilter.exclude));
    entries.filter_map(|e| e.cgroup.as_ref()).map(|c| c.0.as_str()).collect()
}

/// `plan` without the entries whose cgroup is gone: nft could not load them, and nobody can be in it. A new one of the
/// same path is a change that [`Cgroups`] sees.
pub(crate) fn loadable(plan: &RulesPlan) -> RulesPlan {
    without(plan, |path| id(path).is_none())
}

fn without(plan: &RulesPlan, gone: impl Fn(&str) -> bool) -> RulesPlan {
    let mut plan = plan.clone();
    for entries in plan.captures.iter_mut().flat_map(|c| [&mut c.netfilter.capture, &mut c.netfilter.exclude]) {
        entries.retain(|e| e.cgroup.as_ref().is_none_or(|c| !gone(&c.0)));
    }
    plan
}

/// Whether a table that was listed as `applied` and is now listed as `now` is the same, but for cgroups that are gone.
pub(super) fn same_listing(applied: &str, now: &str) -> bool {
    same_but_for(applied, now, |path| id(path).is_none())
}

fn same_but_for(applied: &str, now: &str, gone: impl Fn(&str) -> bool) -> bool {
    let lost = |a: &str, b: &str| {
        let (Some((head, a)), Some((head_now, b))) = (a.split_once(MATCH), b.split_once(MATCH)) else { return false };
        let (Some((level, a)), Some((level_now, b))) = (a.split_once(' '), b.split_once(' ')) else { return false };
        let Some((path, tail)) = a.strip_prefix('"').and_then(|a| a.split_once('"')) else { return false };
        let tail_now = b.trim_start_matches(|c: char| c.is_ascii_digit());
        (head, level, tail) == (head_now, level_now, tail_now) && tail_now.len() < b.len() && gone(path)
    };
    applied == now
        || (applied.lines().count() == now.lines().count()
            && applied.lines().zip(now.lines()).all(|(a, b)| a == b || lost(a, b)))
}

/// Which cgroup each path is; `None`: there is none.
pub(super) type Ids = BTreeMap<String, Option<u64>>;

/// Follows the cgroups of one plan. Without inotify a change is seen at the next patrol.
#[derive(Default)]
pub(super) struct Cgroups {
    notices: Option<Inotify>,
    /// What the rules match.
    loaded: Ids,
    /// Those that are known to be gone.
    gone: BTreeSet<String>,
    /// That inotify does not serve was told.
    unwatched: bool,
}

impl Cgroups {
    /// Becomes readable when a cgroup beside one of the plan's, or above it, is made or removed.
    pub(super) fn fd(&self) -> Option<BorrowedFd<'_>> {
        self.notices.as_ref().map(AsFd::as_fd)
    }

    /// Throws notices away: the cgroups are looked at themselves.
    pub(super) fn drain(&self) {
        while self.notices.as_ref().is_some_and(|n| n.read_events().is_ok_and(|events| !events.is_empty())) {}
    }

    /// The cgroups of `plan` now. Whatever changes after that gives a notice.
    pub(super) fn ids(&mut self, plan: &RulesPlan) -> Ids {
        let named = named(plan);
        if let Err(error) = self.watch(&named)
            && !std::mem::replace(&mut self.unwatched, true)
        {
            tracing::warn!(reason = "cgroups-not-watched", instance = %plan.instance, %error, "looked at every 5 s only");
        }
        named.into_iter().map(|path| (path.to_owned(), id(path))).collect()
    }

    /// Watches every directory above a cgroup, as far as it is there.
    fn watch(&mut self, paths: &BTreeSet<&str>) -> io::Result<()> {
        if paths.is_empty() {
            return Ok(());
        }
        if self.notices.is_none() {
            self.notices = Some(Inotify::init(InitFlags::IN_NONBLOCK | InitFlags::IN_CLOEXEC)?);
        }
        let Some(notices) = self.notices.as_ref() else { return Ok(()) };
        let flags = AddWatchFlags::IN_CREATE | AddWatchFlags::IN_DELETE | AddWatchFlags::IN_ONLYDIR;
        for path in paths {
            // From the root on: the notice of a missing one comes from the one above it.
            let mut dir = PathBuf::from(ROOT);
            for name in Path::new(path) {
                match notices.add_watch(&dir, flags) {
                    Ok(_) => {}
                    Err(nix::errno::Errno::ENOENT) => break,
                    Err(e) => return Err(e.into()),
                }
                dir.push(name);
            }
        }
        Ok(())
    }

    /// The rules were loaded for these.
    pub(super) fn loaded(&mut self, ids: Ids) {
        self.gone = ids.iter().filter(|(_, id)| id.is_none()).map(|(path, _)| path.clone()).collect();
        self.loaded = ids;
    }

    /// Compares what is there with what the rules match. A cgroup that is gone is told once.
    pub(super) fn look(&mut self, plan: &RulesPlan) -> Look {
        let now = if self.loaded.is_empty() { Ids::new() } else { self.ids(plan) };
        let mut look = Look::default();
        for (path, id) in now {
            match id {
                None if self.gone.insert(path.clone()) => look.gone.push(path),
                None => {}
                Some(_) if self.loaded.get(&path) == Some(&id) => {}
                Some(_) => look.recreated.push(path),
            }
        }
        look
    }

    /// Those that are gone.
    pub(super) fn gone(&self) -> Vec<String> {
        self.gone.iter().cloned().collect()
    }
}

/// What became of the cgroups.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Look {
    /// There, and not the one that the rules match.
    pub(super) recreated: Vec<String>,
    /// Gone since the last look.
    pub(super) gone: Vec<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_listing_is_the_same_only_but_for_cgroups_that_are_gone() {
        let line = |operand: &str| format!("table inet t {{\n\tsocket cgroupv2 level 1 {operand} goto x\n}}\n");
        let (path, number) = (line("\"a.slice\""), line("4711"));
        let gone = |path: &str| path == "a.slice";
        assert!(same_but_for(&path, &path, |_| false));
        assert!(same_but_for(&path, &number, gone));
        assert!(!same_but_for(&path, &number, |_| false), "a stale id");
        assert!(!same_but_for(&path, &line("\"b.slice\""), gone));
        assert!(!same_but_for(&path, &line("4711 accept"), gone));
        assert!(!same_but_for(&path, &number.replace("level 1", "level 2"), gone));
        assert!(!same_but_for(&path, &format!("{number}x"), gone));
        assert!(!same_but_for(&number, &path, gone));
    }

    #[test]
    fn only_the_entries_of_a_cgroup_that_is_gone_are_left_out() {
        let parse = |text: &str| {
            let text = format!(
                "[[ingress]]\nname = \"a\"\n[ingress.netfilter]\n{text}\n[ingress.verify]\nprovider = \"sample\"\n\
                 allow_sample = true\n"
            );
            let name = crate::config::InstanceName::new("x").unwrap();
            let config = crate::config::parse(name, Path::new("/x.toml"), &text).unwrap().config;
            let slots =
                crate::capture::allocation::Allocations::default().assign(&config, 0, |_| true).expect("ids are free");
            RulesPlan::new(&config, &slots)
        };
        let list = |slices: &[&str]| {
            let entries: Vec<String> = slices
                .iter()
                .map(|s| format!("{{ port = \"1-3\", cgroup = \"{s}\" }}"))
                .chain(["{ port = \"4-6\" }".into()])
                .collect();
            entries.join(", ")
        };
        let plan = parse(&format!(
            "capture = [{}]\nexclude = [{}]",
            list(&["a.slice", "b.slice"]),
            list(&["a.slice"]).replace("1-3", "2").replace("4-6", "5")
        ));
        let expected = parse(&format!("capture = [{}]\nexclude = [{{ port = 5 }}]", list(&["b.slice"])));
        assert_eq!(named(&plan).into_iter().collect::<Vec<_>>(), ["a.slice", "b.slice"]);
        assert_eq!(without(&plan, |path| path == "a.slice"), expected);
        assert_eq!(without(&plan, |_| false), plan);
    }
}
