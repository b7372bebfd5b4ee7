//! All mistakes of a file at once, each at its line and column.

use super::*;

const BROKEN: &str = "\
on_stop = \"opne\"
drain_timeout = 30
[[ingress]]
nmae = \"a\"
[ingress.netfilter]
capture = [
    { to = \"198.51.100.7/24\", port = 8443 },
    { to = \"2001:db8::/32\", port = \"70000\" },
]
listen_prot = 40000
[ingress.verify]
as_addr = \"http://192.0.2.5:8080/\"
as_type = \"soap\"
[[egress]]
[egress.netfilter]
capture = [{ port = 30001, uid = 5 }]
so_mark = 0x600
";

#[test]
fn every_mistake_of_a_file_is_reported_at_its_place() {
    let report = parsed(BROKEN).unwrap_err();
    let found: Vec<_> =
        report.errors().map(|d| (d.line.unwrap(), d.column.unwrap(), d.path.as_str(), d.reason)).collect();
    assert_eq!(
        found,
        [
            (1, 11, "on_stop", "unknown-value"),
            (2, 17, "drain_timeout", "wrong-type"),
            (4, 1, "ingress[0].nmae", "unknown-key"),
            (7, 12, "ingress[0].netfilter.capture[0].to", "host-bits"),
            (8, 36, "ingress[0].netfilter.capture[1].port", "bad-port"),
            (10, 1, "ingress[0].netfilter.listen_prot", "unknown-key"),
            (12, 11, "ingress[0].verify.as_addr", "as-insecure"),
            (13, 11, "ingress[0].verify.as_type", "unknown-value"),
            (14, 1, "egress[0]", "no-attestation"),
            (16, 34, "egress[0].netfilter.capture[0].uid", "wrong-side"),
            (17, 11, "egress[0].netfilter.so_mark", "bad-mark"),
        ],
        "{report}"
    );
}

#[test]
fn a_finding_names_file_place_value_and_next_step() {
    let text = ingress("capture = [{ port = \"70000\" }]");
    let finding = only_error(&text, "ingress[0].netfilter.capture[0].port", "bad-port");
    let shown = render_diagnostics("tngd", &[finding]);
    let (first, hint) = shown.split_once('\n').unwrap();
    let place = "tngd: /etc/tng/t.toml:4:21: ingress[0].netfilter.capture[0].port";
    assert_eq!(first, format!("{place}: port \"70000\" is not 1-65535"));
    assert!(hint.starts_with("    hint: "), "{hint}");
}

#[test]
fn a_misspelt_key_or_value_gets_the_right_one() {
    let hint = |text: &str, path: &str, reason| only_error(text, path, reason).hint.unwrap();
    let key = hint(
        &ingress("capture = [{ prot = 1, to = \"192.0.2.1\" }]"),
        "ingress[0].netfilter.capture[0].prot",
        "unknown-key",
    );
    assert_eq!(key, "did you mean `port`?");
    let value =
        hint(&format!("on_stop = \"close\"\n{}", ingress("capture = [{ port = 1 }]")), "on_stop", "unknown-value");
    assert_eq!(value, "did you mean `closed`?");
    let far = hint(&format!("zzzzzzzz = 1\n{}", ingress("capture = [{ port = 1 }]")), "zzzzzzzz", "unknown-key");
    assert!(far.contains("on_stop, drain_timeout"), "{far}");
}

#[test]
fn broken_syntax_is_placed_and_does_not_hide_other_mistakes() {
    let report = parsed("on_stop = \"opne\"\n[[ingress]\nno_ra = true\n").unwrap_err();
    let found: Vec<_> = report.errors().map(|d| (d.line.unwrap(), d.reason)).collect();
    assert!(found.contains(&(1, "unknown-value")), "{report}");
    assert!(found.contains(&(2, "toml-syntax")), "{report}");
    assert!(report.errors().all(|d| d.hint.is_some()), "{report}");
}

#[test]
fn columns_count_characters() {
    let report = parsed("on_stop = \"ö\" #\nx = \"öö\"\n\"ö\" = 1\n").unwrap_err();
    let places: Vec<_> = report.errors().map(|d| (d.line.unwrap(), d.column.unwrap())).collect();
    assert!(places.contains(&(1, 11)) && places.contains(&(3, 1)), "{report}");
    let report = parsed(&ingress("capture = [{ cgroup = \"ööö\", port = 0 }]")).unwrap_err();
    assert!(report.errors().any(|d| d.column == Some(37)), "{report}");
}

#[test]
fn findings_of_a_hopeless_file_are_bounded() {
    let text: String = (0..5000).map(|i| format!("key{i} = 1\n")).collect();
    let report = parsed(&text).unwrap_err();
    assert_eq!(report.diagnostics.len(), 200);
    assert!(report.diagnostics[199].message.contains("more findings"), "{}", report.diagnostics[199]);
}

#[test]
fn findings_are_machine_readable() {
    let json = serde_json::to_value(parsed(BROKEN).unwrap_err()).unwrap();
    let first = &json["diagnostics"][0];
    assert_eq!(first["severity"], "error");
    assert_eq!(first["reason"], "unknown-value");
    assert_eq!((first["line"].as_u64(), first["column"].as_u64()), (Some(1), Some(11)));
}

#[test]
fn a_value_of_the_wrong_type_is_not_called_missing() {
    for (text, path) in [
        ("[[ingress]]\nno_ra = true\nmapping = 5\n", "ingress[0].mapping"),
        ("[[ingress]]\nattest = 5\n[ingress.netfilter]\ncapture = [{ port = 1 }]\n", "ingress[0].attest"),
        ("[[ingress]]\nno_ra = true\n[ingress.netfilter]\ncapture = 5\n", "ingress[0].netfilter.capture"),
        (
            "[[ingress]]\nno_ra = true\n[ingress.mapping]\nlisten = 1\ntarget = \"192.0.2.1:1\"\n",
            "ingress[0].mapping.listen",
        ),
    ] {
        only_error(text, path, "wrong-type");
    }
}
