//! Between two configurations: rules that let through nothing that either of them captures.
//!
//! They are applied before the data plane changes and narrowed after it has, so that a command that fails or is killed
//! in between leaves the path no more open than it was.

use ipnet::IpNet;

use super::plan::{CapturePlan, RulesPlan};
use crate::config::PortRange;

/// Begins the names of endpoints that take part a second time. No name in a file begins with an underscore, and those
/// of retired endpoints go on with a digit.
const AGAIN: &str = "_new";

impl RulesPlan {
    /// This plan, and behind it all that `old` captures. Equal to this plan where `old` has nothing besides.
    ///
    /// What the running data plane serves goes on to it until it changes, by the listener that both configurations have.
    /// Once the listener of an endpoint of `old` alone has ended, its traffic is refused. An endpoint whose capture
    /// changed is in it twice, under one id: as it was, and then as it will be. What goes from one endpoint to another that
    /// is there already is refused: both listeners stay, and which demands they make of the peer changes in between.
    #[must_use]
    pub fn covering(&self, old: &RulesPlan) -> RulesPlan {
        let is_new = |c: &&CapturePlan| !old.captures.iter().any(|o| o.id == c.id && o.side == c.side);
        // First those that only this plan has: their listeners wait for the new configuration, whose settings count.
        let mut captures: Vec<CapturePlan> = self.captures.iter().filter(is_new).cloned().collect();
        // Whoever was killed in between has not said which configuration is served now.
        let half_way = old.captures.iter().enumerate().any(|(at, c)| old.captures[..at].iter().any(|o| o.id == c.id));
        let kept = old.captures.iter().map(|was| {
            let now = self.captures.iter().find(|c| c.id == was.id);
            let kept = CapturePlan { port: now.map_or(was.port, |now| now.port), ..was.clone() };
            let others = self.captures.iter().filter(|c| !is_new(c)).chain(old.captures.iter().filter(|_| half_way));
            let stays = !half_way && self.captures.iter().any(|c| c.captures_like(&kept));
            let moves = now.is_some()
                && !stays
                && others.into_iter().any(|c| c.id != was.id && c.side == was.side && c.may_meet(was));
            CapturePlan { refuse_new: moves, ..kept }
        });
        for next in kept.chain(self.captures.iter().filter(|c| !is_new(c)).cloned()) {
            if !captures.iter().any(|c| c.captures_like(&next)) {
                let ident = free_ident(&captures, next.endpoint_ident());
                captures.push(CapturePlan { ident, ..next });
            }
        }
        if captures.len() == self.captures.len() && self.captures.iter().all(|c| captures.contains(c)) {
            captures.clone_from(&self.captures);
        }
        let mut out = RulesPlan { captures, ..self.clone() };
        out.retired.retain(|(id, _)| !out.captures.iter().any(|c| c.id == *id));
        // The sockets of the data plane of before must not be captured.
        out.ingress_marks.extend(old.ingress_marks.iter().filter(|m| !self.ingress_marks.contains(m)));
        out
    }
}

impl RulesPlan {
    /// Whether this plan has all that `old` captures, for the same endpoints.
    pub(super) fn covers(&self, old: &RulesPlan) -> bool {
        old.captures.iter().all(|was| self.captures.iter().any(|c| c.captures_like(was)))
    }
}

impl CapturePlan {
    /// Whether some connection could be captured by both, as far as addresses and ports tell.
    fn may_meet(&self, other: &CapturePlan) -> bool {
        let to = |a: Option<IpNet>, b: Option<IpNet>| match (a, b) {
            (Some(a), Some(b)) => a.contains(&b) || b.contains(&a),
            _ => true,
        };
        let port = |a: Option<PortRange>, b: Option<PortRange>| a.zip(b).is_none_or(|(a, b)| a.overlaps(b));
        let theirs = &other.netfilter.capture;
        self.netfilter.capture.iter().any(|a| theirs.iter().any(|b| to(a.to, b.to) && port(a.port, b.port)))
    }

