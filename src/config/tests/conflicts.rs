//! Contradictions between endpoints and between instances.

use super::*;

fn both(a: &str, b: &str) -> String {
    format!("{a}{b}")
}

/// An ingress with another policy than [`ingress`].
fn verified(lines: &str) -> String {
    format!("[[ingress]]\n[ingress.verify]\nas_addr = \"https://as.example/\"\n[ingress.netfilter]\n{lines}\n")
}

#[test]
fn two_listeners_never_share_a_port() {
    let at = "ingress[1].mapping.listen";
    let pair = |a: &str, b: &str| both(&mapping("ingress", a, "192.0.2.1:1"), &mapping("ingress", b, "192.0.2.2:1"));
    good(&pair("127.0.0.1:80", "127.0.0.2:80"));
    good(&pair("127.0.0.1:80", "[::1]:80"));
    good(&pair("0.0.0.0:80", "127.0.0.1:81"));
    for (a, b) in [("127.0.0.1:80", "127.0.0.1:80"), ("0.0.0.0:80", "127.0.0.1:80"), ("[::]:80", "192.0.2.9:80")] {
        let found = only_error(&pair(a, b), at, "listener-conflict");
        assert!(found.message.contains("ingress[0].mapping.listen (line 4)"), "{found}");
    }
    let netfilter = ingress("capture = [{ port = 1 }]\nlisten_port = 40000");
    only_error(
        &both(&netfilter, &mapping("egress", "127.0.0.1:40000", "127.0.0.1:1")),
        "egress[0].mapping.listen",
        "listener-conflict",
    );
    let control = format!("[control]\nlisten = \"127.0.0.1:80\"\n{}", mapping("ingress", "0.0.0.0:80", "192.0.2.1:1"));
    only_error(&control, "control.listen", "listener-conflict");
    let twice = both(&netfilter, &ingress("capture = [{ port = 2 }]\nlisten_port = 40000"));
    only_error(&twice, "ingress[1].netfilter.listen_port", "listener-conflict");
}

#[test]
fn one_connection_meets_one_policy() {
    let wide = "capture = [{ port = 1 }, { to = \"198.51.100.0/24\", port = \"8000-8100\" }]";
    let at = "ingress[1].netfilter.capture[0]";
    good(&both(&ingress(wide), &verified("capture = [{ to = \"198.51.100.0/24\", port = 8200 }]")));
    good(&both(&ingress(wide), &verified("capture = [{ to = \"203.0.113.1\", port = 8050 }]")));
    let narrow = "capture = [{ to = \"198.51.100.9\", port = \"8050-9000\" }]";
    let found = only_error(&both(&ingress(wide), &verified(narrow)), at, "capture-overlap");
    assert!(found.message.contains("198.51.100.9 port 8050-8100"), "{found}");
    assert!(found.message.contains("ingress[0].netfilter.capture[1] (line 4)"), "{found}");
    // The same policy twice is untidy, not dangerous.
    assert!(warned(&good(&both(&ingress(wide), &ingress(narrow))), "capture-overlap"));
    // An exclude makes room.
    let excluding = format!("{wide}\nexclude = [{{ to = \"198.51.100.9\" }}]");
    good(&both(&ingress(&excluding), &verified(narrow)));
}

#[test]
fn owner_qualifiers_keep_captures_apart() {
    let owned = |q: &str| format!("capture = [{{ port = 443, {q} }}]");
    let meets = |a: &str, b: &str| parsed(&both(&ingress(&owned(a)), &verified(&owned(b)))).is_err();
    assert!(!meets("uid = 1000", "uid = 1001"));
    assert!(meets("uid = 1000", "uid = 1000"));
    assert!(meets("uid = 1000", "gid = 1000"));
    assert!(!meets("cgroup = \"a.slice\"", "cgroup = \"ab.slice\""));
    assert!(meets("cgroup = \"a.slice\"", "cgroup = \"a.slice/a-b.slice\""));
}

#[test]
fn a_mapping_never_leads_back_to_itself() {
    for side in ["ingress", "egress"] {
        let at = format!("{side}[0].mapping.target");
        good(&mapping(side, "127.0.0.1:80", "127.0.0.1:81"));
        good(&mapping(side, "127.0.0.1:80", "192.0.2.1:80"));
        for (listen, target) in [
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("0.0.0.0:80", "127.0.0.1:80"),
            ("[::]:80", "localhost:80"),
            ("0.0.0.0:80-90", "127.0.0.1:85-95"),
        ] {
            let found = only_error(&mapping(side, listen, target), &at, "loop");
            assert!(found.message.contains("own listener"), "{found}");
        }
    }
}

