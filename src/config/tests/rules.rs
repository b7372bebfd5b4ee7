//! Single fields: accepted and refused next to each other.

use std::time::Duration;

use super::*;

fn netfilter(text: &str) -> Netfilter {
    match good(text).config.endpoints.remove(0).mode {
        Mode::Netfilter(n) => n,
        Mode::Mapping(m) => panic!("{m:?}"),
    }
}

#[test]
fn ports_are_integers_or_ranges() {
    for (port, first, last) in [("8443", 8443, 8443), ("\"8443\"", 8443, 8443), ("\"8000-8100\"", 8000, 8100)] {
        let n = netfilter(&ingress(&format!("capture = [{{ port = {port} }}]")));
        assert_eq!(n.capture[0].port, Some(PortRange { first, last }));
    }
    for port in ["0", "-1", "65536", "99999999999999999999", "\"0\"", "\"+80\"", "\"1-2-3\"", "\"80,81\"", "\"\""] {
        let text = ingress(&format!("capture = [{{ port = {port} }}]"));
        // A number beyond 64 bits is no TOML to some parsers; either way the file is refused.
        assert!(errors(&text).iter().any(|e| matches!(e.1, "bad-port" | "toml-syntax")), "{port}");
    }
    let at = "ingress[0].netfilter.capture[0].port";
    let backwards = only_error(&ingress("capture = [{ port = \"8100-8000\" }]"), at, "bad-port");
    assert_eq!(backwards.hint.unwrap(), "write \"8000-8100\"");
    only_error(&ingress("capture = [{ port = true }]"), at, "wrong-type");
}

#[test]
fn destinations_are_what_can_be_captured() {
    for to in ["192.0.2.1", "198.51.100.0/24", "2001:db8::1", "2001:db8::/32", "169.254.169.254"] {
        assert!(netfilter(&ingress(&format!("capture = [{{ to = \"{to}\", port = 1 }}]"))).capture[0].to.is_some());
    }
    let at = "ingress[0].netfilter.capture[0].to";
    let refused =
        |to: &str, reason| only_error(&ingress(&format!("capture = [{{ to = \"{to}\", port = 1 }}]")), at, reason);
    let hint = refused("198.51.100.7/24", "host-bits").hint.unwrap();
    assert!(hint.contains("\"198.51.100.0/24\"") && hint.contains("\"198.51.100.7\""), "{hint}");
    for to in
        ["127.0.0.1", "::1", "0.0.0.0/0", "::/0", "fe80::1", "fe80::/10", "224.0.0.1", "ff02::1", "::ffff:192.0.2.1"]
    {
        refused(to, "bad-address");
    }
    for to in ["db.example", "192.0.2.1:80", "[2001:db8::1]", "192.0.2.0/33", "300.1.1.1"] {
        refused(to, "bad-address");
    }
    // A service on loopback is the egress's own business.
    netfilter(&egress("capture = [{ to = \"127.0.0.1\", port = 1 }]"));
}

#[test]
fn owners_are_ids_or_names_of_this_host() {
    let n = netfilter(&ingress("capture = [{ port = 1, uid = \"root\", gid = \"root\" }, { port = 2, uid = 1000 }]"));
    assert_eq!((n.capture[0].uid, n.capture[0].gid, n.capture[1].uid), (Some(0), Some(0), Some(1000)));
    for (uid, reason) in [
        ("-1", "bad-id"),
        ("4294967295", "bad-id"),
        ("\"1000\"", "bad-id"),
        ("\"no-such-user\"", "unknown-id"),
        ("\"a\\u0000b\"", "unknown-id"),
    ] {
        let text = ingress(&format!("capture = [{{ port = 1, uid = {uid} }}]"));
        only_error(&text, "ingress[0].netfilter.capture[0].uid", reason);
    }
}

#[test]
fn cgroups_are_paths_of_slices() {
    for path in ["batch.slice", "user.slice/user-1000.slice", "a.slice/a-b.slice/a-b-c.slice"] {
        let n = netfilter(&ingress(&format!("capture = [{{ port = 1, cgroup = \"{path}\" }}]")));
        assert_eq!(n.capture[0].cgroup, Some(CgroupPath(path.into())));
    }
    for path in
        ["/a.slice", "a.service", "a.slice/", "a-b.slice", "../a.slice", "a//b.slice", "a\\\"b.slice", ".slice", ""]
    {
        let text = ingress(&format!("capture = [{{ port = 1, cgroup = \"{path}\" }}]"));
        only_error(&text, "ingress[0].netfilter.capture[0].cgroup", "bad-cgroup");
    }
}