    /// The endpoint's own part of its name: what is between two plans counts for the endpoint as well.
    pub(super) fn endpoint_ident(&self) -> &str {
        let again = self.ident.strip_prefix(AGAIN).and_then(|rest| rest.split_once('_'));
        again.map_or(&self.ident, |(_, ident)| ident)
    }

    /// The same endpoint and the same traffic, under whatever name.
    fn captures_like(&self, other: &CapturePlan) -> bool {
        let CapturePlan { ident: _, side, id, port, netfilter, refuse_new: _ } = other;
        (self.side, self.id, self.port, &self.netfilter) == (*side, *id, *port, netfilter)
    }
}

/// `ident`, or where that is given already: `_new_IDENT`, `_new2_IDENT` and so on.
fn free_ident(given: &[CapturePlan], ident: &str) -> String {
    let others = (1usize..).map(|n| match n {
        1 => format!("{AGAIN}_{ident}"),
        n => format!("{AGAIN}{n}_{ident}"),
    });
    let is_free = |name: &String| !given.iter().any(|c| c.ident == *name);
    std::iter::once(ident.to_owned()).chain(others).find(is_free).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::capture::allocation::Allocations;
    use crate::capture::{compile, render};
    use crate::config::{self, InstanceName, Side};

    /// The plans of several configurations of one instance, each after the one before as reloads make them.
    fn plans<const N: usize>(files: [&str; N]) -> [RulesPlan; N] {
        let mut allocations = Allocations::default();
        files.map(|toml| {
            let name = InstanceName::new("web").expect("name");
            let config = config::parse(name, "web.toml".as_ref(), toml).expect("configuration").config;
            let slots = allocations.assign(&config, 0, |_| true).expect("slots");
            RulesPlan::new(&config, &slots)
        })
    }

    fn ingress(name: &str, capture: &str) -> String {
        format!("[[ingress]]\nname = \"{name}\"\nno_ra = true\n[ingress.netfilter]\n{capture}\n")
    }

    fn port(port: u16) -> String {
        format!("capture = [{{ to = \"192.0.2.0/24\", port = {port} }}]")
    }

    /// Endpoints of a plan, by name and first captured port.
    fn shown(plan: &RulesPlan) -> Vec<(&str, u16)> {
        let first = |c: &CapturePlan| c.netfilter.capture[0].port.expect("port").first;
        plan.captures.iter().map(|c| (c.ident.as_str(), first(c))).collect()
    }

    #[test]
    fn between_a_plan_and_itself_and_after_nothing_there_is_no_other() {
        let both = format!("{}{}", ingress("a", &port(80)), ingress("b", &port(81)));
        let turned = format!("{}{}", ingress("b", &port(81)), ingress("a", &port(80)));
        let [old, same, turned] = plans([&both, &both, &turned]);
        assert_eq!(same.covering(&old), same);
        assert_eq!(turned.covering(&old), turned, "the order in the file");
        assert_eq!(old.covering(&RulesPlan::nothing(old.instance.clone())), old);
    }

    #[test]
    fn an_endpoint_that_goes_is_captured_to_its_own_listener_and_not_retired_yet() {
        let first = ingress("a", &port(80));
        let [old, new] = plans([&format!("{first}{}", ingress("b", &port(81))), &first]);
        assert_eq!(new.retired.len(), 1);
        let between = new.covering(&old);
        assert_eq!((&between.captures, between.retired.len()), (&old.captures, 0));
        let nothing = RulesPlan::nothing(new.instance.clone());
        assert_eq!(nothing.covering(&old).captures, old.captures);
    }

    #[test]
    fn a_changed_endpoint_is_captured_as_it_was_and_then_as_it_will_be() {
        let [old, new] = plans([&ingress("a", &port(80)), &ingress("a", &port(81))]);
        let between = new.covering(&old);
        assert_eq!(shown(&between), [("a", 80), ("_new_a", 81)]);
        assert_eq!((between.captures[0].id, between.captures[0].port), (new.captures[0].id, new.captures[0].port));
        assert_eq!(between.captures[1].captured_counter(), "captured_a");
        for table in [compile::capture_table(&between), compile::guard_table(&between)] {
            let text = render::table(&table);
            assert_eq!(text.matches("counter refused_a {").count(), 1, "{text}");
        }
    }

    #[test]
    fn what_another_endpoint_takes_over_stays_with_the_one_of_before_until_then() {
        let [old, new] = plans([
            &format!("{}{}", ingress("a", &port(80)), ingress("b", &port(81))),
            &ingress("a", "capture = [{ to = \"192.0.2.0/24\", port = \"80-90\" }]"),
        ]);
        assert_eq!(shown(&new.covering(&old)), [("a", 80), ("b", 81), ("_new_a", 80)]);
        let refused: Vec<bool> = new.covering(&old).captures.iter().map(|c| c.refuse_new).collect();
        assert_eq!(refused, [false, false, false], "b goes, and its listener with it");
        // A new endpoint has a listener of its own, at which connections wait for the new settings.
        let [old, new] = plans([&ingress("b", &port(81)), &ingress("c", &port(81))]);
        assert_eq!(shown(&new.covering(&old)), [("c", 81), ("b", 81)]);
    }

    #[test]
    fn what_goes_from_one_endpoint_to_another_that_stays_is_refused_till_then() {
        let file = |a, b| format!("{}{}", ingress("a", &port(a)), ingress("b", &port(b)));
        let [old, swapped, moved] = plans([&file(80, 81), &file(81, 80), &file(82, 80)]);
        let refused = |plan: &RulesPlan| plan.captures.iter().map(|c| c.refuse_new).collect::<Vec<_>>();
        let between = swapped.covering(&old);
        assert_eq!(shown(&between), [("a", 80), ("b", 81), ("_new_a", 81), ("_new_b", 80)]);
        assert_eq!(refused(&between), [true, true, false, false]);
        assert!(between.covers(&old) && between.covers(&swapped) && !swapped.covers(&old));
        assert_eq!(refused(&moved.covering(&old)), [true, false, false, false], "81 is nobody's any more");
        // A kill leaves open which of the two is served, so that each of the four may be wrong.
        for next in [&old, &swapped] {
            assert_eq!(refused(&next.covering(&between))[..2], [true, true]);
        }
        let text = render::table(&compile::capture_table(&between));
        let chain = text.split("chain capture_a {").nth(1).and_then(|rest| rest.split('}').next()).expect("chain");
        assert!(chain.contains("reject with tcp reset"), "{chain}");
    }

    #[test]
    fn exclusions_of_one_configuration_do_not_open_what_the_other_captures() {
        let all = "capture = [{ to = \"192.0.2.0/24\" }]";
        let [old, new] = plans([&ingress("a", all), &ingress("a", &format!("{all}\nexclude = [{{ port = 80 }}]"))]);
        let between = new.covering(&old);
        let excluded: Vec<usize> = between.captures.iter().map(|c| c.netfilter.exclude.len()).collect();
        assert_eq!(excluded, [0, 1], "each has a chain of its own, which the other's exclusions do not leave");
    }

    #[test]
    fn after_a_killed_reload_the_next_one_repeats_nothing() {
        let [old, other, again] = plans([&ingress("a", &port(80)), &ingress("a", &port(81)), &ingress("a", &port(81))]);
        let killed = other.covering(&old);
        assert_eq!(again.covering(&killed), killed);
        let [_, _, third] = plans([&ingress("a", &port(80)), &ingress("a", &port(81)), &ingress("a", &port(82))]);
        assert_eq!(shown(&third.covering(&killed)), [("a", 80), ("_new_a", 81), ("_new2_a", 82)]);
    }

    #[test]
    fn an_endpoint_that_changes_its_side_is_captured_on_both() {
        let egress = "[[egress]]\nname = \"a\"\nno_ra = true\n[egress.netfilter]\ncapture = [{ port = 80 }]\n";
        let [old, new] = plans([&ingress("a", &port(80)), egress]);
        let sides: Vec<_> = new.covering(&old).captures.into_iter().map(|c| (c.ident, c.side)).collect();
        assert_eq!(sides, [("a".to_owned(), Side::Egress), ("_new_a".to_owned(), Side::Ingress)]);
    }
}
