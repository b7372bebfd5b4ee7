//! The rulesets of each scenario, compared with the files in `tests/goldens` (`TNG_BLESS=1` writes them anew), and
//! read by the real nft inside a network namespace of their own.

use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use tng::capture::marks::EndpointId;
use tng::capture::plan::{CapturePlan, RulesPlan};
use tng::capture::{compile, render};
use tng::config::*;

fn entry(to: Option<&str>, port: Option<(u16, u16)>) -> Match {
    Match {
        to: to.map(|t| t.parse().unwrap()),
        port: port.map(|(first, last)| PortRange { first, last }),
        ..Match::default()
    }
}

fn netfilter(side: Side, capture: Vec<Match>) -> Netfilter {
    Netfilter {
        capture,
        exclude: Vec::new(),
        capture_local_traffic: false,
        preserve_source: side == Side::Egress,
        preserve_source_ports: PortRange { first: 1024, last: 32767 },
        so_mark: if side == Side::Egress { DEFAULT_EGRESS_MARK } else { DEFAULT_INGRESS_MARK },
        listen_port: None,
    }
}

fn endpoint(ident: &str, side: Side, id: u8, netfilter: Netfilter) -> CapturePlan {
    CapturePlan {
        ident: ident.into(),
        side,
        id: EndpointId(id),
        port: 40000 + u16::from(id) - 1,
        netfilter,
        refuse_new: false,
    }
}

fn plan(captures: Vec<CapturePlan>) -> RulesPlan {
    RulesPlan {
        instance: InstanceName::new("golden").unwrap(),
        owner_uid: 61000,
        captures,
        retired: Vec::new(),
        ingress_marks: vec![DEFAULT_INGRESS_MARK],
    }
}

fn ingress_entries() -> Vec<Match> {
    vec![entry(Some("198.51.100.0/24"), Some((8443, 8443))), entry(Some("2001:db8::/32"), Some((8000, 8100)))]
}

fn scenarios() -> Vec<(&'static str, RulesPlan)> {
    let ingress = || endpoint("api", Side::Ingress, 1, netfilter(Side::Ingress, ingress_entries()));
    let egress_netfilter = || netfilter(Side::Egress, vec![entry(None, Some((30001, 30001)))]);
    let egress = || endpoint("api", Side::Egress, 2, egress_netfilter());

    let mut qualified = netfilter(
        Side::Ingress,
        vec![
            Match { uid: Some(1000), ..entry(Some("192.0.2.0/24"), Some((80, 80))) },
            Match { cgroup: Some(CgroupPath("system.slice".into())), ..entry(None, Some((443, 443))) },
            Match { gid: Some(33), ..entry(Some("2001:db8:1::/48"), None) },
        ],
    );
    qualified.exclude = vec![entry(Some("192.0.2.53/32"), None)];

    let mut local = egress_netfilter();
    local.capture_local_traffic = true;
    let mut no_source = egress_netfilter();
    no_source.preserve_source = false;
    let mut addressed = netfilter(
        Side::Egress,
        vec![
            Match { iif: Some("eth0".into()), ..entry(Some("192.0.2.10/32"), Some((5432, 5433))) },
            entry(Some("2001:db8::10/128"), Some((5432, 5432))),
        ],
    );
    addressed.exclude = vec![entry(None, Some((5433, 5433)))];

    let mut two = plan(vec![
        ingress(),
        endpoint(
            "db",
            Side::Ingress,
            3,
            netfilter(Side::Ingress, vec![entry(Some("203.0.113.7/32"), Some((5432, 5432)))]),
        ),
    ]);
    two.ingress_marks = vec![Mark(700), DEFAULT_INGRESS_MARK];
    let mut retired = plan(vec![ingress()]);
    retired.retired = vec![(EndpointId(9), 40008)];
    let everything =
        netfilter(Side::Ingress, vec![entry(Some("0.0.0.0/0"), None), entry(Some("::/0"), Some((1, 1023)))]);

    // All of the port but one address, which another endpoint has with other settings.
    let mut all_but_one = egress_netfilter();
    all_but_one.exclude = vec![entry(Some("192.0.2.10/32"), Some((30001, 30001)))];
    let mut that_one = netfilter(Side::Egress, vec![entry(Some("192.0.2.10/32"), Some((30001, 30001)))]);
    that_one.so_mark = Mark(700);
    that_one.preserve_source = false;

    vec![
        ("ingress", plan(vec![ingress()])),
        ("ingress-qualified", plan(vec![endpoint("q", Side::Ingress, 1, qualified)])),
        ("ingress-everything", plan(vec![endpoint("all", Side::Ingress, 1, everything)])),
        ("ingress-two-endpoints", two),
        ("ingress-retired", retired),
        ("egress", plan(vec![egress()])),
        ("egress-local", plan(vec![endpoint("api", Side::Egress, 2, local)])),
        ("egress-no-source", plan(vec![endpoint("api", Side::Egress, 2, no_source)])),
        ("egress-addressed", plan(vec![endpoint("pg", Side::Egress, 2, addressed)])),
        (
            "egress-two-endpoints",
            plan(vec![endpoint("api", Side::Egress, 2, all_but_one), endpoint("one", Side::Egress, 4, that_one)]),
        ),
        ("both-sides", plan(vec![ingress(), egress()])),
    ]
}

fn render_all(plan: &RulesPlan) -> String {
    format!("{}{}", render::table(&compile::capture_table(plan)), render::table(&compile::guard_table(plan)))
}