#[test]
fn each_side_refuses_the_other_sides_fields() {
    for key in ["capture_local_traffic = true", "preserve_source = true", "preserve_source_ports = \"2000-3000\""] {
        netfilter(&egress(&format!("capture = [{{ port = 1 }}]\n{key}")));
        assert_eq!(errors(&ingress(&format!("capture = [{{ port = 1 }}]\n{key}")))[0].1, "wrong-side");
    }
    for qualifier in ["uid = 0", "gid = 0", "cgroup = \"a.slice\""] {
        netfilter(&ingress(&format!("capture = [{{ port = 1, {qualifier} }}]")));
        assert_eq!(errors(&egress(&format!("capture = [{{ port = 1, {qualifier} }}]")))[0].1, "wrong-side");
    }
    assert_eq!(netfilter(&egress("capture = [{ port = 1, iif = \"eth0\" }]")).capture[0].iif.as_deref(), Some("eth0"));
    assert_eq!(errors(&ingress("capture = [{ port = 1, iif = \"eth0\" }]"))[0].1, "not-in-this-version");
    assert_eq!(errors(&egress("capture = [{ port = 1, iif = \"eth0; drop\" }]"))[0].1, "bad-interface");
}

#[test]
fn an_empty_capture_is_never_meant() {
    only_error(&ingress("capture = []"), "ingress[0].netfilter.capture", "empty");
    only_error(&ingress(""), "ingress[0].netfilter", "missing");
    only_error(&egress("capture = [{}]"), "egress[0].netfilter.capture[0]", "empty");
    assert!(warned(&good(&egress("capture = [{ to = \"192.0.2.1\" }]")), "every-port"));
    assert!(warned(&good(&ingress("capture = [{ port = 1 }, { port = 1 }]")), "duplicate"));
}

#[test]
fn marks_stay_in_their_half_and_apart() {
    assert_eq!(netfilter(&ingress("capture = [{ port = 1 }]\nso_mark = 700")).so_mark, Mark(700));
    for mark in ["0", "-1", "0x10000", "0x0578", "0x057a", "0x0600", "0x06ff"] {
        let text = ingress(&format!("capture = [{{ port = 1 }}]\nso_mark = {mark}"));
        only_error(&text, "ingress[0].netfilter.so_mark", "bad-mark");
    }
    let both = format!("{}{}", ingress("capture = [{ port = 1 }]\nso_mark = 565"), egress("capture = [{ port = 2 }]"));
    only_error(&both, "egress[0].netfilter.so_mark", "mark-conflict");
}

#[test]
fn durations_have_units_and_bounds() {
    let text = |d: &str| format!("drain_timeout = \"{d}\"\n{}", ingress("capture = [{ port = 1 }]"));
    for (d, millis) in [("0s", 0), ("250ms", 250), ("30s", 30_000), ("5m", 300_000), ("1h", 3_600_000)] {
        assert_eq!(good(&text(d)).config.drain_timeout, Duration::from_millis(millis));
    }
    for d in ["30", "s", "", "1.5s", "-1s", "1d", "99999999999999999999s", "18446744073709551615h"] {
        only_error(&text(d), "drain_timeout", "bad-duration");
    }
    only_error(&text("2h"), "drain_timeout", "out-of-range");
}

