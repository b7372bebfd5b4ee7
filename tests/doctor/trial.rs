//! The trial SYN: what it finds in set-ups where every part is in order and nothing connects, and that it leaves nothing.

use serde_json::Value;

use super::lab::{Lab, PORT, TO_SERVER, egress, ingress};
use super::netns::{Host, Tng, kernel_state};
use super::real::{doctor, kernel_errors};
use super::table::Fate;

/// Where a set-up is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum At {
    Client,
    Server,
}

/// A set-up of a host.
struct Case {
    name: &'static str,
    at: At,
    /// What other software does there.
    make: fn(&Lab),
    /// Whether the tunnel works then.
    served: bool,
    /// The ids of the errors.
    errors: &'static [&'static str],
    /// What each of these findings says, and a part of its command.
    says: &'static [(&'static str, &'static str, &'static str)],
}

const RAW: &str = "type filter hook prerouting priority raw";
const MANGLE: [&str; 2] =
    ["type filter hook prerouting priority mangle - 5", "type route hook output priority mangle - 5"];

/// The reports of the field (docs/field.md, 11 to 13) and what stands beside them.
const CASES: &[Case] = &[
    Case {
        name: "a reverse path filter in firewalld's place",
        at: At::Client,
        make: |lab| rpfilter(&lab.world.client, 10),
        served: true,
        errors: &[],
        says: &[],
    },
    Case {
        name: "a reverse path filter behind tproxy",
        at: At::Client,
        make: |lab| rpfilter(&lab.world.client, 30),
        served: false,
        errors: &["trial-syn"],
        says: &[("trial-syn", "(prerouting, priority 30): fib saddr . mark . iif oif missing drop", "iif lo accept")],
    },
    Case {
        name: "a policy rule that takes the ingress's mark",
        at: At::Client,
        make: |lab| cilium(&lab.world.client),
        served: false,
        errors: &["own-marks"],
        says: &[("own-marks", "so_mark 566 (0x236) of in/in", "so_mark = 309")],
    },
    Case {
        name: "a policy rule that takes the egress's mark",
        at: At::Server,
        make: |lab| cilium(&lab.world.server),
        served: false,
        errors: &["own-marks", "trial-syn"],
        says: &[
            ("trial-syn", "came back by lo", "own-marks"),
            ("own-marks", "so_mark 565 (0x235) of out/out", "so_mark = 309"),
        ],
    },
    Case {
        name: "a policy rule that takes what is captured",
        at: At::Client,
        make: |lab| {
            for family in ["-4", "-6"] {
                let host = &lab.world.client;
                host.sh(&format!("ip {family} rule add pref 9 fwmark 0x400/0x400 lookup main"));
            }
        },
        served: false,
        errors: &["policy-rules", "trial-syn"],
        says: &[
            ("policy-rules", "ip -4 rule pref 9 fwmark 0x400/0x400 lookup main", "ip -4 rule del pref 9"),
            ("trial-syn", "by tng's own chain", "policy-rules"),
        ],
    },
    Case {
        name: "connmark restored whole",
        at: At::Client,
        make: |lab| MANGLE.iter().for_each(|hook| lab.world.client.chain(hook, &["meta mark set ct mark"])),
        served: false,
        errors: &["mark-writers"],
        says: &[("mark-writers", "put the connection's mark over", "meta mark & 0xffff 0")],
    },
    Case {
        name: "wg-quick with a default route",
        at: At::Client,
        make: |lab| wg_quick(&lab.world.client, "c0"),
        served: false,
        errors: &["filter-rules", "trial-syn"],
        says: &[
            ("filter-rules", "wg-quick's rule", "iif lo accept"),
            ("trial-syn", "the listener's answer", "iif lo accept"),
        ],
    },
    Case {
        name: "wg-quick with a default route on an egress that keeps the source",
        at: At::Server,
        make: |lab| wg_quick(&lab.world.server, "s0"),
        served: false,
        errors: &["filter-rules"],
        says: &[("filter-rules", "wg-quick's rule", "iif lo accept")],
    },
    Case {
        name: "output with policy drop and oif lo accept",
        at: At::Client,
        make: |lab| {
            let lines = [
                "oif lo accept",
                "meta l4proto 58 accept",
                "meta mark & 0xffff { 565, 566 } accept",
                "udp dport 9 accept",
            ];
            lab.world.client.chain("type filter hook output priority filter; policy drop", &lines);
        },
        served: false,
        errors: &["trial-syn"],
        says: &[("trial-syn", "(output, priority 0): policy drop", "meta mark & 0xff00 == 0x0600 accept")],
    },
    Case {
        name: "docker -p of the captured port",
        at: At::Server,
        make: docker,
        served: false,
        errors: &["filter-rules"],
        says: &[("filter-rules", "captures port 8080", "preserve_source = false")],
    },
    Case {
        name: "a firewall of the egress's host that closes the port",
        at: At::Server,
        make: |lab| lab.world.server.chain(RAW, &["tcp dport 8080 drop"]),
        served: false,
        errors: &["trial-syn"],
        says: &[("trial-syn", "(prerouting, priority -300): tcp dport 8080 drop", "tcp dport 8080 accept")],
    },
    Case {
        name: "a firewall of the egress's host that closes the port by interface",
        at: At::Server,
        make: |lab| lab.world.server.chain(RAW, &["iifname { s0, lo } accept", "tcp dport 8080 drop"]),
        served: true,
        errors: &[],
        says: &[],
    },
];

