//! `verify.rego`.

use super::*;

fn file(verify: &str) -> String {
    format!(
        "[[ingress]]\nname = \"a\"\n[ingress.mapping]\nlisten = \"127.0.0.1:1\"\ntarget = \"192.0.2.1:2\"\n\
         [ingress.verify]\n{verify}\n"
    )
}

/// A policy file of this content, and the key that names it.
fn policy(content: &[u8]) -> (tempfile::TempDir, String) {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("policy.rego");
    std::fs::write(&path, content).unwrap();
    let key = format!("rego = \"{}\"", path.display());
    (dir, key)
}

#[test]
fn a_policy_goes_with_an_appraisal_in_process_and_is_part_of_what_is_compared() {
    let (dir, key) = policy(b"package tng\nallow := true\n");
    let read = |provider: &str| {
        let loaded = good(&file(&format!("provider = \"{provider}\"\nallow_sample = true\n{key}")));
        (loaded.config.endpoints[0].ra.verify.clone().unwrap(), loaded.warnings)
    };
    for provider in ["builtin", "sample"] {
        let (verify, warnings) = read(provider);
        // Without references the policy decides.
        assert_eq!(warnings.iter().map(|w| w.reason).collect::<Vec<_>>(), ["sample"], "{provider}");
        let [id] = verify.policy_ids.as_slice() else { panic!("{:?}", verify.policy_ids) };
        assert!(id.starts_with("rego:sha256:") && id.len() == 12 + 64, "{id}");
        std::fs::write(dir.path().join("policy.rego"), "package tng\nallow := false\n").unwrap();
        let changed = read(provider).0;
        assert!(changed != verify && changed.policy_ids != verify.policy_ids);
        std::fs::write(dir.path().join("policy.rego"), "package tng\nallow := true\n").unwrap();
        assert_eq!(read(provider).0, verify);
    }
    for other in [
        "as_addr = \"http://127.0.0.1:8080/\"",
        "model = \"passport\"\ntrusted_keys = [\"sha256:0000000000000000000000000000000000000000000000000000000000000000\"]",
    ] {
        let found = only_error(&file(&format!("{other}\n{key}")), "ingress[0].verify.rego", "contradiction");
        assert!(found.hint.unwrap().contains("policy_ids"));
    }
}

#[test]
fn a_mistake_in_a_policy_is_one_of_the_configuration_and_has_both_places() {
    let (dir, key) = policy(b"package tng\nallow if {\n  input.tee = = \"snp\"\n}\n");
    let text = file(&format!("provider = \"sample\"\nallow_sample = true\n{key}"));
    let found = only_error(&text, "ingress[0].verify.rego", "bad-rego");
    assert_eq!((found.line, found.column), (Some(9), Some(8)));
    assert!(found.message.starts_with(&format!("{}/policy.rego:3:15: ", dir.path().display())), "{}", found.message);

    for (content, words) in [
        (&b"package tng\nallow if http.send({})\n"[..], "policy.rego:2:10: there is no function http.send"),
        (b"package tng\nallow if f(1)\nf(x) := f(x)\n", "policy.rego:3:9: the function f calls itself"),
        (b"package tng\nallow if \xff\n", "is not UTF-8"),
        (&[b'#'; 70_000], "64 KiB"),
        (b"", "policy.rego:1:"),
    ] {
        let (_dir, key) = policy(content);
        let text = file(&format!("provider = \"sample\"\nallow_sample = true\n{key}"));
        let found = only_error(&text, "ingress[0].verify.rego", "bad-rego");
        assert!(found.message.contains(words), "{}", found.message);
    }
    for path in ["policy.rego", "/nonexistent/policy.rego", "/etc", ""] {
        let text = file(&format!("provider = \"sample\"\nallow_sample = true\nrego = \"{path}\""));
        only_error(&text, "ingress[0].verify.rego", "bad-rego");
    }
}

#[test]
fn check_names_the_policy() {
    let (dir, key) = policy(b"package tng\nallow := true\n");
    let config = dir.path().join("a.toml");
    std::fs::write(&config, file(&format!("provider = \"sample\"\nallow_sample = true\n{key}"))).unwrap();
    let checked = |path: &Path| check_command("tngd", &[path.display().to_string()], false, |_| Vec::new());
    let fine = checked(&config);
    assert_eq!(fine.code, 0, "{}", fine.stderr);
    assert!(fine.stdout.contains("policy.rego (rego:sha256:"), "{}", fine.stdout);
    std::fs::write(dir.path().join("policy.rego"), "package tng\nallow if\n").unwrap();
    let bad = checked(&config);
    assert_eq!(bad.code, EX_CONFIG);
    assert!(bad.stderr.contains("a.toml:9:8: ") && bad.stderr.contains("policy.rego:"), "{}", bad.stderr);
}

#[tokio::test]
async fn the_example_of_a_policy_lets_in_what_it_says() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("etc/tng/policy.rego");
    let text = std::fs::read_to_string(path).unwrap();
    let policy = crate::attest::rego::Policy::compile(&text).unwrap_or_else(|problem| panic!("{problem}"));
    let guest = |vmpl: u64, bound_to: &str| {
        serde_json::json!({"tee": "snp", "bound_to": bound_to, "claims": {
            "measurement": "c3".repeat(48), "vmpl": vmpl, "tcb_snp": 20,
        }})
    };
    assert_eq!(policy.judge(guest(0, "session")).await, Ok(()));
    let refused = async |document| policy.judge(document).await.unwrap_err().to_string();
    assert!(refused(guest(2, "session")).await.contains("allow is false"));
    assert!(refused(guest(0, "certificate")).await.contains("cannot bind its evidence"));
    let td = |advisory: &str| {
        serde_json::json!({"tee": "tdx", "bound_to": "session", "claims": {
            "mr_td": "c4".repeat(48), "tcb_date": "2026-02-11T00:00:00Z", "advisories": [advisory],
        }})
    };
    assert_eq!(policy.judge(td("INTEL-SA-00837")).await, Ok(()));
    assert!(refused(td("INTEL-SA-99999")).await.contains("INTEL-SA-99999"));
}