#[test]
fn an_endpoint_has_one_mode_and_says_what_it_attests() {
    let both = "[[ingress]]\nno_ra = true\n[ingress.mapping]\nlisten = \"127.0.0.1:1\"\ntarget = \"192.0.2.1:1\"\n[ingress.netfilter]\ncapture = [{ port = 1 }]\n";
    only_error(both, "ingress[0].netfilter", "mode-count");
    only_error("[[ingress]]\nno_ra = true\n", "ingress[0]", "mode-count");
    only_error(
        "[[ingress]]\nno_ra = false\n[ingress.netfilter]\ncapture = [{ port = 1 }]\n",
        "ingress[0]",
        "no-attestation",
    );
    let sample = format!("{}[ingress.attest]\nprovider = \"sample\"\n", ingress("capture = [{ port = 1 }]"));
    only_error(&sample, "ingress[0].no_ra", "contradiction");
    let loaded = good(&sample.replace("no_ra = true\n", ""));
    assert!(warned(&loaded, "sample") && warned(&loaded, "peer-unverified"));
    assert!(warned(&good(&ingress("capture = [{ port = 1 }]")), "no-ra"));
    only_error("", "", "no-endpoint");
    only_error("[ingress]\nno_ra = true\n", "ingress", "wrong-type");
}

#[test]
fn names_are_legal_and_unique_over_both_sides() {
    let named = |name: &str| {
        format!("[[ingress]]\nname = \"{name}\"\nno_ra = true\n[ingress.netfilter]\ncapture = [{{ port = 1 }}]\n")
    };
    assert_eq!(good(&ingress("capture = [{ port = 1 }]")).config.endpoints[0].name.as_str(), "ingress-0");
    good(&named("model-api"));
    for name in ["", "Model", "-a", "a b", "abcdefghijklmnopqrstuvwxyz0123456"] {
        only_error(&named(name), "ingress[0].name", "bad-name");
    }
    let twice = format!("{}{}", named("egress-0"), egress("capture = [{ port = 2 }]"));
    only_error(&twice, "egress[0]", "duplicate-name");
}

#[test]
fn mapping_addresses_are_complete() {
    for (listen, target) in [
        ("127.0.0.1:10001", "192.0.2.10:20001"),
        ("[::1]:10010-10020", "[2001:db8::1]:20010-20020"),
        ("0.0.0.0:80", "db.example:80"),
        ("[::]:80", "under_score.example.:80"),
    ] {
        good(&mapping("ingress", listen, target));
    }
    for listen in [":80", "127.0.0.1", "localhost:80", "::1:80", "[127.0.0.1]:80", "[fe80::1]:80", "224.0.0.1:80", ""] {
        only_error(&mapping("ingress", listen, "192.0.2.1:80"), "ingress[0].mapping.listen", "bad-address");
    }
    for target in
        ["192.0.2.10", "192.0.2:80", "2001:db8::1:80", "0.0.0.0:80", "a b:80", "-a.example:80", "[db.example]:80"]
    {
        only_error(&mapping("ingress", "127.0.0.1:80", target), "ingress[0].mapping.target", "bad-address");
    }
    let missing_brackets = only_error(
        &mapping("ingress", "127.0.0.1:80", "2001:db8::1:20001"),
        "ingress[0].mapping.target",
        "bad-address",
    );
    assert_eq!(missing_brackets.hint.unwrap(), "IPv6 addresses stand in brackets: \"[2001:db8::1]:20001\"");
    only_error(
        &mapping("ingress", "127.0.0.1:10-20", "192.0.2.1:10-15"),
        "ingress[0].mapping.target",
        "range-mismatch",
    );
}

fn verify(lines: &str) -> String {
    format!("[[ingress]]\n[ingress.netfilter]\ncapture = [{{ port = 1 }}]\n[ingress.verify]\n{lines}\n")
}

#[test]
fn a_service_off_the_host_is_asked_over_tls() {
    for url in ["http://127.0.0.1:8080/", "http://[::1]:8080", "http://localhost/", "https://as.example/base"] {
        good(&verify(&format!("as_addr = \"{url}\"")));
    }
    let at = "ingress[0].verify.as_addr";
    only_error(&verify("as_addr = \"http://192.0.2.5/\""), at, "as-insecure");
    assert!(warned(&good(&verify("as_addr = \"http://192.0.2.5/\"\nas_insecure = true")), "as-insecure"));
    assert!(warned(&good(&verify("as_addr = \"https://as.example/\"\nas_insecure = true")), "no-effect"));
    for url in ["", "as.example", "ftp://as.example/", "https://as.example/?q=1", "unix:///run/as.sock"] {
        only_error(&verify(&format!("as_addr = \"{url}\"")), at, "bad-url");
    }
    let secret = only_error(&verify("as_addr = \"https://me:hunter2@as.example/\""), at, "bad-url");
    assert!(!secret.to_string().contains("hunter2"), "{secret}");
}