#[test]
fn every_scenario_renders_as_its_golden_file() {
    let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/goldens");
    let mut wrong = Vec::new();
    for (name, plan) in scenarios() {
        let path = dir.join(format!("{name}.nft"));
        let got = render_all(&plan);
        if std::env::var_os("TNG_BLESS").is_some() {
            std::fs::create_dir_all(&dir).unwrap();
            std::fs::write(&path, &got).unwrap();
        }
        if std::fs::read_to_string(&path).unwrap_or_default() != got {
            wrong.push(name);
        }
    }
    assert!(wrong.is_empty(), "differ from tests/goldens (TNG_BLESS=1 writes them anew): {wrong:?}");
}

/// `nft -c` in a namespace of its own; the cgroup of the scenario must exist, so it is left out where it does not.
fn nft_accepts(text: &str) -> Result<(), String> {
    let mut command = Command::new("unshare");
    command.arg("--net");
    // In a chroot there is no new user namespace, for root neither (user_namespaces(7)).
    if !nix::unistd::geteuid().is_root() {
        command.arg("--map-root-user");
    }
    let mut child = command
        .args(["nft", "-c", "-f", "-"])
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("unshare and nft must be there: apt install util-linux nftables");
    // Who does not read the rules has said why on standard error.
    let unread = child.stdin.take().unwrap().write_all(text.as_bytes()).err().map(|e| format!("{e}: "));
    let out = child.wait_with_output().unwrap();
    if out.status.success() { Ok(()) } else { Err(unread.unwrap_or_default() + &String::from_utf8_lossy(&out.stderr)) }
}

#[test]
fn nft_accepts_every_scenario() {
    let cgroup2 = std::path::Path::new("/sys/fs/cgroup/system.slice").exists();
    for (name, mut plan) in scenarios() {
        if !cgroup2 {
            for c in &mut plan.captures {
                for e in &mut c.netfilter.capture {
                    e.cgroup = None;
                }
            }
        }
        for table in [compile::capture_table(&plan), compile::guard_table(&plan)] {
            let text = render::table(&table);
            if let Err(e) = nft_accepts(&text) {
                panic!("{name}, {}: {e}\n{text}", table.name);
            }
        }
    }
}

#[test]
fn no_endpoint_name_makes_two_chains_of_one_name() {
    let names = ["output", "forward", "input", "other", "postrouting", "prerouting", "return", "pin", "retired_9", "9"];
    for name in names {
        for side in [Side::Ingress, Side::Egress] {
            let entries = || vec![entry(Some("192.0.2.10/32"), Some((80, 80)))];
            let mut plan = plan(vec![
                endpoint(name, side, 1, netfilter(side, entries())),
                endpoint("api", Side::Ingress, 2, netfilter(Side::Ingress, entries())),
                endpoint("pg", Side::Egress, 3, netfilter(Side::Egress, entries())),
            ]);
            plan.retired = vec![(EndpointId(9), 40008)];
            for table in [compile::capture_table(&plan), compile::guard_table(&plan)] {
                let mut seen = std::collections::BTreeSet::new();
                for chain in &table.chains {
                    assert!(seen.insert(chain.name.clone()), "{name}, {}: chain {} twice", table.name, chain.name);
                }
            }
        }
    }
}

/// A base chain that returned on what one endpoint excludes would never ask the endpoint that captures it.
#[test]
fn what_one_endpoint_excludes_is_asked_of_the_others() {
    for side in [Side::Ingress, Side::Egress] {
        let mut wide = netfilter(side, vec![entry(Some("192.0.2.0/24"), Some((80, 80)))]);
        wide.exclude = vec![entry(Some("192.0.2.10/32"), Some((80, 80)))];
        let narrow = netfilter(side, vec![entry(Some("192.0.2.10/32"), Some((80, 80)))]);
        let plan = plan(vec![endpoint("wide", side, 1, wide), endpoint("narrow", side, 2, narrow)]);
        for table in [compile::capture_table(&plan), compile::guard_table(&plan)] {
            let shared = table.chains.iter().filter(|c| !c.name.ends_with("_wide") && !c.name.ends_with("_narrow"));
            for chain in shared {
                for rule in &chain.rules {
                    assert_ne!(rule.comment, "excluded", "{side}, {}: chain {}", table.name, chain.name);
                }
            }
        }
    }
}

/// Such a rule would never match: a packet in output has no incoming interface.
#[test]
fn no_rule_of_output_asks_for_the_incoming_interface() {
    for (name, plan) in scenarios() {
        for table in [compile::capture_table(&plan), compile::guard_table(&plan)] {
            let of_output = |c: &&tng::capture::ir::Chain| c.name == "output" || c.name.ends_with("_output");
            for rule in table.chains.iter().filter(of_output).flat_map(|c| &c.rules) {
                let asks = rule.matches.iter().any(|m| matches!(m, tng::capture::ir::Match::IifName(_)));
                assert!(!asks, "{name}, {}: {rule:?}", table.name);
            }
        }
    }
}

#[test]
fn nft_refuses_what_is_not_a_ruleset() {
    assert!(nft_accepts("table inet tng_x { chain c { no such match accept } }").is_err());
}

#[test]
fn every_rule_has_a_comment_that_nft_can_store() {
    for (name, plan) in scenarios() {
        for table in [compile::capture_table(&plan), compile::guard_table(&plan)] {
            for rule in table.chains.iter().flat_map(|c| &c.rules) {
                assert!(!rule.comment.is_empty() && rule.comment.len() <= 128, "{name}: {rule:?}");
            }
        }
    }
}

#[test]
fn no_rule_touches_the_upper_half_of_a_mark() {
    for (_, plan) in scenarios() {
        let text = render_all(&plan);
        for line in text.lines().filter(|l| l.contains("mark set")) {
            assert!(line.contains("mark & 0xffff0000"), "unmasked write: {line}");
        }
    }
}
