//! What `nft monitor trace` says of the trial's packets.
//!
//! A line is `trace id ID FAMILY TABLE CHAIN`, then `packet: ...`, `rule TEXT (verdict V)`, `policy V` or `verdict V`.
//! The id names a packet only until it passes lo.

use std::collections::HashMap;

/// Lines kept at most: a trial takes some fifty.
const MAX_STEPS: usize = 4000;

/// Which packet a step is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// The SYN.
    Syn,
    /// What came back.
    Answer,
}

/// What happened there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// It entered the chain.
    Entered,
    /// A rule matched.
    Rule {
        /// The rule, as nft writes it.
        text: String,
        /// What it decided.
        verdict: String,
    },
    /// The end of the chain was reached.
    Policy(String),
}

/// One line about a packet of the trial.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Step {
    /// Which packet.
    pub way: Way,
    /// Family and table.
    pub table: String,
    /// The chain.
    pub chain: String,
    /// The outgoing device where it was seen with one; else the device that it came in by.
    pub device: String,
    /// What happened.
    pub event: Event,
}

impl Step {
    /// Whether the packet ends here, and by which text: a rule's, or the policy.
    pub fn ends(&self) -> Option<String> {
        match &self.event {
            Event::Rule { text, verdict } if verdict == "drop" || verdict.starts_with("queue") => Some(text.clone()),
            Event::Policy(verdict) if verdict == "drop" => Some("policy drop".to_owned()),
            _ => None,
        }
    }
}

/// The lines so far, by the trial's own port.
#[derive(Debug, Default)]
pub(super) struct Trace {
    ports: Vec<u16>,
    /// Whose packet an id is now.
    packets: HashMap<String, (u16, Way, String)>,
    steps: Vec<(u16, Step)>,
}

impl Trace {
    /// For trials from these ports.
    pub fn new(ports: Vec<u16>) -> Self {
        Self { ports, ..Self::default() }
    }

    /// Takes one line.
    pub fn take(&mut self, line: &str) {
        let Some(rest) = line.strip_prefix("trace id ") else { return };
        let mut words = rest.splitn(5, ' ');
        let mut word = || words.next().map(str::to_owned);
        let (Some(id), Some(family), Some(table), Some(chain), Some(said)) = (word(), word(), word(), word(), word())
        else {
            return;
        };
        let event = if let Some(packet) = said.strip_prefix("packet: ") {
            match self.whose(packet) {
                Some(whose) => self.packets.insert(id.clone(), whose),
                None => self.packets.remove(&id),
            };
            Event::Entered
        } else if let Some(rule) = said.strip_prefix("rule ") {
            let (text, verdict) = rule.rsplit_once(" (verdict ").unwrap_or((rule, ""));
            let verdict = verdict.split(')').next().unwrap_or_default();
            Event::Rule { text: text.to_owned(), verdict: verdict.to_owned() }
        } else if let Some(verdict) = said.strip_prefix("policy ") {
            // The packet's mark follows where it has one.
            Event::Policy(verdict.split(' ').next().unwrap_or_default().to_owned())
        } else {
            return;
        };
        let Some((port, way, device)) = self.packets.get(&id).cloned() else { return };
        if self.steps.len() < MAX_STEPS {
            self.steps.push((port, Step { way, table: format!("{family} {table}"), chain, device, event }));
        }
    }

    fn whose(&self, packet: &str) -> Option<(u16, Way, String)> {
        let words: Vec<&str> = packet.split(' ').collect();
        let after =
            |name: &str| words.windows(3).find(|w| w[0] == "tcp" && w[1] == name).and_then(|w| w[2].parse().ok());
        let device = |name: &str| words.windows(2).find(|w| w[0] == name).map(|w| w[1].trim_matches('"').to_owned());
        let (from, to): (u16, u16) = (after("sport")?, after("dport")?);
        let device = device("oif").or_else(|| device("iif")).unwrap_or_default();
        if self.ports.contains(&from) {
            Some((from, Way::Syn, device))
        } else if self.ports.contains(&to) {
            Some((to, Way::Answer, device))
        } else {
            None
        }
    }

    /// Whether the trial from `port` is known to have ended in a chain.
    pub fn is_lost(&self, port: u16) -> bool {
        self.steps.iter().any(|(p, step)| *p == port && step.ends().is_some())
    }

    /// The steps of the trial from `port`.
    pub fn of(&self, port: u16) -> Vec<Step> {
        self.steps.iter().filter(|(p, _)| *p == port).map(|(_, step)| step.clone()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As nft 1.0.6 writes them.
    const LINES: &[&str] = &[
        "trace id 00000001 inet other c packet: oif \"c0\" ip saddr 198.51.100.2 tcp sport 40000 tcp dport 8080 tcp flags == syn ",
        "trace id 00000001 inet other c rule tcp dport 8080 jump d (verdict jump d) meta mark 0x00000601 ",
        "trace id 00000001 inet other c policy drop meta mark 0x00000601 ",
        "trace id 00000002 inet other c packet: oif \"c0\" ip saddr 198.51.100.2 tcp sport 40001 tcp dport 8080 tcp flags == syn ",
        "trace id 00000002 inet other c policy drop ",
        "trace id 00000003 ip w p packet: iif \"lo\" ip saddr 203.0.113.1 tcp sport 8080 tcp dport 40000 tcp flags == 0x12 ",
        "trace id 00000003 ip w p rule iifname != \"wg0\" drop (verdict drop)",
    ];

    #[test]
    fn steps_are_of_the_trial_alone_and_both_ways() {
        let mut trace = Trace::new(vec![40000]);
        LINES.iter().for_each(|line| trace.take(line));
        let steps = trace.of(40000);
        assert_eq!(steps.len(), 5, "{steps:#?}");
        let jump = Event::Rule { text: "tcp dport 8080 jump d".into(), verdict: "jump d".into() };
        assert_eq!((steps[0].way, &steps[1].event), (Way::Syn, &jump));
        assert_eq!(steps[2].ends().as_deref(), Some("policy drop"));
        assert_eq!((steps[3].way, steps[3].device.as_str(), steps[3].table.as_str()), (Way::Answer, "lo", "ip w"));
        assert_eq!(steps[4].ends().as_deref(), Some("iifname != \"wg0\" drop"));
        assert!(trace.is_lost(40000) && !trace.is_lost(40001), "another's packet");
    }

    #[test]
    fn what_is_no_trace_is_passed_over() {
        let mut trace = Trace::new(vec![40000]);
        for line in ["", "trace id", "trace id 1 inet", "# new generation 3", "trace id 1 inet t c rule"] {
            trace.take(line);
        }
        assert_eq!(trace.of(40000), []);
    }
}