#[test]
fn secrets_in_headers_are_never_printed() {
    let loaded =
        good(&verify("as_addr = \"https://as.example/\"\nas_headers = { Authorization = \"Bearer hunter2\" }"));
    assert!(!format!("{:?}", loaded.config).contains("hunter2"));
    assert!(!summary(&loaded.config).contains("hunter2"));
    for value in ["\"hunter2\\n\"", "[\"hunter2\"]"] {
        let report =
            parsed(&verify(&format!("as_addr = \"https://as.example/\"\nas_headers = {{ a = {value} }}"))).unwrap_err();
        assert!(!report.to_string().contains("hunter2"), "{report}");
    }
    let text = verify("as_addr = \"https://as.example/?t=hunter2\"\nas_headers = \"hunter2\"");
    let report = parsed(&text).unwrap_err();
    assert_eq!(report.errors().count(), 2);
    assert!(!report.to_string().contains("hunter2"), "{report}");
    only_error(
        &verify("as_addr = \"https://as.example/\"\nas_headers = { \"a b\" = \"x\" }"),
        "ingress[0].verify.as_headers.a b",
        "bad-header",
    );
}

#[test]
fn session_binding_is_required_at_the_endpoint_or_in_its_verify_table() {
    let text = |outer: &str, inner: &str| {
        let text = verify(&format!("as_addr = \"https://a.example/\"\n{inner}"));
        text.replacen("[[ingress]]", &format!("[[ingress]]\n{outer}"), 1)
    };
    let (yes, no) = ("require_session_binding = true", "require_session_binding = false");
    for (outer, inner, required) in
        [("", "", false), ("", yes, true), ("", no, false), (yes, "", true), (yes, yes, true)]
    {
        let endpoints = good(&text(outer, inner)).config.endpoints;
        assert_eq!(endpoints[0].ra.require_session_binding, required, "{outer} {inner}");
    }
    only_error(&text(yes, no), "ingress[0].verify.require_session_binding", "contradiction");
    let bare = ingress("capture = [{ port = 1 }]").replace("no_ra", &format!("{yes}\nno_ra"));
    only_error(&bare, "ingress[0].require_session_binding", "contradiction");
}

#[test]
fn what_a_later_version_brings_is_refused_in_its_own_words() {
    let asked = [
        ("ingress[0].netfilter.capture[0].set", ingress("capture = [{ port = 1, set = \"x\" }]")),
        ("ingress[0].multiplex", ingress("capture = [{ port = 1 }]").replace("no_ra", "multiplex = true\nno_ra")),
        ("ingress[0].ohttp", format!("{}[ingress.ohttp]\n", ingress("capture = [{ port = 1 }]"))),
        ("ingress[0].tls", format!("{}[ingress.tls]\n", ingress("capture = [{ port = 1 }]"))),
        (
            "ingress[0].direct_forward",
            ingress("capture = [{ port = 1 }]").replace("no_ra", "direct_forward = []\nno_ra"),
        ),
    ];
    for (path, text) in asked {
        only_error(&text, path, "not-in-this-version");
    }
    for mode in ["http_proxy", "socks5"] {
        let text = format!("[[ingress]]\nno_ra = true\n[ingress.{mode}]\n");
        assert!(errors(&text).contains(&(format!("ingress[0].{mode}"), "not-in-this-version")));
    }
}

#[test]
fn sample_verification_is_loud_and_takes_nothing_of_a_service() {
    assert!(warned(&good(&verify("provider = \"sample\"")), "sample"));
    let loaded = good(&verify("provider = \"sample\"\nallow_sample = true"));
    assert!(loaded.config.endpoints[0].ra.verify.as_ref().unwrap().allow_sample);
    only_error(
        &verify("provider = \"sample\"\nas_addr = \"https://a.example/\""),
        "ingress[0].verify.as_addr",
        "contradiction",
    );
    only_error(&verify(""), "ingress[0].verify", "missing");
    only_error(&verify("as_addr = \"https://a.example/\"\npolicy_ids = []"), "ingress[0].verify.policy_ids", "empty");
}

