//! One fault each, and the whole host beside it.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, UNIX_EPOCH};

use tng::attest::VerifyError;
use tng::attest::host::{HostError, HostEvidence};
use tng::ctl::Style;
use tng::ctl::doctor::{AgentError, Check, Fate, Ran, Rules, Severity, doctor};

use super::world::{FakeHost, NOW, done, failed};

/// What each fault is: the check that must see it, how bad it is, a part of the text and of the command.
type Fault = (Check, Severity, fn(&mut FakeHost), &'static str, &'static str);

const FAULTS: &[Fault] = &[
    (Check::KernelVersion, Severity::Error, |h| h.write("/proc/sys/kernel/osrelease", "5.10.0-30"), "5.10.0-30", "apt"),
    (
        Check::NftProgram,
        Severity::Error,
        |h| h.answer("nft --version", Ran::NotRun("nft: not found".into())),
        "not found",
        "apt install nftables",
    ),
    (
        Check::NftProgram,
        Severity::Error,
        |h| h.answer("nft --version", done("nftables v0.9.8 (E.D.S.)")),
        "0.9.8",
        "apt",
    ),
    (Check::NftTproxy, Severity::Error, broken_nft, "CONFIG_NFT_TPROXY", "modprobe nft_tproxy"),
    (Check::NftSocket, Severity::Error, broken_nft, "CONFIG_NFT_SOCKET", "modprobe nft_socket"),
    (Check::NftFib, Severity::Error, broken_nft, "CONFIG_NFT_FIB_INET", "modprobe nft_fib_inet"),
    (Check::NftConntrack, Severity::Error, broken_nft, "CONFIG_NFT_CT", "modprobe nft_ct"),
    (Check::NftReject, Severity::Error, broken_nft, "CONFIG_NFT_REJECT_INET", "modprobe nft_reject_inet"),
    (Check::NftNat, Severity::Error, broken_nft, "CONFIG_NFT_NAT", "modprobe nft_chain_nat"),
    (Check::NftOwner, Severity::Error, broken_nft, "5.12", "modprobe nf_tables"),
    (Check::NftCgroup, Severity::Error, broken_nft, "CONFIG_SOCK_CGROUP_DATA", "modprobe nft_socket"),
    (
        Check::Ipv6OnLo,
        Severity::Error,
        |h| h.write("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "1"),
        "disable_ipv6 is 1",
        "net.ipv6.conf.lo.disable_ipv6=0",
    ),
    (
        Check::FwmarkAccept,
        Severity::Error,
        |h| h.write("/proc/sys/net/ipv4/tcp_fwmark_accept", "1"),
        "tcp_fwmark_accept",
        "tcp_fwmark_accept=0",
    ),
    (Check::Somaxconn, Severity::Warning, |h| h.write("/proc/sys/net/core/somaxconn", "128"), "128", "somaxconn=4096"),
    (
        Check::ConntrackTable,
        Severity::Error,
        |h| h.write("/proc/sys/net/netfilter/nf_conntrack_count", "262144"),
        "full",
        "nf_conntrack_max=524288",
    ),
    (
        Check::ConntrackTable,
        Severity::Warning,
        |h| h.write("/proc/sys/net/netfilter/nf_conntrack_count", "250000"),
        "250000 of 262144",
        "nf_conntrack_max",
    ),
    (
        Check::Ptrace,
        Severity::Warning,
        |h| h.write("/proc/sys/kernel/yama/ptrace_scope", "3"),
        "ptrace_scope is 3",
        "ptrace_scope=1",
    ),
    (
        Check::NetworkdRules,
        Severity::Warning,
        |h| h.answer("systemctl is-active systemd-networkd", done("active")),
        "ManageForeignRoutingPolicyRules and ManageForeignRoutes",
        "networkd.conf.d/50-tng.conf",
    ),
    (
        Check::PolicyRules,
        Severity::Error,
        |h| {
            h.answer("ip -4", done(r#"[{"priority":100,"src":"all","fwmark":"0x400","fwmask":"0x400","table":"100"}]"#))
        },
        "fwmark 0x400/0x400",
        "ip -4 rule del pref 100",
    ),
    (
        Check::PolicyRules,
        Severity::Warning,
        |h| {
            let rule = r#"{"priority":100,"src":"all","dst":"10.0.0.0","dstlen":8,"table":"100"}"#;
            h.answer("ip -4", done(&format!("[{rule}]")));
        },
        "ip -4 rule pref 100 lookup 100",
        "ip -4 rule del pref 100",
    ),
    (
        Check::OwnMarks,
        Severity::Warning,
        |h| {
            let rule = r#"{"priority":9,"src":"all","dst":"10.0.0.0","dstlen":8,"fwmark":"0x236","table":"2004"}"#;
            h.answer("ip -4", done(&format!("[{rule}]")));
        },
        "so_mark 566",
        "so_mark = ",
    ),
    (
        Check::OwnMarks,
        Severity::Error,
        |h| h.answer("ip -4", done(r#"[{"priority":9,"src":"all","fwmark":"0x200","fwmask":"0xf00","table":"2004"}]"#)),
        "so_mark 566 (0x236) of in/in by ip -4 rule pref 9 fwmark 0x200/0xf00 lookup 2004",
        "so_mark = 309",
    ),
    (
        Check::MarkWriters,
        Severity::Error,
        |h| {
            let rule = r#"{"rule":{"family":"inet","table":"m","chain":"p","expr":[{"mangle":{"key":{"meta":{"key":"mark"}},"value":{"ct":{"key":"mark"}}}}]}}"#;
            h.answer("nft -j list table", done(&format!(r#"{{"nftables":[{rule}]}}"#)));
        },
        "inet m p",
        "meta mark & 0xffff 0",
    ),
    (
        Check::MarkWriters,
        Severity::Note,
        |h| {
            let rule = r#"{"rule":{"family":"ip","table":"mangle","chain":"OUTPUT","expr":[{"mangle":{"key":{"meta":{"key":"mark"}},"value":7}}]}}"#;
            h.answer("nft -j list table", done(&format!(r#"{{"nftables":[{rule}]}}"#)));
        },
        "ip mangle OUTPUT",
        "meta mark set",
    ),
    (
        Check::FilterRules,
        Severity::Error,
        |h| {
            let expr = r#"{"match":{"op":"!=","left":{"meta":{"key":"iifname"}},"right":"wg0"}},{"match":{"op":"==","left":{"payload":{"protocol":"ip","field":"daddr"}},"right":"192.0.2.11"}},{"match":{"op":"!=","left":{"fib":{"result":"type","flags":["saddr"]}},"right":"local"}},{"drop":null}"#;
            let rule =
                format!(r#"{{"rule":{{"family":"ip","table":"wg-quick-wg0","chain":"preraw","expr":[{expr}]}}}}"#);
            h.answer("nft -j list table", done(&format!(r#"{{"nftables":[{rule}]}}"#)));
        },
        "ip wg-quick-wg0 preraw",
        "nft insert rule ip wg-quick-wg0 preraw iif lo accept",
    ),
    (
        Check::TrialSyn,
        Severity::Error,
        |h| h.fate = Fate::Silent,
        "endpoint in, IPv4: a trial SYN was lost",
        "nft list ruleset",
    ),
    (
        Check::Docker,
        Severity::Note,
        |h| h.answer("systemctl is-active docker", done("active")),
        "docker",
        "preserve_source",
    ),
    (
        Check::Firewalld,
        Severity::Note,
        |h| h.answer("systemctl is-active firewalld", done("active")),
        "firewalld",
        "firewall-cmd",
    ),
    (
        Check::LegacyTables,
        Severity::Note,
        |h| h.write("/proc/net/ip_tables_names", "mangle\n"),
        "legacy",
        "iptables-legacy",
    ),
    (
        Check::SavedRules,
        Severity::Error,
        |h| h.write("/etc/nftables.conf", "flush ruleset\ntable inet tng_in {\n}\n"),
        "tables of tng: tng_in",
        "sed -i",
    ),
    (
        Check::FlushRuleset,
        Severity::Note,
        |h| {
            h.write("/etc/nftables.conf", "#!/usr/sbin/nft -f\nflush ruleset\n");
            h.answer("systemctl is-active nftables", done("active"));
        },
        "flush ruleset",
        "",
    ),
    (
        Check::CgroupLayout,
        Severity::Error,
        |h| {
            h.remove("/sys/fs/cgroup/cgroup.controllers");
            h.write("/sys/fs/cgroup/unified/cgroup.controllers", "");
        },
        "cgroup v1",
        "systemd.unified_cgroup_hierarchy=1",
    ),
    (
        Check::CgroupSlice,
        Severity::Error,
        |h| h.remove("/sys/fs/cgroup/system.slice/cgroup.procs"),
        "system.slice",
        "systemctl start system.slice",
    ),
    (
        Check::SystemdVersion,
        Severity::Error,
        |h| h.answer("systemctl --version", done("systemd 247 (247.3)")),
        "247",
        "apt",
    ),
    (
        Check::UnitState,
        Severity::Error,
        |h| h.unit("", "ActiveState=failed\nResult=exit-code", ""),
        "tng@in.service failed: exit-code",
        "systemctl reset-failed tng@in.service",
    ),
    (
        Check::UnitState,
        Severity::Error,
        |h| h.unit("ActiveState=inactive", "", ""),
        "without its socket",
        "systemctl restart tng@in.socket",
    ),
    (
        Check::UnitEnabled,
        Severity::Warning,
        |h| h.unit("UnitFileState=disabled", "UnitFileState=disabled", "UnitFileState=disabled"),
        "not enabled",
        "systemctl enable tng@in",
    ),
    (
        Check::UnitRestarts,
        Severity::Warning,
        |h| h.unit("", "NRestarts=7", ""),
        "7 times",
        "journalctl -u tng@in.service",
    ),
    (Check::UnitStale, Severity::Warning, |h| h.unit("", "NeedDaemonReload=yes", ""), "changed", "daemon-reload"),
    (
        Check::UnitSandbox,
        Severity::Warning,
        |h| {
            let drop_in = "/etc/systemd/system/tng@in.service.d/x.conf";
            h.unit("", &format!("User=root\nDropInPaths=/run/systemd/generator/g.conf {drop_in}"), "");
            h.agent = Err(AgentError::NotTried("not this user".into()));
        },
        "User=root",
        "rm /etc/systemd/system/tng@in.service.d/x.conf &&",
    ),
    (Check::User, Severity::Error, |h| h.user = None, "no user tng", "systemd-sysusers"),
    (Check::ConfigValid, Severity::Error, |h| h.config("[[ingress]]\nport = 1\n"), "in.toml:", "tngctl check in"),
    (Check::ConfigAccess, Severity::Error, |h| h.mode(0o600), "cannot read", "chmod 0640"),
    (
        Check::ConfigAccess,
        Severity::Warning,
        |h| {
            h.mode(0o644);
            h.dir_mode(0o755);
        },
        "everybody may read",
        "chmod 0640",
    ),
    (Check::ConfigAccess, Severity::Warning, |h| h.mode(0o660), "others than root may write", "chmod 0640"),
    (
        Check::ConfigApplied,
        Severity::Warning,
        |h| h.write("/run/tng/.net/in.toml", "# what was"),
        "not applied",
        "tngctl reload in",
    ),
    (Check::ConfigApplied, Severity::Warning, |h| h.running[0].config_loaded_at = 1, "not applied", "tngctl reload in"),
    (
        Check::RulesPresent,
        Severity::Error,
        |h| h.rules().capture_table = false,
        "tng_in is not there",
        "tngd net up in",
    ),
    (
        Check::RulesPresent,
        Severity::Error,
        |h| h.rules().drift = Some("table inet tng_in was changed".into()),
        "was changed",
        "tngd net up in",
    ),
    (Check::RulesPresent, Severity::Error, |h| h.rules = Err("no".into()), "[nft-refused]", "nft list tables"),
    (
        Check::RoutesPresent,
        Severity::Error,
        |h| h.rules().missing_routes.push("IPv4 policy rule".into()),
        "IPv4 policy rule",
        "tngd net up in",
    ),
    (
        Check::GuardRunning,
        Severity::Error,
        |h| h.rules().guard_running = false,
        "does not run",
        "systemctl restart tng-guard@in",
    ),
    (
        Check::GuardTable,
        Severity::Error,
        |h| h.rules().guard_table = None,
        "not there",
        "systemctl restart tng-guard@in",
    ),
    (Check::GuardTable, Severity::Error, |h| h.rules().guard_table = Some(false), "no owner", "nft delete table"),
    (Check::AaSocket, Severity::Error, |h| h.remove("/run/tng/aa.sock"), "No such file", "tng-aa-proxy.socket"),
    (
        Check::AaSocket,
        Severity::Error,
        |h| {
            h.remove("/run/tng/aa.sock");
            h.write("/run/tng/aa.sock", "");
        },
        "not a socket",
        "tng-aa-proxy.socket",
    ),
    (
        Check::AaAccess,
        Severity::Error,
        |h| h.agent = Err(AgentError::Denied),
        "user tng may not connect",
        "systemctl restart tng-aa-proxy.socket",
    ),
    (
        Check::AaAnswer,
        Severity::Error,
        |h| h.agent = Err(AgentError::Unreachable("Connection refused".into())),
        "Connection refused",
        "tng-aa-proxy.socket",
    ),
    (
        Check::AaAnswer,
        Severity::Error,
        |h| h.agent = Err(AgentError::Answer("garbage".into())),
        "garbage",
        "journalctl",
    ),
    (
        Check::EvidenceHelper,
        Severity::Error,
        |h| own_evidence(h),
        "evidence.sock: No such file",
        "systemctl enable --now tng-evidence.socket",
    ),
    (
        Check::EvidenceHelper,
        Severity::Error,
        |h| {
            own_evidence(h);
            h.write("/run/tng/evidence.sock", "");
        },
        "not a socket",
        "tng-evidence.socket",
    ),
    (
        Check::EvidenceHelper,
        Severity::Error,
        |h| {
            own_evidence(h);
            helper(h, || Err(HostError::TpmUnreachable("/dev/tpmrm0: gone".into())));
        },
        "[tpm-unreachable]",
        "dmesg",
    ),
    (Check::Tee, Severity::Warning, |h| h.remove("/dev/tdx_guest"), "no TEE", "modprobe"),
    (Check::Tee, Severity::Warning, |h| h.agent = Ok("sample".into()), "TEE is sample", ""),
    (Check::Tee, Severity::Note, |h| h.agent = Ok("tpm".into()), "TEE is tpm", "AA_TPM_DEVICE=/dev/tpmrm0"),
    (
        Check::SampleEvidence,
        Severity::Warning,
        |h| {
            let text = std::fs::read_to_string(tng::ctl::doctor::Host::path(h, "/etc/tng/in.toml")).expect("config");
            h.config(&text.replace("[ingress.attest]", "allow_sample = true\n[ingress.attest]"));
        },
        "in accepts it",
        "grep",
    ),
    (
        Check::AsAnswer,
        Severity::Error,
        |h| h.service = Err(VerifyError::AsUnreachable("refused".into())),
        "[as-unreachable]",
        "curl -v http://127.0.0.1:8080/.well-known/jwks.json",
    ),
    (
        Check::AaAnswer,
        Severity::Error,
        // Nobody listens there.
        |h| attest(h, "asr_addr = \"http://127.0.0.1:1\""),
        "[aa-unreachable]",
        "curl -v http://127.0.0.1:1/info",
    ),
    (
        Check::AsAnswer,
        Severity::Error,
        |h| {
            attest(h, "provider = \"sample\"\nmodel = \"passport\"\nas_addr = \"http://127.0.0.1:8099/\"");
            h.service = Err(VerifyError::AsUnreachable("refused".into()));
        },
        "[as-unreachable]",
        "curl -v http://127.0.0.1:80",
    ),
    (Check::AsClock, Severity::Error, |h| date(h, NOW + Duration::from_secs(90)), "90 s", "timedatectl"),
    (Check::AsClock, Severity::Warning, |h| date(h, NOW - Duration::from_secs(45)), "45 s", "timedatectl"),
    (Check::GuardAccess, Severity::Error, |h| h.owner(1000, 0o640), "the guard cannot read it", "chown root:tng"),
    (Check::InstanceConflicts, Severity::Error, |h| h.write("/etc/tng/other.toml", OTHER), "in.toml", "tngctl check"),
    (
        Check::Collateral,
        Severity::Error,
        |h| builtin(h, &format!("collateral = [\"{COLLATERAL}\"]")),
        "ended",
        "fetch new collateral",
    ),
    (
        Check::Collateral,
        Severity::Warning,
        |h| {
            let pccs = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
            let addr = pccs.local_addr().expect("address");
            // It listens for as long as the test runs.
            std::mem::forget(pccs);
            builtin(h, &format!("collateral = [\"{COLLATERAL}\"]\npccs_addr = \"http://{addr}/\""));
        },
        "ended",
        "is asked instead",
    ),
    (
        Check::Collateral,
        Severity::Error,
        |h| {
            let copy = tng::ctl::doctor::Host::path(h, "/etc/tng-collateral.json");
            std::fs::copy(COLLATERAL, &copy).expect("copy");
            std::fs::set_permissions(&copy, std::fs::Permissions::from_mode(0o600)).expect("mode");
            builtin(h, &format!("collateral = [\"{}\"]", copy.display()));
        },
        "user tng cannot read it",
        "chmod a+r",
    ),
    (
        Check::CollateralService,
        Severity::Error,
        |h| builtin(h, "pccs_addr = \"http://127.0.0.1:1/\""),
        "PCCS at http://127.0.0.1:1/",
        "curl -v http://127.0.0.1:1/",
    ),
    (Check::ClockYear, Severity::Error, |h| h.now = UNIX_EPOCH + Duration::from_secs(86400), "1970", "timedatectl"),
    (
        Check::ClockSynchronised,
        Severity::Warning,
        |h| h.answer("timedatectl", done("no\n")),
        "not synchronised",
        "timedatectl set-ntp true",
    ),
];

/// Collateral that ended in July 2025.
const COLLATERAL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/fixtures/quotes/tdx_quote_collateral.json");

/// An instance that captures what `in` does.
const OTHER: &str = r#"
[[ingress]]
name = "other"
[ingress.netfilter]
capture = [{ to = "203.0.113.7", port = 8080, cgroup = "system.slice" }]
[ingress.verify]
provider = "sample"
allow_sample = true
"#;

/// Appraisal in process, with these lines.
fn builtin(host: &mut FakeHost, lines: &str) {
    host.config(&format!(
        "[[ingress]]\nname = \"in\"\n[ingress.netfilter]\n\
         capture = [{{ to = \"203.0.113.0/24\", port = 8080 }}]\n\
         [ingress.verify]\nprovider = \"builtin\"\n{lines}\n\
         [[ingress.verify.reference]]\ntee = \"tdx\"\nmr_td = \"{}\"\n",
        "ab".repeat(48)
    ));
}

/// Other lines in the attest table.
fn attest(host: &mut FakeHost, lines: &str) {
    let text = std::fs::read_to_string(tng::ctl::doctor::Host::path(host, "/etc/tng/in.toml")).expect("config");
    let (head, rest) = text.split_once("[ingress.attest]\n").expect("an attest table");
    let tail = rest.split_once('[').map(|(_, tail)| format!("[{tail}")).unwrap_or_default();
    host.config(&format!("{head}[ingress.attest]\n{lines}\n{tail}"));
}

fn broken_nft(host: &mut FakeHost) {
    host.answer("unshare", failed("/dev/stdin:2:1-9: Error: Could not process rule: No such file or directory\n"));
}

fn date(host: &mut FakeHost, at: Duration) {
    host.service.as_mut().expect("service").date = Some(UNIX_EPOCH + at);
}

#[test]
fn a_whole_host_has_no_finding_above_ok() {
    let host = FakeHost::new();
    assert_eq!(host.problems(Severity::Note), []);
    let answer = doctor(&host, None, false, true, Style { colour: false });
    assert_eq!(answer.status, 0, "{}", answer.text);
    assert!(answer.text.contains("ok in [rules-present]: table inet tng_in"), "{}", answer.text);
}

#[test]
fn each_fault_is_found_with_its_reason_and_its_command_and_nothing_else_is() {
    for (check, severity, fault, what, fix) in FAULTS {
        let mut host = FakeHost::new();
        fault(&mut host);
        let found = host.worst(*check);
        assert_eq!(found.severity, *severity, "{found:?}");
        assert!(found.what.contains(what), "{found:?} does not say {what:?}");
        assert!(found.fix.contains(fix), "{found:?} is not mended by {fix:?}");
        assert!(!found.why.is_empty(), "{found:?}");
        let status = doctor(&host, None, true, false, Style { colour: false }).status;
        let errors = host.problems(Severity::Error);
        assert_eq!(status, u8::from(!errors.is_empty()), "{check:?}: {errors:?}");
        if *severity < Severity::Error {
            assert_eq!(errors, [], "{check:?} is no error");
        }
    }
}

#[test]
fn every_check_has_a_fault() {
    let missing: Vec<_> = Check::ALL.iter().filter(|c| !FAULTS.iter().any(|f| f.0 == **c)).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

#[test]
fn without_root_what_needs_it_is_a_note() {
    let mut host = FakeHost::new();
    host.root = false;
    host.rules = Err("may not".into());
    host.agent = Err(AgentError::Denied);
    broken_nft(&mut host);
    assert_eq!(host.problems(Severity::Warning), []);
    for check in [
        Check::NftTproxy,
        Check::RulesPresent,
        Check::GuardRunning,
        Check::MarkWriters,
        Check::TrialSyn,
        Check::AaAccess,
    ] {
        assert_eq!(host.worst(check).what, "not checked: needs root");
    }
    assert!(!host.ran.borrow().iter().any(|line| line.starts_with("unshare")), "{:?}", host.ran);
}

#[test]
fn the_last_file_of_networkd_wins() {
    let mut host = FakeHost::new();
    host.answer("systemctl is-active systemd-networkd", done("active"));
    let no = "[Network]\nManageForeignRoutingPolicyRules=no\nManageForeignRoutes=no\n";
    host.write("/etc/systemd/networkd.conf.d/50-tng.conf", no);
    assert_eq!(host.worst(Check::NetworkdRules).severity, Severity::Ok);
    host.write("/usr/lib/systemd/networkd.conf.d/90-vendor.conf", "[Network]\nManageForeignRoutes=yes\n");
    let found = host.worst(Check::NetworkdRules);
    assert!(found.severity == Severity::Warning && found.what.contains("(ManageForeignRoutes is yes)"), "{found:?}");
    host.write("/etc/systemd/networkd.conf.d/90-vendor.conf", "# masked by the administrator's file\n");
    assert_eq!(host.worst(Check::NetworkdRules).severity, Severity::Ok);
}

#[test]
fn a_stopped_instance_is_a_note_unless_its_rules_are_left() {
    let mut host = FakeHost::new();
    let off = "ActiveState=inactive";
    host.unit(off, off, off);
    host.running.clear();
    host.rules = Ok(Rules::default());
    assert_eq!(host.problems(Severity::Warning), []);
    assert!(host.worst(Check::UnitState).fix.contains("systemctl start tng@in"));
    host.rules().capture_table = true;
    let found = host.worst(Check::RulesPresent);
    assert!(found.severity == Severity::Error && found.fix.contains("tngd net down in"), "{found:?}");
}

/// The instance attests with its own TPM.
fn own_evidence(h: &mut FakeHost) {
    let text = std::fs::read_to_string(tng::ctl::doctor::Host::path(h, "/etc/tng/in.toml")).expect("config");
    h.config(&text.replace("aa_addr = \"unix:///run/tng/aa.sock\"", "provider = \"tpm\""));
}

/// A helper that answers one request so.
fn helper(h: &FakeHost, outcome: fn() -> Result<HostEvidence, HostError>) {
    let path = tng::ctl::doctor::Host::path(h, "/run/tng/evidence.sock");
    let listener = std::os::unix::net::UnixListener::bind(path).expect("socket");
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("accept");
        tng::attest::host::helper::serve(&mut stream, |_, _| outcome()).expect("served");
    });
}

#[test]
fn a_helper_that_makes_evidence_is_well() {
    let mut host = FakeHost::new();
    own_evidence(&mut host);
    helper(&host, || Ok(HostEvidence { tee: "tpm".into(), evidence: "{}".into() }));
    let found = host.worst(Check::EvidenceHelper);
    assert!(found.severity == Severity::Ok && found.what.contains("TEE tpm"), "{found:?}");
}

#[test]
fn a_socket_of_the_agents_own_is_mended_by_the_packaged_proxy() {
    let mut host = FakeHost::new();
    let text = std::fs::read_to_string(tng::ctl::doctor::Host::path(&host, "/etc/tng/in.toml")).expect("config");
    let own = "/run/confidential-containers/attestation-agent/attestation-agent.sock";
    host.config(&text.replace("/run/tng/aa.sock", own));
    let path = tng::ctl::doctor::Host::path(&host, own);
    std::fs::create_dir_all(path.parent().expect("parent")).expect("directory");
    let _socket = std::os::unix::net::UnixListener::bind(path).expect("socket");
    assert_eq!(host.problems(Severity::Warning), []);
    host.agent = Err(AgentError::Denied);
    let fix = host.worst(Check::AaAccess).fix;
    assert!(fix.contains("enable --now tng-aa-proxy.socket") && fix.contains("/etc/tng/in.toml"), "{fix}");
}

#[test]
fn problems_come_first_and_json_is_an_array_of_findings() {
    let mut host = FakeHost::new();
    host.rules().guard_running = false;
    host.answer("timedatectl", done("no\n"));
    let text = doctor(&host, Some("in"), false, false, Style { colour: false }).text;
    let (error, warning) = (text.find("[guard-running]").expect("error"), text.find("[clock-sync").expect("warning"));
    assert!(error < warning && !text.contains("[kernel-version]") && !text.contains('\x1b'), "{text}");
    assert!(doctor(&host, None, false, false, Style { colour: true }).text.contains("\x1b["));
    let json = doctor(&host, None, true, false, Style { colour: true }).text;
    let all: Vec<serde_json::Value> = serde_json::from_str(&json).expect("JSON");
    let guard = all.iter().find(|f| f["id"] == "guard-running").expect("guard");
    assert_eq!((&guard["severity"], &guard["instance"]), (&"error".into(), &"in".into()));
    assert!(all.iter().all(|f| f["what"].is_string() && f["why"].is_string() && f["fix"].is_string()));
}

#[test]
fn collateral_that_holds_and_a_service_that_listens_are_well() {
    let mut host = FakeHost::new();
    let pccs = std::net::TcpListener::bind("127.0.0.1:0").expect("bind");
    let addr = pccs.local_addr().expect("address");
    builtin(&mut host, &format!("collateral = [\"{COLLATERAL}\"]\npccs_addr = \"http://{addr}/\""));
    // 1 July 2025, and two days before the end.
    for (now, severity, what) in
        [(1_751_328_000, Severity::Ok, "holds for"), (1_752_743_000, Severity::Warning, "ends in")]
    {
        host.now = UNIX_EPOCH + Duration::from_secs(now);
        let found = host.worst(Check::Collateral);
        assert!(found.severity == severity && found.what.contains(what), "{found:?}");
    }
    assert_eq!(host.worst(Check::CollateralService).severity, Severity::Ok);
}

#[test]
fn instances_beside_each_other_are_well_and_the_one_that_is_asked_about_is_compared_with_all() {
    let host = FakeHost::new();
    assert!(host.examine().iter().all(|f| f.check != Check::InstanceConflicts), "there is only one");
    host.write("/etc/tng/other.toml", &OTHER.replace("203.0.113.7", "192.0.2.7"));
    assert_eq!(host.worst(Check::InstanceConflicts).severity, Severity::Ok);
    host.write("/etc/tng/other.toml", OTHER);
    let conflict = host.worst(Check::InstanceConflicts);
    assert!(conflict.what.contains("in.toml") && conflict.what.contains("other.toml"), "{conflict:?}");
    let asked = doctor(&host, Some("other"), false, false, Style { colour: false });
    assert!(asked.text.contains("[instance-conflicts]"), "{}", asked.text);
}

#[test]
fn a_name_that_nothing_has_is_an_error() {
    let host = FakeHost::new();
    let answer = doctor(&host, Some("other"), false, false, Style { colour: false });
    assert!(answer.status == 1 && answer.text.contains("no such file"), "{}", answer.text);
}