fn rpfilter(host: &Host, place: i32) {
    let hook = format!("type filter hook prerouting priority filter + {place}");
    host.chain(&hook, &["fib saddr . mark . iif oif missing drop"]);
}

fn cilium(host: &Host) {
    for family in ["-4", "-6"] {
        host.sh(&format!(
            "ip {family} rule add pref 9 fwmark 0x200/0xf00 lookup 2004
             ip {family} route add local default dev lo table 2004"
        ));
    }
}

fn wg_quick(host: &Host, device: &str) {
    let rules = super::netns::Family::BOTH.map(|family| {
        let (protocol, addr) = (if family == super::netns::Family::V4 { "ip" } else { "ip6" }, host.addr(family));
        format!("iifname != \"{device}\" {protocol} daddr {addr} fib saddr type != local drop")
    });
    host.chain(RAW, &[&rules[0], &rules[1]]);
}

/// The published port of a container, as docker's rules have it for what comes in and for what the host itself sends.
fn docker(lab: &Lab) {
    lab.backend();
    for hook in ["prerouting priority -100", "output priority -100"] {
        let rules = super::netns::Family::BOTH.map(|family| {
            let (protocol, to) = if family == super::netns::Family::V4 {
                ("ip", lab.world.backend.addr(family).to_string())
            } else {
                ("ip6", lab.world.backend.addr(family).to_string())
            };
            format!("fib daddr type local tcp dport {PORT} dnat {protocol} to {to}")
        });
        lab.world.server.chain(&format!("type nat hook {hook}"), &[&rules[0], &rules[1]]);
    }
}

fn served(lab: &Lab) -> bool {
    let seen = lab.each(|family| lab.exchange(family, &super::netns::Connect::default()));
    let answered = seen.iter().filter(|s| s.fate == Fate::Delivered).count();
    assert!(answered == 0 || answered == 2, "one family: {seen:?}");
    answered == 2
}

#[test]
fn a_healthy_host_has_no_error_and_the_trial_leaves_nothing() {
    let lab = Lab::new();
    let (i, e) = lab.start();
    for (host, tng, name) in [(&lab.world.client, &i, "in"), (&lab.world.server, &e, "out")] {
        let before = kernel_state(host);
        let accepted = status(tng);
        let (_, found) = doctor(host);
        assert_eq!(kernel_errors(&found), [""; 0], "{found:#?}");
        let trial: Vec<&Value> = found.iter().filter(|f| f["id"] == "trial-syn").collect();
        let what = format!("endpoint {name}: a trial SYN reaches the listener (IPv4, IPv6)");
        assert!(trial.len() == 1 && trial[0]["severity"] == "ok" && trial[0]["what"] == what, "{trial:#?}");
        assert_eq!(kernel_state(host), before, "the trial leaves nothing");
        assert_eq!(status(tng), accepted, "nobody was dialled, and nothing refused");
    }
    assert!(served(&lab));
}

/// What the data plane itself counts of connections and refusals.
fn status(tng: &Tng<'_>) -> Vec<String> {
    let text = tng.get("/metrics").expect("metrics");
    let counts = ["tng_connections", "tng_refus"];
    text.lines()
        .filter(|l| counts.iter().any(|c| l.starts_with(c)) && !l.contains("captured"))
        .map(str::to_owned)
        .collect()
}

/// Runs the lines that were given for rules, as an operator would, and says what is not well then.
fn mended(lab: &Lab, host: &Host, found: &[Value]) -> Option<String> {
    let errors = found.iter().filter(|f| f["severity"] == "error");
    let lines: Vec<&str> = errors.filter_map(|f| f["fix"].as_str()).filter(|l| l.starts_with("nft insert")).collect();
    if lines.is_empty() {
        return None;
    }
    lines.iter().for_each(|line| drop(host.sh(line)));
    if !served(lab) {
        return Some(format!("not served after {lines:?}"));
    }
    let (_, left) = doctor(host);
    (!kernel_errors(&left).is_empty()).then(|| format!("errors are left after {lines:?}: {left:#?}"))
}

#[test]
fn each_set_up_that_breaks_captures_is_found_with_the_line_that_mends_it() {
    let only = std::env::var("TNG_ROW").unwrap_or_default();
    let mut wrong = Vec::new();
    for case in CASES.iter().filter(|c| c.name.contains(&only)) {
        let lab = Lab::new();
        (case.make)(&lab);
        let _tng = lab.start_with(&ingress(TO_SERVER), &egress(""));
        if served(&lab) != case.served {
            wrong.push(format!("{}: served is not {}", case.name, case.served));
        }
        let host = if case.at == At::Client { &lab.world.client } else { &lab.world.server };
        let (_, found) = doctor(host);
        let mut errors = kernel_errors(&found);
        errors.dedup();
        if errors != case.errors {
            wrong.push(format!("{}: errors are {errors:?}: {found:#?}", case.name));
        }
        for (id, what, fix) in case.says {
            let has = |f: &&Value| {
                let text = |key: &str| f[key].as_str().unwrap_or_default().to_owned();
                f["id"] == *id && text("what").contains(what) && text("fix").contains(fix)
            };
            if !found.iter().any(|f| has(&f)) {
                let of: Vec<&Value> = found.iter().filter(|f| f["id"] == *id).collect();
                wrong.push(format!("{}: no {id} with {what:?} and {fix:?}: {of:#?}", case.name));
            }
        }
        if let Some(said) = mended(&lab, host, &found) {
            wrong.push(format!("{}: {said}", case.name));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