#[test]
fn an_agent_is_a_unix_socket() {
    let attest = |addr: &str| {
        format!("[[egress]]\n[egress.netfilter]\ncapture = [{{ port = 1 }}]\n[egress.attest]\naa_addr = \"{addr}\"\n")
    };
    good(&attest("unix:///run/aa.sock"));
    for addr in
        ["/run/aa.sock", "unix://run/aa.sock", "http://127.0.0.1/", "unix:///", &format!("unix:///{}", "a".repeat(108))]
    {
        only_error(&attest(addr), "egress[0].attest.aa_addr", "bad-address");
    }
}

#[test]
fn trust_anchors_must_exist_and_be_certificates() {
    let dir = tempfile::tempdir().unwrap();
    let (pem, junk, broken) = (dir.path().join("ca.pem"), dir.path().join("junk"), dir.path().join("broken.pem"));
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = rcgen::CertificateParams::new(vec!["as.example".into()]).unwrap().self_signed(&key).unwrap();
    std::fs::write(&pem, cert.pem()).unwrap();
    std::fs::write(&junk, "no certificate").unwrap();
    std::fs::write(&broken, "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n").unwrap();
    let with = |path: &str| verify(&format!("as_addr = \"https://a.example/\"\ntrusted_certs = [\"{path}\"]"));
    good(&with(pem.to_str().unwrap()));
    for path in
        [junk.to_str().unwrap(), broken.to_str().unwrap(), dir.path().to_str().unwrap(), "/nonexistent.pem", "ca.pem"]
    {
        only_error(&with(path), "ingress[0].verify.trusted_certs[0]", "bad-certificate");
    }
}

#[test]
fn a_service_has_one_address_or_several_and_speaks_what_is_said() {
    let of = |lines: &str| match &good(&verify(lines)).config.endpoints[0].ra.verify.as_ref().unwrap().provider {
        VerifyProvider::As(service) => service.clone(),
        other => panic!("{other:?}"),
    };
    let two = of("as_addr = [\"https://a.example\", \"http://127.0.0.1:50004/\"]\nas_type = \"grpc\"");
    let shown: Vec<_> = two.addrs.iter().map(|url| url.as_str()).collect();
    assert_eq!(shown, ["https://a.example/", "http://127.0.0.1:50004/"]);
    assert_eq!(two.kind, Some(AsKind::Grpc));
    assert_eq!(of("as_addr = \"https://a.example\"").kind, None);
    let at = "ingress[0].verify.as_addr";
    only_error(&verify("as_addr = []"), at, "bad-count");
    let nine: Vec<_> = (0..9).map(|n| format!("\"https://a{n}.example\"")).collect();
    only_error(&verify(&format!("as_addr = [{}]", nine.join(","))), at, "bad-count");
    only_error(&verify("as_addr = 5"), at, "wrong-type");
    only_error(&verify("as_addr = [\"https://a.example\", \"b\"]"), "ingress[0].verify.as_addr[1]", "bad-url");
    only_error(
        &verify("as_addr = [\"https://a.example\", \"http://192.0.2.1\"]"),
        "ingress[0].verify.as_addr[1]",
        "as-insecure",
    );
    let twice = good(&verify("as_addr = [\"https://a.example\", \"https://a.example/\"]"));
    assert!(warned(&twice, "duplicate"));
    only_error(
        &verify("as_addr = \"https://a.example\"\nas_type = \"soap\""),
        "ingress[0].verify.as_type",
        "unknown-value",
    );
    assert!(warned(&good(&verify("as_addr = \"https://a.example\"\nas_type = \"grpc\"")), "no-anchors"));
    only_error(
        &verify("as_addr = \"https://a.example\"\nas_headers = { grpc-timeout = \"1S\" }"),
        "ingress[0].verify.as_headers.grpc-timeout",
        "bad-header",
    );
}

