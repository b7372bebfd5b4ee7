//! A ruleset that was saved with tng's tables in it: what the kernel makes of it, what the doctor says, and the cure.

use tng::ctl::doctor::{Check, Ran, Severity};

use super::lab::{TO_SERVER, ingress};
use super::netns::{Tng, World};
use super::world::{FakeHost, done};

/// As an operator saves it.
const SAVE: &str = "(echo 'flush ruleset'; nft list ruleset)";

#[test]
fn a_saved_ruleset_with_our_tables_does_not_load_and_the_doctor_gives_the_cure() {
    let world = World::new();
    let client = &world.client;
    client.nft("table inet mine { chain c { type filter hook input priority 0; tcp dport 7 drop; }; }");
    let tng = Tng::start(client, "in", &ingress(TO_SERVER));
    let saved = client.sh(SAVE);
    let mut host = FakeHost::new();
    host.answer("systemctl is-enabled nftables.service", done("enabled\n"));
    host.write("/etc/nftables.conf", &saved);
    let file = host.dir().join("etc/nftables.conf").to_string_lossy().into_owned();

    // systemctl restart nftables: the flush takes the operator's tables, and the file does not bring them back.
    client.sh("nft flush ruleset");
    let loaded = client.run("nft", &["-f", &file]);
    assert!(!loaded.ok() && loaded.stderr.contains("Operation not permitted"), "{}", loaded.stderr);
    assert!(!client.sh("nft list tables").contains("inet mine"));

    let found = host.worst(Check::SavedRules);
    assert_eq!(found.severity, Severity::Error);
    assert!(found.what.contains("tng_in") && found.what.contains("tngguard_in"), "{}", found.what);
    let fix = found.fix.replace("/etc/nftables.conf", &file);
    client.sh(&fix);
    client.run("nft", &["-f", &file]).expect_ok();
    assert!(client.sh("nft list tables").contains("inet mine"));
    assert_eq!(host.worst(Check::SavedRules).severity, Severity::Ok);

    // The command of the manual saves what loads.
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/man/tngd.8")).expect("page");
    let command = page.split(".\\\" save\n").nth(1).expect("the command").split(".fi").next().expect("its end");
    let command =
        command.replace("\\-", "-").replace("\\(aq", "'").replace("\\(dq", "\"").replace("/etc/nftables.conf", &file);
    client.sh(&command);
    let text = std::fs::read_to_string(&file).expect("saved");
    assert!(text.contains("table inet mine") && !text.contains("tng"), "{text}");
    client.run("nft", &["-f", &file]).expect_ok();

    // Without the guard, as at boot, where it comes after nftables.service, even the first file loads.
    let unit = include_str!("../../systemd/tng-guard@.service");
    assert!(unit.contains("\nAfter=nftables.service\n"), "{unit}");
    assert!(tng.stop().success());
    client.nft(&saved);
    let tables = client.sh("nft list tables");
    assert!(tables.contains("inet mine") && !tables.contains("tngguard"), "{tables}");
    let _again = Tng::start(client, "in", &ingress(TO_SERVER));
}

#[test]
fn included_files_and_files_of_a_drop_in_are_looked_into() {
    let worst = |host: &FakeHost| {
        let found = host.worst(Check::SavedRules);
        (found.severity, found.what)
    };
    let ours = "table inet tng_in {\n}\n";
    let mut host = FakeHost::new();
    host.write("/etc/nftables.conf", "include \"/etc/nftables.d/*.nft\"\ninclude \"more.nft\"\n");
    host.write("/etc/nftables.d/10.nft", "table inet a {\n}\n");
    host.write("/etc/nftables.d/20.nft.bak", ours);
    assert_eq!(worst(&host).0, Severity::Ok, "nobody includes that one");
    // A loop of includes ends.
    host.write("/etc/more.nft", "include \"/etc/nftables.conf\"\ninclude \"/etc/nft/[a-c]/x\"\n");
    assert_eq!(worst(&host).0, Severity::Ok);
    host.write("/etc/nft/b/x", ours);
    let (severity, what) = worst(&host);
    assert!(severity == Severity::Error && what.contains("/etc/nft/b/x"), "{what}");

    let argv = "ExecStart={ path=/usr/sbin/nft ; argv[]=/usr/sbin/nft -f /etc/fw/main.nft ; ignore_errors=no ; }\n";
    host.answer("systemctl show -p ExecStart,ExecStartPost,ExecReload nftables.service", done(argv));
    host.write("/etc/fw/main.nft", "table inet a {\n}\n");
    assert_eq!(worst(&host).0, Severity::Ok, "the default file is not loaded any more");
    host.write("/etc/fw/main.nft", ours);
    let (severity, what) = worst(&host);
    assert!(severity == Severity::Error && what.contains("/etc/fw/main.nft"), "{what}");
    // Nobody loads it, yet.
    host.answer(
        "systemctl is-enabled nftables.service",
        Ran::Done { ok: false, stdout: "disabled\n".into(), stderr: String::new() },
    );
    assert_eq!(worst(&host).0, Severity::Warning);
    host.answer("systemctl is-active nftables.service", done("active\n"));
    assert_eq!(worst(&host).0, Severity::Error);
}