#[test]
fn a_circle_of_mappings_is_found_and_a_chain_is_not() {
    let chain =
        both(&mapping("ingress", "127.0.0.1:10", "127.0.0.1:20"), &mapping("egress", "127.0.0.1:20", "127.0.0.1:30"));
    good(&chain);
    let circle =
        both(&mapping("ingress", "127.0.0.1:10", "127.0.0.1:20"), &mapping("egress", "127.0.0.1:20", "127.0.0.1:10"));
    let found = only_error(&circle, "ingress[0].mapping.target", "loop");
    assert!(found.message.contains("through egress[0]"), "{found}");
}

#[test]
fn a_mapping_is_no_second_door_to_a_captured_service() {
    let captured = |lines: &str| both(&mapping("egress", "192.0.2.1:20001", "127.0.0.1:30001"), &egress(lines));
    good(&captured("capture = [{ port = 30002 }]"));
    good(&captured("capture = [{ port = 30001 }]\nexclude = [{ to = \"127.0.0.1\", port = 30001 }]"));
    good(&captured("capture = [{ port = 30001, to = \"192.0.2.1\" }]"));
    only_error(&captured("capture = [{ port = 30001 }]"), "egress[0].mapping.target", "target-captured");
    let policy = captured("capture = [{ port = 30001 }]\n[egress.attest]\nprovider = \"sample\"");
    let at = policy.rfind("no_ra = true\n").unwrap();
    let policy = format!("{}{}", &policy[..at], &policy[at + "no_ra = true\n".len()..]);
    let found = only_error(&policy, "egress[0].mapping.target", "target-captured");
    assert!(found.message.contains("walk past the attestation policy"), "{found}");
    // The mapping's own listener is not to be captured either.
    only_error(&captured("capture = [{ port = 20001 }]"), "egress[0].mapping.listen", "listener-captured");
}

#[test]
fn an_ingress_mapping_passes_an_ingress_capture_by_its_mark() {
    let to_peer = mapping("ingress", "127.0.0.1:10001", "192.0.2.10:20001");
    let capture = ingress("capture = [{ to = \"192.0.2.0/24\", port = 20001 }]");
    good(&both(&to_peer, &capture));
    let other_mark = to_peer + "so_mark = 700\n";
    only_error(&both(&other_mark, &capture), "ingress[0].mapping.target", "target-captured");
    good(&both(&other_mark, &ingress("capture = [{ to = \"192.0.2.0/24\", port = 20001, uid = 1000 }]")));
}

#[test]
fn the_single_host_demo_is_no_conflict() {
    let text = both(
        &mapping("ingress", "127.0.0.1:10001", "127.0.0.1:30001"),
        &egress("capture = [{ port = 30001 }]\ncapture_local_traffic = true"),
    );
    good(&text);
}

#[test]
fn useless_excludes_are_pointed_out() {
    let warned_by = |exclude: &str| {
        let text = ingress(&format!("capture = [{{ to = \"192.0.2.0/24\", port = 80 }}]\nexclude = [{exclude}]"));
        warned(&good(&text), "no-effect")
    };
    assert!(!warned_by("{ to = \"192.0.2.1\" }"));
    assert!(warned_by("{ to = \"203.0.113.1\" }"));
}

#[test]
fn two_instances_share_neither_listener_nor_capture() {
    let config = |name: &str, text: &str| {
        let name = InstanceName::new(name).unwrap();
        parse(name.clone(), Path::new(&format!("/etc/tng/{name}.toml")), text).unwrap().config
    };
    let a =
        config("a", &both(&ingress("capture = [{ port = 443 }]"), &mapping("egress", "0.0.0.0:80", "127.0.0.1:81")));
    let apart =
        config("b", &both(&ingress("capture = [{ port = 444 }]"), &mapping("egress", "0.0.0.0:82", "127.0.0.1:83")));
    assert_eq!(conflicts_between(&a, &apart), []);
    let b = config(
        "b",
        &both(&ingress("capture = [{ port = \"400-500\" }]"), &mapping("egress", "127.0.0.1:80", "127.0.0.1:83")),
    );
    let found = conflicts_between(&a, &b);
    let reasons: Vec<_> = found.iter().map(|d| (d.reason, d.path.as_str(), d.severity)).collect();
    assert_eq!(
        reasons,
        [
            ("listener-conflict", "egress[0].mapping.listen", Severity::Error),
            ("capture-overlap", "ingress[0].netfilter.capture[0]", Severity::Error),
        ]
    );
    assert!(found.iter().all(|d| d.file == Path::new("/etc/tng/b.toml") && d.message.contains("/etc/tng/a.toml")));
}