#[test]
fn trust_is_named_by_files_keys_and_key_sets() {
    let dir = tempfile::tempdir().unwrap();
    let (set, none, junk) = (dir.path().join("set"), dir.path().join("none"), dir.path().join("junk"));
    std::fs::write(&set, r#"{"keys":[{"kty":"RSA"},{"kty":"EC","crv":"P-256","x":"AQ","y":"AQ"}]}"#).unwrap();
    std::fs::write(&none, r#"{"keys":[{"kty":"RSA"}]}"#).unwrap();
    std::fs::write(&junk, "<html>").unwrap();
    let with = |lines: &str| verify(&format!("as_addr = \"https://a.example\"\n{lines}"));
    let (hex, base64) = ("0f".repeat(32), "Dw8PDw8PDw8PDw8PDw8PDw8PDw8PDw8PDw8PDw8PDw8=");
    let pins = good(&with(&format!("trusted_keys = [\"sha256:{hex}\", \"sha256:{base64}\"]")));
    let VerifyProvider::As(service) = &pins.config.endpoints[0].ra.verify.as_ref().unwrap().provider else {
        panic!("sample")
    };
    assert_eq!(service.trusted.keys, [KeyPin([15; 32]); 2]);
    for bad in [hex.as_str(), "sha256:", "sha256:0f", "sha512:0f", &format!("sha256:{}", "zz".repeat(32))] {
        only_error(&with(&format!("trusted_keys = [\"{bad}\"]")), "ingress[0].verify.trusted_keys[0]", "bad-key");
    }
    for source in [set.to_str().unwrap(), "https://keys.example/jwks", "http://127.0.0.1/jwks"] {
        good(&with(&format!("trusted_jwks = \"{source}\"")));
    }
    for (source, reason) in [
        (none.to_str().unwrap(), "bad-key-set"),
        (junk.to_str().unwrap(), "bad-key-set"),
        ("/nonexistent.json", "bad-key-set"),
        ("jwks.json", "bad-url"),
        ("http://192.0.2.1/jwks", "as-insecure"),
    ] {
        only_error(&with(&format!("trusted_jwks = \"{source}\"")), "ingress[0].verify.trusted_jwks", reason);
    }
    for key in ["trusted_certs", "trusted_keys", "trusted_jwks", "as_ca"] {
        only_error(&with(&format!("{key} = []")), &format!("ingress[0].verify.{key}"), "empty");
    }
    only_error(&with("as_ca = \"/nonexistent.pem\""), "ingress[0].verify.as_ca", "bad-certificate");
    let pem = dir.path().join("ca.pem");
    let key = rcgen::KeyPair::generate().unwrap();
    let cert = rcgen::CertificateParams::new(vec!["as.example".into()]).unwrap().self_signed(&key).unwrap();
    std::fs::write(&pem, cert.pem()).unwrap();
    good(&with(&format!("as_ca = {pem:?}")));
    assert!(warned(&good(&verify(&format!("as_addr = \"http://127.0.0.1\"\nas_ca = {pem:?}"))), "no-effect"));
}

#[test]
fn what_can_never_match_is_an_error_and_what_stands_beside_it_is_not() {
    for (to, side) in [("0.0.0.0", "in"), ("::", "in"), ("0.0.0.0/8", "out"), ("::/128", "out"), ("0.1.2.3", "out")] {
        let lines = format!("capture = [{{ to = \"{to}\", port = 30001 }}]");
        let (text, path) = match side {
            "in" => (ingress(&lines), "ingress[0].netfilter.capture[0].to"),
            _ => (egress(&lines), "egress[0].netfilter.capture[0].to"),
        };
        let found = only_error(&text, path, "never-matches");
        assert!(found.hint.unwrap().contains("leave `to` out"));
    }
    netfilter(&egress("capture = [{ to = \"0.0.0.0/0\", port = 30001 }]"));
    for range in ["224.0.0.0/4", "239.1.0.0/16", "ff00::/8", "ff02::1"] {
        let text = ingress(&format!("capture = [{{ to = \"{range}\", port = 1 }}]"));
        only_error(&text, "ingress[0].netfilter.capture[0].to", "bad-address");
    }

    let excluded = |exclude: &str| {
        ingress(&format!("capture = [{{ to = \"192.0.2.0/24\", port = \"8000-8100\" }}]\nexclude = [{exclude}]"))
    };
    for whole in
        ["{ to = \"192.0.0.0/16\" }", "{ port = \"1-9000\" }", "{ to = \"192.0.2.0/24\", port = \"8000-8100\" }"]
    {
        only_error(&excluded(whole), "ingress[0].netfilter.capture[0]", "never-matches");
    }
    let together =
        "{ port = \"8000-8050\" }, { to = \"192.0.2.0/25\" }, { to = \"192.0.2.128/25\", port = \"8051-9000\" }";
    let found = only_error(&excluded(together), "ingress[0].netfilter.capture[0]", "never-matches");
    assert!(found.message.contains("together"), "{found}");
    for part in ["{ to = \"192.0.2.1\" }", "{ port = 8000 }", "{ to = \"192.0.0.0/16\", uid = 0 }"] {
        netfilter(&excluded(part));
    }
}

#[test]
fn captures_that_take_more_along_than_meant_are_warned_of_by_their_effect() {
    let warns = |text: &str, reason: &str| warned(&good(text), reason);
    for dns in ["{ port = 53 }", "{ port = \"1-100\" }", "{ to = \"192.0.2.0/24\" }", "{ port = \"1-65535\", uid = 0 }"]
    {
        assert!(warns(&ingress(&format!("capture = [{dns}]")), "captures-dns"), "{dns}");
    }
    assert!(!warns(&ingress("capture = [{ port = \"54-65535\" }]"), "captures-dns"));
    for exclude in ["{ port = 53 }", "{ to = \"192.0.2.53\", port = 53 }"] {
        let text = ingress(&format!("capture = [{{ port = \"1-100\" }}]\nexclude = [{exclude}]"));
        assert!(!warns(&text, "captures-dns"), "{exclude}");
    }
    assert!(!warns(&egress("capture = [{ port = 53 }]"), "captures-dns"));
    for ssh in ["{ port = 22 }", "{ to = \"192.0.2.1\" }", "{ port = \"1-1000\", iif = \"eth0\" }"] {
        assert!(warns(&egress(&format!("capture = [{ssh}]")), "captures-ssh"), "{ssh}");
    }
    assert!(!warns(&egress("capture = [{ port = \"1-1000\" }]\nexclude = [{ port = 22 }]"), "captures-ssh"));
    let one = "capture = [{ port = 22 }]\nexclude = [{ to = \"192.0.2.1\", port = 22 }]";
    assert!(warns(&egress(one), "captures-ssh"), "the other addresses are captured still");
    let server = "capture = [{ port = \"1-100\" }]\nexclude = [{ to = \"192.0.2.53\" }]";
    assert!(!warns(&ingress(server), "captures-dns"));
    assert!(warns(&ingress("capture = [{ port = 21 }]"), "captures-ftp"));
    assert!(!warns(&ingress("capture = [{ port = \"21-65535\" }]"), "captures-ftp"));
}

#[test]
fn a_service_by_name_under_a_capture_of_everything_is_warned_of_whichever_endpoint_asks_it() {
    let file = |as_addr: &str, capture: &str| {
        format!(
            "[[ingress]]\nname = \"all\"\nno_ra = true\n[ingress.netfilter]\n{capture}\n[[ingress]]\nname = \"asks\"\n\
             [ingress.mapping]\nlisten = \"127.0.0.1:7000\"\ntarget = \"192.0.2.1:1\"\n[ingress.verify]\n\
             as_addr = \"{as_addr}\"\npolicy_ids = [\"default\"]\n"
        )
    };
    let warns = |as_addr: &str, capture: &str| warned(&good(&file(as_addr, capture)), "service-by-name");
    let everything = "capture = [{ port = \"1-65535\" }]";
    assert!(warns("https://as.example/", everything));
    assert!(!warns("https://192.0.2.9/", everything), "by address");
    assert!(!warns("https://as.example/", "capture = [{ port = 8443 }]"), "DNS goes on");
    let excluded = format!("{everything}\nexclude = [{{ to = \"192.0.2.53\", port = 53 }}]");
    assert!(!warns("https://as.example/", &excluded));
    let attest = "[ingress.attest]\nprovider = \"asr\"\nasr_addr = \"http://NAME:8006/\"\nasr_insecure = true\n";
    let asr = |name: &str| format!("{}{}", file("https://192.0.2.9/", everything), attest.replace("NAME", name));
    assert!(warned(&good(&asr("guest.example")), "service-by-name"));
    assert!(!warned(&good(&asr("127.0.0.1")), "service-by-name"));
}
